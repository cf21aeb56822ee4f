"""Properties of boxes, regions, crops, weights, order and configurations for whatever is drawn."""

import contextlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from salcl_jax import config as config_lib
from salcl_jax import config_record, losses
from salcl_jax.data import pipeline
from salcl_jax.data.examples import KEPT_SHARE, _stride, window_boxes
from salcl_jax.ops import boxes, crop, roi
from salcl_jax.validation import validate

few = settings(max_examples=15, deadline=None, derandomize=True)
many = settings(max_examples=100, deadline=None, derandomize=True)
N = 6


def floats(shape, low=-1.0, high=2.0):
    return hnp.arrays(np.float32, shape, elements=st.floats(low, high, width=32))


def reference_iou(a, b):
    """In float64, from the definition; flipped boxes are empty."""
    a, b = a.astype(np.float64), b.astype(np.float64)

    def area(x):
        return np.prod(np.maximum(x[..., 2:] - x[..., :2], 0), -1)

    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    inside = np.prod(np.maximum(high - low, 0), -1)
    inside = np.where((area(a) > 0) & (area(b) > 0), inside, 0)
    union = area(a) + area(b) - inside
    return np.where(union > 0, inside / np.where(union > 0, union, 1), 0)


# Boxes.


@few
@given(a=floats((N, 4)), b=floats((N, 4)))
def test_overlap_of_any_boxes(a, b):
    a, b = np.round(a, 3), np.round(b, 3)  # far from where float32 cannot tell
    found = np.asarray(boxes.pairwise_iou(jnp.asarray(a), jnp.asarray(b)))
    np.testing.assert_allclose(found, reference_iou(a[:, None], b[None]), atol=2e-4)
    assert (found >= 0).all() and (found <= 1 + 1e-6).all()
    np.testing.assert_allclose(found.T, boxes.pairwise_iou(jnp.asarray(b), jnp.asarray(a)), atol=1e-6)


@few
@given(raw=floats((N, 4), -50.0, 50.0), least=st.floats(0.01, 1.0))
def test_any_box_is_brought_onto_the_canvas(raw, least):
    once = boxes.clip_inside(jnp.asarray(raw), least)
    found = np.asarray(once)
    assert (found >= 0).all() and (found <= 1).all()
    assert (found[:, 2:] - found[:, :2] >= least - 1e-5).all()
    np.testing.assert_allclose(boxes.clip_inside(once, least), found, atol=1e-6)  # where it lies it stays
    kept = ((raw >= 0) & (raw <= 1)).all(1) & (raw[:, 2:] - raw[:, :2] >= least).all(1)
    np.testing.assert_allclose(found[kept], raw[kept], atol=1e-6)


@few
@given(maps=floats((2, 5, 7), 0.0, 1.0), raw=floats((2, N, 4)), value=st.floats(0.0, 1.0, width=32))
def test_a_mean_inside_a_box_lies_between_the_extremes(maps, raw, value):
    inside = boxes.clip_inside(jnp.asarray(raw), 0.05)
    found = np.asarray(boxes.mean_inside(jnp.asarray(maps), inside))
    low, high = maps.min((1, 2))[:, None], maps.max((1, 2))[:, None]
    assert (found >= low - 1e-5).all() and (found <= high + 1e-5).all()
    flat = boxes.mean_inside(jnp.full((2, 5, 7), value, jnp.float32), inside)
    np.testing.assert_allclose(flat, np.full((2, N), value), atol=1e-5)
    for shares in boxes.grid_overlap(inside, 5, 7):
        np.testing.assert_allclose(np.asarray(shares).sum(-1), 1, atol=1e-4)


# Regions.


