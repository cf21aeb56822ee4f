"""Semantic segmentation by a linear probe on dense frozen features: one linear layer for every cell.

Training takes the share of each class in a cell as its soft target, which is the per-pixel cross-entropy
of logits up-sampled to the nearest cell; prediction up-samples the logits bilinearly.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from salcl_jax.evaluators import heads, probe

Scenes = tuple[np.ndarray, np.ndarray]  # features [n, h, w, d], masks uint8 [n, s, s]
Head = tuple[np.ndarray, np.ndarray]  # kernel [d, c], bias [c]
VOID = 255  # pixels that count in nothing
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def evaluate(
    train: Scenes,
    test: Scenes,
    *,
    num_classes: int,
    class_names: Sequence[str],
    rates: Sequence[float] = RATES,
    epochs: int = 20,
    batch_size: int = 1024,
    seed: int = 0,
    chunk: int = 8,
) -> dict[str, float]:
    """Segmentation of `test` by the probe of `train` that is best on held-out images of `train`.

    train, test: (features float [n, h, w, d], masks uint8 [n, s, s]); the features may be memory maps.
    Class 0 is background, 255 void. Features are standardised per channel by the moments of `train`. SGD
    (Nesterov 0.9, cosine) on batches of `batch_size` cells, each of the fitted images' `epochs` times;
    rates: learning rates for 256 cells, scaled linearly. A fixed random tenth of the images is held out
    and chooses the rate by mIoU, the first of equals. `chunk` images are predicted at a time.
    Figures: 'segmentation/miou' (mean IoU of the classes present in the test masks),
    'segmentation/accuracy' (of pixels), 'segmentation/iou/<class>' (NaN: not in the test masks),
    'segmentation/rate', 'segmentation/held_out' (mIoU there) and 'segmentation/miou_background' (mIoU of
    calling everything background). Raises ValueError for sets that do not fit together, classes beyond
    num_classes, features that are not finite, and where every head diverged.
    """
    for name, scenes in (("train", train), ("test", test)):
        _check(name, *scenes, num_classes, class_names)
    moments = _moments(train[0])
    fit_on, held_out = probe.split(len(train[1]))
    trained = _train(train, fit_on, moments, num_classes, rates, epochs, batch_size, seed)
    each = list(zip(trained.kernel["map"], trained.bias["map"], strict=True))
    seen = _confusions(each, train, held_out, moments, chunk)
    finite = [np.isfinite(kernel).all() and np.isfinite(bias).all() for kernel, bias in each]
    if not any(finite):
        raise ValueError(f"segmentation: all heads diverged with rates {tuple(rates)}; use lower ones")
    scores = np.where(finite, [np.nan_to_num(_mean(iou_of(c))) for c in seen], -1.0)
    best = int(np.argmax(scores))
    (found,) = _confusions(each[best : best + 1], test, np.arange(len(test[1])), moments, chunk)
    chosen = {"segmentation/rate": trained.rates[best], "segmentation/held_out": _mean(iou_of(seen[best]))}
    return _figures(found, class_names) | chosen


def cell_targets(
    masks: UInt8[np.ndarray, "n s s"], h: int, w: int, num_classes: int
) -> Float[np.ndarray, "n h w c"]:
    """Share of each class in the area of each of h x w cells, float32; void counts in no class.

    A row sums to the share of the cell that is not void, its weight. Pixels on a border between cells
    count in both by the parts that lie there.
    """
    rows, columns = (_overlaps(masks.shape[1], cells) for cells in (h, w))
    result = np.zeros((len(masks), h, w, num_classes), np.float32)
    for mask, target in zip(masks, result, strict=True):
        for label in np.unique(mask[mask < num_classes]):
            target[..., label] = rows @ (mask == label).astype(np.float32) @ columns.T
    return result


def confusion(
    predicted: Int[np.ndarray, "*s"] | UInt8[np.ndarray, "*s"],
    truth: Int[np.ndarray, "*s"] | UInt8[np.ndarray, "*s"],
    num_classes: int,
) -> Int[np.ndarray, "c c"]:
    """Numbers of pixels [truth, predicted], those of void truth left out.

    Raises ValueError for a class beyond num_classes.
    """
    known = truth != VOID
    truth, predicted = truth[known].astype(np.int64), predicted[known].astype(np.int64)
    both = np.concatenate([truth, predicted])
    if np.any((both < 0) | (both >= num_classes)):
        raise ValueError(f"segmentation: masks have classes outside 0..{num_classes - 1} other than {VOID}")
    counts = np.bincount(truth * num_classes + predicted, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def iou_of(confusion: Int[np.ndarray, "c c"]) -> Float[np.ndarray, "c"]:
    """Intersection over union of each class, NaN for those that are not in the truth."""
    right, present = np.diagonal(confusion), confusion.sum(1)
    union = present + confusion.sum(0) - right
    return np.where(present > 0, right / np.maximum(union, 1), np.nan)


def _train(
    train: Scenes,
    images: np.ndarray,
    moments: tuple[np.ndarray, np.ndarray],
    num_classes: int,
    rates: Sequence[float],
    epochs: int,
    batch_size: int,
    seed: int,
) -> probe.Probe:
    """Probe of the level 'map' from the cells of some images."""
    features, masks = train
    _, h, w, d = features.shape
    targets = np.zeros((len(masks), h * w, num_classes), np.float32)
    targets[images] = cell_targets(masks[images], h, w, num_classes).reshape(-1, h * w, num_classes)
    targets = targets.reshape(-1, num_classes)
    rows = np.flatnonzero(targets.sum(1) > 0)  # of the images, and not all void
    if not len(rows):
        raise ValueError("segmentation: the training masks are void everywhere")
    draw = probe.from_arrays(
        {"map": features.reshape(-1, d)}, targets, rows, batch_size=batch_size, seed=seed
    )

    def standardised(step: int) -> tuple[probe.Features, np.ndarray]:
        cells, target = draw(step)
        return {"map": (cells["map"] - moments[0]) / moments[1]}, target

    steps = max(1, round(epochs * len(rows) / batch_size))
    return probe.train(standardised, steps=steps, num_classes=num_classes, rates=rates, seed=seed)


def _confusions(
    each: list[Head], scenes: Scenes, images: np.ndarray, moments: tuple, chunk: int
) -> np.ndarray:
    """Confusion [heads, c, c] of each head on some images."""
    side, num_classes = scenes[1].shape[1], len(each[0][1])
    result = np.zeros((len(each), num_classes, num_classes), np.int64)
    on_device = [jax.device_put(head) for head in each]
    for features, masks in _chunks(scenes, images, chunk):
        x = jnp.asarray((features - moments[0]) / moments[1])
        for index, head in enumerate(on_device):
            result[index] += confusion(np.asarray(_predict(*head, x, side)), masks, num_classes)
    return result


@partial(jax.jit, static_argnames="side")
def _predict(kernel, bias, x, side):
    """Classes [b, s, s] of maps x [b, h, w, d], by logits up-sampled between the centres of cells."""
    b, h, w, d = x.shape
    logits = heads.logits(kernel[None], bias[None], x.reshape(-1, d)).reshape(b, h, w, -1)
    return jnp.argmax(jax.image.resize(logits, (b, side, side, logits.shape[3]), "linear"), axis=-1)


def _chunks(scenes: Scenes, images: np.ndarray, size: int) -> Iterator[Scenes]:
    """Features and masks of some images, in batches of one size; void images fill the last one."""
    size = min(size, len(images))
    for first in range(0, len(images), size):
        rows = images[np.minimum(np.arange(first, first + size), len(images) - 1)]
        features, masks = np.asarray(scenes[0][rows], np.float32), np.array(scenes[1][rows])
        if not np.isfinite(features).all():
            raise ValueError("segmentation: features are not finite; the encoder has diverged")
        masks[len(images) - first :] = VOID
        yield features, masks


def _moments(features: np.ndarray, images: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation [d] over all cells, read some images at a time; a constant channel gets 1."""
    d, count = features.shape[-1], features.size // features.shape[-1]
    parts = [slice(first, first + images) for first in range(0, len(features), images)]
    mean = sum(features[part].reshape(-1, d).sum(0, dtype=np.float64) for part in parts) / count
    if not np.isfinite(mean).all():
        raise ValueError("segmentation: train features are not finite; the encoder has diverged")
    square = sum(np.square(features[part].reshape(-1, d) - mean).sum(0) for part in parts) / count
    scale = np.sqrt(square)
    constant = scale <= 1e-6 * np.maximum(np.abs(mean), 1e-6)
    return mean.astype(np.float32), np.where(constant, 1.0, scale).astype(np.float32)


