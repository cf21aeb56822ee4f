"""Semi-supervised fine-tuning: the whole encoder and a linear classifier, on few labelled examples.

The protocol of OpenSelfSup and ORL (configs/benchmarks/semi_classification): SGD with weight decay on every
parameter, random resized crops and flips, BatchNorm in train mode over the global batch; the classifier
learns at a multiple of the encoder's rate, and both are found on a grid.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from salcl_jax.guidance import to_float
from salcl_jax.models.network import Network
from salcl_jax.ops.augment import AugmentSpec, augment, normalize
from salcl_jax.ops.crop import center_boxes, crop_and_resize, random_resized_crop_boxes
from salcl_jax.rng import key_for
from salcl_jax.sharding import data_sharded, replicated, share_of_process, to_device
from salcl_jax.types import Batch, HostBatch, Metrics, PyTree


class Recipe(NamedTuple):
    """How to fine-tune; the defaults are those for 1 % of ImageNet (10 %: weight decay 1e-4).

    lr: the encoder's learning rate at batch 256, scaled with the batch; the classifier's is
    head_multiplier times that. Both fall by `factor` at the epochs of `milestones`. size: crop side in
    pixels; area, ratio: of random_resized_crop_boxes.
    """

    lr: float = 0.01
    head_multiplier: float = 10.0
    weight_decay: float = 5e-4
    epochs: int = 20
    milestones: tuple[int, ...] = (12, 16)
    factor: float = 0.2
    momentum: float = 0.9
    batch_size: int = 256
    size: int = 224
    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    seed: int = 0


class State(NamedTuple):
    """Everything that fine-tuning changes."""

    step: Int[Array, ""]
    params: PyTree  # {'encoder', 'classifier': {'kernel' [d, c], 'bias' [c]}}
    batch_stats: PyTree  # the encoder's
    opt_state: PyTree


def learning_rates(recipe: Recipe, step: int, steps_per_epoch: int) -> dict[str, np.float32]:
    """Learning rates of the 'encoder' and the 'classifier' at a step, counted from 0."""
    passed = sum(step >= epoch * steps_per_epoch for epoch in recipe.milestones)
    rate = recipe.lr * recipe.batch_size / 256 * recipe.factor**passed
    return {"encoder": np.float32(rate), "classifier": np.float32(rate * recipe.head_multiplier)}


def make_init(network: Network, recipe: Recipe, num_classes: int) -> Callable[[PyTree, PyTree], State]:
    """Function (params, batch_stats of a branch) -> State with a new classifier: N(0, 0.01), bias 0."""

    def init(params: PyTree, batch_stats: PyTree) -> State:
        image = jnp.zeros((1, 1, recipe.size, recipe.size, 3))
        outputs, _ = jax.eval_shape(lambda: network.encode(params, batch_stats, image, train=False))
        shape = (outputs["pooled"].shape[-1], num_classes)
        kernel = 0.01 * jax.random.normal(key_for(recipe.seed, 0, "classifier"), shape)
        classifier = {"kernel": kernel, "bias": jnp.zeros(num_classes)}
        new = {"encoder": params["encoder"], "classifier": classifier}
        return State(jnp.zeros((), jnp.int32), new, batch_stats["encoder"], _optimizer(recipe).init(new))

    return init


def make_step(network: Network, recipe: Recipe) -> Callable[..., tuple[State, Metrics]]:
    """One step of SGD: function (state, batch, rates) -> (state, {'loss', 'top1'} of the batch).

    batch: 'image' uint8 [b, s, s, 3], 'aspect' [b], 'label' [b]. Pure, for one giant device; crops come from
    (seed, step). rates: those of learning_rates, as arguments, so that one program serves the whole grid.
    """
    optimizer = _optimizer(recipe)

    def step(state: State, batch: Batch, rates: dict[str, Any]) -> tuple[State, Metrics]:
        boxes_key, flip_key = jax.random.split(key_for(recipe.seed, state.step, "finetune"))
        boxes = random_resized_crop_boxes(boxes_key, batch["aspect"], 1, recipe.area, recipe.ratio)
        crops = crop_and_resize(to_float(batch["image"]), boxes, recipe.size)
        crops = normalize(augment(flip_key, crops, (AugmentSpec(flip=0.5),)))

        def mean_loss(params: PyTree) -> tuple[Array, tuple[Array, PyTree]]:
            logits, stats = _classify(network, params, state.batch_stats, crops, train=True)
            values = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            return jnp.mean(values), (logits, stats)

        (loss, (logits, stats)), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = {
            part: jax.tree.map(lambda p, u, rate=rates[part]: p - rate * u, state.params[part], updates[part])
            for part in state.params
        }
        top1 = jnp.mean(_found(logits, batch["label"], 1))
        return State(state.step + 1, params, stats, opt_state), {"loss": loss, "top1": top1}

    return step


def make_score(network: Network, recipe: Recipe) -> Callable[[State, Batch], Metrics]:
    """Function (state, batch) -> sums over the labelled examples: 'count', 'loss', 'top1', 'top5'.

    batch as in make_step, from central crops and running BatchNorm statistics. An example with label -1
    does not count.
    """

    def score(state: State, batch: Batch) -> Metrics:
        boxes = center_boxes(batch["aspect"])[:, None]
        crops = normalize(crop_and_resize(to_float(batch["image"]), boxes, recipe.size))
        logits, _ = _classify(network, state.params, state.batch_stats, crops, train=False)
        real, label = batch["label"] >= 0, jnp.maximum(batch["label"], 0)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        values = {"count": jnp.ones_like(loss), "loss": loss}
        values |= {f"top{k}": _found(logits, label, k) for k in (1, 5)}
        return {name: jnp.sum(jnp.where(real, value, 0.0)) for name, value in values.items()}

    return score


def run(
    network: Network,
    params: PyTree,
    batch_stats: PyTree,
    draw: Callable[[int], HostBatch],
    test: Callable[[], Iterable[HostBatch]],
    recipe: Recipe,
    *,
    num_classes: int,
    steps_per_epoch: int,
    mesh: Mesh,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[str, float]:
    """Fine-tune one branch and test it: {'top1', 'top5', 'loss', 'finite'}, shares in 0..1.

    params, batch_stats: as guidance.branch gives them; they stay as they are. draw(step) is the labelled
    batch of a step, test() the test's batches with 'mask' (False: padding) and 'label' (-1: unknown); all
    processes get the same whole batches, and each labelled example of the test counts once.
    progress(steps done, {'loss', 'top1'}) is called after each step. A run that diverges ends there, with
    'finite' 0, the top1 and top5 of guessing, and NaN as loss. Runs that differ in nothing but learning
    rates, schedule and data share their programs. Raises ValueError for labels outside the classes, a
    batch of another size than the recipe's, and a test without labelled examples.
    """
    # The programs do not depend on these fields.
    fixed = recipe._replace(lr=0.0, head_multiplier=0.0, epochs=0, milestones=(), factor=0.0, batch_size=0)
    begin, train, score = _programs(network, fixed, num_classes, mesh)

    def take(step: int) -> Batch:
        batch = draw(step)
        if (size := len(batch["label"])) != recipe.batch_size:
            raise ValueError(f"finetune: draw gave {size} examples; recipe.batch_size is {recipe.batch_size}")
        return _place(batch, batch["label"], range(num_classes), mesh)

    state, batch = begin(params, batch_stats), take(0)
    steps = recipe.epochs * steps_per_epoch
    for step in range(steps):
        state, measured = train(state, batch, learning_rates(recipe, step, steps_per_epoch))
        if step + 1 < steps:
            batch = take(step + 1)  # while the devices work
        figures = {name: float(value) for name, value in measured.items()}
        if not math.isfinite(figures["loss"]):
            return _diverged(num_classes)
        if progress:
            progress(step + 1, figures)
    total = dict.fromkeys(("count", "loss", "top1", "top5"), 0.0)
    for b in test():
        label = np.where(b["mask"], b["label"], -1)
        sums = score(state, _place(b, label, range(-1, num_classes), mesh))
        total = {name: total[name] + float(sums[name]) for name in total}
    if not total["count"]:
        raise ValueError("finetune: no labelled example to test on; check the data's labels")
    if not math.isfinite(total["loss"]):
        return _diverged(num_classes)
    return {name: total[name] / total["count"] for name in ("top1", "top5", "loss")} | {"finite": 1.0}


def evaluate(
    run_fn: Callable[[float, float, str], dict[str, float]],
    *,
    lrs: Sequence[float] = (0.001, 0.01, 0.1),
    multipliers: Sequence[float] = (1.0, 10.0, 100.0),
    choose: str = "held_out",
) -> dict[str, float]:
    """Figures of the grid's best setting; the default grid is that of ORL.

    run_fn(lr, head_multiplier, on) -> figures of `run`. on='held_out': trained on the fit part of
    `stratified` and scored on the rest; on='test': trained on all labelled examples and tested.

    choose='held_out': the setting with the best held-out top1 (the first of equals) is tested, no other:
    'semi/top1', 'semi/top5', 'semi/lr', 'semi/head_multiplier' and 'semi/held_out', its held-out top1.
    choose='test', a habit of the literature: every setting is tested and the best one reported,
    'semi/top1_best_on_test' and so on, with 'semi/grid/lr<lr>_head<multiplier>' of every setting.

    'semi/diverged' counts the runs that diverged. Such a run is never the best; where all of the grid
    did, the other figures are NaN. Raises ValueError for another `choose` and an empty grid.
    """
    if choose not in ("held_out", "test"):
        raise ValueError(f"finetune: choose={choose!r} is unknown; use 'held_out' or 'test'")
    settings = list(itertools.product(lrs, multipliers))
    if not settings:
        raise ValueError("finetune: the grid is empty; name at least one lr and one multiplier")
    runs = [run_fn(lr, multiplier, choose) for lr, multiplier in settings]
    finite = [i for i, found in enumerate(runs) if found["finite"]]
    best, (lr, multiplier) = {"top1": math.nan, "top5": math.nan}, (math.nan, math.nan)
    if finite:
        index = max(finite, key=lambda i: runs[i]["top1"])
        best, (lr, multiplier) = runs[index], settings[index]
    end, others = "", {"semi/held_out": best["top1"]}
    if choose == "test":
        end, rows = "_best_on_test", zip(settings, runs, strict=True)
        others = {f"semi/grid/lr{a:g}_head{m:g}": found["top1"] for (a, m), found in rows}
    elif finite:
        best = run_fn(lr, multiplier, "test")
        runs.append(best)
    others["semi/diverged"] = float(sum(not found["finite"] for found in runs))
    figures = {"top1": best["top1"], "top5": best["top5"], "lr": lr, "head_multiplier": multiplier}
    return {f"semi/{name}{end}": value for name, value in figures.items()} | others


def stratified(labels: np.ndarray, share: float = 0.2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit on and rows held out, both sorted: about `share` of every class, by `seed`.

    labels: int [n], 0 or more. Every class keeps an example to fit on. What the classes' parts leave of
    share * n goes to the largest fractions. Raises ValueError for a label or a share out of range.
    """
    if not 0 < share < 1:
        raise ValueError(f"finetune: share={share} held out must lie between 0 and 1")
    if len(labels) and labels.min() < 0:
        raise ValueError("finetune: a training example has no label (-1); leave it out")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # class after class, shuffled within
    _, start, count = np.unique(labels[order], return_index=True, return_counts=True)
    held = np.floor(share * count).astype(int)
    shuffled = rng.permutation(len(count))  # so that equal classes have equal chances
    by_fraction = shuffled[np.argsort((held - share * count)[shuffled], kind="stable")]
    able = by_fraction[held[by_fraction] < count[by_fraction] - 1]
    held[able[: round(share * len(labels)) - held.sum()]] += 1
    is_held = np.arange(len(order)) - np.repeat(start, count) < np.repeat(held, count)
    return np.sort(order[~is_held]), np.sort(order[is_held])


