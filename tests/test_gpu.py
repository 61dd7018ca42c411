"""What only a GPU shows: `python -m pytest -m gpu`. The reference is the same work on the CPU, in float32."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import dpo_keys, save_tiny, tilted, tiny_llava, tiny_relook, write_world
from test_activation_memory import counted_returns
from test_answering import as_loaded
from test_packing import PAD, row
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaModel

from relook import LoadedModel, load_model
from relook.data import packing
from relook.data.images import RecentCache
from relook.data.packing import TokenRow, Tree, copy_to_cpu, pack, to_device
from relook.data.samples import Turn
from relook.data.templates import with_image
from relook.doctor import OK, run_checks
from relook.evaluate.tasks.pope import question_text
from relook.files import read_json_object
from relook.forward import activation_memory
from relook.forward.packed_attention import PackedTrunk
from relook.generate import model_runner
from relook.generate.answering import GenerationSettings, Prompt, generate_ids
from relook.generate.attention import ExtentReads, PassView, attend
from relook.generate.dense_attention import NOTHING, DenseReads
from relook.generate.engine import Engine
from relook.generate.model_runner import ModelRunner
from relook.generate.passes import Prefill
from relook.generate.prefill_graph import graph_length
from relook.generate.request import EngineLimits, Request
from relook.generate.scheduler import CHUNK_POSITIONS, Scheduler, feature_bytes
from relook.generate.text import Text
from relook.model.load import add_post_decoder
from relook.model.tower_attention import segment_attention
from relook.recipe import build_recipe
from relook.toyworld import build
from relook.toyworld.build import shipped_base
from relook.toyworld.world import OBJECTS, Scene, draw_scene, sample_scenes
from relook.train.run import train

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("no_trunk_cache")]
REGIMES: dict[str, dict[str, Any]] = {
    "post decoder, cached": {"tune_post_decoder": True, "feature_cache": "disk"},
    "post decoder, live": {"tune_post_decoder": True, "feature_cache": "off"},
    "lora": {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.0},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(0, 4), (1, 4), (1000, 33), (7,)], ids=str)
def test_a_copy_to_the_host_is_the_same(
    dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "STAGING_BYTES", 5000)
    values = (1000 * torch.randn(*shape, device="cuda")).to(dtype)
    found = copy_to_cpu(values)
    assert not found.is_pinned()
    assert torch.equal(found, values.cpu())


def trees(times: int) -> list[Tree]:
    return [Tree.of([row("abcDEFG"), row("abcGH")]), Tree.of([row("abXYZ")])] * times


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("how", ["compiled", "flex"])
def test_packed_states_and_gradients_are_those_of_the_cpu(how: str, everything: bool) -> None:
    """Rows of several lengths, one after the other. Once layers are compiled for any, they are not compiled again."""
    here, there = (tiny_llava().model.language_model.to(device) for device in ("cpu", "cuda"))
    reads = PackedTrunk(there, how)
    for number, times in enumerate((5, 60, 30, 5, 100)):
        packed = pack(trees(times), PAD, everything, 10_000, packing.round_up_to_blocks, root_length=1)
        found: list[tuple[Tensor, Tensor]] = []
        for model, work in ((here, PackedTrunk(here, "dense")), (there, reads)):
            placed = to_device(packed, model.device)
            embeds = model.embed_tokens(placed.ids).detach().requires_grad_(True)
            with torch._dynamo.config.patch(error_on_recompile=how == "compiled" and number > 1):
                states = work(embeds, placed)
                tilted(states).square().mean().backward()
            assert embeds.grad is not None
            found.append((states.detach().cpu(), embeds.grad.cpu()))
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_reference_and_first_step_differ_by_no_more_than_bf16_does() -> None:
    """Compiled without gradients and with them, in rows of other trees: both round, and neither leans to one side."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_hidden_layers": 8}
    with torch.device("cuda"):
        exact = LlamaModel(LlamaConfig(vocab_size=1000, **sizes)).eval()
        head = torch.randn(1000, 512) / 512**0.5
    ids = torch.randint(5, 1000, (32, 140)).tolist()
    made = [
        Tree(tuple(row[:60]), tuple(TokenRow(tuple(row[start : start + 40]), (True,) * 40) for start in (60, 100)))
        for row in ids
    ]

    def log_probs(model: LlamaModel, how: str, order: list[int], grad: bool) -> Tensor:
        """Return those of each tree's targets, (32, 80)."""
        reads, found = PackedTrunk(model, how), torch.empty(32, 80)
        for numbers in torch.tensor(order).split(8):
            rows = [made[i] for i in numbers.tolist()]
            packed = to_device(pack(rows, PAD, False, 10_000, packing.round_up_to_blocks), "cuda")
            with torch.set_grad_enabled(grad):
                embeds = model.embed_tokens(packed.ids)
                states = reads(embeds.detach().requires_grad_(grad), packed)[packed.targets.tree, packed.targets.slot]
            logits = states.detach().float() @ head.float().T
            values = logits.log_softmax(-1).gather(-1, packed.targets.id[:, None])
            found[numbers] = values.view(len(rows), 80).cpu()
        return found

    truth = log_probs(exact, "dense", list(range(32)), False)
    rounded = copy.deepcopy(exact).bfloat16()
    reference = log_probs(rounded, "compiled", list(range(32)), False)
    step = log_probs(rounded, "compiled", torch.randperm(32).tolist(), True)
    noise, difference = (reference - truth).square().mean().sqrt(), step - reference
    assert 0 < noise < 0.1
    assert difference.square().mean().sqrt() < 2 * noise
    margins = difference[:, :40].sum(1) - difference[:, 40:].sum(1)  # of the loss, which leans to no side
    assert margins.mean().abs() < 4 * noise * 2**0.5 * (80 / 32) ** 0.5


