"""A study of seconds, for tests of the machinery.

python -m salcl_jax.study --study=configs/studies/smoke.py --workdir=DIR
"""

from salcl_jax import config as lib
from salcl_jax.study_plan import Study


def get_study() -> Study:
    """Two rows and a matched one, on a few built-in scenes."""
    return Study(
        question="Does the machinery of studies work?",
        config=_config,
        rows={"byol": lib.plain_byol, "guided": lambda c: None},
        matched={"byol_flops": ("byol", "guided")},
        baseline="byol",
        judge=_config,
        tasks=("knn", "localization"),
        figures={"knn/top1": "k-NN", "localization/corloc": "CorLoc"},
        seeds=(0, 1),
    )


def _config() -> lib.ConfigDict:
    c = lib.beside(__file__, "../scenes.py").get_config("smoke")
    c.tasks.baselines = ("untrained",)
    return c
