"""A run at MLflow: the only importer of mlflow. MLFLOW_TRACKING_URI says where, else the workdir."""

import os
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

# A server that does not answer is given up soon, and nothing but the run is sent.
_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_LOGGING_LEVEL": "WARNING",
}  # fmt: skip
_AT_A_TIME = 100  # parameters that a call takes
_LONGEST = 500  # characters of a parameter that every server takes


class MlflowRun:
    """A new run, or the run `old` continued, in the database WORKDIR/mlflow/mlflow.db or at the server."""

    def __init__(self, workdir: str, old: str | None):
        for name, value in _DEFAULTS.items():
            os.environ.setdefault(name, value)
        import mlflow

        uri, files = os.environ.get("MLFLOW_TRACKING_URI"), None
        if not uri:
            if "://" in workdir:
                raise ValueError(f"no database can lie in {workdir}: set MLFLOW_TRACKING_URI")
            folder = os.path.join(os.path.abspath(workdir), "mlflow")
            os.makedirs(folder, exist_ok=True)
            uri, files = f"sqlite:///{folder}/mlflow.db", os.path.join(folder, "artifacts")
        self._mlflow, self._client, self._new = mlflow, mlflow.MlflowClient(uri), old is None
        self.id = old or self._begin(os.path.basename(workdir.rstrip("/")), files)
        self._last = self._last_steps() if old else {}
        self._client.update_run(self.id, status="RUNNING")

    def _begin(self, name: str, files: str | None) -> str:
        group = os.environ.get("MLFLOW_EXPERIMENT_NAME", "salcl_jax")
        found = self._client.get_experiment_by_name(group)
        experiment = found.experiment_id if found else self._client.create_experiment(group, files)
        return self._client.create_run(experiment, run_name=name).info.run_id

    def _last_steps(self) -> dict[str, int]:
        names = self._client.get_run(self.id).data.metrics
        return {name: max(m.step for m in self._client.get_metric_history(self.id, name)) for name in names}

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of a step.

        A continued run repeats the steps after its last checkpoint, with the same figures; MLflow would keep
        both.
        """
        now, allowed = int(1000 * time.time()), {_allowed(name): value for name, value in values.items()}
        new = {name: value for name, value in allowed.items() if step > self._last.get(name, -1)}
        metrics = [self._mlflow.entities.Metric(name, value, now, step) for name, value in new.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def image(self, step: int, name: str, array: np.ndarray) -> None:
        """An image, uint8 [h, w, 3], as an artifact named as in the workdir's panels/."""
        file = f"panels/{name.replace('/', '_')}_{step:08d}.png"
        self._client.log_image(self.id, array, artifact_file=file)

    def config(self, values: Mapping[str, Any]) -> None:
        """The configuration as parameters, which never change there, and as config.json, which may."""
        self._client.log_dict(self.id, dict(values), "config.json")
        make, flat = self._mlflow.entities.Param, list(_flat(values)) if self._new else []
        params = [make(_allowed(name), str(value)[:_LONGEST]) for name, value in flat]
        for i in range(0, len(params), _AT_A_TIME):
            self._client.log_batch(self.id, params=params[i : i + _AT_A_TIME])

    def summary(self, values: Mapping[str, Any]) -> None:
        """The summary as summary.json."""
        self._client.log_dict(self.id, dict(values), "summary.json")

    def close(self, failed: bool) -> None:
        """End the run."""
        self._client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


def _allowed(name: str) -> str:
    """A name in the characters that MLflow takes: recall@0.5 becomes recall_0.5."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
