"""The training step and its parts as programs that can be timed, all on arrays that are already in place.

A part is a function of the step compiled on its own: the same functions, shapes and shardings as in the step.
"""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from salcl_jax import config as config_lib
from salcl_jax import guidance, sharding, train_step
from salcl_jax.models.network import build
from salcl_jax.rng import key_for
from salcl_jax.types import Batch, PyTree, TrainState
from salcl_jax.validation import validate

IMAGES = 100_000  # size of the training set, where it decides how many steps a run has
LEAST = 0.2  # seconds that are timed at a time


class Program(NamedTuple):
    """Something to time: `start` begins one run and returns what to wait for."""

    start: Callable[[], Any]
    per_step: int  # runs in one optimizer step
    flops: float | None  # of one run on all devices, by the compiler's count
    bytes_accessed: float | None  # likewise
    memory: int | None  # bytes on a device while it runs


class Setting:
    """A configuration on a mesh: its step, state and random batch."""

    def __init__(self, config: Any, mesh: Mesh):
        """Raises ConfigError where the configuration does not fit the devices."""
        validate(config, devices=mesh.size)
        self.config = c = config_lib.finish(config, devices=mesh.size, images=IMAGES)
        self.mesh, self.network = mesh, build(**c.model)
        self.whole, self.split = sharding.replicated(mesh), sharding.data_sharded(mesh)
        self._init = train_step.make_init(self.network, c)
        self.places = sharding.state_sharding(jax.eval_shape(self._init), mesh, **c.sharding)
        self.step = sharding.jit_step(train_step.make_train_step(self.network, c), self.places, mesh)

    def state(self) -> TrainState:
        """The untrained state."""
        return jax.jit(self._init, out_shardings=self.places)()

    def batch(self, size: int | None = None) -> Batch:
        """Random canvases of photos of random proportions; size None is the configuration's batch."""
        c, n = self.config, size or self.config.batch_size

        def draw() -> Batch:
            k_image, k_aspect = jax.random.split(key_for(c.seed, 0, "canvases"))
            image = jax.random.bits(k_image, (n, c.data.canvas, c.data.canvas, 3), jnp.uint8)
            aspect = jnp.exp(jax.random.uniform(k_aspect, (n,), minval=-0.4, maxval=0.4))
            found = {"image": image, "aspect": aspect, "skipped": jnp.zeros(n, jnp.int32)}
            if c.roi.source == "ground_truth":
                box = jnp.array([0.2, 0.3, 0.7, 0.8])
                found["boxes"] = jnp.broadcast_to(box[None, None, :], (n, c.data.max_boxes, 4))
            return found

        return jax.jit(draw, out_shardings=self.split)()


def whole_step(setting: Setting) -> Program:
    """The training step; every run continues from the state of the one before."""
    batch, held = setting.batch(), [setting.state()]
    compiled, (flops, moved, memory) = _compile(setting.step, (held[0], batch), setting.mesh)

    def start() -> Any:
        held[0], measured = compiled(held[0], batch)
        return measured

    loops = setting.config.accumulate  # the compiler counts the body of the loop over micro-batches once
    return Program(start, 1, flops and loops * flops, moved and loops * moved, memory)


def parts(setting: Setting) -> dict[str, Program]:
    """Programs by name: saliency (where there is a map), ROI, crops, augmentation, online, ...

    'gradient' is both passes forward and the online one backward. Guidance has its full strength. With
    accumulated gradients all but the update run on micro-batches.
    """
    c, found = setting.config, {}

    def add(name: str, function: Callable, out: Any, *args: Any) -> PyTree:
        compiled, cost = _compile(jax.jit(function, out_shardings=out), args, setting.mesh)
        runs = 1 if name == "update" else c.accumulate
        found[name] = Program(lambda: compiled(*args), runs, *cost)
        return compiled(*args)

    state, strength = setting.state(), jax.device_put(jnp.ones(()), setting.whole)
    crops = _pixel_parts(setting, state, strength, add)
    _network_parts(setting, state, crops, strength, add)
    return found


