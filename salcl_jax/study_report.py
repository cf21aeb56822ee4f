"""What a study found: results.csv, a table in Markdown, plots; means and errors over seeds.

rows: [{row, seed, steps, images, flops_per_step, figures: {name: value}, ...}], one a run.
"""

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from salcl_jax import report_figures


class Mean(NamedTuple):
    """Mean and its standard error over n seeds; the error is NaN for one."""

    mean: float
    error: float
    n: int


def mean_of(values: Iterable[float]) -> Mean:
    """Mean and standard error: the sample's standard deviation (n - 1) over the root of n."""
    values = np.array(list(values), np.float64)
    n = len(values)
    error = float(np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    return Mean(float(np.mean(values)) if n else math.nan, error, n)


def paired(rows: Sequence[Mapping], row: str, baseline: str, figure: str) -> Mean:
    """Difference of a row to the baseline of the same seed, over the seeds that both have."""
    by = {(r["row"], r["seed"]): r["figures"].get(figure, math.nan) for r in rows}
    seeds = sorted({seed for name, seed in by if name == row} & {s for name, s in by if name == baseline})
    return mean_of([by[row, seed] - by[baseline, seed] for seed in seeds])


def write(study: Any, rows: list[dict], out: Path, command: str) -> str:
    """Write everything into the folder `out`; returns the table."""
    out.mkdir(parents=True, exist_ok=True)
    _csv(rows, out / "results.csv")
    text = table(study, rows)
    devices = ", ".join(sorted({row["devices"] for row in rows}))
    lines = [f"# {study.question}", "", text, "", *_notes(study, rows), "", f"Hardware: {devices}.", "",
             "```", command, "```", ""]  # fmt: skip
    (out / "report.md").write_text("\n".join(lines), encoding="utf-8")
    for name, figure in _plots(study, rows).items():
        figure.savefig(out / f"{name}.png", dpi=120)
    return f"{text}\n\n{out / 'report.md'}"


def _csv(rows: list[dict], path: Path) -> None:
    """One line a run: what it was, what it cost, all figures."""
    plain = ("row", "seed", "config", "judge", "steps", "images", "flops_per_step", "train_seconds",
             "judge_seconds", "devices", "host", "jax", "photos")  # fmt: skip
    names = sorted({name for row in rows for name in row["figures"]})
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*plain, *names])
        for row in rows:
            values = {**{name: row.get(name, "") for name in plain}, **row["figures"]}
            writer.writerow([values.get(name, "") for name in (*plain, *names)])


def table(study: Any, rows: list[dict]) -> str:
    """Markdown: a line a row of the grid; mean and standard error in points, difference to the baseline."""
    names = [name for name in (*study.rows, *study.matched) if any(r["row"] == name for r in rows)]
    base = [r for r in rows if r["row"] == study.baseline]
    head = ["", "seeds", "steps", "FLOPs", *study.figures.values()]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    once = {r["seed"]: r for r in rows if r["untrained"]}  # judged beside what was the baseline then
    if once:
        cells = [_cell(mean_of(_values(once.values(), f, "untrained")), None) for f in study.figures]
        lines.append("| untrained | | | | " + " | ".join(cells) + " |")
    cost = _cost(base[0]) if base else math.nan
    for name in names:
        own = [r for r in rows if r["row"] == name]
        cells = []
        for figure in study.figures:
            change = paired(rows, name, study.baseline, figure) if name != study.baseline else None
            cells.append(_cell(mean_of(_values(own, figure)), change))
        first = [name, str(len(own)), f"{own[0]['steps']:,}", f"{_cost(own[0]) / cost:.2f}"]
        lines.append("| " + " | ".join(first + cells) + " |")
    return "\n".join(lines)


def _values(rows: Iterable[dict], figure: str, kind: str = "figures") -> list[float]:
    return [r[kind][figure] for r in rows if figure in r[kind]]


def _cost(row: Mapping) -> float:
    return row["steps"] * row["flops_per_step"]


def _cell(own: Mean, change: Mean | None) -> str:
    """'45.2 ± 0.4 (+1.1 ± 0.5)' in points; bold where the 95 % interval of the difference leaves out 0."""
    if not own.n:
        return ""
    text = f"{100 * own.mean:.1f}" + (f" ± {100 * own.error:.1f}" if own.n > 1 else "")
    if change is None or not change.n:
        return text
    differs = change.n > 1 and abs(change.mean) > _student(change.n) * change.error
    inner = f"{100 * change.mean:+.1f}" + (f" ± {100 * change.error:.1f}" if change.n > 1 else "")
    return f"{text} ({f'**{inner}**' if differs else inner})"


def _student(n: int) -> float:
    """Half width in standard errors of a mean's 95 % interval from n draws: 12.7 for two, 4.3 for three."""
    from scipy import stats  # late: it is slow to import

    return float(stats.t.ppf(0.975, n - 1))


def _notes(study: Any, rows: list[dict]) -> list[str]:
    hosts = sorted({row["host"] for row in rows if row.get("host")})
    mixed = f"- From {len(hosts)} machines ({', '.join(hosts)}): one seed gives other figures on each."
    return [
        f"Mean ± standard error over seeds; in brackets the difference to {study.baseline} of the same seed, "
        "bold where its 95 % interval (Student's t) leaves out 0. FLOPs: of the whole training, in those of "
        f"{study.baseline}.", *(f"- `{row}`: the fields of {own} with the operations of {other}"
                                for row, (own, other) in study.matched.items()),
        *([mixed] if len(hosts) > 1 else []),
    ]  # fmt: skip


def _plots(study: Any, rows: list[dict]) -> dict[str, Any]:
    """The study's curve over steps and over operations: mean of the seeds, one line a row."""
    curves = {}
    for name in (*study.rows, *study.matched):
        own = [(r, _curve(r, study.curve)) for r in rows if r["row"] == name]
        found = [curve for _, curve in own if curve]
        if found:
            steps = sorted(set.intersection(*(set(curve) for curve in found)))
            means = [mean_of([curve[step] for curve in found]) for step in steps]
            curves[name] = (np.array(steps), means, own[0][0]["flops_per_step"])
    if not curves:
        return {}
    return {
        f"over_{kind}": report_figures.study_curves(curves, kind, study.curve.removeprefix("eval/"))
        for kind in ("steps", "flops")
    }


def _curve(row: Mapping, name: str) -> dict[int, float]:
    """Step -> value of a figure that the run's metrics.jsonl holds."""
    path = Path(row["folder"]) / "metrics.jsonl"
    if not path.exists():
        return {}
    lines = map(json.loads, path.read_text().splitlines())
    return {line["step"]: line[name] for line in lines if line.get(name) is not None}
