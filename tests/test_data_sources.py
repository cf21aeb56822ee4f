"""Folders, CSV and COCO annotations, arrays, TFRecord files and tfds data sets."""

import csv
import io
import json
import os
import pathlib
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from salcl_jax.data import records, sources

SHARED = pathlib.Path(
    os.environ.get("SALCL_DATA", pathlib.Path(__file__).parents[1] / "../shared/data")
)


def write(path: pathlib.Path, value: int = 0, size: tuple[int, int] = (24, 16)) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 0)).save(path)
    return path.read_bytes()


def test_folder_lists_several_roots_sorted_and_ignores_the_rest(tmp_path):
    want = [write(tmp_path / "a/x/1.JPG", 1), write(tmp_path / "a/z.png", 2)]
    want.append(write(tmp_path / "b/0.jpeg", 3))
    (tmp_path / "a/notes.txt").write_text("no image")
    os.symlink(tmp_path / "a", tmp_path / "a/x/loop")  # back up: must not be walked for ever
    roots = (str(tmp_path / "a"), str(tmp_path / "b"))
    source = sources.open_source({"kind": "folder", "roots": roots})
    assert [source.read(i)["encoded"] for i in range(len(source))] == want
    assert not source.has_labels and not source.has_boxes and source.class_names == ()


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ({"kind": "folder", "roots": ("{tmp}/missing",)}, "no such folder"),
        ({"kind": "folder", "roots": ("{tmp}/empty",)}, "no image files"),
        ({"kind": "folder"}, "no folder given"),
        ({"kind": "zip"}, "unknown; use one of"),
        ({"kind": "arrays", "path": "{tmp}/none.npz"}, "no .npz file"),
        ({"kind": "arrays", "path": "{tmp}/none.npz", "where": "fold=1"}, "where 'fold=1'.*'arrays'.*drop"),
        ({"kind": "tfds", "name": "coco/2017", "where": "fold=1"}, "where 'fold=1'.*'tfds'.*drop it"),
        ({"kind": "scenes", "where": "fold=1"}, "where 'fold=1'.*'scenes'.*drop it"),
        ({"kind": "arrays", "path": "{tmp}/bad.npz"}, "not an .npz file"),
        ({"kind": "folder", "roots": ("{tmp}/ok",), "expected": 7}, "1 examples, 7 expected"),
        ({"kind": "folder", "roots": ("{tmp}/ok",), "labels": "{tmp}/no.csv"}, "cannot be read"),
    ],
)
def test_faults_are_told_in_one_line(tmp_path, spec, error):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.npz").write_text("text")
    write(tmp_path / "ok/1.png")
    filled = json.loads(json.dumps(spec).replace("{tmp}", str(tmp_path)))
    with pytest.raises((ValueError, FileNotFoundError), match=error) as caught:
        sources.open_source(filled)
    assert "\n" not in str(caught.value)


def test_labels_from_csv_and_from_folder_names(tmp_path):
    for name in ("cat/1.png", "dog/2.png", "dog/3.png", "dog/unlisted.png"):
        write(tmp_path / "photos" / name, len(name))
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "label", "split", "fold", "name"])
        rows.writerows(
            [
                ["photos/dog/3.png", 1, "train", "0", "hound"],
                ["photos/cat/1.png", 0, "val", "0", "tiger"],
                ["photos/dog/2.png", 1, "train", "1", "hound"],
            ]
        )
    spec = {"kind": "folder", "roots": (str(tmp_path / "photos"),)}
    listed = spec | {"labels": str(tmp_path / "labels.csv")}
    whole = sources.open_source(listed)
    assert [whole.read(i)["label"] for i in range(3)] == [1, 0, 1] and len(whole) == 3
    assert whole.class_names == ("tiger", "hound") and whole.has_labels
    assert len(sources.open_source(listed | {"split": "train"})) == 2
    fold = sources.open_source(listed | {"split": "train", "where": "fold=1"})
    want = (tmp_path / "photos/dog/2.png").read_bytes()
    assert len(fold) == 1 and fold.read(0)["encoded"] == want
    with pytest.raises(ValueError, match="no row with"):
        sources.open_source(listed | {"split": "test"})
    with pytest.raises(ValueError, match="no column nope"):
        sources.open_source(listed | {"where": "nope=1"})
    (tmp_path / "photos/dog/2.png").unlink()
    with pytest.raises(ValueError, match=r"dog/2.png is not below"):
        sources.open_source(listed)
    folders = sources.open_source(spec | {"label_from_folder": True})
    assert folders.class_names == ("cat", "dog")
    assert [folders.read(i)["label"] for i in range(len(folders))] == [0, 1, 1]


