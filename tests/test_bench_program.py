"""`python -m salcl_jax.bench` as users start it: table, file, first step after a restart, one-line errors."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("bench")  # one process: what is measured is measured once
ROOT = Path(__file__).parents[1]
SMALL = ["--config=configs/scenes.py:smoke", "--config.batch_size=4", "--config.crops.size=32",
         "--config.data.canvas=40", "--config.saliency.size=32", "--config.model.width=4",
         "--config.model.projector_hidden=16", "--config.model.predictor_hidden=16"]  # fmt: skip
# The figures do not matter here: compiling takes half as long.
FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def run(*arguments, platform="cpu", cache=None):
    env = os.environ | {"JAX_PLATFORMS": platform, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    env["XLA_FLAGS"] = FAST
    env |= {"JAX_COMPILATION_CACHE_DIR": str(cache)} if cache else {}
    command = [sys.executable, "-m", "salcl_jax.bench", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Printed text and report of a run without parts, but with the first step of fresh processes."""
    folder = tmp_path_factory.mktemp("bench")
    arguments = ["--what=step", "--rounds=2", "--noparts", "--cache", f"--out={folder / 'step.json'}"]
    done = run(*SMALL, *arguments, cache=folder / "cache")
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "step.json").read_text())


def test_the_step_is_measured_with_and_without_guidance(measured):
    text, report = measured
    for name in ("guided", "plain"):
        step = report["modes"][name]["step"]
        ms = step["milliseconds"]
        assert 0 < ms["min"] <= ms["median"] <= ms["max"] and "parts" not in report["modes"][name]
        assert step["images_per_second"] == pytest.approx(4000 / ms["median"])
        assert step["flops_per_image"] > 1e5 and "mfu" not in step
    guided, plain = (report["modes"][name]["step"]["flops_per_image"] for name in ("guided", "plain"))
    assert guided > 1.05 * plain  # the map costs a pass
    assert report["guided_over_plain"]["median"] > 0 and report["batch_size"] == 4
    assert re.search(r"^guided images/s over plain: \d", text, re.M) and "note: no published peak" in text


def test_the_wait_for_the_scenes_is_measured(measured):
    wait = measured[1]["data_wait"]
    assert 0 <= wait["share"] < 1 and wait["steps"] >= 1 and wait["images_per_second"] > 0
    assert "waiting for data: " in measured[0]


def test_a_restart_compiles_nothing(measured):
    """Every program comes from the cache, and none is added to it."""
    cold, warm = (measured[1]["restart"][name] for name in ("cold", "warm"))
    assert cold["cached"] == 0 and cold["compiled"] >= 2
    assert warm["compiled"] == 0 and warm["cached"] == cold["compiled"]
    assert warm["files"] == cold["files"] > 0
    assert warm["seconds"] < cold["seconds"]


def test_the_file_says_how_it_came_about(measured):
    report = measured[1]
    assert report["what"] == "step" and "x cpu" in report["hardware"] and report["versions"]["jax"]
    assert report["command"].startswith("python -m salcl_jax.bench --config=configs/scenes.py:smoke")
    assert re.match(r"\d{4}-\d\d-\d\dT", report["date"])


WRONG = {
    "no kind": ([*SMALL], "--what=: give one of input, step, first"),
    "unknown kind": ([*SMALL, "--what=ops"], "--what=ops: give one of"),
    "no config": (["--what=step"], "--config=configs/NAME.py"),
    "sizes": ([*SMALL, "--what=step", "--batches=4,big"], "--batches=4,big: give sizes"),
    "rounds": ([*SMALL, "--what=step", "--rounds=0"], "--rounds=0"),
    "out": ([*SMALL, "--what=step", "--out=/dev/null/a.json"], "--out=/dev/null"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_command(name):
    """Refused before any device is touched: the platform named here does not exist."""
    arguments, words = WRONG[name]
    done = run(*arguments, platform="nonesuch")
    assert done.returncode == 2 and words in done.stderr
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr)


def test_a_batch_that_does_not_divide_is_one_line(tmp_path):
    done = run(*SMALL, "--what=step", "--noparts", "--config.accumulate=3", cache=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "accumulate" in done.stderr
