"""Built-in scenes: when would a perfect map pay, and how much of that does the learnt map reach?

python -m salcl_jax.study --study=configs/studies/scenes.py:small,clutter --workdir=DIR --jobs=2
variants (dials that combine): small and large (objects of 0.12 to 0.25 and 0.4 to 0.7 of the image), clutter
(heaviest), clean (none), short and long (a third and three times the steps)
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
# Name of the rows' ending: where regions come from, and the stage of the map.
REGIONS = {
    "": ("saliency",),
    "_stage1": ("saliency", "stage1"),
    "_true": ("ground_truth",),
    "_random": ("random",),
}


def get_study(variant: str = "") -> Study:
    """Ways from a region to crops, with regions of maps, true ones and random ones; tuned BYOL."""
    dials = {"small": _small, "large": _large, "clutter": _clutter, "clean": _clean, "short": _short,
             "long": _long}  # fmt: skip

    def config() -> lib.ConfigDict:
        c = lib.beside(__file__, "../scenes.py").get_config()
        c.pairs.mix.cover = c.pairs.mix.roi_jitter = 0.0
        c.total_steps = 1200
        c.data.cache = "canvas"
        c.crops.size, c.local.size = 32, 24
        c.eval.every, c.eval.linear, c.log.panels = 0.0, False, 0.0
        c.tasks.linear.protocol, c.tasks.localization.gallery = "lbfgs", 0
        c.tasks.baselines = ("untrained",)
        return lib.apply_variants(c, variant, dials)

    return Study(
        question=f"Built-in scenes{f', {variant}' if variant else ''}: what do regions add to plain crops?",
        config=config,
        rows={
            "byol": lib.plain_byol,
            "byol_tight": _plain((0.05, 0.4)),
            "byol_loose": _plain((0.4, 1.0)),
            **{f"jitter{name}": _pairs("roi_jitter", *how) for name, how in REGIONS.items()},
            **{f"cover{name}": _pairs("cover", *how) for name, how in REGIONS.items()},
            **{f"local{name}": _small_crops(*how) for name, how in REGIONS.items()},
        },
        baseline="byol",
        judge=config,
        tasks=("linear", "knn", "multilabel", "localization"),
        figures=FIGURES,
    )


def _plain(area: tuple[float, float]) -> Change:
    """No guidance; random crops of this share of the scene."""

    def change(c: lib.ConfigDict) -> None:
        lib.plain_byol(c)
        c.crops.area = area

    return change


def _pairs(way: str, regions: str, stage: str = "") -> Change:
    """Four pairs of five by this way."""

    def change(c: lib.ConfigDict) -> None:
        c.pairs.mix[way] = 0.8
        c.roi.source = regions
        _fine_map(c, stage)

    return change


def _small_crops(regions: str, stage: str = "") -> Change:
    """Plain pairs, and two small crops at regions; 'random' ones are ordinary small crops."""

    def change(c: lib.ConfigDict) -> None:
        c.local.count = 2
        if regions == "random":
            c.local.source, c.roi.source, c.saliency.source = "random", "none", "none"
        else:
            c.roi.source = regions
            _fine_map(c, stage)

    return change


def _fine_map(c: lib.ConfigDict, stage: str) -> None:
    """The map from this one stage, of whole scenes; '': as configs/scenes.py has it."""
    if stage:
        c.saliency.stages, c.saliency.size = (stage,), 96


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


def _short(c: lib.ConfigDict) -> None:
    c.total_steps = 400


def _long(c: lib.ConfigDict) -> None:
    c.total_steps = 3600