def test_coco_annotations(tmp_path):
    write(tmp_path / "images/7.jpg", size=(200, 100))
    write(tmp_path / "images/8.jpg", size=(50, 50))
    write(tmp_path / "images/9.jpg")
    data = {
        "images": [
            {"id": 7, "file_name": "7.jpg", "width": 200, "height": 100},
            {"id": 8, "file_name": "8.jpg", "width": 50, "height": 50},
        ],
        "annotations": [
            {"image_id": 7, "category_id": 90, "bbox": [20, 10, 100, 50], "iscrowd": 0},
            {"image_id": 7, "category_id": 3, "bbox": [0, 0, 200, 100], "iscrowd": 1},
            {"image_id": 7, "category_id": 3, "bbox": [150, 50, 50, 50]},
        ],
        "categories": [{"id": 90, "name": "brush"}, {"id": 3, "name": "car"}],
    }
    (tmp_path / "notes.json").write_text(json.dumps(data))
    spec = {"kind": "folder", "roots": (str(tmp_path / "images"),)}
    source = sources.open_source(spec | {"annotations": str(tmp_path / "notes.json")})
    assert len(source) == 2 and source.class_names == ("car", "brush") and source.has_boxes
    first = source.read(0)
    np.testing.assert_allclose(first["boxes"], [[0.1, 0.1, 0.6, 0.6], [0.5, 0.75, 1, 1]])
    assert first["classes"].tolist() == [1, 0] and first["boxes"].dtype == np.float32
    assert source.read(1)["boxes"].shape == (0, 4)  # kept, though nothing is annotated


def test_json_without_boxes_or_with_unknown_categories_is_refused(tmp_path):
    write(tmp_path / "images/7.jpg")
    entry = {"id": 7, "file_name": "7.jpg", "width": 9, "height": 9}
    note = {"id": 5, "image_id": 7, "category_id": 3, "bbox": [0, 0, 4, 4]}
    good = {"images": [entry], "annotations": [note], "categories": [{"id": 3, "name": "car"}]}
    without_width = {key: entry[key] for key in ("id", "file_name", "height")}
    faults = {
        "has no categories": {key: good[key] for key in ("images", "annotations")},
        "annotations entry 5 has no bbox": good | {"annotations": [note | {"bbox": None}]},
        "annotations entry 5 has no category_id, bbox": good | {"annotations": [{"id": 5, "image_id": 7}]},
        "category_id 4 of an object of image 7": good | {"annotations": [note | {"category_id": 4}]},
        "images entry 7 has no width": good | {"images": [without_width]},
    }
    path = tmp_path / "notes.json"
    spec = {"kind": "folder", "roots": (str(tmp_path / "images"),), "annotations": str(path)}
    for message, data in faults.items():
        path.write_text(json.dumps(data))
        with pytest.raises(ValueError, match=message) as caught:
            sources.open_source(spec)
        assert "\n" not in str(caught.value) and "notes.json" in str(caught.value)
    # Crowds are not read, whatever they say.
    path.write_text(json.dumps(good | {"annotations": [note, {"category_id": 9, "iscrowd": 1}]}))
    assert len(sources.open_source(spec).read(0)["boxes"]) == 1


NOTE = {"id": 5, "image_id": 7, "category_id": 3, "bbox": [0, 0, 4, 4]}
ENTRY = {"id": 7, "file_name": "7.jpg", "width": 9, "height": 9}


