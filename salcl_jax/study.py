"""Run a study: `python -m salcl_jax.study --study=configs/studies/NAME.py --workdir=DIR [--jobs=2]`.

Trains and judges every run of the grid that the workdir does not hold yet, each in a process of its own,
and writes results.csv, report.md and plots after each. The same command continues after an interruption.
Exit codes: 0 done, 2 something to mend in the command or the study, 70 some runs failed (the others are
done; the report names them), 75 told to terminate (start again to continue).
"""

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import app, flags

from salcl_jax import cli, peers, study_plan, study_report
from salcl_jax.config import ConfigError

_STUDY = flags.DEFINE_string("study", None, "study file[:variant], see configs/studies")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the runs; studies that share one share equal runs")
_JOBS = flags.DEFINE_integer("jobs", 1, "runs at a time; CPU cores are divided among them", lower_bound=1)
_REPORT = flags.DEFINE_bool("report_only", False, "run nothing: only write the report of what is there")
_CORES = flags.DEFINE_list("cores", [], "with --run: CPU cores that this process may use")
_RUN = flags.DEFINE_string("run", None, "train and judge this run only, ROW-SEED, in this process")

FAILED = 70


def main(_: list[str]) -> None:
    """Run the study that the flags describe."""
    try:
        study = study_plan.load(_STUDY.value)
        if not _RUN.value:
            _leave_the_accelerator()
        if _RUN.value:
            run = {one.name: one for one in study_plan.runs(study)}.get(_RUN.value)
            if run is None:
                raise ConfigError(f"--run={_RUN.value}: no such run; they are named ROW-SEED")
            if _CORES.value:
                os.sched_setaffinity(0, map(int, _CORES.value))
            _keep_the_cpu()
            cli.start("none")
            sys.exit(_run_here(study, run, Path(_WORKDIR.value)))
        code = 0 if _REPORT.value else _run_all(study, Path(_WORKDIR.value))
        rows = finished(study, Path(_WORKDIR.value))
        if rows:
            print(study_report.write(study, rows, _out(), _command()), flush=True)
    except (ConfigError, OSError) as error:
        cli.leave(str(error))
    sys.exit(code)


def _leave_the_accelerator() -> None:
    """This process only counts operations and starts others: their device is not touched."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def _keep_the_cpu() -> None:
    """Operations are counted for a CPU, also where JAX_PLATFORMS names an accelerator alone."""
    import jax

    named = jax.config.jax_platforms
    if named and "cpu" not in named.split(","):
        jax.config.update("jax_platforms", f"{named},cpu")


def folder(workdir: Path, run: study_plan.Run, config: Any) -> Path:
    """Folder of a run: an older one that learnt the same, else one of this name."""
    name = study_plan.digest(config)
    return next(iter(sorted((workdir / "runs").glob(f"*-{name}"))), workdir / "runs" / f"{run.name}-{name}")


def judgement(study: study_plan.Study, place: Path) -> Path:
    """Folder of a run's evaluation, and with .json its row: studies that judge differently have their own."""
    return place / f"judged-{study_plan.judge_digest(study)}"


def finished(study: study_plan.Study, workdir: Path) -> list[dict]:
    """Rows of the runs that are trained and judged, in the order of the grid."""
    rows, flops = [], Flops(workdir)
    for run in study_plan.runs(study):
        place = folder(workdir, run, study_plan.configuration(study, run, flops))
        with contextlib.suppress(OSError, ValueError):
            row = json.loads(judgement(study, place).with_suffix(".json").read_text())
            rows.append(row | {"row": run.row, "seed": run.seed, "folder": str(place)})
    return rows


class Flops:
    """Operations of a configuration's step, counted once and kept in the workdir."""

    def __init__(self, workdir: Path):
        self.path = workdir / "flops.json"

    def __call__(self, config: Any) -> float:
        name = study_plan.digest(config)
        known = json.loads(self.path.read_text()) if self.path.exists() else {}
        if name not in known:
            from salcl_jax import aot

            known[name] = aot.flops_of_step(config)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _write(self.path, known)
        return known[name]


