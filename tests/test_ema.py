"""The moving average, the figures of a step, and the random streams."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salcl_jax import ema, metrics, rng, train_step
from salcl_jax.models.network import build
from salcl_jax.types import Rois, TrainState


@pytest.mark.parametrize("base", [0.9, 0.99, 0.996])
def test_rate_at_the_start_the_middle_and_the_end(base):
    rate = {k: float(ema.decay(k, base=base, total_steps=1000)) for k in (0, 500, 1000, 2000)}
    assert rate[0] == pytest.approx(base, abs=1e-7)
    assert rate[500] == pytest.approx(0.5 + base / 2, abs=1e-6)
    assert rate[1000] == rate[2000] == 1.0


def test_rate_follows_the_cosine_for_a_traced_step():
    steps = jnp.arange(0, 101, 7)
    found = jax.vmap(lambda k: ema.decay(k, base=0.97, total_steps=100))(steps)
    expected = [1 - 0.03 * (math.cos(math.pi * k / 100) + 1) / 2 for k in range(0, 101, 7)]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (np.diff(found) > 0).all()


def test_update_keeps_the_rate_of_the_target_and_takes_the_rest_from_online():
    target = {"encoder": {"w": jnp.array([1.0, 2.0])}, "projector": {"w": jnp.array(4.0)}}
    online = {"encoder": {"w": jnp.array([3.0, -2.0])}, "projector": {"w": jnp.array(0.0)}}
    new = ema.update(target, online, jnp.asarray(0.75))
    np.testing.assert_allclose(new["encoder"]["w"], [0.75 * 1 + 0.25 * 3, 0.75 * 2 - 0.25 * 2])
    np.testing.assert_allclose(new["projector"]["w"], 3.0)


def test_update_leaves_the_predictor_out_and_stops_at_rate_one():
    target = {"encoder": {"w": jnp.ones(2)}}
    online = {"predictor": {"w": jnp.zeros(3)}, "encoder": {"w": jnp.zeros(2)}}
    new = ema.update(target, online, jnp.asarray(1.0))
    assert set(new) == {"encoder"}
    np.testing.assert_array_equal(new["encoder"]["w"], target["encoder"]["w"])


def test_many_updates_equal_the_unrolled_sum():
    rates, values = [0.9, 0.95, 0.99, 1.0], [1.0, 2.0, -3.0, 5.0]
    target = {"encoder": jnp.asarray(0.5)}
    for rate, value in zip(rates, values, strict=True):
        target = ema.update(target, {"encoder": jnp.asarray(value)}, jnp.asarray(rate))
    expected = 0.5 * math.prod(rates)
    for n, (rate, value) in enumerate(zip(rates, values, strict=True)):
        expected += (1 - rate) * value * math.prod(rates[n + 1 :])
    assert float(target["encoder"]) == pytest.approx(expected, abs=1e-6)


def test_spread_is_one_for_isotropic_and_zero_for_collapsed_projections():
    random = jax.random.normal(jax.random.key(0), (4000, 64))
    assert float(metrics.spread(random)) == pytest.approx(1.0, abs=0.01)
    assert float(metrics.spread(100.0 * random)) == pytest.approx(1.0, abs=0.01)
    alike = jnp.broadcast_to(random[:1], (256, 64))
    assert float(metrics.spread(alike)) == pytest.approx(0.0, abs=1e-4)


def test_spread_of_a_partial_collapse_shows_it():
    """All directions in k of d dimensions: std sqrt(1/k) in k of them, so sqrt(k / d) in all."""
    random = jax.random.normal(jax.random.key(1), (4000, 16))
    flat = jnp.concatenate([random, jnp.zeros((4000, 48))], axis=1)
    assert float(metrics.spread(flat)) == pytest.approx(math.sqrt(16 / 64), abs=0.01)


def _crops(**changes):
    boxes = jnp.array([[[0, 0, 0.5, 0.5], [0, 0, 1, 1], [0, 0, 0.1, 0.1]]] * 2)
    crops = dict(maps=None, rois=None, boxes=boxes, score=jnp.ones((2, 3)), guided=jnp.array([True, False]))
    return SimpleNamespace(**crops | changes)


def test_figures_of_a_step():
    value = jnp.array([[1.0, 2.0, 3.0, 5.0], [3.0, 4.0, 5.0, 7.0]])
    weight = jnp.array([[1.0, 1.0, 0.5, 1.5]] * 2)
    projection = jax.random.normal(jax.random.key(0), (2, 3, 4))
    found = metrics.of_step(jnp.asarray(9.0), value, weight, projection, _crops())
    assert float(found["loss"]) == 9.0
    assert float(found["loss_pair"]) == pytest.approx((3 + 7) / 2)
    assert float(found["loss_local"]) == pytest.approx((3 + 5 + 5 + 7) / 2)  # per crop, both targets
    assert float(found["guided"]) == 0.5
    assert float(found["window_area"]) == pytest.approx((0.25 + 1) / 2)
    assert float(found["weight_std"]) == pytest.approx(np.std([1, 1, 0.5, 1.5]), rel=1e-5)
    assert not {"saliency_mean", "window_saliency", "rois_valid", "roi_area"} & set(found)


def test_figures_of_maps_and_regions():
    rois = Rois(
        jnp.array([[[0, 0, 0.5, 0.5], [0, 0, 1, 0.5]]] * 2),
        jnp.array([[True, False], [True, True]]), jnp.ones((2, 2)),
    )  # fmt: skip
    crops = _crops(maps=jnp.full((2, 3, 3), 0.25), rois=rois, score=jnp.array([[0.2, 0.4, 0.9]] * 2))
    value = jnp.ones((2, 2))
    found = metrics.of_step(jnp.asarray(1.0), value, value, jnp.ones((2, 2, 4)), crops)
    assert float(found["saliency_mean"]) == pytest.approx(0.25)
    assert float(found["window_saliency"]) == pytest.approx(0.3)
    assert float(found["rois_valid"]) == 1.5
    assert float(found["roi_area"]) == pytest.approx((0.25 + 0.5) / 2)
    assert "loss_local" not in found


def _draws(key):
    return np.asarray(jax.random.normal(key, (4000,)))


def test_the_same_seed_step_and_purpose_give_the_same_stream():
    first = _draws(rng.key_for(3, 17, "crops"))
    np.testing.assert_array_equal(first, _draws(rng.key_for(3, 17, "crops")))
    traced = jax.jit(lambda step: rng.key_for(3, step, "crops"))(jnp.asarray(17))
    np.testing.assert_array_equal(first, _draws(traced))


def test_other_seeds_steps_and_purposes_give_independent_streams():
    cases = [(0, 0, "init"), (0, 0, "crops"), (0, 1, "crops"), (1, 0, "crops"), (1, 1, "crops"),
             (0, 0, "panel"), (0, 0, "held-out crops"), (2, 3, "crops"), (3, 2, "crops")]  # fmt: skip
    draws = np.stack([_draws(rng.key_for(*case)) for case in cases])
    correlation = np.corrcoef(draws) - np.eye(len(cases))
    assert np.abs(correlation).max() < 5 / math.sqrt(4000)


def test_a_step_averages_the_new_parameters_with_the_rate_of_its_own_number(monkeypatch):
    """BYOL's order: optimizer first, then the target with the rate at the steps done before."""
    config = _Fields(
        seed=0, accumulate=1, loss=_Fields(name="byol"), ema=_Fields(base=0.9),
        guidance=_Fields(start=0.0, full=0.0),
        resolved=_Fields(total_steps=4, peak_lr=0.5, final_lr=0.5, warmup_steps=0),
        optim=_Fields(name="sgd", momentum=0.0, weight_decay=0.0, decay_all=True, trust=1.0, clip_norm=0.0),
    )  # fmt: skip

    def pretext(params, state, batch, key, strength):
        loss = jnp.sum(params["encoder"]) + jnp.sum(params["predictor"])  # a gradient of 1 everywhere
        return loss, (SimpleNamespace(batch_stats={}, target_batch_stats={}), {"loss": loss})

    monkeypatch.setattr(train_step, "make_pretext", lambda network, config: pretext)
    optimizer, _ = train_step.make_optimizer(config)
    params, zero = {"encoder": jnp.ones(2), "predictor": jnp.ones(1)}, jnp.zeros((), jnp.int32)
    state = TrainState(zero, zero, params, {"encoder": jnp.ones(2)}, {}, {}, optimizer.init(params))
    network = build(
        name="resnet18", width=8, stem="cifar", projector_hidden=8, projector_out=8, predictor_hidden=8,
        dtype="float32", remat=False, zero_init_residual=False,
    )  # fmt: skip
    step = train_step.make_train_step(network, config)
    expected = 1.0
    for k in range(4):
        state, measured = step(state, {"skipped": jnp.zeros(2, jnp.int32)})
        rate = 1 - 0.1 * (math.cos(math.pi * k / 4) + 1) / 2
        online = 1 - 0.5 * (k + 1)
        expected = rate * expected + (1 - rate) * online
        assert float(measured["ema"]) == pytest.approx(rate, abs=1e-6)
        np.testing.assert_allclose(state.params["encoder"], online, rtol=1e-6)
        np.testing.assert_allclose(state.target_params["encoder"], expected, rtol=1e-5)
        assert set(state.target_params) == {"encoder"}


class _Fields(SimpleNamespace):
    """A configuration of just these fields."""

    def __getitem__(self, name):
        return getattr(self, name)
