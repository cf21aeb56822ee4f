"""Each way from regions to windows against its definition; mixtures, warm-up and small crops."""

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
    min_size=0.05,
    cover_share=0.5,
    cover_tries=6,
    beta=0.6,
    threshold=0.3,
)
KEY = jax.random.key(0)
MIDDLE = (0.4, 0.45, 0.6, 0.7)  # jittered or with small windows about it, it never meets the border


def _rois(boxes, valid=None, score=None):
    boxes = jnp.array(boxes, jnp.float32)
    valid = jnp.ones(boxes.shape[:2], bool) if valid is None else jnp.array(valid)
    score = jnp.ones(boxes.shape[:2]) if score is None else jnp.array(score, jnp.float32)
    return Rois(boxes, valid, score)


def _scene(rois, maps=None):
    return views.Scene(rois, None if maps is None else jnp.array(maps, jnp.float32), jnp.ones(len(rois.boxes)))


def _repeated(value, n):
    return np.broadcast_to(np.asarray(value, np.float32), (n, *np.shape(value)))


def _random(n, area=(0.08, 1.0), seed=5):
    return random_resized_crop_boxes(jax.random.key(seed), jnp.ones(n), 2, area, (3 / 4, 4 / 3))


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
    n = 6000
    boxes = np.arange(4)[:, None] * np.full((1, 4), 0.1)  # the box tells which region it was
    valid = _repeated([1, 1, 0, 1], n) > 0
    rois = _rois(_repeated(boxes, n), valid, _repeated([0.1, 0.3, 9.0, 0.6], n))
    box, ok = views.choose(KEY, rois)
    counts = np.bincount(np.round(np.asarray(box)[:, 0] * 10).astype(int), minlength=4)
    assert ok.all() and counts[2] == 0
    np.testing.assert_allclose(counts / n, [0.1, 0.3, 0.0, 0.6], atol=0.03)


def test_choose_without_valid_regions_or_without_score():
    rois = _rois(_repeated([MIDDLE, MIDDLE], 2), [[False, False], [False, True]], np.zeros((2, 2)))
    rois = rois._replace(boxes=rois.boxes.at[1, 1].set(0.25))
    for seed in range(5):
        box, ok = views.choose(jax.random.key(seed), rois)
        np.testing.assert_array_equal(ok, [False, True])
        np.testing.assert_array_equal(box[1], 0.25)
        assert np.isfinite(box).all()


