"""What commands say: help, mistakes, completion, tables, log lines, and the package that carries them."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from helpers.command import Command
from helpers.tiny import sft_keys

import relook as package
from relook.cli import options
from relook.cli.command import print_result
from relook.data.convert import PAIR_LAYOUTS
from relook.data.layouts import LAYOUTS
from relook.evaluate.llava_bench import SUBMISSIONS
from relook.evaluate.tasks.pope import PARSERS
from relook.files import write_json
from relook.flags import IGNORED, UNSUPPORTED
from relook.mine.pictures import KINDS
from relook.model.export import WRITERS
from relook.recipe import Recipe, build_recipe, load_recipe, read_yaml_or_shipped, shipped_names
from relook.recipe_help import TRAINING_SECTION, describe_keys, shipped_description, shipped_recipes
from relook.report.score_table import find_evaluations, print_scores, score_rows, write_table
from relook.train.run import train
from relook.train.summary import ProgressCallback, run_summary

ROOT = Path(__file__).parents[1]

# --- help, version, completion


def test_the_help_shows_groups_and_the_version(relook: Command) -> None:
    ended = relook("--help")
    panels = ("Start here", "Train", "Evaluate", "Serve", "Data", "Models")
    places = [ended.out.index(f"─ {panel} ─") for panel in panels]
    assert places == sorted(places)
    assert relook("--version").out == f"relook {package.__version__}\n"


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("relook tr", ["train"]),
        ("relook train post", ["post-decoder", "post-decoder-head"]),
        ("relook eval ch", ["chair"]),
        ("relook data check --layout h", ["hadpo"]),
        ("relook score pope --pars", ["--parser"]),
    ],
)
def test_shells_complete_commands_names_and_options(
    words: str, offered: list[str], relook: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_RELOOK_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    assert relook().out.split() == offered


def test_options_know_the_names_of_the_registries() -> None:
    """They are written out there, since the registries' modules take seconds to import."""
    registries = {
        "LAYOUTS": LAYOUTS,
        "PAIR_LAYOUTS": PAIR_LAYOUTS,
        "ANNOTATIONS": KINDS,
        "PARSERS": PARSERS,
        "SUBMISSIONS": SUBMISSIONS,
        "ENGINES": WRITERS,
    }
    for name, registry in registries.items():
        assert [*getattr(options, name)] == [*registry], name


# --- mistakes


def test_every_mistake_of_the_words_is_named_at_once(relook: Command) -> None:
    words = ("pop", "--modl", "nowhere", "--tempreture", "0.1", "--dtype", "float23", "--bits", "5", "--out")
    ended = relook("eval", *words)
    ended.mistakes(
        "no option --modl. Did you mean --model?",
        "no option --tempreture. `relook eval --help`",
        "'--out' requires an argument",
        "no benchmark 'pop'. Did you mean pope?",
        "nowhere does not exist",
        "no dtype 'float23'. Did you mean float32?",
        "--bits is 5",
    )
    assert ended.err.count("\n") == 7
    ended = relook("mine", "--images", "lost", "--annotations", "cocoa", "--exclude", "a", "--exclude", "b")
    ended.mistakes(
        "'--model'", "'--out'", "lost does not", "Did you mean coco?", "a does not exist", "b does not exist"
    )


def test_several_mistakes_of_an_evaluation_are_named_at_once(relook: Command, base: Path, tmp_path: Path) -> None:
    where = ("--model", base, "--out", tmp_path / "out")
    ended = relook("eval", "pope", *where, "--tasks", "mme", "--judge-url", "ftp://judge")
    ended.mistakes("--tasks would do nothing", "--data is missing", "ftp://judge is no address")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("trian",), "no command 'trian'. Did you mean train?"),
        (("--verison",), "--verison"),
        (("data", "chek", "."), "no command 'chek'. Did you mean check?"),
        (("data", "check", ".", "--layout", "pop"), "no layout 'pop'. Did you mean pope?"),
        (("export", ".", "out", "--for", "vlm"), "no engine 'vlm'. Did you mean vllm?"),
        (("recipes", "extra"), "'extra' is too much"),
        (("train", "hadpo_lora", "--help"), "no recipe 'hadpo_lora'. Did you mean hadpo-lora?"),
        (("train", "head", "--tune_lm_haed", "true"), "Did you mean tune_lm_head?"),
        (("estimate", "head", "--gpu", "8"), "no recipe key 'gpu'. Did you mean gpus?"),
        (("report", ".", "--format", "csv"), "--format would do nothing without --table"),
    ],
)
def test_a_mistake_has_the_most_similar_name(relook: Command, words: tuple[str, ...], said: str) -> None:
    ended = relook(*words)
    assert ended.status == 2
    assert said in ended.err


