"""Documents in text files, JSONL and parquet, cut into pieces that can be read independently.

The cuts of a piece depend on its two offsets alone, so any process can read any piece, in any order. A compressed file
can only be read from its beginning, so its pieces carry their bytes.
"""

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

from jaxgpt.data import DataError
from jaxgpt.errors import shortened
from jaxgpt.files.byte_level import SAFE_CUT
from jaxgpt.text import inputs, places
from jaxgpt.text.inputs import File

PIECE_BYTES = 1 << 20
CUT_BYTES = 1 << 16  # how far we search for a safe cut; a longer text without spaces is cut between any two characters
MARGIN = 4  # bytes before a cut that decide whether it is safe


class Block(NamedTuple):
    """Bytes from a text or JSONL file; those of a piece are `data[first:last]`."""

    data: bytes
    offset: int
    """Where `data` begins in the file, as it is without compression."""
    first: int
    last: int
    is_end: bool
    """Whether a text file ends with this piece."""


class Piece(NamedTuple):
    """A range of bytes of a text or JSONL file, moved to the nearest possible cuts, or a parquet row group."""

    file: File
    begin: int
    end: int
    size: int
    """Its share of the file's bytes, for the progress bar."""
    block: Block | None = None
    """Its bytes, if the file is compressed."""


