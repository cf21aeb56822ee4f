"""The ahead-of-time report on devices that are here, the search for a batch, and the TPU compiler."""

import dataclasses
import functools
import importlib.util
import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from test_train_step import Stub

from salcl_jax import aot, sharding
from salcl_jax import config as config_lib
from salcl_jax.models.network import build
from salcl_jax.train_step import make_init, make_train_step

ROOT = __file__.rsplit("/", 2)[0]
needs_compiler = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="no TPU compiler: pip install -e .[tpu]"
)


def tiny(**fields):
    c = config_lib.base()
    config_lib.small(c)
    c.data.canvas, c.model.width, c.crops.size, c.saliency.size = 48, 8, 32, 32
    c.model.projector_hidden = c.model.predictor_hidden = 16
    c.model.projector_out = 8
    c.loss.name = "byol"
    c.batch_size, c.saliency.stages = 16, ("stage4",)
    c.optim.name = "sgd"
    c.update_from_flattened_dict(fields)
    return c


@pytest.fixture(autouse=True)
def small_encoder(monkeypatch):
    monkeypatch.setattr(aot, "build", lambda **fields: dataclasses.replace(build(**fields), encoder=Stub()))


def network_of(config):
    return aot.build(**config.model)


@functools.cache
def measured(**fields):
    config, mesh = tiny(**fields), sharding.make_mesh()
    return aot.measure(aot.compile_step(config, mesh), config, mesh)


def bytes_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_what_the_step_needs_and_sends():
    """Arguments and traffic against sums over the arrays themselves."""
    config = tiny()
    devices = jax.device_count()
    state = jax.eval_shape(make_init(network_of(config), config_lib.finish(config, devices=1, images=99)))
    found = measured()
    batch = config.batch_size // devices * (3 * config.data.canvas**2 + 4 + 4)
    assert found["chips"] == devices and found["per_chip"] == config.batch_size // devices
    assert found["memory"]["arguments"] == pytest.approx(bytes_of(state) + batch, rel=0.01)
    assert found["not_donated"] == [] and found["recompiles"] == []
    assert set(found["collectives"]) == {"all-reduce"}
    gradients = bytes_of(state.params)
    # Sum and sum of squares of two views, or their gradients: online forward and backward, target forward.
    online, target = (bytes_of(stats) for stats in (state.batch_stats, state.target_batch_stats))
    norms = 2 * (2 * online + target)
    assert found["collectives"]["all-reduce"]["bytes"] == pytest.approx(gradients + norms, rel=0.02)
    assert found["collectives_of"]["batch norm"]["bytes"] >= 0.8 * norms
    assert found["flops_per_image"] > 0 and found["bytes_per_image"] > 3 * config.data.canvas**2


def test_micro_batches_count_as_often_as_they_run():
    """Twice the micro-batches on twice the images: the same work an image, twice the BatchNorm traffic."""
    once, twice = measured(), measured(accumulate=2, batch_size=32)
    assert twice["flops_per_image"] == pytest.approx(once["flops_per_image"], rel=0.05)
    norms = [found["collectives_of"]["batch norm"]["bytes"] for found in (once, twice)]
    assert norms[1] == pytest.approx(2 * norms[0], rel=0.2)


def test_parameters_in_parts_show_as_less_memory_and_other_collectives():
    whole, parts = measured(), measured(**{"sharding.params": "fsdp", "sharding.min_size": 256})
    assert parts["memory"]["arguments"] < 0.6 * whole["memory"]["arguments"]
    assert parts["collectives"]["all-gather"]["bytes"] > 0 and parts["not_donated"] == []


def test_a_state_that_comes_out_otherwise_is_named(monkeypatch):
    def make(network, config):
        step = make_train_step(network, config)

        def changed(state, batch):
            new, measured = step(state, batch)
            return new._replace(failed=new.failed.astype(np.float32)), measured

        return changed

    monkeypatch.setattr(aot, "make_train_step", make)
    found = measured(seed=1)
    assert found["recompiles"] == ["failed"] and found["not_donated"] == ["failed"]


@pytest.mark.parametrize("limit", [100, 1000, 1003, 4096, 7])
@pytest.mark.parametrize("known", [True, False])
def test_the_largest_batch_is_found(limit, known):
    """Memory 40 + 3.7 n + a little that is not linear, in any case against plain counting."""
    def need(n):
        return 40 + 3.7 * n + 0.3 * (n % 16)

    asked = []

    def attempt(n):
        assert n > 0 and n % 8 == 0 and n not in asked
        asked.append(n)
        return need(n) <= limit, need(n) if known else None

    expected = max((n for n in range(8, 2000, 8) if need(n) <= limit), default=0)
    assert aot.largest_batch(attempt, float(limit), 64) == expected
    assert len(asked) <= (5 if known else 14)


