"""Folders of tokens that `jaxgpt prepare` made: opened and verified, and windows read from them.

A batch is a pure function of (seed, stream, step), and each process reads only its rows of it. Nothing stays mapped:
pages of a map that was touched count as memory of the process, and a pass over 10 GB would end with 10 GB.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
from etils import epath

from jaxgpt.data import DataError
from jaxgpt.files import download
from jaxgpt.text import npy

FORMAT = 1
DATASET, TOKENS, ENDS, TOKENIZER = "dataset.json", "tokens.npy", "document_ends.npy", "tokenizer.json"
BLOCK_BYTES = 1 << 23

A, B = TypeVar("A"), TypeVar("B")


@dataclasses.dataclass(frozen=True)
class TokenFolder:
    """A verified folder of tokens."""

    name: str
    """As the user wrote it."""
    path: pathlib.Path
    """Where it lies on this machine."""
    tokens: int
    """How many."""
    dtype: np.dtype
    """The smallest unsigned one that holds the vocabulary."""
    offset: int
    """Of the first token in tokens.npy, in bytes."""
    vocab_size: int
    sha256: str
    """Of the tokens' bytes."""
    tokenizer: pathlib.Path
    tokenizer_sha256: str
    """Of tokenizer.json."""

    def read(self, starts: Iterable[int], length: int) -> np.ndarray:
        """Windows of `length` tokens.

        Returns:
            (len(starts), length) of the stored dtype.
        """
        starts = list(starts)
        windows = np.empty((len(starts), length), self.dtype)
        with open(self.path / TOKENS, "rb", buffering=0) as file:
            for start, window in zip(starts, windows):
                file.seek(self.offset + start * self.dtype.itemsize)
                if file.readinto(window) != window.nbytes:
                    raise DataError(f"the file became shorter ({file.name}): prepare the folder again")
        return windows


class Span(NamedTuple):
    """Tokens of one folder: those with start <= i < stop."""

    folder: TokenFolder
    start: int
    stop: int


class Mixture(NamedTuple):
    """Where windows are drawn from: spans, and the probability of each."""

    spans: tuple[Span, ...]
    weights: tuple[float, ...]


def open_token_folder(path: str) -> TokenFolder:
    """Verify a folder, and copy it into the cache folder first where its path is an object store's (gs://, s3://).

    Raises:
        DataError: it is none, not finished, or its bytes are not the ones that were prepared.
    """
    facts = _facts(epath.Path(path).expanduser())
    return _copied(path, facts) if "://" in path else _verified(path, pathlib.Path(path).expanduser(), facts)


def parse_sources(path: str) -> Mixture:
    """Open what `data.path` names: `DIR`, or several as `DIR=WEIGHT,DIR=WEIGHT`.

    Returns:
        A whole span for each folder, and weights that sum to 1.

    Raises:
        DataError: a folder is unusable, a weight is not a positive number, or the tokenizers are not one.
    """
    parts = [part.rpartition("=") for part in path.split(",")] if "=" in path else [(path, "=", "1")]
    where = f"--data.path, {path!r}"
    try:
        weights = np.array([float(weight) for _, _, weight in parts])
    except ValueError:
        raise DataError(f"not a weight ({where}): write DIR, or DIR=WEIGHT,DIR=WEIGHT") from None
    if not (np.isfinite(weights).all() and (weights > 0).all()):
        raise DataError(f"weights must be positive ({where}): write DIR=WEIGHT,DIR=WEIGHT, as a=0.7,b=0.3")
    folders = [open_token_folder(name) for name, _, _ in parts]
    for other in folders[1:]:
        if other.tokenizer_sha256 != folders[0].tokenizer_sha256:
            raise DataError(
                f"folders of different tokenizers ({folders[0].name} {folders[0].tokenizer_sha256[:8]}, "
                f"{other.name} {other.tokenizer_sha256[:8]}): prepare both with one, --tokenizer FILE"
            )
    return Mixture(tuple(Span(f, 0, f.tokens) for f in folders), tuple((weights / weights.sum()).tolist()))


