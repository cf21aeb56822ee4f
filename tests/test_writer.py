"""Files of a run: valid JSON, repair after an interruption, TensorBoard, terminal lines."""

import io
import json
import logging
import math
import sys

import numpy as np
import pytest
from etils.epath import backend, gpath

from salcl_jax import progress as progress_lib
from salcl_jax import writer
from salcl_jax.progress import Progress
from salcl_jax.workdir import last_step
from salcl_jax.writer import Writer


def open_writer(folder, resume_step=0, tensorboard=False, is_main=True, **how):
    return Writer(str(folder), tensorboard=tensorboard, is_main=is_main, resume_step=resume_step, **how)


def read_lines(folder):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_scalars_are_one_valid_json_line_each_and_at_once(tmp_path):
    with open_writer(tmp_path) as out:
        out.scalars(1, {"train/loss": np.float32(0.5), "train/bad": math.nan})
        assert read_lines(tmp_path) == [{"step": 1, "train/loss": 0.5, "train/bad": None}]
        out.scalars(2, {"a": math.inf, "b": np.array(3)})
    assert read_lines(tmp_path)[1] == {"step": 2, "a": None, "b": 3.0}


HOSTILE = ['{"step": 1e999}\n', '{"step": NaN}\n', '{"step": null}\n', '[' * 100_000 + "\n",
           '{"step": ' + "9" * 5000 + "}\n"]  # fmt: skip


@pytest.mark.parametrize("tail", ["", '{"step": 30, "x": 1.', "garbage\n", "[1]\n", "\x00\x00", *HOSTILE])
def test_interrupted_run_is_repaired(tmp_path, tail):
    good = "".join(f'{{"step": {s}, "x": {s}.5}}\n' for s in (10, 20, 20, 25))
    (tmp_path / "metrics.jsonl").write_text(good + tail)
    assert last_step(str(tmp_path)) == 25
    with open_writer(tmp_path, resume_step=20) as out:
        assert [line["step"] for line in read_lines(tmp_path)] == [10, 20, 20]
        out.scalars(21, {"x": 1})
    assert [line["step"] for line in read_lines(tmp_path)] == [10, 20, 20, 21]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("step", [1, 20])
def test_a_step_that_is_written_again(tmp_path, step):
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {s}}}\n' for s in (0, 1, 1, 20, 20, 21)))
    open_writer(tmp_path, resume_step=step, again=True).close()
    assert [line["step"] for line in read_lines(tmp_path)] == {1: [0], 20: [0, 1, 1]}[step]


def test_nothing_to_repair_leaves_the_file_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":1,   "x":2}\n')
    open_writer(tmp_path, resume_step=1).close()
    assert path.read_text() == '{"step":1,   "x":2}\n'


def test_a_fresh_start_empties_the_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "x": 1}\n')
    open_writer(tmp_path, resume_step=0).close()
    assert read_lines(tmp_path) == []


def test_bucket_file_is_replaced_now_and_then_and_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_is_remote", lambda path: True)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 9}\n')
    with open_writer(tmp_path, resume_step=1) as out:
        out.scalars(2, {"x": 1})
        assert len(read_lines(tmp_path)) == 1
        monkeypatch.setattr(writer, "_REMOTE_INTERVAL", 0.0)
        out.scalars(3, {"x": 1})
        assert len(read_lines(tmp_path)) == 3
        monkeypatch.setattr(writer, "_REMOTE_INTERVAL", 1e9)
        out.scalars(4, {"x": 1})
        out.image(4, "p", np.zeros((2, 2, 3), np.uint8))
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2, 3, 4]
    assert (tmp_path / "panels" / "p_00000004.png").exists()


def test_other_processes_write_nothing(tmp_path):
    with open_writer(tmp_path / "run", is_main=False, tensorboard=True) as out:
        out.scalars(1, {"x": 1.0})
        out.image(1, "p", np.zeros((2, 2, 3), np.uint8))
        out.summary({"x": 1})
        out.config({"x": 1})
    assert list(tmp_path.iterdir()) == []


