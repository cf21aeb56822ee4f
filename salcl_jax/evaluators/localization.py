"""How well saliency maps and ROIs find the annotated objects, with chance levels beside them.

Every score is computed per image first and averaged last, over the images that have boxes (masks:
that have object and background). A ground-truth box without area is padding; one that is marked difficult
does not count.
"""

from collections.abc import Callable, Iterable

import numpy as np

from salcl_jax.evaluators import chance, map_masks
from salcl_jax.types import HostBatch, Rois

MATCH = 0.5  # intersection over union from which two boxes count as the same


def evaluate(maps_fn: Callable, batches: Iterable[HostBatch]) -> dict[str, float]:
    """Localisation scores over all images with ground truth, named 'localization/...'.

    maps_fn(images uint8 [n, s, s, 3]) returns (maps [n, h, w] in [0, 1], Rois) as numpy arrays; a
    batch needs 'boxes' [n, k, 4] and may have 'masks' uint8 [n, t, t] (0 background, 255 unknown,
    the rest objects), 'difficult' [n, k], boxes that do not count, and 'mask' [n], False for padding
    examples, in whose place maps_fn sees others of the batch. 'recall@0.5/r<r>' and
    'coverage/r<r>' are those of the r valid ROIs of highest score, without '/r<r>' of all.
    Images without boxes are only counted, but for their mask. 'inside_ratio' is NaN where all is
    dark outside the boxes, or no image has both sides. Raises ValueError where a batch has no boxes
    or no image of any batch has one.
    """
    return summarise(collect(maps_fn, batches))


def collect(
    maps_fn: Callable, batches: Iterable[HostBatch], drawn: list[tuple[np.ndarray, Rois]] | None = None
) -> dict[str, np.ndarray]:
    """Scores of each image as columns [n], NaN where it has none; arguments as for `evaluate`.

    'index' is an image's position in the set, padding examples not counted, 'id' its number in the
    source where the batch has 'id' (else the index), 'boxes' how many count. The (maps, Rois) of each
    batch's images are appended to `drawn`.
    """
    parts, seen = [], 0
    for batch in batches:
        if "boxes" not in batch:
            raise ValueError("localization: the batch has no 'boxes'; use a source that has them")
        keep = np.asarray(batch.get("mask", np.ones(len(batch["boxes"]), bool)), bool)
        if not keep.any():
            continue
        maps, rois = maps_fn(batch["image"][filled(keep)])
        maps, rois = np.asarray(maps)[keep], Rois(*(np.asarray(x)[keep] for x in rois))
        if drawn is not None:
            drawn.append((maps, rois))
        boxes = counted(batch)[keep]
        index = seen + np.arange(len(boxes))
        seen += len(boxes)
        part = per_image(maps, rois, boxes, index)
        part |= map_masks.scores(maps, batch["masks"][keep] if "masks" in batch else None)
        which = {"index": index, "id": batch["id"][keep] if "id" in batch else index}
        parts.append({**which, "boxes": real_boxes(boxes).sum(-1), **part})
    if not any(part["boxes"].any() for part in parts):
        raise ValueError("localization: no image has a ground-truth box; check the data")
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def filled(keep: np.ndarray) -> np.ndarray:
    """Rows [n] of a batch with other real examples in the place of padding; keep [n]: True for real ones.

    A map may depend on the other images of its batch, and BatchNorm too. Needs one real example.
    """
    rows, good = np.arange(len(keep)), np.flatnonzero(keep)
    return np.where(keep, rows, good[rows % len(good)])


def counted(batch: HostBatch) -> np.ndarray:
    """Boxes [n, k, 4] of a batch that scores count: zero rows where one is difficult."""
    if "difficult" not in batch:
        return batch["boxes"]
    return np.where(batch["difficult"][:, :, None], np.float32(0), batch["boxes"])


def summarise(columns: dict[str, np.ndarray]) -> dict[str, float]:
    """Means of the columns of `collect`: what `evaluate` returns.

    Scores against masks are left out where no image has a mask with object and background.
    """
    masked = int(np.sum(~np.isnan(columns["mask_ap"])))
    aside = ("index", "id", "boxes", "inside", "outside", *(() if masked else map_masks.NAMES))
    result = {name: _mean(values) for name, values in columns.items() if name not in aside}
    # Not the mean of ratios: one image that is dark outside its boxes would decide that.
    inside, outside = _mean(columns["inside"]), _mean(columns["outside"])
    result["inside_ratio"] = inside / outside if outside else float("nan")
    result["images"] = float(np.sum(columns["boxes"] > 0))
    result["images_without_boxes"] = float(np.sum(columns["boxes"] == 0))
    if masked:
        result["images_with_masks"] = float(masked)
    return {f"localization/{name}": value for name, value in result.items()}