def split(mixture: Mixture, train_fraction: float, block_size: int) -> tuple[Mixture, Mixture]:
    """Cut every span in two, the leading `train_fraction` for training and the rest for validation.

    Raises:
        DataError: a part is shorter than one window and its targets.
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
    mixture: Mixture, seed: int, stream: int, step: int, batch_size: int, block_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where the windows of a batch begin: span by weight, then any place in it, with replacement.

    A row depends on (seed, stream, step) and its own number. From the generator's raw bits, since numpy keeps those of
    Philox as they are for ever, while it may change how its distributions use them.

    Args:
        mixture: spans longer than block_size.
        seed: of the run.
        stream: a number for each purpose, as 0 for training and 1 for validation.
        step: in [0, 2**64).
        batch_size: rows.
        block_size: inputs a window; its last target is one further.

    Returns:
        (batch_size,) the number of the span, and (batch_size,) the first token, both int64.
    """
    key, counter = np.array([seed % 2**64, stream], np.uint64), np.array([0, step, 0, 0], np.uint64)
    raw = np.random.Philox(key=key, counter=counter).random_raw((batch_size, 2))  # a step owns 2**64 blocks of bits
    edges = np.cumsum(mixture.weights)[:-1]
    which = np.searchsorted(edges, raw[:, 0] / 2.0**64, side="right")
    room = [span.stop - span.start - block_size for span in mixture.spans]
    # Python's integers: the product has more than 64 bits
    starts = [mixture.spans[s].start + (int(bits) * room[s] >> 64) for s, bits in zip(which, raw[:, 1])]
    return which, np.array(starts, np.int64)


def read_windows(
    mixture: Mixture,
    seed: int,
    stream: int,
    step: int,
    batch_size: int,
    block_size: int,
    rows: slice = slice(None),
) -> np.ndarray:
    """The batch of a step, or only some rows of it: what `draw_windows` chose, read from the folders.

    Returns:
        (rows, block_size + 1) in the stored dtype: inputs are [:, :-1], targets [:, 1:].
    """
    which, starts = (array[rows] for array in draw_windows(mixture, seed, stream, step, batch_size, block_size))
    windows = np.empty((len(which), block_size + 1), mixture.spans[0].folder.dtype)
    for s in np.unique(which):
        windows[which == s] = mixture.spans[s].folder.read(starts[which == s].tolist(), block_size + 1)
    return windows


def consecutive(mixture: Mixture, size: int) -> Iterator[np.ndarray]:
    """All spans in order, piece by piece, each with the first token of the next one as its last target.

    Predicting within each piece predicts every token of a span but its first exactly once.

    Args:
        mixture: its weights play no part.
        size: targets a piece; the last one of a span may be shorter.

    Yields:
        (at most size + 1,) tokens in the stored dtype.
    """
    for folder, start, stop in mixture.spans:
        for i in range(start, stop - 1, size):
            yield folder.read([i], min(size + 1, stop - i))[0]


def prefetched(read: Callable[[A], B], arguments: Iterable[A]) -> Iterator[B]:
    """`map(read, arguments)`, where a thread already reads the next one while the caller works on this one.

    What `read` raises is raised here, in its turn. Closing the iterator waits for the one read in flight at most.
    """
    with concurrent.futures.ThreadPoolExecutor(1, "prefetch") as thread:
        ahead = None
        for argument in arguments:
            current, ahead = ahead, thread.submit(read, argument)
            if current is not None:
                yield current.result()
        if ahead is not None:
            yield ahead.result()


def sha256_of(path: pathlib.Path, offset: int = 0) -> str:
    """The sha256 of a file from a byte on, read in blocks."""
    digest, block = hashlib.sha256(), bytearray(BLOCK_BYTES)
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while n := file.readinto(block):
            digest.update(memoryview(block)[:n])
    return digest.hexdigest()


