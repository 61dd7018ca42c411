"""`relook serve` as processes: how one stops, and two behind a balancer."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import openai
import pytest
from helpers.serving import KEY, Served, assert_well, until, user


@contextmanager
def process(base: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server on a port of its own."""
    command = [sys.executable, "-m", "relook", "serve", str(base), "--port", "0", "--device", "cpu", *flags]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert running.stderr is not None
    line = next(line for line in running.stderr if line.startswith("Serving "))
    [port] = map(int, re.findall(r":(\d+)/v1", line))
    until(lambda: healthy(port))
    try:
        yield running, port
    finally:
        running.kill()
        running.communicate()


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def client(port: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


def count(port: int, *names: str) -> float:
    """Some of a server's metrics, summed up."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    found = tuple(f"relook_{name}{{" for name in names)
    return sum(float(line.split()[-1]) for line in lines if line.startswith(found))


def asked(port: int, name: str, seed: int = 0) -> str:
    reply = client(port).chat.completions.create(
        model=name,
        messages=[user("Describe this image.")],
        max_tokens=300,
        temperature=1.9,
        seed=seed,  # type: ignore[list-item]
    )
    return reply.choices[0].message.content or ""


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_answers_end(base: Path, sent: signal.Signals) -> None:
    with process(base, "--slots", "4") as (running, port):
        expected = [asked(port, base.name, seed) for seed in range(12)]
        said: dict[int, str] = {}

        def ask(seed: int) -> None:
            said[seed] = asked(port, base.name, seed)

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(12)]
        for thread in threads:
            thread.start()
        until(lambda: count(port, "requests_total", "running", "waiting") == 24)
        assert count(port, "running") > 0
        running.send_signal(sent)
        for thread in threads:
            thread.join()
        assert [said[seed] for seed in range(12)] == expected
        assert running.wait(30) == 0
        assert not healthy(port)


@pytest.mark.slow
def test_eight_bits_and_a_base_beside(base: Path, tmp_path: Path) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    with process(base, "--bits", "8", "--base", str(other)) as (_, port):
        assert [model.id for model in client(port).models.list()] == [base.name, other.name]
        assert asked(port, base.name) == asked(port, other.name)


class Balancer:
    """Round robin over servers that say they are well, in twenty lines: a connection is a request."""

    def __init__(self, ports: list[int]) -> None:
        self.ports, self.turn = ports, 0
        self.loop = asyncio.new_event_loop()
        self.server = self.loop.run_until_complete(asyncio.start_server(self.pass_on, "127.0.0.1", 0))
        self.port = self.server.sockets[0].getsockname()[1]
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    async def pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        well = [port for port in self.ports if await asyncio.to_thread(healthy, port)]
        self.turn += 1
        behind_reader, behind_writer = await asyncio.open_connection("127.0.0.1", well[self.turn % len(well)])
        await asyncio.gather(self.copy(reader, behind_writer), self.copy(behind_reader, writer))

    async def copy(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(1 << 16):
            target.write(data)
            await target.drain()
        target.close()


@pytest.mark.slow
def test_two_replicas_behind_a_balancer(base: Path) -> None:
    """They share nothing: each answers alike, and when one stops nobody sees an error."""
    with ExitStack() as stack:
        servers = [stack.enter_context(process(base)) for _ in range(2)]
        ports = [port for _, port in servers]
        balancer = Balancer(ports)
        expected = {seed: asked(ports[0], base.name, seed) for seed in range(8)}
        assert {seed: asked(ports[1], base.name, seed) for seed in range(8)} == expected
        wrong: list[str] = []
        end = time.monotonic() + 6

        def ask(number: int) -> None:
            seed = number
            while time.monotonic() < end:
                seed = (seed + 1) % 8
                try:
                    if asked(balancer.port, base.name, seed) != expected[seed]:
                        wrong.append("another answer")
                except openai.APIError as error:
                    wrong.append(repr(error))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        time.sleep(2)
        assert all(count(port, "requests_total") > 8 for port in ports)
        servers[0][0].send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert servers[0][0].wait(30) == 0
        assert not wrong
        assert asked(balancer.port, base.name, 3) == expected[3]


@pytest.mark.slow
def test_schemathesis_finds_no_server_error(served: Served, tmp_path: Path) -> None:
    """Requests made from the OpenAPI description, valid ones and broken ones, of a model that is there."""
    status, text = served.send("GET", "/openapi.json")
    assert status == 200
    schema = json.loads(text)
    schema["components"]["schemas"]["ChatRequest"]["properties"]["model"] = {"enum": ["tuned"]}
    (tmp_path / "openapi.json").write_text(json.dumps(schema))
    checks = ["not_a_server_error", "status_code_conformance", "content_type_conformance"]
    checks += ["response_schema_conformance"]
    before = served.engines["tuned"].batch.counts.steps
    command = [sys.executable, "-m", "schemathesis.cli", "run", str(tmp_path / "openapi.json")]
    command += ["--url", f"http://127.0.0.1:{served.port}", "--header", f"Authorization: Bearer {KEY}"]
    command += ["--phases", "coverage,fuzzing", "--max-examples", "150", "--seed", "1", "--checks", ",".join(checks)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout[-5000:]
    assert served.engines["tuned"].batch.counts.steps > before
    assert_well(served)
