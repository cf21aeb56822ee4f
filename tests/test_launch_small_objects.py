"""launch/list_small_objects.py: which photos it lists, and that a study trains on them alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from salcl_jax import study_plan
from salcl_jax.data import sources

ROOT = Path(__file__).parents[1]
# name -> boxes (x, y, width, height) of a photo of 40 x 20: their shares of 800 pixels
BOXES = {
    "small.png": [(0, 0, 10, 8), (20, 0, 10, 10)],  # 0.1, 0.125
    "large.png": [(0, 0, 2, 2), (0, 0, 20, 20)],  # 0.005, 0.5
    "edge.png": [(0, 0, 12, 10)],  # 0.15: not below it
    "empty.png": [],
}


def write(folder: Path) -> None:
    """Two data sets in the judge's layout, each with the photos above; the second's names start with v."""
    for name, letter in (("coco", ""), ("voc", "v")):
        root = folder / f"{name}_scenes"
        (root / "images").mkdir(parents=True)
        names = [letter + file for file in BOXES]
        images = [{"id": i, "file_name": file, "width": 40, "height": 20} for i, file in enumerate(names)]
        notes = [{"id": 10 * i + k, "image_id": i, "category_id": 1, "bbox": box, "iscrowd": 0}
                 for i, boxes in enumerate(BOXES.values()) for k, box in enumerate(boxes)]  # fmt: skip
        text = json.dumps({"images": images, "annotations": notes, "categories": [{"id": 1, "name": "dot"}]})
        (root / "annotations_train.json").write_text(text)
        for file in names:
            Image.new("RGB", (40, 20)).save(root / "images" / file)


def listed(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    files = ",".join(f"{folder}/{name}_scenes/annotations_train.json" for name in ("coco", "voc"))
    command = [sys.executable, "launch/list_small_objects.py", f"--annotations={files}",
               f"--out={folder}/small_objects_train.txt", *flags]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("largest, names", [
    ("0.15", ["small.png", "vsmall.png"]),
    ("0.16", ["small.png", "edge.png", "vsmall.png", "vedge.png"]),
])  # fmt: skip
def test_photos_of_which_every_object_is_small(tmp_path, largest, names):
    write(tmp_path)
    done = listed(tmp_path, f"--largest={largest}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "small_objects_train.txt").read_text().split() == names
    assert f"annotations_train.json: {len(names) // 2} of 3 photos" in done.stdout


def test_the_study_trains_on_them_alone(tmp_path, monkeypatch):
    write(tmp_path)
    assert listed(tmp_path).returncode == 0
    monkeypatch.setenv("SALCL_DATA", str(tmp_path))
    plan = study_plan.load(f"{ROOT}/configs/studies/small_objects.py:long,maps")
    source = sources.open_source(plan.config().data.train.to_dict())
    assert [Path(source.place(i)).name for i in range(len(source))] == ["small.png", "vsmall.png"]
    assert [len(source.read(i)["boxes"]) for i in range(len(source))] == [2, 2]
    all_ = study_plan.load(f"{ROOT}/configs/studies/small_objects.py:long,maps,all").config()
    assert len(sources.open_source(all_.data.train.to_dict())) == 8


def test_what_is_wrong_is_named(tmp_path):
    write(tmp_path)
    for flags, words in ((["--largest=1"], "--largest=1.0"), (["--largest=0.01"], "no photo is left")):
        done = listed(tmp_path, *flags)
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr
    done = listed(tmp_path, f"--out={tmp_path}/none/small.txt")
    assert done.returncode == 1 and "none/small.txt: No such file" in done.stderr
    assert "Traceback" not in done.stderr
    whole = (tmp_path / "voc_scenes/annotations_train.json").read_text()
    for text in ("[]", whole.replace('"width": 40', '"width": 0')):
        (tmp_path / "voc_scenes/annotations_train.json").write_text(text)
        done = listed(tmp_path)
        assert done.returncode == 1 and "voc_scenes/annotations_train.json" in done.stderr
        assert "Traceback" not in done.stderr
    (tmp_path / "voc_scenes/annotations_train.json").unlink()
    done = listed(tmp_path)
    assert done.returncode == 1 and "voc_scenes/annotations_train.json" in done.stderr
    assert "Traceback" not in done.stderr
