"""`relook eval` and `relook score`: answers once, in files, whatever the batch; scores from the files."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import tomllib
from collections.abc import Iterator
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.forked import forked
from helpers.several import command
from helpers.tiny import save_tiny
from helpers.variants import variants

import relook
from relook import load_model
from relook.data.annotations import read_coco
from relook.data.templates import TEMPLATES, get_template
from relook.errors import DataError, RecipeError
from relook.evaluate import results
from relook.evaluate.benchmark import ScoringInputs, score_command
from relook.evaluate.compare import compare
from relook.evaluate.results import AnswerFile
from relook.evaluate.run import append_answers, evaluate_model
from relook.evaluate.tasks.chair import chair_images
from relook.evaluate.tasks.pope import (
    LLAVA_QUESTIONS,
    SPLITS,
    differing_answers,
    match_answers,
    official_parse,
    pope_questions,
    read_pope_questions,
)
from relook.files import file_hash, read_json, read_records, text_hash, write_json, write_jsonl
from relook.generate import answering
from relook.generate.answering import GenerationSettings, answer_questions
from relook.model.load import model_hash
from relook.toyworld.build import shipped_base

POPE_KEYS = {"tp", "fp", "tn", "fn", "accuracy", "precision", "recall", "f1", "yes_ratio", "n", "parser"}
CHAIR_KEYS = {"chair_i", "chair_s", "recall", "length", "empty"}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """Every prompt that a model is given: image name and token ids."""
    prompts: list[tuple[str, tuple[int, ...]]] = []
    submit = answering.submit

    def counted(batch: Any, group: Any, *more: Any) -> int:
        prompts.extend((prompt.images[0].name, prompt.ids) for prompt in group)
        return submit(batch, group, *more)

    monkeypatch.setattr(answering, "submit", counted)
    return prompts


def pope(world: Path, out: Path, model: Path | None = None, **how: Any) -> dict[str, Any]:
    return evaluate_model(model or shipped_base(), ["pope"], world / "test", out, **{"max_new_tokens": 8, **how})


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole evaluation of the shipped base."""
    out = tmp_path_factory.mktemp("eval") / "out"
    evaluate_model(shipped_base(), ["pope", "chair"], world / "test", out, max_new_tokens=40)
    return out


def test_what_an_evaluation_leaves(finished: Path, world: Path) -> None:
    scores, chair = read_json(finished / "pope.json"), read_json(finished / "chair.json")
    annotations = read_coco(world / "test" / "annotations" / "instances_val2014.json")
    for split in SPLITS:
        questions = read_pope_questions(world / "test" / "pope" / f"coco_pope_{split}.json", Path())
        answers = read_records(finished / f"pope_{split}.jsonl")
        assert [record["question_id"] for record in answers] == [question.id for question in questions]
        pairs = [(official_parse(a["answer"]), q.label == "yes") for a, q in zip(answers, questions, strict=True)]
        right = sum(said == truth for said, truth in pairs) / len(pairs)
        assert scores[split].keys() >= POPE_KEYS
        assert scores[split]["accuracy"] == pytest.approx(right)
        assert scores[split]["n"] == len(pairs)
        assert scores[split]["tp"] == sum(said and truth for said, truth in pairs)
        low, high = scores[split]["accuracy_ci"]
        assert low <= right <= high
        for rate in ("precision", "recall", "f1", "yes_ratio"):
            low, high = scores[split][f"{rate}_ci"]
            assert low <= scores[split][rate] <= high
    assert chair.keys() >= CHAIR_KEYS
    assert all(chair[f"{rate}_ci"][0] <= chair[rate] <= chair[f"{rate}_ci"][1] for rate in ("chair_i", "length"))
    assert [record["image"] for record in read_records(finished / "chair.jsonl")] == list(annotations.images)
    assert chair["n"] == len(annotations.images)


