"""Full, damaged and vanished storage, and two runs in one workdir: nothing good is lost, nothing begins anew.

A full disk is a limit on the size of files, which the kernel keeps for the libraries' own threads as well.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from runs import arrays, finish, home, metrics, newest, pictures, record, start, summary, train, wait_for_step
from test_checkpoint import abstract, assert_same_bits, make_state, open_run

from salcl_jax import checkpoint, checkpoint_record
from salcl_jax.workdir import alone, check_nothing_lost, last_step
from salcl_jax.writer import Writer

pytestmark = pytest.mark.fault
ROOT = Path(__file__).parents[1]
CONFIG = "configs/folder.py:smoke"


@contextlib.contextmanager
def full_disk(most: int):
    """Inside, no file of this process grows beyond `most` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def run(tmp_path):
    """Folder of checkpoints 1 and 2 made from make_state(1) and (2)."""
    with open_run(tmp_path / "checkpoints") as saver:
        for step in (1, 2):
            saver.save(step, make_state(step), {"step": step})
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_disk_full_in_a_save(run, asynchronous, fault_table):
    """One line; the checkpoints before are whole; with room again the same step can be saved."""
    options = {"every_steps": 1, "keep": 1, "asynchronous": asynchronous}
    with pytest.raises(checkpoint.NotWritten, match="could not be written") as caught:
        with checkpoint.Checkpointer(str(run), **options) as saver, full_disk(3000):
            saver.save(3, make_state(3), {"step": 3})
            saver.wait()
    assert "\n" not in str(caught.value) and str(run) in str(caught.value)
    with checkpoint.Checkpointer(str(run), **options) as saver:
        state, extra, step = saver.restore(abstract(make_state()))
        assert step == 2 and extra == {"step": 2}
        assert_same_bits(state, make_state(2))
        assert saver.save(3, make_state(3), {"step": 3})
        saver.wait()
        assert_same_bits(saver.restore(abstract(make_state()))[0], make_state(3))
    fault_table(f"disk full in a save ({'asynchronous' if asynchronous else 'synchronous'})",
                "one line; the last checkpoint is whole", 1, 70)  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("tensorboard", [False, True])
def test_disk_full_in_logging(tmp_path, tensorboard):
    """OSError at once, in the thread that logs; what was written before is kept, half a line is dropped."""
    if tensorboard:
        pytest.importorskip("tensorboardX")
    values = {f"a/quantity/{number}": float(number) for number in range(60)}
    done = 0
    with pytest.raises(OSError), full_disk(8000):
        with Writer(str(tmp_path), tensorboard=tensorboard, is_main=True, resume_step=0) as out:
            for step in range(1, 100):
                out.scalars(step, values)
                done = step
    assert 0 < done < 99
    with Writer(str(tmp_path), tensorboard=tensorboard, is_main=True, resume_step=done) as out:
        out.scalars(done + 1, values)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, done + 2))


