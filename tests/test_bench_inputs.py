"""The input benchmark: what it reports, on which cores it measures, and that it leaves them as they were."""

import json
import math
import os
import re
import threading
import time
import types

import numpy as np
import pytest
from PIL import Image

from salcl_jax import config as config_lib
from salcl_jax.bench import cores, inputs
from salcl_jax.data import workers

QUICK = {"seconds": 0.02, "rounds": 2}


@pytest.fixture
def config(tmp_path):
    """Twelve photos of noise."""
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(tmp_path / f"{i}.jpg")
    c = config_lib.base()
    c.batch_size, c.data.canvas, c.data.prefetch = 8, 32, 2
    c.data.train.kind, c.data.train.roots = "folder", (str(tmp_path),)
    return c


@pytest.fixture
def threads_only(monkeypatch):
    monkeypatch.setattr(workers, "has_tensorflow", lambda: False)


def spans(report) -> list[dict]:
    """All {median, min, max} in a report."""
    if isinstance(report, dict) and set(report) == {"median", "min", "max"}:
        return [report]
    return [s for value in report.values() for s in spans(value)] if isinstance(report, dict) else []


def test_the_report_is_complete_and_agrees_with_itself(config):
    pytest.importorskip("tensorflow")
    report = inputs.run(config, **QUICK, rates={"slow": 100.0, "fast": 1000.0})
    assert json.loads(json.dumps(report))["bare"] == report["bare"]
    assert report["photos"] == 12 and report["measured"] % 8 == 0 and report["default"] == "tf.data"
    most = min(2, len(cores.available()))
    assert set(report["backends"]) == {"threads", "tf.data"}
    for backend in report["backends"].values():
        assert set(backend) == {str(n) for n in range(1, most + 1)}
    assert set(report["cache"]) == {"encoded", "canvas"} and len(spans(report)) >= 20
    for value in spans(report):
        assert all(map(math.isfinite, value.values()))
        assert value["min"] <= value["median"] <= value["max"]
    default = report["backends"]["tf.data"][str(most)]["images_per_s"]["median"]
    need = report["cores_per_chip"]
    assert need["slow"] == pytest.approx(100 * most / default)
    assert need["fast"] == pytest.approx(1000 * most / default)
    text = inputs.text(report)
    for name in ("threads", "tf.data"):
        for n in backend:
            median = report["backends"][name][n]["ratio"]["median"]
            assert re.search(rf"^{re.escape(name)} +{n} .*{median:.2f} \(", text, re.MULTILINE)
    assert f"{need['fast']:.1f} at fast" in text and "target 0.9" in text and "target 1.8" in text
    shown = text.replace(report["source"], "PHOTOS")  # whose path may be of any length
    assert max(map(len, shown.splitlines())) < 140


def test_parts_of_one_round_follow_from_each_other(config, threads_only):
    report = inputs.run(config, seconds=0.02, rounds=1)
    assert report["default"] == "threads"
    rows = report["backends"]["threads"]
    for row in rows.values():
        assert row["ratio"]["min"] == row["ratio"]["max"]
        rate, ratio = row["images_per_s"]["median"], row["ratio"]["median"]
        assert row["lost_s"]["median"] == pytest.approx(1000 / rate * (1 - ratio))
        assert row["had"]["median"] == pytest.approx(rate * row["cpu_ms"]["median"] / 1e3)
    if "2" in rows:
        both = [rows[n]["images_per_s"]["median"] for n in "12"]
        assert rows["2"]["scaling"]["median"] == pytest.approx(both[1] / both[0])
    assert rows["1"]["scaling"]["median"] == 1


