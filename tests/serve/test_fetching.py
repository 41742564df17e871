"""Remote files: only from public addresses, also after redirects and name look-ups."""

import asyncio
import contextlib
import http.server
import threading
import time

import pytest

from lmm_jax.serve.errors import ApiError
from lmm_jax.serve.fetching import fetch, is_public

PRIVATE = (
    "127.0.0.1 127.8.9.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 255.255.255.255 "
    "192.0.2.1 198.18.0.1 ::1 :: fe80::1 fe80::1%eth0 fc00::1 fd12::1 ff02::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 2002:7f00:1:: "
    "64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 2001:db8::1 64:ff9b:1::a00:1 fec0::1 ::10.0.0.1 ::ffff:0:127.0.0.1"
)


@pytest.mark.parametrize("address", PRIVATE.split())
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_addresses_that_are(address):
    assert is_public(address)


class Pages(http.server.BaseHTTPRequestHandler):
    """A server to fetch from."""

    asked = []

    def do_GET(self):
        self.asked.append((self.path, self.headers["Host"]))
        with contextlib.suppress(OSError):
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", self.path.removeprefix("/to/"))
                self.end_headers()
            elif self.path == "/slow":
                self.send_response(200)
                self.end_headers()
                for _ in range(200):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            elif self.path == "/large":
                self.send_response(200)
                self.end_headers()
                self.wfile.write(bytes(200_000))
            else:
                self.send_response(200 if self.path == "/picture" else 404)
                self.end_headers()
                self.wfile.write(b"content")

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def pages():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def get(url, folder, allows=lambda address: True, **limits):
    asyncio.run(fetch(url, folder / "got", **{"max_bytes": 100_000, "seconds": 5} | limits, allows=allows))
    return (folder / "got").read_bytes()


def test_what_is_allowed_is_fetched(pages, tmp_path):
    assert get(f"http://127.0.0.1:{pages}/picture", tmp_path) == b"content"
    assert get(f"http://localhost:{pages}/picture#part", tmp_path) == b"content"
    assert get(f"http://127.0.0.1:{pages}/to/http://localhost:{pages}/picture", tmp_path) == b"content"
    assert ("/picture", f"localhost:{pages}") in Pages.asked


def test_private_addresses_are_refused_before_anything_is_sent(pages, tmp_path):
    before = len(Pages.asked)
    for host in ("127.0.0.1", "localhost", "[::1]", "127.1", "2130706433", "0x7f000001"):
        with pytest.raises(ApiError):
            get(f"http://{host}:{pages}/picture", tmp_path, is_public)
    assert len(Pages.asked) == before


def test_a_redirect_to_a_private_address_is_refused(pages, tmp_path):
    checked = []

    def first_only(address):
        checked.append(address)
        return len(checked) == 1

    with pytest.raises(ApiError, match="public"):
        get(f"http://127.0.0.1:{pages}/to/http://localhost:{pages}/picture", tmp_path, first_only)
    assert len(checked) >= 2


@pytest.mark.parametrize(
    "path, word",
    [
        ("/large", "larger than 0.1 MB"),
        ("/slow", "longer than 0.5"),
        ("/nothing", "status 404"),
        ("/to/ftp://x/y", "not a URL"),
    ],
)
def test_what_cannot_be_fetched(pages, tmp_path, path, word):
    with pytest.raises(ApiError, match=word):
        get(f"http://127.0.0.1:{pages}{path}", tmp_path, seconds=0.5)


def test_redirects_end(pages, tmp_path):
    loop = "/to/" * 6 + "/picture"
    with pytest.raises(ApiError, match="redirects"):
        get(f"http://127.0.0.1:{pages}{loop}", tmp_path)


@pytest.mark.parametrize(
    "url", ["ftp://x/y", "http://", "http://u:p@x/y", "gopher://x", "http://x:99999/", "http://exa mple/", "http://\u2603/"]
)
def test_what_is_no_url(url, tmp_path):
    with pytest.raises(ApiError):
        get(url, tmp_path)


def test_a_server_that_is_not_there(tmp_path):
    with pytest.raises(ApiError, match="cannot be fetched"):
        get("http://127.0.0.1:9/picture", tmp_path)
    with pytest.raises(ApiError):
        get("http://nobody.invalid/picture", tmp_path)
