"""What an evaluation leaves: tables for people, figures for programs, plots and galleries.

results: {task: {row: figures}}; rows are 'trained', 'untrained' and 'pixels', any of which a task may lack;
figures are flat as 'task/name', shares in 0..1, NaN where undefined. about: {task: {'protocol': ...,
'data': ..., 'examples': ...}}. meta: checkpoint, step, branch, network, size, seed, weights (a digest),
hardware, versions, command, seconds, date, as far as known.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from salcl_jax import report_figures, visualize
from salcl_jax.report_figures import ROWS, TITLES
from salcl_jax.types import Rois

Results = dict[str, dict[str, dict[str, float]]]
About = dict[str, dict[str, str]]
Headline = tuple[str, str, str]  # figure, caption, 'share' (printed in per cent) or 'ratio'

# '<k>' stands for every number that there is a figure of, '<x>' for every word.
_HEADLINES: dict[str, tuple[Headline, ...]] = {
    "linear": (
        ("top1", "top-1 accuracy", "share"),
        ("top5", "top-5 accuracy", "share"),
        ("top1/<x>", "top-1 accuracy, <x>", "share"),
        ("<x>/top1", "top-1 accuracy, <x>", "share"),
    ),
    "knn": (("top1", "top-1 accuracy", "share"), ("top1_k<k>", "top-1 accuracy, k = <k>", "share")),
    "semi": (
        ("top1", "top-1 accuracy", "share"),
        ("top5", "top-5 accuracy", "share"),
        ("top1_best_on_test", "top-1, rates chosen on test", "share"),
        ("top5_best_on_test", "top-5, rates chosen on test", "share"),
    ),
    "voc_svm": (
        ("map", "mean average precision", "share"),
        ("map_11_point", "mean average precision, 11-point", "share"),
        ("<x>/map", "mean average precision, <x>", "share"),
        ("low_shot/<k>", "positives per class: <k>", "share"),
        ("low_shot_best_on_test/<k>", "cost chosen on test, positives: <k>", "share"),
    ),
    "multilabel": (("map", "mean average precision", "share"),),
    "localization": (
        ("pointing", "pointing game", "share"),
        ("corloc", "CorLoc", "share"),
        ("best_iou", "best IoU of any region", "share"),
        ("recall@0.5", "objects found, IoU >= 0.5", "share"),
        ("coverage", "mean best IoU of objects", "share"),
        ("mask_ap", "average precision, masks", "share"),
        ("inside_ratio", "saliency inside / outside", "ratio"),
    ),
    "crops": (
        ("shared", "pairs that share half of an object", "share"),
        ("touched", "pairs that share a tenth of an object", "share"),
        ("share", "what one object takes of both crops", "share"),
    ),
    "segmentation": (("miou", "mean IoU", "share"), ("accuracy", "pixel accuracy", "share")),
}
_CHANCE = {"random": "random", "center": "centre", "whole": "whole image", "boxes": "annotated boxes"}
# What figures must share to stand in one report.
_IDENTITY = ("checkpoint", "step", "branch", "size", "seed", "weights")
_META = (
    "checkpoint", "step", "branch", "network", "size", "seed", "weights", "hardware", "versions", "seconds",
    "date",
)  # fmt: skip
_NOTHING = "-"


def headline(task: str) -> tuple[Headline, ...]:
    """The figures that tables show: (name with task, caption, 'share' or 'ratio'), in order.

    A name may hold '<k>' for any number and '<x>' for any word. A task without headlines has ().
    """
    return tuple((f"{task}/{name}", *rest) for name, *rest in _HEADLINES.get(task, ()))


def text_table(results: Results) -> str:
    """All headline figures for the terminal: a titled table a task, shares in per cent."""
    blocks = []
    for task in _in_order(results):
        head, body = _table(task, results[task])
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
        lines = [
            "  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]).rstrip()
            for cells in (head, *body)
        ]
        blocks.append("\n".join([f"{TITLES.get(task, task)} ({task})", *lines]))
    return "\n\n".join(blocks) + "\n"


def markdown(
    results: Results, about: About, meta: Mapping[str, Any], files: Sequence[str] = ()
) -> str:
    """The report as GitHub Markdown; files: pictures to show at the end, relative to it."""
    step = f" at step {meta['step']}" if meta.get("step") is not None else ""
    lines = [f"# Evaluation of {meta.get('network', 'a network')}{step}", ""]
    names = [*(name for name in _META if name in meta), *(n for n in meta if n not in (*_META, "command"))]
    lines += [f"- {name}: {_words(name, meta[name])}" for name in names]
    if meta.get("command"):
        lines += ["", "```", str(meta["command"]), "```"]
    for task in _in_order(results):
        head, body = _table(task, results[task])
        cells = [head, ["---", *["---:"] * (len(head) - 1)], *body]
        lines += ["", f"## {TITLES.get(task, task)}", ""]
        lines += [caption, ""] if (caption := _caption(about.get(task, {}), meta)) else []
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
    if files:
        lines += ["", "## Pictures"]
    for name in files:
        lines += ["", f"`{name}`", "", f"![{Path(name).stem}]({name})"]
    return "\n".join(lines) + "\n"


def write(
    folder: str | os.PathLike,
    results: Results,
    about: About,
    meta: Mapping[str, Any],
    galleries: Mapping[str, np.ndarray],
) -> list[str]:
    """Write eval.json, eval.md and plots/*.png into the folder; returns their paths.

    galleries: name -> picture uint8 [h, w, 3]. Tasks of an eval.json of the same checkpoint, step, branch,
    size, seed and weights stay unless they were evaluated again, with the command and date of their own; a
    report of anything else is replaced, its plots with it. eval.json is {"meta", "about", "results"}, null
    for what is not finite. Each file is replaced whole. Raises ValueError for a folder that is not local.
    """
    if "://" in os.fspath(folder):
        raise ValueError(f"report: {folder} is not a local folder; write to one and copy it there")
    folder = Path(folder)
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    own = {name: str(meta[name]) for name in ("command", "date") if meta.get(name) is not None}
    about = {task: own | about.get(task, {}) for task in results}
    before = _read(folder / "eval.json")
    if before and all(before["meta"].get(x) == _plain(meta.get(x)) for x in _IDENTITY):
        results, about = before["results"] | results, before["about"] | about
    elif before:
        for old in plots.glob("*.png"):
            old.unlink()
    results = {task: results[task] for task in _in_order(results)}
    content = _plain({"meta": meta, "about": about, "results": results})
    _replace(folder / "eval.json", json.dumps(content, allow_nan=False, indent=2) + "\n")
    drawn = report_figures.figures(results, str(meta.get("network", "")))
    pictures = {stem: report_figures.pixels(figure) for stem, figure in drawn.items()} | dict(galleries)
    for stem, picture in pictures.items():
        visualize.save_png(plots / f"{stem}.png", picture)
    files = [f"plots/{path.name}" for path in sorted(plots.glob("*.png"))]
    _replace(folder / "eval.md", markdown(results, about, meta, files))
    return [str(folder / name) for name in ("eval.json", "eval.md", *files)]


def picks(scores: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Indices of the 'best', 'median' and 'worst' images by score [n], each from its end inwards.

    `count` each, fewer where the groups would meet; NaN is left out. Raises ValueError without scores.
    """
    order = np.argsort(-scores, kind="stable")  # NaN is last
    order = order[: len(order) - int(np.isnan(scores).sum())]
    if not len(order):
        raise ValueError("gallery: no image has a score; choose a score that the data has")
    count = max(1, min(count, len(order) // 3))
    middle = (len(order) - count) // 2
    return {
        "best": order[:count],
        "median": order[middle : middle + count],
        "worst": order[::-1][:count],
    }


def gallery(
    images: np.ndarray,
    maps: np.ndarray,
    rois: Rois,
    boxes: np.ndarray,
    scores: np.ndarray,
    *,
    count: int = 4,
) -> np.ndarray:
    """Picture of the best, the median and the worst images: truth, heat map, regions and score.

    images uint8 [n, s, s, 3], maps [n, h, w], rois of [n, r], boxes [n, k, 4], scores [n]; which
    images: `picks`. Returns uint8 [H, W, 3].
    """
    groups = []
    for name, index in picks(scores, count).items():
        titles = [f"{name} {scores[i]:.3f}" for i in index]
        chosen = Rois(*(np.asarray(x)[index] for x in rois))
        groups.append(visualize.columns(images[index], maps[index], chosen, boxes[index], titles))
    return np.concatenate(groups)


def _table(task: str, rows: dict[str, dict[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Head and cells; columns and lines that would be empty are left out."""
    names = [*(row for row in ROWS if row in rows), *(row for row in rows if row not in ROWS)]
    lines = _lines(task, rows)
    chance = {kind: [_chance(task, rows, figure, kind) for figure, _, _ in lines] for kind in _CHANCE}
    chance = {kind: values for kind, values in chance.items() if any(v is not None for v in values)}
    body = []
    for i, (figure, caption, kind) in enumerate(lines):
        values = [*(rows[row].get(figure) for row in names), *(column[i] for column in chance.values())]
        unit = ", %" if kind == "share" else ""
        body.append([caption + unit, *(_cell(value, kind) for value in values)])
    return ["figure", *names, *(_CHANCE[kind] for kind in chance)], body


def _lines(task: str, rows: dict[str, dict[str, float]]) -> list[Headline]:
    """The headline figures that some row has, '<...>' spelled out; of a task without any, all figures."""
    every = list(dict.fromkeys(figure for figures in rows.values() for figure in figures))
    found = []
    for pattern, caption, kind in headline(task) or [(name, name, "ratio") for name in every]:
        expression = re.escape(pattern).replace("<k>", r"(\d+)").replace("<x>", "([^/]+)")
        matches = [match for match in (re.fullmatch(expression, name) for name in every) if match]
        if "<k>" in pattern:
            matches.sort(key=lambda match: int(match[1]))
        found += [(m[0], re.sub("<.>", m[m.lastindex or 0], caption), kind) for m in matches]
    return found


def _chance(task: str, rows: dict[str, dict[str, float]], figure: str, kind: str) -> float | None:
    """What knowing nothing (or all boxes) reaches, from the first row that has it: the same for all rows."""
    names = [figure.replace(f"{task}/", f"{task}/chance/", 1) + f"_{kind}"]
    names += [f"{figure}_chance"] if kind == "random" else []
    return next((rows[row][name] for row in rows for name in names if name in rows[row]), None)


def _cell(value: float | None, kind: str) -> str:
    if value is None or not math.isfinite(value):
        return _NOTHING
    return f"{100 * value:.1f}" if kind == "share" else f"{value:.2f}"


def _caption(about: Mapping[str, str], meta: Mapping[str, Any]) -> str:
    """One line; command and date only where they are not those of the whole report."""
    shown = {name: text for name, text in about.items() if text and text != str(meta.get(name))}
    return "; ".join(f"{name}: {text}" for name, text in shown.items())


def _words(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {text}" for key, text in value.items())
    return f"{value:.0f}" if name == "seconds" and isinstance(value, (int, float)) else str(value)


def _in_order(results: Mapping[str, Any]) -> list[str]:
    return [*(task for task in TITLES if task in results), *(task for task in results if task not in TITLES)]


def _read(path: Path) -> dict[str, Any] | None:
    """An earlier eval.json with NaN for null figures; None where there is none that can be read."""
    try:
        found = json.loads(path.read_text())
        results = {
            task: {
                row: {name: math.nan if value is None else value for name, value in figures.items()}
                for row, figures in rows.items()
            }
            for task, rows in found["results"].items()
        }
        return {"meta": dict(found["meta"]), "about": dict(found["about"]), "results": results}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _plain(value: Any) -> Any:
    """The value in JSON's types; numbers that are not finite are None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
