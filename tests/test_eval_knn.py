"""k-NN against scikit-learn and brute force; features keep every labelled example exactly once."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from salcl_jax.evaluators import features, knn


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


def box_and_sum(images, boxes):
    """Stand-in for an encoder: the box itself and the sum of the image's pixels."""
    total = images.reshape(len(images), 1, -1).sum(-1, keepdims=True, dtype=np.float32)
    return np.concatenate([boxes, np.repeat(total, boxes.shape[1], 1)], -1)


def scene_batches():
    image = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1) * np.ones((1, 2, 2, 3), np.uint8)
    boxes = np.zeros((4, 2, 4), np.float32)
    boxes[:, 0] = (0.25, 0.5, 0.75, 0.75)
    boxes[1, 1] = (0.0, 0.0, 1.0, 0.5)
    batch = {
        "image": image, "boxes": boxes,
        "classes": np.array([[5, -1], [6, 7], [-1, -1], [8, 9]], np.int32),  # 9: no area
        "label": np.array([3, -1, 1, 2], np.int32),
        "mask": np.array([True, True, True, False]),
    }
    return [batch, {**batch, "image": image + 10, "mask": np.ones(4, bool)}]


def test_features_of_images():
    values, labels = features.extract(box_and_sum, iter(scene_batches()), on="image")
    assert values.dtype == np.float32 and labels.dtype == np.int32
    np.testing.assert_array_equal(labels, [3, 1, 3, 1, 2])
    np.testing.assert_array_equal(values[:, :4], np.tile([0, 0, 1, 1], (5, 1)))
    np.testing.assert_array_equal(values[:, 4], np.array([0, 2, 10, 12, 13]) * 12)


def test_features_of_objects():
    values, labels = features.extract(box_and_sum, scene_batches(), on="object")
    np.testing.assert_array_equal(labels, [5, 6, 7, 5, 6, 7, 8])
    np.testing.assert_array_equal(values[:, 4], np.array([0, 1, 1, 10, 11, 11, 13]) * 12)
    # Sides 0.5 and 0.25 grow by 0.1 and 0.05 at each end; the second box is clipped on three sides.
    np.testing.assert_allclose(values[0, :4], (0.15, 0.45, 0.85, 0.8), atol=1e-6)
    np.testing.assert_allclose(values[2, :4], (0.0, 0.0, 1.0, 0.6), atol=1e-6)


def test_padding_boxes_are_never_empty():
    seen = []
    features.extract(
        lambda image, boxes: seen.append(boxes) or box_and_sum(image, boxes),
        scene_batches(), on="object",
    )
    seen = np.concatenate(seen)
    assert seen.shape == (8, 2, 4) and np.all(seen[..., 2:] > seen[..., :2])


def test_features_refuse_bad_input():
    batches = scene_batches()
    unlabelled = [{**batch, "label": np.full(4, -1, np.int32)} for batch in batches]
    no_boxes = [{name: batch[name] for name in ("image", "label")} for batch in batches]
    for source, on in ((batches, "patch"), (unlabelled, "image"), (no_boxes, "object")):
        with pytest.raises(ValueError, match="features:"):
            features.extract(box_and_sum, source, on=on)
    with pytest.raises(ValueError, match="feature_fn gave"):
        features.extract(lambda image, boxes: boxes[:, 0], batches, on="image")
