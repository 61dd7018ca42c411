"""A judge behind an endpoint that errs in every way: bounded patience, nothing asked twice, nothing lost."""

from __future__ import annotations

import base64
import gzip
import json
import os
import signal
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.endpoint import Answer, Request, completion, endpoint
from helpers.forked import FORK, forked
from helpers.strategies import ANY_TEXT
from hypothesis import given, settings
from hypothesis import strategies as st

from relook.errors import DataError, RecipeError, RelookError
from relook.evaluate.bounded_http import LONGEST_BODY, REDIRECTS
from relook.evaluate.judge import (
    LONGEST_PROMPT,
    LONGEST_REPLY,
    Judge,
    JudgeResults,
    JudgeSettings,
    NoVerdict,
    Task,
    fill_template,
    judge_settings,
    prompt_template,
    read_reply,
)

JSON = st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT | st.lists(st.integers())
SOON = {"retry-after-ms": "1"}  # so that tests do not wait


def number(reply: str) -> int | None:
    return int(reply) if reply.isdigit() else None


def ask(
    url: str, cache: Path, prompts: Sequence[str], parse: Callable[[str], Any] = number, **how: Any
) -> JudgeResults[Any]:
    judge = Judge(JudgeSettings(url, "tester", **{"retries": 2, **how}), cache)
    return judge.ask([Task(prompt, parse) for prompt in prompts], {"temperature": 0.0}, "judge")


def length(request: Request, _: int) -> Answer:
    return Answer(str(len(request["messages"][0]["content"])))


def test_verdicts_come_in_order_with_their_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    prompts = ["a" * n for n in range(1, 21)]
    with endpoint(length) as server:
        judged = ask(server.url, tmp_path / "c.jsonl", prompts, key_variable="MY_KEY", price=(2.0, 30.0))
    assert judged.verdicts == list(range(1, 21))
    assert sorted(map(len, server.prompts)) == list(range(1, 21))
    assert set(server.keys) == {"Bearer secret"}
    assert server.requests[0].items() >= {"model": "tester", "temperature": 0.0}.items()
    record = judged.to_json()
    assert record["model"] == "tester"
    assert (record["prompt_tokens"], record["completion_tokens"], record["replies"]) == (2000, 200, 20)
    assert record["dollars"] == pytest.approx(2000 * 2e-6 + 200 * 30e-6)
    assert record["unjudged"] == {}
    assert "secret" not in json.dumps(record) + (tmp_path / "c.jsonl").read_text()


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    with endpoint(length) as server:
        first = ask(server.url, tmp_path / "c.jsonl", ["a", "bb"])
        again = ask(server.url, tmp_path / "c.jsonl", ["bb", "a", "ccc"])
        assert (first.verdicts, again.verdicts) == ([1, 2], [2, 1, 3])
        assert len(server.requests) == 3
        ask(server.url, tmp_path / "c.jsonl", ["a"], request={"temperature": 1})  # another way of asking
        assert len(server.requests) == 4


def test_fields_of_a_request_can_be_added_and_left_out(tmp_path: Path) -> None:
    with endpoint(length) as server:
        ask(server.url, tmp_path / "c.jsonl", ["a"], request={"temperature": None, "max_completion_tokens": 5})
    assert server.requests[0]["max_completion_tokens"] == 5
    assert "temperature" not in server.requests[0]


@pytest.mark.parametrize(
    "fault",
    [
        Answer(status=429, headers=SOON, body='{"error": {"message": "slow down"}}'),
        Answer(status=500, headers=SOON, body="oops"),
        Answer(status=503, headers=SOON, body=""),
        Answer("7", short=100),
        Answer(body='{"choices": [{"mess'),
        Answer(body="[]"),
        Answer(body='{"choices": []}'),
        Answer(body='{"choices": [{"message": {"content": null}}]}'),
        Answer(body=""),
        Answer(body="[" * 100_000),
    ],
    ids=["429", "500", "503", "broken", "half-JSON", "array", "no-choice", "null", "empty", "deep"],
)
def test_a_fault_that_passes_is_asked_again(fault: Answer, tmp_path: Path) -> None:
    with endpoint(lambda _, number: fault if number == 0 else Answer("7")) as server:
        judged = ask(server.url, tmp_path / "c.jsonl", ["a"])
    assert (judged.verdicts, judged.unjudged, len(server.requests)) == ([7], {}, 2)