@pytest.mark.parametrize(("part", "entry", "message"), [
    ("annotations", 3, "annotations entry number 2 is 3, no object"),
    ("annotations", NOTE | {"bbox": [0, 0, 4, 4] * 2}, r"annotations entry 5 has bbox .*four numbers"),
    ("annotations", NOTE | {"bbox": [0, 0, 4]}, "annotations entry 5 has bbox"),
    ("annotations", NOTE | {"bbox": "0044"}, "annotations entry 5 has bbox '0044'"),
    ("annotations", NOTE | {"bbox": [0, 0, 4, float("nan")]}, "annotations entry 5 has bbox .*nan"),
    ("annotations", NOTE | {"bbox": [0, 0, 10**400, 4]}, "annotations entry 5 has bbox"),
    ("annotations", NOTE | {"category_id": [3]}, r"annotations entry 5 has category_id \[3\]"),
    ("annotations", NOTE | {"image_id": "7"}, "ids of images are numbers and text, such as 7 and '7'"),
    ("categories", {"id": "b", "name": "b"}, "ids of categories are numbers and text, such as 3 and 'b'"),
    ("categories", {"id": 4, "name": 4}, "categories entry 4 has name 4, not text"),
    ("categories", {"id": float("inf"), "name": "b"}, "categories entry inf has id inf"),
    ("images", ENTRY | {"file_name": 7}, "images entry 7 has file_name 7, not text"),
    ("images", ENTRY | {"width": "9"}, "images entry 7 has width '9', not a number of pixels"),
    ("images", ENTRY | {"width": 0}, "images entry 7 has width 0"),
    ("images", ENTRY | {"height": -9}, "images entry 7 has height -9"),
    ("images", ENTRY | {"id": "a\nb", "height": float("inf")}, r"images entry 'a\\nb' has height inf"),
])  # fmt: skip
def test_an_entry_of_json_that_cannot_be_used_is_named(tmp_path, part, entry, message):
    write(tmp_path / "images/7.jpg")
    data = {"images": [ENTRY], "annotations": [NOTE], "categories": [{"id": 3, "name": "car"}]}
    data[part] = [*data[part], entry]
    check_refused(tmp_path, "annotations", json.dumps(data), message)


@pytest.mark.parametrize(("text", "message"), [
    ('{"images": [', "is no JSON"), ("[" * 100_000, "is no JSON"), ("7", "has no categories"),
    ('{"categories": {}}', "has no categories"), (f'[{"9" * 5000}]', "is no JSON"),
])  # fmt: skip
def test_json_of_another_form_is_refused(tmp_path, text, message):
    write(tmp_path / "images/7.jpg")
    check_refused(tmp_path, "annotations", text, message)


@pytest.mark.parametrize(("rows", "message"), [
    ("7.jpg,cat,train\n7.jpg", "line 3 has no label, split; complete the row or drop it"),
    ("7.jpg,cat,train\n7.jpg,dog", "line 3 has no split"),
    (f"7.jpg,{'x' * 200_000},train", "line 2: field larger than field limit"),
    ('7.jpg,cat,train\n7.jpg,"do', "line 3: unexpected end of data"),
])  # fmt: skip
def test_a_row_that_is_cut_short_is_named(tmp_path, rows, message):
    write(tmp_path / "images/7.jpg")
    check_refused(tmp_path, "labels", f"file,label,split\n{rows}", message, split="train")


def check_refused(folder: pathlib.Path, kind: str, text: str, message: str, **more):
    path = folder / "table"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        sources.open_source({"kind": "folder", "roots": (str(folder / "images"),), kind: str(path), **more})
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{path}: ")


def test_real_scenes_open_with_their_boxes():
    folder = SHARED / "coco_scenes"
    if not folder.is_dir():
        pytest.skip("no real photos: set SALCL_DATA to their folder")
    path = str(folder / "annotations_val.json")
    source = sources.open_source(
        {"kind": "folder", "roots": (str(folder / "images"),), "annotations": path, "expected": 387}
    )
    assert len(source.class_names) == 80 and source.class_names[0] == "person"
    crowds = sum(note["iscrowd"] for note in json.loads(open(path).read())["annotations"])
    boxes = [source.read(i)["boxes"] for i in range(len(source))]
    assert sum(map(len, boxes)) == 3297 - crowds


