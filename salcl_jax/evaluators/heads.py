"""Linear heads that learn side by side, and the BatchNorm before them; evaluators/probe.py drives them."""

import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

BATCH = 256  # learning rates are given for a batch of this size
EPSILON, MOMENTUM = 1e-5, 0.1  # of BatchNorm, as torch has them


class Settings(NamedTuple):
    """What all heads of a training share."""

    optimizer: str  # 'sgd' or 'lars'
    momentum: float
    nesterov: bool
    weight_decay: float
    trust: float
    batch_norm: bool
    loss: Callable  # (logits [b, c], targets) -> scalar


class State(NamedTuple):
    """What a step changes."""

    weights: dict[str, dict[str, Array]]  # {level: kernel [rates, d, classes], bias [rates, classes]}
    optimizer: Any
    moments: dict[str, tuple[Array, Array]]  # {level: running mean [d], variance [d]}, or empty


def start(
    features: Mapping[str, Any], num_classes: int, rates: int, settings: Settings, seed: int
) -> State:
    """State before the first step, for features {level: [b, d]}."""
    weights, moments = {}, {}
    for level, values in features.items():
        # By name: a level starts alike, whichever others are there.
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(level.encode()))
        width = values.shape[-1]
        kernel = jnp.repeat(0.01 * jax.random.normal(key, (1, width, num_classes)), rates, axis=0)
        weights[level] = {"kernel": kernel, "bias": jnp.zeros((rates, num_classes))}
        if settings.batch_norm:
            moments[level] = jnp.zeros(width), jnp.ones(width)
    return State(weights, jax.vmap(_transform(settings).init)(weights), moments)


@partial(jax.jit, static_argnames="settings", donate_argnums=0)
def step(
    state: State,
    features: Mapping[str, Any],
    targets: Any,
    rates: Float[Array, "rates"],
    settings: Settings,
) -> State:
    """State after a batch (features {level: [b, d]}, targets), with one learning rate for each head."""
    x = {level: values.astype(jnp.float32) for level, values in features.items()}
    moments = dict(state.moments)
    for level in moments:
        x[level], moments[level] = _batch_norm(x[level], *state.moments[level])

    def objective(weights):
        # A sum of losses of separate weights: the gradient of each head is its own.
        of_head = jax.vmap(settings.loss, (0, None))
        found = [logits(w["kernel"], w["bias"], x[level]) for level, w in weights.items()]
        return sum(jnp.sum(of_head(head, targets)) for head in found)

    def update(gradient, optimizer, weights, rate):
        change, optimizer = _transform(settings).update(gradient, optimizer, weights)
        return jax.tree.map(lambda w, c: w - rate * c, weights, change), optimizer

    scaled = rates * (len(jax.tree.leaves(x)[0]) / BATCH)
    gradient = jax.grad(objective)(state.weights)
    return State(*jax.vmap(update)(gradient, state.optimizer, state.weights, scaled), moments)


def logits(
    kernel: Float[Array, "rates d classes"], bias: Float[Array, "rates classes"], x: Float[Array, "b d"]
) -> Float[Array, "rates b classes"]:
    """Class scores of every head."""
    product = jnp.einsum("bd,rdc->rbc", x, kernel, precision=jax.lax.Precision.HIGHEST)
    return product + jnp.expand_dims(bias, 1)


def normalised(
    x: Float[Array, "b d"], mean: Float[Array, "d"], variance: Float[Array, "d"]
) -> Float[Array, "b d"]:
    """BatchNorm without scale and offset."""
    return (x - mean[None]) * jax.lax.rsqrt(variance + EPSILON)[None]


def _batch_norm(x, mean, variance):
    """x [b, d] normalised by its own moments, and the running moments [d] after it."""
    n, own_mean, own_variance = len(x), jnp.mean(x, 0), jnp.var(x, 0)
    running = (
        (1 - MOMENTUM) * mean + MOMENTUM * own_mean,
        (1 - MOMENTUM) * variance + MOMENTUM * own_variance * (n / max(n - 1, 1)),
    )
    return normalised(x, own_mean, own_variance), running


def _transform(settings: Settings) -> optax.GradientTransformation:
    """The change of a head before its learning rate, which comes after the momentum."""
    lars = [optax.scale_by_trust_ratio(trust_coefficient=settings.trust)]
    return optax.chain(
        optax.add_decayed_weights(settings.weight_decay),
        *(lars if settings.optimizer == "lars" else []),
        optax.trace(settings.momentum, settings.nesterov),
    )
