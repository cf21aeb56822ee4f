"""Label maps: found by the photo's name, values as stored, aligned with the canvas, 255 = unknown."""

import io
import json
import pathlib
import types

import numpy as np
import pytest
from PIL import Image

from salcl_jax.data import masks, sources
from salcl_jax.data.pipeline import eval_batches, train_batches

COLOURS = np.random.default_rng(0).integers(0, 256, 768).tolist()


def write(path: pathlib.Path, values: np.ndarray, palette: bool = False, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    if palette:
        image = Image.fromarray(values, "L")
        image.putpalette(COLOURS)
        assert image.mode == "P"
    image.save(path, **options)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, -1)


def nearest(values: np.ndarray, side: int) -> np.ndarray:
    """The value under the centre of each of side x side cells."""
    rows, columns = (((np.arange(side) + 0.5) * n / side).astype(int) for n in values.shape)
    return values[rows][:, columns]


def read_masks(source: sources.Source, canvas: int, **options) -> np.ndarray:
    batches = list(eval_batches(source, batch_size=2, canvas=canvas, with_masks=True, workers=1, **options))
    found = np.concatenate([batch["masks"] for batch in batches])
    assert found.dtype == np.uint8 and found.shape[1:] == (canvas, canvas)
    assert len(found) == sum(len(batch["image"]) for batch in batches)
    return found


