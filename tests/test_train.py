"""Runs as users start them: what they leave behind, and how they stop, continue and fail."""

import io
import json
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import (
    arrays,
    finish,
    home,
    metrics,
    newest,
    photo,
    pictures,
    record,
    same_networks,
    start,
    summary,
    train,
    wait_for_step,
)

from salcl_jax import checkpoint
from salcl_jax.loop import Alarm


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    return home(tmp_path_factory, "train")


@pytest.fixture(scope="session")
def columns(shared):
    return pictures(shared)


def scenes(shared):
    data = {f"{part}__data_dir": shared / "scenes" for part in (
        "data__train", "eval__pretext", "eval__localization", "eval__probe_train", "eval__probe_test")}
    return data | {"batch_size": 8, "eval__batch_size": 16, "log__tensorboard": True}


def test_what_a_run_leaves_behind(shared, tmp_path):
    out, _ = train(shared, "configs/scenes.py:smoke", tmp_path, **scenes(shared))
    found = json.loads((tmp_path / "config.json").read_text())
    assert found["config"]["crops"]["size"] == 32 and found["config"]["resolved"]["total_steps"] == 4
    lines = metrics(tmp_path)
    assert list(lines) == [2, 4]
    for line in lines.values():
        assert all(value is not None for value in line.values())
        assert line["train/skipped"] == 0 and "train/spread" in line
    evaluations = metrics(tmp_path, "eval")
    assert list(evaluations) == [0, 4]
    figures = summary(tmp_path)
    assert figures["steps"] == 4 and figures["images"] == 32
    assert figures["final"].keys() == figures["untrained"].keys()
    for part in ("pretext/loss", "localization/corloc", "knn/top1", "linear/top1"):
        assert np.isfinite(figures["final"][part]) and part in out
        assert figures["final"][part] == evaluations[4][f"eval/{part}"]
        assert figures["untrained"][part] == evaluations[0][f"eval/{part}"]
    panels = sorted((tmp_path / "panels").glob("*.png"))
    assert [panel.stem for panel in panels] == ["scenes_00000000", "scenes_00000004"]
    for panel in panels:
        with Image.open(panel) as image:
            assert image.mode == "RGB" and np.asarray(image).std() > 10
    assert list((tmp_path / "tensorboard").iterdir()) and str(tmp_path / "panels") in out


@pytest.fixture(scope="session")
def whole(shared, columns):
    """A run of 40 steps without tensorflow, not interrupted, and its fields."""
    fields = arrays(columns, total_steps=40, log__every=1, checkpoint__every=0.2)
    train(shared, "configs/folder.py:smoke", shared / "whole", **fields)
    return shared / "whole", fields


@pytest.mark.fault
def test_interrupted_and_continued_equals_uninterrupted(shared, whole, tmp_path):
    straight, fields = whole
    process = start(shared, "configs/folder.py:smoke", tmp_path, **fields)
    wait_for_step(process, tmp_path, 5)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # Slurm may send two
    _, err = finish(process, 75)
    stopped = newest(tmp_path)
    assert 5 <= stopped < 40 and f"saved step {stopped}; start again to continue" in err
    assert not (tmp_path / "summary.json").exists()

    _, err = train(shared, "configs/folder.py:smoke", tmp_path, 2, **fields | {"optim__lr": 0.123})
    assert err.count("\n") == 1 and "optim.lr" in err and "0.123" in err and "--workdir" in err
    train(shared, "configs/folder.py:smoke", tmp_path, **fields)
    assert record(tmp_path, 40) == record(straight, 40)
    same_networks(tmp_path, straight)
    lines, expected = metrics(tmp_path), metrics(straight)
    assert list(lines) == list(expected) == list(range(1, 41))
    for step in lines:
        for name in ("train/loss", "train/grad_norm", "train/spread", "train/window_area"):
            assert lines[step][name] == expected[step][name]
    assert summary(tmp_path)["final"] == summary(straight)["final"]


def test_a_second_start_of_a_finished_run_changes_nothing(shared, whole):
    run, fields = whole
    names = ("final", "untrained", "steps", "images", "skipped", "collapse_alarm")
    before = record(run, 40), metrics(run), metrics(run, "eval"), [summary(run)[name] for name in names]
    out, err = train(shared, "configs/folder.py:smoke", run, **fields)
    after = record(run, 40), metrics(run), metrics(run, "eval"), [summary(run)[name] for name in names]
    assert after == before and "pretext/loss" in out and "step 40" not in err


