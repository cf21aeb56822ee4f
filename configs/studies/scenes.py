"""Built-in scenes: when does guidance pay, and which of its choices matter there?

python -m salcl_jax.study --study=configs/studies/scenes.py:small,clutter --workdir=DIR --jobs=2
variants, joined by commas
dials of the scenes: small and large (objects of 0.12 to 0.25 and 0.4 to 0.7 of the image; else 0.25 to 0.5),
clutter (heaviest), clean (none); of the training: fine (crops of 64 px, not 40), short and long (half and
three times the steps)
rows, beside zoomed pairs with their controls: plain, pairs, local, maps, regions, weights, schedule
Results: RESULTS.md.
"""

from salcl_jax import config as lib
from salcl_jax.study_plan import Change, Study, guided, plain

SCENES = lib.beside(__file__, "../scenes.py")
FIGURES = {
    "linear/top1": "objects, linear",
    "knn/top1": "objects, k-NN",
    "multilabel/map": "multi-label mAP",
    "localization/corloc": "CorLoc",
    "localization/pointing": "pointing",
}
REGIONS = {
    "": {"roi.source": "saliency"},
    "_true": {"roi.source": "ground_truth"},
    "_random": {"roi.source": "random"},  # of any size
    "_random_small": {"roi.source": "random", "roi.max_size": 0.3},  # small ones
    "_center": {"roi.source": "center"},
}
# Guided rows whose operations plain BYOL is also given, as further steps.
MATCHED = ("zoom", "border23_clip")
CLIP = {"saliency.source": "border", "saliency.stages": ("stage2", "stage3"), "saliency.clip": 1.0,
        "roi.min_peak": 0.8}  # fmt: skip
DRAWN = ("saliency.source", "saliency.stages")


def get_study(variant: str = "") -> Study:
    """Plain crops, zoomed pairs and their controls, and the rows of the groups that the variant names."""
    dials = {"small": _small, "large": _large, "clutter": _clutter, "clean": _clean, "short": _short,
             "long": _long, "fine": _fine}  # fmt: skip
    groups = {"plain": _plain, "pairs": _pairs, "local": _local, "maps": _maps, "regions": _regions,
              "weights": _weights, "schedule": _schedule}  # fmt: skip
    named = variant.split(",") if variant else []
    rows = {"byol": lib.plain_byol} | _core()
    for name in named:
        rows |= groups[name]() if name in groups else {}
    known = dict.fromkeys(groups, lambda c: None) | dials

    def config() -> lib.ConfigDict:
        return lib.apply_variants(_config(), variant, known)

    return Study(
        question=f"Built-in scenes{f', {variant}' if variant else ''}: what does guidance add?",
        config=config,
        rows=rows,
        matched={f"byol_as_{row}": ("byol", row) for row in MATCHED if row in rows},
        baseline="byol",
        judge=config,
        tasks=("linear", "knn", "multilabel", "localization"),
        figures=FIGURES,
        fixed=() if "maps" in named else DRAWN,
    )


def _config() -> lib.ConfigDict:
    """The demo's recipe without guidance's crops and weights; a row adds what it asks about."""
    c = SCENES.get_config()
    for way in c.pairs.mix:
        c.pairs.mix[way] = 0.0
    c.total_steps = 600
    c.data.cache = "canvas"
    c.crops.size, c.local.size = 40, 36  # maps of 3 x 3 cells; smaller ones are slow on CPUs
    c.pairs.min_size = 0.05
    c.saliency.stages, c.saliency.size = ("stage1",), 96
    c.roi.window, c.roi.min_size, c.roi.count = 0.08, 0.1, 4
    c.eval.every, c.eval.linear, c.log.panels = 0.2, False, 0.0  # k-NN: the curves of the report
    c.tasks.linear.protocol, c.tasks.localization.gallery = "lbfgs", 0
    c.tasks.baselines = ("untrained",)
    return c


def _zoom(share: float = 0.8, **fields) -> Change:
    return guided({"zoom": share}, **fields)


def _core() -> dict[str, Change]:
    """Four pairs of five zoomed, at regions of the map and at those of the controls."""
    return {f"zoom{name}": _zoom(**regions) for name, regions in REGIONS.items()}


def _plain() -> dict[str, Change]:
    """BYOL deserves tuning too: crop scale and learning rate; and the guided row with each of them."""
    return {
        "border23_clip_area08": _zoom(**CLIP, **{"roi.level": 0.5, "crops.area": (0.08, 1.0)}),
        "border23_clip_lr_double": _zoom(**CLIP, **{"roi.level": 0.5, "optim.lr": 0.016}),
        "byol_area05": plain(**{"crops.area": (0.05, 0.4)}),
        "byol_area08": plain(**{"crops.area": (0.08, 1.0)}),
        "byol_area40": plain(**{"crops.area": (0.4, 1.0)}),
        "byol_lr_half": plain(**{"optim.lr": 0.004}),
        "byol_lr_double": plain(**{"optim.lr": 0.016}),
    }


