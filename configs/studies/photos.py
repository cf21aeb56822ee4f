"""Scene photos of COCO, VOC and BSDS (train): what does guidance add to plain crops, beside its controls?

SALCL_DATA=DIR python -m salcl_jax.study --study=configs/studies/photos.py --workdir=DIR --jobs=2
The folder SALCL_DATA is that of configs/judge.py. Variants, joined by commas: long (five times the steps);
objects (the same networks, judged by COCO's annotated objects instead of whole photos);
rows, beside zoomed pairs with their controls: plain (crop scale and learning rate), pairs, local
(extra small crops), weights, maps (source of the map)
Results: RESULTS.md.
"""

from salcl_jax import config as lib
from salcl_jax.study_plan import Change, Study, guided, plain

JUDGE = lib.beside(__file__, "../judge.py")
FIGURES = {
    "linear/top1": "linear",
    "linear/fold_10pct/top1": "10 %",
    "linear/fold_1pct/top1": "1 %",
    "knn/top1": "k-NN",
    "multilabel/map": "COCO mAP",
    "voc_svm/map": "VOC mAP",
    "segmentation/miou": "VOC mIoU",
    "localization/corloc": "CorLoc",
}
OBJECTS = {"linear/top1": "objects, linear", "knn/top1": "objects, k-NN"}
REGIONS = {"": "saliency", "_true": "ground_truth", "_random": "random", "_center": "center"}
# Rows without a map that are also given the operations of a guided one, as further steps.
MATCHED = (("byol", "zoom"), ("byol", "local"), ("local_random", "local"))


def get_study(variant: str = "") -> Study:
    """Plain crops, zoomed pairs and their controls, and the rows of the groups that the variant names."""
    groups = {"plain": _plain, "pairs": _pairs, "local": _local, "weights": _weights, "maps": _maps}
    named = variant.split(",") if variant else []
    rows = {"byol": lib.plain_byol} | _core()
    for name in named:
        rows |= groups[name]() if name in groups else {}
    known = dict.fromkeys([*groups, "objects"], lambda c: None) | {"long": _long}
    tasks = ("linear", "knn", "multilabel", "voc_svm", "segmentation", "localization")
    judged = {"judge": _judge, "tasks": tasks, "figures": FIGURES}
    if "objects" in named:
        judged = {"judge": _judge_objects, "tasks": ("linear", "knn"), "figures": OBJECTS}
    return Study(
        question=f"Scene photos{f', {variant}' if variant else ''}: what does guidance add to plain crops?",
        config=lambda: lib.apply_variants(_config(), variant, known),
        rows=rows,
        baseline="byol",
        **judged,
        matched={f"{own}_as_{row}": (own, row) for own, row in MATCHED if row in rows and own in rows},
        fixed=() if "maps" in named else ("saliency.source", "saliency.stages"),
    )


def _config() -> lib.ConfigDict:
    """The small recipe without guidance's crops and weights; a row adds what it asks about."""
    c = lib.base()
    lib.small(c)
    c.data.train = lib.source(
        "folder", roots=_folders("coco", "voc", "bsds"), annotations=_annotations("train"),
        regions=f"{JUDGE.ROOT}/bsds_scenes/index.csv", split="train",
    )  # fmt: skip
    c.data.canvas = 192  # small objects keep their pixels
    c.data.cache = "canvas"  # 0.4 GB
    c.total_epochs, c.total_steps = 0, 1125  # 20 passes over 3,602 photos
    c.crops.size, c.local.size, c.local.area = 40, 36, (0.05, 0.25)  # smaller maps are slow on CPUs
    c.roi.min_size, c.roi.count = 0.1, 6
    c.pairs.min_size = 0.05
    c.pairs.mix.cover = 0.0
    c.weights.mode = "none"
    judge = _judge().tasks.classify
    c.eval.probe_train, c.eval.probe_test = judge.train, judge.test  # k-NN: the curves of the report
    c.eval.every, c.eval.limit, c.eval.linear, c.log.panels = 0.2, 1000, False, 0.0
    return c


def _folders(*names: str) -> tuple[str, ...]:
    return tuple(f"{JUDGE.ROOT}/{name}_scenes/images" for name in names)


def _annotations(split: str) -> str:
    return ",".join(f"{JUDGE.ROOT}/{name}_scenes/annotations_{split}.json" for name in ("coco", "voc"))


def _long(c: lib.ConfigDict) -> None:
    c.total_steps *= 5