@pytest.mark.parametrize("keys", list(REGIMES.values()), ids=list(REGIMES))
def test_training_is_that_of_the_cpu(keys: dict[str, Any], base: Path, tmp_path: Path) -> None:
    """Pairs of mixed lengths, so that rows are, too. Over a few steps: on a GPU sums have another order."""
    world, losses = write_world(tmp_path / "world"), {}
    for device, cpu in (("cpu", True), ("cuda", False)):
        more = {**keys, "use_cpu": cpu, "optim": "sgd", "learning_rate": 0.05, "max_steps": 6}
        out = train(build_recipe(dpo_keys(base, world, tmp_path / device / "run", **more)))
        losses[device] = [line["loss"] for line in json.loads((out / "run.json").read_text())["log"] if "loss" in line]
    assert len(losses["cpu"]) == 6
    assert losses["cpu"][0] != losses["cpu"][-1]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=2e-4)


def test_training_with_activations_that_leave_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed lengths, micro-batches, and measuring in between."""
    monkeypatch.setattr(activation_memory, "MIN_BYTES", 1)
    monkeypatch.setattr(build, "LAYERS", 6)
    base, world = save_tiny(tmp_path / "base"), write_world(tmp_path / "world")
    fetched = counted_returns(monkeypatch)
    more = {**REGIMES["lora"], "trunk_pass": "flex", "optim": "sgd", "learning_rate": 0.05, "max_steps": 4}
    more |= {
        "gradient_accumulation_steps": 2,
        "eval_fraction": 0.3,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "use_cpu": False,
    }
    losses = []
    for share in (0.0, 1.0):
        out = train(build_recipe(dpo_keys(base, world, tmp_path / str(share), activation_offloading=share, **more)))
        log = read_json_object(out / "run.json")["log"]
        losses.append([line[name] for name in ("loss", "eval_loss") for line in log if name in line])
        assert bool(fetched) == (share > 0)
    assert len(losses[0]) == 8
    assert losses[1] == pytest.approx(losses[0], rel=2e-4)


@pytest.mark.parametrize("how", ["compiled", "flex"])
def test_activations_that_leave_come_back_and_lend_their_memory(how: str) -> None:
    """Several passes, so that pinned memory is used again; the last share leaves two layers on the GPU."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_hidden_layers": 12}
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaModel(LlamaConfig(vocab_size=128, **sizes)).train()
    packed = to_device(pack(trees(400), PAD, False, 10_000, packing.round_up_to_blocks, root_length=1), model.device)
    embeds = model.embed_tokens(packed.ids).detach()
    peaks, gradients = [], []
    for share in (0, 0.5, 1):
        reads = PackedTrunk(model, how, activation_offloading=share)
        for _ in range(4):
            model.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            states = reads(embeds, packed)
            # What is above the trunk gives memory free in the backward pass, which others take at once.
            tilted(states).square().mean().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for found in gradients[1:]:
        torch.testing.assert_close(found, gradients[0], rtol=1e-4, atol=1e-6)
    weights = sum(g.nbytes for g in gradients[0])
    all_, half, two = (peak - weights for peak in peaks)
    assert half < 0.65 * all_
    assert two < 0.35 * all_


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Scene]]:
    folder, made = tmp_path_factory.mktemp("pictures"), []
    for number, scene in enumerate(sample_scenes(3, "test", 20)):
        path = folder / f"{number}.png"
        draw_scene(scene).save(path)
        made.append((path, scene))
    return made


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_model_answers(bits: int, pictures: list[tuple[Path, Scene]]) -> None:
    """The shipped base knows what is in a picture, in 8 and in 4 bits too; the engine says what `generate` does."""
    loaded = load_model(shipped_base(), dtype="bfloat16", bits=bits, device="cuda")
    layer = loaded.model.model.language_model.layers[0].mlp.up_proj
    assert type(layer).__name__ == {8: "Linear8bitLt", 4: "Linear4bit"}[bits]
    encoder = loaded.encoder()
    asked = []
    for path, scene in pictures:
        absent = next(name for name in OBJECTS if name not in scene.names)
        asked += [(path, question_text(scene.names[0]), "Yes"), (path, question_text(absent), "No")]
    prompts = [Prompt(i, (path,), encoder.prompt(text, [path])) for i, (path, text, _) in enumerate(asked)]
    said = [
        loaded.decode(generate_ids(loaded, [prompt], GenerationSettings(max_new_tokens=8))[0]) for prompt in prompts
    ]
    right = sum(text.startswith(truth) for text, (_, _, truth) in zip(said, asked, strict=True))
    assert right >= 0.8 * len(asked)
    engine = Engine(loaded, EngineLimits(slots=4))
    try:
        answers = []
        for path, text, _ in asked:
            image = engine.image(path.read_bytes())
            prompt = engine.prompt([Turn(with_image(text), "")], [image])
            answers.append("".join(event.text for event in engine.stream(Request(prompt, (image,), 8))))
    finally:
        engine.stop()
    assert sum(a.strip() == b.strip() for a, b in zip(answers, said, strict=True)) >= 0.9 * len(asked)


