"""Built-in scenes: patchwork backgrounds, clutter, and several objects that hide one another.

A class is a shape with an interior texture; colours, place, size, turn, aspect and the background
are drawn at random and tell nothing about it. A scene is a pure function of (seed, index, dials).
"""

import dataclasses
import math
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from salcl_jax.data.shapes import CLASSES

CLASS_NAMES = tuple(name for name, _, _ in CLASSES)
RENDERER = 1  # raise when render() draws other pixels: old files are then left alone
MIN_VISIBLE = 0.3  # an object with less than this share of its mask in sight is not annotated
_VALIDATION = 2**32  # the first index of the validation scenes


@dataclasses.dataclass(frozen=True)
class Dials:
    """What can be turned. size: pixels; objects: fewest and most an image; object_size: extent
    as a share of the image side; repeat: probability that a further object is of the first one's class,
    as objects of a photo often are; clutter in [0, 1]; the rest counts and the seed."""

    size: int = 96
    num_classes: int = 10
    objects: tuple[int, int] = (1, 4)
    object_size: tuple[float, float] = (0.25, 0.5)
    repeat: float = 0.5
    clutter: float = 0.5
    num_train: int = 2000
    num_val: int = 500
    seed: int = 0

    def __post_init__(self):
        for name in ("objects", "object_size"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _check(self)

    def render(self, index: int) -> dict[str, np.ndarray]:
        return render(
            self.seed,
            index,
            size=self.size,
            num_classes=self.num_classes,
            objects=self.objects,
            object_size=self.object_size,
            repeat=self.repeat,
            clutter=self.clutter,
        )

    def identity(self) -> str:
        """All that the scenes follow from, as text."""
        return repr((RENDERER, sorted(dataclasses.asdict(self).items())))

    def split(self, name: str) -> tuple[int, int]:
        """(first index, number of scenes) of 'train' or 'validation'. Raises ValueError."""
        splits = {"train": (0, self.num_train), "validation": (_VALIDATION, self.num_val)}
        if name not in splits:
            raise ValueError(f"scenes split {name!r}: unknown; use train or validation")
        return splits[name]


def _check(dials: Dials) -> None:
    if not 1 <= dials.num_classes <= len(CLASSES):
        raise ValueError(f"scenes: num_classes {dials.num_classes} must be 1 to {len(CLASSES)}")
    if not 1 <= dials.objects[0] <= dials.objects[1]:
        raise ValueError(f"scenes: objects {dials.objects} must be (fewest >= 1, most)")
    low, high = dials.object_size
    if not 0 < low <= high <= 1 or low * dials.size < 6:
        raise ValueError(f"scenes: object_size {dials.object_size} must be 6 pixels to the image")
    for name in ("clutter", "repeat"):
        if not 0 <= getattr(dials, name) <= 1:
            raise ValueError(f"scenes: {name} {getattr(dials, name)} must be in [0, 1]")


def render(
    seed: int,
    index: int,
    *,
    size: int = 96,
    num_classes: int = 10,
    objects: tuple[int, int] = (1, 4),
    object_size: tuple[float, float] = (0.25, 0.5),
    repeat: float = 0.5,
    clutter: float = 0.5,
) -> dict[str, Any]:
    """Scene `index` of the set `seed`.

    Returns image uint8 [s, s, 3]; per annotated object, k >= 1 of them: masks bool [k, s, s] of
    its visible pixels, boxes float32 [k, 4] that bound them exactly, classes int32 [k].
    """
    key = np.array([seed % 2**64, index % 2**64], np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key))
    canvas = _clutter(rng, _background(rng, size), clutter).astype(np.float32)
    owner = np.zeros((size, size), np.uint8)
    full, classes, centres = [], [], []
    for number in range(1, int(rng.integers(objects[0], objects[1] + 1)) + 1):
        extent = size * rng.uniform(*object_size)
        centre = _place(rng, size, extent, centres)
        centres.append((*centre, extent))
        kind = int(rng.integers(num_classes))
        if classes and rng.random() < repeat:
            kind = classes[0]
        full.append(_draw(rng, canvas, owner, number, kind, extent, centre))
        classes.append(kind)
    seen = np.bincount(owner.ravel(), minlength=len(full) + 1)[1:]
    keep = np.flatnonzero(seen >= np.maximum(MIN_VISIBLE * np.array(full), 1))
    masks = owner[None] == (keep + 1).astype(np.uint8)[:, None, None]
    return {
        "image": np.clip(canvas + 0.5, 0, 255).astype(np.uint8),
        "boxes": mask_boxes(masks),
        "classes": np.array(classes, np.int32)[keep],
        "masks": masks,
    }


