"""relook as a model of lmms-eval: its tasks ask, relook's trees answer.

This module imports lmms-eval; `lmms.py` says what to do where that is not installed.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from PIL import Image

from relook import distributed
from relook.console import ProgressReport, progress
from relook.data.images import MemoryImage, prefetch_map
from relook.errors import DataError, RecipeError, preview
from relook.evaluate.likelihood import Likelihood, likelihoods
from relook.evaluate.results import AnswerFile
from relook.evaluate.run import append_answers
from relook.files import text_hash
from relook.generate.answering import GenerationSettings, answer_questions
from relook.model.load import LoadedModel, LoadOptions
from relook.recipe import coerce

WINDOW = 1 << 28  # bytes of pictures that are in memory at a time: about 300 of COCO's
FILLER = ["\n\n"]  # what lmms-eval writes as `until` where a task names none; its own LLaVA follows no `until` at all
SAMPLING = ("temperature", "top_p", "top_k")
FIXED_SETTINGS = ("num_beams", "repetition_penalty")
UNUSED = {"until", "max_new_tokens", "do_sample", "image_aspect_ratio"}  # read elsewhere; the last is the model's own


@dataclass(frozen=True)
class LmmsRequest:
    """One request of a task.

    Args:
        key: known again by it: the document's number and a hash of what is asked of it.
        how: generation settings; None where an answer is to be weighed.
        repeat: how often the same was asked before, where a task wants several samples.
    """

    task: str
    document: int
    key: str
    text: str
    visuals: Callable[[], Any]
    how: Mapping[str, Any] | None = None
    weighed: str = ""
    repeat: int = 0


class RelookModel(lmms):
    """Answers the requests of lmms-eval's evaluator, and keeps them in a file for each task.

    Args:
        load: called when there is something to ask.
        how: template, batch size, and the longest answer where a task does not say.
        out: folder of the answer files; what is in them is not asked again.
    """

    is_simple = True

    def __init__(self, load: Callable[[], LoadedModel], how: GenerationSettings, out: Path) -> None:
        super().__init__()
        self.device = distributed.collective_device()  # where the evaluator gathers
        self._load, self._how = cache(load), how
        self._file = cache(lambda task: AnswerFile(out / f"{task}.jsonl", "id", distributed.rank()))
        self.asked: dict[str, dict[str, None]] = {}  # keys by task, as a set in order

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> RelookModel:
        """For lmms-eval's own command: `--model relook --model_args model=DIR,adapter=DIR,dtype=bfloat16,bits=8`.

        Further ones: vision_tower, device, version, max_new_tokens, out.
        """
        given = dict(pair.split("=", 1) for pair in arg_string.split(",") if pair)
        given |= {k: str(v) for k, v in (additional_config or {}).items() if v is not None and k != "max_batch_size"}
        names = ("model", "adapter", "vision_tower", "dtype", "bits", "device", "version", "batch_size", "out")
        unknown = given.keys() - {*names, "max_new_tokens"}
        if unknown or "model" not in given:
            raise RecipeError(
                f"relook's model_args need a model, and do not have {preview(sorted(unknown)) or 'one'}.",
                f"Known ones: {', '.join(names)}, max_new_tokens.",
            )
        path = lambda name: Path(given[name]) if name in given else None  # noqa: E731
        loading = LoadOptions(
            path("adapter"),
            path("vision_tower"),
            given.get("dtype", "float32"),
            coerce("bits", given.get("bits", 16), int),
            given.get("device", ""),
        )
        sizes = {"max_new_tokens": 512, "batch_size": 64}
        numbers = (coerce(name, given.get(name, usual), int) for name, usual in sizes.items())
        how = GenerationSettings(given.get("version", ""), *numbers)
        out = path("out") or Path(tempfile.mkdtemp(prefix="relook-lmms-"))
        return cls(lambda: loading.load(Path(given["model"])), how, out)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers, in the order of the requests."""
        return [record["answer"] for record in self._records(requests, _generation_request, self._answers)]

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Of each given answer the loss and whether it is the greedy one.

        lmms-eval takes the smallest value for the best choice, as its LLaVA returns the mean negative log-probability
        of a token, the end of the answer included; so does this. A bare pair the evaluator (0.7.3) would make a string.
        """
        records = self._records(requests, _likelihood_request, self._weights)
        return [GenerationResult((record["loss"], record["greedy"])) for record in records]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refused: relook answers tasks of one round."""
        raise RecipeError(f"{requests[0].task_name} asks in several rounds.", "relook answers tasks of one round.")

    def _records(
        self,
        requests: Sequence[Instance],
        read: Callable[[Instance, Any, int], LmmsRequest],
        ask: Callable[
            [Sequence[LmmsRequest], Sequence[tuple[MemoryImage, ...]], ProgressReport],
            Iterator[tuple[int, dict[str, Any]]],
        ],
    ) -> list[dict[str, Any]]:
        """The records of all requests; those that no file has yet are asked for."""
        seen: Counter[int] = Counter()
        wanted = []
        for request in requests:
            padding = (request.metadata or {}).get("__padding_only__")  # evens out processes; nobody reads its answer
            wanted.append(read(request, self.task_dict, 0 if padding else seen[id(request)]))
            seen[id(request)] += 1
        left = {(one.task, one.key): one for one in wanted if one.key not in self._file(one.task).records}
        if left:
            self._ask(list(left.values()), ask)
        for one in wanted:
            self.asked.setdefault(one.task, {})[one.key] = None
        return [self._file(one.task).records[one.key] for one in wanted]

    def _ask(self, left: Sequence[LmmsRequest], ask: Callable[..., Iterator[tuple[int, dict[str, Any]]]]) -> None:
        files = [self._file(task) for task in dict.fromkeys(one.task for one in left)]
        with progress(", ".join(file.path.stem for file in files)) as report:
            done = 0
            for window, pictures in _windows(left):

                def record(
                    index: int, said: dict[str, Any], window: Sequence[LmmsRequest] = window
                ) -> tuple[AnswerFile, dict[str, Any]]:
                    one = window[index]
                    return self._file(one.task), {"id": one.key, "doc_id": one.document, "question": one.text, **said}

                def share(part: int, whole: int, done: int = done, size: int = len(window)) -> None:
                    report(done + part * size // whole, len(left))

                append_answers(ask(window, pictures, share), record, files, self._how.batch_size)
                done += len(window)

    def _answers(
        self, window: Sequence[LmmsRequest], pictures: Sequence[tuple[MemoryImage, ...]], report: ProgressReport
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        groups: dict[str, list[int]] = {}
        for index, one in enumerate(window):
            groups.setdefault(json.dumps([one.how, one.repeat]), []).append(index)
        for indices in groups.values():
            first = window[indices[0]]
            how, until = parse_generation_settings(self._how, first)
            questions = [(pictures[index], window[index].text) for index in indices]
            for number, text in answer_questions(self._load(), questions, how, report):
                yield indices[number], {"answer": _cut(text, until)}

    def _weights(
        self, window: Sequence[LmmsRequest], pictures: Sequence[tuple[MemoryImage, ...]], report: ProgressReport
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        weighed = [(shown, one.text, one.weighed) for one, shown in zip(window, pictures, strict=True)]
        found: Iterator[tuple[int, Likelihood]] = likelihoods(
            self._load(), weighed, self._how.template, self._how.batch_size, report
        )
        for index, likelihood in found:
            weights = {"loss": likelihood.loss, "greedy": likelihood.greedy}
            yield index, {"choice": window[index].weighed, **weights}

    def clean(self) -> None:
        """After a task: the next one asks the same model, so nothing is given back."""

    def finish(self) -> None:
        """Make each task's answers one file, in the order of its documents; what no longer is asked is left out."""
        keys = distributed.all_gather_objects([(task, key) for task, keys in self.asked.items() for key in keys])
        if distributed.is_main():
            for task in dict.fromkeys(task for task, _ in keys):
                file = AnswerFile(self._file(task).path, "id")  # read again: with what the others have added
                order = dict.fromkeys(key for other, key in keys if other == task)
                file.finish(sorted(order, key=lambda key: file.records[key]["doc_id"]))
        distributed.barrier("the answers")


def parse_generation_settings(how: GenerationSettings, one: LmmsRequest) -> tuple[GenerationSettings, list[str]]:
    """What a task's generation settings mean, and the strings at which its answers end.

    Where a task says `do_sample: false` it is greedy, whatever temperature it names; without `do_sample` a temperature
    above 0 samples, as in lmms-eval's models.

    Raises:
        RecipeError: a setting that relook does not follow.
    """
    given = dict(one.how or {})
    unknown = sorted(given.keys() - {*SAMPLING, *FIXED_SETTINGS, *UNUSED})
    if unknown:
        raise RecipeError(
            f"{one.task} asks for generation with {preview(unknown)}, which relook does not follow.",
            "Take it out there.",
        )
    samples = bool(given.get("temperature", 1 if given.get("do_sample") else 0)) and given.get("do_sample", True)
    names = (*FIXED_SETTINGS, *SAMPLING) if samples else FIXED_SETTINGS
    generate = {"do_sample": samples} | {name: given[name] for name in names if given.get(name)}
    until = given.get("until") or []
    until = [until] if isinstance(until, str) else list(until)
    return replace(
        how,
        max_new_tokens=given.get("max_new_tokens", how.max_new_tokens),
        batch_size=max(1, how.batch_size // generate.get("num_beams", 1)),  # a beam takes as much memory as a prompt
        generate=tuple(generate.items()),
        seed=one.repeat,
    ), ([] if until == FILLER else until)


def _cut(text: str, until: Sequence[str]) -> str:
    """The answer up to the first of these strings."""
    return text[: min((text.index(stop) for stop in until if stop and stop in text), default=len(text))]


def _generation_request(request: Instance, documents: Any, repeat: int) -> LmmsRequest:
    text, how, visuals, document, task, split = request.args
    key = f"{document}-{text_hash(text, json.dumps(how, sort_keys=True), str(repeat))}"
    return LmmsRequest(task, document, key, text, lambda: visuals(documents[task][split][document]), how, repeat=repeat)


def _likelihood_request(request: Instance, documents: Any, repeat: int) -> LmmsRequest:
    if len(request.args) == 2:
        raise RecipeError(f"{request.task_name} weighs answers without their question.", "Leave out acc_mutual_info.")
    text, target, visuals, document, task, split = request.args
    said = target if isinstance(target, str) else str(target(documents[task][split][document]))
    key = f"{document}-{text_hash(text, said)}"
    return LmmsRequest(task, document, key, text, lambda: visuals(documents[task][split][document]), weighed=said)


def _windows(wanted: Sequence[LmmsRequest]) -> Iterator[tuple[list[LmmsRequest], list[tuple[MemoryImage, ...]]]]:
    """Requests in order with their pictures, as many at a time as WINDOW bytes hold; equal pictures are held once."""
    window: list[LmmsRequest] = []
    pictures: list[tuple[MemoryImage, ...]] = []
    known: dict[MemoryImage, MemoryImage] = {}
    size = 0
    for one, shown in zip(wanted, prefetch_map(_load_visuals, wanted), strict=True):
        window.append(one)
        size += sum(3 * held.image.width * held.image.height for held in shown if held not in known)
        pictures.append(tuple(known.setdefault(held, held) for held in shown))
        if size > WINDOW:
            yield window, pictures
            window, pictures, known, size = [], [], {}, 0
    if window:
        yield window, pictures


def _load_visuals(one: LmmsRequest) -> tuple[MemoryImage, ...]:
    who = f"Document {one.document} of {one.task}"
    try:
        visuals = one.visuals() or []
        pictures = [MemoryImage.of(visual) if isinstance(visual, Image.Image) else visual for visual in visuals]
    except Exception as error:  # a task's own code, and Pillow's readers, raise errors of many kinds
        raise DataError(f"{who}: its picture cannot be read: {error}", "Download the task's data again.") from error
    strange = [type(picture).__name__ for picture in pictures if not isinstance(picture, MemoryImage)]
    if strange:
        raise DataError(f"{who} shows a {strange[0]}.", "relook answers about pictures.")
    return tuple(pictures)
