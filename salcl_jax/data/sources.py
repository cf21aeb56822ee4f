"""Where photos come from: tfds records, folders, arrays, built-in scenes. One shape for all."""

import csv
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from salcl_jax.data import arrays

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@dataclasses.dataclass(frozen=True)
class Source:
    """Random access to n photos.

    read(i) -> dict with `encoded` (bytes) or `image` (uint8 [h, w, 3]) and, where known,
    `label` (int), `boxes` (float32 [k, 4], (y0, x0, y1, x1) in [0, 1] of the photo) and `classes`
    (int32 [k]). has_labels / has_boxes say what every record carries. Thread-safe.
    """

    name: str
    kind: str
    class_names: tuple[str, ...]
    size: int
    read: Callable[[int], dict[str, Any]]
    has_labels: bool = False
    has_boxes: bool = False

    def __len__(self) -> int:
        return self.size


def open_source(spec: Mapping[str, Any]) -> Source:
    """Opens the source a plain dict describes.

    Keys (all but `kind` optional): kind 'tfds' | 'folder' | 'arrays' | 'scenes'; name and data_dir
    of tfds; split; roots of folders; annotations (COCO JSON); labels (CSV with file, label, maybe
    split); where (CSV column -> value, keeps equal rows); label_from_folder; path of arrays;
    scenes (dials of the built-in scenes); expected (number of examples, 0 = any).
    Raises ValueError or FileNotFoundError with one line.
    """
    kind = spec.get("kind", "")
    openers = {"folder": _folder, "arrays": _arrays, "tfds": _tfds, "scenes": _scenes}
    if kind not in openers:
        raise ValueError(f"data kind {kind!r}: unknown; use one of {', '.join(sorted(openers))}")
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
    image, label = columns["image"], columns.get("label")
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
        return example

    names = tuple(str(name) for name in columns.get("class_names", ()))
    if not names and label is not None and len(label):
        names = tuple(str(number) for number in range(int(np.max(label)) + 1))
    return Source(path, "arrays", names, len(image), read, label is not None, boxes is not None)


def _folder(spec: Mapping[str, Any]) -> Source:
    roots = spec.get("roots") or ()
    roots = tuple(os.fspath(r) for r in ((roots,) if isinstance(roots, str) else roots))
    if not roots:
        raise ValueError("folder data: no folder given; set data.roots")
    if spec.get("annotations") and spec.get("labels"):
        raise ValueError("folder data: give annotations or labels, not both")
    files = list(dict.fromkeys(path for root in roots for path in list_images(root)))
    columns: dict[str, list] = {}
    names: tuple[str, ...] = ()
    if spec.get("annotations"):
        files, columns, names = _coco(os.fspath(spec["annotations"]), roots, files)
    elif spec.get("labels"):
        rows = dict(spec.get("where") or {})
        if spec.get("split"):
            rows["split"] = spec["split"]
        files, columns, names = _csv(os.fspath(spec["labels"]), roots, files, rows)
    elif spec.get("label_from_folder"):
        parents = [os.path.basename(os.path.dirname(path)) for path in files]
        names = tuple(sorted(set(parents)))
        number = {name: i for i, name in enumerate(names)}
        columns = {"label": [number[parent] for parent in parents]}

    def read(i: int) -> dict[str, Any]:
        return {"encoded": _read_file(files[i])} | {key: col[i] for key, col in columns.items()}

    return Source(
        "+".join(roots), "folder", names, len(files), read, "label" in columns, "boxes" in columns
    )


def _read_file(path: str) -> bytes:
    if "://" in path:
        import tensorflow as tf

        return tf.io.gfile.GFile(path, "rb").read()
    with open(path, "rb") as file:
        return file.read()


def _read_text(path: str) -> str:
    try:
        return _read_file(path).decode("utf-8-sig")
    except Exception as error:
        raise FileNotFoundError(f"{path}: cannot be read; check the path") from error


