"""Costs of compiled programs, counted in their text, against products counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from automoe_jax.system import hlo, hlo_text

N = 64
PRODUCT = 2 * N**3


def compiled(f, *arguments):
    return jax.jit(f).lower(*arguments).compile()


@pytest.fixture(scope="module")
def square():
    return jnp.ones((N, N))


def test_a_product(square):
    found = hlo.costs(compiled(jnp.matmul, square, square).as_text())
    assert found.flops == PRODUCT
    assert found.memory_bytes == 3 * 4 * N * N
    assert not found.sent
    assert (found.unknown_loops, found.unknown_kernels) == (0, 0)


def test_a_loop_counts_as_often_as_it_runs(square):
    def powers(n):
        return compiled(lambda x: lax.fori_loop(0, n, lambda _, y: jnp.tanh(y @ x), x), square)

    once, often = (hlo.costs(powers(n).as_text()) for n in (1, 10))
    assert once.flops == pytest.approx(PRODUCT, rel=0.05)
    assert often.flops == pytest.approx(10 * once.flops, rel=0.01)
    # XLA's own count, which is why this one exists.
    analysis = powers(10).cost_analysis()
    assert analysis is not None
    assert analysis["flops"] < 2 * once.flops


def test_a_loop_whose_rounds_only_the_caller_knows(square):
    def powers(x, n):
        with jax.named_scope("rounds"):
            return lax.fori_loop(0, n, lambda _, y: jnp.tanh(y @ x), x)

    text = compiled(powers, square, 3).as_text()
    once = hlo.costs(text)
    assert once.unknown_loops == 1
    known = hlo.costs(text, lambda name: 7 if name.endswith("rounds/while") else None)
    assert known.unknown_loops == 0
    assert known.flops == pytest.approx(7 * PRODUCT, rel=0.05)
    assert hlo.costs(text, lambda name: 0).flops < 10


def test_a_fusion_reads_a_slice_and_updates_in_place():
    text = """HloModule m

%read (p: f32[100,64], i: s32[]) -> f32[1,64] {
  %p = f32[100,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %s = f32[1,64]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,64}
}

%write (p: f32[100,64], x: f32[1,64], i: s32[]) -> f32[100,64] {
  %p = f32[100,64]{1,0} parameter(0)
  %x = f32[1,64]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %u = f32[100,64]{1,0} dynamic-update-slice(%p, %x, %i, %zero)
}