def _optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """SGD as torch has it, but for the learning rate: the decay is part of the gradient and its momentum."""
    return optax.chain(optax.add_decayed_weights(recipe.weight_decay), optax.trace(decay=recipe.momentum))


def _classify(
    network: Network, params: PyTree, stats: PyTree, crops: Float[Array, "b 1 p p 3"], *, train: bool
) -> tuple[Float[Array, "b c"], PyTree]:
    """Logits, float32, and new encoder statistics."""
    outputs, stats = network.encode(params, {"encoder": stats}, crops, train=train)
    head = params["classifier"]
    logits = jnp.dot(outputs["pooled"][:, 0], head["kernel"], precision=jax.lax.Precision.HIGHEST)
    return logits + head["bias"][None], stats


def _found(logits: Float[Array, "b c"], label: Int[Array, "b"], k: int) -> Bool[Array, "b"]:
    """Whether the label is among the k best classes; of equal ones the first counts as better."""
    best = jax.lax.top_k(logits, min(k, logits.shape[-1]))[1]
    return jnp.any(best == label[:, None], axis=-1)


@lru_cache(maxsize=2)
def _programs(network: Network, recipe: Recipe, num_classes: int, mesh: Mesh) -> tuple[Callable, ...]:
    """Compiled (init, step, score), the same ones for the same arguments."""
    whole, split = replicated(mesh), data_sharded(mesh)
    begin = jax.jit(make_init(network, recipe, num_classes), out_shardings=whole)
    train = jax.jit(make_step(network, recipe), in_shardings=(whole, split, whole), out_shardings=whole)
    score = jax.jit(make_score(network, recipe), in_shardings=(whole, split), out_shardings=whole)
    return begin, train, score


def _place(batch: HostBatch, label: np.ndarray, allowed: range, mesh: Mesh) -> Batch:
    """The batch, known to all processes, on the devices: each process hands over its rows."""
    low, high = label.min(), label.max()
    if low < allowed[0] or high > allowed[-1]:
        raise ValueError(f"finetune: labels {low}..{high}; allowed: {allowed[0]}..{allowed[-1]}")
    leaves = {"image": batch["image"], "aspect": batch["aspect"], "label": label.astype(np.int32)}
    return to_device(share_of_process(leaves), mesh)


def _diverged(num_classes: int) -> dict[str, float]:
    return {"top1": 1 / num_classes, "top5": min(1.0, 5 / num_classes), "loss": math.nan, "finite": 0.0}
