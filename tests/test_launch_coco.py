"""launch/coco_json_to_tfds.py: a COCO JSON file becomes a data set that the sources read and that counts."""

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from salcl_jax.data.sources import open_source

SCRIPT = Path(__file__).parents[1] / "launch" / "coco_json_to_tfds.py"


def test_photos_boxes_and_classes_arrive(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    photos, annotations = [], []
    for i in range(3):
        Image.new("RGB", (40, 20), (i * 80, 0, 0)).save(tmp_path / f"{i}.jpg")
        photos.append({"id": i, "file_name": f"{i}.jpg", "width": 40, "height": 20})
    annotations.append({"id": 1, "image_id": 1, "category_id": 7, "bbox": [10, 5, 20, 10], "area": 200})
    annotations.append(
        {"id": 2, "image_id": 1, "category_id": 3, "bbox": [0, 0, 4, 4], "area": 16, "iscrowd": 1}
    )
    data = {"images": photos, "annotations": annotations, "categories": [{"id": 3}, {"id": 7}]}
    (tmp_path / "a.json").write_text(json.dumps(data))
    options = [f"--images={tmp_path}", f"--data_dir={tmp_path}/out"]
    options += [f"--{split}={tmp_path}/a.json" for split in ("train", "validation")]
    subprocess.run([sys.executable, SCRIPT, *options], check=True, capture_output=True)
    source = open_source({"kind": "tfds", "name": "coco/2017", "data_dir": f"{tmp_path}/out"})
    records = [source.read(i) for i in range(len(source))]
    assert [len(record["boxes"]) for record in records] == [0, 1, 0]  # crowds are dropped, photos are kept
    np.testing.assert_allclose(records[1]["boxes"], [[0.25, 0.25, 0.75, 0.75]], atol=1e-6)
    assert records[1]["classes"].tolist() == [1]
    assert Image.open(io.BytesIO(records[2]["encoded"])).size == (40, 20)
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT.with_name("prepare_data.py"))
    prepare_data = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare_data)
    place = (f"{tmp_path}/out", f"{tmp_path}/scratch", None)
    prepare_data.build("coco/2017", ["train=3", "validation=3"], *place)  # there already: only counted
    with pytest.raises(SystemExit, match="3 images instead of 5000; delete .*/out/coco/2017"):
        prepare_data.build("coco/2017", ["train=3", "validation=5000"], *place)
    again = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True)
    assert again.returncode == 1 and "exists already" in again.stderr.strip().splitlines()[-1]
