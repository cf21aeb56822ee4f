"""Linear probes trained by SGD on frozen features: every level x every learning rate in one pass.

A *draw* is a function step -> (features {level: [b, d]}, targets): from memory (`from_arrays`) or from a
frozen network on freshly augmented images. All heads see the same batches, as in DINOv2's evaluation
(arXiv 2304.07193), so that trying ten learning rates costs little more than one.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from salcl_jax.evaluators import heads

Features = dict[str, Any]  # {level: [n, d]}: numpy arrays, memory maps or jax arrays
Draw = Callable[[int], tuple[Features, Any]]
Schedule = Callable[[int], float]
ON_THEIR_WAY = 8  # batches


class Probe(NamedTuple):
    """Trained heads; those of a level share its BatchNorm. Host arrays; a diverged head is not finite."""

    rates: tuple[float, ...]
    kernel: dict[str, np.ndarray]  # {level: [rates, d, classes]}
    bias: dict[str, np.ndarray]  # {level: [rates, classes]}
    moments: dict[str, tuple[np.ndarray, np.ndarray]]  # {level: running mean [d], variance [d]}, or empty


def split(n: int, share: float = 0.1, most: int = 10_000) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit on and rows held out (`share` of them, 1 to `most`), sorted, the same for the same n."""
    if n < 2:
        raise ValueError(f"probe: {n} examples cannot be split into a part to fit and a part held out")
    order = np.random.default_rng(0).permutation(n)
    held_out = max(1, min(most, round(share * n), n - 1))
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def from_arrays(
    features: Mapping[str, np.ndarray], labels: np.ndarray, rows: np.ndarray, *, batch_size: int, seed: int
) -> Draw:
    """Draw batches of `rows` of features {level: [n, d]} and labels [n] or soft targets [n, c].

    A new order every epoch, by (seed, epoch); batches always have `batch_size` rows and run on over the
    end of an epoch. Memory maps are read a batch at a time. Raises ValueError for arrays of other lengths.
    """
    lengths = {level: len(values) for level, values in features.items()}
    if set(lengths.values()) != {len(labels)} or not len(rows) or batch_size < 1:
        raise ValueError(
            f"probe: features of {lengths} rows, {len(labels)} labels, {len(rows)} rows to draw, batches of "
            f"{batch_size}: lengths must agree, and none may be 0"
        )

    @lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.asarray(rows)[np.random.default_rng((seed, epoch)).permutation(len(rows))]

    def draw(step: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        epoch, place = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), len(rows))
        chosen = np.concatenate([order(int(e))[place[epoch == e]] for e in np.unique(epoch)])
        return {level: np.asarray(values[chosen]) for level, values in features.items()}, labels[chosen]

    return draw


def cosine(steps: int) -> Schedule:
    """Half a cosine from 1 at step 0 to 0 at `steps`."""
    return lambda step: 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))


def steps_at(milestones: Sequence[float | int], steps_per_epoch: int, factor: float = 0.1) -> Schedule:
    """1, times `factor` from each milestone (an epoch) on."""
    return lambda step: factor ** sum(step >= milestone * steps_per_epoch for milestone in milestones)


def cross_entropy(
    logits: Float[Array, "b c"], targets: Int[Array, "b"] | Float[Array, "b c"]
) -> Float[Array, ""]:
    """Mean cross-entropy with labels, of which -1 counts in nothing, or with soft targets.

    The sum of a row of soft targets is its weight.
    """
    if targets.ndim == 1:
        targets = jax.nn.one_hot(targets, logits.shape[1])
    total = -jnp.sum(targets * jax.nn.log_softmax(logits))
    return total / jnp.maximum(jnp.sum(targets), 1e-6)


