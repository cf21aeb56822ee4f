"""The linear probe against scikit-learn's logistic regression and the conditions of an optimum.

Most sets have the same size, so that few programs are compiled.
"""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from salcl_jax.evaluators import linear

L2 = 1e-2


def data(n=90, d=8, classes=3, noise=1.5, seed=0):
    centres = np.random.default_rng(99).normal(size=(classes, d)) * 1.5
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n).astype(np.int32)
    x = centres[y] + noise * rng.normal(size=(n, d))
    return (x * np.arange(1, d + 1) + 5).astype(np.float32), y


def sklearn_fit(x, y, l2):
    return LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=5000).fit(x, y)


@pytest.mark.parametrize("l2", [1e-3, L2, 1.0])
def test_fit_matches_sklearn(l2):
    x, y = data()
    x = StandardScaler().fit_transform(x).astype(np.float32)
    theirs = sklearn_fit(x, y, l2)
    kernel, bias = (np.asarray(w) for w in linear.fit(x, y, l2, steps=200, num_classes=3))
    np.testing.assert_allclose(kernel.T, theirs.coef_, atol=3e-3)
    # A constant added to every bias changes nothing.
    np.testing.assert_allclose(
        bias - bias.mean(), theirs.intercept_ - theirs.intercept_.mean(), atol=3e-3
    )
    scores = np.asarray(linear.logits((kernel, bias), x))
    probability = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    assert log_loss(y, probability) == pytest.approx(
        log_loss(y, theirs.predict_proba(x)), abs=1e-4
    )


def test_fit_has_zero_gradient():
    x, y = data(seed=1)
    x = (x - x.mean(0)) / x.std(0)
    kernel, bias = (np.float64(w) for w in linear.fit(x, y, L2, steps=200, num_classes=3))
    scores = x.astype(np.float64) @ kernel + bias
    probability = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    residual = (probability - np.eye(3)[y]) / len(x)
    np.testing.assert_allclose(x.T @ residual + L2 * kernel, 0.0, atol=1e-4)
    np.testing.assert_allclose(residual.sum(0), 0.0, atol=1e-4)


def test_accuracy_matches_sklearn():
    train, test = data(), data(300, seed=5)
    scaler = StandardScaler().fit(train[0])
    theirs = sklearn_fit(scaler.transform(train[0]), train[1], L2)
    expected = theirs.score(scaler.transform(test[0]), test[1])
    result = linear.evaluate(train, test, l2s=(L2,))
    assert set(result) == {"linear/top1", "linear/l2"}
    assert 0.4 < expected < 1.0  # or the comparison would say little
    assert result["linear/top1"] == pytest.approx(expected, abs=1 / 300 + 1e-6)
    assert result["linear/l2"] == L2


def test_separable_data_are_classified_without_error():
    train, test = data(noise=0.05), data(60, noise=0.05, seed=3)
    assert linear.evaluate(train, test)["linear/top1"] == 1.0


def test_shuffled_labels_give_chance():
    rng = np.random.default_rng(0)
    train, test = ((data(n)[0], rng.integers(0, 3, n).astype(np.int32)) for n in (90, 600))
    # Four standard deviations of 600 throws of 1/3.
    assert abs(linear.evaluate(train, test)["linear/top1"] - 1 / 3) < 0.077


def test_penalty_is_chosen_on_held_out_examples():
    train, test = data(noise=5.0), data(60, noise=5.0, seed=4)
    l2s = (1e-6, 1e-1, 1e3)
    chosen = linear.evaluate(train, test, l2s=l2s)["linear/l2"]
    x, y = StandardScaler().fit_transform(train[0]), train[1]
    fit_on, held_out = linear.split(90)
    scores = {
        l2: sklearn_fit(x[fit_on], y[fit_on], l2).score(x[held_out], y[held_out]) for l2 in l2s
    }
    assert len(set(scores.values())) > 1
    assert scores[chosen] == max(scores.values())


def test_equal_penalties_give_the_largest():
    train = data(noise=0.01)
    assert linear.evaluate(train, train, l2s=(1e-4, 1e-2, 1e-3))["linear/l2"] == 1e-2


def test_split_is_a_fixed_partition():
    for n in (2, 10, 103):
        fit_on, held_out = linear.split(n)
        np.testing.assert_array_equal(np.sort(np.r_[fit_on, held_out]), np.arange(n))
        assert len(held_out) == max(1, round(0.2 * n))
        np.testing.assert_array_equal(held_out, linear.split(n)[1])


def test_standardisation_matches_sklearn_and_survives_constant_features():
    x, _ = data(50)
    x[:, 2] = 7.1
    mean, scale = linear.standardisation(x)
    theirs = StandardScaler().fit(x.astype(np.float64))
    np.testing.assert_allclose(mean, theirs.mean_, rtol=1e-5)
    np.testing.assert_allclose(scale, theirs.scale_, rtol=1e-5)
    assert scale[2] == 1.0


def test_one_constant_feature_does_not_spoil_the_probe():
    train, test = data(noise=0.05), data(60, noise=0.05, seed=3)
    for features, _ in (train, test):
        features[:, 0] = 3.3
    assert linear.evaluate(train, test)["linear/top1"] == 1.0


def test_linear_refuses_bad_input():
    train, test = data(20), data(10)
    for arguments, options in (
        (((train[0] * np.float32(np.inf), train[1]), test), {}),
        ((train, test), {"num_classes": 2}), ((train, test), {"l2s": ()}),
        ((train, (test[0], test[1][:3])), {}),
    ):
        with pytest.raises(ValueError, match="linear:"):
            linear.evaluate(*arguments, **options)
