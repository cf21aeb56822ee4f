"""The loop of a run: steps, and what happens between them at chosen steps."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from salcl_jax import config_record, memory, peers, sharding
from salcl_jax.compilations import Compilations
from salcl_jax.data.pipeline import train_batches
from salcl_jax.data.sources import Source
from salcl_jax.evaluators import HEADLINES, online
from salcl_jax.panels import make_panel
from salcl_jax.progress import Progress
from salcl_jax.train_step import make_init, make_train_step
from salcl_jax.types import HostBatch, TrainState

PREEMPTED = peers.AGAIN  # exit code: saved and left, start again to continue
FAILED = 70  # exit code: non-finite loss, or too many unreadable images


class Stopped(Exception):
    """The run ended early on purpose; `code` is the exit code, the message one line for the user."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def new_history() -> dict:
    """What the summary needs beside the state: figures of the evaluations, steps not yet logged, totals.

    owed: the step was saved before it was looked at and logged; the next start does that first.
    """
    totals = {"seconds": 0.0, "rate": 0.0, "seen": 0, "skipped": 0, "below": 0}
    return {"untrained": {}, "final": {}, "interval": [], "owed": False} | totals


class Run:
    """The loop's working set; one object a run."""

    def __init__(self, config, network, mesh, sources, saved, writer, skipped, history, start, told):
        self.config, self.mesh, self.sources, self.skipped = config, mesh, sources, skipped
        self.saved, self.writer, self.history, self.start = saved, writer, history, start
        self.told = told
        self.total = config.resolved.total_steps
        self.evaluations = online.make_evaluations(network, config, mesh, sources)
        self.panel = make_panel(network, config, mesh, sources)
        shapes = jax.eval_shape(make_init(network, config))
        places = sharding.state_sharding(shapes, mesh, **config.sharding)
        self.step = sharding.jit_step(make_train_step(network, config), places, mesh)
        self.progress = Progress(
            self.total, start=start, images_per_step=config.batch_size, log_every=config.log.every,
            is_main=jax.process_index() == 0,
        )  # fmt: skip
        self.clock = time.monotonic()
        self.pending: tuple | None = None  # step, measured, waited: not yet recorded
        self.compilations = Compilations()
        self.alarm = Alarm(config.collapse.threshold, config.collapse.patience, history["below"])

    def loop(self, state: TrainState) -> dict:
        """Train to the last step; returns the summary."""
        batches = host_batches(self.config, self.sources["train"], self.start)
        batches = sharding.prefetch_to_device(batches, self.mesh)
        with self.compilations, self.progress:
            if self.told():
                self._leave(self.start, state)
            if self.start == 0:
                self.history["untrained"] = self._evaluate(0, state)
                self._draw(0, state)
            elif self.history["owed"]:
                self._at(self.start, state)
            for step in range(self.start + 1, self.total + 1):
                with self._reading(step - 1, state):
                    batch, waited = _next(batches)
                state, measured = self.step(state, batch)
                self._settle(state)  # read one step late: the device is never waited for
                self.pending = (step, measured, waited)
                if self._due(step):
                    self._settle(state)
                    self._at(step, state)
                if self.told() or self.saved.reached_preemption(step):
                    self._leave(step, state)
        self.saved.wait()
        return self._summary()

    def _due(self, step: int) -> bool:
        r = self.config.resolved
        every = (self.config.log.every, r.checkpoint_every, r.eval_every, r.panels_every)
        return step in (1, self.total) or any(step % n == 0 for n in every)

    def _at(self, step: int, state: TrainState) -> None:
        """Everything that happens at chosen steps: evaluation, pictures, lines of metrics, checkpoint.

        A run that ends while it looks is saved as if it had not begun to: its next start does all of this.
        """
        r, last = self.config.resolved, step == self.total
        logs = step % self.config.log.every == 0 or last
        if step % r.eval_every == 0 or last:
            self.history["final"] = self._evaluate(step, state)
        if step % r.panels_every == 0 or last:
            self._draw(step, state)
        if logs:
            self._log(step)
        self._save(step, state, force=step == 1 or last)  # a save that fails shall fail at once
        if last or step % r.eval_every == 0 or step % r.checkpoint_every == 0:
            memory.give_back()
        if logs:
            self._check_skipped(step, state)

    @contextlib.contextmanager
    def _reading(self, step: int, state: TrainState, owed: bool = False) -> Iterator[None]:
        """Inside, photos are read: where that fails, the run stops with a line, and `step` is saved.

        Of several processes one alone cannot save: there the last checkpoint is where it continues.
        """
        try:
            yield
        except (ValueError, OSError) as error:
            self._settle(state)
            if step and jax.process_count() == 1:
                self._save(step, state, force=True, owed=owed)
            reason = " ".join(str(error).split())
            raise Stopped(f"{reason}: mend that and start the same command again", FAILED) from error

    @contextlib.contextmanager
    def _looking(self, step: int, state: TrainState) -> Iterator[None]:
        """Inside, the network is looked at, for minutes perhaps: a run told to terminate does not begin."""
        if self.told():
            self._leave(step, state, owed=True)
        with self._reading(step, state, owed=True), self.progress.paused():
            yield

    def _leave(self, step: int, state: TrainState, owed: bool = False) -> None:
        """End the run, which was told to terminate, with this step saved."""
        self._settle(state)
        if step:
            self._save(step, state, force=True, owed=owed)
        done = f"saved step {step}" if step else "there is no step to save yet"
        raise Stopped(f"told to terminate: {done}; start again to continue", PREEMPTED)

    def _settle(self, state: TrainState) -> None:
        """Record the step whose figures were not waited for."""
        if self.pending:
            pending, self.pending = self.pending, None
            self._record(*pending, state)

    def _record(self, step: int, measured: dict, waited: float, state: TrainState) -> None:
        """Take in one step's figures; stops the run when they are not finite."""
        figures = {name: float(value) for name, value in jax.device_get(measured).items()}
        if not figures["finite"]:
            self.progress.message(f"step {step}: loss {figures['loss']}, gradient {figures['grad_norm']}")
            good = state._replace(failed=jax.numpy.zeros_like(state.failed))
            self._save(step - 1, good, force=True)
            raise Stopped(
                f"loss or gradient not finite at step {step}: step {step - 1} is saved; go on in a new "
                "--workdir with --config.init_from=THIS_WORKDIR and a lower config.optim.lr", FAILED,
            )  # fmt: skip
        if self.alarm.update(figures["spread"]):
            self.progress.message(
                f"step {step}: COLLAPSE ALARM: projections of different images are nearly alike (spread "
                f"{figures['spread']:.3f} < {self.alarm.threshold} for {self.alarm.patience} steps)"
            )
        self.history["below"] = self.alarm.below
        self.history["interval"].append(figures | {"data_wait": waited})
        self.progress.update(step, figures["loss"])

    def _log(self, step: int) -> None:
        rows, self.history["interval"] = self.history["interval"], []
        means = {f"train/{name}": float(np.mean([row[name] for row in rows])) for name in rows[0]}
        skipped, seen = sum(row["skipped"] for row in rows), len(rows) * self.config.batch_size
        means.pop("train/finite")
        means["train/skipped"] = skipped
        self.history["rate"] = self.progress.images_per_second or self.history["rate"]
        means["train/images_per_second"] = self.history["rate"]
        means["train/compiled"] = self.compilations.take()  # programs since the last line; 0 once warm
        means["alarm/collapse"] = float(self.alarm.raised)
        self.writer.scalars(step, means)
        self.history["skipped"] += skipped
        self.history["seen"] += seen

    def _check_skipped(self, step: int, state: TrainState) -> None:
        """Stop the run, saved, where more photos could not be read than are allowed."""
        share = self.history["skipped"] / (self.history["skipped"] + self.history["seen"])
        if share > self.config.data.max_skipped:
            self._save(step, state, force=True)
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.skipped.reasons().items())
            raise Stopped(
                f"{self.history['skipped']:.0f} images could not be read, {100 * share:.1f} % of all so far "
                f"(listed in {self.skipped.path}: {reasons}): mend {self.sources['train'].name} or raise "
                f"config.data.max_skipped (now {self.config.data.max_skipped})", FAILED,
            )  # fmt: skip

    def _evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        figures, networks = {}, self._networks(state)
        for evaluate in self.evaluations:
            with self._looking(step, state):
                figures |= evaluate(networks)
        self.writer.scalars(step, {f"eval/{name}": value for name, value in figures.items()})
        shown = [f"{name} {figures[name]:.3f}" for name in HEADLINES if name in figures]
        self.progress.message(f"step {step}: " + "  ".join(shown))
        return figures

    def _draw(self, step: int, state: TrainState) -> None:
        with self._looking(step, state):
            picture = self.panel(self._networks(state))
        self.writer.image(step, "scenes", picture)

    def _networks(self, state: TrainState) -> TrainState:
        """The state without its optimizer, whole on every device, for functions that only look."""
        return sharding.whole(state._replace(opt_state=()), self.mesh)

    def _save(self, step: int, state: TrainState, force: bool, owed: bool = False) -> None:
        now = time.monotonic()
        self.history["seconds"] += now - self.clock
        self.clock = now
        extra = {"fields": config_record.learnt_fields(self.config), "history": self.history | {"owed": owed}}
        self.skipped.write()  # before the step is saved: what it passed over is not met again
        self.saved.save(step, state, extra, force=force)
        if force:  # whoever forces tells the user next that it is saved
            self.saved.wait()

    def _summary(self) -> dict:
        return {
            "steps": self.total,
            "images": self.total * self.config.batch_size,
            "images_per_second": self.history["rate"],
            "seconds": self.history["seconds"],
            "devices": f"{self.mesh.size} x {jax.devices()[0].device_kind}",
            "skipped": self.history["skipped"],
            "skipped_photos": self.skipped.reasons(),
            "collapse_alarm": self.alarm.raised,
            "final": self.history["final"],
            "untrained": self.history["untrained"],
        }


