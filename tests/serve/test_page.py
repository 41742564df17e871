"""The page in a real browser: Debian's or any other Chromium that is installed."""

import itertools
import random
import re
import shutil
import time
from pathlib import Path

import pytest

import lmm_jax

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1000, "height": 800})
        context.set_default_timeout(120_000)  # a machine may have other things to do
        yield context
        browser.close()


def test_ask_stop_and_look(start, browser, media):
    server = start(page=True)
    page, asked = browser.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    box, chat = page.locator("#question textarea"), page.locator("#chat")

    page.get_by_text("What colour is the circle?").first.click()
    page.locator("#question img").first.wait_for()
    box.press("Enter")
    chat.locator(".timing").wait_for()
    assert "red" in chat.inner_text()
    assert re.search(r"encoded in [\d.]+ s · first token after [\d.]+ s", chat.inner_text())

    page.locator("#where").click()
    page.locator("#map img").wait_for()

    box.fill("What colour is the square?")  # the picture is still there
    box.press("Enter")
    chat.locator(".timing").nth(1).wait_for()
    alone = lmm_jax.load().chat()
    alone.ask("What colour is the circle?", [str(media / "shapes.png")])
    assert f"What colour is the square?\n\n{alone.ask('What colour is the square?')}\n" in chat.inner_text()

    page.locator("#new").click()
    page.get_by_text("Nothing was asked yet.").wait_for()
    page.locator("#question input[type=file]").set_input_files(str(media / "moving.mp4"))
    page.locator("#question").get_by_role("button", name=re.compile("remove", re.I)).or_(
        page.locator("#question .thumbnail-item")
    ).first.wait_for()
    box.fill("Which way does the circle move?")
    box.press("Enter")
    chat.locator(".timing").wait_for()
    assert "right" in chat.inner_text()

    page.set_viewport_size({"width": 375, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    assert all(url.startswith((server.url, "data:", "blob:")) for url in asked), "everything comes from the server"


def test_stop_ends_the_answer(start, browser, monkeypatch):
    from lmm_jax.inference import live
    from lmm_jax.serve import page as page_module

    sampling, advance = page_module.Sampling, live.Slots.advance

    def slowly(*args):  # so that there is time to stop it
        time.sleep(0.1)
        advance(*args)

    monkeypatch.setattr(live, "MOST_STEPS", 1)
    monkeypatch.setattr(live.Slots, "advance", slowly)
    monkeypatch.setattr(page_module, "Sampling", lambda **of: sampling(**of | {"ignore_eos": True, "max_new_tokens": 2000}))
    server = start(page=True)
    page = browser.new_page()
    page.goto(server.url)
    box = page.locator("#question textarea")
    box.fill("Describe it.")
    box.press("Enter")
    page.locator("#chat .bot").first.wait_for()
    page.locator("#stop").click()
    page.get_by_text("stopped: this turn is forgotten").wait_for()
    from serve.conftest import until

    until(server.is_idle, 5)


def test_a_file_that_is_no_picture_is_told(start, browser, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    server = start(page=True)
    page = browser.new_page()
    page.goto(server.url)
    page.locator("#question input[type=file]").set_input_files(str(tmp_path / "broken.png"))
    page.locator("#question .thumbnail-item").first.wait_for()
    box = page.locator("#question textarea")
    box.fill("What is this?")
    box.press("Enter")
    page.get_by_text("is not a picture").or_(page.get_by_text("cannot be read as a picture")).first.wait_for()


def test_the_page_wants_the_key(start):
    server = start(page=True, api_key="s3cret")
    with server.http() as client:
        assert "s3cret" not in client.get("/").text
        assert client.post("/login", data={"username": "a", "password": "wrong"}).status_code == 400
        assert client.get("/gradio_api/info").status_code == 401
        assert client.post("/login", data={"username": "a", "password": "s3cret"}).status_code == 200


OUTSIDE = ("/etc/hostname", "../../../etc/hostname", "http://example.com/x.png", "http://127.0.0.1:1/x.png")


def test_nothing_of_the_servers_disk_or_network_comes_through_the_page(start):
    """By the routes that Gradio offers, and by files that a browser names in its place."""
    server = start(page=True)
    secret = Path("/etc/hostname").read_text().strip()
    before = {p for p in server.service.folder.rglob("*") if p.is_file()}
    with server.http(follow_redirects=False) as client:
        for path in (*OUTSIDE, "pyproject.toml", f"{server.service.folder}/page/../../../../etc/hostname"):
            for route in (f"/gradio_api/file={path}", f"/file={path}", f"/gradio_api/proxy={path}"):
                response = client.get(route)
                assert response.status_code >= 300 and secret not in response.text and "[project]" not in response.text
        for route in ("run-history", "process_recording", "component_server", "dev/reload", "monitoring", "deep_link"):
            assert client.get(f"/gradio_api/{route}").status_code == 404
            assert client.post(f"/gradio_api/{route}", json={}).status_code == 404
        dependencies = client.get("/config").json()["dependencies"]
        for number, path in itertools.product(range(len(dependencies)), OUTSIDE):
            file = {"path": path, "url": path, "meta": {"_type": "gradio.FileData"}}
            shown = [{"role": "user", "content": [{"type": "file", "file": file}]}]
            given = [{"text": "What?", "files": [file]}, shown, file, None][: len(dependencies[number]["inputs"])]
            told = ""
            for data in (given, [shown] * len(given), [file] * len(given)):
                body = {"data": data, "fn_index": number, "session_hash": "abc", "event_data": None, "trigger_id": 1}
                told += client.post("/gradio_api/run/predict", json=body).text
                told += client.post("/gradio_api/queue/join", json=body).text
            assert secret not in told
        with client.stream("GET", "/gradio_api/queue/data?session_hash=abc") as stream:
            for line in stream.iter_lines():
                assert secret not in line and "hostname" not in line
                if "close_stream" in line:
                    break
    new = {p for p in server.service.folder.rglob("*") if p.is_file()} - before
    assert not any(secret in p.read_bytes().decode("latin-1") for p in new)


def test_pages_of_other_servers_may_not_use_this_one(start):
    server = start(page=True)
    with server.http() as client:
        for path in ("/v1/files", "/v1/chat/completions", "/gradio_api/upload", "/gradio_api/queue/join"):
            foreign = client.post(path, headers={"Origin": "https://example.com"}, content=b"{}")
            assert foreign.status_code == 403 and foreign.json()["error"]["code"] == "foreign_page"
            assert client.post(path, headers={"Origin": server.url}, content=b"{}").status_code != 403


def test_random_bodies_to_the_page(start):
    server, random_of = start(page=True), random.Random(5)
    with server.http() as client:
        for _ in range(150):
            near = b'{"data": [[[]]], "fn_index": %d}' % random_of.randrange(-3, 9)
            route = random_of.choice(("run/predict", "queue/join", "upload", "cancel", "reset"))
            client.post(f"/gradio_api/{route}", content=random_of.choice((random_of.randbytes(100), near)))
        assert client.get("/health").json() == {"status": "ok"} and client.get("/").status_code == 200