def mask_boxes(masks: np.ndarray) -> np.ndarray:
    """bool [k, h, w], none empty -> float32 [k, 4]: the tightest (y0, x0, y1, x1) in [0, 1]."""
    high, wide = masks.shape[1:]
    rows, columns = masks.any(2), masks.any(1)
    edges = (
        rows.argmax(1) / high,
        columns.argmax(1) / wide,
        1 - rows[:, ::-1].argmax(1) / high,
        1 - columns[:, ::-1].argmax(1) / wide,
    )
    return np.stack(edges, 1).astype(np.float32)


def instance_map(scene: dict[str, np.ndarray]) -> np.ndarray:
    """uint8 [s, s]: 0 = background, k = the k-th object."""
    numbers = np.arange(1, len(scene["masks"]) + 1, dtype=np.uint8)[:, None, None]
    return (scene["masks"] * numbers).max(0)


def largest(scene: dict[str, np.ndarray]) -> int:
    """Number of the object with most visible pixels."""
    return int(scene["masks"].sum((1, 2)).argmax())


def _noise(rng: np.random.Generator, cells: int, size: int, bands: int) -> np.ndarray:
    """Smooth noise of `cells` waves a side, float32 [s, s, bands] with values of 0 to 255."""
    grid = rng.integers(0, 256, (cells, cells, 3 if bands == 3 else 1), np.uint8)
    image = Image.fromarray(grid if bands == 3 else grid[..., 0])
    smooth = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC), np.float32)
    return smooth.reshape(size, size, bands)


