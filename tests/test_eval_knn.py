"""k-NN against scikit-learn and brute force, on one device and on several."""

import re

import jax
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from salcl_jax.evaluators import knn
from salcl_jax.sharding import make_mesh


def data(n, m, d=6, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, d))
    labels = [rng.integers(0, classes, size).astype(np.int32) for size in (n, m)]
    values = [centres[y] + rng.normal(size=(len(y), d)) for y in labels]
    return [(x.astype(np.float32), y) for x, y in zip(values, labels, strict=True)]


def brute_force(train, queries, classes, k, temperature, leave_out=False):
    a = train[0] / np.linalg.norm(train[0], axis=1, keepdims=True)
    b = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    votes = np.zeros((len(b), classes))
    for i, row in enumerate(b.astype(np.float64)):
        cosine = a.astype(np.float64) @ row
        if leave_out:
            cosine[i] = -2.0
        for j in np.argsort(-cosine)[:k]:
            votes[i, train[1][j]] += np.exp(cosine[j] / temperature)
    return votes / votes.sum(1, keepdims=True)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.5)])
def test_scores_match_sklearn(k, temperature):
    train, test = data(80, 37)
    model = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / temperature),
    ).fit(*train)
    ours = knn.knn_scores(
        *train, test[0], num_classes=4, k=k, temperature=temperature, chunk=16
    )
    np.testing.assert_allclose(ours, model.predict_proba(test[0]), atol=2e-5)


def test_scores_match_brute_force_and_k_is_clipped():
    train, test = data(30, 11)
    for k in (7, 500):
        ours = knn.knn_scores(*train, test[0], num_classes=5, k=k, temperature=0.1)
        np.testing.assert_allclose(
            ours, brute_force(train, test[0], 5, k, 0.1), atol=2e-5
        )


def test_chunks_do_not_change_the_result():
    train, test = data(50, 23)
    scores = [
        np.asarray(knn.knn_scores(*train, test[0], num_classes=4, k=9, chunk=chunk))
        for chunk in (1, 4, 23, 256)
    ]
    for other in scores[1:]:
        np.testing.assert_allclose(other, scores[0], atol=1e-5)


def test_low_temperature_does_not_overflow():
    train, test = data(50, 23)
    scores = knn.knn_scores(*train, test[0], num_classes=4, k=9, temperature=0.001)
    np.testing.assert_allclose(np.sum(scores, axis=1), 1.0, atol=1e-5)


def test_names_and_accuracy_of_each_k():
    train, test = data(60, 40)
    result = knn.evaluate(train, test, ks=(5, 1, 200))
    assert set(result) == {"knn/top1", "knn/top1_k5", "knn/top1_k1", "knn/top1_k200"}
    assert result["knn/top1"] == result["knn/top1_k5"]
    for k in (5, 1, 200):
        predicted = brute_force(train, test[0], 4, k, 0.07).argmax(1)
        assert result[f"knn/top1_k{k}"] == pytest.approx(np.mean(predicted == test[1]))


def test_leave_one_out():
    train, _ = data(40, 1)
    result = knn.evaluate(train, train, ks=(3, 100), leave_one_out=True, chunk=7)
    for k in (3, 100):
        votes = brute_force(train, train[0], 4, min(k, 39), 0.07, leave_out=True)
        expected = np.mean(votes.argmax(1) == train[1])
        assert result[f"knn/top1_k{k}"] == pytest.approx(expected)
    assert knn.evaluate(train, train, ks=(1,))["knn/top1"] == 1.0
    assert result["knn/top1"] < 1.0


def test_shuffled_labels_give_chance():
    train, test = data(600, 600, seed=1)
    rng = np.random.default_rng(2)
    shuffled = (train[0], rng.integers(0, 4, 600).astype(np.int32))
    assert knn.evaluate(train, test)["knn/top1"] > 0.5
    # Four standard deviations of 600 coin flips of 1/4.
    assert abs(knn.evaluate(shuffled, test)["knn/top1"] - 0.25) < 0.071


def test_unseen_test_class_counts_as_wrong():
    train = (np.eye(3, dtype=np.float32), np.arange(3, dtype=np.int32))
    test = (np.eye(3, dtype=np.float32), np.array([0, 1, 7], np.int32))
    assert knn.evaluate(train, test, ks=(1,))["knn/top1"] == pytest.approx(2 / 3)


def test_knn_refuses_bad_input():
    train, test = data(10, 5)
    broken = (train[0] * np.float32(np.nan), train[1])
    for arguments, options in (
        ((broken, test), {}), ((train, broken), {}), ((train, test), {"ks": ()}),
        ((train, test), {"leave_one_out": True}), ((train, (test[0], test[1][:2])), {}),
    ):
        with pytest.raises(ValueError, match="knn:"):
            knn.evaluate(*arguments, **options)


