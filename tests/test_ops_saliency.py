"""Saliency sources against numpy; normalisation and fusion on maps whose result is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salcl_jax.ops import saliency


def _features(b=3, h=4, w=5, d=6, seed=0):
    return np.random.default_rng(seed).normal(size=(b, h, w, d)).astype(np.float32)


def _stretched(maps):
    low, high = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
    return (maps - low) / (high - low)


def test_activation_against_numpy():
    x = _features()
    np.testing.assert_allclose(
        _stretched(np.asarray(saliency.activation(jnp.array(x)))), _stretched(x.sum(-1)), atol=1e-5
    )
    norm = saliency.activation(jnp.array(x), "norm")
    np.testing.assert_allclose(norm, np.linalg.norm(x, axis=-1), rtol=1e-5)


def test_half_precision_features_are_summed_in_float32():
    x = jnp.full((1, 2, 2, 2048), 1.0, jnp.bfloat16).at[0, 0, 0, 0].set(3.0)
    found = saliency.activation(x)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found[0], [[2050 / 2048, 1.0], [1.0, 1.0]], rtol=1e-6)


@pytest.mark.parametrize("statistic", ["sum", "norm"])
def test_silent_features_have_finite_gradients(statistic):
    gradient = jax.grad(lambda x: saliency.activation(x, statistic).sum())(jnp.zeros((1, 2, 3, 4)))
    assert np.isfinite(gradient).all()


def test_similarity_against_numpy():
    x, pooled = _features(), np.random.default_rng(1).normal(size=(3, 6)).astype(np.float32)
    found = saliency.similarity(jnp.array(x), jnp.array(pooled))
    for i in range(3):
        for y in range(4):
            for z in range(5):
                a, b = x[i, y, z], pooled[i]
                cosine = a @ b / np.sqrt((a @ a) * (b @ b))
                assert found[i, y, z] == pytest.approx(cosine, abs=1e-5)
    same = saliency.similarity(jnp.array(x[:, :1, :1]), jnp.array(-2 * x[:, 0, 0]))
    np.testing.assert_allclose(same, -1.0, atol=1e-5)
    assert np.isfinite(saliency.similarity(jnp.zeros((1, 2, 2, 3)), jnp.zeros((1, 3)))).all()


def test_contrast_against_numpy():
    z, own = _features(), np.random.default_rng(1).normal(size=(3, 6)).astype(np.float32)
    found = saliency.contrast(jnp.array(z), jnp.array(own))

    def cosine(a, b):
        return a @ b / np.sqrt((a @ a) * (b @ b))

    for i in range(3):
        for y in range(4):
            for x in range(5):
                others = np.mean([cosine(z[i, y, x], own[j]) for j in range(3)])
                assert found[i, y, x] == pytest.approx(cosine(z[i, y, x], own[i]) - others, abs=1e-5)
    alike = saliency.contrast(jnp.array(z), jnp.array(own[:1].repeat(3, 0)))
    np.testing.assert_allclose(alike, 0.0, atol=1e-6)  # nothing tells images apart that are the same


def test_gradcam_against_numpy():
    x, gradient = _features(), _features(seed=1)
    found = np.asarray(saliency.gradcam(jnp.array(x), jnp.array(gradient)))
    expected = np.zeros(x.shape[:3])
    for i in range(x.shape[0]):
        for channel in range(x.shape[3]):
            expected[i] += gradient[i, :, :, channel].mean() * x[i, :, :, channel]
    assert (expected < -0.01).any() and (expected > 0.01).any()
    np.testing.assert_allclose(found, np.maximum(expected, 0), atol=1e-5)


def test_attention_is_the_mean_over_heads():
    weights = np.random.default_rng(2).uniform(size=(2, 3, 4, 5)).astype(np.float32)
    found = saliency.attention(jnp.array(weights))
    np.testing.assert_allclose(found, (weights[:, 0] + weights[:, 1] + weights[:, 2]) / 3, rtol=1e-6)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-20, 1e-8, 1e8, 1e30])
def test_normalize_stretches_each_map_whatever_its_magnitude(magnitude):
    maps = np.random.default_rng(3).uniform(-1, 1, (4, 3, 5))
    scaled = jnp.array(maps * magnitude, jnp.float32)
    found = saliency.normalize(scaled)
    np.testing.assert_allclose(found, _stretched(maps), atol=1e-6)
    weight = jnp.array(np.random.default_rng(4).normal(size=maps.shape), jnp.float32)
    slope = jax.grad(lambda m: jnp.sum(saliency.normalize(m) * weight))
    gradient, expected = slope(scaled), slope(jnp.array(maps, jnp.float32))
    np.testing.assert_allclose(np.asarray(gradient, np.float64) * magnitude, expected, rtol=1e-3, atol=1e-4)


def test_normalize_gradient_against_central_differences():
    with jax.enable_x64(True):
        rng = np.random.default_rng(5)
        maps, weight, eps = rng.uniform(size=(1, 3, 4)), rng.normal(size=(1, 3, 4)), 1e-6

        @jax.jit
        def function(m):
            return jnp.sum(saliency.normalize(m) * weight)

        found = np.asarray(jax.grad(function)(jnp.array(maps)))
        for index in np.ndindex(*maps.shape):
            step = np.zeros(maps.shape)
            step[index] = eps
            difference = function(jnp.array(maps + step)) - function(jnp.array(maps - step))
            assert found[index] == pytest.approx(float(difference) / (2 * eps), abs=1e-7)


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1e-20, 0.3, -7.0, 1e20, 3e38, -3e38])
def test_a_flat_map_is_all_ones_with_no_gradient(value):
    flat = jnp.full((2, 3, 4), value, jnp.float32)
    found, gradient = jax.value_and_grad(lambda m: jnp.sum(saliency.normalize(m) ** 2))(flat)
    assert found == 24.0
    np.testing.assert_array_equal(gradient, 0.0)


def test_rounding_noise_is_flat_but_weak_structure_is_not():
    noise = np.random.default_rng(6).uniform(-1, 1, (1, 7, 7))
    np.testing.assert_array_equal(saliency.normalize(jnp.array(5 + 1e-6 * noise, jnp.float32)), 1.0)
    found = saliency.normalize(jnp.array(5 + 1e-2 * noise, jnp.float32))
    np.testing.assert_allclose(found, _stretched(noise), atol=1e-3)


def test_one_flat_map_leaves_the_others_of_the_batch_alone():
    maps = np.random.default_rng(7).uniform(size=(3, 4, 4)).astype(np.float32)
    maps[1] = 0.4
    found = saliency.normalize(jnp.array(maps))
    np.testing.assert_allclose(found[::2], _stretched(maps[::2]), atol=1e-6)
    np.testing.assert_array_equal(found[1], 1.0)


def test_one_map_passes_through_fuse():
    maps = jnp.array(np.random.default_rng(8).uniform(0.2, 0.7, (2, 3, 4)), jnp.float32)
    for how in ("product", "mean"):
        np.testing.assert_array_equal(saliency.fuse([maps], how), maps)


def _upsampled(line, n):
    """Linear interpolation between the centres of cells, constant beyond the outermost."""
    centers, wanted = (np.arange(len(line)) + 0.5) / len(line), (np.arange(n) + 0.5) / n
    return np.interp(wanted, centers, line)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("how", ["product", "mean"])
def test_fuse_at_the_finest_grid_against_numpy(how, order):
    rng = np.random.default_rng(9)
    coarse, fine = rng.uniform(size=(2, 3, 4)), rng.uniform(size=(2, 6, 8))
    found = saliency.fuse([jnp.array((coarse, fine)[i], jnp.float32) for i in order], how)
    up = np.array([[_upsampled(row, 8) for row in m] for m in coarse])
    up = np.array([np.array([_upsampled(column, 6) for column in m.T]).T for m in up])
    expected = up * fine if how == "product" else (up + fine) / 2
    np.testing.assert_allclose(found, _stretched(expected), atol=1e-5)


def test_fuse_three_grids():
    rng = np.random.default_rng(10)
    corner = np.zeros((1, 2, 2))
    corner[0, 0, 1] = 1.0  # the coarse map gates: only the upper right may be salient
    maps = [corner, rng.uniform(0.5, 1, (1, 4, 4)), rng.uniform(0.5, 1, (1, 8, 8))]
    found = np.asarray(saliency.fuse([jnp.array(m, jnp.float32) for m in maps]))[0]
    assert found.shape == (8, 8) and found.min() == 0.0 and found.max() == 1.0
    assert found[:2, 6:].min() > 0.2 and found[6:].max() < 0.01 and found[:, :2].max() < 0.01


def test_fuse_with_a_flat_map_and_with_none_in_common():
    rng = np.random.default_rng(11)
    fine = _stretched(rng.uniform(size=(1, 6, 6)))
    for how in ("product", "mean"):
        found = saliency.fuse([jnp.ones((1, 3, 3)), jnp.array(fine, jnp.float32)], how)
        np.testing.assert_allclose(found, fine, atol=1e-5)
    left = jnp.zeros((1, 4, 4)).at[:, :, 0].set(1.0)
    np.testing.assert_array_equal(saliency.fuse([left, left[:, :, ::-1]]), 1.0)
