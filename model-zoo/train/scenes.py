"""Scenes: what is in an image, and the image itself.

A scene is drawn from `random.Random(seed)`, so that it is the same on every machine and with every version of
Python; pixels are computed with integer arithmetic and cached masks alone.
"""

import random
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

import font

SIZE = 192
PATCH = 8
GRID = SIZE // PATCH

COLOURS = {
    "red": (208, 32, 38), "green": (34, 150, 54), "blue": (36, 72, 208), "yellow": (238, 214, 40),
    "orange": (240, 130, 24), "purple": (136, 44, 168), "white": (246, 246, 246), "black": (16, 16, 18),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
PATTERNS = ("plain", "horizontal stripes", "vertical stripes", "checks", "dots", "noise", "gradient")
WORDS = (
    "cat dog sun moon tree fish bird ball book door fire gold hand home iron jump king lake lamp leaf lion milk "
    "nest note open park pear pink rain ring road rock rose ship shoe snow song star stop time town tube wind wolf "
    "wood yard zero apple bread chair cloud earth grape horse house juice knife lemon mouse ocean piano queen river"
).split()

# Pairs of colour and shape, and numbers, that no training scene shows.
HELD_OUT_PAIRS = frozenset({
    ("red", "star"), ("green", "ring"), ("blue", "cross"), ("yellow", "heart"),
    ("orange", "square"), ("purple", "triangle"), ("white", "diamond"), ("black", "circle"),
})
HELD_OUT_NUMBERS = frozenset(n for n in range(10, 100) if n % 9 == 4)


@dataclass(frozen=True)
class Thing:
    """A coloured shape: centre and radius in pixels."""

    colour: str
    shape: str
    x: int
    y: int
    radius: int


@dataclass(frozen=True)
class Label:
    """A written number or word: left upper corner in pixels, pixels a dot."""

    text: str
    x: int
    y: int
    scale: int
    ink: tuple
    paper: tuple | None

    def size(self) -> tuple[int, int]:
        return (6 * len(self.text) - 1) * self.scale, 7 * self.scale


@dataclass
class Scene:
    """All of an image."""

    pattern: str
    tones: tuple
    period: int
    things: list[Thing] = field(default_factory=list)
    label: Label | None = None
    seed: int = 0


def is_free(boxes: list, box: tuple) -> bool:
    x0, y0, x1, y1 = box
    if x0 < 2 or y0 < 2 or x1 > SIZE - 2 or y1 > SIZE - 2:
        return False
    return all(x1 + 3 <= a0 or a1 + 3 <= x0 or y1 + 3 <= b0 or b1 + 3 <= y0 for a0, b0, a1, b1 in boxes)


def pick_pair(rng: random.Random, held_out: bool) -> tuple[str, str]:
    if held_out:
        return rng.choice(sorted(HELD_OUT_PAIRS))
    while True:
        pair = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        if pair not in HELD_OUT_PAIRS:
            return pair


def make_scene(seed: int, held_out: bool = False) -> Scene:
    """The scene of `seed`. With `held_out`, half of its things are of pairs that training never shows, and
    so is its number."""
    rng = random.Random(seed)
    base = [rng.randrange(96, 176)] * 3
    base = tuple(v + rng.randrange(-18, 19) for v in base)
    delta = rng.choice((-1, 1)) * rng.randrange(14, 30)
    scene = Scene(rng.choice(PATTERNS), (base, tuple(v + delta for v in base)), rng.randrange(6, 17), seed=seed)
    boxes: list = []
    if rng.random() < 0.6:
        add_label(scene, boxes, rng, held_out)
    # Few colours and shapes in a scene, so that there is something to count.
    palette = [pick_pair(rng, held_out and i % 2 == 0) for i in range(rng.randrange(1, 5))]
    for _ in range(rng.choices(range(1, 9), (8, 14, 16, 16, 15, 13, 10, 8))[0]):
        add_thing(scene, boxes, rng, palette)
    while not scene.things:
        add_thing(scene, boxes, rng, palette)
    return scene


def add_label(scene: Scene, boxes: list, rng: random.Random, held_out: bool) -> None:
    if rng.random() < 0.5:
        numbers = [n for n in range(10, 100) if (n in HELD_OUT_NUMBERS) == held_out]
        text = str(rng.choice(numbers))
    else:
        text = rng.choice(WORDS).upper()
    scale = rng.choice((2, 2, 3)) if len(text) < 5 else 2
    ink, paper = rng.choice((((20, 20, 24), (226, 222, 208)), ((240, 240, 236), (40, 44, 56)), ((12, 12, 14), None)))
    width, height = (6 * len(text) - 1) * scale, 7 * scale
    x, y = rng.randrange(6, SIZE - width - 5), rng.randrange(6, SIZE - height - 5)
    scene.label = Label(text, x, y, scale, ink, paper)
    boxes.append((x - 4, y - 4, x + width + 4, y + height + 4))


def add_thing(scene: Scene, boxes: list, rng: random.Random, palette: list) -> None:
    """Puts one more thing where there is room, or none."""
    if rng.random() < 0.75:
        colour, shape = rng.choice(palette)
    else:
        colour, shape = rng.choice(palette)[0], rng.choice(palette)[1]
        if (colour, shape) in HELD_OUT_PAIRS and (colour, shape) not in palette:
            return
    for _ in range(12):
        radius = rng.randrange(11, 25)
        x, y = rng.randrange(radius + 2, SIZE - radius - 2), rng.randrange(radius + 2, SIZE - radius - 2)
        box = (x - radius, y - radius, x + radius, y + radius)
        if is_free(boxes, box):
            boxes.append(box)
            scene.things.append(Thing(colour, shape, x, y, radius))
            return


def inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Where points of the square [−1, 1]² lie in the shape; `v` points down."""
    au, av = np.abs(u), np.abs(v)
    if shape == "circle":
        return u * u + v * v <= 1.0
    if shape == "ring":
        return (u * u + v * v <= 1.0) & (u * u + v * v >= 0.3)
    if shape == "square":
        return np.maximum(au, av) <= 0.86
    if shape == "diamond":
        return au / 0.72 + av <= 1.0
    if shape == "cross":
        return (np.minimum(au, av) <= 0.32) & (np.maximum(au, av) <= 0.96)
    if shape == "triangle":
        return (v <= 0.8) & (au <= (v + 0.95) * 0.55)
    if shape == "heart":
        lobes = ((au - 0.46) ** 2 + (v + 0.34) ** 2 <= 0.25) & (v <= 0.2)
        return lobes | ((v > -0.34) & (au <= 0.93 * (0.95 - v) / 1.2) & (v <= 0.95))
    return in_star(u, v)


def in_star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Five points: inside at least four of the pentagram's five half-planes."""
    count = np.zeros(u.shape, np.int32)
    for k in range(5):
        angle = np.pi * (0.5 + 0.4 * k)
        count += (u * np.cos(angle) + v * np.sin(angle)) <= 0.32
    return (count >= 4) & (u * u + v * v <= 1.0)


@lru_cache(maxsize=None)
def coverage(shape: str, radius: int) -> np.ndarray:
    """How much of each pixel the shape covers, in quarters of 64: `[2·radius, 2·radius]`, 0 to 256."""
    fine = (np.arange(radius * 8) + 0.5) / (radius * 4) - 1.0
    hit = inside(shape, fine[None, :].repeat(len(fine), 0), fine[:, None].repeat(len(fine), 1))
    return hit.reshape(radius * 2, 4, radius * 2, 4).sum(axis=(1, 3)).astype(np.int32) * 16


@lru_cache(maxsize=None)
def noise() -> np.ndarray:
    """Grain of −8 to 7, the same on every machine: a linear congruential generator's upper bits."""
    values, state = np.empty(SIZE * SIZE * 2, np.int16), 12345
    for i in range(len(values)):
        state = (state * 1103515245 + 12345) & 0x7FFFFFFF
        values[i] = (state >> 20) % 16 - 8
    return values


@lru_cache(maxsize=1)
def coordinates() -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.int32)
    return y, x


