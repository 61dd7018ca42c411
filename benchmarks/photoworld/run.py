"""Photoworld from photographs to the table, in stages that resume: each is whole or not there.

    python benchmarks/photoworld/fetch.py build/photoworld/assets          # packages, once
    python benchmarks/photoworld/run.py --assets build/photoworld/assets --work build/photoworld/work

Stages: scenes, tower, model, sft, base, probe, mine, study (all by default). `--tiny` runs them small, on a CPU.
Results, as JSON, go to the folder `results` of the work folder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import captions
import numpy as np
import scenes
from analysis import DOSES
from scenes import OBJECTS, Scene
from work import FIRST_ID, HERE, TINY, Paths, Sizes, evaluate, load_pixels, picture_of, read_scenes, relook

from relook.evaluate.tasks.build_pope import build_splits
from relook.files import atomic_file, read_json, write_json, write_jsonl

# ----------------------------------------------------------------------------------------------------
# Scenes


def draw_part(job: tuple[Path, Path, str, range]) -> list[tuple[dict[str, Any], np.ndarray]]:
    """Draw some scenes of a split into its folder; their pixels also go to the rows of an array on disk."""
    assets, folder, split, numbers = job
    pixels = np.load(folder / "pixels.npy", mmap_mode="r+")
    drawn = []
    for number in numbers:
        picture, scene, patches = scenes.render(assets, random.Random(FIRST_ID[split] + number))
        picture.save(picture_of(folder, split, number), "JPEG", quality=92)
        pixels[number] = np.asarray(picture).transpose(2, 0, 1)
        drawn.append((scene.as_json(), patches))
    return drawn


def make_scenes(paths: Paths, sizes: Sizes) -> dict[str, Any]:
    report = {}
    with get_context("fork").Pool(os.cpu_count()) as pool:
        for split, count in sizes.scenes.items():
            folder = paths.data(split)
            if (folder / "scenes.json").exists():
                continue
            start = time.time()
            picture_of(folder, split, 0).parent.mkdir(parents=True, exist_ok=True)
            np.lib.format.open_memmap(
                paths.pixels(split), mode="w+", dtype=np.uint8, shape=(count, 3, scenes.SIZE, scenes.SIZE)
            ).flush()
            jobs = [(paths.assets, folder, split, range(i, min(i + 50, count))) for i in range(0, count, 50)]
            drawn = [item for part in pool.imap(draw_part, jobs) for item in part]
            np.save(folder / "patches.npy", np.stack([patches for _, patches in drawn]))
            write_texts(folder, split, [Scene.from_json(record) for record, _ in drawn])
            write_json(folder / "scenes.json", [record for record, _ in drawn])  # last: the split is whole
            objects = [item for record, _ in drawn for item in Scene.from_json(record).objects]
            report[split] = {
                "scenes": count,
                "per_second": round(count / (time.time() - start), 1),
                "classes_a_scene": float(np.mean([len(Scene.from_json(r).names) for r, _ in drawn])),
                "small": float(np.mean([item.size < captions.SMALL for item in objects])),
            }
    return report


def write_texts(folder: Path, split: str, drawn: list[Scene]) -> None:
    pictures = [picture_of(folder, split, number) for number in range(len(drawn))]
    if split == "sft":  # whose texts are the base's (`write_conversations`)
        return
    write_json(folder / "annotations" / "instances_val2014.json", coco_annotations(pictures, drawn))
    if split == "pairs":
        write_pairs(folder, pictures, drawn)
    else:
        names = {picture.name: scene.names for picture, scene in zip(pictures, drawn, strict=True)}
        for name, records in build_splits(names, list(OBJECTS), 0).items():
            write_jsonl(folder / "pope" / f"coco_pope_{name}.json", records)


def write_pairs(folder: Path, pictures: list[Path], drawn: list[Scene]) -> None:
    """Write HA-DPO's files: description pairs of every dose of false objects, and question pairs."""
    first = FIRST_ID["pairs"]
    # Readers take folder and file from the end of the url, as with Visual Genome's own.
    url = "https://photoworld.invalid/val2014"
    images = [{"image_id": first + i, "url": f"{url}/{picture.name}"} for i, picture in enumerate(pictures)]
    write_json(folder / "image_data.json", images)
    for dose in DOSES:
        pairs = {}
        for number, scene in enumerate(drawn):
            chosen, rejected = captions.caption_pair(scene, dose / 100, f"pairs/{number}")
            if chosen != rejected:
                pairs[first + number] = {"chosen": [chosen], "rejected": [rejected]}
        write_json(folder / f"desc_{dose}.json", pairs)
    records = [
        {"image_id": first + i, "question": question, "chosen": chosen, "reject": rejected, "correct": False}
        for i, scene in enumerate(drawn)
        for question, chosen, rejected in captions.question_pairs(scene, f"questions/{i}")
    ]
    write_json(folder / "pope_data.json", records)


