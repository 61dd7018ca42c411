"""Answering lists of questions, as evaluation, mining and sweeps do.

Equal questions are asked once, and those over the same images share what their prompts begin with. Where the settings
of generation allow it (`Sampler.of`), all texts grow side by side in one `Scheduler`, which admits the next as soon as
there is room; otherwise transformers' `generate` answers batch by batch.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from relook.console import ProgressReport
from relook.data.encode import Encoder, placeholder_count
from relook.data.images import RecentCache, Shown, prefetch_map
from relook.data.samples import Turn
from relook.data.sentences import end_of_first_sentence
from relook.errors import CheckpointError, RecipeError
from relook.generate.attention import without_cudnn_attention
from relook.generate.kv_extents import shared_length
from relook.generate.model_runner import ModelRunner
from relook.generate.passes import BUCKETS
from relook.generate.request import IncrementalText
from relook.generate.sampling import Sampler, TokenLogprobs
from relook.generate.scheduler import PREFILL_POSITIONS, Scheduler, feature_bytes
from relook.generate.text import ImageFeatures, Text
from relook.model.checkpoint import AnyFolder, ModelFolder
from relook.model.load import LoadedModel
from relook.model.tokenizer import token_bytes

FEATURE_BYTES = 1 << 30  # image features that are cached
WAVE_REST = 4  # a share of 1 / 4 of a wave's texts may still grow when the next one comes
ONLY_OWN_ENGINE = "Only relook's own engine goes on with answers that have begun.", "Leave --engine out."
EXTRA_TOKENS = 16  # beside those of a prompt's text: its beginning, and marks around an image

Question = tuple[Shown | tuple[Shown, ...], str]  # one image, or any number of them, and a text


class Beginning(NamedTuple):
    """A question whose answer has begun.

    Args:
        context: the answer so far, which is read with the prompt; empty at its beginning.
    """

    image: Shown
    text: str
    context: str


class Continuation(NamedTuple):
    """What a model writes after a context, with the white space between.

    Args:
        tokens: tokens that were generated for it.
        complete: True if the model ended its answer there.
    """

    text: str
    tokens: int
    complete: bool


@dataclass(frozen=True)
class GenerationSettings:
    """How questions are put and answered.

    Args:
        template: conversation template; empty for the model's own.
        batch_size: bounds memory: that many of the longest prompts with their answers fit into the pool of keys and
            values, so of prompts that share images more do. Answers do not depend on it (fp32).
        generate: keyword arguments of transformers' `generate`, e.g. do_sample, temperature, num_beams.
        seed: of sampling. A question's draws depend on it and on the question's index among the distinct ones; with
            settings that only `generate` itself follows, on the batches too.
        first: index of the first distinct question, where these are a part of a longer list that is asked in parts.
        one_sentence: end an answer with its first sentence.
    """

    template: str = ""
    max_new_tokens: int = 64
    batch_size: int = 64
    generate: tuple[tuple[str, Any], ...] = ()
    seed: int = 0
    first: int = 0
    one_sentence: bool = False

    @property
    def generate_arguments(self) -> dict[str, Any]:
        """Return the arguments of `generate`: greedy unless set otherwise, whatever the model's own settings are."""
        return {"do_sample": False, **dict(self.generate)}

    def __post_init__(self) -> None:
        """Raise a RecipeError where a batch holds no prompt, or an answer no token."""
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} is {getattr(self, name)}.", "Give 1 or more.")


@dataclass(frozen=True)
class Prompt:
    """A distinct question as the model reads it; `context` is the last token of the answer so far, if there is one."""

    number: int
    images: tuple[Shown, ...]
    ids: tuple[int, ...]
    context: tuple[int, ...] = ()


class AnsweringEngine(Protocol):
    """Another engine than relook's own, such as vLLM or a server."""

    def answer(
        self, questions: Sequence[DistinctQuestion], settings: GenerationSettings
    ) -> Iterator[tuple[DistinctQuestion, str]]:
        """Yield the answers to distinct questions as they end."""
        ...


Answerer = LoadedModel | AnsweringEngine


class AnswerSource(Protocol):
    """Where a command takes its answers from: `LoadOptions` load a model, others name another engine."""

    def open(self, model: AnyFolder) -> ModelFolder:
        """Check the settings, and parse the model's folder."""
        ...

    def template_of(self, model: AnyFolder) -> str:
        """Return the conversation template of prompts that name none."""
        ...

    def identity(self, model: AnyFolder) -> dict[str, Any]:
        """Return everything that answers depend on."""
        ...

    def load(self, model: AnyFolder) -> Answerer:
        """Load the model, or reach for the engine that has it."""
        ...


