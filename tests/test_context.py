"""Pairs with a context: ids and targets, readers, conversions, and log-probs against separate rows and TRL."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.damaged import encoded
from helpers.reference import IMAGE_ID, reference_tokenizer
from helpers.tiny import dpo_keys, pixels, tiny_llava
from helpers.variants import crossed
from test_loss import recipe, separate
from test_trl import padded, theirs

from relook.data.check import check_folder
from relook.data.convert import PAIR_LAYOUTS, convert_pairs
from relook.data.encode import Encoder, Example
from relook.data.packing import TokenRow, pack
from relook.data.parquet import _META_COLUMNS
from relook.data.readers import read_hadpo, read_pairs, read_sentinel
from relook.data.samples import PreferencePair
from relook.data.sentinel import SentinelPair, sentinel_pair, sentinel_texts
from relook.data.templates import get_template
from relook.errors import DataError, RecipeError
from relook.files import read_json, write_json, write_jsonl
from relook.forward.policy import LiveBatch, Policy
from relook.recipe import build_recipe
from relook.toyworld.build import make_processor
from relook.train.loss import preference_loss
from relook.train.run import read_samples, train

CONTEXT = "There is a red cup."
PAIR = PreferencePair(
    "p", (Path("1.png"),), "Describe it.", f"{CONTEXT} There is a dog.", f"{CONTEXT} There is a bed.", CONTEXT
)


def encoder(model: Any) -> Encoder:
    positions = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
    return Encoder(make_processor().tokenizer, get_template("llava_hf"), model.config.image_token_id, positions)


def rows_of(example: Example) -> list[TokenRow]:
    prefix, unsupervised = example.tree.prefix, (False,) * len(example.tree.prefix)
    return [TokenRow(prefix + b.ids, unsupervised + b.supervised) for b in example.tree.branches]


def targets(row: TokenRow) -> list[int]:
    return [id for id, supervised in zip(row.ids, row.supervised, strict=True) if supervised]


# --- ids


def with_context(context: str, complete: bool = True) -> PreferencePair:
    return PreferencePair("p", PAIR.images, PAIR.prompt, PAIR.chosen, PAIR.rejected, context, complete)


@pytest.mark.parametrize(
    ("context", "variant"),
    crossed(
        [CONTEXT, f"{CONTEXT} ", f"{CONTEXT} There is a", "There is a re"],
        ["llama_full_32000/legacy_false", "llama_cut_1024/legacy_true"],
    ),
)
def test_a_context_changes_what_is_supervised_and_no_id(context: str, variant: str, refdata: Path) -> None:
    """A token across its end is supervised, wherever white space stands; all tokens before are prefix."""
    encode = Encoder(reference_tokenizer(refdata, variant), get_template("v1"), IMAGE_ID, 1)
    answers = (PAIR.chosen, PAIR.rejected)
    complete, cut = (encode.pair(with_context(text)) for text in ("", context))
    for row, expected, answer in zip(rows_of(cut), rows_of(complete), answers, strict=True):
        assert row.ids == expected.ids
        remainder = f"{answer[len(context) :]}</s>".replace(" ", "")
        texts = [encode.tokenizer.decode(targets(row)[start:]).replace(" ", "") for start in (0, 1)]
        assert texts[0].endswith(remainder)
        assert len(texts[1]) < len(remainder)


def test_an_answer_that_breaks_off_has_no_end_mark() -> None:
    encode = encoder(tiny_llava())
    complete_pair, cut = (encode.pair(with_context(CONTEXT, complete)) for complete in (True, False))
    for row, other in zip(rows_of(complete_pair), rows_of(cut), strict=True):
        assert row.ids[:-1] == other.ids
        assert row.supervised[:-1] == other.supervised
        assert row.ids[-1] == encode.tokenizer.eos_token_id


# --- log-probs


def batch_of(model: Any) -> tuple[Encoder, list[Example]]:
    encode = encoder(model)
    other = PreferencePair(
        "q", PAIR.images, "Is there a cup?", "Yes. There is a dog.", "Yes. There is a bed.", "Yes.", False
    )
    return encode, [encode.pair(pair) for pair in (PAIR, other)]


def log_probs_of(model: Any, examples: list[Example]) -> tuple[Any, torch.Tensor]:
    trees = [example.tree for example in examples]
    batch = LiveBatch(pack(trees, 3, row_length=max(map(len, trees))), pixels(len(trees)), [1] * len(trees))
    return batch.packed.targets, Policy(model)(batch)


@torch.no_grad()
def test_log_probs_are_those_of_separate_rows() -> None:
    model = tiny_llava()
    _, examples = batch_of(model)
    _, log_probs = log_probs_of(model, examples)
    pictures = pixels(2)
    parts = [separate(model, row, picture) for e, picture in zip(examples, pictures, strict=True) for row in rows_of(e)]
    torch.testing.assert_close(log_probs, torch.cat(parts), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_log_probs_and_loss_are_trls_with_the_context_in_the_prompt(tmp_path: Path) -> None:
    """Ids from TRL's rule: those of prompt and answer in one, of which those of the prompt alone are the prompt."""
    model, reference = tiny_llava(1), tiny_llava()
    encode, examples = batch_of(model)
    tokenizer, rows = encode.tokenizer, []
    for example, pair in zip(examples[:1], [PAIR], strict=True):
        before = example.tree.prefix[: example.tree.prefix.index(encode.image_token_id) + encode.image_positions]
        text = f"\n{pair.prompt} ASSISTANT: {pair.context}"
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        for answer in (pair.chosen, pair.rejected):
            ids = tokenizer(text + answer[len(pair.context) :] + "</s>", add_special_tokens=False)["input_ids"]
            assert ids[: len(prompt)] == prompt
            rows.append(
                TokenRow((*before, *ids), (False,) * (len(before) + len(prompt)) + (True,) * (len(ids) - len(prompt)))
            )
    assert rows == rows_of(examples[0])
    policy_targets, log_probs = log_probs_of(model, examples[:1])
    _, by_reference = log_probs_of(reference, examples[:1])
    loss, fields = preference_loss(recipe(), log_probs, policy_targets, by_reference, torch.ones_like(log_probs))
    trainer = theirs(model, "DPO", tmp_path)
    ids, there, answer = padded(rows)
    inputs = {"input_ids": ids, "attention_mask": there, "completion_mask": answer}
    inputs["pixel_values"] = pixels(1).repeat(2, 1, 1, 1)
    expected = trainer._compute_loss(trainer.model, inputs, return_outputs=False)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for side in ("chosen", "rejected"):
        [logged] = trainer._metrics["eval"][f"logps/{side}"]
        assert float(fields[f"policy_logps/{side}"]) == pytest.approx(logged, abs=1e-4)


