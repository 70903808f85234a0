"""Where a text is: a path on this machine, or a URL of an object store."""

import contextlib
import os
from collections.abc import Iterator

from etils import epath

from jaxgpt.data import DataError
from jaxgpt.errors import JaxgptError, shortened
from jaxgpt.files import storage

STORES = ", ".join(f"{name}://" for name in storage.STORES)


def locate(name: str, flag: str) -> epath.Path:
    """Return the place that a user named.

    Args:
        name: a path, in which `~` is the home folder, or a URL of an object store.
        flag: the flag that it was given with, for the error message.

    Raises:
        DataError: it is a URL that we cannot read from, such as https://.
    """
    try:
        return epath.Path(os.path.expanduser(name))
    except KeyError as error:  # which names the scheme
        scheme = shortened(str(error.args[0]), 30)
        raise DataError(
            f"cannot read from {scheme} ({flag}, {shortened(name)}): download it and name the file, or copy it to an "
            f"object store ({STORES})"
        ) from None


def is_remote(name: str) -> bool:
    """Whether a name is a URL, or has one in it as a mixture may."""
    return "://" in name


def exists(name: str, flag: str) -> bool:
    """Whether there is a file or folder of exactly this name.

    Args:
        name: as in `locate`; it may also be a list or a mixture, which is no name of a file.
        flag: as in `locate`.

    Raises:
        DataError: it is a URL that cannot be read.
    """
    if name.partition("://")[0].isalnum() and is_remote(name):
        with reading(name, flag):
            return locate(name, flag).exists()
    return os.path.exists(os.path.expanduser(name))


@contextlib.contextmanager
def reading(name: str, flag: str) -> Iterator[None]:
    """Turn a failure to read an input inside the block into one line that names it.

    Args:
        name: path or URL of the input.
        flag: the flag that it was given with.

    Raises:
        DataError: instead of any error of the operating system, or of the library of an object store.
    """
    where = f"{flag}, {shortened(name, 300)}"
    try:
        yield
    except JaxgptError:
        raise
    except OSError as error:
        why = error.strerror or shortened(str(error))
        raise DataError(f"cannot read the input ({where}, {why}): check it") from None
    except Exception as error:
        if not is_remote(name):
            raise
        # each store has a library of its own, with its own errors
        why = shortened(f"{type(error).__name__}: {error}", 200)
        remedy = "install it" if isinstance(error, ImportError) else "check the address, the network and your rights"
        raise DataError(
            f"cannot read from the object store ({where}, {why}): {remedy}, or copy the files here"
        ) from error
