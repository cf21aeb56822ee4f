"""Photographic cut-outs on photographs: between built-in scenes and photos, does guidance pay?

python launch/paste_cutouts.py --cutouts=cutouts.csv --backgrounds=DIR --out=$SALCL_DATA/cutouts
SALCL_DATA=DIR python -m salcl_jax.study --study=configs/studies/cutouts.py:long --workdir=DIR --jobs=2
variants, joined by commas: the dials of training and the groups of rows of scenes.py
Results: RESULTS.md.
"""

from salcl_jax import config as lib
from salcl_jax.study_plan import Study, guided

SCENES = lib.beside(__file__, "scenes.py")
FOLDER = f"{lib.beside(__file__, '../judge.py').ROOT}/cutouts"


def get_study(variant: str = "") -> Study:
    """The study of small built-in objects in clutter, with other scenes and two maps more."""
    like = SCENES.get_study(",".join(filter(None, ("small,clutter", variant))))
    rows = {
        f"zoom_border{stage}": guided(
            {"zoom": 0.8}, **{"saliency.source": "border", "saliency.stages": (f"stage{stage}",)}
        )
        for stage in (2, 3)
    }

    def config() -> lib.ConfigDict:
        c = like.config()
        c.data.train, c.data.canvas = _scenes("train"), 192
        c.eval.pretext, c.eval.localization = _scenes("val"), _scenes("val")
        c.eval.probe_train, c.eval.probe_test = _scenes("train"), _scenes("val")
        for task in ("classify", "multilabel"):
            c.tasks[task].train, c.tasks[task].test = _scenes("train"), _scenes("val")
        c.tasks.localization.test = _scenes("val")
        return c

    return Study(
        question=f"Cut-outs on photographs{f', {variant}' if variant else ''}: what does guidance add?",
        config=config,
        rows=dict(like.rows) | rows,
        matched=like.matched,
        baseline=like.baseline,
        judge=config,
        tasks=like.tasks,
        figures=like.figures,  # each row is judged by its own kind of map
    )


def _scenes(split: str) -> lib.ConfigDict:
    return lib.source("folder", roots=(f"{FOLDER}/{split}",), annotations=f"{FOLDER}/{split}.json")