def _overlaps(side: int, cells: int) -> np.ndarray:
    """Matrix [cells, side]: the part of each cell's length that each pixel takes."""
    pixel, cell = np.arange(side + 1) / side, np.arange(cells + 1) / cells
    low = np.maximum(pixel[None, :-1], cell[:-1, None])
    high = np.minimum(pixel[None, 1:], cell[1:, None])
    return (cells * np.maximum(high - low, 0.0)).astype(np.float32)


def _figures(found: np.ndarray, class_names: Sequence[str]) -> dict[str, float]:
    truth = found.sum(1)
    background = np.zeros_like(found)
    background[:, 0] = truth
    iou = iou_of(found)
    figures = {
        "miou": _mean(iou),
        "accuracy": float(np.trace(found) / truth.sum()) if truth.any() else float("nan"),
        "miou_background": _mean(iou_of(background)),
    }
    figures |= {f"iou/{name}": float(value) for name, value in zip(class_names, iou, strict=True)}
    return {f"segmentation/{name}": value for name, value in figures.items()}


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _check(
    name: str, features: np.ndarray, masks: np.ndarray, num_classes: int, class_names: Sequence[str]
) -> None:
    if len(class_names) != num_classes or not 2 <= num_classes <= VOID:
        raise ValueError(f"segmentation: {len(class_names)} names for {num_classes} classes (2 to {VOID})")
    if features.ndim != 4 or masks.ndim != 3 or len(features) != len(masks) or not len(masks):
        raise ValueError(
            f"segmentation: {name} features {features.shape} and masks {masks.shape} must be [n, h, w, d] "
            "and [n, s, s]"
        )
    worst = max(int(np.max(mask, where=mask != VOID, initial=0)) for mask in masks)
    if worst >= num_classes:
        raise ValueError(f"segmentation: {name} masks have class {worst}; there are {num_classes}")