@pytest.mark.parametrize("form", ["npz", "compressed", "folder"])
def test_arrays_from_every_form(tmp_path, form):
    rng = np.random.default_rng(0)
    columns = {
        "image": rng.integers(0, 256, (5, 8, 8, 3), np.uint8),
        "label": np.arange(5),
        "boxes": np.tile(np.array([[0.1, 0.2, 0.5, 0.6], [0, 0, 0, 0]], np.float32), (5, 1, 1)),
        "classes": np.tile(np.array([3, -1]), (5, 1)),
        "class_names": np.array(["a", "b", "c", "d", "e"]),
    }
    path = tmp_path / ("data" if form == "folder" else "data.npz")
    if form == "folder":
        path.mkdir()
        for name, column in columns.items():
            np.save(path / f"{name}.npy", column)
    else:
        (np.savez if form == "npz" else np.savez_compressed)(path, **columns)
    source = sources.open_source({"kind": "arrays", "path": str(path), "expected": 5})
    for i in range(5):
        example = source.read(i)
        np.testing.assert_array_equal(example["image"], columns["image"][i])
        assert example["label"] == i
        np.testing.assert_array_equal(example["boxes"], columns["boxes"][i][:1])
        assert example["classes"].tolist() == [3]
    assert source.class_names == ("a", "b", "c", "d", "e")


@pytest.mark.parametrize("form", ["npz", "folder"])
def test_large_columns_stay_in_their_file(tmp_path, form):
    from salcl_jax.data import arrays

    path, image = tmp_path / "data", np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
    if form == "npz":
        path = tmp_path / "data.npz"
        np.savez(path, image=image, label=np.arange(4))
    else:
        path.mkdir()
        np.save(path / "image.npy", image)
        np.save(path / "label.npy", np.arange(4))
    columns = arrays.load(str(path))
    assert isinstance(columns["image"], arrays.Rows) and columns["label"].tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(list(columns["image"]), image)
    file = path if form == "npz" else path / "image.npy"
    os.truncate(file, columns["image"].start + 2 * 192 + 5)  # shrinks under the reader: no signal ends it
    np.testing.assert_array_equal(columns["image"][1], image[1])
    with pytest.raises(OSError, match="ends before row 2"):
        columns["image"][2]
    with pytest.raises(IndexError):
        columns["image"][-1]
    with pytest.raises(ValueError, match="cannot be read"):
        arrays.load(str(path))


def test_arrays_of_another_shape_are_refused(tmp_path):
    from salcl_jax.data import arrays

    np.savez(tmp_path / "bad.npz", image=np.zeros((4, 8, 8, 3), np.float32))
    with pytest.raises(ValueError, match="column image, uint8"):
        arrays.load(str(tmp_path / "bad.npz"))
    np.savez(tmp_path / "odd.npz", image=np.zeros((4, 8, 8, 3), np.uint8), label=np.arange(3))
    with pytest.raises(ValueError, match="label has 3 rows"):
        arrays.load(str(tmp_path / "odd.npz"))
    np.savez_compressed(tmp_path / "text.npz", image=np.zeros((4, 8, 8, 3), np.uint8))
    with zipfile.ZipFile(tmp_path / "text.npz", "a") as archive:
        archive.writestr("label.npy", "no array")
    with pytest.raises(ValueError, match="text.npz: cannot be read .label is no array"):
        arrays.load(str(tmp_path / "text.npz"))


def test_masked_crc_of_known_vectors():
    # RFC 3720 B.4: CRC-32C of 32 zero bytes and of 32 bytes of ones
    for data, crc in ((bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43)):
        rotated = (crc >> 15) | (crc << 17 & 0xFFFFFFFF)
        assert records.masked_crc(data) == (rotated + 0xA282EAD8) % 2**32


