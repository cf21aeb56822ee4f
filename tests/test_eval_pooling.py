"""The fixed pools against torch's layers and against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salcl_jax.evaluators import pooling

# side, cells, torch's kernel, stride and padding (OpenSelfSup), width of that level in a ResNet-50
FIXED = [
    (112, 12, 10, 10, 4, 64), (56, 6, 16, 8, 0, 256), (28, 4, 13, 5, 0, 512),
    (14, 3, 8, 3, 0, 1024), (7, 2, 6, 1, 0, 2048),
]  # fmt: skip
DIMENSIONS = (9216, 9216, 8192, 9216, 8192)  # as published for the five levels


def maps(height, width, channels=3, batch=2, seed=0):
    values = np.random.default_rng(seed).normal(size=(batch, height, width, channels)) + 1
    return jnp.asarray(values, jnp.float32)


def loops(features, windows_y, windows_x):
    """Means over windows (low, high), what lies outside counting as zero, in torch's order."""
    features = np.asarray(features, np.float64)
    result = []
    for image in features:
        for channel in range(image.shape[-1]):
            for top, bottom in windows_y:
                for left, right in windows_x:
                    inside = image[max(top, 0) : bottom, max(left, 0) : right, channel]
                    result.append(inside.sum() / ((bottom - top) * (right - left)))
    return np.reshape(result, (len(features), -1))


def fixed_windows(cells, kernel, stride, padding):
    return [(i * stride - padding, i * stride - padding + kernel) for i in range(cells)]


def adaptive_windows(side, cells):
    return [(int(np.floor(i * side / cells)), int(np.ceil((i + 1) * side / cells))) for i in range(cells)]


@pytest.mark.parametrize(("side", "cells", "kernel", "stride", "padding", "width"), FIXED)
def test_fixed_windows_match_torch_and_loops(side, cells, kernel, stride, padding, width):
    features = maps(side, side)
    ours = pooling.pool(features, cells)
    windows = fixed_windows(cells, kernel, stride, padding)
    np.testing.assert_allclose(ours, loops(features, windows, windows), atol=1e-5)
    torch = pytest.importorskip("torch")
    layer = torch.nn.AvgPool2d(kernel, stride, padding)
    theirs = layer(torch.tensor(np.array(features)).permute(0, 3, 1, 2)).flatten(1)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("height", "width", "cells"), [(8, 8, 3), (13, 10, 4), (5, 9, 1), (2, 3, 6), (56, 56, 5), (112, 112, 6)]
)
def test_other_sides_match_torch_and_loops(height, width, cells):
    features = maps(height, width)
    ours = pooling.pool(features, cells)
    windows = [adaptive_windows(side, min(cells, side)) for side in (height, width)]
    np.testing.assert_allclose(ours, loops(features, *windows), atol=1e-5)
    torch = pytest.importorskip("torch")
    layer = torch.nn.AdaptiveAvgPool2d((min(cells, height), min(cells, width)))
    theirs = layer(torch.tensor(np.array(features)).permute(0, 3, 1, 2)).flatten(1)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)


def test_one_axis_may_be_fixed_and_the_other_not():
    features = maps(14, 20)
    windows = fixed_windows(3, 8, 3, 0), adaptive_windows(20, 3)
    np.testing.assert_allclose(pooling.pool(features, 3), loops(features, *windows), atol=1e-5)


def test_levels_have_the_published_dimensions():
    stages = {
        level: jax.ShapeDtypeStruct((2, side, side, width), jnp.bfloat16)
        for level, (side, _, _, _, _, width) in zip(pooling.LEVELS, FIXED, strict=True)
    }
    out = jax.eval_shape(pooling.pool_levels, {**stages, "pooled": jax.ShapeDtypeStruct((2, 9), jnp.float32)})
    assert [out[level].shape for level in pooling.LEVELS] == [(2, n) for n in DIMENSIONS]
    assert all(value.dtype == jnp.float32 for value in out.values()) and len(out) == 5


def test_levels_that_are_absent_are_left_out():
    stages = {"stage4": maps(7, 7), "stage2": maps(6, 6), "stem": maps(9, 9)}
    out = pooling.pool_levels(stages)
    assert list(out) == ["stage2", "stage4"]
    for level, cells in (("stage2", 4), ("stage4", 2)):
        np.testing.assert_array_equal(out[level], pooling.pool(stages[level], cells))


def test_pool_refuses_no_cells():
    with pytest.raises(ValueError, match="pooling: cells=0"):
        pooling.pool(maps(4, 4), 0)