@pytest.mark.parametrize("use_tf", [False, pytest.param(True, id="tf.data")])
def test_masks_are_aligned_with_their_photos(tmp_path, use_tf):
    if use_tf:
        pytest.importorskip("tensorflow")
    rng = np.random.default_rng(1)
    values = []
    for number, (high, wide) in enumerate([(23, 57), (65, 17), (9, 201)]):
        coarse = rng.integers(0, 2, (3, 4)).astype(np.uint8)
        block = np.kron(coarse, np.ones((-(-high // 3), -(-wide // 4)), np.uint8))[:high, :wide]
        write(tmp_path / f"photos/{number}.png", grey(255 * block))
        write(tmp_path / f"maps/{number}.png", 7 * block, palette=number == 1)
        values.append(7 * block)
    spec = {"kind": "folder", "roots": str(tmp_path / "photos"), "masks": str(tmp_path / "maps")}
    source = sources.open_source(spec)
    assert source.has_masks
    found = read_masks(source, 24, use_tf=use_tf)
    batches = eval_batches(source, batch_size=2, canvas=24, use_tf=use_tf)
    images = np.concatenate([batch["image"] for batch in batches])
    for got, image, want in zip(found, images, values, strict=False):
        np.testing.assert_array_equal(got, nearest(want, 24))
        sure = (image[..., 0] < 20) | (image[..., 0] > 235)  # not blurred by the photo's own resize
        assert sure.mean() > 0.5
        np.testing.assert_array_equal((got == 7)[sure], image[..., 0][sure] > 127)
    assert len(found) == 4 and (found[3] == 255).all()  # padding


def test_a_hand_made_map():
    values = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.uint8)
    whole, part = (0.0, 0.0, 1.0, 1.0), (0.0, 0.5, 1.0, 1.0)
    assert masks.to_canvas(values, whole, 2).tolist() == [[2, 4], [6, 8]]
    assert masks.to_canvas(values, part, 2).tolist() == [[3, 4], [7, 8]]
    assert masks.to_canvas(values[:, :1], whole, 2).tolist() == [[1, 1], [5, 5]]
    assert masks.to_canvas(None, whole, 2).tolist() == [[255, 255]] * 2


def test_values_are_kept_whatever_the_format(tmp_path):
    values = np.array([[0, 3, 20], [255, 1, 254]], np.uint8)
    forms = {
        "grey": (values, False, {}),
        "palette": (values, True, {"transparency": 3}),
        "small": (values % 4, True, {"bits": 2}),
        "bits": (values % 2 == 1, False, {}),
        "wide": (values.astype(np.uint16) * 2, False, {}),
    }
    for name, (stored, palette, options) in forms.items():
        write(tmp_path / "photos" / f"{name}.jpg", grey(values))
        write(tmp_path / "maps" / f"{name}.png", stored, palette, **options)
    spec = {"kind": "folder", "roots": str(tmp_path / "photos"), "masks": str(tmp_path / "maps")}
    source = sources.open_source(spec)
    names = sorted(forms)
    for name, i in zip(names, range(len(source)), strict=True):
        want = np.minimum(forms[name][0].astype(int), 255)  # above 255 is unknown
        np.testing.assert_array_equal(masks.decode(source.read(i)["mask"]), want)
    array = np.full((2, 2), 9, np.uint8)
    assert masks.decode(array) is array


def test_unknown_is_255_everywhere(tmp_path):
    block = np.zeros((12, 12), np.uint8)
    for name in ("bad", "colour", "cut", "good", "none", "photo"):
        write(tmp_path / f"photos/{name}.jpg", grey(block))
        write(tmp_path / f"maps/{name}.png", block)
    (tmp_path / "photos/photo.jpg").write_bytes(b"no photo")
    (tmp_path / "maps/bad.png").write_bytes(b"no map")
    write(tmp_path / "maps/colour.png", grey(block))
    whole = (tmp_path / "maps/cut.png").read_bytes()
    (tmp_path / "maps/cut.png").write_bytes(whole[: whole.index(b"IDAT") + 6])
    (tmp_path / "maps/none.png").unlink()
    spec = {"kind": "folder", "roots": str(tmp_path / "photos"), "masks": str(tmp_path / "maps")}
    source = sources.open_source(spec)
    assert "mask" not in source.read(4) and "mask" in source.read(3)
    unknown = (read_masks(source, 6, use_tf=False) == 255).all((1, 2))
    assert unknown.tolist() == [True, True, True, False, True, True]
    (tmp_path / "maps/good.png").unlink()  # after the source was opened
    assert (read_masks(source, 6, use_tf=False) == 255).all()
    bare = sources.open_source({"kind": "folder", "roots": str(tmp_path / "photos")})
    with pytest.raises(ValueError, match="has no masks"):
        eval_batches(bare, batch_size=2, canvas=6, with_masks=True)


def test_maps_lie_flat_or_in_the_photos_folders(tmp_path):
    for name in ("a/1", "a/2", "b/1", "b/3"):
        write(tmp_path / f"all/{name}.jpg", grey(np.zeros((8, 8), np.uint8)))
    for number, name in enumerate(("a/1", "b/1", "3"), 10):
        write(tmp_path / f"all/maps/{name}.PNG", np.full((8, 8), number, np.uint8), format="PNG")
    spec = {"kind": "folder", "roots": str(tmp_path / "all"), "masks": f"{tmp_path}/all/../all/maps/"}
    source = sources.open_source(spec)
    assert len(source) == 4  # the maps lie below the root, and are no photos
    assert read_masks(source, 4, use_tf=False)[:, 0, 0].tolist() == [10, 255, 11, 12]
    (tmp_path / "all/maps/b/1.PNG").rename(tmp_path / "all/maps/1.PNG")
    (tmp_path / "all/maps/a/1.PNG").unlink()
    with pytest.raises(ValueError, match=r"1.PNG: 2 photos have this name"):
        sources.open_source(spec)


def test_maps_beside_the_photos(tmp_path):
    write(tmp_path / "1.jpg", grey(np.zeros((8, 8), np.uint8)))
    write(tmp_path / "1.png", np.full((8, 8), 5, np.uint8))
    source = sources.open_source({"kind": "folder", "roots": str(tmp_path), "masks": str(tmp_path)})
    assert len(source) == 1 and (read_masks(source, 4, use_tf=False)[0] == 5).all()


def test_faults_of_mask_folders(tmp_path):
    block = np.zeros((8, 8), np.uint8)
    write(tmp_path / "photos/one.jpg", grey(block))
    write(tmp_path / "maps/other.png", block)
    write(tmp_path / "colours/one.png", grey(block))
    spec = {"kind": "folder", "roots": str(tmp_path / "photos")}
    for name, message in (("maps", r"maps: no label map .* one.png"), ("colours", "one.png: RGB pixels")):
        with pytest.raises(ValueError, match=message) as caught:
            sources.open_source(spec | {"masks": str(tmp_path / name)})
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no such folder; check data.masks"):
        sources.open_source(spec | {"masks": str(tmp_path / "none")})
    with pytest.raises(ValueError, match="masks or regions"):
        sources.open_source(spec | {"masks": str(tmp_path / "maps"), "regions": "index.csv"})


def test_maps_belong_to_the_upright_photo(tmp_path):
    upright = np.zeros((20, 40), np.uint8)
    upright[:, 30:] = 1  # the right quarter
    lying = np.rot90(upright)  # as a camera on its side stores it; 6 = turn clockwise to see it
    exif = Image.Exif()
    exif[0x0112] = 6
    write(tmp_path / "photos/1.jpg", grey(255 * lying), exif=exif, quality=95)
    write(tmp_path / "maps/1.png", upright)
    spec = {"kind": "folder", "roots": str(tmp_path / "photos"), "masks": str(tmp_path / "maps")}
    (batch,) = eval_batches(sources.open_source(spec), batch_size=1, canvas=8, with_masks=True, use_tf=False)
    assert batch["aspect"].tolist() == [2.0]
    np.testing.assert_array_equal(batch["masks"][0], nearest(upright, 8))
    sure = np.delete(np.arange(8), [5, 6])  # away from the border of the two halves
    np.testing.assert_array_equal(batch["image"][0, :, sure, 0] > 127, batch["masks"][0].T[sure] == 1)


def test_training_does_not_look_at_masks(tmp_path, monkeypatch):
    block = np.zeros((8, 8), np.uint8)
    write(tmp_path / "photos/1.png", grey(block))
    write(tmp_path / "maps/1.png", block)
    spec = {"kind": "folder", "roots": str(tmp_path / "photos"), "masks": str(tmp_path / "maps")}
    source = sources.open_source(spec)

    def refuse(*args):
        raise AssertionError("a mask was decoded")

    monkeypatch.setattr(masks, "decode", refuse)
    batch = next(train_batches(source, batch_size=2, canvas=8, seed=0, use_tf=False))
    assert set(batch) == {"image", "aspect", "id", "skipped"}
    (batch,) = eval_batches(source, batch_size=1, canvas=8, use_tf=False)
    assert set(batch) == {"image", "aspect", "id", "skipped", "mask"}
    with pytest.raises(AssertionError, match="decoded"):
        list(eval_batches(source, batch_size=1, canvas=8, use_tf=False, with_masks=True))


def test_masks_of_arrays(tmp_path):
    image = np.zeros((3, 8, 8, 3), np.uint8)
    mask = np.random.default_rng(0).integers(0, 256, (3, 6, 10), np.uint8)
    np.savez(tmp_path / "data.npz", image=image, mask=mask)
    source = sources.open_source({"kind": "arrays", "path": str(tmp_path / "data.npz")})
    assert source.has_masks
    found = read_masks(source, 4)
    for got, want in zip(found, mask, strict=False):
        np.testing.assert_array_equal(got, nearest(want, 4))
    for wrong in (mask.astype(np.int32), mask[..., None], mask[:2]):
        np.savez(tmp_path / "bad.npz", image=image, mask=wrong)
        with pytest.raises(ValueError, match="mask"):
            sources.open_source({"kind": "arrays", "path": str(tmp_path / "bad.npz")})


def test_numbers_of_objects_become_classes():
    numbers = np.array([[0, 1, 2], [3, 255, 1]], np.uint8)
    found = masks.by_class(numbers, np.int32([4, 0, 4]))
    np.testing.assert_array_equal(found, [[0, 5, 1], [5, 255, 5]])
    assert masks.by_class(None, np.int32([1])) is None
    assert masks.by_class(numbers, None) is numbers


@pytest.mark.parametrize("installed", [True, False])
def test_masks_of_the_built_in_scenes_are_classes(tmp_path, monkeypatch, installed):
    from salcl_jax.data import scenes, tfds_source

    if not installed:
        monkeypatch.setattr(tfds_source.importlib.util, "find_spec", lambda name: None)
    dials = {"size": 32, "num_train": 2, "num_val": 1}
    source = sources.open_source({"kind": "scenes", "scenes": dials, "data_dir": str(tmp_path)})
    (batch,) = eval_batches(source, batch_size=2, canvas=32, with_masks=True)
    for i in range(2):
        scene = scenes.Dials(**dials).render(i)
        wanted = np.zeros((32, 32), np.uint8)
        for mask, kind in zip(scene["masks"], scene["classes"], strict=True):
            wanted[mask] = kind + 1
        np.testing.assert_array_equal(batch["masks"][i], wanted)


def test_numbers_without_objects_are_no_masks(tmp_path):
    """A tfds data set with a map of instances, but nothing that tells their classes."""
    tf, tfds = pytest.importorskip("tensorflow"), pytest.importorskip("tensorflow_datasets")
    from salcl_jax.data import tfds_source

    write(tmp_path / "photo.png", np.zeros((8, 8, 3), np.uint8))
    png = tf.train.Feature(bytes_list=tf.train.BytesList(value=[(tmp_path / "photo.png").read_bytes()]))
    example = tf.train.Example(features=tf.train.Features(feature={"image": png, "instances": png}))
    with tf.io.TFRecordWriter(str(tmp_path / "0.tfrecord")) as writer:
        writer.write(example.SerializeToString())
    file = types.SimpleNamespace(filename=str(tmp_path / "0.tfrecord"), skip=0, take=1)
    info = types.SimpleNamespace(
        features={"image": None, "instances": tfds.features.Image(shape=(8, 8, 1))},
        splits={"train": types.SimpleNamespace(file_instructions=[file])},
        file_format=types.SimpleNamespace(value="tfrecord"), full_name="made/1.0.0",
    )  # fmt: skip
    source = tfds_source.open_builder(types.SimpleNamespace(info=info), "train")
    assert set(source.read(0)) == {"encoded"} and not source.has_masks
    with pytest.raises(ValueError, match="has no masks"):
        next(iter(eval_batches(source, batch_size=1, canvas=8, with_masks=True)))


def with_masks(folder, name):
    """The validation photos of a folder with their masks, and the path of its annotations."""
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    path = folder / "annotations_val.json"
    spec = {"kind": "folder", "roots": str(folder / "images"), "annotations": str(path)}
    return sources.open_source(spec | {"masks": str(folder / name)}), path


def test_classes_of_real_masks(photos):
    source, path = with_masks(photos / "voc_scenes", "masks")
    told = [image["mask_labels"] for image in json.loads(path.read_text())["images"]]
    for i, want in enumerate(told):
        record = source.read(i)
        found = masks.decode(record["mask"])
        assert sorted(set(found.ravel().tolist()) - {0, 255}) == sorted(want)
        assert found.shape[::-1] == Image.open(io.BytesIO(record["encoded"])).size


def test_instances_of_a_part_of_real_photos(photos):
    source, path = with_masks(photos / "coco_scenes", "instances")
    images = json.loads(path.read_text())["images"]
    full = [i for i, image in enumerate(images) if image["segmentation"] == "full"]
    assert [i for i in range(len(source)) if "mask" in source.read(i)] == full and len(full) > 10
