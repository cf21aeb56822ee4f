"""The digest of a source: another one for other examples, the same one wherever they lie."""

import json
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from salcl_jax.data import scenes, sources, tfds_source


def write(folder: pathlib.Path) -> None:
    """Photos, label maps, and each kind of file that tells something about them."""
    for name in ("photos/a", "photos/b", "maps", "cuts"):
        (folder / name).mkdir(parents=True)
    for i, name in enumerate(("a/0", "a/1", "b/2")):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"photos/{name}.png")
        for kind in ("maps", "cuts"):
            Image.new("L", (8, 8), i).save(folder / f"{kind}/{i}.png")
    (folder / "labels.csv").write_text("file,label\nphotos/a/0.png,0\nphotos/a/1.png,1\nphotos/b/2.png,1\n")
    (folder / "index.csv").write_text("file,segment_files\nphotos/a/0.png,cuts/0.png cuts/1.png\n")
    (folder / "list.txt").write_text("0.png\n2.png\n")
    (folder / "notes.json").write_text(json.dumps(notes([1, 2, 3, 4])))


def notes(bbox: list[int], category: int = 1, **flags) -> dict:
    return {
        "images": [{"id": 1, "file_name": "a/0.png", "width": 8, "height": 8}],
        "annotations": [{"image_id": 1, "category_id": category, "bbox": bbox} | flags],
        "categories": [{"id": 1, "name": "x"}, {"id": 2, "name": "y"}],
    }


def open_folder(folder: pathlib.Path, **more) -> sources.Source:
    paths = {key: str(folder / value) for key, value in more.items()}
    return sources.open_source({"kind": "folder", "roots": (str(folder / "photos"),)} | paths)


LABELS, NOTES, REGIONS = {"labels": "labels.csv"}, {"annotations": "notes.json"}, {"regions": "index.csv"}
LIST, MASKS = {"list": "list.txt"}, {"masks": "maps"}
USES = ({}, LABELS, NOTES, REGIONS, LIST, MASKS, LABELS | LIST | MASKS)


def test_the_place_of_the_folders_is_not_in_it(tmp_path, monkeypatch):
    write(tmp_path / "one")
    before = [open_folder(tmp_path / "one", **use).digest() for use in USES]
    assert before == [open_folder(tmp_path / "one", **use).digest() for use in USES]
    assert len(set(before)) == len(before) and all(int(found, 16) > 0 for found in before)
    os.rename(tmp_path / "one", tmp_path / "two")
    assert before == [open_folder(tmp_path / "two", **use).digest() for use in USES]
    monkeypatch.chdir(tmp_path)
    relative = [open_folder(pathlib.Path("two"), **use).digest() for use in USES]
    assert before == relative


