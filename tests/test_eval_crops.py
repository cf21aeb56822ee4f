"""What pairs of crops show, counted box by box in plain Python."""

import numpy as np
import pytest

from salcl_jax.evaluators import crops


def area(y0, x0, y1, x1):
    return max(0.0, y1 - y0) * max(0.0, x1 - x0)


def by_hand(pair, boxes):
    held, taken = 0.0, 0.0
    for box in boxes:
        if area(*box) == 0:
            continue
        shared = [area(*np.maximum(w[:2], box[:2]), *np.minimum(w[2:], box[2:])) for w in pair]
        held = max(held, min(s / area(*box) for s in shared))
        taken = max(taken, min(s / area(*w) for s, w in zip(shared, pair, strict=True)))
    return float(held >= 0.5), float(held >= 0.1), taken


def drawn(rng, *shape):
    start = rng.uniform(0, 0.6, (*shape, 2))
    return np.concatenate([start, start + rng.uniform(0.2, 0.4, (*shape, 2))], -1)


def test_scores_against_a_loop():
    rng = np.random.default_rng(0)
    windows, boxes = drawn(rng, 20, 3, 2), drawn(rng, 20, 4)
    boxes[:, 3] = 0  # padding
    found = crops.scores(windows, boxes)
    for i in range(20):
        for j in range(3):
            expected = by_hand(windows[i, j], boxes[i])
            assert [found[n][i, j] for n in ("shared", "touched", "share")] == pytest.approx(expected)
    assert 0 < found["shared"].mean() < found["touched"].mean() < 1


def test_both_crops_must_show_the_same_object():
    boxes = np.array([[[0, 0, 0.2, 0.2], [0.8, 0.8, 1, 1]]])
    apart, whole = boxes[:, None], np.tile(np.array([0.0, 0, 1, 1]), (1, 1, 2, 1))
    assert [v.item() for v in crops.scores(apart, boxes).values()] == [0, 0, 0]
    assert [v.item() for v in crops.scores(whole, boxes).values()] == pytest.approx([1, 1, 0.04])


def test_padding_difficult_boxes_and_photos_without_boxes_do_not_count():
    box, none = [[0.1, 0.1, 0.5, 0.5]], [[0, 0, 0, 0]]
    batch = {
        "image": np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8),
        "boxes": np.array([box, none, box, box, box], np.float32), "aspect": np.ones(5, np.float32),
        "difficult": np.array([[0], [0], [1], [0], [0]], bool), "mask": np.array([1, 1, 1, 0, 1], bool),
    }  # fmt: skip
    seen = []

    def windows(number, images, boxes, aspect):
        assert number == 0
        seen.append(images[:, 0, 0, 0].tolist())
        inside = np.tile(np.array(box[0]), (5, 2, 2, 1))
        away = inside + 0.45
        own = np.where(np.arange(5)[:, None, None, None] == 4, inside, away)  # the last photo's only
        own[0, 0] = inside[0, 0]
        return {"": own, "random": away}

    figures = crops.evaluate(windows, [batch])
    assert batch["mask"].tolist() == [True, True, True, False, True]
    assert seen == [[0, 1, 2, 4, 4]]  # another photo in the place of padding
    assert figures["crops/shared"] == pytest.approx(3 / 4)  # two draws of two photos
    assert figures["crops/chance/shared_random"] == 0
    with pytest.raises(ValueError, match="no image has a ground-truth box"):
        crops.evaluate(windows, [batch | {"boxes": np.zeros((5, 1, 4), np.float32)}])
