"""Chance levels against brute force, and columns of single images."""

import numpy as np
import pytest

from salcl_jax.evaluators import chance
from salcl_jax.evaluators import localization as loc
from salcl_jax.types import Rois


def overlap(a, b):
    """Intersection over union of two boxes, number by number."""
    height = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    width = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return height * width / (sum(area) - height * width)


def scene(n=7, r=3, seed=0):
    rng = np.random.default_rng(seed)
    corners = [np.sort(rng.random((n, count, 2, 2)), axis=2).reshape(n, count, 4) for count in (r, 4)]
    score = rng.random((n, r), dtype=np.float32)
    rois = Rois(corners[0].astype(np.float32), rng.random((n, r)) < 0.8, score)
    boxes = corners[1].astype(np.float32)
    boxes[:, 2:] *= rng.random((n, 2, 1)) < 0.5
    boxes[2] = 0
    maps = rng.random((n, 5, 5), dtype=np.float32)
    image = np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1) * np.ones((1, 2, 2, 3), np.uint8)

    def maps_fn(images):
        index = images[:, 0, 0, 0]
        return maps[index], Rois(*(x[index] for x in rois))

    masks = rng.choice(np.array([0, 1, 255], np.uint8), (n, 8, 8))
    return maps_fn, {"image": image, "boxes": boxes, "masks": masks, "mask": np.ones(n, bool)}


def test_random_boxes_are_as_said():
    rois = chance.random_rois(np.arange(500), 4)
    assert rois.boxes.shape == (500 * chance.DRAWS, 4, 4) and rois.valid.all()
    sides = rois.boxes[..., 2:] - rois.boxes[..., :2]
    free = 1 - sides
    places = rois.boxes[..., :2] / free
    for values, low, high in ((sides, 0.15, 0.9), (places, 0.0, 1.0)):
        assert values.min() >= low - 1e-12 and values.max() <= high + 1e-12
        reached = np.quantile(values.reshape(-1, 2), [0.25, 0.5, 0.75], axis=0)
        expected = low + (high - low) * np.array([0.25, 0.5, 0.75])
        np.testing.assert_allclose(reached, np.stack([expected] * 2, -1), atol=0.01)
    together = np.corrcoef(np.concatenate([sides, places], -1).reshape(-1, 4).T)
    assert np.abs(together - np.eye(4)).max() < 0.03


def test_random_boxes_follow_from_the_index_alone():
    whole = chance.random_rois(np.array([5, 9, 2]), 3).boxes
    single = chance.random_rois(np.array([9]), 3).boxes
    np.testing.assert_array_equal(whole[chance.DRAWS : 2 * chance.DRAWS], single)
    assert len(np.unique(whole[..., 0])) == whole[..., 0].size  # no draw and no image repeats another


def test_chance_of_random_boxes_by_brute_force():
    rng = np.random.default_rng(0)
    truth = np.array([(0.2, 0.1, 0.8, 0.7), (0.5, 0.5, 0.9, 1.0)])
    best, cover, recall, top = [], [], [], []
    for _ in range(5000):
        drawn = []
        for _ in range(2):
            size = rng.uniform(0.15, 0.9, 2)
            y, x = rng.uniform(0, 1 - size)
            drawn.append((y, x, y + size[0], x + size[1]))
        table = np.array([[overlap(a, b) for b in truth] for a in drawn])
        best.append(table.max())
        cover.append(table.max(0).mean())
        recall.append((table.max(0) >= 0.5).mean())
        top.append(table[0].max() >= 0.5)
    n = 1000
    boxes = np.broadcast_to(truth.astype(np.float32), (n, 2, 4))
    found = {name: values.mean() for name, values in loc.chance_scores(np.arange(n), boxes, 2).items()}
    for name, values in (("best_iou", best), ("coverage", cover), ("recall@0.5", recall), ("corloc", top)):
        # Both are means of thousands of draws.
        assert found[f"chance/{name}_random"] == pytest.approx(np.mean(values), abs=0.02), name
    assert found["chance/coverage_random/r2"] == found["chance/coverage_random"]
    assert found["chance/recall@0.5_random/r1"] < found["chance/recall@0.5_random/r2"]


