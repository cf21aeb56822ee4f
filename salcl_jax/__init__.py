"""Saliency-guided contrastive pre-training on scene photos, in JAX."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from salcl_jax.api import Model

__version__ = "0.1.0"


def load(checkpoint: str, *, batch_size: int = 32) -> "Model":
    """A trained network for use from Python, see salcl_jax/api.py."""
    from salcl_jax import api  # late: programs that only read the version need no jax

    return api.load(checkpoint, batch_size=batch_size)