def _pairs() -> dict[str, Change]:
    """Other ways from a region to the pair, and how much of which."""
    rows = {
        way + end: guided({way: 0.8}, **REGIONS[end]) for way in ("roi_jitter", "cover")
        for end in ("", "_true", "_random")
    }  # fmt: skip
    others = ("roi_center", "roi_global", "map_center", "contrastive_crop")
    rows |= {way: guided({way: 0.8}) for way in others}
    rows |= {f"zoom_share{100 * share:.0f}": _zoom(share) for share in (0.5, 1.0)}
    return rows | {f"zoom_side{10 * side:.0f}": _zoom(**{"pairs.zoom": side}) for side in (1.0, 2.0, 3.0)}


def _local() -> dict[str, Change]:
    """Two small crops beside plain pairs: at regions of the map, true ones, and plain random crops."""
    two = {"local.count": 2}
    return {
        "local": guided(**two),
        "local_true": guided(**two, **{"roi.source": "ground_truth"}),
        "local_random": guided(**two, **{"local.source": "random", "roi.source": "none"}),
        "zoom_local": _zoom(**two),
    }


def _maps() -> dict[str, Change]:
    """Where the map comes from, for zoomed pairs; `zoom` is the target's activation of stage 1 at 96 px."""

    def drawn(source: str = "activation", *stages: str, **fields) -> Change:
        return _zoom(**{"saliency.source": source, "saliency.stages": stages or ("stage1",), **fields})

    return {
        "norm1": drawn(**{"saliency.statistic": "norm"}),
        "zoom_online": drawn(**{"saliency.branch": "online"}),
        "small1": drawn(**{"saliency.size": 48}),
        "activation2": drawn("activation", "stage2"),
        "activation3": drawn("activation", "stage3"),
        "activation4": drawn("activation", "stage4"),
        "activation12": drawn("activation", "stage1", "stage2"),
        "activation23": drawn("activation", "stage2", "stage3"),
        "border2": drawn("border", "stage2"),
        "border3": drawn("border", "stage3"),
        "border23": drawn("border", "stage2", "stage3"),
        "border23_level": drawn("border", "stage2", "stage3", **{"roi.level": 0.5}),
        "border23_clip": _zoom(**CLIP, **{"roi.level": 0.5}),
        "border23_clip_wide": _zoom(**CLIP),
        "similarity4": drawn("similarity", "stage4"),
        "contrast4": drawn("contrast", "stage4"),
        "gradcam4": drawn("gradcam", "stage4"),
    }


def _regions() -> dict[str, Change]:
    """From the map to regions: how many, how wide a neighbourhood is measured, how large they are."""
    return {
        "count1": _zoom(**{"roi.count": 1}),
        "count2": _zoom(**{"roi.count": 2}),
        "count8": _zoom(**{"roi.count": 8}),
        "window05": _zoom(**{"roi.window": 0.05}),
        "window15": _zoom(**{"roi.window": 0.15}),
        "window30": _zoom(**{"roi.window": 0.3}),
        "extent07": _zoom(**{"roi.extent": 0.7}),
        "extent15": _zoom(**{"roi.extent": 1.5}),
        "peak0": _zoom(**{"roi.min_peak": 0.0}),  # all regions, however weak
        "peak8": _zoom(**{"roi.min_peak": 0.8}),
    }


def _weights() -> dict[str, Change]:
    """Pairs weighted by the saliency inside their crops: of plain crops, and of zoomed pairs."""
    modes = {
        "geometric": {"weights.mode": "geometric"},
        "product": {"weights.mode": "product"},
        "minimum": {"weights.mode": "minimum"},
        "sharp": {"weights.mode": "geometric", "weights.temperature": 0.5},
        "absolute": {"weights.mode": "geometric", "weights.relative": False},
    }
    plain = {f"plain_{name}": guided(**modes[name]) for name in ("geometric", "product", "minimum")}
    return plain | {f"zoom_{name}": _zoom(**fields) for name, fields in modes.items()}


def _schedule() -> dict[str, Change]:
    """When guidance sets in, and whether the loss moves the windows."""
    online = {"saliency.branch": "online", "crops.gradient": True}
    return {
        "start0": _zoom(**{"guidance.start": 0.0, "guidance.full": 0.0}),
        "start10": _zoom(**{"guidance.start": 0.1, "guidance.full": 0.3}),
        "start30": _zoom(**{"guidance.start": 0.3, "guidance.full": 0.6}),
        "zoom_online": _zoom(**{"saliency.branch": "online"}),
        "zoom_gradient": _zoom(**online),
    }


def _small(c: lib.ConfigDict) -> None:
    for source in SCENES.sources(c):
        source.scenes.object_size = (0.12, 0.25)


def _large(c: lib.ConfigDict) -> None:
    for source in SCENES.sources(c):
        source.scenes.object_size = (0.4, 0.7)


def _clutter(c: lib.ConfigDict) -> None:
    for source in SCENES.sources(c):
        source.scenes.clutter = 1.0


def _clean(c: lib.ConfigDict) -> None:
    for source in SCENES.sources(c):
        source.scenes.clutter = 0.0


def _short(c: lib.ConfigDict) -> None:
    c.total_steps = 300


def _long(c: lib.ConfigDict) -> None:
    c.total_steps = 1800


def _fine(c: lib.ConfigDict) -> None:
    c.crops.size = 64
