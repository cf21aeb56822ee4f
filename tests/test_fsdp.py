"""Parameters, target and optimizer in parts: the same training as with copies, in less memory."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salcl_jax import checkpoint, sharding
from salcl_jax.types import TrainState

ROOT = Path(__file__).resolve().parents[1]


def make_state() -> TrainState:
    """Leaves whose sides divide by 8, by 4 only, and not at all."""
    rng = np.random.default_rng(0)
    shapes = {"tall": (64, 16), "wide": (3, 3, 16, 64), "even": (32, 32), "four": (12, 30), "odd": (31, 33)}
    leaves = {n: jnp.asarray(rng.standard_normal(shape), jnp.float32) for n, shape in shapes.items()}
    half = {"small": jnp.arange(8, dtype=jnp.bfloat16)}
    step, stats = jnp.int32(3), {"mean": jnp.zeros((4096,))}
    return TrainState(step, step, leaves | half, leaves, stats, stats, (leaves, {"count": step}))


def places(state, devices, params="fsdp", min_size=300):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    return sharding.state_sharding(state, mesh, params=params, min_size=min_size)


def parts(tree):
    """Shape of each leaf's part on one device."""
    return jax.tree.map(lambda x: x.addressable_shards[0].data.shape, tree)


def test_large_leaves_are_split_along_their_largest_side_that_divides():
    state = make_state()
    eight = {"tall": (8, 16), "wide": (3, 3, 16, 8), "even": (4, 32), "four": (12, 30), "odd": (31, 33)}
    placed = jax.device_put(state, places(state, 8))
    assert parts(placed.params) == eight | {"small": (8,)}
    assert parts(placed.target_params) == eight and parts(placed.opt_state) == (eight, {"count": ()})
    assert parts(placed.batch_stats) == parts(placed.target_batch_stats) == {"mean": (4096,)}
    assert parts(placed.step) == ()
    four = eight | {"tall": (16, 16), "wide": (3, 3, 16, 16), "even": (8, 32), "four": (3, 30)}
    assert parts(jax.device_put(state, places(state, 4)).target_params) == four
    large = places(state, 8, min_size=1025).params
    assert {n for n, s in large.items() if not s.is_fully_replicated} == {"wide"}
    everything = jax.tree.leaves(places(state, 8, params="replicated"))
    assert all(s.is_fully_replicated for s in everything) and len(everything) == len(jax.tree.leaves(state))


def test_abstract_states_have_the_same_places():
    found, expected = places(jax.eval_shape(make_state), 8), places(make_state(), 8)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert jax.tree.leaves(found) == jax.tree.leaves(expected)


@pytest.mark.parametrize("before, after", [((8, "replicated"), (4, "fsdp")), ((8, "fsdp"), (4, "fsdp")),
                                           ((4, "fsdp"), (8, "replicated"))])  # fmt: skip
def test_a_checkpoint_is_restored_in_any_other_layout(tmp_path, before, after):
    state = make_state()
    old, new = places(state, *before), places(state, *after)
    how = {"every_steps": 1, "keep": 1, "asynchronous": False}
    with checkpoint.Checkpointer(str(tmp_path), **how) as saver:
        assert saver.save(1, jax.device_put(state, old), {})
    with checkpoint.Checkpointer(str(tmp_path), **how) as saver:
        restored, _, step = saver.restore(checkpoint.abstract_like(state, new))
    assert step == 1
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), restored, new)
    assert all(jax.tree.leaves(same))
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load_params(str(tmp_path))["params"], state.params)


