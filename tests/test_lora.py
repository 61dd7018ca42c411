"""LoRA and its kin over trees: against plain rows through transformers and peft, quantised, and one on another."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import dpo_keys, sft_keys, write_world
from helpers.variants import variants
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

from relook import load_model
from relook.errors import CheckpointError, RecipeError
from relook.evaluate.pope_from_cache import shares_trunk
from relook.forward.collate import Collator, Item
from relook.forward.policy import Policy
from relook.model.export import merge_adapter
from relook.model.load import TENSORS_FILE, model_hash
from relook.model.trainable import set_trainable
from relook.recipe import build_recipe, load_recipe
from relook.train.loss import preference_loss
from relook.train.run import encode_samples, prepare_items, read_samples, train

pytestmark = pytest.mark.usefixtures("no_trunk_cache")

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NOT_QUANTISED = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]


class Bench:
    """A DPO recipe set up as `train` does it; what it trains moved by noise."""

    def __init__(self, base: Path, world: Path, out: Path, **keys: Any) -> None:
        self.recipe = build_recipe(dpo_keys(base, world, out, **{"lora_enable": True, "lora_r": 4, **keys}))
        how = {"bits": self.recipe.bits, "quant_type": self.recipe.quant_type, "double_quant": self.recipe.double_quant}
        self.loaded = load_model(base, self.recipe.adapter_name_or_path or None, **how)  # type: ignore[arg-type]
        self.examples, _ = encode_samples(self.recipe, self.loaded, *read_samples(self.recipe))
        set_trainable(self.loaded, self.recipe)
        self.policy = Policy(self.loaded.model)
        self.collator = Collator(self.policy, self.loaded.images, 3)
        self.items = prepare_items(self.recipe, self.policy, self.examples, self.collator, 4, lambda: self.policy)

    def move(self) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.policy.named_parameters():
            if parameter.requires_grad and ("lora_B" in name or "magnitude" in name):
                with torch.no_grad():
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)

    def loss(self, items: Sequence[Item]) -> tuple[Tensor, dict[str, float], Tensor]:
        inputs = self.collator(items)
        log_probs = self.policy(inputs["batch"])
        targets = inputs["batch"].packed.targets
        how = (self.recipe, log_probs, targets, inputs["reference"], inputs["weight"])
        return *preference_loss(*how), log_probs

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in self.loaded.core.named_parameters() if p.grad is not None}


def rows_of(item: Item, picture: Tensor) -> list[tuple[list[int], list[int], Tensor]]:
    """The rows of a pair, chosen and rejected: ids, the places of the supervised ones, pixels."""
    tree = item.example.tree
    return [
        (
            [*tree.prefix, *branch.ids],
            [len(tree.prefix) + i for i, flag in enumerate(branch.supervised) if flag],
            picture,
        )
        for branch in tree.branches
    ]


def row_log_probs(model: Any, rows: Sequence[tuple[list[int], list[int], Tensor]]) -> list[Tensor]:
    """Log-probs of the supervised tokens of right-padded rows, by transformers' own forward."""
    longest = max(len(ids) for ids, _, _ in rows)
    ids = torch.tensor([[*ids, *[3] * (longest - len(ids))] for ids, _, _ in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _, _ in rows])
    pictures = torch.stack([picture for _, _, picture in rows])
    logits = model(input_ids=ids, attention_mask=mask, pixel_values=pictures, use_cache=False).logits
    spoken = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return [spoken[row, [position - 1 for position in positions]] for row, (_, positions, _) in enumerate(rows)]


