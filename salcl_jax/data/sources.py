"""Where photos come from: tfds records, folders, arrays, built-in scenes. One shape for all."""

import dataclasses
import functools
import os
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from salcl_jax.data import arrays, coco, files, masks, regions, tables


def _of_its_own() -> Callable[[], str]:
    token = secrets.token_hex(32)  # agrees with no other source, so nothing is taken for its results
    return lambda: token


@dataclasses.dataclass(frozen=True)
class Source:
    """Random access to n photos.

    read(i) -> dict with `encoded` (bytes) or `image` (uint8 [h, w, 3]) and, where known,
    `label` (int), `boxes` (float32 [k, 4], (y0, x0, y1, x1) in [0, 1] of the photo), `classes`
    (int32 [k]), `difficult` (bool [k]: boxes that scores leave out), and `mask` (encoded label map
    or uint8 [h, w]: 0 background, 255 unknown, else a class or an object's number; with
    `mask_classes` [k], object j + 1 is of class mask_classes[j]). has_labels /
    has_boxes say what every record carries, has_masks what some do. Thread-safe.

    digest() -> hex string that changes when the examples do: names, sizes, times of files and what
    is told about them, wherever the folders lie.

    place(i) -> where photo i lies, for people: a path, or a file and the place in it. note(place, reason)
    is told of each photo that cannot be used, from several threads.
    """

    name: str
    kind: str
    class_names: tuple[str, ...]
    size: int
    read: Callable[[int], dict[str, Any]]
    has_labels: bool = False
    has_boxes: bool = False
    has_masks: bool = False
    digest: Callable[[], str] = dataclasses.field(default_factory=_of_its_own)
    place: Callable[[int], str] = "number {}".format
    note: Callable[[str, str], None] = lambda place, reason: None

    def __len__(self) -> int:
        return self.size


def open_source(spec: Mapping[str, Any]) -> Source:
    """Opens the source a plain dict describes.

    Keys, all but `kind` optional:

    - kind: 'tfds' | 'folder' | 'arrays' | 'scenes'; expected: number of examples, 0 = any.
    - tfds: name, split, data_dir. scenes: scenes (the dials), split, data_dir.
    - arrays: path (.npz or folder of .npy files, see arrays.py).
    - folder: roots (one or several), and one at most of the four that follow, or annotations and regions:
      the photos of both.
    - annotations: COCO-style JSON with boxes, and difficult or ignore where an object is.
    - labels: CSV with columns file, label, maybe name.
    - regions: CSV with columns file, segment_files: human segmentations (see regions.py).
    - label_from_folder: the parent folder's name is the class.
    - split, where ('column=value[,column=value]'): rows of `labels` or `regions` to keep; other kinds
      have no such rows.
    - list: text file, a photo to keep a line (relative path or bare name, maybe a label after it).
    - masks: folder of PNG label maps named as the photos.

    Raises ValueError or FileNotFoundError with one line.
    """
    kind = spec.get("kind", "")
    openers = {"folder": _folder, "arrays": _arrays, "tfds": _tfds, "scenes": _scenes}
    if kind not in openers:
        raise ValueError(f"data kind {kind!r}: unknown; use one of {', '.join(sorted(openers))}")
    if kind != "folder" and tables.parse_where(spec.get("where") or ""):
        raise ValueError(
            f"data.where {spec['where']!r}: chooses rows of a folder's CSV file, and kind {kind!r} has none; "
            "drop it (folds and subsets of tasks set it too), or use kind 'folder' with labels"
        )
    source = openers[kind](spec)
    expected = int(spec.get("expected") or 0)
    if expected and len(source) != expected:
        raise ValueError(
            f"{source.name}: {len(source)} examples, {expected} expected; "
            "prepare the data again or set data.expected=0"
        )
    if len(source) == 0:
        raise ValueError(f"{source.name}: no examples; check the split and the files")
    return source


def _tfds(spec: Mapping[str, Any]) -> Source:
    from salcl_jax.data import tfds_source

    return tfds_source.open_prepared(
        spec.get("name", ""), spec.get("split") or "train", spec.get("data_dir") or None
    )


def _scenes(spec: Mapping[str, Any]) -> Source:
    from salcl_jax.data import tfds_source

    return tfds_source.open_scenes(
        dict(spec.get("scenes") or {}), spec.get("split") or "train", spec.get("data_dir") or None
    )