def host_batches(config: Any, source: Source, start: int = 0) -> Iterator[HostBatch]:
    """This process's share of the batches from step `start` on, without what the step does not read."""
    c = config.data
    with_boxes = config.roi.source == "ground_truth"
    keep = ("image", "aspect", "skipped") + (("boxes",) if with_boxes else ())
    found = train_batches(
        source, batch_size=config.batch_size, canvas=c.canvas, seed=config.seed,
        process_index=jax.process_index(), process_count=jax.process_count(),
        start_step=start, window_area=c.window_area, max_boxes=c.max_boxes,
        with_boxes=with_boxes, min_side=c.min_side, max_pixels=c.max_pixels, workers=c.workers,
        prefetch=c.prefetch, cache=c.cache, cache_gb=c.cache_gb,
    )  # fmt: skip
    return ({name: batch[name] for name in keep} for batch in found)


def _next(batches: Iterator) -> tuple[dict, float]:
    """The next batch and the seconds it was waited for."""
    began = time.monotonic()
    return next(batches), time.monotonic() - began


class Alarm:
    """Raised once `patience` values in a row lie below `threshold`; stays raised until one does not."""

    def __init__(self, threshold: float, patience: int, below: int = 0):
        self.threshold, self.patience = threshold, patience
        self.below, self.raised = below, below >= patience

    def update(self, value: float) -> bool:
        """Take in a value; True only at the moment the alarm is raised."""
        self.below = self.below + 1 if value < self.threshold else 0
        before, self.raised = self.raised, self.below >= self.patience
        return self.raised and not before
