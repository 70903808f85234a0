"""The matmul of the linear layers, with a weight gradient that is faster on CPUs.

It gives 1.4x the steps per second of configs/shakespeare_cpu.yaml on one core and 1.7x on two:
`python benchmarks/tricks.py matmul`.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

WIDE = jax.__version_info__ >= (0, 10)  # the CPU backend of jaxlib 0.7 has no bfloat16 matmul with a float32 result
OUTPUT = "matmul"  # remat.py finds the results by this name, because a policy for dots does not see inside a custom VJP


@jax.custom_vjp
def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """Compute `x @ w`.

    Args:
        x: (..., I) floating.
        w: (I, O), same dtype as x.

    Returns:
        (..., O) in the dtype of x.
    """
    return _summed(x, w, ((x.ndim - 1,), (0,)))


def _forward(x, w):
    return matmul(x, w), (x, w)


def _backward(saved, dy):
    x, w = saved
    rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dx = _summed(dy, w, ((dy.ndim - 1,), (1,)))
    return dx, jax.lax.platform_dependent(*rows, cpu=_narrow_first, default=_contract_rows)


def _summed(a, b, axes):
    # For a bfloat16 result, XLA's CPU backend would widen the operands, and lose the 1.1x in speed that they gain.
    wide = jnp.promote_types(a.dtype, jnp.float32) if WIDE else a.dtype
    return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=wide).astype(a.dtype)


def _contract_rows(a, b):
    return _summed(a, b, ((0,), (0,)))


def _narrow_first(x, dy):
    # XLA's CPU backend makes a strided copy of the first operand, with the activation's derivative fused into it, so
    # the narrower operand goes first. The barrier keeps XLA from folding the small transpose back into the matmul.
    if x.shape[1] <= dy.shape[1]:
        return _contract_rows(x, dy)
    return jax.lax.optimization_barrier(_contract_rows(dy, x)).T


matmul.defvjp(_forward, _backward)


def dot_general(x, w, dimension_numbers, precision=None, **_):
    """Adapt `matmul` to the `dot_general` argument of `nnx.Linear`."""
    assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ()))
    return checkpoint_name(matmul(x, w), OUTPUT)
