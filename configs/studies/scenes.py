"""Built-in scenes: would a perfect map pay, and how much of that does the learnt map reach?

python -m salcl_jax.study --study=configs/studies/scenes.py --workdir=DIR --jobs=2
variants (dials that combine, as small,clutter): small and large (objects of 0.12 to 0.25 and 0.4 to 0.7 of
the image), clutter (heaviest), clean (none), long (three times the steps), tight and loose (training crops of
0.05 to 0.4 and 0.3 to 1 of the area)
Results: RESULTS.md.
"""

from salcl_jax import config as lib
from salcl_jax.study_plan import Change, Study

FIGURES = {
    "linear/top1": "objects, linear",
    "knn/top1": "objects, k-NN",
    "multilabel/map": "multi-label mAP",
    "localization/corloc": "CorLoc",
    "localization/pointing": "pointing",
}


def get_study(variant: str = "") -> Study:
    """Ways from a region to crops, each with regions of the map, true ones and random ones."""
    dials = {"small": _small, "large": _large, "clutter": _clutter, "clean": _clean, "long": _long,
             "tight": _tight, "loose": _loose}  # fmt: skip

    def config() -> lib.ConfigDict:
        c = lib.beside(__file__, "../scenes.py").get_config()
        c.pairs.mix.cover = c.pairs.mix.roi_jitter = 0.0
        c.eval.every, c.eval.linear, c.log.panels = 0.5, False, 0.0
        c.tasks.linear.protocol, c.tasks.localization.gallery = "lbfgs", 0
        c.tasks.baselines = ("untrained",)
        return lib.apply_variants(c, variant, dials)

    return Study(
        question=f"Built-in scenes{f', {variant}' if variant else ''}: what do regions add to plain crops?",
        config=config,
        rows={
            "byol": lib.plain_byol,
            "jitter": _pairs("roi_jitter", "saliency"),
            "jitter_true": _pairs("roi_jitter", "ground_truth"),
            "cover": _pairs("cover", "saliency"),
            "cover_true": _pairs("cover", "ground_truth"),
            "local": _small_crops("saliency"),
            "local_true": _small_crops("ground_truth"),
            "local_random": _small_crops("random"),
        },
        baseline="byol",
        judge=config,
        tasks=("linear", "knn", "multilabel", "localization"),
        figures=FIGURES,
    )


def _pairs(way: str, regions: str) -> Change:
    """Four pairs of five by this way."""

    def change(c: lib.ConfigDict) -> None:
        c.pairs.mix[way] = 0.8
        c.roi.source = regions

    return change


def _small_crops(regions: str) -> Change:
    """Plain pairs, and two small crops at regions; 'random' ones are ordinary small crops."""

    def change(c: lib.ConfigDict) -> None:
        c.local.count, c.local.size = 2, 32
        if regions == "random":
            c.local.source, c.roi.source, c.saliency.source = "random", "none", "none"
        else:
            c.roi.source = regions

    return change


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