# --- files

SOUND = {"question": "Describe it.", "context": CONTEXT, "y_win": "There is a dog.", "y_lose": "There is a bed."}
BAD: list[tuple[Any, str]] = [
    ({**SOUND, "y_win": f"{CONTEXT} There is a dog."}, "an answer repeats the context"),
    ({**SOUND, "y_lose": SOUND["y_win"]}, "chosen equals rejected"),
    ({**SOUND, "context": 7}, "context is not text"),
    ({**SOUND, "y_win": " "}, "empty text"),
    ({**SOUND, "y_win": None}, "empty text"),
    ({"question": "?", "context": None}, "no y_win, y_lose"),
    ("text", "no question, y_win, y_lose"),
]


@pytest.fixture
def vg(tmp_path: Path) -> Path:
    folder = tmp_path / "vg"
    entries = [{"image_id": i, "url": f"https://x/VG_100K/{i}.jpg"} for i in (1, 2, 3)]
    write_json(folder / "image_data.json", entries)
    (folder / "VG_100K").mkdir()
    for i in (1, 2):
        (folder / f"VG_100K/{i}.jpg").write_bytes(encoded(random.Random(i), "JPEG"))
    return folder


def sound_file(folder: Path, suffix: str = ".json") -> Path:
    """Two images in turn, with and without contexts, and fields that the layout does not name."""
    first = [SOUND, {**SOUND, "context": None, "type": "y+"}, {**SOUND, "context": "", "y_win": "A cup."}]
    second = [{**SOUND, "context": "It is red.", "objects": ["cup"], "is_last_sent": False}]
    path = folder / f"LLaVA_SENTINEL_6k{suffix}"
    folder.mkdir(parents=True, exist_ok=True)
    if suffix == ".json":
        write_json(path, {"2": first, "1": second})
    else:
        numbered = zip("2121", first + second, strict=True)
        write_jsonl(path, [{"image_id": i, "image_path": "x.jpg", **record} for i, record in numbered])
    return path


