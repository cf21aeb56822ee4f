"""Recipes for detectors and classifiers: the protocols' numbers, settings that fit the weights, training."""

import ast
import csv
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import weights_reference as reference
from PIL import Image

from salcl_jax.data.sources import open_source
from salcl_jax.weights import outgoing, targets

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "launch" / "transfer"
RESNET50 = {"name": "resnet50", "width": 64, "stem": "imagenet"}
pytestmark = pytest.mark.xdist_group("weights")


def merged(one: dict, other: dict) -> dict:
    """Nested fields, the second's over the first's."""
    return one | {
        key: merged(one[key], value) if isinstance(value, dict) and isinstance(one.get(key), dict) else value
        for key, value in other.items()
    }


def recipe(name: str) -> dict:
    """A Detectron2 recipe with what it is based on."""
    yaml = pytest.importorskip("yaml")
    fields = yaml.safe_load((FOLDER / "detectron2" / name).read_text())
    base = fields.pop("_BASE_", None)
    return merged(recipe(base), fields) if base else fields


DETECTRON2 = ["coco_fpn_1x.yaml", "coco_c4_1x.yaml", "voc_c4_24k.yaml"]
SCHEDULES = {  # iterations, drops of the rate, short sides in training, masks
    "coco_fpn_1x.yaml": (90000, (60000, 80000), range(640, 801, 32), True),
    "coco_c4_1x.yaml": (90000, (60000, 80000), range(640, 801, 32), True),
    "voc_c4_24k.yaml": (24000, (18000, 22000), range(480, 801, 32), False),
}


@pytest.mark.parametrize("name", DETECTRON2)
def test_schedules_are_those_of_the_protocols(name):
    fields = recipe(name)
    steps, drops, sides, masks = SCHEDULES[name]
    solver = fields["SOLVER"]
    assert (solver["MAX_ITER"], ast.literal_eval(solver["STEPS"])) == (steps, drops)
    assert (solver["IMS_PER_BATCH"], solver["BASE_LR"]) == (16, 0.02)
    assert ast.literal_eval(fields["INPUT"]["MIN_SIZE_TRAIN"]) == tuple(sides)
    assert fields["MODEL"]["MASK_ON"] is masks and fields["TEST"]["PRECISE_BN"]["ENABLED"]


@pytest.mark.parametrize("name", DETECTRON2)
def test_settings_of_a_recipe_are_those_written_beside_the_weights(name):
    yaml = pytest.importorskip("yaml")
    text = targets.companions("detectron2", RESNET50, "w.pkl", 224)[".yaml"]
    beside = yaml.safe_load(text)
    del beside["MODEL"]["WEIGHTS"]
    defaults = {"STEM_OUT_CHANNELS": 64, "WIDTH_PER_GROUP": 64, "RES2_OUT_CHANNELS": 256}  # Detectron2's own
    for key, value in defaults.items():
        assert beside["MODEL"]["RESNETS"].pop(key) == value
    beside["MODEL"]["RESNETS"]["DEPTH"] = int(beside["MODEL"]["RESNETS"]["DEPTH"])
    fields = recipe(name)
    assert merged(fields, beside) == fields