def test_chance_of_fixed_boxes_by_brute_force():
    maps_fn, batch = scene()
    found = loc.evaluate(maps_fn, [batch])
    for kind, box in (("center", (0.15, 0.15, 0.85, 0.85)), ("whole", (0, 0, 1, 1))):
        rows = [[overlap(box, own) for own in boxes if own.any()] for boxes in batch["boxes"]]
        rows = [row for row in rows if row]
        expected = {
            "best_iou": np.mean([max(row) for row in rows]),
            "coverage": np.mean([np.mean(row) for row in rows]),
            "corloc": np.mean([max(row) >= 0.5 for row in rows]),
            "recall@0.5": np.mean([np.mean(np.array(row) >= 0.5) for row in rows]),
        }
        for name, value in expected.items():
            assert found[f"localization/chance/{name}_{kind}"] == pytest.approx(value, abs=1e-6), name


def test_columns_are_of_single_images():
    maps_fn, batch = scene()
    rows = loc.collect(maps_fn, [batch])
    maps, rois = maps_fn(batch["image"])
    np.testing.assert_array_equal(rows["index"], np.arange(7))
    np.testing.assert_array_equal(rows["id"], np.arange(7))
    numbers = np.array([4, 8, 15, 16, 23, 42, 99], np.int32)
    np.testing.assert_array_equal(loc.collect(maps_fn, [{**batch, "id": numbers}])["id"], numbers)
    np.testing.assert_array_equal(rows["boxes"], (batch["boxes"][..., 2] > 0).sum(-1))
    for i in range(7):
        real = [box for box in batch["boxes"][i] if box.any()]
        valid = [box for box, use in zip(rois.boxes[i], rois.valid[i], strict=True) if use]
        table = np.array([[overlap(a, b) for b in real] for a in valid]).reshape(len(valid), len(real))
        if not real:
            assert np.isnan(rows["best_iou"][i]) and np.isnan(rows["chance/corloc_random"][i])
            continue
        assert rows["best_iou"][i] == pytest.approx(table.max(initial=0), abs=1e-6)
        cover = table.max(0, initial=0).mean()
        assert rows["coverage"][i] == pytest.approx(cover, abs=1e-6)
        assert rows["pointing"][i] in (0, 1)
    assert np.isnan(rows["best_iou"]).sum() == 1  # the image without boxes keeps its mask's score
    assert not np.isnan(rows["mask_ap"][2])


def cut(batch, sizes):
    start = 0
    for size in sizes:
        yield {name: x[start : start + size] for name, x in batch.items()}
        start += size


@pytest.mark.parametrize("sizes", [(1,) * 7, (3, 3, 1), (2, 5)])
def test_figures_do_not_depend_on_the_batches(sizes):
    maps_fn, batch = scene()
    whole, parts = loc.evaluate(maps_fn, [batch]), loc.evaluate(maps_fn, cut(batch, sizes))
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-12), name


def test_padding_counts_nowhere():
    maps_fn, batch = scene()
    where = [0, 0, 1, 2, 3, 0, 4, 5, 6, 0, 0]  # the real images in order, others between and after them
    mask = np.array([0, 1, 1, 1, 1, 0, 1, 1, 1, 0, 0], bool)
    padded = {name: x[where] for name, x in batch.items()} | {"mask": mask}
    padded["boxes"][~mask] = (0.1, 0.1, 0.9, 0.9)
    expected, found = loc.collect(maps_fn, [batch]), loc.collect(maps_fn, cut(padded, (4, 5, 2)))
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-12, err_msg=name)


def test_batches_with_and_without_masks_mix():
    maps_fn, batch = scene()
    first, second = cut(batch, (3, 4))
    second.pop("masks")
    found = loc.evaluate(maps_fn, [first, second])
    known = loc.collect(maps_fn, [batch])["mask_ap"][:3]
    assert found["localization/images_with_masks"] == 3
    assert found["localization/mask_ap"] == pytest.approx(known.mean())
