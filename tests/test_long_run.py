"""Hours of training on real photos: memory, threads, files, compilations and speed stay as they were."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
MINUTES = float(os.environ.get("LONG_RUN_MINUTES", "120"))  # fewer show less: for trying the test itself
STEPS = int(170 * MINUTES)  # more than two cores do in that time; a faster machine ends earlier
EVERY = 5.0  # seconds between looks at the process
WARM, WINDOW = 0.1, 0.1  # shares of the time: left out at the start, compared behind that and at the end
ALONE = 0.8  # share of the time after which a fresh run of the same command trains by turns with the old one
TURN = 5  # training lines a turn; the first spans the other's turn and does not count
FIELDS = {
    "total_steps": STEPS, "total_epochs": 0, "checkpoint.every": 1 / 200, "eval.every": 1 / 40,
    "log.panels": 1 / 40, "log.every": 10, "eval.limit": 512, "data.workers": 2,
}  # fmt: skip


def pace() -> float:
    """CPU seconds of a fixed computation: what of a change in images/s may be the machine's."""
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


def rates(workdir: Path, start: int = 0) -> list[float]:
    """Images/s in the training lines of metrics.jsonl behind byte `start`."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    with open(path, "rb") as file:
        file.seek(start)
        lines = [json.loads(line) for line in file.read().split(b"\n")[:-1]]
    return [line["train/images_per_second"] for line in lines if "train/loss" in line]


def turn(process: subprocess.Popen, workdir: Path, lines: int = TURN, patience: float = 600.0) -> list[float]:
    """Images/s in the next lines of a stopped process, which is stopped again; without the first line."""
    start, until = (workdir / "metrics.jsonl").stat().st_size, time.monotonic() + patience
    process.send_signal(signal.SIGCONT)
    while len(found := rates(workdir, start)) < lines:
        assert process.poll() is None and time.monotonic() < until, f"no {lines} lines in {workdir}"
        time.sleep(0.2)
    process.send_signal(signal.SIGSTOP)
    return found[1:]


def by_turns(old: tuple, fresh: tuple, until: float, after: Callable = lambda: None) -> list[list[float]]:
    """Median images/s of two stopped processes, (process, workdir) each, in each pair of turns till `until`.

    One trains while the other is stopped, so the machine's speed is the same for both; who begins alternates.
    """
    pairs = []
    while time.monotonic() < until or len(pairs) < 2:
        order = (old, fresh) if len(pairs) % 2 == 0 else (fresh, old)
        found = [float(np.median(turn(*run))) for run in order]
        pairs.append(found if order[0] is old else found[::-1])
        after()
    return pairs


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


def figures(looks: list[dict], lines: list[dict], alone: int, pairs: list) -> dict:
    """What the promises are about, from looks at the process, the lines of metrics.jsonl and pairs of turns.

    `alone`: training lines before the turns began; images/s are compared among those.
    """
    trained = [line for line in lines if "train/loss" in line]
    compiled = [line["train/compiled"] for line in trained[int(WARM * len(trained)) :]]
    ratios = [old / fresh for old, fresh in pairs]
    speed, pace = growth(trained[:alone], "train/images_per_second"), growth(looks, "pace")
    return {
        "memory": growth(looks, "memory"),
        "images_per_second": speed, "pace": pace, "beside": speed * pace,
        "fresh": float(np.median(ratios)), "quartiles": [float(np.quantile(ratios, q)) for q in (0.25, 0.75)],
        "pairs": len(pairs),
        "compiled": sum(compiled), "evaluations": sum("eval/pretext/loss" in line for line in lines),
        "threads": [usual(w) for w in windows(looks, "threads")],
        "files": [usual(w) for w in windows(looks, "files")],
    }  # fmt: skip


def check(found: dict) -> None:
    """The promises; speed counts beside the fixed computation and beside a run that has just begun."""
    assert found["evaluations"] >= 4 and found["compiled"] == 0, found
    assert found["memory"] <= 1.02, found
    assert found["beside"] >= 0.97 and found["fresh"] >= 0.97, found
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


def begin(workdir: Path, photos: Path) -> subprocess.Popen:
    """The program, its messages in WORKDIR.txt."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    with open(f"{workdir}.txt", "w") as log:
        return subprocess.Popen(command(workdir, photos), cwd=ROOT, env=env, stdout=log, stderr=log)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(60 * MINUTES + 1800)
