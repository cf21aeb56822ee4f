"""Judging checkpoints on folders of photos: labelled, with boxes, with masks.

python -m salcl_jax.evaluate --config=configs/judge.py --checkpoint=DIR --task=summary
The folder SALCL_DATA (an environment variable; 'data' if not set) holds imagenette/ (images, labels.csv),
coco_scenes/ and voc_scenes/ (images, annotations_train.json, annotations_val.json, instances or masks) and
bsds_scenes/ (images, index.csv).
variants: resnet50 (224 px, for an accelerator), full (all protocols, and the curves with few labels), voc
and bsds (localisation on their photos instead of coco's), objects (linear and knn tell the annotated objects
of coco's photos apart, not the photos of imagenette)
Networks of two_cores runs: see Results in README.md. resnet50: not yet run.
"""

import os

from salcl_jax import config as lib

ROOT = os.environ.get("SALCL_DATA", "data")


def get_config(variant: str = "") -> lib.ConfigDict:
    """Small network unless the variant says otherwise; the checkpoint decides which network it is."""
    c = lib.base()
    if "resnet50" not in (variant or "").split(","):
        lib.small(c)
    c.data.train = lib.source("folder", roots=(f"{ROOT}/coco_scenes", f"{ROOT}/voc_scenes"))
    labelled = {"roots": (f"{ROOT}/imagenette/images",), "labels": f"{ROOT}/imagenette/labels.csv"}
    c.tasks.classify.train = lib.source("folder", split="train", **labelled)
    c.tasks.classify.test = lib.source("folder", split="val", **labelled)
    c.tasks.semi.train = lib.source("folder", split="train", **labelled)
    c.tasks.semi.folds = "fold_1pct=0..4"
    for task, data in (("multilabel", "coco"), ("voc_svm", "voc"), ("segmentation", "voc")):
        c.tasks[task].train = _scenes(data, "train")
        c.tasks[task].test = _scenes(data, "val")
    c.tasks.localization.test = _scenes("coco", "val")
    known = {"resnet50": lambda c: None, "full": _full, "voc": _voc, "bsds": _bsds, "objects": _objects}
    return lib.apply_variants(c, variant, known)


def _scenes(name: str, split: str) -> lib.ConfigDict:
    folder = f"{ROOT}/{name}_scenes"
    masks = {"coco": "instances", "voc": "masks"}[name]
    return lib.source(
        "folder", roots=(f"{folder}/images",), annotations=f"{folder}/annotations_{split}.json",
        masks=f"{folder}/{masks}",
    )  # fmt: skip


def _full(c: lib.ConfigDict) -> None:
    c.tasks.summary = ("linear", "knn", "semi", "voc_svm", "multilabel", "localization", "segmentation")
    c.tasks.linear.subsets = ("fold_1pct=0..4", "fold_10pct=0..4")


def _voc(c: lib.ConfigDict) -> None:
    c.tasks.localization.test = _scenes("voc", "val")


def _bsds(c: lib.ConfigDict) -> None:
    folder = f"{ROOT}/bsds_scenes"
    c.tasks.localization.test = lib.source(
        "folder", roots=(f"{folder}/images",), regions=f"{folder}/index.csv", split="val"
    )


def _objects(c: lib.ConfigDict) -> None:
    """Half of coco's objects are smaller than a tenth of the side: their pixels are kept."""
    c.data.canvas = 320
    c.tasks.classify.on = "object"
    c.tasks.classify.train, c.tasks.classify.test = _scenes("coco", "train"), _scenes("coco", "val")
