"""Each way from regions to windows against its definition; mixtures, warm-up and small crops."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salcl_jax.ops import views
from salcl_jax.ops.crop import random_resized_crop_boxes
from salcl_jax.types import Rois

SHAPE = views.Shape(
    area=(0.08, 1.0),
    ratio=(3 / 4, 4 / 3),
    jitter_shift=0.25,
    jitter_area=(0.5, 2.0),
    jitter_ratio=(0.75, 4 / 3),
    zoom=1.5,
    min_size=0.05,
    cover_share=0.5,
    cover_tries=6,
    beta=0.6,
    threshold=0.3,
)
KEY = jax.random.key(0)
N = 3000  # images per statistic
MIDDLE = (0.4, 0.45, 0.6, 0.7)  # jittered or with small windows about it, it never meets the border


_choose = jax.jit(views.choose)
_ways = {name: jax.jit(way, static_argnums=3) for name, way in views.WAYS.items()}
_draw = jax.jit(random_resized_crop_boxes, static_argnums=(2, 3, 4))
_local_boxes = jax.jit(views.local_boxes, static_argnums=3, static_argnames=("count", "area", "invalid"))


def _rois(boxes, valid=None, score=None):
    boxes = jnp.array(boxes, jnp.float32)
    valid = jnp.ones(boxes.shape[:2], bool) if valid is None else jnp.array(valid)
    score = jnp.ones(boxes.shape[:2]) if score is None else jnp.array(score, jnp.float32)
    return Rois(boxes, valid, score)


def _scene(rois, maps=None):
    maps = None if maps is None else jnp.array(maps, jnp.float32)
    return views.Scene(rois, maps)


def _repeated(value, n):
    return np.broadcast_to(np.asarray(value, np.float32), (n, *np.shape(value)))


def _random(n, seed=5):
    return _draw(jax.random.key(seed), jnp.ones(n), 2, SHAPE.area, SHAPE.ratio)


def _only(box, n):
    """The box as the only valid one of two regions."""
    return _rois(_repeated([box, (0.0, 0.0, 1.0, 1.0)], n), _repeated([1, 0], n) > 0)


def _way(name, random, scene):
    return tuple(np.asarray(v) for v in _ways[name](KEY, random, scene, SHAPE))


def _small(n):
    """Windows of side 0.1 and 0.2, above the smallest allowed."""
    return jnp.array(_repeated([[0.0, 0.0, 0.1, 0.2], [0.3, 0.3, 0.5, 0.4]], n))


def _split(boxes):
    boxes = np.asarray(boxes, np.float64)
    return (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]


def _assert_jittered(windows, box):
    """Centre shift, area factor and ratio factor lie within the bounds and fill them."""
    (center, size), (own_center, own_size) = _split(windows), _split(box)
    shift, factor = (center - own_center) / own_size, size / own_size
    area, ratio = factor[..., 0] * factor[..., 1], factor[..., 1] / factor[..., 0]
    for value, low, high in (
        (shift[..., 0], -0.25, 0.25),
        (shift[..., 1], -0.25, 0.25),
        (np.log(area), np.log(0.5), np.log(2.0)),
        (np.log(ratio), np.log(0.75), np.log(4 / 3)),
    ):
        assert low - 1e-4 < value.min() and value.max() < high + 1e-4
        quarters = np.quantile((value - low) / (high - low), [0.01, 0.25, 0.5, 0.75, 0.99])
        np.testing.assert_allclose(quarters, [0.01, 0.25, 0.5, 0.75, 0.99], atol=0.05)


def test_choose_is_proportional_to_the_score_and_never_invalid():
    boxes = np.arange(4)[:, None] * np.full((1, 4), 0.1)  # the box tells which region it was
    valid = _repeated([1, 1, 0, 1], N) > 0
    rois = _rois(_repeated(boxes, N), valid, _repeated([0.1, 0.3, 9.0, 0.6], N))
    box, ok = _choose(KEY, rois)
    counts = np.bincount(np.round(np.asarray(box)[:, 0] * 10).astype(int), minlength=4)
    assert ok.all() and counts[2] == 0
    np.testing.assert_allclose(counts / N, [0.1, 0.3, 0.0, 0.6], atol=0.03)


def test_choose_without_valid_regions_or_without_score():
    rois = _rois(_repeated([MIDDLE, MIDDLE], 2), [[False, False], [False, True]], np.zeros((2, 2)))
    rois = rois._replace(boxes=rois.boxes.at[1, 1].set(0.25))
    for seed in range(5):
        box, ok = _choose(jax.random.key(seed), rois)
        np.testing.assert_array_equal(ok, [False, True])
        np.testing.assert_array_equal(box[1], 0.25)
        assert np.isfinite(box).all()


def test_roi_jitter_moves_both_windows_within_the_bounds():
    windows, ok = _way("roi_jitter", _random(N), _scene(_only(MIDDLE, N)))
    assert ok.all()
    for view in range(2):
        _assert_jittered(windows[:, view], MIDDLE)
    first, second = (_split(windows[:, view])[0][:, 0] for view in range(2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1


def test_a_pair_jitters_one_and_the_same_region():
    corners = [[0.1, 0.1, 0.3, 0.3], [0.7, 0.7, 0.9, 0.9]]
    scene = _scene(_rois(_repeated(corners, N)))
    for name in ("roi_jitter", "roi_center"):
        center = _split(_way(name, _small(N), scene)[0])[0]
        lower = (center > 0.5).all(axis=-1)
        np.testing.assert_array_equal(lower[:, 0], lower[:, 1])
        assert 0.4 < lower.mean() < 0.6


def test_roi_global_keeps_the_second_random_window():
    random = _random(N)
    windows, ok = _way("roi_global", random, _scene(_only(MIDDLE, N)))
    _assert_jittered(windows[:, 0], MIDDLE)
    np.testing.assert_array_equal(windows[:, 1], random[:, 1])
    assert ok.all()


def test_roi_center_draws_centres_all_over_the_region_and_keeps_sizes():
    windows, ok = _way("roi_center", _small(N), _scene(_only(MIDDLE, N)))
    center, size = _split(windows)
    np.testing.assert_allclose(size, _split(_small(N))[1], atol=1e-6)
    place = (center - MIDDLE[:2]) / (np.array(MIDDLE[2:]) - MIDDLE[:2])
    assert ok.all() and place.min() > -1e-5 and place.max() < 1 + 1e-5
    quarters = np.quantile(place, [0.25, 0.5, 0.75], axis=0)
    np.testing.assert_allclose(quarters, np.tile([[[0.25]], [[0.5]], [[0.75]]], (1, 2, 2)), atol=0.05)
    assert abs(np.corrcoef(place[:, 0, 0], place[:, 1, 0])[0, 1]) < 0.1  # two points, not one


@pytest.mark.parametrize(
    "box, part",
    [
        ((0.4, 0.4, 0.5, 0.6), (0.3, 0.35, 0.6, 0.65)),  # 1.5 x 0.2 around its middle
        ((0.0, 0.7, 0.2, 1.0), (0.0, 0.55, 0.45, 1.0)),  # moved inside
        ((0.1, 0.2, 0.9, 0.9), (0.0, 0.0, 1.0, 1.0)),  # as large as the photo at most
    ],
)
def test_zoom_draws_the_random_windows_in_the_part_around_the_region(box, part):
    draw = np.random.default_rng(0).uniform([0, 0, 0.6, 0.6], [0.4, 0.4, 1, 1], (40, 2, 4))
    random = jnp.array(draw, jnp.float32)
    windows, ok = _way("zoom", random, _scene(_only(box, 40)))
    low, side = np.array(part)[:2], np.array(part)[2:] - np.array(part)[:2]
    expected = np.tile(low, 2) + np.tile(side, 2) * np.asarray(random)
    np.testing.assert_allclose(windows, expected, atol=1e-6)
    assert ok.all()


def test_map_center_follows_the_mass_above_the_mean():
    h, w = 4, 6
    image = np.random.default_rng(0).uniform(size=(h, w))
    image[[0, -1]] = image[:, [0, -1]] = 0  # small windows then never meet the border
    rois = _only(MIDDLE, N)
    windows, ok = _way("map_center", _small(N), _scene(rois, _repeated(image, N)))
    center, size = _split(windows)
    np.testing.assert_allclose(size, _split(_small(N))[1], atol=1e-6)
    mass = np.maximum(image - image.mean(), 0)
    mass /= mass.sum()
    cells = np.floor(center * [h, w]).astype(int)
    for view in range(2):
        counts = np.zeros((h, w))
        np.add.at(counts, (cells[:, view, 0], cells[:, view, 1]), 1)
        np.testing.assert_allclose(counts / N, mass, atol=0.03)
    same = (cells[:, 0] == cells[:, 1]).all(axis=-1).mean()
    assert ok.all() and same == pytest.approx((mass**2).sum(), abs=0.03)  # independent draws
    inside = np.quantile(center * [h, w] - cells, [0.25, 0.5, 0.75])
    np.testing.assert_allclose(inside, [0.25, 0.5, 0.75], atol=0.03)


def _mass_inside(image, box):
    """Integral over a box of a map that is constant in each cell, cell by cell."""
    (h, w), total = image.shape, 0.0
    for i in range(h):
        for j in range(w):
            height = min(box[2], (i + 1) / h) - max(box[0], i / h)
            width = min(box[3], (j + 1) / w) - max(box[1], j / w)
            total += max(height, 0.0) * max(width, 0.0) * image[i, j]
    return total


def test_cover_takes_the_first_place_that_holds_the_share_else_the_best(monkeypatch):
    n, tries, wanted = 40, 5, 0.6
    rng = np.random.default_rng(1)
    maps = rng.uniform(size=(n, 5, 7)) ** 3
    low = rng.uniform(0, 0.6, (n, 1, 2))
    regions = np.concatenate([low, low + rng.uniform(0.2, 0.4, (n, 1, 2))], axis=-1)
    low, size = rng.uniform(0, 0.5, (n, 2, 2)), rng.uniform(0.1, 0.5, (n, 2, 2))
    random = jnp.array(np.concatenate([low, low + size], axis=-1), jnp.float32)
    places = rng.uniform(size=(n, 2, tries, 2)).astype(np.float32)  # of the room that a size leaves
    monkeypatch.setattr(views, "choose", lambda key, rois: (rois.boxes[:, 0], rois.valid[:, 0]))
    monkeypatch.setattr(views.jax.random, "uniform", lambda key, shape: jnp.array(places).reshape(shape))
    shape = SHAPE._replace(cover_tries=tries, cover_share=wanted)
    cover = jax.jit(lambda scene: views.cover(KEY, random, scene, shape))
    found, ok = (np.asarray(v) for v in cover(_scene(_rois(regions), maps)))
    assert ok.all()
    corners = places * (1 - size[:, :, None])
    windows = np.concatenate([corners, corners + size[:, :, None]], axis=-1)
    kinds = set()
    for i in range(n):
        region = regions[i, 0]
        for view in range(2):
            own = windows[i, view]
            common = [[*np.maximum(v[:2], region[:2]), *np.minimum(v[2:], region[2:])] for v in own]
            share = np.array([_mass_inside(maps[i], c) for c in common]) / _mass_inside(maps[i], region)
            index = np.argmax(share >= wanted) if (share >= wanted).any() else share.argmax()
            np.testing.assert_allclose(found[i, view], own[index], atol=1e-6)
            kinds.add("best" if share.max() < wanted else "first" if index == share.argmax() else "not best")
    assert kinds == {"best", "first", "not best"}


def test_cover_of_drawn_windows_mostly_holds_the_share():
    n = 300
    maps = np.random.default_rng(2).uniform(size=(n, 4, 4))
    scene = _scene(_only((0.1, 0.6, 0.4, 0.9), n), maps)
    windows, _ = _way("cover", _random(n), scene)
    np.testing.assert_allclose(_split(windows)[1], _split(_random(n))[1], atol=1e-6)  # no easier crops
    # Plain random windows hold half of a corner region in less than half of the cases.
    region = np.array([0.1, 0.6, 0.4, 0.9])
    holds = {}
    for name, pair in (("cover", windows), ("random", _random(n))):
        share = [
            _mass_inside(maps[i], [*np.maximum(b[:2], region[:2]), *np.minimum(b[2:], region[2:])])
            / _mass_inside(maps[i], region)
            for i in range(n)
            for b in np.asarray(pair[i])
        ]
        holds[name] = np.mean(np.array(share) >= 0.5 - 1e-4)
    assert holds["cover"] > 0.9 and holds["random"] < 0.7


@settings(max_examples=30, deadline=None, database=None)
@given(seed=st.integers(0, 2**31), threshold=st.floats(0.0, 1.0))
def test_thresholded_box_is_the_bounding_box(seed, threshold):
    maps = np.random.default_rng(seed).uniform(size=(2, 5, 8)).astype(np.float32) ** 4
    threshold = float(np.float32(threshold))
    found = views.thresholded_box(jnp.array(maps), threshold)
    for image, box in zip(maps, found, strict=True):
        y, x = np.nonzero(image >= np.float32(threshold) * image.max())
        expected = [y.min() / 5, x.min() / 8, (y.max() + 1) / 5, (x.max() + 1) / 8]
        np.testing.assert_allclose(box, expected, atol=1e-6)


def test_contrastive_crop_draws_centres_from_a_beta_distribution_over_the_box():
    stats = pytest.importorskip("scipy.stats")
    image = np.full((8, 10), 0.05)  # high all over: what counts is above the mean
    image[2:6, 3:5] = 0.5
    image[4, 3:7] = 1.0
    image[1, 2] = 0.2  # below the threshold
    rois = _only(MIDDLE, N)
    windows, ok = _way("contrastive_crop", _small(N), _scene(rois, _repeated(image, N)))
    center, size = _split(windows)
    np.testing.assert_allclose(size, _split(_small(N))[1], atol=1e-6)
    place = (center - [2 / 8, 3 / 10]) / [4 / 8, 4 / 10]
    assert ok.all() and place.min() > -1e-5 and place.max() < 1 + 1e-5
    wanted = [0.1, 0.25, 0.5, 0.75, 0.9]
    quantiles = np.quantile(place, wanted, axis=0)
    expected = stats.beta(0.6, 0.6).ppf(wanted)
    np.testing.assert_allclose(quantiles, np.broadcast_to(expected[:, None, None], (5, 2, 2)), atol=0.05)
    assert abs(np.corrcoef(place[:, 0, 0], place[:, 1, 0])[0, 1]) < 0.1


@settings(max_examples=15, deadline=None, database=None)
@given(seed=st.integers(0, 2**31))
def test_every_way_keeps_its_windows_on_the_canvas(seed):
    rng, n = np.random.default_rng(seed), 8
    low = rng.uniform(0, 0.95, (n, 3, 2))
    boxes = np.concatenate([low, np.minimum(low + rng.uniform(0.02, 1.0, (n, 3, 2)), 1.0)], axis=-1)
    valid, maps = rng.uniform(size=(n, 3)) < 0.5, rng.uniform(size=(n, 4, 5)) ** 4
    scene = _scene(_rois(boxes, valid, rng.uniform(size=(n, 3))), maps)
    for name, (windows, ok) in _all_ways(jax.random.key(seed), _random(n, seed=seed), scene).items():
        np.testing.assert_array_equal(ok, valid.any(axis=1), err_msg=name)
        assert windows.min() >= 0 and windows.max() <= 1, name
        assert _split(windows)[1].min() > 0.1 - 1e-5, name  # min_size; random windows are larger


@jax.jit
def _all_ways(key, random, scene):
    shape = SHAPE._replace(min_size=0.1)
    return {name: way(key, random, scene, shape) for name, way in views.WAYS.items()}


def test_windows_move_with_their_region():
    with jax.enable_x64(True):
        boxes, random, eps = np.array([[[*MIDDLE]]]), np.array(_small(1), np.float64), 1e-6
        weight = np.random.default_rng(3).normal(size=(1, 2, 4))
        for way in (views.roi_jitter, views.roi_center, views.zoom):

            def total(boxes, way=way):
                rois = Rois(boxes, jnp.ones((1, 1), bool), jnp.ones((1, 1)))
                return jnp.sum(way(KEY, jnp.array(random), _scene(rois), SHAPE)[0] * weight)

            total = jax.jit(jax.value_and_grad(total))
            found = np.asarray(total(jnp.array(boxes))[1])[0, 0]
            assert np.abs(found).min() > 1e-3
            for k in range(4):
                up, down = (float(total(jnp.array(boxes + e * np.eye(4)[k]))[0]) for e in (eps, -eps))
                assert found[k] == pytest.approx((up - down) / (2 * eps), abs=1e-6)


def _mixed_scene(n):
    """Every third image has no valid region."""
    has_region = np.arange(n) % 3 > 0
    boxes = _repeated([MIDDLE, (0.1, 0.1, 0.5, 0.5)], n)
    maps = np.random.default_rng(4).uniform(size=(n, 4, 5))
    return _scene(_rois(boxes, np.stack([has_region, has_region], axis=1)), maps), has_region


@partial(jax.jit, static_argnums=0)
def _mixed(mix, random, scene, strength):
    return views.pair_boxes(KEY, random, scene, SHAPE, dict(mix), strength)


def _pair(mix, random, scene, strength):
    found = _mixed(tuple(mix.items()), random, scene, jnp.float32(strength))
    return tuple(np.asarray(v) for v in found)


HALVES = {"roi_jitter": 0.5, "cover": 0.5}
NOTHING = dict.fromkeys(views.WAYS, 0.0)


@pytest.mark.parametrize("mix, strength", [(HALVES, 0.0), (NOTHING, 1.0), ({}, 1.0)])
def test_without_strength_windows_are_the_random_ones(mix, strength):
    scene, _ = _mixed_scene(300)
    random = np.asarray(_random(300))
    boxes, guided = _pair(mix, random, scene, strength)
    np.testing.assert_array_equal(boxes, random)
    assert not guided.any()


@pytest.mark.parametrize("mix", [HALVES, {"roi_center": 1.0}])
def test_with_full_strength_all_images_with_regions_are_guided(mix):
    scene, has_region = _mixed_scene(300)
    random = np.asarray(_random(300))
    boxes, guided = _pair(mix, random, scene, 1.0)
    np.testing.assert_array_equal(guided, has_region)
    np.testing.assert_array_equal(boxes[~has_region], random[~has_region])
    assert (boxes[has_region] != random[has_region]).any(axis=(1, 2)).all()


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_ways_are_mixed_by_their_probabilities(monkeypatch, strength):
    mix = {"roi_jitter": 0.2, "map_center": 0.0, "cover": 0.35, "roi_global": 0.15}
    ok = np.arange(N) % 4 > 0
    for i, name in enumerate(mix):  # each way answers with its own number
        answer = jnp.full((N, 2, 4), i / 10)
        monkeypatch.setitem(views.WAYS, name, lambda *_, answer=answer: (answer, jnp.array(ok)))
    scene, random = _scene(_only(MIDDLE, N)), jnp.full((N, 2, 4), 0.9)
    boxes, guided = _pair(mix, random, scene, strength)
    np.testing.assert_array_equal(guided, boxes[:, 0, 0] < 0.8)
    assert not guided[~ok].any()
    shares = [np.isclose(boxes[ok], i / 10).all(axis=(1, 2)).mean() for i in range(4)]
    np.testing.assert_allclose(shares, strength * np.array([0.2, 0.0, 0.35, 0.15]), atol=0.025)


def _local(scene, *, invalid, strength, count=5):
    fields = {"count": count, "area": (0.05, 0.25), "invalid": invalid, "strength": jnp.float32(strength)}
    return tuple(np.asarray(v) for v in _local_boxes(KEY, scene, jnp.ones(N), SHAPE, **fields))


REGIONS = np.array([[0.15, 0.15, 0.25, 0.3], [0.4, 0.7, 0.6, 0.8]])
VALID = np.array([[True, True], [True, False], [False, False]])[np.arange(N) % 3]
SCENE = _scene(_rois(_repeated(REGIONS, N), VALID))


def test_local_windows_are_random_without_a_scene_and_without_strength():
    boxes, counts = _local(None, invalid="drop", strength=1.0)
    area = _split(boxes)[1].prod(axis=-1)
    assert boxes.shape == (N, 5, 4) and counts.all()
    np.testing.assert_allclose(np.quantile(area, [0, 0.5, 1]), [0.05, 0.15, 0.25], atol=0.01)
    for invalid in ("random", "drop"):
        early, counts = _local(SCENE, invalid=invalid, strength=0.0)
        np.testing.assert_array_equal(early, boxes)
        assert counts.all()


ANY = VALID.any(axis=1)
TURNS = np.where(VALID[:, 1:], [0, 1, 0, 1, 0], 0)  # an image with one region has all its crops there


@pytest.mark.parametrize("invalid", ["random", "drop"])
def test_local_windows_keep_random_sizes_and_stand_in_the_valid_regions_in_turn(invalid):
    boxes, counts = _local(SCENE, invalid=invalid, strength=1.0)
    random, _ = _local(SCENE, invalid=invalid, strength=0.0)
    np.testing.assert_array_equal(counts, ANY[:, None] | (invalid == "random") & np.ones((N, 5), bool))
    np.testing.assert_array_equal(boxes[~ANY], random[~ANY])
    (center, size), (_, wanted) = _split(boxes[ANY]), _split(random[ANY])
    np.testing.assert_allclose(size, wanted, atol=1e-6)
    region = REGIONS[TURNS[ANY]]
    middle, side = (region[..., :2] + region[..., 2:]) / 2, region[..., 2:] - region[..., :2]
    off = np.abs(center - np.clip(middle, size / 2, 1 - size / 2))  # windows are moved inside the canvas
    assert (off <= SHAPE.jitter_shift * side + 1e-5).all() and off.max() > 0.02
    free = ANY & VALID[:, 1]  # second region far enough from the border: shifts of two crops are apart
    shift = _split(boxes[free])[0]
    assert abs(np.corrcoef(shift[:, 1, 0], shift[:, 3, 0])[0, 1]) < 0.1


def test_fewer_local_windows_than_regions_take_the_first():
    boxes, counts = _local(SCENE, invalid="drop", strength=1.0, count=1)
    assert boxes.shape == (N, 1, 4)
    np.testing.assert_array_equal(counts, ANY[:, None])
    five, _ = _local(SCENE, invalid="drop", strength=1.0)
    middle = _split(REGIONS[:1])[0]
    assert np.abs(_split(boxes[ANY])[0] - middle).max() < np.abs(_split(five[VALID[:, 1]])[0] - middle).max()


def test_a_region_that_is_not_valid_is_passed_over():
    valid = np.array([[False, True]])[np.zeros(N, int)]
    boxes, _ = _local(_scene(_rois(_repeated(REGIONS, N), valid)), invalid="drop", strength=1.0)
    center, size = _split(boxes)
    middle = np.clip(_split(REGIONS[1:])[0], size / 2, 1 - size / 2)
    assert np.abs(center - middle).max() < 0.06


def test_warm_up_guides_a_share_of_the_local_windows():
    random, _ = _local(SCENE, invalid="drop", strength=0.0)
    boxes, counts = _local(SCENE, invalid="drop", strength=0.3)
    moved = (boxes != random).any(axis=-1)
    assert not moved[~ANY].any()
    assert moved[ANY].mean() == pytest.approx(0.3, abs=0.03)
    # Where guidance would have used a missing region the window does not count; elsewhere it is random.
    assert counts[ANY].all()
    assert counts[~ANY].mean() == pytest.approx(0.7, abs=0.03)