@few
@given(raw=floats((3, 5, 4)), padded=hnp.arrays(bool, (3, 5)), count=st.sampled_from([1, 3, 7]))
def test_annotated_regions_are_the_largest_boxes(raw, padded, count):
    given_boxes = np.where(padded[:, :, None], 0, raw).astype(np.float32)
    found = roi.ground_truth(jnp.asarray(given_boxes), count=count, min_size=0.05)
    sides = np.maximum(given_boxes[..., 2:] - given_boxes[..., :2], 0)
    areas = np.sort(sides[..., 0] * sides[..., 1], axis=1)[:, ::-1]
    assert np.asarray(found.valid).sum(1).tolist() == np.minimum((areas > 0).sum(1), count).tolist()
    assert found.boxes.shape == (3, count, 4)
    ok, placed = np.asarray(found.valid), np.asarray(found.boxes)
    assert (placed >= 0).all() and (placed <= 1).all()
    inside = ((given_boxes >= 0) & (given_boxes <= 1)).all(-1) & (sides >= 0.05).all(-1)
    for row in range(3):  # a box that needs no mending is found as it is
        if inside[row].all():
            found_areas = np.asarray(boxes.area(found.boxes))[row][ok[row]]
            np.testing.assert_allclose(found_areas, areas[row][: ok[row].sum()], atol=1e-5)


FIND = jax.jit(lambda maps: roi.from_map(
    maps, count=1, temperature=0.05, level=0.25, window=0.15, extent=1.2, min_size=0.15, max_size=0.9,
    min_peak=0.4,
))  # fmt: skip


@few
@given(seed=st.integers(0, 2**31), power=st.floats(0.5, 6.0))
def test_a_mirrored_map_has_mirrored_regions(seed, power):
    maps = np.random.default_rng(seed).random((3, 8, 8)).astype(np.float32) ** power
    straight, mirrored = FIND(jnp.asarray(maps)), FIND(jnp.asarray(maps[:, :, ::-1].copy()))
    turned = np.asarray(mirrored.boxes)[..., [0, 3, 2, 1]] * [1, -1, 1, -1] + [0, 1, 0, 1]
    np.testing.assert_allclose(turned, straight.boxes, atol=2e-3)
    np.testing.assert_array_equal(mirrored.valid, straight.valid)


@few
@given(seed=st.integers(0, 2**31), aspect=floats(N, 0.25, 4.0),
       sides=st.tuples(st.floats(0.05, 0.9), st.floats(0.05, 0.9)))  # fmt: skip
def test_random_regions_keep_their_bounds(seed, aspect, sides):
    low, high = sorted(sides)
    found = roi.random(jax.random.key(seed), jnp.asarray(aspect), count=3, min_size=low, max_size=high)
    placed = np.asarray(found.boxes)
    assert (placed >= 0).all() and (placed <= 1).all() and np.asarray(found.valid).all()
    size = placed[..., 2:] - placed[..., :2]
    assert (size >= low - 1e-5).all() and (size <= high + 1e-5).all()


# Crops.


@few
@given(seed=st.integers(0, 2**31), aspect=floats(N, 0.25, 4.0),
       area=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
       ratio=st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)))  # fmt: skip
def test_random_crops_lie_on_the_photo_and_do_not_depend_on_others(seed, aspect, area, ratio):
    low, high = sorted(area)
    options = {"n": 4, "area": (low, high), "ratio": tuple(sorted(ratio))}
    found = np.asarray(crop.random_resized_crop_boxes(jax.random.key(seed), jnp.asarray(aspect), **options))
    assert (found >= 0).all() and (found <= 1).all()
    size = found[..., 2:] - found[..., :2]
    assert (size > 0).all() and (size.prod(-1) <= high * (1 + 1e-3) + 1e-5).all()
    free = (size < 1 - 1e-5).all(-1)  # a side that was cut to the photo changes both
    assert (size.prod(-1)[free] >= low * (1 - 1e-3) - 1e-5).all()
    pixels = size[..., 1] * aspect[:, None] / size[..., 0]
    assert (pixels[free] >= min(ratio) * 0.99).all() and (pixels[free] <= max(ratio) * 1.01).all()
    others = aspect.copy()
    others[1:] = 1.0
    again = np.asarray(crop.random_resized_crop_boxes(jax.random.key(seed), jnp.asarray(others), **options))
    np.testing.assert_array_equal(again[0], found[0])


CROP = jax.jit(lambda images, boxes_: crop.crop_and_resize(images, boxes_, 6))


