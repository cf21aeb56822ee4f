"""A run at Weights & Biases: the only importer of wandb. Its own variables (WANDB_MODE, ...) say where."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np


class WandbRun:
    """A new run, or the run `old` continued. Files go into the workdir's `wandb/`, off a bucket into ./wandb.

    A step that the service already has is not taken again: a continued run repeats those after its last
    checkpoint, with the same figures.
    """

    def __init__(self, workdir: str, old: str | None):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # send the run, nothing else
        import wandb

        settings = wandb.Settings(
            console="off", quiet=True, reinit="create_new", login_timeout=60, finish_timeout=60
        )
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "salcl_jax"), id=old, resume="allow", settings=settings,
            name=os.environ.get("WANDB_NAME", os.path.basename(workdir.rstrip("/"))),
            dir=None if "://" in workdir else workdir,
        )  # fmt: skip
        self.id = self._run.id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of a step."""
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, array: np.ndarray) -> None:
        """An image, uint8 [h, w, 3]."""
        self._run.log({name: self._wandb.Image(array)}, step=step)

    def config(self, values: Mapping[str, Any]) -> None:
        """The configuration; a continued run may have changed fields that do not decide what is learnt."""
        self._run.config.update(dict(values), allow_val_change=True)

    def summary(self, values: Mapping[str, Any]) -> None:
        """The summary beside the last figures."""
        self._run.summary.update(dict(values))

    def close(self, failed: bool) -> None:
        """Send what is left: for a minute at most, as a run that was told to end has little time."""
        self._run.finish(exit_code=int(failed))