# --- recipes and their keys


def test_every_key_has_a_meaning_a_type_and_a_default() -> None:
    described = {key.name: key for key in describe_keys()}
    own = {field.name for field in dataclasses.fields(Recipe)} - {"post_decoder", "of_the_model", "training", "idle"}
    assert own <= described.keys()
    assert "post_decoder.attention" in described
    assert all(key.meaning for key in described.values() if key.section != TRAINING_SECTION)
    assert described["beta"].default == 0.1
    assert described["task"].kind == "sft | dpo"
    assert described["logging_steps"].default == 10  # relook's
    assert described["learning_rate"].default == 5e-5  # transformers'
    assert not described.keys() & {*IGNORED, *UNSUPPORTED}
    build_recipe(
        {
            "task": "sft",
            "data_path": "d",
            "image_folder": "i",
            "model_name_or_path": "m",
            "output_dir": "o",
            **{name: key.default for name, key in described.items() if key.section == "Loss"},
        }
    )


def test_a_recipes_help_lists_its_keys(relook: Command) -> None:
    ended = relook("train", "hadpo-lora", "--help")
    assert ended.status == 0
    lines = [line.split() for line in ended.out.splitlines()]
    assert ["--lora_r", "int", "128", "*", "rank", "of", "LoRA"] in lines
    assert "Source: HA-DPO (Zhao et al. 2023, arXiv:2311.16839)" in ended.out
    assert "--conversations_per_tree" not in ended.out  # of another task
    other = relook("train", "llava-sft", "--help").out
    assert "--conversations_per_tree" in other
    assert "--beta" not in other


@pytest.mark.parametrize("name", shipped_names("recipe"))
def test_every_recipe_says_its_source_and_draws_a_curve(name: str) -> None:
    what, source = shipped_description(name)
    assert what
    assert source
    assert 1 <= read_yaml_or_shipped(name, "recipe")["logging_steps"] <= 50


