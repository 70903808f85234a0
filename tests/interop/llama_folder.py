"""A small Llama as transformers saves it, written here by the safetensors library and by json."""

import json

import numpy as np
from safetensors.numpy import save_file

from jaxgpt.interop import hf_tokenizer
from jaxgpt.tokenizer import CharTokenizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 7,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_theta": 5000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "torch_dtype": "float32",
    "use_cache": True,
}
LAYER = {
    "input_layernorm.weight": (8,),
    "self_attn.q_proj.weight": (8, 8),
    "self_attn.k_proj.weight": (4, 8),
    "self_attn.v_proj.weight": (4, 8),
    "self_attn.o_proj.weight": (8, 8),
    "post_attention_layernorm.weight": (8,),
    "mlp.gate_proj.weight": (12, 8),
    "mlp.up_proj.weight": (12, 8),
    "mlp.down_proj.weight": (8, 12),
}
SHAPES = {
    "model.embed_tokens.weight": (7, 8),
    "model.norm.weight": (8,),
    "lm_head.weight": (7, 8),
    **{f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in LAYER.items()},
}


def tensors():
    """Random tensors of these names and shapes."""
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def write(folder, config=None, changed=None, alphabet="abcdefg"):
    """Write a folder of 7 ids, with changes, and return it and its tensors."""
    folder.mkdir(exist_ok=True)
    values = {name: value for name, value in (tensors() | (changed or {})).items() if value is not None}
    save_file(values, folder / "model.safetensors")
    stored = {name: value for name, value in (CONFIG | (config or {})).items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(stored))
    if alphabet:
        hf_tokenizer.write(folder, CharTokenizer(alphabet), 16)
    return folder, values
