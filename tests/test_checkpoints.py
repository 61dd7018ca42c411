"""Checkpoints of the original programs: outputs equal to theirs, and broken or foreign files refused by name."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import save_tied, tiny_llava
from helpers.variants import crossed
from safetensors.torch import load_file, save_file

from relook import LoadedModel, load_model
from relook.data.packing import TokenRow, Tree, pack
from relook.errors import RelookError
from relook.forward.policy import LiveBatch, Policy
from relook.model.adapters import read_adapter
from relook.model.checkpoint import FROM_LLAVA, parse_folder, read_tensor_file, read_tensor_folder, rename
from relook.model.load import add_post_decoder
from relook.toyworld.build import shipped_base
from relook.train.loss import dpo_sigmoid, negative_log_likelihood

CLOSE = {"atol": 1e-4, "rtol": 0}
PATCHES = 16


@pytest.fixture(scope="module", params=["ckpt_bin_sharded", "ckpt_safetensors"])
def loaded(request: pytest.FixtureRequest, tiny: Path, tower: Path) -> LoadedModel:
    return load_model(tiny / request.param, vision_tower=tower)


def expand(model: Any, ids: Sequence[int]) -> list[int]:
    """The original's ids, its -200 written as the positions of an image."""
    token = model.config.image_token_id
    return [i for id in ids for i in ([token] * PATCHES if id == -200 else [int(id)])]


def inputs(model: Any, case: Any) -> dict[str, torch.Tensor]:
    ids = torch.tensor([expand(model, case["input_ids"])])
    result = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "pixel_values" in case:
        result["pixel_values"] = torch.from_numpy(case["pixel_values"])
    return result


def generate(model: Any, **given: torch.Tensor) -> list[int]:
    output = model.generate(**given, max_new_tokens=12, do_sample=False, eos_token_id=None)
    return list(output[0, given["input_ids"].shape[1] :].tolist())


def near(ours: torch.Tensor, reference: Any) -> None:
    torch.testing.assert_close(ours.detach(), torch.as_tensor(reference), **CLOSE)


@pytest.mark.parametrize("case", ["A", "B"])
@torch.no_grad()
def test_every_tensor_on_the_way_is_the_originals(loaded: LoadedModel, tiny: Path, case: str) -> None:
    saved = np.load(tiny / f"outputs/case_{case}.npz")
    given = inputs(loaded.model, saved)
    outputs = loaded.model.model(**given)
    image = loaded.model.get_image_features(pixel_values=given["pixel_values"], return_dict=True)
    near(image.hidden_states[-2][:, 1:], saved["vision_features"])
    near(torch.stack(list(image.pooler_output)), saved["projected_features"])
    near(outputs.last_hidden_state[0], saved["final_hidden_state"])
    near(loaded.model(**given).logits[0], saved["logits"])
    assert generate(loaded.model, **given) == saved["generated_ids"].tolist()


def test_pixels_and_prompt_are_the_originals_with_the_folders_own_settings(loaded: LoadedModel, tiny: Path) -> None:
    for case in "AB":
        saved = np.load(tiny / f"outputs/case_{case}.npz")
        encoded = loaded.encode([tiny / f"inputs/image_{case}.png"], "<image>\nIs there a snowboard in the image?")
        near(encoded["pixel_values"], saved["pixel_values"])
        if case == "A":
            assert encoded["input_ids"][0].tolist() == expand(loaded.model, saved["input_ids"])


@torch.no_grad()
def test_a_text_only_prompt(loaded: LoadedModel, tiny: Path) -> None:
    saved = np.load(tiny / "outputs/text_only.npz")
    given = inputs(loaded.model, saved)
    near(loaded.model(**given).logits[0, -1], saved["logits_last"])
    assert generate(loaded.model, **given) == saved["generated_ids"].tolist()


