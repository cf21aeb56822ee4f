"""Where a photo looks like the whole of it."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from salcl_jax.models.network import Network
from salcl_jax.ops import saliency
from salcl_jax.types import PyTree


def draw(
    network: Network, c: Any, params: PyTree, stats: PyTree, x: Float[Array, "b 1 p p 3"]
) -> Float[Array, "b h w"]:
    """Cosine of each location of the last stage with the mean of all."""
    stages, _ = network.encode(params, stats, x, train=False)
    features = stages["stage4"][:, 0]
    return saliency.similarity(features, jnp.mean(features.astype(jnp.float32), axis=(1, 2)))