def background(scene: Scene) -> np.ndarray:
    y, x = coordinates()
    p = scene.period
    which = {
        "plain": lambda: np.zeros((SIZE, SIZE), np.int32),
        "horizontal stripes": lambda: (y // p) % 2,
        "vertical stripes": lambda: (x // p) % 2,
        "checks": lambda: (x // p + y // p) % 2,
        "dots": lambda: ((x % (2 * p) - p) ** 2 + (y % (2 * p) - p) ** 2 < p * p // 3).astype(np.int32),
        "noise": lambda: (noise()[scene.seed % 997 :][: SIZE * SIZE].reshape(SIZE, SIZE) > 0).astype(np.int32),
        "gradient": lambda: np.zeros((SIZE, SIZE), np.int32),
    }[scene.pattern]()
    first, second = (np.array(tone, np.int32) for tone in scene.tones)
    image = first + which[..., None] * (second - first)
    if scene.pattern == "gradient":
        image = image + ((x + y)[..., None] - SIZE) * (3 if scene.period % 2 else -3) // 16
    grain = noise()[scene.seed % 1009 :][: SIZE * SIZE].reshape(SIZE, SIZE, 1)
    return image + grain // 3


def render(scene: Scene) -> np.ndarray:
    """The image, uint8 `[192, 192, 3]`."""
    image = background(scene)
    for thing in scene.things:
        cover = coverage(thing.shape, thing.radius)[..., None]
        part = image[thing.y - thing.radius : thing.y + thing.radius, thing.x - thing.radius : thing.x + thing.radius]
        jitter = (thing.x * 7 + thing.y * 13) % 21 - 10
        colour = np.array(COLOURS[thing.colour], np.int32) + jitter
        part += (colour - part) * cover // 256
    if scene.label:
        write(image, scene.label)
    return np.clip(image, 0, 255).astype(np.uint8)


def write(image: np.ndarray, label: Label) -> None:
    width, height = label.size()
    if label.paper:
        image[label.y - 4 : label.y + height + 4, label.x - 4 : label.x + width + 4] = label.paper
    part = image[label.y : label.y + height, label.x : label.x + width]
    part[font.draw(label.text, label.scale)] = label.ink


def patch_labels(scene: Scene) -> np.ndarray:
    """What the centre of each patch shows, for the encoder's warm-up: int8 `[3, 24, 24]`, shape, colour and
    character, 0 for none."""
    owner = np.zeros((3, SIZE, SIZE), np.int8)
    for thing in scene.things:
        rows = slice(thing.y - thing.radius, thing.y + thing.radius)
        columns = slice(thing.x - thing.radius, thing.x + thing.radius)
        mask = coverage(thing.shape, thing.radius) >= 128
        owner[0, rows, columns][mask] = 1 + SHAPES.index(thing.shape)
        owner[1, rows, columns][mask] = 1 + list(COLOURS).index(thing.colour)
    if scene.label:
        step, height = 6 * scene.label.scale, 7 * scene.label.scale
        for i, character in enumerate(scene.label.text):
            x = scene.label.x + i * step
            owner[2, scene.label.y : scene.label.y + height, x : x + step] = 1 + font.CHARACTERS.index(character)
    return owner[:, PATCH // 2 :: PATCH, PATCH // 2 :: PATCH]


def image_labels(scene: Scene) -> np.ndarray:
    """What the whole image shows: int8 `[17]`: counts of each shape and of each colour (at most 6), pattern."""
    counts = [sum(t.shape == s for t in scene.things) for s in SHAPES]
    counts += [sum(t.colour == c for t in scene.things) for c in COLOURS]
    return np.array([min(c, 6) for c in counts] + [PATTERNS.index(scene.pattern)], np.int8)


def text_labels(scene: Scene) -> np.ndarray:
    """What is written: int8 `[5]` characters, 0 for none."""
    text = scene.label.text if scene.label else ""
    return np.array([1 + font.CHARACTERS.index(c) for c in text] + [0] * (5 - len(text)), np.int8)
