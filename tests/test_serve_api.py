"""The HTTP API, asked by OpenAI's own client and by raw requests."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from helpers.serving import (
    KEY,
    NEW,
    PICTURES,
    Held,
    Served,
    assert_refused,
    assert_well,
    expected,
    serving,
    until,
    user,
    with_picture,
)
from helpers.tiny import save_tiny, tiny_relook
from PIL import Image
from test_answering import TEXTS, as_loaded

from relook import load_model
from relook.data.samples import Turn
from relook.errors import RelookError
from relook.generate.engine import Engine
from relook.generate.request import EngineLimits, Event, Request
from relook.model.load import LoadOptions
from relook.serve.api import ServerLimits
from relook.serve.chat import AnswerStream
from relook.serve.protocol import APIError
from relook.serve.server import bind_socket, load_models

# --- OpenAI's client


def test_openais_client_gets_the_models_texts(served: Served) -> None:
    client = served.client
    assert [model.id for model in client.models.list()] == ["tuned", "base"]
    assert client.models.retrieve("base").id == "base"
    for model in ("tuned", "base"):
        messages: Any = [user(with_picture(TEXTS[0], PICTURES[0]))]
        reply = client.chat.completions.create(model=model, messages=messages, max_tokens=NEW, temperature=0)
        assert reply.choices[0].message.content == expected(served, TEXTS[0], PICTURES[0], model=model)
        assert reply.usage is not None
        assert reply.usage.completion_tokens <= NEW
        assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_openais_client_streams(served: Served) -> None:
    stream = served.client.chat.completions.create(
        model="tuned",
        messages=[user(TEXTS[1])],  # type: ignore[list-item]
        max_completion_tokens=NEW,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected(served, TEXTS[1])
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")
    said = [
        token for c in chunks if c.choices and c.choices[0].logprobs for token in c.choices[0].logprobs.content or []
    ]
    assert "".join(token.token for token in said) == text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(said)


def test_n_seed_stop_and_log_probs(served: Served) -> None:
    ask = lambda **how: served.client.chat.completions.create(  # noqa: E731
        model="tuned", messages=[user(TEXTS[0])], max_tokens=NEW, **how
    )
    several = ask(n=4, seed=5, temperature=1.5)
    texts = [choice.message.content for choice in several.choices]
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert len(set(texts)) > 1
    assert [choice.message.content for choice in ask(n=4, seed=5, temperature=1.5).choices] == texts
    assert ask(seed=6, temperature=1.5).choices[0].message.content == texts[1]
    whole = expected(served, TEXTS[0])
    stop = whole[len(whole) // 2 :][:4]
    stopped = ask(temperature=0, stop=[stop], logprobs=True, top_logprobs=2).choices[0]
    assert stopped.message.content == whole.partition(stop)[0].strip()
    assert stopped.finish_reason == "stop"
    assert stopped.logprobs is not None
    assert all(len(token.top_logprobs) == 2 for token in stopped.logprobs.content or [])


def test_a_second_turn_of_what_openais_client_gave(served: Served) -> None:
    """A reply goes back as the client's own object, as its dict with every null, and as its helpers parse it."""
    how: Any = {"model": "tuned", "max_tokens": NEW, "temperature": 0, "stop": [" "]}  # helpers refuse what was cut
    first: Any = [user(TEXTS[0])]
    create = served.client.chat.completions.create
    reply = create(messages=first, **how).choices[0].message
    parsed = served.client.chat.completions.parse(messages=first, **how).choices[0].message
    with served.client.chat.completions.stream(messages=first, **how) as stream:
        streamed = stream.get_final_completion().choices[0].message
    histories = [
        reply,
        *(message.model_dump() for message in (reply, parsed, streamed)),
        parsed.to_dict(),
        reply.model_dump() | {"annotations": [], "tool_calls": []},
    ]
    assert "refusal" in histories[1]
    plain = create(messages=[*first, {"role": "assistant", "content": reply.content}, user(TEXTS[1])], **how)
    for history in histories:
        again = create(messages=[*first, history, user(TEXTS[1])], **how)
        assert again.choices == plain.choices
        assert again.usage is not None
        assert plain.usage is not None
        assert again.usage.prompt_tokens == plain.usage.prompt_tokens


