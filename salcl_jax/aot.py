"""The training step compiled ahead of time, for devices that need not be there, and what it takes.

The step, its shardings and what it gives up are those of training: `sharding.state_sharding`, `jit_step`.
"""

import importlib.util
import os
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from salcl_jax import config as config_lib
from salcl_jax import hlo, sharding
from salcl_jax.chips import chip_of, roofline
from salcl_jax.models.network import build
from salcl_jax.train_step import make_init, make_train_step
from salcl_jax.validation import validate

# The compiler would otherwise ask the network what machine this is, and print that it does not know.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is touched, so no lock is needed
}
# One device a chip, as on a TPU VM; the compiler's own default gives a v4 chip two.
_OPTIONS = {"v4": {"chip_config_name": "megacore"}}
_USED = re.compile(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


class TooLarge(Exception):
    """The program needs `used` bytes of a chip's `limit`; both None where the compiler did not say."""

    def __init__(self, used: float | None, limit: float | None):
        super().__init__(used, limit)
        self.used, self.limit = used, limit


class Step(NamedTuple):
    """A compiled step and what jax knew of it before."""

    compiled: Any
    leaves: tuple[str, ...]  # names of the state's leaves, in order
    unstable: tuple[str, ...]  # those that come out unlike they go in: the next step would compile again
    seconds: float  # that compiling took


def slice_mesh(topology: str) -> Mesh:
    """Mesh of the chips of a TPU slice such as 'v5e:4x4', with no TPU present.

    Raises ImportError without the TPU compiler and ValueError for a slice that it does not know.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not importlib.util.find_spec("libtpu"):
        raise ImportError("the TPU compiler is not installed: pip install -e .[tpu]")
    from jax.experimental import topologies

    options = _OPTIONS.get(topology.split(":")[0], {})
    try:
        found = topologies.get_topology_desc(topology, "tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).split("\n")[0].removeprefix("INVALID_ARGUMENT: ")
        raise ValueError(
            f"--topology={topology}: {reason}; give the generation and the chips along each axis, "
            "such as v5e:4x4, v6e:8x16, v4:2x2x4, v5p:4x4x4"
        ) from error
    return sharding.make_mesh(found.devices)


def compile_step(config: Any, mesh: Mesh) -> Step:
    """The training step of a configuration for a mesh. Raises ConfigError, and `TooLarge` for the chips."""
    lowered, state = _lower(config, mesh)
    began = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TooLarge(*_used(str(error))) from error
    seconds = time.monotonic() - began
    before, after = (jax.tree_util.tree_leaves_with_path(tree) for tree in (state, lowered.out_info[0]))
    names = tuple(jax.tree_util.keystr(path).lstrip(".") for path, _ in before)
    kinds = ([(leaf.shape, leaf.dtype) for _, leaf in leaves] for leaves in (before, after))
    unstable = tuple(name for name, a, b in zip(names, *kinds, strict=True) if a != b)
    return Step(compiled, names, unstable, seconds)


def flops_of_step(config: Any) -> float:
    """Operations of a training step before the compiler changes it; a loop's body counts once.

    Counted for one CPU device: the runtimes of accelerators do not say before they compile.
    """
    lowered, _ = _lower(config, sharding.make_mesh(jax.devices("cpu")[:1]))
    return config.accumulate * lowered.cost_analysis()["flops"]


def _lower(config: Any, mesh: Mesh) -> tuple[Any, Any]:
    """The step as it is handed to the compiler, and the shapes of its state."""
    validate(config, devices=mesh.size)
    config = config_lib.finish(config, devices=mesh.size, images=1000 * config.batch_size)
    network = build(**config.model)
    state = jax.eval_shape(make_init(network, config))
    places = sharding.state_sharding(state, mesh, **config.sharding)
    step = sharding.jit_step(make_train_step(network, config), places, mesh)
    return step.lower(state, _batch(config)), state


def _batch(config: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the global batch that training hands to the step."""
    b, s = config.batch_size, config.data.canvas
    shapes = {"image": ((b, s, s, 3), np.uint8), "aspect": ((b,), np.float32), "skipped": ((b,), np.int32)}
    if config.roi.source == "ground_truth":
        shapes["boxes"] = ((b, config.data.max_boxes, 4), np.float32)
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}