def _judge() -> lib.ConfigDict:
    """Every protocol chooses on the train side; all rows are judged by one kind of map, but in `maps`."""
    c = JUDGE.get_config()
    c.tasks.linear.protocol, c.tasks.linear.subsets = "lbfgs", ("fold_1pct=0..4", "fold_10pct=0..4")
    c.tasks.voc_svm.shots = ()
    c.tasks.baselines = ("untrained",)
    c.tasks.localization.test = lib.source(
        "folder", roots=_folders("coco", "voc"), annotations=_annotations("val")
    )
    c.tasks.localization.gallery = 0
    c.tasks.jobs = 1
    return c


def _judge_objects() -> lib.ConfigDict:
    """Objects inside the photos, by logistic regression and k-NN."""
    c = JUDGE.get_config("objects")
    c.tasks.linear.protocol = "lbfgs"
    c.tasks.baselines = ("untrained",)
    return c


def _core() -> dict[str, Change]:
    """Four pairs of five zoomed, at regions of the map and of the controls, and `in_domain`.

    That says what better photos or regions could give at all: it trains without labels on the photos
    that the judge's probes are fitted to.
    """

    def in_domain(c: lib.ConfigDict) -> None:
        lib.plain_byol(c)
        c.data.train = _judge().tasks.classify.train

    rows = {f"zoom{end}": guided({"zoom": 0.8}, **{"roi.source": where}) for end, where in REGIONS.items()}
    return rows | {"in_domain": in_domain}


def _plain() -> dict[str, Change]:
    """BYOL deserves tuning too: crop scale and learning rate; and the guided row with half the rate."""
    return {
        "zoom_lr_half": guided({"zoom": 0.8}, **{"optim.lr": 0.004}),
        "byol_area08": plain(**{"crops.area": (0.08, 1.0)}),
        "byol_area30": plain(**{"crops.area": (0.3, 1.0)}),
        "byol_lr_half": plain(**{"optim.lr": 0.004}),
        "byol_lr_double": plain(**{"optim.lr": 0.016}),
    }


def _pairs() -> dict[str, Change]:
    """Other ways from a region to the pair, each for half of the pairs; controls of covering pairs."""
    ways = ("cover", "roi_center", "map_center", "contrastive_crop", "roi_global", "roi_jitter")
    rows = {way: guided({way: 0.5}) for way in ways}
    controls = {f"cover{end}": where for end, where in REGIONS.items() if end}
    return rows | {name: guided({"cover": 0.5}, **{"roi.source": where}) for name, where in controls.items()}


def _local() -> dict[str, Change]:
    """Two extra small crops: of regions from the map, true and central ones, and plain random crops."""
    rows = {f"local{end}": REGIONS[end] for end in ("", "_true", "_center")}
    return {
        **{name: guided(**{"local.count": 2, "roi.source": where}) for name, where in rows.items()},
        "local_random": guided(**{"local.count": 2, "local.source": "random", "roi.source": "none"}),
        "zoom_local": guided({"zoom": 0.8}, **{"local.count": 2}),
    }


def _weights() -> dict[str, Change]:
    """Pairs weighted by the saliency inside their crops: of plain crops, and of zoomed pairs."""
    modes = ("geometric", "product", "minimum")
    rows = {f"plain_{mode}": guided(**{"weights.mode": mode}) for mode in modes}
    return rows | {
        "zoom_geometric": guided({"zoom": 0.8}, **{"weights.mode": "geometric"}),
        "zoom_sharp": guided({"zoom": 0.8}, **{"weights.mode": "geometric", "weights.temperature": 0.5}),
        "cover_geometric": guided({"cover": 0.5}, **{"weights.mode": "geometric"}),  # as ships
    }


def _maps() -> dict[str, Change]:
    """Where the map comes from, for zoomed pairs; `zoom` is the target's border map of stage 3."""

    def drawn(source: str, *stages: str, **fields) -> Change:
        return guided({"zoom": 0.8}, **{"saliency.source": source, "saliency.stages": stages, **fields})

    return {
        "border_online": drawn("border", "stage3", **{"saliency.branch": "online"}),
        "border_fine": drawn("border", "stage3", **{"saliency.size": 96}),
        "border4": drawn("border", "stage4"),
        "border23": drawn("border", "stage2", "stage3", **{"saliency.size": 96}),
        "contrast4": drawn("contrast", "stage4"),
        "activation1": drawn("activation", "stage1"),
        "activation2": drawn("activation", "stage2"),
        "activation4": drawn("activation", "stage4"),
        "activation34": drawn("activation", "stage3", "stage4"),
        "similarity4": drawn("similarity", "stage4"),
        "gradcam4": drawn("gradcam", "stage4"),
    }
