"""Encoded photo -> RGB picture -> square uint8 canvas. PIL only: its scaled JPEG decoding and
its antialiased resize beat tf.io on one core, release the GIL, and need no tensorflow."""

import io
from typing import NamedTuple

import numpy as np
from PIL import Image

Image.MAX_IMAGE_PIXELS = None  # data.max_pixels decides, from the header
# Told by content, whatever a file is called. PIL reads more, some by starting other programs (EPS).
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP")
REASONS = ("truncated", "not_image", "too_small", "too_large", "unreadable")
WHOLE = (0.0, 0.0, 1.0, 1.0)
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BACKGROUND = (255, 255, 255)  # what transparent pixels show


class SkipImage(Exception):
    """An image that cannot be used; `reason` is one of REASONS."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class Photo(NamedTuple):
    """An upright RGB picture, maybe decoded at a lower scale, and its true size in pixels."""

    image: Image.Image
    width: int
    height: int


def decode(encoded: bytes, canvas: int, *, min_side: int = 0, max_pixels: int = 0) -> Photo:
    """Decodes a photo of one of FORMATS to upright 8-bit RGB.

    A JPEG is decoded at the smallest of the scales 1, 1/2, 1/4, 1/8 whose sides are all >= canvas
    pixels. Sizes are checked on the header, before any pixel is decoded. max_pixels 0 = no limit.
    Raises SkipImage.
    """
    image = _open(encoded)
    width, height = image.size
    if min(width, height) < max(min_side, 1):
        raise SkipImage("too_small")
    if max_pixels and width * height > max_pixels:
        raise SkipImage("too_large")
    try:
        image.draft("RGB", (canvas, canvas))
        turn = image.getexif().get(_ORIENTATION, 1) if "exif" in image.info else 1
        image.load()
        image = to_rgb(image)
        if turn in _TURNS:
            image = image.transpose(_TURNS[turn])
            width, height = (height, width) if turn >= 5 else (width, height)
    except Exception as error:  # PIL's plugins raise a dozen types on damaged files
        raise SkipImage(_reason(error)) from error
    return Photo(image, width, height)


def _open(encoded: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(encoded), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SkipImage("too_large") from error
    except Exception as error:
        reason = _reason(error)
        raise SkipImage("not_image" if reason == "unreadable" else reason) from error


def _reason(error: Exception) -> str:
    text = str(error).lower()
    if isinstance(error, EOFError) or "truncated" in text or "premature" in text:
        return "truncated"
    return "unreadable"


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode -> RGB: 16-bit grey is scaled (not clipped) to 8 bits, alpha goes on white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        wide = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        flat = Image.new("RGB", image.size, _BACKGROUND)
        flat.paste(image, mask=image.getchannel("A"))
        return flat
    return image.convert("RGB")


def from_array(image: np.ndarray) -> Photo:
    """uint8 [h, w, 3] -> Photo."""
    return Photo(Image.fromarray(image), image.shape[1], image.shape[0])


def to_canvas(
    photo: Photo, window: tuple[float, float, float, float], canvas: int
) -> tuple[np.ndarray, float]:
    """Squashes a window of the photo to the canvas with an antialiased bilinear resize.

    window: (y0, x0, y1, x1) in [0, 1] of the photo. Returns uint8 [canvas, canvas, 3] and the
    window's aspect, width / height in pixels of the photo.
    """
    y0, x0, y1, x1 = window
    image = photo.image
    aspect = (x1 - x0) * photo.width / ((y1 - y0) * photo.height)
    box = (x0 * image.width, y0 * image.height, x1 * image.width, y1 * image.height)
    if image.size != (canvas, canvas) or tuple(window) != WHOLE:
        image = image.resize((canvas, canvas), Image.Resampling.BILINEAR, box=box)
    return np.asarray(image), aspect
