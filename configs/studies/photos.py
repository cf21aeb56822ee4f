"""Scene photos (COCO and VOC, train splits): what does guidance add to plain crops, beside its controls?

SALCL_DATA=DIR python -m salcl_jax.study --study=configs/studies/photos.py --workdir=DIR --jobs=2
The folder SALCL_DATA is that of configs/judge.py. variants: shipped (what configs/ has, and small crops),
plain (BYOL's own crop scale and learning rate), pairs (ways from a region to the pair of crops), local (extra
small crops), weights, maps (source of the map); none runs the rows of all
Results: RESULTS.md.
"""

from salcl_jax import config as lib
from salcl_jax.study_plan import Change, Study

FIGURES = {
    "linear/top1": "linear",
    "linear/fold_10pct/top1": "10 %",
    "linear/fold_1pct/top1": "1 %",
    "knn/top1": "k-NN",
    "multilabel/map": "COCO mAP",
    "segmentation/miou": "VOC mIoU",
    "localization/corloc": "CorLoc",
}

# Rows without a map that are also given the operations of a guided one, as further steps.
MATCHED = (("byol", "guided"), ("byol", "local_map"), ("byol", "cover"), ("local_random", "local_map"))


def get_study(variant: str = "") -> Study:
    """The rows of one question, or of all."""
    groups = {
        "shipped": _shipped(), "plain": _plain(), "pairs": _pairs(), "local": _local(),
        "weights": _weights(), "maps": _maps(),
    }  # fmt: skip
    if variant and variant not in groups:
        raise lib.ConfigError(f"variant '{variant}' is unknown; this study has: {', '.join(groups)}")
    rows = groups[variant] if variant else {name: row for g in groups.values() for name, row in g.items()}
    return Study(
        question=f"Scene photos: what does guidance add{f' ({variant})' if variant else ''}?",
        config=_config,
        rows={"byol": lib.plain_byol} | rows,
        baseline="byol",
        judge=_judge,
        tasks=("linear", "knn", "multilabel", "segmentation", "localization"),
        figures=FIGURES,
        matched={
            f"{own}_as_{row}": (own, row) for own, row in MATCHED if row in rows and own in {"byol", *rows}
        },
        fixed=() if variant == "maps" else ("saliency.source", "saliency.stages"),
    )


def _config() -> lib.ConfigDict:
    """The small recipe without guidance's crops and weights; a row adds what it asks about."""
    c = lib.base()
    lib.small(c)
    root = lib.beside(__file__, "../judge.py").ROOT
    folders = tuple(f"{root}/{name}_scenes" for name in ("coco", "voc"))
    c.data.train = lib.source(
        "folder", roots=tuple(f"{folder}/images" for folder in folders),
        annotations=",".join(f"{folder}/annotations_train.json" for folder in folders),
    )  # fmt: skip
    c.data.cache = "canvas"  # 0.1 GB
    c.total_epochs = 20
    c.pairs.mix.cover = 0.0
    c.weights.mode = "none"
    c.eval.every, c.log.panels = 0.0, 0.0
    return c


def _judge() -> lib.ConfigDict:
    """Every protocol chooses on the train side; all rows are judged by one kind of map, but in `maps`."""
    c = lib.beside(__file__, "../judge.py").get_config()
    c.tasks.linear.protocol, c.tasks.linear.subsets = "lbfgs", ("fold_1pct=0..4", "fold_10pct=0..4")
    c.tasks.baselines = ()
    c.tasks.localization.gallery = 0
    c.tasks.jobs = 1
    return c


def _mixed(**mix: float) -> Change:
    """Pairs by these ways; what is left of 1 stays random."""

    def change(c: lib.ConfigDict) -> None:
        c.pairs.mix.update(mix)

    return change


def _small_crops(**fields: str) -> Change:
    """Two small crops beside plain pairs; fields: of local and roi, by their dotted names."""

    def change(c: lib.ConfigDict) -> None:
        c.local.count, c.local.size, c.local.area = 2, 32, (0.05, 0.25)
        c.update_from_flattened_dict(fields)

    return change


def _shipped() -> dict[str, Change]:
    """Covering pairs and weights together, as configs/ has them; small crops of the map, and random ones."""

    def guided(c: lib.ConfigDict) -> None:
        c.pairs.mix.cover = lib.base().pairs.mix.cover
        c.weights.mode = lib.base().weights.mode

    local = _local()
    return {"guided": guided, "local_random": local["local_random"], "local_map": local["local_map"]}


def _plain() -> dict[str, Change]:
    """BYOL deserves tuning too: crop scale and learning rate."""

    def plain(**fields: float | tuple) -> Change:
        def change(c: lib.ConfigDict) -> None:
            lib.plain_byol(c)
            c.update_from_flattened_dict(fields)

        return change

    return {
        "byol_area08": plain(**{"crops.area": (0.08, 1.0)}),
        "byol_area30": plain(**{"crops.area": (0.3, 1.0)}),
        "byol_lr_half": plain(**{"optim.lr": 0.002}),
        "byol_lr_double": plain(**{"optim.lr": 0.008}),
    }


def _pairs() -> dict[str, Change]:
    """From a region to the pair: each way for half of the pairs; then covering pairs of other regions."""

    def cover(regions: str) -> Change:
        def change(c: lib.ConfigDict) -> None:
            c.pairs.mix.cover = 0.5
            c.roi.source = regions

        return change

    return {
        "cover": _mixed(cover=0.5),
        "roi_center": _mixed(roi_center=0.5),
        "map_center": _mixed(map_center=0.5),
        "contrastive_crop": _mixed(contrastive_crop=0.5),
        "roi_global": _mixed(roi_global=0.5),
        "roi_jitter": _mixed(roi_jitter=0.5),
        "cover_true": cover("ground_truth"),
        "cover_random": cover("random"),
        "cover_center": cover("center"),
    }


def _local() -> dict[str, Change]:
    """Extra small crops: of regions from the map, true, random and central ones, and plain random crops."""
    no_map = {"local.source": "random", "roi.source": "none", "saliency.source": "none"}
    return {
        "local_random": _small_crops(**no_map),
        "local_map": _small_crops(),
        "local_true": _small_crops(**{"roi.source": "ground_truth"}),
        "local_center": _small_crops(**{"roi.source": "center"}),
    }


def _weights() -> dict[str, Change]:
    """Pairs weighted by the saliency inside their crops; the crops stay plain."""

    def weighted(mode: str, temperature: float = 1.0) -> Change:
        return lambda c: c.weights.update(mode=mode, temperature=temperature)

    return {
        "weights_geometric": weighted("geometric"),
        "weights_product": weighted("product"),
        "weights_minimum": weighted("minimum"),
        "weights_geometric_hot": weighted("geometric", 2.0),
    }


def _maps() -> dict[str, Change]:
    """Where the map comes from, for covering pairs."""

    def drawn(**fields: str) -> Change:
        def change(c: lib.ConfigDict) -> None:
            c.pairs.mix.cover = 0.5
            c.saliency.update(fields)

        return change

    return {
        "cover": drawn(),  # border, stage 3, of the target
        "border_online": drawn(branch="online"),
        "border4": drawn(stages=("stage4",)),
        "contrast": drawn(source="contrast", stages=("stage4",)),
        "activation2": drawn(source="activation", stages=("stage2",)),
        "activation4": drawn(source="activation", stages=("stage4",)),
        "activation34": drawn(source="activation", stages=("stage3", "stage4")),
        "similarity": drawn(source="similarity", stages=("stage4",)),
        "gradcam": drawn(source="gradcam", stages=("stage4",)),
    }