def test_roi_jitter_moves_both_windows_within_the_bounds():
    n = 3000
    windows, ok = views.roi_jitter(KEY, _random(n), _scene(_rois(_repeated([MIDDLE], n))), SHAPE)
    assert ok.all()
    for view in range(2):
        _assert_jittered(windows[:, view], MIDDLE)
    first, second = (_split(windows[:, view])[0][:, 0] for view in range(2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1


def test_a_pair_jitters_one_and_the_same_region():
    n, corners = 500, [[0.1, 0.1, 0.3, 0.3], [0.7, 0.7, 0.9, 0.9]]
    scene = _scene(_rois(_repeated(corners, n)))
    for way in (views.roi_jitter, views.roi_center):
        center = _split(way(KEY, _small(n), scene, SHAPE)[0])[0]
        lower = (center > 0.5).all(axis=-1)
        np.testing.assert_array_equal(lower[:, 0], lower[:, 1])
        assert 0.4 < lower.mean() < 0.6


def test_roi_global_keeps_the_second_random_window():
    n = 3000
    random = _random(n)
    windows, ok = views.roi_global(KEY, random, _scene(_rois(_repeated([MIDDLE], n))), SHAPE)
    _assert_jittered(windows[:, 0], MIDDLE)
    np.testing.assert_array_equal(windows[:, 1], random[:, 1])
    assert ok.all()


def test_roi_center_draws_centres_all_over_the_region_and_keeps_sizes():
    n = 3000
    windows, ok = views.roi_center(KEY, _small(n), _scene(_rois(_repeated([MIDDLE], n))), SHAPE)
    center, size = _split(windows)
    np.testing.assert_allclose(size, _split(_small(n))[1], atol=1e-6)
    place = (center - MIDDLE[:2]) / (np.array(MIDDLE[2:]) - MIDDLE[:2])
    assert ok.all() and place.min() > -1e-5 and place.max() < 1 + 1e-5
    quarters = np.quantile(place, [0.25, 0.5, 0.75], axis=0)
    np.testing.assert_allclose(quarters, np.tile([[[0.25]], [[0.5]], [[0.75]]], (1, 2, 2)), atol=0.05)
    assert abs(np.corrcoef(place[:, 0, 0], place[:, 1, 0])[0, 1]) < 0.1  # two points, not one


def test_map_center_follows_the_mass_above_the_mean():
    n, h, w = 6000, 4, 6
    image = np.random.default_rng(0).uniform(size=(h, w))
    image[[0, -1]] = image[:, [0, -1]] = 0  # small windows then never meet the border
    rois = _rois(_repeated([MIDDLE], n))
    windows, ok = views.map_center(KEY, _small(n), _scene(rois, _repeated(image, n)), SHAPE)
    center, size = _split(windows)
    np.testing.assert_allclose(size, _split(_small(n))[1], atol=1e-6)
    mass = np.maximum(image - image.mean(), 0)
    mass /= mass.sum()
    cells = np.floor(center * [h, w]).astype(int)
    for view in range(2):
        counts = np.zeros((h, w))
        np.add.at(counts, (cells[:, view, 0], cells[:, view, 1]), 1)
        np.testing.assert_allclose(counts / n, mass, atol=0.03)
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


@pytest.mark.parametrize("wanted", [0.3, 0.7])
def test_cover_takes_the_first_window_that_holds_the_share_else_the_best(monkeypatch, wanted):
    n, tries = 24, 5
    rng = np.random.default_rng(1)
    maps = rng.uniform(size=(n, 5, 7)) ** 3
    low = rng.uniform(0, 0.6, (n, 1, 2))
    regions = np.concatenate([low, low + rng.uniform(0.2, 0.4, (n, 1, 2))], axis=-1)
    low = rng.uniform(0, 0.5, (n, 2 * tries, 2))
    windows = np.concatenate([low, low + rng.uniform(0.1, 0.5, low.shape)], axis=-1).astype(np.float32)
    asked = []

    def draw(key, aspect, count, area, ratio):
        asked.append((aspect.shape, count, area, ratio))
        return jnp.array(windows)

    monkeypatch.setattr(views, "random_resized_crop_boxes", draw)
    shape = SHAPE._replace(cover_tries=tries, cover_share=wanted)
    found, ok = views.cover(KEY, _random(n), _scene(_rois(regions), maps), shape)
    assert asked == [((n,), 2 * tries, SHAPE.area, SHAPE.ratio)] and ok.all()
    kinds = set()
    for i in range(n):
        region = regions[i, 0]
        for view in range(2):
            own = windows[i, view * tries : (view + 1) * tries]
            common = [[*np.maximum(v[:2], region[:2]), *np.minimum(v[2:], region[2:])] for v in own]
            share = np.array([_mass_inside(maps[i], c) for c in common]) / _mass_inside(maps[i], region)
            index = np.argmax(share >= wanted) if (share >= wanted).any() else share.argmax()
            np.testing.assert_allclose(found[i, view], own[index])
            kinds.add("best" if share.max() < wanted else "first" if index == share.argmax() else "not best")
    assert kinds == {"best", "first", "not best"}


def test_cover_of_drawn_windows_mostly_holds_the_share():
    n = 200
    maps = np.random.default_rng(2).uniform(size=(n, 4, 4))
    scene = _scene(_rois(_repeated([[0.1, 0.6, 0.4, 0.9]], n)), maps)
    windows, _ = views.cover(KEY, _random(n), scene, SHAPE)
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
    assert holds["cover"] > 0.95 and holds["random"] < 0.7


@settings(max_examples=30, deadline=None)
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
    n = 3000
    image = np.zeros((8, 10))
    image[2:6, 3:5] = 0.5
    image[4, 3:7] = 1.0
    image[1, 2] = 0.2  # below the threshold
    rois = _rois(_repeated([MIDDLE], n))
    windows, ok = views.contrastive_crop(KEY, _small(n), _scene(rois, _repeated(image, n)), SHAPE)
    center, size = _split(windows)
    np.testing.assert_allclose(size, _split(_small(n))[1], atol=1e-6)
    place = (center - [2 / 8, 3 / 10]) / [4 / 8, 4 / 10]
    assert ok.all() and place.min() > -1e-5 and place.max() < 1 + 1e-5
    wanted = [0.1, 0.25, 0.5, 0.75, 0.9]
    quantiles = np.quantile(place, wanted, axis=0)
    expected = stats.beta(0.6, 0.6).ppf(wanted)
    np.testing.assert_allclose(quantiles, np.broadcast_to(expected[:, None, None], (5, 2, 2)), atol=0.05)
    assert abs(np.corrcoef(place[:, 0, 0], place[:, 1, 0])[0, 1]) < 0.1


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_every_way_keeps_its_windows_on_the_canvas(seed):
    rng, n = np.random.default_rng(seed), 8
    low = rng.uniform(0, 0.95, (n, 3, 2))
    boxes = np.concatenate([low, np.minimum(low + rng.uniform(0.02, 1.0, (n, 3, 2)), 1.0)], axis=-1)
    valid, maps = rng.uniform(size=(n, 3)) < 0.5, rng.uniform(size=(n, 4, 5)) ** 4
    aspect = jnp.array(rng.uniform(0.5, 2.0, n), jnp.float32)
    scene = _scene(_rois(boxes, valid, rng.uniform(size=(n, 3))), maps)._replace(aspect=aspect)
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
        for way in (views.roi_jitter, views.roi_global, views.roi_center):

            def total(boxes, way=way):
                rois = Rois(boxes, jnp.ones((1, 1), bool), jnp.ones((1, 1)))
                return jnp.sum(way(KEY, jnp.array(random), _scene(rois), SHAPE)[0] * weight)

            total = jax.jit(total)
            found = np.asarray(jax.grad(total)(jnp.array(boxes)))
            assert np.abs(found).min() > 1e-3
            for k in range(4):
                step = eps * np.eye(4)[k]
                difference = total(jnp.array(boxes + step)) - total(jnp.array(boxes - step))
                assert found[0, 0, k] == pytest.approx(float(difference) / (2 * eps), abs=1e-6)


def _mixed_scene(n):
    """Every third image has no valid region."""
    valid = _repeated([[True, True]], n)[:, 0] & (np.arange(n) % 3 > 0)[:, None]
    boxes = _repeated([MIDDLE, (0.1, 0.1, 0.5, 0.5)], n)
    return _scene(_rois(boxes, valid > 0), np.random.default_rng(4).uniform(size=(n, 4, 5))), valid.any(axis=1)


def test_without_strength_windows_are_the_random_ones():
    scene, _ = _mixed_scene(30)
    random = _random(30)
    mix = dict.fromkeys(views.WAYS, 1 / 6)
    found = [views.pair_boxes(KEY, random, scene, SHAPE, mix, 0.0)]
    found.append(views.pair_boxes(KEY, random, scene, SHAPE, dict.fromkeys(views.WAYS, 0.0), 1.0))
    found.append(views.pair_boxes(KEY, random, scene, SHAPE, {}, jnp.float32(1.0)))
    for boxes, guided in found:
        np.testing.assert_array_equal(boxes, random)
        assert not guided.any()


@pytest.mark.parametrize("mix", [{"cover": 1.0}, {"roi_jitter": 0.5, "roi_center": 0.25, "map_center": 0.25}])
def test_with_full_strength_all_images_with_regions_are_guided(mix):
    scene, has_region = _mixed_scene(300)
    random = _random(300)
    boxes, guided = views.pair_boxes(KEY, random, scene, SHAPE, mix, 1.0)
    np.testing.assert_array_equal(guided, has_region)
    np.testing.assert_array_equal(boxes[~has_region], random[~has_region])
    assert (boxes[has_region] != random[has_region]).any(axis=(1, 2)).all()


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_ways_are_mixed_by_their_probabilities(monkeypatch, strength):
    n, mix = 6000, {"roi_jitter": 0.2, "map_center": 0.0, "cover": 0.35, "roi_global": 0.15}
    ok = np.arange(n) % 4 > 0
    for i, name in enumerate(mix):  # each way answers with its own number
        answer = jnp.full((n, 2, 4), i / 10)
        monkeypatch.setitem(views.WAYS, name, lambda *_, answer=answer: (answer, jnp.array(ok)))
    scene, random = _scene(_rois(_repeated([MIDDLE], n))), jnp.full((n, 2, 4), 0.9)
    pair = jax.jit(lambda strength: views.pair_boxes(KEY, random, scene, SHAPE, mix, strength))
    boxes, guided = (np.asarray(v) for v in pair(jnp.float32(strength)))
    np.testing.assert_array_equal(guided, boxes[:, 0, 0] < 0.8)
    assert not guided[~ok].any()
    shares = [np.isclose(boxes[ok], i / 10).all(axis=(1, 2)).mean() for i in range(4)]
    np.testing.assert_allclose(shares, strength * np.array([0.2, 0.0, 0.35, 0.15]), atol=0.025)


LOCAL = {"area": (0.05, 0.25), "count": 5}


def _local(key, scene, n, *, invalid, strength, **fields):
    return views.local_boxes(
        key, scene, jnp.ones(n), SHAPE, **{**LOCAL, **fields}, invalid=invalid, strength=strength
    )


@pytest.mark.parametrize("invalid", ["random", "drop"])
def test_local_windows_are_random_without_a_scene_and_without_strength(invalid):
    n = 300
    boxes, counts = _local(KEY, None, n, invalid=invalid, strength=1.0)
    area = _split(boxes)[1].prod(axis=-1)
    assert boxes.shape == (n, 5, 4) and counts.all()
    np.testing.assert_allclose(np.quantile(area, [0, 0.5, 1]), [0.05, 0.15, 0.25], atol=0.015)
    scene, _ = _mixed_scene(n)
    early, counts = _local(KEY, scene, n, invalid=invalid, strength=0.0)
    np.testing.assert_array_equal(early, boxes)
    assert counts.all()


@pytest.mark.parametrize("invalid", ["random", "drop"])
def test_local_windows_are_jittered_regions_in_turn(invalid):
    n = 600
    regions = np.array([[0.15, 0.15, 0.25, 0.3], [0.4, 0.7, 0.6, 0.8]])
    valid = np.array([[True, True], [True, False], [False, False]])[np.arange(n) % 3]
    scene = _scene(_rois(_repeated(regions, n), valid))
    boxes, counts = _local(KEY, scene, n, invalid=invalid, strength=1.0)
    random, _ = _local(KEY, None, n, invalid=invalid, strength=1.0)
    slots = valid[:, [0, 1, 0, 1, 0]]
    np.testing.assert_array_equal(counts, slots if invalid == "drop" else np.ones_like(slots))
    np.testing.assert_array_equal(boxes[~slots], random[~slots])
    for slot in range(5):
        _assert_jittered(boxes[slots[:, slot], slot], regions[slot % 2])
    assert np.abs(_split(boxes[0, 0])[0] - _split(boxes[0, 2])[0]).max() > 1e-3  # jittered on their own


def test_fewer_local_windows_than_regions_take_the_first():
    regions = np.array([[0.4, 0.4, 0.6, 0.6], [0.1, 0.1, 0.2, 0.2], [0.7, 0.7, 0.9, 0.9]])
    scene = _scene(_rois(_repeated(regions, 300)))
    boxes, counts = _local(KEY, scene, 300, invalid="drop", strength=1.0, count=2)
    assert boxes.shape == (300, 2, 4) and counts.all()
    for slot in range(2):
        _assert_jittered(boxes[:, slot], regions[slot])


def test_warm_up_guides_a_share_of_the_local_windows():
    n = 1500
    scene = _scene(_rois(_repeated([MIDDLE, MIDDLE], n), _repeated([1, 0], n) > 0))
    random, _ = _local(KEY, None, n, invalid="drop", strength=1.0, count=2)
    boxes, counts = _local(KEY, scene, n, invalid="drop", strength=jnp.float32(0.3), count=2)
    moved = (np.asarray(boxes) != random).any(axis=-1).mean(axis=0)
    np.testing.assert_allclose(moved, [0.3, 0.0], atol=0.04)
    # Where guidance would have used the missing region the window does not count; elsewhere it is random.
    np.testing.assert_allclose(np.asarray(counts).mean(axis=0), [1.0, 0.7], atol=0.04)
