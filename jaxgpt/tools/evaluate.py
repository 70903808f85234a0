"""`jaxgpt eval`: the mean loss of a run over a whole split of its own text or another, per token and per byte."""

import dataclasses
import math
from typing import Any

import numpy as np

from jaxgpt import step
from jaxgpt import tokenizer as tokenizers
from jaxgpt.config import ConfigError
from jaxgpt.data import DataConfig, DataError
from jaxgpt.runs.directory import load
from jaxgpt.text import source

SPLITS = ("train", "val", "all")
TOKENS = 1 << 14  # at a time: a large vocabulary's logits take 200 kB each


@dataclasses.dataclass(frozen=True)
class EvalArgs:
    """The mean loss of a run over a whole split, as one JSON line on stdout. Bits per byte are comparable across
    tokenizers, best on the same text and --split all."""

    run: str
    """Run directory."""
    split: str = "val"
    """train, val, or all of the text."""
    name: str | None = None
    """A named corpus instead of the run's text: shakespeare, or tiny_shakespeare."""
    path: str | None = None
    """A text file or prepared folder of your own instead, read with the run's tokenizer."""


def evaluate(args: EvalArgs) -> dict[str, Any]:
    """Measure a run.

    Returns:
        `split`, `step`, `tokens` (predicted: all but the first), `nats_per_token`, `bits_per_byte`.

    Raises:
        ConfigError: there is no such split.
        CheckpointError: the run cannot be loaded.
        DataError: the text is not the one that the run learned from, or has other tokens.
    """
    if args.split not in SPLITS:
        raise ConfigError(f"no such split (--split, {args.split}): use {', '.join(SPLITS)}")
    if args.name and args.path:
        raise ConfigError(f"two texts (--name, {args.name}; --path, {args.path}): name one")
    run = load(args.run)
    given, text = bool(args.name or args.path), run.config.data
    if given:
        text = DataConfig(name=args.name or text.name, path=args.path, train_fraction=text.train_fraction)
    elif run.corpus_sha256 is None:
        raise DataError(f"imported weights have no text of their own (--run, {args.run}): add --path FILE")
    learned = source.open_source(text, run.tokenizer)
    if not given and learned.sha256 != run.corpus_sha256:
        raise DataError(
            f"not the text that the run learned from ({learned.name}, sha256 {learned.sha256}, learned from was "
            f"{run.corpus_sha256}): restore the file"
        )
    if not tokenizers.same(learned.tokenizer, run.tokenizer):
        raise DataError(f"a folder of other tokens ({learned.name}): prepare it with --tokenizer of the run's file")
    T = run.config.model.block_size
    learned.split(None, 1 if args.split == "all" else T)
    chunks = run.config.train.loss_chunks
    loss = step.evaluate(run.model, learned.pieces(args.split), min(64, max(TOKENS // T, 1)), chunks)
    lengths, targets = run.tokenizer.byte_lengths, [np.asarray(piece)[1:] for piece in learned.pieces(args.split)]
    tokens, size = sum(map(len, targets)), sum(int(lengths[piece].sum()) for piece in targets)
    return {
        "split": args.split,
        "step": run.step,
        "tokens": tokens,
        "nats_per_token": loss,
        "bits_per_byte": loss * tokens / math.log(2) / size,
    }