@few
@given(raw=floats((2, 3, 4)), low=st.floats(0, 1, width=32), seed=st.integers(0, 99))
def test_a_crop_holds_no_value_that_the_canvas_lacks(raw, low, seed):
    images = low + (1 - low) * np.random.default_rng(seed).random((2, 9, 9, 1), np.float32)
    inside = boxes.clip_inside(jnp.asarray(raw), 0.1)
    found = np.asarray(CROP(jnp.asarray(images, jnp.float32), inside))
    assert (found >= images.min((1, 2, 3))[:, None, None, None, None] - 1e-4).all()
    assert (found <= images.max((1, 2, 3))[:, None, None, None, None] + 1e-4).all()
    flat = CROP(jnp.full((2, 9, 9, 1), low, jnp.float32), inside)
    np.testing.assert_allclose(flat, np.full(flat.shape, low), atol=1e-4)


@few
@given(raw=floats((N, 4)), seed=st.integers(0, 2**31), area=st.floats(0.05, 1.0), most=st.integers(1, 8))
def test_boxes_of_any_window_lie_in_it(raw, seed, area, most):
    window = pipeline.draw_window(seed, 3, (area, area))
    y0, x0, y1, x1 = window
    assert 0 <= y0 < y1 <= 1 and 0 <= x0 < x1 <= 1 and math.isclose((y1 - y0) * (x1 - x0), area, rel_tol=1e-6)
    found, classes, hard = window_boxes(raw, np.arange(N), np.ones(N, bool), window, most)
    assert found.shape == (most, 4) and (found >= 0).all() and (found <= 1).all()
    used = classes >= 0
    assert (found[~used] == 0).all() and not hard[~used].any() and hard[used].all()
    for box, kind in zip(found[used], classes[used], strict=True):
        back = box.astype(np.float64) * np.array([y1 - y0, x1 - x0] * 2) + np.array([y0, x0] * 2)
        whole = raw[kind].astype(np.float64)
        assert (back[:2] >= whole[:2] - 1e-5).all() and (back[2:] <= whole[2:] + 1e-5).all()
        share = np.prod(back[2:] - back[:2]) / np.prod(whole[2:] - whole[:2])
        assert share >= KEPT_SHARE - 1e-3


# Weights.


@few
@given(score=floats((4, 3), 0.0, 1.0), valid=hnp.arrays(bool, (4, 2)), value=floats((4, 2), -10, 10),
       mode=st.sampled_from(["none", "product", "geometric", "minimum"]),
       temperature=st.floats(0.01, 10), floor=st.floats(0, 1),
       normalize=st.sampled_from(["image", "batch"]))  # fmt: skip
def test_weights_of_any_scores(score, valid, value, mode, temperature, floor, normalize):
    """Never negative, 1 in the mean over what counts, 0 elsewhere, and a better pair never weighs less."""
    pairs = ((0, 1), (2, 1))
    found = np.asarray(losses.pair_weights(
        jnp.asarray(score), jnp.asarray(valid), pairs, mode=mode, temperature=temperature, floor=floor,
        normalize=normalize))  # fmt: skip
    assert np.isfinite(found).all() and (found >= 0).all() and (found[~valid] == 0).all()
    groups = zip(found, valid, strict=True) if normalize == "image" else [(found, valid)]
    for weights, counted in groups:
        if counted.any():
            assert weights[counted].mean() == pytest.approx(1, abs=1e-4)
    for row in range(4):
        better = (score[row, 0] >= score[row, 2]) & valid[row].all()
        assert not better or found[row, 0] >= found[row, 1] - 1e-6
    broken = np.where(valid, value, np.nan).astype(np.float32)
    total = losses.combine(jnp.asarray(broken), jnp.asarray(found), jnp.ones(2))
    np.testing.assert_allclose(total, (found * np.where(valid, value, 0)).sum(1).mean(), rtol=1e-4, atol=1e-4)


# Order.


@many
@given(n=st.integers(1, 400), seed=st.integers(-(2**63), 2**63), epoch=st.integers(0, 2**40))
def test_every_epoch_is_a_permutation(n, seed, epoch):
    found = [pipeline.order(epoch * n + i, n, seed) for i in range(n)]
    assert sorted(found) == list(range(n))
    pipeline._permutation.cache_clear()
    place = (seed + epoch) % n  # no memory of where the stream began
    assert pipeline.order(epoch * n + place, n, seed) == found[place]


