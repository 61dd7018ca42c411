"""lmms-eval's tasks through relook: a small task of each kind, its score and answers found by hand beside it."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageFile

from relook import LoadedModel, load_model
from relook.data.images import MemoryImage
from relook.errors import DataError, RecipeError, RelookError
from relook.evaluate.lmms import evaluate_tasks, manifest
from relook.files import read_json, read_records, write_jsonl
from relook.generate import answering
from relook.generate.answering import GenerationSettings
from relook.model.load import LoadOptions
from relook.toyworld.build import shipped_base

pytest.importorskip("lmms_eval", reason="pip install --no-deps lmms-eval")

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
  cache_dir: {cache}
test_split: test
output_type: {kind}
doc_to_visual: !function utils.{visual}
doc_to_text: "{{{{question}}}}"
{more}
metadata:
  - version: 0.0
"""
SAID = """
doc_to_target: "{{answer}}"
generation_kwargs: {max_new_tokens: 4, do_sample: false, temperature: 0, top_p: 0, num_beams: 1%s}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
CHOSEN = """
doc_to_choice: ["Yes.", "No."]
doc_to_target: "{{gold}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
VISUALS = """
from PIL import Image

def visual(doc):
    return [Image.open(doc["image"])]

def film(doc):
    return [doc["image"]]

def broken(doc):
    return [Image.open(doc["broken"])]
"""


@pytest.fixture(scope="module", autouse=True)
def only_local_tasks() -> Iterator[None]:
    """lmms-eval's own tasks are a thousand files, which take two seconds to list."""
    from lmms_eval.tasks import TaskManager

    ImageFile.LOAD_TRUNCATED_IMAGES = False  # importing it by itself has such effects
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmms_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
        yield


