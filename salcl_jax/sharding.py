"""Devices and processes: the mesh, and the one place where host batches become global arrays.

Training is data parallel: one mesh axis `data`, batches split on axis 0, the state replicated or, with
`sharding.params = fsdp`, split along the same axis.
"""

import collections
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from salcl_jax import peers
from salcl_jax.types import Batch, HostBatch, PyTree

AXIS = "data"
SPLIT_FIELDS = ("params", "target_params", "opt_state")  # of the state, where fsdp splits leaves
# What jax says when nothing describes a cluster, or when a notebook has already used its devices.
_DAY = 24 * 3600  # seconds; at the end, processes wait for slower ones, and heartbeats notice dead ones
_ALONE = ("coordinator_address should be defined", "must be called before any JAX")


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh of all devices (or the given ones) with the single axis `data`.

    The axis is Auto: the Explicit default of jax.make_mesh refuses several operations a
    contrastive step needs, such as batch-by-batch logits and merging views into the batch.
    """
    devices = jax.devices() if devices is None else list(devices)
    # By process: jax.make_mesh would order a pod by its wiring, and rows of a batch would change places.
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of the training state: a full copy on every device."""
    return NamedSharding(mesh, P())


def data_sharded(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch: axis 0 split over all devices."""
    return NamedSharding(mesh, P(AXIS))


def state_sharding(state: PyTree, mesh: Mesh, *, params: str, min_size: int) -> PyTree:
    """Sharding of every leaf of a TrainState, which may be abstract.

    Args:
      params: 'replicated', or 'fsdp': of parameters, target and optimizer, each leaf of at least `min_size`
        elements is split along its largest dimension that divides by the devices (ZeRO; FSDP).
    """
    copies = replicated(mesh)

    def of_leaf(leaf: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        sides = [(side, -axis) for axis, side in enumerate(leaf.shape) if side % mesh.size == 0]
        if not sides or leaf.size < min_size:
            return copies
        return NamedSharding(mesh, P(*[None] * -max(sides)[1], AXIS))

    found = jax.tree.map(lambda _: copies, state)
    fields = SPLIT_FIELDS if params == "fsdp" else ()
    return found._replace(**{name: jax.tree.map(of_leaf, getattr(state, name)) for name in fields})


def whole(tree: PyTree, mesh: Mesh) -> PyTree:
    """The tree with all of every leaf on every device; itself where that is so already.

    One program: of several under way, two processes may start different ones and wait forever.
    """
    if all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(tree)):
        return tree
    return jax.jit(_same, out_shardings=replicated(mesh))(tree)


def _same(tree: PyTree) -> PyTree:
    return tree


def jit_step(step: Callable, state_shardings: PyTree, mesh: Mesh) -> Callable:
    """The compiled training step: (state, batch) -> (state, metrics); the old state is given up.

    A split state is gathered for the passes through the networks and its gradients are split like the
    parameters, so that the optimizer works on parts. Compiles for abstract arguments and absent devices too.
    """
    copies, split = replicated(mesh), data_sharded(mesh)
    if any(not sharding.is_fully_replicated for sharding in jax.tree.leaves(state_shardings)):
        step = functools.wraps(step)(functools.partial(
            step,
            gather=lambda tree: jax.lax.with_sharding_constraint(tree, copies),
            scatter=lambda grads: jax.lax.with_sharding_constraint(grads, state_shardings.params),
        ))  # fmt: skip
    return jax.jit(
        step, in_shardings=(state_shardings, split), out_shardings=(state_shardings, copies), donate_argnums=0
    )


def to_device(batch: HostBatch, mesh: Mesh) -> Batch:
    """Global arrays, sharded on axis 0, from this process's part of the batch.

    Every process passes its own rows, all processes equally many; row order follows the process
    index. Raises ValueError when a leaf's rows do not divide over this process's devices.
    """
    sharding, local = data_sharded(mesh), len(mesh.local_devices)
    for name, leaf in batch.items():
        if leaf.ndim == 0 or leaf.shape[0] % local:
            raise ValueError(
                f"batch['{name}'] has shape {leaf.shape}: its first axis must divide over the "
                f"{local} devices of this process"
            )
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def share_of_process(batch: HostBatch) -> HostBatch:
    """The rows of a batch, known to all processes, that this process hands to its devices."""
    count, index = jax.process_count(), jax.process_index()
    return {k: v[index * len(v) // count : (index + 1) * len(v) // count] for k, v in batch.items()}


def prefetch_to_device(
    iterator: Iterable[HostBatch], mesh: Mesh, depth: int = 2
) -> Iterator[Batch]:
    """Device batches, `depth` of them on their way or on the devices, the one in use included.

    No thread is involved: transfers are asynchronous, so starting them early is enough.
    """
    if depth < 1:
        raise ValueError(f"prefetch depth is {depth}: it must be at least 1")
    iterator = iter(iterator)
    queue = collections.deque(to_device(b, mesh) for b in itertools.islice(iterator, depth))
    while queue:
        yield queue.popleft()
        queue.extend(to_device(b, mesh) for b in itertools.islice(iterator, 1))


def initialize_distributed(mode: str, timeout: int = 300, patience: int = 60) -> None:
    """Connect the processes of a run; call it before anything else touches jax.

    Args:
      mode: 'none' (one process), 'auto' (TPU pods, GKE and Slurm describe themselves; where nothing
        does, one process) or 'host:port,n,i' (address of process 0, number of processes, index).
      timeout: seconds to wait for the other processes. A process started alone on a pod would
        otherwise wait without a word.
      patience: seconds of silence after which another process counts as gone, see `peers`.

    Prints one line 'process i of n'. Raises ValueError for another mode and ConnectionError when the
    start fails; when the others stay away beyond the time-out jax ends the process itself.
    """
    options = _parse_mode(mode)
    if mode != "none" and not jax.distributed.is_initialized():
        who = f"process {options['process_id']} of {options['num_processes']}" if options else mode
        if options:
            print(f"distributed: {who}, waiting up to {timeout} s for the others", flush=True)
        try:
            jax.distributed.initialize(
                **options, initialization_timeout=timeout, heartbeat_timeout_seconds=patience,
                shutdown_timeout_seconds=_DAY,
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            if mode != "auto" or not any(alone in reason for alone in _ALONE):
                raise ConnectionError(
                    f"distributed start '{mode}' failed ({reason}): start all processes, "
                    "and check that the address of process 0 is reachable"
                ) from error
    print(
        f"process {jax.process_index()} of {jax.process_count()}: {jax.local_device_count()} of "
        f"{jax.device_count()} {jax.default_backend()} devices",
        flush=True,
    )
    if jax.process_count() > 1:
        peers.watch(patience)


def _parse_mode(mode: str) -> dict:
    """Arguments of jax.distributed.initialize; empty for 'none' and 'auto'."""
    if mode in ("none", "auto"):
        return {}
    parts = mode.split(",")
    if len(parts) == 3 and ":" in parts[0] and all(p.strip().isdigit() for p in parts[1:]):
        count, index = int(parts[1]), int(parts[2])
        if index < count:
            return dict(coordinator_address=parts[0], num_processes=count, process_id=index)
    raise ValueError(f"distributed mode '{mode}': use 'none', 'auto' or 'host:port,n,i' with i < n")
