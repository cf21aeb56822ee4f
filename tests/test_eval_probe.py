"""The choice among probes without a look at the test set, their scores, and the draws they learn from."""

import math

import numpy as np
import pytest

from salcl_jax.evaluators import probe

CLASSES = 3


def data(n=50, d=6, classes=CLASSES, noise=1.0, seed=0):
    centres = np.random.default_rng(99).normal(size=(classes, d)) * 2
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n).astype(np.int32)
    return (centres[labels] + noise * rng.normal(size=(n, d)) + 0.5).astype(np.float32), labels


def evaluation(train, test, rates=(0.01, 1.0, 10.0), levels=1, **options):
    """Figures of a probe of `train`, of which a tenth is held out."""
    names = ("top", "low")[:levels]
    fit_on, held_out = probe.split(len(train[1]))
    features, of_test = ({name: x for name in names} for x in (train[0], test[0]))
    draw = probe.from_arrays(features, train[1], fit_on, batch_size=32, seed=0)
    held = {name: x[held_out] for name, x in features.items()}, train[1][held_out]
    return probe.evaluate(
        draw, held, (of_test, test[1]), steps=60, num_classes=CLASSES, rates=rates, score_batch=17, **options
    )


def test_separable_data_are_classified_without_error():
    figures = evaluation(data(200, noise=0.05), data(50, noise=0.05, seed=3))
    assert set(figures) == {"linear/top1", "linear/top5", "linear/rate", "linear/held_out"}
    assert figures["linear/top1"] == figures["linear/held_out"] == figures["linear/top5"] == 1.0


def test_shuffled_labels_give_chance():
    rng = np.random.default_rng(0)
    train, test = ((data(n, seed=n)[0], rng.integers(0, CLASSES, n)) for n in (300, 900))
    # Four standard errors of 900 throws of 1/3.
    assert abs(evaluation(train, test)["linear/top1"] - 1 / 3) < 4 * math.sqrt(2 / 9 / 900)


def test_the_choice_does_not_see_the_test_labels():
    train, test = data(300, noise=3.0), data(80, noise=3.0, seed=3)
    rng = np.random.default_rng(1)
    first = evaluation(train, test, levels=2)
    second = evaluation(train, (test[0], rng.permutation(test[1])), levels=2)
    for figure in ("linear/rate", "linear/held_out"):
        assert first[figure] == second[figure]
    assert first["linear/top1"] != second["linear/top1"]


def test_a_diverged_head_is_not_chosen():
    x, y = data(100)
    figures = evaluation((x, y), (x, y), rates=(1e38, 3.0), batch_norm=True, weight_decay=0.1)
    assert figures["linear/rate"] == 3.0 and figures["linear/top1"] > 0.5
    with pytest.raises(ValueError, match="linear: all heads diverged"):
        evaluation((x, y), (x, y), rates=(1e38,), batch_norm=True, weight_decay=0.1)


def test_of_each_level_the_best_rate_on_held_out_examples_is_reported():
    x, y = data(300, noise=3.0)
    test, of_test = data(200, noise=3.0, seed=3)
    fit_on, held = probe.split(300)
    levels = {"noise": np.random.default_rng(0).normal(size=(300, 2)).astype(np.float32), "top": x}
    test_levels = {"noise": test[:, :2] * 0, "top": test}
    draw = probe.from_arrays(levels, y, fit_on, batch_size=32, seed=0)
    rates = (1e-4, 1.0, 300.0)
    held_out = {name: values[held] for name, values in levels.items()}
    arguments = {"steps": 40, "num_classes": CLASSES, "rates": rates}
    both = (held_out, y[held]), (test_levels, of_test)
    figures = probe.evaluate(draw, *both, name="probe", score_batch=48, **arguments)

    trained = probe.train(draw, **arguments)
    for level in levels:
        sets = (held_out[level], y[held]), (test_levels[level], of_test)
        right = [
            [np.mean(np.argmax(v @ k + b[None], 1) == labels) for v, labels in sets]
            for k, b in zip(trained.kernel[level], trained.bias[level], strict=True)
        ]
        best = max(range(3), key=lambda index: right[index][0])
        assert figures[f"probe/top1/{level}"] == pytest.approx(right[best][1])
    assert figures["probe/rate"] == rates[best] and figures["probe/held_out"] == pytest.approx(right[best][0])
    assert figures["probe/top1"] == figures["probe/top1/top"] > 0.5


