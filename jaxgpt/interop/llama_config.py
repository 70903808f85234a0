"""Configurations of Llama, Qwen2, Qwen3 and Mistral in transformers, and ours.

These families differ in a few switches only. What one of their configurations sets and our model does not compute is
refused by name.
"""

import dataclasses
from typing import Any

import numpy as np

from jaxgpt.errors import CheckpointError, shortened
from jaxgpt.interop.gpt2 import FormatError
from jaxgpt.model import GPTConfig

CLASSES = {  # and what transformers takes where the file says nothing
    "LlamaForCausalLM": {"model_type": "llama", "max_position_embeddings": 2048},
    "MistralForCausalLM": {
        "model_type": "mistral", "max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096
    },
    "Qwen2ForCausalLM": {"model_type": "qwen2", "max_position_embeddings": 32_768, "num_key_value_heads": 32},
    "Qwen3ForCausalLM": {
        "model_type": "qwen3", "max_position_embeddings": 32_768, "num_key_value_heads": 32, "head_dim": 128
    },
}  # fmt: skip
ACTIVATIONS = {  # transformers' names and ours
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "relu": "relu", "relu2": "relu2",
}  # fmt: skip
FIXED = {  # what we compute is this
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "partial_rotary_factor": 1,
}
READ = {
    *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings"),
    *("rms_norm_eps", "tie_word_embeddings", "attention_dropout", "rope_theta", "rope_scaling", "rope_parameters"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
}
HARMLESS = {  # they say how the model was made, saved or is to be sampled from, not what it computes
    *("torch_dtype", "dtype", "transformers_version", "use_cache", "initializer_range", "name_or_path", "return_dict"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "transformers.js_config", "is_llama_config"),
    *("id2label", "label2id", "task_specific_params", "problem_type", "max_length", "do_sample"),
    *("temperature", "top_k", "top_p", "max_new_tokens", "repetition_penalty", "use_bfloat16", "unsloth_version"),
    *("unsloth_fixed", "chunk_size_feed_forward", "num_beams", "length_penalty", "diversity_penalty", "typical_p"),
    *("num_return_sequences", "num_beam_groups", "encoder_no_repeat_ngram_size", "torchscript"),
}
KNOWN = READ | HARMLESS | FIXED.keys()
ROPE = {  # by kind, the numbers that it needs: transformers' names and ours
    "default": {},
    "linear": {"factor": "rope_factor"},
    "llama3": {
        "factor": "rope_factor", "low_freq_factor": "rope_low_freq", "high_freq_factor": "rope_high_freq",
        "original_max_position_embeddings": "rope_original_size",
    },
}  # fmt: skip
FORM = {  # switches that have no place in these files
    "positions": "rope",
    "residual": True,
    "norm": "rmsnorm",
    "projection": True,
    "gated": True,
    "logit_softcap": 0.0,
    "embedding_norm": False,
    "value_embeddings": False,
}
MODEL = "import a Llama, Mistral, Qwen2 or Qwen3 model without it"


def is_ours(stored: dict[str, Any]) -> bool:
    """Return whether a config.json names one of these families."""
    return _class_of(stored) in CLASSES


def to_config(stored: dict[str, Any], vocab_size: int) -> GPTConfig:
    """Convert transformers' config.json to a model configuration.

    Args:
        stored: the content of config.json, in the spelling of transformers 4 or 5.
        vocab_size: number of ids of the tokenizer.

    Raises:
        CheckpointError: the model is of another family, or a variant that computes something else.
    """
    name = _class_of(stored)
    family = CLASSES.get(name)
    if family is None or stored.get("model_type", family["model_type"]) != family["model_type"]:
        given = f"architectures {stored.get('architectures')}, model_type {stored.get('model_type')}"
        known = ", ".join(["GPT2LMHeadModel", *CLASSES])
        raise CheckpointError(f"not a known model (config.json, {shortened(given)}): import a {known}")
    stored = family | stored
    _refuse_unknown(stored)
    missing = [key for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
               if stored.get(key) is None]  # fmt: skip
    if missing:
        raise CheckpointError(f"sizes are missing (config.json, {', '.join(missing)}): restore the file")
    if (activation := stored.get("hidden_act", "silu")) not in ACTIVATIONS:
        raise _refused(f"hidden_act {activation}")
    try:
        heads, C = stored["num_attention_heads"], stored["hidden_size"]
        kv_heads, D = stored.get("num_key_value_heads") or heads, stored.get("head_dim")
        block_size = stored["max_position_embeddings"]
        window = _window(stored)
        return GPTConfig(
            vocab_size=vocab_size,
            block_size=block_size,
            n_layer=stored["num_hidden_layers"],
            n_head=heads,
            n_embd=C,
            attention_dropout=_number("attention_dropout", stored.get("attention_dropout") or 0.0) or None,
            positions="rope",
            lm_head="tied" if stored.get("tie_word_embeddings", False) else "linear",
            norm="rmsnorm",
            norm_eps=_number("rms_norm_eps", stored.get("rms_norm_eps", 1e-6)),
            activation=ACTIVATIONS[activation],
            bias="qkv" if family["model_type"] == "qwen2" else "none",
            qk_norm=family["model_type"] == "qwen3",
            gated=True,
            mlp_width=stored["intermediate_size"],
            n_kv_head=0 if kv_heads == heads else kv_heads,
            head_size=0 if not D or heads * D == C else D,
            sliding_window=0 if window >= block_size else window,
            **_rope(stored),
        )
    except CheckpointError:
        raise
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"inconsistent sizes (config.json, {error}): restore the file") from None


