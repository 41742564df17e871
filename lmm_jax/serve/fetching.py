"""Pictures and videos that a client names by an http(s) URL, where the server allows it.

A client could otherwise make the server ask its own network: every address that is connected to, also after a redirect, must
be a public one. It is looked up once and connected to as it was checked, so that a name cannot change between.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore

from lmm_jax.serve.errors import ApiError

_REDIRECTS = 3
# site-local, and addresses that wrap one of an IPv4 network that may be this one's
_NOT_PUBLIC = [ipaddress.ip_network(n) for n in ("fec0::/10", "64:ff9b:1::/48", "::/96", "::ffff:0:0:0/96")]
_MOVED = (301, 302, 303, 307, 308)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet; those that only wrap another are as that one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if any(ip in network for network in _NOT_PUBLIC):
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(ip.packed[-4:])
        if inner:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


class _Guarded(httpcore.AsyncNetworkBackend):
    """Connects to addresses that were checked."""

    def __init__(self, allows: Callable[[str], bool]) -> None:
        self._backend, self._allows = httpcore.AnyIOBackend(), allows

    async def connect_tcp(self, host: str, port: int, **options: Any) -> httpcore.AsyncNetworkStream:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(f"{host} is not known") from error
        addresses = [info[4][0] for info in found]
        if not addresses or not all(self._allows(a) for a in addresses):
            raise ApiError(400, f"{host} is not a public address: only pictures and videos of the internet are fetched")
        for address in addresses[:-1]:
            with contextlib.suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                return await self._backend.connect_tcp(address, port, **options)
        return await self._backend.connect_tcp(addresses[-1], port, **options)

    async def connect_unix_socket(self, path: str, **options: Any) -> httpcore.AsyncNetworkStream:
        raise ApiError(400, "only http and https URLs are fetched")

    async def sleep(self, seconds: float) -> None:
        await self._backend.sleep(seconds)


async def fetch(url: str, into: Path, *, max_bytes: int, seconds: float, allows: Callable[[str], bool] = is_public) -> None:
    """Writes what a URL leads to into a file.

    Raises:
      ApiError: no http(s) URL, a private address, too many redirects, any answer but 200, too large or too slow.
    """
    try:
        async with asyncio.timeout(seconds), httpcore.AsyncConnectionPool(network_backend=_Guarded(allows)) as pool:
            for _ in range(1 + _REDIRECTS):
                async with _asked(pool, url) as response:
                    if response.status not in _MOVED:
                        return await _write(response, url, into, max_bytes)
                    url = urljoin(url, _header(response.headers, b"location"))
    except TimeoutError:
        raise ApiError(400, f"{_short(url)} took longer than {seconds:g} seconds to fetch") from None
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, httpcore.UnsupportedProtocol) as error:
        raise ApiError(400, f"{_short(url)} cannot be fetched ({error or type(error).__name__})") from error
    raise ApiError(400, f"{_short(url)} cannot be fetched: more than {_REDIRECTS} redirects")


@contextlib.asynccontextmanager
async def _asked(pool: httpcore.AsyncConnectionPool, url: str) -> AsyncIterator[httpcore.Response]:
    try:
        parts = urlsplit(url)
        is_web = parts.scheme in ("http", "https") and parts.hostname and not parts.username and not parts.password
        if not is_web:
            raise ValueError("expected http:// or https://, and a host")
        parts.port  # noqa: B018  raises where it is none
        plain = parts._replace(fragment="").geturl().encode("ascii")
    except (ValueError, UnicodeError) as error:
        raise ApiError(400, f"{_short(url)} is not a URL that can be fetched: {error}") from None
    headers = {"Host": parts.netloc, "User-Agent": "lmm-jax", "Accept": "image/*, video/*", "Accept-Encoding": "identity"}
    async with pool.stream("GET", plain, headers=headers) as response:
        yield response


async def _write(response: httpcore.Response, url: str, into: Path, max_bytes: int) -> None:
    if response.status != 200:
        raise ApiError(400, f"{_short(url)} cannot be fetched: its server answers with status {response.status}")
    size = 0
    with open(into, "wb") as file:
        async for piece in response.aiter_stream():
            size += len(piece)
            if size > max_bytes:
                raise ApiError(413, f"{_short(url)} is larger than {max_bytes / 1e6:g} MB")
            file.write(piece)


def _header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in headers if key.lower() == name), "")


def _short(url: str) -> str:
    return url if len(url) <= 100 else f"{url[:100]}…"
