"""The engine's parts: what is read where, who gets which cells, and texts that come and go in any order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.serving import PICTURES
from helpers.tiny import tiny_llava, tiny_relook
from hypothesis import given, settings
from hypothesis import strategies as st
from test_answering import TEXTS, as_loaded
from torch import Tensor

from relook import LoadedModel
from relook.data.images import EncodedImage, RecentCache
from relook.generate.dense_attention import NOTHING, DenseReads, Span
from relook.generate.kv_extents import ExtentAllocator, shared_length
from relook.generate.model_runner import ModelRunner, run_layer
from relook.generate.scheduler import Scheduler
from relook.generate.shared_projections import share_projections
from relook.generate.text import Text
from relook.serve.server import share_equal_tensors

POOL, HEADS, KEY_HEADS, SIZE = 60, 4, 2, 8
NEW = 8
Models = dict[str, LoadedModel]
Tokens = dict[str, list[list[int]]]  # of the answers, by model


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention_by_hand(query_HD: Tensor, cells: Sequence[int], kv: tuple[Tensor, Tensor]) -> Tensor:
    """One query's softmax over some cells, each head by itself."""
    if not cells:
        return torch.zeros_like(query_HD)
    rows = []
    for head, query in enumerate(query_HD):
        key_head = head // (HEADS // KEY_HEADS)
        keys, values = (side[list(cells), key_head] for side in kv)
        rows.append((keys @ query * SIZE**-0.5).softmax(0) @ values)
    return torch.stack(rows)


@st.composite
def texts(draw: Any) -> tuple[list[int], list[Span], list[Span]]:
    """New positions of some texts, what they have alone, and what neighbours share."""
    counts, own, shared, first = [], [], [], 20
    for _ in range(draw(st.integers(1, 4))):
        length = draw(st.integers(0, 6))
        beginning = (draw(st.integers(0, 20 - length)), length) if length else NOTHING
        for _ in range(draw(st.integers(1, 3))):
            used = draw(st.integers(0 if length else 1, 3))
            counts.append(draw(st.integers(1, used)) if used else 1)
            own.append((first, used) if used else NOTHING)
            shared.append(beginning)
            first += used
    return counts, own, shared


@given(texts())
def test_dense_reads_are_attention_over_the_places_that_each_query_sees(
    drawn: tuple[list[int], list[Span], list[Span]],
) -> None:
    counts, own, shared = drawn
    kv, query = (
        (numbers(0, POOL, KEY_HEADS, SIZE), numbers(1, POOL, KEY_HEADS, SIZE)),
        numbers(2, sum(counts), HEADS, SIZE),
    )
    mixed = DenseReads(counts, own, shared, kv[0]).attend(query, kv, SIZE**-0.5)
    expected, position = [], 0
    for count, (first, used), (begin, length) in zip(counts, own, shared, strict=True):
        for i in range(count):
            seen = [*range(begin, begin + length), *range(first, first + used - count + 1 + i if used else first)]
            expected.append(attention_by_hand(query[position], seen, kv))
            position += 1
    torch.testing.assert_close(mixed, torch.stack(expected))


@given(texts(), st.integers(1, 5), st.integers(1, 5), st.integers(0, 5))
def test_steps_see_what_the_steps_before_wrote_and_leave_it_in_the_pool(
    drawn: tuple[list[int], list[Span], list[Span]], steps: int, room: int, stop: int
) -> None:
    _, own, shared = drawn
    own = [(20 + 10 * i, used or 1) for i, (_, used) in enumerate(own)]  # with room behind them
    size = max(first + used for first, used in own) + 6
    kv = (numbers(0, size, KEY_HEADS, SIZE), numbers(1, size, KEY_HEADS, SIZE))
    pool = (kv[0].clone(), kv[1].clone())
    before = [side.clone() for side in pool]
    rooms = [used - 1 + room for _, used in own]
    rows = len(own)
    reads = DenseReads([1] * rows, own, shared, kv[0], steps, rooms)
    for step in range(steps):
        new = numbers(10 + step, rows, KEY_HEADS, SIZE), numbers(20 + step, rows, KEY_HEADS, SIZE)
        query = numbers(30 + step, rows, HEADS, SIZE)
        for row, (first, used) in enumerate(own):
            for side, fresh in zip(kv, new, strict=True):
                side[first + used - 1 + step] = fresh[row]
        mixed = reads.attend(query, pool, SIZE**-0.5, new)
        reads.advance()
        if step == stop:
            reads.write_back()
        for row, ((first, used), (begin, length)) in enumerate(zip(own, shared, strict=True)):
            seen = [*range(begin, begin + length), *range(first, first + used + step)]
            torch.testing.assert_close(mixed[row], attention_by_hand(query[row], seen, kv))
    reads.write_back()
    for side, stored, untouched in zip(kv, pool, before, strict=True):
        expected = untouched.clone()
        for (first, used), most in zip(own, rooms, strict=True):
            end = first + min(most, used - 1 + steps)
            expected[first + used - 1 : end] = side[first + used - 1 : end]
        assert torch.equal(stored, expected)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=60))
