"""Regions that know nothing of the image: what the scores of a map's regions are held against."""

import numpy as np

from salcl_jax.types import Rois

CENTRAL_BOX = (0.15, 0.15, 0.85, 0.85)  # about half of the canvas: the usual centre prior
WHOLE_CANVAS = (0.0, 0.0, 1.0, 1.0)
DRAWS = 10  # random sets of regions an image, to average over
SIDES = (0.15, 0.9)  # range of a random box's height and width
_SEED = 20230223


def random_rois(index: np.ndarray, count: int) -> Rois:
    """DRAWS sets of `count` random boxes for each image: Rois of [n * DRAWS, count], images first.

    Height and width are uniform in SIDES, the place is uniform on the canvas. index [n]: position of
    an image in its set; its boxes follow from that alone, whatever the batches.
    """
    draws = np.stack([_uniform(int(number), count) for number in index])
    draws = draws.reshape(len(index) * DRAWS, count, 4)
    size = SIDES[0] + (SIDES[1] - SIDES[0]) * draws[..., :2]
    start = (1 - size) * draws[..., 2:]
    return _valid(np.concatenate([start, start + size], -1))


def fixed_rois(box: tuple[float, float, float, float], n: int) -> Rois:
    """The same single box for each of n images: Rois of [n, 1]."""
    return _valid(np.tile(np.float64(box), (n, 1, 1)))


def _uniform(number: int, count: int) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(key=[_SEED, number]))
    return generator.random((DRAWS, count, 4))


def _valid(boxes: np.ndarray) -> Rois:
    return Rois(boxes, np.ones(boxes.shape[:2], bool), np.ones(boxes.shape[:2], np.float32))
