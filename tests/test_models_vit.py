"""Vision transformer: closed-form counts, position embedding, parity with torch's own layers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salcl_jax.models.vit import VITS, ViT, position_embedding

TINY = {"width": 16, "depth": 4, "heads": 2}


@pytest.mark.parametrize("name, published", [("vit_s16", 21_665_664), ("vit_b16", 85_798_656)])
def test_parameter_count(name, published):
    """timm's count without head, less the learned position embedding that is fixed here."""
    d, depth, heads = VITS[name]
    net = ViT(d, depth, heads)
    x = jnp.zeros((1, 224, 224, 3))
    variables = jax.eval_shape(lambda key: net.init(key, x, views=1, train=True), jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    patch, block = 16 * 16 * 3 * d + d, 12 * d * d + 13 * d
    assert count == patch + d + depth * block + 2 * d
    assert count + 197 * d == published
    assert "batch_stats" not in variables


def test_position_embedding_element_by_element():
    h, w, d = 3, 5, 8
    got = position_embedding(h, w, d)
    assert got.shape == (15, 8) and got.dtype == np.float32
    for row in range(h):
        for column in range(w):
            y, x = (row + 0.5) / h * 14 - 0.5, (column + 0.5) / w * 14 - 0.5
            expected = [f(y * s) for f in (math.sin, math.cos) for s in (1, 0.01)]
            expected += [f(x * s) for f in (math.sin, math.cos) for s in (1, 0.01)]
            np.testing.assert_allclose(got[row * w + column], expected, atol=1e-6)
    np.testing.assert_allclose(position_embedding(14, 14, 8)[3, 4], math.sin(3), atol=1e-6)
    with pytest.raises(ValueError, match="not a multiple of 4"):
        position_embedding(2, 2, 6)


def _random_variables(net: ViT, images: np.ndarray) -> dict:
    """Random values everywhere, so that every parameter shows in the output."""
    rng, x = np.random.default_rng(0), jnp.asarray(images)
    shapes = jax.eval_shape(lambda key: net.init(key, x, views=1, train=False), jax.random.key(0))
    return jax.tree.map(lambda p: jnp.float32(0.3 * rng.normal(size=p.shape)), shapes)


def _torch_layer(torch, p: dict, width: int, heads: int):
    """torch's pre-norm encoder layer with the weights of one block."""
    layer = torch.nn.TransformerEncoderLayer(
        width, heads, 4 * width, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True
    ).eval()

    def t(a):
        return torch.from_numpy(np.array(a))

    attention = p["attention"]
    layer.load_state_dict(
        {
            "self_attn.in_proj_weight": t(attention["qkv"]["kernel"]).T,
            "self_attn.in_proj_bias": t(attention["qkv"]["bias"]),
            "self_attn.out_proj.weight": t(attention["out"]["kernel"]).T,
            "self_attn.out_proj.bias": t(attention["out"]["bias"]),
            "linear1.weight": t(p["dense1"]["kernel"]).T,
            "linear1.bias": t(p["dense1"]["bias"]),
            "linear2.weight": t(p["dense2"]["kernel"]).T,
            "linear2.bias": t(p["dense2"]["bias"]),
            "norm1.weight": t(p["norm1"]["scale"]),
            "norm1.bias": t(p["norm1"]["bias"]),
            "norm2.weight": t(p["norm2"]["scale"]),
            "norm2.bias": t(p["norm2"]["bias"]),
        }
    )
    return layer


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_equals_torch(pool):
    torch = pytest.importorskip("torch")
    h, w, width = 3, 2, TINY["width"]
    images = np.random.default_rng(1).normal(size=(2, 16 * h, 16 * w, 3)).astype(np.float32)
    net = ViT(**TINY, pool=pool)
    variables = _random_variables(net, images)
    got = jax.jit(lambda v, x: net.apply(v, x, views=1, train=True))(variables, images)

    p = jax.tree.map(lambda a: np.array(a), variables["params"])
    kernel = torch.from_numpy(p["patch"]["kernel"]).reshape(16, 16, 3, width).permute(3, 2, 0, 1)
    with torch.no_grad():
        x = torch.from_numpy(images).permute(0, 3, 1, 2)
        x = torch.nn.functional.conv2d(x, kernel, torch.from_numpy(p["patch"]["bias"]), 16)
        x = x.flatten(2).transpose(1, 2) + torch.from_numpy(position_embedding(h, w, width))
        first = torch.from_numpy(p["class_token"]).expand(2, 1, width)
        x = torch.cat([first, x], 1)
        for i in range(1, 5):
            layer = _torch_layer(torch, p[f"block{i}"], width, TINY["heads"])
            normed = layer.norm1(x)
            _, weights = layer.self_attn(normed, normed, normed, average_attn_weights=False)
            x = layer(x)
            if i == 4:
                scale, bias = (torch.from_numpy(p["norm"][k]) for k in ("scale", "bias"))
                x = torch.nn.functional.layer_norm(x, (width,), scale, bias, 1e-6)
            expected = x[:, 1:].reshape(2, h, w, width).numpy()
            np.testing.assert_allclose(got[f"stage{i}"], expected, rtol=1e-4, atol=1e-4)
    expected = weights[:, :, 0, 1:].reshape(2, TINY["heads"], h, w).numpy()
    np.testing.assert_allclose(got["attention"], expected, atol=1e-5)
    assert 0.2 < expected.sum((2, 3)).min() < 1
    pooled = x[:, 0] if pool == "token" else x[:, 1:].mean(1)
    np.testing.assert_allclose(got["pooled"], pooled.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options, size, message",
    [
        (TINY, 40, "40x40 pixels is not a multiple of 16"),
        ({**TINY, "depth": 6}, 32, "depth 6 must be a multiple of 4"),
        ({**TINY, "heads": 3}, 32, "width 16 a multiple of the 3 heads"),
        ({**TINY, "pool": "max"}, 32, "unknown pool 'max'"),
    ],
)
def test_what_does_not_fit_is_refused(options, size, message):
    x = jnp.zeros((1, size, size, 3))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda key: ViT(**options).init(key, x, views=1, train=True), jax.random.key(0)
        )