def test_the_doctor_finds_a_gpu_that_works() -> None:
    states = {one.check: one.state for one in run_checks()}
    assert (states["FlexAttention"], states["bf16"]) == (OK, OK)
    assert any(name.startswith("GPU 0") for name in states)


# --- the engine


def engine_texts(
    loaded: LoadedModel, prompts: list[Prompt], places: int = 6000, chunk: int = CHUNK_POSITIONS
) -> tuple[Scheduler, list[Text]]:
    settings = loaded.core.generation_config
    banned = tuple(settings.suppress_tokens or ()), tuple(settings.begin_suppress_tokens or ())
    batch = Scheduler(ModelRunner(loaded, places, banned), 64, RecentCache(1 << 28, feature_bytes), chunk)
    ends = lambda token, _: token == settings.eos_token_id  # noqa: E731
    inputs = {image: loaded.images.inputs(image) for prompt in prompts for image in prompt.images}
    return batch, [Text(prompt.ids, prompt.images, 24, ends, image_inputs=inputs) for prompt in prompts]


def prompts_on(loaded: LoadedModel, pictures: list[tuple[Path, Scene]]) -> list[Prompt]:
    encoder, asked = loaded.encoder(), []
    for path, scene in pictures[:12]:
        asked += [(path, "Describe this image in detail."), (path, question_text(scene.names[0]))]
    return [Prompt(i, (path,), encoder.prompt(text, [path])) for i, (path, text) in enumerate(asked)]


