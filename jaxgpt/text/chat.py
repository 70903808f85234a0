"""Chat templates: from the messages of a dialogue to the text, and the ids, that the model was trained on."""

import itertools
import json
import pathlib
import re
import subprocess
import sys
import threading
import time
import weakref
from typing import Any

import numpy as np

from jaxgpt.errors import JaxgptError, shortened
from jaxgpt.tokenizer import Tokenizer

SECONDS = 10  # that a template may take
PROGRAM = pathlib.Path(__file__).with_name("rendering.py")
PRIVATE = range(0xF0000, 0x110000)  # characters without a meaning
REMEDY = "correct the template, or use `jaxgpt sample`"

Messages = list[dict[str, Any]]
"""What was said, in order: dicts with `role` (system, user or assistant) and `content`."""


class TemplateError(JaxgptError, ValueError):
    """A chat template is missing, cannot be rendered, or refuses the messages."""


class Template:
    """A chat template. A process of its own renders it, which ends with this object."""

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "", where: str = "tokenizer_config.json"):
        """Take a template; nothing is started before it is rendered.

        Args:
            source: in Jinja's language.
            bos_token, eos_token: what the template may name; an empty one is not defined there.
            where: its name in error messages.
        """
        self.source, self._where = source, where
        self._variables = {name: text for name, text in (("bos_token", bos_token), ("eos_token", eos_token)) if text}
        self._process, self._end = None, lambda: None

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """Render a dialogue.

        Args:
            messages: what was said.
            add_generation_prompt: whether the beginning of an answer is added.

        Raises:
            TemplateError: the template is wrong, takes too long or too much memory, or refuses these messages.
        """
        given = {"messages": messages, "variables": self._variables, "add_generation_prompt": add_generation_prompt}
        answer = self._ask({"template": self.source, **given})
        if "error" in answer:
            raise TemplateError(f"chat template ({self._where}, {shortened(answer['error'], 300)}): {REMEDY}")
        return answer["text"]

    def _ask(self, request: dict[str, Any]) -> dict[str, str]:
        """The answer of the process, which is started if there is none."""
        if self._process is None:
            self._process = _start()
            self._end = weakref.finalize(self, _end, self._process)
        process, began = self._process, time.monotonic()
        timer = threading.Timer(SECONDS, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())
        except (BrokenPipeError, ValueError):  # it has ended, and so there is no line, or half of one
            self.close()
            late = time.monotonic() - began >= SECONDS
            return {"error": f"it takes more than {SECONDS} seconds" if late else "it broke its process"}
        except BaseException:  # Ctrl-C: the answer would be taken for that of the next request
            self.close()
            raise
        finally:
            timer.cancel()

    def close(self) -> None:
        """End the process; a later request starts another one."""
        self._end()
        self._process = None


def _start() -> subprocess.Popen:
    """Start the program that renders. -P: the folder that it lies in must not hide modules of the same names."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    # in a session of its own it does not get the terminal's Ctrl-C, which is meant for an answer
    process = subprocess.Popen([sys.executable, "-P", str(PROGRAM)], **pipes, start_new_session=True)
    if process.stdout.readline() != b"ready\n":
        _end(process)
        raise TemplateError("chat templates need jinja2 3.1.6 or newer (jinja2): pip install 'jaxgpt[chat]'")
    return process


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


class ChatEncoder:
    """A run's chat template and tokenizer: from messages to ids."""

    def __init__(self, tokenizer: Tokenizer, where: str):
        """Take the template of a tokenizer.

        Args:
            tokenizer: of the run.
            where: its name in error messages, such as the run directory.

        Raises:
            TemplateError: the tokenizer has none.
        """
        if tokenizer.chat_template is None:
            raise TemplateError(f"no chat template ({where}): continue a text with `jaxgpt sample`")
        self.tokenizer = tokenizer
        self.template = Template(tokenizer.chat_template, **tokenizer.special, where=where)
        special = {tokenizer.decode([i]) for i in np.flatnonzero(tokenizer.byte_lengths == 0)}
        longest_first = sorted((text for text in special if len(text) > 1), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def encode(self, messages: Messages, add_generation_prompt: bool = True) -> np.ndarray:
        """Encode a dialogue. Special tokens of the template become their ids, those in a message are ordinary text.

        Without special tokens in the messages, the rendered text is encoded as a whole, as transformers does it. With
        them it is cut, but only at the template's own special tokens, where every tokenizer begins anew. So the words
        of the template and those of a message still join into tokens, as a line break and the word after it may.

        Args:
            messages: what was said.
            add_generation_prompt: whether the beginning of an answer is added.

        Returns:
            (N,) int32 ids.

        Raises:
            TemplateError: the template cannot be rendered, or refuses these messages.
        """
        said = json.dumps(messages, ensure_ascii=False) + self.template.source
        mark = next(c for c in map(chr, PRIVATE) if c not in said)
        text = self.template.render(self._marked(messages, mark), add_generation_prompt)
        if mark not in text:
            return self.tokenizer.encode(text, special_tokens=True)
        ids = []
        for typed, parts in itertools.groupby(re.split(f"({self._special.pattern})", text), lambda part: mark in part):
            ids.append(self.tokenizer.encode("".join(parts).replace(mark, ""), special_tokens=not typed))
        return np.concatenate(ids)

    def _marked(self, value: Any, mark: str) -> Any:
        """The messages, with a mark between all characters of each special token in them; roles stay as they are."""
        if isinstance(value, dict):
            return {key: each if key == "role" else self._marked(each, mark) for key, each in value.items()}
        if isinstance(value, list):
            return [self._marked(each, mark) for each in value]
        while isinstance(value, str) and self._special.search(value):  # again: two of them may overlap
            value = self._special.sub(lambda found: mark.join(found[0]), value)
        return value

    def ends(self) -> frozenset[int]:
        """The ids that end an answer: the tokenizer's, and the special token that the template puts behind an answer.

        They may differ: the end of text of a base model is <|endoftext|>, whatever template it was given.

        Raises:
            TemplateError: the template cannot be rendered.
        """
        answer = "Quite so"
        dialogue = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        _, found, rest = self.template.render(dialogue).rpartition(answer)
        behind = self._special.match(rest) if found else None
        ids = self.tokenizer.encode(behind[0], special_tokens=True).tolist() if behind else []
        return frozenset([*self.tokenizer.ends, *ids])
