"""The lecture's way to self-attention: a token averages its past, said three times, each time nearer to attention.

B batch, T time, C channels, as in model.py. `average_softmax` with scores that come from the data is attention.
"""

import chex
import jax
import jax.numpy as jnp


def average_loop(x: jax.Array) -> jax.Array:
    """The mean of each position and everything before it, the way one would say it.

    Args:
        x: (B, T, C) float.

    Returns:
        (B, T, C) of x's dtype; position t holds the mean of positions 0 to t.

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
    """The same means as one matrix product: row t of a lower triangle of ones, divided by its sum, picks the past.

    Args:
        x: (B, T, C) float.

    Returns:
        (B, T, C) of x's dtype.

    Source: Karpathy, "Let's build GPT", the mathematical trick in self-attention, version 2.
    """
    chex.assert_rank(x, 3)
    chex.assert_type(x, float)
    T = x.shape[1]
    weights = jnp.tril(jnp.ones((T, T), x.dtype))
    weights = weights / weights.sum(axis=1, keepdims=True)
    return weights @ x  # (T, T) @ (B, T, C): every sequence of the batch gets the same weights


def average_softmax(x: jax.Array, scores: jax.Array | None = None) -> jax.Array:
    """The same means as a softmax over the past, whose weights need no longer be equal.

    Args:
        x: (B, T, C) float.
        scores: (T, T) or (B, T, T) float, how much row t is interested in column s; zeros by default: in all alike.

    Returns:
        (B, T, C) of x's dtype.

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
    """The softmax of each row's past; the future gets a score of minus infinity, so a weight of zero.

    Args:
        scores: (..., T, T) float.

    Returns:
        (..., T, T) of the same dtype; zero above the diagonal, each row sums to one.
    """
    chex.assert_type(scores, float)
    T = scores.shape[-1]
    chex.assert_shape(scores, (..., T, T))
    past = jnp.tril(jnp.ones((T, T), bool))
    return jax.nn.softmax(jnp.where(past, scores, -jnp.inf), axis=-1)