@pytest.fixture(scope="module")
def tasks(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Toyworld's POPE questions as tasks, which generate or choose; and some that cannot be asked."""
    folder, test = tmp_path_factory.mktemp("tasks"), world / "test"
    records = read_records(test / "pope" / "coco_pope_random.json")[:20]
    (folder / "half.png").write_bytes((test / "val2014" / records[0]["image"]).read_bytes()[:600])
    rows: list[dict[str, Any]] = [
        {
            "image": str(test / "val2014" / record["image"]),
            "broken": str(folder / "half.png"),
            "question": record["text"],
            "answer": {"yes": "Yes.", "no": "No."}[record["label"]],
            "gold": ["yes", "no"].index(record["label"]),
        }
        for record in records
    ]
    rows[3] |= {"answer": "Maybe.", "gold": 1 - rows[3]["gold"]}  # the model knows too much of toyworld
    write_jsonl(folder / "questions.jsonl", rows)
    (folder / "utils.py").write_text(VISUALS)

    def write(name: str, kind: str, more: str, visual: str = "visual") -> None:
        given = {"data": folder / "questions.jsonl", "cache": folder / "cache"}
        text = TASK.format(name=name, kind=kind, more=more, visual=visual, **given)
        (folder / f"{name}.yaml").write_text(text)

    write("toy_said", "generate_until", SAID % "")
    write("toy_chosen", "multiple_choice", CHOSEN)
    write("toy_penalty", "generate_until", SAID % ", no_repeat_ngram_size: 3")
    write("toy_film", "generate_until", SAID % "", "film")
    write("toy_broken", "generate_until", SAID % "", "broken")
    return folder


@pytest.fixture(scope="module")
def rows(tasks: Path) -> list[dict[str, Any]]:
    return read_records(tasks / "questions.jsonl")


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(shipped_base())


def run(tasks: Path, out: Path, *names: str, **how: Any) -> dict[str, Any]:
    return evaluate_tasks(shipped_base(), names, out, include_path=tasks, **{"max_new_tokens": 8, **how})


@pytest.fixture(scope="module")
def finished(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lmms") / "out"
    run(tasks, out, "toy_said", "toy_chosen")
    return out


def loss(loaded: LoadedModel, row: dict[str, Any], said: str) -> float:
    """transformers' own loss of an answer and its end, over one whole row."""
    inputs = loaded.encode([Path(row["image"])], row["question"])
    start = inputs["input_ids"].shape[1]
    said_ids = loaded.processor.tokenizer(f" {said}</s>", add_special_tokens=False)["input_ids"]
    ids = torch.cat([inputs["input_ids"], torch.tensor([said_ids])], 1)
    labels = ids.clone()
    labels[:, :start] = -100
    with torch.no_grad():
        output = loaded.model(**inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels=labels)
    return float(output.loss)


def test_answers_are_those_of_generate_and_scored_by_the_task(
    finished: Path, rows: list[dict[str, Any]], loaded: LoadedModel
) -> None:
    result, said = read_json(finished / "toy_said.json"), read_records(finished / "toy_said.jsonl")
    assert [one["doc_id"] for one in said] == list(range(len(rows)))
    assert [one["question"] for one in said] == [row["question"] for row in rows]
    for one, row in list(zip(said, rows, strict=True))[::4]:
        assert one["answer"] == loaded.generate([Path(row["image"])], row["question"], max_new_tokens=4)
    right = sum(one["answer"] == row["answer"] for one, row in zip(said, rows, strict=True))
    assert result["tasks"]["toy_said"]["scores"]["exact_match,none"] == pytest.approx(right / len(rows))
    assert 0 < right < len(rows)
    assert result["tasks"]["toy_said"]["n"] == len(rows)
    provenance = result["provenance"]
    assert (provenance["template"], provenance["bits"], provenance["limit"]) == ("llava_hf", "16", None)
    assert provenance["harness"].keys() == {"lmms-eval", "datasets"}
    assert provenance["generation"]["toy_said"]["max_new_tokens"] == 4


def test_choices_are_weighed_by_transformers_loss(
    finished: Path, rows: list[dict[str, Any]], loaded: LoadedModel
) -> None:
    weighed = read_records(finished / "toy_chosen.jsonl")
    assert [(one["doc_id"], one["choice"].strip()) for one in weighed] == [
        (number, choice) for number in range(len(rows)) for choice in ("Yes.", "No.")
    ]
    losses = [[loss(loaded, row, choice) for choice in ("Yes.", "No.")] for row in rows]
    for one in weighed:
        assert one["loss"] == pytest.approx(losses[one["doc_id"]][one["choice"] == " No."], abs=1e-5)
    right = sum((yes > no) == row["gold"] for (yes, no), row in zip(losses, rows, strict=True))
    scores = read_json(finished / "toy_chosen.json")["tasks"]["toy_chosen"]["scores"]
    assert scores["acc,none"] == pytest.approx(right / len(rows))


def test_a_run_that_was_cut_off_goes_on(
    finished: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, groups = answering.submit, []

    def interrupted(batch: Any, group: Any, *more: Any) -> int:
        groups.append(len(group))
        if len(groups) == 3:
            raise KeyboardInterrupt
        return submit(batch, group, *more)

    monkeypatch.setattr(answering, "submit", interrupted)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(tasks, out, "toy_said", batch_size=4)
    kept = len(read_records(out / "toy_said.jsonl"))
    assert 0 < kept <= sum(groups[:2])
    with (out / "toy_said.jsonl").open("a") as file:
        file.write('{"id": "19-cut')
    run(tasks, out, "toy_said", batch_size=4)
    assert kept + sum(groups[3:]) == 20
    assert (out / "toy_said.jsonl").read_bytes() == (finished / "toy_said.jsonl").read_bytes()
    assert read_json(out / "toy_said.json")["tasks"] == read_json(finished / "toy_said.json")["tasks"]
    asked = len(groups)
    assert run(tasks, out, "toy_said") == {"toy_said": read_json(out / "toy_said.json")}
    assert len(groups) == asked


def test_a_limit_asks_the_first_documents(finished: Path, tasks: Path, tmp_path: Path) -> None:
    result = run(tasks, tmp_path / "out", "toy_said", limit=3)
    assert result["toy_said"]["tasks"]["toy_said"]["n"] == 3
    assert read_records(tmp_path / "out" / "toy_said.jsonl") == read_records(finished / "toy_said.jsonl")[:3]
    with pytest.raises(RecipeError, match="another limit"):
        run(tasks, tmp_path / "out", "toy_said")


def test_what_cannot_be_asked_is_named(tasks: Path, tmp_path: Path) -> None:
    faults = {
        "toy_sad": r"no task 'toy_sad'. Like it: .*toy_said",
        "toy_penalty": "toy_penalty asks for generation with no_repeat_ngram_size",
        "toy_film": "Document 0 of toy_film shows a str",
        "toy_broken": "Document 0 of toy_broken: its picture cannot be read: Truncated",
    }
    for name, message in faults.items():
        with pytest.raises(RelookError, match=message):
            run(tasks, tmp_path / "out", name)
    with pytest.raises(DataError, match=r"no folder .*none.*--include-path"):
        run(tmp_path / "none", tmp_path / "out", "toy_said")


def test_a_task_that_fails_by_itself_is_named_in_one_line(tasks: Path, tmp_path: Path) -> None:
    text = (tasks / "toy_said.yaml").read_text().replace("toy_said", "toy_lost").replace("{{question}}", "{{nothing")
    (tmp_path / "toy_lost.yaml").write_text(text)
    (tmp_path / "utils.py").write_text(VISUALS)
    with pytest.raises(RelookError, match=r"lmms-eval stopped in task toy_lost: TemplateSyntaxError: .*kept"):
        run(tmp_path, tmp_path / "out", "toy_lost")


def test_without_lmms_eval_the_command_says_how_to_get_it(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval.evaluator", None)
    with pytest.raises(RecipeError, match=r"pip install 'relook\[lmms\]' && pip install --no-deps lmms-eval"):
        run(tasks, tmp_path / "out", "toy_said")


@pytest.mark.parametrize(
    ("given", "generate", "until"),
    [
        ({}, {"do_sample": False}, []),
        ({"until": ["\n\n"]}, {"do_sample": False}, []),  # lmms-eval's filler
        ({"until": "ASSISTANT:"}, {"do_sample": False}, ["ASSISTANT:"]),
        ({"temperature": 0.2, "do_sample": False, "top_p": 1.0}, {"do_sample": False}, []),
        ({"temperature": 0, "do_sample": True}, {"do_sample": False}, []),
        ({"temperature": 0.7, "top_p": 0.9}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}, []),
        ({"do_sample": True, "top_p": 0}, {"do_sample": True}, []),
        ({"num_beams": 3, "top_p": 0.5}, {"do_sample": False, "num_beams": 3}, []),
    ],
)
def test_what_generation_settings_mean(given: dict[str, Any], generate: dict[str, Any], until: list[str]) -> None:
    from relook.evaluate.lmms_model import LmmsRequest, parse_generation_settings

    how, stops = parse_generation_settings(
        GenerationSettings(max_new_tokens=9, batch_size=8), LmmsRequest("t", 0, "", "", list, given, repeat=2)
    )
    assert dict(how.generate) == generate
    assert (stops, how.max_new_tokens, how.seed) == (until, 9, 2)
    assert how.batch_size == 8 // generate.get("num_beams", 1)
    assert (
        parse_generation_settings(how, LmmsRequest("t", 0, "", "", list, {"max_new_tokens": 3}))[0].max_new_tokens == 3
    )


def request(task: str, document: int, text: str, **how: Any) -> Any:
    from lmms_eval.api.instance import Instance

    metadata = {"task": task, "doc_id": document, "repeats": 1}
    visuals = lambda doc: [doc["image"]]  # noqa: E731
    return Instance("generate_until", (text, how, visuals, document, task, "test"), 0, metadata)


def test_samples_of_one_question_differ_and_come_again(tmp_path: Path, loaded: LoadedModel) -> None:
    """A task that asks the same several times gets several draws, the same ones in every run; `until` cuts them."""
    from relook.evaluate.lmms_model import RelookModel

    image = Image.new("RGB", (96, 96), "red")
    one = request("toy", 0, "Describe this image.", temperature=3.0, max_new_tokens=6)
    runs = []
    for name in ("a", "b"):
        model = RelookModel(lambda: loaded, GenerationSettings(), tmp_path / name)
        model.task_dict = {"toy": {"test": [{"image": image}]}}
        runs.append(model.generate_until([one] * 4))
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 1
    stop = runs[0][0].split()[1]
    cut = request("toy", 0, "Describe this image.", temperature=3.0, max_new_tokens=6, until=[stop])
    assert model.generate_until([cut]) == [runs[0][0].partition(stop)[0]]


def test_lmms_evals_own_command_finds_relook(tmp_path: Path, loaded: LoadedModel) -> None:
    entry = tomllib.loads(Path("pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]["relook"]
    module, name = entry.split(":")
    found = getattr(import_module(module), name)()
    assert (found.model_id, found) == ("relook", manifest())
    module, name = found.simple_class_path.rsplit(".", 1)
    kind = getattr(import_module(module), name)
    model = kind.create_from_arg_string(f"model={shipped_base()},out={tmp_path}", {"batch_size": 2, "device": None})
    image = Image.new("RGB", (96, 96), "red")
    model.task_dict = {"toy": {"test": [{"image": image}]}}
    text = "Is there a cup in the image?"
    assert model.generate_until([request("toy", 0, text, max_new_tokens=4)]) == [loaded.generate([image], text)]
    assert (tmp_path / "toy.jsonl").exists()
    with pytest.raises(RecipeError, match=r"do not have pretrained. Known ones: model, adapter"):
        kind.create_from_arg_string("pretrained=x")
    with pytest.raises(RecipeError, match="bits is 'eight', but must be of type int"):
        kind.create_from_arg_string("model=x,bits=eight")


def test_pictures_come_in_windows_and_equal_ones_are_held_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from relook.evaluate import lmms_model

    images = [Image.new("RGB", (8, 8), color) for color in ("red", "red", "blue", "green", "green")]
    wanted = [lmms_model.LmmsRequest("t", i, str(i), "", lambda one=one: [one.copy()]) for i, one in enumerate(images)]
    monkeypatch.setattr(lmms_model, "WINDOW", 8 * 8 * 3)
    windows = [[shown[0] for shown in pictures] for _, pictures in lmms_model._windows(wanted)]
    assert [len(window) for window in windows] == [3, 2]
    assert windows[0][0] is windows[0][1]
    assert [held for window in windows for held in window] == [MemoryImage.of(image) for image in images]


@pytest.mark.slow
def test_half_pictures_stay_broken_and_llavas_benchmarks_are_known() -> None:
    code = """
from PIL import ImageFile
from relook.evaluate.lmms import _task_manager
names = "vqav2_test gqa vizwiz_vqa scienceqa_img textvqa_val pope mme mmbench_en_dev mmbench_cn_dev seedbench"
_task_manager([*names.split(), "seedbench_ppl", "llava_in_the_wild", "mmvet"], None)
assert ImageFile.LOAD_TRUNCATED_IMAGES is False
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.slow
def test_two_processes_share_the_documents(finished: Path, tasks: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "relook"]
    names = ["--tasks", "toy_said,toy_chosen", "--include-path", str(tasks), "--max-new-tokens", "8"]
    where = ["--model", str(shipped_base()), "--out", str(tmp_path / "out"), "--limit", "7"]
    subprocess.run([*command, "eval", "lmms", *names, *where], check=True, capture_output=True)
    for name, per_document in (("toy_said", 1), ("toy_chosen", 2)):
        expected = read_records(finished / f"{name}.jsonl")[: 7 * per_document]
        assert [one["id"] for one in read_records(tmp_path / "out" / f"{name}.jsonl")] == [
            one["id"] for one in expected
        ]
        assert not list((tmp_path / "out").glob(f"{name}.1.jsonl"))
        result = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert result["tasks"][name]["n"] == 7


def test_quantised_or_not_is_part_of_what_answers_depend_on(tasks: Path, finished: Path) -> None:
    with pytest.raises(RecipeError, match="another bits"):
        run(tasks, finished, "toy_said", loading=LoadOptions(bits=8))