def _run_here(study: study_plan.Study, run: study_plan.Run, workdir: Path) -> int:
    """Train and judge one run; returns the exit code."""
    import jax

    from salcl_jax import evaluate, train
    from salcl_jax.data import sources

    flops = Flops(workdir)
    config = study_plan.configuration(study, run, flops)
    place = folder(workdir, run, config)
    try:
        flops_per_step = flops(config)
        photos = sources.open_source(config.data.train.to_dict()).digest()
        summary = train.train(config, str(place))
        began = time.monotonic()
        judge = study.judge()
        judge.seed = run.seed
        base = study_plan.configuration(study, study_plan.Run(study.baseline, run.seed))
        if study_plan.digest(config) != study_plan.digest(base):
            judge.tasks.baselines = ()  # the table has one untrained network a seed
        held = dict.fromkeys(study_plan.held(study, config))
        results = evaluate.evaluate(judge, str(place), list(study.tasks), str(judgement(study, place)), held)
    except train.Stopped as stop:
        cli.say(f"stopped: {stop}")
        return stop.code
    except (ConfigError, ValueError, OSError, RuntimeError) as error:
        cli.say(f"error: {' '.join(str(error).split())}")
        return FAILED
    figures = {subject: {} for subject in ("trained", "untrained")}
    for subject, found in figures.items():
        for rows in results.values():
            found |= rows.get(subject, {})
    _write(judgement(study, place).with_suffix(".json"), {
        "config": study_plan.digest(config), "judge": study_plan.judge_digest(study),
        "steps": summary["steps"], "images": summary["images"], "flops_per_step": flops_per_step,
        "train_seconds": round(summary["seconds"], 1), "judge_seconds": round(time.monotonic() - began, 1),
        "devices": summary["devices"], "host": platform.node(), "jax": jax.__version__, "photos": photos,
        "figures": figures["trained"], "untrained": figures["untrained"],
        "online": summary["final"],
    })  # fmt: skip
    return 0


def _run_all(study: study_plan.Study, workdir: Path) -> int:
    """Run what is missing, some at a time; returns the exit code."""
    (workdir / "runs").mkdir(parents=True, exist_ok=True)
    flops = Flops(workdir)
    grid = study_plan.runs(study)
    rows = finished(study, workdir)
    done = {(row["row"], row["seed"]) for row in rows}
    _look_for_other_photos(study, rows, flops)
    waiting, seen = [], set()
    for run in grid:
        name = study_plan.digest(study_plan.configuration(study, run, flops))
        if tuple(run) not in done and name not in seen:  # equal configurations are trained once
            waiting.append(run)
        seen.add(name)
    cli.say(f"{len(grid)} runs, {len(waiting)} to do")
    failed, stopped = [], False
    with _pool(workdir) as (start, ended, told):
        while waiting or ended.running:
            while waiting and not told() and len(ended.running) < _JOBS.value:
                start(waiting.pop(0))
            if told():
                waiting.clear()
            for run, code in ended():
                how = "done" if code == 0 else f"ended with {code}, see logs/{run.name}.txt"
                cli.say(f"{run.name}: {how}")
                failed += [run] if code not in (0, peers.AGAIN) else []
                stopped |= code == peers.AGAIN
                if code == 0:
                    study_report.write(study, finished(study, workdir), _out(), _command())
            time.sleep(0.2)
        stopped |= told()
    return peers.AGAIN if stopped else FAILED if failed else 0


