"""Checks before every request: the key, the host, the size and pace of its body, and how many there may be at once.

Where the headers suffice, a request is refused before a byte of its body is read.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from relook.serve.protocol import APIError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Scope = MutableMapping[str, Any]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
DRAIN_SECONDS, DRAIN_BYTES = 1.0, 64_000_000  # for which a refused client may go on sending
OPEN = ("/health",)  # asked by load balancers, which have no key
HOST = re.compile(r"([a-z0-9._-]+|\[[0-9a-f:.]+\])(:\d*)?", re.ASCII)


@dataclass
class RequestGate:
    """Check key, size, pace and number of requests, as ASGI middleware.

    Args:
        api_key: that each request must carry as a bearer token; empty for none.
        challenge: the WWW-Authenticate header of a request without the key. With "Basic ..." browsers ask their user
            for it, and it is taken as the password of any user name.
        max_body: bytes of one body.
        max_held: bytes of the bodies of all requests that are being received or answered.
        max_requests: how many are received or answered at once.
        seconds: within which a body must arrive.
    """

    app: App
    api_key: str = ""
    max_body: int = 50_000_000
    max_held: int = 400_000_000
    max_requests: int = 1024
    seconds: float = 30.0
    challenge: str = "Bearer"
    held_bytes: int = 0
    requests: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        self.requests += 1
        body, answering = b"", False
        # The API counts the seconds of a request from here.
        scope.setdefault("state", {})["arrived"] = time.monotonic()

        # Once the head of an answer is out, no error can be sent in its place.
        async def sent(message: Message) -> None:
            nonlocal answering
            answering = True
            await send(message)

        try:
            headers = dict(scope["headers"])
            if scope["path"] not in OPEN:
                self._check(headers.get(b"authorization", b""))
            body = await self._body(headers, receive)
            await self.app(scope, replay(body, receive), sent)
        except APIError as error:
            await turn_away(error, receive, send, {"WWW-Authenticate": self.challenge} if error.status == 401 else {})
        except asyncio.CancelledError:  # the server stops; an answer that has begun is cut off
            if not answering:
                await refuse(send, APIError(503, "The server is stopping."))
        finally:
            self.held_bytes -= len(body)
            self.requests -= 1
        return None

    def _check(self, authorization: bytes) -> None:
        # In constant time: the time of a comparison would tell how many characters of a guess are right.
        if self.api_key and not hmac.compare_digest(self._key(authorization), self.api_key.encode()):
            raise APIError(401, "The API key is missing or wrong.", "invalid_api_key")
        if self.requests > self.max_requests:
            raise APIError(429, "The server holds as many requests as it can.", "busy")

    def _key(self, authorization: bytes) -> bytes:
        """Return the key that a request carries; empty if it carries no key."""
        scheme, _, sent = authorization.partition(b" ")
        if scheme.lower() == b"basic" and self.challenge.startswith("Basic"):
            try:
                return base64.b64decode(sent).partition(b":")[2]
            except binascii.Error:
                return b""
        return sent.strip() if scheme.lower() == b"bearer" else b""

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """Receive the whole body, counted as it comes."""
        # Refused by its declared size before a byte is read; a chunked body declares none and is counted below.
        declared = headers.get(b"content-length", b"0")
        self._check_size(int(declared), int(declared))
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.seconds):
                unfinished = True
                while unfinished:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise APIError(400, "The client went away.")
                    chunk = message.get("body", b"")
                    self._check_size(size + len(chunk), len(chunk))
                    chunks.append(chunk)
                    size += len(chunk)
                    self.held_bytes += len(chunk)
                    unfinished = message.get("more_body", False)
        except BaseException as error:  # also where the request is cancelled: its bytes are not held any more
            self.held_bytes -= size
            if isinstance(error, TimeoutError):
                raise APIError(408, f"The body did not arrive within {self.seconds:.0f} s.") from None
            raise
        return b"".join(chunks)

    def _check_size(self, size: int, new: int) -> None:
        if size > self.max_body:
            raise APIError(413, f"The request has more than {self.max_body:,} bytes.")
        if self.held_bytes + new > self.max_held:
            raise APIError(429, "The server holds as many requests as it can.", "busy")


@dataclass(frozen=True)
class OwnNames:
    """Answer to some hosts only, as ASGI middleware.

    A page on the web can let its own name lead to this machine (DNS rebinding), and browsers then take the server for
    that page's; but they send the name, as `Host`.

    Args:
        hosts: in lower case, without ports, IPv6 addresses in brackets.
    """

    app: App
    hosts: frozenset[str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = dict(scope.get("headers", ())).get(b"host")
        if host is None or host_name(host.decode("latin-1")) in self.hosts:  # without one it is no browser
            return await self.app(scope, receive, send)
        error = APIError(403, "The server is not known by this Host. Its owner can allow more: --allow-host NAME.")
        return await turn_away(error, receive, send)


def host_name(host: str) -> str:
    """Return the name in a `Host` header in lower case and without its port; empty if it is malformed."""
    match = HOST.fullmatch(host.lower())
    return match[1] if match else ""


async def turn_away(error: APIError, receive: Receive, send: Send, headers: Mapping[str, str] | None = None) -> None:
    """Answer with an error, and close."""
    # A client that is still sending would not see the answer if the connection closed at once: for a moment what it
    # sends is read and thrown away.
    await refuse(send, error, headers, unfinished=True)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            discarded, unfinished = 0, True
            while unfinished and discarded < DRAIN_BYTES:
                message = await receive()
                discarded, unfinished = discarded + len(message.get("body", b"")), message.get("more_body", False)
    await send({"type": "http.response.body", "body": b""})


async def refuse(
    send: Send, error: APIError, extra_headers: Mapping[str, str] | None = None, unfinished: bool = False
) -> None:
    """Answer with an error; with `unfinished`, the caller ends the answer."""
    content = json.dumps(error.body).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), "Connection": "close"}
    pairs = [
        (name.lower().encode(), value.encode())
        for name, value in {**headers, **error.headers, **(extra_headers or {})}.items()
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": content, "more_body": unfinished})


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body in one piece, then what else comes: that the client has gone away."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed
