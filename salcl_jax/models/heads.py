"""The small networks behind the encoder."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from salcl_jax.models.norm import ViewBatchNorm


class MLP(nn.Module):
    """BYOL's projector or predictor (Grill et al. 2020): linear, batch norm, ReLU, linear."""

    hidden: int
    out: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n d"], *, views: int, train: bool) -> Float[Array, "n e"]:
        """[n, d] -> [n, out] float32; n is [b, v] flattened."""
        x = nn.Dense(self.hidden, dtype=self.dtype, name="dense1")(x)
        x = nn.relu(ViewBatchNorm(dtype=self.dtype, name="norm")(x, views, train))
        x = nn.Dense(self.out, use_bias=False, dtype=self.dtype, name="dense2")(x)
        return x.astype(jnp.float32)
