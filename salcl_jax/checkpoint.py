"""Saving and restoring runs: the only importer of orbax.

Every checkpoint carries, beside the state, a record of each leaf (dtype, shape and a checksum of
its bits) protected by its own CRC. Orbax verifies neither the bytes of large arrays nor dtypes: a
flipped bit on disk or another dtype would otherwise be restored without a word.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from salcl_jax import checkpoint_messages as messages
from salcl_jax import checkpoint_record as record
from salcl_jax import peers
from salcl_jax.checkpoint_record import Mismatch
from salcl_jax.types import PyTree, TrainState

MODEL_FIELDS = ("params", "target_params", "batch_stats", "target_batch_stats")


class NotWritten(OSError):
    """A checkpoint could not be written; those before it are as they were."""


class Checkpointer:
    """Checkpoints of one run, in `directory`/STEP. Every process makes the same calls.

    Kept are the newest `keep` and every step divisible by `keep_every` (0: none beyond the newest).
    `every_steps` 0 saves only when forced. Use as a context manager: leaving it waits for the
    write under way. What a killed run had half written is removed, but in buckets: there nothing
    keeps a second run away, whose write may be under way.
    """

    def __init__(
        self,
        directory: str,
        *,
        every_steps: int,
        keep: int,
        keep_every: int = 0,
        asynchronous: bool = True,
    ):
        messages.quieten()
        if keep < 1:
            raise ValueError(f"keep is {keep} checkpoints: it must be at least 1")
        decide = [policies.PreemptionCheckpointingPolicy()]
        decide += [policies.FixedIntervalPolicy(every_steps)] if every_steps else []
        preserve = [policies.LatestN(keep)]
        preserve += [policies.EveryNSteps(keep_every)] if keep_every else []
        options = ocp.CheckpointManagerOptions(
            save_decision_policy=policies.AnySavePolicy(decide),
            preservation_policy=policies.AnyPreservationPolicy(preserve),
            enable_async_checkpointing=asynchronous,
        )
        self.directory = _absolute(directory)
        _remove_unfinished(self.directory)
        handlers = {"state": ocp.StandardCheckpointHandler(), "extra": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_handlers=handlers
        )
        self._damaged: list[int] = []

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        with contextlib.suppress(*[NotWritten] * (kind is not None)):  # what went wrong first is told
            self.close()

    def latest(self) -> int | None:
        """Newest complete step on disk or being written, None when there is none."""
        return max(self._usable_steps(), default=None)

    def should_save(self, step: int) -> bool:
        """Whether `save` would write this step: due by interval, or the machine is about to go."""
        self._set_aside()
        return self._manager.should_save(step)

    def reached_preemption(self, step: int) -> bool:
        """True, at the same step on all processes, once one of them was told to terminate."""
        return self._manager.reached_preemption(step)

    def save(self, step: int, state: TrainState, extra: dict, force: bool = False) -> bool:
        """Write the state and `extra` (small, JSON) when due or forced; True when written.

        The device buffers are copied before it returns: the caller may donate them afterwards.
        A step that is already there is not written again. Raises NotWritten, also for the write before.
        """
        with self._writing():
            self._set_aside()
        if step in self._manager.all_steps() or not (force or self._manager.should_save(step)):
            return False
        sealed = record.seal({"extra": extra, "leaves": record.describe(state)})
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(sealed)
        )
        with self._writing():
            return bool(self._manager.save(step, args=args, force=True))

    def restore(self, abstract_state: TrainState) -> tuple[TrainState, dict, int] | None:
        """(state, extra, step) of the newest readable checkpoint; None when there is none at all.

        Args:
          abstract_state: ShapeDtypeStructs with the shardings of the current mesh, see
            `abstract_like`; the checkpoint may come from another number of devices.

        A damaged checkpoint is passed over with a warning and stays on disk: the next save renames
        it to damaged-STEP. Raises Mismatch (a ValueError) naming the first leaf that differs, and
        ValueError when checkpoints exist but none can be read.
        """
        self.wait()
        failures: list[tuple[int, str]] = []
        for step in self._usable_steps():
            found, reason = self._try_read(step, abstract_state)
            if found is None:
                failures.append((step, reason))
                continue
            self._damaged = [s for s, _ in failures]
            messages.warn_passed_over(self.directory, failures, step)
            return *found, step
        messages.raise_if_unreadable(self.directory, failures)
        return None

    def wait(self) -> None:
        """Block until the write under way is complete; raises NotWritten if it fails."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish the write under way and release the directory; raises NotWritten."""
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Inside, any error but another process's end is NotWritten: orbax raises many kinds."""
        try:
            yield
        except Exception as error:
            peers.end_if_gone(error)
            raise NotWritten(
                f"{self.directory}: a checkpoint could not be written ({messages.one_line(error)})"
            ) from error

    def _usable_steps(self) -> list[int]:
        """Steps newest first, without those found damaged."""
        return sorted(set(self._manager.all_steps()) - set(self._damaged), reverse=True)

    def _try_read(self, step: int, abstract_state: TrainState):
        """((state, extra), '') or (None, reason); all processes come to the same answer."""
        found, reason = None, ""
        with messages.quiet_failures():
            try:
                found = self._read(step, abstract_state)
            except Mismatch:
                raise
            except Exception as error:  # orbax and tensorstore raise many kinds for damaged files
                reason = messages.one_line(error)
        if jax.process_count() > 1:
            everywhere = multihost_utils.process_allgather(np.asarray(found is not None))
            if found is not None and not everywhere.all():
                found, reason = None, "another process could not read it"
        return found, reason

    def _read(self, step: int, abstract_state: TrainState) -> tuple[TrainState, dict]:
        found = self._manager.restore(step, args=ocp.args.Composite(extra=ocp.args.JsonRestore()))
        leaves, extra = record.unseal(found["extra"])
        record.check_structure(self.directory / str(step), leaves, abstract_state)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        state = self._manager.restore(step, args=args)["state"]
        record.check_sums(leaves, state)
        return state, extra

    def _set_aside(self) -> None:
        """Rename the checkpoints found damaged, so that their steps can be written again."""
        if not self._damaged:
            return
        if jax.process_index() == 0:
            for step in self._damaged:
                target, n = self.directory / f"damaged-{step}", 1
                while target.exists():
                    target, n = self.directory / f"damaged-{step}.{n}", n + 1
                (self.directory / str(step)).rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints set aside")
        self._damaged = []
        self._manager.reload()