def measure(step: Step, config: Any, mesh: Mesh) -> dict[str, Any]:
    """What a step takes on each chip: memory, work and least time, collectives, all in plain JSON values.

    Sizes are bytes; times are left out for devices without published figures. The compiler counts the body
    of a loop once; the only loop of weight is that over micro-batches, so its counts are multiplied by
    `accumulate`. Bytes accessed include what moves within a chip's fast memory: a bound from above.
    """
    memory, cost = step.compiled.memory_analysis(), step.compiled.cost_analysis()
    per_chip, device = config.batch_size // mesh.size, mesh.devices.flat[0].device_kind
    flops, accessed = (config.accumulate * cost[name] for name in ("flops", "bytes accessed"))
    text = step.compiled.as_text()
    found = hlo.collectives(text)
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "output": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    reused = hlo.aliased_outputs(text)
    report = {
        "chips": mesh.size, "device": device, "per_chip": per_chip,
        "memory": sizes | {"total": sum(sizes.values())},
        "flops_per_image": flops / per_chip, "bytes_per_image": accessed / per_chip,
        "collectives": hlo.totals(found, lambda one: one.kind),
        "collectives_of": hlo.totals(found, _carried),
        "not_donated": [name for i, name in enumerate(step.leaves) if i not in reused],
        "recompiles": list(step.unstable),
        "compile_seconds": round(step.seconds, 1),
    }  # fmt: skip
    if not (chip := chip_of(device)):
        return report
    sent = sum(kind["bytes"] for kind in report["collectives"].values())
    line = roofline(chip, flops=flops, bytes_accessed=accessed, sent=sent, chips=mesh.size)
    return report | {
        "memory_of_chip": chip.memory,
        "milliseconds": {name: 1e3 * value for name, value in line._asdict().items()},
        "bound": line.bound,
        "images_per_second": per_chip / line.seconds,
    }


def largest_batch(
    attempt: Callable[[int], tuple[bool, float | None]], limit: float, first: int, multiple: int = 8
) -> int:
    """Largest multiple of `multiple` images per chip that fits, 0 if none does.

    attempt(n) -> whether n images per chip fit, and the bytes they need where those are known; limit: bytes
    of a chip. Memory grows nearly linearly with the batch, so the next attempt is on the line through the
    two largest known sizes, between the largest that fits and the smallest that does not.
    """
    low, high, used, number = 0, None, {}, max(multiple, first // multiple * multiple)
    while high is None or high - low > multiple:
        fits, size = attempt(number)
        low, high = (number, high) if fits else (low, number)
        if size:
            used[number] = size
        number = _next_attempt(used, limit, low, high, multiple)
    return low


def _next_attempt(used: dict[int, float], limit: float, low: int, high: int | None, multiple: int) -> int:
    known = sorted(used.items())
    if len(known) > 1:
        (a, first), (b, second) = known[-2:]
        wanted = a + (limit - first) * (b - a) / max(second - first, 1.0)
    elif known:
        wanted = limit / known[0][1] * known[0][0]
    else:
        wanted = 2 * low if high is None else (low + high) / 2
    wanted = max(low + multiple, int(wanted // multiple) * multiple)
    return wanted if high is None else min(wanted, high - multiple)


def _carried(one: hlo.Collective) -> str:
    """What a collective of the training step carries, by the name of its operation."""
    scope = one.scope.lower()
    if "norm" in scope:
        return "batch norm"
    return "gradients" if "transpose" in scope else "metrics, losses"


def _used(message: str) -> tuple[float | None, float | None]:
    """Bytes that a program needs and may use, from the compiler's error."""
    found = _USED.search(message)
    if not found:
        return None, None
    return float(found[1]) * _UNITS[found[2]], float(found[3]) * _UNITS[found[4]]
