"""Text to token ids and back: one id per character, or byte-level BPE."""

import codecs
import functools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from jaxgpt.errors import ArgumentError, JaxgptError, shortened
from jaxgpt.files import byte_level, tokenizer_files
from jaxgpt.files.byte_level import END_OF_TEXT
from jaxgpt.files.tokenizer_files import TokenizerError

Ids = Sequence[int] | np.ndarray


class UnknownCharacterError(JaxgptError, ValueError):
    """A text contains a character that has no id."""


class Tokenizer:
    """The base class of the tokenizers: each id stands for some bytes of a text."""

    end_of_text: int | None = None
    """The id that ends a document; None if the tokenizer has none."""
    _bytes: list[bytes]
    _special: frozenset[int] = frozenset()  # ids that are no text, such as the end of text

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self._bytes)

    @property
    def byte_lengths(self) -> np.ndarray:
        """How many UTF-8 bytes of a text each id stands for, (vocab_size,) int64; 0 for special tokens."""
        return np.array([0 if i in self._special else len(text) for i, text in enumerate(self._bytes)], np.int64)

    def decode(self, ids: Ids, skip_special_tokens: bool = False) -> str:
        """Decode ids to text; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: (N,) integers in [0, vocab_size).
            skip_special_tokens: whether special tokens are left out of the text.

        Raises:
            ArgumentError: ids has another shape or type, or an id is out of range.
        """
        return "".join(self.decode_stream([ids], skip_special_tokens))

    def decode_stream(self, pieces: Iterable[Ids], skip_special_tokens: bool = False) -> Iterator[str]:
        """Decode a text that arrives in pieces, whose ends may lie inside a character.

        Args:
            pieces: (N,) integers in [0, vocab_size) each; N may differ.
            skip_special_tokens: whether special tokens are left out of the text.

        Yields:
            The text of each piece up to its last whole character, and finally the rest. Joined, they are the text that
            `decode` returns for all ids.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        left_out = self._special if skip_special_tokens else ()
        for piece in pieces:
            ids = _checked(piece, self.vocab_size)
            yield decoder.decode(b"".join(self._bytes[i] for i in ids if i not in left_out))
        yield decoder.decode(b"", final=True)


class CharTokenizer(Tokenizer):
    """A tokenizer with one id per character, the character's position in the alphabet."""

    def __init__(self, alphabet: str):
        """Make a tokenizer from its characters.

        Args:
            alphabet: the characters, in the order of their ids.

        Raises:
            ArgumentError: the alphabet is empty, has a character twice, or is not valid Unicode.
        """
        _utf8(alphabet, "alphabet")
        if not alphabet or len(set(alphabet)) != len(alphabet):
            raise ArgumentError(f"alphabet of {len(alphabet)} characters, {len(set(alphabet))} distinct: use each once")
        self.alphabet = alphabet
        self._ids = {character: i for i, character in enumerate(alphabet)}
        self._bytes = [character.encode() for character in alphabet]

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """Make a tokenizer from all characters that occur in a text, sorted as in the lecture.

        Args:
            text: at least one character.
        """
        return cls("".join(sorted(set(_text(text)))))

    @property
    def start(self) -> np.ndarray:
        """The prompt of a new text, (1,) int32: a line break, or the first character if the alphabet has none."""
        return self.encode("\n" if "\n" in self.alphabet else self.alphabet[0])

    def encode(self, text: str, special_tokens: bool = False) -> np.ndarray:
        """Encode a text.

        Args:
            text: characters of the alphabet.
            special_tokens: changes nothing, because characters have no special tokens.

        Returns:
            (len(text),) int32 ids.

        Raises:
            UnknownCharacterError: a character is not in the alphabet.
        """
        try:
            return np.fromiter(map(self._ids.__getitem__, _text(text)), dtype=np.int32, count=len(text))
        except KeyError as error:
            character = error.args[0]
            raise UnknownCharacterError(
                f"unknown character {character!r} (position {text.index(character)}): "
                f"use only the {self.vocab_size} characters of the alphabet {shortened(repr(self.alphabet), 200)}"
            ) from None

    def save(self, path: str | pathlib.Path) -> None:
        """Write the tokenizer.

        Args:
            path: a tokenizer.json, in a format of our own.
        """
        _path(path).write_text(json.dumps({"type": "char", "alphabet": self.alphabet}) + "\n", encoding="utf-8")