def coco_annotations(pictures: list[Path], drawn: list[Scene]) -> dict[str, Any]:
    ids = {name: number for number, name in enumerate(OBJECTS, 1)}
    images = [
        {"id": int(path.stem[-12:]), "file_name": path.name, "width": scenes.SIZE, "height": scenes.SIZE}
        for path in pictures
    ]
    items = [(image["id"], item) for image, scene in zip(images, drawn, strict=True) for item in scene.objects]
    return {
        "images": images,
        "categories": [{"id": i, "name": n, "synonyms": OBJECTS[n].get("synonyms", [])} for n, i in ids.items()],
        "annotations": [
            {
                "id": number,
                "image_id": image,
                "category_id": ids[item.name],
                "bbox": item.box,
                "area": item.pixels,
                "iscrowd": 0,
            }
            for number, (image, item) in enumerate(items, 1)
        ],
    }


# ----------------------------------------------------------------------------------------------------
# The base


def make_tower(paths: Paths, sizes: Sizes) -> dict[str, Any]:
    import torch
    from llava import tower_scores, train_tower

    net, report = train_tower(*load_pixels(paths, "sft"), *sizes.tower, sizes.tower_seconds)
    report["auc"] = tower_scores(net, load_pixels(paths, "dev")[0], read_scenes(paths, "dev"))
    with atomic_file(paths.tower) as temporary:
        torch.save({key: value.half().cpu() for key, value in net.state_dict().items()}, temporary)
    return report


def load_tower(paths: Paths, sizes: Sizes) -> Any:
    import torch
    from llava import TowerProbe

    net = TowerProbe(*sizes.tower)
    net.load_state_dict(torch.load(paths.tower))
    return net.eval().requires_grad_(False)


def make_model(paths: Paths, sizes: Sizes) -> dict[str, Any]:
    import torch
    from changed import trunk_grid
    from llava import align_projector, assemble

    from relook.files import atomic_folder

    if sizes.trunk_grid:
        trunk_grid(sizes.trunk_grid)
    lm = paths.work / "lm" if (paths.work / "lm").exists() else paths.assets / "lm"
    model, processor = assemble(load_tower(paths, sizes).tower, lm, sizes.layers)
    pixels, labels = load_pixels(paths, "sft")
    loss = align_projector(model, processor, pixels, labels, told_labels(read_scenes(paths, "sft")), sizes)
    with atomic_folder(paths.work / "start") as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        processor.save_pretrained(folder)
    return {"align_loss": loss, "parameters": sum(p.numel() for p in model.parameters())}


def told_labels(drawn: list[Scene]) -> Any:
    """Return which labels of patches the base's annotator would name in each scene, (scenes, classes + 1) bool."""
    import torch

    told = torch.zeros(len(drawn), len(scenes.CLASSES) + 1, dtype=torch.bool)
    told[:, 0] = True
    for number, scene in enumerate(drawn):
        for item in scene.objects:
            if item.size >= captions.SMALL:
                told[number, scenes.CLASSES.index(item.name) + 1] = True
    return told


def write_conversations(paths: Paths, sizes: Sizes) -> Path:
    records = []
    for number, scene in enumerate(read_scenes(paths, "sft")):
        name = picture_of(paths.data("sft"), "sft", number).name
        for turn, (prompt, answer) in enumerate(captions.conversations(scene, f"sft/{number}", sizes.claim_core)):
            sides = [{"from": "human", "value": f"<image>\n{prompt}"}, {"from": "gpt", "value": answer}]
            records.append({"id": f"{number}-{turn}", "image": name, "conversations": sides})
    file = paths.work / "conversations.json"
    write_json(file, records)
    return file