@pytest.mark.parametrize("post_decoder", [{}, {"depth": 2}, {"attention": "self_cross"}], ids=str)
def test_replayed_and_compiled_steps_give_the_cpus_texts(
    post_decoder: dict[str, Any], pictures: list[tuple[Path, Scene]]
) -> None:
    """float32, the first alone, the others three at a time; what is warm captures and compiles nothing more."""
    loaded, there = (load_model(shipped_base(), device=device) for device in ("cpu", "cuda"))
    if post_decoder:
        loaded, there = (as_loaded(tiny_relook(**post_decoder)) for _ in range(2))
        there.model.to("cuda")
    prompts = prompts_on(loaded, pictures)
    here, wanted = engine_texts(loaded, prompts)
    here.waiting.extend(wanted)
    while here.busy:
        here.step()
    batch, texts = engine_texts(there, prompts)
    assert batch.runner.compiled
    for turn in range(2):
        left = list(texts)
        with torch._dynamo.config.patch(error_on_recompile=turn > 0):
            while left or batch.busy:
                count = 3 if batch.busy else 1
                batch.waiting.extend(left[:count])
                del left[:count]
                batch.step()
        assert batch.runner.compiled
        assert [text.tokens for text in texts] == [text.tokens for text in wanted]
        graphs = len(batch.runner._graphs)
        texts = engine_texts(there, prompts)[1]
    assert graphs == len(batch.runner._graphs)


@pytest.mark.parametrize("attention", ["cross", "self_cross"])
def test_prompts_are_read_in_chunks_that_end_none(attention: str, pictures: list[tuple[Path, Scene]]) -> None:
    """bf16, where FlashAttention reads prompts. The post decoder is untrained, so that texts are decided."""
    loaded = load_model(shipped_base(), dtype="bfloat16", device="cuda")
    loaded.model = add_post_decoder(loaded.model, {"attention": attention}, None)
    prompts, answers = prompts_on(loaded, pictures), []
    for chunk in (CHUNK_POSITIONS, 16):
        batch, texts = engine_texts(loaded, prompts, chunk=chunk)
        batch.waiting.append(texts[0])
        batch.step()  # the others are read between the steps of this one
        batch.waiting.extend(texts[1:])
        while batch.busy:
            batch.step()
        assert batch.runner.compiled
        assert not any(text.failed for text in texts)
        answers.append([text.tokens for text in texts])
    whole, chunked = answers
    assert sum(a == b for a, b in zip(whole, chunked, strict=True)) >= 0.8 * len(prompts)