def test_hours_change_nothing(tmp_path, photos, fault_table):
    workdir, newer, looks = tmp_path / "run", tmp_path / "fresh", []
    began, process, fresh = time.monotonic(), begin(workdir, photos), None

    def observe():
        if (workdir / "checkpoints").exists():
            looks.extend(look(process.pid))

    try:
        while process.poll() is None and time.monotonic() - began < ALONE * 60 * MINUTES:
            time.sleep(EVERY)
            observe()
        process.send_signal(signal.SIGSTOP)
        alone, fresh = len(rates(workdir)), begin(newer, photos)
        while len(rates(newer)) < 2 * TURN:  # its own start and first compilations
            assert fresh.poll() is None, Path(f"{newer}.txt").read_text()[-2000:]
            time.sleep(EVERY)
        fresh.send_signal(signal.SIGSTOP)
        pairs = by_turns((process, workdir), (fresh, newer), began + 60 * MINUTES, observe)
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=600)
    finally:
        for each in filter(None, (process, fresh)):
            each.kill()
    (tmp_path / "looks.json").write_text(json.dumps({"looks": looks, "pairs": pairs, "alone": alone}))
    assert code in (0, 75), Path(f"{workdir}.txt").read_text()[-2000:]
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = figures(looks, lines, alone, pairs)
    (tmp_path / "found.json").write_text(json.dumps(found, indent=1))
    print(found)
    check(found)
    minutes, step = (time.monotonic() - began) / 60, lines[-1]["step"]
    happened = (
        f"memory x {found['memory']:.3f}, images/s x {found['fresh']:.3f} of a run just begun "
        f"({len(pairs)} turns each), x {found['images_per_second']:.3f} of its own start (a fixed "
        f"computation: time x {found['pace']:.3f}), nothing compiled again"
    )
    fault_table(fault=f"{minutes:.0f} minutes, {step} steps", happened=happened, lost_steps=0, exit_code=code)


def recorded(**changes):
    """A thousand looks and lines of a run where nothing changes, but what is named: its value at the end."""
    start = {"memory": 100.0, "threads": 20, "files": 5, "pace": 1.0}
    line = {"train/loss": 1.0, "train/compiled": 0}
    looks = [start | {k: v for k, v in changes.items() if k in start and i > 800} for i in range(1000)]
    speeds = [changes.get("speed", 90.0) if i > 800 else 90.0 for i in range(1000)]
    lines = [line | {"step": i, "train/images_per_second": x} for i, x in enumerate(speeds)]
    lines += [line | {"step": 1000, "train/images_per_second": 1.0}] * 200  # across the other's turns
    lines += [{"step": i, "eval/pretext/loss": 1.0} for i in range(4)]
    pairs = [[changes.get("speed", 90.0), changes.get("fresh", 90.0)]] * 9 + [[90.0, 20.0]]
    return looks, lines, 1000, pairs


@pytest.mark.parametrize("changes", [{}, {"memory": 101.0}, {"speed": 80.0, "pace": 1.15, "fresh": 81.0}])
def test_what_keeps_the_promises(changes):
    check(figures(*recorded(**changes)))


@pytest.mark.parametrize("changes", [
    {"memory": 103.0}, {"pace": 0.9}, {"threads": 21}, {"files": 6},
    {"speed": 80.0, "fresh": 80.0}, {"speed": 80.0, "pace": 1.15},
])  # fmt: skip
def test_what_breaks_them(changes):
    with pytest.raises(AssertionError):
        check(figures(*recorded(**changes)))


def test_images_per_second_are_those_before_the_turns():
    assert figures(*recorded(speed=45.0))["images_per_second"] == pytest.approx(0.5)
    assert figures(*recorded(pace=1.5))["beside"] == pytest.approx(1.5)


def test_of_two_runs_by_turns_each_is_timed_while_it_runs(tmp_path):
    program = """if True:
        import json, sys, time
        began = time.monotonic()
        with open(sys.argv[1] + "/metrics.jsonl", "w", buffering=1) as file:
            while True:
                time.sleep(float(sys.argv[2]))
                now = time.monotonic()
                print(json.dumps({"train/loss": 0, "train/images_per_second": 1 / (now - began)}), file=file)
                began = now
    """
    runs = []
    for name, seconds in (("old", "0.1"), ("fresh", "0.05")):
        (tmp_path / name).mkdir()
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / name), seconds])
        runs.append((process, tmp_path / name))
    try:
        for process, workdir in runs:
            while not rates(workdir):
                time.sleep(0.05)
            process.send_signal(signal.SIGSTOP)
        pairs = by_turns(*runs, until=time.monotonic() + 3)
        lengths = [len(rates(workdir)) for _, workdir in runs]
        time.sleep(0.5)
        assert lengths == [len(rates(workdir)) for _, workdir in runs]  # both are stopped
        assert (
            8 < np.median([old for old, _ in pairs]) < 10.1
            and 15 < np.median([new for _, new in pairs]) < 20.1
        )
    finally:
        for process, _ in runs:
            process.kill()


def test_growth_compares_behind_the_warm_up_with_the_end():
    rows = [{"memory": 1e9}] * 10 + [{"memory": 100.0}] * 80 + [{"memory": 103.0}] * 10
    assert growth(rows, "memory") == pytest.approx(1.03)
    (now,) = look(os.getpid())
    assert now["memory"] > 1e7 and now["files"] >= 3
