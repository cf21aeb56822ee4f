"""What a checkpoint says of its own leaves: dtype, shape and a checksum of the bits of each, under a CRC.

Orbax verifies neither the bytes of large arrays nor dtypes; with this record a flipped bit or another
network's leaf is noticed on restore.
"""

import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jaxtyping import Array, UInt

from salcl_jax.types import PyTree


class Mismatch(ValueError):
    """The checkpoint is intact but belongs to another network or optimizer."""


@jax.jit
def checksum(x: Array) -> UInt[Array, ""]:
    """Sum of bits times odd position weights, modulo 2^32: any one changed element changes it.

    Integer sums do not depend on their order, so the value is the same on any number of devices.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    width = min(x.dtype.itemsize, 4)
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * width}").reshape(-1).astype(jnp.uint32)
    return jnp.sum(bits * (2 * jax.lax.iota(jnp.uint32, bits.size) + 1), dtype=jnp.uint32)


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by dotted name; NamedTuples and dicts with the same keys give the same names."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}


def describe(state: PyTree) -> dict[str, list]:
    """[dtype, shape, checksum] of every leaf."""
    named = _named_leaves(state)
    sums = jax.device_get([_start_sum(x) for x in named.values()])
    return {
        name: [str(x.dtype), list(x.shape), int(s)]
        for (name, x), s in zip(named.items(), sums, strict=True)
    }


def _start_sum(x: Any) -> Array:
    """The checksum, perhaps still on its way.

    Sums of split leaves talk between processes, which may run what is on its way in different orders and
    then wait for each other forever: one at a time.
    """
    found = checksum(x)
    return found if getattr(x, "is_fully_replicated", True) else found.block_until_ready()


def seal(record: dict) -> dict:
    """The record with a CRC of its JSON text, which survives a round trip unchanged."""
    text = json.dumps(record, sort_keys=True)
    return {"record": json.loads(text), "crc": zlib.crc32(text.encode())}


def unseal(sealed: dict) -> tuple[dict, dict]:
    """(leaves, extra) of a sealed record; raises RuntimeError, KeyError or TypeError when it was altered."""
    text = json.dumps(sealed["record"], sort_keys=True)
    if zlib.crc32(text.encode()) != sealed["crc"]:
        raise RuntimeError("its record of leaves is altered")
    leaves, extra = sealed["record"]["leaves"], sealed["record"]["extra"]
    if not (isinstance(leaves, dict) and isinstance(extra, dict)):
        raise TypeError("its record has no leaves or nothing beside them")
    return leaves, extra


def check_structure(where: epath.Path, leaves: dict, wanted: PyTree) -> None:
    """Raise Mismatch naming the first leaf whose presence, shape or dtype differs."""
    here = {n: f"{x.dtype}{list(x.shape)}" for n, x in _named_leaves(wanted).items()}
    there = {n: f"{dtype}{shape}" for n, (dtype, shape, _) in leaves.items()}
    for name in [*here, *(n for n in there if n not in here)]:
        if here.get(name) != there.get(name):
            raise Mismatch(
                f"{where} is of another network: {name} is {there.get(name, 'absent')} in the "
                f"checkpoint and {here.get(name, 'absent')} here; use its config or a new workdir"
            )


def check_sums(leaves: dict, tree: PyTree) -> None:
    """Raise RuntimeError naming the first leaf whose bits are not those that were saved."""
    found = describe(tree)
    for name, expected in leaves.items():
        if found.get(name) != expected:
            raise RuntimeError(f"the bits of {name} are not those that were saved")
