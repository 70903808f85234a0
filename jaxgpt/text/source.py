"""Data sources: a text, whose tokens stay on the devices, or token folders, which are read during training.

Both provide the windows for `step.train_steps` and `step.estimate_loss`, and the pieces for `step.evaluate`.
"""

import contextlib
import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TextIO

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt import data
from jaxgpt import tokenizer as tokenizers
from jaxgpt.data import DataConfig
from jaxgpt.devices import sharding
from jaxgpt.errors import JaxgptWarning, shortened
from jaxgpt.files.screen import progress
from jaxgpt.step import TRAIN, VAL, stream_key
from jaxgpt.text import corpus, documents, epochs, inputs, mixtures, places
from jaxgpt.text.token_folder import TokenFolder
from jaxgpt.text.workers import prefetched
from jaxgpt.tokenizer import Tokenizer, UnknownCharacterError

Batches = jax.Array | data.Windows
EVALUATED = 1 << 20  # tokens of a folder's split on the devices at a time


class Text:
    """A named corpus or a text file."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer | None = None):
        text = corpus.load(config.name, config.path)
        if config.path and documents.are_dialogues([inputs.File(config.path, 0, 0)], "text"):
            remedy = "`jaxgpt prepare` makes a folder in which only the answers count"
            warnings.warn(f"dialogues, read as plain text ({shortened(config.path, 300)}): {remedy}", JaxgptWarning, 2)
        self.name, self.sha256, self.train_fraction = text.name, text.sha256, config.train_fraction
        self.in_epochs = config.sampling == "epochs"
        if config.documents == "separate":
            raise data.DataError(
                f"a text is a single document (--data.documents, separate; {_short(self)}): make a folder of its "
                "documents with `jaxgpt prepare`, or leave the flag out"
            )
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
        if self.in_epochs and stream == TRAIN:
            numbers = np.arange(first * rows, (first + n) * rows, dtype=np.int64)
            starts = epochs.starts((seed, stream), numbers, len(tokens), self.block_size)
            return data.cut(tokens, starts.astype(np.int32).reshape(n, rows), self.block_size)
        steps = np.arange(first, first + n, dtype=np.int32)
        return data.windows(stream_key(seed, stream), tokens, steps, rows, self.block_size)

    def feed(self, calls: Iterable[tuple[int, int]], seed: int, rows: int) -> Iterator[jax.Array]:
        """Yield the training batches of each call; see `Source`."""
        return (self.windows(TRAIN, seed, first, n, rows) for first, n in calls)

    def targets(self, split: str) -> int:
        """Count the tokens of a split that `pieces` predicts."""
        return (self.tokens if split == "all" else len(getattr(self.splits, split))) - 1

    def pieces(self, split: str) -> Iterator[jax.Array]:
        """Yield a whole split for `evaluate`; see `Source`."""
        if split == "all" and self.tokens < 2:
            raise _too_short(self)
        yield self.ids if split == "all" else getattr(self.splits, split)


class Folders:
    """One or more token folders made by `jaxgpt prepare`."""

    def __init__(self, config: DataConfig):
        self.mixture = mixtures.parse_sources(config.path, config.verify)
        folders = [span.folder for span in self.mixture.spans]
        self.name, self.train_fraction = config.path, config.train_fraction
        self.in_epochs = config.sampling == "epochs"
        self.reads = {"tokens": TokenFolder.read}  # how each field of the windows is read
        if config.documents == "separate":
            self.reads["documents"] = TokenFolder.documents
            for folder in folders:
                _ = folder.ends  # read now, so that what is wrong with them is told before anything begins
        if any(folder.mask_sha256 for folder in folders):
            self.reads["mask"] = TokenFolder.mask
        hashes = [f"{folder.identity} {weight}" for folder, weight in zip(folders, self.mixture.weights)]
        several = hashlib.sha256("\n".join(hashes).encode()).hexdigest()
        self.sha256 = folders[0].identity if len(folders) == 1 else several
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
        self.splits = data.Splits(*mixtures.split(self.mixture, self.train_fraction, block_size))
        if "mask" in self.reads:  # refused now, as an evaluation would find it only at the end of training
            for which, mixture in zip(("training", "validation"), self.splits):
                self._check_answers(which, mixture)

    def _check_answers(self, which: str, mixture: mixtures.Mixture) -> None:
        if not any(mask[1:].any() for mask in mixtures.consecutive(mixture, EVALUATED, TokenFolder.mask)):
            raise data.DataError(
                f"no answer in a split ({_short(self)}, the {which} split): use more dialogues, or another "
                "--data.train_fraction"
            )

    def windows(self, stream: int, seed: int, first: int, n: int, rows: int) -> Batches:
        """Return the batches of `n` steps; each process reads only the rows of its devices. See `Source`."""
        mixture = self.splits.val if stream == VAL else self.splits.train
        draw = mixtures.next_windows if self.in_epochs and stream == TRAIN else mixtures.draw_windows

        def array(read: Callable[..., np.ndarray]) -> jax.Array:
            def part(index: tuple[slice, ...]) -> np.ndarray:
                rest = rows, self.block_size, index[1], draw, read
                return np.stack([mixtures.read_windows(mixture, seed, stream, first + i, *rest) for i in range(n)])

            shape = (n, rows, self.block_size + 1)
            return jax.make_array_from_callback(shape, NamedSharding(self.mesh, P(None, sharding.BATCH)), part)

        fields = {field: array(read) for field, read in self.reads.items()}
        return data.Windows(**fields) if len(fields) > 1 else fields["tokens"]

    def feed(self, calls: Iterable[tuple[int, int]], seed: int, rows: int) -> Iterator[Batches]:
        """Yield the training batches of each call, reading ahead while the previous call computes; see `Source`."""
        return prefetched(lambda call: self.windows(TRAIN, seed, *call, rows), calls)

    def targets(self, split: str) -> int:
        """Count the tokens of a split that `pieces` predicts, counted or not."""
        mixture = self.mixture if split == "all" else getattr(self.splits, split)
        return sum(max(span.stop - span.start - 1, 0) for span in mixture.spans)

    def pieces(self, split: str) -> Iterator[Batches]:
        """Yield a whole split for `evaluate`, in pieces; see `Source`."""
        if split == "all" and max(span.stop - span.start for span in self.mixture.spans) < 2:
            raise _too_short(self)
        size = max(EVALUATED // self.block_size, 1) * self.block_size
        mixture = self.mixture if split == "all" else getattr(self.splits, split)
        for arrays in zip(*(mixtures.consecutive(mixture, size, read) for read in self.reads.values())):
            piece = arrays[0] if len(arrays) == 1 else data.Windows(**dict(zip(self.reads, arrays)))
            yield piece if self.mesh is None else jax.tree.map(partial(sharding.place, self.mesh), piece)


Source = Text | Folders
"""Both classes have the same methods. Call `split(mesh, block_size)` first, unless the whole text is to be evaluated.