def per_image(
    maps: np.ndarray, rois: Rois, boxes: np.ndarray, index: np.ndarray
) -> dict[str, np.ndarray]:
    """Scores [n] of each image against boxes [n, k, 4], NaN where it has none.

    maps [n, h, w]; rois of [n, r]; index [n]: positions in the set, which fix the random boxes of
    chance. 'inside' and 'outside' are the mean saliency there, both NaN where the boxes cover all.
    """
    inside, outside, area = saliency_means(maps, boxes)
    centre = np.full((len(boxes), 1, 2), 0.5)
    result = {
        "pointing": pointing(maps, boxes),
        **region_scores(rois, boxes),
        "inside": inside,
        "outside": outside,
        "chance/pointing_center": _inside(centre, boxes)[:, 0].astype(float),
        "chance/pointing_random": area,
        **chance_scores(index, boxes, rois.boxes.shape[1]),
    }
    known = real_boxes(boxes).any(-1)
    return {name: np.where(known, values, np.nan) for name, values in result.items()}


def region_scores(rois: Rois, boxes: np.ndarray) -> dict[str, np.ndarray]:
    """Scores [n] of ROIs of [n, r] against boxes [n, k, 4]: of all, and of the best r for every r."""
    found, cover = recall_at(rois, boxes), coverage_at(rois, boxes)
    result = {"corloc": corloc(rois, boxes), "best_iou": best_iou(rois, boxes)}
    result |= {"recall@0.5": found[:, -1], "coverage": cover[:, -1]}
    for r in range(found.shape[1]):
        result |= {f"recall@0.5/r{r + 1}": found[:, r], f"coverage/r{r + 1}": cover[:, r]}
    return result


