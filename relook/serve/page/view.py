"""The page's parts as HTML, from a conversation: templates beside this file, with all texts escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import ChoiceLoader, PackageLoader

from relook.report.attention_maps import has_attention_maps
from relook.report.pages import ENVIRONMENT
from relook.serve.page.actions import EXAMPLE_QUESTION, AnswerWord, AttentionMap, Page
from relook.serve.page.dialogue import Answer, Dialogue, Exchange
from relook.serve.page.texts import TEXTS, translate
from relook.serve.protocol import APIError

# The report's templates have the macro that draws a map.
_ENVIRONMENT = ENVIRONMENT.overlay(
    loader=ChoiceLoader([PackageLoader("relook.serve.page"), PackageLoader("relook.report")])
)


@dataclass(frozen=True)
class Place:
    """Name a word of the conversation: exchange, model and piece of the answer, each by its index."""

    exchange: int
    model: int
    piece: int

    @classmethod
    def parse(cls, text: str) -> Place | None:
        """Read what a click sends; None for anything else."""
        numbers = text.split("-")
        if len(numbers) != 3 or not all(number.isascii() and number.isdigit() for number in numbers):
            return None
        return cls(*map(int, numbers))


@dataclass(frozen=True)
class View:
    """Render the page's parts in one language.

    Args:
        examples: pictures of which it is known what is on them.
        run_pictures: of the served run's own data.
    """

    page: Page
    examples: Sequence[Path]
    run_pictures: Sequence[Path]
    language: str

    def head(self) -> str:
        """Render the title, and what the page is for."""
        name, *other_models = self.page.engines
        key = "lead_compared" if other_models else "lead"
        lead = translate(self.language, key, name=name, others=", ".join(other_models))
        return self._render("head.html.j2", lead=lead, looks=any(map(self._looks, self.page.engines)))

    def panel(self, conversation: Dialogue) -> str:
        """Render the picture, what is on it where that is known, and pictures to choose from."""
        path, facts = conversation.picture, ""
        try:
            objects = self.page.known_objects(path)
        except APIError:  # it was removed meanwhile
            path, objects = "", None
        if objects is not None:
            facts = translate(self.language, "there_is", names=", ".join(sorted(objects)))
        galleries = [
            {"title": translate(self.language, "examples"), "examples": list(map(self._example, self.examples))}
        ]
        if self.run_pictures:
            title = translate(self.language, "run_pictures", name=next(iter(self.page.engines)))
            labels = (translate(self.language, "run_picture", number=i + 1) for i in range(len(self.run_pictures)))
            pictures = [_gallery_item(path, label) for path, label in zip(self.run_pictures, labels, strict=True)]
            galleries.append({"title": title, "examples": pictures})
        return self._render(
            "panel.html.j2",
            picture=_url(Path(path)) if path else "",
            adds=bool(path and (conversation.exchanges or conversation.added)),
            added=[_url(Path(added)) for added in conversation.added],
            facts=facts,
            galleries=galleries,
            max_bytes=self.page.sources.max_bytes,
        )

    def chat(self, conversation: Dialogue, word: Place | None = None, attention: AttentionMap | None = None) -> str:
        """Render the conversation.

        Args:
            word: the clicked word, below whose answer `attention` is shown, or that there is nothing to show.
        """
        try:
            objects = self.page.known_objects(conversation.picture)
        except APIError:
            objects = None
        exchanges = []
        for i, exchange in enumerate(conversation.exchanges):
            known = objects if conversation.only_picture(i) else None
            exchanges.append(
                {
                    "question": exchange.question,
                    "added": [_url(Path(path)) for path in exchange.added],
                    "once_more": self._once_more(exchange),
                    "note": "" if conversation.picture or i else translate(self.language, "without_picture"),
                    "answers": [
                        self._answer(conversation, Place(i, j, -1), answer, known, word, attention)
                        for j, answer in enumerate(exchange.answers)
                    ],
                }
            )
        start = translate(self.language, "start", question=EXAMPLE_QUESTION)
        return self._render("chat.html.j2", exchanges=exchanges, start=start, running=conversation.running)

    def _answer(
        self,
        conversation: Dialogue,
        at: Place,
        answer: Answer,
        objects: frozenset[str] | None,
        word: Place | None,
        attention: AttentionMap | None,
    ) -> dict[str, Any]:
        names = list(self.page.engines)
        name, here = names[at.model], word is not None and (word.exchange, word.model) == (at.exchange, at.model)
        # While an answer grows a map would vanish with the next word.
        picture = conversation.only_picture(at.exchange)
        clickable = bool(picture) and not conversation.running and self._looks(name)
        pieces = self.page.pieces(answer.text, objects)
        role = "served" if at.model == 0 else "compared"
        latest = at.exchange == len(conversation.exchanges) - 1
        shown: dict[str, Any] = {
            "name": name,
            "role": translate(self.language, role) if len(names) > 1 else "",
            "place": f"{at.exchange}-{at.model}",
            "pieces": [
                {
                    "text": piece.text,
                    "absent": piece.absent,
                    "marked": piece.absent and _ends_mention(pieces, i),
                    "clickable": clickable and piece.word,
                    "pressed": here and word is not None and word.piece == i,
                }
                for i, piece in enumerate(pieces)
            ],
            "growing": not answer.finish,
            "note": self._note(answer),
            "hint": translate(self.language, "click_word", name=name)
            if clickable and latest and answer.text and not here
            else "",
            "map": None,
            "no_map": translate(self.language, "no_map", name=name) if here and attention is None else "",
        }
        if here and attention is not None:
            values = {"name": name, "word": attention.word}
            shown["map"] = {
                "source": attention.source,
                "grid": attention.grid,
                "label": translate(self.language, "map", **values),
                "caption": translate(self.language, "before", **values),
            }
        return shown

    def _note(self, answer: Answer) -> str:
        if answer.finish in ("length", "cancelled", "failed"):
            return translate(self.language, answer.finish)
        return translate(self.language, "empty") if answer.finish and not answer.text.strip() else ""

    def _once_more(self, exchange: Exchange) -> str:
        if exchange.temperature is None:
            return ""
        return translate(self.language, "once_more", temperature=f"{exchange.temperature:g}")

    def _example(self, path: Path) -> dict[str, str]:
        names = ", ".join(sorted(self.page.known_objects(str(path)) or ()))
        number = list(self.examples).index(path) + 1
        return _gallery_item(path, translate(self.language, "example", number=number, names=names))

    def _looks(self, name: str) -> bool:
        return has_attention_maps(self.page.engines[name].loaded)

    def _render(self, template: str, **values: Any) -> str:
        return _ENVIRONMENT.get_template(template).render(t=TEXTS[self.language], **values)


def _ends_mention(pieces: Sequence[AnswerWord], index: int) -> bool:
    """Return True for the last word of those that name one object, such as "hot dog"."""
    following = next((piece for piece in pieces[index + 1 :] if piece.word), None)
    return following is None or not following.absent


def _gallery_item(path: Path, label: str) -> dict[str, str]:
    return {"name": path.name, "label": label, "url": _url(path)}


def _url(path: Path) -> str:
    # Relative, for a server below a path of a proxy.
    return f"gradio_api/file={quote(str(path))}"