def answer_questions(
    answerer: Answerer, questions: Sequence[Question], settings: GenerationSettings, report: ProgressReport
) -> Iterator[tuple[int, str]]:
    """Yield (index of the question, answer text) as answers end; equal questions are asked once.

    Long prompts are asked first, so the order of yields is not that of the questions. Tokenising and reading images run
    ahead on threads.

    Raises:
        CheckpointError: the model's logits are NaN or infinite.
    """
    indices: dict[tuple[tuple[Shown, ...], str], list[int]] = {}  # of the questions that are equal to each distinct one
    for index, (images, text) in enumerate(questions):
        indices.setdefault((images if isinstance(images, tuple) else (images,), text), []).append(index)
    distinct = [DistinctQuestion(n, images, text) for n, (images, text) in enumerate(indices, settings.first)]
    by_number = list(indices.values())
    answers: Iterator[tuple[DistinctQuestion | Prompt, str]] = (
        ((prompt, answer.text) for prompt, answer in _answer_distinct(answerer, distinct, settings))
        if isinstance(answerer, LoadedModel)
        else answerer.answer(distinct, settings)
    )
    for done, (question, text) in enumerate(answers, 1):
        for index in by_number[question.number - settings.first]:
            yield index, text
        report(done, len(distinct))


def continue_answers(
    answerer: Answerer, beginnings: Sequence[Beginning], settings: GenerationSettings, report: ProgressReport
) -> Iterator[tuple[int, Continuation]]:
    """Yield (index of the beginning, its continuation) as they end, in any order; see `answer_questions`.

    Equal beginnings have draws of their own. All over one image share what they have in common, as a prefix that is
    read once.

    Raises:
        RecipeError: another engine answers than relook's own.
    """
    if not isinstance(answerer, LoadedModel):
        raise RecipeError(*ONLY_OWN_ENGINE)
    questions = [
        DistinctQuestion(number, (beginning.image,), beginning.text, beginning.context)
        for number, beginning in enumerate(beginnings, settings.first)
    ]
    for done, (prompt, continuation) in enumerate(_answer_distinct(answerer, questions, settings), 1):
        yield prompt.number - settings.first, continuation
        report(done, len(questions))


