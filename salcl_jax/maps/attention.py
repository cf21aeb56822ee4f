"""Where a ViT's class token looks."""

from typing import Any

from jaxtyping import Array, Float

from salcl_jax.models.network import Network
from salcl_jax.ops import saliency
from salcl_jax.types import PyTree


def draw(
    network: Network, c: Any, params: PyTree, stats: PyTree, x: Float[Array, "b 1 p p 3"]
) -> Float[Array, "b h w"]:
    """Mean over the heads of the class token's attention to each patch."""
    stages, _ = network.encode(params, stats, x, train=False)
    return saliency.attention(stages["attention"][:, 0])
