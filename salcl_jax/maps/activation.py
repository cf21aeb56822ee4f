"""How strongly each location fires, at one stage or fused over several."""

from typing import Any

from jaxtyping import Array, Float

from salcl_jax.models.network import Network
from salcl_jax.ops import saliency
from salcl_jax.types import PyTree


def draw(
    network: Network, c: Any, params: PyTree, stats: PyTree, x: Float[Array, "b 1 p p 3"]
) -> Float[Array, "b h w"]:
    """Map of the stages `c.stages`, by the channel statistic `c.statistic`, fused by `c.fuse`."""
    stages, _ = network.encode(params, stats, x, train=False)
    found = [saliency.activation(stages[stage][:, 0], c.statistic) for stage in c.stages]
    return saliency.fuse([saliency.normalize(m) for m in found], c.fuse)
