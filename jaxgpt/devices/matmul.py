"""The matmul of the linear layers: on CPUs with a faster weight gradient and faster products of one row.

The weights may be float32 while the activations are bfloat16: they are rounded for the product, and their gradient, a
sum over tokens and devices, is not. The form for CPUs gives 1.4x the steps per second of configs/shakespeare_cpu.yaml
on one core and 1.7x on two: `python benchmarks/tricks.py matmul`. A product of one row, with which a model of 10 M
parameters or more writes a single text, is computed as two, one on each core: `python benchmarks/tricks.py one_row`.
"""

import functools
import re

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

WIDE = jax.__version_info__ >= (0, 10)  # before, XLA's CPU backend has no bfloat16 matmul with a float32 result
LARGE = 100_000  # weights; smaller products stay whole, so that models of the lecture's size keep their last bits
PARTS = 2
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
    w = w.astype(x.dtype)
    if x.size == len(w) and w.size >= LARGE and len(w) % PARTS == 0:
        return jax.lax.platform_dependent(x, w, cpu=_in_parts, default=_plain)
    return _plain(x, w)


def _plain(x, w):
    return _summed(x, w, ((x.ndim - 1,), (0,)), x.dtype)


def _in_parts(x, w):
    # XLA's CPU backend computes a product of one row on one core, and a stack of such products on all
    parts = x.reshape(PARTS, -1), w.reshape(PARTS, -1, w.shape[1])
    out = _wide(functools.partial(jnp.einsum, "pi,pio->po"), *parts).sum(0)
    return out.astype(x.dtype).reshape(*x.shape[:-1], -1)


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
