"""The configuration: every field, explained once, with its default; variants; derived quantities.

A config file is a `get_config(variant)` that starts from `base()` and changes fields. What cannot run is
refused by `validation.validate` before any device is touched.
"""

import importlib.util
import math
import os
from collections.abc import Callable, Mapping
from types import ModuleType

import ml_collections

from salcl_jax.config_source import source
from salcl_jax.config_tasks import small_tasks, tasks

ConfigDict = ml_collections.ConfigDict


class ConfigError(ValueError):
    """A configuration that cannot run; the message is one line for the user."""


def base() -> ConfigDict:
    """All fields with their defaults: the full recipe for ResNet-50 at 224 px."""
    c = ConfigDict()
    c.seed = 0  # of initialisation, order and augmentation
    c.total_epochs = 800  # passes over the data; exactly one of total_epochs, total_steps is above 0
    c.total_steps = 0  # optimizer steps
    c.batch_size = 512  # images per optimizer step, over all devices
    c.accumulate = 1  # micro-batches per optimizer step; BatchNorm then sees a micro-batch
    c.init_from = ""  # weights to start from: another run's workdir, or a .pth, .safetensors or .npz file
    c.distributed = "auto"  # auto | none | host:port,processes,index
    c.distributed_timeout = 60  # seconds of silence after which a process counts as gone and the others stop

    c.sharding = ConfigDict()  # how the state lies on the devices; the batch is always split over all of them
    c.sharding.params = "replicated"  # a copy on each | fsdp: parameters, target and optimizer in parts
    c.sharding.min_size = 2**18  # fsdp: arrays of fewer elements stay whole

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
    c.data.cache = "none"  # training photos kept in memory: none | encoded (files' bytes) | canvas (decoded)
    c.data.cache_gb = 8.0  # memory for them per process, in 1e9 bytes; photos beyond it are read every time

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
    c.saliency.source = "border"  # none|activation|border|similarity|contrast|gradcam|attention: RESULTS.md
    c.saliency.branch = "target"  # network that draws it: target | online
    c.saliency.size = 112  # side in pixels of the canvas it sees
    c.saliency.stages = ("stage3",)  # stages fused into the map; a finer one adds detail
    c.saliency.fuse = "product"  # product | mean
    c.saliency.statistic = "sum"  # activation: sum | norm over channels
    c.saliency.clip = 0.0  # border: what a step is shortened by, in the photo's mean smallest steps

    c.roi = ConfigDict()  # regions of interest
    c.roi.source = "saliency"  # none | saliency | random | center | ground_truth
    c.roi.count = 3  # regions per image
    c.roi.temperature = 0.05  # of the soft-argmax
    c.roi.level = 0.25  # mass counts above this point between the map's mean (0) and maximum (1)
    c.roi.window = 0.15  # standard deviation of the neighbourhood whose moments are taken, canvas sides
    c.roi.extent = 1.0  # region side over the measured spread
    c.roi.min_size = 0.15  # smallest side of a region, canvas sides
    c.roi.max_size = 0.9  # largest side
    c.roi.min_peak = 0.4  # a region is valid while its peak is this share of the highest, both above `level`

    c.pairs = ConfigDict()  # from a region to the two crops
    c.pairs.mix = ConfigDict()  # probability of each way; what is left of 1 stays random
    c.pairs.mix.roi_jitter = 0.0  # both crops are jittered copies of one region
    c.pairs.mix.roi_global = 0.0  # a jittered region and a random crop
    c.pairs.mix.roi_center = 0.0  # random crops centred in one region
    c.pairs.mix.zoom = 0.0  # random crops of the part around one region, as though it were the photo
    c.pairs.mix.map_center = 0.0  # random crops centred at draws from the map
    c.pairs.mix.cover = 0.5  # crops of random sizes, placed to hold a share of one region's mass
    c.pairs.mix.contrastive_crop = 0.0  # ContrastiveCrop's centres
    c.pairs.jitter_shift = 0.25  # centre shift, in sides of the region
    c.pairs.jitter_area = (0.5, 2.0)  # area factor
    c.pairs.jitter_ratio = (0.75, 4 / 3)  # aspect factor
    c.pairs.zoom = 1.5  # zoom: side of that part over the region's
    c.pairs.min_size = 0.1  # smallest side of a crop, canvas sides
    c.pairs.cover_share = 0.5  # of the region's mass that each crop must hold
    c.pairs.cover_tries = 10  # random places tried for that
    c.pairs.beta = 0.6  # ContrastiveCrop: shape of the centre distribution
    c.pairs.threshold = 0.1  # ContrastiveCrop: of its box, share of the map's peak above its mean

    c.local = ConfigDict()  # extra small crops, whose predictions are asked for the targets of both crops
    c.local.count = 0  # of them per image
    c.local.size = 96  # side in pixels
    c.local.source = "roi"  # where they are: roi | random (control)
    c.local.area = (0.05, 0.25)  # share of the photo
    c.local.invalid = "random"  # roi, where an image has no valid region: random | drop
    c.local.weight = 1.0  # of their loss beside the pair's

    c.weights = ConfigDict()  # re-weighting of pairs by the saliency inside their crops
    c.weights.mode = "geometric"  # none | product | geometric | minimum
    c.weights.relative = True  # scores over the mean of the photo's map: flat maps would weigh most else
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
    c.eval.pretext = source()  # images for loss and collapse statistics; none: the training images
    c.eval.localization = source()  # images with boxes: pointing, CorLoc, saliency inside boxes
    c.eval.probe_train = source()  # labelled images, or images with boxes, for k-NN and linear probe
    c.eval.probe_test = source()  # those that they are tested on
    c.eval.probe_on = "image"  # what a label belongs to: image | object (crops of annotated boxes)
    c.eval.knn = (20, 10, 100, 200)  # k; the first is the headline
    c.eval.linear = True  # also a linear probe (logistic regression on frozen features)

    c.eval.tasks = ()  # tasks of `tasks` that also run then, e.g. ("multilabel",)

    c.tasks = tasks()  # protocols of `python -m salcl_jax.evaluate`, see config_tasks.py

    c.collapse = ConfigDict()  # alarm
    c.collapse.threshold = 0.2  # of the projections' spread: 1 isotropic, 0 all alike
    c.collapse.patience = 50  # steps in a row below it that raise the alarm

    c.log = ConfigDict()  # what is written while training
    c.log.every = 50  # steps between lines of metrics
    c.log.panels = 0.1  # share of training between pictures; 0: only at the end
    c.log.panel_images = 6  # in a picture
    c.log.tensorboard = True  # event files beside metrics.jsonl
    c.log.trackers = ()  # also there: wandb, mlflow; each needs the extra of its name

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


