"""Scenes of photographed objects before photographed places, with exact boxes of what is visible.

A place is a crop of a panorama, whose horizon is known, so an object's size follows from its height and its distance.
What comes together follows the setting: core objects are there in .6 of its scenes, common ones in .3, others in .003.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

SIZE, PATCH = 224, 16
P_CORE, P_COMMON, P_OTHER = 0.60, 0.30, 0.003
MIN_SHARE, MIN_PIXELS = 0.35, 60  # an object of which less is visible leaves the scene
PLACINGS = 3
PATCH_PIXELS = 40  # of 256, from which on a patch is said to show an object
UPRIGHT = {"mug", "teapot", "kettle", "pitcher", "glass", "toolbox", "pepper grinder", "camera", "rubber duck"}
LETTERED = {"bus", "garbage truck", "fire truck", "toolbox"}  # not to be mirrored

_WORLD = yaml.safe_load((Path(__file__).parent / "world.yaml").read_text(encoding="utf-8"))
OBJECTS: dict[str, dict[str, Any]] = _WORLD["objects"]
SETTINGS: dict[str, dict[str, Any]] = _WORLD["settings"]
CLASSES = list(OBJECTS)


@dataclass(frozen=True)
class Visible:
    """An object of a scene: its box (x, y, width, height) and number of pixels count what nothing hides."""

    name: str
    file: str
    box: tuple[int, int, int, int]
    pixels: int

    @property
    def size(self) -> float:
        return math.sqrt(self.pixels)


@dataclass(frozen=True)
class Scene:
    """A scene's setting and objects, the nearest last."""

    setting: str
    objects: tuple[Visible, ...]

    @property
    def names(self) -> set[str]:
        return {item.name for item in self.objects}

    @property
    def usual(self) -> list[str]:
        """The setting's core and common objects."""
        return [*SETTINGS[self.setting]["core"], *SETTINGS[self.setting]["common"]]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(record: dict[str, Any]) -> Scene:
        return Scene(record["setting"], tuple(Visible(**{**o, "box": tuple(o["box"])}) for o in record["objects"]))


@dataclass
class _Sprite:
    """A stamp at its size and place: `base` is where it stands, by which sprites are ordered."""

    name: str
    file: str
    kind: str
    picture: Image.Image  # RGBA
    x: int
    y: int
    base: float

    def __post_init__(self) -> None:
        # The part within the picture: slices of the picture, and the mask below them.
        alpha = np.asarray(self.picture.getchannel("A")) > 100
        self.area = int(alpha.sum())
        left, top = max(0, self.x), max(0, self.y)
        right = max(left, min(SIZE, self.x + self.picture.width))
        bottom = max(top, min(SIZE, self.y + self.picture.height))
        self.window = (slice(top, bottom), slice(left, right))
        self.mask = alpha[top - self.y : bottom - self.y, left - self.x : right - self.x]


def render(assets: Path, rng: random.Random) -> tuple[Image.Image, Scene, np.ndarray]:
    """Draw one scene.

    Returns:
        The RGB picture, the scene, and the class (1 on; 0 is none) that each patch shows, (14, 14) uint8.
    """
    name = rng.choice(list(SETTINGS))
    setting = SETTINGS[name]
    fov, pitch = rng.choice((55, 65, 75)), rng.choice((-12, -9, -6))
    picture, horizon, focal = _background(assets, rng.choice(setting["panoramas"]), rng.random(), fov, pitch)
    light = float(np.asarray(picture.resize((1, 1))).mean())
    table = int(SIZE * rng.uniform(0.40, 0.55)) if setting["stage"] == "table" else 0
    if table:
        picture = _with_table(picture, table, rng)
    items = _choose(setting, rng)
    sprites: list[_Sprite] = []
    for _ in range(PLACINGS):  # what is hidden or hides others is placed anew
        missing = [item for item, count in Counter(items).items() for _ in range(count - _count(sprites, item))]
        sprites += [_place(assets, rng, *item, horizon, focal, table) for item in missing]
        sprites = _drop_hidden(sorted(sprites, key=lambda sprite: sprite.base))
    if not sprites:  # all of them were hidden or outside: once more, with other dice
        return render(assets, rng)
    for sprite in sprites:
        _paste(picture, sprite, light, rng)
    labels = _labels(sprites)
    noise = np.random.default_rng(rng.getrandbits(32)).standard_normal((SIZE, SIZE, 1), np.float32)
    pixels = np.asarray(picture, np.float32) + noise * rng.uniform(1, 4)
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return picture, Scene(name, tuple(_visible(sprites, labels))), _patches(sprites, labels)


