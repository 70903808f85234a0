"""Data sources: a text, whose tokens stay on the devices, or token folders, which are read during training.

Both provide the windows for `step.train_steps` and `step.estimate_loss`, and the pieces for `step.evaluate`.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt import data
from jaxgpt import tokenizer as tokenizers
from jaxgpt.data import DataConfig
from jaxgpt.devices import sharding
from jaxgpt.errors import shortened
from jaxgpt.step import TRAIN, VAL, stream_key
from jaxgpt.text import corpus, places, token_folder
from jaxgpt.text.workers import prefetched
from jaxgpt.tokenizer import Tokenizer, UnknownCharacterError

EVALUATED = 1 << 20  # tokens of a folder's split on the devices at a time


class Text:
    """A named corpus or a text file."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer | None = None):
        text = corpus.load(config.name, config.path)
        self.name, self.sha256, self.train_fraction = text.name, text.sha256, config.train_fraction
        self.tokenizer = tokenizer or tokenizers.for_text(config.tokenizer, text.text, text.alphabet)
        try:
            self.ids = self.tokenizer.encode(text.text)
        except UnknownCharacterError as error:
            raise data.DataError(f"not in the tokenizer's alphabet ({_short(self)}): {error}") from None
        self.tokens = len(self.ids)

    def split(self, mesh: Mesh | None, block_size: int) -> None:
        """Cut the text into the train and val splits, and put both on every device."""
        self.block_size = block_size
        where = (self.train_fraction, self.tokenizer.vocab_size, block_size)
        parts = data.split(self.ids, *where, name=_short(self))
        self.splits = parts if mesh is None else data.Splits(*(sharding.place(mesh, np.asarray(a)) for a in parts))

    def windows(self, stream: int, seed: int, first: int, n: int, rows: int) -> jax.Array:
        """Return the batches of steps `first` to `first + n - 1`; see `Source`."""
        tokens = self.splits.val if stream == VAL else self.splits.train
        steps = np.arange(first, first + n, dtype=np.int32)
        return data.windows(stream_key(seed, stream), tokens, steps, rows, self.block_size)

    def feed(self, calls: Iterable[tuple[int, int]], seed: int, rows: int) -> Iterator[jax.Array]:
        """Yield the training batches of each call; see `Source`."""
        return (self.windows(TRAIN, seed, first, n, rows) for first, n in calls)

    def pieces(self, split: str) -> Iterator[jax.Array]:
        """Yield a whole split for `evaluate`; see `Source`."""
        if split == "all" and self.tokens < 2:
            raise _too_short(self)
        yield self.ids if split == "all" else getattr(self.splits, split)


class Folders:
    """One or more token folders made by `jaxgpt prepare`."""

    def __init__(self, config: DataConfig):
        self.mixture = token_folder.parse_sources(config.path, config.verify)
        folders = [span.folder for span in self.mixture.spans]
        self.name, self.train_fraction = config.path, config.train_fraction
        hashes = [f"{folder.sha256} {weight}" for folder, weight in zip(folders, self.mixture.weights)]
        self.sha256 = folders[0].sha256 if len(folders) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
        self.tokenizer = tokenizers.load(folders[0].tokenizer)
        if folders[0].vocab_size != self.tokenizer.vocab_size:
            raise data.DataError(
                f"the folder does not fit its tokenizer ({folders[0].name}, {folders[0].vocab_size} ids, "
                f"tokenizer.json has {self.tokenizer.vocab_size}): prepare the folder again"
            )
        self.tokens = sum(folder.tokens for folder in folders)
        self.mesh, self.block_size = None, 1  # until `split` is called

    def split(self, mesh: Mesh | None, block_size: int) -> None:
        """Cut each folder into the train and val splits."""
        self.mesh, self.block_size = mesh, block_size
        self.splits = data.Splits(*token_folder.split(self.mixture, self.train_fraction, block_size))

    def windows(self, stream: int, seed: int, first: int, n: int, rows: int) -> jax.Array:
        """Return the batches of `n` steps; each process reads only the rows of its devices. See `Source`."""
        mixture = self.splits.val if stream == VAL else self.splits.train

        def read(index: tuple[slice, ...]) -> np.ndarray:
            steps = range(first, first + n)
            where = (mixture, seed, stream)
            return np.stack([token_folder.read_windows(*where, i, rows, self.block_size, index[1]) for i in steps])

        shape = (n, rows, self.block_size + 1)
        return jax.make_array_from_callback(shape, NamedSharding(self.mesh, P(None, sharding.BATCH)), read)

    def feed(self, calls: Iterable[tuple[int, int]], seed: int, rows: int) -> Iterator[jax.Array]:
        """Yield the training batches of each call, reading ahead while the previous call computes; see `Source`."""
        return prefetched(lambda call: self.windows(TRAIN, seed, *call, rows), calls)

    def pieces(self, split: str) -> Iterator[jax.Array]:
        """Yield a whole split for `evaluate`, in pieces; see `Source`."""
        if split == "all" and max(span.stop - span.start for span in self.mixture.spans) < 2:
            raise _too_short(self)
        size = max(EVALUATED // self.block_size, 1) * self.block_size
        mixture = self.mixture if split == "all" else getattr(self.splits, split)
        for piece in token_folder.consecutive(mixture, size):
            yield piece if self.mesh is None else sharding.place(self.mesh, piece)


Source = Text | Folders
"""Both classes have the same methods. Call `split(mesh, block_size)` first, unless the whole text is to be evaluated.

`windows(stream, seed, first, n, rows)` returns the batches of the n steps from `first` on, (n, rows, T + 1) unsigned
integers. The stream is TRAIN or ESTIMATE, both from the train split, or VAL. `feed(calls, seed, rows)` yields the
training windows of each call; a call is (first step, n). `pieces(split)` yields a whole split for `step.evaluate`;
the split `all` is both as one.
"""


def open_source(config: DataConfig, tokenizer: Tokenizer | None = None) -> Source:
    """Open the token folders that `config.path` names, otherwise a text.

    Args:
        config: as configured.
        tokenizer: for a text, replaces the tokenizer that `config` names; token folders have their own.

    Raises:
        CorpusError: the text cannot be read.
        DataError: a token folder cannot be read.
        TokenizerError: there is no such tokenizer, or its file is damaged.
    """
    if config.path is None:
        return Text(config, tokenizer)
    local = os.path.expanduser(config.path)
    mixture = "=" in config.path and not os.path.exists(local)  # else it is part of a name
    folders = places.is_remote(config.path) or os.path.isdir(local) or mixture
    return Folders(config) if folders else Text(config, tokenizer)


def _too_short(source: Source) -> data.DataError:
    count = "1 token" if source.tokens == 1 else f"{source.tokens} tokens"
    return data.DataError(f"nothing to predict ({_short(source)}, {count}): use a longer text")


def _short(source: Source) -> str:
    return shortened(source.name, 300)


def describe(source: Source) -> dict[str, Any]:
    """Return the facts about a source for the first record of a run."""
    return {
        "corpus": source.name,
        "corpus_sha256": source.sha256,
        "tokens": source.tokens,
        "vocab_size": source.tokenizer.vocab_size,
        "alphabet": getattr(source.tokenizer, "alphabet", None),
    }