@many
@given(n=st.integers(1, 10**6), start=st.integers(0, 10**6))
def test_replacements_meet_every_photo_before_one_twice(n, start):
    stride, tries = _stride(n), min(64, n)
    assert len({(start + k * stride) % n for k in range(tries)}) == tries and math.gcd(stride, n) == 1
    if n > 100:  # far from where the broken one lies
        assert min(stride % n, n - stride % n) > n // 4


# Configurations.


def leaves(c, prefix=""):
    for name, value in c.items():
        if isinstance(value, config_lib.ConfigDict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


BASE = config_lib.base()
FIELDS = dict(leaves(BASE))
WORDS = ("none folder arrays scenes tfds ../x a=b vit_s16 resnet18 random stage4 gradcam attention "
         "similarity image online lars conv1 drop fsdp infonce encoded canvas minimum").split()  # fmt: skip
NUMBERS = st.one_of(st.integers(-3, 40), st.integers(-(2**70), 2**70))
REALS = st.one_of(st.floats(-0.5, 2.0), st.floats())
TEXTS = st.one_of(st.sampled_from(WORDS), st.text(max_size=5))


def values(like):
    """Values of the type of a field, which the command line lets through."""
    if isinstance(like, bool):
        return st.booleans()
    if isinstance(like, int):
        return NUMBERS
    if isinstance(like, float):
        return REALS
    if isinstance(like, str):
        return TEXTS
    return st.lists(st.one_of(NUMBERS, REALS, TEXTS), max_size=4).map(tuple)


CHANGES = st.dictionaries(st.sampled_from(sorted(FIELDS)), st.none(), min_size=1, max_size=4).flatmap(
    lambda names: st.fixed_dictionaries({name: values(FIELDS[name]) for name in names})
)


@contextlib.contextmanager
def configured(changes):
    """Inside, the configuration has these values."""
    try:
        _set(changes)
        yield BASE
    finally:
        _set({name: FIELDS[name] for name in changes})


def _set(changes):
    for name, value in changes.items():
        section, _, field = name.rpartition(".")
        target = BASE
        for part in filter(None, section.split(".")):
            target = target[part]
        target[field] = value


@settings(max_examples=200, deadline=None, derandomize=True)
@given(changes=CHANGES, devices=st.integers(1, 8), images=st.integers(1, 10**9))
def test_any_values_are_valid_or_a_config_error(changes, devices, images):
    try:
        with configured(changes) as c:
            validate(c, devices)
            done = config_lib.finish(c, devices=devices, images=images)
    except config_lib.ConfigError as error:
        assert "\n" not in str(error)
        return
    r = done.resolved
    assert 1 <= r.total_steps < 2**31 and 1 <= r.checkpoint_every <= max(1, r.total_steps)
    assert json.loads(json.dumps(config_record.learnt_fields(done), allow_nan=False))


SOURCES = {name.removesuffix("kind") for name in FIELDS if name.endswith(".kind")} - {"data.train."}
ALONE = [name for name in FIELDS if not name.startswith(tuple(SOURCES))]
ODD = {
    int: [0, -1, 2**31, 2**64, 10**400],
    float: [math.nan, math.inf, -math.inf, -1.0, 1e308],
    str: ["", "\n", "x" * 1000, "\udcff"],
    tuple: [(), ("x",), (math.nan, 1.0), (1.0, math.inf), (None,), ((1,),), (-1, -1), (0.5,) * 3],
    bool: [],
}


@pytest.mark.parametrize("name", ALONE)  # data.train stands for all sources: they share their fields
def test_each_field_alone(name):
    """Every field meets the values that break programs."""
    for value in ODD[type(FIELDS[name])]:
        try:
            with configured({name: value}) as c:
                validate(c)
                config_lib.finish(c, devices=1, images=1000)
        except config_lib.ConfigError as error:
            assert "\n" not in str(error), value
            assert isinstance(value, str) or "config." in str(error)
            continue
        numbers = value if isinstance(value, tuple) else (value,)
        assert all(math.isfinite(x) for x in numbers if isinstance(x, float)), (name, value)
        assert all(isinstance(x, (str, int, float)) for x in numbers), (name, value)
