"""`jaxgpt sample`: write text with a trained run."""

import dataclasses
import pathlib
import sys

import jax
import numpy as np

from jaxgpt import sampling
from jaxgpt.config import ConfigError
from jaxgpt.errors import printable
from jaxgpt.runs.directory import load


@dataclasses.dataclass(frozen=True)
class SampleArgs:
    """Write text with a trained run. Only the text goes to stdout."""

    run: str
    """Run directory."""
    prompt: str | None = None
    """Text to continue; by default, a new text is started."""
    prompt_file: str | None = None
    """UTF-8 file with the text to continue, in place of --prompt."""
    max_new_tokens: int = 500
    """Number of tokens to write per text."""
    num_samples: int = 1
    """Number of texts to write; a line of dashes separates them."""
    temperature: float = 1.0
    """Below 1, the text is more likely; above 1, more varied; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Draw only from the k likeliest tokens."""
    top_p: float | None = None
    """Draw only from the likeliest tokens, as few as together have the probability p."""
    seed: int = 1337
    """Seed of the random numbers; another seed gives another text."""
    stream: bool = False
    """Show the text while it is written; for a single text only."""


def sample(args: SampleArgs) -> None:
    """Write samples to stdout, and the step of the checkpoint to stderr.

    Raises:
        ConfigError: an argument is out of its range, or the prompt cannot be read.
        CheckpointError: the run cannot be loaded.
        UnknownCharacterError: the prompt has a character that is not in the run's alphabet.
    """
    rules = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    sampling.make_rule(**rules)  # a check before the model is loaded
    for name in ("num_samples", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise ConfigError(f"{name} is {getattr(args, name)} (command line): use 1 or more")
    if args.stream and args.num_samples > 1:
        raise ConfigError("only a single text can be streamed (--num_samples): leave out --stream")
    prompt = _prompt(args)
    run = load(args.run)
    print(f"run {args.run}, step {run.step:,}", file=sys.stderr)
    start = run.tokenizer.start if prompt is None else run.tokenizer.encode(prompt)
    tokens = np.tile(start, (args.num_samples, 1))
    key = jax.random.key(args.seed)
    show = printable if sys.stdout.isatty() else str
    if args.stream:
        print(show(run.tokenizer.decode(start)), end="", flush=True)
        for new in sampling.stream(run.model, tokens, key, args.max_new_tokens, **rules):
            print(show(run.tokenizer.decode(np.asarray(new)[0])), end="", flush=True)
        print()
        return
    out = sampling.generate(run.model, tokens, key, args.max_new_tokens, **rules)
    print(f"\n{'-' * 15}\n".join(show(run.tokenizer.decode(row)) for row in np.asarray(out)))


def _prompt(args: SampleArgs) -> str | None:
    if args.prompt_file is None:
        return args.prompt
    try:
        return pathlib.Path(args.prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the prompt ({args.prompt_file}, {error}): name a UTF-8 text file") from None