def plain_peft(base: Path, keys: dict[str, Any], bits: int = 16) -> Any:
    """The same adapter as peft puts it on transformers' model, given by names of its own."""
    quantised = BitsAndBytesConfig(
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=NOT_QUANTISED,
    )
    how = {} if bits == 16 else {"quantization_config": quantised, "device_map": {"": "cpu"}}
    model = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32, **how)
    names = [n for n, _ in model.named_modules() if "language_model" in n and n.rpartition(".")[2] in LINEARS]
    return get_peft_model(model, LoraConfig(target_modules=names, **keys))


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({"lora_r": 4, "lora_alpha": 12}, {"r": 4, "lora_alpha": 12}),
    "rslora": ({"lora_r": 9, "lora_alpha": 6, "use_rslora": True}, {"r": 9, "lora_alpha": 6, "use_rslora": True}),
    "dora": ({"lora_r": 2, "lora_alpha": 4, "use_dora": True}, {"r": 2, "lora_alpha": 4, "use_dora": True}),
    "8 bits": ({"bits": 8, "lora_alpha": 8}, {"r": 4, "lora_alpha": 8}),
    "4 bits": ({"bits": 4, "lora_alpha": 8}, {"r": 4, "lora_alpha": 8}),
}


@pytest.mark.parametrize("kind", variants(KINDS, {"dora", "4 bits"}))
def test_dpo_over_trees_is_dpo_over_two_rows(kind: str, base: Path, world: Path, tmp_path: Path) -> None:
    """Log-probs, reference, loss and every gradient, against rows in one padded batch; peft's own adapter off is the
    reference."""
    keys, theirs = KINDS[kind]
    bench = Bench(base, world, tmp_path / "run", beta=0.3, **keys)
    bench.move()
    plain = plain_peft(base, theirs, bench.recipe.bits)
    plain.train(bench.recipe.bits == 4)  # else bitsandbytes packs the weights: see trainable.keep_unpacked
    ours = dict(bench.loaded.core.named_parameters())
    for name, parameter in plain.get_base_model().named_parameters():
        if "lora_" in name:
            parameter.data.copy_(ours[name].data)
    items = sorted((bench.items[i] for i in (0, 13, 5, 20)), key=lambda item: -len(item.example.tree))
    loss, fields, log_probs = bench.loss(items)
    loss.backward()

    rows = [row for item in items for row in rows_of(item, bench.loaded.images(item.example.images[0]))]
    assert len({len(ids) for ids, _, _ in rows}) > 3
    policy_log_probs = row_log_probs(plain, rows)
    with torch.no_grad(), plain.disable_adapter():
        reference_log_probs = row_log_probs(plain, rows)
    ratios = torch.stack([p.sum() - a.sum() for p, a in zip(policy_log_probs, reference_log_probs, strict=True)])
    expected = -F.logsigmoid(0.3 * (ratios[::2] - ratios[1::2])).mean()
    expected.backward()

    tolerance = {16: 1e-5, 8: 5e-2, 4: 1e-5}[bench.recipe.bits]  # 8 bits: activations are rounded, too
    close: Callable[..., None] = torch.testing.assert_close
    assert abs(float(expected.detach()) - math.log(2)) > 5e-3
    close(log_probs, torch.cat(policy_log_probs), rtol=tolerance, atol=tolerance)
    close(
        torch.cat([i.reference for i in items if i.reference is not None]),
        torch.cat(reference_log_probs),
        rtol=1e-5,
        atol=tolerance,
    )
    close(loss, expected, rtol=tolerance, atol=tolerance)
    assert fields["rewards/chosen"] == pytest.approx(0.3 * float(ratios[::2].detach().mean()), abs=10 * tolerance)
    gradients = bench.gradients()
    expected_gradients = {n: p.grad for n, p in plain.get_base_model().named_parameters() if p.grad is not None}
    assert gradients.keys() == expected_gradients.keys()
    assert len(gradients) == 2 * 7 * (3 if bench.recipe.use_dora else 2)  # two layers, seven linears, A and B and norms
    for name, gradient in gradients.items():
        close(
            gradient,
            expected_gradients[name],
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputing_keeps_loras_gradients(reentrant: bool, base: Path, world: Path, tmp_path: Path) -> None:
    """The embeddings are frozen: nothing before the first adapter needs a gradient."""
    bench = Bench(base, world, tmp_path / "run")
    bench.move()
    bench.policy.train()
    calls = [0]
    layer = bench.loaded.core.model.language_model.layers[0]
    layer.mlp.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    gradients = []
    for _ in range(2):
        bench.policy.zero_grad()
        bench.loss(bench.items[:3])[0].backward()
        gradients.append(bench.gradients())
        bench.policy.activation_checkpointing_enable(
            **{next(k for k in KWARGS if hasattr(bench.loaded.core, k[:-7] + "_enable")): {"use_reentrant": reentrant}}
        )
    assert calls == [3]  # once, and then twice
    assert gradients[0].keys() == gradients[1].keys()
    assert any(gradient.any() for gradient in gradients[0].values())
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


KWARGS = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")


@pytest.mark.filterwarnings("error::FutureWarning")
def test_no_deprecated_name_is_used(base: Path, world: Path, tmp_path: Path) -> None:
    keys = {
        "lora_enable": True,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    }
    train(build_recipe(dpo_keys(base, world, tmp_path / "run", max_steps=1, **keys)))


# --- what LoRA goes on


def adapted(model: Any) -> set[str]:
    return {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}


def with_regime(base: Path, **keys: Any) -> Any:
    loaded = load_model(base)
    data = {"task": "dpo", "vg_path": "v", "pope_data_path": "p", "output_dir": "o", "model_name_or_path": base}
    set_trainable(loaded, build_recipe({**data, "lora_enable": True, "lora_r": 2, **keys}))
    return loaded.core


def test_targets_are_the_language_models_linear_layers(base: Path) -> None:
    language = load_model(base).model.model.language_model
    linears = {f"model.language_model.{n}" for n, m in language.named_modules() if isinstance(m, torch.nn.Linear)}
    assert adapted(with_regime(base)) == linears
    chosen = adapted(with_regime(base, lora_target_modules=["q_proj", "up_proj"]))
    assert chosen == {name for name in linears if name.endswith(("q_proj", "up_proj"))}
    with pytest.raises(RecipeError, match=r"no linear layer fc1.*down_proj, gate_proj"):
        with_regime(base, lora_target_modules=["fc1", "q_proj"])  # fc1 is the vision tower's


def test_biases_train_and_are_loaded(biased: Path, base: Path, world: Path, tmp_path: Path) -> None:
    keys = {"lora_enable": True, "lora_r": 2, "lora_bias": "all", "lora_target_modules": ["q_proj", "down_proj"]}
    out = train(build_recipe(dpo_keys(biased, world, tmp_path / "run", max_steps=2, **keys)))
    tensors = load_file(out / TENSORS_FILE)
    assert len(tensors) == 2 * 4  # two layers: q, k, v, o
    assert not any("vision_tower" in name for name in tensors)
    plain = LlavaForConditionalGeneration.from_pretrained(biased).eval()
    before = {name: p.clone() for name, p in plain.named_parameters()}
    merged = PeftModel.from_pretrained(plain, out).merge_and_unload()
    loaded = dict(load_model(out).model.named_parameters())
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(loaded[name], parameter)
    q, k = (f"model.language_model.layers.0.self_attn.{part}_proj.bias" for part in "qk")
    assert not torch.equal(loaded[q], before[q])
    assert not torch.equal(loaded[k], before[k])
    only = adapted_biases(with_regime(biased, **{**keys, "lora_bias": "lora_only"}))
    assert {name.split(".")[-3] for name in only} == {"q_proj"}
    with pytest.raises(RecipeError, match="has no such biases"):
        with_regime(base, lora_bias="all")


def adapted_biases(core: Any) -> list[str]:
    return [name for name, p in core.named_parameters() if p.requires_grad and name.endswith("bias")]


# --- quantised


@pytest.mark.parametrize(
    "keys",
    [{"bits": 4, "quant_type": "fp4", "double_quant": False}, pytest.param({"bits": 8}, marks=pytest.mark.slow)],
    ids=str,
)
def test_qlora_trains_what_it_should_and_nothing_is_upcast(
    keys: dict[str, Any], base: Path, world: Path, tmp_path: Path
) -> None:
    more = {"tune_mm_mlp_adapter": True, "tune_lm_head": True, "bf16": True, "gradient_checkpointing": True}
    recipe = build_recipe(dpo_keys(base, world, tmp_path / "run", max_steps=1, lora_enable=True, **more, **keys))
    loaded = load_model(base, dtype="bfloat16", **keys)
    quantiser = loaded.model.config.quantization_config
    assert (quantiser.load_in_4bit, quantiser.load_in_8bit) == (keys["bits"] == 4, keys["bits"] == 8)
    if keys["bits"] == 4:
        assert (quantiser.bnb_4bit_quant_type, quantiser.bnb_4bit_use_double_quant) == ("fp4", False)
    set_trainable(loaded, recipe)
    for name, parameter in loaded.core.named_parameters():
        trains = "lora_" in name or name.startswith(("lm_head", "model.multi_modal_projector"))
        linear = ".language_model.layers." in name and "norm" not in name and not trains
        quantised = torch.int8 if keys["bits"] == 8 else torch.uint8
        assert parameter.dtype == (torch.float32 if trains else quantised if linear else torch.bfloat16), name
        assert parameter.requires_grad == trains

    out = train(recipe)
    log = [entry for entry in json.loads((out / "run.json").read_text())["log"] if "loss" in entry]
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=5e-3)
    assert log[0]["grad_norm"] > 0
    trained = load_file(out / TENSORS_FILE)
    start = dict(LlavaForConditionalGeneration.from_pretrained(base).named_parameters())
    assert trained.keys() == {n for n in start if n.startswith(("lm_head", "model.multi_modal_projector"))}
    assert not any(torch.equal(tensor, start[name].bfloat16().float()) for name, tensor in trained.items())
    # On the whole base, as peft does it.
    plain = LlavaForConditionalGeneration.from_pretrained(base)
    plain.load_state_dict(trained, strict=False)
    merged = dict(PeftModel.from_pretrained(plain, out).merge_and_unload().named_parameters())
    for name, parameter in load_model(out).model.named_parameters():
        torch.testing.assert_close(parameter, merged[name])


