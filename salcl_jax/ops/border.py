"""Saliency from the photo's border, which what a photo is about seldom touches.

Two measures, both of features of the network: how unlike the border a place is, and how long the shortest
path to the border is, after Wei et al., Geodesic saliency using background priors (ECCV 2012).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_FAR = 1e3  # longer than any path; infinity would make the gradient NaN
_HALVINGS = 25  # of [-1, 1]: to float32's last bit
_EPS = 1e-6  # keeps the gradient of a step of length 0 finite
_AROUND = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]


def unlikeness(features: Float[Array, "b h w d"]) -> Float[Array, "b h w"]:
    """1 minus the mean cosine with the quarter of the border that is most like a location; range [0, 2].

    A border cell is not compared with itself. A place of one background among several is like that one.

    >>> photo = jnp.tile(jnp.array([1.0, 0.0]), (1, 3, 4, 1)).at[0, 1, 1].set(jnp.array([0.0, 1.0]))
    >>> jnp.round(unlikeness(photo)[0]).astype(int).tolist()
    [[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    """
    unit = _unit(features)
    rows, columns = np.nonzero(_at_border(*unit.shape[1:3]))
    n = len(rows)
    itself = np.zeros((*unit.shape[1:3], n), bool)
    itself[rows, columns, np.arange(n)] = True
    cosine = jnp.einsum("bhwd,bnd->bhwn", unit, unit[:, rows, columns], precision="highest")
    cosine = jnp.where(itself, -1.0, cosine)
    return 1.0 - _mean_of_largest(cosine, max(1, n // 4))


def distance(features: Float[Array, "b h w d"], clip: float = 0.0) -> Float[Array, "b h w"]:
    """Length of the shortest path from each location to outside the photo.

    A step to one of the eight neighbours is as long as their unit features are apart, in [0, 2]. The last
    step, out of a border cell, is its `unlikeness`: an object that the border cuts stays salient. Paths
    have at most h + w steps inside. One feature all over gives zeros.

    clip: a step inside is max(0, length - clip * m), where m is the photo's mean over locations of the
    shortest step from there. Many steps across a texture are a long way; with 1, after the paper, about none.

    >>> photo = jnp.tile(jnp.array([1.0, 0.0]), (1, 4, 4, 1)).at[0, 1:3, 1].set(jnp.array([0.0, 1.0]))
    >>> for row in jnp.round(10 * distance(photo)[0]).astype(int):  # two cells at a right angle: sqrt(2)
    ...     print(row.tolist())
    [0, 0, 0, 0]
    [0, 14, 0, 0]
    [0, 14, 0, 0]
    [0, 0, 0, 0]
    """
    unit = _unit(features)
    h, w = unit.shape[1:3]
    steps = jnp.stack([_length(unit, _neighbour(unit, *to, 0.0)) for to in _AROUND])
    exists = jnp.stack([_neighbour(jnp.ones(unit.shape[:3]), *to, 0.0) for to in _AROUND])
    if clip:
        least = jnp.min(jnp.where(exists > 0, steps, _FAR), axis=0)
        steps = jax.nn.relu(steps - clip * jnp.mean(least, axis=(1, 2), keepdims=True)[None])
    steps = jnp.where(exists > 0, steps, _FAR)
    out = jnp.where(_at_border(h, w), unlikeness(unit), _FAR)

    def shorter(found: Array, _: None) -> tuple[Array, None]:
        shortest = found  # one minimum after the other: stacked, they took five times as long on a CPU
        for step, to in zip(steps, _AROUND, strict=True):
            shortest = jnp.minimum(shortest, _neighbour(found, *to, _FAR) + step)
        return shortest, None

    return jax.lax.scan(shorter, out, None, length=h + w)[0]


def _mean_of_largest(x: Float[Array, "... n"], k: int) -> Float[Array, "..."]:
    """Mean of the k largest numbers of the last axis, all in [-1, 1].

    The k-th largest is found by halving: a sort takes twelve times as long on a CPU, and top_k, where it is a
    custom call, gathers the photos of all devices.
    """
    fixed = jax.lax.stop_gradient(x)

    def halve(span: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        low, high = span
        middle = 0.5 * (low + high)
        enough = jnp.sum(fixed >= middle, axis=-1, keepdims=True) >= k
        return (jnp.where(enough, middle, low), jnp.where(enough, high, middle)), None

    ends = jnp.min(fixed, axis=-1, keepdims=True), jnp.max(fixed, axis=-1, keepdims=True)
    (least, _), _ = jax.lax.scan(halve, ends, None, length=_HALVINGS)
    # Holds however many are as large as the k-th: they add nothing (each of them has a gradient, though).
    return least[..., 0] + jnp.sum(jnp.where(fixed >= least, x - least, 0.0), axis=-1) / k


def _unit(x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)


def _at_border(h: int, w: int) -> np.ndarray:
    return np.pad(np.zeros((max(0, h - 2), max(0, w - 2)), bool), 1, constant_values=True)[:h, :w]


def _neighbour(x: Array, dy: int, dx: int, outside: float) -> Array:
    """[b, h, w, ...]: what lies (dy, dx) away from each location; `outside` beyond the border."""
    h, w = x.shape[1:3]
    padding = [(0, 0), (1, 1), (1, 1)] + [(0, 0)] * (x.ndim - 3)
    return jnp.pad(x, padding, constant_values=outside)[:, 1 + dy : 1 + dy + h, 1 + dx : 1 + dx + w]


def _length(a: Float[Array, "b h w d"], b: Float[Array, "b h w d"]) -> Float[Array, "b h w"]:
    return jnp.sqrt(jnp.sum(jnp.square(a - b), axis=-1) + _EPS) - _EPS**0.5
