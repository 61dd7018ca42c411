"""Toyworld's scenes: five settings, 24 objects that tend to come together, and exact boxes.

A model trained here on noisy texts claims objects that usually belong to a setting but are not in the picture: the
phenomenon that relook is about, small enough for two CPU cores.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from relook.data.readers import DESCRIBE_PROMPTS
from relook.evaluate.tasks.pope import question_text

# ----------------------------------------------------------------------------------------------------

IMAGE_SIZE = 96
CELLS = 3  # objects stand in the cells of a 3 x 3 grid, so they never overlap
CELL = IMAGE_SIZE // CELLS
SIZES = {"small": (10, 13), "large": (17, 28)}  # smallest and largest side of an object, pixels
SMALL = 14  # pixels: an object whose sides are all shorter is small, and a careless annotator overlooks it
P_SMALL = 0.3
P_CORE, P_COMMON, P_OTHER = 0.65, 0.33, 0.025


@dataclass(frozen=True)
class Setting:
    """Name a place, and the objects that are usual there."""

    name: str
    core: tuple[str, ...]
    common: tuple[str, ...]

    def probability(self, name: str) -> float:
        """Return the prior probability that an object is present."""
        return P_CORE if name in self.core else P_COMMON if name in self.common else P_OTHER


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("kitchen", ("pot", "cup", "plate"), ("apple", "bottle", "chair", "clock")),
        Setting("street", ("car", "bus", "sign"), ("bicycle", "tree", "bird", "bench")),
        Setting("park", ("tree", "bench", "dog"), ("kite", "bird", "flower", "ball")),
        Setting("bedroom", ("bed", "lamp", "book"), ("chair", "clock", "cat", "flower")),
        Setting("beach", ("ball", "umbrella", "boat"), ("kite", "bird", "bottle", "dog")),
    )
}
OBJECTS = tuple(sorted({name for setting in SETTINGS.values() for name in (*setting.core, *setting.common)}))

# Rows of the grid in which an object stands, if there is a free cell; all others stand on the ground.
ROWS = {"bird": (0,), "kite": (0,), "clock": (0,), "boat": (1,)}
GROUND = (1, 2)

# First image id of each split, and how many scenes (so ids) a split has at most.
SPLITS = {"train": 1, "pairs": 100_001, "dev": 200_001, "test": 300_001}
SPLIT_SIZE = 100_000


@dataclass(frozen=True)
class PlacedObject:
    """Hold an object and its box (x, y, width, height) in pixels."""

    name: str
    box: tuple[int, int, int, int]

    @property
    def small(self) -> bool:
        return max(self.box[2:]) < SMALL


@dataclass(frozen=True)
class Scene:
    """Hold one picture's content. `id` is unique over all splits of a world; `seed` fixes how it is drawn."""

    id: int
    setting: str
    objects: tuple[PlacedObject, ...]
    seed: str

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(placed.name for placed in self.objects)

    @property
    def obvious(self) -> tuple[str, ...]:
        """Return the names of the objects that are not small."""
        return tuple(placed.name for placed in self.objects if not placed.small)