def _count(sprites: list[_Sprite], item: tuple[str, str]) -> int:
    return sum((sprite.name, sprite.file) == item for sprite in sprites)


def _choose(setting: dict[str, Any], rng: random.Random) -> list[tuple[str, str]]:
    usual = {**dict.fromkeys(setting["common"], P_COMMON), **dict.fromkeys(setting["core"], P_CORE)}
    on_table = setting["stage"] == "table"
    names = []
    for name, item in OBJECTS.items():
        if name in usual or (item["kind"] == "table") == on_table:
            names += [name] if rng.random() < usual.get(name, P_OTHER) else []
    names = names or [rng.choice(setting["core"])]
    counts = [rng.choices((1, 2, 3), (0.75, 0.17, 0.08))[0] for _ in names]
    return [(n, rng.choice(OBJECTS[n]["files"])) for n, count in zip(names, counts, strict=True) for _ in range(count)]


def _place(assets: Path, rng: random.Random, name: str, file: str, horizon: float, focal: float, table: int) -> _Sprite:
    stamp, kind = _stamp(assets, file), OBJECTS[name]["kind"]
    if table:
        base = rng.uniform(table + 18, SIZE - 4)
        height = OBJECTS[name]["height"] ** 0.8 * SIZE * (0.75 + 0.8 * (base - table) / (SIZE - table))
    else:
        # A camera 1.2 m above the ground: y - horizon = focal * 1.2 / depth. Heights are compressed (** .7), since an
        # elephant and a mushroom have to fit the same picture.
        depth = math.exp(rng.uniform(math.log(2.6), math.log(9)))
        base = min(horizon + focal * 1.2 / depth, SIZE - 2)
        depth = focal * 1.2 / (base - horizon)
        height = focal * OBJECTS[name]["height"] ** 0.7 / depth
    height *= rng.uniform(0.85, 1.15)
    bottom, order = base, base
    if kind == "air":
        bottom, order = horizon + rng.uniform(-70, 10), horizon - 1 + rng.random()
    elif kind == "sky":
        bottom, order = rng.uniform(30, max(31, horizon - 5)), horizon - 1 + rng.random()
        height = rng.uniform(22, 60)
    elif kind == "post":
        bottom = base - height * 1.6
    height = max(12, min(height, SIZE * 0.7, SIZE * 0.7 * stamp.height / stamp.width))
    width = max(8, int(height * stamp.width / stamp.height))
    picture = stamp.resize((width, int(height)), Image.Resampling.BILINEAR, reducing_gap=2)
    if rng.random() < 0.5 and kind != "post" and name not in LETTERED:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    turn = 35 if kind == "table" and name not in UPRIGHT else 4
    picture = picture.rotate(rng.uniform(-turn, turn), Image.Resampling.BILINEAR, expand=True)
    x = int(rng.uniform(-0.15 * width, SIZE - 0.85 * width))
    return _Sprite(name, file, kind, picture, x, int(bottom - picture.height), order)


def _labels(sprites: list[_Sprite]) -> np.ndarray:
    labels = np.zeros((SIZE, SIZE), np.int64)  # number of the sprite that is visible, 1 on
    for number, sprite in enumerate(sprites, 1):
        labels[sprite.window][sprite.mask] = number
    return labels


def _drop_hidden(sprites: list[_Sprite]) -> list[_Sprite]:
    """Drop, one at a time, the sprite of which the smallest share is visible, until enough of each is."""
    while sprites:
        pixels = np.bincount(_labels(sprites).ravel(), minlength=len(sprites) + 1)[1:]
        shares = [0.0 if n < MIN_PIXELS else n / max(1, s.area) for n, s in zip(pixels, sprites, strict=True)]
        worst = int(np.argmin(shares))
        if shares[worst] >= MIN_SHARE:
            break
        sprites = sprites[:worst] + sprites[worst + 1 :]
    return sprites


def _visible(sprites: list[_Sprite], labels: np.ndarray) -> list[Visible]:
    objects = []
    for number, sprite in enumerate(sprites, 1):
        ys, xs = np.nonzero(labels == number)
        box = (int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1)
        objects.append(Visible(sprite.name, sprite.file.rsplit("/", 1)[-1], box, len(xs)))
    return objects


