"""Your own photos: any folders of JPEG, PNG, BMP or WebP files, searched recursively; labels are not needed.

python -m salcl_jax.main --config=configs/folder.py --workdir=DIR \
    --config.data.train.roots="('/photos/a','/photos/b')"
Pairs and weights: the first of the studied rows that use a map, within the error, and no better than plain
crops with as many FLOPs (RESULTS.md, "Photos: three seeds").
variants: resnet50 (224 px, for an accelerator), byol (no guidance), smoke (a few steps)
"""

from salcl_jax import config as lib


def get_config(variant: str = "") -> lib.ConfigDict:
    """ResNet-18 of width 16 on 48 px crops; name the folders with --config.data.train.roots."""
    c = lib.base()
    if "resnet50" not in (variant or "").split(","):
        lib.small(c)
    c.data.train = lib.source("folder")
    known = {"resnet50": lambda c: None, "byol": lib.plain_byol, "smoke": lib.few_steps}
    return lib.apply_variants(c, variant, known)
