"""One writer a folder. The kernel holds the lock and drops it when the process dies, however it dies."""

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
FAR = 1 << 30  # Windows locks bytes, and nobody else can read those: one behind the text


class BusyError(JaxgptError, ValueError):
    """Another process writes to the folder."""

    exit_code = 6


class LockWarning(JaxgptWarning):
    """The file system has no locks."""


@contextlib.contextmanager
def hold_lock(folder: str | os.PathLike, remedy: str) -> Iterator[None]:
    """Be the only writer of a folder, which is made if need be and removed again if nothing came into it.

    The file says who holds the lock; the lock itself is the kernel's, so a dead process leaves none. On an object
    store there is no lock.

    Args:
        folder: a local one, or an object store's.
        remedy: what to do when it is busy.

    Raises:
        BusyError: another process holds it, or this one already.
        StorageError: the folder cannot be made or written.
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
                path.unlink()  # still locked: whoever opened it meanwhile sees that it is gone
        with contextlib.suppress(OSError):
            if fcntl is None:
                path.unlink()  # Windows removes no open file, and therefore none that another one has locked
            path.parent.rmdir()  # only if it is empty


def _taken(path: pathlib.Path, remedy: str):
    """The open file of the lock."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        except (FileExistsError, FileNotFoundError):
            if path.parent.is_file() or path.parent.is_symlink():
                raise
            continue  # its last holder removed the empty folder between our two calls
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
            raise BusyError(f"another process writes here ({path.parent}, {holder}): {remedy}") from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        file.close()  # the same with the file


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
    except (OSError, ValueError, KeyError, TypeError):  # it has not said so yet
        return "which has just started"