# What backgrounds are patched from: two colours, then grain, its waves a side, and ripples. Every scene has
# the same four, so that the ground under two crops neither agrees nor tells one scene from another.
_MATERIALS = (
    ((70, 110, 50), (120, 150, 80), 0.35, 28, 0),
    ((150, 190, 225), (215, 230, 240), 0.05, 5, 0),
    ((190, 165, 125), (225, 205, 165), 0.20, 16, 24),
    ((90, 90, 95), (140, 140, 140), 0.30, 36, 16),
)
_PATCHES = 4  # waves a side of the noise that decides which material lies where
# Dark and light colour of an object: few, so that colours do not tell objects apart either.
_COLOURS = np.array(
    [[(30, 30, 35), (240, 240, 235)], [(120, 25, 30), (250, 230, 180)], [(25, 35, 110), (250, 215, 70)]],
    np.float32,
)


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A patchwork of the materials under uneven light: uint8 [s, s, 3]."""
    materials = np.stack([_material(rng, size, *fields) for fields in _MATERIALS])
    height = np.concatenate([_noise(rng, _PATCHES, size, 1) for _ in _MATERIALS], -1)
    image = np.take_along_axis(materials, height.argmax(-1)[None, ..., None], 0)[0]
    return np.clip(image * rng.uniform(0.85, 1.1), 0, 255).astype(np.uint8)


def _material(rng, size, first, second, grain, cells, ripple) -> np.ndarray:
    """One material over the whole image: float32 [s, s, 3]."""
    ramp = _noise(rng, 4, size, 1) / 255
    image = np.array([first], np.float32) * (1 - ramp) + np.array([second], np.float32) * ramp
    image += grain * (_noise(rng, cells, size, 1) - 127.5)
    if ripple:
        axis = np.linspace(-24, 24, size, dtype=np.float32)
        turn, phase = rng.uniform(0, 2 * math.pi, 2).tolist()
        wave = np.sin(math.cos(turn) * axis[None, :] + math.sin(turn) * axis[:, None] + phase)
        image += (ripple * wave)[..., None]
    return image


def _clutter(rng: np.random.Generator, image: np.ndarray, amount: float) -> np.ndarray:
    """Class-less distractors: smudges, line segments and specks; more and stronger with amount."""
    count = round(amount * 24)
    if not count:
        return image
    size = len(image)
    picture = Image.fromarray(image)
    pen = ImageDraw.Draw(picture, "RGBA")
    colours = rng.integers(0, 256, (count, 3)).tolist()
    alphas = (255 * (0.25 + 0.75 * amount) * rng.uniform(0.3, 1, count)).astype(int).tolist()
    places = rng.uniform(0, size, (count, 2)).tolist()
    spans = (size * rng.uniform(-0.12, 0.12, (count, 2))).tolist()
    for number in range(count):
        (x, y), (dx, dy), kind = places[number], spans[number], number % 4
        fill = (*colours[number], alphas[number])
        if kind == 0:
            fill = (*colours[number], alphas[number] // 3)
            pen.ellipse((x - abs(dx), y - abs(dy), x + abs(dx), y + abs(dy)), fill=fill)
        elif kind == 1:
            pen.ellipse((x - 1, y - 1, x + 1 + size / 96, y + 1 + size / 96), fill=fill)
        else:
            pen.line((x, y, x + dx, y + dy), fill=fill, width=1 + size // 96)
    return np.asarray(picture)


def _place(rng, size, extent, others) -> tuple[float, float]:
    """A centre with the object inside the image, apart from the others while there is room."""
    half = extent / 2
    for centre in rng.uniform(half, max(size - half, half + 1e-3), (6, 2)).tolist():
        gaps = (
            math.hypot(centre[0] - y, centre[1] - x) / (0.5 * (extent + other))
            for y, x, other in others
        )
        if min(gaps, default=1.0) > 0.7:
            break
    return centre[0], centre[1]


def _draw(rng, canvas, owner, number, kind, extent, centre) -> int:
    """Paints an object over the scene; returns the number of pixels of its whole mask."""
    size, (cy, cx) = len(canvas), centre
    _, outline, texture = CLASSES[kind]
    turn, light = rng.uniform(0, 2 * math.pi, 2).tolist()
    squash = math.exp(rng.uniform(-0.25, 0.25))
    y0, x0 = max(0, math.floor(cy - extent / 2)), max(0, math.floor(cx - extent / 2))
    y1, x1 = min(size, math.ceil(cy + extent / 2)), min(size, math.ceil(cx + extent / 2))
    # the radius that keeps a turned, stretched shape inside its extent
    scale = 2 / extent * 1.06 * max(squash, 1 / squash)
    y = (np.arange(y0, y1, dtype=np.float32) + (0.5 - cy))[:, None] * scale
    x = (np.arange(x0, x1, dtype=np.float32) + (0.5 - cx))[None, :] * scale
    cos, sin = math.cos(turn), math.sin(turn)
    u, v = (cos * x + sin * y) * squash, (cos * y - sin * x) / squash
    distance = outline(u, v)
    alpha = np.clip(0.5 - distance / scale, 0, 1)
    mask = alpha >= 0.5
    first, second = _two_colours(rng)
    mix = texture(u, v, distance)[..., None]
    shade = 1 + 0.25 * np.clip(math.cos(light) * x + math.sin(light) * y, -1, 1)
    paint = (first + (second - first) * mix) * shade[..., None]
    patch = canvas[y0:y1, x0:x1]
    patch += (np.clip(paint, 0, 255) - patch) * alpha[..., None]
    owner[y0:y1, x0:x1][mask] = number
    return int(mask.sum())


def _two_colours(rng: np.random.Generator) -> np.ndarray:
    """A dark and a light colour, in either order, about one of the fixed pairs: float32 [2, 3]."""
    pair = _COLOURS[int(rng.integers(len(_COLOURS)))] + rng.uniform(-15, 15, (2, 3)).astype(np.float32)
    return pair if rng.random() < 0.5 else pair[::-1]
