"""The manifest that makes a checkpoint valid.

It lists every file with its size and sha256, carries a sha256 of itself, and is written last.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from typing import Any

from etils import epath

from jaxgpt.files import storage

MANIFEST = "manifest.json"
FORMAT = 1
BLOCK_BYTES = 1 << 20
STRAY = re.compile(r"\..*|~.*|.*~|(eh)?thumbs.*\.db|desktop\.ini|icon\r", re.IGNORECASE)


class DamagedError(ValueError):
    """A folder does not match its manifest, or the manifest is not as it was written."""


class OtherFormatError(ValueError):
    """Another version of jaxgpt wrote the manifest."""


def write(folder: epath.Path, facts: dict[str, Any]) -> None:
    """Make a folder valid: sync and list all of its files, then write the manifest atomically.

    On an object store the files are not read again for their sha256: each store keeps checksums of its own.

    Args:
        folder: a complete folder that nothing else writes to.
        facts: further entries of the manifest, as JSON types.
    """
    remote = storage.is_remote(folder)
    names = [name for name in sorted(_files(folder)) if name != MANIFEST]
    files = {name: _size_and_sha256(folder / name, hashed=not remote) for name in names}
    for name in files:
        storage.sync(folder / name)
    for level in sorted({(folder / name).parent for name in files}, reverse=True):
        storage.sync(level)
    storage.write(folder / MANIFEST, _sealed({"format": FORMAT, **facts, "files": files}))
    storage.sync(folder.parent)


def read(folder: epath.Path) -> dict[str, Any]:
    """Read and check the manifest of a folder, without reading the files that it lists.

    Raises:
        FileNotFoundError: there is no manifest.
        DamagedError: a byte of the manifest has changed.
        OtherFormatError: another version of jaxgpt wrote the manifest.
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
        raise OtherFormatError(f"format {content.get('format')}, but this jaxgpt reads format {FORMAT}")
    files = content.get("files")
    if not isinstance(files, dict) or not all(isinstance(facts, dict) for facts in files.values()):
        raise DamagedError(f"{MANIFEST} lists no files")
    return content


def verify(folder: epath.Path) -> None:
    """Compare every file of a folder with its manifest.

    Raises:
        DamagedError: a file is missing, unlisted, a link, or has another size or sha256.
        OSError: a file cannot be read, which says nothing about its bytes.
    """
    files, present = read(folder)["files"], set(_files(folder))
    for name, wanted in files.items():
        if name not in present:  # so a name that leads out of the folder is never opened
            raise DamagedError(f"{name} is missing")
        if os.path.islink(folder / name):
            raise DamagedError(f"{name} is a link")
        try:
            found = _size_and_sha256(folder / name, wanted.get("size"), hashed=wanted.get("sha256") is not None)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise DamagedError(f"{name} cannot be read: {error.strerror}") from None
        for key in ("size", "sha256"):
            if found[key] != wanted.get(key):
                raise DamagedError(f"{name} has {key} {found[key]}, but was saved with {wanted.get(key)}")
    # file managers and network file systems leave files behind, which orbax does not read
    extra = [name for name in present - {MANIFEST, *files} if not STRAY.fullmatch(name.rpartition("/")[2])]
    if extra:
        raise DamagedError(f"not part of this checkpoint: {', '.join(sorted(extra))}")


def _sealed(content: dict[str, Any]) -> str:
    """The content as JSON, led by the sha256 of the rest. Each content has one text, so that any changed byte shows."""
    rest = json.dumps(content, indent=1)
    return json.dumps({"sha256": hashlib.sha256(rest.encode()).hexdigest(), **content}, indent=1) + "\n"


def _files(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """The files below a folder, as `a/b`; a link to a folder counts as a file, since it may lead anywhere."""
    for path in folder.iterdir():
        if path.is_dir() and not os.path.islink(path):
            yield from _files(path, f"{prefix}{path.name}/")
        else:
            yield prefix + path.name


def _size_and_sha256(path: epath.Path, size: int | None = None, hashed: bool = True) -> dict[str, Any]:
    """The size and sha256 of a file; the sha256 is None if it is not wanted, or the size is not the expected one."""
    length = path.stat().length
    if not hashed or size not in (None, length):
        return {"size": length, "sha256": None}
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return {"size": length, "sha256": digest.hexdigest()}
