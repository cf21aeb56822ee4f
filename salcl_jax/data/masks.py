"""Label maps of photos: where they lie, the values of their pixels, their place on the canvas.

A pixel's value is a class or the number of an object; 0 is background, VOID is unknown.
"""

import io
import os
from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL import Image

from salcl_jax.data.decode import FORMATS
from salcl_jax.data.files import PHOTO_BYTES, list_files, read_file, relative

VOID = 255


def find(folder: str, files: Sequence[str], roots: Sequence[str]) -> list[str | None]:
    """Path of each photo's label map, None where it has none.

    It is folder/STEM.png, or has the photo's place below its root: folder/a/STEM.png of a/STEM.jpg.
    Raises FileNotFoundError for a missing folder; ValueError when no photo has a map, when the
    first found is no label map, or when one file would serve two photos.
    """
    pngs = list_files(folder, (".png",), "data.masks")
    maps = {os.path.splitext(relative(path, (folder,)))[0]: path for path in pngs}
    places = [os.path.splitext(relative(path, roots))[0] for path in files]
    found = [maps.get(place) or maps.get(os.path.basename(place)) for place in places]
    first = next((path for path in found if path is not None), None)
    if first is None:
        stem = os.path.basename(places[0]) if places else ""
        raise ValueError(f"{folder}: no label map of any photo, for example {stem}.png; check data.masks")
    path, uses = Counter(path for path in found if path is not None).most_common(1)[0]
    if uses > 1:
        raise ValueError(f"{path}: {uses} photos have this name; put label maps in folders as the photos are")
    _check(first)
    return found


def _check(path: str) -> None:
    try:
        mode = Image.open(io.BytesIO(read_file(path, PHOTO_BYTES)), formats=FORMATS).mode
    except Exception:  # a damaged file counts as unknown where it is read
        return
    if mode not in ("1", "L", "P") and not mode.startswith("I"):
        raise ValueError(f"{path}: {mode} pixels are no label map; save it as a palette or grey PNG")


def read(path: str) -> dict[str, bytes]:
    """`mask` of an example, or nothing where the file went or may not be read."""
    try:
        return {"mask": read_file(path, PHOTO_BYTES)}
    except OSError:
        return {}


def decode(mask: bytes | np.ndarray | None, max_pixels: int = 0) -> np.ndarray | None:
    """Encoded label map, array or nothing -> uint8 [h, w]; None where it cannot be known.

    The numbers as they are stored, a palette's colours are not looked at; above VOID they are VOID. A map
    of more than max_pixels is not decoded; 0 = no limit.
    """
    if mask is None or isinstance(mask, np.ndarray):
        return mask
    try:
        image = Image.open(io.BytesIO(mask), formats=FORMATS)
        if max_pixels and image.width * image.height > max_pixels:
            return None
        values = np.asarray(image)
    except Exception:  # PIL's plugins raise a dozen types on damaged files
        return None
    if values.ndim != 2 or values.dtype.kind not in "bui":
        return None
    return np.where((values < 0) | (values > VOID), VOID, values).astype(np.uint8)


def by_class(mask: np.ndarray | None, classes: np.ndarray | None) -> np.ndarray | None:
    """Map of object numbers 1 .. k -> map of classes + 1, of classes [k]; unchanged without classes."""
    if mask is None or classes is None:
        return mask
    table = np.arange(256).astype(np.uint8)
    known = np.asarray(classes)[:255]  # a byte numbers no more
    table[1 : len(known) + 1] = known + 1
    return table[mask]


def to_canvas(mask: np.ndarray | None, window: tuple[float, float, float, float], canvas: int) -> np.ndarray:
    """Squashes a window of uint8 [h, w] to uint8 [canvas, canvas] by nearest neighbours.

    window: (y0, x0, y1, x1) in [0, 1] of the photo. No mask gives VOID all over.
    """
    if mask is None:
        return np.full((canvas, canvas), VOID, np.uint8)
    y0, x0, y1, x1 = window
    high, wide = mask.shape
    box = (x0 * wide, y0 * high, x1 * wide, y1 * high)
    return np.asarray(Image.fromarray(mask).resize((canvas, canvas), Image.Resampling.NEAREST, box=box))