PREPARE = """
    import contextlib, sys
    import jax, numpy as np
    sys.modules["tensorflow"] = None
    from configs import scenes
    from salcl_jax import config as lib, sharding, train
    from salcl_jax.models.network import build
    from salcl_jax.train_step import make_init, make_train_step
    from runs import SMALL

    def configure(kind, **fields):
        c = scenes.get_config("smoke")
        c.update_from_flattened_dict(SMALL | {"batch_size": 8, "eval.batch_size": 8, "eval.linear": False})
        c.update_from_flattened_dict({"sharding.params": kind, "sharding.min_size": 64, "log.every": 1})
        c.update_from_flattened_dict(fields)
        return c
"""
STEPS = """
    rng = np.random.default_rng(0)
    batch = {"image": rng.integers(0, 256, (8, 48, 48, 3)).astype(np.uint8),
             "aspect": np.ones(8, np.float32), "skipped": np.zeros(8, np.int32)}
    mesh, found, size = sharding.make_mesh(), {}, {}
    for kind in ("replicated", "fsdp"):
        c = lib.finish(configure(kind, **{"accumulate": int(sys.argv[1])}), devices=8, images=64)
        network = build(**c.model)
        init = make_init(network, c)
        where = sharding.state_sharding(jax.eval_shape(init), mesh, **c.sharding)
        state, losses = jax.jit(init, out_shardings=where)(), []
        placed = sharding.to_device(batch, mesh)
        step = sharding.jit_step(make_train_step(network, c), where, mesh).lower(state, placed).compile()
        for _ in range(3):
            before = state
            state, measured = step(state, placed)
            losses.append([float(measured[name]) for name in ("loss", "grad_norm", "spread")])
            assert all(x.is_deleted() for x in jax.tree.leaves(before.opt_state)), "not donated"
        found[kind] = np.array(losses), jax.device_get(state)
        size[kind] = step.memory_analysis()
        if kind == "fsdp":
            for name in ("params", "target_params", "opt_state"):
                leaves = jax.tree.leaves(getattr(state, name))
                whole = sum(x.nbytes for x in leaves)
                held = sum(x.addressable_shards[0].data.nbytes for x in leaves)
                assert held < 0.2 * whole, (name, held, whole)
    (losses, state), (expected, copies) = found["fsdp"], found["replicated"]
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-2, atol=1e-4), state, copies)
    for what in ("argument", "output"):
        one, other = (getattr(size[kind], f"{what}_size_in_bytes") for kind in ("fsdp", "replicated"))
        assert one < 0.3 * other, (what, one, other)
    print("passed")
"""
RESUME = """
    import json, pathlib

    def run(workdir, kind, devices, stop=None, **fields):
        '''Metrics of the run in the workdir after training it to its end, or to the step `stop`.'''
        @contextlib.contextmanager
        def watch():
            def told():
                metrics = pathlib.Path(workdir) / "metrics.jsonl"
                step = len(metrics.read_text().splitlines()) - 1 if metrics.exists() else 0
                return stop is not None and step >= stop
            yield told
        train.watch_for_termination = watch
        train.sharding.make_mesh = lambda: jax.sharding.Mesh(
            np.array(jax.devices()[:devices]), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        try:
            train.train(configure(kind, **fields), str(workdir))
            assert stop is None
        except train.Stopped as stopped:
            assert stopped.code == 75 and f"saved step {stop};" in str(stopped), stopped
        lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    folder = pathlib.Path(sys.argv[1])
    straight = run(folder / "straight", "replicated", 8)
    run(folder / "moved", "replicated", 8, stop=1)
    run(folder / "moved", "fsdp", 4, stop=3)
    moved = run(folder / "moved", "replicated", 8)
    for kind, found in (("moved", moved), ("fsdp", run(folder / "fsdp", "fsdp", 8))):
        assert [line["step"] for line in found] == [line["step"] for line in straight] == [0, 1, 2, 3, 4, 4]
        for line, expected in zip(found, straight):
            for name in {"train/loss", "train/spread", "eval/pretext/loss"} & expected.keys():
                np.testing.assert_allclose(line[name], expected[name], rtol=5e-3, err_msg=f"{kind} {name}")
    begun = run(folder / "begun", "fsdp", 8, stop=1, init_from=str(folder / "straight"))
    first, *_, last = (line for line in straight if "eval/pretext/loss" in line)
    for name in ("eval/pretext/loss", "eval/pretext/spread"):
        np.testing.assert_allclose(begun[0][name], last[name], rtol=1e-3)
    change = abs(first["eval/pretext/loss"] - last["eval/pretext/loss"])
    assert change > 1e-2, change  # so the agreement above means something
    print("passed")
"""


def in_a_process(code, argument, folder):
    """The code on eight virtual devices, with programs compiled in a hurry and kept in the folder."""
    fast = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    env = os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "XLA_FLAGS": fast, "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "JAX_COMPILATION_CACHE_DIR": str(folder), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }  # fmt: skip
    command = [sys.executable, "-c", textwrap.dedent(PREPARE) + textwrap.dedent(code), str(argument)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("passed")


@pytest.mark.parametrize("accumulate", [1])
def test_three_steps_give_the_same_with_parts_as_with_copies(tmp_path, accumulate):
    in_a_process(STEPS, accumulate, tmp_path / "compiled")


@pytest.mark.slow
def test_a_run_goes_on_in_another_layout_and_on_other_devices(tmp_path):
    in_a_process(RESUME, tmp_path, tmp_path / "compiled")
