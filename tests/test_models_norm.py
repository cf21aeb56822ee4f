"""Batch normalisation per view and the MLP heads, against closed forms in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from salcl_jax.models.heads import MLP
from salcl_jax.models.norm import ViewBatchNorm

D = 5


def _variables(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "params": {
            "scale": jnp.asarray(rng.uniform(0.5, 2, D), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=D), jnp.float32),
        },
        "batch_stats": {
            "mean": jnp.asarray(rng.normal(size=D), jnp.float32),
            "var": jnp.asarray(rng.uniform(0.5, 2, D), jnp.float32),
        },
    }


def _images(b: int, v: int, seed: int = 1) -> np.ndarray:
    """Images [b, v, 4, 3, D] whose views differ in mean and spread."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(b, v, 4, 3, D))
    spread, shift = rng.uniform(0.5, 3, (v, 1, 1, D)), rng.normal(size=(v, 1, 1, D)) * 4
    return (x * spread + shift).astype(np.float32)


def _train(norm: ViewBatchNorm, variables: dict, x: np.ndarray, views: int):
    y, new = norm.apply(variables, jnp.asarray(x), views, True, mutable=["batch_stats"])
    return np.asarray(y), jax.tree.map(np.asarray, new["batch_stats"])


@pytest.mark.parametrize("views", [1, 2, 3])
def test_each_view_is_normalised_alone_and_updates_the_running_statistics_in_turn(views):
    x, variables = _images(6, views), _variables()
    y, new = _train(ViewBatchNorm(), variables, x.reshape(6 * views, 4, 3, D), views)

    scale, bias = (np.asarray(variables["params"][k]) for k in ("scale", "bias"))
    mean, var = (np.asarray(variables["batch_stats"][k]) for k in ("mean", "var"))
    y = y.reshape(x.shape)
    for view in range(views):
        one = x[:, view].astype(np.float64)
        m, s = one.mean((0, 1, 2)), one.var((0, 1, 2))
        expected = (one - m) / np.sqrt(s + 1e-5) * scale + bias
        np.testing.assert_allclose(y[:, view], expected, rtol=1e-4, atol=1e-4)
        mean, var = 0.9 * mean + 0.1 * m, 0.9 * var + 0.1 * s
    np.testing.assert_allclose(new["mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new["var"], var, rtol=1e-5)


def test_views_are_not_one_joint_batch():
    x, variables = _images(6, 2).reshape(12, 4, 3, D), _variables()
    apart, apart_stats = _train(ViewBatchNorm(), variables, x, 2)
    joint, joint_stats = _train(ViewBatchNorm(), variables, x, 1)
    assert np.abs(apart - joint).max() > 0.1
    assert np.abs(apart_stats["var"] - joint_stats["var"]).max() > 0.1


def test_evaluation_uses_the_running_statistics_and_ignores_views():
    x, variables = _images(4, 3).reshape(12, 4, 3, D), _variables()
    stats, params = variables["batch_stats"], variables["params"]
    root = np.sqrt(np.asarray(stats["var"], np.float64) + 1e-5)
    expected = (x - np.asarray(stats["mean"])) / root * np.asarray(params["scale"])
    expected = expected + np.asarray(params["bias"])
    for views in (1, 3, 5):  # 5 does not divide 12: no views in evaluation
        y = ViewBatchNorm().apply(variables, jnp.asarray(x), views, False)
        np.testing.assert_allclose(y, expected, atol=2e-5)


def test_gradient_is_the_closed_form():
    x, variables = _images(5, 2), _variables()
    cotangent = np.random.default_rng(3).normal(size=x.shape).astype(np.float32)

    def f(x):
        y, _ = ViewBatchNorm().apply(variables, x, 2, True, mutable=["batch_stats"])
        return jnp.sum(y * cotangent.reshape(10, 4, 3, D))

    got = np.asarray(jax.grad(f)(jnp.asarray(x.reshape(10, 4, 3, D)))).reshape(x.shape)
    axes = (0, 2, 3)
    root = np.sqrt(x.var(axes, keepdims=True, dtype=np.float64) + 1e-5)
    hat = (x - x.mean(axes, keepdims=True, dtype=np.float64)) / root
    inner = cotangent - cotangent.mean(axes, keepdims=True)
    inner = inner - hat * (cotangent * hat).mean(axes, keepdims=True)
    np.testing.assert_allclose(
        got, np.asarray(variables["params"]["scale"]) / root * inner, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1234.567])
def test_constant_input_has_no_negative_variance_and_a_finite_gradient(value):
    variables = _variables()
    x = jnp.full((14, 3, 3, D), value)

    def f(x):
        y, new = ViewBatchNorm().apply(variables, x, 2, True, mutable=["batch_stats"])
        return jnp.sum(y**2), (y, new["batch_stats"]["var"])

    grad, (y, var) = jax.grad(f, has_aux=True)(x)
    assert np.isfinite(grad).all() and np.isfinite(y).all()
    # two updates with a variance of at least zero
    assert (np.asarray(var) >= 0.81 * np.asarray(variables["batch_stats"]["var"]) - 1e-6).all()


def test_a_large_mean_does_not_eat_the_variance_once_the_running_mean_is_there():
    x = (np.random.default_rng(0).normal(size=(512, D)) + 5000).astype(np.float32)
    variables = _variables()
    variables["batch_stats"]["mean"] = jnp.full(D, 5000.0)
    _, new = _train(ViewBatchNorm(momentum=0.0), variables, x, 1)
    np.testing.assert_allclose(new["var"], x.astype(np.float64).var(0), rtol=1e-4)


def test_bfloat16_input_keeps_float32_parameters_and_statistics():
    x = _images(64, 2).reshape(128, 4, 3, D)
    norm = ViewBatchNorm(dtype=jnp.bfloat16)
    variables = norm.init(jax.random.key(0), jnp.asarray(x, jnp.bfloat16), 2, True)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], np.zeros(D))  # init: no update
    x = jnp.asarray(x, jnp.bfloat16)
    y, new = norm.apply(variables, x, 2, True, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype("float32")}
    # far finer than the 3 digits of bfloat16: the sums were float32
    by_view = np.asarray(x, np.float64).reshape(64, 2, 4, 3, D).mean((0, 2, 3))
    np.testing.assert_allclose(
        new["batch_stats"]["mean"], 0.09 * by_view[0] + 0.1 * by_view[1], rtol=1e-4, atol=1e-5
    )


