"""`jaxgpt eval`: evaluate a run on its own text or another one, per token and per byte."""

import dataclasses
import math
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxgpt import step
from jaxgpt import tokenizer as tokenizers
from jaxgpt.config import ConfigError
from jaxgpt.data import DataConfig, DataError, Windows
from jaxgpt.files.screen import Lenient
from jaxgpt.runs.loading import Step, computed_here, load
from jaxgpt.settings.checks import Path, check_fields
from jaxgpt.text import source

SPLITS = ("train", "val", "all")
LONGEST = 2048  # tokens per window of an imported model, whose context may be far longer
TOKENS = 1 << 14  # tokens per batch: the logits of a large vocabulary take 200 kB per token


@dataclasses.dataclass(frozen=True)
class EvalArgs:
    """Print the mean loss of a run over a whole split as one line of JSON. Bits per byte are comparable across
    tokenizers, best on the same text with --split all."""

    run: Path
    """Run directory."""
    split: str = "val"
    """train, val, or all (the whole text)."""
    name: str | None = None
    """Named corpus to use instead of the run's text: shakespeare or tiny_shakespeare."""
    path: Path | None = None
    """Your own text file or prepared folder to use instead, read with the run's tokenizer."""
    step: Step = None
    """Step of the checkpoint; by default the one with the lowest validation loss."""

    def __post_init__(self):
        check_fields(self)


def evaluate(args: EvalArgs) -> dict[str, Any]:
    """Evaluate a run on a whole split.

    Returns:
        `split`, `step`, `tokens` (the predicted ones: all but the first; with separate documents, but the first of
        each; of dialogues, only the assistant's), `nats_per_token` and `bits_per_byte`.

    Raises:
        ConfigError: there is no such split, or two texts are given.
        CheckpointError: the run cannot be loaded.
        DataError: the text is not the one that the run was trained on, or was prepared with another tokenizer.
    """
    if args.split not in SPLITS:
        raise ConfigError(f"no such split (--split, {args.split}): use {', '.join(SPLITS)}")
    if args.name and args.path:
        raise ConfigError(f"two texts are given (--name, {args.name}; --path, {args.path}): give one")
    run = computed_here(load(args.run, args.step))
    which = "" if args.step else ", which has the lowest validation loss of those that are kept; see --step last"
    print(f"run {args.run}, step {run.step:,}{which}", file=Lenient(sys.stderr))
    given, text = bool(args.name or args.path), run.config.data
    if given:
        text = DataConfig(
            name=args.name or text.name,
            path=args.path,
            train_fraction=text.train_fraction,
            documents=text.documents if source.names_folders(args.path) else "packed",  # a text is one document
        )
    elif run.corpus_sha256 is None:
        raise DataError(f"imported weights have no text of their own (--run, {args.run}): add --path FILE")
    opened = source.open_source(text, run.tokenizer)
    if not given and opened.sha256 != run.corpus_sha256:
        raise DataError(
            f"not the text that the run was trained on ({opened.name}, sha256 {opened.sha256}, was "
            f"{run.corpus_sha256}): restore the file"
        )
    if not tokenizers.same(opened.tokenizer, run.tokenizer):
        raise DataError(
            f"the folder was prepared with another tokenizer ({opened.name}): prepare it with the run's tokenizer.json"
        )
    T = run.config.model.block_size
    if run.corpus_sha256 is None:  # imported: a window of 131,072 tokens would not fit into the memory
        T = min(T, LONGEST)
    if args.split != "all":
        opened.split(None, T)
    chunks = run.config.train.loss_chunks
    lengths, tokens, size = run.tokenizer.byte_lengths, 0, 0

    def counted() -> Iterator[Any]:
        nonlocal tokens, size
        for piece in pieces:
            windows = jax.tree.map(np.asarray, Windows.of(piece))
            targets = windows.tokens[1:]
            if windows.counted is not None:
                targets = targets[windows.counted]
            tokens, size = tokens + len(targets), size + int(lengths[targets].sum())
            yield piece

    with source.watched(opened, args.split, sys.stderr) as pieces:
        loss = step.evaluate(run.model, counted(), min(64, max(TOKENS // T, 1)), chunks)
    return {
        "split": args.split,
        "step": run.step,
        "tokens": tokens,
        "nats_per_token": loss,
        "bits_per_byte": loss * tokens / math.log(2) / size if size else None,  # control tokens alone have no bytes
    }
