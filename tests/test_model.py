"""The model with a post decoder: the identity before training, a real stack after it, and the same text every way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.forked import forked
from helpers.tiny import WIDTH, left_padded, pixels, prompt, scramble, tiny_llava, tiny_relook
from helpers.variants import crossed, variants
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, dynamic_module_utils
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from relook import load_model
from relook.errors import CheckpointError
from relook.model.export import WriteOptions, convert_model
from relook.model.load import add_post_decoder
from relook.model.modeling_relook import RelookLlavaForConditionalGeneration
from relook.model.post_decoder import FlatLayout, PostDecoder, PostDecoderSettings, pad_images
from relook.toyworld.build import make_processor

VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"depth": 2, "activation": "silu", "align_size": 48, "num_heads": 2, "mlp_size": 40},
    {"attention": "self_cross", "depth": 2, "align": "linear"},
    {"attention": "none", "depth": 2},
    {"align": "mlp_twice", "depth": 3},
)
every_variant = pytest.mark.parametrize("settings", variants(VARIANTS, (VARIANTS[2], VARIANTS[4])), ids=str)
IMAGES = (1, 2, 0, 1, 1, 0, 2, 1)  # of the rows below
TEXTS = ("Is there a cup?", "Describe this image in detail.", "Is there a dog in the image?", "Is there a bed?") * 2


def rows(model: Any) -> tuple[list[list[int]], list[Tensor]]:
    """Eight prompts of different lengths with 0, 1 or 2 images, and the images of each."""
    made = pixels(sum(IMAGES))
    return (
        [prompt(model, text, images) for text, images in zip(TEXTS, IMAGES, strict=True)],
        list(made.split(IMAGES)),
    )


def batch(ids: list[list[int]], images: list[Tensor]) -> dict[str, Tensor]:
    together = torch.cat(images)
    return {**left_padded(ids), **({"pixel_values": together} if len(together) else {})}


def new_tokens(model: Any, inputs: dict[str, Tensor], **how: Any) -> list[list[int]]:
    """What `generate` writes, up to and without </s>."""
    torch.manual_seed(0)
    how = {"do_sample": False, "max_new_tokens": 6, **how}
    output = model.generate(**inputs, **how)[:, inputs["input_ids"].shape[1] :]
    return [ids[: ids.index(2)] if 2 in ids else ids for ids in output.tolist()]


# --- before training


@pytest.mark.parametrize(
    ("attention", "align"), crossed(["cross", "none", "self_cross"], ["linear", "mlp", "mlp_twice"])
)
def test_untrained_leaves_every_logit_as_it_was(attention: str, align: str) -> None:
    """Every depth with every attention and every alignment, but not with all of their pairs."""
    depth = 1 + (["cross", "none", "self_cross"].index(attention) + ["linear", "mlp", "mlp_twice"].index(align)) % 3
    plain = tiny_llava()
    inputs = batch(*rows(plain))
    activation = ("gelu", "silu", "relu")[depth - 1]
    settings = {"attention": attention, "align": align, "depth": depth, "activation": activation}
    model = add_post_decoder(plain, settings, torch.Generator().manual_seed(1)).eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)


def test_starting_from_the_projector_is_the_identity_too_and_copies_it() -> None:
    plain = tiny_llava()
    model = add_post_decoder(plain, {}, torch.Generator().manual_seed(1), init="projector").eval()
    inputs = batch(*rows(plain))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
        features = torch.randn(5, plain.config.vision_config.hidden_size)
        norm = model.model.post_decoder.align.norm
        norm.weight.fill_(1), norm.bias.zero_()
        expected = F.layer_norm(plain.model.multi_modal_projector(features), (WIDTH,))
        torch.testing.assert_close(model.model.post_decoder.align(features), expected)


@pytest.mark.parametrize("settings", [{"align": "linear"}, {"align_size": 48}, {"attention": "none"}], ids=str)
def test_an_alignment_of_another_shape_cannot_start_from_the_projector(settings: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="projector's shape"):
        add_post_decoder(tiny_llava(), settings, torch.Generator().manual_seed(1), init="projector")


def test_the_same_seed_gives_the_same_weights_and_leaves_torchs_generator_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    decoders = [PostDecoder(PostDecoderSettings(), 8, 16, 2, 24) for _ in range(2)]
    torch.set_rng_state(before)
    for decoder in decoders:
        decoder.reset_parameters(torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), before)
    for name, parameter in decoders[0].named_parameters():
        assert torch.equal(parameter, decoders[1].get_parameter(name))
        zero = name.endswith(("o_proj.weight", "down_proj.weight", "bias"))
        assert bool(parameter.any()) != zero
        if parameter.dim() == 2 and not zero:  # inputs of variance 1 give outputs of variance about 1, at any width
            assert 0.7 < parameter.square().mean() * parameter.shape[1] < 1.3


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"attention": "crosss"}, "attention"),
        ({"align": ""}, "align"),
        ({"depth": 0}, "depth"),
        ({"activation": "x"}, "activation"),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"post_decoder.{named}"):
        PostDecoderSettings(**settings)


# --- what it computes


def reference(model: RelookLlavaForConditionalGeneration, states: Tensor, features: list[Tensor]) -> Tensor:
    """The post decoder of one row written down with torch's own attention, from FORMATS.md: (S, D) to (S, D)."""
    decoder = model.model.post_decoder
    activation = {"gelu": F.gelu, "silu": F.silu}[decoder.settings.activation]
    weights = dict(decoder.named_parameters())

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def attend(name: str, queries: Tensor, others: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v, o = (weights[f"{name}.{part}_proj.weight"] for part in "qkvo")
        heads = decoder.settings.num_heads or 4
        zero, none = q.new_zeros(3 * len(q)), None
        mixed, _ = F.multi_head_attention_forward(
            queries, others, others, len(q), heads, none, zero, none, none, False, 0.0, o, none, training=False,
            attn_mask=mask, use_separate_proj_weight=True, q_proj_weight=q, k_proj_weight=k, v_proj_weight=v,
        )  # fmt: skip
        return mixed

    image = torch.cat(features) if features else None
    if decoder.align is not None and image is not None:
        for i in range(len(decoder.align.linears)):
            linear = f"align.linears.{i}"
            image = F.linear(
                image if i == 0 else activation(image), weights[f"{linear}.weight"], weights[f"{linear}.bias"]
            )
        image = norm("align.norm", image)
    for b in range(decoder.settings.depth):
        block = f"blocks.{b}"
        if decoder.settings.attention == "self_cross":
            normed = norm(f"{block}.self_norm", states)
            hidden = torch.ones(len(states), len(states), dtype=torch.bool).triu(1)
            states = states + attend(f"{block}.self_attention", normed, normed, hidden)
        if decoder.settings.attention != "none" and image is not None:
            states = states + attend(f"{block}.cross_attention", norm(f"{block}.cross_norm", states), image)
        normed = norm(f"{block}.mlp_norm", states)
        gate, up, down = (weights[f"{block}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        states = states + F.linear(activation(F.linear(normed, gate)) * F.linear(normed, up), down)
    return states


@every_variant
@torch.no_grad()
def test_states_are_those_of_the_written_out_formula(settings: dict[str, Any]) -> None:
    """Rows with 0, 1 and 2 images, each alone and all together; every block feeds the next. In float64."""
    plain, model = tiny_llava().double(), tiny_relook(**settings).double()
    ids, images = rows(model)
    images = [pictures.double() for pictures in images]
    together = model.model(**batch(ids, images)).last_hidden_state
    for i, (row, pictures) in enumerate(zip(ids, images, strict=True)):
        alone = batch([row], [pictures])
        states = plain.model(**alone).last_hidden_state[0]
        tower = plain.model.vision_tower(pictures, output_hidden_states=True).hidden_states if len(pictures) else None
        expected = reference(model, states, list(tower[-2][:, 1:]) if tower else [])
        torch.testing.assert_close(model.model(**alone).last_hidden_state[0], expected, rtol=1e-9, atol=1e-9)
        # The trunk's rotations are float32, and a padded row starts at another position.
        torch.testing.assert_close(together[i, -len(row) :], expected, rtol=1e-3, atol=1e-3)
        assert (expected - states).abs().mean() > 0.1


@every_variant
def test_every_parameter_of_every_block_counts(settings: dict[str, Any]) -> None:
    model = tiny_relook(**settings)
    inputs = batch([prompt(model, TEXTS[0])], [pixels(1)])
    logits = model(**inputs).logits
    logits.square().mean().backward()
    for name, parameter in model.model.post_decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
        with torch.no_grad():
            original = parameter.detach().clone()
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            assert not torch.allclose(model(**inputs).logits, logits), name
            parameter.copy_(original)


@torch.no_grad()
def test_flat_states_equal_padded_ones() -> None:
    """`FlatLayout`: only attention needs the padded batch, and padding changes nothing."""
    decoder = tiny_relook(depth=2).model.post_decoder.double()
    features = torch.randn(3, 36, WIDTH, dtype=torch.float64)
    context = decoder.image_context(features, [1, 2])
    padded = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    row, slot = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 2, 0, 1, 4])
    flat = decoder(padded[row, slot], context, layout=FlatLayout(row, slot, (2, 5)))
    torch.testing.assert_close(flat, decoder(padded, context)[row, slot])


def test_images_are_laid_side_by_side() -> None:
    features = torch.arange(6.0).view(3, 2, 1)
    padded, mask = pad_images(features, [1, 0, 2])
    assert padded.squeeze(-1).tolist() == [[0, 1, 0, 0], [0, 0, 0, 0], [2, 3, 4, 5]]
    assert mask is not None
    assert mask.int().tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
    assert pad_images(features, [1, 1, 1])[1] is None
    with pytest.raises(ValueError, match="3 images, but the rows name 2"):
        pad_images(features, [1, 1])


@torch.no_grad()
def test_attention_maps_are_the_last_blocks_softmax() -> None:
    model = tiny_relook(depth=2)
    decoder = model.model.post_decoder
    context = decoder.image_context(torch.randn(1, 36, WIDTH), [1])
    states = torch.randn(1, 4, WIDTH)
    maps = decoder.attention_maps(states, context)
    assert maps.shape == (1, 4, 36)
    torch.testing.assert_close(maps.sum(-1), torch.ones(1, 4))
    first, last = decoder.blocks
    states = first(states, (context.keys[0], context.values[0]), None, None, None)
    queries = last.cross_attention.q_proj(last.cross_norm(states)).view(4, 4, WIDTH // 4)
    for head in range(4):
        scores = queries[:, head] @ context.keys[1][0, head].T / (WIDTH // 4) ** 0.5
        maps[0] -= scores.softmax(-1) / 4
    torch.testing.assert_close(maps, torch.zeros_like(maps), rtol=0, atol=1e-6)


def test_embeddings_given_by_hand_say_the_same() -> None:
    model = tiny_relook()
    inputs = batch([prompt(model, TEXTS[0])], [pixels(1)])
    with torch.no_grad():
        expected = model(**inputs).logits
        embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
        torch.testing.assert_close(model(inputs_embeds=embeds, **inputs).logits, expected)


def test_labels_give_the_mean_cross_entropy() -> None:
    model = tiny_relook()
    inputs = batch([prompt(model, TEXTS[0])], [pixels(1)])
    labels = inputs["input_ids"].clone()
    labels[:, :40] = -100
    with torch.no_grad():
        output = model(labels=labels, **inputs)
    expected = F.cross_entropy(output.logits[0, 39:-1], labels[0, 40:])
    torch.testing.assert_close(output.loss, expected)


# --- generation


@pytest.mark.parametrize("settings", variants(VARIANTS, VARIANTS[2:3]), ids=str)
def test_generated_text_does_not_depend_on_the_way(settings: dict[str, Any]) -> None:
    """Greedy and beams: alone, together, cached or not, in a static cache; an argmax loop that knows no cache."""
    model = tiny_relook(**settings)
    ids, images = rows(model)
    singles = [batch([row], [pictures]) for row, pictures in zip(ids, images, strict=True)]
    greedy = [new_tokens(model, single)[0] for single in singles]
    assert len(set(map(tuple, greedy))) > 4  # the rows do say different things
    assert new_tokens(model, batch(ids, images)) == greedy
    assert new_tokens(model, batch(ids, images), use_cache=False) == greedy
    assert new_tokens(model, batch(ids, images), cache_implementation="static") == greedy
    for single, expected in list(zip(singles, greedy, strict=True))[:3]:
        assert argmax_loop(model, single, len(expected)) == expected
    beams = [new_tokens(model, single, num_beams=3)[0] for single in singles[:4]]
    assert new_tokens(model, batch(ids[:4], images[:4]), num_beams=3) == beams
    assert new_tokens(model, batch(ids[:4], images[:4]), num_beams=3, use_cache=False) == beams
    assert new_tokens(model, batch(ids[:4], images[:4]), num_beams=3, cache_implementation="static") == beams


@torch.no_grad()
def argmax_loop(model: Any, inputs: dict[str, Tensor], steps: int) -> list[int]:
    ids, more = inputs["input_ids"], {k: v for k, v in inputs.items() if k == "pixel_values"}
    for _ in range(steps):
        logits = model(input_ids=ids, use_cache=False, **more).logits[:, -1]
        logits[:, model.generation_config.suppress_tokens] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids[0, -steps:].tolist() if steps else []


@every_variant
def test_sampling_draws_the_same_with_and_without_a_cache(settings: dict[str, Any]) -> None:
    model = tiny_relook(**settings)
    inputs = batch(*rows(model))
    sampled = new_tokens(model, inputs, do_sample=True)
    assert sampled == new_tokens(model, inputs, do_sample=True, use_cache=False)
    assert sampled != new_tokens(model, inputs)


def test_the_image_changes_what_is_said_through_the_post_decoder_alone() -> None:
    """The trunk gets one image, the post decoder another: what it looks at matters."""
    model = tiny_relook()
    ids = [prompt(model, TEXTS[0])]
    seen = []
    for seed in (0, 1):
        features = model.model.get_image_features(pixel_values=pixels(1), return_dict=True)
        other = model.model.get_image_features(pixel_values=pixels(1, seed), return_dict=True)
        features.vision_features = other.vision_features
        inputs = left_padded(ids)
        with torch.no_grad():
            seen.append(model(**inputs, mm_encoder_outputs={"image": features}).logits[:, -1])
    assert not torch.allclose(*seen)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
def test_the_image_side_is_computed_once_per_image(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_relook(depth=2)
    looked: list[tuple[int, list[int]]] = []
    towers: list[int] = []
    look, tower = PostDecoder.image_context, model.model.vision_tower.forward

    def counted(self: PostDecoder, features: Tensor, per_row: list[int]) -> Any:
        looked.append((len(features), per_row))
        return look(self, features, per_row)

    def counted_tower(pixel_values: Tensor, **kwargs: Any) -> Any:
        towers.append(len(pixel_values))
        return tower(pixel_values, **kwargs)

    monkeypatch.setattr(PostDecoder, "image_context", counted)
    monkeypatch.setattr(model.model.vision_tower, "forward", counted_tower)
    assert max(map(len, new_tokens(model, batch(*rows(model)), **how))) > 3
    assert looked == [(sum(IMAGES), list(IMAGES))]
    assert towers == [sum(IMAGES)]


# --- on disk


@every_variant
def test_a_saved_model_is_the_same_after_loading(settings: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_relook(**settings)
    model.save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    again = RelookLlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    loaded = load_model(tmp_path)
    assert isinstance(loaded.model, RelookLlavaForConditionalGeneration)
    inputs = batch(*rows(model))
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.equal(again(**inputs).logits, expected)
        assert torch.equal(loaded.model(**inputs).logits, expected)
    assert again.generation_config.suppress_tokens == model.generation_config.suppress_tokens
    assert PostDecoderSettings(**again.config.post_decoder) == PostDecoderSettings(**settings)


ALONE = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "relook":
            raise ImportError("relook is not installed here")

sys.meta_path.insert(0, Blocked())
try:
    import relook
except ImportError:
    pass
else:
    raise SystemExit("relook can be imported")
import torch
from transformers import AutoModelForImageTextToText

for folder in sys.argv[1:]:
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    inputs = torch.load(folder + "/inputs.pt", weights_only=True)
    with torch.no_grad():
        logits = model(**inputs).logits
    text = model.generate(**inputs, do_sample=False, max_new_tokens=6).tolist()
    torch.save({"logits": logits, "text": text}, folder + "/outputs.pt")
"""


def run_alone(folders: list[Path], home: Path) -> None:
    """In a process of its own, where nothing may be what transformers is about to drop."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-W", "error::FutureWarning", "-c", ALONE, *map(str, folders)]
    subprocess.run(command, check=True, env=environment, cwd=folders[0])


def fork_alone(folders: list[Path], home: Path) -> None:
    """In a fork that forgets relook: one need not wait until transformers is imported again."""
    done = forked(_forget_relook_and_run, folders, home)
    assert done.codes == [0], done.stderr


def _forget_relook_and_run(folders: list[Path], home: Path) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "relook"]:
        del sys.modules[name]
    for registry in (CONFIG_MAPPING, AutoModelForImageTextToText._model_mapping):
        registry._extra_content.clear()
    dynamic_module_utils.HF_MODULES_CACHE = str(home)
    warnings.simplefilter("error", FutureWarning)
    sys.argv = ["alone", *map(str, folders)]
    exec(ALONE, {})


@pytest.mark.parametrize("run", [fork_alone, pytest.param(run_alone, marks=pytest.mark.slow)])
def test_saved_models_load_where_relook_is_not_installed(
    run: Callable[[list[Path], Path], None], tmp_path: Path
) -> None:
    folders, expected = [], []
    for number, settings in enumerate(VARIANTS[:3]):
        model = tiny_relook(**settings)
        inputs = batch(*rows(model))
        folders.append(tmp_path / str(number))
        model.save_pretrained(folders[-1])
        torch.save(inputs, folders[-1] / "inputs.pt")
        with torch.no_grad():
            text = model.generate(**inputs, do_sample=False, max_new_tokens=6).tolist()
            expected.append((model(**inputs).logits, text))
    make_processor().save_pretrained(folders[0])
    convert_model(folders[0], tmp_path / "converted", "hf", WriteOptions(check=False))
    shutil.copyfile(folders[0] / "inputs.pt", tmp_path / "converted" / "inputs.pt")
    folders.append(tmp_path / "converted")
    expected.append(expected[0])
    run(folders, tmp_path / "home")
    for folder, (logits, text) in zip(folders, expected, strict=True):
        outputs = torch.load(folder / "outputs.pt", weights_only=True)
        torch.testing.assert_close(outputs["logits"], logits, rtol=0, atol=1e-5)
        assert outputs["text"] == text


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny_relook().save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    return tmp_path


def test_a_missing_tensor_is_named(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    del tensors["model.post_decoder.blocks.0.mlp.up_proj.weight"]
    save_file(tensors, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.post_decoder\.blocks\.0\.mlp\.up_proj\.weight"):
        load_model(saved)


def test_an_unused_tensor_is_named(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    save_file({**tensors, "model.post_decoder.gate": torch.zeros(3)}, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.post_decoder\.gate"):
        load_model(saved)


def test_a_file_that_was_cut_off_is_an_error(saved: Path) -> None:
    content = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is broken"):
        load_model(saved)


def test_scramble_moves_every_parameter() -> None:
    """The tests above lean on it."""
    fresh, moved = tiny_relook(trained=False), tiny_relook(trained=False)
    scramble(moved.model.post_decoder, torch.Generator().manual_seed(0))
    for name, parameter in moved.model.post_decoder.named_parameters():
        assert not torch.equal(parameter, fresh.model.post_decoder.get_parameter(name))
