"""Byte-level BPE in GPT-2's form with the tokenizers library: settings, training, and encoding in parallel."""

import re
from collections.abc import Iterable

import numpy as np

from jaxgpt.files import tokenizer_files
from jaxgpt.files.tokenizer_files import TokenizerError

END_OF_TEXT = "<|endoftext|>"

# BPE may cut a long text between a character that is not a space and a space or newline: GPT-2's pattern always ends a
# piece there, so the ids of the parts are the ids of the whole. The lookbehinds are the UTF-8 bytes of Unicode's
# spaces. Only these two characters may follow a cut, because regex engines disagree about some others (\x1c to \x1f).
SAFE_CUT = re.compile(
    b"(?=[ \n])" + b"".join(b"(?<!%b)" % re.escape(chr(i).encode()) for i in range(0x3001) if chr(i).isspace())
)
CHUNK_BYTES, CHUNKS = 1 << 16, 32  # per call of the library, which needs a few hundred bytes of memory per token


def configure(tokenizer, special: Iterable[str] = ()) -> None:
    """Change the settings of a tokenizer of the library so that a text always has the same ids.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        special: tokens that are no text, beside those that the tokenizer names itself.
    """
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    for token in (END_OF_TEXT, *special):
        if tokenizer.token_to_id(token) is not None and token not in known:
            tokenizer.add_special_tokens([token])
    tokenizer.encode_special_tokens = True  # <|endoftext|> in a text is ordinary text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if hasattr(tokenizer.model, "dropout"):
        tokenizer.model.dropout = None


def is_cuttable(tokenizer) -> bool:
    """Return whether a text may be cut at `SAFE_CUT`: never inside an added token or the spaces that it takes.

    Args:
        tokenizer: a `tokenizers.Tokenizer` in GPT-2's form.
    """
    added = tokenizer.get_added_tokens_decoder().values()
    return not any(token.rstrip or SAFE_CUT.search(token.content.encode(), 1) for token in added)


def train(texts: Iterable[str], vocab_size: int):
    """Train a tokenizer of the library; see `BPETokenizer.train`."""
    library = tokenizer_files.library()
    if not isinstance(vocab_size, int | np.integer) or vocab_size < 257:
        raise TokenizerError(f"too few ids for all bytes (vocab_size, {vocab_size!r}): use 257 or more")
    trained = tokenizer_files.byte_level(library.models.BPE())
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=sorted(tokenizer_files.bytes_as_characters()),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    trained.add_special_tokens([END_OF_TEXT])
    if (reached := trained.get_vocab_size()) != vocab_size:
        raise TokenizerError(
            f"too little text for so many ids (vocab_size, {vocab_size}): use {reached} or fewer, or more text"
        )
    return trained


def encode(tokenizer, text: bytes, cuttable: bool) -> np.ndarray:
    """Encode a text in UTF-8, in chunks if it is cuttable: (N,) int32 ids."""
    chunks = _chunks(text) if cuttable else [text.decode()]
    ids = [np.empty(0, np.int32)]
    for i in range(0, len(chunks), CHUNKS):
        encoded = tokenizer.encode_batch_fast(chunks[i : i + CHUNKS], add_special_tokens=False)
        ids += [np.array(each.ids, np.int32) for each in encoded]
    return np.concatenate(ids)


def _chunks(text: bytes) -> list[str]:
    """The text cut into chunks that can be encoded independently and in parallel."""
    cuts = [0]
    while len(text) - cuts[-1] > CHUNK_BYTES and (cut := SAFE_CUT.search(text, cuts[-1] + CHUNK_BYTES)):
        cuts.append(cut.start())
    return [text[a:b].decode() for a, b in zip(cuts, [*cuts[1:], len(text)])]
