"""Likelihoods of given answers: those of transformers' plain forward pass over separate rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import IMAGE_SIZE, tiny_llava, tiny_relook
from PIL import Image
from test_answering import as_loaded
from torch import Tensor

from relook import load_model
from relook.data.images import MemoryImage
from relook.evaluate.likelihood import ScoredAnswer, likelihoods
from relook.generate.answering import GenerationSettings, answer_questions
from relook.toyworld.build import shipped_base


def picture(seed: int) -> MemoryImage:
    noise = np.random.default_rng(seed).integers(256, size=(IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    return MemoryImage.of(Image.fromarray(noise))


def plain(loaded: Any, images: tuple[MemoryImage, ...], text: str, said: str) -> Tensor:
    """log p of the tokens of the answer and its end, by one forward pass over one row."""
    inputs = loaded.encode([image.image for image in images], text)
    tokenizer = loaded.processor.tokenizer
    ids = torch.tensor([tokenizer(f" {said}</s>", add_special_tokens=False)["input_ids"]])
    start = inputs["input_ids"].shape[1]
    inputs |= {"input_ids": torch.cat([inputs["input_ids"], ids], 1)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        logits = loaded.model(**inputs).logits[0, start - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[0][:, None]).squeeze(1)


@pytest.mark.parametrize("with_post_decoder", [False, True])
def test_likelihoods_are_those_of_separate_rows(with_post_decoder: bool) -> None:
    loaded = as_loaded(tiny_relook() if with_post_decoder else tiny_llava())
    a, b = picture(0), picture(1)
    weighed: list[ScoredAnswer] = [
        ((a,), "Is there a cup?", "yes"),
        ((), "Is there a dog?", "no"),
        ((b,), "Is there a cup?", "a dog in the kitchen"),
        ((a,), "Is there a cup?", " no"),
        ((a, b), "Is there a dog in the image?", "yes, a cup"),
        ((a,), "Is there a cup?", "yes"),
    ]
    for batch_size in (1, 64):
        measured = dict(likelihoods(loaded, weighed, "", batch_size, lambda done, total: None))
        assert sorted(measured) == list(range(len(weighed)))
        for index, (images, text, answer) in enumerate(weighed):
            expected = plain(loaded, images, text, answer.strip())
            assert torch.tensor(measured[index].log_probs) == pytest.approx(expected, rel=1e-5, abs=1e-5)
            assert measured[index].loss == pytest.approx(-float(expected.mean()), rel=1e-5, abs=1e-5)
        assert measured[0].loss == pytest.approx(measured[5].loss)


def test_what_a_model_says_is_its_greedy_answer() -> None:
    loaded = load_model(shipped_base())
    a, text = picture(0), "Is there a cup in the image?"
    answer = loaded.generate([a.image], text)
    other = {"Yes.": "No.", "No.": "Yes."}[answer]
    weighed: list[ScoredAnswer] = [((a,), text, answer), ((a,), text, other), ((a,), text, f"{answer} {other}")]
    measured = dict(likelihoods(loaded, weighed, "", 8, lambda done, total: None))
    assert [measured[i].greedy for i in range(3)] == [True, False, False]
    assert measured[0].loss < measured[1].loss


def test_a_picture_in_memory_is_asked_about_as_its_file_is(tmp_path: Path) -> None:
    loaded = as_loaded(tiny_llava())
    held = picture(0)
    held.image.save(tmp_path / "a.png")
    again = MemoryImage.of(Image.open(tmp_path / "a.png").convert("RGBA"))
    assert again == held
    assert held != picture(1)
    asked = [(held, "Is there a cup?"), (tmp_path / "a.png", "Is there a cup?"), (again, "Is there a cup?")]
    reports: list[int] = []
    said = dict(
        answer_questions(loaded, asked, GenerationSettings(max_new_tokens=4), lambda done, total: reports.append(total))
    )
    assert said[0] == said[1] == said[2]
    assert set(reports) == {2}  # one of the three was not asked again
