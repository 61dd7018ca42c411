"""The command: a user's mistake ends in one line that says what to do, status 2, and nothing lost."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.command import Command, Ended
from helpers.tiny import dpo_keys

from relook.console import progress
from relook.errors import RelookError
from relook.evaluate.results import AnswerFile
from relook.files import atomic_file, write_json, write_jsonl, writes_alone
from relook.toyworld.build import shipped_base

pytestmark = pytest.mark.usefixtures("no_trunk_cache")


@pytest.fixture
def recipe(base: Path, world: Path, tmp_path: Path) -> Path:
    """A recipe file of a head run of two steps."""
    keys = dpo_keys(base, world, tmp_path / "run", tune_lm_head=True, max_steps=2)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({key: str(v) if isinstance(v, Path) else v for key, v in keys.items()}))
    return path


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """A folder of the user's own."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    return tmp_path / "notes"


def untouched(notes: Path) -> bool:
    return [path.name for path in notes.iterdir()] == ["mine.txt"] and (notes / "mine.txt").read_text() == "mine"


# --- train


def test_train_trains(relook: Command, recipe: Path, tmp_path: Path) -> None:
    ended = relook("train", recipe, "--learning_rate", "2e-6", "--nll_weight=0.5")
    assert ended.status == 0, ended.err
    saved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert (saved["learning_rate"], saved["nll_weight"], saved["max_steps"]) == (2e-6, 0.5, 2)
    assert relook("train", recipe, "--learning_rate", "2e-6", "--nll_weight=0.5").status == 0
    relook("train", recipe).mistake("run of another recipe", "learning_rate, nll_weight", "Choose another output_dir")