def test_messages_in_any_order_are_turns(served: Served) -> None:
    """By the template written out: an answer that follows nothing has an empty prompt."""
    encode = served.engines["tuned"].loaded.processor.tokenizer.backend_tokenizer.encode
    for messages, text in (
        ([said("Yes."), user("A")], "USER:  ASSISTANT: Yes.</s>USER: A ASSISTANT:"),
        ([user("A"), said("Yes."), said("No."), user("B")],
         "USER: A ASSISTANT: Yes.</s>USER:  ASSISTANT: No.</s>USER: B ASSISTANT:"),
        ([user("A"), said(None), user("B")], "USER: A ASSISTANT: </s>USER: B ASSISTANT:"),
        ([{"role": "developer", "content": "A"}], "USER: A ASSISTANT:"),
        ([user("A"), {"role": "system", "content": "B", "name": "n"}], "USER: A\nB ASSISTANT:"),
        ([user([{"type": "text", "text": "A"}, {"type": "text", "text": "B"}])], "USER: A\nB ASSISTANT:"),
    ):  # fmt: skip
        status, reply = served.chat(messages)
        assert status == 200, reply
        assert reply["usage"]["prompt_tokens"] == 1 + len(encode(text, add_special_tokens=False).ids), messages


def said(content: str | None) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def test_a_question_cannot_end_its_own_turn(served: Served) -> None:
    """</s> typed by somebody is four words of toyworld's tokenizer, each unknown, where the template's is one token."""
    tokenizer = served.engines["tuned"].loaded.processor.tokenizer
    cut = served.engines["tuned"].prompt([Turn("A</s>USER: B", "")])
    assert cut.count(tokenizer.eos_token_id) == 0
    assert served.engines["tuned"].prompt([Turn("A", "C"), Turn("B", "")]).count(tokenizer.eos_token_id) == 1


def test_log_probs_list_the_tokens_of_the_text_whole_and_streamed(served: Served) -> None:
    for how in ({}, {"stop": ["there", "is a"]}, {"temperature": 1.5, "seed": 3}):
        asked: Any = {"model": "tuned", "messages": [user(TEXTS[0])], "max_tokens": NEW, "temperature": 0, **how}
        whole = served.client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
        choice, usage = whole.choices[0], whole.usage
        assert choice.logprobs is not None
        assert usage is not None
        tokens = choice.logprobs.content or []
        assert "".join(token.token for token in tokens) == choice.message.content
        assert b"".join(bytes(token.bytes or []) for token in tokens).decode() == choice.message.content
        assert len(tokens) == usage.completion_tokens
        for token in tokens:
            same = [other for other in token.top_logprobs if other.logprob == token.logprob]
            assert how.get("temperature") or (token.token, token.bytes) in [
                (other.token, other.bytes) for other in same
            ]
        stream = served.client.chat.completions.create(**asked, logprobs=True, top_logprobs=3, stream=True)
        choices = [chunk.choices[0] for chunk in stream]
        again = [token for choice in choices if choice.logprobs for token in choice.logprobs.content or []]
        assert [(token.token, token.bytes) for token in again] == [(token.token, token.bytes) for token in tokens]
        text = ""
        seen = ""
        for part in choices:
            text += part.delta.content or ""
            seen += "".join(token.token for token in (part.logprobs and part.logprobs.content) or [])
            assert text.startswith(seen)
        assert text == seen == choice.message.content


def test_openais_client_raises_its_own_errors(served: Served) -> None:
    with pytest.raises(openai.AuthenticationError):
        served.client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError, match="There is tuned, base"):
        served.client.chat.completions.create(model="none", messages=[user("A")])  # type: ignore[list-item]
    tool: Any = {"type": "function", "function": {"name": "f"}}
    with pytest.raises(openai.BadRequestError, match="tools"):
        served.client.chat.completions.create(model="tuned", messages=[user("A")], tools=[tool])  # type: ignore[list-item]


