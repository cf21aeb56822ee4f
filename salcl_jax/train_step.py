"""The training step: one pure function (state, batch) -> (state, metrics).

Reading order: `make_train_step` is the step; `make_pretext` is the method (crops, then branches and weighted
loss in `make_objective`); `make_update` is what the gradient does.
Randomness comes from (seed, step) alone, and the step is written for one giant device: under `jax.jit` with
a batch sharded over a mesh it computes the same numbers.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from salcl_jax import ema, losses, metrics, optim
from salcl_jax.guidance import Config, Crops, make_crops
from salcl_jax.models.network import Network, forward_online, forward_target
from salcl_jax.ops.augment import normalize
from salcl_jax.rng import key_for
from salcl_jax.types import Batch, Metrics, PyTree, TrainState

Place = Callable[[PyTree], PyTree]


def _as_is(tree: PyTree) -> PyTree:
    return tree


class Forward(NamedTuple):
    """What both branches say about a batch."""

    projection: Float[Array, "b v d"]
    prediction: Float[Array, "b v d"]
    target: Float[Array, "b 2 d"]  # detached
    batch_stats: PyTree
    target_batch_stats: PyTree


def make_optimizer(config: Config) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Optimizer of the configuration, and its learning rate as a function of the optimizer step."""
    r, c = config.resolved, config.optim
    rate = optim.schedule(
        peak=r.peak_lr, final=r.final_lr, warmup_steps=r.warmup_steps, total_steps=r.total_steps
    )
    make = {name: c[name] for name in ("momentum", "weight_decay", "decay_all", "trust", "clip_norm")}
    return optim.make(c.name, rate, **make), rate


def make_init(network: Network, config: Config) -> Callable[[], TrainState]:
    """Function of nothing that gives the untrained state; the target starts as a copy of the online one."""
    optimizer, _ = make_optimizer(config)

    def init() -> TrainState:
        key = key_for(config.seed, 0, "init")
        params, stats = network.init(key, config.crops.size)
        target = jax.tree.map(jnp.copy, {name: params[name] for name in ("encoder", "projector")})
        target_stats = jax.tree.map(jnp.copy, {name: stats[name] for name in ("encoder", "projector")})
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, zero, params, target, stats, target_stats, optimizer.init(params))

    return init


def guidance_strength(step: Array, config: Config) -> Float[Array, ""]:
    """0 before `guidance.start`, 1 from `guidance.full` on, linear between (shares of training)."""
    c = config.guidance
    progress = step.astype(jnp.float32) / config.resolved.total_steps
    ramp = jnp.clip((progress - c.start) / max(c.full - c.start, 1e-6), 0.0, 1.0)
    return jnp.where(progress >= c.full, 1.0, ramp)


def make_pretext(network: Network, config: Config) -> Callable[..., tuple[Array, tuple]]:
    """The method: function (params, state, batch, key, strength) -> loss, (Forward, metrics).

    Differentiable in params. Pairs ask each crop's prediction for the target of the other crop, and each
    small crop's prediction for the targets of both.
    """
    draw_crops, judge = make_crops(network, config), make_objective(network, config)

    def pretext(
        params: PyTree, state: TrainState, batch: Batch, key: PRNGKeyArray, strength: Array
    ) -> tuple[Array, tuple[Forward, Metrics]]:
        crops = draw_crops(key, state._replace(params=params), batch, strength)
        return judge(params, state, crops, strength)

    return pretext


def make_objective(network: Network, config: Config) -> Callable[..., tuple[Array, tuple]]:
    """What crops are asked: function (params, state, Crops, strength) -> loss, (Forward, metrics)."""
    small = range(2, 2 + config.local.count)
    pairs = [(0, 1), (1, 0)] + [(i, j) for i in small for j in (0, 1)]
    scale = jnp.array([1.0, 1.0] + [config.local.weight / max(1, config.local.count)] * 2 * len(small))
    weighting = {name: config.weights[name] for name in ("mode", "temperature", "floor", "normalize")}

    def objective(
        params: PyTree, state: TrainState, crops: Crops, strength: Array
    ) -> tuple[Array, tuple[Forward, Metrics]]:
        out = _forward(network, params, state, crops, own_target=config.loss.name == "simsiam")
        with jax.named_scope("loss"):
            value = _pair_losses(out, pairs, config)
            valid = jnp.ones(value.shape, bool)
            if crops.local_valid is not None:
                valid = valid.at[:, 2:].set(jnp.repeat(crops.local_valid, 2, axis=1))
            score = _relative_score(crops) if config.weights.relative else crops.score
            weight = losses.pair_weights(score, valid, pairs, **weighting)
            even = losses.pair_weights(score, valid, pairs, **{**weighting, "mode": "none"})
            weight = even + strength * (weight - even)
            loss = losses.combine(value, weight, scale)
        return loss, (out, metrics.of_step(loss, value, weight, out.projection, crops))

    return objective


def _relative_score(crops: Crops) -> Float[Array, "b v"]:
    """Saliency inside each window over that of the whole photo: about 1, whatever the map's level."""
    if crops.maps is None:
        return crops.score
    return crops.score / jnp.maximum(jnp.mean(crops.maps, axis=(1, 2)), 1e-6)[:, None]


