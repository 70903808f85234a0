"""What makes a checkpoint valid: a list of its files with size and sha256, sealed with its own, and written last."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from jaxgpt.files import storage

MANIFEST = "manifest.json"
FORMAT = 1
BLOCK_BYTES = 1 << 20


class DamagedError(ValueError):
    """A folder is not what its manifest says, or the manifest not what was written."""


class OtherFormatError(ValueError):
    """Another version of jaxgpt wrote the manifest."""


def write(folder: epath.Path, facts: dict[str, Any]) -> None:
    """Make a folder valid: all of its files are put on the disk and listed, then the list appears in one piece.

    Args:
        folder: complete; nothing else writes to it.
        facts: what the manifest says besides the files, in JSON's types.
    """
    files = {name: _size_and_sha256(folder / name) for name in sorted(_files(folder)) if name != MANIFEST}
    for name in files:
        storage.sync(folder / name)
    for level in sorted({(folder / name).parent for name in files}, reverse=True):
        storage.sync(level)
    storage.write(folder / MANIFEST, _sealed({"format": FORMAT, **facts, "files": files}))
    storage.sync(folder.parent)


def read(folder: epath.Path) -> dict[str, Any]:
    """The manifest, without a look at the files.

    Raises:
        FileNotFoundError: there is none.
        DamagedError: a byte of it is not as it was written.
        OtherFormatError: it is as another version of jaxgpt wrote it.
    """
    try:
        text = (folder / MANIFEST).read_bytes().decode()
        content = json.loads(text)
        content.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise DamagedError(f"{MANIFEST} cannot be read") from None
    if text != _sealed(content):
        raise DamagedError(f"{MANIFEST} was changed")
    if content.get("format") != FORMAT:
        raise OtherFormatError(f"format {content.get('format')}, this jaxgpt reads {FORMAT}")
    files = content.get("files")
    if not isinstance(files, dict) or not all(isinstance(facts, dict) for facts in files.values()):
        raise DamagedError(f"{MANIFEST} lists no files")
    return content


def verify(folder: epath.Path) -> None:
    """Compare every file with the manifest.

    Raises:
        DamagedError: a file is missing, a link, has another size or sha256, or stands there besides.
        OSError: a file cannot be read, which says nothing about its bytes.
    """
    files, there = read(folder)["files"], set(_files(folder))
    for name, wanted in files.items():
        if name not in there:  # nor is anything outside of the folder looked at
            raise DamagedError(f"{name} is missing")
        if os.path.islink(folder / name):
            raise DamagedError(f"{name} is a link")
        try:
            found = _size_and_sha256(folder / name, wanted.get("size"))
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise DamagedError(f"{name} cannot be read: {error.strerror}") from None
        for key in ("size", "sha256"):
            if found[key] != wanted.get(key):
                raise DamagedError(f"{name} has {key} {found[key]}, saved was {wanted.get(key)}")
    # a hidden file is a file manager's or a network file system's, and orbax does not read it
    more = [name for name in there - {MANIFEST, *files} if not name.rpartition("/")[2].startswith(".")]
    if more := sorted(more):
        raise DamagedError(f"{', '.join(more)} is not of this checkpoint")


def _sealed(content: dict[str, Any]) -> str:
    """JSON whose first field is the sha256 of the rest. One content has one text, so that any changed byte shows."""
    rest = json.dumps(content, indent=1)
    return json.dumps({"sha256": hashlib.sha256(rest.encode()).hexdigest(), **content}, indent=1) + "\n"


def _files(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """The files below a folder, as `a/b`; a link to a folder, which may lead anywhere, counts as one."""
    for path in folder.iterdir():
        if path.is_dir() and not os.path.islink(path):
            yield from _files(path, f"{prefix}{path.name}/")
        else:
            yield prefix + path.name


def _size_and_sha256(path: epath.Path, size: int | None = None) -> dict[str, Any]:
    """Of a file, read in blocks; not read at all where its size is not the one expected."""
    length = path.stat().length
    if size not in (None, length):
        return {"size": length, "sha256": None}
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return {"size": length, "sha256": digest.hexdigest()}