def _patches(sprites: list[_Sprite], labels: np.ndarray) -> np.ndarray:
    classes = np.array([0, *(CLASSES.index(sprite.name) + 1 for sprite in sprites)])
    side = SIZE // PATCH
    # (224, 224) -> (14, 16, 14, 16) -> (196, 256): one row a patch.
    cells = classes[labels].reshape(side, PATCH, side, PATCH).swapaxes(1, 2).reshape(side * side, -1)
    shown = np.zeros(side * side, np.uint8)
    for i in np.nonzero(cells.any(1))[0]:
        counts = np.bincount(cells[i])
        counts[0] = 0
        shown[i] = counts.argmax() if counts.max() >= PATCH_PIXELS else 0
    return shown.reshape(side, side)


# ----------------------------------------------------------------------------------------------------
# Pixels


@cache
def _panorama(assets: Path, name: str) -> np.ndarray:
    picture = Image.open(assets / "panoramas" / f"{name}.png").convert("RGB")
    return np.asarray(picture.resize((1536, 768), Image.Resampling.BICUBIC))


@cache
def _stamp(assets: Path, file: str) -> Image.Image:
    return Image.open(assets / "stamps" / f"{file.replace('/', '__')}.png").convert("RGBA")


@cache
def _rays(fov: int, pitch: int) -> tuple[np.ndarray, np.ndarray, float]:
    focal = SIZE / 2 / math.tan(math.radians(fov) / 2)
    v, u = np.mgrid[:SIZE, :SIZE]
    x, y, z = (u - SIZE / 2 + 0.5) / focal, -(v - SIZE / 2 + 0.5) / focal, np.ones((SIZE, SIZE))
    a = math.radians(pitch)
    y, z = y * math.cos(a) + z * math.sin(a), z * math.cos(a) - y * math.sin(a)
    return np.arctan2(x, z) / (2 * math.pi), 0.5 - np.arctan2(y, np.hypot(x, z)) / math.pi, focal


def _background(assets: Path, name: str, yaw: float, fov: int, pitch: int) -> tuple[Image.Image, float, float]:
    """Return the crop of a panorama, the row of its horizon, and the focal length in pixels."""
    panorama = _panorama(assets, name)
    longitude, latitude, focal = _rays(fov, pitch)
    height, width, _ = panorama.shape
    columns = ((longitude + yaw) % 1 * width).astype(np.int64).clip(0, width - 1)
    rows = (latitude * height).astype(np.int64).clip(0, height - 1)
    return Image.fromarray(panorama[rows, columns]), SIZE / 2 + focal * math.tan(math.radians(pitch)), focal


def _with_table(picture: Image.Image, top: int, rng: random.Random) -> Image.Image:
    """Paint a table top: a colour of wood with grain along the rows, before the blurred room."""
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(1, 3)))
    dice = np.random.default_rng(rng.getrandbits(32))
    grain = dice.standard_normal((SIZE - top, 8), np.float32).cumsum(1) * 3 + dice.standard_normal((SIZE - top, 1)) * 5
    colour = np.array(rng.choice(((150, 104, 66), (118, 78, 50), (186, 150, 108), (96, 70, 54)))) * rng.uniform(
        0.7, 1.1
    )
    rows = (colour + grain[..., None]).clip(0, 255).astype(np.uint8)
    picture.paste(Image.fromarray(rows).resize((SIZE, SIZE - top), Image.Resampling.BICUBIC), (0, top))
    return picture


def _paste(picture: Image.Image, sprite: _Sprite, light: float, rng: random.Random) -> None:
    stamp, width, height = sprite.picture, *sprite.picture.size
    if sprite.kind == "post":
        x = sprite.x + width // 2
        foot = (x, int(sprite.base))
        ImageDraw.Draw(picture).line([(x, sprite.y + height - 2), foot], (125, 125, 128), max(2, int(height * 0.06)))
    elif sprite.kind in ("ground", "table"):  # a soft shadow
        shadow = Image.new("L", (width + 16, 24))
        thick = max(2, min(9, int(height * 0.07)))
        ImageDraw.Draw(shadow).ellipse((8 + width * 0.06, 12 - thick, 8 + width * 0.94, 12 + thick), 115)
        shadow = shadow.filter(ImageFilter.BoxBlur(2))
        picture.paste((0, 0, 0), (sprite.x - 8, sprite.y + height - 14), shadow)
    dim = min(1.0, 0.55 + 0.45 * light / 125)  # stamps were taken by day
    colour = ImageEnhance.Brightness(stamp.convert("RGB")).enhance(dim * rng.uniform(0.85, 1.12))
    picture.paste(
        ImageEnhance.Color(colour).enhance(rng.uniform(0.75, 1.15)), (sprite.x, sprite.y), stamp.getchannel("A")
    )
