"""Serving: many clients of `relook serve` at once, and the engine's tokens a second beside plain `generate`.

    python benchmarks/serving.py clients --seconds 60 --out serving.json   # toyworld's base, two cores, over HTTP
    python benchmarks/serving.py tokens --out tokens.json                  # LLaVA-1.5-7B's shape, one GPU, no HTTP
    python benchmarks/serving.py tokens --tiny                             # the same on a CPU, in seconds
    python benchmarks/serving.py http --out http.json                      # the same shape over HTTP, with pictures

`clients` starts the server as a user does and asks about pictures whose answers the answering engine gave beforehand:
an answer that is not the one of its picture is counted. It is measured three times: 64 clients, 64 clients of a server
with one slot (what answers one at a time), and one client. Weights of `tokens` are random: speed does not depend on
them (`shapes.py`). It sends 1, 8, 32, 64 and 128 requests at a time; beside the engine's rate stand that of `generate`,
plain and with `cache_implementation="static"`, which compiles for each number of rows and therefore comes last, and
what the memory's bandwidth allows: a step must read the language model's weights once, and the keys and values of every
row. Rates are end to end, prompts and images included, and of the steps alone: those are what bandwidth bounds, while
reading prompts is bound by products. `--out` is written after each measurement.
`http` serves that shape to so many clients, in a process of their own, each request with a picture that is new, and
streams the answers; beside the rate stands the engine's own. One more client asks while all the others are answered:
the time until its first token. The others' answers have lengths from half to one and a half times --new-tokens; a
second figure is of answers of one length, which all end, and are asked for again, at the same moment.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import multiprocessing
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from shapes import (
    GPU,
    LLAVA_7B,
    LLAVA_NEXT_7B,
    TINY,
    TINY_NEXT,
    Question,
    bandwidth,
    device_name,
    endless_model,
    step_bytes,
    sync,
    versions,
    write_questions,
)

from relook import load_model
from relook.data.samples import Turn
from relook.data.templates import with_image
from relook.evaluate.tasks.pope import question_text
from relook.files import write_json
from relook.generate.answering import GenerationSettings, Prompt, answer_questions, generate_ids
from relook.generate.engine import Engine
from relook.generate.request import EngineLimits, Request
from relook.generate.text import Text
from relook.model.load import LoadedModel
from relook.toyworld.build import shipped_base
from relook.toyworld.world import draw_scene, sample_scenes

STEPS = 64  # that are timed by themselves
DESCRIBE = "Describe this image in detail."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = parser.add_subparsers(required=True)
    clients = ways.add_parser("clients")
    clients.set_defaults(measure=measure_clients)
    clients.add_argument("--clients", type=int, default=64)
    clients.add_argument("--seconds", type=float, default=60)
    clients.add_argument("--pictures", type=int, default=200)
    clients.add_argument("--slots", type=int, default=64)
    tokens = ways.add_parser("tokens")
    tokens.set_defaults(measure=measure_tokens)
    tokens.add_argument("--tiny", action="store_true", help="a small shape, for a CPU")
    tokens.add_argument("--at-once", type=int, nargs="+", default=[1, 8, 32, 64, 128])
    tokens.add_argument(
        "--peers",
        nargs="*",
        choices=("generate", "static"),
        default=["generate", "static"],
        help="transformers' `generate` with its usual cache, and with a static one, which it compiles",
    )
    tokens.add_argument("--new-tokens", type=int, default=128)
    tokens.add_argument("--rounds", type=int, default=2, help="requests of each client")
    tokens.add_argument("--bits", type=int, default=16, help="8 or 4: quantised by bitsandbytes")
    tokens.add_argument("--lora", type=int, default=0, help="rank of an adapter that is not merged")
    tokens.add_argument("--post-decoder", type=int, default=1, help="blocks; 0 for none")
    tokens.add_argument("--attention", choices=("cross", "self_cross", "none"), default="cross", help="of its blocks")
    tokens.add_argument("--next", action="store_true", help="a LLaVA-NeXT, whose images take several tiles")
    http = ways.add_parser("http")
    http.set_defaults(measure=measure_http)
    http.add_argument("--tiny", action="store_true", help="a small shape, for a CPU")
    http.add_argument("--at-once", type=int, default=32)
    http.add_argument("--new-tokens", type=int, default=128)
    http.add_argument("--rounds", type=int, default=3, help="requests of each client")
    http.add_argument("--late", type=int, default=12, help="requests whose first token is timed under each load")
    for parsed in (clients, tokens, http):
        parsed.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = options.measure(options)
    keep(options, result | {"versions": versions()})
    print(json.dumps(result, indent=1))


def keep(options: argparse.Namespace, result: dict[str, Any]) -> None:
    if options.out:
        write_json(options.out, result)


# --- many clients over HTTP


@dataclass
class Tally:
    """What clients saw."""

    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    wrong: int = 0
    tokens: int = 0

    def summary(self, wall: float) -> dict[str, Any]:
        times = sorted(self.seconds)
        return {
            "answers": len(times),
            "errors": len(self.errors),
            "first_errors": self.errors[:3],
            "wrong_answers": self.wrong,
            "answers_per_s": round(len(times) / wall, 1),
            "tokens_per_s": round(self.tokens / wall),
            "median_s": round(statistics.median(times), 4),
            "p95_s": round(times[int(0.95 * len(times))], 4),
        }


def measure_clients(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        rows = questions(Path(folder), options.pictures)
    result: dict[str, Any] = {"clients": options.clients, "seconds": options.seconds, "cores": os.cpu_count()}
    for name, slots, clients in (
        ("together", options.slots, options.clients),
        ("one slot", 1, options.clients),
        ("one client", options.slots, 1),
    ):
        with server(slots) as port:
            asyncio.run(ask_all(port, rows, clients, min(5.0, options.seconds)))  # warm-up
            tally, wall = asyncio.run(ask_all(port, rows, clients, options.seconds))
        result[name] = tally.summary(wall)
        print(name, result[name], file=sys.stderr, flush=True)
    for name in ("one slot", "one client"):
        result[f"times {name}"] = round(result["together"]["answers_per_s"] / result[name]["answers_per_s"], 2)
    return result


def questions(folder: Path, pictures: int) -> list[tuple[bytes, str]]:
    """Requests as bytes, each with the answer that the answering engine gives."""
    asked = []
    for i, scene in enumerate(sample_scenes(5, "test", pictures)):
        path = folder / f"{i}.png"
        draw_scene(scene).save(path)
        asked += [(path, DESCRIBE), (path, question_text(scene.names[0]))]
    loaded = load_model(shipped_base())
    said = dict(answer_questions(loaded, asked, GenerationSettings(max_new_tokens=64), lambda *_: None))
    rows = []
    for i, (path, text) in enumerate(asked):
        url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
        message = {"role": "user", "content": content}
        body = json.dumps({"model": "base", "messages": [message], "temperature": 0, "max_tokens": 64}).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        rows.append((head.encode() + body, said[i]))
    return rows


@contextmanager
def server(slots: int) -> Any:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "relook", "serve", str(shipped_base()), "--port", str(port), "--slots", str(slots)]
    process = subprocess.Popen(command)
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                if process.poll() is not None:
                    raise SystemExit("The server did not start.") from None
                time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait()


async def ask_all(port: int, rows: Sequence[tuple[bytes, str]], clients: int, seconds: float) -> tuple[Tally, float]:
    tally, started = Tally(), time.perf_counter()
    await asyncio.gather(*(client(port, rows, i, started + seconds, tally) for i in range(clients)))
    return tally, time.perf_counter() - started


async def client(port: int, rows: Sequence[tuple[bytes, str]], number: int, until: float, tally: Tally) -> None:
    """One after the other, on one connection; each client begins elsewhere."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    at = number * 37
    while time.perf_counter() < until:
        request, expected = rows[at % len(rows)]
        at += 1
        started = time.perf_counter()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        reply = json.loads(await reader.readexactly(length))
        tally.seconds.append(time.perf_counter() - started)
        if b" 200 " not in head[:20]:
            tally.errors.append(str(reply))
            continue
        tally.tokens += reply["usage"]["completion_tokens"]
        tally.wrong += reply["choices"][0]["message"]["content"] != expected
    writer.close()