def test_a_conversation_with_system_text_and_a_later_picture(served: Served) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        user(with_picture("One.", PICTURES[0])),
        {"role": "assistant", "content": "Yes."},
        user("And?"),
        user(with_picture("Two.", PICTURES[1])),
    ]
    status, reply = served.chat(messages)
    assert status == 200
    loaded = served.engines["tuned"].loaded
    texts = "USER: <image>\nBe brief.\nOne. ASSISTANT: Yes.</s>USER: <image>\nAnd?\nTwo. ASSISTANT:"
    tokens = (
        1
        + 2 * 36
        + sum(
            len(loaded.processor.tokenizer.backend_tokenizer.encode(part, add_special_tokens=False).ids)
            for part in texts.split("<image>")
        )
    )
    assert reply["usage"]["prompt_tokens"] == tokens


def test_health_and_metrics(served: Served) -> None:
    assert_well(served)
    assert served.send("GET", "/health", key="") == (200, b'{"status":"ok"}')
    assert_refused(served.send("GET", "/metrics", key=""), 401)
    until(lambda: served.engines["tuned"].running == 0)  # the answer is there a moment before its slot is free
    status, text = served.send("GET", "/metrics")
    assert status == 200
    values = dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if not line.startswith("#"))
    assert float(values['relook_requests_total{model="tuned",status="200"}']) >= 1
    new_tokens = served.engines["tuned"].batch.counts.new_tokens
    assert float(values['relook_new_tokens_total{model="tuned"}']) == new_tokens > 1
    assert values['relook_running{model="tuned"}'] == "0.0"


def test_head_is_get_without_a_body(served: Served) -> None:
    for path in ("/health", "/v1/models", "/v1/models/tuned", "/v1/models/none", "/metrics", "/docs", "/openapi.json"):
        status, headers, body = served.send_for_all("GET", path)
        assert served.send("HEAD", path) == (status, b""), path
        found = served.send_for_all("HEAD", path)[1]
        assert (found["Content-Type"], body != b"") == (headers["Content-Type"], True)
        assert path == "/metrics" or found["Content-Length"] == str(len(body))
    assert served.send("HEAD", "/health", key="")[0] == 200
    assert served.send("HEAD", "/v1/models", key="")[0] == 401
    assert served.send("HEAD", "/v1/chat/completions")[0] == 405


def test_a_stream_is_not_to_be_held_back(served: Served) -> None:
    body = json.dumps({"model": "tuned", "messages": [user("A")], "max_tokens": 2, "stream": True}).encode()
    headers = served.send_for_all("POST", "/v1/chat/completions", body)[1]
    assert (headers["X-Accel-Buffering"], headers["Cache-Control"]) == ("no", "no-store")


def test_a_context_that_is_too_long_is_said_in_openais_words(served: Served) -> None:
    """LiteLLM and others know the error by them."""
    length = served.engines["tuned"].length
    said = f"This model's maximum context length is {length} tokens"
    for content in ("word " * 100_000, "a b " * length):
        status, reply = served.chat(content)
        assert (status, reply["error"]["code"]) == (400, "context_length_exceeded")
        assert said in reply["error"]["message"]


SITE = "https://site.example"
ASKS = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type,x-a"}