def test_the_compilers_error_is_read():
    text = ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. "
            "Exceeded hbm capacity by 1.75G.")  # fmt: skip
    assert aot._used(text) == (17.5 * 2**30, 15.75 * 2**30)
    assert aot._used("RESOURCE_EXHAUSTED: something else") == (None, None)


def run(*flags):
    command = [sys.executable, "-m", "salcl_jax.compile", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)


TINY = """
from salcl_jax import config as lib

def get_config(variant=""):
    c = lib.base()
    lib.small(c)
    c.data.canvas, c.model.width, c.crops.size, c.saliency.size = 48, 8, 32, 32
    c.model.projector_hidden = c.model.predictor_hidden = 16
    c.loss.name = "byol"
    c.batch_size, c.saliency.stages = 16, ("stage4",)
    return lib.apply_variants(c, variant, {"byol": lib.plain_byol})
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(TINY)
    return str(path)


@needs_compiler
def test_the_program_for_a_slice_that_is_not_there(config_file, tmp_path):
    out = tmp_path / "report.json"
    against = f"--against={config_file}:byol"
    done = run(f"--config={config_file}", against, "--topology=v5e:2x2", f"--out={out}")
    assert done.returncode == 0, done.stderr
    guided, byol = json.loads(out.read_text())["reports"]
    assert guided["config"] == config_file and byol["config"] == f"{config_file}:byol"
    for one in (guided, byol):
        assert one["chips"] == 4 and one["per_chip"] == 4 and one["device"] == "TPU v5 lite" and one["fits"]
        assert set(one["collectives"]) == {"all-reduce"} and not one["not_donated"] and not one["recompiles"]
        least = max(one["flops_per_image"] * 4 / 197e12, one["bytes_per_image"] * 4 / 819e9)
        assert one["images_per_second"] <= 1.001 * 4 / least
    shown = float(re.search(r"FLOPs per image +([\d.]+)", done.stdout)[1])
    assert shown == pytest.approx(guided["flops_per_image"] / byol["flops_per_image"], abs=1e-4)
    assert shown > 1.01  # a map and its regions cost something


@needs_compiler
def test_a_step_that_does_not_fit_has_its_own_exit_code(config_file):
    canvas = "--config.data.canvas=4096"
    done = run(f"--config={config_file}", "--topology=v5e:2x2", "--per_chip=400", canvas)
    assert done.returncode == 1, done.stderr
    assert "does not fit" in done.stdout


@pytest.mark.slow
@needs_compiler
def test_the_largest_batch_by_the_real_compiler(config_file, tmp_path):
    """Canvases of 48 MB: the compiler's 15.75 GiB hold nearly as many as fit by division alone."""
    out, canvas = tmp_path / "fit.json", 4096
    flags = ["--topology=v5e:2x2", "--per_chip=64", "--fit", f"--config.data.canvas={canvas}", f"--out={out}"]
    done = run(f"--config={config_file}:byol", *flags)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())["reports"][0]
    room = 15.75 * 2**30 / (3 * canvas**2)
    assert room - 16 < report["largest_per_chip"] < room
    assert report["at_largest"]["fits"] and f"{report['largest_per_chip']} images per chip" in done.stdout


@needs_compiler
@pytest.mark.parametrize("topology", ["v5e:3x3", "v99:2x2", "v5e"])
def test_unknown_slices_are_one_line(config_file, topology):
    done = run(f"--config={config_file}", f"--topology={topology}")
    assert done.returncode == 2
    assert f"--topology={topology}: " in done.stderr and "Traceback" not in done.stderr


def test_without_the_compiler_a_line_says_what_to_install(config_file, monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install -e .\[tpu\]"):
        aot.slice_mesh("v5e:2x2")


@needs_compiler
def test_a_batch_that_does_not_divide_is_one_line(config_file):
    fields = ("--config.batch_size=18", "--config.accumulate=3")
    done = run(f"--config={config_file}", "--topology=v5e:2x2", *fields)
    assert done.returncode == 2 and "batch_size" in done.stderr and "Traceback" not in done.stderr
