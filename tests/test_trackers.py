"""Weights & Biases and MLflow: what a run leaves there, read back from the files of their offline modes."""

import importlib.util
import json
import logging
import math
import shutil
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from salcl_jax import trackers
from salcl_jax.writer import Writer

CONFIG = {"seed": 3, "optim": {"lr": 0.5, "betas": (0.9, 0.99)}}
PICTURE = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)


def installed(name):
    return all(importlib.util.find_spec(package) for package in trackers.PACKAGES[name])


NAMES = [
    pytest.param(name, marks=pytest.mark.skipif(not installed(name), reason=f"pip install -e .[{name}]"))
    for name in trackers.PACKAGES
]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Nothing is sent, and nothing of the user's settings is used."""
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """An MLflow database without runs: making its tables takes seconds."""
    file = tmp_path_factory.mktemp("tables") / "mlflow.db"
    if installed("mlflow"):
        from mlflow import MlflowClient

        MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


def with_tables(folder, tables):
    """The folder, with that database where a run looks for it."""
    (folder / "mlflow").mkdir()
    if tables.exists():
        shutil.copy(tables, folder / "mlflow")
    return folder


def open_writer(folder, names, resume_step=0, is_main=True):
    return Writer(str(folder), tensorboard=False, trackers=names, is_main=is_main, resume_step=resume_step)


def read(name, folder):
    """{run: {"scalars": {name: [(step, value)]}, "config", "summary", "images": their number, "ended"}}."""
    return {"wandb": read_wandb, "mlflow": read_mlflow}[name](folder)


def records(path):
    """Records of a .wandb file: seven bytes, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def wait_for_the_end(path):
    """All records of a run that is over: wandb's own process writes the last ones a moment later."""
    deadline = time.monotonic() + 30
    while True:
        found = list(records(path))
        if any(record.HasField("exit") for record in found):
            return found
        assert time.monotonic() < deadline, f"{path}: no end"
        time.sleep(0.1)


def read_wandb(folder):

    runs = {}
    for path in sorted(Path(folder).glob("wandb/offline-run-*/run-*.wandb")):
        whole = wait_for_the_end(path)
        empty = {"scalars": {}, "config": {}, "summary": {}, "images": 0, "ended": []}
        found = runs.setdefault(path.stem.removeprefix("run-"), empty)
        for record in whole:
            row = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            step = json.loads(row.pop("_step", "-1"))
            for key, value in row.items():
                if isinstance(number := json.loads(value), (int, float)) and not key.startswith("_"):
                    found["scalars"].setdefault(key, []).append((step, number))
            found["images"] += '"image-file"' in " ".join(row.values())
            for item in [*record.run.config.update, *record.config.update]:
                found["config"][item.key or item.nested_key[0]] = json.loads(item.value_json)
            for item in record.summary.update:
                found["summary"][item.key or item.nested_key[0]] = json.loads(item.value_json)
            if record.WhichOneof("record_type") == "exit":
                found["ended"].append(record.exit.exit_code)
    return runs


def read_mlflow(folder):
    from mlflow import MlflowClient

    client, runs = MlflowClient(f"sqlite:///{folder}/mlflow/mlflow.db"), {}
    experiment = client.get_experiment_by_name("salcl_jax")
    for run in client.search_runs([experiment.experiment_id]):
        id, data = run.info.run_id, run.data
        files = folder / "mlflow" / "artifacts" / id / "artifacts"
        scalars = {n: [(m.step, m.value) for m in client.get_metric_history(id, n)] for n in data.metrics}
        runs[id] = {
            "scalars": scalars,
            "config": json.loads((files / "config.json").read_text()),
            "params": data.params,
            "summary": json.loads((files / "summary.json").read_text())
            if (files / "summary.json").exists() else {},
            "images": len(list(files.glob("panels/*.png"))),
            "ended": run.info.status,
            "files": files,
        }  # fmt: skip
    return runs


@pytest.mark.parametrize("name", NAMES)
def test_a_run_and_its_continuation_are_one_run_at_the_tracker(name, tmp_path):
    with open_writer(tmp_path, [name]) as out:
        out.config(CONFIG)
        for step in (1, 2, 3):
            values = {"train/loss": step + 0.5, "train/bad": math.nan, "recall@0.5": np.float32(step)}
            out.scalars(step, values)
        out.image(3, "scenes", PICTURE)
    first = json.loads((tmp_path / "trackers.json").read_text())
    with open_writer(tmp_path, [name], resume_step=2) as out:  # the last checkpoint was that of step 2
        out.config({**CONFIG, "log": 5})
        for step in (3, 4):
            out.scalars(step, {"train/loss": step + 0.5})
        out.summary({"final": {"top1": 0.25}, "steps": 4})
    assert json.loads((tmp_path / "trackers.json").read_text()) == first and list(first) == [name]
    runs = read(name, tmp_path)
    assert list(runs) == list(first.values())
    (run,) = runs.values()
    loss = run["scalars"]["train/loss"]
    # Offline, W&B keeps one file a start; its server drops the step that it has already.
    assert sorted(set(loss)) == [(1, 1.5), (2, 2.5), (3, 3.5), (4, 4.5)]
    assert len(loss) == (5 if name == "wandb" else 4)
    assert run["scalars"]["recall@0.5" if name == "wandb" else "recall_0.5"] == [(1, 1), (2, 2), (3, 3)]
    assert "train/bad" not in run["scalars"]
    assert run["config"]["seed"] == 3 and run["config"]["optim"] == {"lr": 0.5, "betas": [0.9, 0.99]}
    assert run["config"]["log"] == 5 and run["images"] == 1
    assert run["summary"]["final"] == {"top1": 0.25} and run["summary"]["steps"] == 4
    assert run["ended"] == ([0, 0] if name == "wandb" else "FINISHED")


