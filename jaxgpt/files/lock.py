"""A lock that lets one process at a time write to a folder.

The kernel holds the lock, so it is released when the process dies, however it dies. We do not use the package filelock:
it cannot tell who holds the lock without a second file, which may disagree with the first. Where a file system has no
locks, filelock falls back to a marker file that outlives a killed process; we warn instead.
"""

import contextlib
import datetime
import errno
import json
import os
import pathlib
import socket
import warnings
from collections.abc import Iterator

from jaxgpt.errors import JaxgptError, JaxgptWarning
from jaxgpt.files import storage

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = "lock.json"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
HELD = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK}
FAR = 1 << 30  # Windows locks single bytes, which nobody else can then read: we lock one far behind the text


class BusyError(JaxgptError, ValueError):
    """Another process is writing to the folder."""

    exit_code = 6


class LockWarning(JaxgptWarning):
    """The file system has no locks."""


@contextlib.contextmanager
def hold_lock(folder: str | os.PathLike, remedy: str) -> Iterator[None]:
    """Hold the lock of a folder. The folder is created if it is missing, and removed at the end if it is still empty.

    The lock file names the process that holds the lock. An object store has no locks, so there this does nothing.

    Args:
        folder: local path or URL of an object store.
        remedy: what the user can do if the lock is taken, for the error message.

    Raises:
        BusyError: another process holds the lock, or this process already does.
        StorageError: the folder cannot be created or written to.
    """
    if storage.is_remote(folder):
        yield
        return
    path = pathlib.Path(folder) / LOCK
    with storage.failures(folder):
        file = _taken(path, remedy)
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}"}
        file.seek(0)
        file.write(json.dumps(me).encode())
        file.truncate()
        file.flush()
    try:
        yield
    finally:
        with contextlib.suppress(OSError), file:
            if fcntl is not None:
                path.unlink()  # while locked, so that a process that has just opened the file sees that it is gone
        with contextlib.suppress(OSError):
            if fcntl is None:
                path.unlink()  # Windows removes no open file, so never one that another process has locked
            path.parent.rmdir()  # only if it is empty


def _taken(path: pathlib.Path, remedy: str):
    """Take the lock and return its open file."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        except (FileExistsError, FileNotFoundError):
            if path.parent.is_file() or path.parent.is_symlink():
                raise
            continue  # the last holder removed the empty folder between our two calls
        try:
            _lock(file)
        except OSError as error:
            if error.errno in NO_LOCKS:
                warnings.warn(
                    f"no locks on this file system ({path.parent}, {error.strerror}): start only one process here",
                    LockWarning,
                    stacklevel=2,
                )
                return file
            holder = _holder(path)
            file.close()
            if error.errno not in HELD:
                raise
            raise BusyError(f"another process is writing here ({path.parent}, {holder}): {remedy}") from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        file.close()  # the last holder removed the file after we opened it


def _lock(file) -> None:
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        import msvcrt

        file.seek(FAR)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)


def _holder(path: pathlib.Path) -> str:
    try:
        who = json.loads(path.read_bytes())
        return f"pid {who['pid']} on {who['host']} since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # the holder has not written the file yet
        return "a process that has just started"