def test_the_pause_that_the_endpoint_asks_for_is_kept(tmp_path: Path) -> None:
    times: list[float] = []

    def busy(_: Request, number: int) -> Answer:
        times.append(time.monotonic())
        return Answer(status=429, headers={"Retry-After": "0.3"}) if number == 0 else Answer("7")

    with endpoint(busy) as server:
        assert ask(server.url, tmp_path / "c.jsonl", ["a"]).verdicts == [7]
    assert times[1] - times[0] >= 0.3


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Answer(status=429, headers=SOON, body='{"error": {"message": "out of quota"}}'), "out of quota"),
        (Answer(status=500, headers=SOON, body="oops"), "Error code: 500"),
        (Answer("7", delay=0.5), "timed out"),
        (Answer(body='{"choices": [{"mess'), "not a chat completion"),
        (Answer(status=400, body='{"error": {"message": "no such field"}}'), "no such field"),
    ],
    ids=["429", "500", "silence", "half-JSON", "400"],
)
def test_an_endpoint_that_is_down_ends_in_a_report(fault: Answer, reason: str, tmp_path: Path) -> None:
    """Good for some prompts, then down for good: what was said is kept and not asked again."""
    with endpoint(lambda request, _: Answer("7") if "good" in request["messages"][0]["content"] else fault) as server:
        how: dict[str, Any] = {"workers": 1, "timeout": 0.05, "retries": 1 if fault.delay == 0 else 0}
        prompts = ["good 1", "good 2", *(f"bad {n}" for n in range(50))]
        with pytest.raises(RelookError, match=rf"does not answer: .*{reason}.*2 replies so far are kept"):
            ask(server.url, tmp_path / "c.jsonl", prompts, **how)
        assert len(server.requests) <= 2 + 6 * 3  # the sixth may be under way already
        before = len(server.requests)
        assert ask(server.url, tmp_path / "c.jsonl", prompts[:2]).verdicts == [7, 7]
        assert len(server.requests) == before


@pytest.mark.parametrize(("status", "reason"), [(500, "no_answer"), (400, "refused")])
def test_a_prompt_without_an_answer_is_counted(status: int, reason: str, tmp_path: Path) -> None:
    def answer(request: Request, _: int) -> Answer:
        bad = request["messages"][0]["content"] == "bad"
        return Answer(status=status, headers=SOON, body="no") if bad else Answer("7")

    with endpoint(answer) as server:
        judged = ask(server.url, tmp_path / "c.jsonl", ["a", "bad", "b"])
    assert (judged.verdicts, judged.unjudged) == ([7, None, 7], {reason: 1})


def test_one_prompt_alone_without_an_answer_is_no_result(tmp_path: Path) -> None:
    with (
        endpoint(lambda *_: Answer(status=500, headers=SOON)) as server,
        pytest.raises(RelookError, match="does not answer"),
    ):
        ask(server.url, tmp_path / "c.jsonl", ["a"])


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_stops_at_once(status: int, tmp_path: Path) -> None:
    with endpoint(lambda *_: Answer(status=status, body='{"error": {"message": "who?"}}')) as server:
        with pytest.raises(RelookError, match=r"refuses: .*who.*--judge-model and the key in OPENAI_API_KEY"):
            ask(server.url, tmp_path / "c.jsonl", [str(n) for n in range(50)], workers=1)
        assert len(server.requests) <= 2  # the second may be under way already


