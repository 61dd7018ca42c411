"""Toyworld: its scenes, texts and files keep what they promise."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relook.data.annotations import read_coco, read_image_paths, read_objects
from relook.data.readers import DESCRIBE_PROMPTS, read_llava
from relook.errors import DataError
from relook.evaluate.tasks.pope import question_text, read_pope_questions
from relook.toyworld import layouts
from relook.toyworld.world import (
    BACKGROUNDS,
    EXACT,
    FILLERS,
    IMAGE_SIZE,
    MENTIONS,
    OBJECTS,
    P_COMMON,
    P_CORE,
    P_OTHER,
    QUESTIONS,
    SETTINGS,
    SHAPES,
    SIZES,
    SPLIT_SIZE,
    SPLITS,
    SYNONYMS,
    Annotator,
    Scene,
    ask_about,
    describe_scene,
    draw_scene,
    in_order,
    mention,
    opening,
    sample_scene,
    sample_scenes,
    sft_samples,
    vocabulary,
    words,
)

Write = Callable[[Path, layouts.Progress | None], Path]
PARTS: dict[str, Write] = {
    "llava": lambda root, progress: layouts.write_sft(root, 3, 12, progress),
    "vg": lambda root, progress: layouts.write_vg(root, 3, 12, progress),
    "dev": lambda root, progress: layouts.write_eval(root, "dev", 3, 12, progress),
}
every_part = pytest.mark.parametrize("part", PARTS)


def scenes(count: int = 400, split: str = "dev", seed: int = 0) -> list[Scene]:
    return list(sample_scenes(seed, split, count))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- scenes


def test_objects_lie_in_the_image_and_do_not_overlap() -> None:
    for scene in scenes():
        assert 1 <= len(scene.objects) <= 9
        assert len(set(scene.names)) == len(scene.names)
        for item in scene.objects:
            x, y, width, height = item.box
            low, high = SIZES["small" if item.small else "large"]
            assert all(low <= side <= high for side in (width, height))
            assert min(x, y) >= 0
            assert max(x + width, y + height) <= IMAGE_SIZE
        for (ax, ay, aw, ah), (bx, by, bw, bh) in combinations([item.box for item in scene.objects], 2):
            assert ax + aw <= bx or bx + bw <= ax or ay + ah <= by or by + bh <= ay


def test_presence_follows_the_priors() -> None:
    assert (P_CORE, P_COMMON, P_OTHER) == (0.65, 0.33, 0.025)
    drawn = scenes(4000)
    hits, trials = Counter[float](), Counter[float]()
    for scene in drawn:
        for name in OBJECTS:
            prior = SETTINGS[scene.setting].probability(name)
            trials[prior] += 1
            hits[prior] += name in scene.names
    for prior in (P_CORE, P_COMMON, P_OTHER):
        # An empty scene gets a core object, about 1 scene in 160 times 1/3: hence the small constant.
        assert abs(hits[prior] / trials[prior] - prior) < 4 * (prior * (1 - prior) / trials[prior]) ** 0.5 + 0.005
    assert min(Counter(scene.setting for scene in drawn).values()) > 4000 / 5 * 0.85


def test_no_scene_is_in_two_splits() -> None:
    first = sorted(SPLITS.values())
    assert all(after - before >= SPLIT_SIZE for before, after in pairwise(first))
    drawn = {split: scenes(500, split) for split in SPLITS}
    ids = [scene.id for split in SPLITS for scene in drawn[split]]
    assert len(set(ids)) == len(ids)
    contents = {split: {(scene.setting, scene.objects) for scene in drawn[split]} for split in SPLITS}
    for one, other in combinations(SPLITS, 2):
        assert not contents[one] & contents[other]
    with pytest.raises(AssertionError, match="no scene"):
        sample_scene(0, "train", SPLIT_SIZE)


def test_a_scene_depends_on_its_own_seed_only() -> None:
    random.seed(1)
    alone = sample_scene(5, "test", 7)
    assert alone == scenes(8, "test", 5)[7]
    assert alone != sample_scene(6, "test", 7)


# --- pictures


def test_every_object_and_setting_can_be_drawn_and_no_two_are_drawn_alike() -> None:
    assert set(SHAPES) == set(OBJECTS)
    assert set(BACKGROUNDS) == set(SETTINGS)
    assert len(OBJECTS) == 24
    assert len(set(SHAPES.values())) == 24


def test_a_picture_is_fixed_by_its_scene_and_shows_its_objects() -> None:
    for scene in scenes(20):
        image = draw_scene(scene)
        assert (image.size, image.mode) == ((IMAGE_SIZE, IMAGE_SIZE), "RGB")
        assert image.tobytes() == draw_scene(scene).tobytes()
        empty = np.asarray(
            draw_scene(Scene(scene.id, scene.setting, (), scene.seed)), dtype=int
        )  # same background and noise
        changed = np.abs(np.asarray(image, dtype=int) - empty).max(axis=2) > 0
        for item in scene.objects:
            x, y, width, height = item.box
            assert changed[y : y + height, x : x + width].mean() > 0.15
            changed[y : y + height, x : x + width] = False
        assert not changed.any(), "something is drawn outside the boxes"


# --- texts


def test_mentions_and_fillers_have_the_same_number_of_tokens() -> None:
    assert {len(words(mention(name, number))) for name in OBJECTS for number in range(len(MENTIONS))} == {5}
    assert {len(words(filler)) for filler in FILLERS} == {5}
    neighbours = [mention("cup", number).replace("A cup", "a cup") for number in range(len(MENTIONS))]
    assert len(set(neighbours)) == len(MENTIONS)
    named = {*OBJECTS, *SETTINGS, *(word for synonyms in SYNONYMS.values() for word in synonyms)}
    assert not named & {word.lower() for filler in FILLERS for word in words(filler)}


def test_the_exact_annotator_names_what_is_there() -> None:
    rng = random.Random(0)
    for scene in scenes(100):
        assert sorted(EXACT.believe(scene, rng)) == sorted(scene.names)
        (prompt, text), *questions = sft_samples(scene, EXACT, rng)
        assert prompt in DESCRIBE_PROMPTS
        assert text.startswith(opening(scene.setting))
        assert sorted(set(words(text)) & set(OBJECTS)) == sorted(scene.names)
        for question, answer in questions:
            (name,) = set(words(question)) & set(OBJECTS)
            assert question == question_text(name)
            assert answer == ("Yes." if name in scene.names else "No.")


def test_the_noisy_annotator_errs_at_its_rates() -> None:
    annotator, rng = Annotator(), random.Random(0)
    claimed: dict[str, list[bool]] = {"core": [], "common": [], "present": [], "other": []}
    for scene in scenes(1500):
        believed, setting = annotator.believe(scene, rng), SETTINGS[scene.setting]
        for name in OBJECTS:
            kind = "core" if name in setting.core else "common" if name in setting.common else "other"
            # What is small counts as absent: an annotator who overlooks it claims it if it is usual.
            claimed["present" if name in scene.obvious else kind].append(name in believed)
    rates = {kind: sum(values) / len(values) for kind, values in claimed.items()}
    assert rates == pytest.approx({"core": 0.6, "common": 0.0, "present": 0.9, "other": 0.0}, abs=0.04)


def test_descriptions_name_the_most_usual_objects_first_and_none_twice() -> None:
    rng = random.Random(0)
    for scene in scenes(100):
        setting, believed = SETTINGS[scene.setting], Annotator().believe(scene, rng)
        assert len(set(believed)) == len(believed)
        usual = [*setting.core, *setting.common]
        ranks = [usual.index(name) if name in usual else len(usual) + OBJECTS.index(name) for name in believed]
        assert ranks == sorted(ranks)
        assert sorted(in_order(scene.names, scene.setting)) == sorted(scene.names)


def test_questions_are_half_about_present_objects_and_tempting_otherwise() -> None:
    rng = random.Random(0)
    for scene in scenes(100):
        asked = ask_about(scene, QUESTIONS, rng)
        setting = SETTINGS[scene.setting]
        absent = [name for name in asked if name not in scene.names]
        usual = [name for name in (*setting.core, *setting.common) if name not in scene.names]
        assert len(set(asked)) == QUESTIONS
        assert len(asked) - len(absent) == min(QUESTIONS // 2, len(scene.names))
        assert len(set(absent) & set(usual)) == min(len(usual), round(len(absent) * 2 / 3))


def test_every_word_is_in_the_vocabulary() -> None:
    known, rng = set(vocabulary()), random.Random(0)
    assert vocabulary() == sorted(known)
    assert {"USER", "ASSISTANT", ":", ".", "?", ","} <= known
    for scene in scenes(200):
        for sample in sft_samples(scene, Annotator(), rng):
            assert {word for text in sample for word in words(text)} <= known
    for setting in SETTINGS:
        assert set(words(describe_scene(OBJECTS, setting, len(FILLERS), rng))) <= known


# --- files


def test_llava_layout(tmp_path: Path) -> None:
    folder = PARTS["llava"](tmp_path, None)
    samples, _ = read_llava(folder / "toyworld_mix.json", folder / "images", on_bad="error")
    assert len(samples) == 12 * (1 + QUESTIONS)
    assert len({sample.id for sample in samples}) == len(samples)
    assert all(sample.turns[0].prompt.startswith("<image>\n") for sample in samples)


def test_visual_genome_layout(tmp_path: Path) -> None:
    folder = PARTS["vg"](tmp_path, None)
    paths, objects = read_image_paths(folder), read_objects(folder)
    assert {path.parent.name for path in paths.values()} == {"VG_100K", "VG_100K_2"}
    for scene in scenes(12, "pairs", 3):
        with Image.open(paths[str(scene.id)]) as image:
            assert (image.format, image.size) == ("JPEG", (IMAGE_SIZE, IMAGE_SIZE))
        assert objects[str(scene.id)] == set(scene.names)
    regions = json.loads((folder / "region_descriptions.json").read_text())
    assert [[region["phrase"] for region in entry["regions"]] for entry in regions] == [
        [mention(name) for name in scene.names] for scene in scenes(12, "pairs", 3)
    ]


def test_evaluation_layout_and_its_questions_agree_with_the_annotations(tmp_path: Path) -> None:
    folder = layouts.write_eval(tmp_path, "dev", 3, 40)
    annotations = read_coco(folder / "annotations" / "instances_val2014.json")
    assert annotations.categories == OBJECTS
    assert annotations.synonyms == {name: tuple(synonyms) for name, synonyms in SYNONYMS.items()}
    for scene in scenes(40, "dev", 3):
        assert annotations.boxes[layouts.coco_name(scene)] == tuple((item.name, item.box) for item in scene.objects)
    yes = []
    for split in ("random", "popular", "adversarial"):
        questions = read_pope_questions(folder / "pope" / f"coco_pope_{split}.json", folder / "val2014")
        for question in questions:
            assert question.image.is_file()
            (name,) = set(re.findall(r"\w+", question.text)) & set(OBJECTS)
            assert (question.label == "yes") == (name in annotations.objects[question.image.name])
        yes.append([question for question in questions if question.label == "yes"])
        assert len(yes[-1]) * 2 == len(questions) > 0
    assert yes[0] == yes[1] == yes[2]


@every_part
def test_the_same_seed_gives_the_same_bytes(part: str, tmp_path: Path) -> None:
    first = tree(PARTS[part](tmp_path / "a", None))
    assert first == tree(PARTS[part](tmp_path / "b", None))
    assert first.keys() > {layouts.MARKER}


@every_part
def test_a_killed_run_is_completed_to_the_same_bytes(part: str, tmp_path: Path) -> None:
    def killed(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PARTS[part](tmp_path / "killed", killed)
    assert json.loads((tmp_path / "killed" / part / layouts.MARKER).read_text())["finished"] is False
    again = tree(PARTS[part](tmp_path / "killed", None))
    assert again == tree(PARTS[part](tmp_path / "whole", None))


@every_part
def test_a_finished_part_is_skipped(part: str, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    PARTS[part](tmp_path, lambda done, total: calls.append((done, total)))
    assert calls == [(number, 12) for number in range(1, 13)]
    PARTS[part](tmp_path, lambda done, total: calls.append((done, total)))
    assert len(calls) == 12


@every_part
def test_somebody_elses_folder_is_refused(part: str, tmp_path: Path) -> None:
    other = tmp_path / "other" / part / "notes.txt"
    other.parent.mkdir(parents=True)
    other.write_text("mine")
    with pytest.raises(DataError, match="holds something else"):
        PARTS[part](tmp_path / "other", None)
    assert tree(other.parent) == {"notes.txt": b"mine"}
    (tmp_path / part).write_text("a file, not a folder")
    with pytest.raises(DataError, match="holds something else"):
        PARTS[part](tmp_path, None)


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": 1, "seed": 4, "scenes": 12, "finished": true}', "{"])
def test_another_world_or_a_strange_marker_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / layouts.MARKER).write_text(content)
    with pytest.raises(DataError):
        PARTS["llava"](tmp_path, None)


def test_a_kill_during_the_first_write_does_not_lock_the_folder(tmp_path: Path) -> None:
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / f".{layouts.MARKER}.123.part").write_text("{")
    assert (PARTS["llava"](tmp_path, None) / "toyworld_mix.json").is_file()


@pytest.mark.parametrize(("split", "count"), [("tset", 3), ("test", 0), ("test", SPLIT_SIZE + 1)])
def test_impossible_requests_are_refused_before_anything_is_written(split: str, count: int, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no split"):
        layouts.write_eval(tmp_path, split, 0, count)
    assert not any(tmp_path.iterdir())
