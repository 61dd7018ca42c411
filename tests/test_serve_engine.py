"""The serving engine: the text of transformers' `generate` at batch 1, whatever else is being answered."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.serving import NEW, PICTURES, Held, png, until
from helpers.tiny import tiny_llava, tiny_relook
from helpers.variants import variants
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from test_answering import MODELS, TEXTS, as_loaded
from test_llava_next import as_loaded as as_loaded_next
from test_llava_next import picture as next_picture
from test_llava_next import tiny_next, with_decoder
from torch.utils._python_dispatch import TorchDispatchMode

from relook import LoadedModel, load_model
from relook.data.images import EncodedImage, RecentCache
from relook.data.samples import Turn
from relook.data.templates import TEMPLATES, Template, with_image
from relook.errors import CheckpointError, DataError, RelookError
from relook.generate.answering import GenerationSettings, Prompt, generate_ids
from relook.generate.attention import WithoutCudnnAttention
from relook.generate.engine import Engine
from relook.generate.model_runner import ModelRunner
from relook.generate.request import (
    ActiveRequest,
    ContextTooLong,
    EngineLimits,
    Event,
    IncrementalText,
    QueueFull,
    Request,
    TokenOutput,
)
from relook.generate.scheduler import Scheduler
from relook.generate.text import Text
from relook.model.tokenizer import EACH_BYTE, load_tokenizer, token_bytes
from relook.model.trainable import untie_head
from relook.toyworld.build import make_processor

Question = tuple[tuple[bytes, ...], str]


QUESTIONS: list[Question] = [
    *(((picture,), text) for picture in PICTURES for text in TEXTS),
    *(((), text) for text in (*TEXTS, "A")),
    *((tuple(PICTURES[:2]), text) for text in TEXTS[:2]),
    ((PICTURES[0],), TEXTS[0] * 5),
]


@contextmanager
def engine_of(loaded: LoadedModel, template: str = "", **limits: Any) -> Iterator[Engine]:
    engine = Engine(loaded, EngineLimits(**{"slots": 4, **limits}), template)
    try:
        yield engine
    finally:
        engine.stop()


def test_a_function_runs_between_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the engine's thread, while an answer goes on; what it raises goes to who asked, and the engine lives on."""
    with engine_of(as_loaded(tiny_relook())) as engine:
        held = Held(engine, monkeypatch)
        events: list[Event] = []
        engine.submit(asked(engine, (), TEXTS[0]), events.append)
        assert held.inside.wait(30)
        names: list[str] = []
        waiting = threading.Thread(target=lambda: names.append(engine.run(lambda: threading.current_thread().name)))
        waiting.start()
        held.go.set()
        waiting.join()
        assert names == ["engine"]
        until(lambda: bool(events and events[-1].finish))
        assert "".join(event.text for event in events) == engine.loaded.generate((), TEXTS[0], max_new_tokens=NEW)
        with pytest.raises(ZeroDivisionError):
            engine.run(lambda: 1 / 0)
        assert engine.run(lambda: 1) == 1
    with pytest.raises(QueueFull):
        engine.run(lambda: 1)


def test_a_stopped_engine_gives_its_memory_back_at_once() -> None:
    """Not at some collection: its pool is most of a GPU's memory, of which the collector knows nothing."""
    gc.collect()
    gc.disable()
    try:
        with engine_of(as_loaded(tiny_relook())) as engine:
            text_of(engine.stream(asked(engine, PICTURES[:1], TEXTS[0])))
            pools = [weakref.ref(keys) for keys, _ in engine.batch.runner.pool.layers]
        del engine
        assert [pool() for pool in pools] == [None] * len(pools)
    finally:
        gc.enable()


def test_a_pass_leaves_the_models_config_alone() -> None:
    """Another engine, or an attention map, may run a model with the same config on another thread."""
    loaded = as_loaded(tiny_relook())
    model, seen = loaded.core.model.language_model, set[str]()
    model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda *_: seen.add(model.config._attn_implementation))
    before = model.config._attn_implementation
    with engine_of(loaded) as engine:
        text_of(engine.stream(asked(engine, PICTURES[:1], TEXTS[0])))
    assert seen == {before}


