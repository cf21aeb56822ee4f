"""What tells a photo from the others: Grad-CAM on a contrastive similarity."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from salcl_jax.losses import unit
from salcl_jax.models.network import Network
from salcl_jax.ops import saliency
from salcl_jax.types import PyTree


def draw(
    network: Network, c: Any, params: PyTree, stats: PyTree, x: Float[Array, "b 1 p p 3"]
) -> Float[Array, "b h w"]:
    """Grad-CAM of the agreement between an image and its mirror image, minus that with the other images.

    The gradient is first order and stops at the last stage: it costs the projector's backward pass only.
    """
    stages, _ = network.encode(params, stats, x, train=False)
    mirrored, _ = network.encode(params, stats, x[:, :, :, ::-1], train=False)
    z_mirror = network.project(params, stats, mirrored["pooled"], train=False)[0][:, 0]
    z_mirror = jax.lax.stop_gradient(unit(z_mirror))
    features = stages["stage4"][:, 0].astype(jnp.float32)

    def agreement(features: Float[Array, "b h w d"]) -> Float[Array, ""]:
        pooled = jnp.mean(features, axis=(1, 2))[:, None]
        z = unit(network.project(params, stats, pooled, train=False)[0][:, 0])
        own = jnp.sum(z * z_mirror, axis=-1)
        others = z @ jnp.mean(z_mirror, axis=0)
        return jnp.sum(own - others)

    gradient = jax.lax.stop_gradient(jax.grad(agreement)(features))
    return saliency.gradcam(features, gradient)
