"""Text to token ids and back."""

import json
import pathlib
from collections.abc import Iterable

import numpy as np


class UnknownCharacterError(ValueError):
    """A character that the tokenizer has no id for."""


class CharTokenizer:
    """One id a character: the place of the character in the alphabet."""

    def __init__(self, alphabet: str):
        """Take the characters in the order of their ids.

        Raises:
            ValueError: the alphabet is empty or names a character twice.
        """
        if not alphabet or len(set(alphabet)) != len(alphabet):
            raise ValueError(f"an alphabet of {len(alphabet)} characters, {len(set(alphabet))} distinct: each once")
        self.alphabet = alphabet
        self._ids = {character: i for i, character in enumerate(alphabet)}

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """The tokenizer of all characters that occur in the text, sorted as the lecture does."""
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self.alphabet)

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text.

        Returns:
            (len(text),) int32.

        Raises:
            UnknownCharacterError: a character is not in the alphabet.
        """
        try:
            return np.fromiter(map(self._ids.__getitem__, text), dtype=np.int32, count=len(text))
        except KeyError as error:
            character = error.args[0]
            raise UnknownCharacterError(
                f"unknown character {character!r} (position {text.index(character)}): "
                f"use only the {self.vocab_size} characters of the alphabet {self.alphabet!r}"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids.

        Raises:
            ValueError: an id is not in [0, vocab_size).
        """
        ids = np.asarray(ids)
        if ids.size and not (0 <= ids.min() and ids.max() < self.vocab_size):
            raise ValueError(f"ids from {ids.min()} to {ids.max()}: use ids from 0 to {self.vocab_size - 1}")
        return "".join(self.alphabet[i] for i in ids)

    def save(self, path: str | pathlib.Path) -> None:
        """Write tokenizer.json."""
        pathlib.Path(path).write_text(json.dumps({"type": "char", "alphabet": self.alphabet}) + "\n", encoding="utf-8")


def load(path: str | pathlib.Path) -> CharTokenizer:
    """The tokenizer that `save` wrote.

    Raises:
        ValueError: the file is not a tokenizer's.
    """
    try:
        stored = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        if stored["type"] == "char" and isinstance(stored["alphabet"], str):
            return CharTokenizer(stored["alphabet"])
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"not a tokenizer file ({path}): restore it, or train again")
