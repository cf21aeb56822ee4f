"""The training step: against itself on other devices and after a stop, and against arithmetic by hand."""

import dataclasses
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salcl_jax import config as lib
from salcl_jax import frozen, sharding, train_step
from salcl_jax.guidance import Crops, make_crops
from salcl_jax.models.network import build, forward_target
from salcl_jax.models.norm import ViewBatchNorm
from salcl_jax.models.vit import ViT
from salcl_jax.ops.augment import normalize
from salcl_jax.ops.boxes import center_size, mean_inside
from salcl_jax.rng import key_for
from salcl_jax.types import TrainState
from salcl_jax.validation import validate

SIDE, BATCH, TOTAL = 48, 8, 40
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
BARE = {
    **dict.fromkeys(("saliency.source", "roi.source", "weights.mode"), "none"),
    "pairs.mix.cover": 0.0,
    **{f"augment.view{v}.{n}": 0.0 for v in (1, 2) for n in ("jitter_prob", "blur_prob", "solarize_prob")},
}
PAIR_ONLY = {name: BARE[name] for name in BARE if name.startswith("augment")}
NO_WARMUP = {"guidance.start": 0.0, "guidance.full": 0.0}


class Stub(nn.Module):
    """Two strided convolutions in place of a ResNet: compiles in a third of the time."""

    @nn.compact
    def __call__(self, x, *, views, train):
        outputs = {}
        for stage, width in ((3, 8), (4, 12)):
            x = nn.Conv(width, (4, 4), (4, 4), name=f"conv{stage}")(x)
            x = nn.relu(ViewBatchNorm(name=f"norm{stage}")(x, views, train))
            outputs[f"stage{stage}"] = x
        return outputs | {"pooled": x.mean((1, 2))}


def tiny(encoder=None, **fields):
    """A finished configuration, fields by dotted name, and its network with a small encoder."""
    c = lib.base()
    c.total_epochs, c.total_steps, c.batch_size = 0, TOTAL, BATCH
    c.data.canvas, c.data.train = SIDE, lib.source("scenes")
    heads = dict.fromkeys(("projector_hidden", "projector_out", "predictor_hidden"), 16)
    c.model.update({"name": "resnet18", "stem": "stride16", "dtype": "float32", **heads})
    c.crops.size, c.saliency.size, c.local.size = 32, SIDE, 16
    c.optim.lr, c.optim.warmup = 1.6, 0.05
    for name, value in fields.items():
        *above, last = name.split(".")
        section = c
        for part in above:
            section = section[part]
        section[last] = value
    validate(c)
    c = lib.finish(c, devices=1, images=80)
    return c, dataclasses.replace(build(**c.model), encoder=encoder or Stub())


