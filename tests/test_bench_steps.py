"""What is timed is the step and its parts; what is reported follows from the times."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salcl_jax import config as config_lib
from salcl_jax import sharding
from salcl_jax.bench import programs, steps, waiting
from salcl_jax.chips import Chip
from salcl_jax.models.resnet import RESNETS, BasicBlock

pytestmark = pytest.mark.xdist_group("bench")  # one process: its programs are compiled once
ROOT = Path(__file__).parents[1]
PARTS = ["saliency", "ROI", "crops", "augmentation", "online", "target", "gradient", "update"]


def scenes(variant="smoke"):
    spec = importlib.util.spec_from_file_location("scenes_config", ROOT / "configs" / "scenes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = module.get_config(variant)
    c.batch_size, c.data.canvas, c.crops.size, c.saliency.size, c.model.width = 4, 40, 32, 32, 4
    c.model.projector_hidden = c.model.predictor_hidden = c.model.projector_out = 16
    c.weights.mode = "geometric"
    c.optim.name, c.optim.lr, c.optim.warmup = "sgd", 6.4, 0.0  # the first step moves the weights
    c.guidance.start = c.guidance.full = 0.0  # the step has the parts' full guidance at once
    return c


@pytest.fixture(scope="module", autouse=True)
def few_blocks():
    """One block a stage: most of the time goes to compiling."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RESNETS, "resnet18", ((1, 1, 1, 1), BasicBlock))
        yield


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(jax.devices()[:2])


@pytest.fixture(scope="module")
def setting(mesh):
    return programs.Setting(scenes(), mesh)


@pytest.fixture(scope="module")
def parts(setting):
    return programs.parts(setting)


def test_parts_put_together_are_the_step(setting, parts):
    """Each part works on the results of those before it; the last gives the weights that the step gives."""
    assert list(parts) == PARTS
    state, measured = setting.step(setting.state(), setting.batch())
    loss, *_ = parts["gradient"].start()
    updated, figures = parts["update"].start()
    np.testing.assert_allclose(loss, measured["loss"], rtol=1e-4)
    np.testing.assert_allclose(figures["grad_norm"], measured["grad_norm"], rtol=1e-3)
    fresh = setting.state()
    for name in ("params", "target_params", "opt_state"):
        trees = (jax.tree.leaves(getattr(tree, name)) for tree in (updated, state))
        for found, expected in zip(*trees, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), updated.params, fresh.params)
    assert max(jax.tree.leaves(moved)) > 1e-2 and int(updated.step) == int(state.step) == 1
    stats = parts["online"].start()[1], parts["target"].start()[1]
    expected = state.batch_stats, state.target_batch_stats
    for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_parts_are_spread_over_the_devices(parts):
    for name in ("saliency", "crops", "augmentation", "online"):
        leaf = jax.tree.leaves(parts[name].start())[0]
        assert leaf.shape[0] == 4 and leaf.addressable_shards[0].data.shape[0] == 2, name


def test_operations_are_the_compilers(setting, parts):
    """A pass alone holds nothing of the other one, and the gradient holds both."""
    flops = {name: program.flops for name, program in parts.items()}
    assert flops["gradient"] > 1.8 * (flops["online"] + flops["target"])
    assert flops["online"] < 1.3 * flops["target"] and flops["target"] > 5 * flops["ROI"]
    stem = 2 * (3 * 3 * 3) * 4 * 16 * 16 * 2 * 4  # of the first convolution: two views of four images
    assert flops["target"] > stem


def test_cost_is_that_of_all_devices(mesh):
    of_one = {"flops": 10.0, "bytes accessed": 3.0}
    assert programs._cost({"flops": 19.0}, of_one, None, mesh) == (20.0, 6.0, None)
    assert programs._cost({"flops": 50.0}, of_one, None, mesh)[0] == 50.0  # a library has the convolutions
    assert programs._cost(None, None, None, mesh) == (None, None, None)


def zeros(shapes):
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