def abstract_like(state: PyTree, sharding: PyTree) -> PyTree:
    """ShapeDtypeStructs of a state's leaves, the target of a restore; `sharding` is one, or one for each."""
    if isinstance(sharding, jax.sharding.Sharding):
        sharding = jax.tree.map(lambda _, one=sharding: one, state)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, sharding)


def load_params(path: str, abstract_state: TrainState | None = None) -> dict:
    """Networks of another run as numpy trees, without its optimizer state.

    Args:
      path: a workdir, its checkpoints folder, or one STEP folder in it.
      abstract_state: when given, the networks must have these shapes and dtypes.

    Returns a dict with params, target_params, batch_stats and target_batch_stats. Of several steps
    the newest readable one is taken, with a warning when newer ones are damaged. Raises
    FileNotFoundError when there is no checkpoint, Mismatch and ValueError as in
    `Checkpointer.restore`.
    """
    return load_networks(path, abstract_state)[0]


def load_networks(path: str, abstract_state: TrainState | None = None) -> tuple[dict, int]:
    """As `load_params`, with the step that was read."""
    return _newest(path, lambda step_dir: _read_networks(step_dir, abstract_state))


def load_extra(path: str) -> dict:
    """What was saved beside the state of another run, from its newest readable checkpoint."""
    return _newest(path, lambda step_dir: _read_record(step_dir)[1])[0]


def _newest(path: str, read: Callable[[epath.Path], Any]) -> tuple[Any, int]:
    """(what `read` gives, step) of the newest readable checkpoint."""
    messages.quieten()
    root = _absolute(path)
    failures: list[tuple[int, str]] = []
    for step_dir in _step_dirs(root):
        with messages.quiet_failures():
            try:
                found = read(step_dir)
            except Mismatch:
                raise
            except Exception as error:  # as in Checkpointer._try_read
                failures.append((int(step_dir.name), messages.one_line(error)))
                continue
        messages.warn_passed_over(step_dir.parent, failures, int(step_dir.name))
        return found, int(step_dir.name)
    messages.raise_if_unreadable(root, failures)
    raise FileNotFoundError(f"no checkpoint in {root}: give a workdir or its checkpoints folder")


def _read_record(step_dir: epath.Path) -> tuple[dict, dict]:
    return record.unseal(json.loads((step_dir / "extra" / "metadata").read_text()))


def _read_networks(step_dir: epath.Path, abstract_state: TrainState | None) -> dict:
    leaves, _ = _read_record(step_dir)
    leaves = {k: v for k, v in leaves.items() if k.split(".")[0] in MODEL_FIELDS}
    if abstract_state is not None:
        others = {f: None for f in abstract_state._fields if f not in MODEL_FIELDS}
        record.check_structure(step_dir, leaves, abstract_state._replace(**others))
    reader = ocp.PyTreeCheckpointHandler()
    tree = reader.metadata(step_dir / "state").tree
    wanted = {f: jax.tree.map(lambda _: 0, tree[f]) for f in MODEL_FIELDS}
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    args = ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True)
    trees = reader.restore(step_dir / "state", args=args)
    record.check_sums(leaves, trees)
    return trees


def _step_dirs(root: epath.Path) -> list[epath.Path]:
    """STEP folders newest first; `root` itself when it is one."""
    if root.name.isdecimal() and (root / "state").exists():
        return [root]
    root = root / "checkpoints" if (root / "checkpoints").exists() else root
    if not root.exists():
        return []
    steps = [p for p in root.iterdir() if p.name.isdecimal()]
    return sorted(steps, key=lambda p: int(p.name), reverse=True)


def _remove_unfinished(root: epath.Path) -> None:
    """Remove what orbax had not finished; where that cannot be it stays, as it does no harm."""
    if jax.process_index() == 0 and "://" not in str(root):
        for path in root.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)


def _absolute(path: str) -> epath.Path:
    path = epath.Path(path)
    return path if "://" in str(path) else path.expanduser().resolve()
