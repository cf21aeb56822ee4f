"""The protocols, each a function (judge, subject) -> figures: which photos, features and evaluator."""

from functools import partial

import numpy as np

from salcl_jax import classify, frozen, report
from salcl_jax.data.examples import load
from salcl_jax.data.sources import Source
from salcl_jax.evaluators import (
    TASKS,
    average_precision,
    crops,
    features,
    localization,
    multilabel,
    segmentation,
    voc_svm,
)
from salcl_jax.judge import Judge, Subject, shared_classes
from salcl_jax.types import Rois

Figures = dict[str, float]
PIXELS = ("linear", "knn", "voc_svm", "multilabel", "segmentation")  # where raw pixels are a baseline


def run(task: str, judge: Judge, subject: Subject) -> Figures:
    """Figures of one task on one subject, named 'task/...'; ValueError for data that does not suit it."""
    protocols = {
        "linear": classify.linear_probe, "knn": classify.knn, "semi": classify.semi, "voc_svm": _voc_svm,
        "multilabel": _multilabel, "localization": _localization, "crops": _crops,
        "segmentation": _segmentation,
    }  # fmt: skip
    _open(task, judge)
    return protocols[task](judge, subject)


def _open(task: str, judge: Judge) -> dict[str, Source]:
    """Photos of a task: 'train', of the first fold where there are several, and 'test'."""
    folds = {"semi.train": classify.folds(judge.config.tasks.semi.folds)[0]}
    found = {part.split(".")[1]: judge.source(part, folds.get(part, "")) for part in TASKS[task]}
    if task == "linear":
        for spec in judge.config.tasks.linear.subsets:
            judge.source("classify.train", classify.folds(spec)[0])
    if "train" in found:
        shared_classes(found["train"], found["test"])
    return found


def about(task: str, judge: Judge) -> dict[str, str]:
    """Protocol, view and photos of a task, in words for a report; after it, also which photos failed.

    Raises ValueError where photos are missing, or train and test number their classes differently.
    """
    c, saliency = judge.config.tasks, judge.config.saliency
    source = frozen.map_source(judge.config)
    against = f", each against its batch of {judge.batch_size}" if source in ("contrast", "gradcam") else ""
    stages, regions = ", ".join(saliency.stages), judge.config.roi.source
    drawn = f"map '{source}' of {stages} of the {saliency.branch} network at {saliency.size} px{against}"
    protocol = {
        "linear": classify.linear_protocol(c),
        "knn": f"weighted k-NN, cosine, temperature {c.knn.temperature:g} (Wu et al. 2018)",
        "semi": f"fine-tuning, {c.semi.epochs} epochs, weight decay {c.semi.weight_decay:g}, "
                f"{len(c.semi.rates)} x {len(c.semi.multipliers)} rates chosen by "
                f"{c.semi.choose.replace('_', ' ')} (ORL){_folds(c.semi.folds)}",
        "voc_svm": f"linear SVMs on {', '.join(c.voc_svm.levels)}, 19 costs, 3-fold choice (VOC07, ORL)",
        "multilabel": "one-vs-rest logistic regression on pooled features, mAP without interpolation",
        "localization": drawn,
        "crops": f"{frozen.DRAWS} pairs of crops a photo, as in training after its warm-up: "
                 f"{_ways(judge)} at regions of {drawn if regions == 'saliency' else regions}",
        "segmentation": f"linear probe on {', '.join(c.segmentation.stages)} at {c.segmentation.size} px",
    }[task]  # fmt: skip
    photos = {}
    for name, s in _open(task, judge).items():
        count = len(s) if (task, name) == ("semi", "train") else judge.count(s)  # no limit on few labels
        lost = judge.unread.get(s.digest(), 0)
        photos[name] = f"{count - lost:,} of {s.name}" + (f" ({lost:,} cannot be used)" if lost else "")
    view = _view(task, judge)
    return {"protocol": protocol} | ({"view": view} if view else {}) | photos


def _ways(judge: Judge) -> str:
    """How pairs of crops are made from regions, and by which share."""
    return ", ".join(f"{way} {share:g}" for way, share in judge.config.pairs.mix.items() if share)


def _folds(spec: str) -> str:
    count = len(classify.folds(spec))
    return f", mean of {count} folds, {spec}" if count > 1 else f", {spec}" if spec else ""


def _view(task: str, judge: Judge) -> str:
    """What is seen of a photo that is tested, for tasks on features of photos or objects."""
    c = judge.config.tasks
    words = {"center": "central square, 0.875 of the short side", "whole": "whole photo, made square"}
    if task in ("linear", "knn"):
        return words[c.view] if c.classify.on == "image" else "objects in their boxes, 0.2 wider at each end"
    seen = {"semi": "center", "voc_svm": "whole", "multilabel": "whole", "segmentation": "whole"}
    return words[seen[task]] if task in seen else ""


def _image_labels(table: features.Columns, source: Source, count: int) -> np.ndarray:
    if "classes" not in table or not source.class_names:
        raise ValueError(f"{source.name}: has no boxes with classes; name a source that has")
    return average_precision.image_labels(np.asarray(table["classes"]), table.get("difficult"), count)


