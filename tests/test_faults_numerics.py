"""Numbers at their worst: images without content, maps without peaks, NaN, batches of one, collapse."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import ROOT
from test_train_step import BATCH, GUIDED, SIDE, assert_same, compile_step, photos, tiny

from salcl_jax import losses
from salcl_jax.config import ConfigError
from salcl_jax.loop import Alarm

pytestmark = [pytest.mark.fault, pytest.mark.xdist_group("numerics")]  # one process: one program
START = {**GUIDED, "guidance.start": 0.0, "guidance.full": 0.0, "pairs.mix.cover": 1.0}
BLANK = {"black": 0, "white": 255, "grey": 128}


@pytest.fixture(scope="module")
def guided():
    """Guidance at full strength from the first step: weights, covering pairs, small crops."""
    return compile_step(tiny(**START))


def finite(tree):
    return all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", BLANK)
def test_images_without_content(guided, name, fault_table):
    """Flat maps: no region is valid, all pairs are random, all small crops dropped; nothing breaks."""
    step, state = guided
    batch = photos() | {"image": np.full((BATCH, SIDE, SIDE, 3), BLANK[name], np.uint8)}
    for _ in range(3):
        state, measured = step(state, batch)
        assert measured["finite"] and finite(state) and finite(measured)
    fault_table(fault=f"only {name} images", happened="random crops, went on", lost_steps=0, exit_code=0)


def test_one_blank_image_among_others(guided):
    step, state = guided
    batch = photos()
    batch["image"][3] = 0
    after, measured = step(state, batch)
    assert measured["finite"] and finite(after) and finite(measured)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_example_that_is_not_finite(guided, value, fault_table):
    """An aspect is all that is not whole numbers: either it changes nothing but the flag, or does no harm."""
    step, state = guided
    good, _ = step(state, photos())
    bad = photos(1)
    bad["aspect"] = bad["aspect"].copy()
    bad["aspect"][2] = value
    after, measured = step(good, bad)
    broken = not measured["finite"]
    if broken:
        assert_same(after._replace(failed=good.failed), good)
        again, _ = step(after, photos(2))  # a healthy batch comes too late: the state to save stays
        assert_same(again._replace(failed=good.failed), good)
    assert broken or finite(after)
    fault_table(fault=f"{value} in one example", happened="stopped before it changed the state" if broken
                else "bounded, went on", lost_steps=0, exit_code=70 if broken else 0)  # fmt: skip


def test_weights_of_nothing_are_even():
    """Scores of zero everywhere: every pair weighs the same, and the mean weight is 1."""
    valid, pairs = jnp.ones((4, 2), bool), ((0, 1), (1, 0))
    for mode in ("product", "geometric", "minimum"):
        for normalize in ("image", "batch"):
            weight = losses.pair_weights(
                jnp.zeros((4, 2)), valid, pairs, mode=mode, temperature=0.5, floor=0.0, normalize=normalize
            )
            np.testing.assert_array_equal(weight, np.ones((4, 2)))


def test_a_batch_of_one_is_refused():
    """Nothing to compare it with. One image a device is fine: see `test_one_device_equals_eight`."""
    with pytest.raises(ConfigError, match="config.batch_size = 1: must be at least 2"):
        tiny(batch_size=1)


def test_a_forced_collapse_raises_the_alarm_in_time(guided, fault_table):
    """Projections that do not depend on the image: the alarm comes after `patience` steps, not earlier."""
    step, state = guided
    flat = jax.tree.map(lambda x: x, state.target_params)
    last = sorted(name for name in flat["projector"] if name.startswith("dense"))[-1]
    flat["projector"][last]["kernel"] = jnp.zeros_like(flat["projector"][last]["kernel"])
    params = {**state.params, "projector": flat["projector"]}
    collapsed = state._replace(params=params, target_params=flat)
    alarm, raised = Alarm(threshold=0.2, patience=5), []
    for seed in range(6):
        _, measured = step(collapsed, photos(seed))
        raised.append(alarm.update(float(measured["spread"])))
    assert raised == [False] * 4 + [True, False]
    fault_table(fault="forced collapse", happened="alarm after `patience` steps", lost_steps=0, exit_code=0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_false_alarm_on_the_demo(tmp_path, fault_table):
    """`make demo` as users run it: its spread stays above the alarm's threshold from the first step on."""
    command = [sys.executable, "-m", "salcl_jax.main", "--config=configs/scenes.py", f"--workdir={tmp_path}"]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    spread = [line["train/spread"] for line in lines if "train/spread" in line]
    assert min(spread) > 0.2 and not any(line.get("alarm/collapse") for line in lines)
    assert "COLLAPSE ALARM" not in done.stderr + done.stdout
    fault_table(fault="the demo", happened=f"no alarm; lowest spread {min(spread):.2f}", exit_code=0)
