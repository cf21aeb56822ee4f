# %% [markdown]
# # Explore a checkpoint
#
# What has a network learnt? Its maps and regions on photos, the photos that it finds alike, and what a
# linear probe reads off its features: each beside the same network untrained.
#
# `CHECKPOINT` is the folder of a run, for example the one of `pretrain_folder.ipynb`. Without photos
# the built-in scenes are used.

# %% cellView="form" tags=["parameters"]
# @title Settings
# @markdown On Colab: what `git clone` shall fetch this project from. Elsewhere it is not needed.
REPOSITORY = ""  # @param {type: "string"}
RUNTIME = "cpu"  # @param ["tpu", "cpu", "gpu"]
DRIVE = False  # @param {type: "boolean"}
# @markdown Folder of a run, or one STEP of its checkpoints.
CHECKPOINT = "workdir/notebook"  # @param {type: "string"}
# @markdown Folder of photos, searched recursively. Empty: built-in scenes.
PHOTOS = ""  # @param {type: "string"}
# @markdown Classes for the probe: empty, `folders` (a photo's folder), or a CSV with columns file and label.
LABELS = ""  # @param {type: "string"}
# @markdown Photos that are read, and photos that are shown.
LIMIT = 500  # @param {type: "integer"}
SHOWN = 6  # @param {type: "integer"}

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

# %%
import salcl_jax

model = salcl_jax.load(CHECKPOINT)
untrained = model.untrained()
c = model.config
print(f"{c.model.name} of width {c.model.width}, step {model.step:,}")
print(f"map: {c.saliency.source} of {' and '.join(c.saliency.stages)}")

# %% [markdown]
# ## Photos
#
# Drawn at random from all of them; what cannot be read is passed over.

# %%
import numpy as np

from salcl_jax.data.decode import SkipImage, decode
from salcl_jax.data.sources import open_source

spec = {"kind": "scenes"}
if PHOTOS:
    spec = {"kind": "folder", "roots": (PHOTOS,), "label_from_folder": LABELS == "folders"}
    spec["labels"] = LABELS if LABELS != "folders" else ""
source = open_source(spec)

photos = []
for i in np.random.default_rng(0).permutation(len(source))[:LIMIT]:
    try:
        record = source.read(int(i))
        if "encoded" in record:
            record["image"] = np.asarray(decode(record["encoded"], 320, max_pixels=200_000_000).image)
        photos.append(record)
    except (SkipImage, OSError) as error:
        print(f"passed over: {source.place(int(i))}: {error}")
images = [photo["image"] for photo in photos]
print(f"{len(photos)} of {len(source)} photos of {source.name}")

# %% [markdown]
# ## Maps and regions
#
# The map that guides training, here of whole photos, and the regions found in it, each with its number and
# score.

# %%
from salcl_jax import notebook, visualize


def regions_and_map(network, pictures):
    """Per picture: itself with its regions, and its heat map."""
    maps, regions = network.saliency(pictures)
    rows = []
    for picture, heat, boxes, valid, score in zip(pictures, maps, *regions, strict=True):
        large = visualize.fit(picture, 200)
        labels = [f"{i + 1}: {value:.2f}" for i, value in enumerate(score)]
        boxed = visualize.draw_boxes(large, boxes, valid, visualize.PALETTE, labels)
        rows.append((boxed, visualize.heat(heat, large)))
    return rows


shown = images[:SHOWN]
both = zip(regions_and_map(model, shown), regions_and_map(untrained, shown), strict=True)
rows = [after + before for after, before in both]
captions = ["regions", "map", "regions, untrained", "map, untrained"]
notebook.show(visualize.grid(rows, [captions] * len(rows), tile=200))

# %% [markdown]
# ## Nearest neighbours
#
# The photos whose pooled features point the same way (cosine), out of those read above. Photos go in as
# squares of the side that the run was judged at.

# %%
from salcl_jax.data.decode import WHOLE, from_array, to_canvas
from salcl_jax.evaluators import knn


def features(network, pictures):
    """Pooled features [n, d] of pictures of any size."""
    squares = [to_canvas(from_array(picture), WHOLE, c.eval.size)[0] for picture in pictures]
    return network.features(np.stack(squares))["pooled"]


def neighbours(network, count=5):
    """Rows of pictures and captions: a photo and those nearest to it."""
    pooled = features(network, images)
    cosine, nearest = knn.nearest(pooled, pooled, min(count, len(pooled) - 1), leave_one_out=True)
    rows = [[images[j] for j in (i, *nearest[i])] for i in range(len(shown))]
    captions = [["photo", *(f"{value:.3f}" for value in cosine[i])] for i in range(len(shown))]
    return visualize.grid(rows, captions, tile=110)


notebook.show(neighbours(model))

# %% [markdown]
# The same of the untrained network, which goes by colours and brightness:

# %%
notebook.show(neighbours(untrained))

# %% [markdown]
# ## Linear probe
#
# Logistic regression on frozen features, fitted to four fifths of the photos and tested on the rest. Of
# the built-in scenes it names the objects (crops of their boxes), of your photos the classes that
# `LABELS` tells.

# %%
from salcl_jax.evaluators import linear


def labelled(rows):
    """Pictures and classes of some photos; objects of scenes are cut out."""
    if PHOTOS:
        known = [photos[i] for i in rows if photos[i].get("label", -1) >= 0]
        return [photo["image"] for photo in known], np.array([photo["label"] for photo in known])
    pictures, classes = [], []
    for scene in (photos[i] for i in rows):
        for box, kind in zip(scene["boxes"], scene["classes"], strict=True):
            y0, x0, y1, x1 = np.rint(box * len(scene["image"])).astype(int)
            pictures.append(scene["image"][y0:y1, x0:x1])
            classes.append(kind)
    return pictures, np.array(classes)


(fit_on, classes), (held_out, truth) = map(labelled, linear.split(len(photos)))
if len(held_out) and len(set(classes)) > 1:
    chance = np.mean(truth == np.bincount(classes).argmax())
    print(f"{len(fit_on)} pictures to fit on, {len(held_out)} to test on, {len(set(classes))} classes")
    for name, network in {"trained": model, "untrained": untrained}.items():
        train, test = (features(network, fit_on), classes), (features(network, held_out), truth)
        print(f"{name:12}{100 * linear.evaluate(train, test)['linear/top1']:6.1f} %")
    print(f"{'chance':12}{100 * chance:6.1f} %   (always the most frequent class)")
else:
    print("no classes are known: set LABELS")

# %% [markdown]
# The figures of papers come from `python -m salcl_jax.evaluate`, with its protocols and complete sets:
# see README.md.
