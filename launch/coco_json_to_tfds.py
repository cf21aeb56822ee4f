"""Write photos with COCO-style annotations as a TFDS data set with the features of coco/2017.

python launch/coco_json_to_tfds.py --images=DIR --train=train.json --validation=val.json --data_dir=OUT

OUT can then stand for --config.data.train.data_dir in configs/coco.py. Photos without annotations are kept.
Class k is the category with the k-th smallest id of the JSON file.
"""

import argparse
import collections
import json
import os
import pathlib

import numpy as np
import tensorflow_datasets as tfds


def examples(images: str, annotations: str) -> list[dict]:
    """Examples in the order of the JSON file: the encoded photo stays as it is."""
    data = json.loads(pathlib.Path(annotations).read_text())
    labels = {category: i for i, category in enumerate(sorted(c["id"] for c in data["categories"]))}
    objects = collections.defaultdict(list)
    for a in data["annotations"]:
        objects[a["image_id"]].append(a)
    return [_example(images, photo, objects[photo["id"]], labels) for photo in data["images"]]


def _example(images: str, photo: dict, objects: list[dict], labels: dict[int, int]) -> dict:
    found = []
    for a in objects:
        x, y, w, h = a["bbox"]
        box = np.clip([y / photo["height"], x / photo["width"], (y + h) / photo["height"],
                       (x + w) / photo["width"]], 0, 1)  # fmt: skip
        found.append({
            "area": int(a["area"]), "bbox": tfds.features.BBox(*box.tolist()), "id": a["id"],
            "is_crowd": bool(a.get("iscrowd", 0)), "label": labels[a["category_id"]],
        })  # fmt: skip
    name = photo["file_name"]
    if not os.path.exists(os.path.join(images, name)):
        name = os.path.basename(name)  # some files name a folder that is part of --images already
    return {
        "image": os.path.join(images, name), "image/filename": name, "image/id": photo["id"], "objects": found
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("images", "train", "validation", "data_dir"):
        parser.add_argument(f"--{name}", required=True)
    args = parser.parse_args()
    builder = tfds.builder("coco/2017", data_dir=args.data_dir)
    if pathlib.Path(builder.data_dir).exists():
        raise SystemExit(f"error: {builder.data_dir} exists already; name another --data_dir or delete it")
    pathlib.Path(builder.data_dir).mkdir(parents=True)
    writer = tfds.core.SequentialWriter(builder.info, 1000, overwrite=True)
    writer.initialize_splits(["train", "validation"])
    for split in ("train", "validation"):
        found = examples(args.images, getattr(args, split))
        writer.add_examples({split: found})
        print(f"{split}: {len(found)} photos")
    writer.close_all()


if __name__ == "__main__":
    main()
