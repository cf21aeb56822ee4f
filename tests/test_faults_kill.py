"""Runs that are killed or told to stop: nothing is lost but the steps since the last checkpoint."""

import json
import random
import signal
import time

import pytest
from runs import (
    arrays,
    finish,
    home,
    metrics,
    newest,
    pictures,
    record,
    same_networks,
    start,
    train,
    wait_for_step,
)

pytestmark = [pytest.mark.fault, pytest.mark.xdist_group("kills")]  # one process: the whole run is made once
CONFIG = "configs/folder.py:smoke"
STEPS, EVERY = 60, 6
KILLS = 30


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return home(tmp_path_factory, "kills")


@pytest.fixture(scope="module")
def fields(shared):
    """Of a run that saves every 6 of 60 steps, and evaluates three times on the way."""
    return arrays(
        pictures(shared), total_steps=STEPS, log__every=1, checkpoint__every=EVERY / STEPS, eval__every=0.25
    )


@pytest.fixture(scope="module")
def whole(shared, fields):
    """The run that nobody touched."""
    train(shared, CONFIG, shared / "whole", **fields)
    return shared / "whole"


def check_equal(workdir, whole):
    """The last parameters bit for bit; each step once, with the same figures."""
    assert record(workdir, STEPS) == record(whole, STEPS)
    same_networks(workdir, whole)
    for kind, name in (("train", "train/loss"), ("eval", "eval/pretext/loss")):
        found, expected = metrics(workdir, kind), metrics(whole, kind)
        assert list(found) == list(expected)
        assert [line[name] for line in found.values()] == [line[name] for line in expected.values()]


def last_logged(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def saved(workdir):
    return newest(workdir) if any((workdir / "checkpoints").glob("[0-9]*")) else 0


def test_killed_in_the_middle(shared, fields, whole, tmp_path, fault_table):
    process = start(shared, CONFIG, tmp_path, **fields)
    wait_for_step(process, tmp_path, 2 * EVERY + 2)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    lost = last_logged(tmp_path) - saved(tmp_path)
    assert 0 <= lost <= 2 * EVERY + 1  # the newest checkpoint may still have been on its way
    train(shared, CONFIG, tmp_path, **fields)
    check_equal(tmp_path, whole)
    fault_table(fault="SIGKILL while training", happened="continued, bit for bit", lost_steps=lost,
                exit_code=-9)  # fmt: skip


@pytest.mark.slow
def test_killed_at_random_moments(shared, fields, whole, tmp_path, fault_table):
    """Start-up, first save, steps, saves and evaluations: wherever the moment falls."""
    rng, most, kills = random.Random(0), 0, 0
    began = time.monotonic()
    train(shared, CONFIG, tmp_path / "timed", **fields)
    length = time.monotonic() - began
    run = tmp_path / "run"
    while kills < KILLS:
        process = start(shared, CONFIG, run, **fields)
        before = saved(run) if run.exists() else 0
        # What is left of the run gets shorter with every restart: early moments come more often.
        time.sleep(rng.uniform(0.0, length * (1 - 0.7 * before / STEPS)) * rng.choice((0.3, 1.0)))
        ended = process.poll()
        process.kill()
        _, err = process.communicate()
        assert ended in (None, 0), err[-3000:]  # never fails to start
        assert "Traceback" not in err, err[-3000:]
        kills += 1
        if run.exists():
            after = saved(run)
            assert after >= before, "a checkpoint was lost"
            most = max(most, last_logged(run) - after)
        if ended == 0:  # done before the moment came: once more from the start
            check_equal(run, whole)
            run = tmp_path / f"run{kills}"
    train(shared, CONFIG, run, **fields)
    check_equal(run, whole)
    fault_table(fault=f"SIGKILL at {KILLS} random moments", happened="each restart continued, bit for bit",
                lost_steps=most, exit_code=-9)  # fmt: skip


def test_ctrl_c_saves_and_a_second_one_leaves_at_once(shared, fields, whole, tmp_path, fault_table):
    process = start(shared, CONFIG, tmp_path, **fields)
    wait_for_step(process, tmp_path, 3)
    process.send_signal(signal.SIGINT)
    _, err = finish(process, 75)
    assert f"saved step {saved(tmp_path)}" in err and saved(tmp_path) == last_logged(tmp_path)
    fault_table(fault="Ctrl-C", happened="saved at the current step", lost_steps=0, exit_code=75)
    process = start(shared, CONFIG, tmp_path, **fields)
    wait_for_step(process, tmp_path, saved(tmp_path) + 2)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode in (75, -signal.SIGINT, 130) and time.monotonic() - began < 20
    train(shared, CONFIG, tmp_path, **fields)
    check_equal(tmp_path, whole)
    fault_table(fault="Ctrl-C twice", happened="left at once, then continued", lost_steps=EVERY,
                exit_code=process.returncode)  # fmt: skip