def test_record_index_equals_tfrecord_dataset(tmp_path):
    tf = pytest.importorskip("tensorflow")
    rng = np.random.default_rng(0)
    paths = [str(tmp_path / f"{number}.tfrecord") for number in range(3)]
    for number, path in enumerate(paths):
        with tf.io.TFRecordWriter(path) as writer:
            for _ in range(7 * (number != 1)):  # the middle shard is empty
                writer.write(rng.bytes(int(rng.integers(0, 5000))))
    want = list(tf.data.TFRecordDataset(paths).as_numpy_iterator())
    reader = records.Reader(records.build_index([(path, 0, -1) for path in paths]))
    assert len(reader) == len(want) == 14
    with ThreadPoolExecutor(4) as pool:  # in any order, from several threads
        places = rng.permutation(14).tolist() * 5
        assert list(pool.map(reader, places)) == [want[i] for i in places]
    part = records.Reader(records.build_index([(paths[0], 2, 3), (paths[2], 6, 1)]))
    assert [part(i) for i in range(len(part))] == [*want[2:5], want[13]]
    with pytest.raises(ValueError, match="7 records, 9 expected"):
        records.build_index([(paths[0], 0, 9)])
    with pytest.raises(FileNotFoundError, match="shard not found"):
        records.scan(str(tmp_path / "none"))
    whole = pathlib.Path(paths[0]).read_bytes()
    for cut in (len(whole) - 3, len(whole) - 5000, 5):
        pathlib.Path(paths[1]).write_bytes(whole[: max(cut, 5)])
        with pytest.raises(ValueError, match="truncated in record"):
            records.scan(paths[1])
    pathlib.Path(paths[1]).write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="not a TFRecord header"):
        records.scan(paths[1])


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (value, value, value)).save(buffer, "JPEG")
    return buffer.getvalue()


def coco_example(tfds, number: int) -> dict:
    things = [
        {
            "area": 1,
            "bbox": tfds.features.BBox(0.1 * k, 0.2, 0.5 + 0.1 * k, 0.75),
            "id": k,
            "is_crowd": k == 2,
            "label": 10 + k,
        }
        for k in range(number)
    ]
    return {
        "image": io.BytesIO(jpeg(10 * number)),
        "image/filename": f"{number}.jpg",
        "image/id": number,
        "objects": things,
    }


def write_coco(tfds, folder: pathlib.Path, file_format: str):
    """A data set with the features of coco/2017: image k has k objects, the third a crowd."""
    builder = tfds.builder("coco/2017", data_dir=str(folder), file_format=file_format)
    pathlib.Path(builder.data_dir).mkdir(parents=True)
    writer = tfds.core.SequentialWriter(builder.info, 3, overwrite=True, file_format=file_format)
    writer.initialize_splits(["train", "validation"])
    writer.add_examples({"train": [coco_example(tfds, k) for k in range(5)]})
    writer.add_examples({"validation": [coco_example(tfds, k) for k in (1, 0)]})
    writer.close_all()


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_coco_2017_as_tfds_writes_it(tmp_path, file_format):
    tfds = pytest.importorskip("tensorflow_datasets")
    if file_format == "array_record":
        pytest.importorskip("array_record")
    write_coco(tfds, tmp_path, file_format)
    spec = {"kind": "tfds", "name": "coco/2017", "data_dir": str(tmp_path), "split": "train"}
    source = sources.open_source(spec | {"expected": 5})
    assert len(source.class_names) == 80 and source.has_boxes and not source.has_labels
    read = [source.read(i) for i in range(5)]
    assert [example["encoded"] for example in read] == [jpeg(10 * k) for k in range(5)]
    assert read[0]["boxes"].shape == (0, 4) and read[0]["classes"].shape == (0,)
    want = [[0.0, 0.2, 0.5, 0.75], [0.1, 0.2, 0.6, 0.75], [0.3, 0.2, 0.8, 0.75]]
    np.testing.assert_allclose(read[4]["boxes"], want, rtol=1e-6)
    assert read[4]["classes"].tolist() == [10, 11, 13]
    mixed = sources.open_source(spec | {"split": "train[3:]+validation+train[:20%]"})
    got = [mixed.read(i)["encoded"] for i in range(len(mixed))]
    assert got == [jpeg(10 * k) for k in (3, 4, 1, 0, 0)]
    with pytest.raises(ValueError, match="no such split"):
        sources.open_source(spec | {"split": "unlabeled"})
    with pytest.raises(ValueError, match="5 examples, 118287 expected"):
        sources.open_source(spec | {"expected": 118287})


def test_a_data_set_that_is_not_there_tells_the_command(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    for name in ("coco/2017", "no_such_data_set_at_all"):
        spec = {"kind": "tfds", "name": name, "data_dir": str(tmp_path)}
        with pytest.raises(FileNotFoundError, match=f"tfds build {name}") as caught:
            sources.open_source(spec)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