def test_a_result_says_where_it_comes_from(finished: Path, world: Path) -> None:
    pope_from, chair_from = (read_json(finished / f"{name}.json")["provenance"] for name in ("pope", "chair"))
    for found in (pope_from, chair_from):
        assert found["model_hash"] == model_hash(shipped_base())
        assert (found["template"], found["dtype"], found["adapter"]) == ("llava_hf", "float32", None)
        assert found["generation"] == {"do_sample": False, "max_new_tokens": 40}
        assert found["versions"].keys() >= {"relook", "torch", "transformers", "python"}
        assert found["versions"]["torch"] == torch.__version__
        assert datetime.fromisoformat(found["date"]).tzinfo is not None
    assert pope_from["parser"] == "official"
    assert len(set(pope_from["questions"].values())) == 3
    images = read_coco(world / "test" / "annotations" / "instances_val2014.json").images
    assert chair_from["image_list"] == text_hash(*images)


def test_relook_runs_from_its_sources_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> str:
        if name == "relook":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(results, "version", not_installed)
    assert results.library_versions()["relook"] == relook.__version__


def test_the_version_stands_in_two_files_and_is_one() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["version"] == relook.__version__


def test_an_evaluation_is_scored_again_without_its_model(finished: Path, world: Path, tmp_path: Path) -> None:
    for name in ("pope", "chair"):
        assert score_command(name, [finished], ScoringInputs()) == read_json(finished / f"{name}.json")
    out, data = tmp_path / "out", tmp_path / "data"
    shutil.copytree(finished, out)
    shutil.copytree(world / "test", data)
    (out / "eval.json").unlink()
    with pytest.raises(RecipeError, match=r"does not say what data.*--data"):
        score_command("pope", [out], ScoringInputs())
    exact = score_command("pope", [out], ScoringInputs(data=data), "lmms-eval")
    assert exact["random"]["neither"] == exact["random"]["n"]  # toyworld answers "Yes."
    assert exact["provenance"]["parser"] == "lmms-eval"
    with pytest.raises(RecipeError, match="no parser 'mine'"):
        score_command("pope", [out], ScoringInputs(data=data), "mine")


