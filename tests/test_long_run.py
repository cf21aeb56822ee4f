"""Hours of training on real photos: memory, threads, files, compilations and speed stay as they were."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
MINUTES = float(os.environ.get("LONG_RUN_MINUTES", "120"))  # fewer show less: for trying the test itself
STEPS = int(170 * MINUTES)  # more than two cores do in that time; a faster machine ends earlier
EVERY = 5.0  # seconds between looks at the process
WARM, WINDOW = 0.1, 0.1  # shares of the time: left out at the start, compared behind that and at the end
FIELDS = {
    "total_steps": STEPS, "total_epochs": 0, "checkpoint.every": 1 / 200, "eval.every": 1 / 40,
    "log.panels": 1 / 40, "log.every": 20, "eval.limit": 512, "data.workers": 2,
}  # fmt: skip


def pace() -> float:
    """CPU seconds of a fixed computation: neighbours on the machine slow it as they slow the run."""
    began, a = time.process_time(), np.linspace(-1, 1, 2**20, dtype=np.float32)
    for _ in range(8):
        a = np.tanh(a) + np.sqrt(np.abs(a))
    return time.process_time() - began


def look(pid: int) -> list[dict[str, float]]:
    """Resident memory in bytes, threads and open files of a process, `pace`; nothing when it has ended."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    if "VmRSS" not in lines:
        return []
    memory, files = 1024.0 * int(lines["VmRSS"].split()[0]), len(os.listdir(f"/proc/{pid}/fd"))
    return [{"memory": memory, "threads": int(lines["Threads"]), "files": files, "pace": pace()}]


def windows(rows: list, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Values in the window behind the warm-up and in the last one."""
    values = np.array([row[key] for row in rows])
    first, length = int(WARM * len(values)), max(1, int(WINDOW * len(values)))
    return values[first : first + length], values[-length:]


def growth(rows: list, key: str) -> float:
    """Median of the last window over that of the first."""
    first, last = windows(rows, key)
    return float(np.median(last) / np.median(first))


def usual(values: np.ndarray) -> list[float]:
    """Median and 90 % quantile: a save has threads and files of its own, in one look of thirty."""
    return [float(np.quantile(values, q)) for q in (0.5, 0.9)]


def figures(looks: list[dict], lines: list[dict]) -> dict:
    """What the promises are about, from looks at the process and the lines of metrics.jsonl."""
    trained = [line for line in lines if "train/loss" in line]
    compiled = [line["train/compiled"] for line in trained[int(WARM * len(trained)) :]]
    speed = growth(trained, "train/images_per_second")
    return {
        "memory": growth(looks, "memory"),
        "images_per_second": speed, "beside": speed * growth(looks, "pace"),
        "compiled": sum(compiled), "evaluations": sum("eval/pretext/loss" in line for line in lines),
        "threads": [usual(w) for w in windows(looks, "threads")],
        "files": [usual(w) for w in windows(looks, "files")],
    }  # fmt: skip


def check(found: dict) -> None:
    """The promises; speed counts beside the fixed computation."""
    assert found["evaluations"] >= 4 and found["compiled"] == 0, found
    assert found["memory"] <= 1.02, found
    assert found["beside"] >= 0.97, found
    for name in ("threads", "files"):
        first, last = found[name]
        assert all(after <= before for before, after in zip(first, last, strict=True)), found


def command(workdir: Path, photos: Path) -> list[str]:
    scenes, objects = [f"{photos}/{name}_scenes" for name in ("coco", "voc")], f"{photos}/imagenette"
    boxes = {split: [f"{folder}/annotations_{split}.json" for folder in scenes] for split in ("train", "val")}
    labelled = {"kind": "folder", "roots": (f"{objects}/images",), "labels": f"{objects}/labels.csv"}
    sources = {
        "data.train": {
            "roots": tuple(f"{folder}/images" for folder in scenes), "annotations": ",".join(boxes["train"]),
        },
        "eval.localization": {
            "kind": "folder", "roots": (f"{scenes[0]}/images",), "annotations": boxes["val"][0],
        },
        "eval.probe_train": labelled | {"split": "train"},
        "eval.probe_test": labelled | {"split": "val"},
    }  # fmt: skip
    fields = FIELDS | {f"{name}.{field}": v for name, given in sources.items() for field, v in given.items()}
    program = [sys.executable, "-m", "salcl_jax.main", "--config=configs/folder.py", f"--workdir={workdir}"]
    return program + [f"--config.{name}={value}" for name, value in fields.items()]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(60 * MINUTES + 900)
def test_hours_change_nothing(tmp_path, photos, fault_table):
    workdir, looks = tmp_path / "run", []
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    with open(tmp_path / "log.txt", "w") as log:
        process = subprocess.Popen(command(workdir, photos), cwd=ROOT, env=env, stdout=log, stderr=log)
        began = time.monotonic()
        try:
            while process.poll() is None and time.monotonic() - began < 60 * MINUTES:
                time.sleep(EVERY)
                if (workdir / "checkpoints").exists():
                    looks += look(process.pid)
            process.send_signal(signal.SIGTERM)
            code = process.wait(timeout=600)
        finally:
            process.kill()
    (tmp_path / "looks.json").write_text(json.dumps(looks))
    assert code in (0, 75), (tmp_path / "log.txt").read_text()[-2000:]
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = figures(looks, lines)
    (tmp_path / "found.json").write_text(json.dumps(found, indent=1))
    print(found)
    check(found)
    minutes, step = (time.monotonic() - began) / 60, lines[-1]["step"]
    happened = (
        f"memory x {found['memory']:.3f}, images/s x {found['images_per_second']:.3f} "
        f"({found['beside']:.3f} beside a fixed computation), nothing compiled again"
    )
    fault_table(fault=f"{minutes:.0f} minutes, {step} steps", happened=happened, lost_steps=0, exit_code=code)


def recorded(**changes):
    """A thousand looks and lines of a run where nothing changes, but what is named: its value at the end."""
    start = {"memory": 100.0, "threads": 20, "files": 5, "pace": 1.0}
    line = {"train/loss": 1.0, "train/compiled": 0}
    looks = [start | {k: v for k, v in changes.items() if k in start and i > 800} for i in range(1000)]
    speeds = [changes.get("speed", 90.0) if i > 800 else 90.0 for i in range(1000)]
    lines = [line | {"step": i, "train/images_per_second": x} for i, x in enumerate(speeds)]
    return looks, lines + [{"step": i, "eval/pretext/loss": 1.0} for i in range(4)]


@pytest.mark.parametrize("changes", [{}, {"memory": 101.0}, {"speed": 80.0, "pace": 1.15}])
def test_what_keeps_the_promises(changes):
    check(figures(*recorded(**changes)))


@pytest.mark.parametrize(
    "changes",
    [{"memory": 103.0}, {"speed": 80.0}, {"pace": 0.9}, {"threads": 21}, {"files": 6}],
)
def test_what_breaks_them(changes):
    with pytest.raises(AssertionError):
        check(figures(*recorded(**changes)))


def test_growth_compares_behind_the_warm_up_with_the_end():
    rows = [{"memory": 1e9}] * 10 + [{"memory": 100.0}] * 80 + [{"memory": 103.0}] * 10
    assert growth(rows, "memory") == pytest.approx(1.03)
    (now,) = look(os.getpid())
    assert now["memory"] > 1e7 and now["files"] >= 3
