"""Atomic file writes that survive a kill or a power cut, and readable errors when a disk cannot be written."""

import atexit
import contextlib
import errno
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Iterator

from etils import epath

from jaxgpt.errors import ArgumentError, JaxgptError

# what the operating system says of a path or a disk; other numbers would be mistakes of ours
ERRNOS = {getattr(errno, name) for name in (
    "ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "ENOTDIR", "EISDIR", "EEXIST", "EIO", "EFBIG", "ENAMETOOLONG",
    "ELOOP", "ENODEV", "ENXIO", "ESTALE", "ETIMEDOUT", "ENOTCONN", "EMFILE", "ENFILE", "ETXTBSY", "EBUSY",
) if hasattr(errno, name)}  # fmt: skip
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
STORES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}  # and the library that reads each


class StorageError(JaxgptError, RuntimeError):
    """A file or folder cannot be written."""

    exit_code = 7


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is on an object store, where writes are atomic and need no sync.

    Raises:
        ArgumentError: it is an address of another kind.
    """
    scheme, separator, _ = str(path).partition("://")
    if not separator:
        return False
    if scheme not in STORES:
        known = ", ".join(f"{name}://" for name in STORES)
        raise ArgumentError(f"not a path ({path}): use a local path, or an object store ({known})")
    return True


def check_store(path: str | os.PathLike) -> None:
    """Check that the library for an object store is installed.

    Raises:
        ArgumentError: it is not, or the path is an address of another kind.
    """
    if is_remote(path) and importlib.util.find_spec(library := STORES[str(path).partition("://")[0]]) is None:
        raise ArgumentError(f"no library for this object store ({path}): pip install {library}")


def without_backslash(folder: epath.Path) -> epath.Path:
    """Return a name of a folder that has no backslash, which tensorstore would take for a slash.

    Args:
        folder: a local folder; it is created if it needs another name, which is a link to it.
    """
    if "\\" not in str(folder) or os.name == "nt":
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    aside = tempfile.mkdtemp(prefix="jaxgpt-run-")
    atexit.register(shutil.rmtree, aside, ignore_errors=True)
    os.symlink(folder, alias := os.path.join(aside, folder.name))
    return epath.Path(alias)


def write(path: str | os.PathLike, text: str) -> None:
    """Write text to a file atomically: after a crash the file holds either the old content or the new."""
    path = epath.Path(path)
    if is_remote(path):
        path.write_text(text)
        return
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
    replace(temporary, path)


def replace(temporary: str | os.PathLike, path: str | os.PathLike) -> None:
    """Sync a finished temporary file to the disk, then rename it to its final path."""
    sync(temporary)
    os.replace(temporary, path)
    sync(os.path.dirname(os.path.abspath(path)))


def sync(path: str | os.PathLike) -> None:
    """Flush a local file or folder to the disk, so that it survives a power cut."""
    posix = os.name == "posix"
    if is_remote(path) or (os.path.isdir(path) and not posix):  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY if posix else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free(path: str | os.PathLike) -> int | None:
    """Return the free bytes on the disk of a path, which need not exist yet; None for an object store."""
    if is_remote(path):
        return None
    here = os.path.abspath(path)
    while not os.path.exists(here):
        here = os.path.dirname(here)
    return shutil.disk_usage(here).free


def size(n: int) -> str:
    """Format a number of bytes as MB or GB."""
    return f"{n / 1e9:,.2f} GB" if n >= 1e9 else f"{n / 1e6:,.2f} MB"


@contextlib.contextmanager
def failures(folder: str | os.PathLike) -> Iterator[None]:
    """Turn a failed write inside the block into one line with the path and the free space.

    Args:
        folder: the path to name if the error names none.

    Raises:
        StorageError: instead of an OSError about a full or read-only disk, or an orbax error that quotes its number.
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
    """Return the error message for a path (None if unknown) and an OS error number."""
    room = free(path) if path else None
    space = "" if room is None else f", {size(room)} free"
    remedy = "free space, or name another folder" if number in FULL else "name a folder that you can write to"
    return f"cannot write ({path}, {os.strerror(number)}{space}): {remedy}"
