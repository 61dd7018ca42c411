"""Conversation templates: what stands around a prompt and its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from relook.data.samples import Turn
from relook.errors import RecipeError

IMAGE = "<image>"


@dataclass(frozen=True)
class Piece:
    """A stretch of a rendered conversation: `supervised` where it is a response; `end` closes it with the EOS token."""

    text: str
    supervised: bool = False
    end: bool = False


@dataclass(frozen=True)
class Template:
    """How a conversation is written as text. Facts from LLaVA's conversation.py and llava-hf's chat template."""

    name: str
    system: str
    user: str
    assistant: str
    separator: str

    def render(self, turns: Sequence[Turn], open_end: bool = False) -> list[Piece]:
        """The pieces of a conversation. With `open_end` the last response is left for the model to write."""
        pieces = []
        for i, turn in enumerate(turns):
            system = self.system + self.separator if i == 0 and self.system else ""
            pieces.append(Piece(f"{system}{self.user}: {turn.prompt}{self.separator}{self.assistant}:"))
            if not (open_end and i == len(turns) - 1):
                pieces.append(Piece(f" {turn.response}", supervised=True, end=True))
        return pieces


_VICUNA = (
    "A chat between a curious {user} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {user}'s questions."
)
TEMPLATES = {
    template.name: template
    for template in (
        Template("v1", _VICUNA.format(user="user"), "USER", "ASSISTANT", " "),
        # HA-DPO's POPE script evaluates with this one.
        Template("llava_v1", _VICUNA.format(user="human"), "USER", "ASSISTANT", " "),
        Template("llava_hf", "", "USER", "ASSISTANT", " "),
    )
}


def get_template(name: str) -> Template:
    try:
        return TEMPLATES[name]
    except KeyError:
        raise RecipeError(
            f"There is no conversation template {name!r}.", f"Known ones: {', '.join(TEMPLATES)}."
        ) from None


def with_image(prompt: str) -> str:
    """Put the image placeholder before a bare prompt, as LLaVA does; a prompt that has one is left alone."""
    return prompt if IMAGE in prompt else f"{IMAGE}\n{prompt}"
