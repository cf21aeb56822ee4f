"""Built-in scenes: a small network that learns in minutes on a laptop; what `make demo` runs.

python -m salcl_jax.main --config=configs/scenes.py --workdir=DIR
variants: smoke (a few steps), byol (no guidance), clutter (small objects in clutter, where guidance wins)
"""

from salcl_jax import config as lib


def get_config(variant: str = "") -> lib.ConfigDict:
    """ResNet-18 of width 16 on 48 px crops of 96 px scenes."""
    c = lib.base()
    lib.small(c)
    c.total_epochs, c.total_steps = 0, 400
    c.saliency.source, c.saliency.stages = "activation", ("stage2", "stage3")  # objects lie anywhere here
    # Covering pairs keep the map, jittered copies cost it; better than `zoom` by one seed alone (RESULTS.md,
    # "Built-in scenes with larger objects" and the end of the first section).
    c.pairs.mix.cover, c.pairs.mix.roi_jitter = 0.4, 0.4
    c.weights.mode = "none"
    c.guidance.start, c.guidance.full = 0.02, 0.05
    c.data.train = lib.source("scenes", split="train")
    c.data.max_boxes = 4
    c.data.workers = 2
    c.eval.limit = 500
    c.eval.size = 48
    c.eval.every = 0.5
    c.eval.pretext = lib.source("scenes", split="validation")
    c.eval.localization = lib.source("scenes", split="validation")
    c.eval.probe_train = lib.source("scenes", split="train")
    c.eval.probe_test = lib.source("scenes", split="validation")
    c.eval.probe_on = "object"
    c.tasks.summary = ("linear", "knn", "multilabel", "localization", "segmentation")
    c.tasks.classify.on = "object"
    c.tasks.voc_svm.shots = (1, 4, 16)
    c.tasks.segmentation.classes = 11
    for task in ("classify", "voc_svm", "multilabel", "segmentation"):
        c.tasks[task].train = lib.source("scenes", split="train")
        c.tasks[task].test = lib.source("scenes", split="validation")
    c.tasks.semi.train = lib.source("scenes", split="train")
    c.tasks.semi.train.scenes.num_train = 200
    c.tasks.localization.test = lib.source("scenes", split="validation")
    return lib.apply_variants(c, variant, {"smoke": _smoke, "byol": lib.plain_byol, "clutter": _clutter})


def _smoke(c: lib.ConfigDict) -> None:
    lib.few_steps(c)
    c.tasks.limit = 32
    for source in sources(c):
        source.scenes.num_train = 64
        source.scenes.num_val = 32


def _clutter(c: lib.ConfigDict) -> None:
    """The row `zoom` of configs/studies/scenes.py:small,clutter,long; its table is in RESULTS.md."""
    for source in sources(c):
        source.scenes.object_size, source.scenes.clutter = (0.12, 0.25), 1.0
    c.total_steps = 1800
    c.crops.size = 40
    c.saliency.stages, c.saliency.size = ("stage1",), 96  # finer than objects
    c.roi.window, c.roi.min_size, c.roi.count = 0.08, 0.1, 4
    c.pairs.min_size = 0.05
    c.pairs.mix.cover = c.pairs.mix.roi_jitter = 0.0
    c.pairs.mix.zoom = 0.8


def sources(c: lib.ConfigDict) -> list[lib.ConfigDict]:
    """Every source of scenes: training's, the evaluation's and the tasks'."""
    tasks = [part for task in c.tasks.values() if hasattr(task, "values") for part in task.values()]
    return [source for source in (c.data.train, *c.eval.values(), *tasks) if hasattr(source, "scenes")]