def test_an_endpoints_words_do_no_harm(tmp_path: Path) -> None:
    with endpoint(lambda *_: Answer(status=401, body='{"error": {"message": "a\\u001b[2J\\nb"}}')) as server:
        url = server.url.replace("//", "//user:password@")
        with pytest.raises(RelookError) as caught:
            ask(url, tmp_path / "c.jsonl", ["a"])
    assert str(caught.value).isprintable()
    assert "password" not in str(caught.value)


def test_nobody_there(tmp_path: Path) -> None:
    with endpoint(length) as server:
        pass
    with pytest.raises(RelookError, match="does not answer"):
        ask(server.url, tmp_path / "c.jsonl", ["a"], retries=0)


def test_nonsense_is_asked_again_a_few_times_and_counted(tmp_path: Path) -> None:
    with endpoint(lambda request, n: Answer("what?" if "odd" in request["messages"][0]["content"] else "7")) as server:
        judged = ask(server.url, tmp_path / "c.jsonl", ["odd", "a"], tries=3)
        assert (judged.verdicts, judged.unjudged, judged.details["replies"]) == ([None, 7], {"nonsense": 1}, 4)
        with pytest.raises(RelookError, match=r"judged none of 1 prompts \(1 nonsense\).*begins: 'what\?'"):
            ask(server.url, tmp_path / "c.jsonl", ["odd"], tries=2)


def test_what_could_not_be_read_is_asked_again_by_the_next_command(tmp_path: Path) -> None:
    """A mended judge is asked about it; a better reader reads what is there; a verdict is never asked for again."""
    cache, prompts = tmp_path / "c.jsonl", ["odd", "a"]
    with endpoint(lambda request, n: Answer("7" if n >= 4 or request["messages"][0]["content"] == "a" else "7!")) as s:
        assert ask(s.url, cache, prompts, tries=3).unjudged == {"nonsense": 1}
        better = ask(s.url, cache, prompts, lambda reply: int(reply.rstrip("!")), tries=3)
        assert (better.verdicts, better.details["replies"], len(s.requests)) == ([7, 7], 2, 4)
        mended = ask(s.url, cache, prompts, tries=3)
        assert (mended.verdicts, mended.details["replies"], len(s.requests)) == ([7, 7], 2, 5)
        assert ask(s.url, cache, prompts, tries=3).verdicts == [7, 7]
        assert len(s.requests) == 5


def test_replies_belong_to_the_judge_wherever_it_is(tmp_path: Path) -> None:
    with endpoint(length) as server:
        ask(server.url, tmp_path / "c.jsonl", ["a"])
    assert ask("http://127.0.0.1:1/v1", tmp_path / "c.jsonl", ["a"]).verdicts == [1]


def test_a_reply_may_say_itself_why_it_is_refused(tmp_path: Path) -> None:
    def parse(reply: str) -> int:
        raise NoVerdict("contradictory")

    with endpoint(lambda *_: Answer("7")) as server:
        judge = Judge(JudgeSettings(server.url, "tester", tries=2), tmp_path / "c.jsonl")
        assert judge.ask([Task("a", parse)], {}, "judge", optional=True).unjudged == {"contradictory": 1}
    assert len(server.requests) == 2


def test_a_probe_is_one_request_that_leaves_nothing(tmp_path: Path) -> None:
    def judge(url: str) -> Judge:
        return Judge(JudgeSettings(url, "tester", retries=0), tmp_path / "c.jsonl")

    with endpoint(lambda *_: Answer("I cannot help.")) as server:
        judge(server.url).probe({"temperature": 0.5})
    (request,) = server.requests
    assert (request["model"], request["temperature"]) == ("tester", 0.5)
    assert not (tmp_path / "c.jsonl").exists()
    with pytest.raises(RelookError, match=r"does not answer.*Check its address"):
        judge(server.url).probe({})
    for status, message in ((404, "refuses.*Check its address"), (400, "does not answer: .*no such field")):
        fault = Answer(status=status, body='{"error": {"message": "no such field"}}')
        with endpoint(lambda *_, fault=fault: fault) as server, pytest.raises(RelookError, match=message):
            judge(server.url).probe({})


