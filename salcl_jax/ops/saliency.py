"""Saliency maps from the activations that the encoder has anyway.

Every source returns a map per image; `normalize` brings it to [0, 1]. The sources are choices of ours:
channel sums are the map of ContrastiveCrop, `gradcam` is Grad-CAM on a contrastive similarity, `attention`
is the class token's attention of a ViT.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# A map whose range is smaller than this share of its largest magnitude says nothing about places.
FLAT = 1e-4


def activation(features: Float[Array, "b h w d"], statistic: str = "sum") -> Float[Array, "b h w"]:
    """How strongly each location fires: mean over channels ('sum', up to scale) or their norm ('norm')."""
    features = features.astype(jnp.float32)
    if statistic == "norm":
        return jnp.sqrt(jnp.sum(jnp.square(features), axis=-1) + 1e-12)
    return jnp.mean(features, axis=-1)


def similarity(
    features: Float[Array, "b h w d"], pooled: Float[Array, "b d"]
) -> Float[Array, "b h w"]:
    """Cosine of each location with the image's pooled embedding; range [-1, 1]."""
    features = _unit(features.astype(jnp.float32))
    return jnp.einsum("bhwd,bd->bhw", features, _unit(pooled.astype(jnp.float32)))


def contrast(
    projections: Float[Array, "b h w d"], embedding: Float[Array, "b d"]
) -> Float[Array, "b h w"]:
    """How much each location says which image of the batch this is: range [-2, 2].

    Cosine of its projection with its own image's embedding, minus the mean over all images' embeddings.
    """
    own = _unit(embedding.astype(jnp.float32))
    against = own - jnp.mean(own, axis=0, keepdims=True)
    return jnp.einsum("bhwd,bd->bhw", _unit(projections.astype(jnp.float32)), against)


def gradcam(
    features: Float[Array, "b h w d"], gradient: Float[Array, "b h w d"]
) -> Float[Array, "b h w"]:
    """Grad-CAM: channels weighted by their mean gradient, summed, negative evidence cut off."""
    weights = jnp.mean(gradient.astype(jnp.float32), axis=(1, 2))
    return jax.nn.relu(jnp.einsum("bhwd,bd->bhw", features.astype(jnp.float32), weights))


def attention(weights: Float[Array, "b n h w"]) -> Float[Array, "b h w"]:
    """Mean over heads n of the class token's attention to each patch."""
    return jnp.mean(weights.astype(jnp.float32), axis=1)


def normalize(maps: Float[Array, "b h w"]) -> Float[Array, "b h w"]:
    """Stretch each map to [0, 1]; a flat map becomes all ones, with zero gradient, never NaN.

    >>> normalize(jnp.array([[[2.0, 3.0, 4.0]], [[5.0, 5.0, 5.0]]])).tolist()
    [[[0.0, 0.5, 1.0]], [[1.0, 1.0, 1.0]]]
    """
    # To magnitude 1 first: the gradient of the division squares the span, which would underflow. The result
    # does not depend on the magnitude, so it needs no gradient.
    magnitude = jax.lax.stop_gradient(jnp.max(jnp.abs(maps), axis=(1, 2), keepdims=True))
    maps = maps / jnp.maximum(magnitude, jnp.finfo(maps.dtype).tiny)
    low, high = -peak(-maps), peak(maps)
    flat = high - low <= FLAT
    span = jnp.where(flat, 1.0, high - low)  # safe before the division: no NaN in the gradient
    return jnp.where(flat, jnp.ones_like(maps), (maps - low) / span)


def peak(maps: Float[Array, "b h w"]) -> Float[Array, "b 1 1"]:
    """Largest value of each map, whose gradient goes to one cell.

    The gradient of jnp.max compares the values with the maximum. A compiler may compute the two in different
    ways; then no cell is equal to the maximum and the gradient is 0 / 0.
    """
    flat = maps.reshape(maps.shape[0], -1)
    index = jnp.argmax(flat, axis=1)
    return jnp.take_along_axis(flat, index[:, None], axis=1)[:, :, None]


def fuse(maps: Sequence[Float[Array, "b _ _"]], how: str = "product") -> Float[Array, "b h w"]:
    """Bring normalised maps of several stages to the finest grid and combine them into one.

    'product' lets the coarse map gate the fine one, 'mean' averages. One map passes through unchanged.
    """
    if len(maps) == 1:
        return maps[0]
    h, w = max(m.shape[1:] for m in maps)
    resized = [_resize(m, h, w) for m in maps]
    if how == "mean":
        return normalize(sum(resized[1:], resized[0]) / len(resized))
    product = resized[0]
    for other in resized[1:]:
        product = product * other
    return normalize(product)


def _resize(maps: Float[Array, "b _ _"], h: int, w: int) -> Float[Array, "b h w"]:
    # float32 precision: the maps are tiny, and the default would be the slowest one on TPUs as well.
    return jax.image.resize(maps, (maps.shape[0], h, w), "linear")


def _unit(x: Array) -> Array:
    return x / jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)
