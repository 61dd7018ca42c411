"""Special tokens in people's text, read as text.

The tokenizers library finds special tokens wherever they stand: a question with `</s>` in it would end its own turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer

PRIVATE = 0x10F000  # the first of the code points that stand-ins are made of; Unicode gives them no meaning


@dataclass(frozen=True)
class LiteralText:
    """Reads special tokens as text where a person wrote them, and as tokens where a template did.

    `escape` the person's text, write the template around it, and `encode` the whole. Each special token has a stand-in
    of the same length. `escape` puts the stand-in into the person's text, and `encode` exchanges the two: it reads the
    token as text, and the stand-in, an added token of its own, as the template's token. A stand-in that somebody types
    comes out as text, too.

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
        contents = [token.content for token in self._special.values()]
        return {content: chr(PRIVATE + i) * len(content) for i, content in enumerate(contents)}

    @cached_property
    def escape(self) -> Callable[[str], str]:
        """Put stand-ins for the special tokens in a person's text."""
        return _replacing(self._stand_ins)

    def escaped(self, text: str) -> bool:
        """Tell whether a text has stand-ins; one without is read right by the tokenizer itself."""
        return any(stand_in in text for stand_in in self._stand_ins.values())

    @cached_property
    def _exchange(self) -> Callable[[str], str]:
        return _replacing(self._stand_ins | {stand_in: content for content, stand_in in self._stand_ins.items()})

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return ids, and where in the text each token begins and ends.

        Raises:
            TypeError or UnicodeError: the text is not valid Unicode.
        """
        backend, meant = self._backend
        encoding = backend.encode(self._exchange(text), add_special_tokens=False)
        return [meant.get(id, id) for id in encoding.ids], encoding.offsets

    @cached_property
    def _backend(self) -> tuple[Tokenizer, dict[int, int]]:
        """A copy of the tokenizer that reads special tokens as text, and the ids that its stand-ins' ids mean."""
        content = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for token in content["added_tokens"]:
            token["special"] = token["id"] in self._special
        backend = Tokenizer.from_str(json.dumps(content))
        backend.encode_special_tokens = True  # its name is misleading: they are encoded as text
        flags = ("single_word", "lstrip", "rstrip", "normalized")
        for token in self._special.values():
            same = {flag: getattr(token, flag) for flag in flags}
            backend.add_tokens([AddedToken(self._stand_ins[token.content], special=False, **same)])
        meant = {self._stand_ins[token.content]: id for id, token in self._special.items()}
        added = backend.get_added_tokens_decoder().items()
        return backend, {id: meant[token.content] for id, token in added if token.content in meant}


def _replacing(table: Mapping[str, str]) -> Callable[[str], str]:
    longest_first = sorted(table, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
    return lambda text: pattern.sub(lambda match: table[match[0]], text)
