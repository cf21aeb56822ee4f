"""The multi-label probe against scikit-learn's logistic regression of each class."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.preprocessing import StandardScaler

from salcl_jax.evaluators import linear, multilabel

NAMES = ("cat", "dog", "cow")
L2 = 1e-2


def data(n=90, d=6, noise=1.0, seed=0, ignored=0.15):
    kernel = np.random.default_rng(99).normal(size=(3, d))
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, 3)) < (0.2, 0.3, 0.5)).astype(np.int8)
    x = labels @ kernel + noise * rng.normal(size=(n, d))
    labels[rng.random(labels.shape) < ignored] = -1
    return (x * np.arange(1, d + 1) + 5).astype(np.float32), labels


def permuted(examples, seed=5):
    return examples[0], np.random.default_rng(seed).permutation(examples[1])


def standard(train, *others):
    scaler = StandardScaler().fit(train[0])
    return [scaler.transform(x).astype(np.float32) for x, _ in (train, *others)]


def sklearn_class(x, labels, c, l2):
    known = labels[:, c] != -1
    model = LogisticRegression(C=1 / (l2 * known.sum()), tol=1e-8, solver="newton-cholesky")
    return model.fit(x[known].astype(np.float64), labels[known, c])


def sklearn_ap(x, labels, x_test, test_labels, l2):
    values = []
    for c in range(labels.shape[1]):
        scores = sklearn_class(x, labels, c, l2).decision_function(x_test)
        known = test_labels[:, c] != -1
        values.append(average_precision_score(test_labels[known, c], scores[known]))
    return values


@pytest.mark.parametrize("l2", [1e-3, L2, 1.0])
def test_sigmoid_fit_matches_sklearn_class_by_class(l2):
    train = data()
    (x,), labels = standard(train), train[1]
    kernel, bias = linear.fit(
        x, labels == 1, l2, steps=300, num_classes=3, loss="sigmoid", weight=labels >= 0
    )
    assert len(set((labels >= 0).sum(0))) > 1  # classes with an n of their own
    for c in range(3):
        theirs = sklearn_class(x, labels, c, l2)
        np.testing.assert_allclose(kernel[:, c], theirs.coef_[0], atol=1e-3)
        np.testing.assert_allclose(bias[c], theirs.intercept_[0], atol=1e-3)


def test_sigmoid_fit_takes_weights_and_soft_labels():
    train = data(ignored=0.0)
    (x,) = standard(train)
    rng = np.random.default_rng(1)
    weight, soft = rng.random((2, 90, 3)).astype(np.float32)
    kernel, _ = linear.fit(
        x, soft, L2, steps=300, num_classes=3, loss="sigmoid", weight=weight
    )
    for c in range(3):
        # An example of label p is p examples of label 1 and 1 - p of label 0.
        share = np.concatenate([weight[:, c] * soft[:, c], weight[:, c] * (1 - soft[:, c])])
        model = LogisticRegression(C=1 / (L2 * weight[:, c].sum()), tol=1e-8, max_iter=5000)
        model.fit(np.concatenate([x, x]), np.repeat([1, 0], 90), sample_weight=share)
        np.testing.assert_allclose(kernel[:, c], model.coef_[0], atol=1e-3)


def test_sigmoid_fit_without_weight_and_with_an_empty_class():
    train = data(ignored=0.0)
    (x,), truth = standard(train), train[1] == 1
    options = {"steps": 300, "num_classes": 3, "loss": "sigmoid"}
    plain = linear.fit(x, truth, L2, **options)
    ones = linear.fit(x, truth, L2, weight=np.ones((90, 3), np.float32), **options)
    np.testing.assert_array_equal(plain[0], ones[0])
    weight = np.repeat([[True, False, True]], 90, 0)
    kernel, bias = (np.asarray(w) for w in linear.fit(x, truth, L2, weight=weight, **options))
    assert not kernel[:, 1].any() and not bias[1].any()
    np.testing.assert_allclose(kernel[:, [0, 2]], np.asarray(plain[0])[:, [0, 2]], atol=1e-3)


def test_fit_refuses_a_loss_that_does_not_go_with_the_labels():
    x, y, many = np.zeros((4, 2), np.float32), np.zeros(4, np.int32), np.zeros((4, 3), bool)
    for labels, options in (
        (y, {"loss": "sigmoid"}), (many, {"loss": "softmax"}), (many, {}),
        (many[:, :2], {"loss": "sigmoid"}), (y, {"loss": "hinge"}), (y, {"weight": many}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="^linear: loss="):
            linear.fit(x, labels, L2, steps=1, num_classes=3, **options)


def test_figures_match_sklearn():
    train, test = data(), data(200, seed=1)
    result = multilabel.evaluate(train, test, class_names=NAMES, l2s=(L2,))
    x, x_test = standard(train, test)
    expected = sklearn_ap(x, train[1], x_test, test[1], L2)
    assert 0.4 < np.mean(expected) < 0.98  # or the comparison would say little
    for name, value in zip(NAMES, expected, strict=True):
        assert result[f"multilabel/ap/{name}"] == pytest.approx(value, abs=2e-3)
    assert result["multilabel/map"] == pytest.approx(np.mean(expected), abs=2e-3)
    share = [np.mean(column[column != -1]) for column in test[1].T]
    assert result["multilabel/map_chance"] == pytest.approx(np.mean(share))
    assert result["multilabel/l2"] == L2 and result["multilabel/classes"] == 3.0
    assert len(result) == 4 + 3


@pytest.mark.parametrize("seed, best", [(0, 1.0), (1, 1e-3)])
def test_penalty_is_chosen_on_held_out_examples_and_never_on_test(seed, best):
    train, test = data(seed=seed), data(60, seed=7)
    l2s = (1e-3, 1.0, 1e-1)
    first = multilabel.evaluate(train, test, class_names=NAMES, l2s=l2s)
    fit_on, held_out = linear.split(90)
    (x,) = standard(train)
    scores = [np.mean(sklearn_ap(x[fit_on], train[1][fit_on], x[held_out], train[1][held_out], l2))
              for l2 in l2s]
    assert np.ptp(scores) > 0.05
    assert first["multilabel/l2"] == l2s[int(np.argmax(scores))] == best
    for other in (permuted(test), (test[0], np.roll(test[1], 1, axis=1)), data(50, seed=8)):
        result = multilabel.evaluate(train, other, class_names=NAMES, l2s=l2s)
        assert result["multilabel/l2"] == first["multilabel/l2"]
        assert result["multilabel/map"] != first["multilabel/map"]


def separable(n, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (n, 3)).astype(np.int8)
    x = np.concatenate([2.0 * labels - 1, np.zeros((n, 3))], 1) + 0.05 * rng.normal(size=(n, 6))
    return x.astype(np.float32), labels


def test_separable_data_give_one_and_the_largest_of_equal_penalties():
    train, test = separable(90, 0), separable(60, 1)
    result = multilabel.evaluate(train, test, class_names=NAMES, l2s=(1e-3, 1e-1, 1e-2))
    assert result["multilabel/map"] == 1.0 and result["multilabel/l2"] == 1e-1
    assert all(result[f"multilabel/ap/{name}"] == 1.0 for name in NAMES)


def test_shuffled_labels_give_chance():
    train, test = data(), data(600, seed=1)
    result = multilabel.evaluate(permuted(train), permuted(test), class_names=NAMES)
    assert 0.28 < result["multilabel/map_chance"] < 0.38
    # Random scores on 600 images deviate by 0.02 a class.
    assert result["multilabel/map"] == pytest.approx(result["multilabel/map_chance"], abs=0.06)
    assert multilabel.evaluate(train, test, class_names=NAMES)["multilabel/map"] > 0.5


def test_ignored_test_images_say_nothing():
    train, test = data(), data(60, seed=1)
    clean = multilabel.evaluate(train, test, class_names=NAMES, l2s=(L2,))
    more = np.concatenate([9 * test[0], test[0]]), np.concatenate([0 * test[1] - 1, test[1]])
    assert multilabel.evaluate(train, more, class_names=NAMES, l2s=(L2,)) == clean


def test_classes_that_cannot_be_measured_are_left_out():
    train, test = data(ignored=0.0), data(60, seed=1, ignored=0.0)
    test[1][:, 1] = 0
    one = multilabel.evaluate(train, test, class_names=NAMES)
    assert one["multilabel/classes"] == 2.0 and np.isnan(one["multilabel/ap/dog"])
    kept = [one["multilabel/ap/cat"], one["multilabel/ap/cow"]]
    assert one["multilabel/map"] == pytest.approx(np.mean(kept))
    assert one["multilabel/map_chance"] == pytest.approx(test[1][:, [0, 2]].mean())
    train[1][:] = (0, 0, 1)  # nothing to choose by
    none = multilabel.evaluate(train, test, class_names=NAMES)
    assert none["multilabel/classes"] == 0.0 and none["multilabel/l2"] == 1e-1
    assert np.isnan(none["multilabel/map"]) and np.isnan(none["multilabel/map_chance"])


def test_multilabel_refuses_bad_input():
    train, test = data(20), data(10)
    for arguments, options in (
        (((train[0] * np.float32(np.inf), train[1]), test), {}), ((train, test), {"l2s": ()}),
        ((train, (test[0], test[1][:3])), {}), ((train, test), {"class_names": ("cat",)}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="^multilabel: "):
            multilabel.evaluate(*arguments, **{"class_names": NAMES, **options})
