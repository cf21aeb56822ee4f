"""Heads that learn side by side, against torch and plain numpy loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salcl_jax.evaluators import probe
from salcl_jax.sharding import data_sharded, make_mesh

STEPS, BATCH, CLASSES = 23, 8, 3
RATES = (0.3, 3.0)


def data(n=50, d=6, classes=CLASSES, noise=1.0, seed=0):
    centres = np.random.default_rng(99).normal(size=(classes, d)) * 2
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n).astype(np.int32)
    return (centres[labels] + noise * rng.normal(size=(n, d)) + 0.5).astype(np.float32), labels


def fit(x, y, rates=RATES, level="top", **options):
    draw = probe.from_arrays({level: x}, y, np.arange(len(y)), batch_size=BATCH, seed=1)
    return probe.train(draw, steps=STEPS, num_classes=CLASSES, rates=rates, seed=2, **options), draw


def first_kernel(d=6):
    """Where the training starts: the heads after a step of no length."""
    x, y = data(d=d)
    return fit(x, y, rates=(1e-30,))[0].kernel["top"][0]


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def gradients(weights, x, y):
    """Of the mean cross-entropy, for [d, c] and [c]."""
    residual = (softmax(x @ weights[0] + weights[1][None]) - np.eye(CLASSES)[y]) / len(y)
    return [x.T @ residual, residual.sum(0)]


def loop(draw, change, rate, factor):
    """Heads [d, c] and [c] after STEPS steps of a change (weights, gradients, velocities) -> changes."""
    weights = [np.float64(first_kernel()), np.zeros(CLASSES)]
    velocity = [np.zeros_like(w) for w in weights]
    for step in range(STEPS):
        features, labels = draw(step)
        changes = change(weights, gradients(weights, np.float64(features["top"]), labels), velocity)
        for w, c in zip(weights, changes, strict=True):
            w -= rate * BATCH / 256 * factor(step) * c
    return weights


def assert_head(trained, index, weights, level="top"):
    np.testing.assert_allclose(trained.kernel[level][index], weights[0], rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(trained.bias[level][index], weights[1], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_matches_a_plain_loop(nesterov):
    trained, draw = fit(*data(), weight_decay=0.05, nesterov=nesterov)

    def change(weights, gradient, velocity):
        for i, w in enumerate(weights):
            g = gradient[i] + 0.05 * w
            velocity[i] = 0.9 * velocity[i] + g
            yield g + 0.9 * velocity[i] if nesterov else velocity[i]

    for index, rate in enumerate(RATES):
        weights = loop(draw, change, rate, lambda step: 0.5 * (1 + np.cos(np.pi * step / STEPS)))
        assert_head(trained, index, weights)
        assert np.abs(weights[0] - first_kernel()).max() > 0.05


def test_lars_matches_a_plain_loop():
    """Trust ratio, momentum, learning rate, as BYOL; nothing is left out of either."""
    schedule = probe.steps_at((1, 2), 10)
    options = {"optimizer": "lars", "nesterov": False, "trust": 0.02, "weight_decay": 0.01, "momentum": 0.8}
    trained, draw = fit(*data(), rates=(30.0,), schedule=schedule, **options)

    def change(weights, gradient, velocity):
        for i, w in enumerate(weights):
            g = gradient[i] + 0.01 * w
            zero = np.linalg.norm(w) == 0 or np.linalg.norm(g) == 0
            trust = 1.0 if zero else 0.02 * np.linalg.norm(w) / np.linalg.norm(g)
            velocity[i] = 0.8 * velocity[i] + trust * g
            yield velocity[i]

    weights = loop(draw, change, 30.0, lambda step: 1.0 if step < 10 else 0.1 if step < 20 else 0.01)
    assert_head(trained, 0, weights)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_one_head_is_torch(batch_norm):
    torch = pytest.importorskip("torch")
    x, y = data()
    trained, draw = fit(x, y, rates=(4.0,), weight_decay=1e-3, batch_norm=batch_norm)
    norm = torch.nn.BatchNorm1d(6, affine=False) if batch_norm else torch.nn.Identity()
    head = torch.nn.Linear(6, CLASSES)
    with torch.no_grad():
        head.weight.copy_(torch.tensor(first_kernel().T))
        head.bias.zero_()
    model = torch.nn.Sequential(norm, head)
    rate = 4.0 * BATCH / 256
    optimizer = torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        features, labels = draw(step)
        loss = torch.nn.functional.cross_entropy(
            model(torch.tensor(features["top"])), torch.tensor(labels).long()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    weights = [p.detach().numpy() for p in (head.weight.T, head.bias)]
    assert_head(trained, 0, weights)
    if batch_norm:
        for ours, theirs in zip(trained.moments["top"], (norm.running_mean, norm.running_var), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(x)).numpy()
    np.testing.assert_allclose(probe.logits(trained, {"top": x}, "top")[0], theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{"batch_norm": True}, {"optimizer": "lars", "weight_decay": 1e-3}])
def test_levels_and_rates_in_one_pass_are_each_alone(options):
    (x, y), (other, _) = data(), data(d=4, seed=5)
    levels = {"top": x, "low": other}
    draw = probe.from_arrays(levels, y, np.arange(len(y)), batch_size=BATCH, seed=1)
    together = probe.train(draw, steps=STEPS, num_classes=CLASSES, rates=RATES, seed=2, **options)
    for level, values in levels.items():
        for index, rate in enumerate(RATES):
            alone, _ = fit(values, y, rates=(rate,), level=level, **options)
            assert_head(together, index, (alone.kernel[level][0], alone.bias[level][0]), level)


def test_a_diverging_rate_spoils_no_other():
    x, y = data()
    # With such a rate the weight decay makes weights grow a hundredfold or more a step.
    options = {"weight_decay": 0.1, "batch_norm": True}
    together, _ = fit(x, y, rates=(1e6, *RATES, 1e38), **options)
    assert not np.isfinite(together.kernel["top"][[0, 3]]).all((1, 2)).any()
    alone, _ = fit(x, y, **options)
    for index in (0, 1):
        assert_head(together, index + 1, (alone.kernel["top"][index], alone.bias["top"][index]))
    found = probe.scores(together, [({"top": x}, y)])
    assert np.isnan(found["top1"]["top"]).tolist() == [True, False, False, True]


def test_a_batch_split_over_devices_gives_the_same_heads():
    x, y = data(48)
    split = data_sharded(make_mesh())
    draw = probe.from_arrays({"top": x}, y, np.arange(48), batch_size=BATCH, seed=1)
    options = {"steps": STEPS, "num_classes": CLASSES, "rates": RATES, "batch_norm": True}
    one = probe.train(draw, **options)
    many = probe.train(lambda step: jax.device_put(draw(step), split), **options)
    for ours, theirs in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_cross_entropy_matches_its_definition():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(5, 4)), np.array([0, 3, -1, 2, 2], np.int32)
    log_p = np.log(softmax(logits))
    hard = -np.mean([log_p[i, y] for i, y in enumerate(labels) if y >= 0])
    assert float(probe.cross_entropy(jnp.float32(logits), jnp.array(labels))) == pytest.approx(hard, rel=1e-5)
    soft = rng.uniform(size=(5, 4)) * np.array([[1], [1], [0], [0.2], [1]])
    expected = -np.sum(soft * log_p) / np.sum(soft)
    ours = probe.cross_entropy(jnp.float32(logits), jnp.float32(soft))
    assert float(ours) == pytest.approx(expected, rel=1e-5)
    assert float(probe.cross_entropy(jnp.float32(logits), jnp.zeros((5, 4)))) == 0.0


def test_schedules():
    half = probe.cosine(10)
    np.testing.assert_allclose([half(0), half(5), half(10), half(11)], [1, 0.5, 0, 0], atol=1e-12)
    drops = probe.steps_at((8, 16, 24), steps_per_epoch=3)
    found = [drops(step) for step in (0, 23, 24, 47, 48, 72)]
    np.testing.assert_allclose(found, [1, 1, 0.1, 0.1, 0.01, 0.001])


@pytest.mark.parametrize("optimizer, nesterov", [("sgd", True), ("lars", False)])
def test_lars_has_plain_momentum_and_sgd_nesterovs(optimizer, nesterov):
    """BYOL's LARS, and what the two momenta are is tested above."""
    default, plain, ahead = (
        fit(*data(), optimizer=optimizer, **options)[0].kernel["top"]
        for options in ({}, {"nesterov": False}, {"nesterov": True})
    )
    np.testing.assert_array_equal(default, ahead if nesterov else plain)
    assert np.abs(ahead - plain).max() > 1e-5
