"""Random keys as a pure function of (seed, step, purpose): nothing to store, nothing to restore."""

import zlib

import jax
from jaxtyping import Array, Int, PRNGKeyArray


def key_for(seed: int, step: Int[Array, ""] | int, purpose: str) -> PRNGKeyArray:
    """Key of one purpose at one optimizer step; distinct purposes get independent streams."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.fold_in(key, zlib.crc32(purpose.encode()) & 0x7FFFFFFF)
