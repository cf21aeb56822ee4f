"""Regions on maps whose regions are known, against numpy moments and central differences; the controls."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salcl_jax.ops import roi

DEFAULTS = {
    "count": 3,
    "temperature": 0.05,
    "level": 0.25,
    "window": 0.15,
    "extent": 1.0,
    "min_size": 0.1,
    "max_size": 0.9,
    "min_peak": 0.4,
}
WIDE = 100.0  # a window that weighs all mass alike: moments are then those of the whole map
_from_map = jax.jit(roi.from_map, static_argnames=tuple(DEFAULTS))
_slope = jax.jit(jax.grad(lambda maps: roi.from_map(maps, **DEFAULTS).boxes.sum()))


def _find(maps, **fields):
    rois = _from_map(jnp.array(maps), **{**DEFAULTS, **fields})
    return np.asarray(rois.boxes), np.asarray(rois.valid), np.asarray(rois.score)


def _centers(boxes):
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def _sizes(boxes):
    return boxes[..., 2:] - boxes[..., :2]


def _blob(h, w, center, spread, height=1.0):
    y, x = (np.arange(h) + 0.5) / h, (np.arange(w) + 0.5) / w
    square = ((y - center[0]) / spread)[:, None] ** 2 + ((x - center[1]) / spread)[None, :] ** 2
    return (height * np.exp(-square / 2)).astype(np.float32)


def _rectangle(h, w, y0, x0, y1, x1):
    out = np.zeros((h, w), np.float32)
    out[y0:y1, x0:x1] = 1.0
    return out


def _mean_inside(image, box):
    """Mean over a box of a map that is constant in each cell, cell by cell."""
    h, w = image.shape
    total = area = 0.0
    for i in range(h):
        for j in range(w):
            height = max(0.0, min(box[2], (i + 1) / h) - max(box[0], i / h))
            width = max(0.0, min(box[3], (j + 1) / w) - max(box[1], j / w))
            total, area = total + height * width * image[i, j], area + height * width
    return total / area


@pytest.mark.parametrize("h, w", [(10, 16), (15, 6)])
def test_a_rectangle_is_found_as_it_is(h, w):
    cells = np.array([[2, 3, 6, 5], [0, 0, 3, 4], [7, 1, 9, 6], [1, 1, 9, 5]])
    maps = np.stack([_rectangle(h, w, *c) for c in cells])
    boxes, valid, _ = _find(maps, window=WIDE, count=1, min_size=0.01)
    np.testing.assert_allclose(boxes[:, 0], cells / [h, w, h, w], atol=2e-3)
    assert valid.all()


def test_extent_scales_and_the_bounds_clip():
    maps = np.stack([_rectangle(14, 14, 4, 5, 8, 11), _rectangle(14, 14, 5, 3, 7, 7)])
    boxes, _, _ = _find(maps, window=WIDE, count=1, extent=1.3, min_size=0.35, max_size=0.45)
    sizes = [[1.3 * 4 / 14, 0.45], [0.35, 1.3 * 4 / 14]]
    np.testing.assert_allclose(_sizes(boxes)[:, 0], sizes, rtol=1e-2)
    np.testing.assert_allclose(_centers(boxes)[:, 0] * 14, [[6, 8], [6, 5]], atol=0.03)


@pytest.mark.parametrize("n, level, window", [(7, 0.25, 0.25), (28, 0.25, 0.25), (28, 0.0, 0.1)])
def test_a_gaussian_blob(n, level, window):
    # The narrow window sees 0.8 of these spreads; nearly all of the blob is mass, so this can be undone.
    spreads = (0.08, 0.14, 0.1) if window > 0.2 else (0.06, 0.07, 0.065)
    centers = [(0.4, 0.6), (0.52, 0.47), (0.3, 0.35)]
    maps = np.stack([_blob(n, n, c, s) for c, s in zip(centers, spreads, strict=True)])
    boxes, valid, _ = _find(maps, level=level, window=window, count=1)
    assert valid.all()
    np.testing.assert_allclose(_centers(boxes)[:, 0], centers, atol=0.5 / n)
    grid = (np.arange(n) + 0.5) / n
    for i, blob in enumerate(maps):  # the mass that counts, and its spread, without any window
        mass = np.maximum(blob - (blob.mean() + level * (blob.max() - blob.mean())), 0)
        for axis in range(2):
            line = mass.sum(axis=1 - axis) / mass.sum()
            variance = line @ (grid - line @ grid) ** 2 + 1 / (12 * n**2)
            assert _centers(boxes)[i, 0, axis] == pytest.approx(line @ grid, abs=0.01)
            assert _sizes(boxes)[i, 0, axis] == pytest.approx(np.sqrt(12 * variance), rel=0.06)


@pytest.mark.parametrize("h, w", [(14, 14), (7, 9)])
def test_two_blobs_give_two_regions_strongest_first(h, w):
    strong = np.array([[0.5, 0.22], [0.5, 0.78], [0.22, 0.4], [0.78, 0.6]])
    maps = [_blob(h, w, c, 0.08) + _blob(h, w, 1 - c, 0.08, 0.8) for c in strong]
    boxes, valid, _ = _find(np.stack(maps))
    np.testing.assert_array_equal(valid, [[True, True, False]] * 4)
    np.testing.assert_allclose(_centers(boxes)[:, 0], strong, atol=1 / max(h, w))
    np.testing.assert_allclose(_centers(boxes)[:, 1], 1 - strong, atol=1 / max(h, w))
    assert _sizes(boxes)[:, :2].max() < 0.4


def test_three_blobs_give_three_regions_strongest_first():
    centers = np.array([[0.2, 0.2], [0.8, 0.3], [0.4, 0.8]])
    orders = np.array([[0, 1, 2], [2, 0, 1], [1, 2, 0], [2, 1, 0]])
    heights = (1.0, 0.85, 0.7)
    maps = [sum(_blob(14, 14, centers[i], 0.08, heights[k]) for k, i in enumerate(o)) for o in orders]
    boxes, valid, _ = _find(np.stack(maps))
    assert valid.all()
    np.testing.assert_allclose(_centers(boxes), centers[orders], atol=1 / 14)
    assert _sizes(boxes).max() < 0.4


def test_min_peak_decides_on_the_share_of_the_strongest_peak():
    maps = _blob(14, 14, (0.25, 0.25), 0.08) + _blob(14, 14, (0.75, 0.75), 0.08, 0.6)
    cut = maps.mean() + 0.25 * (maps.max() - maps.mean())
    share = float((maps[7:, 7:].max() - cut) / (maps.max() - cut))
    assert 0.2 < share < 0.6
    np.testing.assert_array_equal(_find(maps[None], count=2, min_peak=0.9 * share)[1][0], [True, True])
    np.testing.assert_array_equal(_find(maps[None], count=2, min_peak=1.1 * share)[1][0], [True, False])


def test_a_flat_map_has_no_region():
    values = np.array([0.0, 1e-30, 0.3, 1.0], np.float32)
    maps = np.broadcast_to(values[:, None, None], (4, 7, 9))
    boxes, valid, score = _find(maps)
    assert not valid.any()
    assert boxes.min() >= 0 and boxes.max() <= 1 and _sizes(boxes).min() >= 0.1 - 1e-6
    np.testing.assert_allclose(score, np.broadcast_to(values[:, None], (4, 3)), atol=1e-6)
    assert np.isfinite(_slope(jnp.array(maps))).all()


def test_one_hot_cell_is_one_region_of_its_size():
    h, w = 7, 9
    cells = np.array([[2, 3], [0, 0], [6, 8], [3, 0]])
    maps = np.stack([_rectangle(h, w, y, x, y + 1, x + 1) for y, x in cells])
    boxes, valid, score = _find(maps)
    np.testing.assert_array_equal(valid, [[True, False, False]] * 4)
    expected = np.concatenate([cells, cells + 1], axis=1) / [h, w, h, w]
    np.testing.assert_allclose(boxes[:, 0], expected, atol=0.012)
    assert score[:, 0].min() > 0.85 and boxes.min() >= 0 and boxes.max() <= 1
    assert np.isfinite(_slope(jnp.array(maps))).all()


def test_a_blob_on_the_border_stays_on_the_canvas():
    centers = [(0.0, 0.0), (1.0, 0.4), (0.3, 1.0), (0.97, 0.03)]
    maps = np.stack([_blob(14, 10, center, 0.12) for center in centers])
    boxes, valid, _ = (v[:, 0] for v in _find(maps, extent=1.6, count=1))
    assert valid.all() and boxes.min() >= 0 and boxes.max() <= 1 and _sizes(boxes).min() > 0.2
    for image, box in zip(maps, boxes, strict=True):
        peak = (np.array(np.unravel_index(image.argmax(), image.shape)) + 0.5) / image.shape
        assert (box[:2] <= peak).all() and (peak <= box[2:]).all()


def test_score_is_the_mean_of_the_map_inside_the_box():
    maps = np.random.default_rng(0).uniform(size=(3, 6, 9)).astype(np.float32)
    boxes, _, score = _find(maps)
    for i in range(3):
        for j in range(3):
            assert score[i, j] == pytest.approx(_mean_inside(maps[i], boxes[i, j]), abs=1e-5)


def test_images_of_a_batch_do_not_see_each_other():
    maps = np.random.default_rng(1).uniform(size=(3, 6, 9)).astype(np.float32)
    together = _find(maps)
    others = np.concatenate([maps[:1], 1 - maps[1:]])
    for value, other in zip(together, _find(others), strict=True):
        np.testing.assert_allclose(value[0], other[0], atol=1e-6)
    assert np.abs(together[0][1] - _find(others)[0][1]).max() > 0.05


def test_box_gradient_with_respect_to_the_map_against_central_differences():
    h, w, eps = 7, 10, 1e-6
    rng = np.random.default_rng(2)
    maps = _blob(h, w, (0.27, 0.31), 0.1) + _blob(h, w, (0.71, 0.64), 0.12, 0.8)
    maps = maps.astype(np.float64) + 0.05 * rng.uniform(size=(h, w))
    weight = rng.normal(size=(1, 2, 4))
    fields = {**DEFAULTS, "count": 2, "min_size": 0.05}
    with jax.enable_x64(True):

        @jax.jit
        def value_and_slope(maps):
            boxes, pull = jax.vjp(lambda m: roi.from_map(m, **fields).boxes, maps)
            return boxes, pull(jnp.broadcast_to(jnp.array(weight), boxes.shape))[0]

        # One cell is moved in each image of the batch; the last one is the map itself.
        steps = np.concatenate([eps * np.eye(h * w), np.zeros((1, h * w))]).reshape(-1, h, w)
        up, slopes = (np.asarray(v) for v in value_and_slope(jnp.array(maps + steps)))
        down = np.asarray(value_and_slope(jnp.array(maps - steps))[0])
    difference, found, sizes = ((up - down) * weight).sum(axis=(1, 2))[:-1], slopes[-1], _sizes(up[-1])
    assert sizes.min() > 0.051 and sizes.max() < 0.89  # away from the bounds, where boxes do not move
    expected = difference.reshape(h, w) / (2 * eps)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())


@settings(max_examples=30, deadline=None, database=None)
@given(seed=st.integers(0, 2**31), power=st.floats(0.05, 8.0))
def test_any_map_gives_boxes_on_the_canvas_within_the_bounds(seed, power):
    maps = np.random.default_rng(seed).uniform(size=(2, 5, 8)) ** power
    boxes, valid, score = _find(maps.astype(np.float32), min_size=0.2, max_size=0.6)
    assert boxes.min() >= 0 and boxes.max() <= 1
    assert _sizes(boxes).min() > 0.2 - 1e-6 and _sizes(boxes).max() < 0.6 + 1e-6
    assert valid[:, 0].all() and score.min() >= 0 and score.max() <= 1


def test_random_regions_have_sides_within_the_bounds_anywhere():
    aspect = jnp.array([0.4, 1.0, 2.5])
    draw = jax.jit(partial(roi.random, count=2000, min_size=0.15, max_size=0.8))
    rois = draw(jax.random.key(0), aspect)
    boxes = np.asarray(rois.boxes)
    assert rois.valid.all() and boxes.min() >= 0 and boxes.max() <= 1
    np.testing.assert_array_equal(rois.score, 1.0)
    assert _sizes(boxes).min() > 0.15 - 1e-6 and _sizes(boxes).max() < 0.8 + 1e-6
    assert _sizes(boxes)[1].min() < 0.25 and _sizes(boxes)[1].max() > 0.75
    np.testing.assert_allclose(_centers(boxes).mean(axis=1), 0.5, atol=0.02)
    assert _centers(boxes).min() < 0.2 and _centers(boxes).max() > 0.8


def test_central_regions():
    rois = roi.central(2, count=3, size=0.4)
    np.testing.assert_allclose(rois.boxes, np.broadcast_to([0.3, 0.3, 0.7, 0.7], (2, 3, 4)), atol=1e-6)
    assert rois.valid.shape == (2, 3) and rois.valid.all()


def test_ground_truth_takes_the_largest_boxes_first():
    rng = np.random.default_rng(3)
    low = rng.uniform(0, 0.5, (4, 6, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.1, 0.5, (4, 6, 2))], axis=-1).astype(np.float32)
    rois = roi.ground_truth(jnp.array(boxes), count=3, min_size=0.05)
    for i in range(4):
        areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in boxes[i]]
        np.testing.assert_allclose(rois.boxes[i], boxes[i][np.argsort(areas)[::-1][:3]], atol=1e-6)
    assert rois.valid.all()


@pytest.mark.parametrize("slots", [2, 5])
def test_ground_truth_with_fewer_boxes_than_regions(slots):
    boxes = np.zeros((3, slots, 4), np.float32)
    boxes[0, 1] = [0.2, 0.1, 0.4, 0.5]  # padding before it
    boxes[1, :2] = [[0.1, 0.1, 0.2, 0.2], [0.3, 0.5, 0.9, 1.0]]
    rois = roi.ground_truth(jnp.array(boxes), count=3, min_size=0.05)
    np.testing.assert_array_equal(
        rois.valid, [[True, False, False], [True, True, False], [False, False, False]]
    )
    np.testing.assert_array_equal(rois.score, np.asarray(rois.valid, np.float32))
    np.testing.assert_allclose(rois.boxes[0, 0], boxes[0, 1], atol=1e-6)
    np.testing.assert_allclose(rois.boxes[1, :2], boxes[1, 1::-1], atol=1e-6)
    assert np.asarray(_sizes(rois.boxes)).min() > 0.05 - 1e-6  # also those that are not valid


def test_ground_truth_grows_slivers():
    rois = roi.ground_truth(jnp.array([[[0.0, 0.2, 0.01, 0.6]]]), count=1, min_size=0.1)
    np.testing.assert_allclose(rois.boxes[0, 0], [0.0, 0.2, 0.1, 0.6], atol=1e-6)


@pytest.mark.parametrize("second", [1.0, 0.97])
def test_peaks_of_like_height_are_two_regions_and_not_one_between_them(second):
    first = np.array([[0.5, 0.22], [0.5, 0.78], [0.22, 0.4], [0.78, 0.6]])
    maps = [_blob(14, 14, c, 0.08) + _blob(14, 14, 1 - c, 0.08, second) for c in first]
    boxes, valid, _ = _find(np.stack(maps))
    np.testing.assert_array_equal(valid, [[True, True, False]] * 4)
    found = np.sort(_centers(boxes)[:, :2], axis=1)
    np.testing.assert_allclose(found, np.sort(np.stack([first, 1 - first], axis=1), axis=1), atol=1 / 14)
