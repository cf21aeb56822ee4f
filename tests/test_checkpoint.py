"""Checkpoints: exact round trips, what is kept, and what happens when files are damaged."""

import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from salcl_jax import checkpoint, checkpoint_record, sharding
from salcl_jax.types import TrainState


def make_state(seed: int = 0, width: int = 96) -> TrainState:
    """A state with several dtypes, odd values, an empty node and a real optimizer state.

    Its kernel is large enough for orbax to store it in files of its own, also over 8 devices.
    """
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((64, width)).astype(np.float32)
    kernel[0, :4] = [np.nan, np.inf, -0.0, 1e-42]
    params = {
        "encoder": {"kernel": jnp.asarray(kernel), "half": jnp.arange(5, dtype=jnp.bfloat16) / 3},
        "projector": {"mask": jnp.array([True, False])},
        "predictor": {},
    }
    target = {k: jax.tree.map(jnp.copy, params[k]) for k in ("encoder", "projector")}
    stats = {"encoder": {"mean": jnp.asarray(rng.standard_normal(width), jnp.float32)}}
    opt_state = optax.chain(optax.trace(0.9), optax.scale_by_adam()).init(params)
    state = TrainState(
        step=jnp.int32(seed),
        failed=jnp.int32(0),
        params=params,
        target_params=target,
        batch_stats=stats,
        target_batch_stats=jax.tree.map(jnp.copy, stats),
        opt_state=opt_state,
    )
    return jax.device_put(state, sharding.replicated(sharding.make_mesh()))


def abstract(state):
    return checkpoint.abstract_like(state, sharding.replicated(sharding.make_mesh()))


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def open_run(folder, every=1, keep=3, keep_every=0):
    return checkpoint.Checkpointer(
        str(folder), every_steps=every, keep=keep, keep_every=keep_every, asynchronous=False
    )


@pytest.fixture
def run(tmp_path):
    """Folder of checkpoints 1, 2, 3 made from make_state(1), (2), (3)."""
    with open_run(tmp_path / "checkpoints") as saver:
        for step in (1, 2, 3):
            assert saver.save(step, make_state(step), {"step": step})
    return tmp_path / "checkpoints"


def largest_file(folder: Path) -> Path:
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_round_trip_is_bit_exact_and_survives_donation(tmp_path, asynchronous):
    state = make_state(7)
    expected = jax.tree.map(lambda x: np.array(x, copy=True), state)
    target = abstract(state)
    overwrite = jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s), donate_argnums=0)
    with checkpoint.Checkpointer(
        str(tmp_path), every_steps=5, keep=1, asynchronous=asynchronous
    ) as saver:
        with jax.transfer_guard("disallow"):
            assert saver.save(1, state, {"hash": "ab", "loss": [0.1, 2.5]}, force=True)
        jax.block_until_ready(overwrite(state))
        saver.wait()
        restored, extra, step = saver.restore(target)
    assert step == 1 and extra == {"hash": "ab", "loss": [0.1, 2.5]}
    assert isinstance(restored, TrainState)
    assert_same_bits(restored, expected)
    assert restored.params["encoder"]["kernel"].sharding.is_equivalent_to(target.step.sharding, 2)


def test_nothing_saved_gives_none(tmp_path):
    with open_run(tmp_path) as saver:
        assert saver.latest() is None
        assert saver.restore(abstract(make_state())) is None
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoint.load_params(str(tmp_path))


def test_saves_when_due_and_keeps_the_newest_and_every_nth(tmp_path):
    state = make_state()
    written = []
    with open_run(tmp_path, every=2, keep=2, keep_every=4) as saver:
        for step in range(1, 12):
            assert saver.should_save(step) == (step % 2 == 0)
            if saver.save(step, state, {}, force=step in (1, 11)):
                written.append(step)
        assert not saver.save(11, state, {}, force=True)  # there already
        assert saver.latest() == 11
    assert written == [1, 2, 4, 6, 8, 10, 11]
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [4, 8, 10, 11]


def test_every_steps_zero_saves_only_when_forced(tmp_path):
    with open_run(tmp_path, every=0) as saver:
        assert not saver.save(1, make_state(), {})
        assert saver.save(2, make_state(), {}, force=True)


