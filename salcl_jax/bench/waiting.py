"""How long the training loop waits for its input."""

import itertools
import time
from typing import Any

import jax

from salcl_jax import loop, sharding
from salcl_jax.bench.programs import Setting
from salcl_jax.data.sources import open_source

FIRST = 4  # steps that are not counted: the queues fill, and the step compiles
STEPS = 30
SECONDS = 30.0  # after which no further step is begun


def measure(setting: Setting) -> tuple[dict[str, float] | None, str]:
    """Share of the wall time of a real loop (real photos, real step) spent waiting, and a note.

    As in training, a step's figures are read when the next one has been started. None, and a note with the
    reason, where the configuration's photos cannot be opened.
    """
    try:
        source = open_source(setting.config.data.train.to_dict())
        host = loop.host_batches(setting.config, source)
        batches = sharding.prefetch_to_device(host, setting.mesh)
        return _loop(setting, batches), ""
    except (ValueError, OSError, ImportError) as error:
        return None, f"the wait for data is left out: {' '.join(str(error).split())}"


def _loop(setting: Setting, batches: Any) -> dict[str, float]:
    state, pending, waited, done, began = setting.state(), None, 0.0, 0, 0.0
    for number in itertools.count():
        if number == FIRST:
            jax.block_until_ready(state)
            waited, done, began = 0.0, 0, time.perf_counter()
        started = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - started
        state, measured = setting.step(state, batch)
        if pending is not None:
            jax.device_get(pending)
        pending, done = measured, done + 1
        if number >= FIRST and (done == STEPS or time.perf_counter() - began > SECONDS):
            break
    jax.block_until_ready(state)
    seconds = time.perf_counter() - began
    rate = done * setting.config.batch_size / seconds
    return {"share": waited / seconds, "seconds": seconds, "steps": done, "images_per_second": rate}
