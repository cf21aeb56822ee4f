"""Linear probe for small data: logistic regression on frozen features, full batch."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

Examples = tuple[np.ndarray, np.ndarray]  # features [n, d], labels [n]
HELD_OUT = 0.2


def evaluate(
    train: Examples,
    test: Examples,
    *,
    l2s: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1),
    steps: int = 200,
    num_classes: int | None = None,
) -> dict[str, float]:
    """Top-1 accuracy on `test` ('linear/top1') and the penalty chosen for it ('linear/l2').

    train, test: (features float [n, d], labels int [n]). Each feature is standardised by the
    training set's mean and deviation. The penalty is the one of `l2s` with the best accuracy on a
    fixed random fifth of `train` (the largest among equals); the probe is then fitted to all of
    `train`. num_classes: from the training labels where None. Raises ValueError for features that
    are not finite and for labels outside the classes.
    """
    num_classes = int(train[1].max()) + 1 if num_classes is None else num_classes
    _check(train, test, l2s, num_classes)
    mean, scale = standardisation(train[0])
    x, y = (train[0] - mean) / scale, train[1]
    best = max(l2s) if len(x) < 2 else _choose(x, y, l2s, steps, num_classes)
    weights = fit(x, y, best, steps=steps, num_classes=num_classes)
    return {
        "linear/top1": _accuracy(weights, (test[0] - mean) / scale, test[1]),
        "linear/l2": float(best),
    }


def standardisation(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation [d] of features [n, d]; a constant feature gets a deviation of 1."""
    mean, scale = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    constant = scale <= 1e-6 * np.maximum(np.abs(mean), 1e-6)
    return mean.astype(np.float32), np.where(constant, 1.0, scale).astype(np.float32)


def split(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices to fit on and indices held out (a fifth, at least one), the same for the same n."""
    order = np.random.default_rng(0).permutation(n)
    held_out = max(1, round(HELD_OUT * n))
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def fit(
    x: Float[Array | np.ndarray, "n d"],
    y: Int[Array | np.ndarray, "n"]
    | Float[Array | np.ndarray, "n classes"]
    | Bool[Array | np.ndarray, "n classes"],
    l2: float,
    *,
    steps: int,
    num_classes: int,
    tolerance: float = 1e-5,
    loss: str = "softmax",
    weight: Float[Array | np.ndarray, "n classes"]
    | Bool[Array | np.ndarray, "n classes"]
    | None = None,
) -> tuple[Float[Array, "d classes"], Float[Array, " classes"]]:
    """Weights and bias that minimise a mean cross-entropy + l2 / 2 * sum(weights ** 2).

    loss='softmax': one class an example, y int [n]; the mean over the examples.
    loss='sigmoid': every class by itself, y in [0, 1] [n, classes]; the sum over classes of
    sum_n(weight * binary cross-entropy) / sum_n(weight). A weight of 0 (or False) leaves an entry
    out, None is 1 everywhere; a class without any weight gets zeros.

    L-BFGS from zero, until the gradient's norm is below `tolerance` or after `steps` steps. The
    bias carries no penalty. (l2 = 1 / (C n) in the terms of liblinear and scikit-learn, for
    'sigmoid' with a class's own n = sum_n(weight).) Raises ValueError where loss and y do not fit.
    """
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y)
    wanted = {"softmax": x.shape[:1], "sigmoid": (len(x), num_classes)}.get(loss)
    if y.shape != wanted or (loss == "softmax" and weight is not None):
        raise ValueError(
            f"linear: loss={loss!r} ('softmax' or 'sigmoid') does not go with y {y.shape}, "
            f"{num_classes} classes{'' if weight is None else ' and a weight'}"
        )
    if loss == "sigmoid":
        y = y.astype(jnp.float32)
        weight = jnp.ones(y.shape) if weight is None else jnp.asarray(weight, jnp.float32)
    return _fit(x, y, weight, jnp.float32(l2), jnp.float32(tolerance), steps, num_classes, loss)


def logits(
    weights: tuple[Float[Array | np.ndarray, "d classes"], Float[Array | np.ndarray, " classes"]],
    x: Float[Array | np.ndarray, "n d"],
) -> Float[Array, "n classes"]:
    """Class scores of standardised features."""
    kernel, bias = weights
    return jnp.dot(x, kernel, precision=jax.lax.Precision.HIGHEST) + bias[None]


@partial(jax.jit, static_argnames=("steps", "num_classes", "kind"))
def _fit(x, y, weight, l2, tolerance, steps, num_classes, kind):
    def loss(weights):
        scores = logits(weights, x)
        fit_loss = _softmax(scores, y) if kind == "softmax" else _sigmoid(scores, y, weight)
        return fit_loss + 0.5 * l2 * jnp.sum(weights[0] ** 2)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry):
        weights, state, count, _ = carry
        value, grad = value_and_grad(weights, state=state)
        updates, state = solver.update(
            grad, state, weights, value=value, grad=grad, value_fn=loss
        )
        weights = optax.apply_updates(weights, updates)
        # The line search leaves the gradient of the point it accepted in the state.
        norm = optax.tree.norm(optax.tree.get(state, "grad"))
        return weights, state, count + 1, norm

    def unfinished(carry):
        return (carry[2] < steps) & (carry[3] > tolerance)

    start = (jnp.zeros((x.shape[1], num_classes)), jnp.zeros(num_classes))
    carry = (start, solver.init(start), 0, jnp.float32(jnp.inf))
    return jax.lax.while_loop(unfinished, step, carry)[0]


def _softmax(scores, y):
    return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()


def _sigmoid(scores, y, weight):
    total = weight.sum(0)
    each = jnp.sum(weight * optax.sigmoid_binary_cross_entropy(scores, y), axis=0)
    return jnp.sum(each / jnp.where(total > 0, total, 1.0))


def _choose(x, y, l2s: Sequence[float], steps: int, num_classes: int) -> float:
    fit_on, held_out = split(len(x))

    def score(l2: float) -> tuple[float, float]:
        weights = fit(x[fit_on], y[fit_on], l2, steps=steps, num_classes=num_classes)
        return _accuracy(weights, x[held_out], y[held_out]), l2

    return max(map(score, l2s))[1]


def _accuracy(weights, x: np.ndarray, y: np.ndarray) -> float:
    return float(np.mean(np.asarray(logits(weights, x).argmax(-1)) == y))


def _check(train: Examples, test: Examples, l2s: Sequence[float], num_classes: int) -> None:
    if not l2s:
        raise ValueError("linear: l2s is empty; name at least one penalty")
    for name, (features, labels) in (("train", train), ("test", test)):
        if len(features) != len(labels) or not len(labels):
            raise ValueError(f"linear: {name} has {len(features)} features, {len(labels)} labels")
        if not np.isfinite(features).all():
            raise ValueError(f"linear: {name} features are not finite; the encoder has diverged")
    if train[1].min() < 0 or train[1].max() >= num_classes:
        raise ValueError(f"linear: training labels must lie in 0..{num_classes - 1}")
