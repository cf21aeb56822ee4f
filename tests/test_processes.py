"""Several processes as users start them: the same figures as one, and ends that are told and bounded."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from runs import SMALL, finish, home, metrics, newest, record, summary, wait_for_step

from salcl_jax import peers

slow = pytest.mark.slow
pytestmark = pytest.mark.xdist_group("processes")  # one test at a time: they fill the cores
ROOT = Path(__file__).parents[1]
DEVICES = 4  # of a run, over all its processes
PATIENCE = 15  # seconds
TINY = SMALL | {
    "batch_size": 8, "eval.batch_size": 8, "eval.linear": False, "log.every": 1, "checkpoint.keep": 9,
    "distributed_timeout": PATIENCE, "loss.name": "byol", "optim.lr": 0.0005,
}  # fmt: skip
SHORT = {"total_steps": 6, "checkpoint.every": 0.5}  # few enough that another order of sums changes little
NO_EVALUATION = {f"eval.{name}.kind": "none" for name in ("localization", "probe_train", "probe_test")}
# Long enough to be interrupted, and with a state in parts.
LONG = {"total_steps": 48, "checkpoint.every": 0.25, "sharding.params": "fsdp", "sharding.min_size": 2000,
        **NO_EVALUATION}  # fmt: skip


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return home(tmp_path_factory, "processes")


def start(shared, count, workdir, fields, program="main", every=(), only=()):
    """Processes of one run with DEVICES devices together; `only` are options of the last one alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES // count), "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(shared / "blocked")]),
        "JAX_COMPILATION_CACHE_DIR": str(shared / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }  # fmt: skip
    place = f"--workdir={workdir}" if program == "main" else f"--checkpoint={workdir}"
    command = [sys.executable, "-m", f"salcl_jax.{program}", "--config=configs/scenes.py:smoke", place]
    command += [f"--config.{name}={value}" for name, value in (TINY | fields).items()]
    modes = [f"127.0.0.1:{port},{count},{i}" if count > 1 else "none" for i in range(count)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    commands = [[*command, f"--config.distributed={mode}", *every] for mode in modes]
    commands[-1] += only
    return [subprocess.Popen(command, cwd=ROOT, env=env, **pipes) for command in commands]


def finish_all(processes, codes=0):
    """(stdout, stderr) of every process; exit codes one for all or one for each."""
    codes = [codes] * len(processes) if isinstance(codes, int) else codes
    try:
        return [finish(process, code) for process, code in zip(processes, codes, strict=True)]
    finally:
        for process in processes:
            process.kill()


def run(shared, count, workdir, fields):
    return finish_all(start(shared, count, workdir, fields))


@pytest.fixture(scope="module")
def runs(shared):
    """Folder of the short run by one process and by two, and of the long run by two; none interrupted."""
    made = {}

    def get(name):
        if name not in made:
            count, fields = {"one": (1, SHORT), "two": (2, SHORT), "long": (2, LONG)}[name]
            made[name] = shared / name, run(shared, count, shared / name, fields)
        return made[name]

    return get


def check_losses(workdir, expected, rtol):
    lines, wanted = metrics(workdir), metrics(expected)
    assert list(lines) == list(wanted) == list(range(1, len(lines) + 1))
    for name in ("train/loss", "train/spread", "train/window_area"):
        figures = ([line[name] for line in run.values()] for run in (lines, wanted))
        np.testing.assert_allclose(*figures, rtol=rtol, err_msg=name)


def check_figures(found, expected, rtol):
    """Figures of an evaluation; shares may differ by a photo of 32."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        share = any(part in name for part in ("top1", "corloc", "pointing"))
        assert value == pytest.approx(expected[name], rel=rtol, abs=1 / 32 + 1e-6 if share else 1e-6), name


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=slow)])
def test_several_processes_learn_what_one_learns(shared, runs, tmp_path, count):
    workdir, outputs = runs("two") if count == 2 else (tmp_path, run(shared, count, tmp_path, SHORT))
    straight, _ = runs("one")
    for i, (out, _) in enumerate(outputs):
        assert f"process {i} of {count}: {DEVICES // count} of {DEVICES} cpu devices" in out
        assert ("all figures:" in out) == (i == 0)
    check_losses(workdir, straight, rtol=1e-4)
    found, expected = summary(workdir), summary(straight)
    assert {"pretext/loss", "knn/top1", "localization/corloc"} <= found["final"].keys()
    check_figures(found["untrained"], expected["untrained"], rtol=1e-5)
    check_figures(found["final"], expected["final"], rtol=1e-3)


@pytest.mark.parametrize("before, after", [("two", 1), pytest.param("one", 2, marks=slow)])
def test_another_number_of_processes_continues(shared, runs, tmp_path, before, after):
    straight, _ = runs(before)
    shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    outputs = run(shared, after, tmp_path / "run", SHORT | NO_EVALUATION)
    assert "step 4/6" in outputs[0][1] and "step 3/6" not in outputs[0][1]
    check_losses(tmp_path / "run", straight, rtol=1e-4)


def check_continues(shared, workdir, straight):
    """Two processes continue to the very bits of the run that nothing interrupted."""
    run(shared, 2, workdir, LONG)
    check_losses(workdir, straight, rtol=0)
    assert record(workdir, 48) == record(straight, 48)


@pytest.mark.fault
@pytest.mark.parametrize("goes_on", [False, pytest.param(True, marks=slow)])
def test_sigterm_to_one_of_two_saves_in_both(shared, runs, tmp_path, goes_on):
    processes = start(shared, 2, tmp_path, LONG)
    wait_for_step(processes[0], tmp_path, 3)
    processes[1].send_signal(signal.SIGTERM)
    lines = [err.strip().splitlines()[-1] for _, err in finish_all(processes, 75)]
    saved = newest(tmp_path)
    assert 3 <= saved < 48
    assert set(lines) == {f"stopped: told to terminate: saved step {saved}; start again to continue"}
    if goes_on:
        check_continues(shared, tmp_path, runs("long")[0])


@pytest.mark.fault
@pytest.mark.parametrize("victim, how, goes_on", [
    (1, signal.SIGKILL, False), pytest.param(1, signal.SIGKILL, True, marks=slow),
    pytest.param(0, signal.SIGKILL, True, marks=slow), pytest.param(1, signal.SIGSTOP, True, marks=slow),
])  # fmt: skip
def test_one_of_two_is_gone_and_the_other_stops(shared, runs, tmp_path, victim, how, goes_on):
    processes = start(shared, 2, tmp_path, LONG)
    wait_for_step(processes[0], tmp_path, 14)
    processes[victim].send_signal(how)
    began = time.monotonic()
    _, err = finish(processes[1 - victim], 75)
    assert time.monotonic() - began < PATIENCE + 15
    processes[victim].kill()
    finish(processes[victim], -signal.SIGKILL)
    line = err.strip().splitlines()[-1]
    assert line.startswith("stopped: another process of this run is gone")
    assert "same command again" in line and "last checkpoint" in line
    assert 1 <= newest(tmp_path) < 48
    if goes_on:
        check_continues(shared, tmp_path, runs("long")[0])


@pytest.mark.parametrize("error, ends", [
    (RuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]"), True),
    (RuntimeError("DEADLINE_EXCEEDED: Barrier timed out"), True),
    (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17 bytes"), False),
    (ValueError("gs://bucket: connection refused"), False),
])  # fmt: skip
def test_only_errors_of_lost_processes_count_as_such(monkeypatch, capsys, error, ends):
    ended = []
    monkeypatch.setattr(peers.os, "_exit", ended.append)
    peers.end_if_gone(error)
    assert not ended  # a single process has nobody to lose
    monkeypatch.setattr(peers, "_patience", [1.0])
    peers.end_if_gone(error)
    assert ended == [75] * ends and ("stopped: another process" in capsys.readouterr().err) == ends


@slow
def test_an_error_in_one_process_ends_both(shared, tmp_path):
    """Each with its own reason, the one in error with its own code."""
    began = time.monotonic()
    wrong = ["--config.eval.probe_test.kind=folder", "--config.eval.probe_test.roots=('/nowhere',)"]
    (_, other), (_, own) = finish_all(start(shared, 2, tmp_path, SHORT, only=wrong), [75, 2])
    assert own.strip().splitlines()[-1].startswith("error: ") and "/nowhere" in own
    assert other.strip().splitlines()[-1].startswith("stopped: another process of this run is gone")
    assert time.monotonic() - began < 2 * PATIENCE + 60


@slow
def test_two_processes_judge_as_one(shared, runs, tmp_path):
    workdir, _ = runs("one")
    found = {}
    for count in (1, 2):
        only = ("--task=knn,localization", f"--out={tmp_path / str(count)}")
        fields = {"tasks.cache": "none", "tasks.baselines": "()", "tasks.localization.gallery": 1}
        processes = start(shared, count, workdir, fields, program="evaluate", every=only)
        outputs = finish_all(processes)
        assert [str(tmp_path / str(count)) in out for out, _ in outputs] == [True, False][:count]
        found[count] = json.loads((tmp_path / str(count) / "eval.json").read_text())
    written = [sorted(p.name for p in (tmp_path / name).rglob("*")) for name in "12"]
    assert written[0] == written[1]
    for task in ("knn", "localization"):
        one, two = (found[count]["results"][task]["trained"] for count in (1, 2))
        check_figures(two, one, rtol=1e-5)
