"""Objects from human segmentations without classes, as those of BSDS (Arbelaez et al. 2011).

Several people cut a photo into regions. Of the coarsest cut, regions that are not small and hardly
reach the photo's border are taken for objects; sky, ground and other surroundings run along it.
"""

from collections.abc import Sequence

import numpy as np

from salcl_jax.data.files import PHOTO_BYTES, read_file
from salcl_jax.data.masks import decode
from salcl_jax.data.scenes import mask_boxes

MAX_PIXELS = 2**26  # larger maps are not read
MIN_AREA = 0.01  # of the photo's pixels
MAX_BORDER = 0.05  # of the pixels along the photo's border: an object may stand on its lower edge


def objects(maps: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Label maps uint8 [h, w] of one photo -> boxes, classes, difficult and mask of its objects.

    The map with the fewest regions counts, the first of several. Objects are its regions with at
    least MIN_AREA of all pixels and at most MAX_BORDER of the border's. boxes float32 [k, 4] bound
    them, classes int32 [k] are 0, difficult bool [k] False, mask uint8 [h, w] is 1 inside, else 0.
    """
    chosen = min(maps, key=lambda m: len(np.unique(m)))
    border = np.concatenate([chosen[0], chosen[-1], chosen[1:-1, 0], chosen[1:-1, -1]])
    area = np.bincount(chosen.ravel(), minlength=256) / chosen.size
    along = np.bincount(border, minlength=256) / border.size
    numbers = np.flatnonzero((area >= MIN_AREA) & (along <= MAX_BORDER)).astype(np.uint8)
    inside = chosen[None] == numbers[:, None, None]
    return {
        "boxes": mask_boxes(inside),
        "classes": np.zeros(len(numbers), np.int32),
        "difficult": np.zeros(len(numbers), bool),
        "mask": inside.any(0).astype(np.uint8),
    }


def read(paths: Sequence[str]) -> dict[str, np.ndarray]:
    """`objects` of the files that can be read; no objects and no mask where none can."""
    maps = [found for found in map(_read, paths) if found is not None]
    if maps:
        return objects(maps)
    return {
        "boxes": np.zeros((0, 4), np.float32),
        "classes": np.zeros(0, np.int32),
        "difficult": np.zeros(0, bool),
    }


def _read(path: str) -> np.ndarray | None:
    try:
        return decode(read_file(path, PHOTO_BYTES), MAX_PIXELS)
    except OSError:
        return None
