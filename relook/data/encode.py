"""Encoding of conversations, preference pairs and open prompts as token ids for one model's tokenizer."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from relook.data.images import ImageSource
from relook.data.packing import TokenRow, Tree
from relook.data.samples import Conversation, PreferencePair, Turn
from relook.data.special_tokens import LiteralText
from relook.data.templates import (
    CHAT,
    EOS,
    IM_END,
    IM_PATCH,
    IM_START,
    IMAGE,
    Template,
    TemplatePiece,
    image_first,
    with_image,
)
from relook.errors import DataError, RecipeError

# How a prompt shows an image: a number of placeholders, or numbers with the texts before, between and behind them.
Placeholders = int | tuple[int | str, ...]
Encoded = TypeVar("Encoded")
Sample = TypeVar("Sample")


@dataclass(frozen=True)
class Example:
    """Tree ready for packing, the images of its prefix, and the id of the sample it was made from.

    `desirable` is the label of a rated answer (`PreferencePair`).
    """

    id: str
    tree: Tree
    images: tuple[Path, ...]
    desirable: bool | None = None


@dataclass(frozen=True)
class Encoder:
    """Encoder of samples as token ids and a mask of supervised tokens; for template v1 equal to LLaVA v1.2.2's trainer.

    The equality holds under transformers 4.37. Under 4.31, which HA-DPO pins, a tokenizer without `legacy` splits the
    "USER" after an end-of-text token differently; single turns are the same. The other templates follow the same rule:
    answers and their end marks are supervised.

    A special token in the text of a training sample stays that token, as in the original. In a prompt to be answered
    it is read as plain text, since prompts come from strangers.

    A response with a context is tokenised as one text, so its ids are those of the whole answer. A token that lies
    across the end of the context is supervised.

    Args:
        tokenizer: a fast transformers tokenizer.
        template: text around prompts and answers.
        image_token_id: the placeholder's id.
        image_positions: how a prompt shows an image, or a function of the image for models where images differ.
        max_length: longest row in tokens, images included. Longer samples are refused; nothing is ever truncated.
        image_start_end: put <im_start> and <im_end> around each image (`mm_use_im_start_end` of old checkpoints).
        embeddings: number of ids that the model embeds. On a GPU a larger id triggers a device-side assert, which
            kills the process; here it is an error that names the sample. Without `embeddings`, ids are not checked.

    Raises:
        RecipeError: the template ends answers with </s>, which is not this tokenizer's end-of-text token.
    """

    tokenizer: Any
    template: Template
    image_token_id: int
    image_positions: Placeholders | Callable[[ImageSource], Placeholders]
    max_length: int = 2048
    image_start_end: bool = False
    embeddings: int | None = None

    def __post_init__(self) -> None:
        if EOS in self.template.end and self.tokenizer.eos_token != EOS:
            raise RecipeError(
                f"Template {self.template.name} ends an answer with {EOS}, but this model's tokenizer ends it with "
                f"{self.tokenizer.eos_token}.",
                "Choose another template.",
            )

    def positions(self, images: int | Sequence[ImageSource]) -> list[Placeholders]:
        """Return the placeholders of each image; an image count is enough if all images have the same ones."""
        if not callable(self.image_positions):
            return [self.image_positions] * (images if isinstance(images, int) else len(images))
        if isinstance(images, int):
            if images:
                raise TypeError("the positions of an image depend on its size: give the images, not their number")
            return []
        return [self.image_positions(image) for image in images]

    def row(self, pieces: Sequence[TemplatePiece], images: Sequence[Placeholders], id: str = "prompt") -> TokenRow:
        """Tokenise rendered pieces, with BOS first and the supervised tokens marked.

        `images` holds the placeholders of each image (see `positions`).

        Raises:
            DataError: the row is longer than `max_length`, the text is not valid Unicode, a token straddles the edge of
                an answer, or the model has no embedding for a token.
        """
        ids: list[int] = []
        # Llama's tokenizers put BOS first; others have none, or say in their config that it is not added.
        bos = self.tokenizer.bos_token_id if self.template.bos else None
        if bos is not None and self.tokenizer.init_kwargs.get("add_bos_token", True):
            ids = [bos]
        supervised = [False] * len(ids)
        chunks, counts, pieces = _split_at_images(pieces, images)
        # Two flags per character: whether it is supervised, and whether it belongs to an answer.
        flags = [piece.supervised for piece in pieces for _ in piece.text]
        answer = [piece.supervised or piece.context for piece in pieces for _ in piece.text]
        offset = 0  # of the chunk in the text, in characters
        for i, chunk in enumerate(chunks):
            if i:  # the placeholders before this chunk, none of which is a target
                ids += [self.image_token_id] * counts[i - 1]
                supervised += [False] * counts[i - 1]
            # Text between two images is tokenised in one go, special tokens included, so that an answer right after
            # "ASSISTANT:" gets the tokens that it has in running text.
            if chunk:
                chunk_ids, offsets = self._tokenise(chunk, id)
                # First and last character of each token. A token of no characters (a byte of an emoji) gets one.
                spans = [(offset + start, offset + max(end - 1, start)) for start, end in offsets]
                if any(answer[first] != answer[last] for first, last in spans):
                    raise DataError(
                        f"Sample {id}: a token lies half in an answer and half outside.",
                        f"Template {self.template.name} does not suit this model's tokenizer, or this text.",
                    )
                # A token is supervised if its last character is: the first ones may be a context's.
                ids += chunk_ids
                supervised += [flags[last] for _, last in spans]
            offset += len(chunk)
        if len(ids) > self.max_length:
            raise DataError(
                f"Sample {id} has {len(ids)} positions, more than model_max_length {self.max_length}.",
                "Raise model_max_length or shorten the sample.",
            )
        if ids.count(self.image_token_id) != sum(counts):
            raise DataError(f"Sample {id} has the image placeholder of the model in its text.", "Remove it.")
        self._check_embedded(ids, id)
        return TokenRow(tuple(ids), tuple(supervised))

    def _check_embedded(self, ids: Sequence[int], id: str) -> None:
        # The tokenizer may have more ids than the embedding has rows, e.g. after tokens were added to it alone.
        largest = max(ids, default=0)
        if self.embeddings is not None and largest >= self.embeddings:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise DataError(
                f"Sample {id} has the token {token!r} of id {largest}, but the model embeds {self.embeddings} ids.",
                "Its tokenizer is not this model's, or has tokens that were added without resizing the model.",
            )

    @cached_property
    def _literal(self) -> LiteralText:
        return LiteralText(self.tokenizer, (IM_START, IM_END, IM_PATCH, EOS, self.template.stop), (IMAGE,))

    def _tokenise(self, text: str, id: str) -> tuple[list[int], list[tuple[int, int]]]:
        try:
            if self._literal.escaped(text):
                return self._literal.encode(text)
            encoding = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
            return encoding.ids, encoding.offsets
        except (TypeError, UnicodeError):  # a lone surrogate, which JSON can carry
            raise DataError(f"The text of sample {id} is not valid Unicode.", "Mend or remove it.") from None

    def prompt(
        self, text: str, images: int | Sequence[ImageSource] = 1, history: Sequence[Turn] = (), context: str = ""
    ) -> tuple[int, ...]:
        """Encode an open prompt for generation: `text` is the user's turn, and the model writes the answer.

        A special token such as `</s>` in a turn is read as text, so no question can end its own turn.

        Args:
            images: the images of the whole conversation, or their number (see `positions`). If no turn has a
                placeholder, they are put before the first turn's text.
            history: the earlier turns.
            context: beginning of the answer, which the model continues.
        """
        pieces, positions = self._open_prompt(text, images, history)
        if context:
            pieces.append(TemplatePiece(f"{self.template.lead}{self._literal.escape(context)}", context=True))
        return self.row(pieces, positions).ids

    def answered(self, text: str, response: str, images: int | Sequence[ImageSource] = 1) -> TokenRow:
        """Encode the prompt as `prompt` does, with `response` and its end mark as the supervised tokens."""
        pieces, positions = self._open_prompt(text, images)
        template, response = self.template, self._literal.escape(response)
        return self.row([*pieces, TemplatePiece(f"{template.lead}{response}{template.end}", True)], positions, "answer")

    def _open_prompt(
        self, text: str, images: int | Sequence[ImageSource], history: Sequence[Turn] = ()
    ) -> tuple[list[TemplatePiece], list[Placeholders]]:
        turns, positions = [*history, Turn(text, "")], self.positions(images)
        if positions and not any(IMAGE in turn.prompt for turn in turns):
            turns[0] = replace(turns[0], prompt=with_image(turns[0].prompt, len(positions)))
        self._check_images(turns, len(positions), "The prompt")
        # From here on a special token in the words of a person or of the model is text.
        escape = self._literal.escape
        turns = [Turn(escape(turn.prompt), escape(turn.response)) for turn in turns]
        return self.template.render(self._marked(turns), open_end=True), positions

    def pair(self, pair: PreferencePair) -> Example:
        """Encode a preference pair as a tree with two branches: chosen, then rejected.

        Raises:
            DataError: see `conversation`; or chosen and rejected have the same tokens.
        """
        prompt, sides = with_image(pair.prompt, len(pair.images)), (pair.chosen, pair.rejected)
        turns = [Turn(prompt, response, pair.context, pair.complete) for response in sides]
        rows = [self.learned([turn], pair.images, pair.id) for turn in turns]
        if rows[0] == rows[1] and pair.desirable is None:
            raise DataError(f"Pair {pair.id}: chosen and rejected have the same tokens.", "Remove the pair.")
        return Example(pair.id, Tree.of(rows), pair.images, pair.desirable)

    def pairs(self, pairs: Sequence[PreferencePair], faults: list[str] | None = None) -> list[Example]:
        """Encode preference pairs as trees; `faults` is as in `conversations`."""
        examples = (_or_fault(self.pair, pair, faults) for pair in pairs)
        return [example for example in examples if example is not None]

    def conversation(self, sample: Conversation) -> Example:
        """Encode a supervised conversation as a tree with a single branch.

        Raises:
            DataError: an image lacks a placeholder or the reverse, a prompt or answer is empty, a text contains the
                template's own marks (LLaVA silently trains on nothing of such a sample), or the sample is too long.
                The message names the sample.
        """
        return Example(sample.id, Tree.of([self._conversation_row(sample)]), sample.images)

    def conversations(
        self, samples: Sequence[Conversation], branches: int, faults: list[str] | None = None
    ) -> list[Example]:
        """Encode conversations on the same images as branches of one tree, at most `branches`: images are read once.

        Args:
            faults: list that receives the errors of unusable samples, which are then left out; without it, the first
                one raises.
        """
        # By images and by tokens up to the last image's end, the prefix that they share; in chunks of `branches`.
        groups: dict[tuple[tuple[Path, ...], tuple[int, ...]], list[list[tuple[str, TokenRow]]]] = {}
        singles: list[tuple[tuple[Path, ...], list[tuple[str, TokenRow]]]] = []
        for sample in samples:
            row = _or_fault(self._conversation_row, sample, faults)
            if row is None:
                continue
            start = self._start(row) if sample.images else ()
            # Without an image, or with an answer before the last one, the conversation gets its own tree.
            if not start:
                singles.append((sample.images, [(sample.id, row)]))
                continue
            chunks = groups.setdefault((sample.images, start), [[]])
            if len(chunks[-1]) == branches:
                chunks.append([])
            chunks[-1].append((sample.id, row))
        grouped = [(images, chunk) for (images, _), chunks in groups.items() for chunk in chunks] + singles
        return [Example(chunk[0][0], Tree.of([row for _, row in chunk]), images) for images, chunk in grouped]

    def _start(self, row: TokenRow) -> tuple[int, ...]:
        """Return a row's tokens up to the end of its last image, or () if an answer precedes that."""
        end = len(row.ids) - row.ids[::-1].index(self.image_token_id)
        return () if True in row.supervised[:end] else row.ids[:end]

    def _conversation_row(self, sample: Conversation) -> TokenRow:
        return self.learned(sample.turns, sample.images, sample.id)

    def learned(self, turns: Sequence[Turn], images: Sequence[ImageSource], id: str) -> TokenRow:
        """Encode a training sample as a row. Raises DataError as `conversation` does."""
        self._check_images(turns, len(images), f"Sample {id}")
        turns = [replace(turn, prompt=image_first(turn.prompt)) for turn in turns]
        self._check_learnable(turns, id)
        return self.row(self.template.render(self._marked(turns)), self.positions(images), id)

    def _marked(self, turns: Sequence[Turn]) -> list[Turn]:
        if self.template.name == CHAT:  # the line break that LLaVA's data has beside an image is not written then
            image = re.compile(rf"\n?{IMAGE}\n?")
            return [replace(turn, prompt=image.sub(lambda _: self.template.image, turn.prompt)) for turn in turns]
        marked = f"{IM_START}{IMAGE}{IM_END}" if self.image_start_end else IMAGE
        return [replace(turn, prompt=turn.prompt.replace(IMAGE, marked)) for turn in turns]

    @staticmethod
    def _check_images(turns: Sequence[Turn], images: int, subject: str) -> None:
        placeholders = sum(turn.prompt.count(IMAGE) for turn in turns)
        if placeholders != images:
            problem = f"{subject} has {placeholders} {IMAGE}, but {images} images are given."
            raise DataError(problem, "Write one for each image.")
        if any(IMAGE in turn.response for turn in turns):
            raise DataError(f"{subject} has {IMAGE} in an answer.", "Put it into the prompt.")

    def _check_learnable(self, turns: Sequence[Turn], id: str) -> None:
        template = self.template
        if not turns:
            raise DataError(f"Sample {id} has no turns.", "Remove it.")
        if template.captions and (len(turns) > 1 or IMAGE not in turns[0].prompt):
            raise DataError(
                f"Sample {id} is not one image with one caption, as template {template.name} needs.",
                "Choose another template.",
            )
        # Generation stops at an end mark, and the cue tells where an answer begins: neither may occur in the texts,
        # nor arise where prompt, cue and answer meet.
        cue = template.cue + template.lead
        ends = [end for end in (template.end.strip(), self.tokenizer.eos_token) if end]
        for turn in turns:
            if not turn.prompt or not turn.response:
                raise DataError(f"Sample {id} has an empty prompt or answer.", "Fill it in or remove the sample.")
            mark = next((end for end in ends if end in turn.prompt or end in turn.response), "")
            prompt = template.later + turn.prompt
            exchange = prompt + cue + turn.response
            if cue.strip() and (exchange.count(cue) != 1 or exchange.index(cue) != len(prompt)):
                mark = cue
            if mark:
                raise DataError(
                    f"Sample {id} has {mark.strip()!r} in its text, a mark of template {template.name}.",
                    "Remove it from the text or choose another template.",
                )


