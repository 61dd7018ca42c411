"""What reports say: sentences from differences, marked tables, plots and attention maps that can be read."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from relook.report import findings
from relook.report.examples import caption_effects, in_turn
from relook.report.pages import facts, heat, render
from relook.report.plots import FONT, against_rate, curves, line_styles, measured, tradeoff
from relook.report.tables import Column, Line, ScoreTable, bracket, change, decimal, verdict
from relook.report.terms import GLOSSARY

EVIL = "<script>$x_1$ --> & \\foo{"


def difference(value: float | None, low: float = 0.0, high: float = 0.0) -> dict[str, Any]:
    return {"difference": value, "ci": None if value is None else [low, high]}


UP, DOWN, UNCLEAR = difference(0.04, 0.01, 0.07), difference(-0.2, -0.25, -0.15), difference(0.01, -0.02, 0.04)
BASE = {"chair": {"chair_i": 0.25, "recall": 0.72}}


def paired(invented: Any, found: Any, answers: Any) -> dict[str, Any]:
    splits = ("random", "popular", "adversarial")
    return {"chair": {"chair_i": invented, "recall": found}, "pope": dict.fromkeys(splits, answers)}


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        (
            (DOWN, UNCLEAR, UP),
            "It invents 80 % fewer objects in its captions and answers more adversarial questions right",
        ),
        (
            (DOWN, DOWN, UNCLEAR),
            "It invents 80 % fewer objects in its captions and finds fewer of those that are there",
        ),
        ((UNCLEAR, UNCLEAR, UNCLEAR), "It shows no clear change in invented objects"),
        (
            (UP, UNCLEAR, DOWN),
            "It invents 16 % more objects in its captions and answers fewer adversarial questions right",
        ),
        (
            (difference(None), UNCLEAR, UNCLEAR),
            "It cannot be judged by invented objects, as captions of one or both name none",
        ),
    ],
)
def test_a_headline_says_what_the_intervals_allow(differences: tuple[Any, Any, Any], expected: str) -> None:
    assert findings.headline("It", BASE, paired(*differences)) == expected


def test_answers_alone_have_a_headline() -> None:
    answers = {"pope": paired(DOWN, UP, UNCLEAR)["pope"]}
    assert findings.headline("It", {}, answers) == "It shows no clear change in answers to adversarial questions"


def test_details_have_signs_intervals_and_verdicts() -> None:
    now = {"chair": {"chair_i": 0.05, "recall": 0.73}}
    first, second, third = findings.details(now, BASE, paired(DOWN, UNCLEAR, UP))
    assert "5.0 % instead of 25.0 %" in first
    assert "(−20.0 points [−25.0, −15.0], better)" in first
    assert "(+1.0 points [−2.0, +4.0], no clear change)" in second
    assert third.startswith("Right answers to yes/no questions: adversarial +4.0 points [+1.0, +7.0], better; popular")


def test_captions_that_name_nothing_have_no_share_of_inventions() -> None:
    silent = {"chair": {"chair_i": None, "recall": 0.0}}
    sentences = [
        findings.details(now, before, paired(difference(None), UNCLEAR, UNCLEAR))[0]
        for now, before in ((silent, silent), (silent, BASE), (BASE, silent))
    ]
    assert sentences == [
        "The model's and the reference's captions name no object.",
        "The model's captions name no object; of the reference's objects, 25.0 % are not in the picture.",
        "The reference's captions name no object; of the model's objects, 25.0 % are not in the picture.",
    ]


@pytest.mark.parametrize(
    ("invented", "answers", "conclusion"),
    [
        (UNCLEAR, UNCLEAR, "adds nothing that this test can see"),
        (DOWN, UP, "helps by both measures"),
        (UNCLEAR, UP, "helps by one measure of two, which is no proof that it helps"),
        (UP, UNCLEAR, "does harm by one measure of two"),
        (UP, UP, "helps by one measure and does harm by the other"),
        (difference(None), UP, "cannot be judged by both measures"),
    ],
)
def test_the_control_is_judged_by_both_measures_and_one_seed(invented: Any, answers: Any, conclusion: str) -> None:
    sentence = findings.against_control("nll_control", paired(invented, UP, answers))
    assert f"The preference term, with this one seed, {conclusion}" in sentence


def test_many_unclear_answers_are_a_caution() -> None:
    def split(unclear: int) -> dict[str, Any]:
        return {"pope": {"random": {"unclear": unclear, "n": 100}, "provenance": {}}, "chair": {"n": 100}}

    assert findings.unclear_answers({"A": split(5), "B": split(0)}) == []
    assert findings.unclear_answers({"A": split(5), "B": split(6)}) == [
        "Unclear yes/no answers: 6 of 100 of B. Do not trust their rates."
    ]
    assert findings.unclear_answers({"POPE": split(6)["pope"]})  # of one benchmark
    assert findings.unclear_answers({"CHAIR": {"n": 100}}) == []


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(0.1, 0.2), (-0.1, 0.9), (0, 0.01)], "None of 3 variants clearly changes how many adversarial questions"),
        (
            [(0.1, 0.01), (-0.1, 0.01)],
            "Of 2 variants, 1 answers more adversarial questions right than the base, 1 fewer",
        ),
        ([(-0.1, 0.01), (-0.1, 0.01)], "Of 2 variants, 2 answer fewer adversarial questions right than the base"),
    ],
)
def test_a_sweeps_headline_counts_corrected_p_values(rows: list[tuple[float, float]], expected: str) -> None:
    results = [
        {"paired": {"pope": {"adversarial": {**difference(d, 0.5 * d, 2 * d), "mcnemar_p_holm": p}}}} for d, p in rows
    ]
    assert findings.sweep_headline(results).startswith(expected)


def test_verdicts_follow_the_direction_of_the_metric() -> None:
    assert [verdict(DOWN, better) for better in (1, -1, 0)] == ["worse", "better", "changed"]
    assert verdict(difference(0.1, 0.0, 0.2), 1) == "no clear change"
    assert verdict(difference(None), 1) == "undefined"


def test_a_difference_is_clear_where_interval_and_corrected_p_value_agree() -> None:
    clear = [
        verdict({**UP, **p}, 1) == "better"
        for p in ({"mcnemar_p": 0.04}, {"mcnemar_p": 0.05}, {"mcnemar_p": 0.01, "mcnemar_p_holm": 0.06})
    ]
    assert clear == [True, False, False]
    assert verdict({**UNCLEAR, "mcnemar_p": 0.01}, 1) == "no clear change"


def test_numbers_as_people_write_them() -> None:
    assert change(DOWN) == "−20.0 [−25.0, −15.0]"
    assert (decimal(None), decimal(-0.0001, 100), decimal(0.5, 100, "+")) == ("–", "0.0", "+50.0")
    assert bracket(None) == ""
    assert bracket([-0.26, -0.04]) == "[−0.26, −0.04]"  # not −0.0: it excludes 0
    assert bracket([-0.26, 0.0]) == "[−0.3, 0.0]"


def test_the_best_value_depends_on_the_metric() -> None:
    columns = [Column("chair.chair_i"), Column("chair.recall"), Column("chair.length")]
    scores = [{"chair": dict.fromkeys(("chair_i", "recall", "length"), value)} for value in (0.1, 0.2)]
    table = ScoreTable(
        columns, [Line(str(i), [column.cell(side) for column in columns]) for i, side in enumerate(scores)]
    )
    assert [table.best(index) for index in range(3)] == [0.1, 0.2, None]
    assert ScoreTable(columns[:1], table.lines[:1]).best(0) is None  # the only one is not the best


def test_gains_and_losses_of_a_caption() -> None:
    row = {"hallucinated": [["dog", "dog", "cat"], ["dog", "cup"]], "named": [["bed"], ["book"]]}
    assert [(effect.helps, effect.text) for effect in caption_effects(row)] == [
        (True, "invents less: cat, dog"),
        (True, "now finds: book"),
        (False, "invents: cup"),
        (False, "loses what is there: bed"),
    ]
    gain = {"hallucinated": [["dog"], []], "named": [[], []]}
    assert in_turn([gain, gain, row]) == [row, gain, gain]


class SVG(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_one_point_is_drawn() -> None:
    """A run with one log line has a marker, since a line through one point is invisible."""
    styles = line_styles(["a", "b"])
    (one,) = curves({"a": [{"epoch": 1.0, "loss": 0.5}], "b": []}, styles)
    (two,) = curves({"a": [{"epoch": 1.0, "loss": 0.5}, {"epoch": 2.0, "loss": 0.4}], "b": []}, styles)
    color = styles["a"].color
    assert any(tag == "use" and color in str(attributes) for tag, attributes in SVG(one).tags)
    assert not any(tag == "use" and color in str(attributes) for tag, attributes in SVG(two).tags)


def test_plots_are_legible_on_a_phone_and_escaped() -> None:
    styles = line_styles([EVIL])
    panels = against_rate({EVIL: {EVIL: [(1e-4, 50.0)]}}, {EVIL: 40.0}, styles)
    scores = {"recall": 0.5, "chair_i": 0.2, "recall_ci": [0.4, 0.6], "chair_i_ci": [0.1, 0.3]}
    nothing = measured({"recall": None, "chair_i": 0.1}, "recall", "chair_i")
    points = {"base": nothing, EVIL: measured(scores, "recall", "chair_i")}
    panels.append(tradeoff(points, styles, EVIL, EVIL, "lower right"))
    for panel in panels:
        svg = SVG(panel)
        root = dict(svg.tags[0][1])
        assert float(str(root["width"]).removesuffix("pt")) * 96 / 72 <= 360  # not shrunk at 390 pixels
        sizes = [float(size) for size in re.findall(r"font[^\"]*?([0-9.]+)px", panel)]
        assert sizes
        assert min(sizes) * 96 / 72 >= 11  # units of the drawing are points
        assert min(sizes) == FONT
        assert root["role"] == "img"
        assert root["aria-label"]
        assert "script" not in {tag for tag, _ in svg.tags}
        assert EVIL in svg.text


def test_a_heat_layer_is_smooth_and_leaves_the_rest_as_it_is() -> None:
    grid = np.zeros((6, 6))
    grid[0, 5] = 0.7
    opacity = _opacity(grid)
    assert opacity.argmax() % 64 > 50
    assert opacity.argmax() // 64 < 13
    assert opacity.max() == 204
    assert opacity[32:, :32].max() == 0
    assert abs(np.diff(opacity, axis=1)).max() < 50  # no edges of patches
    assert _opacity(np.zeros((6, 6))).max() == 0  # a map of nothing has no strongest place
    assert 40 < _opacity(np.full((6, 6), 1 / 36)).max() < 60  # nor has an even one


def _opacity(grid: Any) -> Any:
    data = heat(grid.tolist()).removeprefix("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA"))[..., 3].astype(int)


def test_provenance_is_a_list() -> None:
    nested = {"a_b": {"c": [1, {"d": None}], "e": {}}, "f": True, "g": 1234}
    assert facts(nested) == [("a b", [("c", "1; d none"), ("e", "none")]), ("f", "yes"), ("g", "1,234")]


def test_every_term_is_explained_where_it_stands() -> None:
    nothing: dict[str, Any] = {
        "description_count": 0,
        "question_count": 0,
        "descriptions": [],
        "questions": [],
        "steps": [],
    }
    page = render("pairs.html.j2", title="t", kind="descriptions", **nothing)
    tags = SVG(page).tags
    explained = {attributes["id"] for tag, attributes in tags if "popover" in attributes}
    assert explained == {f"term-{key}" for key in GLOSSARY}
    assert page.lstrip().startswith("<!doctype html><html lang=en>")
    assert sum(tag == "h1" for tag, _ in tags) == 1
