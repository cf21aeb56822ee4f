"""Augmentation against PIL, colorsys and plain numpy; decisions against their distributions."""

import colorsys
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from salcl_jax.ops import augment as aug

GREY = np.array([0.2989, 0.587, 0.114])
_augment = jax.jit(aug.augment, static_argnums=2)
FULL = aug.AugmentSpec(0.5, 0.8, 0.4, 0.4, 0.2, 0.1, 0.2, 0.5, (0.1, 2.0), 0.2, 0.5)


def _crop(p=24, seed=0):
    return np.random.default_rng(seed).uniform(size=(p, p, 3)).astype(np.float32)


def _brightness(x, factor):
    return np.clip(x * factor, 0, 1)


def _contrast(x, factor):
    return np.clip(factor * x + (1 - factor) * (x @ GREY).mean(), 0, 1)


def _saturation(x, factor):
    return np.clip(factor * x + (1 - factor) * (x @ GREY)[..., None], 0, 1)


def _hue(x, turn):
    def one(pixel):
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        return colorsys.hsv_to_rgb((h + turn) % 1.0, s, v)

    return np.array([[one(pixel) for pixel in row] for row in x])


def _blur(x, sigma):
    """Loop over pixels; the taps that fall inside the crop are scaled to sum to 1."""
    p = x.shape[0]
    radius, out = p // 20, np.zeros_like(x, dtype=np.float64)
    for i, j in np.ndindex(p, p):
        total = 0.0
        for y in range(max(0, i - radius), min(p, i + radius + 1)):
            for z in range(max(0, j - radius), min(p, j + radius + 1)):
                weight = np.exp(-((y - i) ** 2 + (z - j) ** 2) / (2 * sigma**2))
                out[i, j] += weight * x[y, z]
                total += weight
        out[i, j] /= total
    return out


REFERENCES = {
    aug.BRIGHTNESS: _brightness,
    aug.CONTRAST: _contrast,
    aug.SATURATION: _saturation,
    aug.HUE: _hue,
}


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.7])
@pytest.mark.parametrize(
    "function, enhancer",
    [
        (aug.adjust_brightness, ImageEnhance.Brightness),
        (aug.adjust_contrast, ImageEnhance.Contrast),
        (aug.adjust_saturation, ImageEnhance.Color),
    ],
)
def test_adjustments_against_pil(function, enhancer, factor):
    image = Image.fromarray((_crop() * 255).astype(np.uint8))
    expected = np.asarray(enhancer(image).enhance(factor)) / 255
    found = function(jnp.asarray(np.asarray(image) / 255, jnp.float32), factor)
    # PIL rounds the grey (and its mean) to a byte before blending, and cuts the result down to one.
    np.testing.assert_allclose(found, expected, atol=2.5 / 255)


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.0, 0.07, 0.4])
def test_hue_against_colorsys(turn):
    crop = _crop()
    crop[0, :6] = [
        [0, 0, 0],
        [1, 1, 1],
        [0.5, 0.5, 0.5],
        [1, 0, 0],
        [0.2, 0.9, 0.9],
        [0.9, 0.2, 0.9],
    ]
    np.testing.assert_allclose(aug.adjust_hue(jnp.array(crop), turn), _hue(crop, turn), atol=2e-6)


def test_grayscale():
    crop = _crop()
    expected = np.repeat((crop @ GREY)[..., None], 3, axis=-1)
    np.testing.assert_allclose(aug.to_grayscale(jnp.array(crop)), expected, atol=1e-6)


@pytest.mark.parametrize("p, sigma", [(24, 0.7), (41, 2.0), (41, 0.1)])
def test_blur_against_a_loop(p, sigma):
    crop = _crop(p)
    found = aug.gaussian_blur(jnp.array(crop), sigma)
    np.testing.assert_allclose(found, _blur(crop, sigma), atol=1e-5)


def test_blur_interior_against_scipy_with_23_taps_at_224():
    ndimage = pytest.importorskip("scipy.ndimage")
    crop = np.zeros((224, 224, 3), np.float32)
    crop[100:130, 50:60] = 1.0
    crop[112, 160] = 1.0
    expected = ndimage.gaussian_filter(crop, (6.0, 6.0, 0.0), radius=(11, 11, 0))
    found = np.asarray(aug.gaussian_blur(jnp.array(crop), 6.0))
    np.testing.assert_allclose(found[11:-11, 11:-11], expected[11:-11, 11:-11], atol=1e-5)
    assert np.count_nonzero(found[112, 140:, 0]) == 23


