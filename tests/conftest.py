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

import json
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def photos() -> Path:
    """Folder with real photos, from SALCL_DATA or beside the repository; skips where it is absent."""
    root = Path(os.environ.get("SALCL_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not root.is_dir():
        pytest.skip(f"no real photos in {root}: set SALCL_DATA")
    return root


@pytest.fixture
def fault_table() -> Callable[..., None]:
    """Function (fault, happened, lost_steps, exit_code) of a fault whose promise was kept, for `make faults`.

    Adds a line to the file that the environment variable FAULT_TABLE names; without it, does nothing.
    """

    def add(fault: str, happened: str, lost_steps: int | None = None, exit_code: int | None = None) -> None:
        row = {"fault": fault, "happened": happened, "lost_steps": lost_steps, "exit_code": exit_code}
        if path := os.environ.get("FAULT_TABLE"):
            with open(path, "a", encoding="utf-8") as file:  # one short write: processes do not mix lines
                file.write(json.dumps(row) + "\n")

    return add