def list_images(root: str) -> list[str]:
    """Sorted paths of all image files below root, links followed once; local or gs://.

    Raises FileNotFoundError when root is missing, ValueError when it holds no image.
    """
    if "://" in root:
        import tensorflow as tf

        if not tf.io.gfile.isdir(root):
            raise FileNotFoundError(f"{root}: no such folder; check data.roots")
        walk = ((folder, names) for folder, _, names in tf.io.gfile.walk(root))
    else:
        if not os.path.isdir(root):
            raise FileNotFoundError(f"{root}: no such folder; check data.roots")
        walk = _walk(root)
    files = sorted(
        os.path.join(folder, name)
        for folder, names in walk
        for name in names
        if name.lower().endswith(EXTENSIONS) and not name.startswith("._")
    )
    if not files:
        raise ValueError(f"{root}: no image files ({' '.join(EXTENSIONS)}); check data.roots")
    return files


def _walk(root: str) -> Iterable[tuple[str, list[str]]]:
    seen = set()  # real folders: a link back up, or a second link to one folder, adds nothing
    for folder, folders, names in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        yield folder, names


def _locate(names: list[str], bases: tuple[str, ...], files: list[str], origin: str) -> list[str]:
    """Full path of each listed name, searched below each base. Raises ValueError naming one."""
    listed = {os.path.normpath(path): path for path in files}
    found = []
    for name in names:
        candidates = (os.path.normpath(os.path.join(base, name)) for base in bases)
        path = next((listed[c] for c in candidates if c in listed), None)
        if path is None:
            raise ValueError(f"{origin}: {name} is not below {' or '.join(bases)}; fix data.roots")
        found.append(path)
    return found


def _coco(path: str, roots: tuple[str, ...], files: list[str]):
    data = json.loads(_read_text(path))
    categories = sorted(data["categories"], key=lambda category: category["id"])
    number = {category["id"]: i for i, category in enumerate(categories)}
    objects: dict[Any, list[tuple]] = {image["id"]: [] for image in data["images"]}
    for note in data["annotations"]:
        if not note.get("iscrowd") and note["image_id"] in objects:
            objects[note["image_id"]].append((note["bbox"], number[note["category_id"]]))
    boxes, classes = [], []
    for image in data["images"]:
        found = objects[image["id"]]
        x, y, w, h = np.array([box for box, _ in found], np.float64).reshape(-1, 4).T
        wide, high = image["width"], image["height"]
        corners = np.stack([y / high, x / wide, (y + h) / high, (x + w) / wide], 1)
        boxes.append(np.clip(corners, 0, 1).astype(np.float32))
        classes.append(np.array([kind for _, kind in found], np.int32))
    files = _locate([image["file_name"] for image in data["images"]], roots, files, path)
    names = tuple(category["name"] for category in categories)
    return files, {"boxes": boxes, "classes": classes}, names


def _csv(path: str, roots: tuple[str, ...], files: list[str], where: dict[str, Any]):
    rows = list(csv.DictReader(_read_text(path).splitlines()))
    missing = {"file", "label", *where} - set(rows[0] if rows else ())
    if missing:
        raise ValueError(f"{path}: no column {', '.join(sorted(missing))}; add it to the header")
    labels, names = _numbers(rows)  # before the choice of rows: all splits share one numbering
    chosen = [i for i, row in enumerate(rows) if all(row[k] == str(v) for k, v in where.items())]
    if not chosen:
        raise ValueError(f"{path}: no row with {where}; check data.split")
    bases = (os.path.dirname(path), *roots)
    found = _locate([rows[i]["file"] for i in chosen], bases, files, path)
    return found, {"label": [labels[i] for i in chosen]}, names


def _numbers(rows: list[dict[str, str]]) -> tuple[list[int], tuple[str, ...]]:
    """Integer labels are kept, with `name` as class names if given; words are numbered."""
    words = [row["label"] for row in rows]
    if all(word.isdigit() for word in words):
        labels = [int(word) for word in words]
        known = {label: row.get("name") for label, row in zip(labels, rows, strict=True)}
        return labels, tuple(known.get(i) or str(i) for i in range(max(labels) + 1))
    names = tuple(sorted(set(words)))
    return [names.index(word) for word in words], names
