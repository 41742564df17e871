"""Counted FLOPs and collectives, against programs whose figures are known."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lmm_jax.analysis import program
from lmm_jax.sharding import make_mesh

WIDTH, ROWS, LAYERS = 64, 32, 5
FULL = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)
X = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
PRODUCT = 2 * ROWS * WIDTH**2


def layers(x, kernels):
    return jax.lax.scan(lambda x, kernel: (jnp.sin(x @ kernel), None), x, kernels)[0]


def flops(function, *args):
    return program.flops(jax.make_jaxpr(function)(*args).jaxpr)


def test_a_loop_counts_as_often_as_it_turns():
    assert flops(layers, X, FULL) == LAYERS * PRODUCT
    assert flops(jax.jit(layers), X, FULL) == LAYERS * PRODUCT


def test_what_is_computed_again_counts_again():
    def loss(again, x, kernels):
        layer = jax.checkpoint(lambda x, k: (jnp.sin(x @ k), None)) if again else lambda x, k: (jnp.sin(x @ k), None)
        return jax.lax.scan(layer, x, kernels)[0].sum()

    once, twice = (flops(jax.grad(functools.partial(loss, again), argnums=(0, 1)), X, FULL) for again in (False, True))
    assert once == 3 * LAYERS * PRODUCT
    assert twice == 4 * LAYERS * PRODUCT


def test_the_dearest_branch_counts():
    def either(x, kernels):
        return jax.lax.cond(x[0, 0] > 0, lambda: layers(x, kernels), lambda: x @ kernels[0])

    assert flops(either, X, FULL) == LAYERS * PRODUCT


def test_convolutions():
    def patches(pixels, kernel):
        return jax.lax.conv_general_dilated(pixels, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    args = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 16, 16, 3), (4, 4, 3, 8)))
    assert flops(patches, *args) == 2 * 2 * 16 * (4 * 4 * 3) * 8


def test_parts_of_a_mesh_add_up():
    mesh = make_mesh("fsdp=8")
    rows = PartitionSpec("fsdp")
    mapped = jax.shard_map(lambda x, k: x @ k, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows)
    assert flops(mapped, X, jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)) == PRODUCT


def test_bytes_that_wait_for_the_backward_pass():
    def kept(x, kernel):
        return jax.tree.leaves(jax.vjp(lambda kernel: jnp.exp(x @ kernel), kernel)[1])

    jaxpr = jax.make_jaxpr(kept)(X, jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)).jaxpr
    assert program.dependent_bytes(jaxpr, 1) == 4 * ROWS * WIDTH  # exp's result; x and the kernel are there anyway


@pytest.fixture(scope="module")
def compiled():
    """Rows and kernels over eight devices: every turn gathers a kernel, and the sum meets all devices."""
    mesh = make_mesh("fsdp=8")

    def place(x, *axes):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    def loss(x, kernels):
        return layers(x, kernels).sum()

    return jax.jit(loss).lower(place(X, "fsdp"), place(FULL, None, "fsdp")).compile().as_text()


def test_collectives_of_a_compiled_program(compiled):
    found = {c.kind: c for c in program.collectives(compiled)}
    gathered = found["all-gather"]
    assert (gathered.group, gathered.received) == (8, LAYERS * 4 * WIDTH**2 * 7 / 8)
    assert gathered.count == LAYERS
    assert found["all-reduce"].received == 4 * 2 * 7 / 8  # one number


ASYNC = """\
HloModule step

%body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p = (s32[], bf16[8,16]{1,0}) parameter(0)
  %start = (bf16[8,16]{1,0}, bf16[32,16]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %done = bf16[32,16]{1,0} all-gather-done(%start)
  %scatter = f32[2,16]{1,0} reduce-scatter(%y), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add
  %moved = bf16[8,16]{1,0:T(8,128)(2,1)} collective-permute(%z), source_target_pairs={{0,1},{1,0}}
}

%condition (p: (s32[], bf16[8,16])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  %turn = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%turn, %limit), direction=LT
}

ENTRY %main (x: bf16[8,16]) -> bf16[8,16] {
  %loop = (s32[], bf16[8,16]{1,0}) while(%t), condition=%condition, body=%body, metadata={op_name="while"}
  %all = (f32[4]{0}, f32[6]{0}) all-reduce(%a, %b), replica_groups=[1,8]<=[8], to_apply=%add
}
"""


@pytest.mark.parametrize(
    "groups,size",
    [
        ("[2,4]<=[8]", 4),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("mesh['axis_0'=8] {'axis_0':(2)4}", 4),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", 8),
    ],
)
def test_groups(groups, size):
    exchange = f"  ROOT %a = f32[2]{{0}} all-gather(%x), replica_groups={groups}, dimensions={{0}}"
    entry = f"ENTRY %main (x: f32[2]) -> f32[2] {{\n{exchange}\n}}"
    assert [c.group for c in program.collectives(entry)] == [size]


@pytest.mark.parametrize(
    "exchange,expected",
    [
        ("((bf16[2]{0}, f32[4]{0}), (bf16[16]{0}, f32[32]{0})) all-gather-start(%a, %b)", (2 * 16 + 4 * 32) * 7 / 8),
        ("(f32[4]{0}, f8e4m3fn[8]{0}) all-reduce-start(%a, %b)", (16 + 8) * 2 * 7 / 8),
        ("(bf16[16]{0}, bf16[16]{0}, u32[], u32[]) collective-permute-start(%a)", 32),
        ("s4[16]{0} all-to-all(%a)", 8 * 7 / 8),
    ],
)
def test_bytes(exchange, expected):
    groups = ", source_target_pairs={{0,1}}" if "permute" in exchange else ", replica_groups={}"
    text = f"HloModule m, num_partitions=8\n\nENTRY %main (x: f32[2]) -> f32[2] {{\n  %a = {exchange}{groups}\n}}"
    assert [c.received for c in program.collectives(text)] == [expected]


def test_both_branches_count():
    one = "  ROOT %g = f32[8]{0} all-gather(%p), channel_id=NUMBER, replica_groups=[1,8]<=[8]\n}\n"
    text = "".join(f"%{name} (p: f32[1]) -> f32[8] {{\n{one.replace('NUMBER', name[1])}\n" for name in ("b1", "b2"))
    text += (
        "ENTRY %main (x: f32[1]) -> f32[8] {\n  ROOT %c = f32[8]{0} conditional(%i, %x, %x), branch_computations={%b1, %b2}\n}"
    )
    assert [c.count for c in program.collectives(text)] == [2]


def test_forms_that_accelerators_use():
    noted = ASYNC.replace("metadata={op_name", 'backend_config={"known_trip_count":{"n":"3"}}, metadata={op_name')
    assert program.collectives(noted) == program.collectives(ASYNC)
    found = {c.kind: c for c in program.collectives(ASYNC)}
    assert found["all-gather"] == program.Collective("all-gather", 4, 3 * 2 * 32 * 16 * 3 / 4, 3)
    assert found["reduce-scatter"] == program.Collective("reduce-scatter", 4, 3 * 4 * 2 * 16 * 3, 3)
    assert found["collective-permute"] == program.Collective("collective-permute", 2, 3 * 2 * 8 * 16, 3)
    assert found["all-reduce"] == program.Collective("all-reduce", 8, 4 * 10 * 2 * 7 / 8, 1)
