"""Downloads of models from Hugging Face's hub, by name and pinned commit: safetensors only, which hold no code."""

import pathlib
import re

from jaxgpt.files.download import DownloadError

PINNED = {
    "gpt2": "openai-community/gpt2@607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "openai-community/gpt2-medium@6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "openai-community/gpt2-large@32b71b12589c2f8d625668d2335a01cac3249519",
    "gpt2-xl": "openai-community/gpt2-xl@15ea56dee5df4983c59b2538573817e1667135e2",
}
FILES = [
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
]
NAME = re.compile(r"([\w.-]+/[\w.-]+)@([0-9a-f]{40})")


def is_name(text: str) -> bool:
    """Return whether a text is the name of a pinned model, or OWNER/NAME@COMMIT."""
    return text in PINNED or NAME.fullmatch(text) is not None


def fetch(name: str) -> pathlib.Path:
    """Download the files of a model, once, into the cache of the hub's library.

    Returns:
        The folder with the files.

    Raises:
        DownloadError: the hub is out of reach, has no such files, or its library is not installed.
    """
    repository, commit = NAME.fullmatch(PINNED.get(name, name)).groups()
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise DownloadError(
            f"no library to download with (--from {name}, {error}): pip install 'jaxgpt[hub]', or name a folder"
        ) from None
    try:
        return pathlib.Path(snapshot_download(repository, revision=commit, allow_patterns=FILES))
    except Exception as error:  # the library lets errors of its HTTP client through
        said = " ".join(str(error).split())[:200]
        raise DownloadError(
            f"cannot download the model (--from {name}, {type(error).__name__}: {said}): copy its config.json, "
            "model.safetensors and tokenizer.json here from a machine that can, and give --from their folder"
        ) from None
