"""New preference pairs from the model's own mistakes: it describes and answers, annotations find what is wrong.

Each wrong text is corrected with the least change and kept at the same length and style, so that training cannot learn
length. The result is written in HA-DPO's layout: desc_data.json and pope_data.json.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from relook.console import progress
from relook.data.hadpo import DESCRIBE_PROMPTS
from relook.data.vg import read_image_paths, read_objects
from relook.errors import DataError
from relook.evaluate.answer import Asking, answer
from relook.evaluate.chair import Vocabulary, mentions
from relook.evaluate.pope import official_parse, question_text
from relook.files import write_json
from relook.model.load import LoadedModel, Loading, model_hash

# Sentences that name no object, each as long as "There is a cup.": where nothing true is left to say instead.
NEUTRAL = ("The colors are bright.", "It looks quite calm.", "The light is soft.", "Everything is in place.")
SENTENCE_END = re.compile(r"(?<=[.!?])(\s+)")


@dataclass(frozen=True)
class Mining:
    """How pairs are mined.

    Args:
        samples: sampled descriptions an image, besides the greedy one; the first with a hallucination is used.
        questions: yes/no questions an image, half about present objects.
        temperature: of the sampled descriptions.
    """

    seed: int = 0
    samples: int = 1
    questions: int = 4
    temperature: float = 1.0
    batch_size: int = 64
    max_new_tokens: int = 64
    template: str = ""
    neutral: Sequence[str] = NEUTRAL


@dataclass(frozen=True)
class MiningReport:
    """What was found: for the data card and the screen."""

    images: int
    described: int
    hallucinated: int
    description_pairs: int
    asked: int
    wrong: int
    question_pairs: int


def mine_visual_genome(
    model: Path,
    vg_path: Path,
    out: Path,
    how: Mining,
    synonyms: Mapping[str, Sequence[str]] | None = None,
    loading: Loading = Loading(),  # noqa: B008 (frozen)
) -> MiningReport:
    """Mine pairs on a Visual Genome folder with `objects.json`; `out/card.json` says what was found."""
    paths, names = read_image_paths(vg_path), read_objects(vg_path)
    objects = {paths[image]: found for image, found in names.items() if image in paths and paths[image].is_file()}
    known = sorted(set().union(*objects.values())) if objects else []
    found = mine(loading.load(model), objects, Vocabulary.of(known, synonyms), out, how)
    write_json(out / "card.json", {**asdict(found), "model_hash": model_hash(model), "seed": how.seed})
    return found


def mine(
    loaded: LoadedModel,
    objects: Mapping[Path, Collection[str]],
    vocabulary: Vocabulary,
    out: Path,
    how: Mining,
) -> MiningReport:
    """Mine pairs on annotated images and write `out/desc_data.json` and `out/pope_data.json`.

    Args:
        objects: names of the objects on each image; an image id is its file's stem.
        vocabulary: which words name which object.
    """
    if not objects:
        raise DataError("There are no annotated images to mine.", "Check the annotations.")
    pairs, described, hallucinated = mine_descriptions(loaded, objects, vocabulary, how)
    records, asked, wrong = mine_answers(loaded, objects, how)
    write_json(out / "desc_data.json", pairs)
    write_json(out / "pope_data.json", records)
    return MiningReport(len(objects), described, hallucinated, len(pairs), asked, wrong, len(records))


def mine_descriptions(
    loaded: LoadedModel, objects: Mapping[Path, Collection[str]], vocabulary: Vocabulary, how: Mining
) -> tuple[dict[str, Any], int, int]:
    """Describe every image; returns desc_data records, descriptions made, and how many of them hallucinated."""
    rng = random.Random(f"{how.seed}/describe")
    prompts = [(image, rng.choice(DESCRIBE_PROMPTS)) for image in objects]
    described: dict[Path, list[str]] = {image: [] for image in objects}
    for round_number in range(1 + how.samples):
        sampling = (("do_sample", True), ("temperature", how.temperature), ("top_k", 0)) if round_number else ()
        asking = Asking(how.template, how.max_new_tokens, how.batch_size, sampling, how.seed + round_number)
        with progress("descriptions, sampled" if round_number else "descriptions, greedy") as report:
            for index, text in answer(loaded, prompts, asking, report):
                described[prompts[index][0]].append(text)
    pairs: dict[str, Any] = {}
    hallucinated = 0
    for image, texts in described.items():
        found = [text for text in texts if hallucinations(text, objects[image], vocabulary)]
        hallucinated += len(found)
        if found:
            chosen = correct(found[0], objects[image], vocabulary, how.neutral, rng)
            pairs[image.stem] = {"chosen": [chosen], "rejected": [found[0]]}
    return pairs, sum(map(len, described.values())), hallucinated


def hallucinations(text: str, truth: Collection[str], vocabulary: Vocabulary) -> list[str]:
    """Objects that a text names and the image does not have, in order of mention."""
    return [mention.object for mention in mentions(text, vocabulary) if mention.object not in truth]


def correct(
    text: str, truth: Collection[str], vocabulary: Vocabulary, neutral: Sequence[str], rng: random.Random
) -> str:
    """The least change that makes a description true, at the same number of sentences.

    A hallucinated object is exchanged for one that is there and was not named; where none is left, its sentence is
    exchanged for a neutral one. All else stays as it is, also line breaks and a last sentence that was cut off.
    """
    said = {mention.object for mention in mentions(text, vocabulary)}
    missing = sorted(set(truth) - said)
    rng.shuffle(missing)
    parts = SENTENCE_END.split(text.strip())
    for place in range(0, len(parts), 2):  # every second part is the space between two sentences
        sentence = parts[place]
        for mention in reversed(mentions(sentence, vocabulary)):
            if mention.object in truth:
                continue
            if missing:
                sentence = exchange(sentence, mention.start, mention.end, missing.pop())
            else:
                line = rng.choice([line for line in neutral if line not in parts] or list(neutral))
                sentence = line if sentence.endswith(".") else line.rstrip(".")
                break
        parts[place] = sentence
    return "".join(parts)


def exchange(sentence: str, start: int, end: int, name: str) -> str:
    """Put another noun in a sentence's place, with the article that goes with it."""
    before, after = sentence[:start], sentence[end:]
    words = before.rsplit(maxsplit=1)
    if words and words[-1].lower() in ("a", "an"):
        article = "an" if name[0] in "aeiou" else "a"
        before = f"{words[0]} {article} " if len(words) == 2 else f"{article.capitalize()} "
    return before + name + after