# --- a model of full size over HTTP


def measure_http(options: argparse.Namespace) -> dict[str, Any]:
    count, new = options.at_once, options.new_tokens
    loaded = endless_model(TINY if options.tiny else LLAVA_7B)
    result: dict[str, Any] = {"device": device_name(), "clients": count, "new_tokens": new, "rounds": options.rounds}
    with tempfile.TemporaryDirectory() as folder:
        pictures = 1 + 2 * count * options.rounds + 2 * options.late + count
        warm, *rows = write_questions(Path(folder), loaded.processor, pictures, 1, 25)
        own, rows = rows[: count * options.rounds], rows[count * options.rounds :]
        bodies = [request_bytes(path.read_bytes(), text, new) for path, text in rows]
        lengths = [new // 2 + new * number // count for number in range(count - 1)]
        mixed = [request_bytes(rows[n][0].read_bytes(), rows[n][1], length) for n, length in enumerate(lengths)]
        with warm_engine(loaded, EngineLimits(slots=count, waiting=len(own), cache_gb=64), warm) as (engine, _):
            result["engine"] = engine_speed(engine, own, count, new)
            result |= http_speed(engine, bodies, mixed, options)
    result["share of the engine's"] = round(result["http"]["tokens_per_s"] / result["engine"]["tokens_per_s"], 3)
    return result


def http_speed(
    engine: Engine, bodies: Sequence[bytes], mixed: Sequence[bytes], options: argparse.Namespace
) -> dict[str, Any]:
    """The rate over HTTP, and the time to the first token of a request that comes while all others are answered.

    Args:
        mixed: requests of the others whose answers differ in length.
    """
    from relook.serve.api import ServerLimits
    from relook.serve.server import make_server

    count = options.at_once
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = make_server({"model": engine}, ServerLimits(), 1)
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]  # it runs on another thread
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        # Clients of a process of their own: they take no time from the server's interpreter.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            port, rounds = listening.getsockname()[1], bodies[: count * options.rounds]
            pool.submit(stream_all, port, bodies[-count:], count).result()  # warm-up
            firsts, tokens, wall = pool.submit(stream_all, port, rounds, count).result()
            late = bodies[count * options.rounds : -count]
            lates = {
                "first token under load": pool.submit(stream_late, port, mixed, late[: options.late]).result(),
                "all others at once": pool.submit(
                    stream_late, port, rounds[: count - 1], late[options.late :]
                ).result(),
            }
        server.should_exit = True
        thread.join()
    http = {"tokens_per_s": round(tokens / wall, 1), "first_token_s": round(statistics.median(firsts), 3)}
    return {"http": http} | {
        name: {"requests": len(times), "median_s": round(statistics.median(times), 3), "max_s": round(max(times), 3)}
        for name, times in lates.items()
    }


