"""GPT-2's names and sizes: one table leads from our parameters to Hugging Face's and nanoGPT's, and back.

Hugging Face stores the weights of linear layers as (in, out), as we do; nanoGPT, which is PyTorch's, as (out, in).
"""

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from jaxgpt.devices.sharding import name_of
from jaxgpt.errors import CheckpointError, JaxgptError
from jaxgpt.init import abstract
from jaxgpt.model import LAYER_NORM_EPSILON, GPTConfig
from jaxgpt.step import params_of

OUTSIDE = {
    "token_embedding_table.embedding": "wte.weight",
    "position_embedding_table.embedding": "wpe.weight",
    "ln_f.scale": "ln_f.weight",
    "ln_f.bias": "ln_f.bias",
    "lm_head.kernel": "lm_head.weight",
}
IN_BLOCK = {  # query, key and value are the thirds of c_attn, in this order
    "ln_1.scale": "ln_1.weight",
    "ln_1.bias": "ln_1.bias",
    "attn.query.kernel": "attn.c_attn.weight",
    "attn.key.kernel": "attn.c_attn.weight",
    "attn.value.kernel": "attn.c_attn.weight",
    "attn.query.bias": "attn.c_attn.bias",
    "attn.key.bias": "attn.c_attn.bias",
    "attn.value.bias": "attn.c_attn.bias",
    "attn.proj.kernel": "attn.c_proj.weight",
    "attn.proj.bias": "attn.c_proj.bias",
    "ln_2.scale": "ln_2.weight",
    "ln_2.bias": "ln_2.bias",
    "mlp.fc.kernel": "mlp.c_fc.weight",
    "mlp.fc.bias": "mlp.c_fc.bias",
    "mlp.proj.kernel": "mlp.c_proj.weight",
    "mlp.proj.bias": "mlp.c_proj.bias",
}
THIRDS = ("query", "key", "value")
MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # the triangle, which older files hold as a buffer
# nanoGPT's activation is the erf form since 2023; transformers has several names for the tanh form
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}


class FormatError(JaxgptError, ValueError):
    """A model that GPT-2's format has no place for."""


def table(n_layer: int) -> dict[str, str]:
    """Our name of each parameter -> GPT-2's, without the leading `transformer.`."""
    blocks = {f"blocks.{i}.{ours}": f"h.{i}.{theirs}" for i in range(n_layer) for ours, theirs in IN_BLOCK.items()}
    return OUTSIDE | blocks


def plain(name: str) -> str:
    """A name without what torch.compile and the classes around the model put before it."""
    return name.removeprefix("_orig_mod.").removeprefix("transformer.")


def shapes(config: GPTConfig) -> dict[str, Any]:
    """The parameters of a model as descriptions: the nested dict with shapes and dtypes."""
    return params_of(abstract(config))


def flat(params: dict[str, Any]) -> dict[str, Any]:
    """The nested dict of parameters as {dotted name: leaf}."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def to_params(
    names: Iterable[str], read: Callable[[str], np.ndarray], config: GPTConfig, transposed: bool
) -> dict[str, Any]:
    """GPT-2's tensors as our parameters.

    Args:
        names: of the tensors there are, as `plain` leaves them.
        read: the values of one of them, any floating dtype.
        config: the model that they are; rows of the vocabulary behind its vocab_size are padding and left out.
        transposed: linear weights are (out, in), as in nanoGPT.

    Returns:
        The nested dict, float32 arrays of NumPy.

    Raises:
        CheckpointError: a tensor is missing, left over, or has another shape.
    """
    names, ours = set(names), table(config.n_layer)
    wanted = {ours[name]: name for name in flat(shapes(config)) if name != "lm_head.bias"}
    ignored = {name for name in names if MASKS.fullmatch(name)} | {"lm_head.weight"}
    for what, found in (("missing", wanted.keys() - names), ("unexpected", names - wanted.keys() - ignored)):
        if found:
            shown = ", ".join(sorted(found)[:3]) + (", ..." if len(found) > 3 else "")
            raise CheckpointError(f"not GPT-2's tensors ({len(found)} {what}: {shown}): import a GPT2LMHeadModel")

    def leaf(path, like):
        name = name_of(path)
        if name == "lm_head.bias":  # GPT-2's head has none
            return np.zeros(like.shape, np.float32)
        values, shape, third = read(ours[name]), like.shape, name.split(".")[-2]
        if name.endswith(".kernel") and (transposed or name == "lm_head.kernel"):
            values = values.T
        if name == "token_embedding_table.embedding":
            values = values[: config.vocab_size]
        elif name == "lm_head.kernel":
            values = values[:, : config.vocab_size]
        elif third in THIRDS and values.shape == (*shape[:-1], 3 * shape[-1]):
            begin = THIRDS.index(third) * shape[-1]
            values = values[..., begin : begin + shape[-1]]
        if values.shape != shape:
            raise CheckpointError(
                f"a tensor of another shape ({ours[name]}, {values.shape} for {name}, not {shape}): "
                "correct the sizes in the model's configuration"
            )
        return np.ascontiguousarray(values, np.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes(config))


def to_tensors(params: dict[str, Any], config: GPTConfig) -> dict[str, np.ndarray]:
    """Our parameters as Hugging Face's tensors; biases that the model does not have are zeros.

    Raises:
        FormatError: GPT-2 cannot be this model.
    """
    check_form(config)
    ours = {name: np.asarray(leaf) for name, leaf in flat(params).items()}
    if np.any(ours.pop("lm_head.bias", 0)):
        raise FormatError("GPT-2's head has no bias, this one has (lm_head): export safetensors or stablehlo")
    whole = flat(shapes(dataclasses.replace(config, bias="all")))
    parts: dict[str, list[np.ndarray]] = {}
    for name, theirs in table(config.n_layer).items():
        if name in whole:
            values = ours.get(name, np.zeros(whole[name].shape, np.float32))
            values = values.T if name == "lm_head.kernel" else values
            theirs = theirs if theirs == "lm_head.weight" else f"transformer.{theirs}"
            parts.setdefault(theirs, []).append(values)
    return {name: np.ascontiguousarray(np.concatenate(values, axis=-1)) for name, values in parts.items()}


def check_form(config: GPTConfig) -> None:
    """Find what GPT-2 does not have.

    Raises:
        FormatError: naming each switch.
    """
    needed = {"positions": "learned", "residual": True, "norm": "layernorm", "projection": True}
    wrong = [f"{name} {getattr(config, name)}" for name, value in needed.items() if getattr(config, name) != value]
    wrong += [f"{name} 0" for name in ("n_layer", "n_embd", "mlp_ratio") if not getattr(config, name)]
    if config.lm_head == "none":
        wrong.append("lm_head none")
    if wrong:
        raise FormatError(f"GPT-2 cannot be this model (model: {', '.join(wrong)}): export safetensors or stablehlo")


def to_config(stored: dict[str, Any], vocab_size: int) -> GPTConfig:
    """The model that a config.json of Hugging Face describes.

    Args:
        stored: the content of config.json.
        vocab_size: the tokenizer's.

    Raises:
        CheckpointError: it is not GPT-2's, or one that computes something else.
    """
    fixed = {
        "model_type": "gpt2",
        "layer_norm_epsilon": LAYER_NORM_EPSILON,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }
    for name, value in fixed.items():
        if stored.get(name, None if name == "model_type" else value) != value:
            raise CheckpointError(f"not GPT-2 (config.json, {name} {stored.get(name)}): import one with {value}")
    activation, C = stored.get("activation_function", "gelu_new"), stored.get("n_embd", 768)
    hidden = stored.get("n_inner") or 4 * C
    if activation not in ACTIVATIONS or hidden % C:
        raise CheckpointError(
            f"not in this model's reach (config.json, activation_function {activation}, n_inner {hidden}): "
            f"import one with {', '.join(ACTIVATIONS)} and a multiple of n_embd {C}"
        )
    try:
        return GPTConfig(
            vocab_size=vocab_size,
            block_size=stored.get("n_positions", 1024),
            n_layer=stored.get("n_layer", 12),
            n_head=stored.get("n_head", 12),
            n_embd=C,
            dropout=stored.get("resid_pdrop", 0.1),
            lm_head="tied" if stored.get("tie_word_embeddings", True) else "linear",
            mlp_ratio=hidden // C,
            activation=ACTIVATIONS[activation],
            bias="all",
            embedding_dropout=stored.get("embd_pdrop", 0.1) > 0,
            init="scaled",
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"sizes that do not fit (config.json, {error}): restore the file") from None


def from_config(config: GPTConfig, end_of_text: int | None) -> dict[str, Any]:
    """What Hugging Face's config.json says of a model.

    Raises:
        FormatError: GPT-2 cannot be this model.
    """
    check_form(config)
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.mlp_ratio * config.n_embd,
        "activation_function": names[config.activation],
        "layer_norm_epsilon": LAYER_NORM_EPSILON,
        "resid_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "embd_pdrop": config.dropout if config.embedding_dropout else 0.0,
        "tie_word_embeddings": config.lm_head == "tied",
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "torch_dtype": "float32",
    }


def nanogpt_config(stored: dict[str, Any], vocab_size: int, tied: bool) -> GPTConfig:
    """The model that the `model_args` of nanoGPT's ckpt.pt describe.

    Raises:
        CheckpointError: they are not nanoGPT's.
    """
    try:
        sizes = {name: stored[name] for name in ("block_size", "n_layer", "n_head", "n_embd", "dropout")}
        return GPTConfig(
            vocab_size=vocab_size,
            **sizes,
            lm_head="tied" if tied else "linear",
            activation="gelu",
            bias="all" if stored["bias"] else "none",
            embedding_dropout=True,
            init="scaled",
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"not nanoGPT's sizes (model_args, {error}): import nanoGPT's ckpt.pt") from None
