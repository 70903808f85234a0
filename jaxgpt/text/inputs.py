"""The input files of `jaxgpt prepare`: those that are named, and those of a known kind in a folder."""

import os
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from etils import epath

from jaxgpt.data import DataError
from jaxgpt.errors import JaxgptWarning, shortened
from jaxgpt.text import places

TEXT, JSONL, PARQUET = "text", "jsonl", "parquet"
KINDS = {
    ".txt": TEXT,
    ".md": TEXT,
    ".jsonl": JSONL,
    ".parquet": PARQUET,
    ".txt.gz": TEXT,
    ".md.gz": TEXT,
    ".jsonl.gz": JSONL,
    ".json.gz": JSONL,  # so C4 and Dolma name them
}
ENDINGS = ".txt, .md, .jsonl, .parquet, .txt.gz or .jsonl.gz"
FLAG = "--input"


class InputWarning(JaxgptWarning):
    """Files of a folder are left out."""


class File(NamedTuple):
    """An input file; its size and modification time tell whether it has changed."""

    path: str
    size: int
    modified: float


def kind(path: str) -> str | None:
    """Return the kind of a file, by the ending of its name in any case: TEXT, JSONL, PARQUET, or None if unknown."""
    return next((kind for ending, kind in KINDS.items() if path.lower().endswith(ending)), None)


def is_packed(path: str) -> bool:
    """Return whether a file is compressed with gzip."""
    return path.lower().endswith(".gz")


def is_one_text(files: Sequence[File]) -> bool:
    """Return whether the input is a single text file, and so a single document."""
    return len(files) == 1 and kind(files[0].path) in (TEXT, None)


def list_files(paths: str) -> list[File]:
    """List the input files: those named, and those of a known kind in the named folders, in sorted order.

    Hidden files and folders inside a folder are passed over. What else is left out there is named in a warning.

    Args:
        paths: files and folders, separated by commas; or one file or folder with a comma in its name.

    Raises:
        DataError: a path does not exist, a folder has nothing to read, or a file that is named is empty.
    """
    names = [paths] if places.exists(paths, FLAG) else [name for name in paths.split(",") if name]
    if not names:
        raise DataError(f"no input ({FLAG}, {paths!r}): name files or folders")
    files = []
    for name in names:
        place = places.locate(name, FLAG)
        with places.reading(name, FLAG):
            is_folder = place.is_dir()
        files += _in_folder(name, place) if is_folder else [_named(place)]
    return files


def _named(path: epath.Path) -> File:
    file = _stat(path)
    if not file.size:
        raise DataError(f"empty file ({FLAG}, {file.path}, 0 bytes): leave it out")
    return file


def _in_folder(name: str, folder: epath.Path) -> list[File]:
    with places.reading(name, FLAG):
        paths = list(_inside(folder))
    files = [_stat(path) for path in paths if kind(path.name)]
    other = [path for path in paths if not kind(path.name)]
    empty = [epath.Path(file.path) for file in files if not file.size]
    if len(empty) == len(files):
        found = f", {_some(other + empty, folder)} cannot be used" if paths else ""
        raise DataError(
            f"nothing to read ({FLAG}, {shortened(name, 300)}{found}): put {ENDINGS} files with text into it"
        )
    if other:
        remedy = f"save them as {ENDINGS}, or name a text file of another ending itself"
        warnings.warn(f"left out ({name}, {_some(other, folder)}): {remedy}", InputWarning, stacklevel=3)
    if empty:
        warnings.warn(f"left out as empty ({name}, {_some(empty, folder)}): delete them", InputWarning, stacklevel=3)
    return [file for file in files if file.size]


def _inside(folder: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):  # .git, .ipynb_checkpoints, and the ._a.txt that macOS writes beside a.txt
            continue
        if path.is_dir():
            yield from _inside(path)
        else:
            yield path


def _stat(path: epath.Path) -> File:
    with places.reading(str(path), FLAG):
        facts = path.stat()
        remote = places.is_remote(str(path))
        return File(str(path), facts.length, facts.mtime if remote else os.stat(path).st_mtime)  # which has fractions


def _some(paths: Sequence[epath.Path], folder: epath.Path) -> str:
    """The number of files, and the names of the first few."""
    names = [shortened(os.path.relpath(path, folder), 60) for path in paths[:3]]
    count = "1 file" if len(paths) == 1 else f"{len(paths):,} files"
    return f"{count}: {', '.join(names)}{', ...' if len(paths) > 3 else ''}"
