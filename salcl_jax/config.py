"""The configuration: every field, explained once, with its default; variants; and what is impossible.

A config file is a `get_config(variant)` that starts from `base()` and changes fields. `validate` is called
before any device is touched; it raises `ConfigError` with one line naming field, value and what is allowed.
"""

import json
import math
from collections.abc import Callable, Mapping

import ml_collections

ConfigDict = ml_collections.ConfigDict


class ConfigError(ValueError):
    """A configuration that cannot run; the message is one line for the user."""


def source(kind: str = "none", **fields) -> ConfigDict:
    """Where images come from; used for training and for each evaluation set."""
    c = ConfigDict()
    c.kind = kind  # tfds | folder | arrays | scenes | none
    c.name = ""  # tfds: data set, e.g. coco/2017
    c.split = "train"  # tfds, scenes, and folders with a `labels` file that has splits
    c.data_dir = ""  # tfds, scenes: where data sets are kept; '' is the tfds default
    c.roots = ()  # folder: one or several folders, searched recursively
    c.annotations = ""  # folder: COCO-style JSON with boxes; restricts the photos to those it lists
    c.labels = ""  # folder: CSV with columns file, label[, split]
    c.label_from_folder = False  # folder: the parent folder's name is the class
    c.path = ""  # arrays: .npz, or a folder of .npy files, with `image` and optional label, boxes, classes
    c.expected = 0  # number of images that must be found; 0 does not check
    c.scenes = ConfigDict()  # scenes: the dials of the built-in scenes
    c.scenes.size = 96  # side in pixels
    c.scenes.num_classes = 10  # of at most 16
    c.scenes.objects = (1, 4)  # fewest and most objects of an image
    c.scenes.object_size = (0.2, 0.45)  # side of an object, in image sides
    c.scenes.clutter = 0.5  # 0 none .. 1 heavy: objects of no class, specks and strokes
    c.scenes.num_train = 2000  # images of the train split
    c.scenes.num_val = 500  # images of the validation split
    c.scenes.seed = 0  # the same seed and dials give the same images
    for name, value in fields.items():
        c[name] = value
    return c


