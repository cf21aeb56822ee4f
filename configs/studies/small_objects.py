"""Real photos whose objects are all small: what does guidance add where boxes say that there is room?

export SALCL_DATA=DIR  # that of configs/judge.py
for s in train val; do
  python launch/list_small_objects.py --largest=0.15 --out=$SALCL_DATA/small_objects_$s.txt \
    --annotations=$SALCL_DATA/coco_scenes/annotations_$s.json,$SALCL_DATA/voc_scenes/annotations_$s.json
done
python -m salcl_jax.study --study=configs/studies/small_objects.py:long,maps --workdir=DIR --jobs=2
variants, joined by commas: all (trains on all photos of the two folders instead), objects (the same networks,
judged by VOC's annotated objects instead of whole photos), and those of scenes.py, whose dials of the scenes
change nothing here
Results: RESULTS.md.
"""

import dataclasses

from salcl_jax import config as lib
from salcl_jax.study_plan import Study

PHOTOS, SCENES = (lib.beside(__file__, name) for name in ("photos.py", "scenes.py"))
JUDGE = PHOTOS.JUDGE
TASKS = ("linear", "knn", "multilabel", "voc_svm", "localization")


def get_study(variant: str = "") -> Study:
    """Rows and training of the built-in scenes' study, the photos and the judge of the photos' study."""
    named = variant.split(",") if variant else []
    like = SCENES.get_study(",".join(name for name in named if name not in ("all", "objects")))
    photos = PHOTOS.get_study()
    question = f"Photos of small objects{f', {variant}' if variant else ''}: what does guidance add?"

    def config() -> lib.ConfigDict:
        c, other = like.config(), photos.config()
        c.data, c.eval = other.data, other.eval
        c.data.train = _small("train")
        if "all" in named:
            c.data.train.list = ""
        return c

    def judge() -> lib.ConfigDict:
        c = photos.judge()
        c.tasks.localization.test = _small("val")
        c.saliency = like.config().saliency  # of rows that train without a map
        return c

    judged = {"judge": judge, "tasks": TASKS, "figures": _figures(photos.figures)}
    if "objects" in named:
        judged = {"judge": _judge_objects, "tasks": ("linear", "knn"), "figures": PHOTOS.OBJECTS}
    return dataclasses.replace(like, question=question, config=config, fixed=(), **judged)


def _small(split: str) -> lib.ConfigDict:
    folders = [f"{JUDGE.ROOT}/{name}_scenes" for name in ("coco", "voc")]
    return lib.source(
        "folder", roots=tuple(f"{folder}/images" for folder in folders),
        annotations=",".join(f"{folder}/annotations_{split}.json" for folder in folders),
        list=f"{JUDGE.ROOT}/small_objects_{split}.txt",
    )  # fmt: skip


def _figures(all_: dict[str, str]) -> dict[str, str]:
    return {name: caption for name, caption in all_.items() if name.split("/")[0] in TASKS} | {
        "localization/pointing": "pointing"
    }


def _judge_objects() -> lib.ConfigDict:
    """VOC's objects inside the photos: by COCO's, trained networks are hardly told from untrained ones."""
    c = PHOTOS.get_study("objects").judge()
    folder = f"{JUDGE.ROOT}/voc_scenes"
    for part, split in (("train", "train"), ("test", "val")):
        c.tasks.classify[part] = lib.source(
            "folder", roots=(f"{folder}/images",), annotations=f"{folder}/annotations_{split}.json"
        )
    return c
