# %% [markdown]
# # Pre-train on your own photos
#
# A network learns from a folder of photos without labels: it computes a saliency map from its own
# activations, chooses by it where pairs of crops are taken, and weighs the losses among them.
#
# On Colab choose **Runtime > Change runtime type** first (a TPU, or a CPU for the small network), fill
# in the settings and run all cells. Elsewhere, start Jupyter in an environment with the package;
# nothing is installed then. Without photos the built-in scenes are used, which takes a few minutes on
# two CPU cores.

# %% cellView="form" tags=["parameters"]
# @title Settings
# @markdown On Colab: what `git clone` shall fetch this project from. Elsewhere it is not needed.
REPOSITORY = ""  # @param {type: "string"}
RUNTIME = "cpu"  # @param ["tpu", "cpu", "gpu"]
DRIVE = False  # @param {type: "boolean"}
# @markdown Folder of photos, searched recursively; in Drive `/content/drive/MyDrive/...`. Empty: scenes.
PHOTOS = ""  # @param {type: "string"}
# @markdown Folder of the run; in Drive it outlives the machine, and running all cells again continues it.
WORKDIR = "workdir/notebook"  # @param {type: "string"}
# @markdown `small`: ResNet-18 of width 16, 48 px crops. `resnet50`: 224 px, for an accelerator.
NETWORK = "small"  # @param ["small", "resnet50"]
# @markdown Optimizer steps; 0: as many as the configuration says.
STEPS = 0  # @param {type: "integer"}
# @markdown Further fields, as on the command line: `--config.batch_size=128 --config.optim.lr=0.002`
FIELDS = ""  # @param {type: "string"}

# %% cellView="form"
# @title Code and packages
import os
import subprocess
import sys
from pathlib import Path

if "google.colab" in sys.modules:
    checkout, extra = "/content/checkout", {"tpu": "[tpu]", "gpu": "[cuda]", "cpu": ""}[RUNTIME]
    if not REPOSITORY and not os.path.isdir(checkout):
        raise SystemExit("set REPOSITORY above: the address from which git clones this project")
    if not os.path.isdir(checkout):
        subprocess.run(["git", "clone", "--quiet", REPOSITORY, checkout], check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "-e", checkout + extra]
    subprocess.run(pip, check=True)
    os.chdir(checkout)
start = Path.cwd()
root = next((p for p in (start, *start.parents) if (p / "salcl_jax" / "main.py").exists()), None)
if root is None:
    raise SystemExit(f"{start} is not in a checkout of the project: start Jupyter there")
os.chdir(root)
sys.path.insert(0, str(root))

# %% cellView="form"
# @title Google Drive
if DRIVE and "google.colab" in sys.modules:
    from google.colab import drive

    drive.mount("/content/drive")

# %% [markdown]
# ## Train
#
# Curves and the newest panel are redrawn while the run goes on. **Stopping the cell stops the run,
# which saves first**; running the cell again continues it. The first figures appear when the step is
# compiled, after a minute or two.

# %%
import shlex

from salcl_jax import notebook

arguments = ["--config=configs/scenes.py"]
if PHOTOS:
    arguments = ["--config=configs/folder.py" + (":resnet50" if NETWORK == "resnet50" else "")]
    arguments += [f"--config.data.train.roots=({PHOTOS!r},)", "--config.data.cache=canvas"]
if STEPS:
    arguments += ["--config.total_epochs=0", f"--config.total_steps={STEPS}"]
_ = notebook.train([*arguments, "--config.log.every=10", *shlex.split(FIELDS)], WORKDIR)

# %% [markdown]
# How to read it:
#
# - **Loss** on training crops, and on a fixed set of crops (before, between, after), falls and levels
#   off.
# - **Spread** of the projections is 1 when they fill their space and 0 when all are alike. It stays
#   well above 0.2 in a healthy run.
# - A row of the **panel** is one photo: the canvas (the photo squashed to a square), its map, the
#   regions found, the windows of the two crops, and the crops as the network sees them.
#
# Final figures stand beside those of the untrained network above. `summary.json` in the folder of the
# run has all of them.

# %% [markdown]
# ## From the first picture to the last
#
# The same photos, the same draws; only the network has changed.

# %%
import numpy as np
from PIL import Image

panels = sorted(Path(WORKDIR, "panels").glob("*.png"))
for panel in panels[:1] + panels[1:][-1:]:
    print(f"step {int(panel.stem.split('_')[-1])}")
    with Image.open(panel) as picture:
        notebook.show(np.asarray(picture.convert("RGB")))

# %% [markdown]
# ## Next
#
# `explore_checkpoint.ipynb` with `CHECKPOINT` set to this folder shows maps, regions and neighbours,
# and probes the features. `python -m salcl_jax.export` writes the weights for torchvision, timm,
# Hugging Face and Detectron2: see README.md.
