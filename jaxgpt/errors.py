"""The errors that are meant for users, and how text of unknown origin is shown to them.

This file is at the bottom of the package: every module derives its own errors from the classes here.
"""

import re
import unicodedata

LINE = 1000  # maximum characters of an error; a path in it may be long


class JaxgptError(Exception):
    """An error that a user can do something about: one line, `WHAT (WHERE, VALUE): REMEDY`.

    Anything that does not derive from it, and is not an error of the operating system, is a bug. Subclasses derive from
    a built-in exception too, so that Python code can catch what it expects.
    """

    exit_code = 2
    """The exit code of a command that ends with this error."""


class ArgumentError(JaxgptError, ValueError):
    """An argument or a field of a configuration is out of its range."""


class CheckpointError(JaxgptError, ValueError):
    """A checkpoint or a run directory is missing, or cannot be used."""

    exit_code = 4


class JaxgptWarning(UserWarning):
    """A warning that is meant for users, and that a command shows as one line."""


def shortened(text: str, most: int = 100) -> str:
    """The text, cut if it is longer than `most` characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def printable(text: str) -> str:
    """The text with each control character, which could move the cursor of a terminal or worse, as `\\x1b`."""
    return "".join(f"\\x{ord(c):02x}" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


def one_line(text: str) -> str:
    """The text as one printable line; a long one is cut in its middle, since the remedy is at its end."""
    line = printable(re.sub(r"\s", " ", text))
    return line if len(line) <= LINE else f"{line[: LINE // 2]} ... {line[-LINE // 2 :]}"
