"""Several images in a preference pair, a conversation and a question, from the file to the trained model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import save_tiny, scramble
from helpers.trunks import row_log_probs, save_trunk
from PIL import Image

from relook import LoadedModel, load_model
from relook.data.convert import convert_pairs
from relook.data.readers import read_llava, read_pairs
from relook.data.samples import Conversation, PreferencePair, Turn
from relook.data.templates import interleave
from relook.errors import DataError, RelookError
from relook.evaluate.llava_bench import answer_question_file, read_llava_bench_questions
from relook.files import read_records, write_json, write_jsonl
from relook.forward.collate import Collator, Item
from relook.forward.policy import Policy
from relook.model.load import add_post_decoder
from relook.recipe import build_recipe
from relook.serve.chat import read_turns
from relook.serve.protocol import Message
from relook.train.run import train

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.usefixtures("no_trunk_cache")
SIZES = [(40, 24), (24, 56), (100, 30), (16, 16)]  # width, height
KINDS = ["llava", "llava_next", "qwen2_5_vl"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, generator = tmp_path_factory.mktemp("pictures"), torch.Generator().manual_seed(0)
    paths = []
    for i, (width, height) in enumerate(SIZES):
        pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=generator)
        paths.append(folder / f"{i}.png")
        Image.fromarray(pixels.numpy()).save(paths[-1])
    return paths


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / request.param
    if request.param == "llava":
        return save_tiny(path)
    if request.param == "llava_next":
        from test_llava_next import next_processor, tiny_next

        tiny_next().save_pretrained(path)
        next_processor().save_pretrained(path)
        return path
    return save_trunk(path)


# --- files


def parquet(path: Path, pictures: Sequence[Path], rows: Sequence[tuple[Any, Sequence[int]]]) -> Path:
    """TRL's columns: each row's prompt and the indices of its pictures."""
    columns: dict[str, Any] = {
        "images": [[{"bytes": pictures[i].read_bytes(), "path": f"{i}.png"} for i in shown] for _, shown in rows],
        "prompt": [prompt for prompt, _ in rows],
        "chosen": [f"There is a cup in {i}." for i in range(len(rows))],
        "rejected": [f"There is a dog and a bed in {i}." for i in range(len(rows))],
    }
    pq.write_table(pa.table(columns), path)
    return path


def said(*parts: str | None) -> list[dict[str, Any]]:
    """A user's message of texts and, for None, images."""
    content = [{"type": "image", "text": None} if p is None else {"type": "text", "text": p} for p in parts]
    return [{"role": "user", "content": content}]


def test_trl_rows_keep_images_where_text_stands_between_them(pictures: list[Path], tmp_path: Path) -> None:
    rows = [
        (said(None, None, "Which has a cup?"), (0, 1)),
        (said("First ", None, ", then ", None, "?"), (2, 3)),
        (said("What?"), (1, 2)),  # without parts for its images, as plain texts have none
        (said(None, "What?"), (3,)),
    ]
    pairs, _ = read_pairs(parquet(tmp_path / "a.parquet", pictures, rows), tmp_path / "images")
    prompts = ["Which has a cup?", "First <image>, then <image>?", "What?", "What?"]
    assert [pair.prompt for pair in pairs] == prompts
    for pair, (_, shown) in zip(pairs, rows, strict=True):
        assert [path.read_bytes() for path in pair.images] == [pictures[i].read_bytes() for i in shown]
    # The same rows from a file that relook writes.
    convert_pairs(tmp_path / "a.parquet", tmp_path / "b.parquet", "trl")
    written = pq.read_table(tmp_path / "b.parquet").to_pylist()
    assert [[part["type"] for part in row["prompt"][0]["content"]] for row in written] == [
        [part["type"] for part in prompt[0]["content"]] for prompt, _ in rows
    ]
    assert read_pairs(tmp_path / "b.parquet", tmp_path / "images")[0] == pairs


