"""Dialogues as training data: the tokens that a model's template makes of them, and which of these are answers."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxgpt.data import DataError
from jaxgpt.errors import one_line, shortened
from jaxgpt.text.chat import ChatEncoder, Messages, TemplateError

ANSWER = "assistant"
ROLES = ("system", "user", ANSWER)

Where = Callable[[], str]
"""Names the place of a dialogue, for an error message."""


class DialogueEncoder:
    """Turns dialogues into tokens, as a model's tokenizer and its template say."""

    def __init__(self, chat: ChatEncoder):
        """Prepare for a template and its tokenizer.

        Args:
            chat: both of them.
        """
        self.chat, self.template = chat, chat.template
        self._is_control = chat.tokenizer.byte_lengths == 0  # ids that stand for no text
        self._takes_tools = re.search("['\"]tool['\"]", chat.template.source) is not None

    def encode(self, messages: Any, where: Where) -> tuple[np.ndarray, np.ndarray]:
        """Encode a dialogue, and find the answers in it.

        An answer is what follows the beginning of the dialogue when that is written with the header of an answer. It
        ends with the last control token that the template writes for it, or if there is none, before the next message.

        Args:
            messages: what a record has in its field `messages`: a list of objects with `role` and `content`.
            where: names the place of the record.

        Returns:
            (N,) int32 ids; and (N,) uint8, 1 for the tokens of the answers and 0 for all others.

        Raises:
            DataError: the messages are no dialogue, or the template cannot write it or does not tell its parts apart.
        """
        messages = self._checked(messages, where)
        try:
            return self._encode(messages, where)
        except TemplateError as error:
            raise DataError(f"the template cannot write a dialogue ({where()}): {one_line(str(error))}") from None

    def _encode(self, messages: Messages, where: Where) -> tuple[np.ndarray, np.ndarray]:
        ids = self.chat.encode(messages, False)
        mask = np.zeros(len(ids), np.uint8)
        for i in [i for i, message in enumerate(messages) if message["role"] == ANSWER]:
            begin = self._end_of(messages, i, True, ids, where)
            end = self._end_of(messages, i + 1, False, ids, where)
            controls = np.flatnonzero(self._is_control[ids[begin:end]])
            if len(controls):
                end = begin + controls[-1] + 1
            if begin == end:
                raise _unfit(where, "it leaves answers out", "take the one that belongs to the model")
            mask[begin:end] = 1
        self._check_header(messages, where)
        return ids, mask

    def _end_of(self, messages: Messages, n: int, header: bool, ids: np.ndarray, where: Where) -> int:
        """How many ids of a dialogue are those of its first `n` messages, with or without the header of an answer."""
        if n == len(messages) and not header:
            return len(ids)
        part = self.chat.encode(messages[:n], header)
        length = min(len(part), len(ids))
        differ = np.flatnonzero(part[:length] != ids[:length])
        shared = int(differ[0]) if len(differ) else length
        if shared == len(part):
            return shared
        whole, beginning = self.template.render(messages, False), self.template.render(messages[:n], header)
        if not whole.startswith(beginning):
            remedy = "give each answer a dialogue of its own, or take another template"
            raise _unfit(where, "it writes a dialogue in another way when the dialogue goes on", remedy)
        # a token may join the last characters of the part and the next one; then it belongs to what follows
        rest = part[shared:]
        if len(rest) > 1 and self.chat.tokenizer.decode(rest).strip():
            raise _unfit(where, "its tokens change when the dialogue goes on", "take another tokenizer")
        return shared

    def _check_header(self, messages: Messages, where: Where) -> None:
        """Refuse a template that does not write the header of an answer when it is asked for it."""
        i = next(i for i, message in enumerate(messages) if message["role"] == ANSWER)
        prompt = self.template.render(messages[:i], True)
        if prompt != self.template.render(messages[:i], False):
            return
        answered = self.template.render(messages[: i + 1], False)[len(prompt) :]
        if not answered.lstrip().startswith(messages[i]["content"].strip()):
            remedy = "let it write the header where add_generation_prompt is set"
            raise _unfit(where, "it writes the header of an answer only together with the answer", remedy)

    def _checked(self, messages: Any, where: Where) -> Messages:
        """The messages, after a check of their form; absent fields of parquet, which are None, are dropped."""

        def refuse(what: str, remedy: str = "repair it, or leave it out") -> DataError:
            return DataError(f"not a dialogue ({where()}, {what}): {remedy}")

        if not isinstance(messages, list):
            raise refuse(f"messages is not a list but {type(messages).__name__}")
        found = []
        for i, message in enumerate(messages, 1):
            if not isinstance(message, dict):
                raise refuse(f"message {i} is not an object but {type(message).__name__}")
            message = {key: value for key, value in message.items() if value is not None}
            role, content, others = message.get("role"), message.get("content"), message.keys() - {"role", "content"}
            if role == "tool" and not self._takes_tools:
                raise refuse(f"message {i} has the role 'tool', which the template does not know")
            if role not in (*ROLES, "tool"):
                raise refuse(f"message {i} has the role {shortened(repr(role))}", f"use {', '.join(ROLES)}")
            if not isinstance(content, str):
                raise refuse(f"the content of message {i} is not a string but {type(content).__name__}")
            if others:
                raise refuse(f"message {i} has {shortened(repr(min(others)))}", "leave only role and content")
            if any("\ud800" <= character <= "\udfff" for character in content):
                raise refuse(f"message {i} has half of a surrogate pair")
            found.append(message)
        first = next((i for i, message in enumerate(found) if message["role"] == ANSWER), None)
        if not first:
            raise refuse("no message of the assistant" if first is None else "the assistant answers nobody")
        return found


def _unfit(where: Where, why: str, remedy: str) -> DataError:
    return DataError(f"the template does not tell answers from the rest ({where()}, {why}): {remedy}")
