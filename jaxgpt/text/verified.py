"""What was found when a token folder was read as a whole, so that it is read again only if its files have changed.

A file counts as unchanged if its size, its times, its place on the disk and its device are the same. These are kept in
the cache folder, beside the hashes that the file had.
"""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxgpt.files import download, storage

BLOCK_BYTES = 1 << 23


def sha256_of(path: pathlib.Path, offset: int = 0) -> str:
    """Return the hex sha256 of a file from byte `offset` on."""
    with open(path, "rb") as file:
        file.seek(offset)
        return hashlib.file_digest(file, "sha256").hexdigest()


def scan(path: pathlib.Path, offset: int, dtype: np.dtype, vocab_size: int) -> tuple[str, tuple[int, int] | None]:
    """Read a file of tokens once.

    Args:
        path: the file.
        offset: of the first token, in bytes.
        dtype: of the tokens.
        vocab_size: number of ids.

    Returns:
        The hex sha256 of the tokens' bytes, and index and value of the first id beyond the vocabulary; None if there is
        none.
    """
    digest, block, beyond, at = hashlib.sha256(), bytearray(BLOCK_BYTES), None, 0
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while n := file.readinto(block):
            digest.update(memoryview(block)[:n])
            tokens = np.frombuffer(block, dtype, n // dtype.itemsize)
            if beyond is None and len(tokens) and tokens.max() >= vocab_size:
                first = int((tokens >= vocab_size).argmax())
                beyond = at + first, int(tokens[first])
            at += len(tokens)
    return digest.hexdigest(), beyond


def is_known(files: Iterable[pathlib.Path], facts: dict[str, Any]) -> bool:
    """Whether these files, as they are now, were found to be what `facts` says.

    Args:
        files: the files of a token folder.
        facts: the content of its dataset.json.
    """
    files = list(files)
    with contextlib.suppress(OSError, ValueError, download.DownloadError):
        return json.loads(_record(files).read_text(encoding="utf-8")) == _stamp(files, facts)
    return False


def remember(files: Iterable[pathlib.Path], facts: dict[str, Any]) -> None:
    """Keep that these files were found to be what `facts` says, if the cache folder can be written."""
    files = list(files)
    with contextlib.suppress(OSError, download.DownloadError):
        record = _record(files)
        download.make_private(record.parent)
        storage.write(record, json.dumps(_stamp(files, facts)))


def records() -> pathlib.Path:
    """Return the folder of what is kept."""
    return download.cache_dir() / "verified"


def _record(files: list[pathlib.Path]) -> pathlib.Path:
    name = hashlib.sha256(str(files[0].resolve()).encode()).hexdigest()[:32]
    return records() / f"{name}.json"


def _stamp(files: list[pathlib.Path], facts: dict[str, Any]) -> list:
    stats = map(os.stat, files)
    found = [[s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev] for s in stats]
    wanted = [facts[name] for name in ("sha256", "tokenizer_sha256", "vocab_size", "tokens", "dtype")]
    return [found, *wanted, *(facts[name] for name in ("mask_sha256", "tokenizer_config_sha256") if name in facts)]
