"""A fresh process up to its first training step, with an empty compilation cache and with a filled one."""

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

_EVENTS = {"requests": "compile_requests_use_cache", "hits": "cache_hits"}
MARK = "first step: "


def run(arguments: list[str]) -> dict[str, dict[str, float]]:
    """{'cold', 'warm'}: seconds from the start of a process to its first step; programs compiled, and cached.

    arguments: of `python -m salcl_jax.bench`. The processes use the devices one after the other: call it
    before this process touches them. Raises RuntimeError with the last line of a process that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        return {name: _process(arguments, folder) for name in ("cold", "warm")}


def _process(arguments: list[str], cache: str) -> dict[str, float]:
    command = [sys.executable, "-m", "salcl_jax.bench", *arguments, "--what=first", "--out="]
    began = time.monotonic()
    with subprocess.Popen(
        command, env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}, text=True, stdout=subprocess.PIPE
    ) as process:
        found = None
        for text in process.stdout:
            if text.startswith(MARK):
                found = {"seconds": time.monotonic() - began} | json.loads(text.removeprefix(MARK))
    if process.returncode or found is None:
        raise RuntimeError(f"the process that measures the first step ended with {process.returncode}")
    return found | {"files": len(os.listdir(cache))}


def first_step(config: Any) -> dict[str, float]:
    """One training step of this process as training would do it, and how many programs were compiled."""
    import jax

    from salcl_jax import sharding, train
    from salcl_jax.bench.programs import Setting

    counts = dict.fromkeys(_EVENTS, 0)

    def listen(event: str, **_) -> None:
        for name, ending in _EVENTS.items():
            counts[name] += event == f"/jax/compilation_cache/{ending}"

    train.use_compilation_cache()
    jax.monitoring.register_event_listener(listen)
    setting = Setting(config, sharding.make_mesh())
    jax.block_until_ready(setting.step(setting.state(), setting.batch()))
    return {"cached": counts["hits"], "compiled": counts["requests"] - counts["hits"]}


def line(report: dict[str, float]) -> str:
    """The figures as the line that the measuring process looks for."""
    return MARK + json.dumps(report)
