"""Notebooks run from top to bottom, for tests: with other settings, and what they print and show."""

import base64
import copy
import io
from pathlib import Path

import nbclient
import nbformat
import numpy as np
from PIL import Image

from salcl_jax import config as lib

ROOT = Path(__file__).parents[1]
COLAB = ROOT / "launch" / "colab"
BUILD = lib.load_module(str(COLAB / "build.py"))
NAMES = BUILD.NAMES


def read(name):
    return nbformat.read(COLAB / f"{name}.ipynb", as_version=4)


def code(name):
    return [cell.source for cell in read(name).cells if cell.cell_type == "code"]


def cell(name, part):
    (found,) = [source for source in code(name) if part in source]
    return found


def execute(name, settings, env, again=None, start=""):
    """The notebook's cells after a run from the top, with these settings behind its own.

    again: other settings, with which the cells from the one with the text `start` on are then run once
    more; these second cells are returned too.
    """
    made = read(name)
    (at,) = [i for i, c in enumerate(made.cells) if "parameters" in c.metadata.get("tags", ())]
    assert all(f"\n{key} = " in made.cells[at].source for key in [*settings, *(again or ())])
    made.cells.insert(at + 1, _assignments(settings))
    first = len(made.cells)
    if again:
        (on,) = [i for i, c in enumerate(made.cells) if c.cell_type == "code" and start in c.source]
        made.cells += [_assignments(again), *copy.deepcopy(made.cells[on:])]
    place = {"metadata": {"path": str(COLAB)}}  # where Jupyter starts a notebook
    nbclient.NotebookClient(made, timeout=300, kernel_name="python3", resources=place).execute(env=env)
    return (made.cells[:first], made.cells[first:]) if again else made.cells


def _assignments(settings):
    return nbformat.v4.new_code_cell("\n".join(f"{key} = {value!r}" for key, value in settings.items()))


def printed(cells):
    return "".join(o.text for c in cells for o in c.get("outputs", ()) if o.output_type == "stream")


def images(cells, part):
    """Pictures that the cell with this text shows."""
    (found,) = [c for c in cells if c.cell_type == "code" and part in c.source]
    data = [o.data["image/png"] for o in found.outputs if "image/png" in o.get("data", ())]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in data]
