"""Text to token ids and back: one id per character, or byte-level BPE, or the tokenizer of another model."""

import codecs
import functools
import json
import os
import pathlib
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxgpt.errors import ArgumentError, JaxgptError, shortened
from jaxgpt.files import byte_level, storage, token_bytes, tokenizer_files, tokenizer_settings
from jaxgpt.files.byte_level import END_OF_TEXT
from jaxgpt.files.tokenizer_files import TokenizerError

Ids = Sequence[int] | np.ndarray
# a text that a tokenizer must give back, or it would lose parts of other texts without a word
SAMPLE = "The King's  12,345 é 日本 🙂\n\n\tends here. "


class UnknownCharacterError(JaxgptError, ValueError):
    """A text contains a character that has no id."""


class Tokenizer:
    """The base class of the tokenizers: each id stands for some bytes of a text."""

    end_of_text: int | None = None
    """The id that ends a document; None if the tokenizer has none."""
    ends: tuple[int, ...] = ()
    """All ids that end a text which the model writes, the end of text first."""
    bos: int | None = None
    """The id that begins a text; None if the tokenizer has none."""
    prefix: np.ndarray = np.empty(0, np.int32)
    """(N,) int32 ids that the model expects before the first token of a text: `bos` for most Llamas, or nothing."""
    chat_template: str | None = None
    """The model's own Jinja template of a dialogue; None if it has none."""
    special: Mapping[str, str] = types.MappingProxyType({})
    """The texts of the tokens `bos_token` and `eos_token`, which templates name; without those that are not set."""
    settings: Mapping[str, Any] = types.MappingProxyType({})
    """What stands beside the tokenizer in tokenizer_config.json; see `tokenizer_settings.checked`."""
    _bytes: list[bytes]
    _special: frozenset[int] = frozenset()  # ids that are no text, such as the end of text
    _drops_first_space = False  # whether a text begins without the space of its first word

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

    def decode_stream(
        self, pieces: Iterable[Ids], skip_special_tokens: bool = False, continues: bool = False
    ) -> Iterator[str]:
        """Decode a text that arrives in pieces, whose ends may lie inside a character.

        Args:
            pieces: (N,) integers in [0, vocab_size) each; N may differ.
            skip_special_tokens: whether special tokens are left out of the text.
            continues: whether there is text before, so that the space before the first word is one.

        Yields:
            The text of each piece up to its last whole character, and finally the rest. Joined, they are the text that
            `decode` returns for all ids.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        left_out = self._special if skip_special_tokens else ()
        at_start = self._drops_first_space and not continues
        for piece in pieces:
            ids = _checked(piece, self.vocab_size)
            text = b"".join(self._bytes[i] for i in ids if i not in left_out)
            if at_start and text:
                text, at_start = text.removeprefix(b" "), False
            yield decoder.decode(text)
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
        codes = _codes(alphabet)
        self._ids = np.full(codes.max() + 2, -1, np.int32)  # of each code point; the last entry is for all above
        self._ids[codes] = np.arange(len(codes))
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
        ids = self._ids[np.minimum(_codes(_text(text)), len(self._ids) - 1)]
        if (unknown := ids < 0).any():
            position = int(unknown.argmax())
            raise UnknownCharacterError(
                f"unknown character {text[position]!r} (position {position}): "
                f"use only the {self.vocab_size} characters of the alphabet {shortened(repr(self.alphabet), 200)}"
            )
        return ids

    def save(self, path: str | pathlib.Path) -> None:
        """Write the tokenizer.

        Args:
            path: a tokenizer.json, in a format of our own.
        """
        _path(path).write_text(json.dumps({"type": "char", "alphabet": self.alphabet}) + "\n", encoding="utf-8")


def _codes(text: str) -> np.ndarray:
    """The code point of each character, (N,) uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


