"""The conversation that the browser keeps: pictures, and questions with each model's answer.

The server keeps nothing between two actions, so what comes back is untrusted and is validated before it is read.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from relook.data.samples import Turn

# Why an answer ended: the model ended it, the longest length was reached, somebody stopped it, the server failed.
# Empty while it is growing.
Finish = Literal["", "stop", "length", "cancelled", "failed"]


class _State(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Answer(_State):
    """Hold a model's answer and why it ended."""

    text: str = ""
    finish: Finish = ""


class Exchange(_State):
    """Hold a question and the answer of each model.

    Args:
        temperature: at which the question of the exchange before was asked once more; None for a question of its own.
        added: pictures that the question shows beside those before it.
    """

    question: str
    answers: tuple[Answer, ...]
    temperature: float | None = None
    added: tuple[str, ...] = ()

    @property
    def running(self) -> bool:
        """Return True while an answer is growing."""
        return not all(answer.finish for answer in self.answers)

    def ended(self, finish: Finish) -> Exchange:
        """End the answers that are growing."""
        answers = [answer if answer.finish else Answer(text=answer.text, finish=finish) for answer in self.answers]
        return self.model_copy(update={"answers": tuple(answers)})


class Dialogue(_State):
    """Hold a picture, the exchanges about it, and pictures that were added to it later.

    Args:
        models: their names; the answers of an exchange are in this order.
        picture: the path of the first upload; empty for none.
        added: those that the next question shows.
    """

    models: tuple[str, ...]
    picture: str = ""
    exchanges: tuple[Exchange, ...] = ()
    added: tuple[str, ...] = ()

    @classmethod
    def parse(cls, state: Any, models: Sequence[str]) -> Dialogue:
        """Read what the browser kept; anything that is no conversation with these models gives an empty one."""
        empty = cls(models=tuple(models))
        try:
            conversation = cls.model_validate_json(state or "")
        except (ValidationError, TypeError):
            return empty
        complete = all(len(exchange.answers) == len(models) for exchange in conversation.exchanges)
        return conversation if conversation.models == empty.models and complete else empty

    @property
    def running(self) -> bool:
        """Return True while an answer is growing."""
        return any(exchange.running for exchange in self.exchanges)

    def asked(self, question: str, temperature: float | None = None) -> Dialogue:
        """Add a question whose answers are still empty."""
        answers, new = (Answer(),) * len(self.models), temperature is None
        added = self.added if new else ()
        exchange = Exchange(question=question, answers=answers, temperature=temperature, added=added)
        waiting = () if new else self.added
        return self.model_copy(update={"exchanges": (*self.exchanges, exchange), "added": waiting})

    def answered(self, answers: Sequence[Answer]) -> Dialogue:
        """Replace the answers to the last question."""
        last = self.exchanges[-1].model_copy(update={"answers": tuple(answers)})
        return self.model_copy(update={"exchanges": (*self.exchanges[:-1], last)})

    def ended(self, finish: Finish) -> Dialogue:
        """End the answers that are growing."""
        return self.model_copy(update={"exchanges": tuple(exchange.ended(finish) for exchange in self.exchanges)})

    def before_last_question(self) -> Dialogue:
        """Return what was said before the last question was first asked, with the pictures that it shows."""
        exchanges = list(self.exchanges)
        last = None
        while exchanges and (last is None or last.temperature is not None):
            last = exchanges.pop()
        return self.model_copy(update={"exchanges": tuple(exchanges), "added": last.added if last else ()})

    def turns(self, model: int, last: int | None = None) -> list[Turn]:
        """Return a model's turns up to the exchange `last`, or all; of answers to one question the newest counts."""
        exchanges = self.exchanges if last is None else self.exchanges[: last + 1]
        return [
            Turn(exchange.question, exchange.answers[model].text)
            for exchange, after in itertools.zip_longest(exchanges, exchanges[1:])
            if after is None or after.temperature is None
        ]

    def pictures(self, last: int | None = None) -> list[tuple[str, ...]]:
        """Return the pictures of each question up to the exchange `last`; without it, of the next question as well."""
        exchanges = self.exchanges if last is None else self.exchanges[: last + 1]
        shown = [exchange.added for exchange in exchanges if exchange.temperature is None]
        shown += [self.added] if last is None else []
        return [((self.picture,) if self.picture and not i else ()) + added for i, added in enumerate(shown)]

    def only_picture(self, last: int) -> str:
        """Return the picture up to the exchange `last`; "" where there is none, or where there are several."""
        pictures = sum(self.pictures(last), ())
        return pictures[0] if len(pictures) == 1 else ""
