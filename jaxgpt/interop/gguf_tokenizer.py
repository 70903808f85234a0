"""The tokenizer in a GGUF's metadata as the tokenizer.json and tokenizer_config.json of transformers.

Two kinds exist for the models that jaxgpt computes: byte-level BPE ("gpt2"), with merges, and SentencePiece's BPE
("llama"), whose merges follow from the scores of its tokens.

Source: llama.cpp, src/llama-vocab.cpp; the forms are those of the models' own tokenizer.json.
"""

import math
import pathlib
from typing import Any

from jaxgpt.errors import CheckpointError
from jaxgpt.interop.gguf_config import shown

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # types of tokens; unused and byte tokens need no care
ADDED = (UNKNOWN, CONTROL, USER_DEFINED)
SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
PATTERNS = {  # by tokenizer.ggml.pre: a pattern that cuts a text, or None for GPT-2's own, which ByteLevel has
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
}
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3")  # a word that is a token needs no merges, and texts begin with BOS

REMEDY = "take its tokenizer.json from the folder that the GGUF was made of, and import that folder"


def to_tokenizer(metadata: dict[str, Any], path: pathlib.Path) -> dict[str, Any]:
    """Convert the tokenizer to the content of tokenizer.json.

    Args:
        metadata: all keys of the file.
        path: the file, for error messages.

    Raises:
        CheckpointError: the tokenizer is of another kind, incomplete, or contradicts itself.
    """
    tokens, types = _tokens(metadata, path)
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        form = _byte_level(metadata, tokens, path)
    elif kind == "llama":
        form = _sentencepiece(metadata, tokens, types, path)
    else:
        raise _error("a tokenizer of an unknown kind", path, f"tokenizer.ggml.model {kind!r}")
    added = [
        {"id": i, "content": token, "special": types[i] != USER_DEFINED, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for i, token in enumerate(tokens)
        if types[i] in ADDED
    ]
    config = to_config(metadata, path)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **form,
        "post_processor": _ends(tokens, config),
    }


def to_config(metadata: dict[str, Any], path: pathlib.Path) -> dict[str, Any]:
    """Convert the special tokens and the chat template to the content of tokenizer_config.json.

    Args:
        metadata: all keys of the file.
        path: the file, for error messages.

    Raises:
        CheckpointError: a special token does not exist, or a value has the wrong type.
    """
    tokens, _ = _tokens(metadata, path)
    starts = metadata.get("tokenizer.ggml.model") == "llama" or metadata.get("tokenizer.ggml.pre") in WHOLE_WORDS
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": _flag(metadata, "add_bos_token", starts, path),
        "add_eos_token": _flag(metadata, "add_eos_token", False, path),
    }
    for name, key in SPECIAL.items():
        i = metadata.get(f"tokenizer.ggml.{key}")
        if i is not None and (type(i) is not int or not 0 <= i < len(tokens)):
            raise _error("a special token that does not exist", path, f"tokenizer.ggml.{key} {i!r}")
        if i is not None:
            config[name] = tokens[i]
    for name in ("bos", "eos"):
        if config[f"add_{name}_token"] and f"{name}_token" not in config:
            raise _error("a special token that does not exist", path, f"tokenizer.ggml.add_{name}_token without its id")
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise _error("not a text", path, f"tokenizer.chat_template {template!r}")
    return config if template is None else config | {"chat_template": template}


def _byte_level(metadata: dict[str, Any], tokens: list[str], path: pathlib.Path) -> dict[str, Any]:
    """The parts of tokenizer.json for byte-level BPE."""
    name = metadata.get("tokenizer.ggml.pre")
    if not isinstance(name, str) or name not in PATTERNS:
        raise _error("an unknown pre-tokenizer", path, f"tokenizer.ggml.pre {name!r}")
    pattern, vocabulary, merges = PATTERNS[name], set(tokens), []
    for line in _strings(metadata, "tokenizer.ggml.merges", path):
        pair = line.split(" ")
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary:
            raise _error("merges that do not fit the tokens", path, f"tokenizer.ggml.merges {line!r}")
        merges.append(pair)
    before = [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern is None}]
    if pattern is not None:
        before.insert(0, {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False})
    if name == "smollm":
        before.insert(0, {"type": "Digits", "individual_digits": True})
    return {
        "normalizer": {"type": "NFC"} if name == "qwen2" else None,  # as in Qwen's own tokenizer.json
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": before},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(tokens, merges, ignore_merges=name in WHOLE_WORDS),
    }