def request_bytes(picture: bytes, text: str, new: int) -> bytes:
    """A streamed request about a picture, with the counts at its end."""
    url = "data:image/jpeg;base64," + base64.b64encode(picture).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    body: dict[str, Any] = {"model": "model", "messages": [{"role": "user", "content": content}], "temperature": 0}
    body |= {"max_tokens": new, "stream": True, "stream_options": {"include_usage": True}}
    data = json.dumps(body).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


async def events(port: int, request: bytes) -> AsyncIterator[dict[str, Any]]:
    """The events of one streamed answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in head[:20]:
        raise SystemExit(f"{head.decode()}{(await reader.read()).decode()}")
    async for line in reader:  # each event is a line; the sizes of chunks are lines of their own
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])
    writer.close()


def is_text(event: dict[str, Any]) -> bool:
    return bool(event["choices"] and event["choices"][0]["delta"].get("content"))


def stream_all(port: int, requests: Sequence[bytes], clients: int) -> tuple[list[float], int, float]:
    """Seconds to each first token, tokens, and seconds in all."""
    firsts: list[float] = []
    tokens = 0

    async def client(own: Sequence[bytes]) -> None:
        nonlocal tokens
        for request in own:
            began, first = time.perf_counter(), True
            async for event in events(port, request):
                if first and is_text(event):
                    firsts.append(time.perf_counter() - began)
                    first = False
                if event.get("usage"):
                    tokens += event["usage"]["completion_tokens"]

    async def all_clients() -> None:
        await asyncio.gather(*(client(requests[i::clients]) for i in range(clients)))

    began = time.perf_counter()
    asyncio.run(all_clients())
    return firsts, tokens, time.perf_counter() - began


def stream_late(port: int, others: Sequence[bytes], late: Sequence[bytes]) -> list[float]:
    """Seconds to the first token of requests that come one after the other while others are answered all the time."""
    firsts: list[float] = []

    async def busy(request: bytes) -> None:
        while True:
            async for _ in events(port, request):
                pass

    async def ask() -> None:
        tasks = [asyncio.create_task(busy(request)) for request in others]
        await asyncio.sleep(2)
        for request in late:
            began = time.perf_counter()
            stream = events(port, request)
            async for event in stream:
                if is_text(event):
                    firsts.append(time.perf_counter() - began)
                    break
            await stream.aclose()  # type: ignore[attr-defined]  # the connection ends with it
            await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(ask())
    return firsts


# --- tokens a second of the engine


def measure_tokens(options: argparse.Namespace) -> dict[str, Any]:
    shape = (TINY_NEXT if options.tiny else LLAVA_NEXT_7B) if options.next else TINY if options.tiny else LLAVA_7B
    loaded = endless_model(
        shape, options.post_decoder, bits=options.bits, attention=options.attention, lora=options.lora
    )
    result: dict[str, Any] = {"device": device_name(), "bits": options.bits, "new_tokens": options.new_tokens}
    result |= {"rounds": options.rounds, "loaded_gib": round(torch.cuda.memory_allocated() / 2**30, 1) if GPU else 0}
    result |= {"bytes_per_s": bandwidth(), "rows": {str(count): {} for count in options.at_once}}
    with tempfile.TemporaryDirectory() as folder:
        # Pictures of their own for each number of rows: what was asked before would be in memory.
        sizes = [count * options.rounds for count in options.at_once]
        warm, *rows = write_questions(Path(folder), loaded.processor, 1 + sum(sizes), 1, 25)
        ends = zip(options.at_once, sizes, accumulate(sizes), strict=True)
        parts = {count: rows[end - size : end] for count, size, end in ends}
        # One engine for all numbers of rows: it compiles once.
        limits = EngineLimits(slots=max(options.at_once), waiting=len(rows), cache_gb=64)
        with warm_engine(loaded, limits, warm) as (engine, result["warm_s"]):
            for count in options.at_once:
                speed = engine_speed(engine, parts[count], count, options.new_tokens)
                limit = count * result["bytes_per_s"] / step_bytes(loaded.core, count * speed.pop("positions"))
                share = round(speed["step_tokens_per_s"] / limit, 3)
                measured = {"engine": speed, "byte limit": round(limit, 1), "share of the byte limit": share}
                add_row(options, result, count, measured)
        del engine
        for peer in options.peers:
            for count in options.at_once:
                speed = generate_speed(loaded, warm, parts[count], count, options.new_tokens, peer == "static")
                served = result["rows"][str(count)]["engine"]
                times = {
                    f"{name} {peer}": round(served[rate] / speed[rate], 2)
                    for rate, name in (("tokens_per_s", "times"), ("step_tokens_per_s", "step times"))
                }
                add_row(options, result, count, {peer: speed, **times})
    return result


def add_row(options: argparse.Namespace, result: dict[str, Any], count: int, measured: dict[str, Any]) -> None:
    print(count, measured, file=sys.stderr, flush=True)
    result["rows"][str(count)] |= measured
    keep(options, result)


@contextmanager
def warm_engine(loaded: LoadedModel, limits: EngineLimits, warm: Question) -> Iterator[tuple[Engine, float]]:
    """An engine that is warm, and the seconds that it took."""
    started = time.perf_counter()
    engine = Engine(loaded, limits)
    engine.warm()
    list(engine.stream(request_of(engine, warm, 4)))
    try:
        yield engine, round(time.perf_counter() - started, 1)
    finally:
        engine.stop()


def request_of(engine: Engine, row: Question, new: int) -> Request:
    image = engine.image(row[0].read_bytes())
    return Request(engine.prompt([Turn(with_image(row[1]), "")], [image]), (image,), new)


def engine_speed(engine: Engine, rows: Sequence[Question], count: int, new: int) -> dict[str, Any]:
    """So many clients, each with a request of its own running at any time, streamed."""
    requests = [request_of(engine, row, new) for row in rows]
    firsts: list[float] = []

    def run(own: Sequence[Request]) -> None:
        for request in own:
            started, first = time.perf_counter(), True
            for event in engine.stream(request):
                if first and event.tokens:
                    firsts.append(time.perf_counter() - started)
                    first = False

    said = engine.batch.counts.new_tokens
    started = time.perf_counter()
    threads = [threading.Thread(target=run, args=(requests[i::count],)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - started
    said = engine.batch.counts.new_tokens - said
    length = round(statistics.mean(len(request.ids) for request in requests)) + new // 2 - STEPS // 2
    steps = engine.run(lambda: step_speed(engine, length, count))
    return {
        "positions": length + STEPS // 2,
        "tokens_per_s": round(said / wall, 1),
        "step_tokens_per_s": round(steps, 1),
        "first_token_s": round(statistics.median(firsts), 3),
        "seconds": round(wall, 2),
    }


def step_speed(engine: Engine, length: int, count: int) -> float:
    """Tokens a second of steps alone, with so many texts of that length on average."""
    rng, vocabulary = random.Random(count), engine.loaded.core.config.text_config.vocab_size
    texts = [
        Text(tuple(rng.randrange(300, vocabulary) for _ in range(length)), (), 2 * STEPS, lambda *_: False)
        for _ in range(count)
    ]
    scheduler = engine.batch
    scheduler.waiting.extend(texts)
    while scheduler.waiting or scheduler.reading:
        scheduler.step()
    for _ in range(4):
        scheduler.step()
    sync()
    started = time.perf_counter()
    for _ in range(STEPS):
        scheduler.step()
    sync()
    seconds = time.perf_counter() - started
    for text in texts:
        scheduler.cancel(text)
    while scheduler.busy:
        scheduler.step()
    return count * STEPS / seconds


def generate_speed(
    loaded: LoadedModel, warm: Question, rows: Sequence[Question], count: int, new: int, static: bool = False
) -> dict[str, Any]:
    """transformers' `generate`, the same requests in batches of as many."""
    encoder = loaded.encoder()
    asking = GenerationSettings(max_new_tokens=new, generate=(("cache_implementation", "static"),) if static else ())
    first, *prompts = [Prompt(i, (path,), encoder.prompt(text, [path])) for i, (path, text) in enumerate([warm, *rows])]
    for _ in range(2 if static else 1):  # it compiles, and captures at the second
        generate_ids(loaded, [first] * count, replace(asking, max_new_tokens=new if static else 4))
    for prompt in prompts:
        loaded.images(prompt.images[0])  # the engine's images are read beforehand too
    started = time.perf_counter()
    for start in range(0, len(prompts), count):
        generate_ids(loaded, prompts[start : start + count], asking)
    sync()
    wall = time.perf_counter() - started
    # A single token is reading alone, which `generate` does not compile.
    one = replace(asking, max_new_tokens=1, generate=())
    generate_ids(loaded, prompts[:count], one)
    started = time.perf_counter()
    generate_ids(loaded, prompts[:count], one)
    sync()
    reading = (time.perf_counter() - started) * len(rows) / count
    return {
        "tokens_per_s": round(len(rows) * new / wall, 1),
        "step_tokens_per_s": round(len(rows) * (new - 1) / max(wall - reading, 1e-9), 1),
        "seconds": round(wall, 2),
    }


if __name__ == "__main__":
    main()
