"""Localisation scores of boxes and maps small enough to work out by hand."""

import numpy as np
import pytest

from salcl_jax.evaluators import localization as loc
from salcl_jax.types import Rois

NOTHING = (0.0, 0.0, 0.0, 0.0)


def stack(*images):
    """Boxes [n, k, 4] from a list of boxes an image, padded with zeros."""
    result = np.zeros((len(images), max(map(len, images)), 4), np.float32)
    for i, boxes in enumerate(images):
        result[i, : len(boxes)] = np.reshape(boxes, (-1, 4))
    return result


def regions(boxes, valid=None, score=None):
    shape = boxes.shape[:2]
    valid = np.ones(shape, bool) if valid is None else np.array(valid)
    score = np.zeros(shape, np.float32) if score is None else np.array(score, np.float32)
    return Rois(boxes, valid, score)


def one_hot(shape, *cells):
    result = np.zeros((len(cells), *shape), np.float32)
    for i, cell in enumerate(cells):
        result[i][cell] = 1.0
    return result


def test_iou_by_hand():
    first = stack([(0, 0, 0.5, 0.5), (0.5, 0, 1, 1), NOTHING])
    second = stack([(0, 0, 0.5, 0.5), (0, 0, 1, 0.5), (0.25, 0.25, 0.75, 0.75), NOTHING])
    expected = [[1, 0.5, 1 / 7, 0], [0, 1 / 3, 0.125 / 0.625, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(loc.iou(first, second), [expected], atol=1e-12)


def test_pointing_uses_the_centre_of_the_largest_cell():
    # Cell (0, 3) of a 4 x 4 map is centred at (0.125, 0.875), cell (2, 1) at (0.625, 0.375).
    maps = one_hot((4, 4), (0, 3), (0, 3), (2, 1), (2, 1))
    boxes = stack(
        [(0, 0.8, 0.2, 0.9)],  # holds the centre
        [(0.13, 0.75, 0.25, 1.0)],  # holds most of the cell, not its centre
        [(0, 0, 0.1, 0.1), (0.625, 0.375, 1, 1)],  # the second box, on its corner
        [(0, 0, 0.1, 0.1)],
    )
    np.testing.assert_array_equal(loc.pointing(maps, boxes), [1, 0, 1, 0])


def test_pointing_of_a_map_that_is_not_square():
    # Cell (1, 0) of a 2 x 5 map is centred at (0.75, 0.1).
    maps = one_hot((2, 5), (1, 0))
    assert loc.pointing(maps, stack([(0.7, 0.05, 0.8, 0.15)]))[0] == 1
    assert loc.pointing(maps, stack([(0.05, 0.7, 0.15, 0.8)]))[0] == 0


def test_pointing_shares_ties():
    flat = np.full((1, 4, 4), 0.5, np.float32)
    # The left half holds 8 of the 16 centres, the upper left quarter 4.
    assert loc.pointing(flat, stack([(0, 0, 1, 0.5)]))[0] == 0.5
    assert loc.pointing(flat, stack([(0, 0, 0.5, 0.5)]))[0] == 0.25
    two = flat.copy()
    two[0, 0, 0] = two[0, 3, 3] = 1.0
    assert loc.pointing(two, stack([(0, 0, 0.5, 0.5)]))[0] == 0.5


def test_padding_never_holds_the_corner():
    assert loc.pointing(one_hot((1, 1), (0, 0)), stack([(0.5, 0.5, 0.5, 0.5)]))[0] == 0


def test_corloc_takes_the_best_valid_region():
    box = (0, 0, 0.5, 0.5)
    wide = (0, 0, 1, 0.5)  # intersection over union with `box`: exactly one half
    far = (0.5, 0.5, 1, 1)
    cases = (
        ([box, far], [1, 1], [0.9, 0.1], 1),
        ([box, far], [1, 1], [0.1, 0.9], 0),
        ([box, far], [1, 0], [0.1, 0.9], 1),  # the better one is invalid
        ([box, far], [0, 0], [0.9, 0.1], 0),  # nothing is valid
        ([box, far], [1, 1], [0.5, 0.5], 1),  # the first of equals
        ([far, box], [1, 1], [0.5, 0.5], 0),
        ([wide, far], [1, 1], [0.9, 0.1], 1),
        ([(0, 0, 1, 0.51), far], [1, 1], [0.9, 0.1], 0),
    )
    for boxes, valid, score, expected in cases:
        rois = regions(stack(boxes), [np.array(valid, bool)], [score])
        assert loc.corloc(rois, stack([box, NOTHING]))[0] == expected


def test_corloc_counts_any_box_but_no_padding():
    rois = regions(stack([(0.5, 0.5, 1, 1)], [NOTHING]))
    truth = stack([(0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1)], [(0, 0, 0.1, 0.1)])
    np.testing.assert_array_equal(loc.corloc(rois, truth), [1, 0])


def test_best_iou_and_recall():
    truth = stack(
        [(0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1), (0, 0.5, 0.5, 1)],
        [(0, 0, 0.5, 0.5)],
        [(0, 0, 0.5, 0.5)],
        [],
    )
    rois = regions(
        stack(
            [(0, 0, 1, 0.5), (0.5, 0.5, 1, 1)],  # 1/2 and 1: two of three found
            [(0, 0, 0.5, 0.5), (0.25, 0.25, 0.75, 0.75)],  # the exact one is invalid: 1/7
            [(0, 0, 0.5, 0.5), (0, 0, 0.5, 0.5)],  # none valid
            [(0, 0, 0.5, 0.5), (0, 0, 0.5, 0.5)],  # no truth
        ),
        [[True, True], [False, True], [False, False], [True, True]],
    )
    np.testing.assert_allclose(loc.best_iou(rois, truth), [1, 1 / 7, 0, 0])
    np.testing.assert_allclose(loc.recall(rois, truth), [2 / 3, 0, 0, np.nan])


def test_recall_and_coverage_take_the_best_valid_regions_first():
    truth = stack([(0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1)], [(0, 0, 0.5, 0.5)], [(0, 0, 0.5, 0.5)], [])
    exact, half, far = (0, 0, 0.5, 0.5), (0, 0, 1, 0.5), (0.5, 0.5, 1, 1)
    rois = regions(
        stack([far, half, exact], [exact, half, far], [half, exact, far], [exact, half, far]),
        # First image: best first half, far, exact. Second: the best is invalid. Third: two are equal.
        [[True] * 3, [False, True, True], [True] * 3, [True] * 3],
        [[0.5, 0.9, 0.1], [0.9, 0.1, 0.5], [0.5, 0.5, 0.1], [0.3, 0.2, 0.1]],
    )
    # half matches exact by 1/2 and does not meet far.
    cover = [[1 / 4, 3 / 4, 1], [0, 1 / 2, 1 / 2], [1 / 2, 1, 1], [np.nan] * 3]
    np.testing.assert_allclose(loc.coverage_at(rois, truth), cover)
    found = [[1 / 2, 1, 1], [0, 1, 1], [1, 1, 1], [np.nan] * 3]
    np.testing.assert_allclose(loc.recall_at(rois, truth), found)


def test_union_cover_by_hand():
    # The boxes share the square (0.25..0.5)^2; padding and what is off the canvas do not count.
    boxes = np.array([(0, 0, 0.5, 0.5), (0.25, 0.25, 0.75, 1.5), NOTHING], np.float32)
    expected = [[0.25, 0.25 * 0.5], [0.25 * 0.25, 0.25 * 0.5]]
    np.testing.assert_allclose(loc.union_cover(boxes, (2, 2)), expected, atol=1e-9)
    assert loc.union_cover(boxes[2:], (2, 2)).sum() == 0


def test_union_cover_matches_fine_pixels():
    rng = np.random.default_rng(0)
    corners = np.sort(rng.integers(0, 61, (7, 2, 2)), axis=1) / 60
    boxes = corners.reshape(7, 4)
    fine = np.zeros((60, 60))
    for y0, x0, y1, x1 in np.rint(boxes * 60).astype(int):
        fine[y0:y1, x0:x1] = 1
    expected = fine.reshape(3, 20, 4, 15).sum((1, 3)) / 3600
    np.testing.assert_allclose(loc.union_cover(boxes, (3, 4)), expected, atol=1e-9)


def test_saliency_means_by_hand():
    # Each box holds a quarter of the canvas, in whole or half cells of the left column.
    maps = np.array([[[0.8, 0.2], [0.4, 0.0]]] * 4, np.float32)
    boxes = stack([(0, 0, 0.5, 0.5)], [(0.25, 0, 0.75, 0.5)], [(0, 0, 1, 1)], [])
    inside, outside, area = loc.saliency_means(maps, boxes)
    np.testing.assert_allclose(inside, [0.8, 0.6, np.nan, np.nan], rtol=1e-6)
    # All mass 0.35; second: inside 0.6 * 0.25, so 0.2 / 0.75 is left outside.
    np.testing.assert_allclose(outside, [0.15 / 0.75, 0.2 / 0.75, np.nan, np.nan], rtol=1e-6)
    np.testing.assert_allclose(area, [0.25, 0.25, 1, 0])


def scenes():
    """Four images: a good one, a bad one, one without boxes, one that is batch padding."""
    maps = np.array([[[1, 0.1], [0.1, 0.2]], [[0.2, 0.4], [0.2, 0.0]],
                     [[1, 0], [0, 0]], [[0, 1], [0, 0]]], np.float32)
    boxes = stack([(0, 0, 0.5, 0.5)], [(0.3, 0.2, 0.8, 0.8), (0, 0, 0.1, 0.1)], [],
                  [(0, 0, 0.5, 0.5)])
    rois = regions(
        stack([(0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1)], [(0.5, 0.5, 1, 1), (0.3, 0.2, 0.8, 0.8)],
              [(0, 0, 1, 1)], [(0, 0, 1, 1)]),
        [[True, True], [True, True], [True, False], [True, False]],
        [[0.9, 0.1]] * 4,
    )
    mask = np.array([True, True, True, False])
    image = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1) * np.ones((1, 2, 2, 3), np.uint8)

    def maps_fn(images):
        index = images[:, 0, 0, 0]
        return maps[index], Rois(*(x[index] for x in rois))

    return maps_fn, {"image": image, "boxes": boxes, "mask": mask}


def test_evaluate_by_hand():
    maps_fn, batch = scenes()
    result = loc.evaluate(maps_fn, [batch])
    area = (0.25, 0.3 + 0.01)
    # Second image: the box covers 0.06 of each upper cell and 0.09 of each lower one, the small
    # box 0.01 of the first cell.
    mass = 0.06 * (0.2 + 0.4) + 0.09 * 0.2 + 0.01 * 0.2
    inside = (1.0, mass / 0.31)
    outside = (0.1 / 0.75, (0.2 - mass) / 0.69)
    expected = {
        "pointing": (1 + 0) / 2, "corloc": (1 + 0) / 2, "best_iou": 1.0,
        "recall@0.5": (1 + 0.5) / 2, "inside_ratio": np.mean(inside) / np.mean(outside),
        "chance/pointing_center": (1 + 1) / 2, "chance/pointing_random": np.mean(area),
        # Central box 0.49: IoU with the quarter 0.1225 / 0.6175, with the other 0.3 / 0.49.
        "chance/corloc_center": (0 + 1) / 2, "chance/corloc_whole": 0.0,
        "images": 2.0, "images_without_boxes": 1.0,
        # Second image, better region (0.5, 0.5, 1, 1): shares 0.09 with the large box of 0.3.
        "recall@0.5/r1": (1 + 0) / 2, "recall@0.5/r2": (1 + 0.5) / 2,
        "coverage/r1": (1 + 0.09 / 0.46 / 2) / 2, "coverage/r2": (1 + 0.5) / 2, "coverage": (1 + 0.5) / 2,
        "chance/best_iou_center": (0.1225 / 0.6175 + 0.3 / 0.49) / 2,
        "chance/recall@0.5_center": (0 + 0.5) / 2,
        "chance/coverage_center": (0.1225 / 0.6175 + 0.3 / 0.49 / 2) / 2,
        "chance/best_iou_whole": (0.25 + 0.3) / 2, "chance/recall@0.5_whole": 0.0,
        "chance/coverage_whole": (0.25 + (0.3 + 0.01) / 2) / 2,
    }
    random = {f"chance/{name}_random" for name in ("corloc", "best_iou", "recall@0.5", "coverage")}
    random |= {f"chance/{name}_random/r{r}" for name in ("recall@0.5", "coverage") for r in (1, 2)}
    assert set(result) == {f"localization/{name}" for name in {*expected, *random}}
    for name, value in expected.items():
        assert result[f"localization/{name}"] == pytest.approx(value, abs=1e-6), name


def test_evaluate_does_not_depend_on_the_batches():
    maps_fn, batch = scenes()
    whole = loc.evaluate(maps_fn, [batch])
    single = loc.evaluate(
        maps_fn, ({name: x[i : i + 1] for name, x in batch.items()} for i in range(4))
    )
    assert whole == pytest.approx(single)


def test_whole_canvas_box_is_chance_for_the_whole_image():
    maps_fn, batch = scenes()
    batch["boxes"] = stack([(0, 0, 1, 0.5)], [(0, 0, 1, 1)], [(0, 0, 1, 0.4)], [])
    result = loc.evaluate(maps_fn, [batch])
    assert result["localization/chance/corloc_whole"] == pytest.approx(2 / 3)
    assert result["localization/chance/corloc_center"] == pytest.approx(0.0)
    # The image that is all box has no outside and is left out: the first and the third remain.
    inside = (0.55, (0.4 * 0.5) / 0.4)
    outside = (0.15, (0.1 * 0.5) / 0.6)
    assert result["localization/inside_ratio"] == pytest.approx(np.mean(inside) / np.mean(outside))


def test_localization_refuses_data_without_boxes():
    maps_fn, batch = scenes()
    with pytest.raises(ValueError, match="no image has"):
        loc.evaluate(maps_fn, [{**batch, "boxes": np.zeros((4, 2, 4), np.float32)}])
    with pytest.raises(ValueError, match="no 'boxes'"):
        loc.evaluate(maps_fn, [{"image": batch["image"]}])


def against_the_batch(images):
    """Maps that depend on the other images of the batch, as those of 'contrast' do."""
    x = images[..., 0].astype(np.float32)
    x = np.abs(x - x.mean(0, keepdims=True))
    maps = x / x.max((1, 2), keepdims=True)
    n = len(maps)
    return maps, regions(np.tile(np.array([0, 0, 0.5, 0.5], np.float32), (n, 1, 1)))


def test_padding_does_not_change_maps_that_compare_images():
    rng = np.random.default_rng(0)
    image = rng.integers(1, 255, (4, 4, 4, 3)).astype(np.uint8)
    batch = {"image": image, "boxes": stack(*[[(0, 0, 0.5, 0.5)]] * 4), "mask": np.ones(4, bool)}
    padded = {name: np.concatenate([x, np.zeros_like(x)]) for name, x in batch.items()}
    drawn = []
    wanted, found = loc.collect(against_the_batch, [batch]), loc.collect(against_the_batch, [padded], drawn)
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(drawn[0][0], against_the_batch(image)[0], rtol=1e-6)
    assert len(drawn) == 1 and drawn[0][1].boxes.shape == (4, 1, 4)
    # Black rows would have changed them.
    black = against_the_batch(padded["image"])[0][:4]
    assert np.abs(black - drawn[0][0]).max() > 0.1


def test_difficult_boxes_do_not_count():
    maps_fn, batch = scenes()
    hard = {**batch, "difficult": np.zeros(batch["boxes"].shape[:2], bool)}
    assert loc.evaluate(maps_fn, [hard]) == pytest.approx(loc.evaluate(maps_fn, [batch]))
    hard["difficult"][1, 1] = True  # the small box of the second image
    found = loc.evaluate(maps_fn, [hard])
    boxes = batch["boxes"].copy()
    boxes[1, 1] = 0
    assert found == pytest.approx(loc.evaluate(maps_fn, [{**batch, "boxes": boxes}]))
    assert found["localization/recall@0.5"] == 1.0  # by hand: only the box that no region matches is gone
    hard["difficult"][1] = True
    assert loc.evaluate(maps_fn, [hard])["localization/images_without_boxes"] == 2
