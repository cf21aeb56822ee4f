"""Sources over prepared tfds data sets and over the built-in scenes; never downloads."""

import functools
import importlib.util
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from salcl_jax.data import files, records, scenes
from salcl_jax.data.sources import Source


def _installed() -> bool:
    names = ("tensorflow", "tensorflow_datasets")
    return all(importlib.util.find_spec(name) is not None for name in names)


def open_prepared(name: str, split: str, data_dir: str | None) -> Source:
    """A split (also 'a+b' and 'a[:10%]') of a tfds data set that is already on disk.

    Raises FileNotFoundError with the command that prepares it, ValueError for an unknown split.
    """
    if not name:
        raise ValueError("tfds data: no name given; set data.name, for example coco/2017")
    if not _installed():
        raise ValueError(f"{name}: needs `pip install tensorflow-cpu tensorflow-datasets`")
    import tensorflow_datasets as tfds

    where = os.path.expanduser(data_dir or tfds.core.constants.DATA_DIR)
    try:
        _check_features(epath.Path(where) / name.split(":")[0])
        builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
        prepared = builder.is_prepared()
    except tfds.core.DatasetNotFoundError:
        prepared = False
    except Exception as error:  # tfds, json and protobuf raise a dozen types on damaged files
        reason = " ".join(str(error).split())
        message = f"{name}: its description in {where} cannot be read ({reason}); prepare it again"
        raise ValueError(message) from error
    if not prepared:
        raise FileNotFoundError(
            f"{name}: not prepared in {where}; run `tfds build {name} --data_dir={where}` there "
            "(coco and imagenet: launch/prepare_data.sh), "
            "or set data.data_dir"
        )
    return open_builder(builder, split)


def _check_features(folder: epath.Path) -> None:
    """Raise ValueError where a data set names feature classes of other packages: tfds would import them."""
    for path in [*folder.glob("*/features.json"), *folder.glob("*/*/features.json")]:
        for name in _classes(json.loads(path.read_text())):
            if "." in name and not name.startswith("tensorflow_datasets."):
                raise ValueError(f"{path}: names the class {name!r}, which is not one of tensorflow-datasets")


def _classes(value: Any) -> Iterator[str]:
    """Names of classes anywhere in a features.json, in its present and its former form."""
    if isinstance(value, list):
        yield from itertools.chain.from_iterable(map(_classes, value))
    if isinstance(value, dict):
        for key, part in value.items():
            named = key in ("pythonClassName", "python_class_name", "type") and isinstance(part, str)
            yield from [part] if named else _classes(part)


def open_scenes(dials: Mapping[str, Any], split: str, data_dir: str | None) -> Source:
    """The built-in scenes, written as a tfds data set on first use.

    Where tensorflow or tensorflow-datasets is missing the same pictures are rendered on the fly.
    """
    if not _installed():
        return _rendered(dials, split)
    from salcl_jax.data import scenes_tfds

    return open_builder(scenes_tfds.prepare(data_dir, **dials), split, kind="scenes")


def _rendered(dials: Mapping[str, Any], split: str) -> Source:
    settings = scenes.Dials(**dials)
    first, count = settings.split(split)

    def read(i: int) -> dict[str, Any]:
        scene = settings.render(first + i)
        return {k: scene[k] for k in ("image", "boxes", "classes")} | {
            "label": int(scene["classes"][scenes.largest(scene)]),
            "difficult": np.zeros(len(scene["boxes"]), bool),
            "mask": scenes.instance_map(scene),
            "mask_classes": scene["classes"],
        }

    names = scenes.CLASS_NAMES[: settings.num_classes]
    digest = functools.cache(lambda: files.digest(("scenes", settings.identity(), split)))
    return Source(f"scenes/{split}", "scenes", names, count, read, True, True, True, digest)


