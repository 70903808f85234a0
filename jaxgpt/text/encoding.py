"""What a process does with a piece of the input of `jaxgpt prepare`; every function here can be pickled."""

import functools
import hashlib
from collections.abc import Iterable

import numpy as np

from jaxgpt import tokenizer as tokenizers
from jaxgpt.data import DataError
from jaxgpt.text import documents
from jaxgpt.text.documents import Piece
from jaxgpt.tokenizer import UnknownCharacterError


def characters(field: str, line_ends: bool, piece: Piece) -> set[str]:
    """Return the set of characters in a piece; the arguments are those of `documents.read`."""
    return set().union(*(text for text, _ in documents.read(piece, field, line_ends)))


def digest(field: str, line_ends: bool, piece: Piece) -> str:
    """Return the hash of the texts in a piece; the arguments are those of `documents.read`."""
    return _digest(documents.read(piece, field, line_ends))


def encode(
    tokenizer: str, sha256: str, field: str, line_ends: bool, dtype: np.dtype, piece: Piece
) -> tuple[np.ndarray, np.ndarray, str]:
    """Tokenise a piece.

    Args:
        tokenizer: path of a tokenizer.json.
        sha256: hex digest of that file.
        field: as in `documents.read`.
        line_ends: as in `documents.read`.
        dtype: unsigned dtype of the ids.
        piece: one of `documents.pieces`.

    Returns:
        (N,) ids in `dtype`; for each document that ends in the piece the index after its last id, (D,) int64; and the
        hash that `digest` gives.

    Raises:
        DataError: the piece cannot be read, or has a character that the tokenizer lacks.
    """
    encoder = _tokenizer(tokenizer, sha256)
    end = np.array([] if encoder.end_of_text is None else [encoder.end_of_text], np.int32)
    parts, ends, n = [np.empty(0, dtype)], [], 0
    texts = documents.read(piece, field, line_ends)
    for text, is_end in texts:
        try:
            ids = encoder.encode(text)
        except UnknownCharacterError as error:
            raise DataError(f"not in the tokenizer's alphabet ({piece.file.path}): {error}") from None
        parts += [ids.astype(dtype), end.astype(dtype)] if is_end else [ids.astype(dtype)]
        n += len(ids) + (len(end) if is_end else 0)
        ends += [n] if is_end else []
    return np.concatenate(parts), np.array(ends, np.int64), _digest(texts)


@functools.lru_cache(1)
def _tokenizer(path: str, sha256: str) -> tokenizers.Tokenizer:
    """Load a tokenizer once per process; the hash distinguishes two files with the same path."""
    return tokenizers.load(path)


def _digest(texts: Iterable[tuple[str, bool]]) -> str:
    found = hashlib.sha256()
    for text, is_end in texts:
        content = text.encode()
        found.update(b"%d %d\n" % (len(content), is_end))
        found.update(content)
    return found.hexdigest()