def test_long_prompts_are_not_sent_and_long_replies_are_cut(tmp_path: Path) -> None:
    with endpoint(lambda *_: Answer("x" * (LONGEST_REPLY + 5) + "\ud800")) as server:
        judged = ask(server.url, tmp_path / "c.jsonl", ["a" * (LONGEST_PROMPT + 1), "b"], parse=len)
    assert (judged.verdicts, judged.unjudged) == ([None, LONGEST_REPLY], {"too_long": 1})
    assert len(server.requests) == 1


def packed(text: str) -> Answer:
    return Answer(headers={"Content-Encoding": "gzip"}, data=gzip.compress(completion(text).encode()))


def test_a_reply_may_be_packed(tmp_path: Path) -> None:
    with endpoint(lambda *_: packed("7")) as server:
        assert ask(server.url, tmp_path / "c.jsonl", ["a"]).verdicts == [7]


LONG = completion("a" * 30_000_000).encode()
PACKED = gzip.compress(LONG, 1)


@pytest.mark.parametrize(
    ("data", "encoding", "status"),
    [
        (LONG, "identity", 200),
        (PACKED, "gzip", 200),
        (PACKED, "gzip", 400),
        (gzip.compress(PACKED), "gzip, gzip", 200),
        (b"\x1f\x8b" + bytes(1000), "gzip", 200),
        (zlib.compress(LONG, 1), "deflate", 200),
    ],
    ids=["plain", "gzip", "error", "gzip in gzip", "no gzip", "deflate"],
)
def test_a_reply_is_read_up_to_a_limit(data: bytes, encoding: str, status: int, tmp_path: Path) -> None:
    """Once it is unpacked, too."""
    tracemalloc.start()
    with endpoint(lambda *_: Answer(status=status, headers={"Content-Encoding": encoding}, data=data)) as server:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        too_long = encoding in ("identity", "gzip") and len(data) > 2000
        message = "Error code: 400" if status == 400 else "more than 4,000,000 bytes" if too_long else "not a chat"
        with pytest.raises(RelookError, match=message):
            ask(server.url, tmp_path / "c.jsonl", ["a"], retries=0, tries=1)
        peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert peak < 6 * LONGEST_BODY


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_prompt_is_not_sent_on_to_another_server(status: int, tmp_path: Path) -> None:
    with endpoint(length) as other:
        away = {"Location": other.url.replace("//", "//user:password@") + "/chat/completions?key=secret"}
        with endpoint(lambda *_: Answer(status=status, headers=away, body="")) as server:
            with pytest.raises(RelookError, match=r"redirects to 127\.0\.0\.1:\d+/v1/chat/completions,") as caught:
                ask(server.url, tmp_path / "c.jsonl", ["a"])
            assert len(server.requests) == 1
    assert other.requests == []
    assert "password" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_redirect_within_a_server_is_followed_a_few_times(tmp_path: Path) -> None:
    def moved(_: Request, number: int) -> Answer:
        return Answer("7") if number == 2 else Answer(status=307, headers={"Location": f"/v1/{number}"}, body="")

    with endpoint(moved) as server:
        assert ask(server.url, tmp_path / "c.jsonl", ["a"]).verdicts == [7]
        assert server.prompts == ["a"] * 3
    with endpoint(lambda *_: Answer(status=308, headers={"Location": "/v1/again"}, body="")) as server:
        with pytest.raises(RelookError, match="redirects to /v1/again"):
            ask(server.url, tmp_path / "other.jsonl", ["a"])
        assert len(server.requests) == 1 + REDIRECTS


def test_an_image_goes_with_its_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"pixels")
    with endpoint(lambda *_: Answer("7")) as server:
        judge = JudgeSettings(server.url, "tester")
        tasks = [Task("What is it?", number, tmp_path / "a.png")]
        assert Judge(judge, tmp_path / "c.jsonl").ask(tasks, {}, "judge").verdicts == [7]
        (tmp_path / "a.png").write_bytes(b"others")  # another image is another question
        Judge(judge, tmp_path / "c.jsonl").ask(tasks, {}, "judge")
    sent = [request["messages"][0]["content"] for request in server.requests]
    assert sent[0][0] == {"type": "text", "text": "What is it?"}
    urls = [content[1]["image_url"]["url"] for content in sent]
    head = "data:image/png;base64,"
    assert [base64.b64decode(url.removeprefix(head)) for url in urls] == [b"pixels", b"others"]


