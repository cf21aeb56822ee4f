"""Schedule and optimizers against closed forms, numpy and torch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from salcl_jax import optim

SCHEDULE = {"peak": 3.2, "final": 0.1, "warmup_steps": 10, "total_steps": 40}
OPTIONS = {"momentum": 0.9, "weight_decay": 0.05, "decay_all": False, "trust": 0.01, "clip_norm": 0.0}
SHAPES = {
    "conv": {"kernel": (2, 2, 3, 5)},
    "dense": {"kernel": (4, 3), "bias": (3,)},
    "norm": {"scale": (5,)},
}
STEPS = 30


def _rate(k, peak=3.2, final=0.1, warmup=10, total=40):
    if k < warmup:
        return peak * k / warmup
    progress = min(1.0, (k - warmup) / (total - warmup))
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2


def test_schedule_at_the_start_the_end_of_warmup_the_middle_and_the_end():
    rate = optim.schedule(**SCHEDULE)
    assert float(rate(0)) == 0.0
    assert float(rate(5)) == pytest.approx(1.6)
    assert float(rate(10)) == pytest.approx(3.2)
    assert float(rate(25)) == pytest.approx((3.2 + 0.1) / 2)
    assert float(rate(40)) == pytest.approx(0.1)
    assert float(rate(60)) == pytest.approx(0.1)


def test_schedule_follows_the_closed_form_and_has_no_jump():
    rate = optim.schedule(**SCHEDULE)
    found = np.array([float(rate(jnp.asarray(k))) for k in range(41)])
    np.testing.assert_allclose(found, [_rate(k) for k in range(41)], rtol=1e-5, atol=1e-6)
    assert np.abs(np.diff(found)).max() <= 3.2 / 10 + 1e-6
    assert (np.diff(found[:11]) > 0).all() and (np.diff(found[10:]) < 0).all()


@pytest.mark.parametrize(
    "peak, final, warmup, total", [(1, 0, 0, 5), (1, 1, 2, 5), (0, 0, 2, 5), (1, 0, 5, 5)]
)
def test_schedule_at_its_limits(peak, final, warmup, total):
    rate = optim.schedule(peak=float(peak), final=float(final), warmup_steps=warmup, total_steps=total)
    for k in range(total):
        assert float(rate(k)) == pytest.approx(_rate(k, peak, final, warmup, total), abs=1e-6)


def _trees(seed=0):
    """Parameters of mixed sizes, and a gradient per step."""
    rng = np.random.default_rng(seed)
    shapes, tree = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))

    def draw(scale):
        return jax.tree.unflatten(tree, [rng.normal(size=s).astype(np.float32) * scale for s in shapes])

    return draw(0.5), [draw(1.0 + n % 3) for n in range(STEPS)]


def _run(optimizer, params, grads):
    update = jax.jit(optimizer.update)
    state = optimizer.init(params)
    for grad in grads:
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return jax.tree.leaves(params)


def _byol_lars(params, grads, rate, momentum, weight_decay, trust, adapt_all=False):
    """The LARS of BYOL's published code: decay, adaptation, momentum, and only then the learning rate."""
    params = [np.float64(p) for p in jax.tree.leaves(params)]
    buffers = [np.zeros_like(p) for p in params]
    for k, grad in enumerate(grads):
        for n, g in enumerate(jax.tree.leaves(grad)):
            g = np.float64(g)
            if params[n].ndim > 1 or adapt_all:
                g = g + weight_decay * params[n]
                norm_p, norm_g = np.linalg.norm(params[n]), np.linalg.norm(g)
                g = g * (trust * norm_p / norm_g if norm_p > 0 and norm_g > 0 else 1.0)
            buffers[n] = g + momentum * buffers[n]
            params[n] = params[n] - rate(k) * buffers[n]
    return params


def _lars(**changes):
    return optim.make("lars", optim.schedule(**SCHEDULE), **OPTIONS | changes)


