"""Sweeps: rows from a file, POPE from trunk states against full generation, interruptions, and what the tables say."""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.command import Command
from helpers.tiny import dpo_keys
from helpers.variants import variants
from torch import Tensor

from relook import LoadedModel, load_model, sweep
from relook.errors import RecipeError, RelookError
from relook.evaluate import pope_from_cache
from relook.evaluate.compare import hallucination_by_divergence, kl_divergence
from relook.evaluate.pope_from_cache import FIRST_FILE, AnswerStates, CachedPope, shares_trunk
from relook.evaluate.run import evaluate_model
from relook.evaluate.tasks.pope import SPLITS
from relook.files import read_json, read_records, write_json
from relook.forward.policy import Policy
from relook.model.load import LoadOptions
from relook.recipe import build_recipe, read_yaml_or_shipped, shipped_names
from relook.report.pages import write_report
from relook.report.sweep_page import sweep_chair_table, sweep_pope_table
from relook.sweep import sweep_command
from relook.sweep_config import build_sweep, expand, row_names
from relook.toyworld.build import shipped_base
from relook.train.feature_cache import TrunkCache
from relook.train.run import train

CPU = LoadOptions(device="cpu")
RunOf = Callable[[str], Path]
COUNTS = ("tp", "fp", "tn", "fn")


def keys_of(world: Path, out: Path, **keys: Any) -> dict[str, Any]:
    """A sweep over that world's pairs, two steps a row."""
    recipe = dpo_keys(shipped_base(), world, out, max_steps=2, learning_rate=5e-3)
    common = {"recipe": "toyworld-post-decoder", "data": world / "test", "max_new_tokens": 12, "rows": [{}]}
    return {**{key: value for key, value in recipe.items() if key != "task"}, **common, **keys}


# --- rows


def test_every_row_with_every_combination() -> None:
    expanded = expand([{"beta": 1}, {"beta": 2}], {"seed": [0, 1], "learning_rate": [1e-3]})
    assert expanded == [
        {"beta": 1, "seed": 0, "learning_rate": 1e-3},
        {"beta": 1, "seed": 1, "learning_rate": 1e-3},
        {"beta": 2, "seed": 0, "learning_rate": 1e-3},
        {"beta": 2, "seed": 1, "learning_rate": 1e-3},
    ]
    assert expand([], {"a": [1, 2], "b": ["x", "y"]}) == [{"a": a, "b": b} for a in (1, 2) for b in ("x", "y")]
    assert expand([{"a": 1}], {}) == [{"a": 1}]
    assert expand([{}], {}) == [{}]
    assert expand([], {}) == []