def test_blur_keeps_a_flat_crop_flat():
    found = aug.gaussian_blur(jnp.full((40, 40, 3), 0.7), 1.5)
    np.testing.assert_allclose(found, 0.7, atol=1e-6)


@pytest.mark.parametrize("threshold", [0.5, 0.25])
def test_solarize(threshold):
    crop = (np.arange(27, dtype=np.float32) / 32).reshape(3, 3, 3)  # holds both thresholds
    expected = [1 - x if x >= threshold else x for x in crop.ravel()]
    found = aug.solarize(jnp.array(crop), threshold)
    np.testing.assert_array_equal(np.ravel(found), expected)


def test_normalize():
    images = np.random.default_rng(0).uniform(size=(2, 4, 4, 3)).astype(np.float32)
    expected = (images - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(aug.normalize(jnp.array(images)), expected, rtol=1e-5, atol=1e-6)
    found = aug.normalize(jnp.array(images), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    np.testing.assert_allclose(found, 2 * images - 1, atol=1e-6)


def _decisions(order, amounts, **on):
    flags = {name: jnp.array(on.get(name, False)) for name in aug.Decisions._fields[:2]}
    late = {name: jnp.array(on.get(name, False)) for name in ("grayscale", "blur", "solarize")}
    return aug.Decisions(
        **flags,
        **late,
        order=jnp.array(order),
        amounts=jnp.array(amounts, jnp.float32),
        sigma=jnp.array(1.3),
        threshold=jnp.array(0.5),
    )


def test_jitter_in_every_order_against_the_references():
    crop, amounts = _crop(8, seed=5), [1.3, 0.7, 1.4, 0.08]
    orders = list(itertools.permutations(range(4)))
    batch = jax.tree.map(
        lambda *x: jnp.stack(x), *(_decisions(o, amounts, jitter=True) for o in orders)
    )
    found = jax.jit(jax.vmap(aug.apply, in_axes=(None, 0)))(jnp.array(crop), batch)
    distinct = set()
    for order, result in zip(orders, found, strict=True):
        expected = crop.astype(np.float64)
        for operation in order:
            expected = REFERENCES[operation](expected, amounts[operation])
        np.testing.assert_allclose(result, expected, atol=1e-5)
        distinct.add(expected.tobytes())
    assert len(distinct) > 12  # the order matters on this crop


def test_operations_follow_each_other_as_in_byol():
    crop = _crop(22, seed=6)
    decisions = _decisions(
        [2, 0, 3, 1],
        [1.2, 0.8, 0.9, -0.05],
        flip=True,
        jitter=True,
        grayscale=True,
        blur=True,
        solarize=True,
    )
    expected = crop[:, ::-1].astype(np.float64)
    expected = _contrast(_hue(_brightness(_saturation(expected, 0.9), 1.2), -0.05), 0.8)
    expected = _blur(np.repeat((expected @ GREY)[..., None], 3, axis=-1), 1.3)
    expected = np.where(expected >= 0.5, 1 - expected, expected)
    found = np.asarray(aug.apply(jnp.array(crop), decisions))
    close = np.abs(found - expected) < 1e-5
    # A value within rounding of the threshold may fall on either side of it.
    assert (close | (np.abs(expected - 0.5) < 1e-5)).all()


def test_default_spec_changes_nothing():
    crops = jnp.array(np.random.default_rng(1).uniform(size=(3, 2, 20, 20, 3)), jnp.float32)
    specs = (aug.AugmentSpec(), aug.AugmentSpec())
    np.testing.assert_array_equal(_augment(jax.random.key(0), crops, specs), crops)


def test_probability_zero_and_one_are_exact_and_per_view():
    crops = jnp.array(np.random.default_rng(2).uniform(size=(6, 5, 20, 20, 3)), jnp.float32)
    off = aug.AugmentSpec()
    specs = (
        off,
        off._replace(flip=1.0),
        off._replace(grayscale_prob=1.0),
        off._replace(solarize_prob=1.0, solarize_threshold=0.3),
        off._replace(blur_prob=1.0, blur_sigma=(1.5, 1.5)),
    )
    found = np.asarray(_augment(jax.random.key(0), crops, specs))
    crops = np.asarray(crops)
    np.testing.assert_array_equal(found[:, 0], crops[:, 0])
    np.testing.assert_array_equal(found[:, 1], crops[:, 1, :, ::-1])
    grey = np.repeat((crops[:, 2] @ GREY)[..., None], 3, axis=-1)
    np.testing.assert_allclose(found[:, 2], grey, atol=1e-6)
    inverted = np.where(crops[:, 3] >= np.float32(0.3), 1 - crops[:, 3], crops[:, 3])
    np.testing.assert_array_equal(found[:, 3], inverted)
    for i in range(6):
        np.testing.assert_allclose(found[i, 4], _blur(crops[i, 4], 1.5), atol=1e-5)


def test_full_augmentation_stays_in_range_and_differs_between_views():
    image = np.random.default_rng(3).uniform(size=(4, 1, 24, 24, 3)).astype(np.float32)
    crops = jnp.array(np.repeat(image, 2, axis=1))
    found = np.asarray(_augment(jax.random.key(1), crops, (FULL, FULL)))
    assert found.dtype == np.float32 and found.min() >= 0.0 and found.max() <= 1.0
    assert (np.abs(found[:, 0] - found[:, 1]).mean(axis=(1, 2, 3)) > 0.01).all()


def test_missing_spec_is_an_error():
    with pytest.raises(ValueError, match="1 specs for 2 views"):
        aug.augment(jax.random.key(0), jnp.zeros((1, 2, 8, 8, 3)), (FULL,))


@pytest.fixture(scope="module")
def decisions():
    keys = jax.random.split(jax.random.key(7), 24_000)
    drawn = jax.jit(jax.vmap(lambda key: aug.decide(key, FULL)))(keys)
    return jax.tree.map(np.asarray, drawn)


def test_probabilities_of_decisions(decisions):
    n = 24_000
    for name, p in (
        ("flip", 0.5),
        ("jitter", 0.8),
        ("grayscale", 0.2),
        ("blur", 0.5),
        ("solarize", 0.2),
    ):
        share = getattr(decisions, name).mean()
        assert abs(share - p) < 4 * np.sqrt(p * (1 - p) / n), name
    flags = np.stack([decisions.flip, decisions.jitter, decisions.grayscale, decisions.blur])
    assert np.abs(np.corrcoef(flags) - np.eye(4)).max() < 4 / np.sqrt(n)


def test_orders_are_uniform_over_permutations(decisions):
    _, counts = np.unique(decisions.order, axis=0, return_counts=True)
    assert len(counts) == 24
    chi_squared = ((counts - 1000.0) ** 2 / 1000.0).sum()
    assert chi_squared < 52  # 23 degrees of freedom: exceeded once in 2,000 seeds


def test_amounts_are_uniform_in_their_ranges(decisions):
    bounds = {
        aug.BRIGHTNESS: (0.6, 1.4),
        aug.CONTRAST: (0.6, 1.4),
        aug.SATURATION: (0.8, 1.2),
        aug.HUE: (-0.1, 0.1),
    }
    columns = [(decisions.amounts[:, i], *bounds[i]) for i in range(4)]
    for values, low, high in [*columns, (decisions.sigma, 0.1, 2.0)]:
        scaled = (values - low) / (high - low)
        assert scaled.min() > -1e-5 and scaled.max() < 1 + 1e-5
        np.testing.assert_allclose(
            np.quantile(scaled, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.015
        )
    wide = aug.decide(jax.random.key(0), FULL._replace(brightness=5.0))
    assert wide.amounts[aug.BRIGHTNESS] >= 0.0


def test_gradient_is_finite_on_black_grey_and_saturated_crops():
    crops = np.stack(
        [np.zeros((20, 20, 3)), np.full((20, 20, 3), 0.5), np.ones((20, 20, 3)), _crop(20)]
    )
    crops = jnp.array(crops[:, None], jnp.float32)
    spec = FULL._replace(jitter_prob=1.0, blur_prob=1.0)
    weight = jnp.array(np.random.default_rng(4).normal(size=crops.shape), jnp.float32)

    def total(x):
        return jnp.sum(weight * aug.augment(jax.random.key(2), x, (spec,)))

    gradient = jax.jit(jax.grad(total))(crops)
    assert np.isfinite(gradient).all() and np.abs(gradient[3]).max() > 0


def test_sharded_batch_gets_the_same_augmentation():
    crops = jnp.array(np.random.default_rng(5).uniform(size=(8, 1, 20, 20, 3)), jnp.float32)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    specs = (FULL._replace(solarize_prob=0.0),)  # no threshold for rounding to cross
    key = jax.random.key(4)
    found = _augment(key, jax.device_put(crops, sharding), specs)
    # One image by hand, as the first of a split by images and then by views.
    own = jax.random.split(jax.random.split(key, 8)[5], 1)[0]
    expected = jax.jit(lambda x: aug.apply(x, aug.decide(own, specs[0])))(crops[5, 0])
    np.testing.assert_allclose(found[5, 0], expected, atol=1e-5)
    np.testing.assert_allclose(found, _augment(key, crops, specs), atol=1e-5)
