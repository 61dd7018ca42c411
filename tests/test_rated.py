"""KTO's rated answers: what is read as such, what a pair becomes, and that TRL makes the same of both."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.damaged import encoded

from relook.data.convert import convert_pairs
from relook.data.readers import rated_answers, read_pairs
from relook.data.samples import PreferencePair
from relook.errors import DataError, RecipeError
from relook.recipe import build_recipe
from relook.train.loss import kto
from relook.train.run import read_samples

TEXTS = [("What?", "A dog.", True), ("Where?", "In the sky.", False), ("Who?", "A man.", True)]


def rated_file(path: Path, labels: list[Any] | None = None) -> Path:
    picture = {"bytes": encoded(random.Random(0), "PNG"), "path": None}
    labels = [label for _, _, label in TEXTS] if labels is None else labels
    rows = [
        {"images": [picture], "prompt": prompt, "completion": completion, "label": label}
        for (prompt, completion, _), label in zip(TEXTS, labels, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def texts_of(answers: list[PreferencePair]) -> list[tuple[Any, ...]]:
    return [(answer.prompt, answer.chosen, answer.desirable, answer.rejected) for answer in answers]


def test_rated_answers_are_read_with_another_prompts_answer(tmp_path: Path) -> None:
    path = rated_file(tmp_path / "rated.parquet")
    keys = {"task": "dpo", "model_name_or_path": "base", "output_dir": "out", "pairs_path": path}
    answers, report = read_samples(build_recipe({**keys, "loss_type": "kto"}))
    assert report.used == 3
    assert texts_of(list(answers)) == [  # type: ignore[arg-type]
        ("What?", "A dog.", True, "A man."),
        ("Where?", "In the sky.", False, "A dog."),
        ("Who?", "A man.", True, "In the sky."),
    ]
    with pytest.raises(RecipeError, match=r"has rated answers, not pairs\. Set loss_type kto"):
        read_samples(build_recipe(keys))
    with pytest.raises(DataError, match="has rated answers, not pairs"):
        convert_pairs(path, tmp_path / "pairs.parquet", "trl")


def test_labels_that_are_none_are_named(tmp_path: Path) -> None:
    answers, report = read_pairs(rated_file(tmp_path / "rated.parquet", [True, None, False]))
    assert [answer.desirable for answer in answers] == [True, False]
    assert report.reasons == {"label is neither true nor false": ("row-1",)}


def test_pairs_become_rated_answers_as_trl_makes_them() -> None:
    """Its order, all chosen ones first, and its baseline: the answer before, of another prompt, after one's context."""
    from datasets import Dataset
    from trl.data_utils import unpair_preference_dataset

    pairs = [
        PreferencePair("0", (), "What?", "A dog.", "A cat."),
        PreferencePair("1", (), "Where?", "It is here.", "It is there.", context="It is "),
    ]
    columns = [{name: getattr(pair, name) for name in ("prompt", "chosen", "rejected")} for pair in pairs]
    theirs = unpair_preference_dataset(Dataset.from_list(columns))
    answers = rated_answers(pairs)
    rows = [{"prompt": a.prompt, "completion": a.chosen, "label": a.desirable} for a in answers]
    assert rows == theirs.to_list()
    assert [answer.rejected for answer in answers] == ["there.", "It is A dog.", "here.", "It is A cat."]


def test_kto_by_hand() -> None:
    """sigmoid(ln 3) = 3/4: with a baseline of ln 2, ratios ln 6 and ln 2 / 3 are ln 3 above and below it."""
    ln = torch.log(torch.tensor([6.0, 6.0, 2 / 3, 2 / 3]))
    labels = torch.tensor([True, False, True, False])
    found = kto(ln, torch.log(torch.tensor(2.0)), labels, 1.0, 2.0, 0.5)
    torch.testing.assert_close(found, torch.tensor([2 / 4, 0.5 * 3 / 4, 2 * 3 / 4, 0.5 / 4]))