@pytest.mark.skipif(not installed("mlflow"), reason="pip install -e .[mlflow]")
def test_mlflow_has_parameters_to_compare_by_and_the_exact_picture(tmp_path, tables):
    image = pytest.importorskip("PIL.Image")
    many = {f"field{i}": "x" * 1000 for i in range(250)}
    with open_writer(with_tables(tmp_path, tables), ["mlflow"]) as out:
        out.config({**CONFIG, **many})
        out.image(3, "scenes", PICTURE)
    (run,) = read_mlflow(tmp_path).values()
    assert run["params"]["optim.lr"] == "0.5" and len(run["params"]) == 253
    np.testing.assert_array_equal(image.open(run["files"] / "panels" / "scenes_00000003.png"), PICTURE)


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_start_is_another_run_and_a_stopped_one_says_so(name, tmp_path, tables):
    with_tables(tmp_path, tables)
    with pytest.raises(RuntimeError, match="stopped"), open_writer(tmp_path, [name]) as out:
        out.config(CONFIG)
        raise RuntimeError("stopped")
    with open_writer(tmp_path, [name]) as out:
        out.config(CONFIG)
    ended = {id: run["ended"] for id, run in read(name, tmp_path).items()}
    (last,) = json.loads((tmp_path / "trackers.json").read_text()).values()
    assert len(ended) == 2 and ended.pop(last) in ([0], "FINISHED")
    assert list(ended.values()) in ([[1]], ["FAILED"])


class Broken:
    """A run at a tracker whose every call fails, and that counts them."""

    id, calls = "7", 0

    def __getattr__(self, name):
        def fail(*_):
            self.calls += 1
            raise ConnectionError(f"no route\nto {name}")

        return fail


def test_a_tracker_that_fails_is_one_warning_and_tried_again_later(tmp_path, monkeypatch, caplog):
    broken, now = Broken(), [1000.0]
    monkeypatch.setattr(trackers, "_open", lambda *_: broken)
    monkeypatch.setattr(trackers.time, "monotonic", lambda: now[0])
    with caplog.at_level(logging.WARNING), open_writer(tmp_path, ["wandb"]) as out:
        out.config(CONFIG)
        out.scalars(1, {"x": 1.0})
        out.image(1, "p", PICTURE)
        assert broken.calls == 1
        now[0] += trackers._PAUSE + 1
        out.scalars(2, {"x": 2.0})
        out.scalars(3, {"x": 3.0})
        assert broken.calls == 2
    assert broken.calls == 3  # closing is tried in any case
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == ["wandb: no route to config"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("name", trackers.PACKAGES)
def test_a_tracker_that_cannot_be_opened_is_one_warning(name, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, trackers.PACKAGES[name][0], None)
    monkeypatch.delitem(sys.modules, f"salcl_jax.{name}_run", raising=False)
    with caplog.at_level(logging.WARNING), open_writer(tmp_path, [name]) as out:
        out.scalars(1, {"x": 1.0})
        out.summary({"x": 1})
    assert len(caplog.records) == 1 and name in caplog.text
    assert json.loads((tmp_path / "summary.json").read_text()) == {"x": 1}


class Listening:
    """A run at a tracker that takes everything."""

    id = "7"

    def __init__(self):
        self.heard = []

    def __getattr__(self, name):
        return lambda *given: self.heard.append((name, given[0]))


def test_a_tracker_that_could_not_be_opened_is_tried_again_later(tmp_path, monkeypatch, caplog):
    now, run, answers = [1000.0], Listening(), [ConnectionError("no route"), None]

    def open_(*_):
        if (error := answers.pop(0)) is not None:
            raise error
        return run

    monkeypatch.setattr(trackers, "_open", open_)
    monkeypatch.setattr(trackers.time, "monotonic", lambda: now[0])
    with caplog.at_level(logging.WARNING), open_writer(tmp_path, ["wandb"]) as out:
        out.config(CONFIG)
        out.scalars(1, {"x": 1.0})
        assert len(answers) == 1 and run.heard == []
        now[0] += trackers._PAUSE + 1
        out.scalars(2, {"x": 2.0})
    assert [name for name, _ in run.heard] == ["config", "scalars", "close"]
    assert run.heard[0][1] == json.loads(json.dumps(CONFIG)) and run.heard[1][1] == 2
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": "7"} and len(caplog.records) == 1


def test_half_a_list_of_runs_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "_open", lambda name, workdir, old: Broken())
    (tmp_path / "trackers.json").write_text('{"wandb": "ab')
    open_writer(tmp_path, ["wandb"], resume_step=2).close()
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": "7"}


def test_a_run_opens_the_trackers_of_its_configuration(tmp_path, monkeypatch):
    from salcl_jax import config, train

    opened, c = [], config.base()
    monkeypatch.setattr(trackers, "_open", lambda name, *_: opened.append(name) or Broken())
    c.log.tensorboard, c.log.trackers = False, ("mlflow", "wandb")
    train._writer(c, str(tmp_path), True, 0, False).close()
    assert opened == ["mlflow", "wandb"]


def test_other_processes_open_none(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "_open", lambda *_: pytest.fail("opened"))
    with open_writer(tmp_path, ["wandb", "mlflow"], is_main=False) as out:
        out.scalars(1, {"x": 1.0})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", trackers.PACKAGES)
def test_a_missing_package_is_named_with_the_command(name, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=rf"trackers has {name}, but {name}.* pip install -e \.\[{name}\]$"):
        trackers.check([name])


def test_a_bucket_needs_a_server(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from salcl_jax.mlflow_run import MlflowRun

    with pytest.raises(ValueError, match="gs://bucket/run: set MLFLOW_TRACKING_URI"):
        MlflowRun("gs://bucket/run", None)
