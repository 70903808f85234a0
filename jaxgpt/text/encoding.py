"""What a process does with a piece of the input of `jaxgpt prepare`; every function here can be pickled."""

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from jaxgpt import tokenizer as tokenizers
from jaxgpt.data import DataError
from jaxgpt.text import documents
from jaxgpt.text.chat import ChatEncoder
from jaxgpt.text.dialogues import DialogueEncoder
from jaxgpt.text.documents import Piece
from jaxgpt.tokenizer import UnknownCharacterError


class Reading(NamedTuple):
    """How documents are read: the arguments of `documents.read` behind the piece."""

    field: str
    line_ends: bool
    dialogues: bool

    @classmethod
    def of(cls, request: dict[str, Any]) -> "Reading":
        """What a request says, which an older version may have written: it knew of no line ends and no dialogues."""
        return cls(request["text_field"], request.get("line_ends", False), request.get("dialogues", False))


class Encoded(NamedTuple):
    """A piece as tokens."""

    ids: np.ndarray
    """(N,) ids."""
    ends: np.ndarray
    """(D,) int64, the index after the last id of each document that ends in the piece."""
    digest: str
    """The hash that `digest` gives."""
    mask: np.ndarray | None = None
    """(N,) uint8, 1 for the tokens of answers; None if the documents are no dialogues."""


def characters(reading: Reading, piece: Piece) -> set[str]:
    """Return the set of characters in a piece."""
    return set().union(*(text for text, _ in documents.read(piece, *reading)))


def digest(reading: Reading, piece: Piece) -> str:
    """Return the hash of the texts in a piece."""
    return _digest(documents.read(piece, *reading))


def encode(tokenizer: str, sha256: str, reading: Reading, dtype: np.dtype, piece: Piece) -> Encoded:
    """Tokenise a piece.

    Args:
        tokenizer: path of a tokenizer.json.
        sha256: of that file and its settings, so that two with the same path are not confused.
        reading: how the documents are read.
        dtype: unsigned dtype of the ids.
        piece: one of `documents.pieces`.

    Raises:
        DataError: the piece cannot be read, or has a character that the tokenizer lacks or a dialogue that cannot be
            used.
    """
    encoder, texts = _tokenizer(tokenizer, sha256), documents.read(piece, *reading)
    if reading.dialogues:
        return _encode_dialogues(encoder, texts, dtype, piece)
    end = np.array([] if encoder.end_of_text is None else [encoder.end_of_text], np.int32)
    parts, ends, n = [np.empty(0, dtype)], [], 0
    for text, is_end in texts:
        try:
            ids = encoder.encode(text)
        except UnknownCharacterError as error:
            raise DataError(f"not in the tokenizer's alphabet ({piece.file.path}): {error}") from None
        parts += [ids.astype(dtype), end.astype(dtype)] if is_end else [ids.astype(dtype)]
        n += len(ids) + (len(end) if is_end else 0)
        ends += [n] if is_end else []
    return Encoded(np.concatenate(parts), np.array(ends, np.int64), _digest(texts))


def _encode_dialogues(
    tokenizer: tokenizers.Tokenizer, texts: list[tuple[str, bool]], dtype: np.dtype, piece: Piece
) -> Encoded:
    ids, masks = [np.empty(0, dtype)], [np.empty(0, np.uint8)]
    chat = ChatEncoder(tokenizer, "--tokenizer")
    with contextlib.closing(chat.template):
        encoder = DialogueEncoder(chat)
        for i, (text, _) in enumerate(texts):
            of_dialogue, mask = encoder.encode(json.loads(text), functools.partial(documents.place, piece, i))
            ids.append(of_dialogue.astype(dtype))
            masks.append(mask)
    ends = np.cumsum([len(each) for each in ids[1:]], dtype=np.int64)
    return Encoded(np.concatenate(ids), ends, _digest(texts), np.concatenate(masks))


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