def base() -> ConfigDict:
    """All fields with their defaults: the full recipe for ResNet-50 at 224 px."""
    c = ConfigDict()
    c.seed = 0  # of initialisation, order and augmentation
    c.total_epochs = 800  # passes over the data; exactly one of total_epochs, total_steps is above 0
    c.total_steps = 0  # optimizer steps
    c.batch_size = 512  # images per optimizer step, over all devices
    c.accumulate = 1  # micro-batches per optimizer step; BatchNorm then sees a micro-batch
    c.init_from = ""  # workdir of another run whose weights start this one (not a resume)
    c.distributed = "auto"  # auto | none | host:port,processes,index

    c.data = ConfigDict()  # where images come from, and how they become canvases
    c.data.train = source("tfds", name="coco/2017")  # training images
    c.data.canvas = 384  # side in pixels of the square that a photo is resized to on the host
    c.data.window_area = (1.0, 1.0)  # share of the photo that the canvas shows; (1, 1) is all of it
    c.data.max_boxes = 32  # ground-truth boxes kept per image, where they are used
    c.data.min_side = 16  # photos with a shorter side, in pixels, are skipped
    c.data.max_pixels = 200_000_000  # larger photos are skipped before decoding
    c.data.max_skipped = 0.05  # share of unreadable photos above which the run stops
    c.data.workers = 16  # images decoded at a time, per process
    c.data.prefetch = 4  # batches ready ahead

    c.model = ConfigDict()  # the encoder and its heads
    c.model.name = "resnet50"  # resnet18 | resnet34 | resnet50 | resnet101 | vit_s16 | vit_b16
    c.model.width = 64  # ResNet: channels of the first stage
    c.model.stem = "imagenet"  # ResNet: imagenet (total stride 32) | stride16 | cifar (stride 8)
    c.model.projector_hidden = 4096  # channels of its hidden layer
    c.model.projector_out = 256  # channels of a projection, and of a prediction
    c.model.predictor_hidden = 4096  # channels of its hidden layer
    c.model.dtype = "bfloat16"  # of the computation: bfloat16 | float32; parameters are float32
    c.model.remat = False  # recompute activations in the backward pass: less memory, more time
    c.model.zero_init_residual = False  # start the last BatchNorm scale of each block at 0

    c.crops = ConfigDict()  # the two training crops of an image
    c.crops.size = 224  # side in pixels
    c.crops.area = (0.08, 1.0)  # share of the photo
    c.crops.ratio = (0.75, 4 / 3)  # width / height in pixels of the photo
    c.crops.gradient = False  # let the loss move the crop windows; needs saliency.branch = online

    c.augment = ConfigDict()  # BYOL's asymmetric pair; small crops use view1
    c.augment.view1 = _augmentation(blur_prob=1.0, solarize_prob=0.0)  # of the first crop
    c.augment.view2 = _augmentation(blur_prob=0.1, solarize_prob=0.2)  # of the second

    c.saliency = ConfigDict()  # the map; computed in every step from the model itself
    c.saliency.source = "activation"  # none | activation | similarity | gradcam | attention (ViT)
    c.saliency.branch = "target"  # network that draws it: target | online
    c.saliency.size = 112  # side in pixels of the canvas it sees
    c.saliency.stages = ("stage4",)  # stages fused into the map; a finer one adds detail
    c.saliency.fuse = "product"  # product | mean
    c.saliency.statistic = "sum"  # activation: sum | norm over channels

    c.roi = ConfigDict()  # regions of interest
    c.roi.source = "saliency"  # none | saliency | random | center | ground_truth
    c.roi.count = 3  # regions per image
    c.roi.temperature = 0.05  # of the soft-argmax
    c.roi.level = 0.25  # mass counts above this point between the map's mean (0) and maximum (1)
    c.roi.window = 0.25  # standard deviation of the neighbourhood whose moments are taken, canvas sides
    c.roi.extent = 1.2  # region side over the measured spread
    c.roi.min_size = 0.15  # smallest side of a region, canvas sides
    c.roi.max_size = 0.9  # largest side
    c.roi.min_peak = 0.4  # a region is valid while its peak is this share of the map's

    c.pairs = ConfigDict()  # from a region to the two crops
    c.pairs.mix = ConfigDict()  # probability of each way; what is left of 1 stays random
    c.pairs.mix.roi_jitter = 0.0  # both crops are jittered copies of one region
    c.pairs.mix.roi_global = 0.0  # a jittered region and a random crop
    c.pairs.mix.roi_center = 0.0  # random crops centred in one region
    c.pairs.mix.map_center = 0.0  # random crops centred at draws from the map
    c.pairs.mix.cover = 0.5  # random crops that hold a share of one region's mass
    c.pairs.mix.contrastive_crop = 0.0  # ContrastiveCrop's centres
    c.pairs.jitter_shift = 0.25  # centre shift, in sides of the region
    c.pairs.jitter_area = (0.5, 2.0)  # area factor
    c.pairs.jitter_ratio = (0.75, 4 / 3)  # aspect factor
    c.pairs.min_size = 0.1  # smallest side of a crop, canvas sides
    c.pairs.cover_share = 0.5  # of the region's mass that each crop must hold
    c.pairs.cover_tries = 10  # random crops tried for that
    c.pairs.beta = 0.6  # ContrastiveCrop: shape of the centre distribution
    c.pairs.threshold = 0.1  # ContrastiveCrop: of its box, share of the map's maximum

    c.local = ConfigDict()  # extra small crops, whose predictions are asked for the targets of both crops
    c.local.count = 0  # of them per image
    c.local.size = 96  # side in pixels
    c.local.source = "roi"  # roi | random (control)
    c.local.area = (0.05, 0.25)  # random ones: share of the photo
    c.local.invalid = "random"  # roi, where an image has too few regions: random | drop
    c.local.weight = 1.0  # of their loss beside the pair's

    c.weights = ConfigDict()  # re-weighting of pairs by the saliency inside their crops
    c.weights.mode = "geometric"  # none | product | geometric | minimum
    c.weights.temperature = 1.0  # exponent 1 / temperature
    c.weights.floor = 0.05  # smallest combined score, before the exponent
    c.weights.normalize = "batch"  # mean 1 over the pairs of an image (needs local crops) | batch

    c.guidance = ConfigDict()  # warm-up: a young map is noise
    c.guidance.start = 0.02  # share of training before which crops are random and weights even
    c.guidance.full = 0.10  # share of training after which guidance has its full strength

    c.loss = ConfigDict()  # of a pair
    c.loss.name = "byol"  # byol | infonce | simsiam
    c.loss.temperature = 0.2  # infonce

    c.optim = ConfigDict()  # the optimizer and its schedule
    c.optim.name = "sgd"  # sgd | lars | adamw
    c.optim.lr = 0.2  # for a batch of 256; scaled linearly with the batch
    c.optim.final_lr = 0.0  # for a batch of 256, at the end of the cosine
    c.optim.warmup = 0.005  # share of training with a linear warm-up from 0
    c.optim.momentum = 0.9  # adamw: first beta
    c.optim.weight_decay = 1e-4  # coupled with the gradient (sgd, lars), decoupled in adamw
    c.optim.decay_all = True  # also biases and norm scales (ORL); BYOL's LARS leaves them out
    c.optim.trust = 0.001  # lars: trust coefficient
    c.optim.clip_norm = 0.0  # largest gradient norm; 0 does not clip

    c.ema = ConfigDict()  # the target network
    c.ema.base = 0.99  # rate of the target at the start; rises to 1 by a cosine

    c.eval = ConfigDict()  # online evaluation; also before the first step and after the last
    c.eval.every = 0.1  # share of training between evaluations; 0: only before and after
    c.eval.batch_size = 256  # images at a time, over all devices
    c.eval.limit = 2000  # images per set; 0 is all
    c.eval.size = 224  # side in pixels of the images whose features are judged
    c.eval.branch = "online"  # whose features: online | target
    c.eval.pretext = source()  # held-out images for loss and collapse statistics
    c.eval.localization = source()  # images with boxes: pointing, CorLoc, saliency inside boxes
    c.eval.probe_train = source()  # labelled images, or images with boxes, for k-NN and linear probe
    c.eval.probe_test = source()  # those that they are tested on
    c.eval.probe_on = "image"  # what a label belongs to: image | object (crops of annotated boxes)
    c.eval.knn = (20, 10, 100, 200)  # k; the first is the headline
    c.eval.linear = True  # also a linear probe (logistic regression on frozen features)

    c.collapse = ConfigDict()  # alarm
    c.collapse.threshold = 0.2  # of the projections' spread: 1 isotropic, 0 all alike
    c.collapse.patience = 50  # steps in a row below it that raise the alarm

    c.log = ConfigDict()  # what is written while training
    c.log.every = 50  # steps between lines of metrics
    c.log.panels = 0.1  # share of training between pictures; 0: only at the end
    c.log.panel_images = 6  # in a picture
    c.log.tensorboard = True  # event files beside metrics.jsonl

    c.checkpoint = ConfigDict()  # what is kept to continue from
    c.checkpoint.every = 0.02  # share of training between checkpoints
    c.checkpoint.keep = 2  # newest ones kept
    c.checkpoint.keep_every = 0.25  # share of training between those that are kept for good; 0: none
    c.checkpoint.asynchronous = True  # write while training goes on
    return c