def byol_lars(c: ConfigDict) -> None:
    """BYOL's optimizer: LARS, with biases and norm scales left out of weight decay and adaptation."""
    c.optim.name = "lars"
    c.optim.lr = 0.3
    c.optim.weight_decay = 1e-6
    c.optim.decay_all = False


def small(c: ConfigDict) -> None:
    """What learns on two CPU cores: ResNet-18 of width 16, 48 px crops, InfoNCE and AdamW (see README)."""
    c.total_epochs = 40
    c.batch_size = 64
    c.data.canvas = 96
    c.data.workers = 4
    c.model.name = "resnet18"
    c.model.width = 16
    c.model.stem = "stride16"  # maps of 3 x 3 at 48 px; smaller ones are slow on CPUs
    c.model.projector_hidden = 256
    c.model.projector_out = 64
    c.model.predictor_hidden = 256
    c.model.dtype = "float32"
    c.crops.size = 48
    c.crops.area = (0.15, 1.0)
    c.saliency.size = 64
    c.loss.name = "infonce"
    c.optim.name = "adamw"
    c.optim.lr = 0.008  # on photos half of it loses 2 points (RESULTS.md, "Photos, rate tuned")
    c.optim.weight_decay = 0.01
    c.optim.decay_all = False
    c.optim.warmup = 0.05
    c.ema.base = 0.97
    c.eval.size = 64
    c.eval.every = 0.25
    c.eval.batch_size = 64
    c.checkpoint.every = 0.1
    small_tasks(c.tasks)


def few_steps(c: ConfigDict) -> None:
    """Four steps, for tests of the machinery."""
    c.total_epochs, c.total_steps = 0, 4
    c.batch_size = 16
    c.eval.every, c.eval.limit, c.eval.batch_size = 0.0, 32, 16
    c.log.every, c.log.panels = 2, 0.0


def load_module(path: str) -> ModuleType:
    """A Python file as a module, wherever the command was started."""
    spec = importlib.util.spec_from_file_location(os.path.basename(path).removesuffix(".py"), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def beside(file: str, name: str) -> ModuleType:
    """The config file `name` beside `file`, as a module: beside(__file__, "coco.py")."""
    return load_module(os.path.join(os.path.dirname(os.path.abspath(file)), name))


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
    if total >= 2**31:
        raise ConfigError(f"config.total_epochs = {c.total_epochs}: {total} steps are more than are counted")

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
    c.resolved.checkpoint_every = every = steps(c.checkpoint.every) or total
    kept = steps(c.checkpoint.keep_every)  # only what is saved can be kept
    c.resolved.keep_every = every * max(1, round(kept / every)) if kept else 0
    return c