def train(
    draw: Draw,
    *,
    steps: int,
    num_classes: int,
    rates: Sequence[float],
    schedule: Schedule | None = None,
    optimizer: str = "sgd",
    momentum: float = 0.9,
    nesterov: bool | None = None,
    weight_decay: float = 0.0,
    trust: float = 1e-3,
    batch_norm: bool = False,
    loss: Callable = cross_entropy,
    seed: int = 0,
) -> Probe:
    """One linear head for every level and every one of `rates`, after `steps` batches of `draw`.

    rates: learning rates for a batch of 256, scaled linearly with the batch. schedule: function of the
    step that gives their factor (None: cosine). optimizer: 'sgd' as torch's, or 'lars' (trust ratio
    `trust`, then momentum, then the learning rate, as BYOL). nesterov: None is Nesterov's momentum with sgd
    and the plain one with lars. Weight decay and trust ratio know no
    exceptions: they hold for biases too. Kernels start from N(0, 0.01^2), the same for all rates, biases
    from 0. batch_norm: a BatchNorm without scale and offset before the heads, with torch's momentum 0.1
    and unbiased running variance. loss: function (logits [b, c], targets) -> scalar.
    A rate that is too high spoils its own heads only. Raises ValueError for an unknown optimizer, no
    steps and rates that are not positive.
    """
    if optimizer not in ("sgd", "lars") or steps < 1 or not rates or not min(rates) > 0:
        raise ValueError(
            f"probe: optimizer={optimizer!r}, steps={steps}, rates={tuple(rates)}: use 'sgd' or 'lars', "
            "1 step or more, and at least one rate above 0"
        )
    nesterov = optimizer == "sgd" if nesterov is None else nesterov
    settings = heads.Settings(optimizer, momentum, nesterov, weight_decay, trust, batch_norm, loss)
    schedule, state = schedule or cosine(steps), None
    for step in range(steps):
        features, targets = draw(step)
        state = state or heads.start(features, num_classes, len(rates), settings, seed)
        now = np.asarray(rates, np.float32) * np.float32(schedule(step))
        state = heads.step(state, features, targets, jnp.asarray(now), settings)
        if step % ON_THEIR_WAY == 0:  # steps are only ordered here: their batches must not pile up
            jax.block_until_ready(state)
    weights, moments = jax.device_get((state.weights, state.moments))
    kernel, bias = ({level: w[part] for level, w in weights.items()} for part in ("kernel", "bias"))
    return Probe(tuple(map(float, rates)), kernel, bias, moments)


def scores(probe: Probe, batches: Iterable[tuple[Features, Any]]) -> dict[str, dict[str, np.ndarray]]:
    """Accuracies {'top1' | 'top5': {level: [rates]}} over batches (features, labels [b]), NaN if diverged.

    Labels of -1 (padding) are left out. Equal logits rank by class, as arg-max has them; an example whose
    logits are not finite is wrong. Of fewer than 5 classes all are among the first 5.
    """
    on_device = jax.device_put(probe)
    hits: dict[str, Any] = {level: 0 for level in probe.kernel}
    count = 0
    for features, labels in batches:
        count += int(np.sum(np.asarray(labels) >= 0))
        for level in hits:
            found = _hits(on_device, {level: features[level]}, labels)
            hits[level] = hits[level] + np.asarray(found, np.int64)
    finite = {
        level: np.isfinite(kernel).all((1, 2)) & np.isfinite(probe.bias[level]).all(1)
        for level, kernel in probe.kernel.items()
    }
    share = {level: np.where(finite[level], hits[level] / max(count, 1), np.nan) for level in hits}
    return {name: {level: share[level][i] for level in hits} for i, name in enumerate(("top1", "top5"))}


