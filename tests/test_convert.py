"""`relook convert`, `merge` and `export`: equal tensors, equal logits, whole folders or none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import save_tied, tiny_llava
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration
from typer.testing import CliRunner

from relook import load_model
from relook.cli import app
from relook.errors import RelookError
from relook.files import read_json, write_json
from relook.model import export as module
from relook.model.checkpoint import ADAPTER_FILE, KEPT, read_tensor_folder, weight_files, write_tensors
from relook.model.export import WriteOptions, convert_model, export_model, merge_adapter
from relook.model.lazy_model import open_folder
from relook.model.load import TENSORS_FILE, add_post_decoder

FAST = WriteOptions(check=False)


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A llava-hf folder with a processor and weights of its own."""
    return save_tied(tmp_path / "toy")


def same_tensors(first: Path, second: Path) -> bool:
    one, two = read_tensor_folder(first), read_tensor_folder(second)
    return one.keys() == two.keys() and all(torch.equal(one[name].read(), two[name].read()) for name in one)


def decoder_run(base: Path, out: Path, head: bool = True) -> Path:
    """What `relook train` leaves of a stage 2 run: a post decoder and a head."""
    model = add_post_decoder(tiny_llava(), {"depth": 2, "attention": "self_cross"}, torch.Generator().manual_seed(5))
    parts = ("model.post_decoder.", "lm_head.") if head else ("model.post_decoder.",)
    trained = {n: t.detach() + 0.01 for n, t in model.state_dict().items() if n.startswith(parts)}
    out.mkdir()
    save_file(trained, out / TENSORS_FILE)
    settings = {"depth": 2, "attention": "self_cross"}
    write_json(out / ADAPTER_FILE, {"base": str(base), "post_decoder": settings, "lora": False})
    return out


