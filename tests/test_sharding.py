"""Meshes and transfers on 8 virtual devices, and real processes that meet over jax.distributed."""

import itertools
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

from salcl_jax import cli, sharding
from salcl_jax.data.pipeline import train_batches
from salcl_jax.data.sources import Source

ROOT = Path(__file__).resolve().parents[1]


def start(code: str, *args, devices: int) -> subprocess.Popen:
    """A fresh Python with `devices` virtual CPU devices; the code runs from the repository root."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    env.pop("JAX_NUM_CPU_DEVICES", None)
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen, seconds: float = 60) -> str:
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert process.returncode == 0, err[-3000:]
    return out


def test_to_device_and_prefetch_on_eight_devices():
    out = finish(start("""
        import jax, numpy as np
        from salcl_jax import sharding as s
        mesh = s.make_mesh()
        assert mesh.size == 8 and mesh.axis_names == ("data",)
        assert all(t == jax.sharding.AxisType.Auto for t in mesh.axis_types)
        assert s.make_mesh(jax.devices()[:4]).size == 4
        host = {"image": np.arange(16 * 3, dtype=np.uint8).reshape(16, 3),
                "id": np.arange(16, dtype=np.int32)}
        with jax.transfer_guard("disallow"):
            batch = s.to_device(host, mesh)
        for name, leaf in batch.items():
            assert leaf.sharding == s.data_sharded(mesh) and leaf.dtype == host[name].dtype
            assert np.array_equal(leaf, host[name])
        for shard in batch["id"].addressable_shards:
            i = list(mesh.devices).index(shard.device)
            assert np.array_equal(shard.data, host["id"][2 * i : 2 * i + 2])
        pulled = []
        def source():
            for i in range(5):
                pulled.append(i)
                yield {"id": np.full(8, i, np.int32)}
        seen = []
        for batch in s.prefetch_to_device(source(), mesh, depth=2):
            seen.append(int(batch["id"][0]))
            assert len(pulled) == min(seen[-1] + 2, 5), (seen, pulled)
        assert seen == [0, 1, 2, 3, 4]
        # a batch-by-batch product, refused by explicit axes, is what a contrastive loss needs
        z = jax.device_put(np.eye(8, dtype=np.float32), s.data_sharded(mesh))
        assert np.array_equal(jax.jit(lambda z: z @ z.T)(z), np.eye(8))
        print("passed")
        """, devices=8))  # fmt: skip
    assert out.strip() == "passed"


def test_uneven_batches_are_refused():
    mesh = sharding.make_mesh()
    n = mesh.size
    with pytest.raises(ValueError, match=r"batch\['x'\] has shape \(\)"):
        sharding.to_device({"x": np.array(1)}, mesh)
    if n > 1:
        with pytest.raises(ValueError, match="must divide over the"):
            sharding.to_device({"x": np.zeros((n + 1, 2))}, mesh)


def test_prefetch_passes_errors_on_and_refuses_depth_zero():
    def source():
        yield {"x": np.zeros((jax.device_count(), 2), np.float32)}
        raise OSError("disk gone")

    batches = sharding.prefetch_to_device(source(), sharding.make_mesh(), depth=1)
    next(batches)
    with pytest.raises(OSError, match="disk gone"):
        next(batches)
    with pytest.raises(ValueError, match="prefetch depth is 0"):
        next(sharding.prefetch_to_device([], sharding.make_mesh(), depth=0))


@pytest.mark.parametrize("mode", ["", "all", "host,2,0", "host:1,2,2", "host:1,2", "host:1,a,0"])
def test_unknown_mode_is_refused(mode):
    with pytest.raises(ValueError, match="use 'none', 'auto' or 'host:port,n,i'"):
        sharding.initialize_distributed(mode)


def test_none_and_auto_outside_a_cluster_are_one_process(capsys):
    sharding.initialize_distributed("none")
    sharding.initialize_distributed("auto", timeout=5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[-1] and lines[0].startswith("process 0 of 1: ")


TWO_PROCESSES = """
    import os, signal, sys, time
    import jax, jax.numpy as jnp, numpy as np
    from salcl_jax import sharding as s
    port, index, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    s.initialize_distributed(f"127.0.0.1:{port},2,{index}", timeout=30)
    from salcl_jax.checkpoint import Checkpointer, abstract_like, load_params
    from salcl_jax.types import TrainState

    mesh = s.make_mesh()
    assert mesh.size == 4
    assert np.array_equal(s.share_of_process({"x": np.arange(8)})["x"], np.arange(4) + 4 * index)
    host = {"x": np.arange(4, dtype=np.float32) + 4 * index}
    batch = s.to_device(host, mesh)
    assert batch["x"].shape == (8,)
    mean = jax.jit(jnp.mean, out_shardings=s.replicated(mesh))(batch["x"])
    assert float(mean) == 3.5, mean

    def make(x):
        kernel = jnp.arange(600.0).reshape(20, 30) / 7 + x.mean()
        params = {"encoder": {"kernel": kernel}}
        return TrainState(
            step=jnp.int32(5), failed=jnp.int32(0), params=params,
            target_params=jax.tree.map(jnp.copy, params),
            batch_stats={}, target_batch_stats={}, opt_state={},
        )

    state = jax.jit(make, out_shardings=s.replicated(mesh))(batch["x"])
    expected = np.asarray(state.params["encoder"]["kernel"]).tobytes()
    abstract = abstract_like(state, s.replicated(mesh))

    def run():
        return Checkpointer(folder, every_steps=10**6, keep=3)

    with run() as saver:
        assert saver.save(1, state, {"seed": 1}, force=True)
        assert saver.save(2, state, {"seed": 2}, force=True)
    if index == 0:  # both processes must fall back to the same step
        victim = max((f for d, _, fs in os.walk(f"{folder}/2") for f in (f"{d}/{x}" for x in fs)),
                     key=os.path.getsize)
        with open(victim, "r+b") as file:
            file.seek(os.path.getsize(victim) // 2)
            file.write(bytes(8))
    jax.experimental.multihost_utils.sync_global_devices("damaged")
    with run() as saver:
        restored, extra, step = saver.restore(abstract)
        assert (step, extra) == (1, {"seed": 1}), (step, extra)
        kernel = restored.params["encoder"]["kernel"]
        assert kernel.sharding.is_equivalent_to(s.replicated(mesh), 2)
        assert np.asarray(kernel).tobytes() == expected
        for step in range(2, 200):  # only one process is told to end; both save the same step
            if index == 1 and step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            told = saver.reached_preemption(step)
            assert saver.save(step, restored, {}) == told
            if told:
                break
            time.sleep(0.05)
    assert load_params(folder)["params"]["encoder"]["kernel"].tobytes() == expected
    print("ended at", step)
    jax.distributed.shutdown()
"""


def test_two_processes_share_batches_checkpoints_and_preemption(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [start(TWO_PROCESSES, port, i, tmp_path / "run", devices=2) for i in range(2)]
    try:
        outputs = [finish(p, 90) for p in processes]
    finally:
        for process in processes:
            process.kill()
    for i, out in enumerate(outputs):
        assert f"process {i} of 2: 2 of 4 cpu devices" in out
    ends = [out.splitlines()[-1] for out in outputs]
    assert ends[0] == ends[1] and ends[0].startswith("ended at ")
    step = ends[0].split()[-1]
    assert int(step) < 199
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"1", step, "damaged-2"}


def test_device_batches_stay_as_they_are_while_host_memory_is_used_again():
    """The input pipeline fills the arrays of earlier batches anew; on a CPU the device may share them."""
    images = np.random.default_rng(0).integers(0, 256, (64, 48, 48, 3), np.uint8)
    source = Source("memory", "arrays", (), len(images), lambda i: {"image": images[i]})
    options = {"batch_size": 16, "canvas": 48, "seed": 0, "workers": 2, "prefetch": 1, "use_tf": False}
    mesh = sharding.make_mesh()
    found = itertools.islice(sharding.prefetch_to_device(train_batches(source, **options), mesh), 12)
    kept = list(found)  # no numpy array is held here
    for batch in kept:
        np.testing.assert_array_equal(batch["image"], images[np.asarray(batch["id"])])


def test_a_start_without_the_others_may_be_tried_again(monkeypatch, capsys):
    def nobody(**options):
        raise RuntimeError("DEADLINE_EXCEEDED: nobody there\nstack")

    monkeypatch.setattr(jax.distributed, "initialize", nobody)
    with pytest.raises(SystemExit) as left:
        cli.start("10.0.0.1:1234,2,1")
    lines = capsys.readouterr().err.splitlines()
    assert left.value.code == 75 and len(lines) == 1
    assert lines[0].startswith("stopped: distributed start '10.0.0.1:1234,2,1' failed (DEADLINE_EXCEEDED: ")
    with pytest.raises(SystemExit) as left:
        cli.start("10.0.0.1:1234,2,2")
    assert left.value.code == 2
