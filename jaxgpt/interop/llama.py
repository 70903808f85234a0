"""Names and shapes of the weights of Llama, Qwen2, Qwen3 and Mistral in transformers, and of ours.

transformers stores the weights of linear layers as (out, in). Their configurations are in llama_config.py.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from jaxgpt.devices.sharding import name_of
from jaxgpt.errors import CheckpointError
from jaxgpt.interop.gpt2 import check_names, flat, shapes
from jaxgpt.model import GPTConfig

OUTSIDE = {  # without the leading `model.`
    "token_embedding_table.embedding": "embed_tokens.weight",
    "ln_f.scale": "norm.weight",
    "lm_head.kernel": "lm_head.weight",
}
IN_BLOCK = {
    "ln_1.scale": "input_layernorm.weight",
    "attn.query.kernel": "self_attn.q_proj.weight",
    "attn.key.kernel": "self_attn.k_proj.weight",
    "attn.value.kernel": "self_attn.v_proj.weight",
    "attn.query.bias": "self_attn.q_proj.bias",
    "attn.key.bias": "self_attn.k_proj.bias",
    "attn.value.bias": "self_attn.v_proj.bias",
    "attn.query_norm.scale": "self_attn.q_norm.weight",
    "attn.key_norm.scale": "self_attn.k_norm.weight",
    "attn.proj.kernel": "self_attn.o_proj.weight",
    "ln_2.scale": "post_attention_layernorm.weight",
    "mlp.gate.kernel": "mlp.gate_proj.weight",
    "mlp.fc.kernel": "mlp.up_proj.weight",
    "mlp.proj.kernel": "mlp.down_proj.weight",
}
TABLE, HEAD = OUTSIDE["token_embedding_table.embedding"], OUTSIDE["lm_head.kernel"]
WRAPPERS = re.compile(r"^((_orig_mod|module)\.)*(model\.)?")
BUFFERS = re.compile(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # the frequencies, in older files
LAYER = re.compile(r"layers\.(\d+)\.")


def table(n_layer: int) -> dict[str, str]:
    """Map our name of each parameter to transformers' name, without the leading `model.`."""
    blocks = {f"blocks.{i}.{ours}": f"layers.{i}.{theirs}" for i in range(n_layer) for ours, theirs in IN_BLOCK.items()}
    return OUTSIDE | blocks


def plain(name: str) -> str:
    """Strip the prefixes that torch.compile, DistributedDataParallel and the enclosing class put before a name."""
    return WRAPPERS.sub("", name)


def to_params(
    names: Iterable[str], read: Callable[[str], np.ndarray], config: GPTConfig, dtype: Any = np.float32
) -> dict[str, Any]:
    """Convert transformers' tensors to our parameters, one by one.

    Args:
        names: names of the existing tensors, without prefixes (see `plain`).
        read: returns the values of a tensor by name, in any floating dtype.
        config: the model; vocabulary rows beyond its vocab_size are padding and are left out.
        dtype: of the parameters, float32 or bfloat16.

    Returns:
        The nested dict of NumPy arrays.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or has the wrong shape.
    """
    names = {name for name in names if not BUFFERS.fullmatch(name)}
    layers = {match[1] for name in names if (match := LAYER.match(name))}
    if len(layers) != config.n_layer:  # before a model of a billion layers is built
        raise CheckpointError(
            f"config.json contradicts the tensors (num_hidden_layers {config.n_layer}, tensors of {len(layers)} "
            "layers): restore the file"
        )
    ours, structs = table(config.n_layer), shapes(config)
    wanted = {ours[name] for name in flat(structs)}
    tied = {HEAD} if config.lm_head == "tied" else set()
    check_names(names, wanted, tied, "the tensors of this model", "restore config.json and the weights")

    def leaf(path, struct):
        name = name_of(path)
        values = read(ours[name])
        if name == "token_embedding_table.embedding" or name == "lm_head.kernel":
            values = values[: config.vocab_size]
        if name.endswith(".kernel"):
            values = values.T
        if values.shape != struct.shape:
            stored = values.T.shape if name.endswith(".kernel") else values.shape
            raise CheckpointError(
                f"config.json contradicts a tensor ({ours[name]}, {stored} for {name} {struct.shape}): restore the file"
            )
        return np.ascontiguousarray(values, dtype)

    return jax.tree_util.tree_map_with_path(leaf, structs)


def to_tensors(params: dict[str, Any], config: GPTConfig) -> dict[str, np.ndarray]:
    """Convert our parameters to transformers' tensors; norms without weights get weights of 1.

    Args:
        params: the nested dict of arrays.
        config: the model, which `llama_config.check_form` accepts.

    Returns:
        Hugging Face's name -> array, in the parameters' dtype.
    """
    ours = {name: np.asarray(leaf) for name, leaf in flat(params).items()}
    dtype = ours["token_embedding_table.embedding"].dtype
    whole, tensors = flat(shapes(dataclasses.replace(config, norm_weight=True))), {}
    for name, theirs in table(config.n_layer).items():
        if name in whole:
            values = ours[name] if name in ours else np.ones(whole[name].shape, dtype)
            values = values.T if name.endswith(".kernel") else values
            tensors[theirs if theirs == HEAD else f"model.{theirs}"] = np.ascontiguousarray(values)
    return tensors