def _augmentation(**fields: float) -> ConfigDict:
    c = ConfigDict()
    c.flip = 0.5  # probability of a mirror image
    c.jitter_prob = 0.8  # probability of the four that follow, in random order (torchvision's definitions)
    c.brightness = 0.4  # factor in 1 +- this
    c.contrast = 0.4  # likewise
    c.saturation = 0.2  # likewise
    c.hue = 0.1  # shift in +- this, in turns
    c.grayscale_prob = 0.2  # probability of losing the colours
    c.blur_prob = 0.5  # probability of a Gaussian blur
    c.blur_sigma = (0.1, 2.0)  # pixels at 224 px; scaled with the crop
    c.solarize_prob = 0.0  # probability of inverting what is brighter than the threshold
    c.solarize_threshold = 0.5  # brightness in [0, 1]
    for name, value in fields.items():
        c[name] = value
    return c


def plain_byol(c: ConfigDict) -> None:
    """Turn all guidance off: the baseline is the same program."""
    c.saliency.source = "none"
    c.roi.source = "none"
    c.weights.mode = "none"
    c.local.count = 0
    for way in c.pairs.mix:
        c.pairs.mix[way] = 0.0


def apply_variants(
    c: ConfigDict, variant: str | None, known: Mapping[str, Callable[[ConfigDict], None]]
) -> ConfigDict:
    """Apply the comma-separated variants behind `file.py:`; an unknown one raises `ConfigError`."""
    for name in (variant or "").split(","):
        if name and name not in known:
            raise ConfigError(f"variant '{name}' is unknown; this config has: {', '.join(sorted(known))}")
        if name:
            known[name](c)
    return c