def mine_answers(
    loaded: LoadedModel, objects: Mapping[Path, Collection[str]], how: Mining
) -> tuple[list[dict[str, Any]], int, int]:
    """Ask about present and absent objects; returns pope_data records, questions asked, and wrong answers.

    Absent objects are asked in proportion to how often they come together with what is there: where models err. Every
    question becomes a pair, also where the model was right (`origin` "contrast"; "model" where the rejected answer is
    its own). With wrong answers only, the model's belief and the truth would be opposed in all of the data, and what
    training learns is to turn its answers round.
    """
    rng = random.Random(f"{how.seed}/ask")
    together = co_occurrence(objects)
    asked: list[tuple[Path, str, bool]] = []
    for image, present in objects.items():
        count = how.questions // 2
        yes = rng.sample(sorted(present), min(count, len(present)))
        weights = {n: sum(together[p][n] for p in present) for n in together if n not in present}
        no = weighted_sample(weights, how.questions - len(yes), rng)
        asked += [(image, name, True) for name in yes] + [(image, name, False) for name in no]
    answers = [""] * len(asked)
    asking = Asking(how.template, how.max_new_tokens, how.batch_size)
    with progress("yes/no questions") as report:
        for index, text in answer(loaded, [(image, question_text(name)) for image, name, _ in asked], asking, report):
            answers[index] = text
    records = []
    for (image, name, truth), text in zip(asked, answers, strict=True):
        records.append(
            {
                "image_id": image.stem,
                "question": question_text(name),
                "chosen": "Yes." if truth else "No.",
                "reject": "No." if truth else "Yes.",
                "answer": text,
                "origin": "contrast" if official_parse(text) == truth else "model",
                "correct": False,  # HA-DPO's word for a rejected answer that is right, which leaves nothing to learn
            }
        )
    wrong = sum(record["origin"] == "model" for record in records)
    return balance(records, rng), len(records), wrong


def co_occurrence(objects: Mapping[Path, Collection[str]]) -> dict[str, Counter[str]]:
    """How often two names stand on the same image."""
    counts: dict[str, Counter[str]] = {}
    for present in objects.values():
        for name in present:
            counts.setdefault(name, Counter()).update(other for other in present if other != name)
    return counts


def weighted_sample(weights: Mapping[str, float], count: int, rng: random.Random) -> list[str]:
    """Draw distinct names in proportion to weight + 1, by the largest of u^(1/w) (Efraimidis and Spirakis 2006)."""
    keys = {name: rng.random() ** (1 / (weight + 1)) for name, weight in sorted(weights.items())}
    return sorted(keys, key=lambda name: -keys[name])[:count]


def balance(records: list[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    """Drop pairs of the more frequent kind until as many end in yes as in no."""
    kinds = [[r for r in records if r["chosen"] == word] for word in ("Yes.", "No.")]
    fewest = min(map(len, kinds))
    kept = {id(record) for kind in kinds for record in rng.sample(kind, fewest)}
    return [record for record in records if id(record) in kept]