def _arrays(spec: Mapping[str, Any]) -> Source:
    path = os.fspath(spec.get("path") or "")
    columns = arrays.load(path)
    image, label, mask = columns["image"], columns.get("label"), columns.get("mask")
    boxes, classes = columns.get("boxes"), columns.get("classes")

    def read(i: int) -> dict[str, Any]:
        example: dict[str, Any] = {"image": np.asarray(image[i])}
        if label is not None:
            example["label"] = int(label[i])
        if boxes is not None:
            row = np.asarray(boxes[i], np.float32)
            real = (row[:, 2] > row[:, 0]) & (row[:, 3] > row[:, 1])  # zero rows are padding
            example["boxes"] = row[real]
            kinds = np.zeros(len(row)) if classes is None else np.asarray(classes[i])
            example["classes"] = kinds[real].astype(np.int32)
            example["difficult"] = np.zeros(len(example["boxes"]), bool)
        if mask is not None:
            example["mask"] = np.asarray(mask[i])
        return example

    names = tuple(str(name) for name in columns.get("class_names", ()))
    if label is not None and len(label):
        numbered = tables.numbered_names(label.tolist(), path)  # of use beside names: the numbers are checked
        names = names or numbered
    has = label is not None, boxes is not None, mask is not None
    digest = functools.cache(lambda: files.digest(arrays.identity(path)))
    return Source(path, "arrays", names, len(image), read, *has, digest)


def _folder(spec: Mapping[str, Any]) -> Source:
    roots = spec.get("roots") or ()
    roots = tuple(os.fspath(r) for r in ((roots,) if isinstance(roots, str) else roots))
    if not roots:
        raise ValueError("folder data: no folder given; set data.roots")
    folder = os.fspath(spec.get("masks") or "")
    if folder and spec.get("regions"):
        raise ValueError("folder data: regions are masks already; give masks or regions, not both")
    table = _table(spec, roots, folder)
    if spec.get("list"):
        table = tables.restrict(table, os.fspath(spec["list"]), roots)
    paths, columns, names = table
    maps = masks.find(folder, paths, roots) if folder else [None] * len(paths)

    def read(i: int) -> dict[str, Any]:
        example = {"encoded": files.read_file(paths[i], files.PHOTO_BYTES)}
        example |= {key: column[i] for key, column in columns.items()}
        if segments := example.pop("segments", ()):
            example |= _enclosed(segments, names)
        if maps[i] is not None:
            example |= masks.read(maps[i])
        return example

    def parts():
        """What the digest is made of; every path as it is below its root."""
        yield names
        yield [files.relative(path, roots) for path in paths], files.stats(paths)
        yield [m and files.relative(m, (folder,)) for m in maps], files.stats([m for m in maps if m])
        for key, column in sorted(columns.items()):
            yield key
            yield from _column(key, column, os.path.dirname(os.fspath(spec.get("regions") or "")))

    has_regions = "segments" in columns
    has_boxes = "boxes" in columns or has_regions
    has = "label" in columns, has_boxes, bool(folder) or (has_regions and "boxes" not in columns)
    digest = functools.cache(lambda: files.digest(parts()))
    return Source("+".join(roots), "folder", names, len(paths), read, *has, digest, paths.__getitem__)


def _table(spec: Mapping[str, Any], roots: tuple[str, ...], folder: str) -> tables.Table:
    """The photos below the roots, restricted and described by the one file given, if any."""
    given = [key for key in ("annotations", "labels", "regions") if spec.get(key)]
    if len(given) > 1 and "labels" in given:
        raise ValueError(f"folder data: give {' or '.join(given)}, not both")
    where = tables.parse_where(spec.get("where") or "")
    if where and given in ([], ["annotations"]):
        raise ValueError("folder data: data.where chooses rows of a CSV file; set data.labels to it")
    where += [("split", str(spec["split"]))] if spec.get("split") else []
    paths = list(dict.fromkeys(path for root in roots for path in files.list_images(root)))
    if folder:  # label maps below a root are no photos
        home = os.path.join(os.path.abspath(folder), "")
        maps = {p for p in paths if p.lower().endswith(".png") and os.path.abspath(p).startswith(home)}
        paths = [path for path in paths if path not in maps]
    if not given:
        return tables.folder_labels(paths) if spec.get("label_from_folder") else tables.Table(paths, {})
    read = {
        "annotations": coco.read,
        "labels": functools.partial(tables.labels, where=where),
        "regions": functools.partial(tables.segmentations, where=where),
    }
    found = [read[key](os.fspath(spec[key]), roots, paths) for key in given]
    return found[0] if len(found) == 1 else tables.join(found, " and ".join(spec[key] for key in given))


def _enclosed(segments: tuple[str, ...], names: tuple[str, ...]) -> dict[str, Any]:
    """Objects of human segmentations; beside annotated ones they are one more class, and have no mask."""
    found = regions.read(segments)
    if names != (tables.REGION,):
        found["classes"] += names.index(tables.REGION)
        found.pop("mask", None)
    return found


def _column(key: str, column: list, home: str):
    """A column's part of the digest: lengths and values, or the files of segmentations."""
    if key == "segments":
        paths = [path for row in column for path in row]
        yield [len(row) for row in column], [files.relative(p, (home,)) for p in paths], files.stats(paths)
    elif column and isinstance(column[0], np.ndarray):
        yield np.array([len(row) for row in column])
        yield np.concatenate(column)
    else:
        yield np.array(column)
