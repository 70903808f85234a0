"""What an earlier `jaxgpt prepare` left in its folder, and whether that was for the same request and the same text.

A text is known by its content. Files of the same names, sizes and modification times count as unchanged, which costs
nothing. Otherwise the text is read again and compared by a chain of hashes with one link per piece. The processes that
tokenise compute these links on the way. Reading takes a small part of the time that tokenising took, and a chain can be
compared up to any piece: so a call continues though its input was moved, or was repaired behind what is done.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from jaxgpt.errors import JaxgptError, shortened
from jaxgpt.files import lock
from jaxgpt.files.screen import Lenient, progress
from jaxgpt.text import documents, encoding
from jaxgpt.text.inputs import File
from jaxgpt.text.token_folder import DATASET, TOKENIZER
from jaxgpt.text.workers import in_order

JOURNAL = "journal.json"


class PrepareError(JaxgptError, ValueError):
    """The flags do not fit together, or the folder belongs to another command."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What a call of `prepare` is to make."""

    input: str
    """As the user wrote it."""
    files: list[File]
    request: dict[str, Any]
    """Everything that determines the result."""
    out: pathlib.Path
    workers: int

    @property
    def size(self) -> int:
        """Size of all files, in bytes."""
        return sum(file.size for file in self.files)

    @property
    def processes(self) -> int:
        """The number of processes: no more than pieces, as starting one takes seconds."""
        return min(self.workers, max(1, self.size // documents.PIECE_BYTES))

    def bar(
        self, title: str, total: float | None = None, done: int = 0
    ) -> contextlib.AbstractContextManager[Callable[[float], None]]:
        """Show the progress over `total` bytes, or over all files; yields the function that advances it."""
        return progress(title, self.size if total is None else total, "B", sys.stderr, done)

    def say(self, message: str) -> None:
        """Print a message on the screen."""
        print(message, file=Lenient(sys.stderr), flush=True)


def finished(job: Job) -> dict[str, Any] | None:
    """Return the content of dataset.json if an earlier call has finished this job; None if the folder is not finished.

    Raises:
        PrepareError: the folder was made with other settings, or from another text.
    """
    facts = _read(job.out / DATASET)
    if facts is None:
        return None
    before, remedy = facts["request"], "delete it, or name another --out"
    if changed := _changed(before, job.request):
        raise PrepareError(f"the folder was made with other settings ({job.out}, {', '.join(changed)}): {remedy}")
    if not _same_files(before, job.request):
        sizes = [file.size for file in job.files] == [file["size"] for file in before["inputs"]]
        if not (sizes and _same_text(job, facts, None)):
            raise PrepareError(f"the folder was made from another text ({job.out}, {_inputs(job)}): {remedy}")
    return facts


def begun(job: Job, same_tokenizer: Callable[[], bool]) -> dict[str, Any]:
    """Return the journal to go on from: the one in the folder if it is of this job, else a new one if no work is lost.

    Args:
        job: it has the lock of the folder.
        same_tokenizer: whether the tokenizer in the folder is the one that the input gives now.

    Raises:
        PrepareError: the folder has work of another job, or other files in it.
    """
    fresh = {"request": job.request, "pieces": 0, "tokens": 0, "documents": 0, "texts": ""}
    journal = _read(job.out / JOURNAL)
    if journal is None:
        if any(path.name not in (lock.LOCK, f"{JOURNAL}.tmp") for path in job.out.iterdir()):
            raise PrepareError(f"the folder is not empty (--out, {job.out}): name another, or empty it")
        return fresh
    before, done = journal["request"], journal["pieces"]
    changed = _changed(before, job.request)
    if not changed and _same_files(before, job.request):
        return journal
    if not journal["tokens"]:
        job.say(f"beginning anew: {', '.join(changed) or 'the input'} changed, and no work is lost")
        (job.out / TOKENIZER).unlink(missing_ok=True)
        return fresh
    remedy = "delete it, or name another --out"
    if changed:
        raise PrepareError(f"the folder was begun with other settings ({job.out}, {', '.join(changed)}): {remedy}")
    if not (_same_text(job, journal, done) and same_tokenizer()):
        where = f"{job.out}, {done:,} pieces are done, {_inputs(job)}"
        raise PrepareError(f"the folder was begun with another text ({where}): {remedy}")
    job.say(f"going on: the input changed, but not the {done:,} pieces that are done")
    return journal | {"request": job.request}


def chained(chain: str | None, link: str) -> str | None:
    """Append a piece to a chain of hashes.

    Args:
        chain: the hash of the pieces before it; None if an older version, which wrote no hashes, began with them.
        link: the hash of the piece.
    """
    return None if chain is None else hashlib.sha256(f"{chain} {link}".encode()).hexdigest()


def _same_text(job: Job, before: dict[str, Any], n: int | None) -> bool:
    """Whether the first `n` pieces of the input, or all, are those that the journal or dataset.json tells of."""
    if before.get("texts") is None or before["request"].get("line_ends") != job.request["line_ends"]:
        return False
    chain, digest = "", functools.partial(encoding.digest, encoding.Reading.of(job.request))
    with job.bar("compare") as advance:
        for piece, link in in_order(digest, itertools.islice(documents.pieces(job.files), n), job.processes):
            chain = chained(chain, link)
            advance(piece.size)
    return chain == before["texts"]


def _changed(before: dict[str, Any], request: dict[str, Any]) -> list[str]:
    """The settings that two requests do not share; one that an older version did not know is no difference."""
    names = [name for name in request if name not in ("inputs", "line_ends")]  # which the user did not set
    return [name for name in names if before.get(name, request[name]) != request[name]]


def _same_files(before: dict[str, Any], request: dict[str, Any]) -> bool:
    """Whether the input files have the same names, sizes and times."""
    now = request["inputs"]
    whole_seconds = [{**file, "modified": int(file["modified"])} for file in now]  # as older versions wrote them
    return before["inputs"] in (now, whole_seconds)


def _inputs(job: Job) -> str:
    return f"--input {shortened(job.input, 300)}"


def _read(path: pathlib.Path) -> dict[str, Any] | None:
    """The content of a JSON file that an earlier call left; None if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        names = {"pieces", "tokens", "documents"} if path.name == JOURNAL else {"tokens", "documents", "vocab_size"}
        sizes = [file["size"] for file in found["request"]["inputs"]]
        names |= {"counted"} & found.keys()  # only of dialogues
        if all(isinstance(number, int) for number in [*sizes, *(found[name] for name in names)]):
            return found
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError, IsADirectoryError):
        pass
    raise PrepareError(f"not written by jaxgpt prepare ({path}): delete the folder, or name another")
