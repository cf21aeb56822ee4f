"""How far a place is from the photo's border, by paths through features."""

from typing import Any

from jaxtyping import Array, Float

from salcl_jax.models.network import Network
from salcl_jax.ops import geodesic, saliency
from salcl_jax.types import PyTree


def draw(
    network: Network, c: Any, params: PyTree, stats: PyTree, x: Float[Array, "b 1 p p 3"]
) -> Float[Array, "b h w"]:
    """Geodesic distance to the border in the features of the stages `c.stages`, fused by `c.fuse`."""
    stages, _ = network.encode(params, stats, x, train=False)
    # Beside 1, so that a photo of one colour is flat and its rounding errors are not stretched to a map.
    found = [1.0 + geodesic.distance(stages[stage][:, 0]) for stage in c.stages]
    return saliency.fuse([saliency.normalize(m) for m in found], c.fuse)
