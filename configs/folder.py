"""Your own photos: any folders of JPEG, PNG, BMP or WebP files, searched recursively; labels are not needed.

python -m salcl_jax.main --config=configs/folder.py --workdir=DIR \
    --config.data.train.roots="('/photos/a','/photos/b')"
Map, pairs and weights: hardly told from the best of the studied rows that use a map, and no better than
plain crops with as many FLOPs (RESULTS.md, "Photos, rate tuned").
variants: small_objects (much smaller than the photos: guidance wins on cut-outs and gains a little at equal
steps on photos; RESULTS.md, "Cut-outs", "Photos of small objects"), resnet50 (224 px, for an accelerator),
byol (no guidance), smoke (a few steps)
"""

from salcl_jax import config as lib


def get_config(variant: str = "") -> lib.ConfigDict:
    """ResNet-18 of width 16 on 48 px crops; name the folders with --config.data.train.roots."""
    c = lib.base()
    if "resnet50" not in (variant or "").split(","):
        lib.small(c)
    c.data.train = lib.source("folder")
    known = {"small_objects": _small_objects, "resnet50": lambda c: None, "byol": lib.plain_byol,
             "smoke": lib.few_steps}  # fmt: skip
    return lib.apply_variants(c, variant, known)


def _small_objects(c: lib.ConfigDict) -> None:
    """The guidance of the row `border23_clip` of configs/studies/cutouts.py:maps; at 224 px not yet run."""
    c.data.canvas *= 2  # small objects keep their pixels
    c.saliency.source, c.saliency.stages = "border", ("stage2", "stage3")
    c.saliency.size = max(96, c.crops.size)  # 24 cells of stage 2, 28 for resnet50
    c.saliency.clip = 1.0
    c.roi.source = "saliency"
    c.roi.window, c.roi.min_size, c.roi.count = 0.08, 0.1, 4
    c.roi.level, c.roi.min_peak = 0.5, 0.8
    c.pairs.mix.cover, c.pairs.mix.zoom = 0.0, 0.8
    c.pairs.min_size = 0.05
    c.weights.mode = "none"
    c.guidance.full = 0.05