def test_all_rows_whose_placeholders_are_not_their_images_are_named(pictures: list[Path], tmp_path: Path) -> None:
    messages = [(said(None, "What?"), (0, 1)), (said(None, None, "What?"), (0,)), (said("What?"), ())]
    texts = [("<image> and <image>?", (0,)), ("<image>?", (0, 1)), ("<image> or <image>?", (0, 1))]
    count = "number of <image> differs from the number of images"
    for rows, fault in (
        (messages, f"{count}: 2 (row-0, row-1); no image: 1 (row-2)"),
        (texts, f"{count}: 2 (row-0, row-1)"),
    ):
        path = parquet(tmp_path / "a.parquet", pictures, rows)
        with pytest.raises(DataError) as refused:
            read_pairs(path, tmp_path / "images", on_bad="error")
        assert fault in str(refused.value)
    assert [pair.id for pair in read_pairs(path, tmp_path / "images")[0]] == ["row-2"]
    # LLaVA's file likewise.
    turn = lambda text: [{"from": "human", "value": text}, {"from": "gpt", "value": "A cup."}]  # noqa: E731
    names = [path.name for path in pictures]
    records = [{"id": i, "image": names[:2], "conversations": turn("<image>\n" * i + "What?")} for i in range(4)]
    write_json(tmp_path / "mix.json", records)
    with pytest.raises(DataError, match=r"differs from the number of images: 3 \(0, 1, 3\)"):
        read_llava(tmp_path / "mix.json", pictures[0].parent, on_bad="error")


def test_a_clients_images_stay_where_text_stands_between_them(pictures: list[Path]) -> None:
    image = {"type": "image_url", "image_url": {"url": "file:///a.png"}}
    text = lambda words: {"type": "text", "text": words}  # noqa: E731
    for content, prompt in (
        ([text("What?"), image], "<image>\nWhat?"),
        ([text("What?"), image, image], "<image>\n<image>\nWhat?"),
        ([image, text("or"), image, text("?")], "<image>\nor\n<image>\n?"),
    ):
        [turn], urls = read_turns([Message(role="user", content=content)])
        assert (turn.prompt, len(urls)) == (prompt, content.count(image))
    assert interleave(["<image>", " ", "<image>", "?"]) == " ?"


# --- trees


def with_decoder(folder: Path, **settings: Any) -> LoadedModel:
    loaded = load_model(folder)
    generator = torch.Generator().manual_seed(1)
    loaded.model = add_post_decoder(loaded.model, settings, generator).eval()
    scramble(loaded.model.model.post_decoder, generator)
    return loaded


@pytest.mark.parametrize("settings", [{}, {"features": "tower"}, {"features": "projected"}], ids=str)
@torch.no_grad()
def test_trees_over_several_images_are_equal_to_separate_rows(
    folder: Path, pictures: list[Path], settings: dict[str, Any]
) -> None:
    loaded = with_decoder(folder, depth=2, **settings)
    loaded.model.double()  # random weights make logits so large that float32 rounds away the fifth digit
    encoder, answers = loaded.encoder(), ("There is a cup.", "There is a dog in the image.")
    examples = [
        encoder.pair(PreferencePair("a", tuple(pictures[:2]), "Which?", *answers)),
        encoder.pair(PreferencePair("b", tuple(pictures[1:]), "First <image>, <image>, then <image>?", *answers)),
        encoder.pair(PreferencePair("c", (pictures[3],), "What?", *answers)),
    ]
    turns = [(Turn("<image>\nor <image>?", "A cup."), Turn(again, "A dog.")) for again in ("Where?", "Why?")]
    conversations = [Conversation(str(i), tuple(pictures[2:]), t) for i, t in enumerate(turns)]
    grouped = encoder.conversations(conversations, 16)
    assert [len(example.tree.branches) for example in grouped] == [2]  # both read the images once
    items = sorted(map(Item, [*examples, *grouped]), key=lambda item: -len(item.example.tree))
    collator = Collator(Policy(loaded.core), loaded.images, loaded.pad_id)
    batch = collator(items)["batch"]
    assert sorted(batch.image_counts) == [1, 2, 2, 3]
    theirs = row_log_probs(loaded, items)
    torch.testing.assert_close(collator.policy(batch), theirs, atol=1e-5, rtol=1e-5)
    # Control: the pictures of a tree in another order.
    swapped = [Item(type(i.example)(i.example.id, i.example.tree, i.example.images[::-1])) for i in items[:1]]
    if loaded.core.config.model_type.endswith("llava"):  # elsewhere pictures of other sizes take other positions
        wrong = collator.policy(collator([*swapped, *items[1:]])["batch"])
        assert (wrong - theirs).abs().max() > 1e-3


