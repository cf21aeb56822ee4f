"""Your own photos: any folders of JPEG, PNG, BMP or WebP files, searched recursively; labels are not needed.

python -m salcl_jax.main --config=configs/folder.py --workdir=DIR \
    --config.data.train.roots="('/photos/a','/photos/b')"
variants: resnet50 (224 px, for an accelerator), byol (no guidance), smoke (a few steps)
"""

from salcl_jax import config as lib


def get_config(variant: str = "") -> lib.ConfigDict:
    """ResNet-18 of width 32 on 64 px crops: an hour on two cores for a few thousand photos."""
    c = lib.base()
    c.total_epochs = 100
    c.batch_size = 64
    c.data.canvas = 128
    c.data.train = lib.source("folder")
    c.data.workers = 4

    c.model.name = "resnet18"
    c.model.width = 32
    c.model.stem = "stride16"
    c.model.projector_hidden = 1024
    c.model.projector_out = 128
    c.model.predictor_hidden = 1024
    c.model.dtype = "float32"
    c.crops.size = 64
    c.saliency.size = 96
    c.optim.lr = 0.4
    c.optim.warmup = 0.05
    c.ema.base = 0.97
    c.eval.size = 64
    known = {"resnet50": _resnet50, "byol": lib.plain_byol, "smoke": _smoke}
    return lib.apply_variants(c, variant, known)


def _resnet50(c: lib.ConfigDict) -> None:
    full = lib.base()
    for name in ("model", "crops", "optim", "ema"):
        c[name] = full[name]
    c.batch_size = full.batch_size
    c.data.canvas, c.data.workers = full.data.canvas, full.data.workers
    c.saliency.size, c.eval.size = full.saliency.size, full.eval.size


def _smoke(c: lib.ConfigDict) -> None:
    c.total_epochs, c.total_steps = 0, 4
    c.batch_size = 8
    c.log.every = 2
    c.eval.every, c.log.panels = 0.0, 0.0