def test_sentinels_files_are_read(vg: Path, tmp_path: Path) -> None:
    """A space joins context and sentence, as in the original's trainer, and the end mark is left out."""
    pairs, report = read_sentinel(sound_file(tmp_path), vg)
    assert report.dropped == 0
    assert [pair.id for pair in pairs] == ["2-0", "2-1", "2-2", "1-0"]
    one = pairs[0]
    assert (one.chosen, one.rejected) == (f"{CONTEXT} There is a dog.", f"{CONTEXT} There is a bed.")
    assert (one.context, one.complete, one.images[0]) == (CONTEXT, False, vg / "VG_100K/2.jpg")
    assert [(pair.context, pair.complete) for pair in pairs[1:3]] == [("", True)] * 2
    assert pairs[2].chosen == "A cup."
    lines, _ = read_sentinel(sound_file(tmp_path, ".jsonl"), vg)
    assert [pair.images[0].name for pair in lines] == ["2.jpg", "1.jpg", "2.jpg", "1.jpg"]
    assert [pair.chosen for pair in lines] == [pair.chosen for pair in pairs]


def test_bad_pairs_are_named_by_readers_and_check(vg: Path, tmp_path: Path) -> None:
    records = [record for record, _ in BAD]
    path = tmp_path / "data" / "sentinel.json"
    write_json(path, {"1": [*records, SOUND], "3": [SOUND], "9": [SOUND]})
    pairs, report = read_sentinel(path, vg)
    assert [pair.id for pair in pairs] == ["1-7"]
    named = {name: reason for reason, names in report.reasons.items() for name in names}
    expected = {f"1-{i}": reason for i, (_, reason) in enumerate(BAD)}
    assert named == expected | {"3-0": "image file missing", "9-0": "image id not in image_data.json"}
    with pytest.raises(DataError, match="bad samples: an answer repeats the context"):
        read_sentinel(path, vg, "error")
    write_jsonl(path.with_suffix(".jsonl"), [{"image_id": 1, **r} if isinstance(r, dict) else r for r in records[:-1]])
    checked = check_folder("sentinel", path.parent, vg, workers=1)
    by_file = {file.index.path.suffix: file.faults for file in checked.indexes}
    assert by_file[".json"] == {
        "an answer repeats the context": ["image-1"],
        "image file missing": ["image-3"],
        "image id not in image_data.json": ["image-9"],
    }
    lines = {name: reason for reason, names in by_file[".jsonl"].items() for name in names}
    assert lines == {f"line-{i}": reason for i, (_, reason) in enumerate(BAD[:-1])}


def test_relooks_own_files_have_whole_answers(vg: Path, tmp_path: Path) -> None:
    """So other programs may read them; a context must be their beginning."""
    texts = {"question": "Describe it.", "chosen": PAIR.chosen, "reject": PAIR.rejected, "correct": False}
    records = [
        {"image_id": 1, **texts, "context": CONTEXT, "complete": False},
        {"image_id": 1, **texts, "context": None, "complete": None},
        {"image_id": 1, **texts, "context": " "},
        {"image_id": 1, **texts, "context": "There is a blue cup."},
        {"image_id": 1, **texts, "context": CONTEXT, "chosen": CONTEXT},
        {"image_id": 1, **texts, "complete": "perhaps"},
    ]
    write_json(tmp_path / "pope_data.json", records)
    pairs, report = read_hadpo(vg, None, tmp_path / "pope_data.json")
    assert [(pair.context, pair.complete) for pair in pairs] == [(CONTEXT, False), ("", True), ("", True)]
    assert pairs[0].chosen == PAIR.chosen
    assert report.reasons == {
        "context is not the beginning of both answers": ("pope-3",),
        "nothing follows the context": ("pope-4",),
        "complete is neither true nor false": ("pope-5",),
    }
    write_json(tmp_path / "desc_data.json", {"1": {"chosen": [PAIR.chosen], "rejected": ["No."], "context": CONTEXT}})
    report = read_hadpo(vg, tmp_path / "desc_data.json")[1]
    assert list(report.reasons) == ["context is not the beginning of both answers"]