def from_config(config: GPTConfig, dtype: Any, ends: tuple[int, ...] = (), bos: int | None = None) -> dict[str, Any]:
    """Convert a model configuration to the content of transformers' config.json, in the spelling of 4 and of 5.

    Args:
        config: the model.
        dtype: of the tensors.
        ends: ids that end a text.
        bos: the id that begins a text, None if there is none.

    Raises:
        FormatError: none of the families can represent the model.
    """
    check_form(config)
    name, window = _family_for(config), config.sliding_window
    kind = {"none": "default"}.get(config.rope_scaling, config.rope_scaling)
    rope = {"rope_type": kind} | {theirs: getattr(config, ours) for theirs, ours in ROPE[kind].items()}
    content = {
        "architectures": [name],
        "model_type": CLASSES[name]["model_type"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.channels_per_head,
        "hidden_act": {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[config.activation],
        "max_position_embeddings": config.block_size,
        "rms_norm_eps": config.norm_eps,
        "attention_dropout": config.attention_rate,
        "tie_word_embeddings": config.lm_head == "tied",
        "rope_theta": config.rope_theta,
        "rope_scaling": None if kind == "default" else rope,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "bos_token_id": bos,
        "eos_token_id": list(ends) if len(ends) > 1 else next(iter(ends), None),
        "torch_dtype": np.dtype(dtype).name,
    }
    if name == "MistralForCausalLM":
        return content | {"sliding_window": window or None}
    if name.startswith("Qwen") and window:
        every = {"max_window_layers": 0, "layer_types": ["sliding_attention"] * config.n_layer}
        return content | {"use_sliding_window": True, "sliding_window": window, **every}
    return content


def check_form(config: GPTConfig) -> None:
    """Check that one of the families can represent a model.

    Raises:
        FormatError: none can; the message names each switch that is in the way.
    """
    given = dataclasses.asdict(config)
    wrong = [f"{name} {given[name]}" for name, value in FORM.items() if given[name] != value]
    wrong += [f"{name} 0" for name in ("n_layer", "n_embd", "mlp_ratio") if not given[name]]
    wrong += [f"lm_head {config.lm_head}"] if config.lm_head == "none" else []
    wrong += [f"bias {config.bias}"] if config.bias not in ("none", "qkv") else []
    wrong += ["qk_norm True with bias qkv"] if config.qk_norm and config.bias == "qkv" else []
    if wrong:
        raise FormatError(
            f"Llama's format cannot represent this model (model: {', '.join(wrong)}): export safetensors or stablehlo"
        )


def _family_for(config: GPTConfig) -> str:
    """The class of transformers that has the switches of a model."""
    if config.qk_norm:
        return "Qwen3ForCausalLM"
    if config.bias == "qkv":
        return "Qwen2ForCausalLM"
    # the same as Llama, with a window; and Llama's n_embd must be a multiple of n_head
    return "MistralForCausalLM" if config.sliding_window or config.width % config.n_head else "LlamaForCausalLM"


def _class_of(stored: dict[str, Any]) -> str | None:
    """The class that a config.json names, or that its model_type has."""
    named = stored.get("architectures")
    if named:
        return named[0] if isinstance(named, list) and len(named) == 1 and isinstance(named[0], str) else None
    return next((name for name, each in CLASSES.items() if each["model_type"] == stored.get("model_type")), None)


def _refuse_unknown(stored: dict[str, Any]) -> None:
    """Refuse what is switched on and that we do not know."""
    for name, value in stored.items():
        if name in FIXED and value is not None and value != FIXED[name]:
            raise _refused(f"{name} {shortened(str(value))}")
        known = name in KNOWN or name.startswith("_")
        if not known and value not in (None, False, 0, "", [], {}):
            raise _refused(
                f"{shortened(name)} {shortened(str(value))}", "remove the entry if the model computes the same without"
            )


def _refused(what: str, remedy: str = MODEL) -> CheckpointError:
    return CheckpointError(f"jaxgpt does not compute this (config.json, {what}): {remedy}")


def _number(name: str, value: Any) -> float:
    if isinstance(value, int | float):
        return float(value)
    raise CheckpointError(f"not a number (config.json, {name} {shortened(str(value))}): restore the file")


def _window(stored: dict[str, Any]) -> int:
    """The keys that a token sees in every layer; 0 = all. transformers can have a window in some layers only."""
    kind, n_layer = stored["model_type"], stored["num_hidden_layers"]
    window, types = stored.get("sliding_window") or 0, stored.get("layer_types")
    if kind.startswith("qwen") and not stored.get("use_sliding_window"):
        window = 0
    elif kind == "llama" and window:  # transformers would not use it
        raise _refused(f"sliding_window {window}")
    if types:
        found = set(map(str, types))
        if kind.startswith("qwen") and found == {"full_attention"}:
            return 0
        if found != {"sliding_attention" if window else "full_attention"}:
            raise _refused(f"layer_types {shortened(', '.join(sorted(found)))}")
    elif window and kind.startswith("qwen"):
        if 0 < (first := stored.get("max_window_layers", 28)) < n_layer:
            raise _refused(f"use_sliding_window with max_window_layers {first} of {n_layer} layers")
        window = 0 if first >= n_layer else window
    return window


def _rope(stored: dict[str, Any]) -> dict[str, Any]:
    """Our settings of the rotations."""
    old, new = stored.get("rope_scaling") or {}, stored.get("rope_parameters") or {}
    for name in old.keys() & new.keys():
        if old[name] != new[name]:
            raise CheckpointError(
                f"config.json contradicts itself (rope_scaling and rope_parameters, {name} {shortened(str(old[name]))} "
                f"and {shortened(str(new[name]))}): restore the file"
            )
    given = new | old
    theta = given.pop("rope_theta", None) or stored.get("rope_theta") or GPTConfig.rope_theta
    kind = given.pop("type", "default")
    kind = given.pop("rope_type", kind)
    if kind not in ROPE:
        raise _refused(f"rope_scaling of type {shortened(str(kind))}")
    found = {"rope_theta": _number("rope_theta", theta), "rope_scaling": "none" if kind == "default" else kind}
    for name, value in given.items():
        if name in ROPE[kind]:
            number = _number(name, value)
            found[ROPE[kind][name]] = int(number) if name.startswith("original") else number
        elif value is not None and value != FIXED.get(name):
            raise _refused(f"{shortened(name)} {shortened(str(value))} of rope_scaling {kind}")
    if missing := ROPE[kind].keys() - given.keys():
        names = ", ".join(sorted(missing))
        raise CheckpointError(f"numbers are missing (config.json, {names} of rope_scaling {kind}): restore the file")
    return found
