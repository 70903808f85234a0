"""Epochs: each passes once over all windows of a text, which begin at an offset and come in an order of its own.

Where a window begins is a pure function of a key and of the window's number in the run. It is found without the windows
before it and without a list of all windows, so a run that continues needs no cursor, and each process computes its own
rows only. A key is the seed of the run and the number of the stream.
"""

import numpy as np

ROUNDS = 6  # of the Feistel network
TURNS = 1024  # rows in which a mixture's folders get their shares


def starts(key: tuple[int, int], numbers: np.ndarray, tokens: int, block_size: int, folder: int = 0) -> np.ndarray:
    """Find where windows begin. An epoch has as many of them as fit behind each other at any offset below block_size.

    Args:
        key: seed and stream.
        numbers: (n,) int64, the number of windows of this text that come before each of these in the run.
        tokens: N, more than block_size.
        block_size: T; windows follow each other at this distance, and the last target of one is the next one's first
            token.
        folder: index of the text in its mixture; each has its own offsets and orders.

    Returns:
        (n,) int64, the first token of each window, in [0, N - T).
    """
    windows = max((tokens - block_size) // block_size, 1)
    offsets = min(block_size, tokens - windows * block_size)  # fewer in a text that is shorter than two windows
    found, epochs = np.empty_like(numbers), numbers // windows
    for epoch in np.unique(epochs).tolist():
        bits, chosen = _bits(key, 1 + ROUNDS, (epoch, 1 + folder, 0)), epochs == epoch
        offset = int(bits[0]) * offsets >> 64  # Python integers, because the product has more than 64 bits
        found[chosen] = offset + block_size * permuted(numbers[chosen] % windows, windows, bits[1:])
    return found


def turns(key: tuple[int, int], numbers: np.ndarray, weights: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Find the folder of each row of a mixture. Rows come in rounds, in which each folder has its share of turns.

    Args:
        key: seed and stream.
        numbers: (n,) int64, the number of rows that come before each of these in the run.
        weights: share of each folder; their sum is 1.

    Returns:
        (n,) int64 index of the folder, and (n,) int64 number of rows of this folder that come before.
    """
    size = max(TURNS, len(weights) ** 2)  # of a round: enough for the largest folder to take what the others leave
    which, before = np.empty_like(numbers), np.empty_like(numbers)
    for i in np.unique(numbers // size).tolist():
        first, last = (_shares(n * size, weights) for n in (i, i + 1))
        shuffle = np.argsort(_bits(key, size, (i, 0, 1)), kind="stable")
        order = np.repeat(np.arange(len(weights)), last - first)[shuffle]
        counts = np.empty(size, np.int64)
        counts[np.argsort(order, kind="stable")] = np.concatenate([np.arange(*pair) for pair in zip(first, last)])
        chosen = numbers // size == i
        which[chosen], before[chosen] = order[numbers[chosen] % size], counts[numbers[chosen] % size]
    return which, before


def permuted(index: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Apply a permutation of range(size), drawn by the keys, without listing it.

    A Feistel network permutes the numbers of an even number of bits, at most four times as many; what lies beyond the
    range is permuted again until it lies within.

    Args:
        index: (n,) int64 in [0, size).
        size: of the range, at least 1.
        keys: (ROUNDS,) random uint64.

    Returns:
        (n,) int64, to where each index is moved.

    Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains"; the mixing is SplitMix64's.
    """
    half = np.uint64(max(((size - 1).bit_length() + 1) // 2, 1))
    mask, moved = np.uint64((1 << int(half)) - 1), index.astype(np.uint64)
    outside = np.ones(len(index), bool)
    while outside.any():
        left, right = moved[outside] >> half, moved[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        moved[outside] = left << half | right
        outside = moved >= size
    return moved.astype(np.int64)


def _mixed(bits: np.ndarray) -> np.ndarray:
    """Let every bit of a uint64 depend on every other."""
    bits = (bits ^ bits >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ bits >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return bits ^ bits >> np.uint64(31)


def _shares(rows: int, weights: tuple[float, ...]) -> np.ndarray:
    """How many of the first rows each folder has: its weight, rounded down; the largest has what the others leave."""
    shares = np.floor(rows * np.array(weights)).astype(np.int64)
    shares[np.argmax(weights)] += rows - shares.sum()
    return shares


def _bits(key: tuple[int, int], n: int, counter: tuple[int, int, int]) -> np.ndarray:
    """Random bits, (n,) uint64; see `mixtures.draw_windows`, which has the counters (step, 0, 0)."""
    seed, stream = key
    key, counter = np.array([seed % 2**64, stream], np.uint64), np.array([0, *counter], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(n)
