"""Tasks on labelled photos: nearest neighbours, linear probes, fine-tuning with few labels."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from salcl_jax import finetune, frozen
from salcl_jax.data.pipeline import train_batches
from salcl_jax.data.sources import Source
from salcl_jax.evaluators import features, linear, probe
from salcl_jax.evaluators import knn as neighbours
from salcl_jax.evaluators.pooling import LEVELS
from salcl_jax.guidance import branch
from salcl_jax.judge import Judge, Subject, subset
from salcl_jax.types import HostBatch

Figures = dict[str, float]
# ORL's linear protocols (Goyal et al. 2019): passes over train, and when the rate falls to a tenth.
ORL = {"orl": (28, (8, 16, 24)), "orl_places205": (14, (4, 8, 12)), "orl_inat18": (84, (24, 48, 72))}
_STREAM = 1  # of the order of training photos, beside that of the pre-training


def linear_protocol(tasks: Any) -> str:
    """The linear task's protocol in words, from the fields `tasks`."""
    c = tasks.linear
    few = f"; few labels by L-BFGS: {', '.join(c.subsets)}" if c.subsets else ""
    if c.protocol == "lbfgs":
        return f"logistic regression (L-BFGS) on pooled features{few}"
    crops = "random crops (raw pixels: cached)" if _streams(tasks, pixels=False) else "cached features"
    if c.protocol in ORL:
        epochs = ORL[c.protocol][0]
        return f"{c.protocol}: five levels, {epochs} epochs, SGD 0.01 in steps (ORL), {crops}{few}"
    rates = f"{len(c.rates)} rates in one pass, {c.epochs} epochs, cosine"
    return f"sgd: {rates}, {c.optimizer}, weight decay {c.weight_decay:g}, {crops}{few}"


def _streams(tasks: Any, *, pixels: bool) -> bool:
    """Whether the linear probe learns from new crops at each draw, not from cached features."""
    new = tasks.linear.protocol in ORL or (tasks.linear.protocol == "sgd" and tasks.linear.augment)
    return new and not pixels and tasks.classify.on == "image"


def _classified(judge: Judge, subject: Subject, part: str, where: str = "") -> tuple:
    source = judge.source(part, where)
    return features.labelled(judge.features(subject, source, on=judge.config.tasks.classify.on))



def knn(judge: Judge, subject: Subject) -> Figures:
    """Accuracy of weighted k-NN, exact."""
    c = judge.config.tasks.knn
    first, second = (_classified(judge, subject, f"classify.{part}") for part in ("train", "test"))
    return neighbours.evaluate(
        first, second, ks=c.k, temperature=c.temperature, mesh=judge.mesh, bank_rows=c.bank_rows
    )


def linear_probe(judge: Judge, subject: Subject) -> Figures:
    """Accuracy of a linear probe by `tasks.linear.protocol`, and with few labels by its `subsets`."""
    c = judge.config.tasks.linear
    if c.protocol == "lbfgs":
        first, second = (_classified(judge, subject, f"classify.{part}") for part in ("train", "test"))
        figures = linear.evaluate(first, second, l2s=c.l2)
    else:
        figures = _linear_sgd(judge, subject)
    for spec in c.subsets:
        figures |= _few_labels(judge, subject, spec)
    return figures


