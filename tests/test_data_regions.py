"""Objects from human segmentations: a hand-made case, and what the rule gives on real photos."""

import json
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from salcl_jax.data import regions, sources
from salcl_jax.data.pipeline import eval_batches


def coarse() -> np.ndarray:
    """20 x 20 pixels, 76 of them along the border, six regions."""
    values = np.full((20, 20), 3, np.uint8)  # surroundings
    values[2:6, 8:12] = 0  # inside: an object, though its number is 0
    values[8:14, 0:4] = 7  # 6 pixels of the border are 7.9 %: surroundings
    values[10, 10:13] = 9  # 0.75 % of the photo: too small
    values[12, 10:14] = 200  # exactly 1 %: an object
    values[14:20, 15:18] = 4  # 3 pixels of the border are 3.9 %: stands on the lower edge
    return values


BOXES = [[0.1, 0.4, 0.3, 0.6], [0.7, 0.75, 1.0, 0.9], [0.6, 0.5, 0.65, 0.7]]  # by number: 0, 4, 200


def fine() -> np.ndarray:
    """As coarse(), each object cut in two."""
    values = coarse()
    values[2:4, 8:12] = 50
    values[14:16, 15:18] = 51
    return values


def test_objects_of_a_hand_made_segmentation():
    found = regions.objects([fine(), coarse(), np.flipud(coarse())])
    np.testing.assert_allclose(found["boxes"], BOXES, atol=1e-6)
    assert found["boxes"].dtype == np.float32
    assert found["classes"].tolist() == [0, 0, 0] and found["classes"].dtype == np.int32
    assert found["difficult"].tolist() == [False] * 3
    want = np.isin(coarse(), (0, 4, 200)).astype(np.uint8)
    np.testing.assert_array_equal(found["mask"], want)
    assert found["mask"].dtype == np.uint8
    mirrored = regions.objects([np.flipud(coarse()), coarse()])  # of two as coarse the first counts
    np.testing.assert_array_equal(mirrored["mask"], np.flipud(want))
    nothing = regions.objects([np.zeros((8, 8), np.uint8)])
    assert nothing["boxes"].shape == (0, 4) and not nothing["mask"].any()


def write(folder: pathlib.Path) -> dict:
    """Two photos of the split train, one of val; returns the spec of the folder."""
    (folder / "cuts").mkdir(parents=True)
    (folder / "photos").mkdir()
    rows = ["file,split,segment_files"]
    for number, split in enumerate(("train", "val", "train")):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(folder / f"photos/{number}.png")
        for k, values in enumerate((fine(), coarse())):
            Image.fromarray(values).save(folder / f"cuts/{number}_{k}.png")
        rows.append(f"photos/{number}.png,{split},cuts/{number}_0.png cuts/{number}_1.png")
    (folder / "index.csv").write_text("\n".join(rows))
    return {"kind": "folder", "roots": str(folder / "photos"), "regions": str(folder / "index.csv")}


def test_segmentations_of_a_folder(tmp_path):
    spec = write(tmp_path)
    assert len(sources.open_source(spec)) == 3
    source = sources.open_source(spec | {"split": "train"})
    assert len(source) == 2 and source.class_names == ("region",)
    assert source.has_boxes and source.has_masks and not source.has_labels
    record = source.read(1)
    assert record["encoded"] == (tmp_path / "photos/2.png").read_bytes() and "segments" not in record
    np.testing.assert_allclose(record["boxes"], BOXES, atol=1e-6)
    (tmp_path / "cuts/0_1.png").write_bytes(b"no map")  # the other one stands in
    (tmp_path / "cuts/2_0.png").unlink()
    (tmp_path / "cuts/2_1.png").write_bytes(b"no map")
    assert len(source.read(0)["boxes"]) == 5  # two objects in halves, and the small one
    assert source.read(1)["boxes"].shape == (0, 4) and "mask" not in source.read(1)
    (batch,) = eval_batches(source, batch_size=2, canvas=20, max_boxes=5, with_masks=True, use_tf=False)
    assert (batch["masks"][1] == 255).all() and batch["masks"][0].max() == 1
    assert (batch["classes"] >= 0).sum(1).tolist() == [5, 0] and not batch["difficult"].any()


def test_segmentations_join_annotated_photos(tmp_path):
    """Photos of the JSON, then those of the CSV's split; a region is one more class, without a mask."""
    spec = write(tmp_path) | {"split": "train", "annotations": str(tmp_path / "notes.json")}
    notes = {
        "images": [{"id": 7, "file_name": "1.png", "width": 20, "height": 20}],
        "categories": [{"id": 3, "name": "dog"}, {"id": 5, "name": "cat"}],
        "annotations": [{"image_id": 7, "category_id": 5, "bbox": [5, 10, 5, 10]}],
    }
    (tmp_path / "notes.json").write_text(json.dumps(notes))
    source = sources.open_source(spec)
    assert [os.path.basename(source.place(i)) for i in range(len(source))] == ["1.png", "0.png", "2.png"]
    assert source.class_names == ("dog", "cat", "region") and source.has_boxes and not source.has_masks
    annotated, _, cut = (source.read(i) for i in range(3))
    np.testing.assert_allclose(annotated["boxes"], [[0.5, 0.25, 1, 0.5]])
    assert annotated["classes"].tolist() == [1] and "mask" not in annotated
    np.testing.assert_allclose(cut["boxes"], BOXES, atol=1e-6)
    assert (cut["classes"] == 2).all() and len(cut["difficult"]) == len(BOXES) and "mask" not in cut
    before = source.digest()
    (tmp_path / "cuts/2_0.png").write_bytes(b"other cut")
    assert sources.open_source(spec).digest() != before
    notes["images"][0]["file_name"] = "0.png"
    (tmp_path / "notes.json").write_text(json.dumps(notes))
    with pytest.raises(ValueError, match=r"notes.json and .*index.csv: .*0.png is in more than one"):
        sources.open_source(spec)


def test_faults_of_segmentations(tmp_path):
    spec = write(tmp_path)
    with pytest.raises(ValueError, match="no row with split=test; split has train, val"):
        sources.open_source(spec | {"split": "test"})
    with pytest.raises(ValueError, match="give labels or regions, not both"):
        sources.open_source(spec | {"labels": "labels.csv"})
    for text, message in (
        ("file,label\nphotos/0.png,1", "no column segment_files"),
        ("file,segment_files\nphotos/0.png,", "photos/0.png has no segment_files"),
        ("file,segment_files\nphotos/9.png,a.png", "photos/9.png is not below"),
        ("file,segment_files\nphotos/0.png,a.png", "a.png of photos/0.png: no such file"),
        ("file,segment_files\n", "no rows"),
    ):
        (tmp_path / "index.csv").write_text(text)
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            sources.open_source(spec)
        assert "\n" not in str(caught.value)


def test_real_photos_have_a_few_regions_each(photos):
    folder = photos / "bsds_scenes"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    spec = {"kind": "folder", "roots": str(folder / "images"), "regions": str(folder / "index.csv")}
    source = sources.open_source(spec | {"split": "val", "expected": 100})
    records = [source.read(i) for i in range(100)]
    counts = np.array([len(record["boxes"]) for record in records])
    assert (counts > 0).mean() > 0.8 and 2 < counts.mean() < 4
    for record in records:
        mask = record["mask"]
        high, wide = mask.shape
        for y0, x0, y1, x1 in record["boxes"]:
            inside = mask[round(y0 * high) : round(y1 * high), round(x0 * wide) : round(x1 * wide)]
            assert inside.sum() >= 0.01 * mask.size
            assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
