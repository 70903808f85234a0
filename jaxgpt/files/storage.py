"""Files that are whole or not there after a kill or a power cut, and words for storage that cannot be written."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator

from etils import epath

from jaxgpt.errors import JaxgptError

ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EIO,
          errno.EFBIG}  # fmt: skip


class StorageError(JaxgptError, RuntimeError):
    """A file or a folder cannot be written."""

    exit_code = 7


def is_remote(path) -> bool:
    """Whether a path is an object store's (gs://): a file appears there whole, and nothing is left to sync."""
    return "://" in str(path)


def write(path: str | os.PathLike, text: str) -> None:
    """Put a text in a file's place: whatever happens in between, the old content or the new one is there."""
    path = epath.Path(path)
    if is_remote(path):
        path.write_text(text)
        return
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
    replace(temporary, path)


def replace(temporary: str | os.PathLike, path: str | os.PathLike) -> None:
    """Give a finished file the name that it is to have, once its bytes are on the disk."""
    sync(temporary)
    os.replace(temporary, path)
    sync(os.path.dirname(os.path.abspath(path)))


def sync(path: str | os.PathLike) -> None:
    """Have what a local file or folder holds written to the disk, so that a power cut does not take it."""
    posix = os.name == "posix"
    if is_remote(path) or (os.path.isdir(path) and not posix):  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if posix else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free(path: str | os.PathLike) -> int | None:
    """Bytes that can be written where a path is or will be; None where nobody knows, as on an object store."""
    if is_remote(path):
        return None
    here = os.path.abspath(path)
    while not os.path.exists(here):
        here = os.path.dirname(here)
    return shutil.disk_usage(here).free


def size(n: int) -> str:
    """Bytes in a unit that people read."""
    return f"{n / 1e9:,.2f} GB" if n >= 1e9 else f"{n / 1e6:,.2f} MB"


@contextlib.contextmanager
def failures(folder: str | os.PathLike) -> Iterator[None]:
    """Turn errors of writing into one line that names path and free space.

    Raises:
        StorageError: an OSError of a full or read-only disk came, or an error of orbax that has its number.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        where, number = folder, getattr(error, "errno", None)
        if number is None and (told := re.search(r"os_error_code='(\d+)'|OS error (\d+)", str(error))):
            number = int(told[1] or told[2])
        elif isinstance(error, OSError):
            where = error.filename or folder
        if isinstance(error, StorageError) or number not in ERRNOS:
            raise
        raise StorageError(cannot_write(where, number)) from error


def cannot_write(path: str | os.PathLike | None, number: int) -> str:
    """One line for an error number."""
    room = free(path) if path else None
    space = "" if room is None else f", {size(room)} free"
    return f"cannot write ({path}, {os.strerror(number)}{space}): free space, or name another folder"