def test_torchruns_way_in_is_the_same(recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["relook.train", str(recipe), "--max_steps", "1"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("relook.train", run_name="__main__")
    assert not end.value.code
    assert (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("word", ["--local_rank=0", "--local-rank=1"])
def test_what_a_launcher_puts_first_is_no_recipe(word: str, relook: Command, recipe: Path) -> None:
    ended = relook("train", word, recipe, "--per_device_eval_batch_size", "4", "--local_rank", "0", "--tf32", "True")
    assert ended.status == 0, ended.err
    (line,) = [line for line in ended.err.splitlines() if "without effect here" in line]
    assert all(key in line for key in ("per_device_eval_batch_size", "local_rank"))


def test_all_mistakes_of_a_command_are_said_at_once(relook: Command, recipe: Path) -> None:
    words = ["--learning_rat", "1", "--seed", "x", "--vg_path", "nowhere", "--desc_data_path", "lost.json"]
    ended = relook("train", recipe, *words)
    ended.mistakes("'learning_rat'", "seed is 'x'", "no Visual Genome folder nowhere", "lost.json does not exist")
    assert ended.err.count("\n") == 4
    ended = relook("train", *words, "stray", "--bf16")
    ended.mistakes(
        "names no recipe before --learning_rat", "'stray'", "--bf16 has no value", "seed is 'x'", "lost.json"
    )
    ended = relook("train", recipe, *words[4:], "--model_name_or_path", "nobody", "--version", "v9")
    ended.mistakes("folder nowhere", "lost.json", "no model folder nobody", "no conversation template 'v9'")
    assert ended.err.count("\n") == 4


def test_no_such_recipe(relook: Command) -> None:
    relook("train", "toyworld-hed").mistake("no recipe 'toyworld-hed'", "Did you mean toyworld-head?")
    relook("train", "my.yaml").mistake("no recipe file my.yaml")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--learning_rat", "1"], "Did you mean learning_rate?"),
        (["--learning_rate", "fast"], "learning_rate is 'fast', but must be of type float"),
        (["--beta", "-1"], "beta is -1"),
        (["--tune_lm_head"], "--tune_lm_head has no value"),
        (["--task", "ppo"], "It must be one of sft, dpo"),
        (["--version", "v9"], "no conversation template 'v9'"),
        (["--lr_scheduler_type", "spiral"], "do not fit together"),
        (["--post_decoder.depht", "2"], "post_decoder has no key depht"),
        (["--freeze_backbone", "true", "--tune_lm_head", "false"], "nothing else trains"),
        (["--vg_path", "nowhere"], "no Visual Genome folder nowhere"),
        (["--desc_data_path", "nowhere.json"], "nowhere.json does not exist"),
        (["--pope_data_path", "."], "is a folder"),
        (["--model_name_or_path", "nowhere"], "no model folder nowhere"),
        (["--model_name_or_path", "."], "no config.json"),
        (["--model_max_length", "40"], "No sample can be used"),
    ],
    ids=str,
)
def test_mistakes_in_a_recipe(relook: Command, recipe: Path, words: list[str], said: str) -> None:
    relook("train", recipe, *words).mistake(said)


def test_a_mistake_can_be_mended_in_the_same_folder(relook: Command, recipe: Path) -> None:
    """The wrong run trained nothing, so its folder is not the user's loss."""
    relook("train", recipe, "--vg_path", "nowhere").mistake("nowhere")
    assert relook("train", recipe).status == 0


def test_a_folder_that_holds_something_else(relook: Command, recipe: Path, notes: Path, world: Path) -> None:
    relook("train", recipe, "--output_dir", notes).mistake(f"{notes} holds something else", "another output_dir")
    relook("train", recipe, "--output_dir", notes / "mine.txt").mistake("is a file")
    relook("train", recipe, "--output_dir", notes / "mine.txt" / "run").mistake("mine.txt")
    relook("demo", "--out", notes).mistake(f"{notes} holds something else", "another --out")
    relook("demo", "--out", notes / "mine.txt").mistake("is a file", "another --out")
    where = ("--model", shipped_base(), "--data", world / "test", "--out", notes)
    relook("eval", "pope", *where).mistake(f"{notes} holds something else", "another --out")
    assert untouched(notes)


def test_a_broken_image_is_dropped_and_counted_or_an_error(
    relook: Command, recipe: Path, world: Path, tmp_path: Path
) -> None:
    shutil.copytree(world / "vg", tmp_path / "vg")
    broken = min((tmp_path / "vg" / "VG_100K").iterdir())
    broken.write_bytes(broken.read_bytes()[:300])
    words = ("train", recipe, "--vg_path", tmp_path / "vg")
    relook(*words, "--on_bad", "error").mistake(broken.name, "cannot be decoded")
    ended = relook(*words, "--output_dir", tmp_path / "dropping")
    assert ended.status == 0
    assert "dropped:" in ended.err
    record = json.loads((tmp_path / "dropping" / "run.json").read_text())
    assert record["samples"] == 20
    assert broken.name in " ".join(record["dropped"]["faults"])


# --- eval, score, mine, report, demo


def test_mistakes_of_eval(relook: Command, world: Path, tmp_path: Path, base: Path) -> None:
    out = ("--out", tmp_path / "out")
    model, data = ("--model", base), ("--data", world / "test")
    relook("eval", "mmlu", *model, *data, *out).mistake("no benchmark 'mmlu'", "pope, chair")
    relook("eval", "pope", "--model", "nowhere", *data, *out).mistake("nowhere does not exist")
    relook("eval", "pope", *model, "--data", "nowhere", *out).mistake("nowhere")
    relook("eval", "pope", *model, *data, *out, "--dtype", "float13").mistake("no dtype 'float13'")
    relook("eval", "pope", *model, *data, *out, "--device", "abacus").mistake("'abacus' is not a device")
    assert relook("eval", "pope", *model, *data, *out, "--max-new-tokens", 1).status == 0  # the folder is still free


def test_eval_prints_what_it_writes(relook: Command, world: Path, tmp_path: Path, base: Path) -> None:
    where = ("--model", base, "--data", world / "test", "--out", tmp_path / "out", "--max-new-tokens", 2)
    ended = relook("eval", "pope", "chair", *where)
    assert ended.status == 0, ended.err
    written = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("pope", "chair")}
    assert json.loads(ended.out) == written


def test_an_image_that_is_missing_from_an_evaluation(relook: Command, world: Path, tmp_path: Path, base: Path) -> None:
    shutil.copytree(world / "test", tmp_path / "test")
    lost = min((tmp_path / "test" / "val2014").iterdir())
    lost.unlink()
    where = ("--model", base, "--data", tmp_path / "test", "--out", tmp_path / "out")
    ended = relook("eval", "pope", *where)
    assert ended.status == 2
    assert ended.err.splitlines()[-1].startswith(f"relook: The image {tmp_path / 'test' / 'val2014' / lost.name}")
    assert "Traceback" not in ended.err


QUESTIONS = [{"question_id": i, "image": "a.jpg", "text": f"Is there {i}?", "label": "yes"} for i in range(3)]
ANSWERS = [{"question_id": i, "answer": "Yes."} for i in range(3)]


