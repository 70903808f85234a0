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
from typing import NamedTuple

import numpy as np
from etils import epath

from jaxgpt.data import DataError
from jaxgpt.errors import shortened
from jaxgpt.files import download, tokenizer_settings
from jaxgpt.text import places, verified
from jaxgpt.text.verified import BLOCK_BYTES, sha256_of

FORMAT, MASKED = 1, 2  # the second has a mask, which versions that read only the first would overlook
FLAG = "--data.path"
DATASET, TOKENS, ENDS, TOKENIZER = "dataset.json", "tokens.npy", "document_ends.npy", "tokenizer.json"
MASK, SETTINGS = "mask.npy", tokenizer_settings.FILE
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
    mask_offset: int | None = None
    """Offset of the first element in mask.npy, in bytes; None if there is no mask."""
    mask_sha256: str | None = None
    """Hex digest of the mask's bytes."""

    @property
    def identity(self) -> str:
        """Hex digest of what a run learns from: the tokens and, if there is one, the mask."""
        if self.mask_sha256 is None:
            return self.sha256
        return hashlib.sha256(f"{self.sha256} {self.mask_sha256}".encode()).hexdigest()

    def read(self, starts: Iterable[int], length: int) -> np.ndarray:
        """Read the `length` tokens from each start on.

        Returns:
            (len(starts), length) in the stored dtype.
        """
        return _read(self.path / TOKENS, self.offset, self.dtype, list(starts), length)

    def mask(self, starts: Iterable[int], length: int) -> np.ndarray:
        """Read which of the `length` tokens from each start on the loss counts as targets: all, if there is no mask.

        Returns:
            (len(starts), length) uint8, 0 or 1.
        """
        starts = list(starts)
        if self.mask_offset is None:
            return np.ones((len(starts), length), np.uint8)
        return _read(self.path / MASK, self.mask_offset, np.dtype(np.uint8), starts, length)

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


def _read(path: pathlib.Path, offset: int, dtype: np.dtype, starts: list[int], length: int) -> np.ndarray:
    """Read windows of a stored array, whose first element is at an offset in bytes."""
    windows = np.empty((len(starts), length), dtype)
    with open(path, "rb", buffering=0) as file:
        for start, window in zip(starts, windows):
            file.seek(offset + start * dtype.itemsize)
            if file.readinto(window) != window.nbytes:
                raise DataError(f"the file became shorter ({file.name}): prepare the folder again")
    return windows


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
        wanted |= {"mask_sha256": str} if facts.get("format") == MASKED else {}
        wanted |= {name: str for name in ("tokenizer_config_sha256",) if name in facts}
        bad = [key for key, kind in wanted.items() if not isinstance(facts.get(key), kind)]
    except (ValueError, AttributeError, RecursionError):
        raise DataError(f"not a dataset description ({folder / DATASET}): prepare the folder again") from None
    except (FileNotFoundError, NotADirectoryError) as error:
        unfinished = f"no {DATASET}: {error.strerror or error}"
        raise DataError(f"not a finished token folder ({folder}, {unfinished}): run `jaxgpt prepare`") from None
    if bad or facts["format"] not in (FORMAT, MASKED):
        wrong = f"no {', '.join(bad)}" if bad else f"format {facts['format']}, this jaxgpt reads {FORMAT} and {MASKED}"
        raise DataError(f"not a dataset description ({folder / DATASET}, {wrong}): prepare the folder again")
    return facts


class _Stored(NamedTuple):
    """An array of a folder, as dataset.json describes it."""

    file: str
    dtype: str
    values: int
    """Its elements are below this number."""
    sha256: str