class BPETokenizer(Tokenizer):
    """A byte-level BPE tokenizer in GPT-2's form: it encodes any text, and decoding restores that text."""

    def __init__(self, tokenizer, source: str = "tokenizer.json"):
        """Wrap a tokenizer of the tokenizers library.

        Args:
            tokenizer: a `tokenizers.Tokenizer`, which must not be used elsewhere, because its settings are changed.
            source: its name in error messages.

        Raises:
            ArgumentError: it is not a `tokenizers.Tokenizer`.
            TokenizerError: it is not byte-level BPE with GPT-2's pre-tokenizer, so some texts would not be restored.
        """
        if not hasattr(tokenizer, "to_str"):
            raise ArgumentError(f"not a tokenizer (tokenizer, {type(tokenizer).__name__}): give a tokenizers.Tokenizer")
        byte_level.configure(tokenizer, source)
        self._tokenizer = tokenizer
        self._bytes = tokenizer_files.bytes_of_ids(tokenizer, source)
        self._special = frozenset(i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special)
        self._cuttable = byte_level.is_cuttable(tokenizer)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Train a tokenizer, whose last id is `<|endoftext|>`; equal texts give equal merges.

        Args:
            texts: the texts, read once.
            vocab_size: number of ids, 257 or more.

        Raises:
            TokenizerError: vocab_size is too large for these texts, or too small for all bytes.
            ArgumentError: `texts` is one text, or has something else than texts in it.
        """
        if isinstance(texts, str):
            raise ArgumentError(f"texts is one str of {len(texts)} characters (texts): give a list of texts")
        return cls(byte_level.train(map(_text, texts), vocab_size))

    @property
    def end_of_text(self) -> int | None:
        """The id of `<|endoftext|>`, which ends a document; None if the tokenizer lacks it."""
        return self._tokenizer.token_to_id(END_OF_TEXT)

    @property
    def start(self) -> np.ndarray:
        """The prompt of a new text, (1,) int32: the end of the previous text, or a line break."""
        return self.encode("\n") if self.end_of_text is None else np.array([self.end_of_text], np.int32)

    def encode(self, text: str, special_tokens: bool = False) -> np.ndarray:
        """Encode a text as transformers does, but add no tokens at its start or end.

        Args:
            text: any text.
            special_tokens: whether special tokens in the text become their ids; by default, they are ordinary text.

        Returns:
            (N,) int32 ids.

        Raises:
            ArgumentError: the text is not valid Unicode.
        """
        tokenizer = self._with_special_tokens if special_tokens else self._tokenizer
        return byte_level.encode(tokenizer, _utf8(text), self._cuttable)

    def save(self, path: str | pathlib.Path) -> None:
        """Write the tokenizer.

        Args:
            path: a tokenizer.json, in Hugging Face's format.
        """
        _path(path).write_text(self._tokenizer.to_str(), encoding="utf-8")

    def __reduce__(self):
        return _from_json, (self._tokenizer.to_str(),)  # for pickle: the library's own pickles lose settings

    @functools.cached_property
    def _with_special_tokens(self):
        """A copy of the library's tokenizer that reads special tokens in a text as their ids."""
        tokenizer = tokenizer_files.library().Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.encode_special_tokens = False
        return tokenizer