def _sentencepiece(
    metadata: dict[str, Any], tokens: list[str], types: tuple[int, ...], path: pathlib.Path
) -> dict[str, Any]:
    """The parts of tokenizer.json for SentencePiece's BPE, which writes a space as \u2581."""
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, tuple) or len(scores) != len(types) or not all(map(math.isfinite, scores)):
        raise _error("not one score per token", path, "tokenizer.ggml.scores")
    prefix = _flag(metadata, "add_space_prefix", True, path)
    if _flag(metadata, "remove_extra_whitespaces", False, path):
        raise _error("a tokenizer that removes spaces", path, "tokenizer.ggml.remove_extra_whitespaces")
    to_mark = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    to_space = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    start = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    decoders = [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}, *([start] if prefix else [])]
    normalizers = [*([{"type": "Prepend", "prepend": "\u2581"}] if prefix else []), to_mark]
    unknown = next((token for token, kind in zip(tokens, types) if kind == UNKNOWN), None)
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(tokens, _merges(tokens, types, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True),
    }


def _merges(tokens: list[str], types: tuple[int, ...], scores: tuple[float, ...]) -> list[list[str]]:
    """The merges that make tokens of two others, those with the highest score first, as SentencePiece joins them."""
    score = {token: scores[i] for i, token in enumerate(tokens) if types[i] == NORMAL}
    pairs = [
        (-score[token], -i, token[:i], token[i:])
        for token in score
        for i in range(1, len(token))
        if token[:i] in score and token[i:] in score
    ]
    return [[left, right] for _, _, left, right in sorted(pairs)]


def _bpe(tokens: list[str], merges: list[list[str]], **settings: Any) -> dict[str, Any]:
    """The model in tokenizer.json; any setting that is not named is off."""
    names = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    off = dict.fromkeys(names) | dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return {"type": "BPE", **off, **settings, "vocab": vocabulary, "merges": merges}


def _ends(tokens: list[str], config: dict[str, Any]) -> dict[str, Any] | None:
    """The rule that puts BOS before a text and EOS after it, if the model wants that."""
    bos, eos = (config[f"{name}_token"] if config[f"add_{name}_token"] else None for name in ("bos", "eos"))

    def around(text: str, i: int) -> list[dict[str, Any]]:
        parts = [("SpecialToken", bos), ("Sequence", text), ("SpecialToken", eos)]
        return [{kind: {"id": name, "type_id": i}} for kind, name in parts if name is not None]

    special = {name: {"id": name, "ids": [tokens.index(name)], "tokens": [name]} for name in (bos, eos) if name}
    pair = [*around("A", 0), *around("B", 1)]
    form = {"type": "TemplateProcessing", "single": around("A", 0), "pair": pair, "special_tokens": special}
    return form if special else None


def _tokens(metadata: dict[str, Any], path: pathlib.Path) -> tuple[list[str], tuple[int, ...]]:
    """All tokens in the order of their ids, and their types."""
    tokens = _strings(metadata, "tokenizer.ggml.tokens", path)
    if len(set(tokens)) < len(tokens):
        raise _error("a token has two ids", path, f"tokenizer.ggml.tokens, {len(tokens)}")
    types = metadata.get("tokenizer.ggml.token_type", (NORMAL,) * len(tokens))
    if not isinstance(types, tuple) or len(types) != len(tokens):
        raise _error("not one type per token", path, "tokenizer.ggml.token_type")
    return tokens, types


def _strings(metadata: dict[str, Any], key: str, path: pathlib.Path) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list):
        raise _error("no list of texts", path, key)
    return value


def _flag(metadata: dict[str, Any], name: str, default: bool, path: pathlib.Path) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise _error("neither true nor false", path, f"tokenizer.ggml.{name} {value!r}")
    return value


def _error(what: str, path: pathlib.Path, where: str) -> CheckpointError:
    return CheckpointError(f"{what} ({path}, {shown(where)}): {REMEDY}")