def test_names_tell_rows_apart() -> None:
    rows: list[dict[str, Any]] = [
        {"learning_rate": "2e-6", "seed": 1, "beta": 0.1, "post_decoder.attention": "none"},
        {"learning_rate": 1e-6, "seed": 2, "beta": 0.1, "post_decoder.attention": "self_cross"},
    ]
    assert row_names(rows) == [
        ("learning_rate=2e-06,seed=1,attention=none", "learning_rate=2e-06,attention=none"),
        ("learning_rate=1e-06,seed=2,attention=self_cross", "learning_rate=1e-06,attention=self_cross"),
    ]
    named = [{"name": "no cross/../attention", "tune_lm_head": True, "seed": seed} for seed in (0, 1)]
    assert row_names(named)[1] == ("no_cross_.._attention,seed=1", "no_cross_.._attention")
    paths = row_names([{"pope_data_path": "a/first.json"}, {"pope_data_path": "b/second.json"}])
    assert [name for name, _ in paths] == ["pope_data_path=first", "pope_data_path=second"]
    assert row_names([{}]) == [("run", "run")]
    long = row_names([{"name": "x" * 300}, {"name": "x" * 299}])
    assert len({name for name, _ in long}) == 2
    assert all(len(name) <= 100 for name, _ in long)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"grid": {"learning_rat": [1]}}, "learning_rate"),
        ({"grid": {"learning_rate": ["fast"]}}, "'fast'"),
        ({"grid": {"post_decoder.attention": ["none", "crosss"]}}, "crosss"),
        ({"grid": {"lr_scheduler_type": ["cosinus"]}}, "cosinus"),
        ({"grid": {"learning_rate": 1e-3}}, "grid.learning_rate is 0.001, but .* lists of values"),
        ({"grid": {"seed": []}}, r"grid.seed is \[\]"),
        ({"rows": []}, "no rows"),
        ({"rows": [], "grid": {}}, "no rows"),
        ({"rows": [{"max_steps": 1}]}, "No step would have a learning rate above 0"),
        ({"rows": {"seed": 1}}, "list of mappings"),
        ({"rows": [{"seed": 1}], "grid": {"seed": [1, 2]}}, "rows and in grid"),
        ({"rows": [{"seed": 1}, {"seed": 1}]}, "Several rows of the sweep are called"),
        ({"rows": [{"name": "base"}]}, "base"),
        ({"rows": [{"recipe": "toyworld-heat"}]}, "toyworld-head"),
        ({"rows": [{"recipe": "toyworld-head", "model_name_or_path": "a"}, {"seed": 1}]}, "model_name_or_path"),
        ({"grid": {"chair": [True, False]}}, "chair"),
        ({"grid": {"pope_data_path": ["lost.json"]}}, "lost.json"),
        ({"data": "nowhere"}, "nowhere"),
        ({"dtype": "float17"}, "float17"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"recipe": ""}, "recipe"),
    ],
    ids=str,
)
def test_mistakes_are_found_before_anything_runs(
    keys: dict[str, Any], said: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CachedPope, "evaluate", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr(sweep, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(RelookError, match=said):
        sweep.run_sweep(keys_of(world, tmp_path / "out", **keys))


def test_what_a_row_reads_must_be_there(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of SFT its images, too; of parquet pairs the image folder is where they are written."""
    monkeypatch.setattr(CachedPope, "evaluate", lambda *_: pytest.fail("asked"))
    common = {
        "recipe": "toyworld-base",
        "model_name_or_path": shipped_base(),
        "data": world / "test",
        "image_folder": tmp_path / "lost",
        "rows": [{}],
    }
    data = world / "llava" / "toyworld_mix.json"
    with pytest.raises(RecipeError, match=r"image_folder .*lost of run does not exist"):
        sweep.run_sweep({**common, "data_path": data, "output_dir": tmp_path / "sft"})
    values = {**keys_of(world, tmp_path / "pairs"), "image_folder": tmp_path / "new", "pairs_path": tmp_path}
    for key in ("vg_path", "desc_data_path", "pope_data_path"):
        del values[key]
    sweep.claim_sweep_dir(build_sweep(values), values)


def test_a_folder_of_something_else_is_refused(world: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match="something else"):
        sweep.run_sweep(keys_of(world, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", shipped_names("sweep"))
def test_shipped_sweeps_are_sound(name: str) -> None:
    sweep_config = build_sweep({**read_yaml_or_shipped(name, "sweep"), "model_name_or_path": str(shipped_base())})
    assert len(sweep_config.rows) == {"ablations": 24, "toyworld": 12}[name]
    assert len({row.name for row in sweep_config.rows}) == len(sweep_config.rows)


# --- POPE from trunk states

REGIMES: dict[str, dict[str, Any]] = {
    "head": {"tune_lm_head": True},
    "post decoder": {"tune_post_decoder": True, "post_decoder": {"depth": 2}},
    "both": {"tune_post_decoder": True, "tune_lm_head": True},
    "no cross-attention": {"tune_post_decoder": True, "post_decoder": {"attention": "none"}},
    "self_cross": {"tune_post_decoder": True, "post_decoder": {"attention": "self_cross"}},
    "lora": {"lora_enable": True, "lora_r": 4},
}


@pytest.fixture(scope="module")
def run_of(world: Path, tmp_path_factory: pytest.TempPathFactory) -> RunOf:
    """Return the run of a regime, trained when it is first wanted: steps enough to change answers of the base."""
    root = tmp_path_factory.mktemp("runs")

    @functools.cache
    def trained(regime: str) -> Path:
        if regime == "base":
            return shipped_base()
        TrunkCache.current = None
        keys = dpo_keys(shipped_base(), world, root / regime, max_steps=5, learning_rate=3e-2, **REGIMES[regime])
        run = train(build_recipe(keys))
        TrunkCache.current = None
        return run

    return trained


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the base's states are computed once."""
    return tmp_path_factory.mktemp("states")


def engine_of(base: Path, world: Path, folder: Path) -> CachedPope:
    return CachedPope(base, world / "test", folder / "states.safetensors", "llava_hf", CPU, 32)


@pytest.mark.parametrize(
    "words",
    variants([pope_from_cache.DECISIVE_MARGIN, ("Yes",)], [("Yes",)]),
    ids=["decided by yes and no", "by yes alone"],
)
def test_scores_are_those_of_full_generation(
    words: Sequence[str], run_of: RunOf, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pope_from_cache, "DECISIVE_MARGIN", words)
    engine = engine_of(run_of("base"), world, tmp_path)
    engine.evaluate(run_of("base"), tmp_path / "base")
    engine.release()
    seen = set()
    every = "No" in words
    for name in ("base", *REGIMES) if every else ("base", "both", "lora"):  # one trunk is shared, another is not
        run, generated = run_of(name), tmp_path / f"{name} generated"
        evaluate_model(run, ["pope"], world / "test", generated, "llava_hf", loading=CPU)
        if name != "base":
            engine.evaluate(run, tmp_path / name)
        scores = read_json(tmp_path / name / "pope.json")
        expected = read_json(generated / "pope.json")
        for split in SPLITS:
            full = expected[split]
            assert {k: scores[split][k] for k in full} == full, name
            records = read_records(generated / f"pope_{split}.jsonl")
            undecided = sum(not record["answer"].startswith(tuple(words)) for record in records)
            assert scores[split]["generated"] == undecided, name
        seen.add(tuple(expected["adversarial"][count] for count in COUNTS))
    assert len(seen) > 3 or not every  # the regimes answer differently


@pytest.mark.slow
def test_a_base_that_answers_anything_is_generated_in_full(base: Path, world: Path, tmp_path: Path) -> None:
    scores = engine_of(base, world, tmp_path).evaluate(base, tmp_path / "states")
    evaluate_model(base, ["pope"], world / "test", tmp_path / "whole", "llava_hf", loading=CPU)
    for split in SPLITS:
        assert scores[split]["generated"] == scores[split]["n"] > 0
        first, second = (read_records(tmp_path / folder / f"pope_{split}.jsonl") for folder in ("states", "whole"))
        assert first == second


def next_token(loaded: LoadedModel, image: Path, text: str) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = loaded.model(**loaded.encode([image], text, "llava_hf")).logits[0, -1]
    return logits.log_softmax(-1)


@pytest.mark.parametrize("name", variants(REGIMES, {"self_cross", "lora"}))
def test_first_tokens_are_the_models_own(name: str, run_of: RunOf, world: Path, states: Path, tmp_path: Path) -> None:
    """Log-probs against a plain forward pass, and the divergence against torch's."""
    run, base = run_of(name), run_of("base")
    engine = engine_of(base, world, states)
    log_probs = torch.cat(list(engine.log_probs(run, lambda: load_model(run))))
    engine.evaluate(run, tmp_path / "out")
    records = read_records(tmp_path / "out" / FIRST_FILE)
    assert len(records) == len(log_probs) == len(engine.prompts.questions)
    assert sum(record["kl"] for record in records) > 0
    tuned_model, base_model = load_model(run), load_model(base)
    for index in (0, 7, len(log_probs) - 1):
        question = engine.prompts.questions[index]
        tuned = next_token(tuned_model, question.image, question.text)
        untuned = next_token(base_model, question.image, question.text)
        torch.testing.assert_close(log_probs[index], tuned, atol=2e-4, rtol=1e-5)
        kl = F.kl_div(untuned, tuned, log_target=True, reduction="sum").item()
        assert records[index]["kl"] == pytest.approx(kl, abs=1e-4, rel=1e-3)


@pytest.mark.parametrize("name", variants(REGIMES, {"both", "lora"}))
def test_only_what_has_the_bases_trunk_shares_it(name: str, run_of: RunOf, base: Path) -> None:
    assert shares_trunk(run_of(name), run_of("base")) == (name != "lora")
    assert not shares_trunk(run_of(name), base)


def test_a_run_that_is_shown_other_images_needs_a_pass_of_its_own(
    run_of: RunOf, world: Path, states: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    padded, run = tmp_path / "padded", run_of("both")
    shutil.copytree(run, padded)
    write_json(padded / "change.json", {**read_json(padded / "change.json"), "image_aspect_ratio": "pad"})
    engine = engine_of(run_of("base"), world, states)
    monkeypatch.setattr(CachedPope, "_live", lambda self, loaded: loaded.images.aspect_ratio)
    monkeypatch.setattr(CachedPope, "_from_states", lambda *_: "the base's")
    assert engine.log_probs(padded, lambda: load_model(padded)) == "pad"
    assert engine.log_probs(run, lambda: load_model(padded)) == "the base's"


def test_generation_settings_that_steer(world: Path, tmp_path: Path) -> None:
    engine = engine_of(shipped_base(), world, tmp_path)
    assert {*engine.decisive.values()} == {"Yes", "No"}
    token = next(token for token, word in engine.decisive.items() if word == "No")
    for change, expected in (({"suppress_tokens": [token]}, {"Yes"}), ({"repetition_penalty": 1.2}, set())):
        other = engine_of(shipped_base(), world, tmp_path)
        for name, value in change.items():
            setattr(other.loaded.model.generation_config, name, value)
        assert {*other.decisive.values()} == expected


def test_states_are_kept_until_something_changes(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    shutil.copytree(world / "test", tmp_path / "world" / "test")
    world = tmp_path / "world"
    compute = CachedPope._compute

    def counted(engine: CachedPope, policy: Policy) -> AnswerStates:
        passes.append(1)
        return compute(engine, policy)

    monkeypatch.setattr(CachedPope, "_compute", counted)
    first = engine_of(shipped_base(), world, tmp_path).states
    again = engine_of(shipped_base(), world, tmp_path).states
    assert len(passes) == 1
    assert again.features is not None
    assert first.features is not None
    for old, new in ((first.states, again.states), (first.features, again.features)):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
    engine = engine_of(shipped_base(), world, tmp_path)
    image, other_image = (engine.prompts.examples[i].images[0] for i in (0, 1))
    stat = image.stat()
    image.write_bytes(other_image.read_bytes())
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # by its content, not its time
    assert engine.states is not None
    assert len(passes) == 2
    other = engine_of(shipped_base(), world, tmp_path)
    other.settings = replace(other.settings, template="v1")
    assert other.states is not None
    assert len(passes) == 3
    (tmp_path / "states.safetensors").write_bytes(b"torn")
    assert engine_of(shipped_base(), world, tmp_path).states is not None
    assert len(passes) == 4


def test_divergence_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert kl_divergence(p.log(), q.log()).tolist() == pytest.approx([expected, 0], abs=1e-7)
    tuned = [{"label": "no", "kl": kl, "answer": said} for kl, said in ((0.0, "Yes"), (5e-4, "No"), (0.5, "Yes"))]
    other = [{"label": "no", "kl": 0.0, "answer": said} for said in ("Yes", "Yes", "No")]
    kept = [{"label": "yes", "kl": 0.0, "answer": "Yes"}]
    bins = hallucination_by_divergence([*tuned, *kept], [*other, *kept])
    assert [found["n"] for found in bins] == [2, 0, 0, 1, 0]
    assert (bins[1]["rate"], bins[1]["base_rate"]) == (None, None)
    assert (bins[0]["rate"], bins[0]["base_rate"]) == (0.5, 1.0)
    assert (bins[3]["rate"], bins[3]["base_rate"]) == (1.0, 0.0)


# --- whole sweeps

ROWS: dict[str, Any] = {
    "rows": [{"name": "cross"}, {"name": "head", "recipe": "toyworld-head"}],
    "grid": {"seed": [0, 1]},
    "chair": True,
}
NAMES = ["cross,seed=0", "cross,seed=1", "head,seed=0", "head,seed=1"]


@pytest.fixture
def alone() -> Iterator[None]:
    TrunkCache.current = None
    yield
    TrunkCache.current = None


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    TrunkCache.current = None
    out = tmp_path_factory.mktemp("sweep") / "out"
    assert sweep.run_sweep(keys_of(world, out, **ROWS)) == out / "report.html"
    TrunkCache.current = None
    return out


def test_a_sweep_leaves_a_run_and_scores_for_every_row(whole: Path) -> None:
    results = read_json(whole / "results.json")
    assert [row["name"] for row in results["rows"]] == NAMES
    for row in results["rows"]:
        assert (whole / "runs" / row["name"] / "run.json").exists()
        for bench in ("pope", "chair"):
            scores = read_json(whole / "eval" / row["name"] / f"{bench}.json")
            assert scores.pop("provenance")["model_hash"]
            assert row[bench] == scores
        p = [other["paired"]["pope"]["random"]["mcnemar_p"] for other in results["rows"]]
        assert row["paired"]["pope"]["random"]["mcnemar_p_holm"] >= min(p)
    base = read_json(whole / "eval" / "base" / "pope.json")
    assert results["base"]["pope"] == {split: base[split] for split in SPLITS}
    assert [row["regime"] for row in results["rows"]] == ["post decoder"] * 2 + ["head"] * 2
    for group, pair in zip(results["over_seeds"], (NAMES[:2], NAMES[2:]), strict=True):
        values = [read_json(whole / "eval" / name / "pope.json")["popular"]["f1"] for name in pair]
        f1 = group["pope"]["popular"]["f1"]
        assert f1["mean"] == pytest.approx(sum(values) / 2)
        assert f1["sd"] == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))  # n - 1 = 1


def test_the_table_has_the_files_numbers(whole: Path) -> None:
    lines = [line.strip("| \n").split(" | ") for line in (whole / "table.md").read_text().splitlines() if "|" in line]
    head = lines[0]
    assert head[:8] == ["Model", "Variant", "Method", "Regime", "lr", "Epoch", "Seed", "Split"]
    assert head[8:13] == ["Accuracy", "Precision", "Recall", "F1", "Yes ratio"]
    for number, name in enumerate(["base", *NAMES]):
        for place, split in enumerate(SPLITS):
            line = dict(zip(head, lines[2 + 3 * number + place], strict=False))
            scores = read_json(whole / "eval" / name / "pope.json")[split]
            assert line["Split"] == split
            assert line["Accuracy"] == f"{100 * scores['accuracy']:.2f}"
            assert line["Yes ratio"] == f"{100 * scores['yes_ratio']:.2f}"
            if name != "base":
                assert (line["lr"], line["Method"]) == ("0.005", "DPO + NLL")
    page = (whole / "report.html").read_text()
    assert "<svg" in page
    assert "src=" not in page
    assert "http:" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )


def test_a_rate_of_nothing_is_a_dash_in_the_tables(whole: Path) -> None:
    results = read_json(whole / "results.json")
    row = results["rows"][0]
    results["base"]["pope"]["random"]["precision"] = results["base"]["chair"]["chair_i"] = None
    row["paired"]["chair"]["chair_i"] = {"difference": None, "ci": None}
    head, base, *_ = sweep_pope_table(results)
    assert dict(zip(head, base, strict=True))["Precision"] == "–"
    head, base, first, *_ = sweep_chair_table(results)
    assert dict(zip(head, base, strict=True))["CHAIR_i"] == dict(zip(head, first, strict=True))["CHAIR_i − base"] == "–"
    seeds = sweep.aggregate_seeds([{**row, "seed": seed} for seed in (0, 1)])
    row["pope"]["random"]["precision"] = None
    assert seeds[0]["pope"]["random"]["precision"]["sd"] == 0
    assert sweep.aggregate_seeds([row, row])[0]["pope"]["random"]["precision"] == {"mean": None, "sd": None}


def test_the_report_can_be_written_again(whole: Path) -> None:
    table = (whole / "table.md").read_text()
    (whole / "table.md").write_text("lost")
    assert write_report(whole) == whole / "report.html"
    assert (whole / "table.md").read_text() == table


def test_a_finished_sweep_trains_and_asks_nothing(whole: Path, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "train", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(CachedPope, "evaluate", lambda *_: pytest.fail("asked"))
    before = (whole / "results.json").read_bytes()
    sweep.run_sweep(keys_of(world, whole, **ROWS))
    assert (whole / "results.json").read_bytes() == before


@pytest.mark.slow  # a run and an evaluation that were stopped go on in tests of their own
def test_a_stopped_sweep_goes_on_where_it_was(
    whole: Path, world: Path, tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    real = sweep.train

    def stopping(recipe: Any, *rest: Any) -> Path:
        if len(trained) == 2:
            trained.append("stopped")
            raise KeyboardInterrupt
        trained.append(Path(recipe.output_dir).name)
        return real(recipe, *rest)

    monkeypatch.setattr(sweep, "train", stopping)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        sweep.run_sweep(keys_of(world, out, **ROWS))
    assert not (out / "results.json").exists()
    TrunkCache.current = None  # as in a process of its own
    sweep.run_sweep(keys_of(world, out, **ROWS))
    assert trained == [*NAMES[:2], "stopped", *NAMES[2:]]
    assert read_json(out / "results.json") == read_json(whole / "results.json")


@pytest.mark.slow
def test_a_row_that_diverges_does_not_stop_the_others(world: Path, tmp_path: Path, alone: None) -> None:
    keys = keys_of(
        world, tmp_path / "out", grid={"learning_rate": [1e38, 1e-3]}, recipe="toyworld-head", warmup_steps=0
    )
    sweep.run_sweep(keys)
    results = read_json(tmp_path / "out" / "results.json")
    assert [row["learning_rate"] for row in results["rows"]] == [1e-3]
    assert "loss is nan" in results["failed"]["learning_rate=1e+38"]
    assert "learning_rate=1e+38 failed: The loss is nan" in (tmp_path / "out" / "table.md").read_text()
    with pytest.raises(RelookError, match="No row"):
        sweep.run_sweep({**keys, "output_dir": str(tmp_path / "none"), "grid": {"learning_rate": [1e38]}})


def test_the_command(world: Path, tmp_path: Path, alone: None, relook: Command) -> None:
    keys = {key: str(value) if isinstance(value, Path) else value for key, value in keys_of(world, tmp_path).items()}
    keys |= {"output_dir": "elsewhere", "recipe": "toyworld-head"}
    (tmp_path / "mine.yaml").write_text(json.dumps(keys))  # JSON is YAML
    out = tmp_path / "out"
    words = [str(tmp_path / "mine.yaml"), "--output_dir", str(out), "--grid.learning_rate", "[1e-3, 2.0e-3]"]
    assert relook("sweep", *words).status == 0
    rows = read_json(out / "results.json")["rows"]
    assert [row["learning_rate"] for row in rows] == [1e-3, 2e-3]
    assert "chair" not in rows[0]
    with pytest.raises(RecipeError, match="toyworld"):
        sweep_command(["toyword"])
