"""What is read from compiled programs: on simulated devices against counts by hand, and forms of TPUs and GPUs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from firm_jax.collectives import collective_bytes
from firm_jax.mesh import make_mesh

L, B, D, F = 5, 16, 32, 48  # layers, batch, widths
FOUR = 4  # bytes of a float32


def compiled(function, mesh, *arguments) -> str:
    placed = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for shape, spec in arguments]
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*placed).compile().as_text()


@pytest.fixture(scope="module")
def scanned():
    """A scan over layers whose kernels are split over four of eight devices: each is gathered when it is used."""

    def layers(x, kernels):
        def layer(x, kernel):
            kernel = jax.sharding.reshard(kernel, P(None, None))
            return jnp.tanh(x @ kernel), None

        return jax.lax.scan(layer, x, kernels)[0]

    mesh = make_mesh(data=2, fsdp=4)
    return compiled(layers, mesh, ((B, D), P(("data", "fsdp"))), ((L, D, D), P(None, "fsdp")))


def test_what_a_loop_gathers_counts_as_often_as_it_runs(scanned):
    assert collective_bytes(scanned) == {"all-gather": pytest.approx(L * D * D * FOUR * 3 / 4)}


def test_sums_over_devices():
    def total(x, kernel):
        return jnp.einsum("BD,DF->BF", x, kernel, out_sharding=P("data", None))

    mesh = make_mesh(data=2, fsdp=1, tensor=4)
    text = compiled(total, mesh, ((B, D), P("data", "tensor")), ((D, F), P("tensor", None)))
    assert collective_bytes(text) == {"all-reduce": pytest.approx(2 * 3 / 4 * (B // 2) * F * FOUR)}


def test_a_loop_that_ends_by_its_data_runs_as_often_as_is_said():
    def search(x, kernel):
        def step(carry):
            x, _ = carry
            x = jnp.einsum("BD,DF->BF", x, jax.sharding.reshard(kernel, P(None, None)) * x.sum())
            return x, x.max()

        return jax.lax.while_loop(lambda carry: carry[1] < 3, step, (x, jnp.float32(0)))

    mesh = make_mesh(data=1, fsdp=8)
    text = compiled(search, mesh, ((B, D), P("fsdp")), ((D, D), P("fsdp", None)))
    once, often = (collective_bytes(text, trips)["all-reduce"] for trips in (1, 7))
    assert often == pytest.approx(7 * once) and once > 0


TPU = """\
HloModule jit_step, is_scheduled=true, num_partitions=16

%step.1 (arg: (bf16[8,4], u32[])) -> (bf16[8,4], u32[]) {
  %arg = (bf16[8,4]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) parameter(0)
  %two = u32[]{:T(128)} constant(2)
  %count = u32[]{:T(128)} get-tuple-element(%arg), index=1
  %next = u32[]{:T(128)} add(%count, %two)
  %x = bf16[8,4]{1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=0
  %go = (bf16[8,4]{1,0:T(8,128)(2,1)}, bf16[8,4]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %gone = bf16[8,4]{1,0:T(8,128)(2,1)} collective-permute-done(%go)
  ROOT %result = (bf16[8,4]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) tuple(%gone, /*index=1*/%next)
}

%more.1 (arg.1: (bf16[8,4], u32[])) -> pred[] {
  %eight = u32[]{:T(128)} constant(8)
  %arg.1 = (bf16[8,4]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) parameter(0)
  %count.1 = u32[]{:T(128)} get-tuple-element(%arg.1), index=1
  ROOT %less = pred[]{:T(512)} compare(%count.1, %eight), direction=LT
}

%part.1 (p: bf16[2,4]) -> bf16[32,4] {
  %p = bf16[2,4]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gather.1 = bf16[32,4]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=2, \
replica_groups=mesh['axis_0'=4,'axis_1'=4] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="0"}
}

%part.2 (p.1: bf16[2,4]) -> bf16[32,4] {
  %p.1 = bf16[2,4]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gather.2 = bf16[32,4]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=2, \
replica_groups=mesh['axis_0'=4,'axis_1'=4] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="0"}
}