@pytest.mark.parametrize(("origins", "allowed"), [((SITE,), SITE), (("*",), "*"), (("https://a.example",), None)])
def test_pages_of_the_sites_that_are_named_may_ask(origins: tuple[str, ...], allowed: str | None) -> None:
    engine = Engine(as_loaded(tiny_relook()), EngineLimits(slots=2))
    with serving({"tuned": engine}, ServerLimits(KEY, origins=origins)) as served:
        # A browser asks without the key whether it may.
        status, headers, _ = served.send_for_all("OPTIONS", "/v1/chat/completions", key="", Origin=SITE, **ASKS)
        assert (status, headers["Access-Control-Allow-Origin"]) == (200 if allowed else 400, allowed)
        if allowed:
            assert "POST" in headers["Access-Control-Allow-Methods"]
            assert "x-a" in headers["Access-Control-Allow-Headers"]
        assert headers["Access-Control-Allow-Credentials"] is None
        body = json.dumps({"model": "tuned", "messages": [user("A")], "max_tokens": 2}).encode()
        for key, expected in ((KEY, 200), ("wrong", 401)):  # errors can be read, too
            status, headers, _ = served.send_for_all("POST", "/v1/chat/completions", body, key=key, Origin=SITE)
            assert (status, headers["Access-Control-Allow-Origin"]) == (expected, allowed)
        assert served.send_for_all("GET", "/v1/models")[1]["Access-Control-Allow-Origin"] is None or allowed == "*"


def test_no_site_is_named_by_itself(served: Served) -> None:
    for path in ("/v1/chat/completions", "/v1/models", "/health", "/metrics"):
        status, headers, _ = served.send_for_all("OPTIONS", path, Origin=SITE, **ASKS)
        assert (status, headers["Access-Control-Allow-Origin"]) == (405, None)


# --- those who leave, and too many