def test_summary_and_config_are_valid_and_whole(tmp_path):
    with open_writer(tmp_path) as out:
        out.summary({"top1": np.float32(0.25), "bad": math.nan, "curve": np.arange(3)})
        out.summary({"top1": 0.5})
        out.config({"lr": 0.1, "crops": (128, 64), "name": None})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"top1": 0.5}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["config"] == {"lr": 0.1, "crops": [128, 64], "name": None}
    assert config["versions"]["numpy"] == np.__version__
    assert config["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(config["versions"]) >= {"jax", "flax", "optax", "orbax-checkpoint"}
    assert config["git"] is None or len(config["git"].rstrip("+")) == 40


def test_image_is_readable_and_exact(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    with open_writer(tmp_path) as out:
        out.image(12, "train/panel", pixels)
        out.image(12, "float", pixels / np.float32(255))
    for name in ("train_panel", "float"):
        read = np.asarray(image.open(tmp_path / "panels" / f"{name}_00000012.png"))
        np.testing.assert_array_equal(read, pixels)


def test_tensorboard_files_are_readable_and_resume(tmp_path):
    pytest.importorskip("tensorboardX")
    module = "tensorboard.backend.event_processing.event_accumulator"
    accumulator = pytest.importorskip(module)
    for resume, steps in ((0, (1, 2, 3)), (2, (3, 4))):  # step 3 is written again after resuming
        with open_writer(tmp_path, resume_step=resume, tensorboard=True) as out:
            for step in steps:
                out.scalars(step, {"train/loss": 10 * resume + step})
            out.image(steps[0], "panel", np.full((4, 6, 3), 200, np.uint8))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert scalars == [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0)]
    image = events.Images("panel")[-1]
    assert (image.width, image.height) == (6, 4)


def test_missing_tensorboardx_is_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with caplog.at_level(logging.WARNING), open_writer(tmp_path, tensorboard=True) as out:
        out.scalars(1, {"x": 1})
    assert len(caplog.records) == 1 and "tensorboardX is not installed" in caplog.text
    assert len(read_lines(tmp_path)) == 1


class Bucket:
    """A folder stands for the buckets of gs://; names with `broken` in them cannot be written."""

    broken = "\0"

    def __init__(self, folder):
        self.folder, self.writes = folder, []

    def __getattr__(self, name):
        def call(path, *rest, **named):
            if name == "open" and "w" in rest[0]:
                self.writes.append(path)
                if self.broken in path:
                    raise RuntimeError("403 Forbidden\nno access")
            local = path.replace("gs://", f"{self.folder}/")
            return getattr(backend.os_backend, name)(local, *rest, **named)

        return call


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    found = Bucket(tmp_path)
    monkeypatch.setattr(gpath.PosixGPath, "_backend", found)
    monkeypatch.setattr(writer, "_REMOTE_INTERVAL", 1e9)
    return found


def steps_of(folder):
    """Steps of the scalars in the event files of a folder."""
    module = "tensorboard.backend.event_processing.event_accumulator"
    events = pytest.importorskip(module).EventAccumulator(str(folder))
    events.Reload()
    return [event.step for event in events.Scalars("x")]


def test_tensorboard_files_on_a_bucket_are_renewed_now_and_then_and_at_the_end(tmp_path, bucket, monkeypatch):
    pytest.importorskip("tensorboardX")
    clock, place = Clock(), tmp_path / "b/run/tensorboard"
    monkeypatch.setattr(writer, "_REMOTE_INTERVAL", 30.0)
    monkeypatch.setattr(writer.time, "monotonic", clock)
    for resume in (0, 20):
        with open_writer("gs://b/run", resume_step=resume, tensorboard=True) as out:
            for step in range(resume + 1, resume + 21):
                clock.now += 4
                out.scalars(step, {"x": step})
            assert steps_of(place) == list(range(1, resume + 17))  # copied after 32 and 64 seconds
        assert steps_of(place) == list(range(1, resume + 21))
    assert sum("tensorboard" in path for path in bucket.writes) == 2 * 3
    assert len(list(place.iterdir())) == 2


def test_a_bucket_that_refuses_tensorboard_files_costs_them_only(tmp_path, bucket, monkeypatch, caplog):
    pytest.importorskip("tensorboardX")
    monkeypatch.setattr(bucket, "broken", "tfevents")
    monkeypatch.setattr(writer, "_REMOTE_INTERVAL", 0.0)
    with caplog.at_level(logging.WARNING), open_writer("gs://b/run", tensorboard=True) as out:
        for step in (1, 2):
            out.scalars(step, {"x": step})
        out.image(2, "p", np.zeros((2, 2, 3), np.uint8))
    (message,) = caplog.messages
    assert message.startswith("TensorBoard: 403 Forbidden no access") and "\n" not in message
    assert len(read_lines(tmp_path / "b/run")) == 2 and not list(tmp_path.glob("b/run/tensorboard/*"))


class Clock:
    """Stands in for time.monotonic."""

    now = 100.0

    def __call__(self):
        return self.now


def test_plain_progress_lines_count_images_and_time(monkeypatch):
    clock, stream = Clock(), io.StringIO()
    monkeypatch.setattr(progress_lib.time, "monotonic", clock)
    progress = Progress(1000, start=100, images_per_step=64, log_every=10, stream=stream)
    clock.now += 50  # compilation: not part of the rate
    progress.update(101, 2.0)
    for step in range(102, 121):
        clock.now += 0.25
        if step == 115:
            with progress.paused():
                clock.now += 500
        progress.update(step, 1.2345 if step % 10 == 0 else None)
    progress.message("checkpoint written")
    assert stream.getvalue().splitlines() == [
        "step 101/1000  loss 2",
        "step 110/1000  loss 1.234  256 images/s  left 3m42s",
        "step 120/1000  loss 1.234  256 images/s  left 3m40s",
        "checkpoint written",
    ]
    assert progress.images_per_second == pytest.approx(64 / 0.25)


def test_bar_on_a_terminal_shows_loss_and_rate():
    pytest.importorskip("tqdm")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with Progress(4, images_per_step=2, log_every=1, stream=stream) as progress:
        for step in range(1, 5):
            progress.update(step, 0.5)
        progress.message("a line")
    text = stream.getvalue()
    assert "4/4" in text and "loss 0.5" in text and "images/s" in text and "a line\n" in text


def test_progress_is_silent_on_other_processes():
    stream = io.StringIO()
    progress = Progress(2, log_every=1, is_main=False, stream=stream)
    progress.update(1, 0.5)
    progress.message("x")
    assert stream.getvalue() == ""