def _linear_sgd(judge: Judge, subject: Subject) -> Figures:
    """Heads trained together by SGD: those of our own protocol, or one per level as ORL does."""
    c = judge.config.tasks.linear
    orl = c.protocol in ORL
    pixels = subject.state is None
    levels = ("pooled",) if pixels else LEVELS if orl else tuple(c.levels)
    epochs, milestones = ORL[c.protocol] if orl else (c.epochs, ())
    size = 256 if orl else c.batch_size
    draw_from = _streamed if _streams(judge.config.tasks, pixels=pixels) else _stored
    draw, held_out, fit_on = draw_from(judge, subject, levels, size)
    steps_per_epoch = max(1, fit_on // size)
    steps = epochs * steps_per_epoch
    test = _levels(judge, subject, judge.source("classify.test"), levels)
    shape = {"rates": (0.01,), "weight_decay": 1e-4, "batch_norm": True,
             "schedule": probe.steps_at(milestones, steps_per_epoch)} if orl else {
             "rates": c.rates, "weight_decay": c.weight_decay, "batch_norm": c.batch_norm,
             "schedule": probe.cosine(steps), "optimizer": c.optimizer}  # fmt: skip
    classes = 1 + max(int(labels.max()) for _, labels in (held_out, test))
    classes = max(classes, len(judge.source("classify.train").class_names))
    return probe.evaluate(draw, held_out, test, steps=steps, num_classes=classes, **shape)


def _levels(judge: Judge, subject: Subject, source: Source, levels: tuple[str, ...]) -> tuple:
    """(features by level, labels) of the labelled examples of a source."""
    table = judge.features(subject, source, levels, on=judge.config.tasks.classify.on)
    found = {level: features.labelled(table, level) for level in levels}
    return {level: values for level, (values, _) in found.items()}, found[levels[0]][1]


def _stored(judge: Judge, subject: Subject, levels: tuple[str, ...], size: int) -> tuple:
    """Draws of cached features, held-out examples, number of examples fitted on."""
    values, labels = _levels(judge, subject, judge.source("classify.train"), levels)
    rows, held = probe.split(len(labels))
    draw = probe.from_arrays(values, labels, rows, batch_size=size, seed=judge.config.seed)
    return draw, ({level: x[held] for level, x in values.items()}, labels[held]), len(rows)


def _streamed(judge: Judge, subject: Subject, levels: tuple[str, ...], size: int) -> tuple:
    """As `_stored`, but of a new random crop at each draw, through the frozen network."""
    c = judge.config.tasks
    source = judge.source("classify.train")
    all_rows = np.arange(c.limit) * len(source) // c.limit if 0 < c.limit < len(source) else None
    source = source if all_rows is None else subset(source, all_rows)
    rows, held = probe.split(len(source))
    size = frozen.divisible(size, judge.mesh)
    colours = c.linear.protocol in ORL
    run = judge.compile(
        ("augmented", levels, colours),
        lambda: frozen.make_augmented(judge.network, judge.config, levels, colours=colours),
    )
    found = _shuffled(judge, subset(source, rows), size)

    def draw(step: int) -> tuple:
        batch = next(found)
        return run((subject.state, np.int32(step)), batch["image"], batch["aspect"]), batch["label"]

    return draw, _levels(judge, subject, subset(source, held), levels), len(rows)


def _shuffled(judge: Judge, source: Source, size: int) -> Iterator[HostBatch]:
    """Endless batches in random order, the same whole ones on every process."""
    c = judge.config.data
    return train_batches(
        source, batch_size=size, canvas=c.canvas, seed=judge.config.seed + _STREAM, min_side=c.min_side,
        max_pixels=c.max_pixels, workers=c.workers, prefetch=c.prefetch,
    )  # fmt: skip


def folds(spec: str) -> tuple[str, ...]:
    """'fold_1pct=0..4' -> 'fold_1pct=0', ..., 'fold_1pct=4'; others as they are, '' as one fold of all."""
    name, _, values = spec.partition("=")
    first, dots, last = values.partition("..")
    if not dots:
        return (spec,)
    if not (first.isdigit() and last.isdigit() and int(first) <= int(last)):
        raise ValueError(f"folds {spec!r}: write column=FIRST..LAST, for example fold_1pct=0..4")
    return tuple(f"{name}={i}" for i in range(int(first), int(last) + 1))


def over_folds(spec: str, run_fold: Callable[[str], Figures]) -> Figures:
    """Mean figures over the folds, and the standard error '<name>_se' of each accuracy of several folds."""
    runs = [run_fold(where) for where in folds(spec)]
    figures = {name: float(np.mean([found[name] for found in runs])) for name in runs[0]}
    if len(runs) > 1:
        spread = {name: np.std([found[name] for found in runs], ddof=1) for name in figures if "top1" in name}
        figures |= {f"{name}_se": float(value / np.sqrt(len(runs))) for name, value in spread.items()}
    return figures


def _few_labels(judge: Judge, subject: Subject, spec: str) -> Figures:
    """Logistic regression on some rows of train, averaged over folds: 'linear/<column>/top1'."""
    test = _classified(judge, subject, "classify.test")
    classes = max(int(test[1].max()) + 1, len(judge.source("classify.train").class_names))

    def of_fold(where: str) -> Figures:
        train = _classified(judge, subject, "classify.train", where)
        return linear.evaluate(train, test, l2s=judge.config.tasks.linear.l2, num_classes=classes)

    column = spec.partition("=")[0]
    found = over_folds(spec, of_fold)
    return {name.replace("linear/", f"linear/{column}/"): value for name, value in found.items()}


def semi(judge: Judge, subject: Subject) -> Figures:
    """Accuracy of the fine-tuned network, a mean over folds."""
    return over_folds(judge.config.tasks.semi.folds, partial(_semi_fold, judge, subject))


def _semi_fold(judge: Judge, subject: Subject, where: str) -> Figures:
    c = judge.config.tasks.semi
    source, test = judge.source("semi.train", where), judge.source("classify.test")
    if not (source.has_labels and test.has_labels):
        raise ValueError("semi: semi.train and classify.test need labels; name sources that have them")
    labels = np.array([source.read(i)["label"] for i in range(len(source))], np.int32)
    everything = np.flatnonzero(labels >= 0)
    fit_on, held_out = finetune.stratified(labels[everything])
    classes = max(int(labels.max()) + 1, len(source.class_names))
    size = frozen.divisible(c.batch_size, judge.mesh)
    recipe = finetune.Recipe(
        weight_decay=c.weight_decay, epochs=c.epochs, milestones=tuple(c.milestones), batch_size=size,
        size=judge.config.eval.size, seed=judge.config.seed,
    )  # fmt: skip

    def run_fn(rate: float, multiplier: float, on: str) -> Figures:
        rows = everything if on == "test" else everything[fit_on]
        of_test = test if on == "test" else subset(source, everything[held_out])
        found = _shuffled(judge, subset(source, rows), size)
        label = f"{subject.name}: fine-tuned {where} at {rate:g}, head x {multiplier:g}; scored on {on}"
        return finetune.run(
            judge.network, *branch(subject.state, judge.config.eval.branch), lambda step: next(found),
            lambda: judge.batches(of_test, label), recipe._replace(lr=rate, head_multiplier=multiplier),
            num_classes=classes, steps_per_epoch=max(1, round(len(rows) / size)), mesh=judge.mesh,
        )  # fmt: skip

    return finetune.evaluate(run_fn, lrs=c.rates, multipliers=c.multipliers, choose=c.choose)