def trl_file(path: Path, form: str = "parts") -> Path:
    """Two rows whose prompt ends with a message of the assistant, and one without."""

    def said(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": text if form == "text" else [{"type": "text", "text": text}]}

    picture = {"bytes": encoded(random.Random(0), "PNG"), "path": None}
    starts: list[list[dict[str, Any]]] = [[said("assistant", CONTEXT)], [said("assistant", "It is ")], []]
    ends = [(" There is a dog.", " There is a bed."), ("red.", "blue."), ("Yes.", "No.")]
    rows = [
        {
            "images": [picture],
            "prompt": [said("user", "What?"), *start],
            "chosen": [said("assistant", chosen)],
            "rejected": [said("assistant", rejected)],
        }
        for start, (chosen, rejected) in zip(starts, ends, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("form", ["parts", "text"])
def test_trls_prompts_that_end_with_an_answer(form: str, tmp_path: Path) -> None:
    pairs, report = read_pairs(trl_file(tmp_path / "trl.parquet", form))
    assert report.dropped == 0
    assert [(pair.context, pair.chosen) for pair in pairs] == [
        (CONTEXT, f"{CONTEXT} There is a dog."),
        ("It is ", "It is red."),
        ("", "Yes."),
    ]
    assert all(pair.complete for pair in pairs)


@pytest.mark.parametrize("by", [to for to in PAIR_LAYOUTS if to not in ("trl", "sentinel")])
@pytest.mark.parametrize("form", ["parts", "text"])
def test_trls_contexts_there_and_back(by: str, form: str, tmp_path: Path) -> None:
    source = trl_file(tmp_path / "source.parquet", form)
    between = tmp_path / ("between" if by == "hadpo" else "between.parquet")
    assert convert_pairs(source, between, by) == 3
    assert convert_pairs(between, tmp_path / "back.parquet", "trl") == 3
    first, last = (pq.read_table(path) for path in (source, tmp_path / "back.parquet"))
    assert last.select(first.column_names).to_pylist() == first.to_pylist()
    assert [last.schema.field(name).type for name in first.column_names] == first.schema.types
    assert set(last.column_names) - set(first.column_names) <= {f"{by}_record", *_META_COLUMNS}
    if by != "hadpo":
        pairs, _ = read_pairs(between)
        assert [pair.context for pair in pairs] == [CONTEXT, "It is ", ""]


@pytest.mark.parametrize("by", [to for to in PAIR_LAYOUTS if to != "sentinel"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_sentinels_contexts_there_and_back(by: str, suffix: str, vg: Path, tmp_path: Path) -> None:
    source = sound_file(tmp_path / "data", suffix)
    between = tmp_path / ("between" if by == "hadpo" else "between.parquet")
    assert convert_pairs(source, between, by, vg) == 4
    assert convert_pairs(between, tmp_path / "back", "sentinel") == 4
    back = tmp_path / "back" / f"sentinel{suffix}"
    assert back.read_text() == source.read_text()
    original, again = read_sentinel(source, vg)[0], read_sentinel(back, tmp_path / "back")[0]
    there = read_hadpo(between, None, between / "pope_data.json")[0] if by == "hadpo" else read_pairs(between)[0]
    for pairs in (there, again):
        assert [without_place(pair) for pair in pairs] == [without_place(pair) for pair in original]


def without_place(pair: PreferencePair) -> tuple[Any, ...]:
    return pair.prompt, pair.chosen, pair.rejected, pair.context, pair.complete, pair.images[0].read_bytes()


def test_what_sentinels_layout_cannot_hold_is_refused(tmp_path: Path) -> None:
    """A context that no space ends; whole answers with a context, and first sentences, have relook's key `complete`."""
    with pytest.raises(DataError, match=r"\(no space after the context: 1\)"):
        convert_pairs(trl_file(tmp_path / "trl.parquet"), tmp_path / "out", "sentinel")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("context", "complete"), [("", False), ("", True), (CONTEXT, False), (CONTEXT, True)])
def test_sentinels_records_say_whether_answers_are_whole(context: str, complete: bool) -> None:
    pair = SentinelPair(PAIR.prompt, PAIR.chosen, PAIR.rejected, context, complete)
    record = sentinel_texts(pair)
    assert sentinel_pair(record) == pair
    assert ("complete" in record) == (complete == bool(context))


# --- a run


def test_a_run_trains_on_sentinels_file(base: Path, world: Path, tmp_path: Path) -> None:
    images = read_json(world / "vg/image_data.json")
    write_json(tmp_path / "sentinel.json", {str(image["image_id"]): [SOUND] for image in images[:4]})
    keys = dpo_keys(base, world, tmp_path / "run", tune_lm_head=True, feature_cache="off", max_steps=1)
    for name in ("desc_data_path", "pope_data_path"):
        del keys[name]
    keys["pairs_path"] = tmp_path / "sentinel.json"
    log = json.loads((train(build_recipe(keys)) / "run.json").read_text())
    assert log["samples"] == 4
    assert log["log"][0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert all(pair.context == CONTEXT for pair in read_samples(build_recipe(keys))[0])
    with pytest.raises(RecipeError, match="image_folder"):
        build_recipe({**keys, "image_folder": tmp_path})
    with pytest.raises(RecipeError, match="vg_path"):
        build_recipe({key: value for key, value in keys.items() if key != "vg_path"})
