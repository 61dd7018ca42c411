"""Tokenisation that reads special tokens in people's text as plain text.

The tokenizers library finds special tokens anywhere in a text: a question with `</s>` in it would end its own turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer

PRIVATE = 0x10F000  # first code point for stand-ins; Unicode assigns these no meaning


@dataclass(frozen=True)
class LiteralText:
    """Tokeniser that reads special tokens as text in a person's words, and as tokens in a template.

    `escape` the person's text, write the template around it, and `encode` the whole. Each special token has a stand-in
    of the same length. `escape` replaces special tokens in the person's text by their stand-ins. `encode` swaps the
    two: the person's token is then read as text, and the template's, now a stand-in and an added token of its own, as
    the special token. A stand-in that somebody types is read as text, too.

    Args:
        tokenizer: a fast transformers tokenizer.
        marks: added tokens that count as special even if the tokenizer does not say so.
        exempt: special tokens that `escape` leaves alone.
    """

    tokenizer: Any
    marks: Sequence[str] = ()
    exempt: Sequence[str] = ()

    @cached_property
    def _special(self) -> dict[int, AddedToken]:
        return {
            id: token
            for id, token in self.tokenizer.added_tokens_decoder.items()
            if (token.special or token.content in self.marks) and token.content not in self.exempt
        }

    @cached_property
    def _stand_ins(self) -> dict[str, str]:
        # As long as the token itself, so that offsets in the escaped text hold for the original.
        contents = [token.content for token in self._special.values()]
        return {content: chr(PRIVATE + i) * len(content) for i, content in enumerate(contents)}

    @cached_property
    def escape(self) -> Callable[[str], str]:
        """Replace the special tokens in a person's text by stand-ins."""
        return _replacing(self._stand_ins)

    def escaped(self, text: str) -> bool:
        """Return True if a text has stand-ins; without any, the tokenizer itself reads it correctly."""
        return any(stand_in in text for stand_in in self._stand_ins.values())

    @cached_property
    def _exchange(self) -> Callable[[str], str]:
        return _replacing(self._stand_ins | {stand_in: content for content, stand_in in self._stand_ins.items()})

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids and the (start, end) offsets of each token in the text.

        Raises:
            TypeError or UnicodeError: the text is not valid Unicode.
        """
        # The person's stand-ins become tokens that are read as text; the template's tokens become stand-ins.
        backend, special_ids = self._backend
        encoding = backend.encode(self._exchange(text), add_special_tokens=False)
        return [special_ids.get(id, id) for id in encoding.ids], encoding.offsets

    @cached_property
    def _backend(self) -> tuple[Tokenizer, dict[int, int]]:
        """Build a tokenizer that reads special tokens as text, and the map from stand-in ids to special-token ids."""
        # A copy: the model's own tokenizer stays as it is. Only tokens marked special are then encoded as text.
        content = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for token in content["added_tokens"]:
            token["special"] = token["id"] in self._special
        backend = Tokenizer.from_str(json.dumps(content))
        backend.encode_special_tokens = True  # its name is misleading: they are encoded as text
        flags = ("single_word", "lstrip", "rstrip", "normalized")
        for token in self._special.values():
            token_flags = {flag: getattr(token, flag) for flag in flags}
            backend.add_tokens([AddedToken(self._stand_ins[token.content], special=False, **token_flags)])
        special_ids = {self._stand_ins[token.content]: id for id, token in self._special.items()}
        added = backend.get_added_tokens_decoder().items()
        return backend, {id: special_ids[token.content] for id, token in added if token.content in special_ids}


def _replacing(table: Mapping[str, str]) -> Callable[[str], str]:
    # Alternatives match in order: a token that another begins with must come after it. (?!) matches nothing.
    longest_first = sorted(table, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
    return lambda text: pattern.sub(lambda match: table[match[0]], text)