def open_builder(builder: Any, split: str, kind: str = "tfds") -> Source:
    """Source over a prepared tfds builder, tfrecord or array_record files."""
    features, name = builder.info.features, f"{builder.info.full_name}:{split}"
    if "image" not in features:
        raise ValueError(f"{name}: has no feature 'image'; its features: {', '.join(features)}")
    try:
        parts = builder.info.splits[split].file_instructions
    except (KeyError, ValueError) as error:
        known = ", ".join(builder.info.splits)
        raise ValueError(f"{name}: no such split; it has {known}") from error
    shards = [(os.fspath(file.filename), file.skip, file.take) for file in parts]
    fetch, size, place = _fetcher(shards, str(builder.info.file_format.value), name)
    has_labels = "label" in features
    has_boxes = "objects" in features and "bbox" in features["objects"]
    # Without objects nothing tells the classes of the numbers in the map.
    has_masks = has_boxes and "instances" in features and _is_map(features["instances"])
    has = has_labels, has_boxes, has_masks
    parse = _parser(*has)
    digest = functools.cache(lambda: files.digest((name, _identity(shards))))

    def read(i: int) -> dict[str, Any]:
        try:
            return parse(fetch(i))
        except Exception as error:  # of the checksum, the format's readers and protobuf
            raise OSError(f"{place(i)}: {error}") from error

    return Source(name, kind, _class_names(features), size, read, *has, digest, place)


def _is_map(feature: Any) -> bool:
    """Whether a feature is an image of one channel of bytes, as the object numbers of the scenes."""
    import tensorflow_datasets as tfds

    image = isinstance(feature, tfds.features.Image)
    return image and feature.shape[-1] == 1 and feature.np_dtype == np.uint8


def _identity(shards: list) -> list[tuple]:
    """Name and size of each file and the records taken of it, wherever the files lie."""
    sizes = [size for size, _ in files.stats([path for path, _, _ in shards])]
    return [
        (os.path.basename(path), skip, take, size)
        for (path, skip, take), size in zip(shards, sizes, strict=True)
    ]


def _fetcher(shards: list, file_format: str, name: str) -> tuple[Callable, int, Callable[[int], str]]:
    """Functions number -> record and number -> where it lies, and the number of records."""
    if file_format == "tfrecord":
        reader = records.Reader(records.build_index(shards))
        return reader, len(reader), reader.place
    if file_format == "array_record":
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        parts = [f"{path}[{skip}:{skip + take}]" for path, skip, take in shards if take]
        reader = ArrayRecordDataSource(parts)
        return reader.__getitem__, len(reader), (name + " record {}").format
    raise ValueError(
        f"{name}: files are {file_format}; run `tfds convert_format` with "
        "--out_file_format=tfrecord on them"
    )


def _class_names(features: Any) -> tuple[str, ...]:
    if "label" in features:
        label = features["label"]
    elif "objects" in features and "label" in features["objects"]:
        label = features["objects"]["label"]
    else:
        return ()
    return tuple(getattr(label, "names", ()) or ())


def _parser(has_labels: bool, has_boxes: bool, has_masks: bool) -> Callable[[bytes], dict[str, Any]]:
    from tensorflow.core.example.example_pb2 import Example

    def parse(record: bytes) -> dict[str, Any]:
        feature = Example.FromString(record).features.feature
        example: dict[str, Any] = {"encoded": feature["image"].bytes_list.value[0]}
        if has_labels:
            value = feature["label"].int64_list.value
            example["label"] = int(value[0]) if value else -1
        if has_boxes:
            boxes = np.array(feature["objects/bbox"].float_list.value, np.float32).reshape(-1, 4)
            classes = np.array(feature["objects/label"].int64_list.value, np.int32)
            classes = classes if len(classes) == len(boxes) else np.zeros(len(boxes), np.int32)
            crowd = np.array(feature["objects/is_crowd"].int64_list.value, bool)
            keep = ~crowd if len(crowd) == len(boxes) else np.ones(len(boxes), bool)
            hard = np.array(feature["objects/is_difficult"].int64_list.value, bool)
            hard = hard if len(hard) == len(boxes) else np.zeros(len(boxes), bool)
            example |= {"boxes": boxes[keep], "classes": classes[keep], "difficult": hard[keep]}
        if has_masks:
            example["mask"] = feature["instances"].bytes_list.value[0]
            example["mask_classes"] = classes
        return example

    return parse
