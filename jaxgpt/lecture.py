"""The lecture's path to self-attention: three ways to average a token's past, each one closer to attention.

B batch, T time, C channels, as in model.py. `average_softmax` is attention once its scores depend on the data.
"""

import chex
import jax
import jax.numpy as jnp


def average_loop(x: jax.Array) -> jax.Array:
    """Average each position with all positions before it, in a plain loop.

    Args:
        x: (B, T, C) float.

    Returns:
        (B, T, C) in x's dtype; position t holds the mean of positions 0 to t.

    Source: Karpathy, "Let's build GPT", the mathematical trick in self-attention, version 1.
    """
    chex.assert_rank(x, 3)
    chex.assert_type(x, float)
    T = x.shape[1]
    means = []
    for t in range(T):
        past = x[:, : t + 1]  # (B, t + 1, C)
        means.append(past.mean(axis=1))
    return jnp.stack(means, axis=1)


def average_matmul(x: jax.Array) -> jax.Array:
    """Compute the same means as one matrix product: row t of a normalized lower triangle of ones averages the past.

    Args:
        x: (B, T, C) float.

    Returns:
        (B, T, C) in x's dtype.

    Source: Karpathy, "Let's build GPT", the mathematical trick in self-attention, version 2.
    """
    chex.assert_rank(x, 3)
    chex.assert_type(x, float)
    T = x.shape[1]
    weights = jnp.tril(jnp.ones((T, T), x.dtype))
    weights = weights / weights.sum(axis=1, keepdims=True)
    return weights @ x  # (T, T) @ (B, T, C): every sequence in the batch has the same weights


def average_softmax(x: jax.Array, scores: jax.Array | None = None) -> jax.Array:
    """Average the past with softmax weights, which need not be equal.

    Args:
        x: (B, T, C) float.
        scores: (T, T) or (B, T, T) float, the affinity of row t for column s; the default, zeros, gives equal weights.

    Returns:
        (B, T, C) in x's dtype.

    Source: Karpathy, "Let's build GPT", the mathematical trick in self-attention, version 3.
    """
    chex.assert_rank(x, 3)
    chex.assert_type(x, float)
    T = x.shape[1]
    scores = jnp.zeros((T, T), x.dtype) if scores is None else scores
    chex.assert_rank(scores, {2, 3})
    chex.assert_shape(scores, (..., T, T))
    return causal_weights(scores).astype(x.dtype) @ x


def causal_weights(scores: jax.Array) -> jax.Array:
    """Take the softmax over each row's past; the future gets a score of minus infinity, hence a weight of zero.

    Args:
        scores: (..., T, T) float.

    Returns:
        (..., T, T) in the same dtype, zero above the diagonal; each row sums to one.
    """
    chex.assert_type(scores, float)
    T = scores.shape[-1]
    chex.assert_shape(scores, (..., T, T))
    past = jnp.tril(jnp.ones((T, T), bool))
    return jax.nn.softmax(jnp.where(past, scores, -jnp.inf), axis=-1)
