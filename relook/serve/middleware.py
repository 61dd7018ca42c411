"""What stands before every request: the key, the size and pace of its body, and how many there may be at once.

It decides from the head alone where it can, before a byte of the body is read.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from relook.serve.protocol import APIError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Scope = MutableMapping[str, Any]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
LINGER, LINGER_BYTES = 1.0, 64_000_000  # seconds, and bytes, that a refused client may go on sending
OPEN = ("/health",)  # asked by balancers, which have no key


@dataclass
class Gate:
    """ASGI middleware.

    Args:
        api_key: that each request must carry as a bearer token; empty for none.
        challenge: what a request without it is told to bring. With "Basic ..." browsers ask their user for it, and it
            is taken as the password of any name.
        max_body: bytes of one body.
        max_held: bytes of the bodies of all requests that are being answered.
        max_requests: that are being received or answered.
        seconds: for a body to arrive.
    """

    app: App
    api_key: str = ""
    max_body: int = 50_000_000
    max_held: int = 400_000_000
    max_requests: int = 1024
    seconds: float = 30.0
    challenge: str = "Bearer"
    held: int = 0
    requests: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        self.requests += 1
        body = b""
        try:
            headers = dict(scope["headers"])
            if scope["path"] not in OPEN:
                self._check(headers.get(b"authorization", b""))
            body = await self._body(headers, receive)
        except APIError as error:
            await self._refuse(error, receive, send)
        except asyncio.CancelledError:  # the server stops; what comes half is thrown away
            await refuse(send, APIError(503, "The server is stopping."))
        else:
            await self.app(scope, replay(body, receive), send)
        finally:
            self.held -= len(body)
            self.requests -= 1
        return None

    def _check(self, authorization: bytes) -> None:
        if self.api_key and not hmac.compare_digest(self._key(authorization), self.api_key.encode()):
            raise APIError(401, "The API key is missing or wrong.", "invalid_api_key")
        if self.requests > self.max_requests:
            raise APIError(429, "The server holds as many requests as it can.", "busy")

    def _key(self, authorization: bytes) -> bytes:
        """The key that a request carries; empty where it carries none."""
        scheme, _, sent = authorization.partition(b" ")
        if scheme.lower() == b"basic" and self.challenge.startswith("Basic"):
            try:
                return base64.b64decode(sent).partition(b":")[2]
            except binascii.Error:
                return b""
        return sent.strip() if scheme.lower() == b"bearer" else b""

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The whole body, counted as it comes."""
        declared = headers.get(b"content-length", b"0")
        self._check_size(int(declared), int(declared))
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise APIError(400, "The client went away.")
                    chunk = message.get("body", b"")
                    self._check_size(size + len(chunk), len(chunk))
                    chunks.append(chunk)
                    size += len(chunk)
                    self.held += len(chunk)
                    more = message.get("more_body", False)
        except BaseException as error:
            self.held -= size
            if isinstance(error, TimeoutError):
                raise APIError(408, f"The body did not arrive within {self.seconds:.0f} s.") from None
            raise
        return b"".join(chunks)

    def _check_size(self, size: int, new: int) -> None:
        if size > self.max_body:
            raise APIError(413, f"The request has more than {self.max_body:,} bytes.")
        if self.held + new > self.max_held:
            raise APIError(429, "The server holds as many requests as it can.", "busy")

    async def _refuse(self, error: APIError, receive: Receive, send: Send) -> None:
        """Answer, and close. A client that is still sending would not see the answer if it were closed at once: what
        it sends meanwhile is read and thrown away, for a moment."""
        challenge = {"WWW-Authenticate": self.challenge} if error.status == 401 else {}
        await refuse(send, error, challenge, more=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER):
                thrown, more = 0, True
                while more and thrown < LINGER_BYTES:
                    message = await receive()
                    thrown, more = thrown + len(message.get("body", b"")), message.get("more_body", False)
        await send({"type": "http.response.body", "body": b""})


async def refuse(
    send: Send, error: APIError, more_headers: Mapping[str, str] | None = None, more: bool = False
) -> None:
    """Answer with an error; with `more`, the caller ends the answer."""
    content = json.dumps(error.body).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), "Connection": "close"}
    pairs = [
        (name.lower().encode(), value.encode())
        for name, value in {**headers, **error.headers, **(more_headers or {})}.items()
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": content, "more_body": more})


def replay(body: bytes, receive: Receive) -> Receive:
    """The body in one piece, then what else comes, which is that the client goes away."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed
