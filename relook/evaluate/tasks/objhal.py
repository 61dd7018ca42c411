"""Object HalBench (Rohrbach et al. 2018; Yu et al. 2024, arXiv:2312.00849): objects that 300 descriptions make up.

The protocol is RLHF-V's and RLAIF-V's (eval_gpt_obj_halbench.py of RLHF-V/RLAIF-V): COCO images, prompts that ask for
detail, a refined list of synonyms. Published figures extract the objects by a judge. Without one, words of the list are
looked up in the text; both results are named.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relook.data.annotations import read_captions, read_coco
from relook.data.paths import coco_annotations
from relook.data.samples import Question, as_id
from relook.errors import DataError, preview
from relook.evaluate.benchmark import Answers, Benchmark, Questions, answers_provenance
from relook.evaluate.judge import Judge, Task, prompt_template
from relook.evaluate.statistics import rate_intervals, safe_ratio, to_columns
from relook.evaluate.tasks.chair import ChairScore, Vocabulary, chair_vocabulary, count_objects, mentions
from relook.files import atomic_file, read_records, read_text, text_hash

QUESTIONS, SYNONYMS = "obj_halbench_300_with_image.jsonl", "synonyms_refine.txt"
PROGRAM = "eval_gpt_obj_halbench.py"
SOURCE = "It comes from github.com/RLHF-V/RLAIF-V, eval/data; its licence keeps it out of relook."
LONGEST_IMAGE = 20 << 20  # bytes of an embedded image
SHORTEST = 4  # words; the original asks no judge about shorter answers, which name nothing
REQUEST = {"temperature": 0.0}
TEMPLATE = """You list the objects that an answer says are in an image. You cannot see the image; take the answer as
true. List each object that the answer names as visible, by its name alone, without colour, material, number or any
other attribute. Leave out what the answer only supposes, and what it says is absent. Answer with one JSON list of
strings, such as ["dog", "tennis racket"], and nothing else; [] if there is none.

Question: {question}

Answer: {answer}
"""


def objhal_file(data: Path, name: str) -> Path:
    """Return the path of one of the benchmark's files.

    Raises:
        DataError: it does not exist.
    """
    path = data / "objhal" / name
    if not path.exists():
        raise DataError(f"{path} does not exist.", SOURCE)
    return path


def objhal_questions(data: Path) -> list[Question]:
    """Read the questions; their images, which the file embeds, are written once to `data/objhal/images`.

    Raises:
        DataError: a file is missing, or a record is not in its layout.
    """
    path = objhal_file(data, QUESTIONS)
    questions = []
    for number, record in enumerate(read_records(path), 1):
        try:
            image_id, text = as_id(record["image_id"]), record["question"]
            image = path.with_name("images") / f"COCO_{int(image_id):012d}.jpg"
            if not image.exists():
                _write_image(image, record["image"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: record {number} is not in the benchmark's layout ({error}).", SOURCE) from None
        questions.append(Question(image_id, image, str(text)))
    return questions


def _write_image(path: Path, text: Any) -> None:
    """Write an embedded image.

    Raises:
        ValueError: it is longer than `LONGEST_IMAGE`, or not base64.
    """
    if not isinstance(text, str) or len(text) > LONGEST_IMAGE * 4 // 3:
        raise ValueError("no image, or one that is too large")
    try:
        content = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"image: {error}") from None
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def objhal_vocabulary(data: Path) -> Vocabulary:
    """Read the benchmark's synonyms as a vocabulary with CHAIR's rules for double words."""
    lines = read_text(objhal_file(data, SYNONYMS)).splitlines()
    return chair_vocabulary([[word.strip() for word in line.split(",")] for line in lines if line.strip()])


def objhal_truth(data: Path, images: Sequence[str], vocabulary: Vocabulary) -> dict[str, frozenset[str]]:
    """Return the objects on each image, by COCO's id: annotated ones, and those named in human captions.

    The images are from val2014 and train2014; of the two, the annotation files that exist are read.

    Raises:
        DataError: a file of captions is missing, or images have no annotations.
    """
    truth: dict[str, frozenset[str]] = {}
    for split in ("val2014", "train2014"):
        instances, captions = (_of_split(coco_annotations(data, kind), split) for kind in ("instances", "captions"))
        if not instances.exists():
            continue
        annotations, human = read_coco(instances), read_captions(captions)
        for image in images:
            name = annotations.ids.get(image)
            if name is not None:
                texts = human.get(name, ())
                # A category is its own word of the list, or one of its synonyms.
                annotated = {vocabulary.phrases.get(category, category) for category in annotations.objects[name]}
                truth[image] = frozenset(annotated | {m.object for t in texts for m in mentions(t, vocabulary)})
    if missing := [image for image in images if image not in truth]:
        raise DataError(
            f"{len(missing)} images have no COCO annotations ({preview(missing)}).",
            "Put instances_ and captions_ of val2014, and of train2014 if they are from there, into annotations/.",
        )
    return truth


def _of_split(path: Path, split: str) -> Path:
    return path.with_name(path.name.replace("val2014", split))


def read_object_list(reply: str) -> tuple[str, ...] | None:
    """Parse a judge's list of objects; None unless the reply holds exactly one JSON list of strings."""
    lists = re.findall(r"\[[^\[\]]*\]", reply)
    if len(lists) != 1:
        return None
    try:
        content = json.loads(lists[0])
    except ValueError:
        return None
    return tuple(content) if all(isinstance(name, str) for name in content) else None


def listed_objects(names: Sequence[str], vocabulary: Vocabulary) -> list[str]:
    """Map a judge's names to objects of the list; each word counts once.

    As in the original, a name counts if it contains a double word of the list, or is a word of it as a whole: "wooden
    dining table" is a dining table, a "coffee table" is none.
    """
    words: dict[str, str] = {}
    for name in names:
        phrase = re.sub(r"^(a|an|the) ", "", " ".join(name.lower().split()))
        if phrase in vocabulary.phrases:
            words.setdefault(phrase, vocabulary.phrases[phrase])
            continue
        for double in _double_words(phrase):
            if double in vocabulary.phrases:
                words.setdefault(double, vocabulary.phrases[double])
    return [name for name in words.values() if name]


def _double_words(phrase: str) -> list[str]:
    words = phrase.split()
    return [" ".join(words[i : i + 2]) for i in range(len(words) - 1)]


def objhal_rates(score: ChairScore) -> dict[str, Any]:
    """Compute the benchmark's rates, with 95 % intervals over images.

    Response: answers with an absent object / answers that name an object. Mention: mentions of absent objects /
    mentions. Recall: objects on the images that are named / objects on the images.
    """
    ratios = {
        "response": [(int(h > 0), int(m > 0)) for h, m in zip(score.hallucinated, score.mentioned, strict=True)],
        "mention": list(zip(score.hallucinated, score.mentioned, strict=True)),
        "recall": list(zip(score.covered, score.present, strict=True)),
    }
    rates = {name: safe_ratio(*map(sum, to_columns(ratio))) for name, ratio in ratios.items()}
    return {**rates, **rate_intervals(ratios), "length": score.length, "empty": score.empty, "n": score.n}


def score_objhal(
    data: Path, questions: Sequence[Question], answers: Mapping[str, str], judge: Judge | None
) -> dict[str, Any]:
    """Compute the rates by the word list and, with a judge, by its lists of objects.

    Answers that the judge did not read are left out of its rates and counted in `not_judged`.
    """
    vocabulary = objhal_vocabulary(data)
    truth = objhal_truth(data, [question.id for question in questions], vocabulary)
    mentioned = {i: [m.object for m in mentions(text, vocabulary)] for i, text in answers.items()}
    result: dict[str, Any] = {"word_list": objhal_rates(count_objects(mentioned, answers, truth))}
    result["synonyms"] = text_hash(*sorted(f"{word}={name}" for word, name in vocabulary.phrases.items()))
    if judge is not None:
        template, prompt = prompt_template(data / "objhal" / PROGRAM, "prompt_template", TEMPLATE)
        long_enough = [question for question in questions if len(answers[question.id].split()) >= SHORTEST]
        tasks = [
            Task(_filled(template, question.text, answers[question.id]), read_object_list) for question in long_enough
        ]
        judged = judge.ask(tasks, REQUEST, "Object HalBench judge")
        lists: dict[str, tuple[str, ...] | None] = {question.id: () for question in questions}
        lists |= {question.id: names for question, names in zip(long_enough, judged.verdicts, strict=True)}
        read = {i: listed_objects(names, vocabulary) for i, names in lists.items() if names is not None}
        result["by_judge"] = {
            **objhal_rates(count_objects(read, answers, truth)),
            "judged": len(read),
            "not_judged": len(lists) - len(read),
        }
        result["judge"] = {**judged.to_json(), **prompt}
    return result


def _filled(template: str, question: str, answer: str) -> str:
    # In one pass: an answer may hold the other placeholder.
    parts = {"{question}": question, "{answer}": answer}
    return re.sub(r"\{question\}|\{answer\}", lambda match: parts[match[0]], template)


def _results(data: Path, questions: Questions, answers: Answers, location: Path, judge: Judge | None) -> dict[str, Any]:
    result = score_objhal(data, questions["objhal"], BENCHMARK.texts(answers), judge)
    return result | answers_provenance(location, questions, answers)


BENCHMARK = Benchmark(
    "Object HalBench",
    questions=lambda data: {"objhal": objhal_questions(data)},
    score=_results,
    id_field="image_id",
    text_field="answer",
    judge_request=REQUEST,
)
