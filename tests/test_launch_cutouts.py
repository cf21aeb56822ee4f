"""launch/paste_cutouts.py: what it pastes is where the boxes say, and a study can read it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from salcl_jax import study_plan
from salcl_jax.data import sources

ROOT = Path(__file__).parents[1]
COLOURS = {"blue": (0, 0, 255), "red": (255, 0, 0)}


def paste(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "launch/paste_cutouts.py", f"--cutouts={folder}/cutouts.csv",
               f"--backgrounds={folder}/grounds", f"--out={folder}/cutouts", *flags]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Discs of two classes, opaque inside, and grey grounds."""
    (tmp_path / "grounds").mkdir()
    Image.new("RGB", (90, 60), (128, 128, 128)).save(tmp_path / "grounds" / "grey.png")
    for name, colour in COLOURS.items():
        image = Image.new("RGBA", (40, 40), (*colour, 0))
        ImageDraw.Draw(image).ellipse((4, 4, 35, 35), fill=(*colour, 255))
        image.save(tmp_path / f"{name}.png")
    (tmp_path / "cutouts.csv").write_text("file,class\nred.png,red\nblue.png,blue\n")
    return tmp_path


def test_boxes_hold_what_is_pasted(folder, monkeypatch):
    done = paste(folder, "--train=30", "--val=5", "--side=96")
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("SALCL_DATA", str(folder))
    plan = study_plan.load(f"{ROOT}/configs/studies/cutouts.py:long")
    c = plan.config()
    source = sources.open_source(c.data.train.to_dict())
    assert len(source) == 30 and source.class_names == ("blue", "red")
    assert len(sources.open_source(plan.judge().tasks.localization.test.to_dict())) == 5
    counts = []
    for i in range(len(source)):
        record = source.read(i)
        pixels = np.asarray(Image.open(source.place(i)).convert("RGB")).astype(int)
        strength = pixels.max(-1) - pixels.min(-1)  # 0 where grey shows
        outside = strength > 60
        counts.append(len(record["boxes"]))
        for box, kind in zip(record["boxes"], record["classes"], strict=True):
            y0, x0, y1, x1 = np.round(box * 96).astype(int)
            assert 0.12 * 96 * 0.3 <= max(y1 - y0, x1 - x0) <= 0.25 * 96 + 1
            found = pixels[y0:y1, x0:x1][strength[y0:y1, x0:x1] > 60]
            own = (found[:, 2] > found[:, 0]) == (kind == 0)
            assert own.mean() > 0.3  # another object may cover it
            outside[y0 - 1 : y1 + 1, x0 - 1 : x1 + 1] = False
        # what has no box is hidden by seven tenths
        assert outside.mean() < 0.02
    assert min(counts) == 1 and max(counts) == 4


def test_the_same_scenes_again(folder):
    assert paste(folder, "--train=4", "--val=2").returncode == 0
    first = json.loads((folder / "cutouts/train.json").read_text())
    again = paste(folder, "--train=4", "--val=2")
    assert again.returncode == 1 and "exists already" in again.stderr
    (folder / "cutouts").rename(folder / "before")
    assert paste(folder, "--train=4", "--val=2").returncode == 0
    assert json.loads((folder / "cutouts/train.json").read_text()) == first
    pairs = [(folder / f"{name}/train/00003.jpg").read_bytes() for name in ("before", "cutouts")]
    assert pairs[0] == pairs[1]


def test_what_is_missing_is_named(folder):
    done = paste(folder, "--label=kind")
    assert done.returncode == 1 and "columns file and kind; see --label" in done.stderr
    done = paste(folder, "--smallest=0.3")
    assert done.returncode == 1 and "--smallest=0.3 --largest=0.25" in done.stderr
    (folder / "red.png").rename(folder / "other.png")
    done = paste(folder)
    assert done.returncode == 1 and "red.png" in done.stderr and "Traceback" not in done.stderr
    (folder / "other.png").rename(folder / "red.png")
    (folder / "grounds/grey.png").unlink()
    done = paste(folder)
    assert done.returncode == 1 and "holds no .jpg or .png" in done.stderr and "Traceback" not in done.stderr
