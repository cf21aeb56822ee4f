"""The SVM protocol against a loop written with scikit-learn's own cross-validation."""

import os
import sys
import warnings

import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC

from salcl_jax.evaluators import voc_svm

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

NAMES = ("cat", "dog", "cow")
FEW = (1e-4, 1e-2, 1.0)


def data(n=100, d=6, classes=3, noise=1.0, seed=0, ignored=0.06):
    kernel = np.random.default_rng(99).normal(size=(classes, d))
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, classes)) < 0.3).astype(np.int8)
    x = labels @ kernel + noise * rng.normal(size=(n, d))
    labels[rng.random(labels.shape) < ignored] = -1
    return (3 * x + 1).astype(np.float32), labels


def permuted(test, seed=5):
    return test[0], np.random.default_rng(seed).permutation(test[1])


def unit(x):
    x = x.astype(np.float64)
    return np.stack([row / (np.sqrt(np.sum(row**2)) + 1e-5) for row in x])


def svm(cost):
    return LinearSVC(
        C=cost, loss="squared_hinge", dual=True, tol=1e-4, max_iter=2000, random_state=0,
        class_weight={1: 2, -1: 1},
    )  # fmt: skip


def one_class(examples, c):
    """Normalised features and labels of -1 and 1 of the examples that are not ignored."""
    known = examples[1][:, c] != -1
    return unit(examples[0])[known], np.where(examples[1][known, c] == 1, 1, -1)


def cross_validated(x, y, costs, folds):
    scores = [cross_val_score(svm(cost), x, y, cv=folds, scoring="average_precision").mean()
              for cost in costs]
    return costs[int(np.argmax(np.round(scores, 10)))]  # the first, the smallest, of equals


def all_point(y, scores):
    """Mean over the positives of the best precision at their recall or more."""
    truth = [t for _, t in sorted(zip(-scores, y == 1, strict=True))]
    precision = np.cumsum(truth) / np.arange(1, len(y) + 1)
    assert len(set(scores)) == len(scores)  # no ties, or this would be wrong
    return np.mean([precision[i:].max() for i, hit in enumerate(truth) if hit])


def eleven_point(y, scores):
    truth = [t for _, t in sorted(zip(-scores, y == 1, strict=True))]
    precision, recall = np.cumsum(truth) / np.arange(1, len(y) + 1), np.cumsum(truth) / sum(truth)
    return np.mean([precision[recall >= i / 10 - 1e-9].max() for i in range(11)])


def quick(train, test, **options):
    names = options.pop("class_names", NAMES)
    return voc_svm.evaluate(train, test, class_names=names, **{"costs": FEW, **options})


def test_costs_are_those_of_the_protocol():
    assert len(voc_svm.COSTS) == 19
    assert set(voc_svm.COSTS) == {1.0, 10.0, 100.0, *(0.5**i for i in range(4, 20))}


@pytest.mark.parametrize("scale", [1.0, 2e-6])  # of lengths beside which 1e-5 is not small
def test_figures_match_a_loop_with_sklearn(scale):
    train, test = ((x * np.float32(scale), y) for x, y in (data(), data(150, seed=1)))
    result = voc_svm.evaluate(train, test, class_names=NAMES)
    expected, official = [], []
    for c, name in enumerate(NAMES):
        x, y = one_class(train, c)
        cost = cross_validated(x, y, sorted(voc_svm.COSTS), 3)
        assert result[f"voc_svm/cost/{name}"] == cost
        x_test, y_test = one_class(test, c)
        scores = svm(cost).fit(x, y).decision_function(x_test)
        expected.append(all_point(y_test, scores))
        official.append(eleven_point(y_test, scores))
        assert result[f"voc_svm/ap/{name}"] == pytest.approx(expected[-1], abs=1e-9)
    assert len({result[f"voc_svm/cost/{name}"] for name in NAMES}) > 1
    assert 0.3 < np.mean(expected) < 0.98  # or the comparison would say little
    assert result["voc_svm/map"] == pytest.approx(np.mean(expected), abs=1e-9)
    assert result["voc_svm/map_11_point"] == pytest.approx(np.mean(official), abs=1e-9)
    assert result["voc_svm/classes"] == 3.0 and len(result) == 3 + 2 * 3


