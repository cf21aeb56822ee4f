"""Photographic cut-outs on photographs: between built-in scenes and photos, does guidance pay?

python launch/paste_cutouts.py --cutouts=cutouts.csv --backgrounds=DIR --out=$SALCL_DATA/cutouts
SALCL_DATA=DIR python -m salcl_jax.study --study=configs/studies/cutouts.py:long --workdir=DIR --jobs=2
variants, joined by commas: those of scenes.py, whose dials of the scenes change nothing here
Results: RESULTS.md.
"""

import dataclasses

from salcl_jax import config as lib
from salcl_jax.study_plan import Study

SCENES = lib.beside(__file__, "scenes.py")
FOLDER = f"{lib.beside(__file__, '../judge.py').ROOT}/cutouts"


def get_study(variant: str = "") -> Study:
    """The study of built-in scenes with other scenes; each row is judged by its own kind of map."""
    like = SCENES.get_study(variant)

    def config() -> lib.ConfigDict:
        c = like.config()
        train, val = _scenes("train"), _scenes("val")
        c.data.train, c.data.canvas = train, 192
        c.eval.pretext, c.eval.localization, c.eval.probe_train, c.eval.probe_test = val, val, train, val
        for task in ("classify", "multilabel"):
            c.tasks[task].train, c.tasks[task].test = train, val
        c.tasks.localization.test = val
        return c

    question = f"Cut-outs on photographs{f', {variant}' if variant else ''}: what does guidance add?"
    return dataclasses.replace(like, question=question, config=config, judge=config, fixed=())


def _scenes(split: str) -> lib.ConfigDict:
    return lib.source("folder", roots=(f"{FOLDER}/{split}",), annotations=f"{FOLDER}/{split}.json")
