"""Photoworld (benchmarks/photoworld): texts say what they are meant to say, and the chain runs in a tiny form.

Its photographs and language model are not shipped: here stamps are discs, and the weights are random.
"""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

FOLDER = Path(__file__).parents[1] / "benchmarks" / "photoworld"
sys.path.insert(0, str(FOLDER))

import captions  # noqa: E402
import scenes  # noqa: E402


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Discs for stamps, noise for panoramas."""
    folder = tmp_path_factory.mktemp("assets")
    for name in ("stamps", "panoramas"):
        (folder / name).mkdir()
    for number, file in enumerate(file for item in scenes.OBJECTS.values() for file in item["files"]):
        stamp = Image.new("RGBA", (60, 60))
        colour = ((number * 37) % 256, (number * 91) % 256, (number * 53) % 256, 255)
        ImageDraw.Draw(stamp).ellipse((2, 2, 57, 57), colour)
        stamp.save(folder / "stamps" / f"{file.replace('/', '__')}.png")
    dice = np.random.default_rng(0)
    for name in {name for setting in scenes.SETTINGS.values() for name in setting["panoramas"]}:
        pixels = dice.integers(0, 255, (32, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "panoramas" / f"{name}.png")
    return folder


def render(assets: Path, count: int) -> list[scenes.Scene]:
    return [scenes.render(assets, random.Random(seed))[1] for seed in range(count)]


def test_boxes_and_patches_agree(assets: Path) -> None:
    for seed in range(5):
        picture, scene, patches = scenes.render(assets, random.Random(seed))
        assert picture.size == (224, 224)
        assert set(np.unique(patches)) - {0} <= {scenes.CLASSES.index(name) + 1 for name in scene.names}
        for item in scene.objects:
            x, y, width, height = item.box
            assert x >= 0
            assert y >= 0
            assert x + width <= 224
            assert y + height <= 224
            assert scenes.MIN_PIXELS <= item.pixels <= width * height


def test_base_texts_keep_small_objects_to_themselves(assets: Path) -> None:
    for number, scene in enumerate(render(assets, 30)):
        largest = {name: max(o.size for o in scene.objects if o.name == name) for name in scene.names}
        small = {name for name, size in largest.items() if size < captions.SMALL}
        (_, caption), *questions = captions.conversations(scene, str(number))
        named = {mention.name for mention in captions.noisy_mentions(scene, random.Random(str(number)))}
        assert not named & small
        answers = dict(questions)
        for name in scene.names:
            asked = answers.get(captions.question_text(name))
            assert asked in (None, captions.YES) if name not in small else asked is None
        assert caption.startswith(tuple(opening.split("{")[0] for opening in captions.OPENINGS))


def test_caption_pairs_differ_in_nouns_alone_and_by_the_dose(assets: Path) -> None:
    false: Counter[tuple[float, str]] = Counter()
    mentions = 0
    for number, scene in enumerate(render(assets, 60)):
        mentions += len(scene.names)
        for dose in (0.0, 0.2):
            chosen, rejected = captions.caption_pair(scene, dose, str(number))
            assert chosen.count(".") == rejected.count(".")
            absent = [name for name in scene.usual if name not in scene.names]
            for side, text in (("chosen", chosen), ("rejected", rejected)):
                words = text.lower().split(" ", 3)[-1]
                false[dose, side] += sum(f" {captions.with_article(name)} " in f" {words} " for name in absent)
    assert false[0.0, "chosen"] == 0
    assert 0.1 < false[0.2, "chosen"] / mentions < 0.3
    for dose in (0.0, 0.2):
        assert 0.1 < (false[dose, "rejected"] - false[dose, "chosen"]) / mentions < 0.4


def write_annotations(folder: Path) -> list[str]:
    """Write instances of three images, with a dog in each and an apple in the first, and return the images' names."""
    names = ["dog", "apple", "car"]
    images = ["COCO_val2014_000000000001.jpg", "COCO_val2014_000000000002.jpg", "COCO_val2014_000000000003.jpg"]
    instances = {
        "images": [{"id": number, "file_name": name} for number, name in enumerate(images, 1)],
        "categories": [{"id": number, "name": name} for number, name in enumerate(names, 1)],
        "annotations": [
            {"id": number, "image_id": image, "category_id": category}
            for number, (image, category) in enumerate([(1, 1), (1, 2), (2, 1), (3, 1)], 1)
        ],
    }
    (folder / "annotations").mkdir()
    (folder / "annotations" / "instances_val2014.json").write_text(json.dumps(instances))
    return images


def test_corrected_captions_name_nothing_absent(tmp_path: Path) -> None:
    import analysis

    images = write_annotations(tmp_path)
    texts = ["A park. A car is near. A dog is left.", "A park. A dog is left. A car is near. End.", "A dog is left."]
    lines = [json.dumps({"image": image, "caption": text}) for image, text in zip(images, texts, strict=True)]
    (tmp_path / "chair.jsonl").write_text("\n".join(lines))
    assert analysis.corrected(tmp_path, tmp_path) == {
        images[0]: ("A park. An apple is near. A dog is left.", texts[0]),  # the apple was not named
        images[1]: ("A park. A dog is left. End.", texts[1]),  # nothing else is there
    }


