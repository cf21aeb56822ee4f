"""What a configuration may not be: values out of range and combinations that cannot run.

Each refusal is a `ConfigError` of one line that names the field, its value and what is allowed.
"""

import math

from salcl_jax import maps
from salcl_jax.config import ConfigDict, ConfigError
from salcl_jax.evaluators import TASKS
from salcl_jax.trackers import PACKAGES

_KINDS = ("tfds", "folder", "arrays", "scenes")
_EVAL_SOURCES = ("pretext", "localization", "probe_train", "probe_test")
_ONE_OF = {
    "data.cache": ("none", "encoded", "canvas"),
    "sharding.params": ("replicated", "fsdp"),
    "model.name": ("resnet18", "resnet34", "resnet50", "resnet101", "vit_s16", "vit_b16"),
    "model.stem": ("imagenet", "stride16", "cifar"),
    "model.dtype": ("bfloat16", "float32"),
    "saliency.branch": ("target", "online"),
    "saliency.fuse": ("product", "mean"),
    "saliency.statistic": ("sum", "norm"),
    "roi.source": ("none", "saliency", "random", "center", "ground_truth"),
    "local.source": ("roi", "random"),
    "local.invalid": ("random", "drop"),
    "weights.mode": ("none", "product", "geometric", "minimum"),
    "weights.normalize": ("image", "batch"),
    "loss.name": ("byol", "infonce", "simsiam"),
    "optim.name": ("sgd", "lars", "adamw"),
    "eval.branch": ("online", "target"),
    "eval.probe_on": ("image", "object"),
    "tasks.view": ("center", "whole"),
    "tasks.classify.on": ("image", "object"),
    "tasks.linear.protocol": ("sgd", "orl", "orl_places205", "orl_inat18", "lbfgs"),
    "tasks.linear.optimizer": ("sgd", "lars"),
    "tasks.semi.choose": ("held_out", "test"),
}
_LEVELS = ("pooled", "conv1", "stage1", "stage2", "stage3", "stage4")
# Lists of which every element must be one of these, or at least this; they may not be empty, but for *.
_EACH = {
    "log.trackers*": tuple(PACKAGES),
    "eval.tasks*": tuple(TASKS), "tasks.summary": tuple(TASKS), "tasks.baselines*": ("untrained", "pixels"),
    "tasks.linear.levels": _LEVELS, "tasks.voc_svm.levels": _LEVELS, "tasks.segmentation.stages": _LEVELS[2:],
    "tasks.knn.k": 1, "tasks.voc_svm.shots*": 1, "tasks.linear.rates": 1e-8, "tasks.semi.rates": 1e-8,
    "tasks.semi.multipliers": 1e-8, "tasks.segmentation.rates": 1e-8, "tasks.linear.l2": 0,
    "tasks.multilabel.l2": 0, "tasks.semi.milestones*": 1,
}  # fmt: skip
_AT_LEAST = {
    "batch_size": 2, "accumulate": 1, "total_epochs": 0, "total_steps": 0, "data.canvas": 16,
    "data.max_boxes": 1, "data.workers": 1, "data.prefetch": 1, "model.width": 1, "crops.size": 16,
    "saliency.size": 16, "saliency.clip": 0, "roi.window": 0.01, "roi.extent": 0.01, "roi.temperature": 1e-4,
    "local.count": 0, "local.size": 16, "loss.temperature": 1e-3, "weights.temperature": 1e-3,
    "weights.floor": 0, "log.every": 1, "eval.batch_size": 1, "pairs.cover_tries": 1, "pairs.zoom": 1,
    "checkpoint.keep": 1, "collapse.patience": 1, "optim.weight_decay": 0, "optim.lr": 0,
    "local.weight": 0, "pairs.beta": 0.01, "log.panel_images": 1, "roi.count": 1, "eval.size": 16,
    "model.projector_hidden": 1, "model.projector_out": 1, "model.predictor_hidden": 1,
    "optim.final_lr": 0, "optim.clip_norm": 0, "optim.trust": 1e-6, "pairs.jitter_shift": 0,
    "data.min_side": 0, "data.max_pixels": 0, "eval.limit": 0, "tasks.pixels": 2, "tasks.max_boxes": 1,
    "tasks.limit": 0, "sharding.min_size": 1, "distributed_timeout": 5, "data.cache_gb": 0,
    "tasks.jobs": -1, "tasks.knn.temperature": 1e-3, "tasks.knn.bank_rows": 1, "tasks.linear.epochs": 1,
    "tasks.linear.batch_size": 2, "tasks.linear.weight_decay": 0, "tasks.semi.weight_decay": 0,
    "tasks.semi.epochs": 1, "tasks.semi.batch_size": 2, "tasks.voc_svm.samples": 1,
    "tasks.localization.gallery": 0, "tasks.segmentation.classes": 2, "tasks.segmentation.size": 16,
    "tasks.segmentation.epochs": 1, "tasks.segmentation.batch_size": 1,
}  # fmt: skip
_SHARES = (
    "data.max_skipped", "guidance.start", "guidance.full", "optim.warmup", "ema.base", "eval.every",
    "checkpoint.every", "log.panels", "roi.level", "roi.min_peak", "pairs.cover_share",
    "pairs.min_size", "pairs.threshold", "roi.min_size", "roi.max_size", "collapse.threshold",
    "optim.momentum", "checkpoint.keep_every", "weights.floor",
)  # fmt: skip
_RANGES = ("data.window_area", "crops.area", "crops.ratio", "local.area", "pairs.jitter_area",
           "pairs.jitter_ratio", "augment.view1.blur_sigma", "augment.view2.blur_sigma")  # fmt: skip


