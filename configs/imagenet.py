"""ImageNet-1k, ResNet-50 at 224 px: BYOL's LARS recipe with saliency guidance.

python -m salcl_jax.main --config=configs/imagenet.py --workdir=DIR --config.data.train.data_dir=gs://BUCKET/tfds
variants: byol (no guidance), smoke (a few steps of a small network)
Map, pairs and weights: chosen with small networks on photos of scenes (RESULTS.md, "Photos, rate tuned").
Not yet run.
"""

from salcl_jax import config as lib


def get_config(variant: str = "") -> lib.ConfigDict:
    """300 epochs at batch 4096, LARS 0.3 x batch / 256, EMA 0.99."""
    c = lib.base()
    c.total_epochs = 300
    c.batch_size = 4096
    c.data.train = lib.source("tfds", name="imagenet2012", split="train", expected=1_281_167)
    lib.byol_lars(c)
    c.optim.warmup = 10 / 300
    c.eval.limit = 20_000
    c.eval.pretext = lib.source("tfds", name="imagenet2012", split="validation")
    c.eval.probe_train = lib.source("tfds", name="imagenet2012", split="train")
    c.eval.probe_test = lib.source("tfds", name="imagenet2012", split="validation")
    known = {"byol": lib.plain_byol, "smoke": _smoke}
    return lib.apply_variants(c, variant, known)


def _smoke(c: lib.ConfigDict) -> None:
    lib.small(c)
    lib.few_steps(c)
    c.data.train.expected = 0
