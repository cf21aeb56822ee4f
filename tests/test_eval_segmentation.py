"""Cells and their targets, IoU against scikit-learn, and probes of made-up scenes whose masks are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, jaccard_score

from salcl_jax.evaluators import probe, segmentation

CLASSES, SIDE, CELLS = 4, 24, 6
NAMES = ("background", "cat", "dog", "boat")
OPTIONS = {"num_classes": CLASSES, "class_names": NAMES, "epochs": 40, "batch_size": 64}


def random_masks(n, side, seed=0, void=0.2):
    rng = np.random.default_rng(seed)
    masks = rng.integers(0, CLASSES, (n, side, side))
    return np.where(rng.uniform(size=masks.shape) < void, segmentation.VOID, masks).astype(np.uint8)


def scenes(n, seed, noise=0.3, void=0.05):
    """Features [n, CELLS, CELLS, 7] that tell the class of each cell; half of the cells are background."""
    rng = np.random.default_rng(seed)
    of_cell = rng.integers(1, CLASSES, (n, CELLS, CELLS)) * (rng.uniform(size=(n, CELLS, CELLS)) < 0.5)
    code = np.random.default_rng(99).normal(size=(CLASSES, 7))
    features = code[of_cell] * 40 + 40 * noise * rng.normal(size=(n, CELLS, CELLS, 7)) + 300
    masks = of_cell.repeat(SIDE // CELLS, 1).repeat(SIDE // CELLS, 2)
    masks = np.where(rng.uniform(size=masks.shape) < void, segmentation.VOID, masks)
    return features.astype(np.float32), masks.astype(np.uint8)


def shares(masks, h, w):
    """Shares by counting, for cells that are whole pixels."""
    n, side, _ = masks.shape
    blocks = masks.reshape(n, h, side // h, w, side // w)
    return np.stack([(blocks == c).mean((2, 4)) for c in range(CLASSES)], -1)


@pytest.mark.parametrize(("side", "h", "w"), [(12, 3, 4), (8, 8, 8), (6, 1, 2)])
def test_targets_of_whole_pixels_are_counts(side, h, w):
    masks = random_masks(5, side)
    ours = segmentation.cell_targets(masks, h, w, CLASSES)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, shares(masks, h, w), atol=1e-6)
    weight = 1 - (masks == segmentation.VOID).reshape(5, h, side // h, w, side // w).mean((2, 4))
    np.testing.assert_allclose(ours.sum(-1), weight, atol=1e-6)


@pytest.mark.parametrize(("side", "h", "w"), [(10, 3, 4), (5, 7, 2)])
def test_targets_of_parts_of_pixels_are_areas(side, h, w):
    masks = random_masks(4, side)
    fine = masks.repeat(h * w, 1).repeat(h * w, 2)
    ours = segmentation.cell_targets(masks, h, w, CLASSES)
    np.testing.assert_allclose(ours, shares(fine, h, w), atol=1e-6)


def test_the_loss_is_that_of_pixels_with_the_nearest_cell():
    masks = random_masks(3, 12)
    logits = np.random.default_rng(1).normal(size=(3, 4, 6, CLASSES)).astype(np.float32)
    targets = segmentation.cell_targets(masks, 4, 6, CLASSES)
    ours = probe.cross_entropy(*(jnp.asarray(x.reshape(-1, CLASSES)) for x in (logits, targets)))
    pixels = np.asarray(jax.image.resize(logits, (3, 12, 12, CLASSES), "nearest"))
    log_p = pixels - np.log(np.exp(pixels).sum(-1, keepdims=True))
    known = masks != segmentation.VOID
    expected = -np.mean(log_p[known, masks[known]])
    assert float(ours) == pytest.approx(expected, rel=1e-5)


def test_confusion_and_iou_match_sklearn():
    predicted, truth = random_masks(6, 20, seed=1, void=0), random_masks(6, 20, seed=2)
    ours = segmentation.confusion(predicted, truth, CLASSES)
    known = truth != segmentation.VOID
    counts = confusion_matrix(truth[known], predicted[known], labels=range(CLASSES))
    np.testing.assert_array_equal(ours, counts)
    theirs = jaccard_score(truth[known], predicted[known], labels=range(CLASSES), average=None)
    np.testing.assert_allclose(segmentation.iou_of(ours), theirs)


def test_absent_classes_have_no_iou():
    truth = np.array([[0, 0, 2, 2], [0, 0, 2, 255]], np.uint8)
    predicted = np.array([[0, 0, 2, 1], [0, 2, 2, 3]], np.uint8)
    iou = segmentation.iou_of(segmentation.confusion(predicted, truth, CLASSES))
    np.testing.assert_allclose(iou, [3 / 4, np.nan, 2 / 4, np.nan])
    nothing = segmentation.confusion(predicted, np.full_like(truth, 255), CLASSES)
    assert nothing.sum() == 0 and np.isnan(segmentation.iou_of(nothing)).all()


def test_features_that_determine_the_mask_are_segmented():
    figures = segmentation.evaluate(scenes(40, 0, noise=0.05), scenes(10, 1, noise=0.05), **OPTIONS)
    assert set(figures) == {
        *(f"segmentation/{name}" for name in ("miou", "accuracy", "rate", "held_out", "miou_background")),
        *(f"segmentation/iou/{name}" for name in NAMES),
    }
    # Between cells of two classes the up-sampled logits of a third may win: corners are lost.
    assert figures["segmentation/miou"] > 0.9 and figures["segmentation/accuracy"] > 0.9
    ious = [figures[f"segmentation/iou/{name}"] for name in NAMES]
    assert figures["segmentation/miou"] == pytest.approx(np.mean(ious))


def test_shuffled_masks_give_no_more_than_background():
    rng = np.random.default_rng(0)
    (features, masks), test = scenes(40, 0), scenes(20, 1, void=0)
    order = rng.permutation(masks.size)
    figures = segmentation.evaluate((features, masks.ravel()[order].reshape(masks.shape)), test, **OPTIONS)
    share = np.mean(test[1] == 0)
    assert figures["segmentation/miou_background"] == pytest.approx(share / CLASSES)
    assert figures["segmentation/miou"] == pytest.approx(share / CLASSES, abs=0.02)


def test_figures_are_those_of_the_chosen_head(monkeypatch):
    """With one rate: train alone, up-sample with torch, count with scikit-learn."""
    torch = pytest.importorskip("torch")
    trained, real = [], probe.train
    monkeypatch.setattr(probe, "train", lambda *a, **k: trained.append(real(*a, **k)) or trained[-1])
    train, test = scenes(30, 0, noise=1.0), scenes(7, 1, noise=1.0)
    test[1][test[1] == 3] = 0  # a class that is absent
    figures = segmentation.evaluate(train, test, **OPTIONS, rates=(0.1,), chunk=3)
    flat = train[0].reshape(-1, 7).astype(np.float64)
    x = (test[0] - flat.mean(0)) / flat.std(0)
    logits = x @ trained[0].kernel["map"][0] + trained[0].bias["map"][0]
    up = torch.nn.functional.interpolate(
        torch.tensor(logits).permute(0, 3, 1, 2), (SIDE, SIDE), mode="bilinear", align_corners=False
    )
    known = test[1] != segmentation.VOID
    predicted, truth = up.argmax(1).numpy()[known], test[1][known]
    theirs = jaccard_score(truth, predicted, labels=range(3), average=None)
    assert 0.2 < theirs.mean() < 0.9
    for name, value in zip(NAMES, theirs, strict=False):
        assert figures[f"segmentation/iou/{name}"] == pytest.approx(value, abs=1e-3)
    assert np.isnan(figures["segmentation/iou/boat"])
    assert figures["segmentation/miou"] == pytest.approx(theirs.mean(), abs=1e-3)
    assert figures["segmentation/accuracy"] == pytest.approx(np.mean(predicted == truth), abs=1e-3)


def test_the_choice_does_not_see_the_test_masks():
    train, test = scenes(40, 0, noise=1.5), scenes(10, 1, noise=1.5)
    permuted = np.random.default_rng(0).permuted(test[1].reshape(10, -1), axis=1).reshape(test[1].shape)
    first, second = (segmentation.evaluate(train, (test[0], m), **OPTIONS) for m in (test[1], permuted))
    for name in ("rate", "held_out"):
        assert first[f"segmentation/{name}"] == second[f"segmentation/{name}"]
    assert first["segmentation/miou"] > second["segmentation/miou"] + 0.05


def test_the_rate_is_chosen_on_images_that_are_not_fitted():
    """Held-out masks that contradict the others change the choice and its figure, not the heads."""
    train, test = scenes(40, 0), scenes(10, 1)
    _, held_out = probe.split(40)
    masks = train[1].copy()
    masks[held_out] = np.where(masks[held_out] == segmentation.VOID, segmentation.VOID, 3 - masks[held_out])
    options = OPTIONS | {"rates": (0.1,)}
    first, second = (segmentation.evaluate((train[0], m), test, **options) for m in (train[1], masks))
    assert first["segmentation/miou"] == second["segmentation/miou"]
    assert first["segmentation/held_out"] > 0.5 > second["segmentation/held_out"]


def test_memory_maps_chunks_and_a_diverging_rate_do_not_change_the_figures(tmp_path):
    train, test = scenes(30, 0), scenes(7, 1)
    np.save(tmp_path / "features.npy", train[0])
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    options, rates = OPTIONS | {"epochs": 10}, (0.03, 1.0)
    first = segmentation.evaluate(train, test, **options, rates=rates)
    second = segmentation.evaluate((mapped, train[1]), test, **options, rates=(float("inf"), *rates), chunk=2)
    for name, value in first.items():
        assert second[name] == pytest.approx(value, abs=1e-3)


def test_a_diverged_head_is_not_chosen_where_background_would_win():
    (features, masks), test = scenes(20, 0), scenes(5, 1)
    figures = segmentation.evaluate((features, masks * 0), test, **OPTIONS, rates=(float("inf"), 1e-9))
    assert figures["segmentation/rate"] == 1e-9 and figures["segmentation/held_out"] < 0.9


def test_segmentation_refuses_bad_input():
    train, test = scenes(4, 0), scenes(2, 1)
    broken = test[0].copy()
    broken[1, 2, 3, 4] = np.inf
    void = np.full_like(train[1], segmentation.VOID)
    options = OPTIONS | {"epochs": 1}
    for first, second, others in (
        ((train[0], train[1][:2]), test, {}), (train, (test[0], test[1] + np.uint8(CLASSES)), {}),
        (train, (broken, test[1]), {}), ((broken, test[1]), test, {}), ((train[0], void), test, {}),
        (train, test, {"class_names": NAMES[:2]}), (train, test, {"rates": (float("inf"),)}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="segmentation:"):
            segmentation.evaluate(first, second, **options | others)
    with pytest.raises(ValueError, match="segmentation: masks have classes"):
        segmentation.confusion(np.array([0, 1]), np.array([0, 9]), 4)
