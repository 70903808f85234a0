"""Mixtures of token folders: which window each row of a batch is, and reading it.

A batch is a pure function of (seed, stream, step), and each process reads only its own rows.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from jaxgpt.data import DataError
from jaxgpt.errors import shortened
from jaxgpt.text import epochs, places
from jaxgpt.text.token_folder import FLAG, TokenFolder, open_token_folder


class Span(NamedTuple):
    """Tokens `start` to `stop - 1` of one folder."""

    folder: TokenFolder
    start: int
    stop: int


class Mixture(NamedTuple):
    """Spans that windows are drawn from, and the probability of each."""

    spans: tuple[Span, ...]
    weights: tuple[float, ...]


def parse_sources(path: str, again: bool = False) -> Mixture:
    """Open the folders that `data.path` names: `DIR`, or `DIR=WEIGHT,DIR=WEIGHT`.

    Args:
        path: a folder of exactly this name, if there is one, also with a `=` in it; otherwise a mixture.
        again: as for `open_token_folder`.

    Returns:
        One span per folder, which covers it, and weights that sum to 1.

    Raises:
        DataError: a folder is unusable, a weight is not a positive number, or the tokenizers differ.
    """
    whole = "=" not in path or places.exists(path, FLAG)
    parts = [(path, "1")] if whole else [part.rpartition("=")[::2] for part in path.split(",")]
    weights = np.array([_weight(name, weight, path) for name, weight in parts])
    folders = [open_token_folder(name, again) for name, _ in parts]
    for other in folders[1:]:
        if other.tokenizer_sha256 != folders[0].tokenizer_sha256:
            raise DataError(
                f"the folders have different tokenizers ({folders[0].name} {folders[0].tokenizer_sha256[:8]}, "
                f"{other.name} {other.tokenizer_sha256[:8]}): prepare both with the same --tokenizer FILE"
            )
    return Mixture(tuple(Span(f, 0, f.tokens) for f in folders), tuple((weights / weights.sum()).tolist()))


def split(mixture: Mixture, train_fraction: float, block_size: int) -> tuple[Mixture, Mixture]:
    """Cut every span into the train split, which is its first `train_fraction`, and the val split, which is the rest.

    Raises:
        DataError: a split is shorter than one window and its targets.
    """
    train, val = [], []
    for folder, start, stop in mixture.spans:
        cut = start + int(train_fraction * (stop - start))
        for name, parts, span in (("train", train, (start, cut)), ("validation", val, (cut, stop))):
            if span[1] - span[0] <= block_size:
                raise DataError(
                    f"too few tokens for a window ({folder.name}, {span[1] - span[0]} in the {name} split, "
                    f"{block_size + 1} needed): use a longer text, or another --data.train_fraction"
                )
            parts.append(Span(folder, *span))
    return Mixture(tuple(train), mixture.weights), Mixture(tuple(val), mixture.weights)


def draw_windows(
    mixture: Mixture, seed: int, stream: int, step: int, batch_size: int, block_size: int, rows: slice = slice(None)
) -> tuple[np.ndarray, np.ndarray]:
    """Draw where the windows of a batch begin: a span by weight, then a uniform position in it, with replacement.

    A row depends only on (seed, stream, step) and its index. We use the raw bits of the generator: NumPy guarantees
    those of Philox for ever, but may change how its distributions use them.

    Args:
        mixture: spans longer than block_size.
        seed: of the run.
        stream: one number per purpose, such as 0 for training and 1 for validation.
        step: in [0, 2**64).
        batch_size: windows per batch.
        block_size: tokens per window; the last target is the token after it.
        rows: the rows that are wanted, out of batch_size.

    Returns:
        (rows,) index of the span, and (rows,) index of the first token in its folder, both int64.
    """
    key, counter = np.array([seed % 2**64, stream], np.uint64), np.array([0, step, 0, 0], np.uint64)
    raw = np.random.Philox(key=key, counter=counter).random_raw((batch_size, 2))  # each step has 2**64 blocks of bits
    raw, edges = raw[rows], np.cumsum(mixture.weights)[:-1]
    which = np.searchsorted(edges, raw[:, 0] / 2.0**64, side="right")
    room = [span.stop - span.start - block_size for span in mixture.spans]
    # Python integers, because the product has more than 64 bits
    starts = [mixture.spans[s].start + (int(bits) * room[s] >> 64) for s, bits in zip(which, raw[:, 1])]
    return which, np.array(starts, np.int64)


def next_windows(
    mixture: Mixture, seed: int, stream: int, step: int, batch_size: int, block_size: int, rows: slice = slice(None)
) -> tuple[np.ndarray, np.ndarray]:
    """Find where the windows of a batch begin when each span is passed through in epochs, without replacement.

    Args:
        mixture, seed, stream, step, batch_size, block_size, rows: as in `draw_windows`.

    Returns:
        As `draw_windows`.
    """
    numbers, key = step * batch_size + np.arange(batch_size, dtype=np.int64)[rows], (seed, stream)
    which, before = epochs.turns(key, numbers, mixture.weights)
    starts = np.empty_like(numbers)
    for s in np.unique(which):
        (_, start, stop), mine = mixture.spans[s], which == s
        starts[mine] = start + epochs.starts(key, before[mine], stop - start, block_size, s)
    return which, starts


def read_windows(
    mixture: Mixture,
    seed: int,
    stream: int,
    step: int,
    batch_size: int,
    block_size: int,
    rows: slice = slice(None),
    draw: Callable[..., tuple[np.ndarray, np.ndarray]] = draw_windows,
    read: Callable[..., np.ndarray] = TokenFolder.read,
) -> np.ndarray:
    """Read the windows of a batch, or only some of its rows.

    Args:
        mixture, seed, stream, step, batch_size, block_size, rows: as in `draw_windows`.
        draw: `draw_windows` or `next_windows`.
        read: what is wanted of each window: its tokens, or their documents (`TokenFolder.documents`).

    Returns:
        (rows, block_size + 1) in the dtype that `read` returns: inputs are [:, :-1], targets are [:, 1:].
    """
    which, starts = draw(mixture, seed, stream, step, batch_size, block_size, rows)
    parts = {s: read(mixture.spans[s].folder, starts[which == s].tolist(), block_size + 1) for s in np.unique(which)}
    windows = np.empty((len(which), block_size + 1), np.result_type(*parts.values()))
    for s, part in parts.items():
        windows[which == s] = part
    return windows


def consecutive(
    mixture: Mixture, size: int, read: Callable[..., np.ndarray] = TokenFolder.read
) -> Iterator[np.ndarray]:
    """Read all spans in order, in pieces that overlap by one token.

    Predicting within each piece then predicts every token of a span, except its first, exactly once.

    Args:
        mixture: its weights are ignored.
        size: targets per piece; the last piece of a span may be shorter.
        read: as in `read_windows`.

    Yields:
        (at most size + 1,) in the dtype that `read` returns.
    """
    for folder, start, stop in mixture.spans:
        for i in range(start, stop - 1, size):
            yield read(folder, [i], min(size + 1, stop - i))[0]


def _weight(name: str, weight: str, path: str) -> float:
    """The weight of a folder in the mixture `path`."""
    with contextlib.suppress(ValueError):
        if name and 0 < float(weight) < 1e300:  # so that the sum is finite
            return float(weight)
    where = f"{FLAG}, {shortened(path, 300)!r}"
    weight = repr(shortened(weight))
    wrong = f"the weight of {shortened(name)!r} is {weight}" if name else f"{weight} has no weight"
    raise DataError(
        f"no such file or folder, and not a mixture ({where}; {wrong}): check the path, or write "
        "DIR=WEIGHT,DIR=WEIGHT with positive numbers, such as a=0.7,b=0.3"
    )
