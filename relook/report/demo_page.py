"""The demo's page: what tuning changed in toyworld, with the pictures on which it helps and on which it does not."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from relook.data.annotations import Annotations
from relook.data.paths import coco_images
from relook.data.samples import Turn
from relook.data.templates import with_image
from relook.evaluate.tasks.chair import (
    CHAIR_PROMPT,
    Vocabulary,
    data_truth,
    differing_captions,
    mentions,
    read_eval_captions,
    vocabulary_of,
)
from relook.evaluate.tasks.pope import differing_answers
from relook.files import read_json, write_text
from relook.model.load import LoadedModel, load_model
from relook.report.attention_maps import attention_before
from relook.report.examples import answer_effect, by_image, caption_effects
from relook.report.findings import against_control, details, headline, unclear_answers
from relook.report.pages import Spans, data_url, mark_absent, render
from relook.report.plots import Style, curves, line_styles, measured, tradeoff
from relook.report.tables import ANSWER_COLUMNS, CAPTION_COLUMNS, Column, Line, ScoreTable, axis_labels
from relook.report.terms import variant

TUNED = "post_decoder"  # the run that the headline, the examples and the maps are about
CAPTION_CARDS = 5  # pictures in each group of examples
ANSWER_CARDS = 6  # pictures in each group of answers


def write_demo_page(out: Path) -> Path:
    """Write `out/report.html` from a finished demo folder."""
    results = read_json(out / "results.json")
    runs, data = list(results["runs"]), out / "world" / "test"
    scores = {"base": results["base"], **results["runs"]}
    styles = line_styles(scores)
    page = render(
        "demo.html.j2",
        title=headline(f"The {variant(TUNED).label.lower()}", results["base"], results["paired"][TUNED]),
        findings=[
            *details(results["runs"][TUNED], results["base"], results["paired"][TUNED]),
            *(against_control(name, paired) for name, paired in results["against"].items()),
        ],
        cautions=unclear_answers({variant(name).label: score for name, score in scores.items()}),
        pictures=results["base"]["chair"]["n"],
        seed=results["provenance"]["seed"],
        models=[(variant(name).label, style) for name, style in styles.items()],
        chart=chart(scores, styles),
        table=score_table(scores, results["paired"], styles),
        groups=example_groups(out, data, runs),
        curves=curves({run: read_json(out / "runs" / run / "run.json")["log"] for run in runs}, styles),
        steps=next_steps(out),
        provenance=results["provenance"],
    )
    write_text(out / "report.html", page)
    return out / "report.html"


def chart(scores: Mapping[str, Mapping[str, Any]], styles: Mapping[str, Style]) -> str:
    """Plot CHAIR_i against recall, a point per model."""
    points = {name: measured(score["chair"], "recall", "chair_i") for name, score in scores.items()}
    return tradeoff(points, styles, *axis_labels("chair", "recall", "chair_i"), "lower right")


def score_table(
    scores: Mapping[str, Mapping[str, Any]], paired: Mapping[str, Any], styles: Mapping[str, Style]
) -> ScoreTable:
    columns = [*CAPTION_COLUMNS, *ANSWER_COLUMNS, Column("pope.yes_ratio", "adversarial")]
    return ScoreTable(
        columns,
        [
            Line(
                variant(name).label,
                [column.cell(score, paired.get(name)) for column in columns],
                term=name,
                note=name,
                style=styles[name],
            )
            for name, score in scores.items()
        ],
    )


def next_steps(out: Path) -> list[tuple[str, str]]:
    """Return what to do next, and the command that does it."""
    run, folder = shlex.quote(str(out / "runs" / TUNED)), shlex.quote(str(out))
    answers = [shlex.quote(str(out / "eval" / "test" / name)) for name in ("base", TUNED)]
    return [
        ("Ask the model yourself, beside its base, on a page in the browser", f"relook serve {run} --with-base"),
        ("See all pictures on which the two differ", f"relook report {' '.join(answers)}"),
        (
            "Mine preference pairs from a model's mistakes on your own annotated pictures",
            "relook mine --model MODEL --images PICTURES --annotations coco --out pairs",
        ),
        (
            "Train on them",
            "relook train post-decoder --model_name_or_path MODEL --vg_path pairs "
            "--desc_data_path pairs/desc_data.json --pope_data_path pairs/pope_data.json --output_dir runs/mine",
        ),
        (
            "Vary the settings on this demo's data",
            f"relook sweep toyworld --data {folder}/world/test --vg_path {folder}/world/vg "
            f"--desc_data_path {folder}/pairs/desc_data.json --pope_data_path {folder}/pairs/pope_data.json",
        ),
    ]


# ----------------------------------------------------------------------------------------------------
# Examples, in the order of the test pictures: none is picked for its looks.


def example_groups(out: Path, data: Path, runs: Sequence[str]) -> list[dict[str, Any]]:
    """Return groups of pictures on which base and tuned model differ: captions and answers, better and worse."""
    folders = {name: out / "eval" / "test" / name for name in ("base", *runs)}
    captions = {name: read_eval_captions(folder) for name, folder in folders.items()}
    rows = sorted(differing_captions(data, folders["base"], folders[TUNED]), key=lambda row: str(row["image"]))
    answers = differing_answers(data, folders["base"], folders[TUNED])
    effects = [(row, caption_effects(row)) for row in rows]
    helped = [row for row, of_row in effects if all(effect.helps for effect in of_row)]
    broken = [row for row, of_row in effects if not all(effect.helps for effect in of_row)]
    writer = _Cards(data, captions, load_model(out / "runs" / TUNED))
    total = len(captions["base"])
    return [
        {
            "title": "Captions: where tuning helps",
            "text": f"On {len(helped)} of {total} pictures the tuned model invents less or finds more, and nothing "
            f"is lost. {_first(len(helped), CAPTION_CARDS)}",
            "cards": [writer.caption(row) for row in helped[:CAPTION_CARDS]],
            "small": False,
        },
        {
            "title": "Captions: where tuning breaks something",
            "text": f"On {len(broken)} of {total} pictures the tuned model loses an object that is there, or invents "
            f"one. {_first(len(broken), CAPTION_CARDS)}",
            "cards": [writer.caption(row) for row in broken[:CAPTION_CARDS]],
            "small": False,
        },
        *_answer_groups(writer, answers),
    ]


def _first(count: int, shown: int) -> str:
    return f"The first {shown} of the test set are shown." if count > shown else ""


def _answer_groups(writer: _Cards, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    groups = []
    for helps, title in ((True, "Answers that became right"), (False, "Answers that became wrong")):
        chosen = [row for row in rows if any(effect.helps == helps for effect in answer_effect(row["right"]))]
        images = by_image(chosen)
        groups.append(
            {
                "title": f"Yes/no: {title.lower()}",
                "text": f"{len(chosen)} distinct questions on {len(images)} pictures. "
                f"{_first(len(images), ANSWER_CARDS)}",
                "cards": [writer.answers(image, images[image]) for image in list(images)[:ANSWER_CARDS]],
                "small": True,
            }
        )
    return groups


class _Cards:
    """Builds cards: a picture, what both models say about it, and where the post decoder looked."""

    def __init__(self, data: Path, captions: Mapping[str, Mapping[str, str]], loaded: LoadedModel) -> None:
        self.data, self.captions, self.loaded = data, captions, loaded
        self.truth: Annotations = data_truth(data)
        self.vocabulary: Vocabulary = vocabulary_of(self.truth)

    def caption(self, row: Mapping[str, Any]) -> dict[str, Any]:
        image, first = row["image"], row["captions"]
        tuned_invents = bool(set(row["hallucinated"][1]) - set(row["hallucinated"][0]))
        # The maps explain the base's invented words, or those that only the tuned model invents.
        side = 1 if tuned_invents else 0
        return {
            **self._picture(image),
            "effects": caption_effects(row),
            "texts": [
                (variant(name).label, self._marked(image, text))
                for name, text in zip(("base", TUNED), first, strict=True)
            ],
            "others": [
                (variant(name).label, self._marked(image, texts[image]))
                for name, texts in self.captions.items()
                if name not in ("base", TUNED)
            ],
            "maps": self._maps(image, first[side]),
            "speaker": variant(("base", TUNED)[side]).label.lower(),
        }

    def answers(self, image: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        questions = [
            (row["question"], row["label"], row["answers"], answer_effect(row["right"]), row["splits"]) for row in rows
        ]
        return {**self._picture(image), "questions": questions}

    def _picture(self, image: str) -> dict[str, Any]:
        objects = sorted(self.truth.objects[image])
        source = data_url((coco_images(self.data) / image).read_bytes())
        return {"source": source, "objects": objects, "alt": f"test picture with {', '.join(objects) or 'nothing'}"}

    def _marked(self, image: str, text: str) -> Spans:
        return mark_absent(text, self.truth.objects[image], self.vocabulary)

    def _maps(self, image: str, text: str) -> list[tuple[list[list[float]], str]]:
        """Return a grid of attention weights for each distinct invented word; none without cross-attention."""
        starts: dict[str, int] = {}
        for mention in mentions(text, self.vocabulary):
            if mention.object not in self.truth.objects[image]:
                starts.setdefault(text[mention.start : mention.end], mention.start)
        turns = [Turn(with_image(CHAIR_PROMPT), text)]
        path = coco_images(self.data) / image
        grids = attention_before(self.loaded, path, turns, list(starts.values())) if starts else []
        return list(zip(grids, starts, strict=False))
