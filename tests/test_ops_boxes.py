"""Boxes against plain Python arithmetic, counting on a fine grid and central differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salcl_jax.ops import boxes as box_ops


def _random_boxes(rng, *shape):
    low, high = rng.uniform(0, 0.6, (*shape, 2)), rng.uniform(0.1, 0.4, (*shape, 2))
    return np.concatenate([low, low + high], axis=-1).astype(np.float32)


def _iou(a, b):
    h = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    w = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - h * w
    return h * w / union


def test_iou_and_areas_against_scalar_arithmetic():
    rng = np.random.default_rng(0)
    a, b = _random_boxes(rng, 6), _random_boxes(rng, 5)
    expected = np.array([[_iou(p, q) for q in b] for p in a])
    assert (expected > 0).any() and (expected == 0).any()
    found = box_ops.pairwise_iou(jnp.array(a), jnp.array(b))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(
        box_ops.iou(jnp.array(a[:5]), jnp.array(b)), np.diag(expected[:5]), atol=1e-6
    )
    np.testing.assert_allclose(box_ops.iou(jnp.array(a), jnp.array(a)), 1.0, atol=1e-6)
    sides = (a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1])
    np.testing.assert_allclose(box_ops.area(jnp.array(a)), sides, rtol=1e-6)


def test_one_box_broadcasts_over_many():
    rng = np.random.default_rng(1)
    a, b = _random_boxes(rng, 3, 1), _random_boxes(rng, 3, 4)
    found = box_ops.intersection_area(jnp.array(a), jnp.array(b))
    for i in range(3):
        for j in range(4):
            h = min(a[i, 0, 2], b[i, j, 2]) - max(a[i, 0, 0], b[i, j, 0])
            w = min(a[i, 0, 3], b[i, j, 3]) - max(a[i, 0, 1], b[i, j, 1])
            assert found[i, j] == pytest.approx(max(h, 0) * max(w, 0), abs=1e-6)


def test_empty_boxes_have_no_area_and_finite_iou():
    boxes = jnp.array([[0.5, 0.5, 0.5, 0.5], [0.7, 0.1, 0.2, 0.6], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(box_ops.area(boxes), 0.0)
    np.testing.assert_array_equal(box_ops.pairwise_iou(boxes, boxes), 0.0)
    gradient = jax.jit(jax.grad(lambda b: box_ops.pairwise_iou(b, b).sum()))(boxes)
    assert np.isfinite(gradient).all()


def test_center_and_size_return_to_the_box():
    boxes = jnp.array([[0.1, 0.2, 0.5, 0.9]])
    center, size = box_ops.center_size(boxes)
    np.testing.assert_allclose(center, [[0.3, 0.55]], atol=1e-6)
    np.testing.assert_allclose(size, [[0.4, 0.7]], atol=1e-6)
    np.testing.assert_allclose(box_ops.from_center_size(center, size), boxes, atol=1e-6)


@pytest.mark.parametrize(
    "box, expected",
    [
        ([0.2, 0.3, 0.5, 0.9], [0.2, 0.3, 0.5, 0.9]),  # inside: untouched
        ([-0.2, 0.3, 0.1, 0.6], [0.0, 0.3, 0.3, 0.6]),  # shifted, not cut
        ([0.9, 0.8, 1.3, 1.4], [0.6, 0.4, 1.0, 1.0]),
        ([-1.0, 0.2, 1.5, 0.4], [0.0, 0.2, 1.0, 0.4]),  # larger than the canvas
        ([0.5, 0.5, 0.5, 0.5], [0.45, 0.45, 0.55, 0.55]),  # grown about the centre
        ([0.6, 0.5, 0.2, 0.9], [0.35, 0.5, 0.45, 0.9]),  # flipped
        ([1.5, -3.0, 1.6, -2.8], [0.9, 0.0, 1.0, 0.2]),  # far outside
    ],
)
def test_clip_inside(box, expected):
    found = box_ops.clip_inside(jnp.array([box]), 0.1)
    np.testing.assert_allclose(found, [expected], atol=1e-6)


def test_clip_inside_never_leaves_the_canvas():
    boxes = np.random.default_rng(2).uniform(-1, 2, (5000, 4)).astype(np.float32)
    found = np.asarray(box_ops.clip_inside(jnp.array(boxes), 0.05))
    assert found.min() >= 0.0 and found.max() <= 1.0
    assert (found[:, 2:] - found[:, :2]).min() > 0.05 - 1e-6


def test_grid_overlap_against_counting():
    boxes = np.array([[0.13, 0.4, 0.77, 0.52], [0.0, 0.0, 1.0, 1.0], [-0.3, 0.9, 0.2, 1.4]])
    rows, cols = box_ops.grid_overlap(jnp.array(boxes, jnp.float32), 5, 7)
    steps = (np.arange(100_000) + 0.5) / 100_000
    for shares, low, high, cells in ((rows, 0, 2, 5), (cols, 1, 3, 7)):
        for i, box in enumerate(boxes):
            points = box[low] + steps * (box[high] - box[low])
            counts, _ = np.histogram(points, bins=np.arange(cells + 1) / cells)
            np.testing.assert_allclose(shares[i], counts / len(points), atol=1e-4)


def test_mean_inside_against_a_fine_grid():
    rng = np.random.default_rng(3)
    maps = rng.uniform(size=(2, 4, 5)).astype(np.float32)
    boxes = _random_boxes(rng, 2, 3)
    boxes[0, 0] = [-0.2, 0.5, 0.4, 1.3]  # only its part on the canvas counts
    found = box_ops.mean_inside(jnp.array(maps), jnp.array(boxes))
    steps = (np.arange(1000) + 0.5) / 1000
    for i in range(2):
        for j in range(3):
            y0, x0, y1, x1 = boxes[i, j]
            y, x = y0 + steps * (y1 - y0), x0 + steps * (x1 - x0)
            y, x = y[(y >= 0) & (y < 1)], x[(x >= 0) & (x < 1)]
            inside = maps[i][np.floor(y * 4).astype(int)][:, np.floor(x * 5).astype(int)]
            assert found[i, j] == pytest.approx(inside.mean(), abs=2e-3)


def test_mean_inside_of_degenerate_boxes():
    maps = jnp.arange(12.0).reshape(1, 3, 4)
    boxes = jnp.array(
        [
            [
                [0.5, 0.6, 0.5, 0.6],  # a point in row 1, column 2
                [0.5, 0.3, 0.5, 0.7],  # a line in row 1, columns 1 (half) and 2 (half)
                [0.9, 0.9, 0.9, 0.1],  # flipped: a point at its centre, row 2, columns 1 and 2
                [2.0, 2.0, 3.0, 3.0],  # off the canvas
                [0.0, 0.0, 0.0, 0.0],
            ]
        ]
    )
    found = box_ops.mean_inside(maps, boxes)
    np.testing.assert_allclose(found, [[6.0, 5.5, 9.5, 0.0, 0.0]], atol=0.02)
    gradient = jax.grad(lambda m, b: box_ops.mean_inside(m, b).sum(), argnums=(0, 1))
    gradients = jax.jit(gradient)(maps, boxes)
    assert all(np.isfinite(g).all() for g in gradients)


def _central_differences(function, boxes, eps=1e-5):
    function, gradient = jax.jit(function), np.zeros(boxes.shape)
    for index in np.ndindex(*boxes.shape):
        step = np.zeros(boxes.shape)
        step[index] = eps
        up, down = function(jnp.array(boxes + step)), function(jnp.array(boxes - step))
        gradient[index] = (up - down) / (2 * eps)
    return gradient


def test_box_gradients_against_central_differences():
    with jax.enable_x64(True):
        rng = np.random.default_rng(4)
        maps = jnp.array(rng.uniform(size=(1, 4, 5)))
        boxes = np.array([[[0.11, 0.23, 0.68, 0.83], [-0.1, 0.31, 0.37, 0.77]]])
        weight = jnp.array(rng.normal(size=(1, 2, 4)))
        for function in (
            lambda b: box_ops.mean_inside(maps, b).sum(),
            lambda b: (box_ops.clip_inside(b, 0.1) * weight).sum(),
            lambda b: box_ops.iou(b[:, :1], b[:, 1:]).sum(),
        ):
            found = np.asarray(jax.jit(jax.grad(function))(jnp.array(boxes)))
            assert np.abs(found).max() > 0.05
            np.testing.assert_allclose(found, _central_differences(function, boxes), atol=1e-7)
