"""The built-in scenes: exact ground truth, determinism, working dials, tfds round trip."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from salcl_jax.data import scenes, sources
from salcl_jax.data.shapes import CLASSES


def bounds(mask: np.ndarray) -> list[float]:
    rows, columns = np.nonzero(mask)
    high, wide = mask.shape
    edges = rows.min() / high, columns.min() / wide
    return [*edges, (rows.max() + 1) / high, (columns.max() + 1) / wide]


def test_a_scene_follows_from_seed_and_index():
    first, again = scenes.render(3, 5), scenes.render(3, 5)
    for key in first:
        np.testing.assert_array_equal(first[key], again[key])
    assert not np.array_equal(first["image"], scenes.render(3, 6)["image"])
    assert not np.array_equal(first["image"], scenes.render(4, 5)["image"])


def test_boxes_bound_the_visible_masks_exactly():
    for index in range(40):
        scene = scenes.render(0, index, objects=(2, 5), object_size=(0.3, 0.6))
        assert scene["image"].dtype == np.uint8 and scene["image"].shape == (96, 96, 3)
        assert len(scene["boxes"]) == len(scene["classes"]) == len(scene["masks"]) >= 1
        want = [bounds(mask) for mask in scene["masks"]]
        np.testing.assert_allclose(scene["boxes"], want, atol=1e-6)
        assert scene["masks"].sum(0).max() == 1  # a pixel has one owner


def grow(mask: np.ndarray) -> np.ndarray:
    """One pixel more on all sides: as far as the soft edge of an object reaches."""
    shifts = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return np.logical_or.reduce([np.roll(mask, shift, (0, 1)) for shift in shifts])


def test_masks_are_where_the_object_is_painted():
    for index in range(10):
        large, small = (
            scenes.render(1, index, objects=(1, 1), object_size=size, clutter=0.0)
            for size in ((0.4, 0.5), (0.07, 0.08))
        )  # the same background under two objects
        changed = (large["image"] != small["image"]).any(-1)
        mask, other = large["masks"][0], grow(small["masks"][0])
        assert changed[mask & ~other].mean() > 0.95
        assert (changed & ~grow(mask) & ~other).sum() < 10  # but for the soft tip of a sharp corner


def test_hidden_objects_are_dropped_from_the_annotations():
    crowded = [scenes.render(2, i, objects=(8, 8), object_size=(0.5, 0.8)) for i in range(20)]
    counts = [len(scene["classes"]) for scene in crowded]
    assert min(counts) >= 1 and np.mean(counts) < 8
    apart = [scenes.render(2, i, objects=(2, 2), object_size=(0.1, 0.15)) for i in range(20)]
    assert np.mean([len(scene["classes"]) for scene in apart]) > 1.8


def test_dials_have_effect():
    sizes = {}
    for size in ((0.15, 0.2), (0.5, 0.6)):
        drawn = [scenes.render(0, i, objects=(1, 1), object_size=size) for i in range(20)]
        sides = [(s["boxes"][:, 2:] - s["boxes"][:, :2]).max() for s in drawn]
        assert max(sides) <= size[1] + 2 / 96
        sizes[size] = np.mean(sides)
    assert sizes[(0.5, 0.6)] > 2.5 * sizes[(0.15, 0.2)]
    plain, busy = (scenes.render(0, 1, clutter=c)["image"].astype(int) for c in (0.0, 1.0))
    assert (np.abs(plain - busy).max(-1) > 20).mean() > 0.02
    classes = np.concatenate([scenes.render(0, i, num_classes=16)["classes"] for i in range(200)])
    assert set(classes.tolist()) == set(range(16))
    assert scenes.render(0, 0, size=64)["image"].shape == (64, 64, 3)
    assert len(CLASSES) == 16 == len(set(scenes.CLASS_NAMES))


def test_shapes_fill_their_patch_and_differ():
    axis = np.linspace(-1.1, 1.1, 64, dtype=np.float32)
    v, u = np.meshgrid(axis, axis, indexing="ij")
    masks = np.stack([outline(u, v) < 0 for _, outline, _ in CLASSES])
    share = masks.mean((1, 2))
    assert share.min() > 0.1 and share.max() < 0.75
    common, either = masks[:, None] & masks[None], masks[:, None] | masks[None]
    overlap = common.sum((2, 3)) / either.sum((2, 3))
    assert (overlap - np.eye(16)).max() < 0.9
    for _, outline, texture in CLASSES:
        mix = texture(u, v, outline(u, v))
        assert mix.min() >= 0 and mix.max() <= 1 and mix.std() > 0.05


def test_colours_do_not_tell_the_class():
    pairs, kinds = [], []
    for index in range(300):
        scene = scenes.render(5, index, num_classes=4, objects=(1, 1), clutter=0.0)
        inside = scene["image"][scene["masks"][0]].astype(float)
        inside = inside[inside.sum(1).argsort()]
        tenth = max(1, len(inside) // 10)  # what it is painted with, however much of each
        pairs.append(np.concatenate([inside[:tenth].mean(0), inside[-tenth:].mean(0)]))
        kinds.append(int(scene["classes"][0]))
    pairs, kinds = np.array(pairs), np.array(kinds)
    half = len(kinds) // 2  # nearest neighbour in both colours: chance is 1/4
    gaps = ((pairs[half:, None] - pairs[None, :half]) ** 2).sum(-1)
    assert np.mean(kinds[:half][gaps.argmin(1)] == kinds[half:]) < 0.45


@pytest.mark.parametrize(
    "dials",
    [{"num_classes": 17}, {"objects": (0, 2)}, {"object_size": (0.01, 0.1)}, {"clutter": 1.5}],
)
def test_impossible_dials_are_refused(dials):
    with pytest.raises(ValueError, match="scenes: "):
        scenes.Dials(**dials)


def test_the_default_dials_can_be_given_as_well(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    from salcl_jax.data import scenes_tfds

    made = []
    monkeypatch.setattr(scenes_tfds.SalclScenes, "is_prepared", lambda builder: made.append(builder) or True)
    for dials in ({}, {"num_train": scenes.Dials().num_train}, {"num_train": 7}):
        scenes_tfds.prepare(str(tmp_path), **dials)
    names = [builder.builder_config.name for builder in made]
    assert names[0] == names[1] != names[2]


def test_tfds_round_trip(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    from salcl_jax.data import scenes_tfds

    dials = {"num_train": 12, "num_val": 4, "size": 48, "objects": (1, 3), "seed": 7}
    spec = {"kind": "scenes", "data_dir": str(tmp_path), "scenes": dials, "expected": 12}
    source = sources.open_source(spec)
    assert source.class_names == scenes.CLASS_NAMES[:10]
    plain = scenes.Dials(**dials)
    for i in range(12):
        scene, record = plain.render(i), source.read(i)
        image = np.asarray(Image.open(io.BytesIO(record["encoded"])))
        np.testing.assert_array_equal(image, scene["image"])
        np.testing.assert_array_equal(record["boxes"], scene["boxes"])
        np.testing.assert_array_equal(record["classes"], scene["classes"])
        assert record["label"] == scene["classes"][scene["masks"].sum((1, 2)).argmax()]
        numbers = np.asarray(Image.open(io.BytesIO(record["mask"])))
        for number, mask in enumerate(scene["masks"], 1):
            np.testing.assert_array_equal(numbers == number, mask)
        assert ((numbers == 0) == ~scene["masks"].any(0)).all()
    builder = scenes_tfds.prepare(str(tmp_path), **dials)
    row = next(iter(builder.as_dataset(split="validation").as_numpy_iterator()))
    scene = plain.render(plain.split("validation")[0])
    for number, mask in enumerate(scene["masks"], 1):
        np.testing.assert_array_equal(row["instances"][..., 0] == number, mask)
    assert not np.array_equal(row["image"], plain.render(0)["image"])
    other = scenes_tfds.config_of(dataclasses.replace(plain, clutter=0.9))
    assert other.name != builder.builder_config.name
    with pytest.raises(ValueError, match="unknown dial colour"):
        scenes_tfds.prepare(str(tmp_path), colour=1)


def test_scenes_are_rendered_where_tfds_is_not_installed(monkeypatch):
    from salcl_jax.data import tfds_source

    monkeypatch.setattr(tfds_source.importlib.util, "find_spec", lambda name: None)
    dials = {"num_train": 3, "num_val": 2}
    source = sources.open_source({"kind": "scenes", "split": "validation", "scenes": dials})
    first = scenes.Dials().split("validation")[0]
    assert len(source) == 2
    record, scene = source.read(1), scenes.render(0, first + 1)
    np.testing.assert_array_equal(record["image"], scene["image"])
    assert record["mask"].dtype == np.uint8 and source.has_masks
    assert record["mask"].max() == len(scene["masks"]) == len(record["difficult"])
    for number, mask in enumerate(scene["masks"], 1):
        np.testing.assert_array_equal(record["mask"] == number, mask)