def ranked(bank, queries, k, leave_out=False):
    """Cosines and rows of the nearest by a stable sort of all of them."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries))
    cosine = b @ a.T
    if leave_out:
        np.fill_diagonal(cosine, -2.0)
    rows = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(cosine, rows, axis=1), rows


def signs(n, seed):
    """Vectors of +-1: unit vectors and cosines are exact in floating point, and many are equal."""
    return np.random.default_rng(seed).choice(np.float32([-1, 1]), (n, 4))


@pytest.mark.parametrize("devices", [1, 3, 8])
@pytest.mark.parametrize(
    ("n", "m", "k", "bank_rows", "chunk"),
    [
        (101, 13, 7, 1000, 5),  # one slice, odd sizes
        (101, 13, 7, 32, 256),  # several slices, the last one padded
        (101, 3, 60, 9, 2),  # slices (and devices' shares) smaller than k
        (10, 4, 10, 1, 4),  # as few rows at once as there are devices; all rows are neighbours
    ],
)
def test_slices_and_devices_give_brute_force(devices, n, m, k, bank_rows, chunk):
    rng = np.random.default_rng(n + m + k)
    bank, queries = (rng.normal(size=(size, 9)).astype(np.float32) for size in (n, m))
    mesh = make_mesh(jax.devices()[:devices])
    cosine, rows = knn.nearest(bank, queries, k, chunk=chunk, mesh=mesh, bank_rows=bank_rows)
    expected_cosine, expected_rows = ranked(bank, queries, k)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(cosine, expected_cosine, atol=1e-6)


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize(("devices", "bank_rows"), [(1, 1000), (1, 20), (8, 1000), (8, 20)])
def test_of_equals_the_lower_row_comes_first(devices, bank_rows, leave_one_out):
    bank = signs(77, seed=1)
    queries = bank if leave_one_out else signs(9, seed=2)
    mesh = make_mesh(jax.devices()[:devices])
    found = knn.nearest(bank, queries, 30, leave_one_out=leave_one_out, mesh=mesh, bank_rows=bank_rows)
    for ours, theirs in zip(found, ranked(bank, queries, 30, leave_one_out), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_devices_slices_and_memory_maps_do_not_change_the_accuracy(tmp_path, leave_one_out):
    train, test = data(90, 35)
    test = train if leave_one_out else test
    expected = knn.evaluate(train, test, ks=(5, 89), leave_one_out=leave_one_out)
    np.save(tmp_path / "bank.npy", train[0])
    mapped = (np.load(tmp_path / "bank.npy", mmap_mode="r"), train[1])
    for options in ({"mesh": make_mesh()}, {"mesh": make_mesh(), "bank_rows": 16}, {"bank_rows": 7}):
        ours = knn.evaluate(mapped, test, ks=(5, 89), leave_one_out=leave_one_out, chunk=10, **options)
        assert ours == expected


def test_padding_is_never_a_neighbour_however_far_the_others_are():
    bank, query = -np.ones((9, 3), np.float32), np.ones((1, 3), np.float32)
    cosine, rows = knn.nearest(bank, query, 9, mesh=make_mesh())
    np.testing.assert_array_equal(rows, np.arange(9)[None])
    np.testing.assert_allclose(cosine, -1.0, atol=1e-6)


def test_all_slices_and_chunks_share_one_program(monkeypatch):
    traced, top_k = [], jax.lax.top_k
    monkeypatch.setattr(jax.lax, "top_k", lambda *a: traced.append(1) or top_k(*a))
    knn._update_on.cache_clear()
    bank = np.random.default_rng(0).normal(size=(103, 5)).astype(np.float32)
    for _ in range(2):
        knn.nearest(bank, bank[:41], 6, chunk=8, mesh=make_mesh(), bank_rows=24)
    assert len(traced) == 2  # within the devices' shares, and of what they found


def test_only_the_best_of_each_device_travel():
    chunk, k, parts, per = 6, 5, 8, 400
    best = np.zeros((chunk, k), np.float32), np.zeros((chunk, k), np.int32)
    arguments = best, np.zeros((parts, per, 12), np.float32), np.zeros((chunk, 12), np.float32)
    program = knn._update_on(make_mesh()).lower(*arguments, np.zeros(3, np.int32)).compile().as_text()
    sent = re.findall(r"= (.*) (?:all-gather|all-reduce|all-to-all|collective-permute)[\w-]*\(", program)
    shapes = [shape for line in sent for shape in re.findall(r"\[([\d,]+)\]", line)]
    sizes = [np.prod([int(side) for side in shape.split(",")]) for shape in shapes]
    assert sizes and max(sizes) <= parts * chunk * k


def test_nearest_refuses_what_cannot_be_found():
    bank = np.eye(3, dtype=np.float32)
    one = {"leave_one_out": True}
    for k, options in ((4, {}), (0, {}), (3, one), (1, {"chunk": 0}), (1, {"bank_rows": 0})):
        with pytest.raises(ValueError, match="knn:"):
            knn.nearest(bank, bank, k, **options)