def finish(c: ConfigDict, *, devices: int, images: int) -> ConfigDict:
    """Copy with `resolved`: the quantities in steps that follow from the fields and the data's size."""
    c = ConfigDict(c.to_dict())
    total = c.total_steps or math.ceil(c.total_epochs * images / c.batch_size)

    def steps(share: float) -> int:
        return max(1, round(share * total)) if share > 0 else 0

    c.resolved = ConfigDict()
    c.resolved.devices = devices
    c.resolved.images = images
    c.resolved.total_steps = total
    c.resolved.peak_lr = c.optim.lr * c.batch_size / 256
    c.resolved.final_lr = c.optim.final_lr * c.batch_size / 256
    c.resolved.warmup_steps = steps(c.optim.warmup)
    c.resolved.eval_every = steps(c.eval.every) or total
    c.resolved.panels_every = steps(c.log.panels) or total
    c.resolved.checkpoint_every = steps(c.checkpoint.every) or total
    c.resolved.keep_every = steps(c.checkpoint.keep_every)
    return c


def learnt_fields(c: ConfigDict) -> dict:
    """Fields that decide what is learnt, as flat JSON values; a resumed run must have the same."""
    fields = c.to_dict()
    for passive in ("eval", "log", "checkpoint", "collapse", "resolved", "distributed"):
        fields.pop(passive, None)
    for passive in ("workers", "prefetch"):
        fields["data"].pop(passive, None)
    return json.loads(json.dumps(_flatten(fields), sort_keys=True))


def differences(old: Mapping, new: Mapping) -> list[str]:
    """Names and values of flat fields that differ, as 'name: old -> new'."""
    names = sorted(set(old) | set(new))
    return [f"{n}: {old.get(n)} -> {new.get(n)}" for n in names if old.get(n) != new.get(n)]


def _flatten(fields: Mapping, prefix: str = "") -> dict:
    flat = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


