"""Trackers beside metrics.jsonl, as optional extras: which run there, and that none of them ends ours."""

import contextlib
import importlib.util
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

PACKAGES = {"wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}
_IDS = "trackers.json"  # in the workdir: name -> run there
_PAUSE = 600.0  # seconds without another try after one that failed: a dead server may cost little time only
_log = logging.getLogger(__name__)


def check(names: Sequence[str]) -> None:
    """Raise ValueError with the command that installs what these trackers lack."""
    for name in names:
        missing = [package for package in PACKAGES[name] if importlib.util.find_spec(package) is None]
        if missing:
            raise ValueError(
                f"config.log.trackers has {name}, but {', '.join(missing)} is not installed: "
                f"pip install -e .[{name}]"
            )


class Tracker:
    """A run at the tracker `name`: a new one, or where resume_step > 0 that of the workdir's `trackers.json`.

    What goes wrong there is told once and tried again after ten minutes; it never reaches the training.
    """

    def __init__(self, name: str, workdir: str, resume_step: int):
        self._name, self._workdir, self._resumed = name, workdir, resume_step > 0
        self._told, self._next = False, 0.0
        self._run: Any = None
        self._config: Mapping[str, Any] = {}
        with self._guarded():
            self._begin()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of a step; those that are not finite are left out."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._do(lambda run: run.scalars(step, finite))

    def image(self, step: int, name: str, array: np.ndarray) -> None:
        """An image, uint8 [h, w, 3]."""
        self._do(lambda run: run.image(step, name, array))

    def config(self, values: Mapping[str, Any]) -> None:
        """The configuration, in JSON's types."""
        self._config = values
        self._do(lambda run: run.config(values))

    def summary(self, values: Mapping[str, Any]) -> None:
        """The summary, in JSON's types."""
        self._do(lambda run: run.summary(values))

    def close(self, failed: bool = False) -> None:
        """Hand over what is left and end the run there; `failed`: ours did not reach its end."""
        if self._run is not None:
            self._next = 0.0
            self._do(lambda run: run.close(failed))

    def _begin(self) -> None:
        file = epath.Path(self._workdir) / _IDS
        ids = _read(file)
        old = ids.get(self._name) if self._resumed else None
        run = _open(self._name, self._workdir, old)
        if run.id != old:
            file.write_text(json.dumps(ids | {self._name: run.id}) + "\n")
        self._run = run

    def _do(self, action: Callable[[Any], None]) -> None:
        if time.monotonic() >= self._next:
            with self._guarded():
                if self._run is None:  # could not be opened so far
                    self._begin()
                    self._run.config(self._config)
                action(self._run)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # these packages raise anything
            self._next = time.monotonic() + _PAUSE
            if not self._told:
                text = " ".join(str(error).split()) or type(error).__name__
                _log.warning("%s: %s (the run goes on; metrics.jsonl has all)", self._name, text[:300])
            self._told = True


def _read(file: epath.Path) -> dict[str, str]:
    with contextlib.suppress(ValueError):  # a kill may have left half of it
        return json.loads(file.read_text()) if file.exists() else {}
    return {}


def _open(name: str, workdir: str, old: str | None) -> Any:
    if name == "wandb":
        from salcl_jax.wandb_run import WandbRun

        return WandbRun(workdir, old)
    from salcl_jax.mlflow_run import MlflowRun

    return MlflowRun(workdir, old)