def test_the_two_mmdet_recipes_agree_with_the_weights_and_with_each_other():
    namespace: dict = {}
    exec(targets.companions("mmdet", RESNET50, "backbone.pth", 224)[".py"], namespace)
    beside, fpn, c4 = namespace["model"], *(
        runpy.run_path(str(FOLDER / "mmdet" / f"coco_{name}_1x.py")) for name in ("fpn", "c4")
    )
    for found in (fpn, c4):
        for part in ("data_preprocessor", "backbone"):
            mine = {k: v for k, v in beside[part].items() if k not in ("type", "depth", "base_channels")}
            assert merged(found["model"][part], mine) == found["model"][part]
        assert found["train_cfg"]["max_iters"] == 90000 and 8 * found["train_dataloader"]["batch_size"] == 16
        assert found["param_scheduler"][1]["milestones"] == [60000, 80000]
        assert found["optim_wrapper"]["optimizer"]["lr"] == 0.02
        assert [side for _, side in found["train_pipeline"][2]["scales"]] == list(range(640, 801, 32))
    shared = ("train_pipeline", "train_dataloader", "train_cfg", "param_scheduler", "default_hooks")
    assert all(fpn[name] == c4[name] for name in shared)
    shared_head = c4["model"]["roi_head"]["shared_head"]  # the last stage, which would otherwise start anew
    assert shared_head["init_cfg"] == c4["model"]["backbone"]["init_cfg"] and not shared_head["norm_eval"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small backbone of random weights for images of 64 px, as `export --to=huggingface` writes it."""
    pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    torch.set_num_threads(1)  # tests run side by side
    c = reference.small_config(name="resnet18")
    folder = tmp_path_factory.mktemp("weights") / "backbone"
    outgoing.export(reference.run_of(c, reference.random_state(c)), "huggingface", str(folder), size=64)
    return folder


def coloured(folder: Path, per_class: int) -> None:
    """Photos that their colour tells apart, in a folder a class."""
    rng = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green")):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            image = rng.integers(0, 90, (70, 80, 3), np.uint8)
            image[..., channel] += 150
            Image.fromarray(image).save(folder / name / f"{i}.png")


def test_a_classifier_learns_from_exported_weights(weights, tmp_path):
    import torch
    import transformers

    hf = SimpleNamespace(**runpy.run_path(str(FOLDER / "hf_classify.py")))
    coloured(tmp_path / "train", 16)
    coloured(tmp_path / "val", 8)
    fixed = ["--batch-size=8", "--workers=0", "--log-every=1", f"--weights={weights}", f"--photos={tmp_path}"]
    figures = hf.fine_tune(hf.parse([*fixed, "--steps=40", f"--out={tmp_path / 'out'}"]))
    assert figures["eval_top1"] == 1.0
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [line["loss"] for line in history if "loss" in line]
    assert len(losses) == 40 and np.mean(losses[-5:]) < 0.5 * losses[0]
    trained = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert trained.config.id2label == {0: "green", 1: "red"}
    before = transformers.AutoModel.from_pretrained(weights).state_dict()
    after = trained.resnet.state_dict()
    assert before.keys() == after.keys()
    # It began at the weights, and moved.
    first = "embedder.embedder.convolution.weight"
    change = (after[first] - before[first]).norm() / before[first].norm()
    assert 0 < change < 0.8 and not torch.equal(after[first], before[first])


def test_the_crop_is_a_part_of_the_photo_of_the_asked_size(weights):
    import torch

    hf = SimpleNamespace(**runpy.run_path(str(FOLDER / "hf_classify.py")))
    ramp = np.broadcast_to(np.arange(120, dtype=np.uint8)[None, :, None], (40, 120, 3))
    torch.manual_seed(0)
    spans = []
    for _ in range(60):
        crop = np.asarray(hf.random_crop(Image.fromarray(ramp), 32))[16, :, 0].astype(int)
        assert crop.shape == (32,) and np.all(np.diff(crop) * np.sign(crop[-1] - crop[0]) >= 0)
        spans.append(crop[-1] - crop[0])
    assert min(spans) < -8 and max(spans) > 8  # mirrored, and not
    assert max(map(abs, spans)) <= 60  # at most 4/3 of 40 px wide


def test_the_command_in_the_guide_is_one(weights):
    hf = SimpleNamespace(**runpy.run_path(str(FOLDER / "hf_classify.py")))
    for text in ((FOLDER / "README.md").read_text(), hf.__doc__):
        (line,) = re.findall(r"^python launch/transfer/hf_classify.py (.*)$", text, flags=re.M)
        assert hf.parse(shlex.split(line)).labels == "labels.csv"


def test_a_broken_photo_is_passed_over(weights, tmp_path, capsys):
    hf = SimpleNamespace(**runpy.run_path(str(FOLDER / "hf_classify.py")))
    coloured(tmp_path, 3)
    (tmp_path / "green" / "1.png").write_bytes(b"no picture")
    source = open_source({"kind": "folder", "roots": (str(tmp_path),), "label_from_folder": True})
    prepare = transformers_of(weights)
    found = [hf.Photos(source, prepare, crop)[i] for crop in (False, True) for i in range(len(source))]
    assert [f["labels"] for f in found] == [0, 0, 0, 1, 1, 1] * 2
    assert all(f["pixel_values"].shape == (3, 64, 64) for f in found)
    assert capsys.readouterr().out.count("passed over: ") == 2


def transformers_of(weights):
    import transformers

    return transformers.AutoImageProcessor.from_pretrained(weights)


def test_classes_that_differ_stop_with_one_line(weights, tmp_path):
    coloured(tmp_path / "train", 2)
    coloured(tmp_path / "val", 2)
    (tmp_path / "val" / "red").rename(tmp_path / "val" / "blue")
    command = [sys.executable, FOLDER / "hf_classify.py", f"--weights={weights}", f"--photos={tmp_path}"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, f"--out={tmp_path / 'out'}"], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().endswith("the classes of train and val differ")
    assert "Traceback" not in done.stderr


def test_fine_tuning_on_real_photos(weights, photos, tmp_path):
    """A few steps on Imagenette, by its CSV."""
    hf = SimpleNamespace(**runpy.run_path(str(FOLDER / "hf_classify.py")))
    with open(photos / "imagenette" / "labels.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    few = [row for split in ("train", "val") for row in [r for r in rows if r["split"] == split][::100]]
    with open(tmp_path / "few.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(few)
    given = [f"--weights={weights}", f"--photos={photos / 'imagenette'}", f"--labels={tmp_path / 'few.csv'}",
             f"--out={tmp_path / 'out'}", "--batch-size=16", "--workers=0", "--steps=4"]  # fmt: skip
    figures = hf.fine_tune(hf.parse(given))
    assert 0 <= figures["eval_top1"] <= 1 and np.isfinite(figures["eval_loss"])
    saved = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert saved["eval_top1"] == figures["eval_top1"]
    assert len(json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]) == 10