def asked(engine: Engine, images: Sequence[bytes], *texts: str, **how: Any) -> Request:
    """A request of a conversation: texts of user and model in turns, all images in the first."""
    read = tuple(map(engine.image, images))
    first = with_image(texts[0], len(images)) if images else texts[0]
    words = [first, *texts[1:], ""]
    turns = [Turn(*words[i : i + 2]) for i in range(0, len(words), 2)]
    return Request(engine.prompt(turns, read), read, **{"max_new_tokens": NEW, **how})


def text_of(events: Iterator[Event]) -> str:
    return "".join(event.text for event in events)


def at_once(engine: Engine, questions: Sequence[Question], **how: Any) -> list[str]:
    """The answers to many questions that are asked at the same time, every second one streamed."""
    said = [""] * len(questions)

    def ask(i: int) -> None:
        images, text = questions[i]
        said[i] = text_of(engine.stream(asked(engine, images, text, stream=i % 2 == 0, **how)))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def one_by_one(loaded: LoadedModel, questions: Sequence[Question], **how: Any) -> list[str]:
    return [
        loaded.generate([Image.open(io.BytesIO(image)) for image in images], text, **{"max_new_tokens": NEW, **how})
        for images, text in questions
    ]


# --- the text of `generate`


@pytest.mark.parametrize(
    "name", variants(["cross, deep", "self_cross"], {"self_cross"})
)  # test_answering.py has the others in such steps
def test_many_at_once_each_get_the_text_of_generate(name: str) -> None:
    loaded = as_loaded(MODELS[name]())
    expected = one_by_one(loaded, QUESTIONS, max_new_tokens=6)
    assert len(set(expected)) > 6
    with engine_of(loaded) as engine:
        assert at_once(engine, QUESTIONS, max_new_tokens=6) == expected
        assert (
            at_once(engine, QUESTIONS[6::-1], max_new_tokens=6) == expected[6::-1]
        )  # with all slots full of earlier ones
        until(lambda: engine.running == engine.waiting == 0)
        assert engine.batch.counts.images == len(PICTURES)


@pytest.mark.parametrize("make", variants([tiny_next, with_decoder], {with_decoder}), ids=["plain", "post decoder"])
def test_llava_next(make: Callable[[], Any]) -> None:
    """Images of different sizes take different numbers of positions, and of tiles."""
    loaded = as_loaded_next(make())
    pictures = [png(next_picture(size, i)) for i, size in enumerate([(40, 90), (90, 40), (64, 64), (200, 60)])]
    questions: list[Question] = [((picture,), text) for picture in pictures for text in TEXTS[:2]]
    questions += [((pictures[0], pictures[1]), TEXTS[0]), ((), TEXTS[1])]
    with engine_of(loaded) as engine:
        assert at_once(engine, questions, max_new_tokens=8) == one_by_one(loaded, questions, max_new_tokens=8)


def test_four_bits(base: Path) -> None:
    loaded = load_model(base, bits=4)
    expected = one_by_one(loaded, QUESTIONS[:6])
    assert expected != one_by_one(load_model(base), QUESTIONS[:6])
    with engine_of(loaded) as engine:
        assert at_once(engine, QUESTIONS[:6]) == expected


def test_a_conversation_goes_on_from_its_earlier_turns() -> None:
    loaded = as_loaded(tiny_relook())
    first = (TEXTS[0],)
    with engine_of(loaded) as engine:
        said = text_of(engine.stream(asked(engine, PICTURES[:1], *first)))
        at_once(engine, QUESTIONS[4:6])  # others come between
        again = asked(engine, PICTURES[:1], *first, said, TEXTS[1])
        events = list(engine.stream(again))
        assert events[-1].reused >= len(asked(engine, PICTURES[:1], *first).ids)
        images = engine.batch.counts.images
        with_another = asked(engine, PICTURES[:2], *first, said, TEXTS[1])
        other = list(engine.stream(with_another))
        assert other[-1].reused == 0  # the post decoder looks at both pictures from the first word on
        assert engine.batch.counts.images <= images + 1
    with engine_of(loaded) as fresh:
        assert "".join(event.text for event in events) == text_of(fresh.stream(again))
        assert "".join(event.text for event in other) == text_of(fresh.stream(with_another))


