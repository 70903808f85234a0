"""`jaxgpt chat`: talk to a run that has a chat template."""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import sys

from jaxgpt.devices.stopping import stop_requests
from jaxgpt.errors import ArgumentError, JaxgptError, one_line, printable
from jaxgpt.files.screen import Lenient
from jaxgpt.runs.loading import Step, computed_here, load
from jaxgpt.sampling import make_rule
from jaxgpt.settings.checks import Path, Text, check_fields, check_seed
from jaxgpt.text.chat import ChatEncoder
from jaxgpt.tools.dialogue import Dialogue, Writer

PROMPT = "> "
HELP = """/reset       forget what was said
/save FILE   add the dialogue to FILE, as a line of JSON
/help        show this
Ctrl-C ends an answer, and at the empty prompt the program; so does Ctrl-D."""


@dataclasses.dataclass(frozen=True)
class ChatArgs:
    """Talk to a run that has a chat template. If stdin is not a terminal, each of its lines is a message."""

    run: Path
    """Run directory."""
    step: Step = None
    """Step of the checkpoint; by default the one with the lowest validation loss."""
    system: Text | None = None
    """What the model is told before the dialogue; by default what its template says, if anything."""
    max_new_tokens: int = 500
    """Maximum number of tokens of an answer."""
    temperature: float = 0.7
    """Below 1, answers are more predictable; above 1, more varied; 0 always takes the most likely token."""
    top_k: int | None = None
    """Draw only from the k most likely tokens."""
    top_p: float | None = None
    """Draw only from the most likely tokens, as few as together have the probability p."""
    seed: int = 1337
    """Seed of the random numbers, from 0 to 2^32 - 1; another seed gives other answers."""

    def __post_init__(self):
        check_fields(self)
        check_seed(self.seed)
        make_rule(self.temperature, self.top_k, self.top_p)
        if self.max_new_tokens < 1:
            raise ArgumentError(f"max_new_tokens is {self.max_new_tokens}: use 1 or more")


def chat(args: ChatArgs) -> None:
    """Hold a dialogue: replies go to stdout, everything else to stderr.

    Raises:
        CheckpointError: the run cannot be loaded.
        TemplateError: it has no chat template, or one that cannot be rendered.
    """
    run = computed_here(load(args.run, args.step))
    dialogue = Dialogue(
        Writer(run.model),
        ChatEncoder(run.tokenizer, args.run),
        window=run.config.model.block_size,
        max_new_tokens=args.max_new_tokens,
        rule=make_rule(args.temperature, args.top_k, args.top_p),
        seed=args.seed,
        system=args.system,
    )
    _note(f"run {args.run}, step {run.step:,}")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # what is not UTF-8 becomes U+FFFD
    if sys.stdin is not None and sys.stdin.isatty():
        _talk(dialogue)
        return
    for line in sys.stdin or ():
        if line.strip():
            _reply(dialogue, line.rstrip("\r\n"))


def _note(text: str) -> None:
    print(text, file=Lenient(sys.stderr), flush=True)


def _reply(dialogue: Dialogue, message: str, stopped=lambda: None) -> None:
    """Print the answer as it is written, until `stopped` returns the number of a signal."""
    show = printable if sys.stdout is not None and sys.stdout.isatty() else str
    forgotten = dialogue.forgotten
    with contextlib.closing(dialogue.answer(message)) as pieces:
        for text in pieces:
            if forgotten != dialogue.forgotten:
                forgotten = dialogue.forgotten
                _note(f"(the window is full; oldest turns forgotten: {forgotten:,})")
            if text:
                print(show(text), end="", flush=True)
            if stopped() is not None:
                break
    print(flush=True)


def _talk(dialogue: Dialogue) -> None:
    """A dialogue on a terminal."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (from now on, input() edits lines and knows the earlier ones)
    _note("Type a message. /help lists commands, Ctrl-C ends an answer, Ctrl-D the program.")
    while (line := _line()) is not None:
        if not line.strip() or _obeyed(dialogue, line.strip()):
            continue
        try:
            with stop_requests() as stopped:
                _reply(dialogue, line, stopped)
            if stopped() == signal.SIGTERM:
                signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:  # a second one, before the first was seen
            print(flush=True)
        except JaxgptError as error:
            _note(one_line(str(error)))


def _line() -> str | None:
    """The next line that is typed; None at the end of the dialogue."""
    # where stdout is a file, it has replies only
    on_screen = sys.stdout is not None and sys.stdout.isatty()
    end_line = print if on_screen else functools.partial(_note, "")
    while True:
        try:
            if on_screen:
                return input(PROMPT)
            print(PROMPT, end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            return line.removesuffix("\n") if line else None
        except EOFError:
            end_line()
            return None
        except KeyboardInterrupt:
            end_line()
            if "readline" not in sys.modules or not sys.modules["readline"].get_line_buffer():
                return None


def _obeyed(dialogue: Dialogue, line: str) -> bool:
    """Do what a line says if it is a command; return whether it was one."""
    command, _, rest = line.partition(" ")
    if command == "/reset" and not rest:
        dialogue.reset()
    elif command == "/save":
        _save(dialogue, rest.strip())
    elif command == "/help":
        _note(HELP)
    else:
        return False
    return True


def _save(dialogue: Dialogue, path: str) -> None:
    """Add the dialogue to a file, in the form that `jaxgpt prepare` takes."""
    if not path:
        return _note("no file (/save): write /save FILE")
    try:
        with open(os.path.expanduser(path), "a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": dialogue.messages}, ensure_ascii=False) + "\n")
    except (OSError, ValueError) as error:
        _note(one_line(f"cannot write the dialogue ({path}, {error}): name another file"))
    else:
        _note(one_line(f"saved ({path}, {len(dialogue.messages)} messages)"))