def test_score_writes_the_contracts_keys(relook: Command, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "q.json", QUESTIONS)
    write_jsonl(tmp_path / "a.jsonl", ANSWERS)
    files = ("--questions", tmp_path / "q.json", "--answers", tmp_path / "a.jsonl", "--json", tmp_path / "s.json")
    ended = relook("score", "pope", *files)
    assert ended.status == 0, ended.err
    scores = json.loads((tmp_path / "s.json").read_text())
    assert json.loads(ended.out) == scores
    expected = {"tp": 3, "fp": 0, "tn": 0, "fn": 0, "accuracy": 1.0, "precision": 1.0, "recall": 1.0, "f1": 1.0}
    assert scores.items() >= {**expected, "yes_ratio": 1.0, "n": 3, "parser": "official"}.items()


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([*ANSWERS[:2], {"question_id": 7, "answer": "No."}], "7"),
        (ANSWERS[:2], "2"),
        ([*ANSWERS, ANSWERS[0]], "more than once"),
        ([*ANSWERS[:2], {"question_id": 2}], "record 3"),
        ([{"id": 1}], "record 1"),
    ],
    ids=str,
)
def test_pope_files_that_do_not_match(relook: Command, tmp_path: Path, answers: list[Any], said: str) -> None:
    write_jsonl(tmp_path / "q.json", QUESTIONS)
    write_jsonl(tmp_path / "a.jsonl", answers)
    files = ("--questions", tmp_path / "q.json", "--answers", tmp_path / "a.jsonl", "--json", tmp_path / "s.json")
    relook("score", "pope", *files).mistake(said)
    assert not (tmp_path / "s.json").exists()


def test_files_that_cannot_be_scored(relook: Command, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "q.json", QUESTIONS)
    (tmp_path / "broken.json").write_text('{"question_id": 1,')
    (tmp_path / "picture.json").write_bytes(b"\xff\xd8\xff\xe0")
    for answers, said in (("nowhere", "does not exist"), ("broken.json", "not valid JSON"), ("picture.json", "UTF-8")):
        relook("score", "pope", "--questions", tmp_path / "q.json", "--answers", tmp_path / answers).mistake(said)
    relook("score", "mme", "--questions", tmp_path / "q.json", "--answers", tmp_path / "q.json").mistake(
        "benchmark 'mme'"
    )
    relook("score", "shr", "--answers", tmp_path / "q.json").mistake("shr", "--data")


def test_mistakes_of_mine_and_report(relook: Command, tmp_path: Path, base: Path, notes: Path, world: Path) -> None:
    mined = ("--annotations", "vg", "--out", tmp_path / "p")
    relook("mine", "--model", base, "--images", "nowhere", *mined).mistake("nowhere")
    relook("mine", "--model", "nowhere", "--images", world / "vg", *mined).mistake("nowhere does not exist")
    relook("report", notes).mistake("no finished demo")
    assert untouched(notes)


def test_a_demo_with_other_settings_is_refused(relook: Command, tmp_path: Path) -> None:
    write_json(tmp_path / "demo" / "demo.json", {"seed": 1, "rebuild": False, "base": "shipped"})
    (tmp_path / "demo" / "world").mkdir()
    relook("demo", "--out", tmp_path / "demo", "--seed", "2").mistake("a demo made with another seed", "another --out")
    relook("demo", "--out", tmp_path / "new", "--base", "nowhere").mistake("nowhere")


