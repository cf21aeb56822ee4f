# %% [markdown]
# # A COCO run on a TPU VM
#
# This notebook only gives orders: it requests a TPU slice in your Google Cloud project, installs the
# code there, starts the run and looks at what it writes to a bucket. The run goes on when the notebook
# is closed. **A slice costs money until it is deleted**, at the end of this page.
#
# With `DRY_RUN` on, every cell prints its commands instead of running them. Read them, then switch it
# off. `launch/README.md` says what each script does. COCO lies in the bucket already, or is prepared
# once, see below.

# %% cellView="form" tags=["parameters"]
# @title Settings
# @markdown On Colab: what `git clone` shall fetch this project from. Elsewhere it is not needed.
REPOSITORY = ""  # @param {type: "string"}
DRY_RUN = True  # @param {type: "boolean"}
PROJECT = "my-project"  # @param {type: "string"}
ZONE = "us-central2-b"  # @param {type: "string"}
BUCKET = "my-bucket"  # @param {type: "string"}
NAME = "salcl"  # @param {type: "string"}
TYPE = "v4-32"  # @param {type: "string"}
# @markdown A spot slice is cheaper and may be taken away; this notebook then requests it again.
SPOT = False  # @param {type: "boolean"}
RUN = "one"  # @param {type: "string"}
# @markdown Folder here for the curves and panels of the run.
COPY = "workdir/coco"  # @param {type: "string"}
CONFIG = "configs/coco.py"  # @param ["configs/coco.py", "configs/coco.py:lars", "configs/coco_byol.py"]
# @markdown Further fields, as on the command line: `--config.total_epochs=100`
FIELDS = ""  # @param {type: "string"}

# %% cellView="form"
# @title Code
import os
import subprocess
import sys
from pathlib import Path

if "google.colab" in sys.modules:
    checkout = "/content/checkout"
    if not REPOSITORY and not os.path.isdir(checkout):
        raise SystemExit("set REPOSITORY above: the address from which git clones this project")
    if not os.path.isdir(checkout):
        subprocess.run(["git", "clone", "--quiet", REPOSITORY, checkout], check=True)
    os.chdir(checkout)
start = Path.cwd()
root = next((p for p in (start, *start.parents) if (p / "salcl_jax" / "main.py").exists()), None)
if root is None:
    raise SystemExit(f"{start} is not in a checkout of the project: start Jupyter there")
os.chdir(root)
sys.path.insert(0, str(root))

# %% cellView="form"
# @title Google account, and a key for ssh
if "google.colab" in sys.modules and not DRY_RUN:
    from google.colab import auth

    auth.authenticate_user(project_id=PROJECT)
    key = Path.home() / ".ssh" / "google_compute_engine"
    key.parent.mkdir(mode=0o700, exist_ok=True)
    if not key.exists():
        subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-N", "", "-f", str(key)], check=True)
    agent = subprocess.run(["ssh-agent", "-s"], check=True, capture_output=True, text=True).stdout
    os.environ.update(part.strip().split("=") for part in agent.split(";") if "=" in part)
    subprocess.run(["ssh-add", "-q", str(key)], check=True)

# %%
import shlex

from salcl_jax import notebook

slice_ = [f"--name={NAME}", f"--zone={ZONE}", f"--project={PROJECT}"]
workdir = f"gs://{BUCKET}/runs/{RUN}"
data_dir = f"gs://{BUCKET}/tfds"
program = ["--", f"--config={CONFIG}", f"--workdir={workdir}", f"--config.data.train.data_dir={data_dir}"]
program += shlex.split(FIELDS)


def launch(script, *arguments, seconds=0):
    """Run a script of launch/, or let it print its commands."""
    dry = ["--dry-run"] if DRY_RUN else []
    notebook.command(["bash", f"launch/{script}", *dry, *arguments], seconds=seconds)


# %% [markdown]
# ## Data, once
#
# COCO as TFDS records in the bucket. This downloads 25 GB, needs 75 GB of disk and an hour or more, so
# a machine of your own in the bucket's region is a better place than Colab: there, take the command
# that the dry run prints.

# %%
PREPARE = False  # @param {type: "boolean"}
if PREPARE and "google.colab" in sys.modules and not DRY_RUN:
    notebook.command([sys.executable, "-m", "pip", "install", "--quiet", "-e", "."])
if PREPARE or DRY_RUN:
    launch("prepare_data.sh", "--data=coco", f"--data-dir={data_dir}")

# %% [markdown]
# ## Start
#
# Requests the slice and waits for it (which may take long; stopping the cell leaves the request in the
# queue, running it again waits on), copies the code, and starts the run. For a spot slice the cell goes
# on watching: stopping it leaves the run alone.

# %%
if SPOT:
    launch("tpu_resume.sh", *slice_, f"--type={TYPE}", "--spot", "--attempts=50", *program)
else:
    launch("tpu_create.sh", *slice_, f"--type={TYPE}")
    launch("tpu_setup.sh", *slice_)
    launch("tpu_run.sh", *slice_, "--detach", *program)

# %% [markdown]
# ## Watch
#
# Its output, for a minute:

# %%
launch("tpu_logs.sh", *slice_, "--lines=40", seconds=60)

# %% [markdown]
# Its curves and newest panel, from the bucket; run the cell whenever you like:

# %%
fetch = ["gcloud", "storage", "rsync", "--recursive", "--exclude=(checkpoints|tensorboard)/.*", workdir, COPY]
if DRY_RUN:
    print(shlex.join(fetch))
else:
    os.makedirs(COPY, exist_ok=True)
    notebook.command(fetch)
    notebook.draw_run(COPY)

# %% [markdown]
# ## Stop, and delete
#
# `STOP` lets the run save and end; the same start continues it. `DELETE` deletes the slice, not the
# bucket.

# %%
STOP = False  # @param {type: "boolean"}
if STOP or DRY_RUN:
    launch("tpu_stop.sh", *slice_)

# %%
DELETE = False  # @param {type: "boolean"}
if DELETE or DRY_RUN:
    launch("tpu_delete.sh", *slice_)