def test_places_are_given_once_and_come_back(actions: list[tuple[bool, int]]) -> None:
    allocator, taken = ExtentAllocator(30), []
    for take, count in actions:
        if take:
            used = {place for first, size in taken for place in range(first, first + size)}
            first = allocator.allocate(count)
            longest = max(
                (len(run) for run in "".join(" "[i in used :] or "x" for i in range(30)).split("x")), default=0
            )
            assert (first is None) == (longest < count)
            if first is not None:
                assert not used.intersection(range(first, first + count))
                taken.append((first, count))
        elif taken:
            allocator.release(*taken.pop(count % len(taken)))
    for extent in taken:
        allocator.release(*extent)
    assert allocator.free == [(0, 30)]


@given(st.lists(st.integers(0, 1), max_size=6), st.lists(st.integers(0, 1), max_size=6), st.integers(0, 6))
def test_what_two_sequences_begin_with(a: list[int], b: list[int], most: int) -> None:
    expected = 0
    while expected < min(len(a), len(b), most) and a[expected] == b[expected]:
        expected += 1
    assert shared_length(a, b, most) == expected


# --- texts


@pytest.fixture(scope="module")
def models() -> Models:
    makers = {
        "plain": tiny_llava,
        "cross": tiny_relook,
        "self_cross": lambda: tiny_relook(attention="self_cross", depth=2),
    }
    return {name: as_loaded(make()) for name, make in makers.items()}


@pytest.fixture(scope="module")
def asked() -> list[tuple[tuple[EncodedImage, ...], str]]:
    a, b, c = (EncodedImage(picture, "a picture") for picture in PICTURES)
    rows: list[tuple[tuple[EncodedImage, ...], str]] = [((a,), text) for text in TEXTS]
    rows += [((b,), text * 4) for text in TEXTS[:2]] + [((c,), TEXTS[0]), ((a, b), TEXTS[1]), ((), TEXTS[2] * 3)]
    return [*rows, ((), TEXTS[2] * 3 + TEXTS[0]), ((c,), TEXTS[0])]


@pytest.fixture(scope="module")
def by_generate(models: Models, asked: list[Any]) -> Tokens:
    """Tokens of transformers' `generate` at batch 1."""
    said = {}
    for name, loaded in models.items():
        rows = []
        for images, text in asked:
            inputs = loaded.encode(images, text)
            output = loaded.model.generate(**inputs, do_sample=False, max_new_tokens=NEW)
            rows.append(output[0, inputs["input_ids"].shape[1] :].tolist())
        said[name] = rows
    return said


def batch_of(loaded: LoadedModel, cells: int, rows: int, **how: Any) -> Scheduler:
    settings = loaded.core.generation_config
    banned = tuple(settings.suppress_tokens or ()), tuple(settings.begin_suppress_tokens or ())
    return Scheduler(ModelRunner(loaded, cells, banned), rows, RecentCache(1 << 20, lambda _: 1), **how)


def text_of(
    loaded: LoadedModel,
    ids: tuple[int, ...],
    pictures: tuple[EncodedImage, ...],
    eos: int | None = None,
    new: int = NEW,
) -> Text:
    """A text that ends with a token, where one is given."""
    inputs = {picture: loaded.images.inputs(picture) for picture in pictures}
    return Text(ids, pictures, new, lambda token, _: token == eos, image_inputs=inputs)


@settings(max_examples=6)
@given(st.sampled_from(["plain", "cross", "self_cross"]), st.integers(0, 2**32))
def test_texts_are_those_of_generate_however_they_come_and_go(
    models: Models,
    asked: list[Any],
    by_generate: Tokens,
    name: str,
    seed: int,
) -> None:
    """In any order, beside any others, cut into chunks, in a pool with hardly any room, some cancelled."""
    come_and_go(models[name], asked, by_generate[name], random.Random(seed))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "cross", "self_cross"])
def test_many_texts_are_those_of_generate(models: Models, asked: list[Any], by_generate: Tokens, name: str) -> None:
    for seed in range(20):
        come_and_go(models[name], asked, by_generate[name], random.Random(seed))


