"""Paste photographic cut-outs on photographs: scenes of small objects with COCO-style boxes.

python launch/paste_cutouts.py --cutouts=cutouts.csv --backgrounds=DIR --out=OUT

cutouts.csv has the columns file (an image with transparency, below the CSV's folder) and class (or the one
that --label names). OUT gets train/, val/, train.json and val.json, which configs/studies/cutouts.py reads.
A scene shows one to four objects, half of the further ones of the first one's class, mirrored, turned by up
to 20 degrees, lighter or darker; an object of which less than 30 % is left visible has no box.
"""

import argparse
import csv
import json
import pathlib

import numpy as np
from PIL import Image

MOST, REPEAT, TURN, LIGHT, VISIBLE = 4, 0.5, 20, (0.8, 1.15), 0.3


def read_cutouts(path: pathlib.Path, label: str) -> dict[str, list[Image.Image]]:
    """Class -> its cut-outs, classes in the order of their names."""
    rows = list(csv.DictReader(path.read_text().splitlines()))
    if not rows or "file" not in rows[0] or label not in rows[0]:
        raise SystemExit(f"error: {path}: needs rows with the columns file and {label}; see --label")
    found: dict[str, list] = {name: [] for name in sorted({row[label] for row in rows})}
    for row in rows:
        found[row[label]].append(Image.open(path.parent / row["file"]).convert("RGBA"))
    return found


def ground(rng: np.random.Generator, photos: list[Image.Image], side: int) -> Image.Image:
    """A square of a photo of half to all of its shorter side, maybe mirrored."""
    photo = photos[rng.integers(len(photos))]
    crop = int(min(photo.size) * rng.uniform(0.5, 1))
    x, y = rng.integers(photo.width - crop + 1), rng.integers(photo.height - crop + 1)
    found = photo.crop((x, y, x + crop, y + crop)).resize((side, side), Image.Resampling.BICUBIC)
    return _mirrored(rng, found)


def _mirrored(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def varied(
    rng: np.random.Generator, cutout: Image.Image, sizes: tuple[float, float]
) -> tuple[Image.Image, float]:
    """A cut-out mirrored, turned, trimmed and scaled; its longest side in pixels, drawn between `sizes`."""
    found = _mirrored(rng, cutout).rotate(rng.uniform(-TURN, TURN), Image.Resampling.BICUBIC, expand=True)
    found = found.crop(found.getchannel("A").getbbox())
    longest = rng.uniform(*sizes)
    scale = longest / max(found.size)
    size = (max(4, round(found.width * scale)), max(4, round(found.height * scale)))
    return found.resize(size, Image.Resampling.LANCZOS), longest


def scene(rng: np.random.Generator, cutouts: list[list[Image.Image]], photos: list[Image.Image], side: int,
          sizes: tuple[float, float]) -> tuple[Image.Image, list[tuple[int, list[int]]]]:  # fmt: skip
    """A scene, and (class, [x, y, width, height]) of each object that can be seen."""
    image, owner = ground(rng, photos, side), np.zeros((side, side), np.uint8)
    kinds, areas, places = [], [], []  # places: middle and longest side, in pixels
    for number in range(1, int(rng.integers(1, MOST + 1)) + 1):
        kind = int(rng.integers(len(cutouts)))
        kind = kinds[0] if kinds and rng.random() < REPEAT else kind
        cutout = cutouts[kind][rng.integers(len(cutouts[kind]))]
        cutout, size = varied(rng, cutout, (side * sizes[0], side * sizes[1]))
        x, y = _place(rng, cutout, size, places, side)
        rgb = np.asarray(cutout.convert("RGB")) * rng.uniform(*LIGHT)
        image.paste(Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8)), (x, y), cutout.getchannel("A"))
        opaque = np.asarray(cutout.getchannel("A")) > 127
        owner[y : y + cutout.height, x : x + cutout.width][opaque] = number
        kinds.append(kind)
        areas.append(int(opaque.sum()))
    found = []
    for number, (kind, area) in enumerate(zip(kinds, areas, strict=True), 1):
        rows, columns = np.nonzero(owner == number)
        if len(rows) >= max(VISIBLE * area, 1):
            x, y = int(columns.min()), int(rows.min())
            found.append((kind, [x, y, int(columns.max()) - x + 1, int(rows.max()) - y + 1]))
    return image, found


def _place(rng: np.random.Generator, cutout: Image.Image, size: float,
           places: list[tuple[float, float, float]], side: int) -> tuple[int, int]:  # fmt: skip
    """A corner for the cut-out, away from the other objects where eight tries find one."""
    for _ in range(8):
        x, y = int(rng.integers(side - cutout.width + 1)), int(rng.integers(side - cutout.height + 1))
        middle = x + cutout.width / 2, y + cutout.height / 2
        if all(np.hypot(middle[0] - a, middle[1] - b) > 0.35 * (size + other) for a, b, other in places):
            break
    places.append((*middle, size))
    return x, y


def write(split: str, number: int, seed: int, args: argparse.Namespace, cutouts: dict, photos: list) -> None:
    """One split: its photos and the JSON file of its boxes."""
    (args.out / split).mkdir(parents=True)
    rng, images, notes = np.random.default_rng(seed), [], []
    for i in range(number):
        image, objects = scene(rng, list(cutouts.values()), photos, args.side, (args.smallest, args.largest))
        images.append({"id": i, "file_name": f"{i:05d}.jpg", "width": args.side, "height": args.side})
        image.save(args.out / split / images[-1]["file_name"], quality=92)
        for kind, box in objects:
            notes.append({"id": len(notes), "image_id": i, "category_id": kind + 1, "bbox": box,
                          "area": box[2] * box[3], "iscrowd": 0})  # fmt: skip
    kinds = [{"id": k + 1, "name": name} for k, name in enumerate(cutouts)]
    text = json.dumps({"images": images, "annotations": notes, "categories": kinds})
    (args.out / f"{split}.json").write_text(text)
    print(f"{split}: {number} scenes, {len(notes)} objects")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("cutouts", "backgrounds", "out"):
        parser.add_argument(f"--{name}", required=True, type=pathlib.Path)
    parser.add_argument("--label", default="class", help="column of the classes")
    parser.add_argument("--train", type=int, default=2000, help="scenes to train on")
    parser.add_argument("--val", type=int, default=500, help="scenes to judge on")
    parser.add_argument("--side", type=int, default=192, help="of a scene, in pixels")
    parser.add_argument("--smallest", type=float, default=0.12, metavar="SHARE", help="of a scene's side")
    parser.add_argument("--largest", type=float, default=0.25, metavar="SHARE")
    args = parser.parse_args()
    if not 0 < args.smallest <= args.largest <= 0.5:
        given = f"--smallest={args.smallest} --largest={args.largest}"
        raise SystemExit(f"error: {given}: give 0 < smallest <= largest <= 0.5")
    if args.out.exists():
        raise SystemExit(f"error: {args.out} exists already; name another --out or delete it")
    cutouts = read_cutouts(args.cutouts, args.label)
    files = sorted(p for p in args.backgrounds.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not files:
        raise SystemExit(f"error: {args.backgrounds}: holds no .jpg or .png; see --backgrounds")
    photos = [Image.open(path).convert("RGB") for path in files]
    for seed, split in enumerate(("train", "val"), 1):
        write(split, getattr(args, split), seed, args, cutouts, photos)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # a file that is not there, or no image
        raise SystemExit(f"error: {error}") from error