@pytest.mark.parametrize("attention", ["cross", "self_cross"])
def test_prompts_that_a_graph_reads_have_the_same_states(
    attention: str, pictures: list[tuple[Path, Scene]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16; whole prompts and chunks, alone and side by side, with beginnings that they share and without."""
    loaded = load_model(shipped_base(), dtype="bfloat16", device="cuda")
    loaded.model = add_post_decoder(loaded.model, {"attention": attention}, None)
    for chunk in (CHUNK_POSITIONS, 40):
        batch, texts = engine_texts(loaded, prompts_on(loaded, pictures), chunk=chunk)
        read, lengths = batch.runner._read_prompts, []

        def read_twice(prefill: Prefill) -> Tensor:
            lengths.append(graph_length(prefill))  # noqa: B023
            with monkeypatch.context() as patch:
                patch.setattr(model_runner, "graph_length", lambda _: None)
                expected = read(prefill).clone()  # noqa: B023
            states = read(prefill)  # noqa: B023
            torch.testing.assert_close(states, expected, atol=0.05, rtol=0.05)
            return states

        batch.runner._read_prompts = read_twice  # type: ignore[method-assign]
        batch.waiting.append(texts[0])
        batch.step()
        batch.waiting.extend(texts[1:])
        while batch.busy:
            batch.step()
        assert batch.runner.compiled
        assert not any(text.failed for text in texts)
        assert set(batch.runner._prefill_graphs) == set(filter(None, lengths)) != set()


def test_a_replayed_tower_gives_the_same_features(pictures: list[tuple[Path, Scene]]) -> None:
    """As many images as a graph is recorded for, fewer and more; each number twice, over other pictures."""
    loaded = as_loaded(tiny_relook())
    loaded.model.to("cuda")
    replayed, plain = (ModelRunner(loaded, 100, compiled=compiled) for compiled in (True, False))
    inputs = [loaded.images.inputs(path) for path, _ in pictures]
    for count in (1, 3, 8, 9):
        for images in (inputs[:count], inputs[-count:]):
            for features, expected in zip(replayed.encode_images(images), plain.encode_images(images), strict=True):
                torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    assert sorted(count for count, _ in replayed._tower_graphs) == [1, 4, 8]
    assert not plain._tower_graphs


def test_a_step_launches_one_graph(pictures: list[tuple[Path, Scene]]) -> None:
    loaded = load_model(shipped_base(), dtype="bfloat16", device="cuda")
    loaded.core.generation_config.eos_token_id = None
    batch, texts = engine_texts(loaded, prompts_on(loaded, pictures))
    batch.waiting.extend(texts)
    for _ in range(4):
        batch.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(5):
            batch.step()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts.get("cudaGraphLaunch") == 5
    assert not counts.get("cudaLaunchKernel")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(32, 32, 128), (32, 8, 128), (4, 4, 64), (4, 2, 32)])
def test_the_decode_kernel_attends_as_plain_operations_do(
    dtype: torch.dtype, heads: int, key_heads: int, size: int
) -> None:
    """Groups of one query and of many, extents of one place and of many, and one that is empty."""
    torch.manual_seed(0)
    kv = tuple(torch.randn(6000, key_heads, size, device="cuda", dtype=dtype) for _ in range(2))
    ints = lambda values: torch.tensor(values, dtype=torch.int32, device="cuda")  # noqa: E731
    counts, extents = [1, 1, 1, 18, 3], [(4000, 700), (0, 1), (900, 0), (2000, 640), (5, 333)]
    query = torch.randn(sum(counts), heads, size, device="cuda", dtype=dtype)
    keys, values = (side.float() for side in kv)
    expected = DenseReads(counts, [NOTHING] * 5, extents, keys).attend(query.float(), (keys, values), size**-0.5)
    ends, firsts, used = [0, 1, 2, 3, 21, 24], [first for first, _ in extents], [length for _, length in extents]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    close = partial(torch.testing.assert_close, atol=tolerance, rtol=tolerance)
    for pieces in (1, 4):
        reads = ExtentReads(ints(ends), ints([*firsts, 0]), ints(used), 18, 704, False, pieces)
        close(attend(query, (kv[0], kv[1]), PassView(ints([]), [reads], True), size**-0.5).float(), expected)
        # The beginning that a group shares, and what each query has alone: some of either are empty.
        alone = [(3000 + 40 * n, 7 * n % 31) for n in range(len(query))]
        shared = [extent for count, extent in zip(counts, extents, strict=True) for _ in range(count)]
        both = DenseReads([1] * len(query), alone, shared, keys).attend(query.float(), (keys, values), size**-0.5)
        starts, lengths = ints([first for first, _ in alone] + [0]), ints([length for _, length in alone])
        own = ExtentReads(ints(range(len(query) + 1)), starts, lengths, 1, 31, False, 1)
        close(attend(query, (kv[0], kv[1]), PassView(ints([]), [reads, own], True), size**-0.5).float(), both)


def test_a_tower_attends_within_its_segments_and_passes_gradients() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    states = [torch.randn(1, 4, 300, 80, device="cuda", generator=generator) for _ in range(4)]
    bounds = torch.tensor([0, 64, 128, 140, 300], device="cuda", dtype=torch.int32)

    def run(dtype: torch.dtype) -> list[Tensor]:
        query, key, value = (tensor.to(dtype, copy=True).requires_grad_() for tensor in states[:3])
        output, _ = segment_attention(nn.Identity(), query, key, value, None, bounds, 160)
        (output * states[3].transpose(1, 2)).sum().backward()
        return [output.detach(), *(tensor.grad for tensor in (query, key, value) if tensor.grad is not None)]

    parts = [tensor.split(bounds.diff().tolist(), 2) for tensor in states[:3]]
    rows = [scaled_dot_product_attention(*qkv).transpose(1, 2) for qkv in zip(*parts, strict=True)]
    exact, half = run(torch.float32), run(torch.bfloat16)
    torch.testing.assert_close(exact[0], torch.cat(rows, 1), atol=1e-5, rtol=1e-4)
    for found, expected in zip(half, exact, strict=True):  # FlashAttention
        torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)
