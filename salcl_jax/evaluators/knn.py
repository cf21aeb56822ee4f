"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018)."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Examples = tuple[np.ndarray, np.ndarray]  # features [n, d], labels [n]


def knn_scores(
    train_features: Float[Array | np.ndarray, "n d"],
    train_labels: Int[Array | np.ndarray, "n"],
    test_features: Float[Array | np.ndarray, "m d"],
    *,
    num_classes: int,
    k: int,
    temperature: float = 0.07,
    chunk: int = 256,
) -> Float[Array, "m classes"]:
    """Share of the vote of each class among the k nearest training examples.

    A neighbour votes with exp(cosine / temperature); rows sum to 1. `k` is clipped to n. Memory
    holds `chunk` rows of the m x n cosines at a time. (InstDisc, arXiv 1805.01978.)
    """
    k = min(k, len(train_features))
    cosine, index = _neighbours(train_features, test_features, k, chunk, False)
    return _vote(cosine, jnp.asarray(train_labels)[index], num_classes, temperature)


def evaluate(
    train: Examples,
    test: Examples,
    *,
    ks: Sequence[int] = (20,),
    temperature: float = 0.07,
    leave_one_out: bool = False,
    chunk: int = 256,
) -> dict[str, float]:
    """Top-1 accuracy: 'knn/top1_k<k>' for each of `ks`, and 'knn/top1' for the first of them.

    train, test: (features float [n, d], labels int [n]). leave_one_out: `test` is the same examples
    as `train`, in the same order, and none is its own neighbour. A k beyond the number of
    neighbours is clipped. Raises ValueError for features that are not finite and for sets that do
    not fit together.
    """
    _check(train, test, ks, leave_one_out)
    features, labels = train
    num_classes = int(labels.max()) + 1
    most = len(features) - int(leave_one_out)
    nearest = min(max(ks), most)
    cosine, index = _neighbours(features, test[0], nearest, chunk, leave_one_out)
    voters = jnp.asarray(labels)[index]
    result = {}
    for k in ks:
        # Neighbours come nearest first: those of a smaller k are the first columns.
        scores = _vote(cosine[:, :k], voters[:, :k], num_classes, temperature)
        predicted = np.asarray(scores.argmax(-1))
        result[f"knn/top1_k{k}"] = float(np.mean(predicted == test[1]))
    return {"knn/top1": result[f"knn/top1_k{ks[0]}"], **result}


@partial(jax.jit, static_argnames=("k", "chunk", "skip_self"))
def _neighbours(train, test, k, chunk, skip_self):
    """Cosines and indices [m, k] of the nearest training rows of each test row, nearest first."""
    train, test = _unit(jnp.asarray(train)), _unit(jnp.asarray(test))

    def one_row(row_and_position):
        row, position = row_and_position
        # The default precision of a TPU (bfloat16) would reorder close neighbours.
        cosine = jnp.dot(train, row, precision=jax.lax.Precision.HIGHEST)
        if skip_self:
            cosine = cosine.at[position].set(-jnp.inf)
        return jax.lax.top_k(cosine, k)

    rows = (test, jnp.arange(len(test)))
    return jax.lax.map(one_row, rows, batch_size=min(chunk, len(test)))


@partial(jax.jit, static_argnames="num_classes")
def _vote(cosine, voters, num_classes, temperature):
    """Votes [m, classes] of neighbours [m, k]; softmax: normalised, without overflow."""
    weight = jax.nn.softmax(cosine / temperature, axis=-1)
    rows = jnp.arange(len(cosine))[:, None]
    return jnp.zeros((len(cosine), num_classes), weight.dtype).at[rows, voters].add(weight)


def _unit(x):
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _check(train: Examples, test: Examples, ks: Sequence[int], leave_one_out: bool) -> None:
    if not ks or min(ks) < 1:
        raise ValueError(f"knn: ks={tuple(ks)} must name at least one k, each 1 or more")
    for name, (features, labels) in (("train", train), ("test", test)):
        if len(features) != len(labels) or not len(labels):
            raise ValueError(f"knn: {name} has {len(features)} features, {len(labels)} labels")
        if not np.isfinite(features).all():
            raise ValueError(f"knn: {name} features are not finite; the encoder has diverged")
    if leave_one_out and (len(train[0]) != len(test[0]) or len(train[0]) < 2):
        raise ValueError("knn: leave_one_out wants test to be train, with 2 examples or more")