_KINDS = ("tfds", "folder", "arrays", "scenes")
_EVAL_SOURCES = ("pretext", "localization", "probe_train", "probe_test")
_ONE_OF = {
    "data.train.kind": _KINDS,
    **{f"eval.{name}.kind": (*_KINDS, "none") for name in _EVAL_SOURCES},
    "model.name": ("resnet18", "resnet34", "resnet50", "resnet101", "vit_s16", "vit_b16"),
    "model.stem": ("imagenet", "stride16", "cifar"),
    "model.dtype": ("bfloat16", "float32"),
    "saliency.source": ("none", "activation", "similarity", "gradcam", "attention"),
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
}
_AT_LEAST = {
    "batch_size": 2, "accumulate": 1, "total_epochs": 0, "total_steps": 0, "data.canvas": 16,
    "data.max_boxes": 1, "data.workers": 1, "data.prefetch": 1, "model.width": 1, "crops.size": 16,
    "saliency.size": 16, "roi.window": 0.01, "roi.extent": 0.01, "roi.temperature": 1e-4,
    "local.count": 0, "local.size": 16, "loss.temperature": 1e-3, "weights.temperature": 1e-3,
    "weights.floor": 0, "log.every": 1, "eval.batch_size": 1, "pairs.cover_tries": 1,
    "checkpoint.keep": 1, "collapse.patience": 1, "optim.weight_decay": 0, "optim.lr": 0,
    "local.weight": 0, "pairs.beta": 0.01, "log.panel_images": 1, "roi.count": 1, "eval.size": 16,
    "model.projector_hidden": 1, "model.projector_out": 1, "model.predictor_hidden": 1,
    "optim.final_lr": 0, "optim.clip_norm": 0, "optim.trust": 1e-6, "pairs.jitter_shift": 0,
    "data.min_side": 0, "data.max_pixels": 0, "eval.limit": 0,
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
    for name, allowed in _ONE_OF.items():
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


def _validate_length(c: ConfigDict, devices: int) -> None:
    _need((c.total_epochs > 0) != (c.total_steps > 0), c, "total_steps",
          f"exactly one of total_epochs (now {c.total_epochs}) and total_steps must be above 0")  # fmt: skip
    parts = devices * c.accumulate
    _need(c.batch_size % parts == 0, c, "batch_size",
          f"must be divisible by devices x accumulate = {devices} x {c.accumulate}")  # fmt: skip
    _need(c.batch_size // c.accumulate >= 2, c, "accumulate", "leaves fewer than 2 images for BatchNorm")
    _need(c.guidance.start <= c.guidance.full, c, "guidance.start", "must not exceed guidance.full")


def _validate_sizes(c: ConfigDict) -> None:
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
        need_map |= share > 0 and way in ("map_center", "cover", "contrastive_crop")
    total = sum(mix.values())
    followed = sum(mix[way] for way in ("roi_jitter", "roi_global", "roi_center"))  # windows of a region
    if total > 1 + 1e-6:
        raise ConfigError(f"config.pairs.mix adds up to {total:g}: must not exceed 1")
    small = c.local.count > 0 and c.local.source == "roi"
    if total > 0 or small:
        _need(c.roi.source != "none", c, "roi.source",
              "the crops of pairs.mix or local.source = roi need regions; allowed: saliency, random, "
              "center, ground_truth")  # fmt: skip
    if need_map:
        _need(c.saliency.source != "none", c, "saliency.source",
              "roi.source = saliency, weights.mode and the ways map_center, cover and contrastive_crop "
              "need a map; allowed: activation, similarity, gradcam, attention")  # fmt: skip
    vit = c.model.name.startswith("vit")
    _need(vit or c.saliency.source != "attention", c, "saliency.source", "needs a ViT (model.name)")
    stages = ("stage1", "stage2", "stage3", "stage4")
    _need(len(c.saliency.stages) > 0 and all(s in stages for s in c.saliency.stages), c,
          "saliency.stages", f"must be one or more of {', '.join(stages)}")  # fmt: skip
    if c.saliency.source in ("similarity", "gradcam"):
        _need(tuple(c.saliency.stages) == ("stage4",), c, "saliency.stages",
              f"must be ('stage4',) for saliency.source = {c.saliency.source}")  # fmt: skip
    if c.crops.gradient:
        _need(c.saliency.branch == "online", c, "saliency.branch",
              "must be online when crops.gradient is on: the target is not trained")  # fmt: skip
        _need(c.roi.source == "saliency", c, "roi.source", "must be saliency when crops.gradient is on")
        _need(followed > 0 or small, c, "crops.gradient",
              "no window follows a region: needs roi_jitter, roi_global or roi_center in pairs.mix, or "
              "small crops (local.count) of regions")  # fmt: skip
    if c.weights.normalize == "image" and c.weights.mode != "none":
        _need(c.local.count > 0, c, "weights.normalize",
              "image needs local.count > 0: both pairs of two crops weigh the same")  # fmt: skip


def _validate_sources(c: ConfigDict) -> None:
    for name in ("data.train", *(f"eval.{part}" for part in _EVAL_SOURCES)):
        found = _get(c, name)
        needed = {"tfds": "name", "folder": "roots", "arrays": "path"}.get(found.kind)
        _need(needed is None or bool(found[needed]), c, f"{name}.{needed}",
              f"must be given for {name}.kind = {found.kind}")  # fmt: skip
        _need(found.expected >= 0, c, f"{name}.expected", "must be at least 0")
    both = c.eval.probe_train.kind != "none", c.eval.probe_test.kind != "none"
    _need(both[0] == both[1], c, "eval.probe_test.kind", "probe_train and probe_test go together")
    ks = c.eval.knn
    _need(len(ks) > 0 and _numbers(ks) and min(ks) >= 1, c, "eval.knn", "must be numbers above 0")


def _numbers(values: tuple) -> bool:
    return all(isinstance(value, (int, float)) for value in values)


def _get(c: ConfigDict, name: str):
    for part in name.split("."):
        c = c[part]
    return c


def _need(condition: bool, c: ConfigDict, name: str, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"config.{name} = {_get(c, name)!r}: {allowed}")