class Shapes:
    """A program that is not compiled: it gives zeros of the right shapes."""

    def __init__(self, function, args):
        self.shapes = jax.eval_shape(function, *args)

    def __call__(self, *_):
        return zeros(self.shapes)


def test_parts_of_other_configurations(mesh, monkeypatch):
    """No map without guidance; small crops; micro-batches; no target pass where the online one serves."""
    monkeypatch.setattr(programs.Setting, "state", lambda setting: zeros(jax.eval_shape(setting._init)))
    none = (None, None, None)
    monkeypatch.setattr(programs, "_compile", lambda jitted, args, mesh: (Shapes(jitted, args), none))
    plain, c = scenes(), scenes()
    config_lib.plain_byol(plain)
    assert list(programs.parts(programs.Setting(plain, mesh))) == PARTS[1:]
    c.local.count, c.local.size, c.accumulate, c.loss.name, c.batch_size = 2, 16, 2, "simsiam", 8
    found = programs.parts(programs.Setting(c, mesh))
    assert "target" not in found and found["online"].start()[0].shape == (4, 4, 16)
    assert found["crops"].start()[1].shape == (4, 2, 16, 16, 3)
    assert [found[name].per_step for name in ("saliency", "gradient", "update")] == [2, 2, 1]


def fake(clock, seconds):
    """A program that takes so many seconds of the given clock; returns it and the list of its runs."""
    runs = []

    def start():
        runs.append(len(runs))
        clock[0] += seconds
        return jnp.zeros(())

    return programs.Program(start, 1, None, None, None), runs