def test_equal_prompts_are_read_once() -> None:
    with engine_of(as_loaded(tiny_relook()), slots=8) as engine:
        length = len(asked(engine, *QUESTIONS[0]).ids)
        assert len(set(at_once(engine, QUESTIONS[:1] * 8))) == 1
        assert engine.batch.counts.prompt_tokens - engine.batch.counts.reused_tokens == length + 7


def test_answers_end_where_the_template_says(tiny: Path, tower: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a text, which may begin in the middle of a token."""
    loaded = load_model(tiny / "ckpt_safetensors", vision_tower=tower)
    plain = one_by_one(loaded, QUESTIONS[:4])
    for end in (plain[0][4:7], plain[1][9:11]):
        monkeypatch.setitem(TEMPLATES, "short", Template("short", "USER: ", "USER: ", " ASSISTANT:", " ", end))
        expected = one_by_one(loaded, QUESTIONS[:4], template="short")
        assert expected != plain
        with engine_of(loaded, "short") as engine:
            assert at_once(engine, QUESTIONS[:4]) == expected


def test_a_special_token_that_ends_the_template_ends_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded text leaves it out."""
    loaded = as_loaded(tiny_llava())
    tokenizer = loaded.processor.tokenizer
    with engine_of(loaded) as engine:
        words = text_of(engine.stream(asked(engine, *QUESTIONS[0]))).split()
    word = "▁" + words[2]
    tokenizer.add_special_tokens({"additional_special_tokens": [word]})
    monkeypatch.setitem(TEMPLATES, "short", Template("short", "USER: ", "USER: ", " ASSISTANT:", " ", word))
    with engine_of(loaded, "short") as engine:
        assert text_of(engine.stream(asked(engine, *QUESTIONS[0]))) == " ".join(words[: words.index(words[2])])


def test_a_stop_that_the_tokenizer_does_not_know_is_not_the_unknown_token() -> None:
    """v0 ends with ###, which toyworld's tokenizer cannot write: no answer holds it, and `generate` need not look."""
    model = tiny_llava()
    untie_head(model)
    loaded = as_loaded(model)
    tokenizer, head = loaded.processor.tokenizer, model.lm_head
    loaded.core.generation_config.suppress_tokens = None
    how = {"template": "v0"}
    assert not loaded.stop_arguments("v0")
    with engine_of(loaded, "v0") as engine:
        word = next(token.id for event in engine.stream(asked(engine, *QUESTIONS[0])) for token in event.tokens)
    with torch.no_grad():
        head.weight[[word, tokenizer.unk_token_id]] = head.weight[[tokenizer.unk_token_id, word]]
    expected = one_by_one(loaded, QUESTIONS[:4], **how)
    with engine_of(loaded, "v0") as engine:
        assert at_once(engine, QUESTIONS[:4]) == expected
        tokens = [token.id for event in engine.stream(asked(engine, *QUESTIONS[0])) for token in event.tokens]
    assert len(tokens) == NEW
    assert tokenizer.unk_token_id in tokens[:-1]


def test_attention_makes_no_plan_for_each_length_while_generate_grows_texts() -> None:
    loaded = as_loaded(tiny_relook())
    planning = []
    loaded.core.model.register_forward_pre_hook(lambda *_: planning.append(torch.backends.cuda.cudnn_sdp_enabled()))
    generate_ids(loaded, [Prompt(0, (), loaded.encoder().prompt(TEXTS[0], []))], GenerationSettings(max_new_tokens=2))
    assert planning
    assert not any(planning)
    before, any_length = torch.backends.cuda.cudnn_sdp_enabled(), WithoutCudnnAttention()
    with any_length:
        with any_length:
            pass
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


class Kernels(TorchDispatchMode):
    """Counts what would be kernels on a GPU: operations that are no views."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    "texts", variants([TEXTS[:1], TEXTS[:1] * 3, TEXTS], [TEXTS]), ids=["one", "of one length", "of several"]
)
def test_a_step_has_no_more_kernels_than_one_of_generate(texts: Sequence[str]) -> None:
    model = tiny_relook()
    language_model = model.model.language_model
    layers = language_model.layers
    for i in range(len(layers), 12):  # so that what is done in each layer counts
        layers.append(copy.deepcopy(layers[0]))
        layers[i].self_attn.layer_idx = i
    model.config.text_config.num_hidden_layers = language_model.config.num_hidden_layers = 12
    loaded = as_loaded(model)
    model.generation_config.eos_token_id = None
    picture, encoder = EncodedImage(PICTURES[0], "a picture"), loaded.encoder()
    prompts = [Prompt(i, (picture,), encoder.prompt(text, [picture])) for i, text in enumerate(texts)]
    plain: list[int] = []
    hook = model.model.register_forward_pre_hook(lambda *_: plain.append(kernels.count))
    with Kernels() as kernels:
        generate_ids(loaded, prompts, GenerationSettings(max_new_tokens=NEW))
    hook.remove()
    inputs = loaded.images.batch([picture])
    batch = Scheduler(ModelRunner(loaded, 4 * 400), 4, RecentCache(0, lambda _: 0))
    shown = {picture: inputs}
    batch.waiting.extend(Text(prompt.ids, (picture,), NEW, lambda *_: False, image_inputs=shown) for prompt in prompts)
    own: list[int] = []
    with Kernels() as kernels:
        while batch.busy:
            own.append(kernels.count)
            batch.step()
    assert own[5] - own[4] <= plain[5] - plain[4]


def test_a_warm_engine_answers_as_a_cold_one() -> None:
    loaded = as_loaded(tiny_relook())
    with engine_of(loaded, slots=5) as engine:
        engine.warm()
        assert engine.batch.counts.new_tokens == 0
        assert at_once(engine, QUESTIONS[:8]) == one_by_one(loaded, QUESTIONS[:8])


def test_generate_runs_beside_an_engine() -> None:
    """While the engine is inside a pass, the model's own forward passes attend as transformers'."""
    loaded = as_loaded(tiny_relook())
    expected = loaded.generate((), TEXTS[0], max_new_tokens=NEW)
    inside, go = threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
        if threading.current_thread().name == "engine":
            inside.set()
            assert go.wait(30)

    with engine_of(loaded) as engine:
        loaded.core.model.language_model.norm.register_forward_pre_hook(hold)
        events: list[Event] = []
        engine.submit(asked(engine, (), TEXTS[0]), events.append)
        assert inside.wait(30)
        beside = loaded.generate((), TEXTS[0], max_new_tokens=NEW)
        go.set()
        until(lambda: bool(events and events[-1].finish))
    assert beside == text_of(iter(events)) == expected


# --- sampling, stops, log-probs


def test_a_seed_draws_the_same_answer_whatever_else_is_being_answered() -> None:
    how = {"temperature": 1.5, "top_p": 0.9}
    with engine_of(as_loaded(tiny_llava())) as engine:
        alone = [text_of(engine.stream(asked(engine, *QUESTIONS[0], seed=seed, **how))) for seed in range(6)]
        assert len(set(alone)) > 3
        together: list[str] = [""] * 6

        def ask(seed: int) -> None:
            together[seed] = text_of(engine.stream(asked(engine, *QUESTIONS[0], seed=seed, **how)))

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        at_once(engine, QUESTIONS)  # greedy ones beside
        for thread in threads:
            thread.join()
        assert together == alone


def test_stop_texts_end_an_answer_and_are_not_part_of_it() -> None:
    with engine_of(as_loaded(tiny_llava())) as engine:
        whole = text_of(engine.stream(asked(engine, *QUESTIONS[0])))
        stop = whole[7:12]
        for stream in (True, False):
            events = list(engine.stream(asked(engine, *QUESTIONS[0], stop=("never said", stop), stream=stream)))
            assert "".join(event.text for event in events) == whole[: whole.index(stop)].strip()
            assert events[-1].finish == "stop"


def grown(tokenizer: Any, ids: Sequence[int], stops: Sequence[str] = (), top: int = 0) -> list[Event]:
    """What an answer of these tokens reports while it grows."""
    events: list[Event] = []
    text = IncrementalText(partial(token_bytes, tokenizer), stops)
    request = Request((), logprobs=True, top=top)
    answer = ActiveRequest(request, events.append, text, frozenset(), len(ids), inf)
    for id in ids:
        finish = answer.add(TokenOutput(id, top=((id, 0.0),)))
        answer.report(finish)
        if finish:
            break
    return events


@given(
    ids=st.lists(st.integers(0, 89), min_size=1, max_size=20),
    stops=st.lists(st.text("abc .", min_size=1, max_size=4), max_size=3),
)
def test_pieces_of_a_text_are_the_whole(ids: list[int], stops: list[str]) -> None:
    tokenizer = make_processor().tokenizer
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    cut = min([whole.index(stop) for stop in stops if stop in whole], default=len(whole))
    assert "".join(event.text for event in grown(tokenizer, ids, stops)) == whole[:cut].strip()


@given(ids=st.lists(st.integers(0, 1023), min_size=1, max_size=20), stop=st.text("aeit 狗", min_size=1, max_size=2))
@example(ids=[197, 0], stop="a")  # half a character, and a special token
def test_tokens_join_to_the_text_that_came_with_them(ids: list[int], stop: str, tiny: Path) -> None:
    """Llama's tokens in any order: bytes, halves of characters, spaces, special ones."""
    tokenizer = load_tokenizer(tiny / "ckpt_safetensors")
    for stops in ((), (stop,)):
        events = grown(tokenizer, ids, stops)
        text = "".join(event.text for event in events)
        tokens = [token for event in events for token in event.tokens]
        assert "".join(token.written[0][0] for token in tokens) == text
        assert b"".join(token.written[0][1] for token in tokens).decode(errors=EACH_BYTE) == text
        assert all(token.written[1] == token.written[0] for token in tokens)  # the same among the likeliest
        assert [token.id for token in tokens] == ids[: len(tokens)]
        if not stops:
            assert len(tokens) == len(ids)
        for n in range(1, len(events)):  # a token never comes before its text
            seen = "".join(event.text for event in events[:n])
            assert seen.startswith("".join(token.written[0][0] for event in events[:n] for token in event.tokens))


def test_characters_of_several_tokens_come_whole(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny / "ckpt_safetensors")
    said = " ".join(["ça 狗! 😀"] * 20)
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    events = grown(tokenizer, ids)
    assert "".join(event.text for event in events) == said
    assert not any("\ufffd" in event.text for event in events)
    emoji = next(event for event in events if "😀" in event.text)
    assert [token.written[0] for token in emoji.tokens[-4:]] == [
        ("", b"\xf0"), ("", b"\x9f"), ("", b"\x98"), ("😀", b"\x80")
    ]  # fmt: skip
    cut = grown(tokenizer, ids[:-1])  # within the last character
    assert "".join(event.text for event in cut) == said[:-1] + 3 * "\ufffd"
    stopped = grown(tokenizer, ids, ("😀",))
    assert b"".join(token.written[0][1] for event in stopped for token in event.tokens).decode() == "ça 狗!"


@pytest.mark.parametrize(("bits", "tolerance"), [(16, 1e-4), (8, 5e-2), (4, 1e-4)])
def test_log_probs_are_those_of_the_model(base: Path, bits: int, tolerance: float) -> None:
    """With 8 bits activations are rounded, too."""
    loaded = load_model(base, bits=bits)
    with engine_of(loaded) as engine:
        request = asked(engine, *QUESTIONS[0], logprobs=True, top=3)
        said = [token for event in engine.stream(request) for token in event.tokens]
    inputs = loaded.encode([Image.open(io.BytesIO(PICTURES[0]))], TEXTS[0])
    prompt = inputs["input_ids"].shape[1]
    ids = torch.tensor([[*request.ids, *(token.id for token in said)]])
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.inference_mode():
        log_probs = loaded.model(**inputs).logits[0, prompt - 1 : -1].log_softmax(-1)
    for token, row in zip(said, log_probs, strict=True):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=tolerance)
        assert [value for _, value in token.top] == pytest.approx(row.topk(3).values.tolist(), abs=tolerance)


