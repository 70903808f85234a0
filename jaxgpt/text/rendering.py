"""The program that renders chat templates: a request per line of stdin, an answer per line of stdout, both JSON.

A template is a stranger's program. Jinja's sandbox keeps it from Python's insides, but does not bound what it computes:
`{{ "a" * 10**10 }}` is a single operation. So it runs in a process of its own, which has little memory and can write to
no file, and which `chat.py` ends when it takes too long. It imports nothing of jaxgpt, so that it starts quickly.
"""

import contextlib
import datetime
import functools
import importlib.metadata
import json
import sys
from typing import Any

import jinja2
from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

READY = b"ready\n"
MEMORY = 1 << 29  # bytes of address space of the process
LENGTH = 1 << 20  # characters that a template may write, beside 16 times those of the messages
OLDEST = (3, 1, 6)  # before it, Jinja's sandbox has holes that are known


class _Generation(Extension):
    """`{% generation %}`, by which transformers finds the assistant's words: what is in it is rendered as usual."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Dict:
    """In place of the class dict, whose attributes lead further."""

    def __call__(self, *args, **kwargs):
        return dict(*args, **kwargs)

    def fromkeys(self, *args):
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """A namespace whose attributes cannot hide those of Python."""

    def __init__(*args, **kwargs):  # no names of its own: an attribute may be called self
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name, value):
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"the namespace's attribute {name!r} begins with an underscore")


def _raise_exception(message: str):
    raise TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    """The template in an environment with the settings of transformers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json  # Jinja's own is for HTML
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(template)


def render(
    template: str, messages: list[dict[str, Any]], variables: dict[str, str], add_generation_prompt: bool
) -> str:
    """Render a dialogue as `apply_chat_template` of transformers does.

    Args:
        template: Jinja's language.
        messages: dicts with `role` and `content`.
        variables: `bos_token` and `eos_token`, if the tokenizer has them.
        add_generation_prompt: whether the beginning of an answer is added.

    Raises:
        Exception: any, and those of Jinja; `reason` has their words.
    """
    most = LENGTH + 16 * len(json.dumps(messages))
    given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
    pieces, length = [], 0
    for piece in _compiled(template).generate(given | variables):
        pieces.append(piece)
        length += len(piece)
        if length > most:
            raise TemplateError(f"it writes more than {most:,} characters")
    return "".join(pieces)


def reason(error: Exception) -> str:
    """Say why a template could not be rendered."""
    if isinstance(error, TemplateSyntaxError):
        return f"line {error.lineno}: {error.message}"
    if isinstance(error, MemoryError):
        return f"it needs more than {MEMORY >> 20} MiB of memory"
    if isinstance(error, RecursionError):
        return "it calls itself without end"
    return str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"


def _limit() -> None:
    """Bound what this process may take; Windows has no such bounds."""
    try:
        import resource
    except ImportError:
        return
    for name, most in (("RLIMIT_AS", MEMORY), ("RLIMIT_FSIZE", 0)):
        with contextlib.suppress(OSError, ValueError):  # not every system has both
            resource.setrlimit(getattr(resource, name), (most, most))


def main() -> None:
    """Answer requests until stdin ends."""
    if tuple(map(int, importlib.metadata.version("jinja2").split(".")[:3])) < OLDEST:
        return
    _limit()
    out = sys.stdout.buffer
    out.write(READY)
    out.flush()
    for line in sys.stdin.buffer:
        try:
            answer = {"text": render(**json.loads(line))}
        except Exception as error:
            answer = {"error": reason(error)}
        out.write(json.dumps(answer).encode() + b"\n")
        out.flush()


if __name__ == "__main__":
    main()