def test_equal_recall_counts_each_object_once(tmp_path: Path) -> None:
    import analysis

    images = write_annotations(tmp_path)
    captions_of = {
        "first": ["A car. A dog. An apple. A car.", "A dog.", "A dog."],
        "second": ["A dog. A dog. An apple.", "A dog.", "A park."],
    }
    for run, texts in captions_of.items():
        (tmp_path / run).mkdir()
        lines = [json.dumps({"image": image, "caption": text}) for image, text in zip(images, texts, strict=True)]
        (tmp_path / run / "chair.jsonl").write_text("\n".join(lines))
    found = analysis.at_equal_recall([(tmp_path, tmp_path / "first", tmp_path / "second")])
    # Both reach a recall of 3 / 4: the first with "A car. A dog." and two dogs, the second with all it says.
    assert found["cuts"] == [{"words": [4, 6], "recall": [0.75, 0.75]}]
    assert found["difference"] == pytest.approx(0 / 3 - 1 / 4)


def test_cells_are_averaged_where_they_are() -> None:
    import changed
    import torch

    patches = torch.arange(16.0).view(1, 16, 1)  # 4 x 4
    rows = changed.averaged(patches, 2).view(4, 4).tolist()
    assert rows == [[2.5, 2.5, 4.5, 4.5]] * 2 + [[10.5, 10.5, 12.5, 12.5]] * 2


def test_cut_tokenizer_keeps_tokens() -> None:
    import fetch
    import tokenizers

    corpus = ["Is there a dog in the image?", "There is a cat on the left side.", "unrelated words entirely"] * 50
    full = tokenizers.ByteLevelBPETokenizer()
    full.train_from_iterator(corpus, vocab_size=600, show_progress=False)
    description = json.loads(full.to_str())

    class Wrapped:
        backend_tokenizer = full._tokenizer

    kept = fetch.cut_vocabulary(description, Wrapped, corpus[:2])
    cut = tokenizers.Tokenizer.from_str(json.dumps(description))
    assert len(kept) < full.get_vocab_size()
    for text in corpus[:2]:
        assert cut.encode(text).tokens == full.encode(text).tokens
        assert [kept[i] for i in cut.encode(text).ids] == full.encode(text).ids
    assert cut.decode(cut.encode("unrelated").ids) == "unrelated"


def write_random_language_model(folder: Path, layers: int) -> None:
    """Write blocks as `fetch.write_language_model` does, with random weights and a tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", "<|im_end|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    shapes = {"token_embd.weight": (len(vocabulary), 576), "output_norm.weight": (576,)}
    for layer in range(layers):
        square, wide = {"attn_q": 576, "attn_k": 192, "attn_v": 192, "attn_output": 576}, ("ffn_gate", "ffn_up")
        shapes |= {f"blk.{layer}.{name}.weight": (rows, 576) for name, rows in square.items()}
        shapes |= {f"blk.{layer}.{name}.weight": (1536, 576) for name in wide}
        shapes |= {f"blk.{layer}.ffn_down.weight": (576, 1536)}
        shapes |= {f"blk.{layer}.{name}.weight": (576,) for name in ("attn_norm", "ffn_norm")}
    dice, index, blob = np.random.default_rng(0), [], b""
    for name, shape in shapes.items():
        values = dice.normal(0, 0.04, shape) if len(shape) > 1 else np.ones(shape)
        data = values.astype(np.float32).tobytes()
        index.append([name, "f32", list(shape), len(blob), len(data)])
        blob += data
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "part0.bin").write_bytes(blob[: len(blob) // 2])
    (folder / "part1.bin").write_bytes(blob[len(blob) // 2 :])


@pytest.mark.slow
def test_the_chain_runs_in_a_tiny_form(assets: Path, tmp_path: Path) -> None:
    write_random_language_model(assets / "lm", layers=2)
    command = [sys.executable, FOLDER / "run.py", "--tiny", "--assets", assets, "--work", tmp_path]
    subprocess.run([str(word) for word in command], check=True)
    results = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").glob("*.json")}
    # A base of random weights names no object, so its captions give no pairs.
    assert set(results["study"]["failures"]) <= {"nll_policy-1", "dpo_policy-1"}
    rows = results["study"]["rows"]
    assert {"cross-1", "none-1", "own_tokens-1", "swapped-1", "swapped_similar-1", "lora-1", "base"} <= rows.keys()


def test_blocks_are_dequantised_by_their_layout() -> None:
    import llava

    # Q4_1: scale and minimum (fp16), then 16 bytes whose low halves are values 0 to 15, the high ones 16 to 31.
    digits = [i % 16 for i in range(32)]
    block = struct.pack("<2e16B", 0.5, -1.0, *(digits[i] | digits[16 + i] << 4 for i in range(16)))
    values = llava.dequantised("q4_1", np.frombuffer(block, np.uint8))
    assert values.ravel().tolist() == [0.5 * digit - 1 for digit in digits]
    # Q8_0: scale (fp16), then 32 signed bytes.
    block = struct.pack("<e32b", 0.25, *range(-16, 16))
    assert llava.dequantised("q8_0", np.frombuffer(block, np.uint8)).ravel().tolist() == [i / 4 for i in range(-16, 16)]