# --- limits, and those who leave


def test_a_full_queue_refuses_and_who_leaves_frees_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_of(as_loaded(tiny_llava()), slots=1, waiting=1) as engine:
        held, events = Held(engine, monkeypatch), []
        request = asked(engine, *QUESTIONS[0])
        running = engine.submit(request, events.append)
        assert held.inside.wait(30)
        waiting = engine.submit(request, events.append)
        with pytest.raises(QueueFull):
            engine.submit(request, events.append)
        running.cancel()
        waiting.cancel()
        held.go.set()
        until(lambda: engine.running == engine.waiting == 0)
        assert [event.finish for event in events if event.finish] == ["timeout", "timeout"]
        assert text_of(engine.stream(request))


def test_leaving_a_stream_frees_its_slot() -> None:
    with engine_of(as_loaded(tiny_llava()), slots=1) as engine:
        engine.loaded.core.generation_config.eos_token_id = None
        for event in engine.stream(asked(engine, *QUESTIONS[0], max_new_tokens=400)):
            if event.text:
                break
        until(lambda: engine.running == 0)


def test_an_answer_that_takes_too_long_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_of(as_loaded(tiny_llava()), seconds=0.05) as engine:
        held = Held(engine, monkeypatch)
        threading.Timer(0.1, held.go.set).start()
        assert list(engine.stream(asked(engine, *QUESTIONS[0], max_new_tokens=400)))[-1].finish == "timeout"