%all-reduce-scatter.1 (q: f32[64]) -> f32[4] {
  %q = f32[64]{0:T(128)} parameter(0)
  %sum = f32[64]{0:T(128)} all-reduce(%q), channel_id=3, replica_groups=[1,16]<=[16], to_apply=%add
  ROOT %slice = f32[4]{0:T(128)} dynamic-slice(%sum), dynamic_slice_sizes={4}
}

ENTRY %main (a: bf16[8,4], b: bf16[2,4], c: f32[64]) -> f32[4] {
  %a = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[2,4]{1,0:T(8,128)(2,1)} parameter(1)
  %c = f32[64]{0:T(128)} parameter(2)
  %zero = u32[]{:T(128)} constant(0)
  %start = (bf16[8,4]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) tuple(%a, %zero)
  %loop = (bf16[8,4]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) while(%start), condition=%more.1, body=%step.1
  %f.1 = bf16[32,4]{1,0:T(8,128)(2,1)} fusion(%b), kind=kCustom, calls=%part.1
  %f.2 = bf16[32,4]{1,0:T(8,128)(2,1)} fusion(%b), kind=kCustom, calls=%part.2
  ROOT %f.3 = f32[4]{0:T(128)} fusion(%c), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_forms_that_only_the_tpu_compiler_writes():
    found = collective_bytes(TPU, unknown_trips=1000)
    assert found == {
        "collective-permute": 4 * 8 * 4 * 2,  # a loop to eight in steps of two
        "all-gather": pytest.approx(32 * 4 * 2 * 3 / 4),  # one collective, spread over two fusions
        "reduce-scatter": pytest.approx(4 * 4 * 15),
    }


GPU = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%body.1 (arg: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %arg = (s32[], bf16[4,8]{1,0}) parameter(0)
  %a = bf16[4,8]{1,0} get-tuple-element(%arg), index=1
  %one = ((bf16[4,8]{1,0}), bf16[32,8]{1,0}) all-gather-start(%a), channel_id=1, \
replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}
  %two = ((bf16[4,8]{1,0}, f32[2]{0}), (bf16[32,8]{1,0}, f32[16]{0})) all-gather-start(%a, %b), channel_id=2, \
replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}
  %scatter = ((bf16[32,8]{0,1}, bf16[16,8]{0,1}), (bf16[4,8]{0,1}, bf16[2,8]{0,1})) \
reduce-scatter-start(%c, %d), channel_id=3, replica_groups=mesh['axis_0'=8] {'axis_0'}, dimensions={0}, to_apply=%add
  ROOT %result = (s32[], bf16[4,8]{1,0}) tuple(%next, %a)
}

%more.1 (arg.1: (s32[], bf16[4,8])) -> pred[] {
  ROOT %less = pred[] compare(%count, %three), direction=LT
}

ENTRY %main (p: bf16[4,8]) -> f32[6] {
  %loop = (s32[], bf16[4,8]{1,0}) while(%start), condition=%more.1, body=%body.1, \
backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0","step":"1"}}
  %sums = (f32[6]{0}, f32[10]{0}) all-reduce-start(%e, %f), channel_id=4, replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %sum = f32[6]{0} get-tuple-element(%done), index=0
}
"""


def test_forms_that_only_the_gpu_compiler_writes():
    """Several arrays in one collective, and a start that names its operands beside its results."""
    assert collective_bytes(GPU) == {
        "all-gather": pytest.approx(3 * (2 * 32 * 8 * 2 + 16 * 4) * 7 / 8),
        "reduce-scatter": pytest.approx(3 * (4 + 2) * 8 * 2 * 7),
        "all-reduce": pytest.approx((6 + 10) * 4 * 2 * 1 / 2),
    }
