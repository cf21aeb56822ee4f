"""The target network: a moving average of the online parameters."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from salcl_jax.types import PyTree


def decay(
    step: Int[Array, ""] | int, *, base: float, total_steps: int
) -> Float[Array, ""]:
    """BYOL's rate 1 - (1 - base) (cos(pi k / K) + 1) / 2 at optimizer step k of K: base to 1.

    >>> [round(float(decay(step, base=0.9, total_steps=100)), 3) for step in (0, 50, 100)]
    [0.9, 0.95, 1.0]
    """
    progress = jnp.clip(jnp.asarray(step, jnp.float32) / total_steps, 0.0, 1.0)
    return 1.0 - (1.0 - base) * (jnp.cos(jnp.pi * progress) + 1.0) / 2.0


def update(target: PyTree, online: PyTree, rate: Float[Array, ""]) -> PyTree:
    """rate * target + (1 - rate) * online, over the leaves that the target has (it has no predictor)."""
    online = {name: online[name] for name in target}
    return jax.tree.map(lambda t, o: rate * t + (1.0 - rate) * o, target, online)
