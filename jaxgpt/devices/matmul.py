"""The matmul of the linear layers, with a weight gradient that CPUs compute faster.

1.4x the steps a second of configs/shakespeare_cpu.yaml on one core, 1.7x on two: `python benchmarks/tricks.py matmul`.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

WIDE = jax.__version_info__ >= (0, 10)  # the CPU backend of jaxlib 0.7 has no product of bfloat16 into float32
OUTPUT = "matmul"  # remat.py finds the results by this name: a policy for dots does not see through a custom VJP


@jax.custom_vjp
def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x @ w`: (..., I) times (I, O) -> (..., O), any floating dtype."""
    return _summed(x, w, ((x.ndim - 1,), (0,)))


def _forward(x, w):
    return matmul(x, w), (x, w)


def _backward(saved, dy):
    x, w = saved
    rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dx = _summed(dy, w, ((dy.ndim - 1,), (1,)))
    return dx, jax.lax.platform_dependent(*rows, cpu=_narrow_first, default=_contract_rows)


def _summed(a, b, axes):
    # asked for a bfloat16 result, XLA's CPU backend would widen the operands and lose what they gain, 1.1x of a step
    wide = jnp.promote_types(a.dtype, jnp.float32) if WIDE else a.dtype
    return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=wide).astype(a.dtype)


def _contract_rows(a, b):
    return _summed(a, b, ((0,), (0,)))


def _narrow_first(x, dy):
    # XLA's CPU backend copies the first operand of this product with a stride, and the activation's derivative with it:
    # the narrow one should be first. The barrier keeps XLA from folding the small transpose back into the product.
    if x.shape[1] <= dy.shape[1]:
        return _contract_rows(x, dy)
    return jax.lax.optimization_barrier(_contract_rows(dy, x)).T


matmul.defvjp(_forward, _backward)


def dot_general(x, w, dimension_numbers, precision=None, **_):
    """`matmul` where `nnx.Linear` expects a `dot_general`."""
    assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ()))
    return checkpoint_name(matmul(x, w), OUTPUT)