def _answer_distinct(
    loaded: LoadedModel, questions: Sequence[DistinctQuestion], settings: GenerationSettings
) -> Iterator[tuple[Prompt, Continuation]]:
    """Answer by the engine, or by `generate` where only that follows the settings; yield answers as they end."""
    if not questions:
        return
    encoder = loaded.encoder(settings.template)
    bounds = {question: max_length(encoder, question) + settings.max_new_tokens for question in questions}
    longest = max(questions, key=lambda question: bounds[question])
    sampler = Sampler.of(loaded, settings.template, settings.generate_arguments, bounds[longest], settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if sampler is None:
            yield from _answer_by_generate(loaded, encoder, questions, settings)
            return
        length = len(longest.encode(encoder).ids) + settings.max_new_tokens
        cells = max(bounds[longest], settings.batch_size * length)
        if loaded.core.device.type == "cpu":
            cells = min(cells, sum(bounds.values()))  # a GPU keeps its pool for the next questions, however many
        groups = group_by_images(questions, bounds)
        yield from _answer_by_engine(loaded, encoder, groups, settings, sampler, cells, bounds[longest])


@dataclass(frozen=True)
class DistinctQuestion:
    """A text asked about images; `number` is its index among the distinct questions, `context` its answer so far."""

    number: int
    images: tuple[Shown, ...]
    text: str
    context: str = ""

    def encode(self, encoder: Encoder) -> Prompt:
        """Tokenise the question."""
        ids = encoder.prompt(self.text, self.images, context=self.context)
        return Prompt(self.number, self.images, ids, ids[-1:] if self.context else ())


def max_length(encoder: Encoder, question: DistinctQuestion) -> int:
    """Return an upper bound of a prompt's positions, without the cost of tokenising: a token has a byte at least."""
    template = encoder.template.render([Turn("", "")], open_end=True)
    text = "".join([*(piece.text for piece in template), question.text, question.context])
    images = sum(placeholder_count(image, of_byte=1) for image in encoder.positions(question.images))
    return images + len(text.encode(errors="surrogatepass")) + EXTRA_TOKENS * max(1, len(question.images))


def group_by_images(
    questions: Sequence[DistinctQuestion], bounds: Mapping[DistinctQuestion, int]
) -> list[list[DistinctQuestion]]:
    """Return groups of questions over the same images, long ones first."""
    groups: dict[tuple[Shown, ...], list[DistinctQuestion]] = {}
    for question in questions:
        groups.setdefault(question.images, []).append(question)
    return sorted(groups.values(), key=lambda group: -max(bounds[question] for question in group))


# ----------------------------------------------------------------------------------------------------
# By the engine


def _answer_by_engine(
    loaded: LoadedModel,
    encoder: Encoder,
    groups: Sequence[Sequence[DistinctQuestion]],
    settings: GenerationSettings,
    sampler: Sampler,
    cells: int,
    minimum: int,
) -> Iterator[tuple[Prompt, Continuation]]:
    """Yield answers as they end.

    Args:
        cells: positions that are in memory at most.
        minimum: positions of the longest text.
    """
    runner = ModelRunner.of(loaded, cells, minimum, (sampler.never, sampler.not_first))
    features: RecentCache[ImageFeatures] = RecentCache(FEATURE_BYTES, feature_bytes)
    # Whole prompts are read at once, since nobody waits for a step.
    scheduler = Scheduler(runner, BUCKETS[-1], features, chunk=PREFILL_POSITIONS, keeps_answers=False)
    finished: deque[tuple[Prompt, Continuation]] = deque()
    bytes_of = lru_cache(None)(partial(token_bytes, loaded.processor.tokenizer))

    def prepare(questions: Sequence[DistinctQuestion]) -> list[Text]:
        """Tokenise a group and read its images, on another thread: the scheduler's has no time for that."""
        inputs = {image: runner.staged(loaded.images.inputs(image)) for image in questions[0].images}
        prompts = [question.encode(encoder) for question in questions]
        # What all prompts of the group have in common: its image, usually, and the words before it.
        common = min(shared_length(prompts[0].ids, prompt.ids, len(prompt.ids) - 1) for prompt in prompts)
        texts = []
        for prompt in prompts:
            text = IncrementalText(bytes_of, sampler.stops)
            answer = _GrowingAnswer(prompt, loaded, settings, sampler, text, finished)
            draws = sampler.draws(prompt.number, settings.max_new_tokens)
            how = sampler.temperature, sampler.top_k, sampler.top_p, draws
            texts.append(Text(prompt.ids, prompt.images, settings.max_new_tokens, answer.add, *how))
            texts[-1].image_inputs, texts[-1].max_shared = inputs, common
        return texts

    def step() -> Iterator[tuple[Prompt, Continuation]]:
        scheduler.step()
        require_finite(not scheduler.counts.not_finite)
        while finished:
            yield finished.popleft()

    queued = 0  # positions that the texts of the next wave need
    for texts in prefetch_map(prepare, groups):
        queued += submit(scheduler, texts)
        if runner.has_kernel:
            # Some texts always wait, so that a pass is full; no more do, so that few images are in memory.
            while len(scheduler.waiting) >= settings.batch_size:
                yield from step()
        elif queued >= cells:
            # Without kernels each coming and going copies what all texts read: they come in waves.
            wave = scheduler.live
            while scheduler.live > wave // WAVE_REST:
                yield from step()
            queued = 0
    while scheduler.busy:
        yield from step()


def submit(scheduler: Scheduler, texts: Sequence[Text]) -> int:
    """Queue the texts of a group. Return the positions that they need."""
    scheduler.waiting.extend(texts)
    common = texts[0].max_shared or 0
    return common + sum(len(text.ids) - common + text.max_new_tokens for text in texts)


@dataclass
class _GrowingAnswer:
    """A prompt's answer while it grows; it goes to `finished` with its last token."""

    prompt: Prompt
    loaded: LoadedModel
    settings: GenerationSettings
    sampler: Sampler
    text: IncrementalText
    finished: deque[tuple[Prompt, Continuation]]
    ids: list[int] = field(default_factory=list)

    def add(self, token: int, _: TokenLogprobs | None) -> bool:
        """Take the next token. Return True if the answer ends with it."""
        self.ids.append(token)
        if self.sampler.stops or self.settings.one_sentence:
            self.text.add(token)
        complete = token in self.sampler.eos or self.text.stopped
        # White space after an end mark: the sentence ended with the token before.
        ends = complete or (self.settings.one_sentence and end_of_first_sentence(self.text.raw) is not None)
        if ends or len(self.ids) == self.settings.max_new_tokens:
            self.finished.append(
                (self.prompt, continuation(self.loaded, self.prompt, self.ids, complete, self.settings))
            )
        return ends


def continuation(
    loaded: LoadedModel, prompt: Prompt, ids: Sequence[int], complete: bool, settings: GenerationSettings
) -> Continuation:
    """Decode an answer's tokens; what follows a context keeps its white space."""
    # A tokenizer drops white space at the beginning of a text: the token before is decoded, too.
    before = loaded.decode(prompt.context, settings.template) if prompt.context else ""
    text = loaded.decode([*prompt.context, *ids], settings.template)[len(before) :]
    end = end_of_first_sentence(text) if settings.one_sentence else None
    return Continuation(text[:end], len(ids), complete and end is None)


# ----------------------------------------------------------------------------------------------------
# By transformers' `generate`


def require_finite(finite: Tensor | bool) -> None:
    """Refuse answers of a model whose logits are no numbers.

    Raises:
        CheckpointError: `finite` is false.
    """
    if not finite:
        raise CheckpointError(
            "The model's logits are NaN or infinite, though all of its weights are numbers.",
            "float16 overflows where bfloat16 and float32 do not: choose another --dtype.",
        )


def _answer_by_generate(
    loaded: LoadedModel, encoder: Encoder, questions: Sequence[DistinctQuestion], settings: GenerationSettings
) -> Iterator[tuple[Prompt, Continuation]]:
    """Yield the answers of batches of prompts of similar length."""
    # Longest first: rows of similar length waste little padding, and a lack of memory shows at once.
    prompts = sorted((question.encode(encoder) for question in questions), key=lambda prompt: -len(prompt.ids))
    size = settings.batch_size
    batches = [prompts[i : i + size] for i in range(0, len(prompts), size)]

    def load_images(batch: list[Prompt]) -> list[Prompt]:
        for image in itertools.chain.from_iterable(prompt.images for prompt in batch):
            loaded.images(image)
        return batch

    eos = loaded.core.generation_config.eos_token_id
    ends = {eos} if isinstance(eos, int) else set(eos or ())
    for batch in prefetch_map(load_images, batches):
        for prompt, ids in zip(batch, generate_ids(loaded, batch, settings), strict=True):
            # A row that ends before the others is padded.
            length = next((number for number, id in enumerate(ids, 1) if id in ends), len(ids))
            complete = length < settings.max_new_tokens or ids[length - 1] in ends
            yield prompt, continuation(loaded, prompt, ids[:length], complete, settings)


class _NaNCheck(LogitsProcessor):
    """Processor that leaves scores as they are and records whether all of them are numbers."""

    def __init__(self) -> None:
        self.finite: Tensor | bool = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.finite = ~scores.isnan().any() & self.finite
        return scores


@without_cudnn_attention
@torch.inference_mode()
def generate_ids(loaded: LoadedModel, batch: Sequence[Prompt], settings: GenerationSettings) -> list[list[int]]:
    """Return transformers' answers to left-padded prompts with their images, as tokens with padding behind.

    Raises:
        CheckpointError: the model's logits are NaN.
    """
    pad, core = loaded.pad_id, loaded.core
    longest = max(len(prompt.ids) for prompt in batch)
    ids = torch.tensor([[pad] * (longest - len(prompt.ids)) + list(prompt.ids) for prompt in batch])
    mask = torch.tensor([[0] * (longest - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in batch])
    images = [image for prompt in batch for image in prompt.images]
    inputs = loaded.images.batch(images) if images else {}
    check = _NaNCheck()
    output = loaded.model.generate(
        input_ids=ids.to(core.device),
        attention_mask=mask.to(core.device),
        **loaded.token_types(ids.to(core.device)),
        **{n: t.to(core.device, core.dtype if t.is_floating_point() else t.dtype) for n, t in inputs.items()},
        max_new_tokens=settings.max_new_tokens,
        pad_token_id=pad,
        logits_processor=LogitsProcessorList([check]),
        **loaded.stop_arguments(settings.template),
        **settings.generate_arguments,
    )
    require_finite(check.finite)
    answers: list[list[int]] = output[:, longest:].tolist()
    return answers
