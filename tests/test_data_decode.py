"""Photos of every kind -> canvas; the references are PIL's own transforms and closed forms."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from salcl_jax.data import decode as d


def picture(height: int = 48, width: int = 64) -> np.ndarray:
    """Smooth and without symmetry, so that a wrong turn or channel order shows."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [255 * x / width, 255 * y / height, 127 + 120 * np.cos(7 * x / width + 3 * y / height)]
    return np.stack(planes, -1).astype(np.uint8)


def encode(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(encoded: bytes, canvas: int = 16, **limits) -> np.ndarray:
    return np.asarray(d.decode(encoded, canvas, **limits).image)


def test_jpeg_equals_a_plain_decode_when_no_scaling_applies():
    encoded = encode(Image.fromarray(picture()), "JPEG", quality=90)
    want = np.asarray(Image.open(io.BytesIO(encoded)))
    np.testing.assert_array_equal(pixels(encoded, canvas=48), want)


def test_large_jpeg_is_decoded_small_but_not_below_the_canvas():
    encoded = encode(Image.fromarray(picture(800, 1203)), "JPEG", quality=95)
    photo = d.decode(encoded, 96)
    assert photo.image.size == (151, 100)  # one eighth
    assert (photo.width, photo.height) == (1203, 800)
    assert d.decode(encoded, 101).image.size == (301, 200)
    canvas, aspect = d.to_canvas(photo, d.WHOLE, 96)
    whole = Image.fromarray(picture(800, 1203)).resize((96, 96), Image.Resampling.BOX)
    assert np.abs(canvas.astype(int) - np.asarray(whole)).mean() < 2
    assert aspect == pytest.approx(1203 / 800)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_grey_becomes_three_equal_channels(form):
    grey = picture()[..., 0]
    got = pixels(encode(Image.fromarray(grey), form), 48)
    assert got.shape == (48, 64, 3)
    assert np.abs(got.astype(int) - grey[..., None]).max() <= 4
    np.testing.assert_array_equal(got[..., 0], got[..., 2])


def test_cmyk_jpeg_has_its_true_colours():
    rgb = np.zeros((32, 32, 3), np.uint8)
    rgb[:, :16], rgb[:, 16:] = (200, 30, 40), (20, 40, 210)
    got = pixels(encode(Image.fromarray(rgb).convert("CMYK"), "JPEG", quality=95), 32)
    assert np.abs(got[8, 4].astype(int) - (200, 30, 40)).max() < 12
    assert np.abs(got[8, 28].astype(int) - (20, 40, 210)).max() < 12


def test_sixteen_bit_png_is_scaled_not_clipped():
    wide = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    got = pixels(encode(Image.fromarray(wide), "PNG"))
    np.testing.assert_allclose(got[..., 1], wide / 257, atol=0.51)


def test_transparent_pixels_are_white_and_palettes_are_looked_up():
    rgba = np.dstack([picture(), np.zeros((48, 64), np.uint8)])
    rgba[:, 32:, 3] = 255
    got = pixels(encode(Image.fromarray(rgba, "RGBA"), "PNG"))
    assert (got[:, :32] == 255).all()
    np.testing.assert_array_equal(got[:, 32:], picture()[:, 32:])
    flat = np.repeat(np.array([[250, 0, 10], [5, 200, 90]], np.uint8), 24, 0)[:, None]
    flat = np.broadcast_to(flat, (48, 40, 3))
    palette = Image.fromarray(np.ascontiguousarray(flat)).quantize(4)
    np.testing.assert_array_equal(pixels(encode(palette, "PNG")), flat)
    see_through = encode(palette, "PNG", transparency=palette.getpixel((0, 0)))
    assert (pixels(see_through)[0] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientations_equal_exif_transpose(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = encode(Image.fromarray(picture()), "JPEG", exif=exif, quality=90)
    want = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))))
    photo = d.decode(encoded, 48)
    np.testing.assert_array_equal(np.asarray(photo.image), want)
    assert (photo.height, photo.width) == want.shape[:2]


def broken(kind: str) -> bytes:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8))
    if kind == "text":
        return b"<html>404 Not Found</html>" * 9
    if kind == "empty":
        return b""
    encoded = encode(image, "JPEG" if kind == "jpeg" else "PNG")
    return encoded[: len(encoded) // 2]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("jpeg", "truncated"), ("png", "truncated"), ("text", "not_image"), ("empty", "not_image")],
)
def test_broken_files_are_skipped_with_their_reason(kind, reason):
    for canvas in (16, 200):  # a scaled decode must notice it too
        with pytest.raises(d.SkipImage) as caught:
            d.decode(broken(kind), canvas)
        assert caught.value.reason == reason and reason in d.REASONS


def test_damaged_header_bytes_never_escape_as_another_error():
    rng = np.random.default_rng(1)
    good = np.frombuffer(encode(Image.fromarray(picture()), "PNG"), np.uint8)
    for _ in range(60):
        bad = good.copy()
        bad[rng.integers(8, len(bad), 6)] = rng.integers(0, 256, 6)
        try:
            d.decode(bad.tobytes(), 16, max_pixels=10**6)
        except d.SkipImage as error:
            assert error.reason in d.REASONS


def test_size_limits_look_at_the_header_only():
    tiny = encode(Image.fromarray(picture(20, 20)), "PNG")
    with pytest.raises(d.SkipImage, match="too_small"):
        d.decode(tiny, 16, min_side=32)
    assert d.decode(tiny, 16, min_side=20).width == 20
    huge = encode(Image.new("1", (30000, 2500)), "PNG")
    bomb = encode(Image.new("1", (30000, 12000)), "PNG")  # beyond PIL's own limit
    for encoded in (huge, bomb):
        with pytest.raises(d.SkipImage, match="too_large"):
            d.decode(encoded, 16, max_pixels=10**7)


def test_window_is_cut_where_it_says_and_reports_its_aspect():
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (100, 200, 3))
    photo = d.from_array(np.ascontiguousarray(ramp))
    canvas, aspect = d.to_canvas(photo, (0.25, 0.5, 0.75, 0.75), 25)
    assert aspect == pytest.approx(50 / 50)
    centres = 100 + (np.arange(25) + 0.5) * 2 - 0.5  # of the canvas columns, in photo columns
    np.testing.assert_allclose(canvas[12, 1:-1, 0], centres[1:-1], atol=1)


def test_downscaling_averages_instead_of_picking_pixels():
    board = (np.indices((96, 96)).sum(0) % 2 * 255).astype(np.uint8)
    canvas, _ = d.to_canvas(d.from_array(np.dstack([board] * 3)), d.WHOLE, 12)
    assert np.abs(canvas.astype(int) - 127).max() < 6


def test_canvas_sized_array_passes_untouched():
    image = picture(32, 32)
    np.testing.assert_array_equal(d.to_canvas(d.from_array(image), d.WHOLE, 32)[0], image)
