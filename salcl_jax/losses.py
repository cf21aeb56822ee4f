"""Losses of pairs of views, and the weights that saliency gives to those pairs.

A pair (i, j) asks view i's prediction for view j's target. Losses are values per pair; they are weighted
and reduced in one place, `combine`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Pairs = Sequence[tuple[int, int]]


def unit(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """Scale vectors to length one, in float32; a zero vector stays zero with a finite gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-12))


def byol(
    prediction: Float[Array, "b v d"], target: Float[Array, "b t d"], pairs: Pairs
) -> Float[Array, "b p"]:
    """2 - 2 cos of each pair, in [0, 4] (BYOL). The two directions are separate pairs, to be summed.

    >>> views = jnp.array([[[1.0, 0.0], [0.0, 3.0]]])  # one image, two views at right angles
    >>> byol(views, views, pairs=[(0, 1), (1, 0), (0, 0)]).tolist()
    [[2.0, 2.0, 0.0]]
    """
    i, j = _indices(pairs)
    cosine = jnp.sum(unit(prediction)[:, i] * unit(target)[:, j], axis=-1)
    return 2.0 - 2.0 * cosine


def simsiam(
    prediction: Float[Array, "b v d"], target: Float[Array, "b t d"], pairs: Pairs
) -> Float[Array, "b p"]:
    """-cos / 2 of each pair (SimSiam), so that the two directions sum to the mean of both."""
    return 0.25 * byol(prediction, target, pairs) - 0.5


def info_nce(
    prediction: Float[Array, "b v d"],
    target: Float[Array, "b t d"],
    pairs: Pairs,
    temperature: float,
) -> Float[Array, "b p"]:
    """Cross-entropy of finding the own target among those of the whole batch, scaled by the temperature.

    The factor 2 * temperature follows MoCo v3: it keeps gradients comparable across temperatures.
    """
    query, key = unit(prediction), unit(target)

    def of_pair(i: int, j: int) -> Float[Array, "b"]:
        logits = jnp.matmul(query[:, i], key[:, j].T, precision="highest") / temperature
        return jax.nn.logsumexp(logits, axis=1) - jnp.diagonal(logits)

    return 2.0 * temperature * jnp.stack([of_pair(i, j) for i, j in pairs], axis=1)


def pair_weights(
    score: Float[Array, "b v"],
    valid: Bool[Array, "b p"],
    pairs: Pairs,
    *,
    mode: str,
    temperature: float,
    floor: float,
    normalize: str,
) -> Float[Array, "b p"]:
    """Detached weight of each pair from the saliency scores of its crops; invalid pairs weigh 0.

    mode: 'none' (all 1), 'product', 'geometric' (mean) or 'minimum' of the two scores, at least 0;
    floor: smallest combined score; temperature: exponent 1/temperature on what is above it;
    normalize: mean 1 over the valid pairs of an 'image' or of the 'batch'.

    >>> score = jnp.array([[1.0, 1.0], [0.25, 0.25]])  # the second image was cropped off its object
    >>> print(pair_weights(score, jnp.ones((2, 2), bool), [(0, 1), (1, 0)], mode="geometric", temperature=1.0,
    ...                    floor=0.05, normalize="batch"))
    [[1.6 1.6]
     [0.4 0.4]]
    """
    i, j = _indices(pairs)
    first, second = score[:, i], score[:, j]
    if mode == "none":
        raw = jnp.ones_like(first)
    elif mode == "product":
        raw = first * second
    elif mode == "geometric":
        raw = jnp.sqrt(first * second)
    else:
        raw = jnp.minimum(first, second)
    raw = jnp.where(valid, jnp.maximum(raw, floor), 0.0)
    axes = 1 if normalize == "image" else (0, 1)
    top = jnp.max(raw, axis=axes, keepdims=True)
    flat = top <= 1e-8  # all scores zero: the pairs are equally (un)salient, so they weigh the same
    raw = (raw / jnp.where(flat, 1.0, top)) ** (1.0 / temperature)  # of the top: a power cannot underflow
    even = valid.astype(jnp.float32)
    raw = jnp.where(flat, even, raw)
    total = jnp.sum(raw, axis=axes, keepdims=True)
    count = jnp.sum(even, axis=axes, keepdims=True)
    weights = raw * count / jnp.maximum(total, 1.0)
    return jax.lax.stop_gradient(weights)


def combine(
    value: Float[Array, "b p"], weight: Float[Array, "b p"], scale: Float[Array, "p"]
) -> Float[Array, ""]:
    """Mean over images of the weighted, scaled *sum* over pairs (summed directions, as BYOL has it).

    The weight is applied to the value of each pair; a pair of weight 0 cannot pass on a NaN.
    """
    weighted = weight * jnp.where(weight > 0, value, 0.0)
    return jnp.mean(jnp.sum(weighted * scale[None, :], axis=1))


def _indices(pairs: Pairs) -> tuple[Array, Array]:
    array = jnp.array(pairs, dtype=jnp.int32)
    return array[:, 0], array[:, 1]
