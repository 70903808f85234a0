"""The matmul of the linear layers, with a weight gradient that is faster on CPUs and summed in float32 everywhere.

The weights may be float32 while the activations are bfloat16: they are rounded for the product, and their gradient, a
sum over tokens and devices, is not. The form for CPUs gives 1.4x the steps per second of configs/shakespeare_cpu.yaml
on one core and 1.7x on two: `python benchmarks/tricks.py matmul`.
"""

import functools
import re

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

WIDE = jax.__version_info__ >= (0, 10)  # before, XLA's CPU backend has no bfloat16 matmul with a float32 result
OUTPUT = "matmul"  # remat.py finds the results by this name, because a policy for dots does not see inside a custom VJP


@jax.custom_vjp
def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """Compute `x @ w`.

    Args:
        x: (..., I) floating.
        w: (I, O) floating; rounded to the dtype of x.

    Returns:
        (..., O) in the dtype of x.
    """
    return _summed(x, w.astype(x.dtype), ((x.ndim - 1,), (0,)), x.dtype)


def _forward(x, w):
    return matmul(x, w), (x, w)


def _backward(saved, dy):
    x, w = saved
    rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dx = _summed(dy, w.astype(dy.dtype), ((dy.ndim - 1,), (1,)), dy.dtype)
    sums = (functools.partial(way, out=w.dtype) for way in (_narrow_first, _contract_rows))
    return dx, jax.lax.platform_dependent(*rows, cpu=next(sums), default=next(sums))


def _summed(a, b, axes, out):
    # For a bfloat16 result, XLA's CPU backend would widen the operands, and lose the 1.1x in speed that they gain.
    return _wide(functools.partial(jax.lax.dot_general, dimension_numbers=(axes, ((), ()))), a, b).astype(out)


def _wide(product, a, b):
    """A product whose sums, and whose result, are float32 or wider."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    direct = functools.partial(product, preferred_element_type=wide)
    if WIDE or a.dtype == wide:
        return direct(a, b)
    return jax.lax.platform_dependent(a, b, cpu=lambda a, b: product(a.astype(wide), b.astype(wide)), default=direct)


def _contract_rows(a, b, out):
    return _summed(a, b, ((0,), (0,)), out)


def _narrow_first(x, dy, out):
    # XLA's CPU backend makes a strided copy of the first operand, with the activation's derivative fused into it, so
    # the narrower operand goes first. The barrier keeps XLA from folding the small transpose back into the matmul.
    if x.shape[1] <= dy.shape[1]:
        return _contract_rows(x, dy, out)
    return jax.lax.optimization_barrier(_contract_rows(dy, x, out)).T


matmul.defvjp(_forward, _backward)


def named_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """`matmul`, with a name by which rematerialisation finds its result."""
    return checkpoint_name(matmul(x, w), OUTPUT)


def project(letters: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """Compute the einsum of activations and a matrix as float32; the head's product.

    Args:
        letters: such as `btc,cv->btv`.
        x: activations, floating.
        w: the matrix; rounded to the dtype of x, its gradient is summed in float32.

    Returns:
        float32.
    """
    return _wide(functools.partial(jnp.einsum, letters), x, w) if w.dtype == x.dtype else _project(letters, x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(letters, x, w):
    return _wide(functools.partial(jnp.einsum, letters), x, w.astype(x.dtype))


def _project_backward(letters, saved, dy):
    (x, w), (first, second, result) = saved, re.split(",|->", letters)
    dy = dy.astype(x.dtype)  # a product of two bfloat16 operands, as forward, is many times as fast
    dx = _wide(functools.partial(jnp.einsum, f"{result},{second}->{first}"), dy, w.astype(x.dtype))
    dw = _wide(functools.partial(jnp.einsum, f"{first},{result}->{second}"), x, dy)
    return dx.astype(x.dtype), dw.astype(w.dtype)


_project.defvjp(lambda letters, x, w: (_project(letters, x, w), (x, w)), _project_backward)
