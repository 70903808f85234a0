"""A dataclass of sections from flags such as `--model.n_layer 6`, and the help text that lists them."""

import argparse
import ast
import dataclasses
import difflib
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from jaxgpt.errors import ArgumentError, shortened
from jaxgpt.settings.checks import WORDS, Text


class ConfigError(ArgumentError):
    """A flag, a configuration file or a value in it is wrong."""


def fields(cls: type) -> dict[str, Any]:
    """The type of each field of a dataclass by the name of its flag; a field of a section is `section.field`."""
    found = {}
    for field in dataclasses.fields(cls):
        inner = fields(field.type) if dataclasses.is_dataclass(field.type) else {"": field.type}
        outer = field.name.rstrip("_")  # a field whose flag is a word of Python, such as --from, ends in _
        found |= {f"{outer}.{name}".rstrip("."): kind for name, kind in inner.items()}
    return found


def split_flags(argv: Sequence[str], cls: type) -> dict[str, str | tuple[str, ...]]:
    """Split a command line into the texts of its flags.

    Args:
        argv: `--name value` or `--name=value`, with - or _ in the name. The last of two equal names wins, unless the
            field is a tuple. A flag of a boolean field may stand without a value, which means true.
        cls: the dataclass that the flags are for.

    Returns:
        The text of each flag by its name; all of them, in their order, for a field that is a tuple.

    Raises:
        ConfigError: the command line holds something else.
    """
    known, flags, rest = fields(cls), {}, list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            remedy = "write flags as --name VALUE, a value with spaces in quotes"
            raise ConfigError(f"unexpected argument (command line, {word!r}): {remedy}")
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name != "config":
            check_name(name, known, "command line")
        if not equals:
            bare = not rest or (rest[0].startswith("--") and known.get(name) is bool)
            if bare and known.get(name) is not bool:
                raise ConfigError(f"no value (command line, --{name}): write --{name} VALUE")
            value = "true" if bare else rest.pop(0)
        flags[name] = (*flags.get(name, ()), value) if _is_tuple(known.get(name)) else value
    return flags


def _is_tuple(kind: Any) -> bool:
    return typing.get_origin(kind) is tuple


def check_name(name: str, known: Iterable[str], where: str) -> None:
    """Check that a flag exists.

    Raises:
        ConfigError: it does not; the message suggests the nearest one.
    """
    if name in known:
        return
    short = {flag.split(".")[-1]: flag for flag in known}
    near = difflib.get_close_matches(name, known, 1) or difflib.get_close_matches(name.split(".")[-1], short, 1)
    remedy = f"perhaps you meant --{short.get(near[0], near[0])}" if near else "--help lists all"
    raise ConfigError(f"unknown option ({where}, {'--' if where == 'command line' else ''}{name}): {remedy}")


def parse(cls: type, values: dict[str, str | tuple[str, ...]], where: str) -> Any:
    """Build a dataclass from the texts of its flags.

    Args:
        cls: the dataclass; a field is a section, or an int, float, bool, str or Literal, or some of them or None, or
            tuple[str, ...].
        values: the text of each flag by its name; the other fields keep their defaults.
        where: where the texts come from, for error messages.

    Raises:
        ConfigError: a text is not of the field's type, a value is out of range, or one without a default is missing.
    """
    return _build(cls, values, where, "")


def _build(cls: type, values: dict[str, str], where: str, prefix: str) -> Any:
    arguments = {}
    for field in dataclasses.fields(cls):
        name = prefix + field.name.rstrip("_")
        if dataclasses.is_dataclass(field.type):
            arguments[field.name] = _build(field.type, values, where, f"{name}.")
        elif name in values:
            arguments[field.name] = convert(values[name], field.type, name, where)
        elif field.default is dataclasses.MISSING:
            raise ConfigError(f"a flag is missing ({where}, --{name}): write --{name} VALUE")
    try:
        return cls(**arguments)
    except ArgumentError as error:  # a check of the dataclass itself: `WHAT: REMEDY`
        what, _, remedy = str(error).partition(": ")
        section = f", {prefix.rstrip('.')}" if prefix else ""
        raise ConfigError(f"{what} ({where}{section}): {remedy}") from None


def convert(text: str, kind: Any, name: str, where: str) -> Any:
    """Return the value that a text means for a field of this type.

    Raises:
        ConfigError: the text is not of that type.
    """
    if _is_tuple(kind):
        return text
    options = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        if text in options:
            return text
        expected = f"one of {', '.join(map(repr, options))}"
    else:
        words = [word for option in options for word in typing.get_args(option)]  # as in int | Literal["last"]
        if text in words:
            return text
        if types.NoneType in options:
            if text.lower() in ("", "none", "null") and Text not in options:
                return None
            (kind,) = (option for option in options if option in WORDS and option is not types.NoneType)
        expected = " or ".join([WORDS[kind], *words])
        try:
            return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            pass
    raise ConfigError(f"--{name} is {shortened(repr(text))} ({where}): use {expected}")


def help_text(cls: type, prog: str) -> str:
    """What `--help` prints: the docstring of a dataclass, and a paragraph for each of its fields."""
    formatter = lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110)  # noqa: E731
    parser = argparse.ArgumentParser(prog, "%(prog)s [flags]", cls.__doc__, add_help=False, formatter_class=formatter)
    _describe(parser, cls, "")
    return parser.format_help()


def _describe(parser: argparse.ArgumentParser, cls: type, prefix: str) -> None:
    docs = _docstrings(cls)
    group = parser.add_argument_group(prefix.rstrip(".") or "flags", cls.__doc__ if prefix else None)
    sections = []
    for field in dataclasses.fields(cls):
        name = prefix + field.name.rstrip("_")
        if dataclasses.is_dataclass(field.type):
            sections.append((field.type, f"{name}."))
            continue
        required = field.default is dataclasses.MISSING
        default = "required" if required else f"default: {'none' if field.default in (None, '', ()) else field.default}"
        default = f"repeatable; {default}" if _is_tuple(field.type) else default
        options = typing.get_args(field.type)
        words = [word for option in options for word in (option, *typing.get_args(option)) if isinstance(word, str)]
        kinds = [kind for kind in (field.type, *options) if kind in WORDS and kind is not types.NoneType]
        metavar = "|".join([*(kind.__name__.upper() for kind in kinds), *words])
        group.add_argument(f"--{name}", metavar=metavar, help=f"{docs[field.name]} ({default})".replace("%", "%%"))
    for inner, name in sections:
        _describe(parser, inner, name)


def _docstrings(cls: type) -> dict[str, str]:
    """The text below each field of a dataclass, those that it inherits included."""
    found = {}
    for base in reversed(cls.__mro__[:-1]):
        lines = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for field, doc in itertools.pairwise(lines):
            if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr):
                found[field.target.id] = " ".join(doc.value.value.split())
    return found