def test_llava_to_hf_and_back(tiny: Path, tower: Path, tmp_path: Path) -> None:
    source, hf, back = tiny / "ckpt_bin_sharded", tmp_path / "hf", tmp_path / "back"
    options = WriteOptions(vision_tower=tower, shard_gb=3e-4)
    assert convert_model(source, hf, "hf", options) == 0
    assert len(weight_files(hf)) > 2
    assert convert_model(hf, back, "llava") == 0
    assert same_tensors(source, back)
    config, ours = read_json(source / "config.json"), read_json(back / "config.json")
    same = [
        *("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "rms_norm_eps", "rope_theta"),
        *("mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature", "mm_hidden_size"),
        *("rope_scaling", "torch_dtype", "model_type", "architectures", *KEPT),
    ]
    assert {key: ours[key] for key in same} == {key: config[key] for key in same}
    assert (back / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    assert read_json(back / "tokenizer_config.json")["legacy"] is False
    # The tower lies in the folder, under the names of a CLIP model's.
    of_tower = {
        n: t for n, t in read_tensor_folder(tower).items() if n.startswith("vision_model.") and "position_ids" not in n
    }
    tower_tensors = read_tensor_folder(back / "vision_tower")
    assert tower_tensors.keys() == of_tower.keys()
    assert all(torch.equal(tower_tensors[name].read(), of_tower[name].read()) for name in tower_tensors)


def test_hf_to_llava_and_back(toy: Path, tmp_path: Path) -> None:
    published = tmp_path / "published"
    convert_model(toy, published, "hf")
    assert convert_model(published, tmp_path / "llava", "llava") == 0
    assert convert_model(tmp_path / "llava", tmp_path / "back", "hf") == 0
    assert same_tensors(published, tmp_path / "back")
    configs = [read_json(folder / "config.json") for folder in (published, tmp_path / "back")]
    for key in ("image_token_index", "vision_feature_layer", "projector_hidden_act", "conversation_template"):
        assert configs[0][key] == configs[1][key]


@torch.no_grad()
def test_a_converted_folder_in_plain_transformers(tiny: Path, tower: Path, tmp_path: Path) -> None:
    from PIL import Image

    convert_model(tiny / "ckpt_safetensors", tmp_path / "hf", "hf", WriteOptions(vision_tower=tower))
    model, report = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    saved = np.load(tiny / "outputs/case_B.npz")
    token = model.config.image_token_id
    ids = [i for id in saved["input_ids"] for i in ([token] * 16 if id == -200 else [int(id)])]
    logits = model(input_ids=torch.tensor([ids]), pixel_values=torch.from_numpy(saved["pixel_values"])).logits
    torch.testing.assert_close(logits[0], torch.from_numpy(saved["logits"]), atol=1e-4, rtol=0)
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    image = Image.open(tiny / "inputs/image_B.png").convert("RGB")
    inputs = processor(images=image, text="USER: <image>\nWhat? ASSISTANT:", return_tensors="pt")
    assert (inputs["input_ids"] == token).sum() == 16
    torch.testing.assert_close(inputs["pixel_values"], torch.from_numpy(saved["pixel_values"]), atol=1e-4, rtol=0)


def test_a_linear_projector_becomes_one_again(tiny: Path, tower: Path, tmp_path: Path) -> None:
    folder = tmp_path / "linear"
    folder.mkdir()
    for file in (tiny / "ckpt_safetensors").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    write_json(folder / "config.json", read_json(folder / "config.json") | {"mm_projector_type": "linear"})
    tensors = {n: t.read().clone() for n, t in read_tensor_folder(folder).items() if ".mm_projector.2." not in n}
    for part in ("weight", "bias"):
        tensors[f"model.mm_projector.{part}"] = tensors.pop(f"model.mm_projector.0.{part}")
    save_file(tensors, folder / "model.safetensors")
    convert_model(folder, tmp_path / "hf", "hf", WriteOptions(vision_tower=tower))
    assert convert_model(tmp_path / "hf", tmp_path / "back", "llava") == 0
    assert same_tensors(folder, tmp_path / "back")


@torch.no_grad()
def test_merged_lora_and_head_give_the_originals_logits(tiny: Path, tower: Path, tmp_path: Path) -> None:
    options = WriteOptions(vision_tower=tower)
    saved = np.load(tiny / "outputs/case_A.npz")
    for change, output in (("lora_llava-tiny", "lora_A"), ("head_fp32/non_lora_trainables.bin", "head_fp32_A")):
        assert merge_adapter(tiny / "ckpt_bin_sharded", tiny / change, tmp_path / output, None, options) == 0
        model = load_model(tmp_path / output).model
        token = model.config.image_token_id
        ids = [i for id in saved["input_ids"] for i in ([token] * 16 if id == -200 else [int(id)])]
        logits = model(input_ids=torch.tensor([ids]), pixel_values=torch.from_numpy(saved["pixel_values"])).logits
        expected = torch.from_numpy(np.load(tiny / f"outputs/{output}.npz")["logits_last"])
        torch.testing.assert_close(logits[0, -1], expected, atol=1e-4, rtol=0)


def test_stages_take_what_replace_bin_took(toy: Path, tmp_path: Path) -> None:
    run, only = decoder_run(toy, tmp_path / "run"), decoder_run(toy, tmp_path / "only", head=False)
    base, trained = open_folder(toy).tensors, read_folder_of(run)

    def merged(source: Path, change: Path, stage: int) -> dict[str, bool]:
        out = tmp_path / f"{source.name}-{change.name}-{stage}"
        merge_adapter(source, change, out, stage, FAST)
        tensors = open_folder(out).tensors
        assert tensors.keys() == base.keys() | {n for n in trained if "post_decoder" in n} | {"lm_head.weight"}
        head = tensors["lm_head.weight"].read() if "lm_head.weight" in tensors else None
        assert all(torch.equal(tensors[n].read(), trained[n]) for n in trained if "post_decoder" in n)
        assert all(torch.equal(tensors[n].read(), base[n].read()) for n in base if n != "lm_head.weight")
        return {"head": head is not None and torch.equal(head, trained["lm_head.weight"])}

    untied = tmp_path / "untied"
    merge_adapter(toy, head_file(tmp_path), untied, None, FAST)
    base = open_folder(untied).tensors
    assert merged(untied, run, 0) == {"head": True}
    assert merged(untied, run, 1) == {"head": False}
    with_decoder = tmp_path / "untied-run-1"
    assert merged(with_decoder, run, 2) == {"head": True}
    for source, change, stage, message in (
        (untied, run, 2, "has no post decoder. Use stage 0"),
        (with_decoder, run, 0, "already has a post decoder. Use stage 2"),
        (untied, only, 0, "has no lm_head"),
        (untied, run, 3, "There is no stage 3"),
    ):
        with pytest.raises(RelookError, match=message):
            merge_adapter(source, change, tmp_path / "never", stage, FAST)
    assert not (tmp_path / "never").exists()


def read_folder_of(run: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(run / TENSORS_FILE))


def head_file(folder: Path) -> Path:
    """A head of its own, which unties a tied base."""
    torch.save({"lm_head.weight": tiny_llava().lm_head.weight.detach() * 2}, folder / "head.bin")
    return folder / "head.bin"


@pytest.mark.slow  # imports transformers in a process of its own; test_model.py does so by default
def test_an_export_works_where_relook_cannot_be_imported(toy: Path, tmp_path: Path) -> None:
    run = decoder_run(toy, tmp_path / "run")
    assert export_model(run, tmp_path / "whole") == 0
    program = """
import sys, torch
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "relook":
            raise ImportError(name)
sys.meta_path.insert(0, Block())
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
side = model.config.vision_config.image_size
ids = torch.tensor([[1] + [model.config.image_token_id] * 36 + [6, 7, 8]])
pixels = torch.linspace(-1, 1, 3 * side * side).view(1, 3, side, side)
output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, max_new_tokens=6,
                        do_sample=False)
assert not any(name.startswith("relook.") or name == "relook" for name in sys.modules)
print(type(processor).__name__, type(model).__name__, output[0, ids.shape[1]:].tolist())
torch.save(model(input_ids=ids, pixel_values=pixels).logits.detach(), sys.argv[2])
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "whole"), str(tmp_path / "logits.pt")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("LlavaProcessor RelookLlavaForConditionalGeneration")
    model = load_model(run).model
    side = model.config.vision_config.image_size
    ids = torch.tensor([[1] + [model.config.image_token_id] * 36 + [6, 7, 8]])
    with torch.no_grad():
        ours = model(input_ids=ids, pixel_values=torch.linspace(-1, 1, 3 * side * side).view(1, 3, side, side)).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), ours, atol=1e-5, rtol=0)


def test_a_post_decoder_has_no_place_in_llavas_format(toy: Path, tmp_path: Path) -> None:
    run = decoder_run(toy, tmp_path / "run")
    with pytest.raises(RelookError, match="cannot hold a post decoder"):
        convert_model(run, tmp_path / "llava", "llava")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "toy"]


def test_writing_holds_one_shard_at_a_time(tmp_path: Path) -> None:
    """Tensors that were handed over are let go as their shard is written."""
    size, count, per_shard = 1000, 20, 4
    alive: list[weakref.ref[Any]] = []
    most = 0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal most
        for i in range(count):
            tensor = torch.full((size,), float(i))
            alive.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in alive))
            yield f"t{i}", tensor
            del tensor

    write_tensors(tmp_path, tensors(), per_shard * size * 4)
    assert most <= 2
    assert len(weight_files(tmp_path)) == count // per_shard
    assert all(path.stat().st_size < per_shard * size * 4 + 1000 for path in weight_files(tmp_path))
    assert all(read_tensor_folder(tmp_path)[f"t{i}"].read().eq(i).all() for i in range(count))


def test_nothing_is_overwritten_and_nothing_half_is_left(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    convert_model(toy, out, "llava", FAST)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(RelookError, match=r"exists.*--force"):
        convert_model(toy, out, "llava", FAST)

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "logit_difference", stop)
        for target, how in ((tmp_path / "new", WriteOptions()), (out, WriteOptions(force=True))):
            with pytest.raises(KeyboardInterrupt):
                convert_model(toy, target, "llava", how)
        patch.setattr(module, "logit_difference", lambda *sources: float("nan"))
        with pytest.raises(RelookError, match="logits of the result differ"):
            convert_model(toy, tmp_path / "new", "llava")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "toy"]
    convert_model(toy, out, "hf", WriteOptions(force=True, check=False))
    assert read_json(out / "config.json")["model_type"] == "llava"

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("words")
    with pytest.raises(RelookError, match="no model folder and is not replaced"):
        convert_model(toy, tmp_path / "mine", "hf", WriteOptions(force=True))
    for target in (toy, tmp_path):
        with pytest.raises(RelookError, match="holds the source itself"):
            convert_model(toy, target, "hf", WriteOptions(force=True))
    run = decoder_run(toy, tmp_path / "run")
    with pytest.raises(RelookError, match="holds the source itself"):
        merge_adapter(toy, run, run, None, WriteOptions(force=True))


def test_a_link_stays_a_link_and_a_killed_writers_rest_is_removed(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for force in (False, True):
        convert_model(toy, tmp_path / "link", "hf", WriteOptions(force=force, check=False))
    assert (tmp_path / "link").is_symlink()
    assert weight_files(tmp_path / "disk")

    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    rest, other = (tmp_path / f".out.{process}.part" for process in (ended.pid, os.getppid()))
    for folder in (rest, other):
        folder.mkdir()
    convert_model(toy, tmp_path / "out", "hf", FAST)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([other.name, "disk", "link", "out", "toy"])


def test_the_old_folder_is_removed_after_the_new_one_has_its_name(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_model(toy, tmp_path / "out", "hf", FAST)

    def stop(*arguments: Any) -> float:
        monkeypatch.setattr("shutil.rmtree", lambda *arguments, **named: None)  # as a kill there would
        return 0.0

    monkeypatch.setattr(module, "logit_difference", stop)
    convert_model(toy, tmp_path / "out", "llava", WriteOptions(force=True))
    assert read_json(tmp_path / "out/config.json")["model_type"] == "llava_llama"
    assert (tmp_path / f".out.old.{os.getpid()}.part/config.json").exists()


def test_anyone_may_read_what_is_written_whatever_the_path(
    toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(tmp_path / "toy/tokenizer.json", tmp_path / "toy/tokenizer.model")
    (toy / "tokenizer.model").chmod(0o400)
    out = tmp_path / ("long " * 30) / "a[/b] [red]"
    export_model(toy, out, FAST)
    plain = tmp_path / "new"
    plain.touch()
    assert {path.stat().st_mode for path in out.iterdir()} == {plain.stat().st_mode}
    assert capfd.readouterr().err.startswith(f"{out}: ")


def test_a_full_disk_is_noticed_first(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(RelookError, match=r"needs .* on disk, but .* free\. Make room there"):
        convert_model(toy, tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()


def test_the_commands(toy: Path, tmp_path: Path) -> None:
    run, invoke = decoder_run(toy, tmp_path / "run"), CliRunner().invoke
    for arguments in (
        ["convert", toy, tmp_path / "llava", "--to", "llava"],
        ["merge", toy, run, tmp_path / "merged", "--stage", "0", "--max-shard-gb", "0.001"],
        ["export", run, tmp_path / "exported", "--no-check"],
    ):
        done = invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output
    assert load_model(tmp_path / "llava").template == "llava_hf"
    assert same_tensors(tmp_path / "merged", tmp_path / "exported")
    assert json.loads((tmp_path / "merged/config.json").read_text())["post_decoder"]["depth"] == 2
    assert isinstance(invoke(app, ["convert", str(toy), str(tmp_path / "x"), "--to", "gguf"]).exception, RelookError)
