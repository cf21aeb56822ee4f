"""Collectives and donation in program texts: hand-written ones, and those of programs of known traffic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salcl_jax import hlo, sharding

LOOP = """HloModule jit_f, input_output_alias={ {0}: (0, {}, may-alias), {2}: (5, {}, must-alias) }

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  ROOT %s = f32[] add(%x, %y)
}

%inner (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = bf16[8,4]{1,0:T(8,128)} all-gather(%a), dimensions={0}, metadata={op_name="jit(f)/gather"}
  ROOT %t = (s32[], f32[8]) tuple(%i, %b)
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %r = (f32[2,64]{1,0:T(2,128)S(1)}, f32[3]{0}) all-reduce(%a, %b), to_apply=%add, metadata={op_name="norm"}
  %w = (s32[], f32[8]) while(%t), condition=%cond, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %t = (s32[], f32[8]) tuple(%i, %b)
}

%unused (p: f32[8]) -> f32[8] {
  ROOT %r = f32[8]{0} all-reduce(%p), to_apply=%add
}

ENTRY %main (p0: f32[8], p1: f32[8]) -> (f32[8], f32[8], f32[]) {
  %w = (s32[], f32[8]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %s = (f32[16]{0}, f32[64]{0}) all-gather-start(%p0), dimensions={0}
  %d = f32[64]{0} all-gather-done(%s)
  %q = pred[7]{0} all-to-all(%p), dimensions={0}
  ROOT %o = (f32[8], f32[8], f32[]) tuple(%a, %b, %c)
}
"""


def test_loops_are_counted_by_their_turns_and_async_pairs_once():
    found = {(c.kind, c.count, c.bytes, c.scope) for c in hlo.collectives(LOOP)}
    assert found == {
        ("all-reduce", 3, 4 * (128 + 3), "norm"),
        ("all-gather", 15, 2 * 32, "jit(f)/gather"),
        ("all-gather", 1, 4 * 64, ""),
        ("all-to-all", 1, 7, ""),
    }


def test_totals_by_kind():
    assert hlo.totals(hlo.collectives(LOOP), lambda one: one.kind) == {
        "all-gather": {"count": 16, "bytes": 15 * 64 + 256},
        "all-reduce": {"count": 3, "bytes": 3 * 524},
        "all-to-all": {"count": 1, "bytes": 7},
    }


def test_outputs_that_reuse_an_argument():
    assert hlo.aliased_outputs(LOOP) == {0, 2}
    assert hlo.aliased_outputs("HloModule jit_f, entry_computation_layout={...}\n") == set()


def compiled(f, *args, **options):
    return jax.jit(f, **options).lower(*args).compile().as_text()


def test_programs_with_known_traffic():
    mesh = sharding.make_mesh()
    if mesh.size < 2:
        pytest.skip("one device has nothing to send")
    whole, split = sharding.replicated(mesh), sharding.data_sharded(mesh)
    x = jax.ShapeDtypeStruct((8 * mesh.size, 4), np.float32)

    text = compiled(lambda x: jnp.sum(x, axis=0), x, in_shardings=split, out_shardings=whole)
    assert hlo.totals(hlo.collectives(text), lambda c: c.kind) == {"all-reduce": {"count": 1, "bytes": 16}}
    text = compiled(lambda x: x * 2, x, in_shardings=split, out_shardings=whole)
    found = hlo.totals(hlo.collectives(text), lambda c: c.kind)
    assert found == {"all-gather": {"count": 1, "bytes": 8 * mesh.size * 16}}
    text = compiled(lambda x: x * 2, x, in_shardings=split, out_shardings=split)
    assert hlo.collectives(text) == []


def test_a_loop_of_a_real_program():
    mesh = sharding.make_mesh()
    if mesh.size < 2:
        pytest.skip("one device has nothing to send")

    def f(x):
        def body(total, row):
            return total + jnp.sum(jax.nn.relu(row + total)), None

        return jax.lax.scan(body, jnp.zeros(()), x)[0]

    x = jax.ShapeDtypeStruct((6, mesh.size), np.float32)
    places = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    text = compiled(f, x, in_shardings=places, out_shardings=sharding.replicated(mesh))
    assert hlo.totals(hlo.collectives(text), lambda c: c.kind)["all-reduce"] == {"count": 6, "bytes": 24}


def test_donation_of_a_real_program():
    def f(state, x):
        return {"a": state["a"] + x, "b": jnp.sum(state["b"])}  # b changes its shape: it cannot be reused

    state = {"a": jax.ShapeDtypeStruct((4,), np.float32), "b": jax.ShapeDtypeStruct((3,), np.float32)}
    with pytest.warns(UserWarning, match="donated"):
        text = compiled(f, state, jax.ShapeDtypeStruct((4,), np.float32), donate_argnums=0)
    assert hlo.aliased_outputs(text) == {0}
