"""Boxes and classes of photos from COCO-style JSON, each entry checked before it is used."""

import json
import math
import reprlib
from collections.abc import Callable
from typing import Any

import numpy as np

from salcl_jax.data.files import locate, read_text
from salcl_jax.data.tables import Table, join

_PIXELS = 1e9  # no photo is larger, and no box lies further out
_GIVE = "give COCO-style JSON of objects with boxes"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _id(value: Any) -> bool:
    return _text(value) or _number(value)


def _side(value: Any) -> bool:
    return _number(value) and 1 <= value < _PIXELS


def _box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(_number(v) and abs(v) < _PIXELS for v in value)


_ID, _TEXT, _SIDE = (_id, "a number or text"), (_text, "text"), (_side, "a number of pixels")
_PARTS: dict[str, dict[str, tuple[Callable[[Any], bool], str]]] = {
    "categories": {"id": _ID, "name": _TEXT},
    "images": {"id": _ID, "file_name": _TEXT, "width": _SIDE, "height": _SIDE},
    "annotations": {"image_id": _ID, "category_id": _ID, "bbox": (_box, "four numbers of pixels")},
}


def read(paths: str, roots: tuple[str, ...], files: list[str]) -> Table:
    """Boxes, classes and difficult of COCO-style JSON; crowds are dropped, photos without stay.

    Of several files, comma-separated, classes with the same name are one.
    """
    return join([_read_one(path.strip(), roots, files) for path in paths.split(",")], paths)


def _read_one(path: str, roots: tuple[str, ...], files: list[str]) -> Table:
    data = _content(path)
    categories = sorted(data["categories"], key=lambda category: category["id"])
    number = {category["id"]: i for i, category in enumerate(categories)}
    objects: dict[Any, list[tuple]] = {image["id"]: [] for image in data["images"]}
    for note in data["annotations"]:
        if note["image_id"] in objects:
            hard = bool(note.get("difficult") or note.get("ignore"))
            objects[note["image_id"]].append((note["bbox"], number[note["category_id"]], hard))
    columns: dict[str, list] = {"boxes": [], "classes": [], "difficult": []}
    for image in data["images"]:
        found = objects[image["id"]]
        x, y, w, h = np.array([box for box, _, _ in found], np.float64).reshape(-1, 4).T
        wide, high = image["width"], image["height"]
        corners = np.stack([y / high, x / wide, (y + h) / high, (x + w) / wide], 1)
        columns["boxes"].append(np.clip(corners, 0, 1).astype(np.float32))
        columns["classes"].append(np.array([kind for _, kind, _ in found], np.int32))
        columns["difficult"].append(np.array([hard for _, _, hard in found], bool))
    files = locate([image["file_name"] for image in data["images"]], roots, files, path)
    return Table(files, columns, tuple(category["name"] for category in categories))


def _content(path: str) -> dict[str, Any]:
    """The content of COCO-style JSON with boxes, without crowds; ValueError names the entry that is wrong."""
    try:
        data = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no JSON ({error}); {_GIVE}") from error
    for part in _PARTS:
        if not isinstance(data, dict) or not isinstance(data.get(part), list):
            raise ValueError(f"{path}: has no {part}; {_GIVE}")
        for number, entry in enumerate(data[part], 1):
            if fault := _fault(part, entry):
                raise ValueError(f"{path}: {part} entry {_name(entry, number)} {fault}; {_GIVE}")
    data["annotations"] = [note for note in data["annotations"] if not note.get("iscrowd")]
    for part, key in (("categories", "category_id"), ("images", "image_id")):
        _check_ids(path, data, part, key)
    return data


def _name(entry: Any, number: int) -> str:
    if not isinstance(entry, dict) or "id" not in entry:
        return f"number {number}"
    return reprlib.repr(entry["id"])


def _fault(part: str, entry: Any) -> str:
    """What is wrong with an entry, '' where nothing is. Of crowds nothing is read."""
    if not isinstance(entry, dict):
        return f"is {reprlib.repr(entry)}, no object"
    if part == "annotations" and entry.get("iscrowd"):
        return ""
    needed = _PARTS[part]
    if missing := [key for key in needed if entry.get(key) is None]:
        return f"has no {', '.join(missing)}"
    odd = next((key for key, (good, _) in needed.items() if not good(entry[key])), None)
    return "" if odd is None else f"has {odd} {reprlib.repr(entry[odd])}, not {needed[odd][1]}"


def _check_ids(path: str, data: dict[str, Any], part: str, key: str) -> None:
    """ValueError where the ids of a part are numbers here and text there, or a category is unknown."""
    known, notes = {entry["id"] for entry in data[part]}, data["annotations"]
    kinds = {_text(value): value for value in (*known, *(note[key] for note in notes))}
    if len(kinds) == 2:
        pair = f"{reprlib.repr(kinds[False])} and {reprlib.repr(kinds[True])}"
        raise ValueError(f"{path}: ids of {part} are numbers and text, such as {pair}; use one of the two")
    odd = next((note for note in notes if note[key] not in known), None)
    if part == "categories" and odd is not None:
        raise ValueError(
            f"{path}: category_id {odd[key]!r} of an object of image {odd['image_id']!r} is not among the "
            "categories; add it there or drop the object"
        )
