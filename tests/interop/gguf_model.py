"""Small GGUF files for tests, written by the package gguf."""

import gguf
import numpy as np

HIDDEN, HEADS, KV_HEADS, HEAD, WIDTH = 32, 4, 2, 8, 256  # 256 is the block of K-quants
SETTINGS = {
    "context_length": 64,
    "embedding_length": HIDDEN,
    "block_count": 1,
    "feed_forward_length": WIDTH,
    "rope.freq_base": 500_000.0,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.dimension_count": HEAD,
}
CONTROL, USER_DEFINED = 3, 4
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<|end|>", "a", "b", "ab", "Ġ"],
    "tokenizer.ggml.token_type": [CONTROL, 1, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.chat_template": "{{ messages }}",
}
DOWN = "blk.0.ffn_down.weight"


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def tensors(n_tokens=5):
    return {
        "token_embd.weight": normal(n_tokens, HIDDEN),
        "blk.0.attn_norm.weight": normal(HIDDEN),
        "blk.0.attn_q.weight": normal(HEADS * HEAD, HIDDEN),
        "blk.0.attn_k.weight": normal(KV_HEADS * HEAD, HIDDEN),
        "blk.0.attn_v.weight": normal(KV_HEADS * HEAD, HIDDEN),
        "blk.0.attn_output.weight": normal(HIDDEN, HEADS * HEAD),
        "blk.0.ffn_norm.weight": normal(HIDDEN),
        "blk.0.ffn_gate.weight": normal(WIDTH, HIDDEN),
        "blk.0.ffn_up.weight": normal(WIDTH, HIDDEN),
        DOWN: normal(HIDDEN, WIDTH),
        "output_norm.weight": normal(HIDDEN),
    }


def write(path, architecture="llama", settings=(), arrays=(), keys=(), kinds=()):
    """A small model: what is given replaces or extends the default; a value of None leaves it out."""
    keys = TOKENIZER | dict(keys)
    stored = {f"{architecture}.{name}": value for name, value in (SETTINGS | dict(settings)).items()} | keys
    arrays = tensors(len(keys["tokenizer.ggml.tokens"] or range(5))) | dict(arrays)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in stored.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, values in arrays.items():
        if values is not None:
            writer.add_tensor(name, values, raw_dtype=dict(kinds).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3_factors(factor, head_dim=HEAD, theta=500_000.0, context=8192, low=1, high=4):
    """The loop of llama.cpp's convert_hf_to_gguf.py."""
    factors = []
    for i in range(0, head_dim, 2):
        wave = 2 * np.pi * theta ** (i / head_dim)
        if wave < context / high:
            factors.append(1)
        elif wave > context / low:
            factors.append(factor)
        else:
            smooth = (context / wave - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)
