"""Hugging Face's tokenizer files: tokenizer.json, and tokenizer_config.json, which says how to load it."""

import json
import pathlib

from jaxgpt.tokenizer import END_OF_TEXT, CharTokenizer, Tokenizer

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"


def write(folder: pathlib.Path, tokenizer: Tokenizer, block_size: int) -> None:
    """Write both files into a folder; a character tokenizer becomes BPE without merges.

    Args:
        folder: an existing folder.
        tokenizer: the tokenizer.
        block_size: the longest input of the model, in tokens.
    """
    if isinstance(tokenizer, CharTokenizer):
        text = json.dumps(_characters(tokenizer.alphabet), ensure_ascii=False)
        (folder / FILE).write_text(text, encoding="utf-8")
    else:
        tokenizer.save(folder / FILE)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,  # decoding must return the exact text
    }
    if tokenizer.special:
        config |= tokenizer.special
    elif tokenizer.end_of_text is not None:
        config |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    if "add_bos_token" in tokenizer.settings:
        config["add_bos_token"] = tokenizer.settings["add_bos_token"]
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _characters(alphabet: str) -> dict:
    """The content of tokenizer.json for an alphabet."""
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {character: i for i, character in enumerate(alphabet)},
        "merges": [],
    }
    none = {"truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None, "post_processor": None}
    return {"version": "1.0", **none, "added_tokens": [], "decoder": {"type": "Fuse"}, "model": model}