class BPETokenizer(Tokenizer):
    """A tokenizer of the tokenizers library: it encodes any text, and decoding restores that text."""

    def __init__(self, tokenizer, source: str = "tokenizer.json", settings: dict[str, Any] | None = None):
        """Wrap a tokenizer of the library.

        Args:
            tokenizer: a `tokenizers.Tokenizer`, which must not be used elsewhere, because its settings are changed.
            source: its name in error messages.
            settings: what stands beside it in a tokenizer_config.json, as `tokenizer_settings.checked` returns it.

        Raises:
            ArgumentError: it is not a `tokenizers.Tokenizer`.
            TokenizerError: some texts would not be restored, or the settings name a token that it lacks.
        """
        if not hasattr(tokenizer, "to_str"):
            raise ArgumentError(f"not a tokenizer (tokenizer, {type(tokenizer).__name__}): give a tokenizers.Tokenizer")
        self.settings = settings or {}
        self.special = {name: self.settings[name] for name in tokenizer_settings.TOKENS if name in self.settings}
        for name, token in self.special.items():
            if tokenizer.token_to_id(token) is None:
                raise TokenizerError(
                    f"a token that the tokenizer lacks ({source}, {name} {shortened(repr(token))}): restore "
                    f"{tokenizer_settings.FILE}, or take the tokenizer.json that belongs to it"
                )
        byte_level.configure(tokenizer, self.special.values())
        self._tokenizer = tokenizer
        self._bytes = token_bytes.bytes_of_ids(tokenizer, source)
        self._special = frozenset(i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special)
        plain = tokenizer_files.has_gpt2_form(json.loads(tokenizer.to_str()))
        self._cuttable = plain and byte_level.is_cuttable(tokenizer)
        self._drops_first_space = token_bytes.drops_first_space(tokenizer)
        more = tuple(self.settings.get("eos_token_id", ()))
        first = () if self.end_of_text is None else (self.end_of_text,)
        self.ends = tuple(dict.fromkeys(first + more))
        if more and not 0 <= min(more) <= max(more) < self.vocab_size:
            beyond = f"{source}, eos_token_id {more}"
            raise TokenizerError(f"an id beyond the vocabulary ({beyond}): use ids from 0 to {self.vocab_size - 1}")
        if not plain and (found := self.decode(self.encode(SAMPLE))) != SAMPLE:
            raise TokenizerError(
                f"a tokenizer that changes a text ({source}, {SAMPLE!r} becomes {shortened(repr(found), 80)}): use "
                "char, gpt2, bpe or the tokenizer of a Llama or Qwen model"
            )

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
        """The id that ends a document: the settings' eos_token, else `<|endoftext|>`; None if there is neither."""
        if "eos_token" not in self.special and self.settings.get("eos_token_id"):
            return self.settings["eos_token_id"][0]
        return self._tokenizer.token_to_id(self.special.get("eos_token", END_OF_TEXT))

    @property
    def bos(self) -> int | None:
        """The id that begins a text: the settings' bos_token; None if there is none."""
        return self._tokenizer.token_to_id(self.special["bos_token"]) if "bos_token" in self.special else None

    @functools.cached_property
    def prefix(self) -> np.ndarray:
        """The ids that the model expects before the first token of a text, (N,) int32; most often none, or `bos`."""
        added = self._tokenizer.encode("", add_special_tokens=True).ids  # what the post-processor of the file adds
        begins = self.settings.get("add_bos_token", added[:1] == [self.bos])
        return np.array([self.bos] if begins and self.bos is not None else [], np.int32)

    @property
    def chat_template(self) -> str | None:
        """The model's own Jinja template of a dialogue; None if it has none."""
        return self.settings.get("chat_template")

    @property
    def start(self) -> np.ndarray:
        """The prompt of a new text, (1,) int32: its beginning, the end of the text before, or a line break."""
        first = self.end_of_text if self.bos is None else self.bos
        return self.encode("\n") if first is None else np.array([first], np.int32)

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
        """Write the tokenizer, and a tokenizer_config.json beside it if it has settings.

        Args:
            path: a tokenizer.json, in Hugging Face's format.
        """
        if self.settings:
            text = json.dumps(self.settings, indent=1, ensure_ascii=False) + "\n"
            storage.write(_path(path).with_name(tokenizer_settings.FILE), text)
        _path(path).write_text(self._tokenizer.to_str(), encoding="utf-8")

    def __reduce__(self):
        # for pickle: the library's own pickles lose settings
        return from_json, (self._tokenizer.to_str(), "pickle", self.settings)

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
    return a.end_of_text == b.end_of_text and tokenizer_files.same(a._tokenizer, b._tokenizer)


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
        path: a tokenizer.json of characters or of the tokenizers library, with its tokenizer_config.json beside it if
            there is one, or GPT-2's vocab.json with merges.txt beside it.

    Raises:
        TokenizerError: the file is not a usable tokenizer, or the tokenizers library is not installed.
    """
    found = tokenizer_files.read(_path(path))
    try:
        if not hasattr(found, "to_str"):
            return CharTokenizer(found)
        return BPETokenizer(found, str(path), tokenizer_settings.read(_path(path)))
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


def from_json(text: str, source: str, settings: dict[str, Any] | None = None) -> BPETokenizer:
    """Make a tokenizer of the text of a tokenizer.json; the other arguments are those of `BPETokenizer`."""
    return BPETokenizer(tokenizer_files.from_json(text, source), source, settings)


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
