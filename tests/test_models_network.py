"""The pure functions around encoder, projector and predictor."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from salcl_jax.models.network import (
    STAGE_NAMES,
    build,
    forward_online,
    forward_target,
    parameter_table,
)
from salcl_jax.models.resnet import BasicBlock, BottleneckBlock, ResNet
from salcl_jax.models.vit import ViT

SIZE = 48
FIELDS = {
    "name": "resnet18",
    "width": 4,
    "stem": "stride16",
    "projector_hidden": 12,
    "projector_out": 6,
    "predictor_hidden": 10,
    "dtype": "float32",
    "remat": False,
    "zero_init_residual": False,
}


def _tiny(kind: str = "resnet", dtype: str = "float32", remat: bool = False):
    """A network of one block a stage."""
    if kind == "resnet":
        encoder = ResNet(
            (1, 1, 1, 1), BasicBlock, 4, "stride16", dtype, remat, zero_init_residual=False
        )
    else:
        encoder = ViT(width=16, depth=4, heads=2, dtype=dtype, remat=remat)
    return dataclasses.replace(build(**{**FIELDS, "dtype": dtype}), encoder=encoder)


def _images(b: int = 4, v: int = 2) -> jax.Array:
    """Normal images; the second view is brighter, so that joint statistics would show."""
    x = np.random.default_rng(0).normal(size=(b, v, SIZE, SIZE, 3))
    return jnp.asarray(x * (1 + np.arange(v)[:, None, None, None]), jnp.float32)


def _close(a, b, atol: float = 1e-5) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=atol), a, b)


@pytest.fixture(scope="module")
def tiny():
    network = _tiny()
    return network, *network.init(jax.random.key(0), SIZE)


def test_init_gives_float32_trees_by_part(tiny):
    network, params, stats = tiny
    assert set(params) == set(stats) == {"encoder", "projector", "predictor"}
    assert {leaf.dtype for leaf in jax.tree.leaves((params, stats))} == {jnp.dtype("float32")}
    assert params["predictor"]["dense1"]["kernel"].shape == (6, 10)
    again, _ = network.init(jax.random.key(1), SIZE)
    kernels = [p["encoder"]["stem"]["conv"]["kernel"] for p in (params, again)]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.01


def test_views_in_one_pass_equal_one_call_a_view(tiny):
    network, params, stats = tiny
    images = _images()
    forward = jax.jit(lambda stats, x: forward_online(network, params, stats, x))
    z, q, pooled, together = forward(stats, images)
    assert z.shape == q.shape == (4, 2, 6) and pooled.shape == (4, 2, 32)
    running = stats
    for view in range(2):
        one_z, one_q, one_pooled, running = forward(running, images[:, view : view + 1])
        _close((z[:, view], q[:, view]), (one_z[:, 0], one_q[:, 0]), atol=1e-4)
        _close(pooled[:, view], one_pooled[:, 0])
    _close(together, running)
    assert jax.tree.structure(together) == jax.tree.structure(stats)


def test_all_views_go_through_one_pass(tiny):
    network, params, stats = tiny
    jaxpr = str(jax.make_jaxpr(lambda x: forward_online(network, params, stats, x))(_images()))
    convolutions = sum("kernel" in layer for layer in _modules(params["encoder"]))
    assert jaxpr.count("conv_general_dilated[") == convolutions == 1 + 4 * 2 + 3


def _modules(tree: dict) -> list[dict]:
    children = [v for v in tree.values() if isinstance(v, dict)]
    return [tree, *(m for child in children for m in _modules(child))]


def test_encode_gives_every_stage_by_view(tiny):
    network, params, stats = tiny
    encode = jax.jit(lambda x: network.encode(params, stats, x, train=False))
    outputs, new = encode(_images(3, 2))
    assert set(outputs) == {"conv1", "stem", *STAGE_NAMES, "pooled"}
    for name, side, width in zip(STAGE_NAMES, (24, 12, 6, 3), (4, 8, 16, 32), strict=True):
        assert outputs[name].shape == (3, 2, side, side, width)
    _close(outputs["pooled"], np.asarray(outputs["stage4"]).mean((2, 3)))
    jax.tree.map(np.testing.assert_array_equal, new, stats["encoder"])


def test_evaluation_changes_no_statistics_and_is_the_same_image_by_image(tiny):
    network, params, stats = tiny
    images = _images()
    forward = jax.jit(lambda x: forward_online(network, params, stats, x, train=False))
    z, q, _, new = forward(images)
    jax.tree.map(np.testing.assert_array_equal, new, stats)
    one = forward(images[1:2, 1:])
    _close((z[1:2, 1:], q[1:2, 1:]), one[:2])


def test_target_needs_no_predictor(tiny):
    network, params, stats = tiny
    images = _images()
    pair = {k: params[k] for k in ("encoder", "projector")}
    pair_stats = {k: stats[k] for k in ("encoder", "projector")}
    z, new = jax.jit(lambda p, s: forward_target(network, p, s, images))(pair, pair_stats)
    assert jax.tree.structure(new) == jax.tree.structure(pair_stats)
    expected, _, _, expected_stats = jax.jit(lambda p, s: forward_online(network, p, s, images))(
        params, stats
    )
    _close(z, expected, atol=1e-4)
    _close(new, {k: expected_stats[k] for k in new})


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_bfloat16_computes_low_and_keeps_high(kind):
    network = _tiny(kind, "bfloat16")
    params, stats = jax.eval_shape(lambda: network.init(jax.random.key(0), SIZE))

    def loss(params, stats):
        z, q, pooled, new = forward_online(network, params, stats, _images())
        outputs, _ = network.encode(params, stats, _images(), train=False)
        return jnp.sum(q**2), (z, q, pooled, new, outputs["stage4"])

    grads, (z, q, pooled, new, stage4) = jax.eval_shape(jax.grad(loss, has_aux=True), params, stats)
    high = jax.tree.leaves((params, stats, grads, z, q, pooled, new))
    assert {leaf.dtype for leaf in high} == {jnp.dtype("float32")}
    assert stage4.dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_remat_changes_no_gradient(kind):
    shapes = jax.eval_shape(lambda: _tiny(kind).init(jax.random.key(0), SIZE))
    rng = np.random.default_rng(0)
    params, stats = jax.tree.map(lambda a: jnp.float32(rng.uniform(0, 0.2, a.shape)), shapes)
    results = []
    for remat in (False, True):
        network = _tiny(kind, remat=remat)
        own = jax.eval_shape(lambda network=network: network.init(jax.random.key(0), SIZE))
        assert jax.tree.structure(own) == jax.tree.structure(shapes)

        def loss(params, network=network):
            outputs, new = network.encode(params, stats, _images(2), train=True)
            return jnp.mean(outputs["stage4"] ** 2), new

        grad = jax.grad(loss, has_aux=True)
        assert ("remat" in str(jax.make_jaxpr(grad)(params))) == remat
        results.append(jax.jit(grad)(params))
    leaves = jax.tree.leaves(results[0][0]["encoder"])
    assert min(np.abs(g).max() for g in leaves) > 0 and max(np.abs(g).max() for g in leaves) > 1e-2
    _close(*results)


def test_statistics_are_global_over_a_sharded_batch(tiny):
    if jax.device_count() < 2:
        pytest.skip("needs two devices: XLA_FLAGS=--xla_force_host_platform_device_count=2")
    network, params, stats = tiny
    images = _images() * jnp.arange(1.0, 5.0)[:, None, None, None, None]  # shards differ
    forward = jax.jit(lambda x: forward_online(network, params, stats, x))
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])
    sharded = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
    _close(forward(images), forward(sharded), atol=1e-4)


def test_build_by_name_and_its_errors():
    network = build(**{**FIELDS, "name": "resnet50", "remat": True})
    assert network.encoder.block is BottleneckBlock and network.encoder.blocks == (3, 4, 6, 3)
    assert network.encoder.remat and network.encoder.width == 4
    assert (network.projector.hidden, network.projector.out) == (12, 6)
    assert (network.predictor.hidden, network.predictor.out) == (10, 6)
    assert build(**{**FIELDS, "name": "vit_s16"}).encoder.width == 384
    for field, value in (("name", "vgg"), ("dtype", "float16"), ("stem", "none")):
        with pytest.raises(ValueError, match=f"unknown {field} '{value}'"):
            build(**{**FIELDS, field: value})


def test_parameter_table_lists_and_adds_up(tiny):
    _, params, _ = tiny
    lines = parameter_table(params).splitlines()
    assert len({len(line) for line in lines}) == 1  # aligned
    rows = {line.rsplit(maxsplit=1)[0].rstrip(): line.split()[-1] for line in lines}
    stem = next(line for line in lines if line.startswith("encoder/stem/conv/kernel"))
    assert stem.split("  ")[-1].strip() == "108" and "(3, 3, 3, 4)" in stem and "float32" in stem
    total = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
    assert rows["total"] == f"{total:,}"
    assert rows["total predictor"] == f"{6 * 10 + 10 + 2 * 10 + 10 * 6:,}"