def touch(path: pathlib.Path) -> None:
    """One nanosecond later; the bytes stay."""
    status = os.stat(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def grow(path: pathlib.Path) -> None:
    """One byte more, at the same time."""
    status = os.stat(path)
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def rewrite(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("use", "change", "differs"),
    [
        ({}, lambda f: touch(f / "photos/a/1.png"), True),
        ({}, lambda f: grow(f / "photos/a/1.png"), True),
        ({}, lambda f: (f / "photos/a/1.png").rename(f / "photos/b/1.png"), True),
        ({}, lambda f: (f / "photos/a/1.png").unlink(), True),
        ({}, lambda f: touch(f / "maps/1.png"), False),
        (LIST, lambda f: touch(f / "photos/a/1.png"), False),  # it is not listed
        (LIST, lambda f: touch(f / "photos/b/2.png"), True),
        (LIST, rewrite("list.txt", "2.png\n0.png"), True),
        (LIST, rewrite("list.txt", "0.png 1\n2.png 0"), True),
        (LIST, rewrite("list.txt", "a/0.png\n\nb/2.png"), False),
        (MASKS, lambda f: touch(f / "maps/1.png"), True),
        (MASKS, lambda f: (f / "maps/1.png").unlink(), True),
        (LABELS, rewrite("labels.csv", "file,label\nphotos/a/0.png,0"), True),
        (LABELS, lambda f: touch(f / "labels.csv"), False),
        (NOTES, rewrite("notes.json", json.dumps(notes([1, 2, 3, 5]))), True),
        (NOTES, rewrite("notes.json", json.dumps(notes([1, 2, 3, 4], 2))), True),
        (NOTES, rewrite("notes.json", json.dumps(notes([1, 2, 3, 4], ignore=1))), True),
        (REGIONS, lambda f: touch(f / "cuts/1.png"), True),
        (REGIONS, lambda f: touch(f / "cuts/2.png"), False),
        (REGIONS, rewrite("index.csv", "file,segment_files\nphotos/a/0.png,cuts/0.png"), True),
    ],
)
def test_what_changes_the_digest_of_a_folder(tmp_path, use, change, differs):
    write(tmp_path)
    before = open_folder(tmp_path, **use).digest()
    change(tmp_path)
    assert (open_folder(tmp_path, **use).digest() != before) == differs


def test_labels_and_their_names_are_in_it(tmp_path):
    write(tmp_path)
    found = [open_folder(tmp_path, labels="labels.csv").digest()]
    for text in ("0,1,0", "0,2,2", "x,y,y"):
        rows = zip(("a/0", "a/1", "b/2"), text.split(","), strict=True)
        lines = "".join(f"photos/{name}.png,{label}\n" for name, label in rows)
        (tmp_path / "labels.csv").write_text("file,label\n" + lines)
        found.append(open_folder(tmp_path, labels="labels.csv").digest())
    assert len(set(found)) == 4


@pytest.mark.parametrize("form", ["npz", "folder"])
def test_digest_of_arrays(tmp_path, form):
    (tmp_path / "one").mkdir()
    columns = {"image": np.zeros((2, 4, 4, 3), np.uint8), "label": np.arange(2)}
    if form == "npz":
        np.savez(tmp_path / "one/data.npz", **columns)
    else:
        for name, column in columns.items():
            np.save(tmp_path / f"one/{name}.npy", column)
    last = tmp_path / ("two/data.npz" if form == "npz" else "two/label.npy")

    def digest(folder: str) -> str:
        path = tmp_path / folder / ("data.npz" if form == "npz" else "")
        return sources.open_source({"kind": "arrays", "path": str(path)}).digest()

    before = digest("one")
    os.rename(tmp_path / "one", tmp_path / "two")
    assert digest("two") == before
    touch(last)
    assert digest("two") != before


def test_digest_of_rendered_scenes(monkeypatch):
    monkeypatch.setattr(tfds_source.importlib.util, "find_spec", lambda name: None)

    def digest(split: str = "train", **dials) -> str:
        return sources.open_source({"kind": "scenes", "split": split, "scenes": dials}).digest()

    assert digest(seed=1) == digest(seed=1, clutter=0.5)
    found = [digest(), digest("validation"), digest(seed=1), digest(num_train=5)]
    monkeypatch.setattr(scenes, "RENDERER", 99)
    assert len({*found, digest()}) == 5


def test_digest_of_record_files(tmp_path):
    pytest.importorskip("tensorflow_datasets")

    def digest(place: str, split: str = "train", **dials) -> str:
        dials = {"num_train": 4, "num_val": 4, "size": 32} | dials
        spec = {"kind": "scenes", "data_dir": str(tmp_path / place), "split": split, "scenes": dials}
        return sources.open_source(spec).digest()

    found = [digest("one"), digest("one", "validation"), digest("one", "train[:2]"), digest("one", seed=1)]
    assert len(set(found)) == 4
    os.rename(tmp_path / "one", tmp_path / "two")
    assert digest("two") == found[0]
    assert digest("three", seed=1) == found[3]  # written anew, of the same size


def test_sources_made_by_hand_share_no_digest():
    made = [sources.Source("same", "folder", (), 1, lambda i: {}) for _ in range(2)]
    assert made[0].digest() == made[0].digest() != made[1].digest()