def test_a_pipeline_of_known_speed_is_measured_right(config, threads_only, monkeypatch):
    """A clock of its own: 5 ms a photo bare, 10 ms on one core and 6.25 ms on two; 80 % of a core is had."""
    now, seen = [0.0], []

    def work(seconds: float) -> None:
        now[0] += seconds

    def train_batches(source, *, batch_size, workers, **settings):
        seen.append((workers, len(os.sched_getaffinity(0)), settings["cache"]))
        work(100.0)  # before the first batch: not measured
        while True:
            work(batch_size * {1: 0.01, 2: 0.00625}[workers])
            yield {}

    clock = types.SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: 0.8 * now[0])
    monkeypatch.setattr(inputs, "time", clock)
    monkeypatch.setattr(inputs.decode, "decode", lambda *_: work(0.004))
    monkeypatch.setattr(inputs.decode, "to_canvas", lambda *_: work(0.001))
    monkeypatch.setattr(inputs.pipeline, "train_batches", train_batches)
    report = inputs.run(config, seconds=0.4, rounds=2)
    assert report["measured"] == 80  # 0.4 s of the bare loop
    rows = report["backends"]["threads"]
    figures = {name: value["median"] for name, value in rows["1"].items()}
    ratios = {"ratio": 0.5, "cpu_ratio": 0.5, "scaling": 1}
    assert figures == pytest.approx({"images_per_s": 100, "cpu_ms": 8, "had": 0.8, "lost_s": 5} | ratios)
    assert report["cache"]["canvas"]["median"] == pytest.approx(0.5)
    if "2" in rows:
        figures = {name: rows["2"][name]["median"] for name in ("ratio", "scaling", "lost_s")}
        assert figures == pytest.approx({"ratio": 0.4, "scaling": 1.6, "lost_s": 3.75})
        assert report["cores_per_chip"]["1000/s"] == pytest.approx(12.5)  # 160 images/s on two cores
    assert all(workers == available for workers, available, _ in seen)
    assert {cache for *_, cache in seen} == {"none", "encoded", "canvas"}
    text = inputs.text(report)
    assert "target 0.9 of the bare loop per core: missed (0.50)" in text
    assert "2" not in rows or "target 1.8 from one core to two: open (1.60)" in text
    assert "other programs ran too: the bare loop had 0.80 of its core" in text


def test_bare_loop_and_pipeline_meet_the_same_files_in_the_same_order(config, threads_only, monkeypatch):
    asked, real = {}, inputs.open_source

    def open_source(spec):
        source = real(spec)

        def read(i):
            asked.setdefault(threading.current_thread() is threading.main_thread(), []).append(i)
            return source.read(i)

        return inputs.dataclasses.replace(source, read=read)

    monkeypatch.setattr(inputs, "open_source", open_source)
    report = inputs.run(config, seconds=1e-4, rounds=1, cores=(1,))
    n = report["measured"]
    assert sorted(set(asked[True])) == sorted(set(asked[False])) == sorted({i * 12 // n for i in range(n)})
    warm = 2 * 8  # photos that the pipeline takes before its clock starts
    assert asked[True][-n:] == asked[False][warm : warm + n]


@pytest.mark.parametrize("fails", [False, True])
def test_cores_are_given_back(config, threads_only, monkeypatch, fails):
    before, seen = os.sched_getaffinity(0), []
    done, other = threading.Event(), []

    def live():
        other.append(threading.get_native_id())
        done.wait(60)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        def broken(*args, **settings):
            seen.append((os.sched_getaffinity(0), os.sched_getaffinity(other[0])))
            raise ValueError("disk on fire")

        if fails:
            monkeypatch.setattr(inputs.pipeline, "train_batches", broken)
            with pytest.raises(ValueError, match="disk on fire"):
                inputs.run(config, **QUICK)
            assert seen == [({cores.available()[0]}, {cores.available()[0]})]
        else:
            inputs.run(config, seconds=0.01, rounds=1)
        assert os.sched_getaffinity(0) == os.sched_getaffinity(other[0]) == before
    finally:
        done.set()
        thread.join()


def test_a_thread_started_inside_is_freed_on_leaving():
    before, first = os.sched_getaffinity(0), cores.available()[0]
    done, found = threading.Event(), []
    with cores.only([first]):
        thread = threading.Thread(target=lambda: (found.append(threading.get_native_id()), done.wait(60)))
        thread.start()
        while not found:
            time.sleep(0.001)
        assert os.sched_getaffinity(found[0]) == {first}
    assert os.sched_getaffinity(found[0]) == before
    done.set()
    thread.join()


def test_windows_that_differ_leave_out_the_cache_of_canvases(config, threads_only):
    config.data.window_area = (0.3, 0.8)
    report = inputs.run(config, seconds=0.01, rounds=1, cores=(1,))
    assert set(report["cache"]) == {"encoded"} and set(report["backends"]["threads"]) == {"1"}
    assert "one core to two" not in inputs.text(report)


def test_broken_photos_and_scenes_are_measured_too(config, threads_only, tmp_path):
    (tmp_path / "3.jpg").write_bytes(b"rubbish")
    assert inputs.run(config, seconds=0.01, rounds=1, cores=(1,))["photos"] == 12
    config.data.train = config_lib.source("scenes")
    config.data.train.scenes.num_train = 4
    config.data.train.data_dir = str(tmp_path / "tfds")
    report = inputs.run(config, seconds=0.01, rounds=1, cores=(1,))
    assert report["photos"] == 4 and "scenes" in report["source"]


def test_a_source_that_is_not_there_is_one_line(config, tmp_path):
    config.data.train.roots = (str(tmp_path / "none"),)
    with pytest.raises(FileNotFoundError, match="no such folder; check data.roots") as caught:
        inputs.run(config)
    assert "\n" not in str(caught.value)
