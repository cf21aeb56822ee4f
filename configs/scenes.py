"""Built-in scenes: a small network that learns in minutes on a laptop; what `make demo` runs.

python -m salcl_jax.main --config=configs/scenes.py --workdir=DIR
variants: smoke (a few steps), byol (no guidance)
"""

from salcl_jax import config as lib


def get_config(variant: str = "") -> lib.ConfigDict:
    """ResNet-18 of width 16 on 64 px crops of 96 px scenes."""
    c = lib.base()
    c.total_epochs = 0
    c.total_steps = 800
    c.batch_size = 64

    c.data.canvas = 96
    c.data.train = lib.source("scenes", split="train")
    c.data.max_boxes = 4
    c.data.workers = 2

    c.model.name = "resnet18"
    c.model.width = 16
    c.model.stem = "stride16"
    c.model.projector_hidden = 256
    c.model.projector_out = 64
    c.model.predictor_hidden = 256
    c.model.dtype = "float32"

    c.crops.size = 64
    c.crops.area = (0.15, 1.0)
    c.saliency.size = 96
    c.saliency.stages = ("stage3", "stage4")
    c.optim.lr = 0.4
    c.optim.warmup = 0.05
    c.ema.base = 0.97

    c.eval.every = 0.5
    c.eval.batch_size = 100
    c.eval.limit = 500
    c.eval.size = 64
    c.eval.pretext = lib.source("scenes", split="validation")
    c.eval.localization = lib.source("scenes", split="validation")
    c.eval.probe_train = lib.source("scenes", split="train")
    c.eval.probe_test = lib.source("scenes", split="validation")
    c.eval.probe_on = "object"
    c.log.every = 50
    c.checkpoint.every = 0.25
    return lib.apply_variants(c, variant, {"smoke": _smoke, "byol": lib.plain_byol})


def _smoke(c: lib.ConfigDict) -> None:
    lib.few_steps(c)
    for source in (c.data.train, c.eval.pretext, c.eval.localization, c.eval.probe_train, c.eval.probe_test):
        source.scenes.num_train = 64
        source.scenes.num_val = 32