def flip(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.fault
@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "choose",
    [
        lambda step: largest_file(step / "state" / "ocdbt.process_0"),
        lambda step: step / "extra" / "metadata",
        lambda step: largest_file(step / "state" / "d"),
    ],
    ids=["arrays", "record", "index"],
)
def test_damaged_newest_falls_back_with_one_warning(run, damage, choose, caplog, capfd):
    damage(choose(run / "3"))
    with caplog.at_level(logging.WARNING), open_run(run) as saver:
        restored, extra, step = saver.restore(abstract(make_state()))
        assert saver.latest() == 2
    assert step == 2 and extra == {"step": 2}
    assert_same_bits(restored, make_state(2))
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1 and "\n" not in warnings[0]
    assert "checkpoint 3 is damaged" in warnings[0] and "using 2 instead" in warnings[0]
    assert "Traceback" not in capfd.readouterr().err
    assert (run / "3").exists()


def test_missing_state_folder_falls_back(run):
    shutil.rmtree(run / "3" / "state")
    with open_run(run) as saver:
        assert saver.restore(abstract(make_state()))[2] == 2


def test_run_continues_past_a_damaged_checkpoint(run):
    """The damaged step is kept under another name, its number is free, and it does not count."""
    flip(largest_file(run / "3" / "state" / "ocdbt.process_0"))
    with open_run(run, keep=1) as saver:
        saver.restore(abstract(make_state()))
        assert saver.should_save(3) and saver.save(3, make_state(33), {})
        restored, _, step = saver.restore(abstract(make_state()))
    assert step == 3
    assert_same_bits(restored, make_state(33))
    assert sorted(p.name for p in run.iterdir()) == ["3", "damaged-3"]


def test_none_readable_raises_and_deletes_nothing(run):
    for step in (1, 2, 3):
        truncate(run / str(step) / "extra" / "metadata")
    before = sorted(run.rglob("*"))
    with open_run(run) as saver:
        with pytest.raises(ValueError, match="3, 2, 1 but none can be read") as error:
            saver.restore(abstract(make_state()))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="none can be read"):
        checkpoint.load_params(str(run))
    assert sorted(run.rglob("*")) == before


def with_kernel(tree: TrainState, leaf) -> TrainState:
    encoder = {**tree.params["encoder"], "kernel": leaf}
    return tree._replace(params={**tree.params, "encoder": encoder})


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda a: with_kernel(a, jax.ShapeDtypeStruct((64, 128), jnp.float32)),
            r"params\.encoder\.kernel is float32\[64, 96\] .* and float32\[64, 128\] here",
        ),
        (
            lambda a: with_kernel(a, jax.ShapeDtypeStruct((64, 96), jnp.bfloat16)),
            r"params\.encoder\.kernel is float32\[64, 96\] .* and bfloat16\[64, 96\] here",
        ),
        (
            lambda a: a._replace(batch_stats={}),
            r"batch_stats\.encoder\.mean is float32\[96\] .* and absent here",
        ),
        (
            lambda a: a._replace(opt_state=(*a.opt_state, {"more": a.step})),
            r"opt_state\.2\.more is absent in the checkpoint and int32\[\] here",
        ),
    ],
    ids=["shape", "dtype", "missing", "extra"],
)
def test_another_network_is_refused_in_one_line(run, change, message):
    with open_run(run) as saver:
        with pytest.raises(ValueError, match=message) as error:
            saver.restore(change(abstract(make_state())))
    assert "\n" not in str(error.value)


def test_load_params_from_workdir_folder_and_step(run, caplog):
    three, two = make_state(3), make_state(2)
    for path in (run.parent, run, run / "3"):
        trees = checkpoint.load_params(str(path), abstract(three))
        assert set(trees) == set(checkpoint.MODEL_FIELDS)
        for name, tree in trees.items():
            assert_same_bits(tree, jax.tree.map(np.asarray, getattr(three, name)))
            assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(tree))
    trees = checkpoint.load_params(str(run / "2"))
    assert_same_bits(trees["params"], jax.tree.map(np.asarray, two.params))
    with pytest.raises(ValueError, match=r"params\.encoder\.kernel"):
        checkpoint.load_params(str(run), abstract(make_state(width=16)))

    flip(largest_file(run / "3" / "state" / "ocdbt.process_0"))
    trees = checkpoint.load_params(str(run))
    assert_same_bits(trees["params"], jax.tree.map(np.asarray, two.params))
    assert "using 2 instead" in caplog.text


def test_checksum_notices_any_single_bit():
    """Against the definition in numpy, and for each bit of one element."""
    x = np.random.default_rng(0).standard_normal(37).astype(np.float32)
    weights = 2 * np.arange(37, dtype=np.uint64) + 1
    reference = int((x.view(np.uint32).astype(np.uint64) * weights).sum() % 2**32)
    assert int(checkpoint_record.checksum(x)) == reference
    for bit in range(32):
        y = x.copy()
        y.view(np.uint32)[11] ^= np.uint32(1 << bit)
        assert int(checkpoint_record.checksum(y)) != reference
