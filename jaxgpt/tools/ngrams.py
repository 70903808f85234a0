"""Language models that only count: what a trained model has to be measured against.

V is the vocabulary. Everything here is NumPy, in float64.
"""

import chex
import numpy as np


def count(tokens: np.ndarray, n: int, vocab_size: int) -> np.ndarray:
    """How often each run of `n` tokens occurs.

    Args:
        tokens: (N,) integers in [0, vocab_size), N at least n.
        n: 1 for unigrams, 2 for bigrams, 3 for trigrams; the table has vocab_size**n entries.
        vocab_size: V.

    Returns:
        (V,) * n int64; the last axis is the token that follows.

    Raises:
        ValueError: a token is out of range, or there are fewer than n.
    """
    tokens = np.asarray(tokens)
    chex.assert_rank(tokens, 1)
    chex.assert_type(tokens, int)
    shape = (vocab_size,) * n
    runs = np.lib.stride_tricks.sliding_window_view(tokens, n)  # (N - n + 1, n)
    return np.bincount(np.ravel_multi_index(tuple(runs.T), shape), minlength=vocab_size**n).reshape(shape)


def loss(train: np.ndarray, tokens: np.ndarray, n: int, vocab_size: int, smoothing: float = 0.0) -> float:
    """Mean cross-entropy, in nats a token, of the n-gram counts of one text on another.

    On the text that was counted, without smoothing, this is the least that any model of n - 1 tokens can reach there.

    Args:
        train: (N,) integers in [0, vocab_size), the text to count.
        tokens: (M,) integers in [0, vocab_size), the text to predict: each token that has n - 1 before it.
        n: 1 for unigrams, 2 for bigrams, 3 for trigrams.
        vocab_size: V.
        smoothing: added to each count; with 0, what never occurred in `train` costs infinitely much.

    Source: Shannon 1951, "Prediction and entropy of printed English"; additive smoothing is Laplace's.
    """
    table = count(train, n, vocab_size) + smoothing
    total = table.sum(axis=-1, keepdims=True)
    probability = table / np.where(total > 0, total, 1)  # all zero after a context that never occurred
    times = count(tokens, n, vocab_size)
    asked = times > 0
    with np.errstate(divide="ignore"):
        return float(np.average(-np.log(probability[asked]), weights=times[asked]))
