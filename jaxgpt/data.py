"""Tokens on the device, and the batches of windows that are cut from them.

A window is block_size tokens and one more: the inputs, and for each input the token after it, the target. A batch is a
pure function of (seed, split, step), so a run that is resumed needs no iterator state.
"""

import dataclasses
from functools import partial
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.errors import ArgumentError, JaxgptError
from jaxgpt.settings.checks import Path, check_fields

SHARED = 32  # steps whose places are drawn at a time: the drawing, half a second to compile, is compiled once


class DataError(JaxgptError, ValueError):
    """A text or a prepared folder cannot be used."""

    exit_code = 3


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The text, its splits and the batch size."""

    name: str = "shakespeare"
    """Named corpus: shakespeare, or tiny_shakespeare (the lecture's exact file)."""
    path: Path | None = None
    """Your own UTF-8 text file, or a folder from `jaxgpt prepare`; mix several as DIR=WEIGHT,DIR=WEIGHT."""
    tokenizer: Path = "char"
    """Tokenizer of a text: char (one id per character), gpt2, or a tokenizer.json; a prepared folder has its own."""
    batch_size: int = 12
    """Windows per batch; a step uses optim.grad_accumulation batches."""
    sampling: Literal["random", "epochs"] = "random"
    """Windows to train on: at random places, with replacement as in the lecture; or in epochs, in which consecutive
    windows, in random order, cover the text once."""
    documents: Literal["packed", "separate"] = "packed"
    """Documents of a prepared folder in one window: packed = as if they were one; separate = no token sees or predicts
    a token of another. Positions are counted from the window's first token in both."""
    verify: bool = False
    """Read and hash a prepared folder completely before training, even if its files have not changed since then."""
    train_fraction: float = 0.9
    """Leading fraction of the text that is the train split, in (0, 1); the rest is the val split."""

    def __post_init__(self):
        check_fields(self)
        if self.batch_size < 1:
            raise ArgumentError(f"batch_size is {self.batch_size}: use 1 or more")
        if not 0.0 < self.train_fraction < 1.0:
            raise ArgumentError(f"train_fraction is {self.train_fraction}: use a number between 0 and 1")


class Splits(NamedTuple):
    """The tokens of both splits, each (N,) in the smallest unsigned dtype that holds the vocabulary."""

    train: jax.Array
    val: jax.Array


class Windows(NamedTuple):
    """Windows of tokens, with what else matters of each token. A whole split is one long window."""

    tokens: jax.Array
    """(..., T + 1) unsigned integers."""
    documents: jax.Array | None = None
    """(..., T + 1) integers, which differ between documents; None if all tokens are of the same one."""
    mask: jax.Array | None = None
    """(..., T + 1) integers, 0 for a token that the loss does not count as a target; None if it counts all."""

    @classmethod
    def of(cls, tokens: "jax.Array | Windows") -> "Windows":
        """Windows of bare tokens; others are returned as they are."""
        return tokens if isinstance(tokens, cls) else cls(tokens)

    @property
    def counted(self) -> jax.Array | None:
        """(..., T) bool, the targets that the loss counts: in the mask, and of their input's document. None = all."""
        same = None if self.documents is None else self.documents[..., 1:] == self.documents[..., :-1]
        if self.mask is None:
            return same
        in_mask = self.mask[..., 1:] != 0
        return in_mask if same is None else same & in_mask


def split(ids: np.ndarray, train_fraction: float, vocab_size: int, block_size: int, name: str = "the text") -> Splits:
    """Cut the ids into a train and a val split and put both on the device.

    Args:
        ids: (N,) integers in [0, vocab_size).
        train_fraction: leading fraction of the ids for the train split, in (0, 1).
        vocab_size: V, which decides the dtype of the splits.
        block_size: T, tokens per window.
        name: name of the text, for the error message.

    Returns:
        The two splits.

    Raises:
        DataError: a split is shorter than one window and its targets.
    """
    dtype = np.min_scalar_type(vocab_size - 1)
    cut = int(train_fraction * len(ids))
    parts = {"train": ids[:cut], "validation": ids[cut:]}
    for which, part in parts.items():
        if len(part) <= block_size:
            numbers = f"{len(part)} in the {which} split, {block_size + 1} needed for block_size {block_size}"
            raise DataError(
                f"too few tokens for a window and its last target ({name}, {numbers}): use a longer text, or train "
                "with a smaller --model.block_size"
            )
    return Splits(*(jax.device_put(part.astype(dtype)) for part in parts.values()))


def windows(key: jax.Array, tokens: jax.Array, steps: jax.Array, batch_size: int, block_size: int) -> jax.Array:
    """Draw the batches of the given steps: windows at uniformly random places, with replacement as in the lecture.

    Args:
        key: typed PRNG key of the split.
        tokens: (N,) unsigned integers, N > block_size.
        steps: (n,) integers; equal steps give equal batches.
        batch_size: B, windows per step.
        block_size: T, tokens per window, not counting its last target.

    Returns:
        (n, B, T + 1) in the dtype of the tokens.
    """
    chex.assert_rank([tokens, steps], 1)
    n = len(steps)
    steps = np.pad(np.asarray(steps), (0, -n % SHARED), mode="edge")
    return cut(tokens, _starts(key, steps, len(tokens) - block_size, batch_size), block_size, n)


@partial(jax.jit, static_argnames="batch_size")
def _starts(key: jax.Array, steps: jax.Array, end: int, batch_size: int) -> jax.Array:
    """The position of the first token of each window, (n, B). Compiled on its own: all splits and calls share it."""
    return jax.vmap(lambda step: jax.random.randint(jax.random.fold_in(key, step), (batch_size,), 0, end))(steps)


@partial(jax.jit, static_argnames=("block_size", "n"))
def cut(tokens: jax.Array, starts: jax.Array, block_size: int, n: int | None = None) -> jax.Array:
    """Cut windows out of a text.

    Args:
        tokens: (N,) unsigned integers.
        starts: (n, B) integers in [0, N - block_size), the position of the first token of each window.
        block_size: T, tokens per window, not counting its last target.
        n: how many of the first rows of `starts` to cut out; None = all.

    Returns:
        (n, B, T + 1) in the dtype of the tokens.
    """
    return tokens[starts[:n, :, None] + jnp.arange(block_size + 1)]


def inputs_and_targets(windows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Separate windows into inputs and targets.

    Args:
        windows: (B, T + 1) integers.

    Returns:
        The inputs and the targets, each (B, T) int32; a target is the token after its input.
    """
    windows = windows.astype(jnp.int32)
    return windows[:, :-1], windows[:, 1:]


def batch(windows: jax.Array | Windows) -> tuple[jax.Array, ...]:
    """Turn the windows of a step into what its loss takes.

    Args:
        windows: (B, T + 1) integers, or Windows of that shape.

    Returns:
        The inputs and the targets, each (B, T) int32. If not all targets count, also the documents of the inputs,
        (B, T) integers or None, and the weight of each target, (B, T) float32: 0, or what makes the mean of all weights
        1. So the mean of the weighted losses, in whatever parts it is taken, is the mean over the targets that count.
    """
    windows = Windows.of(windows)
    pair, counted = inputs_and_targets(windows.tokens), windows.counted
    if counted is None:
        return pair
    share = jnp.maximum(counted.mean(), 1 / counted.size)  # above 0, also if no target counts
    return *pair, None if windows.documents is None else windows.documents[:, :-1], counted / share


def consecutive_batch(tokens: jax.Array | Windows, i, batch_size: int, block_size: int):
    """Take batch `i` of an ordered pass over the whole split, which predicts every token but the first exactly once.

    Args:
        tokens: (N,) unsigned integers, or Windows of that shape.
        i: () integer in [0, consecutive_batches(N, ...)).
        batch_size: B, windows per batch.
        block_size: T, tokens per window.

    Returns:
        The inputs and the targets, each (B, T) int32; the documents of the inputs, (B, T) integers or None; and a bool
        mask, (B, T), that is False where a target does not count or is past the end of the split.
    """
    windows = Windows.of(tokens)
    chex.assert_rank(windows.tokens, 1)
    index = (i * batch_size * block_size + jnp.arange(batch_size * block_size)).reshape(batch_size, block_size)
    last = len(windows.tokens) - 1

    def take(at):
        return jax.tree.map(lambda a: a[jnp.minimum(at, last)], windows)

    of_inputs, of_targets = take(index), take(index + 1)
    inputs, targets = (each.tokens.astype(jnp.int32) for each in (of_inputs, of_targets))
    counted = index < last
    if windows.documents is not None:
        counted &= of_inputs.documents == of_targets.documents
    if windows.mask is not None:
        counted &= of_targets.mask != 0
    return inputs, targets, of_inputs.documents, counted


def consecutive_batches(n_tokens: int, batch_size: int, block_size: int) -> int:
    """Count the batches of an ordered pass over a split.

    Args:
        n_tokens: N, tokens in the split.
        batch_size: B, windows per batch.
        block_size: T, tokens per window.

    Returns:
        The number of batches, of which the last may be partly filled.
    """
    return -(-(n_tokens - 1) // (batch_size * block_size))
