"""Samples to token ids: conversations, preference pairs and open prompts for one model's tokenizer."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relook.data.prompts import IMAGE, Piece, Template, with_image
from relook.data.samples import Conversation, PreferencePair, Turn
from relook.errors import DataError
from relook.tree import Row, Tree


@dataclass(frozen=True)
class Example:
    """A tree ready to be packed, the images of its prefix, and the name of what it was made from."""

    id: str
    tree: Tree
    images: tuple[Path, ...]


@dataclass(frozen=True)
class Encoder:
    """Turns samples into token ids.

    Args:
        tokenizer: a fast transformers tokenizer.
        template: what stands around prompts and answers.
        image_token_id: the placeholder's id, written `image_positions` times for each image.
        max_length: longest row in tokens, images included. Longer samples are refused; nothing is ever truncated.
    """

    tokenizer: Any
    template: Template
    image_token_id: int
    image_positions: int
    max_length: int = 2048

    def row(self, pieces: Sequence[Piece], id: str = "prompt") -> Row:
        """Token ids of rendered pieces, with BOS first and the supervised tokens marked.

        Raises:
            DataError: the row is longer than `max_length`, or a supervised piece has no token.
        """
        ids: list[int] = []
        supervised: list[bool] = []
        if self.tokenizer.bos_token_id is not None:
            ids, supervised = [self.tokenizer.bos_token_id], [False]
        # Text between two images or ends is tokenised in one go: a response right after "ASSISTANT:" must get the
        # tokens it has in running text. Which of them belong to it is read from the character offsets.
        stretch: list[Piece] = []
        for piece in pieces:
            *heads, tail = piece.text.split(IMAGE)
            for head in heads:
                self._append([*stretch, Piece(head, piece.supervised)], ids, supervised)
                ids += [self.image_token_id] * self.image_positions
                supervised += [False] * self.image_positions
                stretch = []
            stretch.append(Piece(tail, piece.supervised))
            if piece.end:
                self._append(stretch, ids, supervised)
                ids.append(self.tokenizer.eos_token_id)
                supervised.append(piece.supervised)
                stretch = []
        self._append(stretch, ids, supervised)
        if len(ids) > self.max_length:
            raise DataError(
                f"Sample {id} has {len(ids)} positions, more than model_max_length {self.max_length}.",
                "Raise model_max_length or shorten the sample.",
            )
        return Row(tuple(ids), tuple(supervised))

    def _append(self, stretch: Sequence[Piece], ids: list[int], supervised: list[bool]) -> None:
        text = "".join(piece.text for piece in stretch)
        if not text:
            return
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends, position = [], 0
        for piece in stretch:
            position += len(piece.text)
            ends.append((position, piece.supervised))
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            # A token belongs to the piece in which its last character lies: the space before an answer is part of
            # the answer's first token.
            last = max(end - 1, start)
            ids.append(token)
            supervised.append(next(flag for piece_end, flag in ends if last < piece_end))

    def prompt(self, text: str, images: int = 1) -> tuple[int, ...]:
        """Ids of an open prompt for generation: `text` as the user's turn, the answer left to the model."""
        text = with_image(text) if images and IMAGE not in text else text
        if text.count(IMAGE) != images:
            raise DataError(f"The prompt names {text.count(IMAGE)} images, but {images} are given.")
        return self.row(self.template.render([Turn(text, "")], open_end=True)).ids

    def pair(self, pair: PreferencePair) -> Example:
        """A preference pair as a tree with two branches: chosen, then rejected."""
        prompt = with_image(pair.prompt)
        rows = [
            self.row(self.template.render([Turn(prompt, response)]), pair.id)
            for response in (pair.chosen, pair.rejected)
        ]
        if rows[0] == rows[1]:
            raise DataError(f"Pair {pair.id}: chosen and rejected have the same tokens.", "Remove the pair.")
        return Example(pair.id, Tree.of(rows), (pair.image,))

    def conversation(self, sample: Conversation) -> Example:
        """A supervised conversation as a tree with a single branch."""
        return Example(sample.id, Tree.of([self._conversation_row(sample)]), sample.images)

    def conversations(self, samples: Sequence[Conversation], branches: int) -> list[Example]:
        """Conversations on one image as branches of a tree, at most `branches` of them: the image is read once."""
        groups: dict[tuple[Path, ...], list[list[Conversation]]] = {}
        singles = []
        for sample in samples:
            if len(sample.images) != 1:
                singles.append([sample])
                continue
            chunks = groups.setdefault(sample.images, [[]])
            if len(chunks[-1]) == branches:
                chunks.append([])
            chunks[-1].append(sample)
        chunks = [chunk for chunks in groups.values() for chunk in chunks] + singles
        return [
            Example(chunk[0].id, Tree.of([self._conversation_row(sample) for sample in chunk]), chunk[0].images)
            for chunk in chunks
        ]

    def _conversation_row(self, sample: Conversation) -> Row:
        row = self.row(self.template.render(sample.turns), sample.id)
        if not any(row.supervised):
            raise DataError(f"Sample {sample.id} has no answer to learn from.", "Remove it.")
        return row


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
