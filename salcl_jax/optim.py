"""Learning-rate schedule and optimizers."""

import jax
import optax

from salcl_jax.types import PyTree


def schedule(
    *, peak: float, final: float, warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """Linear warm-up from 0 to `peak` over `warmup_steps`, then a cosine to `final` at `total_steps`.

    >>> rate = schedule(peak=1.0, final=0.0, warmup_steps=10, total_steps=110)
    >>> [round(float(rate(step)), 3) for step in (0, 5, 10, 60, 110)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    decay = optax.cosine_decay_schedule(
        peak, max(1, total_steps - warmup_steps), alpha=final / peak if peak else 0.0
    )
    if warmup_steps == 0:
        return decay
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, warmup_steps), decay], [warmup_steps]
    )


def is_weight(params: PyTree) -> PyTree:
    """True for kernels, False for biases and the scales of norm layers (all that have one axis)."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def make(
    name: str,
    learning_rate: optax.Schedule,
    *,
    momentum: float,
    weight_decay: float,
    decay_all: bool,
    trust: float,
    clip_norm: float,
) -> optax.GradientTransformation:
    """'sgd' (as ORL), 'lars' (as BYOL: the learning rate comes after the momentum) or 'adamw'.

    decay_all: weight decay also on biases and norm scales, as ORL does; BYOL leaves them out, and then
    LARS does not adapt them either. trust: LARS' coefficient. clip_norm: 0 leaves gradients alone.
    """
    mask = None if decay_all else is_weight
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm > 0 else []
    if name == "adamw":
        steps = [
            optax.scale_by_adam(b1=momentum, b2=0.999),
            optax.add_decayed_weights(weight_decay, mask),
        ]
    else:
        adapt = optax.scale_by_trust_ratio(trust_coefficient=trust)
        adapt = optax.masked(adapt, mask) if mask else adapt
        steps = [
            optax.add_decayed_weights(weight_decay, mask),
            *([adapt] if name == "lars" else []),
            optax.trace(decay=momentum),
        ]
    return optax.chain(*clip, *steps, optax.scale_by_learning_rate(learning_rate))