ENTRY %main (p: f32[100,64], i: s32[]) -> f32[100,64] {
  %p = f32[100,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = f32[1,64]{1,0} fusion(%p, %i), kind=kLoop, calls=%read
  ROOT %y = f32[100,64]{1,0} fusion(%p, %x, %i), kind=kLoop, calls=%write
}
"""
    # The slice out of the array, its index, the slice; and the slice, its index, the update.
    assert hlo.costs(text).memory_bytes == 2 * (4 * 64 + 4 + 4 * 64)


def test_what_devices_send():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    each = PartitionSpec("data")
    f = jax.shard_map(
        lambda x: lax.psum(x, "data"), mesh=mesh, in_specs=each, out_specs=PartitionSpec()
    )
    found = hlo.costs(compiled(f, jnp.ones((4 * N, N))).as_text())
    assert found.sent == {"all-reduce": 2 * 3 / 4 * 4 * N * N}


def test_a_sum_of_which_each_device_keeps_a_part():
    """A TPU's compiler hides it in a fusion."""
    text = """HloModule m

%fused (p: f32[800,64]) -> f32[100,64] {
  %p = f32[800,64]{1,0} parameter(0)
  %all = f32[800,64]{1,0} all-reduce(%p), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum
  %nth = u32[] partition-id()
  %zero = s32[] constant(0)
  ROOT %part = f32[100,64]{1,0} dynamic-slice(%all, %nth, %zero), dynamic_slice_sizes={100,64}
}

ENTRY %main (p: f32[800,64]) -> f32[100,64] {
  %p = f32[800,64]{1,0} parameter(0)
  ROOT %x = f32[100,64]{1,0} fusion(%p), kind=kCustom, calls=%fused
}
"""
    assert hlo.costs(text).sent == {"reduce-scatter": 7 * 4 * 100 * 64}


def test_what_a_tpu_sends_beside_its_work():
    """The fusions of a loop go on with a gather of the weights that are read after it."""
    gather = 'all-gather(%a), replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="0"}'
    text = f"""HloModule m

%start (a: bf16[100,64]) -> (bf16[100,64], bf16[400,64], u32[]) {{
  %a = bf16[100,64]{{1,0}} parameter(0)
  %all = bf16[400,64]{{1,0}} {gather}
  ROOT %s = (bf16[100,64]{{1,0}}, bf16[400,64]{{1,0}}, u32[]{{:S(2)}}) custom-call(%all), \
custom_call_target="AsyncCollectiveStart"
}}

%work (a: bf16[100,64], b: bf16[400,64], x: f32[8,64]) -> (f32[8,64], bf16[100,64], bf16[400,64]) {{
  %x = f32[8,64]{{1,0}} parameter(2)
  %twice = f32[8,64]{{1,0}} add(%x, %x)
  %a = bf16[100,64]{{1,0}} parameter(0)
  %b = bf16[400,64]{{1,0}} parameter(1)
  %all = bf16[400,64]{{1,0}} {gather}
  ROOT %t = (f32[8,64]{{1,0}}, bf16[100,64]{{1,0}}, bf16[400,64]{{1,0}}) tuple(%twice, %a, %b)
}}

%end (a: bf16[100,64], b: bf16[400,64]) -> bf16[400,64] {{
  %a = bf16[100,64]{{1,0}} parameter(0)
  %b = bf16[400,64]{{1,0}} parameter(1)
  %all = bf16[400,64]{{1,0}} {gather}
  ROOT %c = bf16[400,64]{{1,0}} custom-call(%a, %b, %all), custom_call_target="AsyncCollectiveDone"
}}

ENTRY %main (p: bf16[100,64], x: f32[8,64]) -> bf16[400,64] {{
  %p = bf16[100,64]{{1,0}} parameter(0)
  %x = f32[8,64]{{1,0}} parameter(1)
  %s = (bf16[100,64]{{1,0}}, bf16[400,64]{{1,0}}, u32[]{{:S(2)}}) fusion(%p), kind=kCustom, \
output_to_operand_aliasing={{{{0}}: (0, {{}})}}, calls=%start
  %a = bf16[100,64]{{1,0}} get-tuple-element(%s), index=0
  %b = bf16[400,64]{{1,0}} get-tuple-element(%s), index=1
  %w = (f32[8,64]{{1,0}}, bf16[100,64]{{1,0}}, bf16[400,64]{{1,0}}) fusion(%a, %b, %x), \
kind=kOutput, output_to_operand_aliasing={{{{1}}: (0, {{}}), {{2}}: (1, {{}})}}, calls=%work
  %c = bf16[100,64]{{1,0}} get-tuple-element(%w), index=1
  %d = bf16[400,64]{{1,0}} get-tuple-element(%w), index=2
  ROOT %x2 = bf16[400,64]{{1,0}} fusion(%c, %d), kind=kCustom, calls=%end
}}
""".replace("\\\n", "")
    found = hlo.costs(text)
    assert found.sent == {"all-gather": 3 / 4 * 2 * 400 * 64}
    assert found.memory_bytes == 2 * (100 + 400) * 64 + 2 * 4 * 8 * 64
    assert found.flops == 8 * 64


@pytest.mark.parametrize("groups", ["{{0,1,2,3}}", "[1,4]<=[4]", "{}"])
def test_sums_that_begin_and_end(groups):
    text = f"""HloModule m, is_scheduled=true, num_partitions=4

ENTRY %main (p: f32[800,64]) -> f32[800,64] {{
  %p = f32[800,64]{{1,0}} parameter(0)
  %s = f32[800,64]{{1,0}} all-reduce-start(%p), replica_groups={groups}, to_apply=%sum
  ROOT %x = f32[800,64]{{1,0}} all-reduce-done(%s)
}}
"""
    assert hlo.costs(text).sent == {"all-reduce": 2 * 3 / 4 * 4 * 800 * 64}


def test_convolutions_are_products():
    """As TPUs write products: of a batch, the dimension is a window with as many dilated steps."""
    text = """HloModule m

ENTRY %main (a: f32[8,4,16,32], b: f32[8,4,32,16]) -> f32[8,4,16,16] {
  %a = f32[8,4,16,32]{3,2,1,0} parameter(0)
  %b = f32[8,4,32,16]{3,2,1,0} parameter(1)
  ROOT %c = f32[8,4,16,16]{3,2,1,0} convolution(%a, %b), window={size=8x4 stride=7x3 lhs_dilate=8x4}, dim_labels=01bf_01io->01bf
}
"""  # noqa: E501
    assert hlo.costs(text).flops == 2 * 8 * 4 * 16 * 32 * 16


def test_a_ragged_product_of_a_tpu():
    text = """HloModule m

ENTRY %main (n: s32[3], a: bf16[960,128], b: bf16[3,128,384]) -> f32[960,384] {
  %n = s32[3]{0} parameter(0)
  %a = bf16[960,128]{1,0:T(8,128)S(1)} parameter(1)
  %b = bf16[3,128,384]{2,1,0:T(8,128)} parameter(2)
  ROOT %c = f32[960,384]{1,0:T(8,128)S(1)} custom-call(%n, /*index=1*/%a, %b), custom_call_target="tpu_custom_call", frontend_attributes={ragged_dot_tiling="64,128,384"}
}
"""  # noqa: E501
    found = hlo.costs(text)
    assert found.flops == 2 * 960 * 128 * 384
    # The rows and the result are in the core's own memory.
    assert found.memory_bytes == 4 * 3 + 2 * 3 * 128 * 384
    unknown = hlo.costs(text.replace("ragged_dot_tiling", "something"))
    assert (unknown.flops, unknown.unknown_kernels) == (0, 1)


def test_what_another_core_of_a_tpu_computes():
    """Chips with SparseCores have computations whose end names their thread."""
    text = """HloModule m

%there (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %c = f32[8]{0} copy(%p)
}, execution_thread="sparsecore"

ENTRY %main (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  %s = ((f32[8]{0}), f32[8]{0}) call-start(%q), async_execution_thread="sparsecore", to_apply=%there
  ROOT %d = f32[8]{0} call-done(%s)
}
"""
    assert hlo.costs(text).memory_bytes == 2 * 8 * 4


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="no entry computation"):
        hlo.costs("nothing")


def test_shapes():
    shape = "(f32[2,3]{1,0:T(8,128)}, pred[5], bf16[4]{0:T(256)S(1)}, s32[])"
    assert hlo_text.n_bytes(shape) == 24 + 5 + 4
    assert hlo_text.n_bytes(shape, anywhere=True) == 24 + 5 + 8 + 4
    assert hlo_text.elements(shape) == 6 + 5 + 4 + 1
    assert hlo_text.dimensions("f32[2,3]{1,0}") == (2, 3)
