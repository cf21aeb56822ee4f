"""Unlikeness to the border against numpy, distance from it against scipy's shortest paths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse.csgraph import dijkstra

from salcl_jax import hlo, sharding
from salcl_jax.ops import border


def features(h, w, d=6, seed=0):
    return np.random.default_rng(seed).normal(size=(2, h, w, d)).astype(np.float32)


def by_numpy(x):
    """[h, w]: unlikeness of each place."""
    h, w = x.shape[:2]
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    edge = [(i, j) for i in range(h) for j in range(w) if i in (0, h - 1) or j in (0, w - 1)]
    found = np.zeros((h, w))
    for i in range(h):
        for j in range(w):
            cosines = sorted((x[i, j] @ x[place] for place in edge if place != (i, j)), reverse=True)
            found[i, j] = 1 - np.mean(cosines[: max(1, len(edge) // 4)])
    return found


def by_scipy(x, clip=0.0):
    """[h, w]: shortest paths of a graph with one node more, outside."""
    h, w = x.shape[:2]
    out, x = by_numpy(x), x / np.linalg.norm(x, axis=-1, keepdims=True)
    places = [(i, j) for i in range(h) for j in range(w)]
    lengths = np.full((h * w + 1, h * w + 1), np.inf)
    for n, a in enumerate(places):
        for m, b in enumerate(places):
            if n != m and max(abs(a[0] - b[0]), abs(a[1] - b[1])) == 1:
                lengths[n, m] = np.linalg.norm(x[a] - x[b])
    free = clip * np.mean(np.min(lengths[:-1], axis=1))
    lengths = np.maximum(lengths - free, 1e-6)  # 0 would be no edge
    for n, a in enumerate(places):
        if a[0] in (0, h - 1) or a[1] in (0, w - 1):
            lengths[n, -1] = lengths[-1, n] = out[a]
    return dijkstra(np.where(np.isinf(lengths), 0, lengths), indices=h * w)[:-1].reshape(h, w)


@pytest.mark.parametrize(("h", "w"), [(2, 2), (3, 7), (6, 5)])
def test_unlikeness_against_numpy(h, w):
    x = features(h, w)
    found = border.unlikeness(jnp.array(x))
    for i in range(2):
        np.testing.assert_allclose(found[i], by_numpy(x[i]), atol=1e-5)


@pytest.mark.parametrize("clip", [0.0, 0.5, 1.2])
@pytest.mark.parametrize(("h", "w"), [(2, 2), (3, 7), (6, 5)])
def test_paths_against_scipy(h, w, clip):
    x = features(h, w)
    found = border.distance(jnp.array(x), clip)
    for i in range(2):
        # A step is short by up to 1e-3, and what it is shortened by as well.
        np.testing.assert_allclose(found[i], by_scipy(x[i], clip), atol=4e-3 if clip else 2e-3)
    np.testing.assert_allclose(border.distance(jnp.array(x[:, ::-1]), clip), found[:, ::-1], atol=1e-5)


def test_clipped_paths_cross_texture_and_not_the_edge_of_an_object():
    x = 0.1 * np.random.default_rng(0).normal(size=(1, 16, 16, 32))
    x[..., 0] += 1
    x[0, 2:5, 9:12, :2] += (-1, 1)  # off the middle

    def share(clip):
        found = np.asarray(border.distance(jnp.array(x, jnp.float32), clip)[0])
        middle = found[7:9, 6:8].mean()
        return middle / found[2:5, 9:12].mean()

    assert share(1.0) < 0.5 * share(0.0)


def test_an_object_stands_out_also_where_the_border_cuts_it():
    x = np.zeros((1, 8, 8, 2), np.float32)
    x[..., 0] = 1
    x[0, 5:, 3:5] = (0, 1)  # reaches the lower border
    found = np.asarray(border.distance(jnp.array(x))[0])
    inside = x[0, ..., 1] > 0
    assert found[inside].min() > 0.7 and found[~inside].max() < 1e-5


def test_background_that_changes_slowly_stays_dark():
    angle = np.linspace(0, np.pi / 2, 9)
    x = np.tile(np.stack([np.cos(angle), np.sin(angle)], -1)[None, None], (1, 9, 1, 1))
    found = np.asarray(border.distance(jnp.array(x, jnp.float32))[0])
    x[0, 3:6, 3:6] *= -1
    jumps = np.asarray(border.distance(jnp.array(x, jnp.float32))[0])
    assert found.max() < 0.5 and jumps[3:6, 3:6].min() > 1.5


@pytest.mark.parametrize("measure", [border.distance, border.unlikeness])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_one_feature_all_over_is_flat_and_has_a_gradient(measure, value):
    x = jnp.full((1, 4, 5, 3), value)
    found = measure(x)
    np.testing.assert_allclose(found, found[0, 0, 0], atol=1e-6)
    assert np.isfinite(jax.grad(lambda x: measure(x).sum())(x)).all()


def test_a_photo_of_one_place_has_a_map():
    assert np.isfinite(border.distance(jnp.ones((2, 1, 1, 3)))).all()


@pytest.mark.parametrize("measure", [border.distance, border.unlikeness])
def test_gradient_against_finite_differences(measure):
    x, rng = features(5, 5, seed=3)[:1].astype(np.float64), np.random.default_rng(4)
    weights = rng.normal(size=(1, 5, 5)).astype(np.float32)

    def total(x):
        return jnp.sum(measure(x) * weights)

    gradient = np.asarray(jax.grad(total)(jnp.array(x, jnp.float32)))
    for _ in range(5):
        way = rng.normal(size=x.shape)
        ahead, behind = (float(total(jnp.array(x + s * 1e-4 * way, jnp.float32))) for s in (1, -1))
        assert (ahead - behind) / 2e-4 == pytest.approx(np.sum(gradient * way), rel=0.05, abs=0.05)


@pytest.mark.parametrize("measure", [border.unlikeness, border.distance])
def test_photos_stay_on_their_devices(measure):
    mesh = sharding.make_mesh()
    here = sharding.data_sharded(mesh)
    photos = jax.ShapeDtypeStruct((2 * mesh.size, 6, 6, 8), jnp.float32, sharding=here)
    assert hlo.collectives(jax.jit(measure, out_shardings=here).lower(photos).compile().as_text()) == []


@pytest.mark.parametrize("k", [1, 3, 8])
def test_mean_of_the_largest_against_a_sort(k):
    x = np.random.default_rng(0).uniform(-1, 1, size=(50, 8)).astype(np.float32)
    x[:10] = np.round(x[:10])  # many as large as the k-th
    x[10] = 0.3
    largest = np.sort(x, axis=-1)[:, -k:]
    np.testing.assert_allclose(border._mean_of_largest(jnp.array(x), k), largest.mean(-1), atol=1e-6)
    gradient = jax.grad(lambda x: border._mean_of_largest(x, k).sum())(jnp.array(x[11:]))
    np.testing.assert_allclose(gradient, (x[11:] >= largest[11:, :1]) / k, atol=1e-6)
