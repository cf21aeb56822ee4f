"""Test set-up: shape annotations are checked, ranks must match, and the CPU plays eight devices."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
_hook = install_import_hook("salcl_jax", "beartype.beartype")
_hook.__enter__()

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def photos() -> Path:
    """Folder with real photos, from SALCL_DATA or beside the repository; skips where it is absent."""
    root = Path(os.environ.get("SALCL_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not root.is_dir():
        pytest.skip(f"no real photos in {root}: set SALCL_DATA")
    return root