def come_and_go(loaded: LoadedModel, asked: list[Any], by_generate: list[list[int]], rng: random.Random) -> None:
    """Answer the texts by one schedule; `by_generate` has their tokens."""
    encoder, eos = loaded.encoder(), loaded.core.generation_config.eos_token_id
    prompts = [encoder.prompt(text, images) for images, text in asked]
    cells = rng.choice([max(map(len, prompts)) + NEW, 300, 2000])
    batch = batch_of(
        loaded, cells, rng.choice([1, 3, 20]), chunk=rng.choice([7, 64, 1000]), keeps_answers=rng.random() < 0.5
    )
    texts = [text_of(loaded, ids, images, eos) for ids, (images, _) in zip(prompts, asked, strict=True)]
    for text in texts:
        text.max_shared = rng.choice([None, None, 20])
    order = rng.sample(texts, len(texts))
    cancelled = set(rng.sample(texts, 2))
    while order or batch.busy:
        for _ in range(rng.choice([0, 1, 5])):
            if order:
                batch.waiting.append(order.pop())
        batch.step()
        for text in cancelled:
            if text not in order and not text.ended and rng.random() < 0.2:
                batch.cancel(text)
    for text, expected in zip(texts, by_generate, strict=True):
        assert text.tokens == (expected[: len(text.tokens)] if text in cancelled else expected)
    assert batch.counts.prompt_tokens - batch.counts.reused_tokens <= sum(map(len, prompts))
    while batch.extents.by_images:
        unused = [extent for extents in batch.extents.by_images.values() for extent in extents if not extent.users]
        batch.extents.drop(unused[0])
    assert batch.extents.allocator.free == [(0, cells)]
    if batch.runner.image_pool is not None:
        assert batch.extents.image_allocator.free == [(0, batch.runner.image_pool.cells)]


def test_an_answer_is_gone_on_from_and_another_picture_shares_the_words_before_it(
    models: Models,
) -> None:
    loaded = models["cross"]
    encoder = loaded.encoder()
    a, b = (EncodedImage(picture, "a picture") for picture in PICTURES[:2])
    batch = batch_of(loaded, 2000, 4)

    def ask(text: str, picture: EncodedImage) -> Text:
        asked = text_of(loaded, encoder.prompt(text, [picture]), (picture,))
        batch.waiting.append(asked)
        while batch.busy:
            batch.step()
        return asked

    words = TEXTS[0] * 4 + " <image> "
    first = ask(words + TEXTS[1], a)
    assert first.reused == 0
    again = ask(words + TEXTS[1] + TEXTS[2], a)
    further = ask(words + TEXTS[1] + TEXTS[2] + TEXTS[3], a)
    assert again.reused < further.reused
    other = ask(words + TEXTS[1], b)
    assert other.reused == other.ids.index(loaded.core.config.image_token_id)
    for text, (asked, picture) in zip(
        (again, further, other),
        ((TEXTS[1] + TEXTS[2], a), (TEXTS[1] + TEXTS[2] + TEXTS[3], a), (TEXTS[1], b)),
        strict=True,
    ):
        inputs = loaded.encode([picture], words + asked)
        length = inputs["input_ids"].shape[1]
        assert inputs["input_ids"][0].tolist() == list(text.ids)
        output = loaded.model.generate(**inputs, do_sample=False, max_new_tokens=NEW, eos_token_id=None)
        assert text.tokens == output[0, length:].tolist()


