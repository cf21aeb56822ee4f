"""What a study is: one question, a grid of configurations x seeds, and how each network is judged."""

import dataclasses
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from salcl_jax import config as config_lib
from salcl_jax import config_record
from salcl_jax.validation import validate, validate_task

Change = Callable[[Any], None]


@dataclasses.dataclass(frozen=True)
class Study:
    """The contents of a file in configs/studies; its `get_study()` returns one.

    Rows whose networks come from the same fields and seed are trained once, also between studies that share
    a workdir. Nothing here may look at a test label: `judge` names the protocols, which choose on the train
    side.
    """

    question: str  # one sentence; the report's heading
    config: Callable[[], Any]  # the configuration that all rows start from
    rows: Mapping[str, Change]  # row -> what it changes in a configuration
    baseline: str  # row that the others are paired with, seed by seed
    judge: Callable[[], Any]  # configuration of the evaluation
    tasks: tuple[str, ...]  # protocols of `salcl_jax.evaluate`
    figures: Mapping[str, str]  # figure of the report -> its caption; shares in 0..1
    seeds: tuple[int, ...] = (0, 1, 2)
    # fields of `judge` that hold for all rows; others of the map and the regions are those of the row, but a
    # row that trains without a map is judged by the map of `judge`
    fixed: tuple[str, ...] = ()
    # row -> (row whose fields it has, row whose operations it is given as further steps)
    matched: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    curve: str = "eval/knn/top1"  # figure of metrics.jsonl that is plotted over steps and operations


class Run(NamedTuple):
    """One network of the grid."""

    row: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.row}-{self.seed}"


def guided(mix: Mapping[str, float] | None = None, **fields: Any) -> Change:
    """A row: pairs by these ways (`pairs.mix`), and fields by their dotted names.

    Where nothing looks at a map, none is drawn: a control is not charged for it.
    """

    def change(c: Any) -> None:
        c.pairs.mix.update(mix or {})
        c.update_from_flattened_dict(fields)
        if c.roi.source != "saliency" and c.weights.mode == "none":
            c.saliency.source = "none"

    return change


def plain(**fields: Any) -> Change:
    """A row: no guidance, and fields by their dotted names."""

    def change(c: Any) -> None:
        config_lib.plain_byol(c)
        c.update_from_flattened_dict(fields)

    return change


def load(path: str) -> Study:
    """The study in a file, FILE.py[:VARIANT]. Raises `ConfigError` with what is wrong with it."""
    file, _, variant = path.partition(":")
    if not os.path.isfile(file):
        raise config_lib.ConfigError(f"--study={path}: no such file from {os.getcwd()}")
    try:
        module = config_lib.load_module(file)
        if not hasattr(module, "get_study"):
            raise config_lib.ConfigError("has no get_study()")
        if variant and not inspect.signature(module.get_study).parameters:
            raise config_lib.ConfigError(f"variant '{variant}' is unknown; this study has none")
        study = module.get_study(variant) if variant else module.get_study()
        study.config()
    except Exception as error:  # a study's file raises what it likes
        kind = "" if isinstance(error, config_lib.ConfigError) else f"{type(error).__name__}: "
        raise config_lib.ConfigError(f"--study={path}: {kind}{error}") from error
    _check(study, path)
    return study


def _check(study: Study, path: str) -> None:
    """Raise `ConfigError` for a grid that cannot run, before anything is trained."""
    names = [*study.rows, *study.matched]
    needed = {study.baseline, *(row for pair in study.matched.values() for row in pair)}
    if missing := sorted(needed - set(study.rows)):
        raise config_lib.ConfigError(f"--study={path}: no row {missing[0]}; rows are {', '.join(study.rows)}")
    for name in names:
        if not name.isidentifier() or names.count(name) > 1:
            raise config_lib.ConfigError(f"--study={path}: row {name!r}: give each a name like roi_local")
    if len(set(study.seeds)) != len(study.seeds) or not study.seeds:
        raise config_lib.ConfigError(f"--study={path}: seeds {study.seeds}: give different ones")
    for name in study.rows:
        try:
            validate(configuration(study, Run(name, study.seeds[0])))
        except config_lib.ConfigError as error:
            raise config_lib.ConfigError(f"--study={path}: row {name}: {error}") from error
    for task in study.tasks:
        validate_task(study.judge(), task)


def runs(study: Study) -> list[Run]:
    """The grid seed by seed: an interrupted study has whole comparisons first."""
    return [Run(row, seed) for seed in study.seeds for row in (*study.rows, *study.matched)]


def configuration(study: Study, run: Run, flops: Callable[[Any], float] | None = None) -> Any:
    """The configuration that a run trains; `flops` (configuration -> operations a step) serves `matched`."""
    config = study.config()
    own, other = study.matched.get(run.row, (run.row, run.row))
    study.rows[own](config)
    config.seed = run.seed
    if own != other:
        ratio = flops(configuration(study, Run(other, run.seed))) / flops(config)
        config.total_steps = round(config.total_steps * ratio)
        config.total_epochs = round(config.total_epochs * ratio)
    return config


def held(study: Study, config: Any) -> list[str]:
    """Fields of the judge that hold for the network trained by `config`, whatever its checkpoint says."""
    mapless = config.saliency.source == "none"
    return [*study.fixed, *(f"saliency.{name}" for name in config.saliency if mapless)]


def digest(config: Any) -> str:
    """Name of what a configuration learns: 12 hexadecimal digits of its fields and photos."""
    return _hash([config_record.learnt_fields(config), config.data.train.to_dict()])


def judge_digest(study: Study) -> str:
    """Name of how a study judges; other protocols judge its networks anew."""
    return _hash([study.tasks, study.fixed, study.judge().to_dict()])


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
