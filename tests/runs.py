"""Training as users start it, for tests: processes, what they leave behind, and how they end."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from salcl_jax import checkpoint

ROOT = Path(__file__).parents[1]
NO_TENSORFLOW = "import sys\nsys.modules['tensorflow'] = None  # an import of it raises ImportError\n"
SMALL = {
    "data.canvas": 48, "model.width": 4, "crops.size": 32, "saliency.size": 32, "eval.size": 32,
    "model.projector_hidden": 16, "model.projector_out": 16, "model.predictor_hidden": 16,
    "data.workers": 1, "log.panel_images": 2, "log.tensorboard": False,
}  # fmt: skip


def home(tmp_path_factory, name):
    """A folder for compiled programs, with the block that keeps tensorflow out."""
    folder = tmp_path_factory.mktemp(name)
    (folder / "blocked").mkdir()
    (folder / "blocked" / "sitecustomize.py").write_text(NO_TENSORFLOW)
    return folder


def photo(rng, side=56):
    """Smooth noise with a bright box, uint8 [side, side, 3], and the box."""
    image = np.kron(rng.integers(0, 120, (7, 7, 3)), np.ones((side // 7, side // 7, 1))).astype(np.uint8)
    y, x = rng.integers(0, side // 2, 2)
    image[y : y + side // 2, x : x + side // 3] += rng.integers(60, 130, 3).astype(np.uint8)
    return image, np.array([y, x, y + side // 2, x + side // 3]) / side


def pictures(folder):
    """An .npz file of 32 pictures."""
    rng = np.random.default_rng(0)
    np.savez(folder / "photos.npz", image=np.stack([photo(rng)[0] for _ in range(32)]))
    return folder / "photos.npz"


def environment(shared, block=False):
    """Of a process that runs quickly: compiled programs are kept, and little is optimised."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join([str(ROOT)] + [str(shared / "blocked")] * block),
        "JAX_COMPILATION_CACHE_DIR": str(shared / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }  # fmt: skip


def start(shared, config, workdir, block=False, **fields):
    """A training process; fields by dotted name with __ for dots."""
    given = SMALL | {name.replace("__", "."): value for name, value in fields.items()}
    command = [sys.executable, "-m", "salcl_jax.main", f"--config={config}", f"--workdir={workdir}"]
    command += [f"--config.{name}={value}" for name, value in given.items()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment(shared, block), **pipes)


def finish(process, code=0):
    """(stdout, stderr) of a process that must end with this exit code, without a traceback."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, err[-3000:]
    assert "Traceback" not in out + err, err[-3000:]
    return out, err


def train(shared, config, workdir, code=0, **fields):
    return finish(start(shared, config, workdir, **fields), code)


def arrays(columns, **fields):
    """Fields of a run on the .npz file, for configs/folder.py:smoke, without tensorflow."""
    return {"data__train__kind": "arrays", "data__train__path": columns, "batch_size": 8,
            "eval__batch_size": 8, "block": True, **fields}  # fmt: skip


def metrics(workdir, kind="train"):
    """Lines of one kind, which must be increasing in step: {step: figures}."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if f"{kind}/loss" in line or f"{kind}/pretext/loss" in line]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps))
    return dict(zip(steps, lines, strict=True))


def summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


def record(workdir, step):
    """Name, type, shape and checksum of every array of a checkpoint, the optimizer's included."""
    text = (workdir / "checkpoints" / str(step) / "extra" / "metadata").read_text()
    return json.loads(text)["record"]["leaves"]


def same_networks(one, other):
    one, other = checkpoint.load_params(str(one)), checkpoint.load_params(str(other))
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_equal(one[name], other[name])


def wait_for_step(process, workdir, step):
    """Until the running process has logged this step."""
    path, deadline = workdir / "metrics.jsonl", time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and f'{{"step": {step}, "train/' in path.read_text():
            return
        time.sleep(0.02)
    pytest.fail(f"step {step} was not reached: {process.poll()}")


def newest(workdir):
    """The last step that a run has saved."""
    return max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
