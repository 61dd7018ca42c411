"""Model class for lmms-eval: its tasks send requests, relook answers them over trees and keeps the answers.

This module imports lmms-eval; `lmms.py` prints how to install it if it is missing.
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

WINDOW = 1 << 28  # bytes of decoded pictures in memory at a time: about 300 of COCO's
# What lmms-eval fills in as `until` if a task sets none; its own LLaVA follows no `until` at all.
FILLER = ["\n\n"]
SAMPLING = ("temperature", "top_p", "top_k")
FIXED_SETTINGS = ("num_beams", "repetition_penalty")
READ_ELSEWHERE = {"until", "max_new_tokens", "do_sample", "image_aspect_ratio"}  # the last from the model's config


@dataclass(frozen=True)
class LmmsRequest:
    """One request of a task.

    Args:
        key: id of its record: the document's number and a hash of the request.
        visuals: loads the document's pictures.
        settings: generation settings of the task; None for a request of a likelihood.
        target: answer whose likelihood is requested.
        repeat: number of equal requests before this one, if a task wants several samples.
    """

    task: str
    document: int
    key: str
    text: str
    visuals: Callable[[], Any]
    settings: Mapping[str, Any] | None = None
    target: str = ""
    repeat: int = 0


class RelookModel(lmms):
    """Answer the requests of lmms-eval's evaluator, and keep the answers in a file for each task.

    Args:
        load: loads the model; called only if there is something to ask.
        settings: template, batch size, and the longest answer for tasks that set none.
        out: folder of the answer files; requests with an answer there are not asked again.
    """

    is_simple = True

    def __init__(self, load: Callable[[], LoadedModel], settings: GenerationSettings, out: Path) -> None:
        super().__init__()
        self.device = distributed.collective_device()  # the evaluator gathers scores on it
        self._load, self._settings = cache(load), settings
        self._file = cache(lambda task: AnswerFile(out / f"{task}.jsonl", "id", distributed.rank()))
        self.asked: dict[str, dict[str, None]] = {}  # keys by task, as a set in order

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> RelookModel:
        """Build the model from lmms-eval's own command: `--model relook --model_args model=DIR,dtype=bfloat16,bits=8`.

        Further arguments: adapter, vision_tower, device, version, batch_size, max_new_tokens, out.
        """
        arguments = dict(pair.split("=", 1) for pair in arg_string.split(",") if pair)
        arguments |= {
            k: str(v) for k, v in (additional_config or {}).items() if v is not None and k != "max_batch_size"
        }
        names = ("model", "adapter", "vision_tower", "dtype", "bits", "device", "version", "batch_size", "out")
        unknown = arguments.keys() - {*names, "max_new_tokens"}
        if unknown or "model" not in arguments:
            raise RecipeError(
                f"relook's model_args need a model, and do not have {preview(sorted(unknown)) or 'one'}.",
                f"Known ones: {', '.join(names)}, max_new_tokens.",
            )
        path = lambda name: Path(arguments[name]) if name in arguments else None  # noqa: E731
        loading = LoadOptions(
            path("adapter"),
            path("vision_tower"),
            arguments.get("dtype", "float32"),
            coerce("bits", arguments.get("bits", 16), int),
            arguments.get("device", ""),
        )
        sizes = {"max_new_tokens": 512, "batch_size": 64}
        numbers = (coerce(name, arguments.get(name, default), int) for name, default in sizes.items())
        settings = GenerationSettings(arguments.get("version", ""), *numbers)
        out = path("out") or Path(tempfile.mkdtemp(prefix="relook-lmms-"))
        return cls(lambda: loading.load(Path(arguments["model"])), settings, out)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Generate answers, in the order of the requests."""
        return [record["answer"] for record in self._records(requests, _generation_request, self._answers)]

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Compute each target's loss, and whether it is the greedy answer.

        lmms-eval takes the smallest value for the best choice: its LLaVA returns the mean negative log-probability of a
        token, the end of the answer included, and so does this.
        """
        # The evaluator (0.7.3) would turn a bare pair into a string, hence GenerationResult.
        records = self._records(requests, _likelihood_request, self._likelihoods)
        return [GenerationResult((record["loss"], record["greedy"])) for record in records]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse: relook answers tasks of one round."""
        raise RecipeError(f"{requests[0].task_name} asks in several rounds.", "relook answers tasks of one round.")

    def _records(
        self,
        instances: Sequence[Instance],
        read: Callable[[Instance, Any, int], LmmsRequest],
        ask: Callable[
            [Sequence[LmmsRequest], Sequence[tuple[MemoryImage, ...]], ProgressReport],
            Iterator[tuple[int, dict[str, Any]]],
        ],
    ) -> list[dict[str, Any]]:
        """Return the records of all requests, after asking for those that no file has yet.

        Args:
            read: converts (instance, documents, number of equal requests before it).
            ask: answers a window of requests about its pictures, as (index, answer fields).
        """
        seen: Counter[int] = Counter()
        requests = []
        for instance in instances:
            # Padding evens out the number of requests per process: nobody reads its answer, so it is no new sample.
            padding = (instance.metadata or {}).get("__padding_only__")
            requests.append(read(instance, self.task_dict, 0 if padding else seen[id(instance)]))
            seen[id(instance)] += 1
        missing = {
            (request.task, request.key): request
            for request in requests
            if request.key not in self._file(request.task).records
        }
        if missing:
            self._ask(list(missing.values()), ask)
        for request in requests:
            self.asked.setdefault(request.task, {})[request.key] = None
        return [self._file(request.task).records[request.key] for request in requests]

    def _ask(self, requests: Sequence[LmmsRequest], ask: Callable[..., Iterator[tuple[int, dict[str, Any]]]]) -> None:
        files = [self._file(task) for task in dict.fromkeys(request.task for request in requests)]
        with progress(", ".join(file.path.stem for file in files)) as report:
            done = 0
            # Window by window: a task's pictures together may not fit into memory.
            for window, pictures in _windows(requests):
                # Bind the window as a default: a closure would see the loop's next one.
                def record(
                    index: int, answer: dict[str, Any], window: Sequence[LmmsRequest] = window
                ) -> tuple[AnswerFile, dict[str, Any]]:
                    request = window[index]
                    fields = {"id": request.key, "doc_id": request.document, "question": request.text}
                    return self._file(request.task), fields | answer

                def share(part: int, total: int, done: int = done, size: int = len(window)) -> None:
                    report(done + part * size // total, len(requests))

                append_answers(ask(window, pictures, share), record, files, self._settings.batch_size)
                done += len(window)

    def _answers(
        self, window: Sequence[LmmsRequest], pictures: Sequence[tuple[MemoryImage, ...]], report: ProgressReport
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        # A batch shares its settings and its seed, and a repeated request needs another seed.
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(window):
            groups.setdefault(json.dumps([request.settings, request.repeat]), []).append(index)
        for indices in groups.values():
            first = window[indices[0]]
            settings, until = parse_generation_settings(self._settings, first)
            questions = [(pictures[index], window[index].text) for index in indices]
            for number, text in answer_questions(self._load(), questions, settings, report):
                yield indices[number], {"answer": _cut(text, until)}

    def _likelihoods(
        self, window: Sequence[LmmsRequest], pictures: Sequence[tuple[MemoryImage, ...]], report: ProgressReport
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        answers = [(shown, request.text, request.target) for request, shown in zip(window, pictures, strict=True)]
        results: Iterator[tuple[int, Likelihood]] = likelihoods(
            self._load(), answers, self._settings.template, self._settings.batch_size, report
        )
        for index, likelihood in results:
            weights = {"loss": likelihood.loss, "greedy": likelihood.greedy}
            yield index, {"choice": window[index].target, **weights}

    def clean(self) -> None:
        """Keep the model after a task, since the next one asks it too."""

    def finish(self) -> None:
        """Merge each task's answers of all processes into one file, in the order of its documents.

        Answers to requests that the task no longer has are left out.
        """
        # Each process knows the keys of its own share alone.
        keys = distributed.all_gather_objects([(task, key) for task, keys in self.asked.items() for key in keys])
        if distributed.is_main():
            for task in dict.fromkeys(task for task, _ in keys):
                file = AnswerFile(self._file(task).path, "id")  # read again, with what other processes have added
                order = dict.fromkeys(key for other, key in keys if other == task)
                file.finish(sorted(order, key=lambda key: file.records[key]["doc_id"]))
        distributed.barrier("the answers")


def parse_generation_settings(
    settings: GenerationSettings, request: LmmsRequest
) -> tuple[GenerationSettings, list[str]]:
    """Convert a task's generation settings, and return the strings at which its answers end.

    `do_sample: false` is greedy, whatever the temperature; without `do_sample`, a temperature above 0 samples, as in
    lmms-eval's models.

    Raises:
        RecipeError: the task sets something that relook does not support.
    """
    requested = dict(request.settings or {})
    unknown = sorted(requested.keys() - {*SAMPLING, *FIXED_SETTINGS, *READ_ELSEWHERE})
    if unknown:
        raise RecipeError(
            f"{request.task} asks for generation with {preview(unknown)}, which relook does not follow.",
            "Take it out there.",
        )
    do_sample = requested.get("do_sample")
    temperature = requested.get("temperature", 1 if do_sample else 0)
    samples = bool(temperature) and requested.get("do_sample", True)
    names = (*FIXED_SETTINGS, *SAMPLING) if samples else FIXED_SETTINGS
    generate = {"do_sample": samples} | {name: requested[name] for name in names if requested.get(name)}
    beams = generate.get("num_beams", 1)  # each beam takes as much memory as a prompt
    until = requested.get("until") or []
    until = [until] if isinstance(until, str) else list(until)
    return replace(
        settings,
        max_new_tokens=requested.get("max_new_tokens", settings.max_new_tokens),
        batch_size=max(1, settings.batch_size // beams),
        generate=tuple(generate.items()),
        seed=request.repeat,
    ), ([] if until == FILLER else until)


def _cut(text: str, until: Sequence[str]) -> str:
    """Cut an answer off before the first of these strings."""
    return text[: min((text.index(stop) for stop in until if stop and stop in text), default=len(text))]


def _generation_request(request: Instance, documents: Any, repeat: int) -> LmmsRequest:
    text, settings, visuals, document, task, split = request.args
    # The hash covers all that the answer depends on: a changed prompt or setting is asked anew.
    key = f"{document}-{text_hash(text, json.dumps(settings, sort_keys=True), str(repeat))}"
    return LmmsRequest(
        task, document, key, text, lambda: visuals(documents[task][split][document]), settings, repeat=repeat
    )


def _likelihood_request(request: Instance, documents: Any, repeat: int) -> LmmsRequest:
    if len(request.args) == 2:
        raise RecipeError(f"{request.task_name} weighs answers without their question.", "Leave out acc_mutual_info.")
    text, target, visuals, document, task, split = request.args
    answer = target if isinstance(target, str) else str(target(documents[task][split][document]))
    key = f"{document}-{text_hash(text, answer)}"
    return LmmsRequest(task, document, key, text, lambda: visuals(documents[task][split][document]), target=answer)


def _windows(requests: Sequence[LmmsRequest]) -> Iterator[tuple[list[LmmsRequest], list[tuple[MemoryImage, ...]]]]:
    """Yield requests in order with their pictures, as many at a time as fit WINDOW bytes."""
    window: list[LmmsRequest] = []
    pictures: list[tuple[MemoryImage, ...]] = []
    distinct: dict[MemoryImage, MemoryImage] = {}
    size = 0
    for request, shown in zip(requests, prefetch_map(_load_visuals, requests), strict=True):
        window.append(request)
        # Several requests often show the same picture: keep one copy of equal ones, and count its bytes once.
        size += sum(3 * picture.image.width * picture.image.height for picture in shown if picture not in distinct)
        pictures.append(tuple(distinct.setdefault(picture, picture) for picture in shown))
        if size > WINDOW:
            yield window, pictures
            window, pictures, distinct, size = [], [], {}, 0
    if window:
        yield window, pictures


def _load_visuals(request: LmmsRequest) -> tuple[MemoryImage, ...]:
    source = f"Document {request.document} of {request.task}"
    try:
        visuals = request.visuals() or []
        pictures = [MemoryImage.of(visual) if isinstance(visual, Image.Image) else visual for visual in visuals]
    except Exception as error:  # a task's own code, and Pillow's readers, raise errors of many kinds
        raise DataError(f"{source}: its picture cannot be read: {error}", "Download the task's data again.") from error
    strange = [type(picture).__name__ for picture in pictures if not isinstance(picture, MemoryImage)]
    if strange:
        raise DataError(f"{source} shows a {strange[0]}.", "relook answers about pictures.")
    return tuple(pictures)
