"""`jaxgpt sample`: write text with a trained run."""

import dataclasses
import pathlib
import sys
from collections.abc import Iterable, Iterator

import jax
import numpy as np

from jaxgpt import sampling
from jaxgpt.config import ConfigError
from jaxgpt.errors import ArgumentError, printable
from jaxgpt.files.screen import Lenient
from jaxgpt.runs.loading import Step, computed_here, load
from jaxgpt.settings.checks import Path, Text, check_fields, check_seed
from jaxgpt.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class SampleArgs:
    """Write text with a trained run. Only the text goes to stdout."""

    run: Path
    """Run directory."""
    prompt: Text | None = None
    """Text to continue; by default, and if it is empty, a new text is started."""
    prompt_file: Path | None = None
    """UTF-8 file with the text to continue, in place of --prompt."""
    step: Step = None
    """Step of the checkpoint; by default the one with the lowest validation loss."""
    special_tokens: bool = False
    """Read special tokens in the prompt, such as <|endoftext|>, as their ids; by default, they are ordinary text."""
    max_new_tokens: int = 500
    """Number of tokens to write per text, unless it ends before."""
    stop: tuple[Text, ...] = ()
    """End a text just before this text; of several, before the first that occurs. The prompt does not count."""
    ignore_eos: bool = False
    """Go on after the tokenizer's end-of-text token, which ends a text by default."""
    num_samples: int = 1
    """Number of texts to write; a line of dashes separates them."""
    temperature: float = 1.0
    """Below 1, the text is more predictable; above 1, more varied; 0 always takes the most likely token."""
    top_k: int | None = None
    """Draw only from the k most likely tokens."""
    top_p: float | None = None
    """Draw only from the most likely tokens, as few as together have the probability p."""
    seed: int = 1337
    """Seed of the random numbers, from 0 to 2^32 - 1; another seed gives another text."""
    stream: bool = False
    """Show the text while it is written; for a single text only."""

    def __post_init__(self):
        check_fields(self)
        check_seed(self.seed)
        sampling.make_rule(**self.rules)
        for name in ("num_samples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} is {getattr(self, name)}: use 1 or more")
        if self.stream and self.num_samples > 1:
            raise ArgumentError(f"only a single text can be streamed, not {self.num_samples}: leave out --stream")
        if "" in self.stop:
            raise ArgumentError("stop is '': use a text of one character or more")

    @property
    def rules(self) -> dict[str, int | float | None]:
        """The numbers of the sampling rule."""
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}


def sample(args: SampleArgs) -> None:
    """Write samples to stdout, and the step of the checkpoint to stderr.

    Raises:
        ConfigError: the prompt cannot be read.
        CheckpointError: the run cannot be loaded.
        UnknownCharacterError: the prompt has a character that is not in the run's alphabet.
    """
    prompt = _prompt(args)
    run = computed_here(load(args.run, args.step))
    print(f"run {args.run}, step {run.step:,}", file=Lenient(sys.stderr))
    tokenizer = run.tokenizer
    start = _begun(tokenizer, prompt, args.special_tokens) if prompt else tokenizer.start
    before = prompt or tokenizer.decode(start, skip_special_tokens=True)
    tokens, key = np.tile(start, (args.num_samples, 1)), jax.random.key(args.seed)
    ends = None if args.ignore_eos else tokenizer.ends or None

    def text_of(pieces: Iterable[np.ndarray]) -> Iterator[str]:
        return before_first(args.stop, tokenizer.decode_stream(_before_token(ends, pieces), continues=True))

    show = printable if sys.stdout is not None and sys.stdout.isatty() else str
    if args.stream:
        new = sampling.stream(run.model, tokens, key, args.max_new_tokens, **args.rules)
        print(show(before), end="", flush=True)
        for text in text_of(np.asarray(piece)[0] for piece in new):
            print(show(text), end="", flush=True)
        print()
        return
    out = sampling.generate(run.model, tokens, key, args.max_new_tokens, **args.rules, stop=ends)
    texts = ("".join(text_of([row])) for row in np.asarray(out)[:, len(start) :])
    print(f"\n{'-' * 15}\n".join(show(before + text) for text in texts))


def _prompt(args: SampleArgs) -> str | None:
    if args.prompt_file is None:
        return args.prompt
    try:
        return pathlib.Path(args.prompt_file).read_text(encoding="utf-8-sig")  # without a byte order mark
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 at byte {error.start:,}"
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
    raise ConfigError(f"cannot read the prompt ({args.prompt_file}, {reason}): name a UTF-8 text file")


def _begun(tokenizer: Tokenizer, prompt: str, special_tokens: bool) -> np.ndarray:
    """The ids of a prompt, (N,) int32, behind those that the model expects before a text."""
    ids, prefix = tokenizer.encode(prompt, special_tokens), tokenizer.prefix
    return ids if np.array_equal(ids[: len(prefix)], prefix) else np.concatenate([prefix, ids])


def _before_token(ends: tuple[int, ...] | None, pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The (N,) ids of each piece, up to the first of `ends`; None for all."""
    for ids in pieces:
        found = () if ends is None else np.flatnonzero(np.isin(ids, ends))
        yield ids[: found[0]] if len(found) else ids
        if len(found):
            return


def before_first(stops: tuple[str, ...], texts: Iterable[str]) -> Iterator[str]:
    """What comes before the first of some texts in a text that arrives in pieces.

    Args:
        stops: the texts to look for, none of them empty.
        texts: the pieces. No further one is asked for once one of `stops` is complete.

    Yields:
        Pieces of the text, without what may be the beginning of one of `stops` until the next piece decides that.
    """
    held, longest = "", max(map(len, stops), default=1)
    for text in texts:
        held += text
        last = range(max(len(held) - longest + 1, 0), len(held))  # where a stop text may begin that goes on
        begun = next((i for i in last if any(stop.startswith(held[i:]) for stop in stops)), len(held))
        first = _find_first(stops, held)
        if first is not None and first <= begun:
            yield held[:first]
            return
        yield held[:begun]
        held = held[begun:]
    yield held[: _find_first(stops, held)]


def _find_first(stops: tuple[str, ...], text: str) -> int | None:
    """Where the first of the stop texts begins; None if none occurs."""
    return min((i for i in map(text.find, stops) if i >= 0), default=None)
