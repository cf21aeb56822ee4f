"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018).

The search is exact. The training features stay on the host (an array or a memory map) and pass through
the devices in slices, so that they may be larger than the devices' memory.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

Examples = tuple[np.ndarray, np.ndarray]  # features [n, d], labels [n]
BANK_ROWS = 1 << 18  # 2 GiB of 2048 float32 features, shared by the devices
ROWS_AT_ONCE = 1 << 14  # rows of a memory map that are looked at together on the host


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

    >>> features, labels = np.eye(3, dtype=np.float32), np.array([0, 1, 1])
    >>> knn_scores(features, labels, features[:1], num_classes=2, k=1).tolist()
    [[1.0, 0.0]]
    """
    k = min(k, len(train_features))
    cosine, index = nearest(np.asarray(train_features), np.asarray(test_features), k, chunk=chunk)
    return _votes(cosine, np.asarray(train_labels)[index], num_classes, temperature)


def evaluate(
    train: Examples,
    test: Examples,
    *,
    ks: Sequence[int] = (20,),
    temperature: float = 0.07,
    leave_one_out: bool = False,
    chunk: int = 256,
    mesh: Mesh | None = None,
    bank_rows: int = BANK_ROWS,
) -> dict[str, float]:
    """Top-1 accuracy: 'knn/top1_k<k>' for each of `ks`, and 'knn/top1' for the first of them.

    train, test: (features float [n, d], labels int [n]); the features may be memory maps.
    leave_one_out: `test` is the same examples as `train`, in the same order, and none is its own
    neighbour. A k beyond the number of neighbours is clipped. chunk, mesh, bank_rows: see `nearest`;
    with several processes all call this with the same data. Raises ValueError for features that are
    not finite and for sets that do not fit together.
    """
    _check(train, test, ks, leave_one_out)
    features, labels = train
    num_classes = int(labels.max()) + 1
    k_max = min(max(ks), len(features) - int(leave_one_out))
    cosine, index = nearest(
        features, test[0], k_max, leave_one_out=leave_one_out, chunk=chunk, mesh=mesh, bank_rows=bank_rows
    )
    voters = labels[index]
    result = {}
    for k in ks:
        # Neighbours come nearest first: those of a smaller k are the first columns.
        predicted = _predict(cosine[:, :k], voters[:, :k], num_classes, temperature, chunk)
        result[f"knn/top1_k{k}"] = float(np.mean(np.asarray(predicted) == test[1]))
    return {"knn/top1": result[f"knn/top1_k{ks[0]}"], **result}


def nearest(
    bank: np.ndarray,
    queries: np.ndarray,
    k: int,
    *,
    leave_one_out: bool = False,
    chunk: int = 256,
    mesh: Mesh | None = None,
    bank_rows: int = BANK_ROWS,
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines float32 [m, k] and rows int32 [m, k] of the k nearest rows of the bank, nearest first.

    bank [n, d] and queries [m, d]: float, on the host. Of equal cosines the lower row comes first.
    leave_one_out: query i is row i of the bank, which is not its neighbour; k is at most n, or n - 1.
    The bank passes through the devices of `mesh` (None: one device) in slices of at most `bank_rows`
    rows, each split over the devices; these hold `chunk` rows of the cosines at a time. Every process
    reads only the rows of its own devices. Raises ValueError for a k without as many neighbours.
    """
    most = len(bank) - int(leave_one_out)
    if not 1 <= k <= most or chunk < 1 or bank_rows < 1:
        raise ValueError(
            f"knn: k={k} (with {most} neighbours), chunk={chunk} and bank_rows={bank_rows} must be 1 or "
            "more, and k no more than the neighbours"
        )
    mesh = Mesh(np.array(jax.local_devices()[:1]), ("data",)) if mesh is None else mesh
    chunk = min(chunk, len(queries))
    firsts = range(0, len(queries), chunk)
    update, rows = _update_on(mesh), _slice_rows(len(bank), bank_rows, mesh.size)
    best = [_nothing(chunk, k, mesh)] * len(firsts)
    for start in range(0, len(bank), rows):
        part = _slice(bank, start, rows, mesh)
        for i, first in enumerate(firsts):
            own = first if leave_one_out else -chunk  # no row has a negative number
            where = np.array([start, len(bank), own], np.int32)
            best[i] = update(best[i], part, _rows(queries, first, chunk), where)
        # Calls return before they are done: without a halt all slices would be on their way at once.
        jax.block_until_ready(best)
    cosine, index = (np.concatenate([np.asarray(b[j]) for b in best])[: len(queries)] for j in (0, 1))
    return cosine, index