def _forward(
    network: Network, params: PyTree, state: TrainState, crops: Crops, own_target: bool
) -> Forward:
    """Both branches in train mode; small crops go through the online branch only."""
    pair = normalize(crops.pair)
    with jax.named_scope("online"):
        z, q, _, stats = forward_online(network, params, state.batch_stats, pair)
        if crops.local is not None:
            local = normalize(crops.local)
            z_small, q_small, _, stats = forward_online(network, params, stats, local)
            z, q = jnp.concatenate([z, z_small], axis=1), jnp.concatenate([q, q_small], axis=1)
    with jax.named_scope("target"):
        if own_target:  # SimSiam: the target is the online branch itself, detached
            target, target_stats = z[:, :2], {name: stats[name] for name in state.target_batch_stats}
        else:
            detached = jax.lax.stop_gradient(pair)
            target, target_stats = forward_target(
                network, state.target_params, state.target_batch_stats, detached
            )
    return Forward(z, q, jax.lax.stop_gradient(target), stats, target_stats)


def _pair_losses(out: Forward, pairs: losses.Pairs, config: Config) -> Float[Array, "b p"]:
    if config.loss.name == "infonce":
        return losses.info_nce(out.prediction, out.target, pairs, config.loss.temperature)
    of_pairs = losses.simsiam if config.loss.name == "simsiam" else losses.byol
    return of_pairs(out.prediction, out.target, pairs)


def make_train_step(
    network: Network, config: Config
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """One optimizer step over `accumulate` micro-batches; EMA and schedules advance once.

    A step whose loss or gradient is not finite changes nothing but `failed`, and no later step changes
    anything either: the caller finds the last good state in its hands. `gather` and `scatter` put parameters
    in place for the passes and gradients for the update, see `sharding.jit_step`.
    """
    update = make_update(config)
    pretext = make_pretext(network, config)
    grad = jax.value_and_grad(pretext, has_aux=True)

    def micro_step(state: TrainState, batch: Batch, index: Array, scatter: Place) -> tuple:
        key = jax.random.fold_in(key_for(config.seed, state.step, "crops"), index)
        strength = guidance_strength(state.step, config)
        (_, (out, measured)), grads = grad(state.params, state, batch, key, strength)
        state = state._replace(batch_stats=out.batch_stats, target_batch_stats=out.target_batch_stats)
        return state, scatter(grads), {**measured, "guidance": strength}

    def accumulate(state: TrainState, batch: Batch, scatter: Place) -> tuple[TrainState, PyTree, Metrics]:
        if config.accumulate == 1:
            return micro_step(state, batch, jnp.zeros((), jnp.int32), scatter)
        batches = jax.tree.map(lambda x: _split(x, config.accumulate), batch)
        index = jnp.arange(config.accumulate)

        def body(state: TrainState, xs: tuple) -> tuple:
            state, grads, measured = micro_step(state, *xs, scatter)
            return state, (grads, measured)

        state, stacked = jax.lax.scan(body, state, (batches, index))
        return state, *jax.tree.map(lambda x: jnp.mean(x, axis=0), stacked)

    def train_step(
        state: TrainState, batch: Batch, gather: Place = _as_is, scatter: Place = _as_is
    ) -> tuple[TrainState, Metrics]:
        nets = state._replace(params=gather(state.params), target_params=gather(state.target_params))
        new, grads, measured = accumulate(nets, batch, scatter)
        new, figures = update(state, new, grads, measured["loss"])
        return new, {**measured, **figures, "skipped": jnp.sum(batch["skipped"])}

    return train_step


def make_update(config: Config) -> Callable[..., tuple[TrainState, Metrics]]:
    """Function (state, new, grads, loss) -> (state, metrics): optimizer, target network and counters advance.

    `new` is the state with the batch statistics of the passes.
    """
    optimizer, rate = make_optimizer(config)

    def update(
        state: TrainState, new: TrainState, grads: PyTree, loss: Float[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            rate_ema = ema.decay(state.step, base=config.ema.base, total_steps=config.resolved.total_steps)
            rate_ema = rate_ema * (config.loss.name != "simsiam")  # SimSiam: the target is the online branch
            target = ema.update(state.target_params, params, rate_ema)
        new = new._replace(
            step=state.step + 1, params=params, target_params=target, opt_state=opt_state
        )
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(params))
        figures = {"grad_norm": norm, "learning_rate": jnp.asarray(rate(state.step)), "ema": rate_ema,
                   "finite": finite.astype(jnp.float32)}  # fmt: skip
        return _keep_if_good(state, new, finite), figures

    return update


def _split(x: Array, parts: int) -> Array:
    """[b, ...] -> [parts, b / parts, ...] by strides, so that every device keeps its share of each part."""
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)


def _keep_if_good(old: TrainState, new: TrainState, finite: Array) -> TrainState:
    failed = jnp.where((old.failed == 0) & ~finite, old.step + 1, old.failed)
    kept = jax.tree.map(lambda n, o: jnp.where(failed == 0, n, o), new, old)
    return kept._replace(failed=failed)


def make_eval_step(network: Network, config: Config) -> Callable[[TrainState, Batch], Metrics]:
    """Loss and collapse statistics on held-out images, with full guidance and fixed draws; trains nothing."""
    pretext = make_pretext(network, config)

    def eval_step(state: TrainState, batch: Batch) -> Metrics:
        key = key_for(config.seed, 0, "held-out crops")
        _, (_, measured) = pretext(state.params, state, batch, key, jnp.ones(()))
        return measured

    return eval_step
