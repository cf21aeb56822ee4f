"""A run's weights written for another package, with what goes with them and a model card."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from salcl_jax import checkpoint as checkpoint_lib
from salcl_jax import writer
from salcl_jax.types import PyTree
from salcl_jax.weights import files, incoming, targets
from salcl_jax.weights.card import card


class Run(NamedTuple):
    """What is exported."""

    trees: Mapping[str, Mapping[str, PyTree]]  # params, batch_stats, target_params, target_batch_stats
    fields: Mapping[str, Any]  # of the configuration, flat
    step: int


def open_run(checkpoint: str) -> Run:
    """The run of a workdir, or of one STEP of its checkpoints; raises as `checkpoint.load_params`."""
    trees, step = checkpoint_lib.load_networks(checkpoint)
    return Run(trees, checkpoint_lib.load_extra(checkpoint)["fields"], step)


def export(
    run: Run,
    to: str,
    out: str,
    *,
    branch: str = "online",
    heads: bool = False,
    size: int = 0,
    figures: str = "",
) -> list[Path]:
    """Write weights, what goes with them and the model card; returns the paths.

    to: a key of `targets.SUFFIXES`. branch: online | target. size: of images in pixels, 0 is the run's
    crops.size. figures: path of an eval.json, which may be missing. Raises ValueError, OSError and
    ImportError with one line.
    """
    file, page = _places(to, out)
    fields = run.fields
    model = {name: fields[f"model.{name}"] for name in ("name", "width", "stem")}
    size = size or fields["crops.size"]
    targets.check(to, model, size)
    params, stats = _modules(run.trees, branch, heads)
    arrays = targets.arrays(to, model, params, stats, size, run.step)
    file.parent.mkdir(parents=True, exist_ok=True)
    about = {"model": model, "branch": branch, "step": run.step}
    files.write(file, arrays, about)
    about |= {
        "to": to, "file": file.name, "heads": [name for name in params if name != "encoder"], "size": size,
        "network": incoming.describe(model), "versions": writer.versions(),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }  # fmt: skip
    texts = targets.companions(to, model, file.name, size)
    texts = {file.with_suffix(n) if n[0] == "." else file.parent / n: text for n, text in texts.items()}
    texts[page] = card(about, fields, _judged(figures))
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return [file, *texts]


def _places(to: str, out: str) -> tuple[Path, Path]:
    """(file of the weights, model card); raises ValueError for a name that does not suit the destination."""
    path, suffixes = Path(out).expanduser(), targets.SUFFIXES[to]
    if "://" in out:
        raise ValueError(f"--out={out}: write to a local disk and copy it there")
    if not suffixes:
        if path.is_file() or path.suffix in files.SUFFIXES:
            raise ValueError(f"--out={out}: --to={to} writes a folder; name one")
        return path / files.FOLDER_FILE, path / "README.md"
    if path.suffix not in suffixes:
        raise ValueError(f"--out={out}: --to={to} writes a file that ends in {' or '.join(suffixes)}")
    return path, path.with_suffix(".md")


def _modules(trees: Mapping[str, Any], branch: str, heads: bool) -> tuple[dict, dict]:
    """(params, stats) of the branch's encoder, with its heads where they are wanted."""
    mark = "target_" if branch == "target" else ""
    params, stats = trees[f"{mark}params"], trees[f"{mark}batch_stats"]
    wanted = [name for name in ("encoder", "projector", "predictor") if name in params]
    wanted = wanted if heads else ["encoder"]
    return {name: params[name] for name in wanted}, {name: stats.get(name, {}) for name in wanted}


def _judged(figures: str) -> dict | None:
    path = Path(figures)
    return json.loads(path.read_text()) if figures and path.is_file() else None
