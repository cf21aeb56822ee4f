"""A checkpoint from Python, and the program that draws and lists regions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import salcl_jax
from salcl_jax import checkpoint, config_record, guidance
from salcl_jax import config as lib
from salcl_jax.data.sources import open_source
from salcl_jax.models.network import build
from salcl_jax.train_step import make_init

ROOT = Path(__file__).parents[1]
RNG = np.random.default_rng(0)
TINY = {
    "model.width": 4, "model.projector_hidden": 16, "model.projector_out": 16, "model.predictor_hidden": 16,
    "data.canvas": 32, "saliency.size": 32, "crops.size": 32, "eval.branch": "target",
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with a checkpoint whose branches differ; its configuration and state."""
    folder = tmp_path_factory.mktemp("api")
    c = lib.base()
    lib.small(c)
    c.update_from_flattened_dict(TINY)
    c = lib.finish(c, devices=1, images=100)
    state = jax.jit(make_init(build(**c.model), c))()
    state = state._replace(params=jax.tree.map(lambda x: x * 1.5, state.params))
    with checkpoint.Checkpointer(str(folder / "checkpoints"), every_steps=0, keep=2) as keeper:
        keeper.save(7, state, {"fields": config_record.learnt_fields(c), "history": {}}, force=True)
    return folder, c, state


def pictures(count, high=40, wide=56):
    return RNG.integers(0, 256, (count, high, wide, 3), np.uint8)


@pytest.mark.parametrize("branch", ["online", "target"])
def test_features_are_those_of_the_network(saved, branch):
    folder, c, state = saved
    model = salcl_jax.load(str(folder), batch_size=8)
    assert model.step == 7 and model.config.model.width == 4 and model.batch_size == 8
    images = pictures(11)
    found = model.features(images, branch)
    params, stats = guidance.branch(state, branch)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    x = jax.numpy.asarray((images / 255 - mean) / std, np.float32)[:, None]
    expected, _ = build(**c.model).encode(params, stats, x, train=False)
    assert found["pooled"].shape == (11, expected["pooled"].shape[-1])
    for stage in ("stage2", "stage4", "pooled"):
        wanted = np.asarray(expected[stage][:, 0])  # sums of float32: rounding goes with the largest terms
        np.testing.assert_allclose(found[stage], wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_saliency_of_images_of_any_size(saved):
    model = salcl_jax.load(str(saved[0] / "checkpoints" / "7"), batch_size=8)
    images = [pictures(1, h, w)[0] for h, w in ((40, 56), (32, 32), (90, 20))]
    maps, regions = model.saliency(images)
    assert maps.shape[0] == 3 and maps.min() >= -1e-6 and maps.max() <= 1 + 1e-6
    assert regions.boxes.shape == (3, 3, 4) and regions.valid.dtype == bool
    alone, own = model.saliency(images[1:2])
    np.testing.assert_allclose(alone[0], maps[1], atol=1e-5)  # the batch it comes in does not matter
    np.testing.assert_allclose(own.boxes[0], regions.boxes[1], atol=1e-5)


def test_the_untrained_network_is_the_one_that_the_run_began_with(saved):
    folder, c, state = saved
    trained = salcl_jax.load(str(folder), batch_size=8)
    model, images = trained.untrained(), pictures(3)
    assert model.step == 0 and trained.step == 7
    jax.tree.map(  # what was saved is the first state, but for its parameters
        lambda first, saved: np.testing.assert_allclose(1.5 * first, saved, rtol=1e-5, atol=1e-7),
        jax.device_get(model.state.params), jax.device_get(state.params),
    )  # fmt: skip
    online, target = (model.features(images, branch)["pooled"] for branch in ("online", "target"))
    np.testing.assert_allclose(online, target, rtol=1e-3, atol=1e-5)
    assert np.abs(online - trained.features(images, "online")["pooled"]).max() > 1e-3


def test_wrong_images_and_places_are_told(saved, tmp_path):
    model = salcl_jax.load(str(saved[0]))
    with pytest.raises(ValueError, match=r"uint8 \[n, h, w, 3\]"):
        model.features(pictures(2).astype(np.float32))
    with pytest.raises(FileNotFoundError):
        salcl_jax.load(str(tmp_path))


def program(*arguments):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "salcl_jax.saliency", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)


def test_the_program_draws_and_lists_regions(saved, tmp_path):
    photos = tmp_path / "photos"
    (photos / "more").mkdir(parents=True)
    for name, (high, wide) in {"a.png": (40, 60), "more/b.jpg": (80, 50)}.items():
        Image.fromarray(pictures(1, high, wide)[0]).save(photos / name)
    (photos / "broken.jpg").write_bytes(b"no photo")
    done = program(f"--checkpoint={saved[0]}", f"--out={tmp_path / 'out'}", photos)
    assert done.returncode == 0, done.stderr
    assert "2 photos" in done.stdout and "1 skipped" in done.stdout and "broken.jpg: not_image" in done.stderr
    found = json.loads((tmp_path / "out" / "regions.json").read_text())
    sizes = {one["file_name"]: (one["height"], one["width"]) for one in found["images"]}
    assert sizes == {"a.png": (40, 60), "more/b.jpg": (80, 50)}
    number = {one["id"]: one["file_name"] for one in found["images"]}
    model = salcl_jax.load(str(saved[0]))
    for name, (high, wide) in sizes.items():
        with Image.open(photos / name) as image:
            _, regions = model.saliency([np.asarray(image.convert("RGB"))])
        own = [note for note in found["annotations"] if number[note["image_id"]] == name]
        assert len(own) == regions.valid.sum() > 0
        for note in own:
            x, y, w, h = note["bbox"]
            box = np.array([y / high, x / wide, (y + h) / high, (x + w) / wide])
            assert np.abs(regions.boxes[0] - box).max(1).min() < 0.01
        picture = Image.open(tmp_path / "out" / "pictures" / f"{name}.png")
        assert picture.size == (2 * wide, high)
    # What was written can be read as annotations of the same photos.
    spec = {"kind": "folder", "roots": (str(photos),), "annotations": str(tmp_path / "out" / "regions.json")}
    source = open_source(spec)
    assert len(source) == 2 and source.class_names == ("salient region",)


@pytest.mark.parametrize("arguments, words", [
    ((), "give --checkpoint"), (("--checkpoint=x", "--out=y"), "name photos"),
    (("--checkpoint=x", "--out=y", "nonesuch.jpg"), "nonesuch.jpg: no such file"),
])  # fmt: skip
def test_a_wrong_command_is_one_line(arguments, words):
    done = program(*arguments)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