@pytest.mark.parametrize("decay_all", [False, True])
def test_lars_is_the_one_of_byol(decay_all):
    params, grads = _trees()
    expected = _byol_lars(params, grads, _rate, 0.9, 0.05, 0.01, adapt_all=decay_all)
    for found, wanted in zip(_run(_lars(decay_all=decay_all), params, grads), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-5)


def test_lars_is_not_the_one_of_optax():
    params, grads = _trees()
    mask = {"weight_decay_mask": optim.is_weight, "trust_ratio_mask": optim.is_weight}
    other = optax.lars(optim.schedule(**SCHEDULE), 0.05, trust_coefficient=0.01, momentum=0.9, **mask)
    kernel, other_kernel = _run(_lars(), params, grads)[0], _run(other, params, grads)[0]
    start = jax.tree.leaves(params)[0]
    difference = np.linalg.norm(kernel - other_kernel) / np.linalg.norm(kernel - start)
    assert difference > 0.01


def test_lars_does_not_divide_by_a_gradient_or_weight_of_zero():
    params, grads = _trees()
    params["dense"]["kernel"] = np.zeros((4, 3), np.float32)
    for grad in grads:
        grad["conv"]["kernel"] = np.zeros((2, 2, 3, 5), np.float32)
    expected = _byol_lars(params, grads, _rate, 0.9, 0.0, 0.01)
    for found, wanted in zip(_run(_lars(weight_decay=0.0), params, grads), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-5)


def _torch(torch, make, params, grads, decay_all, decay):
    """Parameters after torch's optimizer, its learning rate set before every step."""
    leaves = [torch.nn.Parameter(torch.tensor(p, dtype=torch.float64)) for p in jax.tree.leaves(params)]
    groups = [{"params": [p], "weight_decay": decay if decay_all or p.ndim > 1 else 0.0} for p in leaves]
    optimizer = make(groups)
    for k, grad in enumerate(grads):
        for group in optimizer.param_groups:
            group["lr"] = _rate(k) / 10
        for p, g in zip(leaves, jax.tree.leaves(grad), strict=True):
            p.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
    return [p.detach().numpy() for p in leaves]


@pytest.mark.parametrize("decay_all", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_sgd_and_adamw_are_those_of_torch(name, decay_all):
    torch = pytest.importorskip("torch")
    params, grads = _trees()
    makers = {
        "sgd": lambda groups: torch.optim.SGD(groups, lr=1.0, momentum=0.9),
        "adamw": lambda groups: torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.999), eps=1e-8),
    }
    expected = _torch(torch, makers[name], params, grads, decay_all, 0.05)
    rate = optim.schedule(**SCHEDULE | {"peak": 0.32, "final": 0.01})
    found = _run(optim.make(name, rate, **OPTIONS | {"decay_all": decay_all}), params, grads)
    for leaf, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(leaf, wanted, rtol=2e-4, atol=2e-5)


def test_weights_are_kernels_and_nothing_else():
    params, _ = _trees()
    expected = {"dense": {"kernel": True, "bias": False}, "conv": {"kernel": True}, "norm": {"scale": False}}
    assert optim.is_weight(params) == expected


def test_gradients_are_clipped_by_their_global_norm_before_the_decay():
    params, grads = _trees()
    rate = optim.schedule(peak=1.0, final=1.0, warmup_steps=0, total_steps=5)
    clipped = optim.make("sgd", rate, **OPTIONS | {"clip_norm": 0.5, "momentum": 0.0, "decay_all": True})
    norm = math.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads[0])))
    found = _run(clipped, params, grads[:1])
    for leaf, p, g in zip(found, jax.tree.leaves(params), jax.tree.leaves(grads[0]), strict=True):
        np.testing.assert_allclose(leaf, p - (g * 0.5 / norm + 0.05 * p), rtol=1e-5, atol=1e-6)