@pytest.mark.parametrize("seed", [0, 3])
def test_low_shot_matches_a_loop_and_looks_at_no_test_label(seed):
    train, test = data(noise=2.0), data(120, noise=2.0, seed=1)
    k, samples, costs = 3, 3, (1e-3, 1.0, 100.0)
    for target in (test, permuted(test)):
        result = quick(train, target, costs=costs, shots=(k,), samples=samples, seed=seed)
        table, picks = np.zeros((3, samples, 3)), np.zeros((3, samples), int)
        for c in range(3):
            x, y = one_class(train, c)
            x_test, y_test = one_class(target, c)
            for i in range(samples):
                picked = voc_svm.draw(y == 1, k, (seed, c, k, i))
                rest = np.setdiff1d(np.arange(len(x)), picked)
                models = [svm(cost).fit(x[picked], y[picked]) for cost in costs]
                table[c, i] = [all_point(y_test, m.decision_function(x_test)) for m in models]
                inner = [average_precision_score(y[rest], m.decision_function(x[rest]))
                         for m in models]
                picks[c, i] = np.argmax(np.round(inner, 10))
        chosen = np.take_along_axis(table, picks[..., None], -1).mean()
        best = table.mean((0, 1)).max()
        assert result[f"voc_svm/low_shot/{k}"] == pytest.approx(chosen, abs=1e-9)
        assert result[f"voc_svm/low_shot_best_on_test/{k}"] == pytest.approx(best, abs=1e-9)
        # Costs differ by sample, and neither the test's favourites nor one cost for all would do.
        assert len(np.unique(picks)) > 1 and np.any(picks != table.argmax(-1))
        assert best != pytest.approx(chosen, abs=1e-3)


def test_cost_is_chosen_without_the_test_set():
    train, test = data(noise=2.0), data(60, noise=2.0, seed=1)
    first = quick(train, test, costs=voc_svm.COSTS)
    costs = {name: value for name, value in first.items() if "/cost/" in name}
    assert len(set(costs.values())) > 1
    for other in (permuted(test), data(40, seed=8)):
        result = quick(train, other, costs=voc_svm.COSTS)
        assert {name: result[name] for name in costs} == costs
        assert result["voc_svm/map"] != first["voc_svm/map"]


def test_separable_data_give_one_and_the_smallest_of_equal_costs():
    rng = np.random.default_rng(0)
    sets = []
    for n in (60, 40):
        y = np.arange(n) % 3
        x = np.eye(3)[y] + 0.01 * rng.random((n, 3))
        sets.append((x.astype(np.float32), np.eye(3, dtype=np.int8)[y]))
    result = quick(*sets, costs=(1.0, 10.0, 0.1), shots=(1, 4), samples=2)
    assert all(result[f"voc_svm/ap/{name}"] == 1.0 for name in NAMES)
    assert result["voc_svm/map"] == result["voc_svm/map_11_point"] == 1.0
    assert result["voc_svm/low_shot/4"] == result["voc_svm/low_shot_best_on_test/1"] == 1.0
    assert all(result[f"voc_svm/cost/{name}"] == 0.1 for name in NAMES)


def test_shuffled_labels_give_chance():
    train, test = data(200, ignored=0.0), data(600, seed=1, ignored=0.0)
    result = quick(permuted(train), permuted(test), shots=(4,), samples=3)
    share = test[1].mean()
    # Labels of 30 per cent on 600 images: random scores deviate by 0.02 a class.
    assert result["voc_svm/map"] == pytest.approx(share, abs=0.06)
    assert result["voc_svm/low_shot/4"] == pytest.approx(share, abs=0.06)
    assert quick(train, test)["voc_svm/map"] > share + 0.2


def test_ignored_examples_are_as_if_absent():
    train, test = ((x, y[:, :1]) for x, y in (data(ignored=0.2), data(80, seed=1, ignored=0.2)))
    kept = [(x[y[:, 0] != -1], y[y[:, 0] != -1]) for x, y in (train, test)]
    assert len(kept[0][0]) < 90 and len(kept[1][0]) < 75
    options = {"class_names": ("cat",), "shots": (2,), "samples": 2}
    assert quick(train, test, **options) == quick(*kept, **options)