# --- training and answers


@pytest.mark.parametrize(
    "keys",
    [
        {"tune_post_decoder": True, "tune_lm_head": True},
        pytest.param({"tune_post_decoder": True, "post_decoder.features": "tower"}, marks=pytest.mark.slow),
        pytest.param({"tune_post_decoder": True, "post_decoder.features": "projected"}, marks=pytest.mark.slow),
        pytest.param({"lora_enable": True, "lora_r": 4, "lora_dropout": 0.0}, marks=pytest.mark.slow),
        pytest.param(
            {"lora_enable": True, "lora_r": 4, "tune_post_decoder": True, "post_decoder.features": "tower"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_pairs_of_several_images_train_alike_live_and_from_what_is_kept(
    folder: Path, pictures: list[Path], tmp_path: Path, keys: dict[str, Any]
) -> None:
    rows = [("Which?", (0, 1)), ("<image>, <image> or <image>?", (1, 2, 3)), ("What?", (3,)), ("Both?", (2, 0))]
    data = {"pairs_path": parquet(tmp_path / "a.parquet", pictures, rows), "image_folder": tmp_path / "images"}
    short = {"max_steps": 3, "per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 0.1, "use_cpu": True}
    weights, losses = [], []
    for cache in ("memory", "off"):
        names = {"model_name_or_path": folder, "output_dir": tmp_path / cache, "version": "v1"}
        recipe = {"task": "dpo", **names, **data, **short, **keys, "feature_cache": cache, "logging_steps": 1}
        out = train(build_recipe(recipe))
        weights.append(load_model(out).model.state_dict())
        losses.append([entry["loss"] for entry in json.loads((out / "run.json").read_text())["log"] if "loss" in entry])
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_a_question_file_with_lists_of_images(pictures: list[Path], tmp_path: Path) -> None:
    folder, names = save_trunk(tmp_path / "model"), [path.name for path in pictures]
    questions = [
        {"question_id": 0, "image": names[:2], "text": "Which of both?"},
        {"question_id": 1, "image": names[1:], "text": "First <image>, then <image> or <image>?"},
        {"question_id": 2, "image": names[0], "text": "What is this?"},
    ]
    write_jsonl(tmp_path / "questions.jsonl", questions)
    root = pictures[0].parent
    answer_question_file(folder, tmp_path / "questions.jsonl", root, tmp_path / "out", max_new_tokens=5)
    loaded = load_model(folder)
    for question, record in zip(questions, read_records(tmp_path / "out/llava.jsonl"), strict=True):
        named = question["image"] if isinstance(question["image"], list) else [question["image"]]
        images: list[Any] = [root / name for name in named]
        assert record["text"] == loaded.generate(images, question["text"], max_new_tokens=5)
    # A file's faults come together.
    write_jsonl(
        tmp_path / "bad.jsonl",
        [
            {**questions[0], "text": "<image>?"},
            {**questions[2], "text": "<image><image>?"},
            {**questions[2], "image": "no.png"},
        ],
    )
    with pytest.raises(RelookError) as refused:
        read_llava_bench_questions(tmp_path / "bad.jsonl", root)
    assert "1 images do not exist" in str(refused.value)
    assert "2 questions: number of <image> differs from the number of images (0, 2)" in str(refused.value)
