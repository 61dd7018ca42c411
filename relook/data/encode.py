"""Samples to token ids: conversations, preference pairs and open prompts for one model's tokenizer."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from relook.data.images import Picture
from relook.data.packing import Row, Tree
from relook.data.samples import Conversation, PreferencePair, Turn
from relook.data.templates import EOS, IM_END, IM_START, IMAGE, Piece, Template, image_first, with_image
from relook.errors import DataError, RecipeError

Made = TypeVar("Made")
Sample = TypeVar("Sample")


@dataclass(frozen=True)
class Example:
    """A tree ready to be packed, the images of its prefix, and the name of what it was made from."""

    id: str
    tree: Tree
    images: tuple[Path, ...]


@dataclass(frozen=True)
class Encoder:
    """Turns samples into token ids and the mask of what is learned, for template v1 equal to LLaVA v1.2.2's trainer.

    That is under transformers 4.37. Under 4.31, which HA-DPO pins, a tokenizer without `legacy` splits the "USER" after
    an end of text otherwise; single turns are the same. For the other templates the rule is the same: answers and what
    ends them are learned.

    Args:
        tokenizer: a fast transformers tokenizer.
        template: what stands around prompts and answers.
        image_token_id: the placeholder's id, written `image_positions` times for each image.
        image_positions: a number, or a function of the image for models whose images differ.
        max_length: longest row in tokens, images included. Longer samples are refused; nothing is ever truncated.
        image_start_end: put <im_start> and <im_end> around each image (`mm_use_im_start_end` of old checkpoints).
        embeddings: how many ids the model embeds. On a GPU a larger one would be a device-side assert, after which the
            process is lost; here it is an error that names the sample. Without it, none is looked for.

    Raises:
        RecipeError: the template ends answers with </s>, and that does not end a text for this tokenizer.
    """

    tokenizer: Any
    template: Template
    image_token_id: int
    image_positions: int | Callable[[Picture], int]
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

    def positions(self, images: int | Sequence[Picture]) -> list[int]:
        """How many positions each of some images takes; a bare number of images is enough where all take the same."""
        if isinstance(self.image_positions, int):
            return [self.image_positions] * (images if isinstance(images, int) else len(images))
        if isinstance(images, int):
            if images:
                raise TypeError("the positions of an image depend on its size: give the images, not their number")
            return []
        return [self.image_positions(image) for image in images]

    def row(self, pieces: Sequence[Piece], images: Sequence[int], id: str = "prompt") -> Row:
        """Token ids of rendered pieces, with BOS first and the supervised tokens marked.

        `images` holds the number of positions of each image (see `positions`).

        Text between two images is tokenised in one go, as it stands, special tokens in it included: an answer right
        after "ASSISTANT:" gets the tokens that it has in running text. A token is supervised where its characters are.

        Raises:
            DataError: the row is longer than `max_length`, the text is not valid Unicode, a token lies half in an
                answer, or the model has no embedding for one.
        """
        ids: list[int] = []
        if self.tokenizer.bos_token_id is not None and self.tokenizer.init_kwargs.get("add_bos_token", True):
            ids = [self.tokenizer.bos_token_id]
        supervised = [False] * len(ids)
        text = "".join(piece.text for piece in pieces)
        flags = [piece.supervised for piece in pieces for _ in piece.text]  # one a character
        at = 0
        for i, chunk in enumerate(text.split(IMAGE)):
            if i:
                ids += [self.image_token_id] * images[i - 1]
                supervised += [False] * images[i - 1]
                at += len(IMAGE)
            if chunk:
                encoding = self._tokenise(chunk, id)
                spans = [(at + start, at + max(end - 1, start)) for start, end in encoding.offsets]
                if any(flags[first] != flags[last] for first, last in spans):
                    raise DataError(
                        f"Sample {id}: a token lies half in an answer and half outside.",
                        f"Template {self.template.name} does not suit this model's tokenizer, or this text.",
                    )
                ids += encoding.ids
                supervised += [flags[last] for _, last in spans]
            at += len(chunk)
        if len(ids) > self.max_length:
            raise DataError(
                f"Sample {id} has {len(ids)} positions, more than model_max_length {self.max_length}.",
                "Raise model_max_length or shorten the sample.",
            )
        self._check_embedded(ids, id)
        return Row(tuple(ids), tuple(supervised))

    def _check_embedded(self, ids: Sequence[int], id: str) -> None:
        largest = max(ids, default=0)
        if self.embeddings is not None and largest >= self.embeddings:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise DataError(
                f"Sample {id} has the token {token!r} of id {largest}, but the model embeds {self.embeddings} ids.",
                "Its tokenizer is not this model's, or has tokens that were added without resizing the model.",
            )

    def _tokenise(self, text: str, id: str) -> Any:
        try:
            return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeError):  # a lone surrogate, which JSON can carry
            raise DataError(f"The text of sample {id} is not valid Unicode.", "Mend or remove it.") from None

    def prompt(self, text: str, images: int | Sequence[Picture] = 1, history: Sequence[Turn] = ()) -> tuple[int, ...]:
        """Ids of an open prompt for generation: `text` as the user's turn, the answer left to the model.

        Args:
            images: those that come with the whole conversation, or their number (see `positions`). Where no turn has
                a placeholder, they are put before the first one's text.
            history: the turns before this one.
        """
        pieces, positions = self._asked(text, images, history)
        return self.row(pieces, positions).ids

    def answered(self, text: str, response: str, images: int | Sequence[Picture] = 1) -> Row:
        """The prompt that `prompt` makes, with a given answer, and what ends it, as the supervised tokens."""
        pieces, positions = self._asked(text, images)
        template = self.template
        return self.row([*pieces, Piece(f"{template.lead}{response}{template.end}", True)], positions, "answer")

    def _asked(
        self, text: str, images: int | Sequence[Picture], history: Sequence[Turn] = ()
    ) -> tuple[list[Piece], list[int]]:
        turns, positions = [*history, Turn(text, "")], self.positions(images)
        if positions and not any(IMAGE in turn.prompt for turn in turns):
            turns[0] = replace(turns[0], prompt=with_image(turns[0].prompt, len(positions)))
        self._check_images(turns, len(positions), "The prompt")
        return self.template.render(self._marked(turns), open_end=True), positions

    def pair(self, pair: PreferencePair) -> Example:
        """A preference pair as a tree with two branches: chosen, then rejected.

        Raises:
            DataError: see `conversation`; or chosen and rejected have the same tokens.
        """
        prompt = with_image(pair.prompt)
        rows = [
            self.learned([Turn(prompt, response)], (pair.image,), pair.id) for response in (pair.chosen, pair.rejected)
        ]
        if rows[0] == rows[1]:
            raise DataError(f"Pair {pair.id}: chosen and rejected have the same tokens.", "Remove the pair.")
        return Example(pair.id, Tree.of(rows), (pair.image,))

    def pairs(self, pairs: Sequence[PreferencePair], faults: list[str] | None = None) -> list[Example]:
        """Preference pairs as trees; `faults` as in `conversations`."""
        made = (_or_fault(self.pair, pair, faults) for pair in pairs)
        return [example for example in made if example is not None]

    def conversation(self, sample: Conversation) -> Example:
        """A supervised conversation as a tree with a single branch.

        Raises:
            DataError: an image without placeholder or the reverse, an empty prompt or answer, a text that holds what
                the template puts around answers (LLaVA trains on nothing of such a sample, without an error), or a
                sample that is too long. Each names the sample.
        """
        return Example(sample.id, Tree.of([self._conversation_row(sample)]), sample.images)

    def conversations(
        self, samples: Sequence[Conversation], branches: int, faults: list[str] | None = None
    ) -> list[Example]:
        """Conversations on one image as branches of a tree, at most `branches` of them: the image is read once.

        Args:
            faults: takes what is wrong with samples that cannot be used, which are then left out; without it, the
                first one raises.
        """
        groups: dict[tuple[Path, ...], list[list[tuple[str, Row]]]] = {}
        singles: list[tuple[tuple[Path, ...], list[tuple[str, Row]]]] = []
        for sample in samples:
            row = _or_fault(self._conversation_row, sample, faults)
            if row is None:
                continue
            if len(sample.images) != 1:
                singles.append((sample.images, [(sample.id, row)]))
                continue
            chunks = groups.setdefault(sample.images, [[]])
            if len(chunks[-1]) == branches:
                chunks.append([])
            chunks[-1].append((sample.id, row))
        shared = [(images, chunk) for images, chunks in groups.items() for chunk in chunks] + singles
        return [Example(chunk[0][0], Tree.of([row for _, row in chunk]), images) for images, chunk in shared]

    def _conversation_row(self, sample: Conversation) -> Row:
        return self.learned(sample.turns, sample.images, sample.id)

    def learned(self, turns: Sequence[Turn], images: Sequence[Picture], id: str) -> Row:
        """The row of a sample to be learned from. Raises DataError as `conversation` does."""
        self._check_images(turns, len(images), f"Sample {id}")
        turns = [replace(turn, prompt=image_first(turn.prompt)) for turn in turns]
        self._check_learnable(turns, id)
        return self.row(self.template.render(self._marked(turns)), self.positions(images), id)

    def _marked(self, turns: Sequence[Turn]) -> list[Turn]:
        marked = f"{IM_START}{IMAGE}{IM_END}" if self.image_start_end else IMAGE
        return [replace(turn, prompt=turn.prompt.replace(IMAGE, marked)) for turn in turns]

    @staticmethod
    def _check_images(turns: Sequence[Turn], images: int, who: str) -> None:
        named = sum(turn.prompt.count(IMAGE) for turn in turns)
        if named != images:
            raise DataError(f"{who} has {named} {IMAGE}, but {images} images are given.", "Write one for each image.")
        if any(IMAGE in turn.response for turn in turns):
            raise DataError(f"{who} has {IMAGE} in an answer.", "Put it into the prompt.")

    def _check_learnable(self, turns: Sequence[Turn], id: str) -> None:
        template = self.template
        if not turns:
            raise DataError(f"Sample {id} has no turns.", "Remove it.")
        if template.captions and (len(turns) > 1 or IMAGE not in turns[0].prompt):
            raise DataError(
                f"Sample {id} is not one image with one caption, as template {template.name} needs.",
                "Choose another template.",
            )
        cue = template.cue + template.lead
        ends = [end for end in (template.end.strip(), self.tokenizer.eos_token) if end]
        for turn in turns:
            if not turn.prompt or not turn.response:
                raise DataError(f"Sample {id} has an empty prompt or answer.", "Fill it in or remove the sample.")
            wrong = next((end for end in ends if end in turn.prompt or end in turn.response), "")
            asked = template.later + turn.prompt
            around = asked + cue + turn.response
            if cue.strip() and (around.count(cue) != 1 or around.index(cue) != len(asked)):
                wrong = cue
            if wrong:
                raise DataError(
                    f"Sample {id} has {wrong.strip()!r} in its text, a mark of template {template.name}.",
                    "Remove it from the text or choose another template.",
                )


def _or_fault(make: Callable[[Sample], Made], sample: Sample, faults: list[str] | None) -> Made | None:
    try:
        return make(sample)
    except DataError as error:
        if faults is None:
            raise
        faults.append(str(error))
        return None


def differing(tree: Tree) -> list[bool]:
    """For each target of a pair's tree, in order: does the token differ from the other response's?

    A token differs when it lies outside the matching blocks of the two responses (longest common subsequences of runs).
    """
    chosen, rejected = ([t for t, s in zip(b.ids, b.supervised, strict=True) if s] for b in tree.branches)
    same_chosen: set[int] = set()
    same_rejected: set[int] = set()
    for a, b, size in difflib.SequenceMatcher(None, chosen, rejected, autojunk=False).get_matching_blocks():
        same_chosen.update(range(a, a + size))
        same_rejected.update(range(b, b + size))
    return [i not in same_chosen for i in range(len(chosen))] + [i not in same_rejected for i in range(len(rejected))]