`windows(stream, seed, first, n, rows)` returns the batches of the n steps from `first` on, (n, rows, T + 1) unsigned
integers. The stream is TRAIN or ESTIMATE, both from the train split, or VAL. `feed(calls, seed, rows)` yields the
training windows of each call; a call is (first step, n). `pieces(split)` yields a whole split for `step.evaluate`;
the split `all` is both as one. With `data.documents: separate`, and of dialogues, each of these is `data.Windows` of
that shape.
"""


@contextlib.contextmanager
def watched(source: Source, split: str, stream: TextIO | None) -> Iterator[Iterator[Batches]]:
    """Show how far the evaluation of a split is, in a `with` block: yields its pieces.

    Args:
        source: after `split`.
        split: train, val or all.
        stream: the screen; None = nowhere.
    """
    with progress("evaluate", source.targets(split), "tokens", stream) as advance:

        def pieces() -> Iterator[Batches]:
            for piece in source.pieces(split):
                yield piece
                advance(len(jax.tree.leaves(piece)[0]) - 1)

        yield pieces()


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
    return Folders(config) if names_folders(config.path) else Text(config, tokenizer)


def names_folders(path: str | None) -> bool:
    """Whether a `data.path` names token folders, and no text."""
    if path is None:
        return False
    local = os.path.expanduser(path)
    mixture = "=" in path and not os.path.exists(local)  # else it is part of a name
    return places.is_remote(path) or os.path.isdir(local) or mixture


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
