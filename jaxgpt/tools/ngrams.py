"""N-gram language models: baselines for a trained model.

V is the vocabulary. Everything here is NumPy, in float64.
"""

import chex
import numpy as np


def count(tokens: np.ndarray, n: int, vocab_size: int) -> np.ndarray:
    """Count how often each sequence of `n` tokens occurs.

    Args:
        tokens: (N,) integers in [0, vocab_size); N is at least n.
        n: 1 for unigrams, 2 for bigrams, 3 for trigrams; the table has vocab_size**n entries.
        vocab_size: V.

    Returns:
        Counts, (V,) * n int64; the last axis is the last token of the sequence.

    Raises:
        ValueError: a token is out of range, or there are fewer than n tokens.
    """
    tokens = np.asarray(tokens)
    chex.assert_rank(tokens, 1)
    chex.assert_type(tokens, int)
    shape = (vocab_size,) * n
    sequences = np.lib.stride_tricks.sliding_window_view(tokens, n)  # (N - n + 1, n)
    return np.bincount(np.ravel_multi_index(tuple(sequences.T), shape), minlength=vocab_size**n).reshape(shape)


def loss(train: np.ndarray, tokens: np.ndarray, n: int, vocab_size: int, smoothing: float = 0.0) -> float:
    """Compute the mean cross-entropy of the n-gram counts of one text on another.

    On the counted text itself, without smoothing, no model that sees n - 1 tokens can have a lower loss.

    Args:
        train: (N,) integers in [0, vocab_size), the text to count.
        tokens: (M,) integers in [0, vocab_size), the text to predict: each token with n - 1 tokens before it.
        n: 1 for unigrams, 2 for bigrams, 3 for trigrams.
        vocab_size: V.
        smoothing: added to each count; with 0, a sequence that never occurs in `train` has an infinite loss.

    Returns:
        Nats per token.

    Source: Shannon 1951, "Prediction and entropy of printed English"; additive smoothing is Laplace's.
    """
    table = count(train, n, vocab_size) + smoothing
    total = table.sum(axis=-1, keepdims=True)
    probability = table / np.where(total > 0, total, 1)  # all zero after a context that never occurred
    times = count(tokens, n, vocab_size)
    asked = times > 0
    with np.errstate(divide="ignore"):
        return float(np.average(-np.log(probability[asked]), weights=times[asked]))
