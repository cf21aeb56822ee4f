"""launch/prepare_data.sh and .py: what they call, what they count, and what they say when it is wrong."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from launch_fakes import LAUNCH, Cloud
from PIL import Image

PREPARE = LAUNCH / "prepare_data.py"
ARCHIVES = {
    "coco": ["train2017.zip", "val2017.zip", "test2017.zip", "annotations_trainval2017.zip",
             "image_info_test2017.zip"],
    "coco_plus": ["train2017.zip", "unlabeled2017.zip"],
    "imagenet": ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"],
    "imagenet_10pct": ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"],
}  # fmt: skip
FAKE_TFDS = """
import os, types
class Config:
    def __init__(self, manual_dir): self.manual_dir = manual_dir
download = types.SimpleNamespace(DownloadConfig=Config)
class builder:
    def __init__(self, name, data_dir):
        print(name, data_dir)
        self.data_dir = "/made/here"
        sizes = dict(part.split("=") for part in os.environ["COUNTS"].split())
        splits = {k: types.SimpleNamespace(num_examples=int(v)) for k, v in sizes.items()}
        self.info = types.SimpleNamespace(splits=splits)
    def download_and_prepare(self, download_dir, download_config):
        print(download_dir, download_config.manual_dir)
"""


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    return Cloud(tmp_path / "cloud")


@pytest.fixture
def with_tfds(tmp_path) -> dict[str, str]:
    """Environment in which `python` is real and tensorflow_datasets is not."""
    (tmp_path / "tensorflow_datasets.py").write_text(FAKE_TFDS)
    return {"SALCL_PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}


def zips(folder: Path, data: str) -> str:
    folder.mkdir()
    for name in ARCHIVES[data]:
        (folder / name).touch()
    return f"--manual={folder}"


@pytest.mark.parametrize("data, counts, name", [
    ("coco", "train=118287 validation=5000", "coco/2017"),
    ("imagenet", "train=1281167 validation=50000", "imagenet2012"),
    ("imagenet_10pct", "train=128116 validation=50000", "imagenet2012_subset/10pct"),
])  # fmt: skip
def test_records_are_built_by_tfds_and_counted(cloud, tmp_path, with_tfds, data, counts, name):
    args = [f"--data={data}", "--data-dir=gs://b/tfds", zips(tmp_path / "zips", data)]
    result = cloud.run("prepare_data.sh", *args, COUNTS=counts, **with_tfds)
    assert result.returncode == 0, result.stderr
    work = cloud.root / "tmp" / "salcl_jax_data"
    assert result.stdout.splitlines()[:2] == [f"{name} gs://b/tfds", f"{work} {tmp_path}/zips"]
    wrong = counts.replace("train=1", "train=2")
    result = cloud.run("prepare_data.sh", *args, COUNTS=wrong, **with_tfds)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert f"{counts.split()[0][6:]}; delete /made/here" in result.stderr


def test_coco_needs_no_archives_and_keeps_downloads_beside_the_records(cloud, with_tfds):
    args, counts = ["--data=coco", "--data-dir=/d"], "train=118287 validation=5000"
    result = cloud.run("prepare_data.sh", *args, COUNTS=counts, **with_tfds)
    assert result.stdout.splitlines()[:2] == ["coco/2017 /d", "/d/downloads None"]
    result = cloud.run("prepare_data.sh", *args, "--work-dir=/w", COUNTS=counts, **with_tfds)
    assert result.stdout.splitlines()[1] == "/w None"


@pytest.mark.parametrize("data", ARCHIVES)
def test_a_missing_archive_is_named(cloud, tmp_path, data):
    manual = zips(tmp_path / "zips", data)
    (tmp_path / "zips" / ARCHIVES[data][-1]).unlink()
    result = cloud.run("prepare_data.sh", f"--data={data}", "--data-dir=/d", manual)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and not cloud.log()
    assert result.stderr.startswith(f"prepare_data.sh: no {tmp_path}/zips/{ARCHIVES[data][-1]};")


def test_imagenet_is_not_downloaded_and_other_names_are_unknown(cloud):
    result = cloud.run("prepare_data.sh", "--data=imagenet", "--data-dir=/d")
    assert result.returncode == 2 and "--manual=DIR" in result.stderr
    result = cloud.run("prepare_data.sh", "--data=voc", "--data-dir=/d")
    assert result.returncode == 2 and "coco_plus" in result.stderr
    assert "--data-dir" in cloud.run("prepare_data.sh", "--data=coco").stderr


def test_coco_plus_becomes_the_two_folders_its_config_reads(tmp_path):
    """On disk, with real archives of a few photos in place of the real ones."""
    from configs.coco import get_config

    manual = tmp_path / "zips"
    manual.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg")
    for name in ("train2017", "unlabeled2017"):
        with zipfile.ZipFile(manual / f"{name}.zip", "w") as archive:
            archive.write(tmp_path / "photo.jpg", f"{name}/1.jpg")
    command = ["bash", LAUNCH / "prepare_data.sh", "--data=coco_plus", f"--data-dir={tmp_path}/photos"]
    env = {"PATH": "/usr/bin:/bin", "SALCL_PYTHON": sys.executable, "PYTHONPATH": str(LAUNCH.parent)}
    result = subprocess.run([*command, f"--manual={manual}"], env=env, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert f"{tmp_path}/photos/train2017: 1 images instead of 118287; give --manual" in result.stderr
    config = get_config("coco_plus").data.train
    assert [path.name for path in (tmp_path / "photos").iterdir()] == list(config.roots)[:1]
    assert config.expected == 118287 + 123403


def test_coco_plus_goes_to_a_bucket_by_way_of_the_disk(cloud, tmp_path):
    args = ["--data=coco_plus", "--data-dir=gs://b/photos", "--work-dir=/w"]
    with_zips = cloud.printed("prepare_data.sh", *args, "--manual=/zips")
    count = [["python", str(PREPARE), "folder", f"gs://b/photos/{name}", number]
             for name, number in (("train2017", "118287"), ("unlabeled2017", "123403"))]  # fmt: skip
    assert with_zips[1] == ["python", "-m", "zipfile", "-e", "/zips/train2017.zip", "/w"]
    sync = ["gcloud", "storage", "rsync", "--recursive", "/w/train2017", "gs://b/photos/train2017"]
    assert with_zips[2:4] == [sync, count[0]] and with_zips[-1] == count[1]
    assert cloud.printed("prepare_data.sh", *args) == count  # without archives: what is there


@pytest.mark.parametrize("photos, expected, code, message", [
    (2, "2", 0, ""), (1, "2", 1, "1 images instead of 2"), (0, "2", 1, "no photos there"),
])  # fmt: skip
def test_folders_are_counted_as_a_source_counts_them(tmp_path, photos, expected, code, message):
    root = tmp_path / "photos"
    root.mkdir()
    for i in range(photos):
        (root / f"{i}.jpg").touch()
    (root / "notes.txt").touch()
    env = os.environ | {"PYTHONPATH": str(LAUNCH.parent)}
    command = [sys.executable, PREPARE, "folder", root, expected]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == code and message in result.stderr
    assert result.stderr.count("\n") == (1 if code else 0)
