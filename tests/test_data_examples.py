"""Boxes of one example, and which of them are difficult: windows, JSON, tfds records, batches."""

import io
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from salcl_jax.data import sources
from salcl_jax.data.examples import window_boxes
from salcl_jax.data.pipeline import eval_batches, train_batches
from salcl_jax.data.sources import Source


def test_boxes_follow_the_window():
    boxes = np.array(
        [
            [0.5, 0.5, 0.75, 0.75],  # the middle of the window
            [0.0, 0.0, 0.3, 0.3],  # a corner of 1/9 of it inside: dropped
            [0.25, 0.1, 0.75, 0.4],  # its right half inside
            [0.8, 0.8, 0.9, 0.9],  # outside
            [0.5, 0.5, 0.5, 0.6],  # no area
        ],
        np.float32,
    )
    window = (0.2, 0.25, 0.8, 0.85)
    hard = np.array([False, True, True, False, True])
    got, classes, difficult = window_boxes(boxes, np.arange(5), hard, window, 4)
    want = [[0.3 / 0.6, 0.25 / 0.6, 0.55 / 0.6, 0.5 / 0.6], [0.05 / 0.6, 0, 0.55 / 0.6, 0.25]]
    np.testing.assert_allclose(got[:2], want, atol=1e-6)
    assert classes.tolist() == [0, 2, -1, -1] and not got[2:].any()
    assert difficult.tolist() == [False, True, False, False]
    largest, classes, difficult = window_boxes(boxes, np.arange(5), hard, window, 1)
    assert classes.tolist() == [2] and difficult.tolist() == [True]  # 0.5 * 0.15 > 0.25 * 0.25
    np.testing.assert_allclose(largest, want[1:], atol=1e-6)


def write_photo(path: pathlib.Path, size: tuple[int, int] = (40, 20)) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 30)).save(path)
    return path.read_bytes()


def note(category: int, bbox: list, **flags) -> dict:
    return {"image_id": 1, "category_id": category, "bbox": bbox} | flags


@pytest.mark.parametrize("backend", [False, pytest.param(True, id="tf.data")])
def test_difficult_objects_of_json_reach_the_batches(tmp_path, backend):
    if backend:
        pytest.importorskip("tensorflow")
    write_photo(tmp_path / "a.png")
    write_photo(tmp_path / "b.png")
    notes = [
        note(5, [0, 0, 10, 10], difficult=1),
        note(5, [0, 0, 8, 8], iscrowd=1),  # dropped: it must not shift the others' flags
        note(5, [0, 0, 40, 20], difficult=0, ignore=0),
        note(5, [10, 0, 20, 20], ignore=True),
        note(5, [0, 0, 4, 4]),
    ]
    photos = [{"id": i, "file_name": f"{n}.png", "width": 40, "height": 20} for i, n in ((1, "a"), (2, "b"))]
    data = {"images": photos, "annotations": notes, "categories": [{"id": 5, "name": "x"}]}
    (tmp_path / "notes.json").write_text(json.dumps(data))
    spec = {"kind": "folder", "roots": str(tmp_path), "annotations": str(tmp_path / "notes.json")}
    source = sources.open_source(spec)
    first = source.read(0)
    assert first["difficult"].tolist() == [True, False, True, False]
    assert first["difficult"].dtype == bool and source.read(1)["difficult"].shape == (0,)
    options = {"canvas": 8, "workers": 1, "use_tf": backend}
    (batch,) = eval_batches(source, batch_size=4, max_boxes=3, **options)
    assert batch["difficult"].dtype == bool and batch["difficult"].shape == (4, 3)
    assert batch["difficult"][0].tolist() == [True, False, True]  # the smallest of four boxes went
    assert not batch["difficult"][1:].any() and (batch["classes"][0] == 0).all()
    (bare,) = eval_batches(source, batch_size=4, **options)
    assert "difficult" not in bare and "boxes" not in bare
    trained = next(train_batches(source, batch_size=2, seed=0, max_boxes=3, with_boxes=True, **options))
    assert set(trained) == {"image", "aspect", "id", "skipped", "boxes", "classes"}


def test_records_without_the_flag_count_as_easy(tmp_path):
    boxes = np.tile(np.array([[0.1, 0.2, 0.5, 0.6], [0, 0, 0, 0]], np.float32), (2, 1, 1))
    image = np.zeros((2, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "data.npz", image=image, boxes=boxes)
    arrays = sources.open_source({"kind": "arrays", "path": str(tmp_path / "data.npz")})
    assert arrays.read(0)["difficult"].tolist() == [False]

    def read(i: int) -> dict:
        return {"image": image[i], "boxes": boxes[i, :1], "classes": np.zeros(1, np.int32)}

    made = Source("made", "folder", (), 2, read, False, True)
    assert not made.has_masks
    (batch,) = eval_batches(made, batch_size=2, canvas=8, max_boxes=2, use_tf=False)
    assert batch["difficult"].tolist() == [[False, False]] * 2


def test_difficult_objects_of_tfds_voc(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    builder = tfds.builder("voc/2007", data_dir=str(tmp_path))
    pathlib.Path(builder.data_dir).mkdir(parents=True)
    objects = [
        {
            "label": k,
            "bbox": tfds.features.BBox(0.0, 0.1 * k, 0.5, 0.9),
            "pose": 0,
            "is_truncated": False,
            "is_difficult": k in (1, 2),
        }
        for k in range(4)
    ]
    photo = write_photo(tmp_path / "a.jpg")
    examples = [
        {
            "image": io.BytesIO(photo),
            "image/filename": "a.jpg",
            "objects": objects[:count],
            "labels": [],
            "labels_no_difficult": [],
        }
        for count in (4, 0)
    ]
    writer = tfds.core.SequentialWriter(builder.info, 2, overwrite=True)
    writer.initialize_splits(["test"])
    writer.add_examples({"test": examples})
    writer.close_all()
    spec = {"kind": "tfds", "name": "voc/2007", "data_dir": str(tmp_path), "split": "test"}
    source = sources.open_source(spec)
    read = [source.read(i) for i in range(2)]
    assert [len(record["boxes"]) for record in read] == [4, 0]
    assert read[0]["difficult"].tolist() == [False, True, True, False]
    assert read[0]["classes"].tolist() == [0, 1, 2, 3] and read[1]["difficult"].shape == (0,)
    assert source.has_boxes and not source.has_masks and "mask" not in read[0]