def test_files_of_metrics_that_are_damaged(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\x00{"step": 2}\n[3]\nnull\n{"step": "x"}\n{"step": 4}\n{"st')
    assert last_step(str(tmp_path)) == 4
    Writer(str(tmp_path), tensorboard=False, is_main=True, resume_step=4).close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 4]
    assert last_step(str(tmp_path / "none")) == 0


def empty_all(step: Path):
    for path in step.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def remove_all(step: Path):
    for path in step.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def remove_one(step: Path, *parts: str):
    path = step.joinpath(*parts)
    shutil.rmtree(path) if path.is_dir() else path.unlink()


DAMAGES = {
    "emptied": empty_all,
    "no files": remove_all,
    "no record": lambda step: remove_one(step, "extra"),
    "no arrays": lambda step: remove_one(step, "state", "ocdbt.process_0"),
    "no index": lambda step: remove_one(step, "state", "manifest.ocdbt"),
    "no tree": lambda step: remove_one(step, "state", "_METADATA"),
    "nonsense": lambda step: (step / "extra" / "metadata").write_text('{"record": [1], "crc": "x"}'),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(run, name, fault_table):
    DAMAGES[name](run / "2")
    good = sorted((run / "1").rglob("*"))
    with open_run(run, keep=1) as saver:
        state, extra, step = saver.restore(abstract(make_state()))
        assert step == 1 and extra == {"step": 1}
        assert_same_bits(state, make_state(1))
        assert sorted((run / "1").rglob("*")) == good and (run / "2").exists()
        assert saver.save(2, make_state(22), {})
    assert (run / "damaged-2").exists()
    fault_table(f"checkpoint: {name}", "the one before is used; the damaged one is kept aside", 1)


def test_bits_flipped_anywhere_in_a_checkpoint(run):
    """Either the state comes back bit for bit or the one before does."""
    rng, files = np.random.default_rng(0), sorted(p for p in (run / "2").rglob("*") if p.is_file())
    states, found = {step: make_state(step) for step in (1, 2)}, []
    with open_run(run) as saver:
        for number in range(len(files)):
            path = files[number]
            whole = path.read_bytes()
            bad = bytearray(whole)
            for at in rng.integers(0, len(bad), 4):
                bad[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(bad)
            state, _, step = saver.restore(abstract(make_state()))
            assert_same_bits(state, states[step])
            found.append(step)
            path.write_bytes(whole)
            saver._damaged = []
    assert set(found) == {1, 2}


@pytest.mark.parametrize("read_only", [False, pytest.param(True, marks=pytest.mark.skipif(
    not shutil.which("chattr"), reason="needs chattr"))])  # fmt: skip
def test_what_a_killed_run_had_half_written_is_removed(run, read_only):
    """And nothing else; where it cannot be removed it is in nobody's way."""
    kept = ["1", "2", "damaged-2", "note.txt"]
    (run / "note.txt").write_text("")
    for name in ("damaged-2", "3.orbax-checkpoint-tmp", "4.orbax-checkpoint-tmp-17"):
        (run / name / "state").mkdir(parents=True)
    if read_only and not immutable(run, True):
        pytest.skip("the file system or the user's rights do not allow it")
    try:
        with open_run(run) as saver:
            assert saver.restore(abstract(make_state()))[2] == 2
    finally:
        immutable(run, False) if read_only else None
    if not read_only:
        assert sorted(path.name for path in run.iterdir()) == kept
    with open_run(run) as saver:
        assert saver.save(3, make_state(3), {})
    assert sorted(path.name for path in run.iterdir()) == sorted([*kept, "3"])


def test_an_altered_record_is_damage():
    """Its CRC is no secret: what has the right one but not the right parts must not get further."""
    for altered in ({"leaves": [], "extra": {}}, {"leaves": {}, "extra": "x"}):
        with pytest.raises((TypeError, RuntimeError)):
            checkpoint_record.unseal(checkpoint_record.seal(altered))


HOLD = """
import sys, time
from salcl_jax.workdir import alone
with alone(sys.argv[1]):
    print(1, flush=True)
    time.sleep(100)
"""


def test_one_run_in_a_workdir(tmp_path):
    """The second is told who the first is; a killed one leaves nothing behind."""
    place = str(tmp_path / "run")
    command = [sys.executable, "-c", HOLD, place]
    holder = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"1\n"
        with pytest.raises(ValueError, match=rf"another run is at work.*process {holder.pid} on") as caught:
            with alone(place):
                pytest.fail("two runs in one workdir")
        assert "\n" not in str(caught.value) and "--workdir" in str(caught.value)
        with alone(str(tmp_path / "other")):
            pass
    finally:
        holder.kill()
        holder.wait()
    for _ in range(2):  # and a run that ended
        with alone(place), pytest.raises(ValueError), alone(place):
            pass
    with alone("gs://bucket/run"), alone("gs://bucket/run"):
        pass


def test_figures_without_checkpoints_are_not_written_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert not check_nothing_lost(str(tmp_path), 10)
    for last in (0, 1, 10):  # killed while the first checkpoint, or the second, was being written
        path.write_text("".join(f'{{"step": {step}}}\n' for step in range(last + 1)))
        assert check_nothing_lost(str(tmp_path), 10) == (last > 0)
    path.write_text('{"step": 3}\n{"step": 11}\n')
    with pytest.raises(ValueError, match="up to step 11 but no checkpoint.*--workdir") as caught:
        check_nothing_lost(str(tmp_path), 10)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return home(tmp_path_factory, "storage")


@pytest.fixture(scope="module")
def fields(shared):
    return arrays(pictures(shared), total_steps=2000, log__every=1, checkpoint__every=0.002)


def one_line(err: str, kind: str) -> str:
    """The last line, which is all that a user gets beside progress."""
    line = err.strip().splitlines()[-1]
    assert line.startswith(f"{kind}: "), err[-2000:]
    return line


@pytest.mark.slow
def test_a_second_start_in_the_same_workdir(shared, fields, tmp_path, fault_table):
    first = start(shared, CONFIG, tmp_path, **fields)
    wait_for_step(first, tmp_path, 5)
    began = time.monotonic()
    _, err = finish(start(shared, CONFIG, tmp_path, **fields), 2)
    line = one_line(err, "error")
    assert "another run is at work" in line and f"process {first.pid}" in line and err.count("\n") == 1
    assert time.monotonic() - began < 100 and first.poll() is None
    fault_table("two runs in one workdir", "the second stops with one line, the first goes on", 0, 2)
    wait_for_step(first, tmp_path, max(metrics(tmp_path)) + 5)
    first.kill()
    first.communicate()
    lost = max(metrics(tmp_path)) - newest(tmp_path)
    again = start(shared, CONFIG, tmp_path, **fields)
    wait_for_step(again, tmp_path, newest(tmp_path) + lost + 5)
    again.send_signal(signal.SIGTERM)
    finish(again, 75)
    fault_table("start after SIGKILL", "no lock is left behind", lost, 75)


@pytest.mark.slow
def test_disk_full_while_training(shared, fields, tmp_path, fault_table):
    """Stops with one line and the last good checkpoint; with room again the same command continues."""
    process = start(shared, CONFIG, tmp_path, **fields)
    wait_for_step(process, tmp_path, 20)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (3000, 3000))
    _, err = finish(process, 70)
    line = one_line(err, "stopped")
    assert "make room" in line and "File too large" in line
    good, logged = newest(tmp_path), max(metrics(tmp_path))
    assert record(tmp_path, good)
    again = start(shared, CONFIG, tmp_path, **fields)
    wait_for_step(again, tmp_path, logged + 5)
    again.send_signal(signal.SIGTERM)
    finish(again, 75)
    assert newest(tmp_path) >= good + 5 and list(metrics(tmp_path)) == list(range(1, newest(tmp_path) + 1))
    fault_table("disk full while training", "one line; continues once there is room", logged - good, 70)


def immutable(folder: Path, on: bool) -> bool:
    """Whether nothing below a folder can be written any more, or can again."""
    done = subprocess.run(["chattr", "-R", "+i" if on else "-i", folder], capture_output=True)
    return done.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chattr"), reason="needs chattr")
def test_a_workdir_that_becomes_read_only(shared, fields, tmp_path, fault_table):
    run = tmp_path / "run"
    process = start(shared, CONFIG, run, **fields)
    wait_for_step(process, run, 20)
    try:
        if not immutable(run, True):
            pytest.skip("the file system or the user's rights do not allow it")
        _, err = finish(process, 70)
    finally:
        immutable(run, False)
        process.kill()
    assert "make room or mend" in one_line(err, "stopped") and str(run) in err
    good, logged = newest(run), max(metrics(run))
    again = start(shared, CONFIG, run, **fields)
    wait_for_step(again, run, logged + 5)
    again.send_signal(signal.SIGTERM)
    finish(again, 75)
    assert list(metrics(run)) == list(range(1, newest(run) + 1))
    fault_table("the workdir becomes read-only", "one line; continues once mended", logged - good, 70)


@pytest.mark.slow
def test_a_workdir_that_vanishes_and_one_that_cannot_be(shared, fields, tmp_path, fault_table):
    run = tmp_path / "run"
    process = start(shared, CONFIG, run, **fields)
    wait_for_step(process, run, 10)
    run.rename(tmp_path / "away")
    _, err = finish(process, 70)
    line = one_line(err, "stopped")
    assert str(run) in line and not (run / "metrics.jsonl").exists()
    logged = max(metrics(tmp_path / "away"))
    fault_table("the workdir vanishes", "stops with one line", None, 70)
    shutil.rmtree(run, ignore_errors=True)
    (tmp_path / "away").rename(run)
    process = start(shared, CONFIG, run, **fields)
    wait_for_step(process, run, logged + 3)
    process.send_signal(signal.SIGTERM)
    finish(process, 75)
    shutil.rmtree(run / "checkpoints")
    _, err = finish(start(shared, CONFIG, run, **fields), 2)
    assert "but no checkpoint" in one_line(err, "error") and metrics(run)
    fault_table("all checkpoints vanish", "refuses to begin anew, with one line", None, 2)
    _, err = finish(start(shared, CONFIG, "/proc/run", **fields), 2)
    assert "/proc" in one_line(err, "error") and err.count("\n") == 1
    fault_table("a workdir that cannot be written to", "stops at the start with one line", 0, 2)


@pytest.mark.slow
def test_a_checkpoint_of_another_version(shared, tmp_path, fault_table):
    """Of totals that it does not know, a run begins at 0; of fields, it says which differ."""
    fields = arrays(pictures(tmp_path), total_steps=4, log__every=1)
    train(shared, CONFIG, tmp_path, **fields | {"total_steps": 4})
    path = tmp_path / "checkpoints" / "4" / "extra" / "metadata"
    leaves, extra = checkpoint_record.unseal(json.loads(path.read_text()))

    def rewrite(extra):
        path.write_text(json.dumps(checkpoint_record.seal({"extra": extra, "leaves": leaves})))

    history = {name: value for name, value in extra["history"].items() if name != "below"}
    rewrite(extra | {"history": history})
    train(shared, CONFIG, tmp_path, **fields)
    assert summary(tmp_path)["steps"] == 4
    rewrite({"fields": extra["fields"] | {"loss.gone": 1}, "history": history})
    _, err = train(shared, CONFIG, tmp_path, 2, **fields)
    assert "loss.gone: 1 -> None" in one_line(err, "error") and err.count("\n") == 1
    fault_table("checkpoint of another version or config", "one line that names the difference", 0, 2)