def pieces(files: Iterable[File]) -> Iterator[Piece]:
    """Yield all pieces, in the order of their documents.

    Raises:
        DataError: a parquet or compressed file cannot be read.
    """
    for file in files:
        if inputs.kind(file.path) == inputs.PARQUET:
            with places.reading(file.path, inputs.FLAG), _parquet(file) as opened:
                n = opened.num_row_groups
            yield from (Piece(file, i, i + 1, file.size * (i + 1) // n - file.size * i // n) for i in range(n))
        elif inputs.is_packed(file.path):
            yield from _unpacked(file)
        else:
            for begin in range(0, file.size, PIECE_BYTES):
                end = min(begin + PIECE_BYTES, file.size)
                yield Piece(file, begin, end, end - begin)


def read(piece: Piece, field: str, line_ends: bool = False) -> list[tuple[str, bool]]:
    """Read the texts of a piece.

    Args:
        piece: one of `pieces`.
        field: JSONL field or parquet column that holds the text.
        line_ends: whether a line break is added to each document that does not end in one, unless it is empty.

    Returns:
        Each text, and whether a document ends with it.

    Raises:
        DataError: the piece cannot be read; the message names the file and the line, row or offset.
    """
    path = piece.file.path
    kind = inputs.kind(path)
    with places.reading(path, inputs.FLAG):
        if kind == inputs.PARQUET:
            texts = _read_parquet(piece, field)
        elif kind == inputs.JSONL:
            texts = _read_jsonl(path, piece.block or _lines(piece), field)
        else:
            return [_read_text(path, piece.block or _text(piece), line_ends)]
    return [(text + "\n" if line_ends and text and text[-1] != "\n" else text, True) for text in texts]


def _unpacked(file: File) -> Iterator[Piece]:
    """Yield the pieces of a compressed file, which are those of the file that it was made from."""
    blocks = _blocks_of_lines if inputs.kind(file.path) == inputs.JSONL else _blocks_of_text
    told = 0
    with places.reading(file.path, inputs.FLAG), _opened(file.path) as (stored, stream):
        for i, block in enumerate(blocks(stream)):
            at = stored.tell()
            yield Piece(file, i * PIECE_BYTES, (i + 1) * PIECE_BYTES, at - told, block)
            told = at


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open a file: as it is stored, and as a stream of its text or lines."""
    with places.locate(path, inputs.FLAG).open("rb") as stored:
        if not inputs.is_packed(path):
            yield stored, stored
            return
        with gzip.GzipFile(fileobj=stored) as stream:
            try:
                yield stored, stream
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise DataError(
                    f"damaged gzip ({inputs.FLAG}, {path}, {error}): fetch it again, or leave it out"
                ) from None


def _text(piece: Piece) -> Block:
    """Read the bytes of a piece of a text file."""
    (path, size, _), begin, end, *_ = piece
    offset = max(0, begin - MARGIN)
    wanted = min(end + CUT_BYTES, size) - offset
    with _opened(path) as (_, file):
        file.seek(offset)
        data = file.read(wanted)
    if len(data) < wanted:
        raise _shorter(path, offset + len(data), size)
    first = _cut(data, begin - offset) if begin else 0
    last = _cut(data, end - offset) if end < size else len(data)
    return Block(data, offset, first, last, end >= size)


def _blocks_of_text(stream: BinaryIO) -> Iterator[Block]:
    """Yield the bytes of the pieces of a text that can only be read from its beginning."""
    data, offset, first, end = b"", 0, 0, PIECE_BYTES
    while True:
        data += stream.read(end + CUT_BYTES - offset - len(data))
        if offset + len(data) <= end:
            yield Block(data, offset, first, len(data), True)
            return
        last = _cut(data, end - offset)
        yield Block(data, offset, first, last, False)
        used = end - MARGIN - offset
        data, offset, first, end = data[used:], offset + used, last - used, end + PIECE_BYTES


def _read_text(path: str, block: Block, line_ends: bool) -> tuple[str, bool]:
    data, offset, first, last, is_end = block
    try:
        text = data[first:last].decode()
    except UnicodeDecodeError as error:
        bad = f"byte 0x{data[first + error.start]:02x} at offset {offset + first + error.start}"
        raise DataError(f"not UTF-8 ({path}, {bad}): save the file as UTF-8 text, or leave it out") from None
    if offset + first == 0:
        text = text.removeprefix("\ufeff")
    if line_ends and is_end and not data.endswith(b"\n"):  # the last piece may be empty, so look at the bytes before it
        text += "\n"
    return text, is_end


def _cut(block: bytes, nominal: int) -> int:
    """The first offset from `nominal` on where a cut changes no ids, else the text's end, else a character boundary."""
    window = nominal + CUT_BYTES
    if found := SAFE_CUT.search(block, nominal, window):
        return found.start()
    if len(block) < window:
        return len(block)
    while nominal < len(block) and block[nominal] & 0xC0 == 0x80:
        nominal += 1
    return nominal


def _lines(piece: Piece) -> Block:
    """Read the lines that begin in a piece of a JSONL file."""
    (path, size, _), begin, end, *_ = piece
    found, offset = [], begin
    with _opened(path) as (_, file):
        if begin:
            file.seek(begin - 1)
            offset += len(file.readline()) - 1
        at = offset
        while at < end and (line := file.readline()):
            found.append(line)
            at += len(line)
    if at < end:
        raise _shorter(path, at, size)
    data = b"".join(found)
    return Block(data, offset, 0, len(data), end >= size)


def _blocks_of_lines(stream: BinaryIO) -> Iterator[Block]:
    """Yield the bytes of the pieces of lines that can only be read from their beginning."""
    found, offset, at, end = [], 0, 0, PIECE_BYTES
    for line in stream:
        while at >= end:
            yield Block(b"".join(found), offset, 0, at - offset, False)
            found, offset, end = [], at, end + PIECE_BYTES
        found.append(line)
        at += len(line)
    yield Block(b"".join(found), offset, 0, at - offset, True)


def _read_jsonl(path: str, block: Block, field: str) -> list[str]:
    """Read the texts of lines; blank lines are skipped."""
    texts, at = [], block.offset
    for line in io.BytesIO(block.data):
        if not line.isspace():
            texts.append(_text_of(line, field, path, at))
        at += len(line)
    return texts


def _text_of(line: bytes, field: str, path: str, offset: int) -> str:
    try:
        record = json.loads(line)
        has_text = isinstance(record, dict) and field in record
        wrong = _wrong(record[field]) if has_text else f"no field {shortened(repr(field))}"
    except (ValueError, RecursionError) as error:
        wrong = f"not JSON: {_line(error)}"
    if wrong:
        with _opened(path) as (_, file):
            number = 1 + sum(block.count(b"\n") for block in _blocks(file, offset))
        raise DataError(f"a line without text ({path}, line {number}, {wrong}): repair it, or see --text_field")
    return record[field]


def _wrong(text) -> str | None:
    """Why a value is not a text; None if it is one."""
    if not isinstance(text, str):
        return f"not a string but {type(text).__name__}"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"half of a surrogate pair at character {error.start}"
    return None


def _blocks(file, size: int) -> Iterator[bytes]:
    while size and (block := file.read(min(size, PIECE_BYTES))):
        size -= len(block)
        yield block


def _parquet(file: File):
    """Open a file with pyarrow, which is an optional dependency: plain text does not need it."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"parquet needs pyarrow ({file.path}, {error}): pip install 'jaxgpt[parquet]'") from None
    opened = places.locate(file.path, inputs.FLAG).open("rb")
    try:
        return pyarrow.parquet.ParquetFile(opened)
    except pyarrow.ArrowException as error:
        opened.close()
        raise DataError(f"not parquet ({file.path}, {_line(error)}): leave it out") from None


def _read_parquet(piece: Piece, field: str) -> list[str]:
    path = piece.file.path
    with _parquet(piece.file) as file:
        if field not in (names := file.schema_arrow.names):
            has = shortened(", ".join(names), 200)
            raise DataError(f"no column {shortened(repr(field))} ({path}, it has {has}): name one with --text_field")
        try:
            texts = file.read_row_group(piece.begin, columns=[field])[field].to_pylist()
        except Exception as error:  # damaged pages: pyarrow raises several kinds
            where = f"{path}, row group {piece.begin}, {_line(error)}"
            raise DataError(f"damaged parquet ({where}): fetch it again") from None
    for i, text in enumerate(texts):
        if wrong := _wrong(text):
            where = f"{path}, row {i} of row group {piece.begin}, {wrong}"
            raise DataError(f"a row without text ({where}): repair it, or see --text_field")
    return texts


def _line(error: Exception) -> str:
    return shortened(" ".join(str(error).split()), 200)


def _shorter(path: str, found: int, size: int) -> DataError:
    return DataError(
        f"the file became shorter ({path}, {found:,} of {size:,} bytes): wait until it is written, and repeat"
    )