def test_starting_from_another_run_and_a_forced_collapse(shared, whole, tmp_path):
    straight, fields = whole
    changed = {"init_from": straight, "total_steps": 3, "collapse__threshold": 1.0, "collapse__patience": 2}
    _, err = train(shared, "configs/folder.py:smoke", tmp_path, **fields | changed)
    first, last = metrics(tmp_path, "eval")[0], metrics(straight, "eval")[40]
    assert first["eval/pretext/loss"] == pytest.approx(last["eval/pretext/loss"], rel=1e-4)
    untrained = metrics(straight, "eval")[0]["eval/pretext/loss"]
    assert abs(first["eval/pretext/loss"] - untrained) > 1e-3
    assert err.count("COLLAPSE ALARM") == 1 and "step 2: COLLAPSE ALARM" in err
    assert [line["alarm/collapse"] for line in metrics(tmp_path).values()] == [0, 1, 1]
    assert summary(tmp_path)["collapse_alarm"] is True


@pytest.mark.fault
def test_a_loss_that_is_not_finite(shared, columns, tmp_path):
    fields = arrays(columns, total_steps=20, log__every=1, optim__lr=1e30)
    _, err = train(shared, "configs/folder.py:smoke,byol", tmp_path, 70, **fields)
    line = err.strip().splitlines()[-1]
    saved = newest(tmp_path)
    assert line.startswith("stopped: ") and f"not finite at step {saved + 1}" in line
    assert f"step {saved} is saved" in line and "config.optim.lr" in line
    assert max(metrics(tmp_path)) == saved
    assert checkpoint.load_params(str(tmp_path))["params"].keys() == {"encoder", "projector", "predictor"}


def test_broken_photos(shared, tmp_path):
    """Too many stop the run; with a higher limit the same command goes on and counts them."""
    rng, folder = np.random.default_rng(1), tmp_path / "photos"
    folder.mkdir()
    for i in range(40):
        path = folder / f"{i:02d}.jpg"
        Image.fromarray(photo(rng)[0]).save(path)
        if i % 10 == 3:
            path.write_bytes(path.read_bytes()[:300])
    fields = {"data__train__roots": f"('{folder}',)", "batch_size": 8, "total_steps": 10,
              "block": True}  # fmt: skip
    run = tmp_path / "run"
    _, err = train(shared, "configs/folder.py:smoke,byol", run, 70, **fields)
    line = err.strip().splitlines()[-1]
    assert line.startswith("stopped: ") and "could not be read" in line and "config.data.max_skipped" in line
    assert str(folder) in line and str(run / "skipped.jsonl") in line

    train(shared, "configs/folder.py:smoke,byol", run, **fields, data__max_skipped=0.5)
    # ten steps of 8 are two passes over 40 photos, 4 of them broken
    assert sum(line["train/skipped"] for line in metrics(run).values()) == 8
    assert summary(run)["skipped"] == 8 and list(metrics(run)) == [2, 4, 6, 8, 10]
    listed = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert sorted(row["file"] for row in listed) == [str(folder / f"{i}.jpg") for i in ("03", 13, 23, 33)]
    assert summary(run)["skipped_photos"] == {"truncated": 4}


def coco_example(tfds, rng, number):
    image, (y0, x0, y1, x1) = photo(rng)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG")
    box = tfds.features.BBox(y0, x0, y1, x1)
    things = [{"area": 1, "bbox": box, "id": number, "is_crowd": False, "label": number % 3}]
    return {"image": io.BytesIO(buffer.getvalue()), "image/filename": f"{number}.jpg", "image/id": number,
            "objects": things}  # fmt: skip


def test_coco_as_tfds_writes_it(shared, tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    builder = tfds.builder("coco/2017", data_dir=str(tmp_path / "data"))
    Path(builder.data_dir).mkdir(parents=True)
    writer = tfds.core.SequentialWriter(builder.info, 100, overwrite=True)
    writer.initialize_splits(["train", "validation"])
    rng = np.random.default_rng(2)
    for split, count in (("train", 24), ("validation", 16)):
        writer.add_examples({split: [coco_example(tfds, rng, i) for i in range(count)]})
    writer.close_all()
    fields = {"data__train__data_dir": tmp_path / "data", "batch_size": 8, "roi__source": "ground_truth",
              "guidance__start": 0.0, "guidance__full": 0.0}  # fmt: skip
    train(shared, "configs/coco.py:smoke", tmp_path / "run", **fields)
    figures = summary(tmp_path / "run")["final"]
    for part in ("pretext/loss", "localization/corloc", "knn/top1", "linear/top1"):
        assert np.isfinite(figures[part])
    assert metrics(tmp_path / "run")[4]["train/guided"] > 0


def test_the_alarm_is_raised_once_and_taken_back():
    alarm = Alarm(0.2, 3)
    values = [0.1, 0.1, 0.3, 0.1, 0.1, 0.1, 0.1, 0.2, 0.1, 0.1, 0.1]
    assert [alarm.update(value) for value in values] == [False] * 5 + [True] + [False] * 4 + [True]
    assert alarm.raised
    assert not alarm.update(0.2) and not alarm.raised
    alarm = Alarm(0.2, 1)
    assert alarm.update(float("-inf")) and not alarm.update(0.1)