def _look_for_other_photos(study: study_plan.Study, rows: list[dict], flops: Flops) -> None:
    """Say which finished runs learnt from photos that are not those of today: names of files do not tell."""
    from salcl_jax.data import sources

    today, told = {}, set()  # rows that learn the same share a folder
    for row in rows:
        if not row.get("photos") or row["folder"] in told:
            continue
        told.add(row["folder"])
        source = study_plan.configuration(study, study_plan.Run(row["row"], row["seed"]), flops).data.train
        name = source.to_json(sort_keys=True)
        if name not in today:
            with contextlib.suppress(OSError, ValueError, ImportError):  # not here: nothing to compare
                today[name] = sources.open_source(source.to_dict()).digest()
        if row["photos"] != today.get(name, row["photos"]):
            cli.say(f"{row['row']}-{row['seed']}: the photos have changed since; to train on those of today, "
                    f"delete {row['folder']}")  # fmt: skip


class _Ended:
    """Runs in progress; calling it gives those that have ended since, with their exit codes."""

    def __init__(self):
        self.running: dict[study_plan.Run, tuple[subprocess.Popen, int]] = {}

    def __call__(self) -> Iterator[tuple[study_plan.Run, int]]:
        for run, (process, _) in list(self.running.items()):
            if (code := process.poll()) is not None:
                del self.running[run]
                yield run, code


@contextlib.contextmanager
def _pool(workdir: Path) -> Iterator[tuple]:
    """Functions start(run), ended() and told(); being told to terminate is passed on to the runs."""
    ended, signals = _Ended(), []

    def start(run: study_plan.Run) -> None:
        slot = min(set(range(_JOBS.value)) - {slot for _, slot in ended.running.values()})
        command = [sys.executable, "-m", "salcl_jax.study", f"--study={_STUDY.value}",
                   f"--workdir={workdir}", f"--run={run.name}", f"--cores={_cores(slot)}"]  # fmt: skip
        logs = workdir / "logs"
        logs.mkdir(exist_ok=True)
        with open(logs / f"{run.name}.txt", "a", encoding="utf-8") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=_environment(), start_new_session=True
            )
        ended.running[run] = process, slot
        if signals:  # told while it was being started
            process.terminate()

    def tell(number: int, frame: Any) -> None:
        signals.append(number)
        for process, _ in ended.running.values():
            process.terminate()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup: a closed terminal does not matter
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, tell) for number in numbers}
    try:
        yield start, ended, lambda: bool(signals)
    finally:
        for process, _ in ended.running.values():  # after an error here: nobody would wait for them
            process.terminate()
        for number, handler in before.items():
            signal.signal(number, handler)


def _environment() -> dict[str, str]:
    """Several runs on one accelerator must not each take all of its memory."""
    shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if _JOBS.value > 1 else {}
    return {**shared, **os.environ}


def _cores(slot: int) -> str:
    """The share of the cores that a run gets, where this system can say so."""
    if not hasattr(os, "sched_setaffinity") or _JOBS.value == 1:
        return ""
    cores = sorted(os.sched_getaffinity(0))
    return ",".join(map(str, cores[slot :: _JOBS.value] or [cores[slot % len(cores)]]))


def _out() -> Path:
    """Folder of the report: named after the study, in the workdir."""
    file, _, variant = _STUDY.value.partition(":")
    return Path(_WORKDIR.value) / "-".join(filter(None, (Path(file).stem, variant)))


def _command() -> str:
    return f"python -m salcl_jax.study --study={_STUDY.value} --workdir=DIR --jobs={_JOBS.value}"


def _write(path: Path, value: Any) -> None:
    """Replace a JSON file whole."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(value, indent=2, default=float) + "\n", encoding="utf-8")
    part.replace(path)


def _check(rest: list[str]) -> None:
    cli.nothing_else(rest)
    if "://" in _WORKDIR.value:
        raise flags.Error(f"--workdir={_WORKDIR.value}: a study writes to a disk; give a folder")
    cli.writable("workdir", _WORKDIR.value)


if __name__ == "__main__":
    app.run(main, flags_parser=cli.plain_parser(("study", "workdir"), _check))
