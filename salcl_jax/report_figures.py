"""Plots of an evaluation. Each function returns a matplotlib Figure, or None where it has nothing to show.

rows: {'trained': figures, 'untrained': figures, ...} of one task, figures flat as 'task/name', shares in
0..1. matplotlib is imported late and without pyplot: no window, no state outside the figures.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Rows = Mapping[str, Mapping[str, float]]
TITLES = {
    "linear": "Linear probe", "knn": "Nearest neighbours", "semi": "Fine-tuning with few labels",
    "voc_svm": "Linear SVM per class", "multilabel": "Multi-label linear probe",
    "localization": "Localisation by saliency", "crops": "What pairs of crops show",
    "segmentation": "Segmentation by linear probe",
}  # fmt: skip
ROWS = ("trained", "untrained", "pixels")
# Okabe and Ito: told apart by most colour-blind eyes.
_COLOURS = {"trained": "#0072B2", "untrained": "#E69F00", "pixels": "#009E73"}
_MARKERS = {"trained": "o", "untrained": "s", "pixels": "^"}
_CYCLE = ("#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_INK, _GREY, _PALE = "#282828", "#767676", "#DDDDDD"
_PER_CLASS = {"ap": "average precision", "iou": "intersection over union"}
_LOW_SHOT = ((0, "low_shot", "-"), (1, "low_shot_best_on_test", "--"))
_REGION_SCORES = {"recall@0.5": "objects found (IoU >= 0.5), %", "coverage": "mean best IoU of objects, %"}
_RUN_SCORES = {"loss": "loss", "spread": "spread of projections (0: collapsed)"}
_CHANCE = (
    ("random", "random boxes", "--"),
    ("center", "one central box", "-."),
    ("whole", "whole image", ":"),
)


def figures(results: Mapping[str, Rows], network: str) -> dict[str, Any]:
    """All plots of the results of an evaluation, by the stem of their file's name."""
    found = {}
    for task, rows in results.items():
        found[f"{task}_classes"] = class_bars(task, rows, network)
        found[f"{task}_low_shot"] = low_shot_curve(task, rows, network)
    found["localization_regions"] = region_curves(results.get("localization", {}), network)
    return {stem: figure for stem, figure in found.items() if figure is not None}


def class_bars(task: str, rows: Rows, network: str) -> Any:
    """Horizontal bars of '<task>/ap/<class>' or '<task>/iou/<class>', trained beside untrained.

    The best class of the first of the two rows is on top; a class that is NaN in both is left out.
    """
    for kind, words in _PER_CLASS.items():
        values = {name: numbered(rows.get(name, {}), f"{task}/{kind}/", str) for name in ROWS[:2]}
        values = {name: found for name, found in values.items() if found}
        kept = {c for found in values.values() for c, value in found.items() if value == value}
        if kept:
            return _bars(kept, values, f"{_title(task)}: {words} per class", network, f"{words}, %")
    return None


def low_shot_curve(task: str, rows: Rows, network: str) -> Any:
    """'<task>/low_shot/<k>' over k for every row; 'low_shot_best_on_test' dashed."""
    figure, (axes,) = _figure(7.0, 4.2, 1)
    ticks, dashed = set(), False
    for name in _ordered(rows):
        for best, prefix, style in _LOW_SHOT:
            values = numbered(rows[name], f"{task}/{prefix}/", int)
            if any(value == value for value in values.values()):
                ticks |= values.keys()
                dashed |= bool(best)
                _line(axes, values, name, style, None if best else name)
    if not ticks:
        return None
    if dashed:
        axes.plot([], [], "--", color=_GREY, label="cost chosen on the test set")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ticks), [str(k) for k in sorted(ticks)])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("positive examples per class", color=_INK)
    axes.set_ylabel("mean average precision, %", color=_INK)
    return _finish(figure, f"{_title(task)}: few examples", network)


def region_curves(rows: Rows, network: str) -> Any:
    """Recall and coverage by the r best regions, r = 1 .. R, with what chance reaches."""
    figure, both = _figure(9.0, 4.0, 2)
    last = 0
    for axes, (score, words) in zip(both, _REGION_SCORES.items(), strict=True):
        for name in _ordered(rows):
            values = numbered(rows[name], f"localization/{score}/r", int)
            if any(value == value for value in values.values()):
                _line(axes, values, name, "-", name)
                last = max(last, *values)
        axes.set_ylabel(words, color=_INK)
        axes.set_xlabel("regions per image", color=_INK)
    if not last:
        return None
    ends = 0.8, last + 0.2
    for axes, score in zip(both, _REGION_SCORES, strict=True):
        for kind, label, style in _CHANCE:
            levels = chance_levels(rows, score, kind, last)
            x, y = list(levels), [100 * value for value in levels.values()]
            if len(set(y)) == 1:  # a level: across the panel, so that one region's shows as well
                x, y = list(ends), y[:1] * 2
            if y:
                axes.plot(x, y, style, color=_GREY, linewidth=1.4, label=label, zorder=1)
        axes.set_xticks(range(1, last + 1))
        axes.set_xlim(ends)
    return _finish(figure, f"{_title('localization')}: what the best regions find", network)


def chance_levels(rows: Rows, score: str, kind: str, last: int) -> dict[int, float]:
    """Chance of a score at r = 1 .. last from the first row that has it; the same at all r for one box."""
    for name in _ordered(rows):
        start = f"localization/chance/{score}_{kind}"
        values = numbered(rows[name], f"{start}/r", int)
        if not values and start in rows[name]:
            values = dict.fromkeys(range(1, last + 1), rows[name][start])
        if any(value == value for value in values.values()):
            return values
    return {}


