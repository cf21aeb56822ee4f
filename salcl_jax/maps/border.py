"""Where a photo is unlike its border, and far from it."""

from typing import Any

from jaxtyping import Array, Float

from salcl_jax.models.network import Network
from salcl_jax.ops import border, saliency
from salcl_jax.types import PyTree


def draw(
    network: Network, c: Any, params: PyTree, stats: PyTree, x: Float[Array, "b 1 p p 3"]
) -> Float[Array, "b h w"]:
    """Mean of unlikeness to the border and geodesic distance from it, in the stages `c.stages`, fused."""
    stages, _ = network.encode(params, stats, x, train=False)
    found = []
    for stage in c.stages:
        features = stages[stage][:, 0]
        measures = border.unlikeness(features), border.distance(features, c.clip)
        # Beside 1, so that a photo of one colour is flat and its rounding errors are not stretched to a map.
        found.append(saliency.fuse([saliency.normalize(1.0 + m) for m in measures], "mean"))
    return saliency.fuse(found, c.fuse)
