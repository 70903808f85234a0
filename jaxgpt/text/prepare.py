"""`jaxgpt prepare`: turn documents into a token folder, streamed, in parallel, and resumable.

A journal records how much of the arrays is safely on the disk, and an interrupted call continues from there.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxgpt import tokenizer as tokenizers
from jaxgpt.data import DataError
from jaxgpt.devices import cores
from jaxgpt.devices.stopping import Stopped, stop_requests
from jaxgpt.errors import shortened
from jaxgpt.files import lock, storage
from jaxgpt.settings.checks import Path, check_fields
from jaxgpt.text import documents, inputs, journal, records
from jaxgpt.text.encoding import Reading, characters, encode
from jaxgpt.text.inputs import File
from jaxgpt.text.journal import JOURNAL, Job, PrepareError
from jaxgpt.text.npy import GrowingArray
from jaxgpt.text.token_folder import DATASET, ENDS, FORMAT, MASK, MASKED, SETTINGS, TOKENIZER, TOKENS
from jaxgpt.text.verified import sha256_of
from jaxgpt.text.workers import in_order
from jaxgpt.tokenizer import BPETokenizer, CharTokenizer, TokenizerError

JOURNAL_SECONDS = 5.0
SAMPLE_BYTES = 100_000_000
FROM_INPUT, KNOWN = ("char", "bpe"), ("gpt2", "char", "bpe")
FRESH_TOKENIZER = "tokenizer.tmp"
NO_TEXT = "no text in the input (--input, {}): name files with text in them"


@dataclasses.dataclass(frozen=True)
class PrepareArgs:
    """Turn text files, JSONL and parquet into a token folder for --data.path."""

    input: Path
    """Files or folders, separated by commas. Each row of .jsonl and .parquet is a document, and every other file is
    one; .gz is unpacked. A folder gives its .txt, .md, .jsonl, .parquet, .txt.gz and .jsonl.gz files. Rows with
    messages (a list of objects with role and content) are dialogues, of which training learns the answers only."""
    out: Path
    """Folder to create; after an interruption the same command continues in it."""
    tokenizer: Path = "gpt2"
    """gpt2, char, a tokenizer.json, or bpe: trained on the input, or on a sample spread over it if it is large. With
    char, each document ends in a line break, which is added where there is none; a text file alone stays as it is.
    Dialogues need the tokenizer.json of a run that has a chat template."""
    vocab_size: int | None = None
    """Number of ids of the tokenizer that bpe trains."""
    text_field: str = "text"
    """JSONL field or parquet column that holds the text."""
    workers: int = cores.count()
    """Number of processes; it does not change the result."""

    def __post_init__(self):
        check_fields(self)


def prepare(args: PrepareArgs) -> dict[str, Any]:
    """Make the token folder, continue an interrupted one, or find it finished.

    Returns:
        The content of dataset.json.

    Raises:
        PrepareError: the flags do not fit together, or the folder belongs to another text or to other settings.
        DataError: an input cannot be read.
        TokenizerError: there is no such tokenizer.
        Stopped: a signal arrived; the same command continues.
        BusyError: another process is making this folder.
        StorageError: the folder cannot be written to.
    """
    _check(args)
    files = inputs.list_files(args.input)
    job = Job(args.input, files, _request(args, files), pathlib.Path(args.out), args.workers)
    if (facts := _finished(job)) is not None:
        return facts
    with lock.hold_lock(job.out, "wait until it is done, or name another --out"), storage.failures(job.out):
        facts = _finished(job)  # another process may have been faster
        return _prepare(job, args) if facts is None else facts


def _finished(job: Job) -> dict[str, Any] | None:
    facts = journal.finished(job)
    if facts is not None:
        with contextlib.suppress(OSError):
            (job.out / JOURNAL).unlink()
        job.say(f"nothing to do: {_summary(job, facts)}")
    return facts


def _prepare(job: Job, args: PrepareArgs) -> dict[str, Any]:
    def make_tokenizer() -> pathlib.Path:
        _make_tokenizer(job, args).save(job.out / FRESH_TOKENIZER)
        return job.out / FRESH_TOKENIZER

    def same_tokenizer() -> bool:
        made_of_input = args.tokenizer in FROM_INPUT
        return not made_of_input or make_tokenizer().read_bytes() == (job.out / TOKENIZER).read_bytes()

    done = journal.begun(job, same_tokenizer)
    _write_json(job.out / JOURNAL, done)
    if not (job.out / TOKENIZER).exists():
        (job.out / SETTINGS).unlink(missing_ok=True)  # of another tokenizer, with which a call began
        storage.replace(make_tokenizer(), job.out / TOKENIZER)
    facts = _tokenise(job, done)
    for name in (JOURNAL, FRESH_TOKENIZER):
        (job.out / name).unlink(missing_ok=True)
    job.say(f"done: {_summary(job, facts)}")
    return facts


def _check(args: PrepareArgs) -> None:
    if args.workers < 1:
        raise PrepareError(f"too few processes (--workers, {args.workers}): use 1 or more")
    if storage.is_remote(args.out):
        raise PrepareError(f"the folder must be a local one (--out, {shortened(args.out)}): make it here, then copy it")
    if (args.tokenizer == "bpe") != (args.vocab_size is not None):
        raise PrepareError(
            f"bpe needs --vocab_size, and nothing else takes it ({args.vocab_size} with --tokenizer "
            f"{shortened(args.tokenizer)}): write --tokenizer bpe --vocab_size 8192, or leave --vocab_size out"
        )
    if args.tokenizer not in KNOWN and not os.path.isfile(args.tokenizer):
        named = shortened(repr(args.tokenizer))
        raise TokenizerError(f"no such tokenizer (--tokenizer, {named}): use {', '.join(KNOWN)} or a tokenizer.json")


def _request(args: PrepareArgs, files: list[File]) -> dict[str, Any]:
    """Everything that determines the result."""
    given, alphabet, loaded = args.tokenizer, "\n" if args.tokenizer == "char" else "", None
    if given not in KNOWN:
        given = f"sha256 {sha256_of(pathlib.Path(args.tokenizer))}"
        loaded = tokenizers.load(args.tokenizer)
        alphabet = getattr(loaded, "alphabet", "")
    request = {
        "tokenizer": given,
        "vocab_size": args.vocab_size,
        "text_field": args.text_field,
        "line_ends": "\n" in alphabet and not inputs.is_one_text(files),
        "piece_bytes": documents.PIECE_BYTES,
        "inputs": [file._asdict() for file in files],
    }
    if settings := getattr(loaded, "settings", None):
        request["tokenizer_config"] = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    if documents.are_dialogues(files, args.text_field):
        _check_dialogues(args, files, loaded)
        request |= {"text_field": records.MESSAGES, "line_ends": False, "dialogues": True}
    return request


def _check_dialogues(args: PrepareArgs, files: list[File], tokenizer: tokenizers.Tokenizer | None) -> None:
    if tokenizer is None or tokenizer.chat_template is None:
        raise TokenizerError(
            f"dialogues need a chat template (--tokenizer, {shortened(args.tokenizer)} has none): name the "
            "tokenizer.json of a run that has one, such as one of `jaxgpt import --from smollm2`"
        )
    if texts := [file.path for file in files if inputs.kind(file.path) in (inputs.TEXT, None)]:
        raise DataError(
            f"a text among dialogues ({inputs.FLAG}, {shortened(texts[0], 300)}): prepare it into another folder; "
            "--data.path DIR=WEIGHT,DIR=WEIGHT mixes both"
        )


def _make_tokenizer(job: Job, args: PrepareArgs) -> tokenizers.Tokenizer:
    if args.tokenizer == "gpt2":
        return tokenizers.gpt2()
    if args.tokenizer not in FROM_INPUT:
        return tokenizers.load(args.tokenizer)
    if args.tokenizer == "char":
        alphabet: set[str] = set()
        find = functools.partial(characters, Reading.of(job.request))
        with job.bar("alphabet") as advance:
            for piece, found in in_order(find, documents.pieces(job.files), job.processes):
                alphabet |= found
                advance(piece.size)
        if not alphabet:
            raise DataError(NO_TEXT.format(shortened(job.input, 300)))
        return CharTokenizer("".join(sorted(alphabet)))
    every = -(-job.size // SAMPLE_BYTES)

    def sample() -> Iterator[str]:
        for piece in itertools.islice(documents.pieces(job.files), 0, None, every):
            yield from (text for text, _ in documents.read(piece, args.text_field))
            advance(piece.size)

    with job.bar("sample", job.size / every) as advance:
        return BPETokenizer.train(sample(), args.vocab_size)


def _tokenise(job: Job, done: dict[str, Any]) -> dict[str, Any]:
    """Append the pieces that the journal lacks, then write dataset.json."""
    out, request = job.out, done["request"]
    vocab_size, reading = tokenizers.load(out / TOKENIZER).vocab_size, Reading.of(request)
    dtypes = {TOKENS: np.min_scalar_type(vocab_size - 1), ENDS: np.dtype(np.int64)}
    if reading.dialogues:
        dtypes[MASK] = np.dtype(np.uint8)
    hashes = {name: sha256_of(out / name) for name in (TOKENIZER, SETTINGS) if (out / name).exists()}
    turn = functools.partial(encode, str(out / TOKENIZER), " ".join(hashes.values()), reading, dtypes[TOKENS])
    with contextlib.ExitStack() as stack:
        arrays = {}
        for name, dtype in dtypes.items():
            length = done["documents" if name == ENDS else "tokens"]
            arrays[name] = stack.enter_context(contextlib.closing(GrowingArray(out / name, dtype, length)))
        _append(job, done, turn, arrays)
        if not arrays[TOKENS].length:
            raise DataError(NO_TEXT.format(shortened(job.input, 300)))
        offsets = {name: array.finish() for name, array in arrays.items()}
    facts = {
        "format": MASKED if reading.dialogues else FORMAT,
        "dtype": dtypes[TOKENS].name,
        "tokens": arrays[TOKENS].length,
        "documents": arrays[ENDS].length,
        "vocab_size": vocab_size,
        "sha256": sha256_of(out / TOKENS, offsets[TOKENS]),
        "tokenizer_sha256": hashes[TOKENIZER],
        "texts": done.get("texts"),
        "request": request,
    }
    if SETTINGS in hashes:
        facts["tokenizer_config_sha256"] = hashes[SETTINGS]
    if reading.dialogues:
        facts |= {"mask_sha256": sha256_of(out / MASK, offsets[MASK]), "counted": done["counted"]}
    _write_json(out / DATASET, facts)
    return facts


def _append(job: Job, done: dict[str, Any], turn: Callable, arrays: dict[str, GrowingArray]) -> None:
    """Turn the pieces that the journal lacks into tokens, and keep the journal."""
    todo, tokens, ends = documents.pieces(job.files), arrays[TOKENS], arrays[ENDS]
    size = sum(piece.size for piece in itertools.islice(todo, done["pieces"]))

    def keep() -> None:
        for array in arrays.values():
            array.sync()
        _write_json(job.out / JOURNAL, done)

    saved = time.monotonic()
    try:
        with stop_requests() as stop_request, job.bar("tokens", done=size) as advance:
            for piece, found in in_order(turn, todo, job.processes):
                ends.append(found.ends + tokens.length)
                tokens.append(found.ids)
                if found.mask is not None:
                    arrays[MASK].append(found.mask)
                    done["counted"] = done.get("counted", 0) + int(found.mask.sum())
                done |= {"pieces": done["pieces"] + 1, "tokens": tokens.length, "documents": ends.length}
                done["texts"] = journal.chained(done.get("texts"), found.digest)
                advance(piece.size)
                asked = stop_request()
                if asked is not None:
                    raise Stopped(asked, done["pieces"], "piece")
                if time.monotonic() - saved > JOURNAL_SECONDS:
                    keep()
                    saved = time.monotonic()
    except (Stopped, DataError):  # once the input is repaired, the same command goes on from here
        keep()
        raise


def _summary(job: Job, facts: dict[str, Any]) -> str:
    size = f"{facts['tokens']:,} tokens ({facts['dtype']}, vocabulary of {facts['vocab_size']:,})"
    train = f"train on it with --data.path {job.out}"
    if "counted" not in facts:
        return f"{job.out} holds {size} in {facts['documents']:,} documents; {train}"
    answers = f"{facts['documents']:,} dialogues, {facts['counted']:,} of them in answers"
    return f"{job.out} holds {size} in {answers}; {train} --data.documents separate"


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    storage.write(path, json.dumps(content, indent=1))