def ask_twelve(url: str, cache: Path) -> None:
    judge = Judge(JudgeSettings(url, "tester", workers=1), cache)
    verdicts = judge.ask([Task(f"prompt {n}", str) for n in range(12)], {}, "judge").verdicts
    sys.stdout.write(f"{verdicts}\n")


def test_a_kill_loses_no_reply(tmp_path: Path) -> None:
    """kill -9 while the sixth prompt is before the judge; a half-written line is left, too."""
    cache = tmp_path / "c.jsonl"
    running: list[Any] = []

    def answer(request: Request, number: int) -> Answer:
        if number == 5:
            os.kill(running[0].pid, signal.SIGKILL)
        return Answer(request["messages"][0]["content"].upper())

    with endpoint(answer) as server:
        running.append(FORK.Process(target=ask_twelve, args=(server.url, cache)))
        running[0].start()
        running[0].join()
        assert running[0].exitcode == -signal.SIGKILL
        cached = cache.read_bytes()
        assert cached.count(b"\n") == 5
        cache.write_bytes(cached + b'{"key": "ab')
        done = forked(ask_twelve, server.url, cache)
    assert done.codes == [0], done.stderr
    assert done.stdout.strip() == str([f"PROMPT {n}" for n in range(12)])
    assert len(server.requests) == 6 + 7
    assert cache.read_bytes().startswith(cached)


@settings(max_examples=40)
@given(ANY_TEXT)
def test_no_body_is_too_odd(body: str) -> None:
    assert read_reply(body) is None or json.loads(body)["choices"]


@settings(max_examples=40)
@given(JSON | st.fixed_dictionaries({"prompt_tokens": JSON, "completion_tokens": JSON}))
def test_no_usage_is_too_odd(usage: Any) -> None:
    reply = read_reply(json.dumps({"choices": [{"message": {"content": "7"}}], "usage": usage}))
    assert reply is not None
    assert reply.text == "7"
    assert reply.prompt_tokens >= 0 <= reply.completion_tokens


# --- prompts and settings


def test_braces_in_what_is_filled_in_mean_nothing() -> None:
    assert fill_template("{} and {}: {0}", "{}", "b{0}") == "{} and b{0}: {0}"
    with pytest.raises(DataError, match="2 places"):
        fill_template("{} {}", "a")


def test_a_prompt_is_read_from_a_program_that_is_not_run(tmp_path: Path) -> None:
    program = tmp_path / "eval.py"
    assert prompt_template(program, "template", "own")[0] == "own"
    program.write_text("import nowhere\nother = 3\ntemplate = '''Rate {}\nnow'''\nraise SystemExit(1)\n")
    assert prompt_template(program, "template", "own")[0] == "Rate {}\nnow"
    for odd in ("template = 3", "template = open('x')", "def broken(", ""):
        program.write_text(odd)
        with pytest.raises(DataError, match="assigns no string to template"):
            prompt_template(program, "template", "own")


def test_a_judge_on_the_command_line() -> None:
    rest: tuple[Any, ...] = ((1.0, 2.0), "KEY", 3)
    assert judge_settings("", "", *rest, "{}") is None
    settings = judge_settings("http://host/v1", "m", *rest, '{"seed": 1}')
    assert settings == JudgeSettings("http://host/v1", "m", "KEY", (1.0, 2.0), 3, request={"seed": 1})
    for url, model, request in (("", "m", "{}"), ("http://h", "", "{}"), ("host", "m", "{}"), ("http://h", "m", "[")):
        with pytest.raises(RecipeError):
            judge_settings(url, model, *rest, request)
