"""Documents in text files, JSONL and parquet, cut into pieces that can be read independently.

The cuts of a piece depend on its two offsets alone, so any process can read any piece, in any order.
"""

import json
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from etils import epath

from jaxgpt.data import DataError
from jaxgpt.tokenizer import SAFE_CUT

PIECE_BYTES = 1 << 20
CUT_BYTES = 1 << 16  # how far we search for a safe cut; a longer text without spaces is cut between any two characters
MARGIN = 4  # bytes before a cut that decide whether it is safe
KINDS = (".txt", ".jsonl", ".parquet")


class File(NamedTuple):
    """An input file; its size and modification time tell whether it has changed."""

    path: str
    size: int
    modified: float


class Piece(NamedTuple):
    """A range of bytes of a text or JSONL file, moved to the nearest possible cuts, or a parquet row group."""

    file: File
    begin: int
    end: int
    size: int
    """Its share of the file's bytes, for the progress bar."""


def list_files(paths: str) -> list[File]:
    """List the input files: those named, and those of a known kind in the named folders, in sorted order.

    Args:
        paths: files and folders, separated by commas.

    Raises:
        DataError: a path does not exist, a folder has no file of a known kind, or a file is empty.
    """
    files = []
    for name in paths.split(","):
        path = epath.Path(name).expanduser()
        try:
            facts = [(each, each.stat()) for each in (_inside(path) if path.is_dir() else [path])]
        except OSError as error:
            raise DataError(f"cannot read the input (--input, {name}, {error.strerror or error}): check it") from None
        if not facts:
            raise DataError(f"nothing to read (--input, {name}): put {', '.join(KINDS)} files into the folder")
        files += [File(str(each), stat.length, stat.mtime) for each, stat in facts]
    for file in files:
        if not file.size:
            raise DataError(f"empty file ({file.path}, 0 bytes): leave it out")
    return files


def _inside(folder: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _inside(path)
        elif path.suffix in KINDS:
            yield path


def pieces(files: Iterable[File]) -> Iterator[Piece]:
    """Yield all pieces, in the order of their documents."""
    for file in files:
        if file.path.endswith(".parquet"):
            n = _parquet(file).num_row_groups
            yield from (Piece(file, i, i + 1, file.size * (i + 1) // n - file.size * i // n) for i in range(n))
        else:
            for begin in range(0, file.size, PIECE_BYTES):
                end = min(begin + PIECE_BYTES, file.size)
                yield Piece(file, begin, end, end - begin)


def read(piece: Piece, field: str) -> list[tuple[str, bool]]:
    """Read the texts of a piece.

    Args:
        piece: one of `pieces`.
        field: JSONL field or parquet column that holds the text.

    Returns:
        Each text, and whether a document ends with it.

    Raises:
        DataError: the piece cannot be read; the message names the file and the line, row or offset.
    """
    path = piece.file.path
    try:
        if path.endswith(".parquet"):
            return _read_parquet(piece, field)
        if path.endswith(".jsonl"):
            return _read_jsonl(piece, field)
        return _read_text(piece)
    except OSError as error:
        raise DataError(f"cannot read the input ({path}, {error.strerror or error}): check it") from None


def _read_text(piece: Piece) -> list[tuple[str, bool]]:
    (path, size, _), begin, end, _ = piece
    offset = max(0, begin - MARGIN)
    with epath.Path(path).open("rb") as file:
        file.seek(offset)
        block = file.read(min(end + CUT_BYTES, size) - offset)
    first = _cut(block, begin - offset) if begin else 0
    last = _cut(block, end - offset) if end < size else len(block)
    try:
        text = block[first:last].decode()
    except UnicodeDecodeError as error:
        bad = f"byte 0x{block[first + error.start]:02x} at offset {offset + first + error.start}"
        raise DataError(f"not UTF-8 ({path}, {bad}): save the file as UTF-8 text, or leave it out") from None
    return [(text if begin else text.removeprefix("\ufeff"), end >= size)]


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


def _read_jsonl(piece: Piece, field: str) -> list[tuple[str, bool]]:
    """Read the lines that begin in the piece; blank lines are skipped."""
    (path, _, _), begin, end, _ = piece
    texts = []
    with epath.Path(path).open("rb") as file:
        at = begin
        if begin:
            file.seek(begin - 1)
            at += len(file.readline()) - 1
        while at < end and (line := file.readline()):
            if not line.isspace():
                texts.append((_text_of(line, field, path, at), True))
            at += len(line)
    return texts


def _text_of(line: bytes, field: str, path: str, offset: int) -> str:
    try:
        record = json.loads(line)
        wrong = _wrong(record[field]) if isinstance(record, dict) and field in record else f"no field {field!r}"
    except (ValueError, RecursionError) as error:
        wrong = f"not JSON: {error}"
    if wrong:
        with epath.Path(path).open("rb") as file:
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
    try:
        return pyarrow.parquet.ParquetFile(epath.Path(file.path).open("rb"))
    except pyarrow.ArrowException as error:
        raise DataError(f"not parquet ({file.path}, {_line(error)}): leave it out") from None


def _read_parquet(piece: Piece, field: str) -> list[tuple[str, bool]]:
    path = piece.file.path
    with _parquet(piece.file) as file:
        if field not in (names := file.schema_arrow.names):
            raise DataError(f"no column {field!r} ({path}, it has {', '.join(names)}): name one with --text_field")
        try:
            texts = file.read_row_group(piece.begin, columns=[field])[field].to_pylist()
        except Exception as error:  # damaged pages: pyarrow raises several kinds
            where = f"{path}, row group {piece.begin}, {_line(error)}"
            raise DataError(f"damaged parquet ({where}): fetch it again") from None
    for i, text in enumerate(texts):
        if wrong := _wrong(text):
            where = f"{path}, row {i} of row group {piece.begin}, {wrong}"
            raise DataError(f"a row without text ({where}): repair it, or see --text_field")
    return [(text, True) for text in texts]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
