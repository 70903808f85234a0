import jax
import jax.numpy as jnp
import pytest

from jaxgpt.tools import traffic

TPU = """HloModule example

%fused (param_0.1: f32[1000,128], param_1.1: s32[8]) -> f32[8,128] {
  %param_0.1 = f32[1000,128]{1,0:T(8,128)} parameter(0)
  %param_1.1 = s32[8]{0:T(128)} parameter(1)
  ROOT %gather.1 = f32[8,128]{1,0:T(8,128)} gather(%param_0.1, %param_1.1), offset_dims={1}
}

%body (arg: (s32[], f32[64,128])) -> (s32[], f32[64,128]) {
  %arg = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}) parameter(0)
  %element = f32[64,128]{1,0:T(8,128)} get-tuple-element(%arg), index=1
  %count = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %twice = f32[64,128]{1,0:T(8,128)} add(%element, %element)
  ROOT %result = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}) tuple(%count, %twice)
}

%condition (arg.1: (s32[], f32[64,128])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}) parameter(0)
  %limit = s32[]{:T(128)} constant(15)
  %i = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main (table: f32[1000,128], rows: s32[8]) -> f32[64,128] {
  %table = f32[1000,128]{1,0:T(8,128)} parameter(0)
  %rows = s32[8]{0:T(128)} parameter(1)
  %weights = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(2)
  %start = (bf16[64,128]{1,0:T(8,128)(2,1)S(1)}, bf16[64,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%weights)
  %done = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%start)
  %wide = f32[64,128]{1,0:T(8,128)} convert(%done)
  %picked = f32[8,128]{1,0:T(8,128)} fusion(%table, %rows), kind=kCustom, calls=%fused
  %zero = s32[]{:T(128)} constant(0)
  %tuple = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}) tuple(%zero, %wide)
  %loop = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}) while(%tuple), condition=%condition, body=%body
  ROOT %out = f32[64,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_loops_count_each_time_chip_memory_never_and_gathers_what_they_pick():
    row = 128 * 4
    fetched = 64 * 128 * 2  # read from memory once; what it becomes on the chip is free
    widened = 64 * row
    picked = 8 * row + 8 * row + 8 * 4
    loop = 15 * 3 * 64 * row
    compared = 15 * 0  # the condition's scalars are not looked at
    assert traffic.bytes_moved(TPU) == fetched + widened + picked + loop + compared


def test_without_loops_it_is_what_xla_counts():
    compiled = jax.jit(lambda x, w: jnp.tanh(x @ w).sum()).lower(jnp.zeros((512, 256)), jnp.zeros((256, 128))).compile()
    assert traffic.bytes_moved(compiled.as_text()) == pytest.approx(
        compiled.cost_analysis()["bytes accessed"], rel=0.01
    )


def test_a_scan_moves_as_much_as_its_steps():
    def scan(x, w):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, length=7)[0]

    text = jax.jit(scan).lower(jnp.zeros((256, 256)), jnp.zeros((256, 256))).compile().as_text()
    # the matmul reads two and writes one matrix, tanh reads and writes one; copies in and out
    assert traffic.bytes_moved(text) == pytest.approx(7 * 5 * 256 * 256 * 4, rel=0.1)
