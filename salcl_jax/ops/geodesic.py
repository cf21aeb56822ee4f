"""Saliency as the length of the shortest path to the border, after Wei et al., Geodesic saliency using
background priors (ECCV 2012), with features of the network in the place of colours.

What a photo is about seldom touches its border, and background leads there without a jump.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_FAR = 1e3  # longer than any path; infinity would make the gradient NaN
_EPS = 1e-6  # keeps the gradient of a step of length 0 finite
_AROUND = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]


def distance(features: Float[Array, "b h w d"]) -> Float[Array, "b h w"]:
    """Length of the shortest path from each location to outside the photo.

    A step to one of the eight neighbours is as long as their unit features are apart, in [0, 2]. The last
    step, out of a border cell, is 1 minus its mean cosine with the quarter of the border that is most like
    it: an object that the border cuts stays salient. Paths have at most h + w steps inside. One feature all
    over gives zeros.

    >>> photo = jnp.tile(jnp.array([1.0, 0.0]), (1, 4, 4, 1)).at[0, 1:3, 1].set(jnp.array([0.0, 1.0]))
    >>> for row in distance(photo)[0]:  # two cells at a right angle to the others: sqrt(2)
    ...     print([round(float(x), 1) for x in row])
    [0.0, 0.0, 0.0, 0.0]
    [0.0, 1.4, 0.0, 0.0]
    [0.0, 1.4, 0.0, 0.0]
    [0.0, 0.0, 0.0, 0.0]
    """
    features = features.astype(jnp.float32)
    features = features / jnp.sqrt(jnp.sum(jnp.square(features), axis=-1, keepdims=True) + 1e-12)
    steps = jnp.stack([_length(features, _neighbour(features, *to, 0.0)) for to in _AROUND])
    inside = jnp.ones(features.shape[:3], jnp.float32)
    exists = jnp.stack([_neighbour(inside, *to, 0.0) for to in _AROUND])
    steps = jnp.where(exists > 0, steps, _FAR)

    def shorter(found: Array, _: None) -> tuple[Array, None]:
        through = jnp.stack([_neighbour(found, *to, _FAR) for to in _AROUND]) + steps
        return jnp.minimum(found, jnp.min(through, axis=0)), None

    h, w = features.shape[1:3]
    return jax.lax.scan(shorter, _way_out(features), None, length=h + w)[0]


def _neighbour(x: Array, dy: int, dx: int, outside: float) -> Array:
    """[b, h, w, ...]: what lies (dy, dx) away from each location; `outside` beyond the border."""
    h, w = x.shape[1:3]
    padding = [(0, 0), (1, 1), (1, 1)] + [(0, 0)] * (x.ndim - 3)
    return jnp.pad(x, padding, constant_values=outside)[:, 1 + dy : 1 + dy + h, 1 + dx : 1 + dx + w]


def _length(a: Float[Array, "b h w d"], b: Float[Array, "b h w d"]) -> Float[Array, "b h w"]:
    return jnp.sqrt(jnp.sum(jnp.square(a - b), axis=-1) + _EPS) - _EPS**0.5


def _way_out(unit: Float[Array, "b h w d"]) -> Float[Array, "b h w"]:
    """Length of the step from a border cell to outside; _FAR from the other cells."""
    h, w = unit.shape[1:3]
    places = [(y, x) for y in range(h) for x in range(w) if y in (0, h - 1) or x in (0, w - 1)]
    rows, columns = (jnp.array(numbers) for numbers in zip(*places, strict=True))
    border = unit[:, rows, columns]
    n = len(places)
    cosine = jnp.einsum("bnd,bmd->bnm", border, border, precision="highest")
    cosine = jnp.where(jnp.eye(n, dtype=bool), -1.0, cosine)  # a cell is not like itself
    alike = jnp.mean(jax.lax.top_k(cosine, max(1, n // 4))[0], axis=-1)
    return jnp.full(unit.shape[:3], _FAR).at[:, rows, columns].set(1.0 - alike)