def test_recipes_are_listed_as_a_table_or_as_json(relook: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = json.loads(relook("recipes").out)
    assert listed == shipped_recipes()
    assert [line["recipe"] for line in listed] == shipped_names("recipe")
    lora = next(line for line in listed if line["recipe"] == "hadpo-lora")
    assert (lora["trains"], lora["loss"], lora["data"]) == ("LoRA", "DPO", "pairs")


def test_the_recipe_of_llavas_mix_is_its_script_and_trains(base: Path, world: Path, tmp_path: Path) -> None:
    names = ("data_path", "image_folder", "model_name_or_path", "output_dir")
    places = {name: sft_keys(base, world, tmp_path / "run")[name] for name in names}
    recipe = load_recipe("llava-sft", places)
    # LLaVA's scripts/v1_5/finetune.sh, on 8 GPUs
    assert recipe.full
    assert recipe.training["per_device_train_batch_size"] * 8 == 128
    assert [recipe.training[key] for key in ("learning_rate", "warmup_steps", "weight_decay")] == [2e-5, 0.03, 0.0]
    assert (recipe.group_by_modality_length, recipe.image_aspect_ratio, recipe.version) == (True, "pad", "v1")
    short = {"max_steps": 1, "warmup_steps": 0, "dataloader_num_workers": 0, "per_device_train_batch_size": 2}
    out = train(load_recipe("llava-sft", {**places, **short}))
    assert (out / "model.safetensors").exists()  # a whole model


# --- tables and JSON


def test_programs_get_json_and_people_tables(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    shown: list[Any] = []
    print_result({"a": 1}, None, shown.append)
    assert json.loads(capsys.readouterr().out) == {"a": 1}
    print_result({"a": 1}, False, shown.append)  # --text
    assert (capsys.readouterr().out, shown) == ("", [{"a": 1}])
    shown.clear()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_result({"a": 1}, None, shown.append)
    assert (capsys.readouterr().out, shown) == ("", [{"a": 1}])
    print_result({"a": 1}, True, shown.append)
    assert json.loads(capsys.readouterr().out) == {"a": 1}


RATES = {"accuracy": 0.875, "precision": 0.9, "recall": 0.8, "f1": 0.84705, "yes_ratio": 0.45}
POPE = {split: {**RATES, "n": 80} for split in ("random", "popular", "adversarial")}


def test_scores_are_printed_with_their_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    parts = {split: {**rates, "accuracy_ci": [0.8, 0.95]} for split, rates in POPE.items()}
    chair = {"chair_s": 0.48, "chair_s_ci": None, "length": 23.6, "length_ci": [23.1, 24.09], "n": 300}
    mmhal = {"score": 2.5, "score_ci": [2.0, 3.0], "provenance": {"accuracy": 1, "accuracy_ci": [0, 1]}}
    print_scores({"pope": {**parts, "provenance": {}}, "chair": chair, "mmhal": mmhal, "mme": {"answers": 3}})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["POPE", "random", "popular", "adversarial"] in lines
    assert ["accuracy", *(["87.5", "[80.0,", "95.0]"] * 3)] in lines
    assert ["CHAIR_s", "48.0"] in lines
    assert ["length", "23.60", "[23.10,", "24.09]"] in lines
    assert ["score", "2.50", "[2.00,", "3.00]"] in lines
    assert ["mme", "answers:", "3"] in lines


@pytest.fixture
def evaluations(tmp_path: Path) -> list[Path]:
    """Evaluations of a base, of a run on it, and of one of the run's checkpoints."""
    run, base = tmp_path / "runs" / "pd", tmp_path / "llava-1.5-7b-hf"
    checkpoint = run / "checkpoints" / "checkpoint-10"
    keys = {"task": "dpo", "tune_post_decoder": True, "tune_lm_head": True, "nll_weight": 1.0, "learning_rate": 5e-7}
    checkpoint.mkdir(parents=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump({**keys, "model_name_or_path": "x"}))
    write_json(run / "run.json", {"log": [{"loss": 1.0, "epoch": 0.5}, {"train_loss": 1.0, "epoch": 1.0}]})
    write_json(checkpoint / "trainer_state.json", {"epoch": 0.254})
    for folder in (run, checkpoint):
        write_json(folder / "change.json", {"base": str(base)})
    models = {"base": base, "tuned": run, "checkpoint": checkpoint}
    for name, model in models.items():
        write_json(tmp_path / "eval" / name / "eval.json", {"model": str(model), "adapter": None})
        write_json(tmp_path / "eval" / name / "pope.json", {**POPE, "provenance": {}})
    write_json(tmp_path / "eval" / "tuned" / "chair.json", {"chair_i": 0.1, "chair_s": 0.3333})
    return [tmp_path / "eval" / name for name in models]


def test_the_notes_table_is_made_of_any_number_of_evaluations(evaluations: list[Path], tmp_path: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(write_table(evaluations, "csv", None))))
    assert [*rows[0]][:6] == ["Model", "Method", "Regime", "lr", "Epoch", "Split"]
    assert len(rows) == 9
    assert rows[3] == {
        "Model": "llava-1.5-7b-hf",
        "Method": "DPO + NLL",
        "Regime": "post decoder + head",
        "lr": "5e-07",
        "Epoch": "1",
        "Split": "random",
        "Accuracy": "87.50",
        "Precision": "90.00",
        "Recall": "80.00",
        "F1": "84.70",
        "Yes ratio": "45.00",
        "CHAIR_s": "33.33",
        "CHAIR_i": "10.00",
        "Folder": str(evaluations[1]),
    }
    assert (rows[0]["Regime"], rows[0]["lr"], rows[0]["CHAIR_s"]) == ("base", "", "")
    assert (rows[6]["Epoch"], rows[6]["Model"]) == ("0.25", "llava-1.5-7b-hf")
    # RePOPE's splits are lines of their own.
    write_json(evaluations[0] / "repope.json", {"random": {**POPE["random"], "accuracy": 0.5}, "provenance": {}})
    corrected = score_rows(evaluations)[3]
    assert (corrected["Split"], corrected["Accuracy"], corrected["Regime"]) == ("RePOPE random", "50.00", "base")
    # A folder above them gives them all.
    assert {row["Folder"] for row in score_rows(find_evaluations([tmp_path / "eval"]))} == set(map(str, evaluations))


def test_the_notes_table_as_text_markdown_and_file(relook: Command, evaluations: list[Path], tmp_path: Path) -> None:
    text = relook("report", "--table", *evaluations).out
    assert [line.split()[0] for line in text.splitlines()[1::3]] == ["base", "tuned", "checkpoint"]
    assert "87.50" in text
    out = tmp_path / "table.md"
    markdown = relook("report", "--table", *evaluations, "--format", "markdown", "--out", out).out.splitlines()
    assert markdown[1] == "| " + " | ".join(["---"] * 14) + " |"
    assert len(markdown) == 11
    assert out.read_text().splitlines() == markdown
    relook("report", "--table", tmp_path / "runs", ROOT / "docs").mistakes(
        f"{tmp_path / 'runs'} holds no finished evaluation", f"{ROOT / 'docs'} holds no finished evaluation"
    )


def test_the_notes_table_shows_settings_that_differ_and_passes_over_comparisons(
    relook: Command, evaluations: list[Path], tmp_path: Path
) -> None:
    for folder, dtype in zip(evaluations, ("bfloat16", "float32", "float32"), strict=True):
        record = json.loads((folder / "eval.json").read_text())
        write_json(folder / "eval.json", {**record, "dtype": dtype, "template": "v1"})
    write_json(tmp_path / "eval" / "base-tuned" / "comparison.json", {})
    unclear = {"random": {**POPE["random"], "unclear": 50, "n": 100}}
    write_json(evaluations[0] / "pope.json", {**unclear, "provenance": {}})
    shown = relook("report", "--table", "--format", "csv", *sorted((tmp_path / "eval").iterdir()))
    rows = list(csv.DictReader(io.StringIO(shown.out)))
    assert {row["Folder"]: row["dtype"] for row in rows} == {
        str(folder): dtype for folder, dtype in zip(evaluations, ("bfloat16", "float32", "float32"), strict=True)
    }
    assert "template" not in rows[0]
    assert f"50 of 100 of {evaluations[0]}" in shown.err
    relook("report", "--table", tmp_path / "eval" / "base-tuned").mistakes("only comparisons")


def test_a_sweep_ends_in_its_results_or_the_table(
    relook: Command, evaluations: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(tmp_path / "results.json", {"rows": []})
    monkeypatch.setattr("relook.sweep.sweep_command", lambda words: tmp_path / "report.html")
    assert json.loads(relook("sweep", "toyworld").out) == {"rows": []}
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "post decoder + head" in relook("sweep", "toyworld").out


# --- training's lines and summary


def test_a_log_file_gets_a_line_per_log_step(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    shown: list[Any] = []
    callback = ProgressCallback(lambda *report: shown.append(report))
    clock = iter([100.0, 110.0, 150.0])
    monkeypatch.setattr("relook.train.summary.time.monotonic", lambda: next(clock))
    state = SimpleNamespace(global_step=1, max_steps=101)
    callback.on_step_end(None, state, None)  # compiles; does not count
    state.global_step = 6
    callback.on_step_end(None, state, None)
    state.global_step = 11
    line = {"loss": 0.69314, "rewards/margins": 0.0123, "rewards/accuracies": 0.5625, "tokens_per_second": 4210.4}
    callback.on_log(None, state, None, {**line, "peak_memory_gib": 17.26})
    callback.on_log(None, state, None, {"eval_loss": 0.5, "eval_rewards/accuracies": 0.75})
    # 10 steps in 50 s: 90 more take 450 s.
    assert capsys.readouterr().err.splitlines() == [
        "  step 11/101: loss 0.6931, margin 0.012, accuracy 0.56, 4,210 tokens/s, 17.3 GiB, 7 min 30 s left",
        "  step 11/101, held out: loss 0.5000, accuracy 0.75",
    ]
    assert shown[0] == (1, 101, "")


def test_a_summary_says_what_was_trained_and_what_to_do_next(tmp_path: Path) -> None:
    places = {"task": "dpo", "model_name_or_path": "m", "vg_path": "v", "pope_data_path": "p", "tune_lm_head": True}
    recipe = build_recipe({**places, "output_dir": "o", "eval_fraction": 0.1, "bf16": True})
    log = [
        {"loss": 0.7, "step": 10},
        {"eval_loss": 0.5, "eval_rewards/accuracies": 0.8, "step": 10},
        {"loss": 0.4, "step": 20},
        {"eval_loss": 0.6, "step": 20},
        {"train_loss": 0.5, "step": 20, "epoch": 0.2591},
    ]
    out = tmp_path / "a run"
    write_json(out / "run.json", {"seconds": 3725.2, "samples": 1234, "log": log})
    assert run_summary(recipe, out).splitlines() == [
        "trained: head by DPO, 20 steps over 1,234 pairs (0.259 epochs), in 1 h 02 min",
        f"folder:  {out}",
        "best:    step 10: loss 0.5000, accuracy 0.80 (held out)",
        "last:    step 20: loss 0.4000",
        f"next:    relook eval pope chair --model '{out}' --data DATA --out '{out}-eval' --dtype bfloat16",
    ]
    still = {"loss": 0.6929, "rewards/margins": 0.0005, "step": 20}
    for line, noticed in ((still, True), ({**still, "loss": 0.68, "rewards/margins": 0.02}, False)):
        write_json(out / "run.json", {"seconds": 3.0, "samples": 9, "log": [line]})
        text = run_summary(recipe, out)
        assert ("still ln 2" in text) == noticed
        assert "best:" not in text  # the lowest loss of a batch is none


# --- the package


def test_the_public_names_are_listed_documented_and_loaded_late() -> None:
    names = dir(package)
    assert {"load_model", "train_recipe", "evaluate_model", "RelookError"} <= set(names)
    assert not [name for name in names if not getattr(package, name).__doc__]
    with pytest.raises(AttributeError):
        package.no_such_name  # noqa: B018
    code = "import sys, relook; dir(relook); print([m for m in ('torch', 'transformers', 'yaml') if m in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


def test_reports_and_checks_of_data_do_without_torch() -> None:
    """Its import and that of transformers take seconds, which a page of scores need not wait for."""
    names = ["report.pages", "report.comparison", "report.sweep_page", "report.align_page", "data.check"]
    code = f"import sys; {'; '.join(f'import relook.{name}' for name in names)}; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "False"


def test_the_wheel_takes_every_file() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["relook"]
    files = [path.relative_to(ROOT / "relook").as_posix() for path in (ROOT / "relook").rglob("*") if path.is_file()]
    others = [file for file in files if not file.endswith(".py") and "__pycache__" not in file]
    assert "py.typed" in others
    assert not [file for file in others if not any(fnmatch(file, pattern) for pattern in patterns)]


def test_the_citation_is_of_this_version_and_license() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert citation["version"] == package.__version__
    assert citation["authors"]


@pytest.mark.slow
def test_mypy_sees_the_types_in_a_users_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import relook\nnumber: int = relook.load_model('m')\nrelook.no_name\n")
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--cache-dir", str(tmp_path), str(script)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert 'expression has type "LoadedModel", variable has type "int"' in ended.stdout
    assert 'Module has no attribute "no_name"' in ended.stdout
