"""COCO train2017, ResNet-50 at 224 px: plain BYOL, the baseline of configs/coco.py with all guidance off.

python -m salcl_jax.main --config=configs/coco_byol.py --workdir=DIR --config.data.train.data_dir=gs://BUCKET/tfds
variants: coco_plus, lars, two_cores, smoke, as in configs/coco.py
Not yet run.
"""

from salcl_jax import config as lib


def get_config(variant: str = "") -> lib.ConfigDict:
    """configs/coco.py without a map, regions, weights and small crops."""
    c = lib.beside(__file__, "coco.py").get_config(variant)
    lib.plain_byol(c)
    return c
