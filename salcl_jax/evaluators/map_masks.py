"""How well a saliency map tells object pixels from the rest, against masks of the objects."""

import numpy as np

VOID = 255  # mask value of pixels that belong to neither side
NAMES = ("mask_ap", "chance/mask_ap_random", "chance/mask_ap_center")


def scores(maps: np.ndarray, masks: np.ndarray | None) -> dict[str, np.ndarray]:
    """Average precision [n] of maps [n, h, w] against masks uint8 [n, s, s], with its chance levels.

    A mask is 0 on the background, 255 where unknown (not counted), anything else on objects. The map
    is enlarged to the mask's side. '.../mask_ap_random' is the share of object pixels, the expected
    value for random scores; '.../mask_ap_center' that of a map that falls with the distance from the
    middle, as the usual Gaussian centre prior does (its width does not change the order of pixels).
    NaN where an image lacks object or background, and without masks. A value of a map that is not
    finite counts as 0, the darkest. Raises ValueError where masks are not uint8 squares, one an image.
    """
    rows = np.full((len(maps), len(NAMES)), np.nan)
    if masks is None:
        return dict(zip(NAMES, rows.T, strict=True))
    n, side = len(maps), masks.shape[-1]
    if masks.dtype != np.uint8 or masks.shape != (n, side, side):
        raise ValueError(
            f"localization: masks are {masks.dtype} {list(masks.shape)}; give uint8 [{n}, s, s]"
        )
    maps = np.where(np.isfinite(maps), maps, 0).astype(np.float32)
    centre = _centre_prior(side)
    for i, mask in enumerate(masks):
        known = mask != VOID
        positive = mask[known] > 0
        if positive.any() and not positive.all():
            found = average_precision(enlarge(maps[i], side)[known], positive)
            rows[i] = found, positive.mean(), average_precision(centre[known], positive)
    return dict(zip(NAMES, rows.T, strict=True))


def average_precision(score: np.ndarray, positive: np.ndarray) -> float:
    """Area under the precision-recall steps, not interpolated; equal scores are one threshold.

    score [q], positive bool [q] with at least one True. As average_precision.plain, for many
    pixels: it sorts values instead of indices, which is twice as quick.
    """
    found, every = np.sort(score[positive]), np.sort(score)
    first = np.flatnonzero(np.append(True, found[1:] != found[:-1]))  # of each threshold with a positive
    precision = (len(found) - first) / (len(every) - np.searchsorted(every, found[first]))
    return float(np.diff(first, append=len(found)) @ precision / len(found))


def enlarge(map: np.ndarray, side: int) -> np.ndarray:
    """Bilinear enlargement of a map [h, w] to [side, side]: cell centres keep their value, edges go on."""
    for axis in (0, 1):
        cells = map.shape[axis]
        place = np.clip((np.arange(side) + 0.5) * cells / side - 0.5, 0, cells - 1)
        low = np.minimum(place.astype(int), max(cells - 2, 0))
        high = np.minimum(low + 1, cells - 1)
        share = np.expand_dims((place - low).astype(map.dtype), 1 - axis)
        first = map.take(low, axis)
        # In this form what is flat stays exactly flat, and so one threshold.
        map = first + (map.take(high, axis) - first) * share
    return map


def _centre_prior(side: int) -> np.ndarray:
    """Minus the squared distance from the middle [side, side]; whole numbers, so equal is equal."""
    away = (2 * np.arange(side, dtype=np.int32) + 1 - side) ** 2
    return -(away[:, None] + away[None, :])