class _Header(NamedTuple):
    """What an .npy file says of itself, and the size of its array in bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    size: int


def _stored(facts: dict) -> list[_Stored]:
    """The arrays that training reads: the tokens and, if there is one, the mask."""
    tokens = _Stored(TOKENS, facts["dtype"], facts["vocab_size"], facts["sha256"])
    return [tokens, _Stored(MASK, "uint8", 2, facts["mask_sha256"])] if facts["format"] == MASKED else [tokens]


def _tokenizer_files(facts: dict) -> dict[str, str]:
    """The files of the tokenizer, and the hash of each."""
    files = {TOKENIZER: facts["tokenizer_sha256"]}
    return files | ({SETTINGS: facts["tokenizer_config_sha256"]} if "tokenizer_config_sha256" in facts else {})


def _header(path: pathlib.Path) -> _Header:
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        offset = file.tell()
    return _Header(shape, dtype, offset, path.stat().st_size - offset)


def _verified(name: str, folder: pathlib.Path, facts: dict, again: bool) -> TokenFolder:
    """Compare headers, sizes, hashes and values with dataset.json, and return the folder."""
    arrays, texts = _stored(facts), _tokenizer_files(facts)
    files = [folder / file for file in (*(array.file for array in arrays), *texts)]
    try:
        headers = {array.file: _header(folder / array.file) for array in arrays}
        known = not again and verified.is_known(files, facts)
        found, beyond = {}, {}
        for file, _, values, _ in [] if known else arrays:
            header = headers[file]
            found[file], beyond[file] = verified.scan(folder / file, header.offset, header.dtype, values)
        found |= {} if known else {file: sha256_of(folder / file) for file in texts}
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the tokens ({name}, {error}): {REMEDY}") from None
    for file, wanted in ({array.file: array.sha256 for array in arrays} | texts).items():
        if found.get(file, wanted) != wanted:
            size = f", {headers[file].size} bytes of {file.partition('.')[0]}" if file in headers else ""
            differs = f"sha256 {found[file]} instead of {shortened(wanted)}"
            raise DataError(f"a damaged token folder ({name}/{file}{size}, {differs}): {REMEDY}")
    for array in arrays:
        _check_values(name, array, headers[array.file], facts["tokens"], beyond.get(array.file))
    if not known:
        verified.remember(files, facts)
    tokens, mask = headers[TOKENS], headers.get(MASK)
    return TokenFolder(
        name=name,
        path=folder,
        tokens=facts["tokens"],
        dtype=tokens.dtype,
        offset=tokens.offset,
        vocab_size=facts["vocab_size"],
        sha256=facts["sha256"],
        tokenizer=folder / TOKENIZER,
        tokenizer_sha256=facts["tokenizer_sha256"],
        mask_offset=mask and mask.offset,
        mask_sha256=facts["mask_sha256"] if mask else None,
    )


def _check_values(name: str, array: _Stored, header: _Header, n: int, beyond: tuple[int, int] | None) -> None:
    """Refuse an array of another shape or dtype, or with an element that is too large, of which `beyond` tells."""
    if (header.shape, header.dtype.name) != ((n,), array.dtype):
        differs = shortened(f"{array.file}: {header.dtype} {header.shape}")
        raise DataError(f"a damaged token folder ({name}, {differs} is not what {DATASET} says): {REMEDY}")
    if beyond and array.file == MASK:
        raise DataError(f"a mask of other numbers than 0 and 1 ({name}, {beyond[1]} at {beyond[0]:,}): {REMEDY}")
    if beyond:
        at, token = beyond
        raise DataError(
            f"an id beyond the vocabulary ({name}, token {at:,} is {token}, the last id is {array.values - 1}): "
            "prepare the folder with its own tokenizer"
        )


def _copied(path: str, facts: dict, again: bool) -> TokenFolder:
    """Return the cached copy of a remote folder, copying it if needed; the hashes alone name the copy."""
    hashes = [array.sha256 for array in _stored(facts)] + list(_tokenizer_files(facts).values())
    name = hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:32]
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
            for file in (*(array.file for array in _stored(facts)), *_tokenizer_files(facts), DATASET):
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
