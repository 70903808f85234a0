"""Token folders made by `jaxgpt prepare`: opening them, verifying them and reading windows from them.

We do not memory-map the tokens: touched pages count as memory of the process, so a pass over 10 GB would end with 10 GB
in use.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable

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
REMEDY = "prepare the folder again, or copy it again"


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

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """The index after the last token of each document, (D,) int64; read once, and kept."""
        file = places.locate(self.name, FLAG) / ENDS
        with places.reading(self.name, FLAG):
            try:
                with file.open("rb") as opened:
                    ends = np.load(opened)
            except (OSError, ValueError, EOFError) as error:
                raise DataError(f"cannot read where documents end ({file}, {error}): {REMEDY}") from None
        grows = ends.dtype == np.int64 and ends.ndim == 1 and (np.diff(ends, prepend=0) >= 0).all()
        if not grows or ends[-1:].tolist() != [self.tokens]:
            raise DataError(f"not the ends of its documents ({file}, the folder has {self.tokens} tokens): {REMEDY}")
        return ends

    def documents(self, starts: Iterable[int], length: int) -> np.ndarray:
        """Number the documents of the `length` tokens from each start on; the first token's is 0.

        Returns:
            (len(starts), length) int32.
        """
        starts = list(starts)
        begins = np.zeros((len(starts), length), np.int32)  # how many documents, with empty ones, begin at a token
        for start, row in zip(starts, begins):
            first, last = np.searchsorted(self.ends, [start, start + length - 1], side="right")
            np.add.at(row, self.ends[first:last] - start, 1)
        return begins.cumsum(axis=1, dtype=np.int32)


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
    files = folder / TOKENS, folder / TOKENIZER
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
        raise DataError(f"cannot read the tokens ({name}, {error}): {REMEDY}") from None
    n, hashes = facts["tokens"], (facts["sha256"], facts["tokenizer_sha256"])
    for file, wanted in zip((TOKENS, TOKENIZER), hashes):
        if found.get(file, wanted) != wanted:
            what = f"{name}/{file}" + (f", {size} bytes of tokens" if file == TOKENS else "")
            differs = f"sha256 {found[file]} instead of {shortened(wanted)}"
            raise DataError(f"a damaged token folder ({what}, {differs}): {REMEDY}")
    if (shape, dtype.name) != ((n,), facts["dtype"]):
        header = shortened(f"{dtype} {shape}")
        raise DataError(f"a damaged token folder ({name}, {header} is not what {DATASET} says): {REMEDY}")
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