def test_scores_count_ranks_and_leave_padding_out():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(2, 4, 9)).astype(np.float32)
    kernel[1, 2, 3] = np.inf
    bias = rng.normal(size=(2, 9)).astype(np.float32)
    heads = probe.Probe((1.0, 2.0), {"top": kernel}, {"top": bias}, {})
    x, y = rng.normal(size=(40, 4)).astype(np.float32), rng.integers(0, 9, 40)
    padded = np.where(np.arange(40) < 33, y, -1)
    found = probe.scores(heads, [({"top": x[:20]}, padded[:20]), ({"top": x[20:]}, padded[20:])])
    order = np.argsort(-(x @ kernel[0] + bias[:1]), axis=1)[:33]
    for name, first in (("top1", 1), ("top5", 5)):
        expected = np.mean((order[:, :first] == y[:33, None]).any(1))
        np.testing.assert_allclose(found[name]["top"], [expected, np.nan])


def test_a_head_that_always_says_the_same_is_right_only_for_the_first_class():
    kernel, bias = np.zeros((1, 4, 6), np.float32), np.zeros((1, 6), np.float32)
    heads = probe.Probe((1.0,), {"top": kernel}, {"top": bias}, {})
    found = probe.scores(heads, [({"top": np.ones((6, 4), np.float32)}, np.arange(6))])
    assert found["top1"]["top"] == [1 / 6] and found["top5"]["top"] == [5 / 6]
    huge = heads._replace(kernel={"top": np.full_like(kernel, 3e38)})
    found = probe.scores(huge, [({"top": np.ones((6, 4), np.float32)}, np.arange(6))])
    assert found["top1"]["top"] == [0] and found["top5"]["top"] == [0]


def test_draws_take_every_row_once_an_epoch_in_a_new_order():
    x = np.arange(22, dtype=np.float32)[:, None]
    rows = np.arange(3, 20)
    draw = probe.from_arrays({"top": x}, np.arange(22), rows, batch_size=5, seed=3)
    batches = [draw(step) for step in range(17)]  # five epochs of 17
    assert all(len(labels) == 5 and (features["top"][:, 0] == labels).all() for features, labels in batches)
    stream = np.concatenate([labels for _, labels in batches]).reshape(5, 17)
    np.testing.assert_array_equal(np.sort(stream, axis=1), np.tile(rows, (5, 1)))
    assert len({tuple(epoch) for epoch in stream}) == 5
    np.testing.assert_array_equal(draw(3)[1], batches[3][1])
    other = probe.from_arrays({"top": x}, np.arange(22), rows, batch_size=40, seed=4)
    assert len(other(0)[1]) == 40 and (other(0)[1][:5] != batches[0][1]).any()


def test_memory_maps_give_the_same_figures(tmp_path):
    train, test = data(120), data(40, seed=3)
    np.save(tmp_path / "features.npy", train[0])
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    draw = probe.from_arrays({"top": mapped}, train[1], np.arange(9), batch_size=4, seed=0)
    assert not isinstance(draw(0)[0]["top"], np.memmap)
    assert evaluation((mapped, train[1]), test) == evaluation(train, test)


def test_split_is_a_fixed_partition():
    for n, count in ((2, 1), (10, 1), (104, 10), (200_000, 10_000)):
        fit_on, held_out = probe.split(n)
        np.testing.assert_array_equal(np.sort(np.r_[fit_on, held_out]), np.arange(n))
        assert len(held_out) == count
        np.testing.assert_array_equal(held_out, probe.split(n)[1])


def test_probe_refuses_bad_input():
    x, y = data()
    draw = probe.from_arrays({"top": x}, y, np.arange(50), batch_size=4, seed=0)
    for options in ({"optimizer": "adam"}, {"steps": 0}, {"rates": ()}, {"rates": (0.1, -1.0)}):
        with pytest.raises(ValueError, match="probe:"):
            probe.train(draw, **{"steps": 1, "num_classes": CLASSES, "rates": (0.1,)} | options)
    for labels, rows in ((y[:9], np.arange(9)), (y, np.arange(0))):
        with pytest.raises(ValueError, match="probe:"):
            probe.from_arrays({"top": x}, labels, rows, batch_size=4, seed=0)
    with pytest.raises(ValueError, match="probe: 1 examples"):
        probe.split(1)
    for bad in ((x * np.nan, y), (x, y + 1), (x, y - 1), (x, y[:4]), (x[:0], y[:0])):
        with pytest.raises(ValueError, match="linear"):
            evaluation((x, y), bad)