def validate(c: ConfigDict, devices: int = 1) -> None:
    """Raise `ConfigError` for values and combinations that cannot run on this number of devices."""
    _validate_values(c, c)
    for name, allowed in (_ONE_OF | {"saliency.source": ("none", *maps.names())}).items():
        _need(_get(c, name) in allowed, c, name, f"allowed: {', '.join(allowed)}")
    for name, least in _AT_LEAST.items():
        _need(_get(c, name) >= least, c, name, f"must be at least {least}")
    for name in _SHARES:
        _need(0 <= _get(c, name) <= 1, c, name, "must lie between 0 and 1")
    for name in _RANGES:
        pair = _get(c, name)
        _need(len(pair) == 2 and _numbers(pair) and 0 < pair[0] <= pair[1], c, name,
              "must be (low, high) with 0 < low <= high")  # fmt: skip
    for name in ("data.window_area", "crops.area", "local.area"):
        _need(_get(c, name)[1] <= 1, c, name, "must not exceed 1, the whole photo")
    _validate_length(c, devices)
    _validate_sizes(c)
    _validate_augmentation(c)
    _validate_guidance(c)
    _validate_sources(c)
    _validate_tasks(c)


def _validate_values(c: ConfigDict, section: ConfigDict, prefix: str = "") -> None:
    """What holds for every field: numbers are finite and whole ones fit the devices' integers."""
    for field, value in section.items():
        name = f"{prefix}{field}"
        if isinstance(value, ConfigDict):
            _validate_values(c, value, f"{name}.")
            continue
        values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        most = 2**63 if name == "seed" else 2**31
        large = any(isinstance(v, int) and not -most <= v < most for v in values)
        _need(not large, c, name, f"must lie between {-most} and {most - 1}")
        _need(all(math.isfinite(v) for v in values if isinstance(v, float)), c, name, "must be finite")
        words = field in ("roots", "subsets")
        kinds = str if words else (str, int, float)
        _need(all(isinstance(v, kinds) for v in values), c, name,
              f"must be {'texts' if words else 'numbers or texts'}")  # fmt: skip


def validate_task(c: ConfigDict, task: str) -> None:
    """Raise `ConfigError` where the photos that a task needs are not named."""
    for part in TASKS[task]:
        _validate_source(c, f"tasks.{part}", (*_KINDS,))
    if task == "segmentation":
        for part in TASKS[task]:
            found = _get(c, f"tasks.{part}")
            _need(found.kind != "folder" or bool(found.masks), c, f"tasks.{part}.masks",
                  "must name the folder of PNG masks with the photos' names")  # fmt: skip


