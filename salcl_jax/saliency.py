"""Maps and regions of photos: `python -m salcl_jax.saliency --checkpoint=DIR --out=DIR PHOTOS...`.

PHOTOS are files and folders. Writes OUT/regions.json (COCO-style: images, and boxes in pixels with their
scores) and, unless --nopictures, OUT/pictures/NAME.png with heat map and regions. A photo that cannot be
read is passed over and listed. Exit codes: 0 done, 2 something to mend in the command or the photos.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from salcl_jax import cli

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "workdir of a run, or one STEP of its checkpoints")
_OUT = flags.DEFINE_string("out", None, "folder of the results")
_PICTURES = flags.DEFINE_bool("pictures", True, "draw heat map and regions of every photo")
_BATCH = flags.DEFINE_integer("batch_size", 32, "photos at a time", lower_bound=1)
_SIDE = flags.DEFINE_integer("side", 480, "longer side of a picture, pixels", lower_bound=32)
CATEGORY = {"id": 1, "name": "salient region"}


def main(argv: list[str]) -> None:
    """Draw and list the regions of the photos that the command names."""
    cli.start("none")
    from salcl_jax import api

    try:
        paths = _photos(argv[1:])
        model = api.load(_CHECKPOINT.value, batch_size=_BATCH.value)
    except (ValueError, OSError, RuntimeError) as error:
        cli.leave(str(error))
    found: dict[str, Any] = {"images": [], "categories": [CATEGORY], "annotations": []}
    skipped: list[str] = []
    for names, photos in _batches(paths, model.batch_size, skipped):
        maps, regions = model.saliency([np.asarray(photo.image) for photo in photos])
        for i, (name, photo) in enumerate(zip(names, photos, strict=True)):
            own = type(regions)(*(np.asarray(x[i]) for x in regions))
            _note(found, name, photo, own)
            if _PICTURES.value:
                _draw(Path(_OUT.value) / "pictures" / f"{name}.png", photo, maps[i], own)
    _write(Path(_OUT.value) / "regions.json", found)
    for line in skipped:
        cli.say(f"skipped: {line}")
    print(f"{len(found['images'])} photos, {len(found['annotations'])} regions, {len(skipped)} skipped: "
          f"{os.path.join(_OUT.value, 'regions.json')}")  # fmt: skip


def _photos(given: list[str]) -> list[tuple[str, str]]:
    """(name, path) of every photo; names are unique and relative to the folder that was given."""
    from salcl_jax.data.files import list_images

    found: dict[str, str] = {}
    for one in given:
        inside = list_images(one) if os.path.isdir(one) else [one]
        for path in inside:
            name = os.path.relpath(path, one) if os.path.isdir(one) else os.path.basename(path)
            if name in found and found[name] != path:
                raise ValueError(f"{path} and {found[name]} would both be called {name}: do them one by one")
            found[name] = path
    return list(found.items())


def _batches(paths: list[tuple[str, str]], size: int, skipped: list[str]) -> Iterator[tuple[list, list]]:
    """Names and photos, `size` at a time; what cannot be read goes to `skipped` with its reason."""
    from salcl_jax.data.decode import SkipImage, decode

    names, photos = [], []
    for name, path in paths:
        try:
            photos.append(decode(Path(path).read_bytes(), _SIDE.value, max_pixels=200_000_000))
            names.append(name)
        except (SkipImage, OSError) as error:
            skipped.append(f"{path}: {error}")
        if len(photos) == size:
            yield names, photos
            names, photos = [], []
    if photos:
        yield names, photos


def _note(found: dict[str, Any], name: str, photo: Any, regions: Any) -> None:
    """Add a photo and its valid regions, best first, to the list; boxes are x, y, width, height in pixels."""
    number = len(found["images"]) + 1
    found["images"].append({"id": number, "file_name": name, "width": photo.width, "height": photo.height})
    order = np.argsort(-regions.score, kind="stable")
    scale = np.array([photo.height, photo.width] * 2)
    for r in order[regions.valid[order]]:
        y0, x0, y1, x1 = (float(v) for v in regions.boxes[r] * scale)
        found["annotations"].append({
            "id": len(found["annotations"]) + 1, "image_id": number, "category_id": CATEGORY["id"],
            "bbox": [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)],
            "area": round((x1 - x0) * (y1 - y0), 2), "iscrowd": 0, "score": round(float(regions.score[r]), 5),
        })  # fmt: skip


def _draw(path: Path, photo: Any, saliency: np.ndarray, regions: Any) -> None:
    """Photo with regions beside its heat map, at most --side pixels each."""
    from salcl_jax import visualize

    picture = photo.image.copy()
    picture.thumbnail((_SIDE.value, _SIDE.value))
    canvas = np.asarray(picture)
    labels = [f"{i + 1}: {score:.2f}" for i, score in enumerate(regions.score)]
    boxed = visualize.draw_boxes(canvas, regions.boxes, regions.valid, visualize.PALETTE, labels)
    visualize.save_png(path, np.concatenate([boxed, visualize.heat(saliency, canvas)], axis=1))


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(value), encoding="utf-8")
    part.replace(path)


def _check(photos: list[str]) -> None:
    if not photos:
        raise flags.Error("name photos, or folders of photos, behind the options")
    missing = next((path for path in photos if not os.path.exists(path)), None)
    if missing:
        raise flags.Error(f"{missing}: no such file or folder")
    cli.writable("out", _OUT.value)


if __name__ == "__main__":
    app.run(main, flags_parser=cli.plain_parser(("checkpoint", "out"), _check))