@cache
def _update_on(mesh: Mesh) -> Callable:
    """Function (best, slice, queries, where) -> best with the neighbours found in the slice.

    where: the slice's first row, the rows of the bank, and the row of the bank that is the first query.
    """
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(mesh.axis_names))

    def update(best, bank, queries, where):
        # A plain jit would gather all cosines for top_k; so only the best of each device travel.
        found = jax.shard_map(
            partial(_of_device, k=best[0].shape[1], axes=mesh.axis_names),
            mesh=mesh, in_specs=(P(mesh.axis_names), P(), P()), out_specs=P(None, mesh.axis_names),
        )(bank, queries, where)  # fmt: skip
        found = jax.lax.with_sharding_constraint(found, whole)
        # In the order of rows, which top_k keeps among equals: earlier slices, then device by device.
        cosine, row = (jnp.concatenate([b, f], 1) for b, f in zip(best, found, strict=True))
        cosine, index = jax.lax.top_k(cosine, best[0].shape[1])
        return cosine, jnp.take_along_axis(row, index, axis=1)

    return jax.jit(update, in_shardings=(whole, split, whole, whole), out_shardings=whole)


def _of_device(bank, queries, where, k, axes):
    """Cosines and rows [c, k] of the best in a device's share of a slice, bank [1, rows, d]."""
    per = bank.shape[1]
    row = where[0] + jax.lax.axis_index(axes) * per + jnp.arange(per)
    own = where[2] + jnp.arange(len(queries))
    # The default precision of a TPU (bfloat16) would reorder close neighbours.
    cosine = jnp.dot(_unit(queries), _unit(bank[0]).T, precision="highest")
    nobody = (row >= where[1])[None] | (row[None] == own[:, None])  # padding and the query itself
    cosine, index = jax.lax.top_k(jnp.where(nobody, -jnp.inf, cosine), min(per, k))
    return cosine, row[index]


def _nothing(chunk: int, k: int, mesh: Mesh) -> tuple[Array, Array]:
    """Cosines and rows [chunk, k] before anything was found, on all devices."""
    start = np.full((chunk, k), -np.inf, np.float32), np.zeros((chunk, k), np.int32)
    everywhere = NamedSharding(mesh, P())
    cosine, row = (jax.make_array_from_callback(s.shape, everywhere, s.__getitem__) for s in start)
    return cosine, row


def _slice_rows(n: int, bank_rows: int, parts: int) -> int:
    """Rows of a slice: at most `bank_rows`, a multiple of `parts`, all slices about equally full."""
    most = max(parts, bank_rows // parts * parts)
    return -(-n // (-(-n // most) * parts)) * parts


def _slice(bank: np.ndarray, start: int, rows: int, mesh: Mesh) -> Array:
    """Rows [start, start + rows) as [devices, rows per device, d], zeros beyond the bank's end."""
    per = rows // mesh.size
    sharding = NamedSharding(mesh, P(mesh.axis_names))

    def of_device(index: tuple[slice, ...]) -> np.ndarray:
        low, high, _ = index[0].indices(mesh.size)
        return _rows(bank, start + low * per, (high - low) * per).reshape(high - low, per, -1)

    return jax.make_array_from_callback((mesh.size, per, bank.shape[1]), sharding, of_device)


def _rows(features: np.ndarray, first: int, count: int) -> np.ndarray:
    """float32 rows [count, d] from `first` on, zeros beyond the end."""
    result = np.zeros((count, features.shape[1]), np.float32)
    found = features[first : first + count]
    result[: len(found)] = found
    return result


@partial(jax.jit, static_argnames=("num_classes", "chunk"))
def _predict(cosine, voters, num_classes, temperature, chunk):
    """Class with most votes of each row, `chunk` rows of votes at a time; of equals the first."""

    def one_row(row):
        return _votes(row[0][None], row[1][None], num_classes, temperature)[0].argmax()

    return jax.lax.map(one_row, (cosine, voters), batch_size=min(chunk, len(cosine)))


@partial(jax.jit, static_argnames="num_classes")
def _votes(cosine, voters, num_classes, temperature):
    """Votes [m, classes] of neighbours [m, k]; softmax: normalised, without overflow."""
    weight = jax.nn.softmax(cosine / temperature, axis=-1)
    rows = jnp.arange(len(cosine))[:, None]
    return jnp.zeros((len(cosine), num_classes), weight.dtype).at[rows, voters].add(weight)


def _unit(x):
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _finite(features: np.ndarray) -> bool:
    steps = range(0, len(features), ROWS_AT_ONCE)
    return all(np.isfinite(features[i : i + ROWS_AT_ONCE]).all() for i in steps)


def _check(train: Examples, test: Examples, ks: Sequence[int], leave_one_out: bool) -> None:
    if not ks or min(ks) < 1:
        raise ValueError(f"knn: ks={tuple(ks)} must name at least one k, each 1 or more")
    for name, (features, labels) in (("train", train), ("test", test)):
        if len(features) != len(labels) or not len(labels):
            raise ValueError(f"knn: {name} has {len(features)} features, {len(labels)} labels")
        if not _finite(features):
            raise ValueError(f"knn: {name} features are not finite; the encoder has diverged")
    if leave_one_out and (len(train[0]) != len(test[0]) or len(train[0]) < 2):
        raise ValueError("knn: leave_one_out wants test to be train, with 2 examples or more")
