"""A small GPT-2 as transformers saves it, written here by the safetensors library and by json."""

import json

import numpy as np
from safetensors.numpy import save_file

from jaxgpt.interop import hf_tokenizer
from jaxgpt.tokenizer import CharTokenizer

CONFIG = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 7}
SHAPES = {
    "transformer.wte.weight": (7, 8),
    "transformer.wpe.weight": (16, 8),
    "transformer.ln_f.weight": (8,),
    "transformer.ln_f.bias": (8,),
    "transformer.h.0.ln_1.weight": (8,),
    "transformer.h.0.ln_1.bias": (8,),
    "transformer.h.0.ln_2.weight": (8,),
    "transformer.h.0.ln_2.bias": (8,),
    "transformer.h.0.attn.c_attn.weight": (8, 24),
    "transformer.h.0.attn.c_attn.bias": (24,),
    "transformer.h.0.attn.c_proj.weight": (8, 8),
    "transformer.h.0.attn.c_proj.bias": (8,),
    "transformer.h.0.mlp.c_fc.weight": (8, 32),
    "transformer.h.0.mlp.c_fc.bias": (32,),
    "transformer.h.0.mlp.c_proj.weight": (32, 8),
    "transformer.h.0.mlp.c_proj.bias": (8,),
}


def write(folder, config=None, tensors=None, alphabet="abcdefg"):
    """Write a folder of 7 ids, with changes, and return it and its tensors."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    values = {name: value for name, value in (values | (tensors or {})).items() if value is not None}
    save_file(values, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    if alphabet:
        hf_tokenizer.write(folder, CharTokenizer(alphabet), 16)
    return folder, values
