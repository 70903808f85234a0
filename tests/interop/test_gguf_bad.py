"""GGUF files that are damaged, lie, or hold what jaxgpt does not compute: one line, and no memory."""

import struct
import sys
import tracemalloc

import numpy as np
import pytest
from gguf_model import DOWN, HEAD, HIDDEN, llama3_factors, normal, write

from jaxgpt.errors import CheckpointError
from jaxgpt.files import download
from jaxgpt.interop.gguf_file import open_gguf


def settings(**values):
    return {"settings": {name.replace("__", "."): value for name, value in values.items()}}


LIES = {  # what a file may claim, and the words of the message that name it
    "another architecture": ({"architecture": "gemma2"}, "gemma2"),
    "experts": (settings(expert_count=8), "llama.expert_count 8"),
    "unknown scaling": (settings(rope__scaling__type="yarn"), "rope.scaling.type 'yarn'"),
    "another head": (settings(rope__dimension_count=4), "rope.dimension_count 4"),
    "heads by layer": (settings(attention__head_count=[4, 4]), "attention.head_count"),
    "a text for a size": (settings(embedding_length="32"), "embedding_length '32'"),
    "too many layers": (settings(block_count=2**31 - 1), "block_count: 2147483647 and 1"),
    "other heads": (settings(attention__head_count=8, attention__key_length=HEAD), "q_proj: 64 and 32"),
    "no number": (settings(attention__layer_norm_rms_epsilon=float("nan")), "rms_epsilon nan"),
    "a missing size": (settings(context_length=None), "context_length None"),
    "a name of two lines": (settings(**{"logit\nscale": 0.5}), "llama.logit scale 0.5"),
    "another scale": (settings(logit_scale=0.5), "llama.logit_scale 0.5"),
    "other factors": ({"arrays": {"rope_freqs.weight": 1 + llama3_factors(8)}}, "rope_freqs.weight"),
    "an unknown tensor": ({"arrays": {"blk.0.ffn_gate_exps.weight": normal(4, 4)}}, "blk.0.ffn_gate_exps.weight"),
    "no embedding": ({"arrays": {"token_embd.weight": None}}, "embedding_length: 32 and None"),
    "a table for other ids": ({"arrays": {"token_embd.weight": normal(9, HIDDEN)}}, "tokenizer.ggml.tokens: 5 and 9"),
    "integers": ({"arrays": {"output.weight": np.ones((5, HIDDEN), np.int8)}}, "output.weight, GGML type 24"),
    "an id without a token": ({"keys": {"tokenizer.ggml.eot_token_id": 5}}, "eot_token_id 5"),
    "an unknown token that is none": ({"keys": {"tokenizer.ggml.unknown_token_id": 5}}, "unknown_token_id 5"),
    "a part": ({"keys": {"split.count": 2}}, "split.count"),
    "an adapter": ({"keys": {"general.type": "adapter"}}, "adapter"),
    "a kind that is a list": ({"keys": {"general.type": [1, 2]}}, "(1, 2)"),
    "an unknown tokenizer": ({"keys": {"tokenizer.ggml.model": "bert"}}, "tokenizer.ggml.model 'bert'"),
    "an unknown pattern": ({"keys": {"tokenizer.ggml.pre": "falcon"}}, "tokenizer.ggml.pre 'falcon'"),
    "no pattern": ({"keys": {"tokenizer.ggml.pre": None}}, "tokenizer.ggml.pre None"),
    "other merges": ({"keys": {"tokenizer.ggml.merges": ["a c"]}}, "tokenizer.ggml.merges 'a c'"),
    "tokens that are numbers": ({"keys": {"tokenizer.ggml.tokens": [1, 2, 3, 4, 5]}}, "tokenizer.ggml.tokens"),
    "a token twice": ({"keys": {"tokenizer.ggml.tokens": ["a", "b", "ab", "a", "c"]}}, "tokenizer.ggml.tokens"),
    "too few types": ({"keys": {"tokenizer.ggml.token_type": [1]}}, "tokenizer.ggml.token_type"),
    "a template that is a number": ({"keys": {"tokenizer.chat_template": 7}}, "tokenizer.chat_template 7"),
    "a flag that is a number": ({"keys": {"tokenizer.ggml.add_bos_token": 1}}, "add_bos_token 1"),
    "BOS without an id": ({"keys": {"tokenizer.ggml.add_bos_token": True}}, "add_bos_token"),
    "SentencePiece without scores": ({"keys": {"tokenizer.ggml.model": "llama"}}, "tokenizer.ggml.scores"),
}