def test_llavas_questions_are_asked_where_they_lie_beside_popes(finished: Path, world: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(world / "test", data)
    official = {split: read_records(data / "pope" / f"coco_pope_{split}.json") for split in SPLITS}
    lines = [
        {"image": r["image"], "text": f"{r['text']}\nAnswer shortly.", "category": split}
        for split in SPLITS
        for r in official[split]
    ]
    write_jsonl(data / "pope" / LLAVA_QUESTIONS, [{"question_id": i, **line} for i, line in enumerate(lines)])
    questions = pope_questions(data)
    for split in SPLITS:
        assert [(q.text.split("\n")[0], q.label) for q in questions[split]] == [
            (r["text"], r["label"]) for r in official[split]
        ]
    write_jsonl(data / "pope" / LLAVA_QUESTIONS, [{"question_id": 1, **lines[0]}, {"question_id": 2, **lines[-1]}])
    with pytest.raises(DataError, match=r"in random: 0 questions have no label \(\), \d+ labels have no question"):
        pope_questions(data)


def test_equal_questions_are_asked_once(world: Path, tmp_path: Path, asked: list[Any]) -> None:
    pope(world, tmp_path / "out")
    questions = [
        q for s in SPLITS for q in read_pope_questions(world / "test" / "pope" / f"coco_pope_{s}.json", Path())
    ]
    assert len(asked) == len(set(asked)) == len({(q.image, q.text) for q in questions}) < len(questions)


def test_a_finished_evaluation_asks_nothing(
    finished: Path, world: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("relook.model.load.load_model", never)
    results = evaluate_model(shipped_base(), ["pope", "chair"], world / "test", finished, max_new_tokens=40)
    assert results == {name: read_json(finished / f"{name}.json") for name in ("pope", "chair")}
    assert asked == []


def test_a_cut_off_evaluation_goes_on(finished: Path, world: Path, tmp_path: Path, asked: list[Any]) -> None:
    """Killed while an answer was being written: one split half done, one not begun, captions half done."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    for name in ("pope.json", "chair.json", "pope_adversarial.jsonl"):
        (out / name).unlink()
    left: set[tuple[str, str]] = set()
    for name, key in (("pope_popular", "question"), ("chair", "image")):
        lines = (out / f"{name}.jsonl").read_bytes().splitlines(keepends=True)
        kept = len(lines) // 2
        (out / f"{name}.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][: len(lines[kept]) // 2])
        left |= {(json.loads(line)["image"], json.loads(line)[key]) for line in lines[kept:]}
    left |= {(r["image"], r["question"]) for r in read_records(finished / "pope_adversarial.jsonl")}
    evaluate_model(shipped_base(), ["pope", "chair"], world / "test", out, max_new_tokens=40)
    assert len(asked) == len(left)
    for path in finished.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_cut_in_the_middle_of_a_character_is_a_cut_off_line(tmp_path: Path) -> None:
    file = AnswerFile(tmp_path / "a.jsonl", "id")
    file.append([{"id": "1", "text": "kitchen"}, {"id": "2", "text": "Küche"}])
    whole = file.path.read_bytes()
    file.path.write_bytes(whole[: whole.index("ü".encode()) + 1])
    again = AnswerFile(file.path, "id")
    assert again.records == {"1": {"id": "1", "text": "kitchen"}}
    again.append([{"id": "2", "text": "Küche"}])
    assert file.path.read_bytes() == whole


@pytest.mark.parametrize("line", ["[]", "3", '{"other": 1}'])
def test_a_strange_line_in_an_answer_file_is_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'{line}\n{{"id": "1"}}\n')
    with pytest.raises(DataError, match=r"a\.jsonl"):
        AnswerFile(tmp_path / "a.jsonl", "id")
    assert (tmp_path / "a.jsonl").read_text().startswith(line)


def test_answers_are_kept_while_they_come(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after some answers: those are on disk and are not asked again."""
    submit, groups = answering.submit, []

    def interrupted(batch: Any, group: Any, *more: Any) -> int:
        groups.append(group)
        if len(groups) == 4:
            raise KeyboardInterrupt
        return submit(batch, group, *more)

    monkeypatch.setattr(answering, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pope(world, tmp_path / "out", batch_size=5)
    held = {
        r["question"] + r["image"]
        for s in SPLITS
        for r in AnswerFile(tmp_path / "out" / f"pope_{s}.jsonl", "question_id").records.values()
    }
    assert len(held) >= 10
    pope(world, tmp_path / "out", batch_size=5)
    questions = [question for split in pope_questions(world / "test").values() for question in split]
    asked_again = sum(map(len, groups[4:]))
    assert asked_again == len({(question.image, question.text) for question in questions}) - len(held)


def test_answers_before_a_failure_are_kept(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[int, str]]:
        yield from ((0, "a"), (2, "c"), (1, "b"))
        raise DataError("The image x.jpg cannot be decoded.")

    files = [AnswerFile(tmp_path / f"{name}.jsonl", "id") for name in ("even", "odd")]
    with pytest.raises(DataError):
        append_answers(failing(), lambda index, text: (files[index % 2], {"id": index, "text": text}), files, 2)
    assert read_records(tmp_path / "even.jsonl") == [{"id": 0, "text": "a"}, {"id": 2, "text": "c"}]
    assert read_records(tmp_path / "odd.jsonl") == [{"id": 1, "text": "b"}]


def test_an_evaluation_goes_on_once_a_broken_image_is_mended(world: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(world / "test", data)
    victim = data / "val2014" / read_pope_questions(data / "pope" / "coco_pope_random.json", Path())[-1].image
    whole = victim.read_bytes()
    victim.write_bytes(whole[:200])
    with pytest.raises(DataError, match=f"{victim.name} cannot be decoded"):
        evaluate_model(shipped_base(), ["pope"], data, out, max_new_tokens=8, batch_size=4)
    victim.unlink()
    with pytest.raises(DataError, match=rf"The image .*{victim.name} does not exist\."):
        evaluate_model(shipped_base(), ["pope"], data, out, max_new_tokens=8, batch_size=4)
    victim.write_bytes(whole)
    evaluate_model(shipped_base(), ["pope"], data, out, max_new_tokens=8, batch_size=4)
    pope(world, tmp_path / "whole")
    for split in SPLITS:
        assert (out / f"pope_{split}.jsonl").read_bytes() == (tmp_path / f"whole/pope_{split}.jsonl").read_bytes()


@pytest.mark.parametrize("trained", variants([False, True], [False]), ids=["random weights", "shipped base"])
def test_answers_do_not_depend_on_the_batch(trained: bool, base: Path, world: Path) -> None:
    loaded = load_model(shipped_base() if trained else base)
    assert loaded.model.dtype == torch.float32
    questions = read_pope_questions(world / "test" / "pope" / "coco_pope_popular.json", world / "test" / "val2014")[:12]
    prompts = [(q.image, " ".join([q.text] * (1 + 3 * (i % 5)))) for i, q in enumerate(questions)]
    prompts += [(q.image, "Describe this image in detail.") for q in questions[::4]]
    answers = []
    for batch_size in (1, 8, 5):
        found: dict[int, str] = dict(
            answer_questions(loaded, prompts, GenerationSettings("", 20, batch_size), lambda *_: None)
        )
        answers.append([found[i] for i in range(len(prompts))])
    assert answers[0] == answers[1] == answers[2]
    single = [loaded.generate([image], text, max_new_tokens=20) for image, text in prompts]
    assert single == answers[0]
    assert len(set(answers[0])) > 2


def test_an_answer_ends_where_its_template_does(refdata: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Template v0 ends answers with "###", which is no special token; here a part of an answer stands for it."""
    tiny = refdata / "llava_tiny"
    loaded = load_model(
        tiny / "ckpt_safetensors", vision_tower=tiny / "vision_towers" / "openai" / "clip-vit-tiny-patch14-56"
    )
    prompts = [(tiny / "inputs" / "image_A.png", "What is this?"), (tiny / "inputs" / "image_B.png", "Describe it.")]
    whole = loaded.generate([prompts[0][0]], prompts[0][1], max_new_tokens=12)
    end = whole[4:7]
    assert end.strip()
    monkeypatch.setitem(TEMPLATES, "short", dataclasses.replace(get_template("v1"), name="short", end=end))
    single = [loaded.generate([image], text, "short", max_new_tokens=12) for image, text in prompts]
    assert single[0] == whole[: whole.index(end.strip())].strip()
    found = dict(answer_questions(loaded, prompts, GenerationSettings("short", 12, 8), lambda *_: None))
    assert [found[0], found[1]] == single
    assert (get_template("v0").stop, get_template("v1").stop, get_template("llama_2").stop) == ("###", "", "")


def test_sampling_is_repeatable_and_leaves_torchs_generator_alone(base: Path, world: Path) -> None:
    loaded = load_model(base)
    image = sorted((world / "test" / "val2014").iterdir())[0]
    how = GenerationSettings("", 12, 4, (("do_sample", True),), seed=3)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second = (
        list(answer_questions(loaded, [(image, "Is there a cup?")], how, lambda *_: None)) for _ in range(2)
    )
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)


# --- several processes


def test_processes_that_share_an_evaluation_lose_no_row(finished: Path, world: Path, tmp_path: Path) -> None:
    """Over gloo; the images do not divide, and a part is left of a killed run of more processes."""
    out, part = tmp_path / "out", tmp_path / "out" / "chair.3.jsonl"
    out.mkdir()
    shutil.copy(finished / "eval.json", out)
    lines = (finished / "chair.jsonl").read_bytes().splitlines(keepends=True)
    part.write_bytes(lines[0] + lines[1][:20])
    names = [json.loads(line)["image"] for line in lines[:5]]
    data = tmp_path / "data"
    shutil.copytree(world / "test", data)
    (data / "chair_images.txt").write_text("\n".join(names))
    settings = read_json(out / "eval.json") | {"data": str(data.resolve())}
    write_json(out / "eval.json", settings)
    keys = ["--model", shipped_base(), "--data", data, "--out", out, "--max-new-tokens", 40, "--device", "cpu"]
    done = forked(command, "eval", "pope", "chair", *map(str, keys), count=2)
    assert done.codes == [0, 0], done.stderr
    assert json.loads(done.stdout) == {name: read_json(out / f"{name}.json") for name in ("pope", "chair")}
    # Five images, one of them answered already; of the other four two are the first process's, which alone speaks.
    assert done.stderr.count("descriptions for CHAIR: 2 in") == 1
    assert (out / "chair.jsonl").read_bytes() == b"".join(lines[:5])
    for split in SPLITS:
        assert (out / f"pope_{split}.jsonl").read_bytes() == (finished / f"pope_{split}.jsonl").read_bytes()
    results, expected = read_json(out / "pope.json"), read_json(finished / "pope.json")
    expected["provenance"]["data"] = settings["data"]
    assert results == expected
    assert not list(out.glob("*.[0-9]*.jsonl"))


# --- folders


def test_another_models_answers_are_refused(finished: Path, world: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    with pytest.raises(RecipeError, match=rf"another model \(.*toyworld/base, not {re.escape(str(base))}"):
        evaluate_model(base, ["pope"], world / "test", out, max_new_tokens=40)
    with pytest.raises(RecipeError, match="another max_new_tokens"):
        evaluate_model(shipped_base(), ["pope"], world / "test", out, max_new_tokens=41)
    with pytest.raises(RecipeError, match="another template"):
        evaluate_model(shipped_base(), ["pope"], world / "test", out, template="v1", max_new_tokens=40)
    for path in finished.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_answers_have_a_token_and_batches_a_prompt(world: Path, tmp_path: Path) -> None:
    """Empty answers would be scored as yes."""
    for name in ("max_new_tokens", "batch_size"):
        with pytest.raises(RecipeError, match=f"{name} is 0. Give 1 or more"):
            pope(world, tmp_path / "out", **{name: 0})
    assert not (tmp_path / "out").exists()


def test_a_model_that_changed_on_disk_is_another_one(world: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    pope(world, tmp_path / "out", model, max_new_tokens=1)
    save_tiny(tmp_path / "model", seed=1)
    with pytest.raises(RecipeError, match=r"another model \(its files"):
        pope(world, tmp_path / "out", model, max_new_tokens=1)


def test_somebody_elses_folder_is_refused(world: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match="holds something else"):
        pope(world, tmp_path)
    with pytest.raises(RecipeError, match="is a file"):
        pope(world, tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("part", ["pope", "annotations", "val2014"])
def test_missing_data_is_named(part: str, world: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(world / "test", data)
    shutil.rmtree(data / part)
    with pytest.raises(DataError, match=f"{part}.* does not exist"):
        evaluate_model(shipped_base(), ["pope", "chair"], data, tmp_path / "out", max_new_tokens=1)


def test_unknown_benchmarks_and_templates_leave_no_folder(world: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no benchmark mmlu"):
        evaluate_model(shipped_base(), ["mmlu"], world / "test", tmp_path / "out")
    with pytest.raises(RecipeError, match="no conversation template"):
        evaluate_model(shipped_base(), ["pope"], world / "test", tmp_path / "out", template="v9")
    assert not (tmp_path / "out").exists()


def test_chair_takes_a_pinned_list(world: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(world / "test", data)
    images = read_coco(data / "annotations" / "instances_val2014.json").images
    (data / "chair_images.txt").write_text("\n".join(images[1::2]) + "\n")
    result = evaluate_model(shipped_base(), ["chair"], data, tmp_path / "out", max_new_tokens=20)["chair"]
    assert [record["image"] for record in read_records(tmp_path / "out" / "chair.jsonl")] == list(images[1::2])
    whole = evaluate_model(shipped_base(), ["chair"], world / "test", tmp_path / "whole", max_new_tokens=20)["chair"]
    assert result["image_list"] != whole["image_list"]
    listed = {"name": "chair_images.txt", "sha256": file_hash(data / "chair_images.txt")}
    assert result["provenance"]["image_list_file"] == listed
    assert "image_list_file" not in whole["provenance"]
    (data / "chair_images.txt").write_text("nowhere.jpg\n")
    with pytest.raises(DataError, match=r"without annotations: nowhere\.jpg"):
        evaluate_model(shipped_base(), ["chair"], data, tmp_path / "other", max_new_tokens=20)


def test_published_lists_name_images_in_three_ways(world: Path, tmp_path: Path) -> None:
    annotations = read_coco(world / "test" / "annotations" / "instances_val2014.json")
    numbers = {name: number for number, name in annotations.ids.items()}
    names, listed = annotations.images[:4], tmp_path / "list.jsonl"
    lines = [names[0], numbers[names[1]], json.dumps({"image_id": int(numbers[names[2]]), "caption": "A cup."})]
    listed.write_text("\n".join([*lines, json.dumps({"image": names[3]}), ""]))
    assert chair_images(annotations, listed) == list(names)


# --- scores of existing files


def test_scores_of_an_answer_file(tmp_path: Path) -> None:
    labels = ["yes", "yes", "yes", "no", "no", "no", "no"]
    said = ["Yes.", "Yes, there is.", "No.", "No, there is not.", "Yes", "There is not one.", "no"]
    write_jsonl(
        tmp_path / "q.json",
        [{"question_id": i, "image": "a.jpg", "text": f"Is there {i}?", "label": v} for i, v in enumerate(labels)],
    )
    write_json(tmp_path / "a.json", [{"question_id": i, "answer": v} for i, v in enumerate(said)][::-1])
    result = score_command("pope", [tmp_path / "a.json"], ScoringInputs(questions=tmp_path / "q.json"))
    assert result.keys() >= POPE_KEYS
    assert {key: result[key] for key in ("tp", "fn", "tn", "fp", "n")} == {"tp": 2, "fn": 1, "tn": 3, "fp": 1, "n": 7}
    expected = {"accuracy": 5 / 7, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_ratio": 3 / 7}
    assert {key: result[key] for key in expected} == pytest.approx(expected)
    with pytest.raises(RecipeError, match=r"no benchmark mme.*pope, chair"):
        score_command("mme", [tmp_path / "a.json"], ScoringInputs(), "official", None)


# --- two models


def test_a_model_differs_from_itself_by_nothing(finished: Path, world: Path) -> None:
    found = compare(world / "test", finished, finished)
    for entry in [*found["pope"].values(), *found["chair"].values()]:
        assert entry["difference"] == 0
        assert entry["ci"] == pytest.approx((0, 0))
    assert all(entry["mcnemar_p"] == 1 for entry in found["pope"].values())


def test_differences_are_second_minus_first(finished: Path, world: Path, tmp_path: Path) -> None:
    """Against a model that is right about everything."""
    perfect, data = tmp_path / "perfect", world / "test"
    perfect.mkdir()
    annotations = read_coco(data / "annotations" / "instances_val2014.json")
    for split in SPLITS:
        questions = read_pope_questions(data / "pope" / f"coco_pope_{split}.json", Path())
        write_jsonl(perfect / f"pope_{split}.jsonl", [{"question_id": q.id, "answer": q.label} for q in questions])
    write_jsonl(
        perfect / "chair.jsonl",
        [{"image": i, "caption": " and ".join(sorted(annotations.objects[i]))} for i in annotations.images],
    )
    found = compare(data, finished, perfect)
    pope_scores, chair = read_json(finished / "pope.json"), read_json(finished / "chair.json")
    for split in SPLITS:
        assert found["pope"][split]["difference"] == pytest.approx(1 - pope_scores[split]["accuracy"])
    assert found["chair"]["chair_i"]["difference"] == pytest.approx(-chair["chair_i"])
    assert found["chair"]["recall"]["difference"] == pytest.approx(1 - chair["recall"])
    assert found["chair"]["chair_s"]["difference"] == pytest.approx(-chair["chair_s"])
    # Every caption with a hallucination is one on which the second alone is right.
    wrong = round(chair["chair_s"] * chair["n"])
    assert found["chair"]["chair_s"]["mcnemar_p"] == pytest.approx(min(1, 2 * 0.5**wrong))
    for split in SPLITS:
        for rate, best in (("f1", 1), ("precision", 1), ("yes_ratio", 0.5)):
            assert found["pope"][split][rate]["difference"] == pytest.approx(best - pope_scores[split][rate])
    differing = differing_answers(data, finished, perfect)
    wrong_rows = [
        (row.image, row.question.text)
        for split in SPLITS
        for row in match_answers(pope_questions(data)[split], read_records(finished / f"pope_{split}.jsonl"))
        if not row.right
    ]
    assert {(row["image"], row["question"]) for row in differing} == set(wrong_rows)
    assert sum(len(row["splits"]) for row in differing) == len(wrong_rows)
    assert all(row["right"] == [False, True] for row in differing)
    (perfect / "chair.jsonl").write_text('{"image": "a.jpg", "caption": ""}')
    with pytest.raises(DataError, match=r"Only one of .* describes .*300001\.jpg"):
        compare(data, finished, perfect, ["chair"])


def test_reading_captions_writes_nothing(finished: Path, world: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    compare(world / "test", finished, finished)
    assert {path: path.stat().st_mtime_ns for path in finished.iterdir()} == before