def test_a_step_that_fails_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = as_loaded(tiny_relook())
    with engine_of(loaded) as engine:
        expected = text_of(engine.stream(asked(engine, *QUESTIONS[0])))
        with monkeypatch.context() as patch:
            patch.setattr(engine.batch.runner, "prefill", lambda *_: 1 / 0)
            assert [event.finish for event in engine.stream(asked(engine, *QUESTIONS[0]))] == ["error"]
        assert engine.alive
        assert text_of(engine.stream(asked(engine, *QUESTIONS[0]))) == expected


def test_stopping_finishes_what_runs_and_takes_nothing_new(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(as_loaded(tiny_llava()), EngineLimits(slots=1))
    expected = text_of(engine.stream(asked(engine, *QUESTIONS[0])))
    held, events = Held(engine, monkeypatch), []
    engine.submit(asked(engine, *QUESTIONS[0]), events.append)
    assert held.inside.wait(30)
    stopping = threading.Thread(target=engine.stop, args=(30,))
    stopping.start()
    until(lambda: engine._stopping)
    with pytest.raises(QueueFull, match="stopping"):
        engine.submit(asked(engine, *QUESTIONS[1]), events.append)
    held.go.set()
    stopping.join()
    assert text_of(iter(events)) == expected
    assert not engine.alive


def test_what_does_not_fit_is_said() -> None:
    loaded = as_loaded(tiny_llava())
    with engine_of(loaded, length=60) as engine:
        with pytest.raises(ContextTooLong, match=r"takes 6. positions"):
            asked(engine, PICTURES[:1], TEXTS[0] * 4)
        with pytest.raises(ContextTooLong, match="characters"):
            asked(engine, (), "a " * 10_000)
        events = list(engine.stream(asked(engine, *QUESTIONS[0], max_new_tokens=400)))
        assert events[-1].finish in ("length", "stop")
        with pytest.raises(DataError, match="in no known format"):
            engine.image(b"<svg xmlns='http://www.w3.org/2000/svg'/>")
    with pytest.raises(RelookError, match="16 slots do not fit"):
        Engine(loaded, EngineLimits(cache_gb=1e-6))
    loaded.core.generation_config.repetition_penalty = 1.3
    with pytest.raises(CheckpointError, match="only `generate` follows"):
        Engine(loaded, EngineLimits())
