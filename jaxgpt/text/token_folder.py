"""Token folders made by `jaxgpt prepare`: opening them, verifying them and reading windows from them.

A batch is a pure function of (seed, stream, step), and each process reads only its own rows. We do not memory-map the
tokens: touched pages count as memory of the process, so a pass over 10 GB would end with 10 GB in use.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from etils import epath

from jaxgpt.data import DataError
from jaxgpt.errors import shortened
from jaxgpt.files import download
from jaxgpt.text import places, verified
from jaxgpt.text.verified import BLOCK_BYTES, sha256_of

FORMAT = 1
FLAG = "--data.path"
DATASET, TOKENS, ENDS, TOKENIZER = "dataset.json", "tokens.npy", "document_ends.npy", "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class TokenFolder:
    """A verified token folder."""

    name: str
    """As the user wrote it."""
    path: pathlib.Path
    """Its path on this machine."""
    tokens: int
    """Number of tokens."""
    dtype: np.dtype
    """The smallest unsigned dtype that holds the vocabulary."""
    offset: int
    """Offset of the first token in tokens.npy, in bytes."""
    vocab_size: int
    sha256: str
    """Hex digest of the tokens' bytes."""
    tokenizer: pathlib.Path
    tokenizer_sha256: str
    """Hex digest of tokenizer.json."""

    def read(self, starts: Iterable[int], length: int) -> np.ndarray:
        """Read the `length` tokens from each start on.

        Returns:
            (len(starts), length) in the stored dtype.
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
    """Tokens `start` to `stop - 1` of one folder."""

    folder: TokenFolder
    start: int
    stop: int


class Mixture(NamedTuple):
    """Spans that windows are drawn from, and the probability of each."""

    spans: tuple[Span, ...]
    weights: tuple[float, ...]


def open_token_folder(path: str, again: bool = False) -> TokenFolder:
    """Open and verify a token folder; one on an object store (gs://, s3://) is first copied to the cache folder.

    Args:
        path: of the folder.
        again: read it as a whole, although its files have not changed since they were verified.

    Raises:
        DataError: it is not a token folder, is unfinished, or its bytes have changed.
    """
    with places.reading(path, FLAG):
        facts = facts_of(places.locate(path, FLAG))
        if places.is_remote(path):
            return _copied(path, facts, again)
    return _verified(path, pathlib.Path(os.path.expanduser(path)), facts, again)


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
    mixture: Mixture, seed: int, stream: int, step: int, batch_size: int, block_size: int
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

    Returns:
        (batch_size,) index of the span, and (batch_size,) index of the first token in its folder, both int64.
    """
    key, counter = np.array([seed % 2**64, stream], np.uint64), np.array([0, step, 0, 0], np.uint64)
    raw = np.random.Philox(key=key, counter=counter).random_raw((batch_size, 2))  # each step has 2**64 blocks of bits
    edges = np.cumsum(mixture.weights)[:-1]
    which = np.searchsorted(edges, raw[:, 0] / 2.0**64, side="right")
    room = [span.stop - span.start - block_size for span in mixture.spans]
    # Python integers, because the product has more than 64 bits
    starts = [mixture.spans[s].start + (int(bits) * room[s] >> 64) for s, bits in zip(which, raw[:, 1])]
    return which, np.array(starts, np.int64)


def read_windows(
    mixture: Mixture, seed: int, stream: int, step: int, batch_size: int, block_size: int, rows: slice = slice(None)
) -> np.ndarray:
    """Read the windows of a batch that `draw_windows` chose, or only some of its rows.

    Args:
        mixture, seed, stream, step, batch_size, block_size: as in `draw_windows`.
        rows: the rows to read.

    Returns:
        (rows, block_size + 1) in the stored dtype: inputs are [:, :-1], targets are [:, 1:].
    """
    which, starts = (array[rows] for array in draw_windows(mixture, seed, stream, step, batch_size, block_size))
    windows = np.empty((len(which), block_size + 1), mixture.spans[0].folder.dtype)
    for s in np.unique(which):
        windows[which == s] = mixture.spans[s].folder.read(starts[which == s].tolist(), block_size + 1)
    return windows


def consecutive(mixture: Mixture, size: int) -> Iterator[np.ndarray]:
    """Read all spans in order, in pieces that overlap by one token.

    Predicting within each piece then predicts every token of a span, except its first, exactly once.

    Args:
        mixture: its weights are ignored.
        size: targets per piece; the last piece of a span may be shorter.

    Yields:
        (at most size + 1,) tokens in the stored dtype.
    """
    for folder, start, stop in mixture.spans:
        for i in range(start, stop - 1, size):
            yield folder.read([i], min(size + 1, stop - i))[0]


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


def facts_of(folder: epath.Path) -> dict:
    """Read dataset.json, which is written last: a folder without it is unfinished.

    Raises:
        DataError: it is missing, or something else.
    """
    wanted = {"format": int, "dtype": str, "tokens": int, "vocab_size": int, "sha256": str, "tokenizer_sha256": str}
    try:
        facts = json.loads((folder / DATASET).read_text())
        bad = [key for key, kind in wanted.items() if not isinstance(facts.get(key), kind)]
    except (ValueError, AttributeError, RecursionError):
        raise DataError(f"not a dataset description ({folder / DATASET}): prepare the folder again") from None
    except (FileNotFoundError, NotADirectoryError) as error:
        unfinished = f"no {DATASET}: {error.strerror or error}"
        raise DataError(f"not a finished token folder ({folder}, {unfinished}): run `jaxgpt prepare`") from None
    if bad or facts["format"] != FORMAT:
        wrong = f"no {', '.join(bad)}" if bad else f"format {facts['format']}, this jaxgpt reads {FORMAT}"
        raise DataError(f"not a dataset description ({folder / DATASET}, {wrong}): prepare the folder again")
    return facts


def _verified(name: str, folder: pathlib.Path, facts: dict, again: bool) -> TokenFolder:
    """Compare header, size, hashes and ids with dataset.json, and return the folder."""
    remedy, files = "prepare the folder again, or copy it again", (folder / TOKENS, folder / TOKENIZER)
    try:
        with open(folder / TOKENS, "rb") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            offset = file.tell()
        size = (folder / TOKENS).stat().st_size - offset
        known = not again and verified.is_known(files, facts)
        found, beyond = {}, None
        if not known:
            found[TOKENS], beyond = verified.scan(folder / TOKENS, offset, dtype, facts["vocab_size"])
            found[TOKENIZER] = sha256_of(folder / TOKENIZER)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the tokens ({name}, {error}): {remedy}") from None
    n, hashes = facts["tokens"], (facts["sha256"], facts["tokenizer_sha256"])
    for file, wanted in zip((TOKENS, TOKENIZER), hashes):
        if found.get(file, wanted) != wanted:
            what = f"{name}/{file}" + (f", {size} bytes of tokens" if file == TOKENS else "")
            differs = f"sha256 {found[file]} instead of {shortened(wanted)}"
            raise DataError(f"a damaged token folder ({what}, {differs}): {remedy}")
    if (shape, dtype.name) != ((n,), facts["dtype"]):
        header = shortened(f"{dtype} {shape}")
        raise DataError(f"a damaged token folder ({name}, {header} is not what {DATASET} says): {remedy}")
    if beyond:
        at, token = beyond
        raise DataError(f"an id beyond the vocabulary ({name}, token {at:,} is {token}, the last id is "
                        f"{facts['vocab_size'] - 1}): prepare the folder with its own tokenizer")  # fmt: skip
    if not known:
        verified.remember(files, facts)
    return TokenFolder(name, folder, n, dtype, offset, facts["vocab_size"], hashes[0], folder / TOKENIZER, hashes[1])


def _copied(path: str, facts: dict, again: bool) -> TokenFolder:
    """Return the cached copy of a remote folder, copying it if needed; the hashes alone name the copy."""
    name = hashlib.sha256(f"{facts['sha256']} {facts['tokenizer_sha256']}".encode()).hexdigest()[:32]
    target = download.cache_dir() / "tokens" / name
    try:
        if target.exists():
            with contextlib.suppress(DataError):
                return _verified(path, target, facts, again)
            shutil.rmtree(target)  # damaged since it was copied
        download.make_private(target.parent)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as temporary:
            fresh = pathlib.Path(temporary) / name
            fresh.mkdir(mode=0o700)
            for file in (TOKENS, TOKENIZER, DATASET):
                with (places.locate(path, FLAG) / file).open("rb") as source, open(fresh / file, "wb") as sink:
                    shutil.copyfileobj(source, sink, BLOCK_BYTES)
            folder = _verified(path, fresh, facts, again=True)
            try:
                os.replace(fresh, target)
            except OSError:
                if not target.exists():  # another process on this machine was faster
                    raise
    except OSError as error:
        why = f"cannot copy the token folder ({path} to {target}, {error})"
        raise DataError(f"{why}: check both, or set JAXGPT_CACHE to a folder with room") from error
    return dataclasses.replace(folder, path=target, tokenizer=target / TOKENIZER)