def _validate_length(c: ConfigDict, devices: int) -> None:
    _need((c.total_epochs > 0) != (c.total_steps > 0), c, "total_steps",
          f"exactly one of total_epochs (now {c.total_epochs}) and total_steps must be above 0")  # fmt: skip
    parts = devices * c.accumulate
    _need(c.batch_size % parts == 0, c, "batch_size",
          f"must be divisible by devices x accumulate = {devices} x {c.accumulate}")  # fmt: skip
    _need(c.optim.final_lr <= c.optim.lr, c, "optim.final_lr", f"must not exceed optim.lr = {c.optim.lr}")
    _need(c.batch_size // c.accumulate >= 2, c, "accumulate", "leaves fewer than 2 images for BatchNorm")
    _need(c.guidance.start <= c.guidance.full, c, "guidance.start", "must not exceed guidance.full")


def _validate_sizes(c: ConfigDict) -> None:
    whole = min(c.data.window_area) >= 1
    _need(c.data.cache != "canvas" or whole, c, "data.cache",
          "keeps whole photos, but data.window_area is not (1, 1); use encoded")  # fmt: skip
    local = ("local.size",) if c.local.count else ()
    for name in ("crops.size", "saliency.size", *local):
        _need(_get(c, name) <= c.data.canvas, c, name, f"must not exceed data.canvas = {c.data.canvas}")
    if c.model.name.startswith("vit"):
        for name in ("crops.size", "saliency.size", "eval.size", *local):
            _need(_get(c, name) % 16 == 0, c, name, "must be a multiple of 16 for a ViT")
    _need(c.roi.min_size <= c.roi.max_size, c, "roi.min_size", "must not exceed roi.max_size")
    _need(0 < c.roi.min_size, c, "roi.min_size", "must be above 0")
    _need(0 < c.pairs.min_size, c, "pairs.min_size", "must be above 0")


def _validate_augmentation(c: ConfigDict) -> None:
    most = {"hue": 0.5} | dict.fromkeys(("brightness", "contrast", "saturation"), math.inf)
    for view in ("view1", "view2"):
        for name in c.augment[view]:
            limit = most.get(name, 1)
            if name != "blur_sigma":
                _need(0 <= c.augment[view][name] <= limit, c, f"augment.{view}.{name}",
                      f"must lie between 0 and {limit}")  # fmt: skip


def _validate_guidance(c: ConfigDict) -> None:
    mix, need_map = c.pairs.mix, c.weights.mode != "none" or c.roi.source == "saliency"
    for way, share in mix.items():
        _need(0 <= share <= 1, c, f"pairs.mix.{way}", "must lie between 0 and 1")
        need_map |= share > 0 and way in ("map_center", "contrastive_crop")
    total = sum(mix.values())
    # Ways whose windows move with a region.
    followed = sum(mix[way] for way in ("roi_jitter", "roi_global", "roi_center", "zoom"))
    if total > 1 + 1e-6:
        raise ConfigError(f"config.pairs.mix adds up to {total:g}: must not exceed 1")
    small = c.local.count > 0 and c.local.source == "roi"
    if total > 0 or small:
        _need(c.roi.source != "none", c, "roi.source",
              "the crops of pairs.mix or local.source = roi need regions; allowed: saliency, random, "
              "center, ground_truth")  # fmt: skip
    if need_map:
        _need(c.saliency.source != "none", c, "saliency.source",
              "roi.source = saliency, weights.mode and the ways map_center and contrastive_crop "
              f"need a map; allowed: {', '.join(maps.names())}")  # fmt: skip
    vit = c.model.name.startswith("vit")
    _need(vit or c.saliency.source != "attention", c, "saliency.source", "needs a ViT (model.name)")
    stages = ("stage1", "stage2", "stage3", "stage4")
    _need(len(c.saliency.stages) > 0 and all(s in stages for s in c.saliency.stages), c,
          "saliency.stages", f"must be one or more of {', '.join(stages)}")  # fmt: skip
    if c.saliency.source in ("similarity", "contrast", "gradcam"):
        _need(tuple(c.saliency.stages) == ("stage4",), c, "saliency.stages",
              f"must be ('stage4',) for saliency.source = {c.saliency.source}")  # fmt: skip
    _need(not (vit and c.saliency.source in ("contrast", "gradcam")), c, "saliency.source",
          "projects pooled locations, but a ViT's embedding is its class token; use attention")  # fmt: skip
    stride = 16 if vit else {"imagenet": 32, "stride16": 16, "cifar": 8}[c.model.stem]
    _need(c.saliency.source == "none" or c.saliency.size >= 2 * stride, c, "saliency.size",
          f"must be at least {2 * stride}, for a map of 2 x 2 cells")  # fmt: skip
    if c.crops.gradient:
        _need(c.saliency.branch == "online", c, "saliency.branch",
              "must be online when crops.gradient is on: the target is not trained")  # fmt: skip
        _need(c.roi.source == "saliency", c, "roi.source", "must be saliency when crops.gradient is on")
        _need(followed > 0 or small, c, "crops.gradient",
              "no window follows a region: needs roi_jitter, roi_global, roi_center or zoom in pairs.mix, or "
              "small crops (local.count) of regions")  # fmt: skip
    if c.weights.normalize == "image" and c.weights.mode != "none":
        _need(c.local.count > 0, c, "weights.normalize",
              "image needs local.count > 0: both pairs of two crops weigh the same")  # fmt: skip


def _validate_source(c: ConfigDict, name: str, kinds: tuple) -> None:
    found = _get(c, name)
    _need(found.kind in kinds, c, f"{name}.kind", f"allowed: {', '.join(kinds)}")
    needed = {"tfds": "name", "folder": "roots", "arrays": "path"}.get(found.kind)
    _need(needed is None or bool(found[needed]), c, f"{name}.{needed}",
          f"must be given for {name}.kind = {found.kind}")  # fmt: skip
    _need(found.expected >= 0, c, f"{name}.expected", "must be at least 0")


def _validate_sources(c: ConfigDict) -> None:
    _validate_source(c, "data.train", _KINDS)
    for part in _EVAL_SOURCES:
        _validate_source(c, f"eval.{part}", (*_KINDS, "none"))
    both = c.eval.probe_train.kind != "none", c.eval.probe_test.kind != "none"
    _need(both[0] == both[1], c, "eval.probe_test.kind", "probe_train and probe_test go together")
    ks = c.eval.knn
    _need(len(ks) > 0 and _numbers(ks) and min(ks) >= 1, c, "eval.knn", "must be numbers above 0")


def _validate_tasks(c: ConfigDict) -> None:
    for name, allowed in _EACH.items():
        values = _get(c, name.rstrip("*"))
        _need(len(values) > 0 or name.endswith("*"), c, name.rstrip("*"), "must not be empty")
        if isinstance(allowed, tuple):
            good, text = all(value in allowed for value in values), f"each one of {', '.join(allowed)}"
        else:
            good = _numbers(values) and all(value >= allowed for value in values)
            text = f"each must be at least {allowed:g}"
        _need(good, c, name.rstrip("*"), text)
    for name in c.eval.tasks:
        validate_task(c, name)
    vit = c.model.name.startswith("vit")
    for name in ("tasks.linear.levels", "tasks.voc_svm.levels"):
        _need(not vit or "conv1" not in _get(c, name), c, name, "a ViT has no conv1")


def _numbers(values: tuple) -> bool:
    return all(isinstance(value, (int, float)) for value in values)


def _get(c: ConfigDict, name: str):
    for part in name.split("."):
        c = c[part]
    return c


def _need(condition: bool, c: ConfigDict, name: str, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"config.{name} = {_get(c, name)!r}: {allowed}")