def test_a_pass_that_fails_ends_its_texts_and_no_others(
    models: Models,
    asked: list[Any],
    by_generate: Tokens,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = models["cross"]
    batch, encoder = batch_of(loaded, 2000, 8), loaded.encoder()
    images = [rows[0] for rows in asked]
    eos = loaded.core.generation_config.eos_token_id
    texts = [text_of(loaded, encoder.prompt(text, pictures), pictures, eos) for pictures, text in asked]
    batch.waiting.extend(texts[:2])
    batch.step()
    with monkeypatch.context() as patch:
        patch.setattr(batch.runner, "prefill", lambda *_: 1 / 0)
        batch.waiting.append(texts[4])
        with pytest.raises(ZeroDivisionError):
            batch.step()
    assert texts[4].failed
    while batch.busy:
        batch.step()
    assert [text.tokens for text in texts[:2]] == by_generate["cross"][:2]
    again = text_of(loaded, texts[4].ids, images[4], eos)
    batch.waiting.append(again)
    while batch.busy:
        batch.step()
    assert again.tokens == by_generate["cross"][4]


def test_a_text_that_cannot_be_admitted_ends_and_is_not_tried_again(
    models: Models, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = models["plain"]
    batch, (pictures, text) = batch_of(loaded, 2000, 4), asked[0]
    bad = text_of(loaded, loaded.encoder().prompt(text, pictures), pictures)
    batch.waiting.append(bad)
    monkeypatch.setattr("relook.generate.scheduler.row_positions", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        batch.step()
    assert bad.failed
    assert not batch.busy


def test_a_long_prompt_is_read_between_the_steps_of_others(models: Models) -> None:
    loaded = models["plain"]
    encoder = loaded.encoder()
    batch = batch_of(loaded, 2000, 4, chunk=10)
    short = text_of(loaded, encoder.prompt(TEXTS[0], ()), (), new=100)
    batch.waiting.append(short)
    batch.step()
    long = text_of(loaded, encoder.prompt(TEXTS[0] * 10, ()), (), new=1)
    batch.waiting.append(long)
    counts = []
    while not long.tokens:
        batch.step()
        counts.append(len(short.tokens))
    assert len(counts) == -(-(len(long.ids) - long.reused) // 10)
    assert counts == list(range(counts[0], counts[0] + len(counts)))


def test_a_chosen_token_does_not_wait_for_the_next_prompt(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the host runs ahead of the device; it hands out what is there before it launches more."""
    loaded, events = models["plain"], []
    batch = batch_of(loaded, 2000, 4)
    batch._runs_ahead = True
    prefill = batch.runner.prefill
    monkeypatch.setattr(batch.runner, "prefill", lambda work: (events.append("read"), prefill(work))[1])
    for text in TEXTS[:2]:
        prompt = text_of(loaded, loaded.encoder().prompt(text, ()), (), new=20)
        take = prompt.on_token
        prompt.on_token = lambda token, logprobs, take=take: (events.append("token"), take(token, logprobs))[1]
        batch.waiting.append(prompt)
        batch.step()
    assert events[:3] == ["read", "token", "token"]
    assert events[3] == "read"


def test_what_cannot_be_compiled_is_said_once(
    models: Models,
    asked: list[Any],
    by_generate: Tokens,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A layer that raises once it is compiled: the answers come, by the plain way."""
    loaded = models["plain"]
    batch, encoder = batch_of(loaded, 2000, 8), loaded.encoder()
    said: list[str] = []
    monkeypatch.setattr("relook.generate.model_runner.status", lambda text, **_: said.append(text))
    monkeypatch.setattr(batch.runner, "_run_layer", lambda *_: 1 / 0)
    eos = loaded.core.generation_config.eos_token_id
    texts = [text_of(loaded, encoder.prompt(text, pictures), pictures, eos) for pictures, text in asked]
    batch.waiting.extend(texts)
    while batch.busy:
        batch.step()
    assert [text.tokens for text in texts] == by_generate["plain"]
    assert len(said) == 1
    assert "cannot be compiled (ZeroDivisionError" in said[0]


def test_layers_are_compiled_for_one_position_and_for_any_number(models: Models, asked: list[Any]) -> None:
    """Whatever a pass reads: prompts and steps, extents that are shared, texts that come and go."""
    loaded = models["plain"]
    batch, encoder = batch_of(loaded, 2000, 8), loaded.encoder()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    batch.runner._run_layer = torch.compile(run_layer, fullgraph=True, dynamic=True, backend="eager")
    waiting = [text_of(loaded, encoder.prompt(text, pictures), pictures) for pictures, text in [asked[0], *asked]]
    while waiting or batch.busy:
        batch.waiting.extend(waiting[:3] if batch.busy else waiting[:1])
        del waiting[: 3 if batch.busy else 1]
        batch.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


# --- projections that share one product


@pytest.mark.parametrize("make", [tiny_llava, tiny_relook])
def test_a_model_whose_projections_share_a_matrix_is_saved_as_before(make: Any, tmp_path: Path) -> None:
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    share_projections(model.model.language_model.layers)
    model.save_pretrained(tmp_path)
    after = type(model).from_pretrained(tmp_path).state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_models_that_share_tensors_share_joint_matrices() -> None:
    first, second = tiny_llava(), tiny_llava()
    projection = lambda model: model.model.language_model.layers[0].self_attn.k_proj  # noqa: E731
    share_projections(first.model.language_model.layers)
    group = projection(first).group
    share_projections(first.model.language_model.layers)
    assert projection(first).group is group
    share_equal_tensors(second, first)
    share_projections(second.model.language_model.layers)
    assert projection(second).group.weight.data_ptr() == group.weight.data_ptr()
    projection(second).weight.data = projection(second).weight + 1  # other weights: the matrix is made anew
    share_projections(second.model.language_model.layers)
    assert projection(second).group.weight.data_ptr() != group.weight.data_ptr()
    q, k, _ = projection(second).group.sizes
    assert torch.equal(projection(second).group.weight[q : q + k], projection(first).weight + 1)
