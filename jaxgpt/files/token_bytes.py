"""The bytes that each id of a tokenizer of the tokenizers library stands for."""

import json
import re

from jaxgpt.files.tokenizer_files import TokenizerError, bytes_as_characters

BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a byte that has no token of its own, in SentencePiece's BPE (Llama 2)
BEFORE = "a"  # decoders treat the first token of a text differently, so each token is decoded behind this one


def bytes_of_ids(tokenizer, source: str) -> list[bytes]:
    """Return the bytes of a text that each id stands for, none for an id that has no token.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        source: its name in error messages.

    Raises:
        TokenizerError: most ids have no token, or it has no decoder.
    """
    added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
    tokens = {i: token for token, i in tokenizer.get_vocab(with_added_tokens=False).items()}
    if not tokens or max(tokens | added) > 2 * len(tokens | added):
        most = max(tokens | added, default=0)
        raise TokenizerError(f"{len(tokens | added)} tokens with ids up to {most} ({source}): number them from 0 on")
    if _decoder(tokenizer) is None:
        raise TokenizerError(f"no decoder ({source}): save the tokenizer with transformers again")
    if is_byte_level(tokenizer):
        bytes_of = bytes_as_characters()
        found = {i: token.encode() for i, token in added.items()}
        for i, token in tokens.items():
            known = all(character in bytes_of for character in token)
            found[i] = bytes(map(bytes_of.get, token)) if known else token.encode()
    else:
        found = {i: _decoded(tokenizer.decoder, token) for i, token in (tokens | added).items()}
    return [found.get(i, b"") for i in range(max(found) + 1)]


def is_byte_level(tokenizer) -> bool:
    """Return whether each character of a token stands for a byte, as in GPT-2's, Llama 3's and Qwen's tokenizers."""
    decoder = _decoder(tokenizer) or {}
    return "ByteLevel" in [part["type"] for part in decoder.get("decoders", [decoder]) if "type" in part]


def drops_first_space(tokenizer) -> bool:
    """Return whether the space before the first word of a text is left out, as in Llama 2's tokenizer."""
    return not is_byte_level(tokenizer) and tokenizer.decoder.decode(["▁a"]) == "a"


def _decoder(tokenizer) -> dict | None:
    return None if tokenizer.decoder is None else json.loads(tokenizer.decoder.__getstate__())


def _decoded(decoder, token: str) -> bytes:
    """What a token adds to a text."""
    if byte := BYTE.fullmatch(token):
        return bytes.fromhex(byte[1])
    return decoder.decode([BEFORE, token]).removeprefix(BEFORE).encode()
