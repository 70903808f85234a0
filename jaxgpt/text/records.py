"""The records of JSONL and parquet files, and the text or the messages in them."""

import json
from typing import Any

from jaxgpt.data import DataError
from jaxgpt.errors import shortened
from jaxgpt.text import inputs, places
from jaxgpt.text.inputs import File

MESSAGES = "messages"
"""The field that holds the messages of a dialogue."""


def parse(line: bytes) -> dict[str, Any]:
    """Return the object in a line of JSONL, an empty one if there is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def text_in(line: bytes, field: str, dialogues: bool) -> tuple[str | None, str | None]:
    """Read the text in a line of JSONL.

    Args:
        line: the line.
        field: the field that holds the text.
        dialogues: whether the field holds messages; the text is then JSON of them.

    Returns:
        The text, and why it cannot be used; None if it can.
    """
    try:
        record = json.loads(line)
        if not isinstance(record, dict) or field not in record:
            return None, f"no field {shortened(repr(field))}"
        text = _text(record[field], dialogues)
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {_line(error)}"
    return text, _wrong(text)


def open_parquet(file: File):
    """Open a file with pyarrow, which is an optional dependency: plain text does not need it.

    Raises:
        DataError: it is not parquet, or pyarrow is not installed.
    """
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


def example(file: File) -> dict[str, Any]:
    """Return a record with the columns of a parquet file: empty lists where they are nested, otherwise empty texts."""
    with open_parquet(file) as opened:
        return {column.name: [] if column.type.num_fields else "" for column in opened.schema_arrow}


def read_row_group(file: File, group: int, field: str, dialogues: bool) -> list[str]:
    """Read the texts of a row group of a parquet file.

    Args:
        file: the file.
        group: index of the row group.
        field: the column that holds the text.
        dialogues: as in `text_in`.

    Raises:
        DataError: the file cannot be read, or a row has no text.
    """
    with open_parquet(file) as opened:
        if field not in (names := opened.schema_arrow.names):
            has = shortened(", ".join(names), 200)
            raise DataError(
                f"no column {shortened(repr(field))} ({file.path}, it has {has}): name one with --text_field"
            )
        try:
            values = opened.read_row_group(group, columns=[field])[field].to_pylist()
        except Exception as error:  # damaged pages: pyarrow raises several kinds
            where = f"{file.path}, row group {group}, {_line(error)}"
            raise DataError(f"damaged parquet ({where}): fetch it again") from None
    texts = [_text(value, dialogues) for value in values]
    for i, text in enumerate(texts):
        if wrong := _wrong(text):
            raise DataError(f"a row without text ({row(file, group, i)}, {wrong}): repair it, or see --text_field")
    return texts


def row(file: File, group: int, i: int) -> str:
    """Name row `i` of a row group, for an error message."""
    return f"{file.path}, row {i} of row group {group}"


def _text(value: Any, dialogues: bool) -> Any:
    return json.dumps(value, default=str) if dialogues else value


def _wrong(text: Any) -> str | None:
    """Why a value is not a text; None if it is one."""
    if not isinstance(text, str):
        return f"not a string but {type(text).__name__}"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"half of a surrogate pair at character {error.start}"
    return None


def _line(error: Exception) -> str:
    return shortened(" ".join(str(error).split()), 200)
