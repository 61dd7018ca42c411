"""An HTTP client for endpoints that are not trusted: bodies have a largest size, also once they are unpacked, and
requests stay with the server that they were meant for."""

from __future__ import annotations

import contextlib
import zlib
from typing import Any

from openai import DefaultAsyncHttpxClient

LONGEST_BODY = 4_000_000  # bytes; what follows is dropped
REDIRECTS = 5
GZIP = 16 + zlib.MAX_WBITS
OF_BODY = ("content-encoding", "content-length", "transfer-encoding")  # headers that hold for the body as it was sent


class BoundedClient(DefaultAsyncHttpxClient):
    """OpenAI's client asks through it. A response that redirects elsewhere is returned as it is."""

    async def send(self, request: Any, **options: Any) -> Any:
        """Send a request and read the response, up to one byte more than `LONGEST_BODY`."""
        request.headers["Accept-Encoding"] = "gzip"
        options |= {"stream": True, "follow_redirects": False}
        followed = 0
        while True:
            # Follow redirects here, one at a time: httpx would carry the key and the prompt to any host.
            response = await super().send(request, **options)
            try:
                following = response.next_request
                if following is None or followed == REDIRECTS or not _same_server(request.url, following.url):
                    return await _read(response)
            finally:
                await response.aclose()
            request, followed = following, followed + 1


def _same_server(url: Any, other: Any) -> bool:
    """Return True if both URLs are one server, or `other` is the same host over TLS."""
    secured = (url.scheme, other.scheme) == ("http", "https") and {url.port, other.port} <= {None, 80, 443}
    return url.host == other.host and (secured or (url.scheme, url.port) == (other.scheme, other.port))


async def _read(response: Any) -> Any:
    """Read a response's body into a new response. A body that is neither plain nor gzip stays encoded."""
    encoding = response.headers.get("Content-Encoding", "")
    unpack = zlib.decompressobj(GZIP) if encoding.lower() in ("gzip", "x-gzip") else None
    body = bytearray()
    with contextlib.suppress(zlib.error):  # what could be unpacked is no whole JSON then
        async for chunk in response.aiter_raw():
            # Bound the unpacked size: a gzip bomb of a few kilobytes unpacks to gigabytes.
            room = LONGEST_BODY + 1 - len(body)
            body += unpack.decompress(chunk, room) if unpack else chunk[:room]
            if len(body) > LONGEST_BODY:
                break
    headers = [(name, value) for name, value in response.headers.multi_items() if name.lower() not in OF_BODY]
    return type(response)(response.status_code, headers=headers, content=bytes(body), request=response.request)