@torch.no_grad()
def test_rows_padded_on_the_right(loaded: LoadedModel, tiny: Path) -> None:
    saved = np.load(tiny / "outputs/batch_AB_right.npz")
    rows = [
        expand(loaded.model, ids[mask]) for ids, mask in zip(saved["input_ids"], saved["attention_mask"], strict=True)
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    assert mask.bool().tolist() == saved["merged_attention_mask"].tolist()
    pixels = [np.load(tiny / f"outputs/case_{case}.npz")["pixel_values"] for case in "AB"]
    output = loaded.model(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=torch.from_numpy(np.concatenate(pixels)),
        labels=torch.from_numpy(saved["merged_labels"]),
    )
    last = torch.stack([logits[len(row) - 1] for logits, row in zip(output.logits, rows, strict=True)])
    near(last, saved["last_valid_logits"])
    near(output.loss, saved["loss"])


@pytest.mark.parametrize("change", ["head_fp32", "head_fp32/non_lora_trainables.bin"])
@torch.no_grad()
def test_a_trained_head_alone(tiny: Path, tower: Path, change: str) -> None:
    model = load_model(tiny / "ckpt_bin_sharded", tiny / change, tower).model
    saved = np.load(tiny / "outputs/head_fp32_A.npz")
    given = inputs(model, np.load(tiny / "outputs/case_A.npz"))
    near(model(**given).logits[0, -1], saved["logits_last"])
    assert generate(model, **given) == saved["generated_ids"].tolist()


@pytest.mark.parametrize("file", ["bin", "safetensors"])
@torch.no_grad()
def test_lora_and_projector_are_merged_as_the_original_does(tiny: Path, tower: Path, tmp_path: Path, file: str) -> None:
    adapter = tiny / "lora_llava-tiny"
    if file == "safetensors":
        adapter = Path(shutil.copytree(adapter, tmp_path / "a-name-that-says-nothing"))
        adapter.chmod(0o755)
        (adapter / "adapter_model.bin").unlink()
        shutil.copy(tiny / "lora_adapter_model_same_tensors.safetensors", adapter / "adapter_model.safetensors")
    model = load_model(tiny / "ckpt_safetensors", adapter, tower).model
    saved, weights = (np.load(tiny / f"outputs/{name}.npz") for name in ("lora_A", "lora_merged_weights_sample"))
    layers = model.model.language_model.layers
    near(layers[0].self_attn.q_proj.weight, weights["q0"])
    near(layers[1].mlp.down_proj.weight, weights["down1"])
    near(model.model.multi_modal_projector.linear_1.weight, weights["proj0"])
    given = inputs(model, np.load(tiny / "outputs/case_A.npz"))
    near(model(**given).logits[0, ::8], saved["logits_every_8th"])
    assert generate(model, **given) == saved["generated_ids"].tolist()


def tree_of(model: Any, *rows: tuple[np.ndarray, np.ndarray]) -> Tree:
    return Tree.of(
        [
            TokenRow(
                tuple(expand(model, ids)),
                tuple(
                    flag
                    for id, label in zip(ids, labels, strict=True)
                    for flag in ([False] * PATCHES if id == -200 else [bool(label != -100)])
                ),
            )
            for ids, labels in rows
        ]
    )


def check_gradients(model: Any, norms: dict[str, float]) -> None:
    parameters = dict(model.named_parameters())
    for name, norm in norms.items():
        gradient = parameters[rename(name, FROM_LLAVA)].grad
        assert gradient is not None, name
        assert gradient.norm().item() == pytest.approx(norm, abs=1e-4, rel=1e-4), name


def test_gradients_of_two_supervised_turns(tiny: Path, tower: Path) -> None:
    model = load_model(tiny / "ckpt_safetensors", vision_tower=tower).model
    cases = json.loads((tiny / "training/preprocess_v1.json").read_text())["cases"]
    encoded = cases["two_turns"]["variants"]["llama_cut_1024/legacy_false"]
    tree = tree_of(model, (np.array(encoded["input_ids"]), np.array(encoded["labels"])))
    pixels = torch.from_numpy(np.load(tiny / "outputs/case_A.npz")["pixel_values"])
    loss = negative_log_likelihood(Policy(model)(LiveBatch(pack([tree], 0), pixels, [1])))
    loss.backward()
    saved = np.load(tiny / "training/sft_two_turns.npz")
    near(loss, saved["loss"])
    near(model.lm_head.weight.grad, saved["grad_lm_head"])
    near(model.model.multi_modal_projector.linear_1.weight.grad, saved["grad_projector_0"])
    check_gradients(model, json.loads((tiny / "training/sft_two_turns.json").read_text())["grad_norms"])


@pytest.mark.parametrize(("name", "reference"), [("dpo_A", "reference_lm_head_A.bin"), ("dpo_B_same_reference", None)])
def test_preference_loss_and_gradients(tiny: Path, tower: Path, name: str, reference: str | None) -> None:
    saved = np.load(tiny / f"training/{name}.npz")
    sides = [(saved[f"{side}_input_ids"][0], saved[f"{side}_labels"][0]) for side in ("chosen", "reject")]
    adapter = None if reference is None else tiny / "training" / reference
    sums = []
    models = [load_model(tiny / "ckpt_bin_sharded", change, tower).model for change in (None, adapter)]
    for model in models:
        packed = pack([tree_of(model, *sides)], 0)
        log_probs = Policy(model)(LiveBatch(packed, torch.from_numpy(saved["images"]), [1]))
        if model is models[0]:
            near(log_probs, np.concatenate([saved["chosen_0_token_logps"], saved["reject_0_token_logps"]]))
        sums.append(packed.targets.sum_by_branch(log_probs))
    for model_name, summed in zip(("policy", "reference"), sums, strict=True):
        for side, value in zip(("chosen", "rejected"), summed, strict=True):
            near(value[None], saved[f"{model_name}_{side}_logps"])
    ratio = sums[0] - sums[1].detach()
    loss = dpo_sigmoid(ratio[:1], ratio[1:], beta=0.1)
    near(loss, saved["losses"])
    loss.backward()
    check_gradients(models[0], json.loads((tiny / f"training/{name}.json").read_text())["grad_norms"])
    if "grad_lm_head" in saved:
        near(models[0].lm_head.weight.grad, saved["grad_lm_head"])


# Folders that are not like the fixtures: made from them.


def copied(folder: Path, to: Path, **config: Any) -> Path:
    """A writable copy of a model folder; keys of its config changed, or with None removed."""
    to.mkdir(parents=True)
    for file in folder.iterdir():
        if file.is_file():
            (to / file.name).write_bytes(file.read_bytes())
    values = json.loads((to / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return to


@torch.no_grad()
def logits(model: Any, tiny: Path) -> torch.Tensor:
    result: torch.Tensor = model(**inputs(model, np.load(tiny / "outputs/case_A.npz"))).logits
    return result


def test_hadpos_model_type_and_a_tower_named_relative_to_the_folder(tiny: Path, tower: Path, tmp_path: Path) -> None:
    folder = copied(tiny / "ckpt_safetensors", tmp_path / "lora-7b", model_type="llava", mm_vision_tower="../tower")
    copied(tower, tmp_path / "tower")
    near(logits(load_model(folder).model, tiny)[0], np.load(tiny / "outputs/case_A.npz")["logits"])


def test_a_tower_in_the_file_counts_where_it_was_trained_only(tiny: Path, tower: Path, tmp_path: Path) -> None:
    """As in the original, which reads the tower's own folder unless unfreeze_mm_vision_tower is set."""
    base = logits(load_model(tiny / "ckpt_safetensors", vision_tower=tower).model, tiny)
    for unfrozen in (True, False):
        folder = copied(tiny / "ckpt_safetensors", tmp_path / str(unfrozen), unfreeze_mm_vision_tower=unfrozen)
        tensors = load_file(folder / "model.safetensors")
        for name, tensor in read_tensor_folder(tower).items():
            if name.startswith("vision_model.") and not name.endswith("position_ids"):
                tensors[f"model.vision_tower.vision_tower.{name}"] = tensor.read() + 0.01
        save_file(tensors, folder / "model.safetensors")
        values = logits(load_model(folder, vision_tower=tower).model, tiny)
        assert bool((values - base).abs().max() > 1e-2) == unfrozen


def test_a_linear_projector_and_the_class_token(tiny: Path, tower: Path, tmp_path: Path) -> None:
    folder = copied(
        tiny / "ckpt_safetensors", tmp_path / "m", mm_projector_type="linear", mm_vision_select_feature="cls_patch"
    )
    tensors = load_file(folder / "model.safetensors")
    tensors = {k: v for k, v in tensors.items() if ".mm_projector.2." not in k}
    weight, bias = tensors.pop("model.mm_projector.0.weight"), tensors.pop("model.mm_projector.0.bias")
    tensors |= {"model.mm_projector.weight": weight, "model.mm_projector.bias": bias}
    save_file(tensors, folder / "model.safetensors")
    loaded = load_model(folder, vision_tower=tower)
    pixels = torch.from_numpy(np.load(tiny / "outputs/case_A.npz")["pixel_values"])
    image = loaded.model.get_image_features(pixel_values=pixels, return_dict=True)
    near(image.pooler_output[0], (image.hidden_states[-2][0] @ weight.T + bias).detach())
    assert loaded.image_positions == len(image.pooler_output[0]) == PATCHES + 1


def test_sizes_come_from_the_config(tiny: Path, tower: Path, tmp_path: Path) -> None:
    folder = copied(tiny / "ckpt_safetensors", tmp_path / "m", num_hidden_layers=3)
    with pytest.raises(RelookError, match=r"9 missing: model\.language_model\.layers\.2\."):
        load_model(folder, vision_tower=tower)
    folder = copied(tiny / "ckpt_safetensors", tmp_path / "n", intermediate_size=None)
    with pytest.raises(RelookError, match="does not say intermediate_size"):
        load_model(folder, vision_tower=tower)


def test_settings_that_are_null_are_as_absent(tiny: Path, tower: Path, tmp_path: Path) -> None:
    """The original reads them with a default: no pad, no class token, no marks."""
    nulls = ("image_aspect_ratio", "mm_vision_select_feature", "mm_use_im_start_end", "mm_use_im_patch_token")
    folder = copied(tiny / "ckpt_safetensors", tmp_path / "m")
    settings = json.loads((folder / "config.json").read_text()) | dict.fromkeys(nulls)
    (folder / "config.json").write_text(json.dumps(settings))
    loaded = load_model(folder, vision_tower=tower)
    saved = np.load(tiny / "outputs/preprocess_A.npz")["center_crop"]
    near(loaded.encode([tiny / "inputs/image_A.png"], "<image>")["pixel_values"][0], saved)
    near(logits(loaded.model, tiny)[0], np.load(tiny / "outputs/case_A.npz")["logits"])


def test_templates_and_dtypes(tiny: Path, tower: Path) -> None:
    loaded = load_model(tiny / "ckpt_safetensors", vision_tower=tower, dtype="bfloat16")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.template == parse_folder(tiny / "ckpt_safetensors").template == "v1"
    assert loaded.aspect_ratio == loaded.images.aspect_ratio == "pad"
    with pytest.raises(RelookError, match="dtype"):
        load_model(tiny / "ckpt_safetensors", vision_tower=tower, dtype="int8")
    with pytest.raises(RelookError, match="'gpu' is not a device"):
        load_model(tiny / "ckpt_safetensors", vision_tower=tower, device="gpu")


def test_no_text_is_encoded_to_the_image_placeholder(loaded: LoadedModel) -> None:
    token, tokenizer = loaded.model.config.image_token_id, loaded.processor.tokenizer
    assert token < 1024 == loaded.model.config.text_config.vocab_size
    text = "".join(map(chr, [*range(1, 256), 0xFFFD, 0xFFFF, 0x10FFFF]))
    assert token not in tokenizer(text + " <0xFF> <0xFE>")["input_ids"]
    assert tokenizer("<image>", add_special_tokens=False)["input_ids"] == [token]


@pytest.mark.parametrize("legacy", [False, True])
def test_transformers_own_processor_gives_the_originals_ids(
    tiny: Path, tower: Path, tmp_path: Path, legacy: bool
) -> None:
    from PIL import Image

    folder = copied(tiny / "ckpt_safetensors", tmp_path / "m")
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"legacy": legacy}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = load_model(folder, vision_tower=tower)
    image = Image.open(tiny / "inputs/image_A.png").convert("RGB")
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    prompt = loaded.processor.apply_chat_template(message, add_generation_prompt=True)
    theirs = loaded.processor(images=image, text=prompt, return_tensors="pt")["input_ids"]
    ours = loaded.encode([image], "<image>\nWhat is this?")["input_ids"]
    assert theirs.tolist() == ours.tolist()
    assert (ours == loaded.model.config.image_token_id).sum() == PATCHES


# Changes


@pytest.mark.parametrize(
    ("prefix", "dtype"), crossed(["base_model.model.model.", "model.", ""], [torch.float32, torch.bfloat16])
)
def test_bare_tensors_of_head_projector_and_post_decoder(tmp_path: Path, prefix: str, dtype: torch.dtype) -> None:
    base = save_tied(tmp_path / "base")
    model = add_post_decoder(tiny_llava(), {"depth": 2}, torch.Generator().manual_seed(1))
    expected = {
        name: (tensor + 0.25).to(dtype)
        for name, tensor in model.state_dict().items()
        if name.startswith(("model.post_decoder.", "model.multi_modal_projector.", "lm_head."))
    }
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text('{"post_decoder": {"depth": 2}}')
    head = prefix.removesuffix("model.") + "lm_head.weight"
    torch.save(
        {head if n == "lm_head.weight" else prefix + n.removeprefix("model."): t for n, t in expected.items()},
        tmp_path / "run/non_lora_trainables.bin",
    )
    loaded = load_model(base, tmp_path / "run/non_lora_trainables.bin")
    tensors = loaded.model.state_dict()
    assert all(torch.equal(tensors[name], tensor.float()) for name, tensor in expected.items())
    rest = tiny_llava().state_dict()
    assert all(torch.equal(tensors[name], rest[name]) for name in rest.keys() - expected.keys())


def test_a_post_decoder_whose_settings_nobody_knows(tmp_path: Path) -> None:
    base = save_tied(tmp_path / "base")
    model = add_post_decoder(tiny_llava(), {}, None)
    decoder = {n: t for n, t in model.state_dict().items() if n.startswith("model.post_decoder.")}
    save_file(decoder, tmp_path / "decoder.safetensors")
    with pytest.raises(RelookError, match=r"nothing says its settings.*config\.json"):
        load_model(base, tmp_path / "decoder.safetensors")


@pytest.mark.parametrize("file", ["adapter_config.json", "config.json"])
def test_an_adapters_settings_that_are_no_object(tiny: Path, tower: Path, tmp_path: Path, file: str) -> None:
    adapter = copied(tiny / "lora_llava-tiny", tmp_path / "a")
    (adapter / file).write_text("[1]")
    with pytest.raises(RelookError, match=rf"{file} is not a JSON object"):
        load_model(tiny / "ckpt_safetensors", adapter, tower)


def test_an_adapter_for_another_size_and_an_adapter_alone(tiny: Path) -> None:
    base = shipped_base()
    with pytest.raises(RelookError, match=r"does not fit .*base: 18 tensors"):
        load_model(base, tiny / "lora_llava-tiny")
    with pytest.raises(RelookError, match=r"lm_head\.weight \[1024, 64\] on \[107, 128\]"):
        load_model(base, tiny / "head_fp32")
    with pytest.raises(RelookError, match="Pass its base as path"):
        load_model(tiny / "lora_llava-tiny")
    with pytest.raises(RelookError, match="is a whole model"):
        load_model(base, base)


def test_quantised_models_stay_near(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Toyworld's shapes on a CPU: eight bits stay closer than four, and the image side is not quantised.

    No product of theirs logs anything: a server would write a line for each.
    """
    base = save_tied(tmp_path / "base")
    ids = torch.tensor([[1, 5, 6, 7, 8, 9]])
    with torch.no_grad():
        full, eight, four = (load_model(base, bits=bits).model for bits in (16, 8, 4))
        exact = full(input_ids=ids).logits
        errors = [(model(input_ids=ids).logits - exact).abs().mean().item() for model in (eight, four)]
    assert 0 < errors[0] < errors[1] < exact.abs().mean()
    assert type(four.model.language_model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert type(four.model.vision_tower.encoder.layers[0].mlp.fc1) is torch.nn.Linear
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")]


def test_quantisation_without_bitsandbytes_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_tied(tmp_path / "base")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RelookError, match=r"pip install 'relook\[quant\]'"):
        load_model(base, bits=4)
    with pytest.raises(RelookError, match="bits is 3"):
        load_model(base, bits=3)


# Bad files


class _Runs:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("old", [False, True])
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path, old: bool) -> None:
    proof, file = tmp_path / "it-ran", tmp_path / "non_lora_trainables.bin"
    torch.save({"lm_head.weight": _Runs(proof)}, file, _use_new_zipfile_serialization=not old)
    with pytest.raises(RelookError, match="refused"):
        read_adapter(file)
    assert not proof.exists()
    torch.load(file, weights_only=False)  # the file is what it claims to be
    assert proof.exists()
    proof.unlink()
    file.write_bytes(pickle.dumps(_Runs(proof)))
    with pytest.raises(RelookError, match=r"refused|broken"):
        read_tensor_file(file)
    assert not proof.exists()


def test_pytorchs_old_format_is_read(tmp_path: Path) -> None:
    tensor = torch.arange(6.0)
    torch.save({"lm_head.weight": tensor}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(read_tensor_file(tmp_path / "old.bin")["lm_head.weight"].read(), tensor)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not tensors at all", "no safetensors or PyTorch file"),
        (b"", "no safetensors or PyTorch file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_text_under_a_weight_files_name(tiny: Path, tower: Path, tmp_path: Path, content: bytes, message: str) -> None:
    folder = copied(tiny / "ckpt_safetensors", tmp_path / "m")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(RelookError, match=rf"model\.safetensors is .*{message}"):
        load_model(folder, vision_tower=tower)


@pytest.mark.parametrize(
    "file", ["ckpt_safetensors/model.safetensors", "ckpt_bin_sharded/pytorch_model-00002-of-00002.bin"]
)
@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_a_truncated_file(tiny: Path, tower: Path, tmp_path: Path, file: str, share: float) -> None:
    folder = copied((tiny / file).parent, tmp_path / "m")
    content = (tiny / file).read_bytes()
    (folder / Path(file).name).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(RelookError, match=rf"{Path(file).name} is (broken|refused)"):
        load_model(folder, vision_tower=tower)


def test_indexes_that_lie(tiny: Path, tower: Path, tmp_path: Path) -> None:
    folder = copied(tiny / "ckpt_bin_sharded", tmp_path / "m")
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
    index["weight_map"]["model.extra"] = "pytorch_model-00001-of-00002.bin"
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(RelookError, match=r"lack tensors of its index: model\.extra"):
        load_model(folder, vision_tower=tower)
    (folder / "pytorch_model-00001-of-00002.bin").unlink()
    with pytest.raises(RelookError, match=r"not in the folder: pytorch_model-00001-of-00002\.bin"):
        load_model(folder, vision_tower=tower)
    index["weight_map"]["model.extra"] = "../../somewhere.bin"
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(RelookError, match=r"\.\./\.\./somewhere\.bin"):
        load_model(folder, vision_tower=tower)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mm_vision_tower": None}, "names no mm_vision_tower.*Pass the vision tower"),
        ({"mm_vision_tower": "nobody/has-this"}, "nobody/has-this.*Pass its folder as vision_tower"),
        ({"model_type": "llava_mpt"}, "llava_mpt"),
        ({"model_type": "llava_mistral"}, "llava_mistral"),
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type 'mlp3x_gelu'"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres'"),
        ({"mm_vision_tower": 5}, "names no mm_vision_tower"),
        ({"hidden_size": "wide"}, "config"),
        ({"rope_scaling": {"type": "banana", "factor": 2.0}}, "not valid: unknown value 'banana'"),
        ({"mm_vision_select_layer": -5}, "from layer -5 of a vision tower that has 3"),
        ({"mm_use_im_start_end": True}, "1024 embeddings have no rows for <im_start>"),
    ],
)
def test_configs_that_cannot_be_used(tiny: Path, tower: Path, tmp_path: Path, config: Any, message: str) -> None:
    folder = copied(tiny / "ckpt_safetensors", tmp_path / "m", **config)
    with pytest.raises(RelookError, match=message):
        load_model(folder, vision_tower=None if "mm_vision_tower" in config else tower)


@pytest.mark.parametrize("file", ["tower/preprocessor_config.json", "m/tokenizer_config.json", "m/config.json"])
def test_settings_that_are_no_object(tiny: Path, tower: Path, tmp_path: Path, file: str) -> None:
    folder, images = copied(tiny / "ckpt_safetensors", tmp_path / "m"), copied(tower, tmp_path / "tower")
    (tmp_path / file).write_text("[1]")
    with pytest.raises(RelookError, match=r"not a JSON object|processor of .* cannot be loaded"):
        load_model(folder, vision_tower=images)


def test_missing_unused_and_misshapen_tensors_are_listed(tiny: Path, tower: Path, tmp_path: Path) -> None:
    folder = copied(tiny / "ckpt_safetensors", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.odd.weight"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:1000]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # old files have it: computed, not needed
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(RelookError) as caught:
        load_model(folder, vision_tower=tower)
    assert "1 missing: model.language_model.norm.weight" in str(caught.value)
    assert "1 unused: model.odd.weight" in str(caught.value)
    assert "1 of another shape: lm_head.weight [1000, 64] instead of [1024, 64]" in str(caught.value)


def test_a_folder_without_projector_takes_it_as_adapter(tiny: Path, tower: Path, tmp_path: Path) -> None:
    folder = copied(tiny / "ckpt_safetensors", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    projector = {name: tensors.pop(name) for name in list(tensors) if "mm_projector" in name}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(RelookError, match=r"4 missing.*as adapter"):
        load_model(folder, vision_tower=tower)
    torch.save(projector, tmp_path / "mm_projector.bin")
    loaded = load_model(folder, tmp_path / "mm_projector.bin", tower)
    near(logits(loaded.model, tiny)[0], np.load(tiny / "outputs/case_A.npz")["logits"])


@pytest.mark.parametrize("name", ["ckpt_safetensors", "ckpt_bin_sharded"])
def test_training_a_loaded_model_leaves_its_files_alone(tiny: Path, tower: Path, tmp_path: Path, name: str) -> None:
    """Files are mapped into memory: writing to a parameter must not write to the disk."""
    folder = copied(tiny / name, tmp_path / "m")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = load_model(folder, vision_tower=tower).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_lora_on_a_half_precision_base_is_rounded_once(tiny: Path, tower: Path, tmp_path: Path) -> None:
    folder = copied(tiny / "ckpt_safetensors", tmp_path / "half")
    tensors = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    adapter = read_tensor_file(tiny / "lora_llava-tiny/adapter_model.bin")
    name = "layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.model.{name}.lora_{half}.weight"].read() for half in "AB")
    exact = tensors[f"model.{name}.weight"].float() + 2 * b @ a  # alpha 8 over rank 4
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(folder, tiny / "lora_llava-tiny", tower, dtype).model
        torch.testing.assert_close(model.model.language_model.layers[0].self_attn.q_proj.weight, exact.to(dtype))


def test_a_lora_run_of_relook_names_its_base_and_is_merged(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base, run = save_tied(tmp_path / "base"), tmp_path / "run"
    model = get_peft_model(load_model(base).model, LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    model.save_pretrained(run)
    save_file({}, run / "trained.safetensors")  # nothing else trained
    (run / "change.json").write_text(json.dumps({"base": str(base), "post_decoder": None, "lora": True}))
    merged = model.merge_and_unload().state_dict()
    torch.testing.assert_close(load_model(run).model.state_dict(), merged)
    torch.testing.assert_close(load_model(base, run).model.state_dict(), merged)
    folder = parse_folder(run)
    assert folder.template == "llava_hf"
    (run / "change.json").unlink()  # it has been read, once
    torch.testing.assert_close(load_model(folder).model.state_dict(), merged)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, r"does not name a base"),
        ({"base": "gone"}, r"base of the run .*, gone, is not there.*adapter=run"),
        ({"post_decoder": {"depht": 2}}, r"base with .*run is not valid.*depht"),
        ({"post_decoder": {"attention": "x"}}, r"post_decoder\.attention is 'x'"),
    ],
)
def test_runs_that_cannot_be_used(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    base, run = save_tied(tmp_path / "base"), tmp_path / "run"
    run.mkdir()
    model = add_post_decoder(tiny_llava(), {}, None)
    save_file(
        {n: t for n, t in model.state_dict().items() if n.startswith("model.post_decoder.")},
        run / "trained.safetensors",
    )
    settings = {"base": str(base), "post_decoder": {}, "lora": False} | change if change else {}
    (run / "change.json").write_text(json.dumps(settings))
    with pytest.raises(RelookError, match=message):
        load_model(run)
