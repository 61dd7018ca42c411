"""Thread pools on which requests are read, so that the event loop answers others meanwhile."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.exceptions import HTTPException

from relook.generate.engine import DECODERS

Result = TypeVar("Result")
FETCHES = 16  # image files at a time
# Strings, commas and brackets of a body. 10,000 messages have 70,000, and images are a string each.
JSON_TOKENS = 100_000


@dataclass(frozen=True)
class Readers:
    """Hold the thread pools: queued work can be cancelled, and texts never wait for images."""

    texts: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "texts"))
    fetches: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(FETCHES, "fetches"))
    decodes: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(DECODERS, "decodes"))


async def on(pool: ThreadPoolExecutor, work: Callable[..., Result], *args: Any) -> Result:
    """Call a function on a thread of a pool. If the caller is cancelled, work that has not begun never does."""
    return await asyncio.get_running_loop().run_in_executor(pool, work, *args)


def parse_body(body: bytes) -> Any:
    """Parse a JSON body, unless it has so many values that they would fill the memory.

    Raises:
        HTTPException: it has too many values.
        ValueError: it is not JSON in UTF-8, or has NaN or Infinity, which Python would read.
    """
    # Parsed, each value takes about a hundred bytes, so values are counted first. Escaped quotation marks do not
    # end a string; without them every second piece between quotation marks lies outside of strings.
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    tokens = plain.count(b'"') // 2
    if tokens <= JSON_TOKENS:  # else there is no need to cut it at every quotation mark
        between = b"".join(plain.split(b'"')[::2])
        tokens += sum(between.count(sign) for sign in (b",", b"[", b"{"))
    if tokens > JSON_TOKENS:
        raise HTTPException(400, "The body has too many messages or parts for any model to read. Shorten it.")
    return json.loads(body.decode("utf-8-sig"), parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> None:
    raise json.JSONDecodeError(f"{name} is no value", name, 0)