def study_curves(curves: Mapping[str, tuple], kind: str, figure: str) -> Any:
    """A figure while training, over 'steps' or 'flops' (operations); one line a row of a study.

    curves: row -> (steps [n], n of (mean, standard error, seeds), operations of a step); errors are bands.
    """
    plot, (axes,) = _figure(7.5, 4.6, 1)
    for i, (name, (steps, means, flops)) in enumerate(curves.items()):
        x = steps if kind == "steps" else steps * flops / 1e12
        mean, error = (100 * np.array([m[k] for m in means]) for k in (0, 1))
        colour, style = _CYCLE[i % len(_CYCLE)], ("-", "--", ":")[i // len(_CYCLE) % 3]
        axes.plot(x, mean, style, color=colour, label=name, linewidth=1.6, marker="o", markersize=3)
        if np.isfinite(error).all():
            axes.fill_between(x, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("optimizer steps" if kind == "steps" else "operations of training, 1e12", color=_INK)
    axes.set_ylabel(f"{figure}, %", color=_INK)
    plot.legend(loc="outside right upper", frameon=False, fontsize=8)
    return plot


def run_curves(lines: Sequence[Mapping[str, Any]], total: int = 0) -> Any:
    """Loss and spread of a run over its steps, on training crops and on fixed ones.

    lines: those of metrics.jsonl, in order. total: steps the run will take; 0: those it has taken.
    """
    figure, both = _figure(9.0, 3.4, 2)
    done = lines[-1]["step"]
    for axes, name in zip(both, ("loss", "spread"), strict=True):
        for kind, label, style in (("train", "training crops", "-"), ("eval/pretext", "fixed crops", "o")):
            found = [(line["step"], line[f"{kind}/{name}"]) for line in lines if f"{kind}/{name}" in line]
            points = np.array(found, np.float64).reshape(-1, 2)  # null, where not finite, becomes NaN
            colour = _COLOURS["trained" if kind == "train" else "untrained"]
            axes.plot(*points.T, style, color=colour, label=label, markersize=5, clip_on=False, zorder=3)
        axes.set_xlim(0, max(total, done, 1))
        axes.set_xlabel("optimizer steps", color=_INK)
        axes.set_title(_RUN_SCORES[name], fontsize=10, color=_INK)
    both[1].set_ylim(0, 1.05)
    figure.suptitle(f"step {done:,}" + (f" of {total:,}" if total else ""), fontsize=11, color=_INK)
    handles, labels = both[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def numbered(figures: Mapping[str, float], prefix: str, kind: type) -> dict[Any, float]:
    """Figures '<prefix><x>' by x as an int, in order, or as a str; others are passed over."""
    found = {name[len(prefix) :]: value for name, value in figures.items() if name.startswith(prefix)}
    if kind is str:
        return found
    return {int(x): found[x] for x in sorted((x for x in found if x.isdecimal()), key=int)}


def pixels(figure: Any) -> np.ndarray:
    """A figure drawn by Agg: uint8 [h, w, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _bars(
    classes: set[str], values: dict[str, dict[str, float]], title: str, network: str, label: str
) -> Any:
    first = next(iter(values.values()))
    order = sorted(classes, key=lambda c: (-_known(first.get(c), -1.0), c))
    figure, (axes,) = _figure(7.5, 1.2 + 0.17 * len(order) * (len(values) + 0.4), 1)
    y, thick = np.arange(len(order)), 0.84 / len(values)
    highest = 1.0
    for i, (name, found) in enumerate(values.items()):
        widths = [100 * _known(found.get(c), float("nan")) for c in order]
        place = y + (i - (len(values) - 1) / 2) * thick
        bars = axes.barh(place, np.nan_to_num(widths), thick, color=_COLOURS[name], label=name)
        labels = ["-" if width != width else f"{width:.1f}" for width in widths]
        axes.bar_label(bars, labels, padding=3, fontsize=8, color=_INK)
        highest = max(highest, *np.nan_to_num(widths))
    axes.set_yticks(y, order)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_xlim(0, 1.08 * highest)
    axes.set_xlabel(label, color=_INK)
    axes.grid(visible=False)
    return _finish(figure, title, network, bottom=None)


def _line(axes: Any, values: dict[int, float], name: str, style: str, label: str | None) -> None:
    axes.plot(
        list(values), [100 * value for value in values.values()], style, color=_COLOURS.get(name, _INK),
        marker=_MARKERS.get(name, "D"), markersize=5, linewidth=1.8, label=label, zorder=3, clip_on=False,
        markerfacecolor="white" if style == "--" else None,
    )  # fmt: skip


def _figure(width: float, height: float, panels: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained", facecolor="white")
    found = list(figure.subplots(1, panels, squeeze=False)[0])
    for axes in found:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_GREY)
        axes.tick_params(colors=_INK, labelsize=9)
        axes.grid(axis="y", color=_PALE, linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, found


def _finish(figure: Any, title: str, network: str, bottom: float | None = 0.0) -> Any:
    if bottom is not None:
        for axes in figure.axes:
            axes.set_ylim(bottom=bottom)
    figure.suptitle(f"{title}\n{network}", fontsize=11, color=_INK)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    return figure


def _ordered(rows: Rows) -> list[str]:
    return [*(name for name in ROWS if name in rows), *(name for name in rows if name not in ROWS)]


def _title(task: str) -> str:
    return TITLES.get(task, task)


def _known(value: float | None, other: float) -> float:
    return other if value is None or value != value else value
