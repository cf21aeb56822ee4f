"""Built-in scenes: would a perfect map pay, and how much of that does the learnt map reach?

python -m salcl_jax.study --study=configs/studies/scenes.py --workdir=DIR --jobs=2
variants (dials that combine, as small,clutter): small and large (objects of 0.12 to 0.25 and 0.4 to 0.7 of
the image), clutter (heaviest), clean (none), long (three times the steps), tight and loose (training crops of
0.05 to 0.4 and 0.3 to 1 of the area)
Results: RESULTS.md.
"""

from salcl_jax import config as lib
from salcl_jax.study_plan import Study

FIGURES = {
    "linear/top1": "objects, linear",
    "knn/top1": "objects, k-NN",
    "multilabel/map": "multi-label mAP",
    "segmentation/miou": "mIoU",
    "localization/corloc": "CorLoc",
    "localization/pointing": "pointing",
}


def get_study(variant: str = "") -> Study:
    """Plain BYOL's crops, the demo's guidance, and its controls."""
    dials = {"small": _small, "large": _large, "clutter": _clutter, "clean": _clean, "long": _long,
             "tight": _tight, "loose": _loose}  # fmt: skip

    def config() -> lib.ConfigDict:
        c = lib.beside(__file__, "../scenes.py").get_config()
        c.eval.every, c.eval.linear, c.log.panels = 0.25, False, 0.0
        c.tasks.baselines = ("untrained",)
        return lib.apply_variants(c, variant, dials)

    return Study(
        question=f"Built-in scenes{f', {variant}' if variant else ''}: what do regions add to plain crops?",
        config=config,
        rows={
            "byol": lib.plain_byol,
            "saliency": lambda c: None,
            "ground_truth": lambda c: c.roi.update(source="ground_truth"),
            "random": lambda c: c.roi.update(source="random"),
            "center": lambda c: c.roi.update(source="center"),
        },
        matched={"byol_flops": ("byol", "saliency")},
        baseline="byol",
        judge=config,
        tasks=("linear", "knn", "multilabel", "segmentation", "localization"),
        figures=FIGURES,
    )


def _photos(c: lib.ConfigDict) -> list[lib.ConfigDict]:
    """Every source of scenes in a configuration."""
    tasks = [part for task in c.tasks.values() if hasattr(task, "values") for part in task.values()]
    return [source for source in (c.data.train, *c.eval.values(), *tasks) if hasattr(source, "scenes")]


def _small(c: lib.ConfigDict) -> None:
    for source in _photos(c):
        source.scenes.object_size = (0.12, 0.25)


def _large(c: lib.ConfigDict) -> None:
    for source in _photos(c):
        source.scenes.object_size = (0.4, 0.7)


def _clutter(c: lib.ConfigDict) -> None:
    for source in _photos(c):
        source.scenes.clutter = 1.0


def _clean(c: lib.ConfigDict) -> None:
    for source in _photos(c):
        source.scenes.clutter = 0.0


def _long(c: lib.ConfigDict) -> None:
    c.total_steps = 1200


def _tight(c: lib.ConfigDict) -> None:
    c.crops.area = (0.05, 0.4)


def _loose(c: lib.ConfigDict) -> None:
    c.crops.area = (0.3, 1.0)