def train_base(paths: Paths, sizes: Sizes) -> dict[str, Any]:
    texts = write_conversations(paths, sizes)
    words = ("--model_name_or_path", paths.work / "start", "--output_dir", paths.base, "--seed", str(sizes.seed))
    images = ("--data_path", texts, "--image_folder", paths.data("sft") / "images")
    relook(paths, sizes, "sft", "train", HERE / "recipe_sft.yaml", *words, *sizes.sft, *images)
    run = read_json(paths.base / "run.json")
    losses = [row["loss"] for row in run["log"] if "loss" in row]
    return {"train_seconds": run["seconds"], "losses": losses[:: max(1, len(losses) // 10)]}


def evaluate_base(paths: Paths, sizes: Sizes) -> dict[str, Any]:
    report: dict[str, Any] = {"dev": evaluate(paths, sizes, "base", paths.base, "dev")}
    lines = (paths.work / "eval/dev/base/chair.jsonl").read_text().splitlines()
    report["captions"] = [json.loads(line) for line in lines[:8]]
    return report


def mine(paths: Paths, sizes: Sizes) -> dict[str, Any]:
    """Let the base describe the pair scenes, and write pairs of its captions and corrected ones."""
    from analysis import corrected

    data = paths.data("pairs")
    drawn = read_scenes(paths, "pairs")[: sizes.mined]
    pictures = [picture_of(data, "pairs", number).name for number in range(len(drawn))]
    (data / "chair_images.txt").write_text("\n".join(pictures))
    out = paths.work / "eval" / "pairs" / "base"
    words = ("eval", "chair", "--model", paths.base, "--data", data, "--out", out, "--version", "llava_hf")
    relook(paths, sizes, "mine", *words, *sizes.evaluation, change=("uncompiled",))
    pairs = corrected(data, out)
    ids = {name: FIRST_ID["pairs"] + number for number, name in enumerate(pictures)}
    write_json(
        paths.work / "desc_policy.json",
        {ids[name]: {"chosen": [chosen], "rejected": [rejected]} for name, (chosen, rejected) in pairs.items()},
    )
    return {"captions": len(pictures), "pairs": len(pairs)}


def run_probe(paths: Paths, sizes: Sizes) -> dict[str, Any]:
    import probe
    from changed import trunk_grid

    if sizes.trunk_grid:
        trunk_grid(sizes.trunk_grid)
    return probe.run(paths, sizes)


def run_study(paths: Paths, sizes: Sizes) -> dict[str, Any]:
    import study

    return study.run(paths, sizes)


STAGES: dict[str, Callable[[Paths, Sizes], dict[str, Any]]] = {
    "scenes": make_scenes,
    "tower": make_tower,
    "model": make_model,
    "sft": train_base,
    "base": evaluate_base,
    "probe": run_probe,
    "mine": mine,
    "study": run_study,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", choices=[*STAGES, []], help="default: all")
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shared", type=Path, help="folder of scenes and tower, for several bases; default: --work")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=JSON", help="sizes that differ from the defaults")
    options = parser.parse_args()
    paths = Paths(options.assets.resolve(), options.work.resolve(), (options.shared or options.work).resolve())
    changes = {name: json.loads(value) for name, value in (word.split("=", 1) for word in options.set)}
    sizes = replace(TINY if options.tiny else Sizes(), **changes)
    results = paths.work / "results"
    results.mkdir(parents=True, exist_ok=True)
    for stage in options.stages or STAGES:
        marker = results / f"{stage}.json"
        start = time.time()
        if not marker.exists() or stage == "study":
            report = STAGES[stage](paths, sizes)
            write_json(marker, {**report, "seconds": round(time.time() - start, 1)})
        print(f"== {stage}: {time.time() - start:.1f} s", flush=True)
        if stage != "study":  # which prints its table
            print(json.dumps(read_json(marker), indent=1)[:3000], flush=True)


if __name__ == "__main__":
    main()
