"""`jaxgpt prepare`: turn documents into a token folder, streamed, in parallel, and resumable.

A journal records how much of the arrays is safely on the disk, and an interrupted call continues from there.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from jaxgpt import tokenizer as tokenizers
from jaxgpt.data import DataError
from jaxgpt.devices import cores
from jaxgpt.devices.stopping import Stopped, stop_requests
from jaxgpt.errors import JaxgptError
from jaxgpt.files import lock, storage
from jaxgpt.text import documents
from jaxgpt.text.documents import File, Piece
from jaxgpt.text.npy import GrowingArray
from jaxgpt.text.token_folder import DATASET, ENDS, FORMAT, TOKENIZER, TOKENS, sha256_of
from jaxgpt.text.workers import in_order
from jaxgpt.tokenizer import BPETokenizer, CharTokenizer, TokenizerError, UnknownCharacterError

JOURNAL = "journal.json"
JOURNAL_SECONDS = 5.0
SAMPLE_BYTES = 100_000_000
NO_TEXT = "no text in the input (--input, {}): name files with text in them"


@dataclasses.dataclass(frozen=True)
class PrepareArgs:
    """Turn text files, JSONL and parquet into a token folder for --data.path."""

    input: str
    """Files or folders, separated by commas; .jsonl and .parquet hold many documents, other files are one document."""
    out: str
    """Folder to create; after an interruption the same command continues in it."""
    tokenizer: str = "gpt2"
    """gpt2, char, a tokenizer.json, or bpe: trained on the input, or on a sample spread over it if it is large."""
    vocab_size: int | None = None
    """Number of ids of the tokenizer that bpe trains."""
    text_field: str = "text"
    """JSONL field or parquet column that holds the text."""
    workers: int = cores.count()
    """Number of processes; it does not change the result."""


class PrepareError(JaxgptError, ValueError):
    """The flags do not fit together, or the folder belongs to another command."""


def prepare(args: PrepareArgs) -> dict[str, Any]:
    """Make the token folder, continue an interrupted one, or find it finished.

    Returns:
        The content of dataset.json.

    Raises:
        PrepareError: the flags do not fit together, or the folder belongs to other inputs or settings.
        DataError: an input cannot be read.
        TokenizerError: there is no such tokenizer.
        Stopped: a signal arrived; the same command continues.
        BusyError: another process is making this folder.
        StorageError: the folder cannot be written to.
    """
    _check(args)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    files = documents.list_files(args.input)
    request = _request(args, files)
    out = pathlib.Path(args.out).expanduser()
    if (facts := _finished(args, out, request, console)) is not None:
        return facts
    with lock.hold_lock(out, "wait until it is done, or name another --out"), storage.failures(out):
        return _finished(args, out, request, console) or _prepare(args, files, request, out, console)


def _finished(args: PrepareArgs, out: pathlib.Path, request: dict[str, Any], console: Console) -> dict[str, Any] | None:
    """The content of dataset.json, if an earlier call has finished this request."""
    facts = _earlier(out, DATASET, request)
    if facts is not None:
        (out / JOURNAL).unlink(missing_ok=True)
        console.print(f"nothing to do: {_summary(args, facts)}")
    return facts


def _prepare(
    args: PrepareArgs, files: list[File], request: dict[str, Any], out: pathlib.Path, console: Console
) -> dict[str, Any]:
    journal = _earlier(out, JOURNAL, request)
    if journal is None:
        if any(path.name != lock.LOCK for path in out.iterdir()):
            raise PrepareError(f"the folder is not empty (--out, {args.out}): name another, or empty it")
        journal = {"request": request, "pieces": 0, "tokens": 0, "documents": 0}
        _write_json(out / JOURNAL, journal)
    with _progress(console) as progress:
        if not (out / TOKENIZER).exists():
            _make_tokenizer(args, files, progress).save(out / "tokenizer.tmp")
            storage.replace(out / "tokenizer.tmp", out / TOKENIZER)
        facts = _tokenise(args, files, out, journal, progress)
    (out / JOURNAL).unlink()
    console.print(f"done: {_summary(args, facts)}")
    return facts


def _check(args: PrepareArgs) -> None:
    if args.workers < 1:
        raise PrepareError(f"too few processes (--workers, {args.workers}): use 1 or more")
    if "://" in args.out:
        raise PrepareError(f"the folder must be a local one (--out, {args.out}): make it here, then copy it")
    if (args.tokenizer == "bpe") != (args.vocab_size is not None):
        raise PrepareError(
            f"bpe needs --vocab_size, and nothing else takes it ({args.vocab_size} with --tokenizer {args.tokenizer}): "
            "write --tokenizer bpe --vocab_size 8192, or leave --vocab_size out"
        )
    known = ("gpt2", "char", "bpe")
    if args.tokenizer not in known and not os.path.isfile(args.tokenizer):
        raise TokenizerError(
            f"no such tokenizer (--tokenizer, {args.tokenizer!r}): use {', '.join(known)} or a tokenizer.json"
        )


def _request(args: PrepareArgs, files: list[File]) -> dict[str, Any]:
    """Everything that determines the result."""
    given = f"sha256 {sha256_of(pathlib.Path(args.tokenizer))}" if os.path.isfile(args.tokenizer) else args.tokenizer
    return {
        "tokenizer": given,
        "vocab_size": args.vocab_size,
        "text_field": args.text_field,
        "piece_bytes": documents.PIECE_BYTES,
        "inputs": [file._asdict() for file in files],
    }


def _earlier(out: pathlib.Path, name: str, request: dict[str, Any]) -> dict[str, Any] | None:
    """The content of a JSON file that an earlier call with the same request left in the folder."""
    try:
        found = json.loads((out / name).read_text(encoding="utf-8"))
        before = found["request"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise PrepareError(
            f"not written by jaxgpt prepare ({out / name}): delete the folder, or name another"
        ) from None
    if other := [key for key in request if before.get(key) != request[key]]:
        raise PrepareError(
            f"the folder was started with other settings ({out}, {', '.join(other)}): delete it, or name another --out"
        )
    return found


def _make_tokenizer(args: PrepareArgs, files: list[File], progress: Progress) -> tokenizers.Tokenizer:
    if args.tokenizer == "gpt2":
        return tokenizers.gpt2()
    if args.tokenizer not in ("char", "bpe"):
        return tokenizers.load(args.tokenizer)
    total = sum(file.size for file in files)
    if args.tokenizer == "char":
        task = progress.add_task("alphabet", total=total)
        alphabet: set[str] = set()
        find = functools.partial(characters, args.text_field)
        for piece, found in in_order(find, documents.pieces(files), _processes(args, files)):
            alphabet |= found
            progress.advance(task, piece.size)
        if not alphabet:
            raise DataError(NO_TEXT.format(args.input))
        return CharTokenizer("".join(sorted(alphabet)))
    every = -(-total // SAMPLE_BYTES)
    task = progress.add_task("sample", total=total / every)

    def sample() -> Iterator[str]:
        for piece in itertools.islice(documents.pieces(files), 0, None, every):
            yield from (text for text, _ in documents.read(piece, args.text_field))
            progress.advance(task, piece.size)

    return BPETokenizer.train(sample(), args.vocab_size)


def _tokenise(
    args: PrepareArgs, files: list[File], out: pathlib.Path, journal: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    """Append the pieces that the journal lacks, then write dataset.json."""
    vocab_size = tokenizers.load(out / TOKENIZER).vocab_size
    dtype = np.min_scalar_type(vocab_size - 1)
    tokens = GrowingArray(out / TOKENS, dtype, journal["tokens"])
    ends = GrowingArray(out / ENDS, np.dtype(np.int64), journal["documents"])
    todo = documents.pieces(files)
    done = sum(piece.size for piece in itertools.islice(todo, journal["pieces"]))
    task = progress.add_task("tokens", total=sum(file.size for file in files), completed=done)
    encode = functools.partial(encode_piece, str(out / TOKENIZER), sha256_of(out / TOKENIZER), args.text_field, dtype)

    def keep() -> None:
        tokens.sync()
        ends.sync()
        _write_json(out / JOURNAL, journal)

    saved = time.monotonic()
    with contextlib.closing(tokens), contextlib.closing(ends):
        with stop_requests() as request:
            for piece, (ids, ended) in in_order(encode, todo, _processes(args, files)):
                ends.append(ended + tokens.length)
                tokens.append(ids)
                journal |= {"pieces": journal["pieces"] + 1, "tokens": tokens.length, "documents": ends.length}
                progress.advance(task, piece.size)
                asked = request()
                if asked is not None or time.monotonic() - saved > JOURNAL_SECONDS:
                    keep()
                    saved = time.monotonic()
                if asked is not None:
                    raise Stopped(asked, journal["pieces"], "piece")
        if not tokens.length:
            raise DataError(NO_TEXT.format(args.input))
        ends.finish()
        offset = tokens.finish()
    facts = {
        "format": FORMAT,
        "dtype": dtype.name,
        "tokens": tokens.length,
        "documents": ends.length,
        "vocab_size": vocab_size,
        "sha256": sha256_of(out / TOKENS, offset),
        "tokenizer_sha256": sha256_of(out / TOKENIZER),
        "request": journal["request"],
    }
    _write_json(out / DATASET, facts)
    return facts


def characters(field: str, piece: Piece) -> set[str]:
    """Return the set of characters in a piece."""
    return set().union(*(text for text, _ in documents.read(piece, field)))


def encode_piece(
    tokenizer: str, sha256: str, field: str, dtype: np.dtype, piece: Piece
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise a piece.

    Args:
        tokenizer: path of a tokenizer.json.
        sha256: hex digest of that file.
        field: JSONL field or parquet column that holds the text.
        dtype: unsigned dtype of the ids.
        piece: one of `documents.pieces`.

    Returns:
        (N,) ids in `dtype`, and for each document that ends in the piece the index after its last id, (D,) int64.

    Raises:
        DataError: the piece cannot be read, or has a character that the tokenizer lacks.
    """
    encoder = _tokenizer(tokenizer, sha256)
    end = np.array([] if encoder.end_of_text is None else [encoder.end_of_text], np.int32)
    parts, ends, n = [np.empty(0, dtype)], [], 0
    for text, is_end in documents.read(piece, field):
        try:
            ids = encoder.encode(text)
        except UnknownCharacterError as error:
            raise DataError(f"not in the tokenizer's alphabet ({piece.file.path}): {error}") from None
        parts += [ids.astype(dtype), end.astype(dtype)] if is_end else [ids.astype(dtype)]
        n += len(ids) + (len(end) if is_end else 0)
        ends += [n] if is_end else []
    return np.concatenate(parts), np.array(ends, np.int64)


@functools.lru_cache(1)
def _tokenizer(path: str, sha256: str) -> tokenizers.Tokenizer:
    """Load a tokenizer once per process; the hash distinguishes two files with the same path."""
    return tokenizers.load(path)


def _processes(args: PrepareArgs, files: list[File]) -> int:
    """No more processes than pieces, as starting one takes seconds."""
    return min(args.workers, max(1, sum(file.size for file in files) // documents.PIECE_BYTES))


def _progress(console: Console) -> Progress:
    columns = "{task.description:9}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console)


def _summary(args: PrepareArgs, facts: dict[str, Any]) -> str:
    return (
        f"{args.out} holds {facts['tokens']:,} tokens ({facts['dtype']}, vocabulary of {facts['vocab_size']:,}) "
        f"in {facts['documents']:,} documents; train on it with --data.path {args.out}"
    )


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    storage.write(path, json.dumps(content, indent=1))
