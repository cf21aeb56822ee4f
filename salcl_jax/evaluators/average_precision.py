"""Average precision of image-level labels, in the three ways the literature computes it.

Equal scores are one threshold: the order of the examples never matters. Where nothing is positive
every average precision is NaN.
"""

from collections.abc import Callable, Sequence

import numpy as np

Examples = tuple[np.ndarray, np.ndarray]  # features [n, d], labels [n, c]: 1, 0 or -1 (ignored)


def all_point(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the precision envelope of scores [n], positive bool [n]: VOC from 2010 on.

    The envelope is the best precision at this recall or a larger one. What OpenSelfSup and ORL
    report for the SVMs on VOC07. Raises ValueError for scores that are NaN.

    >>> round(all_point(np.array([0.9, 0.8, 0.7]), np.array([True, False, True])), 4)
    0.8333
    """
    found, precision = _curve(scores, positive)
    return _area(found, np.maximum.accumulate(precision[::-1])[::-1])


def eleven_point(scores: np.ndarray, positive: np.ndarray) -> float:
    """Mean of the envelope at the recalls 0, 0.1 .. 1: the official figure of VOC07.

    scores [n], positive bool [n]. Raises ValueError for scores that are NaN.
    """
    found, precision = _curve(scores, positive)
    if not len(found):
        return float("nan")
    # In whole numbers: 0.3 is no binary fraction, and a recall of 3 / 10 must reach it.
    reached = [10 * found >= tenths * found[-1] for tenths in range(11)]
    return float(np.mean([precision[at_least].max() for at_least in reached]))


def plain(scores: np.ndarray, positive: np.ndarray) -> float:
    """Mean over the positives of the precision at their score, without envelope (scikit-learn's).

    scores [n], positive bool [n]. Raises ValueError for scores that are NaN.
    """
    return _area(*_curve(scores, positive))


def per_class(
    metric: Callable[[np.ndarray, np.ndarray], float], scores: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """`metric` of each class, float64 [c], from scores [n, c] and labels int [n, c].

    Labels: 1 present, 0 absent, -1 leaves this example out for this class.
    """
    known = labels >= 0
    values = [metric(scores[known[:, c], c], labels[known[:, c], c] == 1)
              for c in range(labels.shape[1])]
    return np.array(values, np.float64)


def mean(values: np.ndarray) -> float:
    """Mean over the values that are not NaN; NaN if there is none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def image_labels(
    classes: np.ndarray, difficult: np.ndarray | None, num_classes: int
) -> np.ndarray:
    """Labels int8 [n, c] of images from their objects: classes int [n, k], -1 is padding.

    1 where an object of the class is not difficult, -1 where all of them are (difficult bool
    [n, k]; None: none is), 0 where there is none. Raises ValueError for unknown classes.
    """
    if classes.size and (classes.min() < -1 or classes.max() >= num_classes):
        raise ValueError(f"image_labels: classes must lie in -1..{num_classes - 1}")
    labels = np.zeros((len(classes), num_classes), np.int8)
    row, column = np.nonzero(classes >= 0)
    hard = np.zeros(len(row), bool) if difficult is None else difficult[row, column].astype(bool)
    kind = classes[row, column]
    labels[row[hard], kind[hard]] = -1
    labels[row[~hard], kind[~hard]] = 1
    return labels


def learnable(labels: np.ndarray) -> np.ndarray:
    """Which classes of labels [n, c] have both a positive and a negative example: bool [c]."""
    return np.any(labels == 1, axis=0) & np.any(labels == 0, axis=0)


def check(task: str, train: Examples, test: Examples, class_names: Sequence[str]) -> None:
    """Raises ValueError, beginning with `task`, for sets that a probe cannot be measured on."""
    count = len(class_names)
    if not count or len(set(class_names)) != count:
        raise ValueError(f"{task}: class_names must name at least one class, each once")
    for name, (features, labels) in (("train", train), ("test", test)):
        if len(features) != len(labels) or not len(labels):
            raise ValueError(f"{task}: {name} has {len(features)} features, {len(labels)} labels")
        if labels.shape[1:] != (count,):
            raise ValueError(f"{task}: {name} labels are {labels.shape}, but {count} class_names")
        if not np.isfinite(features).all():
            raise ValueError(f"{task}: {name} features are not finite; the encoder has diverged")
        if not np.isin(labels, (-1, 0, 1)).all():
            raise ValueError(f"{task}: {name} labels must be 1, 0 or -1 (ignored)")
    if train[0].shape[1:] != test[0].shape[1:] or train[0].ndim != 2:
        raise ValueError(
            f"{task}: features of train {train[0].shape} and test {test[0].shape} do not match"
        )


def _curve(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positives found and precision at each score, highest first; empty for no positive."""
    scores, positive = np.asarray(scores), np.asarray(positive, bool)
    if scores.shape != positive.shape or scores.ndim != 1:
        raise ValueError(f"average_precision: {scores.shape} scores, {positive.shape} labels")
    if np.isnan(scores).any():
        raise ValueError("average_precision: scores are NaN; the classifier has diverged")
    if not positive.any():
        return np.zeros(0, np.int64), np.zeros(0)
    order = np.argsort(scores)[::-1]
    ranked = scores[order]
    last = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
    found = np.cumsum(positive[order])[last]
    return found, found / (last + 1)


def _area(found: np.ndarray, precision: np.ndarray) -> float:
    """Area under precision over recall; exactly 1 where the precision is 1 throughout."""
    if not len(found):
        return float("nan")
    return float(np.diff(found, prepend=0) @ precision / found[-1])
