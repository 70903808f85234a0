"""Tokenizers in a GGUF's metadata give the ids that the library and SentencePiece's rule give."""

import itertools
import json
import re

import numpy as np
import pytest
import tokenizers
from gguf_model import CONTROL, USER_DEFINED, write
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from jaxgpt.interop.gguf_file import open_gguf

# llama.cpp's own patterns, src/llama-vocab.cpp: a text is cut by each in turn
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
CUTS = {"gpt-2": [GPT2], "smollm": [r"\p{N}", GPT2], "llama-bpe": [LLAMA3], "qwen2": [QWEN2]}
SPOKEN = (
    "<|user|>I'll pay 1234567 in 2024,  or 42's?\r\n\n\tWE'RE ½ café 🙂👩‍👩‍👧<tool>x</tool>  <|end|> 日本語 <|end|>",
    "  12  12\n 12 a1b22 (word) cafe\u0301",
    "",
)


def cutter(pre):
    cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in CUTS[pre]]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(False, use_regex=False)])


@pytest.mark.parametrize("pre", CUTS)
def test_byte_level_ids_are_those_of_the_library_with_llama_cpps_patterns(pre, tmp_path):
    expected = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    expected.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    texts = [part for text in SPOKEN for part in re.split("<[^>]*>", text)]
    expected.train_from_iterator(texts * 2, trainer)  # uncut, so that each cut breaks a token
    expected.pre_tokenizer = cutter(pre)
    expected.normalizer = normalizers.NFC() if pre == "qwen2" else None
    expected.decoder = decoders.ByteLevel()
    merges = json.loads(expected.to_str())["model"]["merges"]
    expected.add_special_tokens(["<|user|>", "<|end|>"])
    expected.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
    tokens = sorted(expected.get_vocab(), key=expected.get_vocab().get)
    types = [1] * (len(tokens) - 3) + [CONTROL, CONTROL, USER_DEFINED]
    if pre == "llama-bpe":
        tokens, types = [*tokens, "Ġnomerges"], [*types, 1]
    keys = {"pre": pre, "tokens": tokens, "token_type": types, "merges": [" ".join(pair) for pair in merges]}
    keys |= {"eos_token_id": tokens.index("<|end|>"), "add_bos_token": False}
    file = open_gguf(write(tmp_path / "m.gguf", keys={f"tokenizer.ggml.{key}": value for key, value in keys.items()}))
    ours = tokenizers.Tokenizer.from_str(json.dumps(file.tokenizer))
    for text in SPOKEN:
        ids = expected.encode(text).ids
        assert ours.encode(text).ids == ids
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == expected.decode(ids, skip_special_tokens=skip)
    assert ours.get_vocab() == {token: i for i, token in enumerate(tokens)}
    if pre == "llama-bpe":  # a whole word that is a token needs no merges
        assert ours.encode(" nomerges").ids == [len(tokens) - 1]
    assert file.tokenizer_config["eos_token"] == "<|end|>"
    assert file.tokenizer_config["chat_template"] == "{{ messages }}"


def sentencepiece(text, tokens, scores, words):
    """SentencePiece's BPE: join the neighbours that make the token with the highest score, the first of equals."""
    parts = list(text.replace(" ", "\u2581"))
    while True:
        joined = [
            (scores[tokens.index(a + b)], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in words
        ]
        if not joined:
            break
        i = -max(joined)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    found = [[part] if part in words else [f"<0x{byte:02X}>" for byte in part.encode()] for part in parts]
    return [tokens.index(part) for parts in found for part in parts]


def test_sentencepiece_ids_are_those_of_joining_by_score(tmp_path):
    spaced = "_ _the _t he th e h t _th _n n i g ig ght night nig _night gh ht __ s < > 0 x 4 1 <0 <0x <0x4 1>"
    words = spaced.replace("_", "\u2581").split()
    controls, octets = ["<unk>", "<s>", "</s>"], [f"<0x{i:02X}>" for i in range(256)]
    tokens = [*controls, *octets, *words]
    scores = [0.0] * (3 + 256) + [-float(i) for i in np.random.default_rng(1).permutation(len(words))]
    keys = {
        "model": "llama",
        "pre": None,
        "tokens": tokens,
        "scores": scores,
        "token_type": [2, CONTROL, CONTROL] + [6] * 256 + [1] * len(words),
        "merges": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    file = open_gguf(write(tmp_path / "m.gguf", keys={f"tokenizer.ggml.{key}": value for key, value in keys.items()}))
    ours = tokenizers.Tokenizer.from_str(json.dumps(file.tokenizer))
    for text in ("the night", " the  nights", "thing é🙂\n", "night", "<0x41>"):
        ids = ours.encode(text).ids
        assert ids == [1, *sentencepiece(f" {text}", tokens, scores, words)]  # BOS, and a space before the text
        assert ours.decode(ids) == text
    assert ours.encode("<s>").ids == [1, 1]  # in a text it is the token
    assert file.tokenizer_config["add_bos_token"] and file.tokenizer_config["bos_token"] == "<s>"