def test_programs_are_timed_in_turns(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(programs.time, "perf_counter", lambda: clock[0])
    (a, _), (b, _) = fake(clock, 0.25), fake(clock, 0.5)
    a = a._replace(start=lambda start=a.start: (order.append("a"), start())[1])
    b = b._replace(start=lambda start=b.start: (order.append("b"), start())[1])
    found = programs.measure({"a": a, "b": b}, 3)
    assert found == {"a": [0.25] * 3, "b": [0.5] * 3}
    assert "".join(order) == "aabb" + "ab" * 3  # warm-up, then in turns
    monkeypatch.setattr(programs.jax, "default_backend", lambda: "gpu")
    quick, runs = fake(clock, 0.03)
    assert programs.measure({"quick": quick}, 2)["quick"] == pytest.approx([0.03] * 2)
    assert len(runs) == 2 + 2 * 7  # 0.2 s at a time


def test_figures_by_hand(monkeypatch, setting):
    """Batch 4 on two chips of 1000 operations a second."""
    def of(flops, runs=1):
        return programs.Program(lambda: None, runs, flops, 2 * flops, 7)

    own = {"step": of(800.0), "crops": of(20.0, 2), "online": of(100.0), "target": of(80.0)}
    own |= {"gradient": of(400.0), "update": of(2.0)}
    seconds = {"step": [2.0, 1.0, 3.0], "crops": [0.1, 0.2, 0.3], "online": [0.25] * 3}
    seconds |= {"target": [0.125] * 3, "gradient": [1.0, 1.5, 2.0], "update": [0.5] * 3}
    monkeypatch.setattr(steps, "chip_of", lambda kind: Chip(1000.0, 500.0, 1.0, 1.0))
    found = steps._figures(setting, own, seconds)
    step = found["step"]
    assert step["milliseconds"] == {"median": 2000.0, "min": 1000.0, "max": 3000.0}
    assert step["images_per_second"] == 2.0 and step["flops_per_image"] == 200.0
    assert step["mfu"] == pytest.approx(800 / 2 / 2000)  # images/s x operations an image / (chips x peak)
    assert step["bandwidth_share"] == pytest.approx(1600 / 2 / 1000) and step["memory"] == 7
    assert list(found["parts"]) == ["crops", "online", "target", "backward", "update"]
    crops, backward = found["parts"]["crops"], found["parts"]["backward"]
    assert crops["milliseconds"]["median"] == pytest.approx(400) and crops["flops_per_image"] == 10.0
    assert backward["milliseconds"] == pytest.approx({"median": 1125.0, "min": 625.0, "max": 1625.0})
    assert backward["flops_per_image"] == 55.0
    total = 400 + 250 + 125 + 1125 + 500
    assert found["sum_of_parts"] == pytest.approx({"milliseconds": total, "over_step": total / 2000})


def test_the_report_of_both_modes(monkeypatch):
    """Ratio of each round; the batch with the highest rate; sizes that do not fit."""
    def timed(settings, rounds, parts, notes):
        taken = {"guided": [2.0, 4.0, 2.0], "plain": [1.0, 3.0, 1.8]}
        own = {"step": programs.Program(lambda: None, 1, 40.0, None, None)}
        return {name: (own, {"step": taken[name]}) for name in settings}

    def rate(config, mesh, rounds):
        size = config.batch_size
        if size == 64:
            return {"batch_size": size, "images_per_second": None, "why": "out of memory"}
        return {"batch_size": size, "images_per_second": {16: 5.0, 32: 4.0}[size]}

    monkeypatch.setattr(steps, "_time", timed)
    monkeypatch.setattr(steps, "_images_per_second", rate)
    monkeypatch.setattr(waiting, "measure", lambda setting: (None, "no photos"))
    report = steps.run(scenes(), batches=(16, 32, 64), rounds=3)
    assert report["batch_size"] == 16 and list(report["modes"]) == ["guided", "plain"]
    assert report["guided_over_plain"] == pytest.approx({"median": 0.75, "min": 0.5, "max": 0.9})
    assert "mfu" not in report["modes"]["plain"]["step"]
    assert len(report["notes"]) == 2 and "'cpu'" in report["notes"][0] and report["notes"][1] == "no photos"
    text = steps.text(report)
    assert "batch 64: out of memory" in text and "0.750 (0.500 .. 0.900)" in text
    assert "note: no photos" in text
    with pytest.raises(config_lib.ConfigError, match="none fits"):
        steps.run(scenes(), batches=(64,))
    plain = scenes("smoke,byol")
    plain.weights.mode = "none"
    assert list(steps._modes(plain)) == ["plain"]


@pytest.mark.parametrize("message, kept", [("RESOURCE_EXHAUSTED: 5 GiB", True), ("INTERNAL: broken", False)])
def test_only_a_lack_of_memory_is_taken_for_one(monkeypatch, mesh, message, kept):
    def fail(setting):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(programs, "whole_step", fail)
    if not kept:
        with pytest.raises(jax.errors.JaxRuntimeError):
            steps._images_per_second(scenes(), mesh, 1)
        return
    row = steps._images_per_second(scenes(), mesh, 1)
    assert row == {"batch_size": 4, "images_per_second": None, "why": "out of memory"}


def test_the_wait_for_data(monkeypatch, setting):
    """Input that takes as long as three steps makes the loop wait three quarters of its time."""
    clock = [0.0]
    monkeypatch.setattr(waiting.time, "perf_counter", lambda: clock[0])
    batch = setting.batch()

    def step(state, batch):
        clock[0] += 0.5
        return state, state

    monkeypatch.setattr(setting, "step", step)
    monkeypatch.setattr(setting, "state", lambda: jnp.zeros(()))

    def batches():
        while True:
            clock[0] += 1.5
            yield batch

    found = waiting._loop(setting, batches())
    assert found["share"] == pytest.approx(0.75) and found["steps"] == 16  # of 30 s
    assert found["images_per_second"] == pytest.approx(4 / 2.0)


def test_photos_that_are_not_there_are_a_note(setting):
    config = scenes()
    config.data.train.kind, config.data.train.roots = "folder", ("/nonexistent",)
    found, note = waiting.measure(programs.Setting(config, setting.mesh))
    assert found is None and "/nonexistent" in note and "\n" not in note
