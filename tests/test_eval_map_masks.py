"""Average precision of maps against masks, against scikit-learn and Pillow."""

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score

from salcl_jax.evaluators import localization, map_masks
from salcl_jax.types import Rois

MASK_FIGURES = {"mask_ap", "images_with_masks", "chance/mask_ap_random", "chance/mask_ap_center"}


@pytest.mark.parametrize("levels", [2, 5, 10**6])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_average_precision_is_scikit_learns(levels, share):
    rng = np.random.default_rng(levels)
    for dtype in (np.float32, np.int32):
        score = rng.integers(-levels, levels, 700).astype(dtype)
        positive = rng.random(700) < share
        positive[:2] = True, False
        expected = average_precision_score(positive, score)
        assert map_masks.average_precision(score, positive) == pytest.approx(expected, abs=1e-12)


def test_average_precision_by_hand():
    score, positive = np.array([3.0, 2, 2, 1]), np.array([False, True, False, True])
    assert map_masks.average_precision(score, positive) == pytest.approx(0.5 * 1 / 3 + 0.5 * 2 / 4)
    assert map_masks.average_precision(score * 0, positive) == 0.5  # one threshold
    assert map_masks.average_precision(score, np.ones(4, bool)) == 1.0


@pytest.mark.parametrize("shape", [(3, 5), (7, 7), (1, 4), (12, 1)])
def test_enlarging_is_bilinear_between_centres(shape):
    image = np.random.default_rng(0).random(shape, dtype=np.float32)
    pillow = Image.fromarray(image).resize((24, 24), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(map_masks.enlarge(image, 24), np.asarray(pillow), atol=1e-6)


def test_what_is_flat_stays_exactly_flat():
    for value in (0.1, 0.7, 1 / 3):
        large = map_masks.enlarge(np.full((7, 5), value, np.float32), 96)
        assert large.shape == (96, 96) and np.all(large == np.float32(value))


def example(n=5, side=32, seed=0):
    rng = np.random.default_rng(seed)
    maps = rng.random((n, 4, 4), dtype=np.float32)
    masks = np.kron(rng.choice(np.array([0, 0, 3, 255], np.uint8), (n, 8, 8)), np.ones((side // 8,) * 2))
    return maps, masks.astype(np.uint8)


def test_scores_are_of_the_known_pixels():
    maps, masks = example()
    found = map_masks.scores(maps, masks)
    middle = (np.arange(32) + 0.5) / 32 - 0.5  # exact in binary: equal distances are equal
    prior = np.exp(-(middle[:, None] ** 2 + middle[None] ** 2) / (2 * 0.25**2))
    for i in range(len(maps)):
        known = masks[i] != 255
        truth = masks[i][known] > 0
        large = np.asarray(Image.fromarray(maps[i]).resize((32, 32), Image.Resampling.BILINEAR))
        expected = average_precision_score(truth, large[known])
        assert found["mask_ap"][i] == pytest.approx(expected, abs=1e-4)
        assert found["chance/mask_ap_random"][i] == pytest.approx(truth.mean())
        expected = average_precision_score(truth, prior[known])
        assert found["chance/mask_ap_center"][i] == pytest.approx(expected, abs=1e-9)


def test_the_share_of_objects_is_what_random_scores_reach():
    _, masks = example(1)
    known = masks[0] != 255
    truth, rng = masks[0][known] > 0, np.random.default_rng(1)
    reached = np.mean([average_precision_score(truth, rng.random(len(truth))) for _ in range(100)])
    share = map_masks.scores(np.zeros((1, 2, 2), np.float32), masks)["chance/mask_ap_random"][0]
    assert reached == pytest.approx(share, abs=0.01)


def test_void_pixels_change_nothing():
    maps, masks = example(1)
    other = np.where(masks == 255, np.uint8(7), masks)
    assert map_masks.scores(maps, other)["mask_ap"][0] != map_masks.scores(maps, masks)["mask_ap"][0]
    # Only what is void is brighter: a map that is right about the rest stays perfect.
    mask = np.zeros((1, 8, 8), np.uint8)
    mask[:, :, 2:4], mask[:, :, 6:] = 1, 255
    row = np.array([0.1, 0.9, 0.1, 1.0], np.float32)
    bright = np.broadcast_to(row, (1, 8, 4)).copy()
    assert map_masks.scores(np.repeat(bright, 2, 2), mask)["mask_ap"][0] == 1.0


def test_one_sided_masks_have_no_score_and_broken_maps_have_chance():
    maps, masks = example(4)
    masks[0], masks[1] = 0, 255
    masks[2][masks[2] == 0] = 1
    maps[3] = np.nan
    for values in map_masks.scores(maps, masks).values():
        np.testing.assert_array_equal(np.isnan(values), [True, True, True, False])
    found = map_masks.scores(maps, masks)
    assert found["mask_ap"][3] == pytest.approx(found["chance/mask_ap_random"][3])


@pytest.mark.parametrize("wrong", [lambda m: m[:2], lambda m: m.astype(int), lambda m: m[:, :4]])
def test_masks_that_do_not_fit_are_refused(wrong):
    maps, masks = example(3)
    with pytest.raises(ValueError, match=r"masks are .* give uint8 \[3, s, s\]"):
        map_masks.scores(maps, wrong(masks))


def scene(n=6, real=5):
    maps, masks = example(n)
    boxes = np.zeros((n, 2, 4), np.float32)
    boxes[:, 0] = (0.1, 0.2, 0.6, 0.7)
    boxes[3] = 0  # no box, but a mask
    rois = Rois(boxes[:, ::-1], np.ones((n, 2), bool), np.zeros((n, 2), np.float32))
    image = np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1) * np.ones((1, 2, 2, 3), np.uint8)

    def maps_fn(images):
        index = images[:, 0, 0, 0]
        return maps[index], Rois(*(x[index] for x in rois))

    return maps_fn, {"image": image, "boxes": boxes, "masks": masks, "mask": np.arange(n) < real}, maps


def test_figures_are_means_over_the_images_with_both_sides():
    maps_fn, batch, maps = scene()
    batch["masks"][1] = 0
    kept = [0, 2, 3, 4]  # 1 has no object, 5 is padding
    single = map_masks.scores(maps[kept], batch["masks"][kept])
    found = localization.evaluate(maps_fn, [batch])
    for name in map_masks.NAMES:
        assert found[f"localization/{name}"] == pytest.approx(single[name].mean()), name
    assert found["localization/images_with_masks"] == 4
    assert found["localization/images"] == 4 and found["localization/images_without_boxes"] == 1


def test_without_masks_there_are_no_such_figures():
    maps_fn, batch, _ = scene()
    full = {f"localization/{name}" for name in MASK_FIGURES}
    with_masks = localization.evaluate(maps_fn, [batch])
    assert full <= set(with_masks)
    masks = batch.pop("masks")
    without = localization.evaluate(maps_fn, [batch])
    assert set(with_masks) - set(without) == full
    assert without.items() <= with_masks.items()
    assert set(localization.evaluate(maps_fn, [{**batch, "masks": masks * 0}])) == set(without)
