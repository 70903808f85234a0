"""Conversion of names, shapes and configurations between our model and GPT-2 as Hugging Face and nanoGPT store it.

Hugging Face stores the weights of linear layers as (in, out), as we do. nanoGPT stores them as (out, in), as PyTorch
does.
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
from jaxgpt.model import GPTConfig
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
FORM = {  # switches that have no place in GPT-2's files
    "positions": "learned",
    "residual": True,
    "norm": "layernorm",
    "norm_weight": True,
    "norm_eps": GPTConfig.norm_eps,
    "qk_norm": False,
    "projection": True,
    "gated": False,
    "logit_softcap": 0.0,
    "embedding_norm": False,
    "value_embeddings": False,
}
WRAPPERS = re.compile(r"^((_orig_mod|module)\.)*(transformer\.)?")
MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # the causal mask, a buffer in older files
# transformers has several names for the tanh form of GELU; nanoGPT has used the erf form since 2023
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}


class FormatError(JaxgptError, ValueError):
    """The format of another program cannot represent the model."""


def table(n_layer: int) -> dict[str, str]:
    """Map our name of each parameter to GPT-2's name, without the leading `transformer.`."""
    blocks = {f"blocks.{i}.{ours}": f"h.{i}.{theirs}" for i in range(n_layer) for ours, theirs in IN_BLOCK.items()}
    return OUTSIDE | blocks


def plain(name: str) -> str:
    """Strip the prefixes that torch.compile, DistributedDataParallel and the enclosing class put before a name."""
    return WRAPPERS.sub("", name)


def shapes(config: GPTConfig) -> dict[str, Any]:
    """Return the nested dict of parameters with abstract leaves: shapes and dtypes."""
    return params_of(abstract(config))


