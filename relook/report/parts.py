"""What the reports' HTML files are made of. Names, questions and answers are untrusted text: they are escaped here."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from relook.data.images import open_image
from relook.errors import DataError
from relook.evaluate.chair import Vocabulary, mentions

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1400px;margin:2em auto;padding:0 1em;color:#1c2330}
table{border-collapse:collapse;margin:1em 0;font-size:14px}
td{white-space:nowrap}td,th{padding:.35em .7em;border-bottom:1px solid #dde2ea;text-align:right}
td:first-child,th:first-child{text-align:left}small{color:#6a7486}th{vertical-align:bottom}
.card{display:grid;grid-template-columns:190px 1fr;gap:1em;border-top:1px solid #dde2ea;padding:1em 0}
.card p{margin:.2em 0;padding-left:12em;display:flow-root}
.card p b{float:left;margin-left:-12em;max-width:11.5em;overflow-wrap:anywhere;font-weight:600;color:#44506a}
.card td,.card th,.wrap td,.wrap th{white-space:normal;text-align:left;overflow-wrap:anywhere}.card table{margin:0}
mark{background:#ffd2cf;color:#a3140c;padding:0 .2em;border-radius:3px}
.wrong{color:#a3140c}.right{color:#1a7a3c}.card small{overflow-wrap:anywhere}.card img{width:180px}
svg.picture{width:180px;height:180px;image-rendering:pixelated}.maps{display:flex;gap:.8em;flex-wrap:wrap;margin-top:.6em}
.maps figure{margin:0}.maps svg{width:110px;height:110px}
figcaption{font-size:13px;color:#44506a}svg{max-width:100%;height:auto}
"""
THUMBNAIL = 240  # pixels of the longer side


def document(title: str, sections: Sequence[str]) -> str:
    """A whole HTML file."""
    head = f"<meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en>{head}{''.join(sections)}</html>"


def table(cells: Sequence[Sequence[str]]) -> str:
    """A table of HTML cells; the first line is the head."""
    head, *lines = cells
    return f"<table>{_row(head, 'th')}{''.join(_row(line, 'td') for line in lines)}</table>"


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"


NOTHING = "–"  # in place of a ratio of nothing


def percent(value: float | None, interval: Sequence[float] | None = None) -> str:
    """A fraction in percent, and its interval in brackets, as HTML."""
    return number(value, interval, 100)


def number(value: float | None, interval: Sequence[float] | None = None, scale: float = 1, sign: str = "") -> str:
    """A number, and its interval in brackets, as HTML; `sign` "+" is also written where it is positive.

    None is a ratio of nothing.
    """
    if value is None:
        return NOTHING
    text, *ends = (f"{scale * part:{sign}.1f}" for part in (value, *(interval or ())))
    return f"{text} <small>[{ends[0]}, {ends[1]}]</small>" if ends else text


def marked(text: str, there: Collection[str], vocabulary: Vocabulary) -> str:
    """A caption as HTML, the words for objects that are not there marked."""
    parts, last = [], 0
    for mention in mentions(text, vocabulary):
        if mention.object not in there:
            parts += [
                html.escape(text[last : mention.start]),
                f"<mark>{html.escape(text[mention.start : mention.end])}</mark>",
            ]
            last = mention.end
    return "".join(parts) + html.escape(text[last:])


def card(picture: str, content: str) -> str:
    """A picture and what is said of it, both HTML, side by side."""
    return f"<div class=card><div>{picture}</div><div>{content}</div></div>"


def described(there: Collection[str], captions: Iterable[tuple[str, str]], vocabulary: Vocabulary) -> str:
    """What is on a picture, and what each model, by name, says of it, words for absent objects marked, as HTML."""
    said = [(name, marked(text, there, vocabulary)) for name, text in captions]
    return lines([("there is", html.escape(", ".join(sorted(there)))), *said])


def lines(named: Iterable[tuple[str, str]]) -> str:
    """Lines of HTML, each under the name of what it is."""
    return "".join(f"<p><b>{html.escape(name)}</b>{line}</p>" for name, line in named)


def thumbnail(path: Path) -> str:
    """A small copy of an image file as an HTML element; words where it cannot be read."""
    try:
        image = open_image(path)
    except DataError as error:
        return f"<small>{html.escape(error.what)}</small>"
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def picture(data: bytes, grid: Sequence[Sequence[float]] | None = None, kind: str = "jpeg") -> str:
    """An image file's bytes as an inline SVG, with an attention grid laid over it."""
    source = base64.b64encode(data).decode()
    cells = ""
    if grid:
        most, side = max(map(max, grid)), len(grid)
        cells = "<rect width=1 height=1 fill=#000 opacity=.35 />" + "".join(
            f'<rect x="{x / side:.4f}" y="{y / side:.4f}" width="{1 / side:.4f}" height="{1 / side:.4f}" '
            f'fill="#ffb000" opacity="{0.75 * weight / most:.2f}"/>'
            for y, line in enumerate(grid)
            for x, weight in enumerate(line)
        )
    return (
        '<svg class=picture viewBox="0 0 1 1"><image width="1" height="1" preserveAspectRatio="none" '
        f'href="data:image/{kind};base64,{source}"/>{cells}</svg>'
    )
