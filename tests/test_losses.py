"""Losses and pair weights against numpy, torch, closed forms and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salcl_jax import losses

BOTH = ((0, 1), (1, 0))
SMALL = ((0, 1), (1, 0), (2, 0), (2, 1), (3, 0), (3, 1))
WEIGHTING = {"mode": "geometric", "temperature": 1.0, "floor": 0.05, "normalize": "image"}


def _vectors(b=6, v=4, d=5, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(b, v, d)), rng.normal(size=(b, 2, d))


def _f32(x):
    return jnp.asarray(x, jnp.float32)


def _cosine(prediction, target, pairs):
    q = prediction / np.linalg.norm(prediction, axis=-1, keepdims=True)
    z = target / np.linalg.norm(target, axis=-1, keepdims=True)
    return np.stack([(q[:, i] * z[:, j]).sum(-1) for i, j in pairs], axis=1)


def _weights(score, valid=None, pairs=SMALL, **changes):
    score = _f32(score)
    shape = (score.shape[0], len(pairs))
    valid = jnp.ones(shape, bool) if valid is None else jnp.asarray(valid)
    return np.asarray(losses.pair_weights(score, valid, pairs, **{**WEIGHTING, **changes}))


def test_unit_has_length_one_and_keeps_zero_finite():
    x = _f32(_vectors()[0])
    np.testing.assert_allclose(np.linalg.norm(losses.unit(x), axis=-1), 1.0, rtol=1e-6)
    zero = jnp.zeros((2, 3))
    assert not np.asarray(losses.unit(zero)).any()
    assert np.isfinite(jax.grad(lambda x: losses.unit(x).sum())(zero)).all()


def test_unit_computes_in_float32():
    assert losses.unit(jnp.ones((2, 3), jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("pairs", [BOTH, SMALL])
def test_byol_is_two_minus_two_cosines(pairs):
    q, z = _vectors()
    value = losses.byol(_f32(q), _f32(z), pairs)
    np.testing.assert_allclose(value, 2 - 2 * _cosine(q, z, pairs), atol=1e-5)


def test_byol_extremes_and_scale():
    x = _f32(np.random.default_rng(1).normal(size=(3, 2, 4)))
    same = jnp.stack([x[:, 0], x[:, 0]], axis=1)
    np.testing.assert_allclose(losses.byol(7.0 * same, 0.1 * same, BOTH), 0.0, atol=1e-6)
    np.testing.assert_allclose(losses.byol(same, -same, BOTH), 4.0, atol=1e-6)


def test_byol_sums_both_directions():
    q, z = _vectors(v=2)
    value = losses.byol(_f32(q), _f32(z), BOTH)
    loss = losses.combine(value, jnp.ones_like(value), jnp.ones(2))
    cosine = _cosine(q, z, BOTH)
    np.testing.assert_allclose(loss, np.mean((2 - 2 * cosine[:, 0]) + (2 - 2 * cosine[:, 1])), rtol=1e-5)


def test_simsiam_is_half_of_each_negative_cosine():
    torch = pytest.importorskip("torch")
    p, z = _vectors(v=2)
    value = losses.simsiam(_f32(p), _f32(z), BOTH)
    loss = losses.combine(value, jnp.ones_like(value), jnp.ones(2))
    similarity = torch.nn.CosineSimilarity(dim=1)
    p, z = torch.tensor(p), torch.tensor(z)
    expected = -(similarity(p[:, 0], z[:, 1]).mean() + similarity(p[:, 1], z[:, 0]).mean()) * 0.5
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.1, 0.2, 1.0])
def test_info_nce_is_the_cross_entropy_of_torch(temperature):
    torch = pytest.importorskip("torch")
    q, k = _vectors(b=7)
    value = losses.info_nce(_f32(q), _f32(k), SMALL, temperature)
    for column, (i, j) in enumerate(SMALL):
        query = torch.nn.functional.normalize(torch.tensor(q[:, i]), dim=1)
        key = torch.nn.functional.normalize(torch.tensor(k[:, j]), dim=1)
        entropy = torch.nn.functional.cross_entropy(
            query @ key.T / temperature, torch.arange(7), reduction="none"
        )
        np.testing.assert_allclose(value[:, column], 2 * temperature * entropy, rtol=1e-4, atol=1e-5)


def _info_nce_numpy(q, k, temperature):
    q = q / np.linalg.norm(q, axis=-1, keepdims=True)
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    total = 0.0
    for i, j in BOTH:
        logits = q[:, i] @ k[:, j].T / temperature
        total += 2 * temperature * (np.log(np.exp(logits).sum(1)) - np.diag(logits)).mean()
    return total


NUMPY = {
    "byol": lambda q, z: np.mean(np.sum(2 - 2 * _cosine(q, z, BOTH), axis=1)),
    "simsiam": lambda q, z: np.mean(np.sum(-0.5 * _cosine(q, z, BOTH), axis=1)),
    "info_nce": lambda q, z: _info_nce_numpy(q, z, 0.3),
}


@pytest.mark.parametrize("name", NUMPY)
def test_gradients_match_finite_differences_in_float64(name):
    q, z = _vectors(b=3, v=2, d=4)
    extra = (0.3,) if name == "info_nce" else ()

    def loss(q):
        value = getattr(losses, name)(q, _f32(z), BOTH, *extra)
        return losses.combine(value, jnp.ones_like(value), jnp.ones(2))

    found, step = jax.grad(loss)(_f32(q)), 1e-6
    for index in np.ndindex(q.shape):
        moved = np.zeros_like(q)
        moved[index] = step
        expected = (NUMPY[name](q + moved, z) - NUMPY[name](q - moved, z)) / (2 * step)
        assert found[index] == pytest.approx(expected, abs=2e-5)


SCORES = np.random.default_rng(3).uniform(0.1, 0.9, size=(5, 4))
COMBINED = {
    "product": lambda a, b: a * b,
    "geometric": lambda a, b: np.sqrt(a * b),
    "minimum": np.minimum,
    "none": lambda a, b: np.ones_like(a),
}


@pytest.mark.parametrize("mode", COMBINED)
@pytest.mark.parametrize("normalize", ["image", "batch"])
def test_weights_are_the_combined_scores_with_mean_one(mode, normalize):
    raw = np.stack([COMBINED[mode](SCORES[:, i], SCORES[:, j]) for i, j in SMALL], axis=1)
    mean = raw.mean(axis=1, keepdims=True) if normalize == "image" else raw.mean()
    found = _weights(SCORES, mode=mode, normalize=normalize, floor=0.0)
    np.testing.assert_allclose(found, raw / mean, rtol=1e-5)


def test_temperature_is_an_exponent():
    raw = np.stack([SCORES[:, i] * SCORES[:, j] for i, j in SMALL], axis=1) ** 4
    found = _weights(SCORES, mode="product", temperature=0.25, floor=0.0)
    np.testing.assert_allclose(found, raw / raw.mean(axis=1, keepdims=True), rtol=1e-4)


@pytest.mark.parametrize("normalize", ["image", "batch"])
def test_a_low_temperature_gives_all_weight_to_the_best_pair(normalize):
    score = np.array([[0.5, 0.4, 0.1, 0.1], [0.05, 0.04, 0.01, 0.01]])
    pairs = ((0, 1), (2, 0), (3, 1))
    found = _weights(score, pairs=pairs, mode="product", temperature=0.01, floor=0.0, normalize=normalize)
    expected = [[3, 0, 0], [3, 0, 0]] if normalize == "image" else [[6, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_floor_lifts_the_smallest_scores():
    score = np.array([[0.8, 0.8, 0.0, 0.1]])
    raw = np.array([[0.8, 0.8, 0.3, 0.3, 0.3, 0.3]])  # sqrt(0.8 * 0.1) = 0.283 is lifted as well
    np.testing.assert_allclose(_weights(score, floor=0.3), raw / raw.mean(), rtol=1e-5)


@pytest.mark.parametrize("normalize", ["image", "batch"])
def test_scores_of_zero_give_even_weights(normalize):
    found = _weights(np.zeros((3, 4)), floor=0.0, normalize=normalize)
    np.testing.assert_allclose(found, 1.0)


def test_an_unsalient_image_weighs_nothing_beside_a_salient_one_but_is_even_alone():
    score = np.array([[0.0, 0.0], [0.5, 0.5]])
    found = _weights(score, pairs=BOTH, floor=0.0, normalize="batch")
    np.testing.assert_allclose(found, [[0, 0], [2, 2]])
    found = _weights(score, pairs=BOTH, floor=0.0, normalize="image")
    np.testing.assert_allclose(found, 1.0)


@pytest.mark.parametrize("normalize", ["image", "batch"])
@pytest.mark.parametrize("mode", COMBINED)
def test_invalid_pairs_weigh_zero_and_the_others_keep_mean_one(mode, normalize):
    valid = np.ones((5, 6), bool)
    valid[0, 2:], valid[1, 4:], valid[2] = False, False, False
    found = _weights(SCORES, valid, mode=mode, normalize=normalize)
    assert not found[~valid].any()
    assert (found[valid] > 0).all()
    if normalize == "image":
        np.testing.assert_allclose(found.sum(1), valid.sum(1), rtol=1e-5)
    np.testing.assert_allclose(found.sum(), valid.sum(), rtol=1e-5)


@pytest.mark.parametrize("mode", COMBINED)
def test_no_gradient_goes_through_the_weights(mode):
    value = _f32(np.random.default_rng(0).uniform(size=(5, 6)))

    def loss(score):
        weight = losses.pair_weights(score, jnp.ones((5, 6), bool), SMALL, **{**WEIGHTING, "mode": mode})
        return losses.combine(value, weight, jnp.ones(6))

    assert not np.asarray(jax.grad(loss)(_f32(SCORES))).any()
    assert not np.asarray(jax.grad(loss)(jnp.zeros((5, 4)))).any()  # the root at 0 gives no NaN


def test_combine_is_a_mean_over_images_of_a_sum_over_pairs():
    rng = np.random.default_rng(2)
    value, weight = rng.normal(size=(5, 6)), rng.uniform(0.1, 2, size=(5, 6))
    scale = np.array([1, 1, 0.5, 0.5, 0.5, 0.5])
    expected = sum(value[n, p] * weight[n, p] * scale[p] for n in range(5) for p in range(6)) / 5
    assert losses.combine(_f32(value), _f32(weight), _f32(scale)) == pytest.approx(expected, rel=1e-5)


def test_a_pair_of_weight_zero_passes_no_nan_on():
    value = jnp.array([[1.0, jnp.nan], [2.0, jnp.inf]])
    weight = jnp.array([[1.0, 0.0], [0.5, 0.0]])
    loss, grads = jax.value_and_grad(losses.combine, argnums=(0, 1))(value, weight, jnp.ones(2))
    assert loss == pytest.approx((1.0 + 1.0) / 2)
    np.testing.assert_allclose(grads[0], [[0.5, 0], [0.25, 0]])
    np.testing.assert_allclose(grads[1], [[0.5, 0], [1.0, 0]])


def test_a_nan_score_of_a_dropped_crop_leaves_the_weights_alone():
    score = SCORES.copy()
    score[:, 3] = np.nan
    valid = np.ones((5, 6), bool)
    valid[:, 4:] = False
    np.testing.assert_allclose(_weights(score, valid), _weights(SCORES, valid))