def _with_image_labels(judge: Judge, subject: Subject, task: str, levels: tuple[str, ...]) -> tuple:
    """For train and test: features by level and labels of each image; the names of the classes.

    Photos are seen whole, squashed to a square (VOC07, ORL): an object at the edge is among the labels.
    """
    sources = [judge.source(f"{task}.{part}") for part in ("train", "test")]
    names = shared_classes(*sources)
    tables = [judge.features(subject, source, levels, view="whole") for source in sources]
    labels = [_image_labels(table, s, len(names)) for table, s in zip(tables, sources, strict=True)]
    return *zip(tables, labels, strict=True), names


def _multilabel(judge: Judge, subject: Subject) -> Figures:
    train, test, names = _with_image_labels(judge, subject, "multilabel", ("pooled",))
    examples = [(np.asarray(table["pooled"]), labels) for table, labels in (train, test)]
    return multilabel.evaluate(*examples, class_names=names, l2s=judge.config.tasks.multilabel.l2)


def _voc_svm(judge: Judge, subject: Subject) -> Figures:
    """Figures of the first level; of further ones as 'voc_svm/<level>/...'."""
    c = judge.config.tasks.voc_svm
    levels = ("pooled",) if subject.state is None else tuple(c.levels)
    train, test, names = _with_image_labels(judge, subject, "voc_svm", levels)
    figures: Figures = {}
    for level in levels:
        found = voc_svm.evaluate(
            *((np.asarray(table[level]), labels) for table, labels in (train, test)), class_names=names,
            shots=c.shots, samples=c.samples, jobs=judge.config.tasks.jobs, seed=judge.config.seed,
        )  # fmt: skip
        place = "voc_svm/" if level == levels[0] else f"voc_svm/{level}/"
        figures |= {name.replace("voc_svm/", place, 1): value for name, value in found.items()}
    return figures


def _boxed(judge: Judge) -> Source:
    source = judge.source("localization.test")
    if not source.has_boxes:
        raise ValueError(f"tasks.localization.test: {source.name} has no boxes; name a source that has")
    return source


def _crops(judge: Judge, subject: Subject) -> Figures:
    c, source = judge.config, _boxed(judge)
    if c.roi.source == "none" or not sum(c.pairs.mix.values()):
        fields = "roi.source, saliency.source and a way of pairs.mix"
        raise ValueError(f"crops: no pair follows a region; give {fields}")
    batches = judge.batches(source, f"{subject.name}: crops of {len(source):,} photos")
    windows = judge.windows_fn()
    return crops.evaluate(lambda number, *x: windows((subject.state, np.int32(number)), *x), batches)


def _localization(judge: Judge, subject: Subject) -> Figures:
    source = _boxed(judge)
    label = f"{subject.name}: maps of {len(source):,} photos"
    batches = judge.batches(source, label, masks=source.has_masks)
    drawn: list | None = [] if judge.config.tasks.localization.gallery else None
    columns = localization.collect(partial(judge.maps_fn(), subject.state), batches, drawn)
    judge.kept["localization", subject.name], judge.kept["maps", subject.name] = columns, drawn
    return localization.summarise(columns)


def gallery(judge: Judge, subject: Subject) -> np.ndarray:
    """Picture of the photos whose objects the regions cover best, middling and worst; after the task."""
    c, count = judge.config, judge.config.tasks.localization.gallery
    columns, drawn = (judge.kept[what, subject.name] for what in ("localization", "maps"))
    source = judge.source("localization.test")
    known = np.flatnonzero(columns["boxes"] > 0)
    order = known[np.argsort(-columns["coverage"][known], kind="stable")]
    middle = max(0, len(order) // 2 - count // 2)
    chosen = np.unique(np.r_[order[:count], order[middle : middle + count], order[-count:]])
    sizes = {"canvas": c.data.canvas, "max_boxes": c.tasks.max_boxes, "max_pixels": c.data.max_pixels}
    examples = [load(source, int(columns["id"][i]), tries=1, **sizes) for i in chosen]
    batch = {name: np.stack([x[name] for x in examples]) for name in ("image", "boxes", "difficult")}
    maps = np.concatenate([maps for maps, _ in drawn])[chosen]
    rois = Rois(*(np.concatenate(parts)[chosen] for parts in zip(*(r for _, r in drawn), strict=True)))
    boxes = localization.counted(batch)
    return report.gallery(batch["image"], maps, rois, boxes, columns["coverage"][chosen], count=count)


def _segmentation(judge: Judge, subject: Subject) -> Figures:
    c = judge.config.tasks.segmentation
    sources = [judge.source(f"segmentation.{part}") for part in ("train", "test")]
    for source in sources:
        if not source.has_masks:
            raise ValueError(f"segmentation: {source.name} has no masks; name a source that has")
    tables = [judge.dense(subject, source) for source in sources]
    names = ("background", *shared_classes(*sources))
    names = names if len(names) == c.classes else tuple(map(str, range(c.classes)))
    return segmentation.evaluate(
        *((table["features"], table["masks"]) for table in tables), num_classes=c.classes,
        class_names=names, rates=c.rates, epochs=c.epochs, batch_size=c.batch_size, seed=judge.config.seed,
    )  # fmt: skip