def test_a_vision_tower_may_be_a_name_in_the_cache(
    relook: Command, tiny: Path, tower: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("relook.model.lazy_model.snapshot_download", lambda name, **_: asked.append(name) or str(tower))
    ended = relook("inspect", tiny / "ckpt_safetensors", "--vision-tower", "openai/tower")
    assert (ended.status, asked) == (0, ["openai/tower"]), ended.err


def test_what_is_written_may_not_be_a_folder(relook: Command, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "q.json", QUESTIONS)
    write_jsonl(tmp_path / "a.jsonl", ANSWERS)
    files = ("--questions", tmp_path / "q.json", "--answers", tmp_path / "a.jsonl", "--json", tmp_path)
    relook("score", "pope", *files).mistake(f"{tmp_path} is a folder")


def test_what_other_commands_call_a_setting_is_told_its_name(relook: Command) -> None:
    ended = relook("train", "head", "--model", "m", "--out", "o", "--dtype", "bfloat16")
    ended.mistakes("It is model_name_or_path in", "It is output_dir in", "It is bf16 or fp16 in")
    relook("eval", "pope", "--model_name_or_path", ".", "--output_dir", "o").mistakes("mean --model?", "mean --out?")


@pytest.mark.parametrize(("command", "option"), [("mine", "--temperature"), ("estimate", "--tflops")])
def test_an_option_is_a_finite_number(relook: Command, command: str, option: str) -> None:
    relook(command, option, "nan").mistakes(f"{option} is nan")


def test_a_wrong_name_is_found_without_torch() -> None:
    script = "import sys; from relook.cli.train import check_names\n"
    script += "try: check_names('hed', ['--model', 'm', '--max_steps', '2'])\n"
    script += "except Exception as error: print(error, 'torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "Did you mean head?" in done.stdout
    assert done.stdout.endswith("False False\n")


def test_a_training_run_has_no_report_but_evaluations(relook: Command, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("task: dpo")
    relook("report", tmp_path).mistake("is a training run", f"relook eval pope chair --model {tmp_path}")


def test_a_file_of_ambers_is_missed_where_the_documents_put_it(relook: Command, base: Path, tmp_path: Path) -> None:
    ended = relook("eval", "amber", "--model", base, "--data", tmp_path, "--out", tmp_path / "out")
    ended.mistake(f"{tmp_path / 'amber/data/query/query_all.json'} does not exist")


def test_a_tower_may_lie_below_the_working_directory(
    relook: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the original program finds the relative name in the model's config."""
    monkeypatch.chdir(tiny / "vision_towers")
    ended = relook("inspect", tiny / "ckpt_safetensors")
    assert ended.status == 0, ended.err


# --- endings


def test_ctrl_c_is_one_line_and_130(relook: Command, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("relook.train.run.recipe_of_command", stopped)
    ended = relook("train", recipe)
    assert ended.status == 130
    assert ended.err.strip() == "relook: stopped."


@pytest.mark.parametrize("has_answers", [True, False])
def test_ctrl_c_says_whether_the_same_command_goes_on(
    has_answers: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @writes_alone(lambda out: out)
    def job(out: Path) -> None:
        if has_answers:
            AnswerFile(out / "work" / "answers.jsonl", "key").append([{"key": "1"}])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job(tmp_path / "out")
    assert ("goes on from here" in capsys.readouterr().err) == has_answers


@pytest.mark.parametrize(
    ("count", "ready", "line"), [(600, 300, "600 in 0.0 s, 300 there already"), (0, 900, "900 there already")]
)
def test_what_an_earlier_run_left_is_counted(
    count: int, ready: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("scenes", ready) as report:
        if count:
            report(count, count)
    assert capsys.readouterr().err.strip() == f"scenes: {line}"


@pytest.mark.parametrize("write", [lambda path: path.write_text("{}"), lambda path: torch.save({}, path)])
def test_a_full_disk_is_told_with_the_path(write: Callable[[Path], Any], tmp_path: Path) -> None:
    def write_all() -> None:
        with atomic_file(tmp_path / "out") as temporary:
            temporary.symlink_to("/dev/full")
            write(temporary)

    with pytest.raises(RelookError, match=f"{tmp_path / 'out'} cannot be written: the disk is full"):
        write_all()
    assert not [*tmp_path.iterdir()]


def test_a_full_disk_under_standard_output_is_no_traceback(relook: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w") as full, suppress(OSError):  # closing writes what is left
        monkeypatch.setattr(sys, "stdout", full)
        relook("recipes").mistake("No space left on device. Make room")


def test_a_fault_of_relooks_own_keeps_its_traceback(
    relook: Command, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("relook.train.run.recipe_of_command", fault)
    with pytest.raises(ZeroDivisionError):
        relook("train", recipe)


def test_the_installed_command_says_the_same() -> None:
    """In a process of its own: nothing of the libraries' stands around the line."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "relook", "train", "toyworld-hed"]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    Ended(ended.returncode, ended.stdout, ended.stderr).mistake("Did you mean toyworld-head?")


def test_help_names_every_command(relook: Command) -> None:
    ended = relook("--help")
    assert ended.status == 0
    for name in ("demo", "train", "eval", "score", "build-pope", "mine", "report"):
        assert name in ended.out
