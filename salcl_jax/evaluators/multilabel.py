"""Linear probe on image-level labels: one logistic regression a class on frozen features."""

from collections.abc import Sequence

import numpy as np

from salcl_jax.evaluators import average_precision, linear
from salcl_jax.evaluators.average_precision import Examples


def evaluate(
    train: Examples,
    test: Examples,
    *,
    class_names: Sequence[str],
    l2s: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1),
    steps: int = 200,
) -> dict[str, float]:
    """Mean average precision on `test` ('multilabel/map') and what belongs to it.

    train, test: (features float [n, d], labels int [n, c] as of average_precision.image_labels);
    an ignored example is left out for its class, in both sets. Each feature is standardised by the
    training set's mean and deviation. One penalty serves all classes: the one of `l2s` with the
    best mean average precision on a fixed random fifth of `train` (the largest among equals, and
    where nothing can be measured there); the probe is then fitted to all of `train`.
    Figures: 'map' and 'ap/<class>' (average_precision.plain, scikit-learn's), 'l2', 'classes' (how
    many count) and 'map_chance': the mean share of positives in `test`, what scores without any
    knowledge come to. A class counts if `train` has positives and negatives of it and `test` has
    positives; the others are NaN and in no mean. Raises ValueError for features that are not
    finite and for sets that do not fit together.
    """
    average_precision.check("multilabel", train, test, class_names)
    if not l2s:
        raise ValueError("multilabel: l2s is empty; name at least one penalty")
    mean, scale = linear.standardisation(train[0])
    x, x_test = (((features - mean) / scale).astype(np.float32) for features, _ in (train, test))
    labels, test_labels = train[1], test[1]
    best = max(l2s) if len(x) < 2 or len(l2s) == 1 else _choose(x, labels, l2s, steps)
    counts = average_precision.learnable(labels) & np.any(test_labels == 1, axis=0)
    precision = _precision(_fit(x, labels, best, steps), x_test, test_labels)
    precision = np.where(counts, precision, np.nan)
    share = np.sum(test_labels == 1, 0) / np.maximum(np.sum(test_labels >= 0, 0), 1)
    result = {
        "map": average_precision.mean(precision),
        "map_chance": average_precision.mean(np.where(counts, share, np.nan)),
        "classes": float(counts.sum()),
        "l2": float(best),
    }
    result |= {f"ap/{name}": float(value)
               for name, value in zip(class_names, precision, strict=True)}
    return {f"multilabel/{name}": value for name, value in result.items()}


def _fit(x: np.ndarray, labels: np.ndarray, l2: float, steps: int):
    return linear.fit(
        x, labels == 1, l2, steps=steps, num_classes=labels.shape[1], loss="sigmoid",
        weight=labels >= 0,
    )  # fmt: skip


def _precision(weights, x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    scores = np.asarray(linear.logits(weights, x))
    return average_precision.per_class(average_precision.plain, scores, labels)


def _choose(x: np.ndarray, labels: np.ndarray, l2s: Sequence[float], steps: int) -> float:
    fit_on, held_out = linear.split(len(x))
    able = average_precision.learnable(labels[fit_on])

    def score(l2: float) -> tuple[float, float]:
        weights = _fit(x[fit_on], labels[fit_on], l2, steps)
        precision = _precision(weights, x[held_out], labels[held_out])
        # Zero instead of NaN: every penalty is then equal, and NaN would compare as it likes.
        return float(np.nan_to_num(average_precision.mean(precision[able]))), l2

    return max(map(score, l2s))[1]