def same(a: Tokenizer, b: Tokenizer) -> bool:
    """Return whether two tokenizers give the same ids to every text and have the same special tokens.

    Args:
        a: a tokenizer.
        b: a tokenizer.
    """
    if wrong := [type(each).__name__ for each in (a, b) if not isinstance(each, Tokenizer)]:
        raise ArgumentError(f"not a tokenizer (a or b, {wrong[0]}): give a CharTokenizer or a BPETokenizer")
    if isinstance(a, CharTokenizer) or isinstance(b, CharTokenizer):
        return getattr(a, "alphabet", None) == getattr(b, "alphabet", None)
    return tokenizer_files.same(a._tokenizer, b._tokenizer)


def gpt2() -> BPETokenizer:
    """Make GPT-2's own tokenizer, with the ids of every GPT-2 checkpoint.

    Raises:
        DownloadError: its files are neither in the cache nor can they be downloaded.
        TokenizerError: the tokenizers library is not installed.
    """
    return BPETokenizer(tokenizer_files.gpt2(), "gpt2")


def load(path: str | pathlib.Path) -> Tokenizer:
    """Load a tokenizer that `save`, `jaxgpt export` or another program wrote.

    Args:
        path: a tokenizer.json of characters or byte-level BPE, or GPT-2's vocab.json with merges.txt beside it.

    Raises:
        TokenizerError: the file is not a usable tokenizer, or the tokenizers library is not installed.
    """
    found = tokenizer_files.read(_path(path))
    try:
        return BPETokenizer(found, str(path)) if hasattr(found, "to_str") else CharTokenizer(found)
    except ArgumentError as error:
        raise TokenizerError(f"not a tokenizer file ({path}, {error}): restore it, or train again") from None


def for_text(spec: str, text: str, alphabet: str | None = None) -> Tokenizer:
    """Make or load the tokenizer that `data.tokenizer` names.

    Args:
        spec: `char`, `gpt2`, or the path of a tokenizer.json.
        text: source of the alphabet for `char`, unless `alphabet` is given.
        alphabet: fixed alphabet for `char`.

    Raises:
        TokenizerError: there is no such tokenizer, or it cannot be used.
    """
    if spec == "char":
        return CharTokenizer(alphabet) if alphabet else CharTokenizer.from_text(text)
    if spec == "gpt2":
        return gpt2()
    if not os.path.isfile(_path(spec)):
        raise TokenizerError(f"no such tokenizer (--data.tokenizer, {spec!r}): use char, gpt2 or a tokenizer.json")
    return load(spec)


def _from_json(text: str) -> BPETokenizer:
    return BPETokenizer(tokenizer_files.from_json(text, "pickle"))


def _path(path: str | os.PathLike) -> pathlib.Path:
    try:
        return pathlib.Path(os.path.expanduser(path))
    except TypeError:
        raise ArgumentError(f"not a path (path, {type(path).__name__}): give a str or a pathlib.Path") from None


def _text(text: str, name: str = "text") -> str:
    if not isinstance(text, str):
        raise ArgumentError(f"{name} is of type {type(text).__name__} ({name}): give one str")
    return text


def _utf8(text: str, name: str = "text") -> bytes:
    try:
        return _text(text, name).encode()
    except UnicodeEncodeError as error:
        bad = f"{name}, position {error.start}, {text[error.start]!r}"
        raise ArgumentError(f"half of a surrogate pair ({bad}): use valid Unicode") from None


def _checked(ids: Ids, vocab_size: int) -> list[int]:
    """The ids as a list, after a check of their shape, type and range."""
    try:
        array = np.asarray(list(ids) if isinstance(ids, Iterator) else ids)
    except (TypeError, ValueError):
        raise ArgumentError("rows of different lengths (ids): decode them row by row") from None
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ArgumentError(
            f"ids of shape {array.shape} and type {array.dtype} (ids): give (N,) integers, a (B, T) array row by row"
        )
    if array.size and not (0 <= array.min() and array.max() < vocab_size):
        raise ArgumentError(f"ids from {array.min()} to {array.max()} (ids): use ids from 0 to {vocab_size - 1}")
    return array.tolist()
