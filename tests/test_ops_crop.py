"""Crops against a loop of bilinear samples, torch and central differences; boxes in pixels."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salcl_jax.ops import crop as crop_ops

BOXES = np.array(
    [
        [[0.1, 0.2, 0.8, 0.7], [0.0, 0.0, 1.0, 1.0]],
        [[0.31, 0.05, 0.52, 0.33], [0.5, 0.4, 1.0, 0.9]],
    ],
    np.float32,
)
BAD_BOXES = np.array(
    [
        [
            [0.5, 0.5, 0.5, 0.5],  # no size
            [0.7, 0.2, 0.3, 0.9],  # flipped
            [1.5, 1.5, 2.0, 2.0],  # outside
            [-0.5, -0.5, 1.5, 1.5],  # larger than the canvas
            [0.2, 0.4, 0.2 + 1e-6, 0.8],
        ]
    ],
    np.float32,
)


def _images(b, s, c=3, seed=0):
    return np.random.default_rng(seed).uniform(size=(b, s, s, c)).astype(np.float32)


def _smooth(s, dtype=np.float64):
    y, x = np.meshgrid(np.arange(s) / s, np.arange(s) / s, indexing="ij")
    image = np.stack([np.sin(3 * y + x), np.cos(2 * x * y), y - x * x], axis=-1)
    return image[None].astype(dtype)


def _bilinear(image, box, size):
    """Sample the centre of every output pixel, pixel by pixel, without an antialiasing filter."""
    s = image.shape[0]
    out = np.zeros((size, size, image.shape[-1]))
    for i in range(size):
        for j in range(size):
            y = (box[0] + (i + 0.5) / size * (box[2] - box[0])) * s - 0.5
            x = (box[1] + (j + 0.5) / size * (box[3] - box[1])) * s - 0.5
            for row in (math.floor(y), math.floor(y) + 1):
                for col in (math.floor(x), math.floor(x) + 1):
                    weight = (1 - abs(y - row)) * (1 - abs(x - col))
                    out[i, j] += weight * image[min(max(row, 0), s - 1), min(max(col, 0), s - 1)]
    return out


@pytest.mark.parametrize("size", [8, 24])
def test_against_a_loop_of_samples(size):
    images = _images(2, 16)
    found = crop_ops.crop_and_resize(jnp.array(images), jnp.array(BOXES), size, antialias=False)
    assert found.shape == (2, 2, size, size, 3)
    for i in range(2):
        for j in range(2):
            expected = _bilinear(images[i], BOXES[i, j], size)
            np.testing.assert_allclose(found[i, j], expected, atol=1e-5)


def test_against_torch_grid_sample():
    torch = pytest.importorskip("torch")
    images, size = _images(2, 16), 24
    found = crop_ops.crop_and_resize(jnp.array(images), jnp.array(BOXES), size)
    steps = (np.arange(size) + 0.5) / size
    for j in range(2):
        y0, x0, y1, x1 = (BOXES[:, j, k, None] for k in range(4))
        y, x = y0 + steps * (y1 - y0), x0 + steps * (x1 - x0)
        grid = np.stack(
            [np.broadcast_to(x[:, None, :], (2, size, size)), y[:, :, None] + 0 * x[:, None, :]], -1
        )
        expected = torch.nn.functional.grid_sample(
            torch.tensor(images).permute(0, 3, 1, 2),
            torch.tensor((2 * grid - 1).astype(np.float32)),
            padding_mode="border",
            align_corners=False,
        )
        np.testing.assert_allclose(found[:, j], expected.permute(0, 2, 3, 1).numpy(), atol=1e-4)


def test_shrinking_against_torch_antialiased_interpolate():
    torch = pytest.importorskip("torch")
    images = _images(1, 32)
    box = jnp.array([[[0.25, 0.125, 1.0, 0.875]]])  # whole pixels, so that torch can cut them out
    found = crop_ops.crop_and_resize(jnp.array(images), box, 10)[0, 0]
    # torch filters the cut-out alone, the crop sees what lies around it: compare the interior.
    cut = torch.tensor(images[:, 8:32, 4:28]).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(cut, (10, 10), mode="bilinear", antialias=True)
    expected = expected[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(found[1:-1, 1:-1], expected[1:-1, 1:-1], atol=1e-5)
    plain = crop_ops.crop_and_resize(jnp.array(images), box, 10, antialias=False)[0, 0]
    assert np.abs(plain - expected)[1:-1, 1:-1].max() > 0.05


def test_full_box_is_the_identity():
    images = _images(2, 12)
    full = jnp.broadcast_to(jnp.array([0.0, 0.0, 1.0, 1.0]), (2, 1, 4))
    found = crop_ops.crop_and_resize(jnp.array(images), full, 12)
    np.testing.assert_array_equal(found[:, 0], images)


def test_whole_pixel_box_is_a_slice():
    images = _images(1, 16)
    box = jnp.array([[[4 / 16, 2 / 16, 12 / 16, 10 / 16]]])
    found = crop_ops.crop_and_resize(jnp.array(images), box, 8)
    np.testing.assert_allclose(found[0, 0], images[0, 4:12, 2:10], atol=1e-6)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [6, 20])
def test_box_gradient_against_central_differences(antialias, size):
    with jax.enable_x64(True):
        images = jnp.array(_smooth(12))
        boxes = np.array([[[0.11, 0.23, 0.79, 0.83]]])
        weight = jnp.array(np.random.default_rng(1).normal(size=(1, 1, size, size, 3)))

        @jax.jit
        def function(b):
            crops = crop_ops.crop_and_resize(
                images, b, size, antialias=antialias, precision=jax.lax.Precision.HIGHEST
            )
            return jnp.sum(weight * crops)

        found, eps = np.asarray(jax.jit(jax.grad(function))(jnp.array(boxes))), 1e-5
        for k in range(4):
            step = np.zeros((1, 1, 4))
            step[..., k] = eps
            difference = function(jnp.array(boxes + step)) - function(jnp.array(boxes - step))
            assert found[0, 0, k] == pytest.approx(
                float(difference) / (2 * eps), rel=1e-5, abs=1e-6
            )


@pytest.mark.parametrize("antialias", [True, False])
def test_bad_boxes_are_finite_in_value_and_gradient(antialias):
    images, boxes = jnp.array(_images(1, 16)), jnp.array(BAD_BOXES)

    def total(images, boxes):
        crops = crop_ops.crop_and_resize(images, boxes, 8, antialias=antialias)
        return jnp.sum(jnp.square(crops)), crops

    gradient = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    (gi, gb), crops = gradient(images, boxes)
    for value in (gi, gb, crops):
        assert np.isfinite(value).all()
    np.testing.assert_array_equal(crops[0, 2], 0.0)
    assert np.abs(gi).max() > 0 and np.abs(gb[0, 3]).max() > 0


def test_a_sizeless_box_is_a_pixel_about_its_centre():
    image = jnp.array(_smooth(64, np.float32))
    found = crop_ops.crop_and_resize(image, jnp.array([[[0.5, 0.25, 0.5, 0.25]]]), 4)
    np.testing.assert_allclose(
        found[0, 0].mean(axis=(0, 1)), image[0, 31:33, 15:17].mean(axis=(0, 1)), atol=1e-4
    )


def _draw(aspects, n, area, ratio, seed=0):
    aspect = jnp.array(aspects, jnp.float32)
    return crop_ops.random_resized_crop_boxes(jax.random.key(seed), aspect, n, area, ratio)


def test_drawn_boxes_have_the_asked_area_and_pixel_ratio():
    # Photos of aspect 0.7 to 1.6 with areas up to 0.3 never reach the border's clamp.
    aspects = np.array([0.7, 1.0, 1.6])
    boxes = np.asarray(_draw(aspects, 4000, (0.08, 0.3), (3 / 4, 4 / 3)))
    assert boxes.min() >= 0.0 and boxes.max() <= 1.0
    h, w = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    area, log_ratio = h * w, np.log(w * aspects[:, None] / h) / math.log(4 / 3)
    for i in range(3):
        # Uniform: quartiles at quarters of the range. 4000 draws: standard error below 0.008.
        quarters = np.quantile((area[i] - 0.08) / 0.22, [0.25, 0.5, 0.75])
        np.testing.assert_allclose(quarters, [0.25, 0.5, 0.75], atol=0.04)
        quarters = np.quantile(log_ratio[i], [0.25, 0.5, 0.75])
        np.testing.assert_allclose(quarters, [-0.5, 0.0, 0.5], atol=0.08)
        assert np.abs(log_ratio[i]).max() < 1 + 1e-3
        assert 0.08 - 1e-4 < area[i].min() and area[i].max() < 0.3 + 1e-4
        assert abs(np.corrcoef(area[i], log_ratio[i])[0, 1]) < 0.06


def test_drawn_boxes_are_anywhere():
    boxes = np.asarray(_draw([1.3], 4000, (0.1, 0.4), (3 / 4, 4 / 3)))[0]
    room = 1 - (boxes[:, 2:] - boxes[:, :2])
    place = boxes[:, :2] / room
    for axis in range(2):
        quarters = np.quantile(place[:, axis], [0.25, 0.5, 0.75])
        np.testing.assert_allclose(quarters, [0.25, 0.5, 0.75], atol=0.04)
    assert abs(np.corrcoef(place.T)[0, 1]) < 0.06


def test_long_sides_are_clamped_to_the_photo():
    boxes = np.asarray(_draw([3.0, 1 / 3], 500, (0.5, 1.0), (3 / 4, 4 / 3)))
    sides = boxes[..., 2:] - boxes[..., :2]
    assert boxes.min() >= 0.0 and boxes.max() <= 1.0
    np.testing.assert_allclose(sides[0, :, 0], 1.0, atol=1e-6)  # a wide photo: full height
    np.testing.assert_allclose(sides[1, :, 1], 1.0, atol=1e-6)
    assert sides[0, :, 1].max() < 0.7


def test_draws_do_not_depend_on_jit_or_sharding():
    aspect = np.linspace(0.5, 2.0, 8).astype(np.float32)
    key, arguments = jax.random.key(3), (2, (0.08, 1.0), (3 / 4, 4 / 3))
    plain = crop_ops.random_resized_crop_boxes(key, jnp.array(aspect), *arguments)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    jitted = jax.jit(lambda k, a: crop_ops.random_resized_crop_boxes(k, a, *arguments))
    np.testing.assert_allclose(jitted(key, jnp.array(aspect)), plain, atol=1e-6)
    np.testing.assert_allclose(jitted(key, jax.device_put(aspect, sharding)), plain, atol=1e-6)
    assert np.abs(plain[:, 0] - plain[:, 1]).min(axis=-1).max() > 0


@pytest.mark.parametrize("width, height", [(640, 480), (480, 640), (500, 500), (1000, 200)])
def test_central_boxes_show_what_resizing_and_cutting_out_the_middle_shows(width, height):
    box = np.asarray(crop_ops.center_boxes(jnp.array([width / height])))[0]
    y0, x0, y1, x1 = box * [height, width, height, width]  # in pixels of the photo
    assert y1 - y0 == pytest.approx(x1 - x0, rel=1e-5)  # a square
    scale = 256 / min(width, height)  # the shorter side becomes 256 pixels
    top, left = (height * scale - 224) / 2, (width * scale - 224) / 2
    expected = [top, left, top + 224, left + 224]
    np.testing.assert_allclose(np.array([y0, x0, y1, x1]) * scale, expected, rtol=1e-4, atol=1e-3)


def test_a_share_of_one_reaches_the_borders_of_the_shorter_side():
    boxes = np.asarray(crop_ops.center_boxes(jnp.array([2.0, 0.5, 1.0]), share=1.0))
    expected = [[0, 0.25, 1, 0.75], [0.25, 0, 0.75, 1], [0, 0, 1, 1]]
    np.testing.assert_allclose(boxes, expected, atol=1e-6)
    assert np.asarray(crop_ops.center_boxes(jnp.linspace(0.2, 5, 50), share=1.0)).min() >= 0


def test_the_central_crop_of_a_squashed_photo_has_the_photo_s_proportions():
    # A disc of the photo is an ellipse on the canvas and a disc again in the crop.
    y, x = np.meshgrid((np.arange(64) + 0.5) / 64, (np.arange(64) + 0.5) / 64, indexing="ij")
    aspect = 1.6
    disc = ((y - 0.5) ** 2 + ((x - 0.5) * aspect) ** 2 < 0.3**2).astype(np.float32)
    boxes = crop_ops.center_boxes(jnp.array([aspect]))[:, None]
    crop = np.asarray(crop_ops.crop_and_resize(jnp.array(disc)[None, :, :, None], boxes, 56))[0, 0, ..., 0]
    extents = [crop.max(axis=axis).sum() for axis in (0, 1)]
    expected = 56 * 0.6 / 0.875
    np.testing.assert_allclose(extents, expected, atol=1.5)