def test_two_positives_are_split_into_two_folds():
    train, test = data(40, ignored=0.0), data(60, seed=1)
    train, test = (train[0], train[1][:, :1].copy()), (test[0], test[1][:, :1])
    train[1][np.flatnonzero(train[1])[2:]] = 0
    x, y = one_class(train, 0)
    costs = (1e-5, 1e-3, 1e-1, 10.0)
    expected = cross_validated(x, y, costs, 2)
    assert expected not in (min(costs), 1e-3)  # neither the first nor the middle
    result = quick(train, test, class_names=("cat",), costs=costs)
    assert result["voc_svm/cost/cat"] == expected


@pytest.mark.parametrize("rare", [0, 1])
def test_one_example_of_a_kind_takes_the_middle_cost(rare):
    train, test = data(30, ignored=0.0), data(60, seed=1)
    train, test = (train[0], train[1][:, :1].copy()), (test[0], test[1][:, :1])
    train[1][:] = 1 - rare
    train[1][7] = rare
    result = quick(train, test, class_names=("cat",), costs=(100.0, 1e-6, 1e-3, 1.0, 10.0))
    assert result["voc_svm/cost/cat"] == 1.0
    assert 0 < result["voc_svm/ap/cat"] < 1


def test_classes_that_cannot_be_measured_are_left_out():
    names = ("cat", "no_train", "all_train", "no_test", "ignored_test")
    train, test = data(60, classes=5, ignored=0.0), data(60, classes=5, seed=1, ignored=0.0)
    train[1][:, 1], train[1][:, 2], test[1][:, 3] = 0, 1, 0
    test[1][:, 4] = np.minimum(-test[1][:, 4], 0)
    result = quick(train, test, class_names=names, shots=(2,), samples=1)
    assert result["voc_svm/classes"] == 1.0
    assert result["voc_svm/map"] == result["voc_svm/ap/cat"]
    assert not np.isnan(result["voc_svm/low_shot/2"])
    for name in names[1:]:
        assert np.isnan(result[f"voc_svm/ap/{name}"]) and np.isnan(result[f"voc_svm/cost/{name}"])
    nothing = quick((train[0], train[1] * 0), test, class_names=names, shots=(2,))
    assert nothing.pop("voc_svm/classes") == 0.0
    assert np.isnan(list(nothing.values())).all()


def test_low_shot_leaves_out_classes_of_too_few_positives():
    train, test = data(ignored=0.0), data(80, seed=1)
    train[1][np.flatnonzero(train[1][:, 1])[3:], 1] = 0  # three dogs
    result = quick(train, test, shots=(3, 4, 90), samples=2)
    without = [(x, y[:, [0]]) for x, y in (train, test)]
    alone = quick(*without, class_names=("cat",), shots=(3, 4), samples=2)
    pair = quick(train, (test[0], test[1] * np.array([1, 0, 0], np.int8)), shots=(3, 4), samples=2)
    # The draws of a class depend on its place alone, not on what else is there.
    assert pair["voc_svm/low_shot/4"] == alone["voc_svm/low_shot/4"]
    dogs = quick(train, (test[0], test[1] * np.array([0, 1, 0], np.int8)), shots=(3, 4), samples=2)
    cows = quick(train, (test[0], test[1] * np.array([0, 0, 1], np.int8)), shots=(3, 4), samples=2)
    name = "voc_svm/low_shot/"
    three, four = ([part[f"{name}{k}"] for part in (pair, dogs, cows)] for k in (3, 4))
    assert result[f"{name}3"] == pytest.approx(np.mean(three))
    assert np.isnan(four[1]) and result[f"{name}4"] == pytest.approx((four[0] + four[2]) / 2)
    assert np.isnan(result[f"{name}90"]) and np.isnan(result["voc_svm/low_shot_best_on_test/90"])


