"""COCO train2017, ResNet-50 at 224 px: plain BYOL, the baseline of configs/coco.py with all guidance off.

python -m salcl_jax.main --config=configs/coco_byol.py --workdir=DIR --config.data.train.data_dir=gs://BUCKET/tfds
variants: coco_plus, lars, two_cores, smoke, as in configs/coco.py
Not yet run.
"""

import importlib.util
from pathlib import Path

from salcl_jax import config as lib

# The file beside this one, wherever the command was started.
_SPEC = importlib.util.spec_from_file_location("coco", Path(__file__).with_name("coco.py"))
coco = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(coco)


def get_config(variant: str = "") -> lib.ConfigDict:
    """configs/coco.py without a map, regions, weights and small crops."""
    c = coco.get_config(variant)
    lib.plain_byol(c)
    return c
