"""Documents in text files, JSONL and parquet, cut into pieces that can be read independently.

The cuts of a piece depend on its two offsets alone, so any process can read any piece, in any order. A compressed file
can only be read from its beginning, so its pieces carry their bytes.
"""

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

from jaxgpt.data import DataError
from jaxgpt.files.byte_level import SAFE_CUT
from jaxgpt.text import inputs, places, records
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
            with places.reading(file.path, inputs.FLAG), records.open_parquet(file) as opened:
                n = opened.num_row_groups
            yield from (Piece(file, i, i + 1, file.size * (i + 1) // n - file.size * i // n) for i in range(n))
        elif inputs.is_packed(file.path):
            yield from _unpacked(file)
        else:
            for begin in range(0, file.size, PIECE_BYTES):
                end = min(begin + PIECE_BYTES, file.size)
                yield Piece(file, begin, end, end - begin)


def are_dialogues(files: Iterable[File], field: str) -> bool:
    """Whether the first record of the input holds messages instead of a text.

    Args:
        files: the input.
        field: as in `read`; the messages of a dialogue are in the field `messages`.

    Raises:
        DataError: the file of the first record cannot be read.
    """
    file = next((file for file in files if inputs.kind(file.path) in (inputs.JSONL, inputs.PARQUET)), None)
    if file is None or field not in ("text", records.MESSAGES):
        return False
    with places.reading(file.path, inputs.FLAG):
        if inputs.kind(file.path) == inputs.PARQUET:
            record = records.example(file)
        else:
            with _opened(file.path) as (_, lines):
                record = records.parse(next((line for line in lines if not line.isspace()), b""))
    if records.MESSAGES not in record:
        return False
    return field not in record or (field == records.MESSAGES and not isinstance(record[field], str))


def read(piece: Piece, field: str, line_ends: bool = False, dialogues: bool = False) -> list[tuple[str, bool]]:
    """Read the texts of a piece.

    Args:
        piece: one of `pieces`.
        field: JSONL field or parquet column that holds the text.
        line_ends: whether a line break is added to each document that does not end in one, unless it is empty.
        dialogues: whether the field holds the messages of a dialogue, whose text is JSON of them.

    Returns:
        Each text, and whether a document ends with it.

    Raises:
        DataError: the piece cannot be read; the message names the file and the line, row or offset.
    """
    path = piece.file.path
    kind = inputs.kind(path)
    with places.reading(path, inputs.FLAG):
        if kind == inputs.PARQUET:
            texts = records.read_row_group(piece.file, piece.begin, field, dialogues)
        elif kind == inputs.JSONL:
            texts = _read_jsonl(path, piece.block or _lines(piece), field, dialogues)
        else:
            return [_read_text(path, piece.block or _text(piece), line_ends)]
    return [(text + "\n" if line_ends and text and text[-1] != "\n" else text, True) for text in texts]


def place(piece: Piece, i: int) -> str:
    """Name the file and the line or row of a text, for an error message.

    Args:
        piece: a piece of JSONL or parquet.
        i: index of the text in what `read` returns.
    """
    path = piece.file.path
    if inputs.kind(path) == inputs.PARQUET:
        return records.row(piece.file, piece.begin, i)
    block = piece.block or _lines(piece)
    starts = [at for at, line in _located(block) if not line.isspace()]
    return f"{path}, line {_number(path, starts[i])}"


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


def _located(block: Block) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a block, and where each begins in the file."""
    at = block.offset
    for line in io.BytesIO(block.data):
        yield at, line
        at += len(line)


def _read_jsonl(path: str, block: Block, field: str, dialogues: bool) -> list[str]:
    """Read the texts of lines; blank lines are skipped."""
    return [_text_of(line, field, dialogues, path, at) for at, line in _located(block) if not line.isspace()]


def _text_of(line: bytes, field: str, dialogues: bool, path: str, offset: int) -> str:
    text, wrong = records.text_in(line, field, dialogues)
    if wrong:
        where = f"{path}, line {_number(path, offset)}, {wrong}"
        raise DataError(f"a line without text ({where}): repair it, or see --text_field")
    return text


def _number(path: str, offset: int) -> int:
    """The number of the line that begins at an offset."""
    with _opened(path) as (_, file):
        return 1 + sum(block.count(b"\n") for block in _blocks(file, offset))


def _blocks(file, size: int) -> Iterator[bytes]:
    while size and (block := file.read(min(size, PIECE_BYTES))):
        size -= len(block)
        yield block


def _shorter(path: str, found: int, size: int) -> DataError:
    return DataError(
        f"the file became shorter ({path}, {found:,} of {size:,} bytes): wait until it is written, and repeat"
    )