@pytest.mark.parametrize("left_out", ["positives", "negatives"])
def test_low_shot_without_images_outside_the_sample(left_out):
    train, test = data(noise=2.0, seed=1, ignored=0.0), data(80, noise=2.0, seed=2, ignored=0.0)
    train, test = (train[0], train[1][:, :1].copy()), (test[0], test[1][:, :1])
    x, y = one_class(train, 0)
    costs = (1e-5, 1e-3, 1e-1, 10.0, 100.0)
    if left_out == "positives":  # two positives, both in the sample
        y[np.flatnonzero(y == 1)[2:]] = -1
        picked, cost = voc_svm.draw(y == 1, 2, (0, 0, 2, 0)), costs[2]
        k = 2
    else:  # fewer than 19 x 5 negatives, all in the sample
        k = 5
        picked = voc_svm.draw(y == 1, k, (0, 0, k, 0))
        assert set(np.flatnonzero(y == -1)) < set(picked)
        cost = cross_validated(x[picked], y[picked], costs, 3)
        assert cost not in (costs[0], costs[2])
    train = (train[0], (y == 1).astype(np.int8)[:, None])
    x_test, y_test = one_class(test, 0)
    scores = svm(cost).fit(x[picked], y[picked]).decision_function(x_test)
    result = quick(train, test, class_names=("cat",), costs=costs, shots=(k,), samples=1)
    assert result[f"voc_svm/low_shot/{k}"] == pytest.approx(all_point(y_test, scores), abs=1e-9)


def test_draw():
    positive = np.arange(300) % 10 == 0
    picked = voc_svm.draw(positive, 4, (0, 1, 4, 0))
    assert positive[picked].sum() == 4 and len(picked) == 80
    assert np.all(np.diff(picked) > 0)
    np.testing.assert_array_equal(picked, voc_svm.draw(positive, 4, (0, 1, 4, 0)))
    for seed in ((1, 1, 4, 0), (0, 2, 4, 0), (0, 1, 4, 1)):
        assert set(voc_svm.draw(positive, 4, seed)) != set(picked)
    most = voc_svm.draw(positive, 20, (0,))  # 380 negatives wanted, 270 there
    assert positive[most].sum() == 20 and len(most) == 290
    seen = np.zeros(300)
    for i in range(400):
        seen[voc_svm.draw(positive, 4, (i,))] += 1
    # Four standard deviations of 400 draws of 4 out of 30 and 76 out of 270.
    assert np.all(abs(seen[positive] - 400 * 4 / 30) < 28)
    assert np.all(abs(seen[~positive] - 400 * 76 / 270) < 36)


def test_one_job_stays_in_this_process_and_warns_of_nothing(monkeypatch):
    inner, seen = voc_svm._one_class, []

    def spy(*arguments):
        seen.append(os.getpid())
        return inner(*arguments)

    monkeypatch.setattr(voc_svm, "_one_class", spy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = quick(data(60), data(30, seed=1), max_iter=2, costs=(100.0, 10.0))
    assert seen == [os.getpid()] * 3
    assert result != quick(data(60), data(30, seed=1), costs=(100.0, 10.0))  # max_iter counts


def test_two_jobs_give_what_one_gives():
    train, test = data(60), data(40, seed=1)
    one = quick(train, test, shots=(2,), samples=2)
    assert quick(train, test, shots=(2,), samples=2, jobs=2) == one


def test_voc_svm_refuses_bad_input(monkeypatch):
    train, test = data(30), data(20, seed=1)
    for arguments, options in (
        (((train[0] * np.float32(np.nan), train[1]), test), {}),
        ((train, (test[0][:, :2], test[1])), {}), ((train, test), {"class_names": ("a",)}),
        ((train, test), {"costs": ()}), ((train, test), {"costs": (0.0, 1.0)}),
        ((train, test), {"folds": 1}), ((train, test), {"jobs": 0}),
        ((train, test), {"shots": (0,)}), ((train, test), {"shots": (1,), "samples": 0}),
        ((train, test), {"seed": -1}), ((train, test), {"max_iter": 0}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="^voc_svm: "):
            quick(*arguments, **options)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match="pip install scikit-learn"):
        quick(train, test)