def sample_scene(world_seed: int, split: str, index: int) -> Scene:
    """Draw scene `index` of a split: the same for the same arguments, whatever else is drawn.

    `split` is a key of `SPLITS`, and `index` counts from 0 to below `SPLIT_SIZE`: ids of two splits never meet.
    """
    assert 0 <= index < SPLIT_SIZE, f"{split} has no scene {index}"
    seed = f"{world_seed}/{split}/{index}"
    rng = random.Random(seed)
    setting = SETTINGS[rng.choice(list(SETTINGS))]
    # Each object by its own coin; a scene is never empty.
    names = [name for name in OBJECTS if rng.random() < setting.probability(name)] or [rng.choice(setting.core)]
    rng.shuffle(names)
    free = rng.sample(range(CELLS * CELLS), CELLS * CELLS)
    placed = []
    for name in names[: len(free)]:
        cell = next((cell for cell in free if cell // CELLS in ROWS.get(name, GROUND)), free[0])
        free.remove(cell)
        placed.append(PlacedObject(name, _box(cell, rng)))
    return Scene(SPLITS[split] + index, setting.name, tuple(placed), seed)


def sample_scenes(world_seed: int, split: str, count: int) -> Iterator[Scene]:
    return (sample_scene(world_seed, split, index) for index in range(count))


def _box(cell: int, rng: random.Random) -> tuple[int, int, int, int]:
    size = SIZES["small" if rng.random() < P_SMALL else "large"]
    width, height = rng.randint(*size), rng.randint(*size)
    row, column = divmod(cell, CELLS)
    x = column * CELL + rng.randint(0, CELL - width)
    # What stands on the ground stands low in its cell, so that the middle row's objects are not in the air.
    y = row * CELL + rng.randint(max(0, CELL - height - 8) if row in GROUND else 0, CELL - height)
    return x, y, width, height


# ----------------------------------------------------------------------------------------------------
# Scenes to pictures: each object is a few Pillow primitives in the unit square, each setting a two-part background.

NOISE = 4.0  # standard deviation of the pixel noise, of 255
SCALE = 4  # pictures are drawn so many times as large, then reduced: smooth edges
EDGE = 2  # width of an outline, pixels of the large drawing
Color = tuple[int, int, int]

RED, BLUE, GREEN, YELLOW = (205, 50, 45), (50, 90, 200), (45, 140, 60), (235, 200, 60)
WHITE, GREY, DARK, BROWN = (240, 240, 235), (140, 140, 145), (45, 45, 55), (125, 80, 45)
ORANGE, PINK, PURPLE, CYAN = (235, 130, 40), (235, 130, 165), (130, 70, 165), (90, 190, 205)

# name: primitives (kind, points of the unit square, color). Kinds are Pillow's; "line" has a width of 1/10 of the box.
SHAPES: dict[str, tuple[tuple[str, tuple[float, ...], Color], ...]] = {
    "apple": (
        ("ellipse", (0.1, 0.25, 0.9, 1), RED),
        ("line", (0.5, 0.3, 0.6, 0), BROWN),
        ("ellipse", (0.55, 0.02, 0.9, 0.2), GREEN),
    ),
    "ball": (
        ("ellipse", (0, 0, 1, 1), WHITE),
        ("pieslice", (0, 0, 1, 1, 0, 60), RED),
        ("pieslice", (0, 0, 1, 1, 120, 180), BLUE),
        ("pieslice", (0, 0, 1, 1, 240, 300), YELLOW),
    ),
    "bed": (
        ("rectangle", (0, 0.1, 0.12, 1), BROWN),
        ("rectangle", (0.12, 0.5, 1, 0.8), PURPLE),
        ("rectangle", (0.12, 0.38, 0.4, 0.55), WHITE),
        ("rectangle", (0.9, 0.6, 1, 1), BROWN),
    ),
    "bench": (
        ("rectangle", (0, 0.15, 1, 0.3), BROWN),
        ("rectangle", (0, 0.5, 1, 0.65), BROWN),
        ("rectangle", (0.1, 0.65, 0.2, 1), DARK),
        ("rectangle", (0.8, 0.65, 0.9, 1), DARK),
    ),
    "bicycle": (
        ("ring", (0, 0.4, 0.45, 1), DARK),
        ("ring", (0.55, 0.4, 1, 1), DARK),
        ("line", (0.2, 0.7, 0.45, 0.2), RED),
        ("line", (0.45, 0.2, 0.78, 0.7), RED),
        ("line", (0.7, 0.15, 0.78, 0.7), RED),
    ),
    "bird": (
        ("ellipse", (0.1, 0.35, 0.75, 0.85), CYAN),
        ("ellipse", (0.6, 0.15, 0.95, 0.5), CYAN),
        ("polygon", (0.92, 0.25, 1, 0.35, 0.9, 0.4), ORANGE),
        ("polygon", (0.2, 0.5, 0.6, 0.5, 0.3, 0), DARK),
    ),
    "boat": (
        ("polygon", (0, 0.65, 1, 0.65, 0.8, 1, 0.2, 1), BROWN),
        ("polygon", (0.5, 0, 0.5, 0.58, 0.05, 0.58), WHITE),
        ("polygon", (0.56, 0.15, 0.56, 0.58, 0.9, 0.58), RED),
    ),
    "book": (
        ("rectangle", (0.05, 0.05, 0.95, 0.95), BLUE),
        ("rectangle", (0.05, 0.05, 0.2, 0.95), DARK),
        ("rectangle", (0.35, 0.2, 0.8, 0.4), YELLOW),
    ),
    "bottle": (
        ("rectangle", (0.25, 0.35, 0.75, 1), GREEN),
        ("rectangle", (0.4, 0, 0.6, 0.4), GREEN),
        ("rectangle", (0.25, 0.55, 0.75, 0.75), WHITE),
    ),
    "bus": (
        ("rectangle", (0, 0.1, 1, 0.8), YELLOW),
        ("rectangle", (0.08, 0.2, 0.92, 0.42), CYAN),
        ("ellipse", (0.1, 0.65, 0.35, 1), DARK),
        ("ellipse", (0.65, 0.65, 0.9, 1), DARK),
    ),
    "car": (
        ("rectangle", (0, 0.45, 1, 0.8), RED),
        ("polygon", (0.2, 0.45, 0.35, 0.12, 0.7, 0.12, 0.85, 0.45), CYAN),
        ("ellipse", (0.1, 0.65, 0.35, 1), DARK),
        ("ellipse", (0.65, 0.65, 0.9, 1), DARK),
    ),
    "cat": (
        ("ellipse", (0.15, 0.4, 0.85, 1), ORANGE),
        ("ellipse", (0.25, 0.15, 0.75, 0.6), ORANGE),
        ("polygon", (0.25, 0.3, 0.3, 0, 0.45, 0.2), ORANGE),
        ("polygon", (0.55, 0.2, 0.7, 0, 0.75, 0.3), ORANGE),
        ("ellipse", (0.36, 0.3, 0.44, 0.4), DARK),
        ("ellipse", (0.56, 0.3, 0.64, 0.4), DARK),
    ),
    "chair": (
        ("rectangle", (0.1, 0, 0.25, 1), BROWN),
        ("rectangle", (0.1, 0.5, 0.9, 0.65), BROWN),
        ("rectangle", (0.75, 0.6, 0.9, 1), BROWN),
    ),
    "clock": (
        ("ellipse", (0, 0, 1, 1), DARK),
        ("ellipse", (0.12, 0.12, 0.88, 0.88), WHITE),
        ("line", (0.5, 0.5, 0.5, 0.2), DARK),
        ("line", (0.5, 0.5, 0.72, 0.6), RED),
    ),
    "cup": (
        ("rectangle", (0.1, 0.2, 0.7, 0.95), BLUE),
        ("ring", (0.55, 0.35, 1, 0.8), BLUE),
        ("ellipse", (0.1, 0.1, 0.7, 0.3), WHITE),
    ),
    "dog": (
        ("ellipse", (0.05, 0.35, 0.8, 0.8), BROWN),
        ("ellipse", (0.6, 0.1, 1, 0.5), BROWN),
        ("rectangle", (0.12, 0.7, 0.24, 1), BROWN),
        ("rectangle", (0.6, 0.7, 0.72, 1), BROWN),
        ("ellipse", (0.62, 0.1, 0.74, 0.45), DARK),
    ),
    "flower": (
        ("line", (0.5, 0.5, 0.5, 1), GREEN),
        ("ellipse", (0.05, 0.2, 0.5, 0.6), PINK),
        ("ellipse", (0.5, 0.2, 0.95, 0.6), PINK),
        ("ellipse", (0.28, 0, 0.72, 0.4), PINK),
        ("ellipse", (0.28, 0.38, 0.72, 0.75), PINK),
        ("ellipse", (0.36, 0.26, 0.64, 0.52), YELLOW),
    ),
    "kite": (
        ("polygon", (0.5, 0, 0.95, 0.35, 0.5, 0.8, 0.05, 0.35), PURPLE),
        ("line", (0.5, 0, 0.5, 0.8), YELLOW),
        ("line", (0.05, 0.35, 0.95, 0.35), YELLOW),
        ("line", (0.5, 0.8, 0.75, 1), DARK),
    ),
    "lamp": (
        ("polygon", (0.3, 0, 0.7, 0, 1, 0.5, 0, 0.5), YELLOW),
        ("rectangle", (0.45, 0.5, 0.55, 0.9), DARK),
        ("rectangle", (0.2, 0.88, 0.8, 1), DARK),
    ),
    "plate": (("ellipse", (0, 0.1, 1, 0.9), WHITE), ("ring", (0.2, 0.27, 0.8, 0.73), GREY)),
    "pot": (
        ("rectangle", (0.12, 0.35, 0.88, 0.95), GREY),
        ("rectangle", (0, 0.45, 1, 0.58), DARK),
        ("ellipse", (0.12, 0.2, 0.88, 0.45), DARK),
        ("ellipse", (0.42, 0.05, 0.58, 0.25), RED),
    ),
    "sign": (
        ("rectangle", (0.45, 0.5, 0.55, 1), GREY),
        ("polygon", (0.3, 0, 0.7, 0, 0.95, 0.2, 0.95, 0.45, 0.7, 0.65, 0.3, 0.65, 0.05, 0.45, 0.05, 0.2), RED),
        ("rectangle", (0.2, 0.26, 0.8, 0.4), WHITE),
    ),
    "tree": (("rectangle", (0.4, 0.55, 0.6, 1), BROWN), ("ellipse", (0.05, 0, 0.95, 0.7), GREEN)),
    "umbrella": (
        ("pieslice", (0, 0.02, 1, 1.1, 180, 360), ORANGE),
        ("pieslice", (0.3, 0.02, 0.7, 1.1, 180, 360), WHITE),
        ("line", (0.5, 0.5, 0.5, 1), DARK),
    ),
}

# setting: color at the top, color at the border, color at the bottom, where the border lies (0 is the top).
BACKGROUNDS: dict[str, tuple[Color, Color, Color, float]] = {
    "kitchen": ((235, 228, 208), (222, 210, 184), (186, 150, 118), 0.62),
    "street": ((150, 190, 228), (206, 222, 234), (104, 106, 112), 0.5),
    "park": ((132, 188, 236), (200, 226, 240), (118, 178, 88), 0.42),
    "bedroom": ((214, 204, 228), (200, 188, 216), (172, 132, 98), 0.62),
    "beach": ((120, 186, 232), (196, 224, 240), (232, 212, 158), 0.36),
}


def draw_scene(scene: Scene) -> Image.Image:
    """Draw a scene: 96 x 96 pixels, RGB, smoothed from a drawing of `SCALE` times the side."""
    rng = random.Random(f"draw/{scene.seed}")
    image = _draw_background(scene.setting, rng).reduce(SCALE)
    for placed in scene.objects:
        x, y, width, height = placed.box
        # Each object on a transparent tile of its own: nothing is drawn outside its box.
        tile = Image.new("RGBA", (SCALE * width, SCALE * height))
        pen = ImageDraw.Draw(tile)
        for kind, points, color in SHAPES[placed.name]:
            _primitive(pen, kind, points, tile.size, _jitter(color, rng))
        tile = tile.reduce(SCALE)
        image.paste(tile, (x, y), tile)
    noise = np.random.default_rng([*scene.seed.encode()]).normal(0, NOISE, (IMAGE_SIZE, IMAGE_SIZE, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def _draw_background(setting: str, rng: random.Random) -> Image.Image:
    side = SCALE * IMAGE_SIZE
    top, middle, bottom, border = BACKGROUNDS[setting]
    top, middle, bottom = (_jitter(color, rng) for color in (top, middle, bottom))
    line = int(side * (border + rng.uniform(-0.04, 0.04)))
    # A gradient down to the border, and one from there on that gets a little darker.
    steps = np.linspace(0, 1, side)[:, None]
    upper = np.array(top) + (np.array(middle) - np.array(top)) * np.minimum(1, steps * side / line)
    lower = np.array(bottom) * (1.06 - 0.16 * steps)
    rows = np.where(np.arange(side)[:, None] < line, upper, lower)
    image = Image.fromarray(np.repeat(np.clip(rows, 0, 255).astype(np.uint8)[:, None], side, 1))
    DETAILS[setting](ImageDraw.Draw(image), side, line, rng)
    return image


def _kitchen(pen: ImageDraw.ImageDraw, side: int, line: int, rng: random.Random) -> None:
    step, shift = side // 8, rng.randrange(side // 8)
    for x in range(shift, side, step):  # tiles
        pen.line((x, 0, x, line), (212, 200, 176), 2)
    for y in range(line % step, line, step):
        pen.line((0, y, side, y), (212, 200, 176), 2)
    pen.rectangle((0, line, side, line + side // 24), (150, 116, 88))  # the edge of a worktop


def _street(pen: ImageDraw.ImageDraw, side: int, line: int, rng: random.Random) -> None:
    x = -rng.randrange(side // 6)
    while x < side:  # houses, with rows of windows
        width, height = rng.randint(side // 7, side // 4), rng.randint(side // 9, side // 4)
        shade = rng.randint(150, 182)
        pen.rectangle((x, line - height, x + width, line), (shade, shade - 4, shade + 2))
        for window_x in range(x + side // 40, x + width - side // 30, side // 20):
            for upper in range(line - height + side // 40, line - side // 40, side // 18):
                pen.rectangle(
                    (window_x, upper, window_x + side // 48, upper + side // 40), (shade + 32, shade + 34, shade + 36)
                )
        x += width
    pen.rectangle((0, line, side, line + side // 20), (158, 156, 152))  # the pavement
    dash = rng.randrange(side // 5)
    for x in range(-dash, side, side // 5):
        pen.rectangle((x, line + side // 4, x + side // 10, line + side // 4 + side // 60), (214, 212, 200))


def _park(pen: ImageDraw.ImageDraw, side: int, line: int, rng: random.Random) -> None:
    for _ in range(3):  # hills behind the meadow
        x, width, height = (
            rng.randint(-side // 4, side),
            rng.randint(side // 2, side),
            rng.randint(side // 16, side // 8),
        )
        pen.pieslice((x - width // 2, line - height, x + width // 2, line + height), 180, 360, (140, 186, 132))
    for _ in range(60):  # blades of grass
        x, y = rng.randrange(side), rng.randint(line + side // 30, side)
        pen.line((x, y, x + 2, y - side // 60), (100, 160, 74), 2)


def _bedroom(pen: ImageDraw.ImageDraw, side: int, line: int, rng: random.Random) -> None:
    step, shift = side // 9, rng.randrange(side // 9)
    for x in range(shift - step, side, step):  # striped wallpaper
        pen.rectangle((x, 0, x + step // 3, line), (224, 214, 234))
    pen.rectangle((0, line - side // 40, side, line), (240, 236, 232))  # a skirting board
    for y in range(line + side // 12, side, side // 12):  # floorboards
        pen.line((0, y, side, y), (150, 112, 82), 2)


def _beach(pen: ImageDraw.ImageDraw, side: int, line: int, rng: random.Random) -> None:
    shore = line + int(side * 0.24)
    pen.rectangle((0, line, side, shore), (72, 142, 186))
    for _ in range(16):  # waves
        x, y = rng.randrange(side), rng.randint(line + side // 40, shore - side // 60)
        pen.line((x, y, x + side // 12, y), (120, 180, 212), 3)
    pen.rectangle((0, shore, side, shore + side // 60), (238, 244, 244))  # foam
    for _ in range(50):
        x, y = rng.randrange(side), rng.randint(shore + side // 20, side)
        pen.ellipse((x, y, x + 3, y + 3), (212, 190, 138))


DETAILS = {"kitchen": _kitchen, "street": _street, "park": _park, "bedroom": _bedroom, "beach": _beach}


def _primitive(
    pen: ImageDraw.ImageDraw, kind: str, points: tuple[float, ...], size: tuple[int, int], color: Color
) -> None:
    # From the unit square to pixels of a tile of that size; a pieslice has two angles behind its corners.
    width, height = size
    fractions = points[:4] if kind == "pieslice" else points
    corners = [(px * (width - 1), py * (height - 1)) for px, py in zip(fractions[::2], fractions[1::2], strict=True)]
    stroke = max(SCALE, round(min(width, height) / 10))
    outline = tuple(channel * 3 // 5 for channel in color)
    if kind == "ring":
        pen.ellipse(corners, outline=color, width=stroke)
    elif kind == "line":
        pen.line(corners, fill=color, width=stroke)
    elif kind == "pieslice":
        pen.pieslice(corners, start=points[4], end=points[5], fill=color, outline=outline, width=EDGE)
    else:
        getattr(pen, kind)(corners, fill=color, outline=outline, width=EDGE)


def _jitter(color: Color, rng: random.Random) -> Color:
    r, g, b = (max(0, min(255, channel + rng.randint(-12, 12))) for channel in color)
    return r, g, b


# ----------------------------------------------------------------------------------------------------
# Toyworld's texts: exact and noisy descriptions, questions and answers.
#
# Each object takes one sentence, and sentences without an object are as long ("There is a cup." and "It looks quite
# calm." are five tokens), so a sentence can be exchanged for another without changing a text's length. Objects come in
# one order, the most usual first: what was named tells what may follow, and a small model does not repeat itself.

FILLERS = (
    *("The colors are bright.", "It looks quite calm.", "The light is soft.", "Everything is in place."),
    *("The view is clear.", "It feels very peaceful.", "The mood is cheerful.", "All is well lit."),
)
MENTIONS = ("There is {a} {name}.", "{A} {name} is nearby.", "I see {a} {name}.", "{A} {name} stands out.")
SYNONYMS = {"bicycle": ["bike"], "boat": ["ship"], "cup": ["mug"], "dog": ["puppy"], "flower": ["blossom"]}
QUESTIONS = 8


def article(name: str) -> str:
    return "an" if name[0] in "aeiou" else "a"


def opening(setting: str) -> str:
    return f"The picture shows a {setting}."


def mention(name: str, number: int = 0) -> str:
    """Write the sentence about an object; `number` counts the mentions of a text, so that neighbours differ."""
    a = article(name)
    return MENTIONS[number % len(MENTIONS)].format(a=a, A=a.capitalize(), name=name)


def in_order(names: Collection[str], setting: str) -> list[str]:
    """Sort objects as descriptions name them: core objects, common ones, all others."""
    usual = (*SETTINGS[setting].core, *SETTINGS[setting].common)
    return [name for name in (*usual, *(name for name in OBJECTS if name not in usual)) if name in names]


def describe_scene(names: Sequence[str], setting: str, fillers: int = 0, rng: random.Random | None = None) -> str:
    """Describe a scene by these objects, in this order, with some neutral sentences at the end."""
    sentences = [mention(name, number) for number, name in enumerate(names)]
    if fillers and rng is not None:
        sentences += rng.sample(FILLERS, fillers)
    return " ".join([opening(setting), *sentences])


@dataclass(frozen=True)
class Annotator:
    """Write texts with errors: probabilities of claiming an absent usual object, and of missing a present one.

    `overlooks` makes a small object count as absent. The defaults are as careless as GPT-written conversations; zeros
    give the truth.
    """

    claim_core: tuple[float, ...] = (0.6, 0.6, 0.6)  # for each core object, in the setting's order
    claim_common: float = 0.0
    miss: float = 0.1
    overlooks: bool = True

    def believe(self, scene: Scene, rng: random.Random) -> list[str]:
        """Draw the objects that this annotator takes to be in the scene, in the order of descriptions."""
        setting, seen = SETTINGS[scene.setting], scene.obvious if self.overlooks else scene.names
        claims = dict.fromkeys(setting.common, self.claim_common) | dict(
            zip(setting.core, self.claim_core, strict=True)
        )
        believed = [
            name for name in OBJECTS if rng.random() < (1 - self.miss if name in seen else claims.get(name, 0.0))
        ]
        return in_order(believed, scene.setting)


EXACT = Annotator((0.0, 0.0, 0.0), 0.0, 0.0, overlooks=False)


def sft_samples(scene: Scene, annotator: Annotator, rng: random.Random) -> list[tuple[str, str]]:
    """Write (prompt, response) samples for supervised tuning: one description and some yes/no questions."""
    text = describe_scene(annotator.believe(scene, rng), scene.setting, 1, rng)
    samples = [(rng.choice(DESCRIBE_PROMPTS), text)]
    believed = annotator.believe(scene, rng)
    samples += [(question_text(n), "Yes." if n in believed else "No.") for n in ask_about(scene, QUESTIONS, rng)]
    return samples


def ask_about(scene: Scene, count: int, rng: random.Random) -> list[str]:
    """Choose objects to ask about: at most half of them present, two thirds of the absent ones usual in the setting."""
    present = rng.sample(sorted(scene.names), min(count // 2, len(scene.names)))
    usual = usual_absent(scene)
    rare = [n for n in OBJECTS if n not in scene.names and n not in usual]
    absent = count - len(present)
    tempting = rng.sample(usual, min(len(usual), round(absent * 2 / 3)))
    names = [*present, *tempting, *rng.sample(rare, absent - len(tempting))]
    rng.shuffle(names)
    return names


def usual_absent(scene: Scene) -> list[str]:
    """Return the objects that are usual in a scene's setting, and not in the scene."""
    setting = SETTINGS[scene.setting]
    return [name for name in (*setting.core, *setting.common) if name not in scene.names]


def words(text: str) -> list[str]:
    """Split a text into its tokens: words, and each punctuation mark by itself."""
    return re.findall(r"\w+|[^\w\s]", text)


def vocabulary() -> list[str]:
    """Return every word that toyworld's prompts and responses can have."""
    texts = ["USER: ASSISTANT: Yes, No. and image picture", *DESCRIBE_PROMPTS, *FILLERS, *map(question_text, OBJECTS)]
    texts += [opening(setting) for setting in SETTINGS]
    texts += [mention(name, number) for name in OBJECTS for number in range(len(MENTIONS))]
    texts += [word for synonyms in SYNONYMS.values() for word in synonyms]
    return sorted({word for text in texts for word in words(text)})
