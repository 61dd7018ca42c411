"""Dataset folders with known defects: what is damaged, and the names that a check has to give it."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Damage = Callable[[random.Random], bytes | None]
Expected = dict[str, set[str]]  # reason to names
SIZE = (24, 32, 3)


def picture(rng: random.Random, mode: str = "RGB") -> Image.Image:
    noise = np.frombuffer(rng.randbytes(SIZE[0] * SIZE[1] * SIZE[2]), np.uint8).reshape(SIZE)
    if mode == "I;16":
        return Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    return Image.fromarray(noise).convert(mode)


def encoded(rng: random.Random, form: str = "JPEG", mode: str = "RGB") -> bytes:
    made = io.BytesIO()
    picture(rng, mode).save(made, form)
    return made.getvalue()


def cut(rng: random.Random) -> bytes:
    """A download that stopped: anywhere behind the head, or one byte before the end."""
    data = encoded(rng)
    head = data.index(b"\xff\xda") + 14
    return data[: rng.choice((rng.randrange(head, len(data) - 2), len(data) - 1))]


def zeroed(rng: random.Random) -> bytes:
    """A download whose rest was reserved and never written. Pillow decodes it without an error."""
    data = encoded(rng)
    kept = rng.randrange(data.index(b"\xff\xda") + 14, len(data) - 2)
    return data[:kept] + bytes(len(data) - kept)


# Suffix, what becomes of the file, and what a check has to say. None: no file.
IMAGES: dict[str, tuple[str, Damage, str]] = {
    "gif under jpg": (".jpg", lambda rng: encoded(rng, "GIF"), "wrong extension"),
    "png under jpg": (".jpg", lambda rng: encoded(rng, "PNG"), "wrong extension"),
    "webp under jpg": (".jpg", lambda rng: encoded(rng, "WEBP"), "wrong extension"),
    "jpg under png": (".png", lambda rng: encoded(rng), "wrong extension"),
    "cmyk": (".jpg", lambda rng: encoded(rng, "JPEG", "CMYK"), "unusual mode"),
    "palette": (".png", lambda rng: encoded(rng, "PNG", "P"), "unusual mode"),
    "alpha": (".png", lambda rng: encoded(rng, "PNG", "RGBA"), "unusual mode"),
    "16 bits": (".png", lambda rng: encoded(rng, "PNG", "I;16"), "unusual mode"),
    "cut": (".jpg", cut, "truncated"),
    "zeroed": (".jpg", zeroed, "truncated"),
    "cut png": (".png", lambda rng: encoded(rng, "PNG")[:-12], "truncated"),
    "empty": (".jpg", lambda rng: b"", "empty file"),
    "text": (".jpg", lambda rng: b"<html>404 Not Finding</html>", "not an image"),
    "noise": (".jpg", lambda rng: rng.randbytes(900), "not an image"),
    "missing": (".jpg", lambda rng: None, "missing"),
}
SOUND: tuple[tuple[str, Damage], ...] = (
    (".jpg", lambda rng: encoded(rng)),
    (".jpg", lambda rng: encoded(rng, "JPEG", "L")),
    (".jpg", lambda rng: encoded(rng) + b"trailing bytes, as some cameras write"),
    (".JPEG", lambda rng: encoded(rng)),
    (".png", lambda rng: encoded(rng, "PNG")),
    (".gif", lambda rng: encoded(rng, "GIF")),
    (".webp", lambda rng: encoded(rng, "WEBP")),
)


def talk(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]


def bad_records(image: str) -> dict[str, tuple[dict[str, Any] | str, str]]:
    """Records of LLaVA's layout that cannot be used, on a sound image."""
    return {
        "no turns": ({"id": "1", "image": image}, "no conversations"),
        "no answer": ({"image": image, "conversations": talk("<image>\nWhat?", " ")}, "empty answer"),
        "no placeholder": (
            {"image": image, "conversations": talk("What?", "A cat.")},
            "number of <image> differs from the number of images",
        ),
        "out of the folder": (
            {"image": "../secret.jpg", "conversations": talk("<image>\nWhat?", "A cat.")},
            "image path leads out of its folder",
        ),
        "half a character": (
            {"image": image, "conversations": talk("<image>\nWhat?", "A \ud83d cat.")},
            "not valid Unicode",
        ),
        "no record": ("text", "no conversations"),
    }


def write_llava(root: Path, count: int, each: int, seed: int = 0) -> tuple[Expected, Expected]:
    """A LLaVA folder of `count` images, `each` of them with each defect; the image and record faults to be found."""
    rng = random.Random(seed)
    kinds: list[tuple[str, Damage, str]] = [kind for kind in IMAGES.values() for _ in range(each)]
    kinds += [(*rng.choice(SOUND), "") for _ in range(count - len(kinds))]
    rng.shuffle(kinds)
    images: Expected = {}
    records: list[Any] = []
    expected: Expected = {}
    sound: list[str] = []
    for number, (suffix, damage, fault) in enumerate(kinds):
        name = f"part{number % 7}/{number:06d}{suffix}"
        path = root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = damage(rng)
        if data is not None:
            path.write_bytes(data)
        if fault:
            images.setdefault(fault, set()).add(name)
        else:
            sound.append(name)
        if fault not in ("", "wrong extension", "unusual mode"):
            lost = "image file missing" if fault == "missing" else "image file broken"
            expected.setdefault(lost, set()).add(str(len(records)))
        records.append({"id": str(number), "image": name, "conversations": talk("<image>\nWhat?", f"Thing {number}.")})
    named = set(sound)
    whole = [record for record in records if record["image"] in named]
    for _ in range(each):
        for record, fault in bad_records(rng.choice(sound)).values():
            expected.setdefault(fault, set()).add(str(len(records)))
            records.append(record)
        expected.setdefault("duplicate", set()).add(str(len(records)))
        records.append(rng.choice(whole))
        records.append({"id": "t", "conversations": talk("What is blue?", f"The sky, {len(records)} times.")})
    (root / "llava_mix.json").write_text(json.dumps(records))
    return images, expected