def evaluate(
    draw: Draw,
    held_out: tuple[Features, np.ndarray],
    test: tuple[Features, np.ndarray],
    *,
    steps: int,
    num_classes: int,
    rates: Sequence[float],
    name: str = "linear",
    score_batch: int = 1024,
    **options: Any,
) -> dict[str, float]:
    """Accuracy on `test` of the head, of all levels and rates, that is best on `held_out`.

    held_out, test: (features {level: [n, d]}, labels int [n]), which `draw` does not draw from. Of equals
    the first level and rate are chosen. options: of `train`. Figures: '<name>/top1', '<name>/top5',
    '<name>/rate', '<name>/held_out' (top-1 there) and, for several levels, '<name>/top1/<level>' of the
    rate that is best on `held_out` for the level (NaN where all rates diverged). Raises ValueError for
    labels outside the classes, features that are not finite, and where every head diverged.
    """
    for part, (features, labels) in (("held-out", held_out), ("test", test)):
        _check(features, labels, num_classes, f"{name}: {part}")
    probe = train(draw, steps=steps, num_classes=num_classes, rates=rates, **options)
    seen = scores(probe, _batches(*held_out, score_batch, name))["top1"]
    best = {level: int(np.argmax(np.nan_to_num(top1, nan=-1.0))) for level, top1 in seen.items()}
    top = {level: float(seen[level][rate]) for level, rate in best.items()}
    finite = [level for level in top if not math.isnan(top[level])]
    if not finite:
        raise ValueError(f"{name}: all heads diverged with rates {tuple(rates)}; use lower ones")
    level = max(finite, key=top.__getitem__)
    found = scores(_chosen(probe, best), _batches(*test, score_batch, name))
    figures = {f"{name}/{figure}": float(found[figure][level][0]) for figure in ("top1", "top5")}
    figures |= {f"{name}/rate": probe.rates[best[level]], f"{name}/held_out": top[level]}
    several = found["top1"].items() if len(best) > 1 else ()
    return figures | {f"{name}/top1/{of_level}": float(top1[0]) for of_level, top1 in several}


def logits(probe: Probe, features: Mapping[str, Any], level: str) -> Float[Array, "rates n classes"]:
    """Class scores of features {level: [n, d]} by every head of the level, with the running statistics."""
    x = jnp.asarray(features[level], jnp.float32)
    if level in probe.moments:
        x = heads.normalised(x, *map(jnp.asarray, probe.moments[level]))
    return heads.logits(jnp.asarray(probe.kernel[level]), jnp.asarray(probe.bias[level]), x)


@jax.jit
def _hits(probe, features, labels):
    """Examples [2, rates] whose class is the first, and among the first five, of the one level given."""
    (level,) = features
    found, labels = logits(probe, features, level), labels[None, :, None]
    own = jnp.take_along_axis(found, jnp.broadcast_to(labels, (len(found), labels.shape[1], 1)), axis=2)
    earlier = jnp.arange(found.shape[2])[None, None] < labels
    rank = jnp.sum((found > own) | ((found == own) & earlier), axis=2)
    right = jnp.isfinite(found).all(2) & (labels[..., 0] >= 0)
    return jnp.stack([jnp.sum(right & (rank < first), axis=1) for first in (1, 5)])


def _chosen(probe: Probe, rate: dict[str, int]) -> Probe:
    """The probe with one head, of the given index, for each level."""
    kernel, bias = ({k: v[k][None, rate[k]] for k in rate} for v in (probe.kernel, probe.bias))
    return probe._replace(kernel=kernel, bias=bias)


def _batches(
    features: Features, labels: np.ndarray, size: int, name: str
) -> Iterator[tuple[Features, np.ndarray]]:
    """Rows in order, in batches of one size: the last one is padded with labels of -1."""
    size = min(size, len(labels))
    for first in range(0, len(labels), size):
        rows = np.minimum(np.arange(first, first + size), len(labels) - 1)
        batch = {level: np.asarray(values[rows], np.float32) for level, values in features.items()}
        if not all(np.isfinite(values).all() for values in batch.values()):
            raise ValueError(f"{name}: features are not finite; the encoder has diverged")
        yield batch, np.where(np.arange(first, first + size) < len(labels), labels[rows], -1)


def _check(features: Features, labels: np.ndarray, num_classes: int, what: str) -> None:
    lengths = {level: len(values) for level, values in features.items()}
    if set(lengths.values()) != {len(labels)} or not len(labels):
        raise ValueError(f"{what} has features of {lengths} rows and {len(labels)} labels; both must agree")
    if np.min(labels) < 0 or np.max(labels) >= num_classes:
        raise ValueError(
            f"{what} labels reach from {np.min(labels)} to {np.max(labels)}, beyond {num_classes} classes"
        )
