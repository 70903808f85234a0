"""What a command says when it ends early: one line, and an exit code."""

import logging
import os
import re
import signal
import sys
import warnings

import jax

from jaxgpt import data
from jaxgpt.config import ConfigError
from jaxgpt.devices import processes
from jaxgpt.devices.processes import PeerLostError
from jaxgpt.devices.stopping import Stopped
from jaxgpt.files import download, storage
from jaxgpt.files.lock import BusyError, LockWarning
from jaxgpt.loop import NonFiniteError
from jaxgpt.runs.checkpoint import CheckpointError, CheckpointWarning
from jaxgpt.runs.directory import OtherRunError
from jaxgpt.runs.metrics import harmless
from jaxgpt.text import corpus
from jaxgpt.text.workers import ProcessError
from jaxgpt.tokenizer import UnknownCharacterError

AGAIN = "run the same command again on all of them; the last checkpoint is intact"
FORMATTED = warnings.formatwarning


def say_in_one_line(debug: bool) -> None:
    """Our warnings become one line on stderr each; what libraries log of errors that they raise, too, is left out."""

    def ours(message, category, *where):
        named = issubclass(category, CheckpointWarning | LockWarning)
        return f"jaxgpt: warning: {_one_line(str(message))}\n" if named else FORMATTED(message, category, *where)

    warnings.formatwarning = ours
    if not debug:
        for library in ("absl", "asyncio"):
            logging.getLogger(library).setLevel(logging.CRITICAL)
        sys.unraisablehook = lambda _: None  # where tensorstore's threads report, too


def describe(error: BaseException) -> tuple[int, str]:
    """The exit code and the message of an error: one line without control characters, whatever it quotes.

    A bug's is as it is.
    """
    code, message = _describe(error)
    return code, message if code == 1 else _one_line(message)


def _one_line(text: str) -> str:
    return harmless(re.sub(r"\s", " ", text))


def _describe(error: BaseException) -> tuple[int, str]:
    text = str(error) or type(error).__name__
    match error:
        case _ if processes.lost_peer(error):
            return 8, f"another process of the run is gone ({text.splitlines()[0][:200]}): {AGAIN}"
        case Stopped():
            return (130 if error.signal_number == signal.SIGINT else 75), text
        case KeyboardInterrupt():
            return 130, "stopped by Ctrl-C"
        case corpus.CorpusError() | download.DownloadError() | data.DataError():
            return 3, text
        case CheckpointError():
            return 4, text
        case NonFiniteError():
            return 5, text
        case OtherRunError() | BusyError():
            return 6, text
        case PeerLostError():
            return 8, text
        case BrokenPipeError():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on: not an error
            return 0, ""
        case storage.StorageError():
            return 7, text
        case OSError() if error.errno in storage.ERRNOS:
            return 7, storage.cannot_write(error.filename, error.errno)
        case jax.errors.JaxRuntimeError() if "RESOURCE_EXHAUSTED" in text:
            return (
                9,
                f"out of memory ({text.splitlines()[0]}): halve --data.batch_size, double --optim.grad_accumulation",
            )
        case ProcessError():  # nearly always the kernel, when memory ran out
            return 9, text
        case ConfigError() | UnknownCharacterError() | ValueError():
            return 2, text
    return 1, f"{type(error).__name__}: {text}"
