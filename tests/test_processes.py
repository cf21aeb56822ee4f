"""Several processes as users start them: the same figures as one, and ends that are told and bounded."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from test_train import NO_TENSORFLOW, SMALL, finish, metrics, summary, wait_for_step

from salcl_jax.checkpoint import load_params

pytestmark = pytest.mark.xdist_group("processes")  # one test at a time: they fill the cores
ROOT = Path(__file__).parents[1]
DEVICES = 4  # of a run, over all its processes
STEPS = 48
PATIENCE = 15  # seconds
NO_EVALUATION = {f"eval.{name}.kind": "none" for name in ("localization", "probe_train", "probe_test")}
TINY = SMALL | {
    "batch_size": 8, "eval.batch_size": 8, "eval.linear": False, "total_steps": STEPS, "log.every": 1,
    "checkpoint.every": 0.25, "checkpoint.keep": 9, "distributed_timeout": PATIENCE,
    "loss.name": "byol", "optim.lr": 0.0005,  # calm: another order of sums stays a small difference
}  # fmt: skip


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Folder of this file: compiled programs, and the block that keeps tensorflow out."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "blocked").mkdir()
    (folder / "blocked" / "sitecustomize.py").write_text(NO_TENSORFLOW)
    return folder


def start(shared, count, workdir, program="main", **fields):
    """Processes of one run with DEVICES devices together; fields by dotted name with __ for dots."""
    given = TINY | {name.replace("__", "."): value for name, value in fields.items()}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES // count), "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(shared / "blocked")]),
        "JAX_COMPILATION_CACHE_DIR": str(shared / "compiled"), "XDG_CACHE_HOME": str(shared / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }  # fmt: skip
    place = f"--workdir={workdir}" if program == "main" else f"--checkpoint={workdir}"
    command = [sys.executable, "-m", f"salcl_jax.{program}", "--config=configs/scenes.py:smoke", place]
    command += [f"--config.{name}={value}" for name, value in given.items()]
    modes = [f"127.0.0.1:{port},{count},{i}" if count > 1 else "none" for i in range(count)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen([*command, f"--config.distributed={mode}"], cwd=ROOT, env=env, **pipes)
        for mode in modes
    ]


def finish_all(processes, codes=0):
    """(stdout, stderr) of every process; exit codes one for all or one for each."""
    codes = [codes] * len(processes) if isinstance(codes, int) else codes
    try:
        return [finish(process, code) for process, code in zip(processes, codes, strict=True)]
    finally:
        for process in processes:
            process.kill()


def run(shared, count, workdir, **fields):
    return finish_all(start(shared, count, workdir, **fields))


@pytest.fixture(scope="module")
def straight(shared):
    """A run of one process that nothing interrupts."""
    run(shared, 1, shared / "straight")
    return shared / "straight"


def same_losses(workdir, straight):
    lines, expected = metrics(workdir), metrics(straight)
    assert list(lines) == list(expected) == list(range(1, STEPS + 1))
    for name in ("train/loss", "train/spread", "train/window_area"):
        found, wanted = ([line[name] for line in run.values()] for run in (lines, expected))
        np.testing.assert_allclose(found[:5], wanted[:5], rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(found, wanted, rtol=5e-3, err_msg=name)
    way = moved(straight)
    assert np.linalg.norm(moved(workdir) - way) < 0.1 * np.linalg.norm(way)


def moved(workdir):
    """Difference of the parameters at the end to those after the first step, as one vector."""
    first, last = (load_params(str(workdir / "checkpoints" / str(step)))["params"] for step in (1, STEPS))
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.tree.map(np.subtract, last, first))])


def newest(workdir):
    return max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_learn_what_one_learns(shared, straight, tmp_path, count):
    outputs = run(shared, count, tmp_path)
    for i, (out, _) in enumerate(outputs):
        assert f"process {i} of {count}: {DEVICES // count} of {DEVICES} cpu devices" in out
        assert ("all figures:" in out) == (i == 0)
    same_losses(tmp_path, straight)
    found, expected = summary(tmp_path), summary(straight)
    assert {"pretext/loss", "knn/top1", "localization/corloc"} <= found["final"].keys()
    assert found["untrained"] == pytest.approx(expected["untrained"], rel=1e-4)
    for name in ("pretext/loss", "pretext/spread", "localization/inside_ratio", "localization/best_iou"):
        assert found["final"][name] == pytest.approx(expected["final"][name], rel=5e-3)
    for name in ("knn/top1", "localization/corloc", "localization/pointing"):  # shares of 32 photos
        assert found["final"][name] == pytest.approx(expected["final"][name], abs=2 / 32)


def test_sigterm_to_one_of_two_saves_in_both_and_one_process_continues(shared, straight, tmp_path):
    processes = start(shared, 2, tmp_path, **NO_EVALUATION)
    wait_for_step(processes[0], tmp_path, 3)
    processes[1].send_signal(signal.SIGTERM)
    lines = [err.strip().splitlines()[-1] for _, err in finish_all(processes, 75)]
    saved = newest(tmp_path)
    assert 3 <= saved < STEPS
    assert set(lines) == {f"stopped: told to terminate: saved step {saved}; start again to continue"}
    run(shared, 1, tmp_path, **NO_EVALUATION)
    same_losses(tmp_path, straight)


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_one_of_two_is_killed_and_the_run_continues(shared, straight, tmp_path, victim):
    processes = start(shared, 2, tmp_path, **NO_EVALUATION)
    wait_for_step(processes[0], tmp_path, 14)
    processes[victim].kill()
    began = time.monotonic()
    codes = [75, 75]
    codes[victim] = -signal.SIGKILL
    _, err = finish_all(processes, codes)[1 - victim]
    assert time.monotonic() - began < PATIENCE + 15
    line = err.strip().splitlines()[-1]
    assert line.startswith("stopped: another process of this run is gone")
    assert "same command again" in line and "last checkpoint" in line
    assert 1 <= newest(tmp_path) < STEPS
    run(shared, 2, tmp_path, **NO_EVALUATION)
    same_losses(tmp_path, straight)