def flat(params: dict[str, Any]) -> dict[str, Any]:
    """Flatten the nested dict of parameters to {dotted name: leaf}."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def to_params(
    names: Iterable[str],
    read: Callable[[str], np.ndarray],
    config: GPTConfig,
    transposed: bool,
    dtype: Any = np.float32,
) -> dict[str, Any]:
    """Convert GPT-2's tensors to our parameters.

    Args:
        names: names of the existing tensors, without prefixes (see `plain`).
        read: returns the values of a tensor by name, in any floating dtype.
        config: the model; vocabulary rows beyond its vocab_size are padding and are left out.
        transposed: whether linear weights are (out, in), as in nanoGPT.
        dtype: of the parameters, float32 or bfloat16.

    Returns:
        The nested dict of NumPy arrays.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or has the wrong shape.
    """
    names, ours = set(names), table(config.n_layer)
    wanted = {ours[name] for name in flat(shapes(config)) if name != "lm_head.bias"}
    ignored = {name for name in names if MASKS.fullmatch(name)} | {"lm_head.weight"}
    check_names(names, wanted, ignored, "GPT-2's tensors", "import a GPT2LMHeadModel")

    def leaf(path, struct):
        name = name_of(path)
        if name == "lm_head.bias":  # GPT-2's head has no bias
            return np.zeros(struct.shape, dtype)
        values, shape, third = read(ours[name]), struct.shape, name.split(".")[-2]
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
                f"a tensor has the wrong shape ({ours[name]}, {values.shape} for {name}, not {shape}): "
                "correct the sizes in the model's configuration"
            )
        return np.ascontiguousarray(values, dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes(config))


def check_names(names: set[str], wanted: set[str], ignored: set[str], whose: str, remedy: str) -> None:
    """Check that the tensors are those of a model.

    Args:
        names: the existing ones.
        wanted: those that the model needs.
        ignored: those that may exist.
        whose: what they should be, and `remedy`: what to do, for the message.

    Raises:
        CheckpointError: one is missing or unexpected.
    """
    for what, found in (("missing", wanted - names), ("unexpected", names - wanted - ignored)):
        if found:
            shown = ", ".join(sorted(found)[:3]) + (", ..." if len(found) > 3 else "")
            raise CheckpointError(f"not {whose} ({len(found)} {what}: {shown}): {remedy}")


def to_tensors(params: dict[str, Any], config: GPTConfig) -> dict[str, np.ndarray]:
    """Convert our parameters to Hugging Face's tensors; biases that the model lacks become zeros.

    Args:
        params: the nested dict of arrays.
        config: the model.

    Returns:
        Hugging Face's name -> array.

    Raises:
        FormatError: GPT-2's format cannot represent the model.
    """
    check_form(config)
    ours = {name: np.asarray(leaf) for name, leaf in flat(params).items()}
    if np.any(ours.pop("lm_head.bias", 0)):
        raise FormatError(
            "GPT-2's head has no bias, but this model's has one (lm_head): export safetensors or stablehlo"
        )
    whole = flat(shapes(dataclasses.replace(config, bias="all")))
    dtype = ours["token_embedding_table.embedding"].dtype
    parts: dict[str, list[np.ndarray]] = {}
    for name, theirs in table(config.n_layer).items():
        if name in whole:
            values = ours.get(name, np.zeros(whole[name].shape, dtype))
            values = values.T if name == "lm_head.kernel" else values
            theirs = theirs if theirs == "lm_head.weight" else f"transformer.{theirs}"
            parts.setdefault(theirs, []).append(values)
    return {name: np.ascontiguousarray(np.concatenate(values, axis=-1)) for name, values in parts.items()}


def check_form(config: GPTConfig) -> None:
    """Check that GPT-2's format can represent a model.

    Raises:
        FormatError: it cannot; the message names each switch that is in the way.
    """
    needed = {name: (value,) for name, value in FORM.items()} | {
        "activation": tuple(ACTIVATIONS.values()),
        "mlp_width": (0, config.mlp_ratio * config.n_embd),
        "n_kv_head": (0, config.n_head),
        "head_size": (0, config.n_embd / config.n_head),
        "sliding_window": (0, config.block_size),
    }
    given = dataclasses.asdict(config)
    wrong = [f"{name} {given[name]}" for name, values in needed.items() if given[name] not in values]
    wrong += [f"{name} 0" for name in ("n_layer", "n_embd", "mlp_ratio") if not getattr(config, name)]
    if config.lm_head == "none":
        wrong.append("lm_head none")
    if wrong:
        raise FormatError(
            f"GPT-2's format cannot represent this model (model: {', '.join(wrong)}): export safetensors or stablehlo"
        )


def to_config(stored: dict[str, Any], vocab_size: int) -> GPTConfig:
    """Convert Hugging Face's config.json to a model configuration.

    Args:
        stored: the content of config.json.
        vocab_size: number of ids of the tokenizer.

    Raises:
        CheckpointError: the model is not GPT-2, or a variant that computes something else.
    """
    fixed = {
        "model_type": "gpt2",
        "layer_norm_epsilon": GPTConfig.norm_eps,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }
    for name, value in fixed.items():
        if stored.get(name, None if name == "model_type" else value) != value:
            raise CheckpointError(f"not GPT-2 (config.json, {name} {stored.get(name)}): import one with {name} {value}")
    try:
        dropout, attention_dropout = stored.get("resid_pdrop", 0.1), stored.get("attn_pdrop", 0.1)
        activation, C = stored.get("activation_function", "gelu_new"), stored.get("n_embd", 768)
        hidden = stored.get("n_inner") or 4 * C
        if activation not in ACTIVATIONS or hidden % C:
            raise CheckpointError(
                f"not supported (config.json, activation_function {activation}, n_inner {hidden}): import a model with "
                f"activation_function {', '.join(ACTIVATIONS)} and n_inner a multiple of n_embd {C}"
            )
        return GPTConfig(
            vocab_size=vocab_size,
            block_size=stored.get("n_positions", 1024),
            n_layer=stored.get("n_layer", 12),
            n_head=stored.get("n_head", 12),
            n_embd=C,
            dropout=dropout,
            attention_dropout=None if attention_dropout == dropout else attention_dropout,
            lm_head="tied" if stored.get("tie_word_embeddings", True) else "linear",
            mlp_ratio=hidden // C,
            activation=ACTIVATIONS[activation],
            bias="all",
            embedding_dropout=stored.get("embd_pdrop", 0.1) > 0,
            init="scaled",
        )
    except CheckpointError:
        raise
    except (ArithmeticError, TypeError, ValueError) as error:
        raise CheckpointError(f"inconsistent sizes (config.json, {error}): restore the file") from None


def from_config(config: GPTConfig, end_of_text: int | None, dtype: Any = np.float32) -> dict[str, Any]:
    """Convert a model configuration to the content of Hugging Face's config.json.

    Args:
        config: the model.
        end_of_text: id of the end-of-text token, None if the tokenizer has none.
        dtype: of the tensors.

    Raises:
        FormatError: GPT-2's format cannot represent the model.
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
        "layer_norm_epsilon": config.norm_eps,
        "resid_pdrop": config.dropout,
        "attn_pdrop": config.attention_rate,
        "embd_pdrop": config.dropout if config.embedding_dropout else 0.0,
        "tie_word_embeddings": config.lm_head == "tied",
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "torch_dtype": np.dtype(dtype).name,
    }


def nanogpt_config(stored: dict[str, Any], vocab_size: int, tied: bool, bias: bool) -> GPTConfig:
    """Convert the `model_args` of nanoGPT's ckpt.pt to a model configuration.

    Args:
        stored: the `model_args`.
        vocab_size: number of ids of the tokenizer.
        tied: whether the head shares the token embedding.
        bias: whether there are biases, for older versions, which did not store this.

    Raises:
        CheckpointError: these are not nanoGPT's `model_args`.
    """
    try:
        sizes = {name: stored[name] for name in ("block_size", "n_layer", "n_head", "n_embd")}
        return GPTConfig(
            vocab_size=vocab_size,
            **sizes,
            dropout=stored.get("dropout", 0.0),
            lm_head="tied" if tied else "linear",
            activation="gelu",
            bias="all" if stored.get("bias", bias) else "none",
            embedding_dropout=True,
            init="scaled",
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"not nanoGPT's sizes (model_args, {error}): import nanoGPT's ckpt.pt") from None