def test_a_client_that_goes_away_frees_its_slot(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = served.engines["tuned"]
    held, steps = Held(engine, monkeypatch), engine.batch.counts.steps
    for stream in (False, True):
        body = {"model": "tuned", "messages": [user("A")], "max_tokens": 400, "stream": stream}
        connection = http.client.HTTPConnection("127.0.0.1", served.port)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        assert held.inside.wait(30)
        assert connection.sock is not None
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        time.sleep(0.1)  # until the server has noticed
        held.go.set()
        until(lambda: engine.running == 0)
        assert engine.batch.counts.steps - steps < 400
        held.go.clear()
        held.inside.clear()
    held.go.set()
    assert_well(served)


def test_too_many_are_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(as_loaded(tiny_relook()), EngineLimits(slots=1, waiting=1))
    with serving({"tuned": engine}, ServerLimits()) as served:
        held, statuses = Held(engine, monkeypatch), []
        threads = [threading.Thread(target=lambda: statuses.append(served.chat(TEXTS[0])[0])) for _ in range(2)]
        threads[0].start()
        assert held.inside.wait(30)
        threads[1].start()
        until(lambda: engine.waiting == 1)
        assert_refused(served.chat(TEXTS[0]), 429, "waiting")
        with pytest.raises(openai.RateLimitError):
            served.client.chat.completions.create(model="tuned", messages=[user("A")])  # type: ignore[list-item]
        held.go.set()
        for thread in threads:
            thread.join()
        assert statuses == [200, 200]


def test_a_failing_step_is_a_short_error(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise RuntimeError("/work/secret/path.py")

    with monkeypatch.context() as patch:
        patch.setattr(served.engines["tuned"].batch.runner, "prefill", failing)
        assert_refused(served.chat("A"), 500, "failed")
        body = json.dumps({"model": "tuned", "messages": [user("A")], "stream": True}).encode()
        _, events = served.send("POST", "/v1/chat/completions", body)
        assert b'"error"' in events
        assert b"secret" not in events
    assert_well(served)


# --- two models from folders


def test_a_model_and_itself_with_its_change_switched_off(tmp_path: Path) -> None:
    """From one folder with a post decoder: the same weights stand behind both."""
    model = tiny_relook()
    model.save_pretrained(tmp_path / "pd")
    as_loaded(model).processor.save_pretrained(tmp_path / "pd")
    models = load_models([tmp_path / "pd"], LoadOptions(), with_base=True)
    assert list(models) == ["pd", "pd-base"]
    plain = save_tiny(tmp_path / "plain")
    image = Image.open(io.BytesIO(PICTURES[0]))
    texts = {name: loaded.generate([image], TEXTS[0], max_new_tokens=NEW) for name, loaded in models.items()}
    assert texts["pd-base"] == load_model(plain).generate([image], TEXTS[0], max_new_tokens=NEW) != texts["pd"]
    both = [loaded.core.model.language_model.embed_tokens.weight for loaded in models.values()]
    assert both[0].data_ptr() == both[1].data_ptr()
    beside = load_models([tmp_path / "pd"], LoadOptions(), plain)
    assert list(beside) == ["pd", "plain"]
    both = [loaded.core.model.language_model.embed_tokens.weight for loaded in beside.values()]
    assert both[0].data_ptr() == both[1].data_ptr()
    with pytest.raises(RelookError, match="nothing that could be switched off"):
        load_models([plain], LoadOptions(), with_base=True)


def test_several_models_share_what_is_equal_and_have_names_of_their_own(tmp_path: Path) -> None:
    plain, other = save_tiny(tmp_path / "plain"), save_tiny(tmp_path / "other" / "plain")
    tiny_relook().save_pretrained(tmp_path / "pd")
    as_loaded(tiny_relook()).processor.save_pretrained(tmp_path / "pd")
    models = load_models([tmp_path / "pd", plain, other], LoadOptions())
    assert list(models) == [f"{tmp_path.name}/pd", f"{tmp_path.name}/plain", "other/plain"]
    weights = [loaded.core.model.language_model.embed_tokens.weight for loaded in models.values()]
    assert len({weight.data_ptr() for weight in weights}) == 1
    with pytest.raises(RelookError, match="named twice"):
        load_models([plain, tmp_path / "other" / ".." / "plain"], LoadOptions())
    with pytest.raises(RelookError, match="single model"):
        load_models([plain, other], LoadOptions(), with_base=True)


def test_a_port_is_taken_or_the_user_is_told() -> None:
    with bind_socket("127.0.0.1", 0) as taken:
        assert taken.proto == socket.IPPROTO_TCP  # else asyncio leaves small pieces waiting for 40 ms
        taken.listen()
        for port in (taken.getsockname()[1], 70_000):
            with pytest.raises(RelookError, match="--port"):
                bind_socket("127.0.0.1", port)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_model_says_over_http_what_it_says_in_python(bits: int, base: Path) -> None:
    (model,) = load_models([base], LoadOptions(bits=bits, device="cpu")).values()
    with serving({"tuned": Engine(model, EngineLimits(slots=2))}, ServerLimits()) as quantised:
        status, reply = quantised.chat(with_picture(TEXTS[0], PICTURES[0]))
        assert status == 200
        again = load_model(base, bits=bits)
        picture = Image.open(io.BytesIO(PICTURES[0]))
        assert reply["choices"][0]["message"]["content"] == again.generate([picture], TEXTS[0], max_new_tokens=NEW)


def test_events_that_wait_for_a_slow_loop_come_together() -> None:
    class Emitter:
        """An engine that hands out all at once, from a thread."""

        def __init__(self, *events: Event) -> None:
            self.events = events

        def submit(self, request: Request, emit: Callable[[Event], None]) -> Any:
            thread = threading.Thread(target=lambda: [emit(event) for event in self.events])
            thread.start()
            thread.join()
            return SimpleNamespace(cancel=lambda: None)

    async def stream(*engines: Any) -> list[tuple[int, Event]]:
        received: list[tuple[int, Event]] = []
        try:
            async for index, event in AnswerStream([(engine, Request((1,), ())) for engine in engines]):
                received.append((index, event))
        except APIError as error:
            received.append((error.status, Event()))
        return received

    a, b = Emitter(Event("It"), Event(" is", finish="stop")), Emitter(Event("Yes", finish="length", reused=3))
    assert asyncio.run(stream(a, b)) == [
        (0, Event("It is", finish="stop")),
        (1, Event("Yes", finish="length", reused=3)),
    ]
    # What was said before a failure is told before it.
    failed = Emitter(Event("It"), Event(" is"), Event(finish="error"))
    assert asyncio.run(stream(failed)) == [(0, Event("It is")), (500, Event())]