def test_bits_ask_for_something_that_can_train(base: Path) -> None:
    with pytest.raises(RecipeError, match=r"Weights of 4 bits cannot train.*lora_enable"):
        with_regime(base, lora_enable=False, lora_r=128, bits=4)
    with pytest.raises(RecipeError, match=r"bits is 3\. It must be one of 16, 8, 4"):
        with_regime(base, bits=3)
    with pytest.raises(RecipeError, match="double_quant would have no effect without bits 4"):
        with_regime(base, bits=8, double_quant=False)
    with pytest.raises(CheckpointError, match="quant_type is 'int4'"):
        load_model(base, bits=4, quant_type="int4")


# --- one run on another


@pytest.fixture(scope="module")
def sft(base: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run over LLaVA conversations that has moved the model."""
    keys = {"lora_enable": True, "lora_r": 3, "learning_rate": 2e-2, "max_steps": 4}
    return train(build_recipe(sft_keys(base, world, tmp_path_factory.mktemp("sft") / "run", **keys)))


def by_peft(base: Path, *adapters: Path) -> Any:
    """A base with adapters merged into it one after another, by peft."""
    model = LlavaForConditionalGeneration.from_pretrained(base).eval()
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model


@pytest.mark.parametrize("how", variants(["model", "adapter"], {"adapter"}))
def test_a_policy_that_goes_on_from_an_sft_lora(how: str, sft: Path, base: Path, world: Path, tmp_path: Path) -> None:
    """Its reference is the SFT model, and what is saved is the new adapter on that."""
    on = {"model_name_or_path": sft} if how == "model" else {"adapter_name_or_path": sft}
    bench = Bench(sft if how == "model" else base, world, tmp_path / "bench", **on)
    tuned = by_peft(base, sft)
    for item in (bench.items[0], bench.items[13]):
        rows = rows_of(item, bench.loaded.images(item.example.images[0]))
        with torch.no_grad():
            expected, bare = (torch.cat(row_log_probs(model, rows)) for model in (tuned, by_peft(base)))
        assert item.reference is not None
        torch.testing.assert_close(item.reference, expected, rtol=1e-5, atol=1e-5)
        assert (expected - bare).abs().max() > 0.05

    keys = {"lora_enable": True, "lora_r": 2, "use_dora": True, "max_steps": 3, "learning_rate": 1e-2, **on}
    out = train(build_recipe(dpo_keys(base, world, tmp_path / "run", **keys)))
    log = [entry for entry in json.loads((out / "run.json").read_text())["log"] if "loss" in entry]
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    change = json.loads((out / "change.json").read_text())
    assert (change["base"], change["earlier"]) == (str(base.resolve()), [str(sft.resolve())])
    merge_adapter(base, out, tmp_path / "merged")
    merge_adapter(sft, out, tmp_path / "on_the_run")  # which has the first adapter already
    expected_tensors = dict(by_peft(base, sft, out).named_parameters())
    for model in (
        load_model(out),
        load_model(base, out),
        load_model(tmp_path / "merged"),
        load_model(tmp_path / "on_the_run"),
    ):
        for name, parameter in model.model.named_parameters():
            torch.testing.assert_close(parameter, expected_tensors[name], rtol=1e-5, atol=1e-5)
    assert not shares_trunk(out, base)
    with pytest.raises(CheckpointError, match=r"has no model\.post_decoder, which stage 1 takes"):
        merge_adapter(base, out, tmp_path / "stage", stage=1)


@pytest.mark.slow
def test_a_third_run_and_a_frozen_trunk_on_a_run(sft: Path, base: Path, world: Path, tmp_path: Path) -> None:
    second = train(
        build_recipe(dpo_keys(base, world, tmp_path / "2", model_name_or_path=sft, tune_lm_head=True, max_steps=2))
    )
    keys = {"lora_enable": True, "lora_r": 2, "max_steps": 2, "learning_rate": 1e-2}
    third = train(build_recipe(dpo_keys(base, world, tmp_path / "3", adapter_name_or_path=second, **keys)))
    assert json.loads((third / "change.json").read_text())["earlier"] == [str(sft.resolve()), str(second.resolve())]
    expected = by_peft(base, sft)
    expected.load_state_dict(load_file(second / TENSORS_FILE), strict=False)
    expected = PeftModel.from_pretrained(expected, third).merge_and_unload()
    loaded = dict(load_model(third).model.named_parameters())
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(loaded[name], parameter, rtol=1e-5, atol=1e-5)
    log = [e for e in json.loads((second / "run.json").read_text())["log"] if "loss" in e]
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # the trunk cache is of the SFT model
    before = model_hash(third)
    tensors = sft / "adapter_config.json"
    saved = tensors.read_bytes()
    tensors.write_bytes(saved + b" ")
    try:
        assert model_hash(third) != before
    finally:
        tensors.write_bytes(saved)


@pytest.mark.parametrize("on", variants(["bits", "adapter", "run"], {"run"}))
def test_what_stands_above_a_trunk_trains_as_with_it(
    on: str, sft: Path, base: Path, world: Path, tmp_path: Path
) -> None:
    """Cached runs load no trunk: of few bits, with LoRA merged into it, below a head and a post decoder of before."""
    keys = {"tune_post_decoder": True, "tune_lm_head": True, "optim": "sgd", "learning_rate": 0.1, "max_steps": 3}
    if on == "bits":
        keys["bits"] = 4
    elif on == "adapter":
        keys["adapter_name_or_path"] = sft
    else:
        keys["model_name_or_path"] = train(
            build_recipe(dpo_keys(base, world, tmp_path / "first", adapter_name_or_path=sft, **keys))
        )
    live, cached, other = (
        train(build_recipe(dpo_keys(base, world, tmp_path / name, **more)))
        for name, more in (
            ("live", {**keys, "feature_cache": "off"}),
            ("cached", {**keys, "feature_cache": "memory"}),
            ("other", {**keys, "model_name_or_path": base, "bits": 16, "adapter_name_or_path": ""}),
        )
    )
    tensors, expected, plain = (load_file(out / TENSORS_FILE) for out in (cached, live, other))
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(tensors["lm_head.weight"], plain["lm_head.weight"], rtol=1e-4, atol=1e-5)


def test_a_projector_file_is_an_adapter_too(base: Path, world: Path, tmp_path: Path) -> None:
    """What the original's pretrain_mm_mlp_adapter takes."""
    tensors = {n.removeprefix("model."): torch.full_like(p, 0.01) for n, p in projector(load_model(base).model)}
    torch.save(tensors, tmp_path / "mm_projector.bin")
    keys = {"adapter_name_or_path": tmp_path / "mm_projector.bin", "tune_lm_head": True, "max_steps": 1}
    out = train(build_recipe(dpo_keys(base, world, tmp_path / "run", **keys)))
    assert all(torch.equal(p, torch.full_like(p, 0.01)) for _, p in projector(load_model(out).model))
    other = train(build_recipe(dpo_keys(base, world, tmp_path / "other", tune_lm_head=True, max_steps=1)))
    assert load_file(out / TENSORS_FILE)["lm_head.weight"].ne(load_file(other / TENSORS_FILE)["lm_head.weight"]).any()


def projector(model: Any) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in model.named_parameters() if "multi_modal_projector" in name]