def chance_scores(index: np.ndarray, boxes: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """What `region_scores` gives for `count` random boxes an image, the central box and the canvas.

    Names: 'chance/<score>_random', also at r ('chance/coverage_random/r2'); '_center' and '_whole',
    which are one box, without. Random boxes: the mean over chance.DRAWS sets.
    """
    result, repeated = {}, np.repeat(boxes, chance.DRAWS, axis=0)
    for name, values in region_scores(chance.random_rois(index, count), repeated).items():
        name, slash, r = name.partition("/")
        result[f"chance/{name}_random{slash}{r}"] = values.reshape(-1, chance.DRAWS).mean(-1)
    for kind, box in (("center", chance.CENTRAL_BOX), ("whole", chance.WHOLE_CANVAS)):
        for name, values in region_scores(chance.fixed_rois(box, len(boxes)), boxes).items():
            if "/" not in name:
                result[f"chance/{name}_{kind}"] = values
    return result


def pointing(maps: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """1 where the centre of the map's largest cell lies in a box (edges belong to it), else 0.

    The pointing game (Zhang et al. 2016, arXiv 1608.00507) with no tolerance. Among equal largest
    cells: the share that hits, the expected value of picking one at random.
    """
    n, h, w = maps.shape
    y, x = np.meshgrid((np.arange(h) + 0.5) / h, (np.arange(w) + 0.5) / w, indexing="ij")
    centres = np.tile(np.stack([y, x], -1).reshape(1, h * w, 2), (n, 1, 1))
    largest = maps.reshape(n, -1) == maps.reshape(n, -1).max(-1, keepdims=True)
    return np.sum(largest & _inside(centres, boxes), -1) / largest.sum(-1)


def corloc(rois: Rois, boxes: np.ndarray) -> np.ndarray:
    """1 where the valid ROI of highest score (the first of equals) matches a box, else 0 [n]."""
    top = np.where(rois.valid, rois.score, -np.inf).argmax(-1)
    matched = _matches(iou(rois.boxes, boxes), boxes) & np.asarray(rois.valid, bool)
    return matched[np.arange(len(top)), top].astype(float)


def best_iou(rois: Rois, boxes: np.ndarray) -> np.ndarray:
    """Largest intersection over union of any valid ROI with any box [n]; 0 without valid ROI."""
    return _valid_iou(rois, boxes).max((-2, -1), initial=0.0)


def recall(rois: Rois, boxes: np.ndarray) -> np.ndarray:
    """Share of the ground-truth boxes that some valid ROI matches [n]; NaN without boxes."""
    return recall_at(rois, boxes)[:, -1]


def recall_at(rois: Rois, boxes: np.ndarray) -> np.ndarray:
    """Share of the boxes matched by one of the r valid ROIs of highest score, [n, r]."""
    return _mean_over_boxes(_best_so_far(rois, boxes) >= MATCH, boxes)


def coverage_at(rois: Rois, boxes: np.ndarray) -> np.ndarray:
    """Mean over the boxes of the best intersection over union with the r best valid ROIs, [n, r]."""
    return _mean_over_boxes(_best_so_far(rois, boxes), boxes)


def saliency_means(
    maps: np.ndarray, boxes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean saliency inside and outside the union of the boxes, and the union's area [n] each.

    The map is constant over each of its cells; a cell counts by the area the union covers of it,
    exactly. Both means are NaN where the union is empty or covers the canvas.
    """
    cell = 1.0 / (maps.shape[1] * maps.shape[2])
    covered = np.stack([union_cover(own, maps.shape[1:]) for own in boxes])
    area = covered.sum((-2, -1))
    maps = maps.astype(np.float64)
    mixed = (area > 1e-9) & (area < 1 - 1e-9)
    inside = np.sum(maps * covered, (-2, -1)) / np.where(mixed, area, np.nan)
    outside = np.sum(maps * (cell - covered), (-2, -1)) / np.where(mixed, 1 - area, np.nan)
    return inside, outside, area


def union_cover(boxes: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Area of the union of boxes [k, 4] within each cell of an h x w grid on the canvas [h, w]."""
    boxes = np.clip(boxes[real_boxes(boxes)].astype(np.float64), 0.0, 1.0)
    # The edges of cells and boxes together cut the canvas into rectangles wholly in or out.
    share, member = zip(*(_cuts(boxes[:, axis::2], shape[axis]) for axis in (0, 1)), strict=True)
    covered = (member[0] @ member[1].T > 0).astype(np.float64)
    return share[0] @ covered @ share[1].T


def iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes [n, r, 4] with boxes [n, k, 4]: [n, r, k]."""
    a, b = (np.asarray(x, np.float64) for x in (first[:, :, None], second[:, None]))
    overlap = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    shared = np.prod(np.maximum(overlap, 0.0), -1)
    total = sum(np.prod(np.maximum(x[..., 2:] - x[..., :2], 0.0), -1) for x in (a, b)) - shared
    return shared / np.where(total > 0, total, 1.0)


def real_boxes(boxes: np.ndarray) -> np.ndarray:
    """Which boxes [..., 4] have an area; the rest is padding."""
    return np.all(boxes[..., 2:] > boxes[..., :2], axis=-1)


def _valid_iou(rois: Rois, boxes: np.ndarray) -> np.ndarray:
    counts = np.asarray(rois.valid, bool)[:, :, None] & real_boxes(boxes)[:, None, :]
    return np.where(counts, iou(rois.boxes, boxes), 0.0)


def _best_so_far(rois: Rois, boxes: np.ndarray) -> np.ndarray:
    """Best overlap of each box with the r valid ROIs of highest score (the first of equals): [n, r, k]."""
    order = np.argsort(np.where(rois.valid, -rois.score, np.inf), axis=-1, kind="stable")
    ranked = np.take_along_axis(_valid_iou(rois, boxes), order[:, :, None], axis=1)
    return np.maximum.accumulate(ranked, axis=1)


def _mean_over_boxes(values: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Mean over the last axis of [n, r, k], which is 0 for padding; NaN without boxes."""
    count = real_boxes(boxes).sum(-1)[:, None].astype(float)
    return values.sum(-1) / np.where(count > 0, count, np.nan)


def _matches(overlap: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    return np.any((overlap >= MATCH) & real_boxes(boxes)[:, None, :], axis=-1)


def _inside(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Whether points (y, x) [n, q, 2] lie in any real box [n, k, 4]: [n, q]."""
    p, b = points[:, :, None], boxes[:, None]
    hit = np.all((p >= b[..., :2]) & (p <= b[..., 2:]), axis=-1)
    return np.any(hit & real_boxes(b), axis=-1)


def _cuts(ends: np.ndarray, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Length of each cut in each cell [cells, cuts]; whether a cut is in each box [cuts, k]."""
    edges = np.unique(np.concatenate([np.arange(cells + 1) / cells, ends.ravel()]))
    middle = (edges[1:] + edges[:-1]) / 2
    owner = np.minimum((middle * cells).astype(int), cells - 1)
    share = np.zeros((cells, len(middle)))
    share[owner, np.arange(len(middle))] = np.diff(edges)
    member = (middle[:, None] > ends[None, :, 0]) & (middle[:, None] < ends[None, :, 1])
    return share, member.astype(np.float64)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
