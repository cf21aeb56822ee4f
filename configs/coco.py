"""COCO train2017, ResNet-50 at 224 px: ORL's BYOL recipe with saliency guidance.

python -m salcl_jax.main --config=configs/coco.py --workdir=DIR --config.data.train.data_dir=gs://BUCKET/tfds
variants: coco_plus (train2017 + unlabeled2017 from folders), lars (BYOL's optimizer), two_cores (small
network and crops), smoke (a few steps of a small network)
Map, pairs and weights: chosen with small networks, where they are no better than plain crops with as many
FLOPs (RESULTS.md, "Photos, rate tuned", "Photos: which map").
Full recipe: not yet run. two_cores on 2,068 photos, at half the rate: see Results in README.md.
"""

from salcl_jax import config as lib


def get_config(variant: str = "") -> lib.ConfigDict:
    """The defaults of `lib.base()`: 800 epochs, SGD 0.2 x batch / 256, EMA 0.99."""
    c = lib.base()
    c.data.train = lib.source("tfds", name="coco/2017", split="train", expected=118_287)
    c.eval.localization = lib.source("tfds", name="coco/2017", split="validation")
    c.eval.pretext = lib.source("tfds", name="coco/2017", split="validation")
    c.eval.probe_train = lib.source("tfds", name="coco/2017", split="train")
    c.eval.probe_test = lib.source("tfds", name="coco/2017", split="validation")
    c.eval.probe_on = "object"
    known = {"coco_plus": _coco_plus, "lars": lib.byol_lars, "two_cores": _two_cores, "smoke": _smoke}
    return lib.apply_variants(c, variant, known)


def _coco_plus(c: lib.ConfigDict) -> None:
    """TFDS does not have unlabeled2017: name both folders with --config.data.train.roots."""
    c.data.train = lib.source("folder", roots=("train2017", "unlabeled2017"), expected=241_690)


def _two_cores(c: lib.ConfigDict) -> None:
    lib.small(c)
    c.data.train.expected = 0


def _smoke(c: lib.ConfigDict) -> None:
    lib.small(c)
    lib.few_steps(c)
    c.data.train.expected = 0