@pytest.mark.slow
def test_a_trainer_that_compiles_the_policy(base: Path, world: Path, tmp_path: Path) -> None:
    """transformers' own torch_compile, around all that relook does."""
    keys = {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.0, "max_steps": 2, "optim": "sgd", "learning_rate": 0.1}
    trained = []
    for name, more in (("plain", {}), ("compiled", {"torch_compile": True, "torch_compile_backend": "aot_eager"})):
        out = train(build_recipe(dpo_keys(base, world, tmp_path / name, **keys, **more)))
        trained.append([line["loss"] for line in json.loads((out / "run.json").read_text())["log"] if "loss" in line])
    assert trained[1] == pytest.approx(trained[0], rel=1e-4)


# --- HA-DPO's recipe


@pytest.mark.slow  # test_real_data.py runs it, too
def test_hadpos_recipe_runs_as_it_ships(base: Path, tmp_path: Path) -> None:
    """On a small model and few pairs, with flags of HA-DPO's command beside it."""
    keys = dpo_keys(base, write_world(tmp_path / "world", scenes=2), tmp_path / "run")
    paths = {k: keys[k] for k in ("model_name_or_path", "output_dir", "vg_path", "desc_data_path", "pope_data_path")}
    llava_keys = {"mm_projector_lr": 0, "mm_vision_select_layer": -2, "mm_projector_type": "mlp2x_gelu"}
    recipe = load_recipe("hadpo-lora", {**paths, **llava_keys, "use_cpu": True, "max_steps": 2, "learning_rate": 1e-3})
    assert (recipe.lora_r, recipe.lora_alpha, recipe.lora_dropout, recipe.beta) == (128, 256, 0.0, 0.1)
    out = train(recipe)
    log = [e for e in json.loads((out / "run.json").read_text())["log"] if "loss" in e]
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=0.02)
    adapter = json.loads((out / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (128, 256, 0.0)
    more = {"output_dir": tmp_path / "2", "mm_vision_select_layer": -1, "use_cpu": True, "max_steps": 2}
    with pytest.raises(RecipeError, match="mm_vision_select_layer is -1, but the model's config says -2"):
        train(load_recipe("hadpo-lora", {**paths, **more}))


def test_dropout_is_off_for_the_reference(base: Path, world: Path, tmp_path: Path) -> None:
    with_dropout, without = (Bench(base, world, tmp_path / "run", lora_dropout=rate) for rate in (0.5, 0.0))
    for first, second in zip(with_dropout.items, without.items, strict=True):
        assert first.reference is not None
        assert second.reference is not None
        assert torch.equal(first.reference, second.reference)
