"""A chat-completion endpoint on this machine that answers as it is told, for tests of judges."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Request = dict[str, Any]


@dataclass
class Answer:
    """What the endpoint sends back.

    Args:
        body: of the response; None for a chat completion with `text`.
        data: of the response instead, as it is.
        short: bytes that are announced and never sent.
        delay: seconds before the response.
    """

    text: Any = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: str | None = None
    data: bytes = b""
    short: int = 0
    delay: float = 0.0


@dataclass
class Endpoint:
    url: str
    requests: list[Request]
    keys: list[str]

    @property
    def prompts(self) -> list[str]:
        return [request["messages"][0]["content"] for request in self.requests]


def completion(text: Any) -> str:
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage})


@contextmanager
def endpoint(answer: Callable[[Request, int], Answer], pages: Mapping[str, Any] | None = None) -> Iterator[Endpoint]:
    """Serve `answer(request, how many requests came before)`; the requests are noted. GET finds JSON among `pages`."""
    lock, requests, keys = threading.Lock(), [], []  # type: ignore[var-annotated]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else a body waits 40 ms for the acknowledgement of its headers

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(requests)
                requests.append(request)
                keys.append(self.headers.get("Authorization", ""))
            said = answer(request, number)
            time.sleep(said.delay)
            body = said.data or (completion(said.text) if said.body is None else said.body).encode()
            try:
                self.send_response(said.status)
                for name, value in said.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body) + said.short))
                self.end_headers()
                self.wfile.write(body)
                self.close_connection = bool(said.short)
            except OSError:
                self.close_connection = True  # the client waited no longer

        def do_GET(self) -> None:
            body = json.dumps((pages or {}).get(self.path)).encode()
            self.send_response(200 if self.path in (pages or {}) else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            pass  # clients that are killed, or that wait no longer

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield Endpoint(f"http://127.0.0.1:{server.server_address[1]}/v1", requests, keys)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