def _facts(folder: epath.Path) -> dict:
    """dataset.json, which is written last: a folder without it is not finished."""
    wanted = {"format": int, "dtype": str, "tokens": int, "vocab_size": int, "sha256": str, "tokenizer_sha256": str}
    try:
        facts = json.loads((folder / DATASET).read_text())
        bad = [key for key, kind in wanted.items() if not isinstance(facts.get(key), kind)]
    except (ValueError, AttributeError):
        raise DataError(f"not a dataset description ({folder / DATASET}): prepare the folder again") from None
    except OSError as error:
        unfinished = f"no {DATASET}: {error.strerror or error}"
        raise DataError(f"not a finished token folder ({folder}, {unfinished}): run `jaxgpt prepare`") from None
    if bad or facts["format"] != FORMAT:
        wrong = f"no {', '.join(bad)}" if bad else f"format {facts['format']}, this jaxgpt reads {FORMAT}"
        raise DataError(f"not a dataset description ({folder / DATASET}, {wrong}): prepare the folder again")
    return facts


def _verified(name: str, folder: pathlib.Path, facts: dict) -> TokenFolder:
    """The folder, after comparing header, size and hashes with the facts."""
    again = "prepare the folder again, or copy it again"
    try:
        with open(folder / TOKENS, "rb") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            offset = file.tell()
        size = (folder / TOKENS).stat().st_size - offset
        found = {TOKENS: sha256_of(folder / TOKENS, offset), TOKENIZER: sha256_of(folder / TOKENIZER)}
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the tokens ({name}, {error}): {again}") from None
    for file, wanted in ((TOKENS, facts["sha256"]), (TOKENIZER, facts["tokenizer_sha256"])):
        if found[file] != wanted:
            what = f"{name}/{file}" + (f", {size} bytes of tokens" if file == TOKENS else "")
            raise DataError(f"a damaged token folder ({what}, sha256 {found[file]}, prepared were {wanted}): {again}")
    n, hashes = facts["tokens"], (facts["sha256"], facts["tokenizer_sha256"])
    if (shape, dtype.name) != ((n,), facts["dtype"]):
        raise DataError(f"a damaged token folder ({name}, {dtype} {shape} is not what {DATASET} says): {again}")
    if beyond := npy.first_beyond(folder / TOKENS, facts["vocab_size"]):
        at, token = beyond
        raise DataError(f"an id beyond the vocabulary ({name}, token {at:,} is {token}, ids go to "
                        f"{facts['vocab_size'] - 1}): prepare the folder with its own tokenizer")  # fmt: skip
    return TokenFolder(name, folder, n, dtype, offset, facts["vocab_size"], hashes[0], folder / TOKENIZER, hashes[1])


def _copied(path: str, facts: dict) -> TokenFolder:
    """The cache's copy of a remote folder, made if need be; a folder of these hashes is the same wherever it lay."""
    name = hashlib.sha256(f"{facts['sha256']} {facts['tokenizer_sha256']}".encode()).hexdigest()[:32]
    target = download.cache_dir() / "tokens" / name
    try:
        if target.exists():
            with contextlib.suppress(DataError):
                return _verified(path, target, facts)
            shutil.rmtree(target)  # damaged since
        download.make_private(target.parent)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as temporary:
            fresh = pathlib.Path(temporary) / name
            fresh.mkdir(mode=0o700)
            for file in (TOKENS, TOKENIZER, DATASET):
                with (epath.Path(path) / file).open("rb") as source, open(fresh / file, "wb") as sink:
                    shutil.copyfileobj(source, sink, BLOCK_BYTES)
            folder = _verified(path, fresh, facts)
            if not target.exists():  # another process of this machine may have been faster
                os.replace(fresh, target)
    except OSError as error:
        why = f"cannot copy the token folder ({path} to {target}, {error})"
        raise DataError(f"{why}: check both, or set JAXGPT_CACHE to a folder with room") from error
    return dataclasses.replace(folder, path=target, tokenizer=target / TOKENIZER)