def photos(seed=0, n=BATCH, with_boxes=False):
    """Noise with a bright box each, so that maps differ; every third photo is not annotated."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 120, (n, SIDE, SIDE, 3), np.uint8)
    boxes = np.zeros((n, 3, 4), np.float32)
    for i in range(n):
        y, x = rng.integers(0, 28, 2)
        image[i, y : y + 20, x : x + 14] += rng.integers(60, 130, 3, np.uint8)
        boxes[i, 1] = np.array([y, x, y + 20, x + 14]) / SIDE if i % 3 else 0.0
    aspect = rng.uniform(0.7, 1.5, n).astype(np.float32)
    batch = {"image": image, "aspect": aspect, "skipped": np.arange(n, dtype=np.int32) % 2}
    return batch | ({"boxes": boxes} if with_boxes else {})


def compile_step(made, devices=1):
    """(step, state) on the first `devices` devices, sharded as in training."""
    config, network = made
    mesh = sharding.make_mesh(jax.devices()[:devices])
    whole, split = sharding.replicated(mesh), sharding.data_sharded(mesh)
    state = jax.jit(train_step.make_init(network, config), compiler_options=FAST)()
    state = jax.device_put(state, whole)
    jitted = jax.jit(
        train_step.make_train_step(network, config),
        in_shardings=(whole, split), out_shardings=(whole, whole), compiler_options=FAST,
    )  # fmt: skip
    compiled = jitted.lower(state, sharding.to_device(photos(), mesh)).compile()

    def step(state, batch):
        return compiled(jax.device_put(state, whole), sharding.to_device(batch, mesh))

    step.compiled = compiled
    return step, state


def follow(step, state, seeds):
    """States and figures of the steps on the batches of `seeds`."""
    found = []
    for seed in seeds:
        state, measured = step(state, photos(seed))
        found.append((state, jax.device_get(measured)))
    return found


def assert_close(a, b, atol=1e-5, rtol=1e-4):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=rtol), a, b)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def differ(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return any(np.any(np.asarray(x) != np.asarray(y)) for x, y in pairs)


GUIDED = {
    "pairs.mix.cover": 0.7, "local.count": 2, "local.invalid": "drop", "weights.normalize": "image",
    "guidance.start": 0.1, "guidance.full": 0.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def guided():
    """Everything on: step on 8 devices, untrained state, and a run of four steps past the warm-up."""
    step, state = compile_step(tiny(**GUIDED), devices=8)
    late = state._replace(step=jnp.int32(20))
    return step, state, follow(step, late, (1, 2, 3, 4))


@pytest.fixture(scope="module")
def plain():
    """Plain BYOL with the stub on one device: configuration, network, step, state."""
    made = tiny(**BARE)
    return *made, *compile_step(made)


def test_one_device_equals_eight(guided):
    _, _, eight = guided
    step, state = compile_step(tiny(**GUIDED), devices=1)
    one = follow(step, state._replace(step=jnp.int32(20)), (1, 2, 3, 4))
    assert eight[0][1]["guided"] > 0 and eight[0][1]["weight_std"] > 0.01
    for (state1, figures1), (state8, figures8) in zip(one, eight, strict=True):
        assert_close(figures1, figures8)
        for name in ("params", "target_params", "batch_stats", "target_batch_stats"):
            assert_close(jax.device_get(getattr(state1, name)), jax.device_get(getattr(state8, name)))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), *jax.device_get((state.params, state1.params)))
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_devices_exchange_sums_only(guided):
    """Per-image work stays on its device; a step needs no more than all-reduces."""
    step, _, _ = guided
    found = re.findall(r" (all-[a-z]+|reduce-scatter|collective-[a-z]+)[a-z-]*\(", step.compiled.as_text())
    assert set(found) == {"all-reduce"}


def test_resumed_equals_uninterrupted_bit_for_bit(guided):
    step, _, run = guided
    stored = jax.tree.map(lambda x: np.array(x), run[0][0])
    again = follow(step, stored, (2, 3, 4))
    assert_same(again[-1][0], run[-1][0])
    assert_same(again[-1][1], run[-1][1])


def test_key_comes_from_seed_and_step_alone(plain):
    _, _, step, state = plain
    (first, figures), (second, same) = step(state, photos()), step(state, photos())
    assert_same(first, second)
    assert_same(figures, same)
    _, later = step(state._replace(step=jnp.int32(1)), photos())
    assert later["window_area"] != figures["window_area"]
    config, network = tiny(**BARE, seed=1)
    other, _ = compile_step((config, network))
    assert other(state, photos())[1]["window_area"] != figures["window_area"]


def test_warm_up_holds_guidance_back(guided):
    step, state, run = guided
    config, _ = tiny(**GUIDED)
    for number, strength in ((0, 0.0), (4, 0.0), (8, 0.5), (12, 1.0), (40, 1.0)):
        found = train_step.guidance_strength(jnp.int32(number), config)
        np.testing.assert_allclose(found, strength, atol=1e-6)
    _, first = step(state, photos(1))
    assert first["guidance"] == 0 and first["guided"] == 0 and first["weight_std"] == 0
    assert train_step.guidance_strength(jnp.int32(0), tiny(**NO_WARMUP)[0]) == 1
    assert run[0][1]["guidance"] == 1
    assert first["window_area"] != run[0][1]["window_area"]


# By hand: one view at a time, numpy for everything after the gradient.


def crops_of(config, network, state, batch, index=0):
    key = jax.random.fold_in(key_for(config.seed, int(state.step), "crops"), index)
    strength = train_step.guidance_strength(state.step, config)
    draw = jax.jit(make_crops(network, config), compiler_options=FAST)
    return draw(key, state, jax.tree.map(jnp.asarray, batch), strength)


def cosine_loss(p, z):
    cosine = jnp.sum(p * z, 1) / (jnp.linalg.norm(p, axis=1) * jnp.linalg.norm(z, axis=1))
    return 2 - 2 * cosine


def branch(network, params, stats, x, predict):
    """Output of one view, and the statistics after it."""
    stages, encoder = network.encode(params, stats, x[:, None], train=True)
    z, projector = network.project(params, stats, stages["pooled"], train=True)
    stats = {**stats, "encoder": encoder, "projector": projector}
    if predict:
        z, stats["predictor"] = network.predict(params, stats, z, train=True)
    return z[:, 0], stats


def byol_by_hand(network):
    """Compiled function (params, state, pair) -> (loss, (online, target statistics)), gradient."""

    def loss(params, state, pair):
        x = normalize(pair)
        q1, stats = branch(network, params, state.batch_stats, x[:, 0], True)
        q2, stats = branch(network, params, stats, x[:, 1], True)
        z1, other = branch(network, state.target_params, state.target_batch_stats, x[:, 0], False)
        z2, other = branch(network, state.target_params, other, x[:, 1], False)
        return jnp.mean(cosine_loss(q1, z2) + cosine_loss(q2, z1)), (stats, other)

    return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST)


def rate_by_hand(step):
    peak, warmup = 1.6 * BATCH / 256, 2
    if step < warmup:
        return peak * step / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (TOTAL - warmup))) / 2


def sgd_by_hand(config, step, params, momentum, grads):
    def leaf(p, m, g):
        return 0.9 * m + (g + config.optim.weight_decay * p)

    momentum = jax.tree.map(leaf, params, momentum, grads)
    rate = rate_by_hand(step)
    return jax.tree.map(lambda p, m: p - rate * m, params, momentum), momentum


def ema_by_hand(step, target, params):
    tau = 1 - (1 - 0.99) * (math.cos(math.pi * step / TOTAL) + 1) / 2
    return {n: jax.tree.map(lambda t, p: tau * t + (1 - tau) * p, target[n], params[n]) for n in target}


def run_by_hand(made, state, start, steps, parts=1):
    """TrainState after `steps` steps of plain BYOL, each over `parts` strided micro-batches."""
    config, network = made
    grad = byol_by_hand(network)
    state, momentum = jax.device_get(state), jax.tree.map(np.zeros_like, state.params)
    for step in range(start, start + steps):
        grads, losses = [], []
        for part in range(parts):
            micro = {k: v[part::parts] for k, v in photos(step).items()}
            at = state._replace(step=jnp.int32(step))
            pair = crops_of(config, network, at, micro, part).pair
            (loss, stats), g = jax.device_get(grad(state.params, state, pair))
            state = state._replace(batch_stats=stats[0], target_batch_stats=stats[1])
            grads.append(g)
            losses.append(loss)
        mean = jax.tree.map(lambda *g: sum(g) / parts, *grads)
        params, momentum = sgd_by_hand(config, step, state.params, momentum, mean)
        target = ema_by_hand(step, state.target_params, params)
        state = state._replace(params=params, target_params=target, step=np.int32(step + 1))
    return state, np.mean(losses)


def assert_by_hand(made, step, state, parts=1):
    start, steps = 1, 2  # at step 0 the learning rate is 0
    begun = state._replace(step=jnp.int32(start))
    # the schedule counts on its own: bring it to the same step
    begun = begun._replace(opt_state=jax.tree.map(
        lambda x: jnp.int32(start) if x.dtype == jnp.int32 else x, begun.opt_state))  # fmt: skip
    found = follow(step, begun, range(start, start + steps))
    wanted, loss = run_by_hand(made, state, start, steps, parts)
    state = jax.device_get(found[-1][0])
    np.testing.assert_allclose(found[-1][1]["loss"], loss, rtol=1e-4)
    for name in ("params", "target_params", "batch_stats", "target_batch_stats"):
        assert_close(getattr(state, name), getattr(wanted, name), atol=2e-5)
    assert state.step == start + steps and state.failed == 0
    assert differ(state.batch_stats["encoder"], state.target_batch_stats["encoder"])
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, jax.device_get(begun.params))
    assert max(jax.tree.leaves(moved)) > 1e-3
    return found


def test_plain_byol_by_hand(plain):
    config, network, step, state = plain
    found = assert_by_hand((config, network), step, state)
    np.testing.assert_allclose(found[-1][1]["learning_rate"], rate_by_hand(2), rtol=1e-5)
    assert found[-1][1]["skipped"] == 4


def test_accumulated_gradients_by_hand():
    made = tiny(**BARE, accumulate=2)
    step, state = compile_step(made)
    assert_by_hand(made, step, state, parts=2)


def fixed_pretext(monkeypatch, made, crops):
    """The pretext loss of given crops instead of drawn ones."""
    config, network = made
    monkeypatch.setattr(train_step, "make_crops", lambda *_: lambda *_: crops)
    return train_step.make_pretext(network, config)


def test_the_loss_does_not_know_which_view_is_first(plain, monkeypatch):
    config, network, _, state = plain
    state = state._replace(  # a target that is not the online branch
        target_params=jax.tree.map(lambda p: 0.7 * p + 0.05, state.target_params)
    )
    crops = crops_of(config, network, state, photos())
    swapped = crops._replace(pair=crops.pair[:, ::-1], boxes=crops.boxes[:, ::-1])
    assert np.abs(crops.pair[:, 0] - crops.pair[:, 1]).max() > 0.1
    for name in ("byol", "simsiam"):
        made = tiny(**BARE, **{"loss.name": name})[0], network
        results = []
        for given in (crops, swapped):
            pretext = fixed_pretext(monkeypatch, made, given)
            gradient = jax.jit(jax.value_and_grad(pretext, has_aux=True), compiler_options=FAST)
            (loss, _), grads = gradient(state.params, state, {}, jax.random.key(0), jnp.ones(()))
            results.append((loss, grads))
        assert_close(*results)


# Failing, targets, losses.


def test_a_step_that_is_not_finite_changes_nothing_and_is_remembered(plain):
    _, _, step, state = plain
    state, _ = step(state, photos(1))
    broken = jax.tree.map(lambda x: x, state.params)
    kernel = broken["projector"]["dense1"]["kernel"]
    broken["projector"]["dense1"]["kernel"] = kernel.at[0, 0].set(jnp.nan)
    before = state._replace(params=broken)
    after, measured = step(before, photos(2))
    assert measured["finite"] == 0 and after.failed == 2
    assert_same(after._replace(failed=before.failed), before)
    healed, measured = step(after._replace(params=state.params), photos(3))
    assert measured["finite"] == 1 and healed.failed == 2
    assert_same(healed, state._replace(failed=healed.failed))


def test_the_target_is_not_trained(plain):
    config, network, _, state = plain
    pretext = train_step.make_pretext(network, config)
    batch = jax.tree.map(jnp.asarray, photos())

    @jax.jit
    def gradient(target):
        def loss(target):
            at = state._replace(target_params=target)
            return pretext(state.params, at, batch, jax.random.key(0), jnp.ones(()))[0]

        return jax.value_and_grad(loss)(target)

    loss, grads = gradient(state.target_params)
    assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(grads))
    worse, _ = gradient(jax.tree.map(lambda p: -p, state.target_params))
    assert worse != loss  # the loss does look at it
    momenta = [x.shape for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sorted(momenta) == sorted(x.shape for x in jax.tree.leaves(state.params) if x.ndim)


def test_the_loss_falls_on_a_fixed_batch(plain):
    _, _, step, state = plain
    losses = [float(f["loss"]) for _, f in follow(step, state, [0] * TOTAL)]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    assert 0 < losses[-1] < 4 and np.isfinite(losses).all()


def test_info_nce_falls_on_a_fixed_batch():
    step, state = compile_step(tiny(**BARE, **{"loss.name": "infonce"}))
    losses = [float(f["loss"]) for _, f in follow(step, state, [0] * TOTAL)]
    assert np.isfinite(losses).all() and np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


def test_simsiam_is_its_own_target():
    config, network = made = tiny(**BARE, **{"loss.name": "simsiam"})
    step, state = compile_step(made)

    def loss(params, frozen, pair):
        x, stats, z, q = normalize(pair), state.batch_stats, [], []
        for view in range(2):
            z.append(branch(network, frozen, stats, x[:, view], False)[0])
            q.append(branch(network, params, stats, x[:, view], True)[0])
        return jnp.mean(cosine_loss(q[0], z[1]) + cosine_loss(q[1], z[0])) / 4 - 1

    state = state._replace(step=jnp.int32(1), opt_state=jax.tree.map(
        lambda x: jnp.int32(1) if x.dtype == jnp.int32 else x, state.opt_state))  # fmt: skip
    pair = crops_of(config, network, state, photos()).pair
    value, grads = jax.jit(jax.value_and_grad(loss), compiler_options=FAST)(state.params, state.params, pair)
    new, measured = step(state, photos())
    np.testing.assert_allclose(measured["loss"], value, atol=1e-5)
    zeros = jax.tree.map(np.zeros_like, jax.device_get(state.params))
    wanted, _ = sgd_by_hand(config, 1, jax.device_get(state.params), zeros, jax.device_get(grads))
    assert_close(jax.device_get(new.params), wanted)
    assert_same(new.target_params, {n: new.params[n] for n in new.target_params})
    assert_same(new.target_batch_stats, {n: new.batch_stats[n] for n in new.target_batch_stats})


# Guidance.

FOLLOWED = {
    **PAIR_ONLY, **NO_WARMUP, "saliency.branch": "online", "pairs.mix.cover": 0.0,
    "pairs.mix.roi_jitter": 1.0, "weights.mode": "none",
}  # fmt: skip


def test_gradient_through_the_windows(monkeypatch):
    """Off, the crops are constants; on, the gradient is the slope of the loss with moving windows."""
    config, network = made = tiny(**FOLLOWED)
    state = jax.jit(train_step.make_init(network, config), compiler_options=FAST)()
    batch, key = jax.tree.map(jnp.asarray, photos()), jax.random.key(5)
    coarse = jax.random.randint(key, (BATCH, 8, 8, 3), 0, 255).astype(jnp.float32)
    smooth = jax.image.resize(coarse, batch["image"].shape, "cubic")  # crops of noise have many kinks
    batch["image"] = jnp.clip(smooth, 0, 255).astype(jnp.uint8)

    def gradient_of(pretext):
        def loss(params):
            return pretext(params, state, batch, key, jnp.ones(()))[0]

        return jax.jit(jax.value_and_grad(loss), compiler_options=FAST)

    moving = tiny(**FOLLOWED, **{"crops.gradient": True})[0]
    off = gradient_of(train_step.make_pretext(network, config))
    on = gradient_of(train_step.make_pretext(network, moving))
    draw = jax.jit(make_crops(network, config), compiler_options=FAST)
    crops = draw(key, state, batch, jnp.ones(()))
    assert crops.guided.all()
    with monkeypatch.context() as patch:
        constant = gradient_of(fixed_pretext(patch, made, crops))
    target = forward_target(network, state.target_params, state.target_batch_stats, normalize(crops.pair))
    # The crops of the targets move as well, but by design no gradient follows: hold the targets still.
    monkeypatch.setattr(train_step, "forward_target", lambda *_: target)
    (loss_off, grads_off), (loss_on, grads_on) = off(state.params), on(state.params)
    assert_close((loss_off, grads_off), constant(state.params), atol=1e-4)
    np.testing.assert_allclose(loss_on, loss_off, rtol=1e-5)

    through = jax.tree.map(lambda a, b: a - b, grads_on, grads_off)["encoder"]
    size = np.sqrt(sum(float(jnp.vdot(x, x)) for x in jax.tree.leaves(through)))
    assert np.isfinite(size) and size > 1.0
    direction = jax.tree.map(lambda g: g / size, through)
    inner = sum(float(jnp.vdot(g, d)) for g, d in zip(
        jax.tree.leaves(grads_on["encoder"]), jax.tree.leaves(direction), strict=True))  # fmt: skip

    def at(distance):
        moved = jax.tree.map(lambda p, d: p + distance * d, state.params["encoder"], direction)
        return float(on({**state.params, "encoder": moved})[0])

    slope = (at(2e-5) - at(-2e-5)) / 4e-5  # the loss is steep: regions follow the sharpest cell
    np.testing.assert_allclose(slope, inner, rtol=0.05)
    assert abs(slope - (inner - size)) > 0.5 * size  # the detached gradient misses it


def test_the_oracle_follows_the_annotated_boxes():
    still = {"pairs.jitter_shift": 0.0, "pairs.jitter_area": (1.0, 1.0), "pairs.jitter_ratio": (1.0, 1.0)}
    oracle = {"roi.source": "ground_truth", "roi.count": 2, "local.count": 1, "local.invalid": "drop"}
    config, network = tiny(**FOLLOWED, **still, **oracle)
    state = jax.jit(train_step.make_init(network, config), compiler_options=FAST)()
    batch = photos(with_boxes=True)
    crops = crops_of(config, network, state, batch)
    annotated = np.arange(BATCH) % 3 > 0
    assert crops.guided.tolist() == annotated.tolist()
    assert crops.local_valid[:, 0].tolist() == annotated.tolist()
    truth = batch["boxes"][annotated, 1]
    for view in range(2):
        np.testing.assert_allclose(crops.boxes[annotated, view], truth, atol=1e-6)
    center, size = center_size(crops.boxes[annotated, 2])  # the small crop has its own size
    middle = np.clip((truth[:, :2] + truth[:, 2:]) / 2, size / 2, 1 - size / 2)
    np.testing.assert_allclose(center, middle, atol=1e-6)
    assert np.abs(crops.boxes[~annotated, 0] - crops.boxes[~annotated, 1]).max() > 0.01


WAYS = {"roi_jitter": 0.2, "roi_global": 0.2, "roi_center": 0.15, "map_center": 0.15, "cover": 0.15,
        "contrastive_crop": 0.15}  # fmt: skip
EVERY_WAY = {f"pairs.mix.{way}": share for way, share in WAYS.items()}
CHOICES = {
    **{f"way {w}": {"pairs.mix.cover": 0.0, f"pairs.mix.{w}": 1.0} for w in WAYS},
    **{f"map {s} {b}": {"saliency.source": s, "saliency.branch": b, "saliency.stages": ("stage4",)}
       for s in ("activation", "border", "similarity", "contrast", "gradcam")
       for b in ("target", "online")},
    "map fused, border": {"saliency.source": "border", "saliency.stages": ("stage3", "stage4"),
                          "saliency.clip": 1.0},
    "map fused": {"saliency.source": "activation", "saliency.stages": ("stage3", "stage4"),
                  "saliency.fuse": "mean", "saliency.statistic": "norm"},
    **{f"regions {s}": {"roi.source": s} for s in ("random", "center", "ground_truth")},
    **{f"small {s} {i}": {"local.count": 4, "local.source": s, "local.invalid": i}
       for s in ("roi", "random") for i in ("random", "drop")},
    **{f"weights {m} {n}": {"local.count": 1, "weights.mode": m, "weights.normalize": n}
       for m in ("none", "product", "geometric", "minimum") for n in ("image", "batch")},
}  # fmt: skip
RUN = {
    "gradcam": {
        "saliency.source": "gradcam", "saliency.stages": ("stage4",), "weights.mode": "minimum",
        "pairs.mix.cover": 1.0},
    "similarity, small crops": {
        "pairs.mix.roi_center": 0.5, "saliency.source": "similarity", "saliency.branch": "online",
        "saliency.stages": ("stage4",), "local.count": 4,
        "local.invalid": "drop", "weights.normalize": "image", "loss.name": "infonce"},
    "every way, oracle, fused maps": {
        **EVERY_WAY, "roi.source": "ground_truth", "roi.count": 5, "local.count": 2,
        "saliency.stages": ("stage3", "stage4"), "weights.mode": "product"},
    "random regions, no map": {
        "roi.source": "random", "saliency.source": "none", "weights.mode": "none", "pairs.mix.cover": 0.0,
        "pairs.mix.roi_global": 1.0, "local.count": 1, "loss.name": "simsiam"},
}  # fmt: skip


def held_out(fields, encoder=None):
    """(eval step, abstract state) of a choice; augmentation is left out."""
    config, network = tiny(encoder, **{**PAIR_ONLY, **fields})
    init = train_step.make_init(network, config)
    return train_step.make_eval_step(network, config), init


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_traces(name):
    step, init = held_out(CHOICES[name])
    figures = jax.eval_shape(step, jax.eval_shape(init), photos(with_boxes=True))
    assert figures["loss"].shape == () and figures["loss"].dtype == jnp.float32
    assert ("loss_local" in figures) == ("local.count" in CHOICES[name])


@pytest.mark.parametrize("name", RUN)
def test_choices_run(name):
    step, init = held_out(RUN[name])
    state: TrainState = jax.jit(init, compiler_options=FAST)()
    figures = jax.jit(step, compiler_options=FAST)(state, photos(with_boxes=True))
    assert all(np.isfinite(value) for value in figures.values())
    assert figures["guided"] > 0.3 and 0 < figures["window_area"] < 1


def test_attention_of_a_vit_runs():
    fields = {"saliency.source": "attention", "model.name": "vit_s16", "pairs.mix.cover": 1.0}
    step, init = held_out(fields, ViT(width=16, depth=4, heads=2))
    figures = jax.jit(step, compiler_options=FAST)(jax.jit(init, compiler_options=FAST)(), photos())
    assert all(np.isfinite(value) for value in figures.values()) and figures["guided"] > 0.3


def test_features_are_those_of_the_crop_in_running_statistics():
    config, network = tiny(**BARE, **{"eval.size": SIDE})
    state = jax.jit(train_step.make_init(network, config), compiler_options=FAST)()
    batch, whole = photos(), np.tile(np.array([0, 0, 1, 1], np.float32), (BATCH, 1, 1))
    found = jax.jit(frozen.make_features(network, config), compiler_options=FAST)(
        state, batch["image"], whole
    )["pooled"]
    x = normalize(jnp.asarray(batch["image"], jnp.float32)[:, None] / 255)
    wanted = network.encode(state.params, state.batch_stats, x, train=False)[0]["pooled"]
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_relative_scores_do_not_know_how_high_a_map_is():
    rng = np.random.default_rng(0)
    maps, boxes = rng.uniform(0.1, 0.5, (3, 4, 4)).astype(np.float32), np.tile([0, 0, 0.5, 0.5], (3, 2, 1))
    boxes[:, 1] = [0, 0, 1, 1]  # the whole photo
    for factor in (1.0, 0.1):
        level = jnp.array(factor * maps)
        score = mean_inside(level, jnp.array(boxes, jnp.float32))
        crops = Crops(level, None, None, score, None, None, None, None)
        found = np.asarray(train_step._relative_score(crops))
        np.testing.assert_allclose(found[:, 0], maps[:, :2, :2].mean((1, 2)) / maps.mean((1, 2)), rtol=1e-5)
        np.testing.assert_allclose(found[:, 1], 1, rtol=1e-5)
    flat = Crops(jnp.zeros((3, 4, 4)), None, None, jnp.zeros((3, 2)), None, None, None, None)
    assert np.isfinite(train_step._relative_score(flat)).all()
