"""List the photos whose largest annotated object is small: a `list` of data sources.

python launch/list_small_objects.py --annotations=a.json,b.json --largest=0.15 --out=small.txt

--largest is the share of the photo that the box of its largest object may take; photos without a box are left
out. configs/studies/small_objects.py trains on such a list; configs/folder.py takes one as
--config.data.train.list=small.txt.
"""

import argparse
import json
import pathlib


def small(path: pathlib.Path, largest: float) -> tuple[list[str], int]:
    """File names of one COCO-style JSON, in its order, and how many of its photos have boxes."""
    given = json.loads(path.read_text())
    photos = {image["id"]: image for image in given["images"]}
    shares: dict[int, float] = {}
    for note in given["annotations"]:
        photo, (_, _, width, height) = photos[note["image_id"]], note["bbox"]
        share = width * height / (photo["width"] * photo["height"])
        shares[photo["id"]] = max(share, shares.get(photo["id"], 0.0))
    return [photos[i]["file_name"] for i in photos if shares.get(i, 1.0) < largest], len(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--annotations", required=True, help="COCO-style JSON files, joined by commas")
    parser.add_argument("--largest", type=float, default=0.15, metavar="SHARE", help="of the photo, below 1")
    parser.add_argument("--out", required=True, type=pathlib.Path)
    args = parser.parse_args()
    if not 0 < args.largest < 1:
        raise SystemExit(f"error: --largest={args.largest}: give a share between 0 and 1")
    names: list[str] = []
    for path in map(pathlib.Path, args.annotations.split(",")):
        try:
            found, photos = small(path, args.largest)
        except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
            raise SystemExit(f"error: {path}: {error!r}; give JSON files in COCO's layout") from None
        print(f"{path}: {len(found)} of {photos} photos")
        names += found
    if not names:
        raise SystemExit(f"error: --largest={args.largest}: no photo is left; give more")
    try:
        args.out.write_text("\n".join(names) + "\n")
    except OSError as error:
        raise SystemExit(f"error: --out={args.out}: {error.strerror}") from None


if __name__ == "__main__":
    main()
