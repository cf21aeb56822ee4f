"""Columns of features: which examples and boxes they come from, each exactly once."""

import numpy as np
import pytest

from salcl_jax.evaluators import features

SIDE = 8


def box_and_sum(images, boxes):
    """The box itself and the sum of the pixels as features, so that rows can be traced."""
    total = images.reshape(len(images), -1).sum(-1).astype(np.float32)
    total = np.repeat(total[:, None, None], boxes.shape[1], axis=1)
    return {"pooled": np.concatenate([boxes, total], -1), "stage1": -boxes}


def batch(numbers, **fields):
    """Images whose pixels add up to number * 192."""
    images = np.stack([np.full((SIDE, SIDE, 3), n, np.uint8) for n in numbers])
    known = {"id": np.int32(numbers), "aspect": np.ones(len(numbers), np.float32)}
    return {"image": images, **known, **fields}


def labelled_batches():
    """Five photos in batches of three; the last is padding, the third is unlabelled."""
    yield batch([1, 2, 3], label=np.int32([0, 1, -1]), mask=np.array([True, True, True]))
    yield batch([4, 5, 0], label=np.int32([2, 0, -1]), mask=np.array([True, True, False]))


def test_every_real_image_has_one_row():
    found = features.columns(box_and_sum, labelled_batches(), on="image")
    np.testing.assert_array_equal(found["pooled"][:, 4], np.arange(1, 6) * SIDE * SIDE * 3)
    np.testing.assert_array_equal(found["pooled"][:, :4], np.tile([0, 0, 1, 1], (5, 1)))
    np.testing.assert_array_equal(found["id"], [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(found["label"], [0, 1, -1, 2, 0])
    assert found["stage1"].shape == (5, 4)


def test_labelled_leaves_out_what_has_no_label():
    table = features.columns(box_and_sum, labelled_batches(), on="image")
    values, labels = features.labelled(table)
    np.testing.assert_array_equal(labels, [0, 1, 2, 0])
    np.testing.assert_array_equal(values[:, 4] / 192, [1, 2, 4, 5])
    assert features.labelled(table, "stage1")[0].shape == (4, 4)


def test_the_central_view_is_the_central_square_of_the_photo():
    wide = batch([1, 2], aspect=np.float32([2.0, 0.5]))
    found = features.columns(box_and_sum, [wide], on="image", view="center")["pooled"][:, :4]
    # 0.875 of the short side: half as much, in canvas units, along the long one.
    np.testing.assert_allclose(
        found, [[0.0625, 0.28125, 0.9375, 0.71875], [0.28125, 0.0625, 0.71875, 0.9375]], atol=1e-6
    )


def object_batches():
    boxes = np.zeros((2, 3, 4), np.float32)
    boxes[0, 0], boxes[0, 1] = (0.4, 0.4, 0.6, 0.6), (0.0, 0.5, 0.5, 1.0)
    boxes[1, 0] = (0.1, 0.1, 0.2, 0.3)
    classes = np.int32([[7, 3, -1], [5, -1, -1]])
    yield batch([1, 2], boxes=boxes, classes=classes, mask=np.array([True, True]))
    yield batch([3, 0], boxes=boxes, classes=classes, mask=np.array([True, False]))


def test_every_real_object_has_one_row():
    found = features.columns(box_and_sum, object_batches(), on="object")
    np.testing.assert_array_equal(found["label"], [7, 3, 5, 7, 3])
    np.testing.assert_array_equal(found["pooled"][:, 4] / 192, [1, 1, 2, 3, 3])
    # 0.2 of the side at each end, cut at the canvas.
    np.testing.assert_allclose(found["pooled"][0, :4], [0.36, 0.36, 0.64, 0.64], atol=1e-6)
    np.testing.assert_allclose(found["pooled"][1, :4], [0.0, 0.4, 0.6, 1.0], atol=1e-6)


def test_padding_of_boxes_is_hardly_computed():
    widths = []

    def counted(images, boxes):
        widths.append(boxes.shape[1])
        return box_and_sum(images, boxes)

    def batches():
        for last in (None, 0, 2, 8):  # place of the last real box, of 16
            boxes, classes = np.zeros((1, 16, 4), np.float32), np.full((1, 16), -1, np.int32)
            if last is not None:
                boxes[0, last], classes[0, last] = (0.2, 0.2, 0.4, 0.4), last
            yield batch([7], boxes=boxes, classes=classes)

    found = features.columns(counted, batches(), on="object")
    assert widths == [1, 1, 4, 16]
    np.testing.assert_array_equal(found["label"], [0, 2, 8])


def test_the_classes_of_an_image_come_along():
    found = features.columns(box_and_sum, object_batches(), on="image")
    np.testing.assert_array_equal(found["classes"], [[7, 3, -1], [5, -1, -1], [7, 3, -1]])


@pytest.mark.parametrize(
    "batches, how, words",
    [
        (lambda: [batch([1])], {"on": "object"}, "'boxes'"),
        (lambda: [batch([1])], {"on": "pixel"}, "on='pixel'"),
        (lambda: [batch([1])], {"on": "image", "view": "left"}, "view='left'"),
        (lambda: [batch([1], mask=np.array([False]))], {"on": "image"}, "no example"),
        (lambda: [], {"on": "image"}, "no example"),
    ],
)
def test_data_that_does_not_suit_is_refused(batches, how, words):
    with pytest.raises(ValueError, match=words):
        features.columns(box_and_sum, batches(), **how)


def test_no_labels_are_refused():
    with pytest.raises(ValueError, match="no labels"):
        features.labelled({"pooled": np.zeros((2, 3))})
    with pytest.raises(ValueError, match="no example is labelled"):
        features.labelled({"pooled": np.zeros((2, 3)), "label": np.int32([-1, -1])})


def test_a_feature_function_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="feature_fn gave"):
        features.columns(lambda images, boxes: {"pooled": boxes[:, 0]}, [batch([1, 2])], on="image")
