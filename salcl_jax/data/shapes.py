"""Outlines and interior textures of the built-in scenes, as functions of object coordinates.

(u, v) lie in about [-1, 1]. An outline is negative inside, positive outside, and near its zero
roughly a distance; a texture is in [0, 1] and mixes two colours.
"""

from collections.abc import Callable

import numpy as np

Field = np.ndarray  # float32 [h, w]
_TAU = 2 * np.pi


def _polygon(u: Field, v: Field, corners: int, inner: float) -> Field:
    """Regular convex polygon with its sides at distance `inner` from the centre."""
    angles = np.arange(corners) * _TAU / corners + np.pi / 2
    sides = [np.cos(a) * u + np.sin(a) * v for a in angles.tolist()]
    return np.maximum.reduce(sides) - inner


def _bar(u: Field, v: Field, cu: float, cv: float, hu: float, hv: float) -> Field:
    return np.maximum(np.abs(u - cu) - hu, np.abs(v - cv) - hv)


def _petals(u: Field, v: Field, count: int, mean: float, swing: float) -> Field:
    return (np.hypot(u, v) - mean - swing * np.cos(count * np.arctan2(v, u))) * 0.8


def _disk(u: Field, v: Field) -> Field:
    return np.hypot(u, v) - 0.95


def _square(u: Field, v: Field) -> Field:
    return _bar(u, v, 0.0, 0.0, 0.8, 0.8)


def _triangle(u: Field, v: Field) -> Field:
    return _polygon(u, v - 0.1, 3, 0.52)


def _star(u: Field, v: Field) -> Field:
    return _petals(u, v, 5, 0.64, 0.32)


def _ring(u: Field, v: Field) -> Field:
    return np.abs(np.hypot(u, v) - 0.7) - 0.25


def _cross(u: Field, v: Field) -> Field:
    return np.minimum(_bar(u, v, 0.0, 0.0, 0.95, 0.3), _bar(u, v, 0.0, 0.0, 0.3, 0.95))


def _crescent(u: Field, v: Field) -> Field:
    return np.maximum(np.hypot(u, v) - 0.95, 0.72 - np.hypot(u - 0.48, v))


def _heart(u: Field, v: Field) -> Field:
    y = 0.25 - 1.15 * v
    return (np.hypot(u * 1.05, y - 0.62 * np.sqrt(np.abs(u))) - 0.8) * 0.75


def _ell(u: Field, v: Field) -> Field:
    return np.minimum(_bar(u, v, -0.5, 0.0, 0.32, 0.9), _bar(u, v, 0.0, 0.58, 0.82, 0.32))


def _hexagon(u: Field, v: Field) -> Field:
    return _polygon(u, v, 6, 0.82)


def _arrow(u: Field, v: Field) -> Field:
    head = np.maximum(v - 0.05, np.abs(u) * 0.78 - 0.62 * (v + 0.95))
    return np.minimum(head, _bar(u, v, 0.0, 0.45, 0.24, 0.5))


def _flower(u: Field, v: Field) -> Field:
    return _petals(u, v, 7, 0.74, 0.2)


def _aitch(u: Field, v: Field) -> Field:
    posts = np.maximum(np.abs(np.abs(u) - 0.62) - 0.24, np.abs(v) - 0.88)
    return np.minimum(posts, _bar(u, v, 0.0, 0.0, 0.6, 0.2))


def _half_disk(u: Field, v: Field) -> Field:
    return np.maximum(np.hypot(u, v + 0.4) - 0.95, -v - 0.4)


def _lens(u: Field, v: Field) -> Field:
    return np.maximum(np.hypot(u - 0.6, v) - 1.12, np.hypot(u + 0.6, v) - 1.12)


def _zed(u: Field, v: Field) -> Field:
    caps = np.maximum(np.abs(np.abs(v) - 0.66) - 0.2, np.abs(u) - 0.78)
    stroke = np.maximum(np.abs(u + v * 0.9) * 0.74 - 0.2, np.abs(v) - 0.66)
    return np.minimum(caps, stroke)


def _wave(x: Field) -> Field:
    return 0.5 + 0.5 * np.clip(3.0 * np.sin(x), -1, 1)  # a soft square wave: no aliasing


def _stripes(frequency: float) -> Callable[[Field, Field, Field], Field]:
    return lambda u, v, d: _wave(frequency * u)


def _checker(frequency: float) -> Callable[[Field, Field, Field], Field]:
    return lambda u, v, d: 0.5 + 0.5 * np.clip(
        5.0 * np.sin(frequency * u) * np.sin(frequency * v), -1, 1
    )


def _dots(frequency: float) -> Callable[[Field, Field, Field], Field]:
    return lambda u, v, d: np.clip(
        3.0 * (np.cos(frequency * u) + np.cos(frequency * v) - 0.6), 0, 1
    )


def _rays(count: int) -> Callable[[Field, Field, Field], Field]:
    return lambda u, v, d: _wave(count * np.arctan2(v, u))


def _rings(frequency: float) -> Callable[[Field, Field, Field], Field]:
    return lambda u, v, d: _wave(frequency * np.hypot(u, v))


def _waves(frequency: float) -> Callable[[Field, Field, Field], Field]:
    return lambda u, v, d: _wave(frequency * u + 1.5 * np.sin(frequency * 0.8 * v))


def _border(width: float) -> Callable[[Field, Field, Field], Field]:
    return lambda u, v, d: np.clip((d + width) * 10.0, 0, 1)


def _halves(u: Field, v: Field, d: Field) -> Field:
    return np.clip(0.5 + 8.0 * v, 0, 1)


def _contours(u: Field, v: Field, d: Field) -> Field:
    return _wave(22.0 * d)


CLASSES: tuple[tuple[str, Callable, Callable], ...] = (
    ("disk", _disk, _stripes(7.0)),
    ("square", _square, _dots(8.0)),
    ("triangle", _triangle, _border(0.14)),
    ("star", _star, _rings(9.0)),
    ("ring", _ring, _rays(8)),
    ("cross", _cross, _checker(6.0)),
    ("crescent", _crescent, _stripes(15.0)),
    ("heart", _heart, _waves(7.0)),
    ("ell", _ell, _halves),
    ("hexagon", _hexagon, _rays(3)),
    ("arrow", _arrow, _contours),
    ("flower", _flower, _border(0.3)),
    ("aitch", _aitch, _dots(13.0)),
    ("half_disk", _half_disk, _checker(11.0)),
    ("lens", _lens, _rings(16.0)),
    ("zed", _zed, _waves(13.0)),
)