def placeholder_count(image: Placeholders, of_byte: int = 0) -> int:
    """Return the number of an image's placeholders, with `of_byte` positions for each byte of the texts around them."""
    parts = image if isinstance(image, tuple) else (image,)
    return sum(part if isinstance(part, int) else of_byte * len(part.encode()) for part in parts)


def _split_at_images(
    pieces: Sequence[TemplatePiece], images: Sequence[Placeholders]
) -> tuple[list[str], list[int], list[TemplatePiece]]:
    """Write each image's placeholders into a rendered conversation.

    Returns:
        The text between runs of placeholders, the length of each run, and the pieces of this text.
    """
    chunks, counts, written = [""], list[int](), list[TemplatePiece]()
    shown = iter(images)
    for piece in pieces:
        for i, text in enumerate(piece.text.split(IMAGE)):
            image = next(shown) if i else ()
            for part in (*(image if isinstance(image, tuple) else (image,)), text):
                if isinstance(part, int):
                    counts.append(part)
                    chunks.append("")
                else:
                    chunks[-1] += part
                    written.append(replace(piece, text=part))
    return chunks, counts, written


def _or_fault(make: Callable[[Sample], Encoded], sample: Sample, faults: list[str] | None) -> Encoded | None:
    try:
        return make(sample)
    except DataError as error:
        if faults is None:
            raise
        faults.append(str(error))
        return None


def differing_tokens(tree: Tree) -> list[bool]:
    """Mark the targets of a pair's tree, in order, whose token differs from the other response.

    A token differs if it lies outside the matching blocks of the two responses (longest common subsequences of runs).
    """
    # Supervised tokens alone: both responses, each with its end mark.
    chosen, rejected = (
        [id for id, supervised in zip(branch.ids, branch.supervised, strict=True) if supervised]
        for branch in tree.branches
    )
    same_chosen: set[int] = set()
    same_rejected: set[int] = set()
    for a, b, size in difflib.SequenceMatcher(None, chosen, rejected, autojunk=False).get_matching_blocks():
        same_chosen.update(range(a, a + size))
        same_rejected.update(range(b, b + size))
    return [i not in same_chosen for i in range(len(chosen))] + [i not in same_rejected for i in range(len(rejected))]
