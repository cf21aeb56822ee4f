"""Where a photo differs from the others of its batch."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from salcl_jax.models.network import Network
from salcl_jax.ops import saliency
from salcl_jax.types import PyTree


def draw(
    network: Network, c: Any, params: PyTree, stats: PyTree, x: Float[Array, "b 1 p p 3"]
) -> Float[Array, "b h w"]:
    """Contrast of every location's projection, as if that location were the whole image."""
    stages, _ = network.encode(params, stats, x, train=False)
    b, _, h, w, d = stages["stage4"].shape
    features = stages["stage4"].astype(jnp.float32).reshape(b, h * w, d)
    z, _ = network.project(params, stats, features, train=False)
    whole, _ = network.project(params, stats, jnp.mean(features, axis=1, keepdims=True), train=False)
    return saliency.contrast(z.reshape(b, h, w, -1), whole[:, 0])
