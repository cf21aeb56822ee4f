"""Batch normalisation with separate statistics for every view of a batch."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class ViewBatchNorm(nn.Module):
    """Batch norm of [b*v, ..., d], equal to applying it to the v views in turn as BYOL does.

    In training each view is normalised with its own mean and variance over the batch and space,
    and the running statistics take the views in order: r <- momentum r + (1 - momentum) stat_v.
    Otherwise the running statistics normalise. Statistics are float32 whatever the compute dtype.
    Under jit with a batch sharded over devices they are those of the global batch.

    The running variance holds the biased estimate, as in TensorFlow (torch stores the unbiased one,
    n/(n-1) larger).
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    scale_init: nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(
        self, x: Float[Array, "n ... d"], views: int, train: bool
    ) -> Float[Array, "n ... d"]:
        """Normalise x, whose first axis is [b, v] flattened; raises if v does not divide it."""
        d = x.shape[-1]
        scale = self.param("scale", self.scale_init, (d,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (d,), jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (d,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (d,), jnp.float32)
        if not train:
            mean, var = running_mean.value[None], running_var.value[None]
            return self._normalise(x[:, None], mean, var, scale, bias).reshape(x.shape)

        if x.shape[0] % views:
            raise ValueError(
                f"ViewBatchNorm: {x.shape[0]} inputs do not split into {views} views; "
                "flatten [b, v] with the same v."
            )
        by_view = x.reshape(-1, views, *x.shape[1:])
        mean, var = _view_statistics(by_view, running_mean.value)
        if not self.is_initializing():
            running_mean.value = self._update(running_mean.value, mean)
            running_var.value = self._update(running_var.value, var)
        return self._normalise(by_view, mean, var, scale, bias).reshape(x.shape)

    def _update(
        self, running: Float[Array, " d"], stats: Float[Array, "v d"]
    ) -> Float[Array, " d"]:
        for stat in jax.lax.stop_gradient(stats):
            running = self.momentum * running + (1 - self.momentum) * stat
        return running

    def _normalise(
        self,
        x: Float[Array, "b v ... d"],
        mean: Float[Array, "v d"],
        var: Float[Array, "v d"],
        scale: Float[Array, " d"],
        bias: Float[Array, " d"],
    ) -> Float[Array, "b v ... d"]:
        factor = jax.lax.rsqrt(var + self.epsilon) * scale[None]
        y = x.astype(jnp.float32) - _align(mean, x.ndim)
        y = y * _align(factor, x.ndim) + _align(bias[None], x.ndim)
        return y.astype(self.dtype)


def _align(stat: Float[Array, "v d"], rank: int) -> Float[Array, "1 v ... d"]:
    """Give a per-view statistic the rank of an array [b, v, ..., d]."""
    return stat.reshape(1, stat.shape[0], *(1,) * (rank - 3), stat.shape[1])


def _view_statistics(
    x: Float[Array, "b v ... d"], centre: Float[Array, " d"]
) -> tuple[Float[Array, "v d"], Float[Array, "v d"]]:
    """Mean and biased variance of each view, in one pass over x.

    Both moments are taken about `centre`, any constant (the running mean). Two separate reductions
    of x would read the activations twice and need two rounds of communication on a pod, and moments
    about zero cancel where the mean is large. Rounding can still leave a constant input slightly
    below zero, hence the floor.
    """
    axes = (0, *range(2, x.ndim - 1))
    centre = jax.lax.stop_gradient(centre)[None]
    shifted = x.astype(jnp.float32) - _align(centre, x.ndim)
    first = shifted.mean(axes)
    second = jnp.square(shifted).mean(axes)
    return first + centre, jnp.maximum(second - jnp.square(first), 0.0)
