"""Figures of a training step that say whether it is healthy."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from salcl_jax.losses import unit
from salcl_jax.ops.boxes import area
from salcl_jax.types import Metrics


def spread(projection: Float[Array, "b d"]) -> Float[Array, ""]:
    """Collapse statistic of SimSiam: std over the batch of unit vectors, times sqrt(d).

    1 for directions drawn at random, 0 when all images have the same projection.

    >>> compass = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> round(float(spread(compass)), 3), float(spread(jnp.ones((4, 2))))
    (1.0, 0.0)
    """
    return jnp.mean(jnp.std(unit(projection), axis=0)) * projection.shape[-1] ** 0.5


def of_step(
    loss: Float[Array, ""],
    value: Float[Array, "b p"],
    weight: Float[Array, "b p"],
    projection: Float[Array, "b v d"],
    crops,
) -> Metrics:
    """Scalars of one step from its loss, pair losses, pair weights, projections and `guidance.Crops`."""
    figures = {
        "loss": loss,
        "loss_pair": jnp.mean(jnp.sum(value[:, :2], axis=1)),
        "spread": spread(projection[:, 0]),
        "weight_std": jnp.std(weight),
        "guided": jnp.mean(crops.guided.astype(jnp.float32)),
        "window_area": jnp.mean(area(crops.boxes[:, :2])),
    }
    if value.shape[1] > 2:
        counted = (weight[:, 2:] > 0).astype(jnp.float32)
        figures["loss_local"] = 2 * jnp.sum(value[:, 2:] * counted) / jnp.maximum(jnp.sum(counted), 1.0)
    if crops.maps is not None:
        figures["saliency_mean"] = jnp.mean(crops.maps)
        figures["window_saliency"] = jnp.mean(crops.score[:, :2])
    if crops.rois is not None:
        figures["rois_valid"] = jnp.mean(jnp.sum(crops.rois.valid.astype(jnp.float32), axis=1))
        figures["roi_area"] = jnp.mean(area(crops.rois.boxes))
    return figures
