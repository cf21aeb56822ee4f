"""Average precision against loops over thresholds in exact fractions, and scikit-learn."""

from fractions import Fraction

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from salcl_jax.evaluators import average_precision as ap

METRICS = (ap.all_point, ap.eleven_point, ap.plain)


def points(scores, positive):
    """(recall, precision) as fractions of 'predict what scores at least t', t falling."""
    found = []
    for t in sorted(set(scores.tolist()), reverse=True):
        hits = [p for s, p in zip(scores.tolist(), positive.tolist(), strict=True) if s >= t]
        found.append((Fraction(sum(hits), int(positive.sum())), Fraction(sum(hits), len(hits))))
    return found


def envelope(found, recall):
    return max(precision for reached, precision in found if reached >= recall)


def by_hand(metric, scores, positive):
    found, count = points(scores, positive), int(positive.sum())
    if metric is ap.eleven_point:
        return sum(envelope(found, Fraction(i, 10)) for i in range(11)) / 11
    if metric is ap.all_point:  # the envelope is constant between multiples of 1 / count
        return sum(envelope(found, Fraction(i, count)) for i in range(1, count + 1)) / count
    before = [Fraction(0), *(recall for recall, _ in found)]
    return sum((r - b) * p for (r, p), b in zip(found, before, strict=False))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("levels", [2, 6, 10**6])
def test_metrics_match_loops_over_thresholds(metric, levels):
    rng = np.random.default_rng(levels)
    for _ in range(40):
        n = int(rng.integers(1, 40))
        scores = rng.integers(0, levels, n) / 7 - 1
        positive = rng.random(n) < rng.choice([0.1, 0.5, 0.9])
        positive[rng.integers(n)] = True
        expected = float(by_hand(metric, scores, positive))
        assert metric(scores, positive) == pytest.approx(expected, abs=1e-12)
        order = rng.permutation(n)
        assert metric(scores[order], positive[order]) == metric(scores, positive)


def test_metrics_of_a_worked_example():
    scores, positive = np.array([9.0, 7.0, 5.0, 3.0, 1.0]), np.array([1, 0, 0, 1, 1], bool)
    assert ap.plain(scores, positive) == pytest.approx((1 + 2 / 4 + 3 / 5) / 3)
    assert ap.all_point(scores, positive) == pytest.approx((1 + 3 / 5 + 3 / 5) / 3)
    # Recalls 0, .1, .2, .3 are reached at once, the other seven by the fifth example.
    assert ap.eleven_point(scores, positive) == pytest.approx((4 + 7 * 3 / 5) / 11)


def test_plain_matches_sklearn():
    rng = np.random.default_rng(0)
    for levels in (3, 50, 10**9):
        scores = rng.integers(0, levels, 200).astype(np.float32)
        positive = rng.random(200) < 0.2
        expected = average_precision_score(positive, scores)
        assert ap.plain(scores, positive) == pytest.approx(expected, abs=1e-12)


def test_a_recall_of_three_tenths_is_reached():
    positive = np.repeat([True, False, True], [3, 97, 7])
    expected = (4 * 1 + 7 * 10 / 107) / 11
    assert ap.eleven_point(-np.arange(107.0), positive) == pytest.approx(expected)


@pytest.mark.parametrize("metric", METRICS)
def test_extremes(metric):
    positive = np.array([True, True, True, False, False])
    assert metric(np.array([0.9, 0.8, 0.7, 0.3, 0.2]), positive) == 1.0
    assert metric(np.zeros(5), positive) == pytest.approx(3 / 5)  # one threshold: all of them
    assert metric(np.array([1.0, 2.0, 3.0, 4.0]), np.eye(4, dtype=bool)[0]) == 1 / 4
    assert np.isnan(metric(np.arange(3.0), np.zeros(3, bool)))
    assert np.isnan(metric(np.zeros(0), np.zeros(0, bool)))


@pytest.mark.parametrize("metric", METRICS)
def test_metrics_refuse_bad_input(metric):
    with pytest.raises(ValueError, match="NaN"):
        metric(np.array([0.0, np.nan]), np.array([True, False]))
    with pytest.raises(ValueError, match="average_precision:"):
        metric(np.zeros(3), np.ones(2, bool))


def test_random_scores_come_to_the_share_of_positives():
    rng = np.random.default_rng(1)
    positive = np.arange(3000) < 600
    values = [ap.plain(rng.random(3000), positive) for _ in range(20)]
    assert np.mean(values) == pytest.approx(0.2, abs=0.01)


def test_per_class_leaves_ignored_examples_out():
    rng = np.random.default_rng(2)
    scores, labels = rng.normal(size=(60, 4)), rng.integers(-1, 2, (60, 4)).astype(np.int8)
    labels[:, 1] = 0
    labels[:, 2] = -1
    values = ap.per_class(ap.plain, scores, labels)
    assert values.dtype == np.float64 and np.isnan(values[1:3]).all()
    for c in (0, 3):
        kept = labels[:, c] != -1
        assert 10 < kept.sum() < 60
        expected = average_precision_score(labels[kept, c], scores[kept, c])
        assert values[c] == pytest.approx(expected, abs=1e-12)
    assert ap.mean(values) == pytest.approx((values[0] + values[3]) / 2)
    assert np.isnan(ap.mean(values[1:3])) and np.isnan(ap.mean(values[:0]))


def test_image_labels():
    classes = np.array([[0, 0, 2], [1, -1, -1], [-1, -1, -1], [2, 2, 1]], np.int32)
    difficult = np.array([[1, 0, 1], [1, 1, 1], [1, 1, 1], [1, 1, 0]], bool)
    labels = ap.image_labels(classes, difficult, 4)
    assert labels.dtype == np.int8
    np.testing.assert_array_equal(
        labels, [[1, 0, -1, 0], [0, -1, 0, 0], [0, 0, 0, 0], [0, 1, -1, 0]]
    )
    easy = ap.image_labels(classes, None, 3)
    np.testing.assert_array_equal(easy, [[1, 0, 1], [0, 1, 0], [0, 0, 0], [0, 1, 1]])
    assert not ap.image_labels(classes[:, :0], None, 3).any()
    # The order of an image's objects says nothing.
    flipped = ap.image_labels(classes[:, ::-1], difficult[:, ::-1], 4)
    np.testing.assert_array_equal(flipped, labels)
    for wrong in (np.array([[3]]), np.array([[-2]])):
        with pytest.raises(ValueError, match="image_labels:"):
            ap.image_labels(wrong, None, 3)


def test_learnable_classes_have_both_kinds():
    labels = np.array([[1, 1, 0, 1, -1], [0, 1, 0, -1, -1]], np.int8)
    np.testing.assert_array_equal(ap.learnable(labels), [True, False, False, False, False])


def test_check_refuses_sets_that_do_not_fit():
    x, y = np.zeros((4, 3), np.float32), np.zeros((4, 2), np.int8)
    good, names = (x, y), ("a", "b")
    ap.check("task", good, good, names)
    for train, test, classes in (
        ((x[:3], y), good, names), (good, (x, y[:2]), names), (good, (x[:, :2], y), names),
        ((x[:0], y[:0]), good, names), (good, good, ("a",)), (good, good, ("a", "a")),
        ((x, y + 2), good, names), (good, (x, y[:, 0]), names), (good, good, ()),
        ((x[:, None], y), (x[:, None], y), names),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="^task: "):
            ap.check("task", train, test, classes)
    for broken in (np.nan, np.inf):
        with pytest.raises(ValueError, match="test features are not finite; the encoder"):
            ap.check("task", good, (x + np.float32(broken), y), names)