def test_views_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match="7 inputs do not split into 2 views"):
        _train(ViewBatchNorm(), _variables(), np.zeros((7, D), np.float32), 2)


def test_scale_can_start_at_zero():
    norm = ViewBatchNorm(scale_init=nn.initializers.zeros)
    y, _ = norm.init_with_output(jax.random.key(0), jnp.ones((4, D)), 1, False)
    np.testing.assert_array_equal(y, np.zeros((4, D)))


def test_mlp_is_linear_norm_relu_linear():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 6)).astype(np.float32)
    mlp = MLP(hidden=7, out=3)
    variables = mlp.init(jax.random.key(0), jnp.asarray(x), views=2, train=True)
    params = jax.tree.map(lambda p: np.asarray(p + rng.normal(size=p.shape)), variables["params"])
    assert set(params["dense1"]) == {"kernel", "bias"} and set(params["dense2"]) == {"kernel"}

    y, _ = mlp.apply(
        {"params": jax.tree.map(jnp.float32, params), "batch_stats": variables["batch_stats"]},
        jnp.asarray(x),
        views=2,
        train=True,
        mutable=["batch_stats"],
    )
    hidden = (x @ params["dense1"]["kernel"] + params["dense1"]["bias"]).reshape(4, 2, 7)
    hidden = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5)
    hidden = np.maximum(hidden * params["norm"]["scale"] + params["norm"]["bias"], 0)
    expected = hidden.reshape(8, 7) @ params["dense2"]["kernel"]
    np.testing.assert_allclose(y, expected, atol=1e-4)