def refusal(path):
    """What is said of a file: one line with exit code 4 that names it, after work that takes no memory to speak of."""
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            file = open_gguf(path)
            _ = file.tokenizer, file.tokenizer_config
            for name in file.shapes:
                file.read(name)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    said = str(caught.value)
    assert str(path) in said and "): " in said and "\n" not in said
    assert caught.value.exit_code == 4
    return said


@pytest.mark.parametrize("lie", LIES)
def test_what_is_wrong_or_not_computed_is_refused_by_its_name(lie, tmp_path):
    claims, words = LIES[lie]
    assert words in refusal(write(tmp_path / "m.gguf", **claims))


def after(data, name, skip):
    """The place so many bytes after a name in the file: its type or number of dimensions, sizes, type, offset."""
    return data.index(name.encode()) + len(name) + skip


HUGE = 1 << 40
WRITTEN = {  # place in the file, format and value
    "magic": (lambda data: 0, "<I", 0, "begin with GGUF"),
    "version 1": (lambda data: 4, "<I", 1, "version 1"),
    "big-endian": (lambda data: 4, "<I", 0x03000000, "little-endian"),
    "tensors": (lambda data: 8, "<Q", HUGE, str(HUGE)),
    "tensors that are not there": (lambda data: 8, "<Q", 1 << 20, "tensor"),
    "keys": (lambda data: 16, "<Q", HUGE, str(HUGE)),
    "length of a key": (lambda data: 24, "<Q", HUGE, str(HUGE)),
    "tokens": (lambda data: after(data, "tokenizer.ggml.tokens", 8), "<Q", HUGE, str(HUGE)),
    "numbers": (lambda data: after(data, "tokenizer.ggml.token_type", 8), "<Q", 1 << 20, str(4 << 20)),
    "type of a value": (lambda data: after(data, "llama.block_count", 0), "<I", 77, "type 77"),
    "arrays of arrays": (lambda data: after(data, "tokenizer.ggml.token_type", 4), "<I", 9, "array of arrays"),
    "no text": (lambda data: after(data, "tokenizer.ggml.model", 12), "<I", 0xFFFFFFFF, "utf-8"),
    "dimensions": (lambda data: after(data, DOWN, 0), "<I", 0x7FFFFFFF, "dimensions"),
    "a long row": (lambda data: after(data, DOWN, 4), "<Q", HUGE, "ends at byte"),
    "many rows": (lambda data: after(data, DOWN, 12), "<Q", HUGE, "ends at byte"),
    "no rows": (lambda data: after(data, DOWN, 12), "<Q", 0, "impossible shape"),
    "a broken block": (lambda data: after(data, "blk.0.ffn_up.weight", 20), "<I", 12, "impossible shape"),
    "an unknown type": (lambda data: after(data, DOWN, 20), "<I", 999, "GGML type 999"),
    "offset": (lambda data: after(data, DOWN, 24), "<Q", HUGE, "ends at byte"),
}


@pytest.mark.parametrize("lie", WRITTEN)
def test_a_header_that_claims_too_much_takes_no_memory(lie, tmp_path):
    path = write(tmp_path / "m.gguf")
    place, form, value, words = WRITTEN[lie]
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, place(data), value)
    path.write_bytes(data)
    assert words in refusal(path)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    path = write(tmp_path / "m.gguf")
    data = path.read_bytes()
    for length in [*range(0, 2000, 100), *range(2000, len(data), 30_000), len(data) - 200]:
        path.write_bytes(data[:length])
        assert "m.gguf" in refusal(path)
    assert "No such file" in refusal(tmp_path / "none.gguf")
    assert "directory" in refusal(tmp_path)


@pytest.mark.full
def test_any_damage_of_the_header_is_one_line_or_another_model(tmp_path):
    path, draw = write(tmp_path / "m.gguf"), np.random.default_rng(0)
    data = path.read_bytes()
    for _ in range(300):
        damaged = bytearray(data)
        damaged[draw.integers(1800)] = draw.integers(256)
        path.write_bytes(damaged)
        try:
            file = open_gguf(path)
            _ = file.tokenizer, file.tokenizer_config
            for name in file.shapes:
                file.read(name)
        except CheckpointError as error:
            assert str(path) in str(error) and "\n" not in str(error)


def test_a_file_that_shrinks_after_it_was_opened_is_refused(tmp_path):
    path = write(tmp_path / "m.gguf")
    file = open_gguf(path)
    path.write_bytes(path.read_bytes()[:-HIDDEN])
    with pytest.raises(CheckpointError, match="shorter"):
        file.read("model.norm.weight")


def test_without_its_package_the_extra_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(download.DownloadError, match=r"pip install 'jaxgpt\[gguf\]'"):
        open_gguf(path)