def _pixel_parts(setting: Setting, state: TrainState, strength: jax.Array, add: Callable) -> guidance.Crops:
    """From the canvases to the crops, which are returned."""
    c, split = setting.config, setting.split
    batch = setting.batch(c.batch_size // c.accumulate)
    key = jax.random.fold_in(key_for(c.seed, 0, "crops"), 0)  # that of the first step
    key = jax.device_put(key, setting.whole)
    *k_windows, k_pair, k_small = jax.random.split(key, 6)
    maps = None
    if c.saliency.source != "none":
        draw = guidance.make_saliency(setting.network, c)
        nets = guidance.branch(state, c.saliency.branch)
        maps = add("saliency", lambda n, i: draw(*n, guidance.to_float(i)), split, nets, batch["image"])
    w = add("ROI", guidance.make_windows(c), split, k_windows, maps, batch, strength)
    cut = add("crops", lambda i, b: guidance.cut(guidance.to_float(i), b, c), split, batch["image"], w.boxes)
    pair, small = add("augmentation", guidance.make_augmentation(c), split, k_pair, k_small, *cut)
    return guidance.Crops(maps, w.rois, w.boxes, w.score, pair, small, w.local_valid, w.guided)


def _network_parts(
    setting: Setting, state: TrainState, crops: guidance.Crops, strength: jax.Array, add: Callable
) -> None:
    """From the crops to the new state. Of a pass that is wanted alone the compiler drops the other one."""
    c, whole, split = setting.config, setting.whole, setting.split
    objective, change = train_step.make_objective(setting.network, c), train_step.make_update(c)

    def online(state: TrainState, crops: guidance.Crops) -> tuple:
        out = objective(state.params, state, crops, strength)[1][0]
        return out.prediction, out.batch_stats

    def target(state: TrainState, crops: guidance.Crops) -> tuple:
        out = objective(state.params, state, crops, strength)[1][0]
        return out.target, out.target_batch_stats

    def gradient(state: TrainState, crops: guidance.Crops) -> tuple:
        with_aux = jax.value_and_grad(objective, has_aux=True)
        (loss, (out, _)), grads = with_aux(state.params, state, crops, strength)
        return loss, grads, out.batch_stats, out.target_batch_stats

    def update(state: TrainState, grads: PyTree, loss: jax.Array) -> tuple:
        return change(state, state, grads, loss)

    add("online", online, (split, whole), state, crops)
    if c.loss.name != "simsiam":  # there the online pass is the target
        add("target", target, (split, whole), state, crops)
    out = add("gradient", gradient, (whole, setting.places.params, whole, whole), state, crops)
    add("update", update, (setting.places, whole), state, out[1], out[0])


def _compile(jitted: Any, args: tuple, mesh: Mesh) -> tuple[Any, tuple]:
    """The compiled program and its cost."""
    lowered = jitted.lower(*args)
    compiled = lowered.compile()
    counts = lowered.cost_analysis(), compiled.cost_analysis(), compiled.memory_analysis()
    return compiled, _cost(*counts, mesh)


def _cost(
    before: dict | None, after: dict | None, memory: Any, mesh: Mesh
) -> tuple[float | None, float | None, int | None]:
    """Operations and bytes of all devices, and memory of one, as the compiler counts them.

    before, after: of the whole program before it was compiled, of a device's program after. Where the
    compiler hands convolutions to a library (GPUs) they may be missing after; then the former counts.
    """
    whole, flops, moved = (before or {}).get("flops"), *map((after or {}).get, ("flops", "bytes accessed"))
    flops = flops and flops * mesh.size
    if whole and (flops or 0) < 0.5 * whole:
        flops = whole
    used = memory and (
        memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )  # fmt: skip
    return flops or None, moved and moved * mesh.size, used or None


def measure(programs: dict[str, Program], rounds: int) -> dict[str, list[float]]:
    """Seconds of one run of each program, for each of `rounds` rounds.

    A round times every program once, so that what slows the machine for a while slows all of them. On
    accelerators runs follow each other without waiting, as in training; a CPU would run them side by side.
    """
    calls = {name: _calls(program.start) for name, program in programs.items()}
    found: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            found[name].append(_seconds(program.start, calls[name]))
    return found


def _calls(start: Callable[[], Any]) -> int:
    """How many runs are timed together; also warms up."""
    jax.block_until_ready(start())
    took = _seconds(start, 1)
    return 1 if jax.default_backend() == "cpu" else int(np.clip(math.ceil(LEAST / took), 1, 50))


def _seconds(start: Callable[[], Any], calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        out = start()
    jax.block_until_ready(out)
    return (time.perf_counter() - began) / calls
