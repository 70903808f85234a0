"""The settings in a GGUF's metadata as the config.json of transformers.

A setting that jaxgpt does not compute is refused by its name, never ignored.

Source: llama.cpp, gguf-py/gguf/constants.py and convert_hf_to_gguf.py.
"""

import pathlib
from typing import Any

import numpy as np

from jaxgpt.errors import CheckpointError, one_line, shortened

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",  # in GGUF a llama with a sliding window
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ARCHITECTURES = ("llama", "qwen2", "qwen3")
INTEGERS = {  # GGUF's name of a setting, which begins with the architecture's, and transformers'
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
}
FLOATS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps", "rope.freq_base": "rope_theta"}
LARGEST = 2**31
BIASES = {"attention_bias": "self_attn.q_proj.bias", "mlp_bias": "mlp.up_proj.bias"}
CAN_SAY = {"attention_bias": ("llama", "qwen3"), "mlp_bias": ("llama",)}  # families that have the setting
WINDOW = "attention.sliding_window"
SCALING = ("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear")
SAME_AS_HEAD = ("attention.value_length", "rope.dimension_count")
HARMLESS = (  # they change nothing in a model whose other settings are known
    "vocab_size",
    "tensor_data_layout",
    "expert_used_count",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
)
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
END = ("eos_token_id", "eot_token_id", "eom_token_id")  # the last two end a turn, as further EOS of transformers do

CONVERT = "convert the model with a recent llama.cpp"
ANOTHER = "import a Llama, Mistral, Qwen2 or Qwen3 model without it"


def shown(text: str) -> str:
    """A text of the file for an error message: short, and without line breaks or control characters."""
    return shortened(one_line(text))


def check(metadata: dict[str, Any], path: pathlib.Path) -> None:
    """Check that the file holds a whole model whose settings are all known, or off.

    Raises:
        CheckpointError: it holds something else.
    """
    architecture, kind = metadata.get("general.architecture"), metadata.get("general.type", "model")
    if kind != "model" or architecture not in ARCHITECTURES:
        what = f"{shown(str(kind))} of architecture {shown(str(architecture))}"
        raise CheckpointError(f"not a model that jaxgpt computes ({path}, {what}): import {', '.join(ARCHITECTURES)}")
    if metadata.get("split.count", 0):
        raise CheckpointError(f"a part of a model ({path}, split.count): merge all with llama-gguf-split --merge")
    known = {*INTEGERS, *FLOATS, *SCALING, *SAME_AS_HEAD, *HARMLESS, *([WINDOW] if architecture == "llama" else [])}
    for name, value in _settings(metadata).items():
        off = not value or (name, value) == ("attention.causal", True)
        if name not in known and not off:
            claimed = f"{architecture}.{shown(name)} {shown(repr(value))}"
            raise CheckpointError(f"a setting that jaxgpt does not compute ({path}, {claimed}): {ANOTHER}")


def is_permuted(metadata: dict[str, Any]) -> bool:
    """Return whether the rows of queries and keys are in llama.cpp's own order."""
    return metadata["general.architecture"] == "llama"


def to_config(
    metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]], factors: np.ndarray | None, path: pathlib.Path
) -> dict[str, Any]:
    """Convert the settings to the content of config.json.

    Args:
        metadata: all keys of the file, which `check` has approved of.
        shapes: the shape of each tensor by its name in transformers.
        factors: (head_dim / 2,) the factors by which Llama 3's scaling lengthens the waves of RoPE, or None.
        path: the file, for error messages.

    Raises:
        CheckpointError: a setting is missing, wrong, not computed by jaxgpt, or contradicts the tensors.
    """
    architecture = metadata["general.architecture"]
    settings = _settings(metadata)
    hidden, heads = settings.get("embedding_length"), settings.get("attention.head_count")
    settings.setdefault("attention.head_count_kv", heads)
    settings.setdefault("rope.freq_base", 10_000.0)
    if type(hidden) is type(heads) is int and heads:
        settings.setdefault("attention.key_length", hidden // heads)
    sizes = {theirs: _number(int, settings, name, path) for name, theirs in INTEGERS.items()}
    floats = {theirs: _shortest(_number(float, settings, name, path)) for name, theirs in FLOATS.items()}
    for name in SAME_AS_HEAD:
        if settings.get(name, 0) not in (0, sizes["head_dim"]):
            claimed = f"{name} {shown(repr(settings[name]))}, not the {sizes['head_dim']} of a head"
            raise CheckpointError(f"a setting that jaxgpt does not compute ({path}, {claimed}): {ANOTHER}")
    sliding = architecture == "llama" and bool(settings.get(WINDOW, 0))
    vocab_size = _check_tensors(metadata, sizes, shapes, path)
    family = "mistral" if sliding else architecture
    return {
        "architectures": [CLASSES[family]],
        "model_type": family,
        "hidden_act": "silu",
        "vocab_size": vocab_size,
        **sizes,
        **floats,
        "rope_scaling": _rope_scaling(settings, sizes["head_dim"], floats["rope_theta"], factors, path),
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        **{key: any(part in name for name in shapes) for key, part in BIASES.items() if family in CAN_SAY[key]},
        **({"sliding_window": _number(int, settings, WINDOW, path)} if sliding else {}),
        **_token_ids(metadata, vocab_size, path),
    }


def _settings(metadata: dict[str, Any]) -> dict[str, Any]:
    """The settings of the architecture, without its name before theirs."""
    start = f"{metadata['general.architecture']}."
    return {key.removeprefix(start): value for key, value in metadata.items() if key.startswith(start)}


def _number(kind: type, settings: dict[str, Any], name: str, path: pathlib.Path) -> int | float:
    value = settings.get(name)
    if type(value) not in (int, kind) or not 0 < value < LARGEST:
        claimed = shown(repr(value))
        raise CheckpointError(f"not {kind.__name__} above 0 ({path}, {name} {claimed}): {CONVERT}")
    return kind(value)


def _shortest(value: float) -> float:
    """The decimal number that the file stores in float32: 1e-05, where float32 has 9.99999974e-06."""
    return float(str(np.float32(value)))


def _check_tensors(
    metadata: dict[str, Any], sizes: dict[str, int], shapes: dict[str, tuple[int, ...]], path: pathlib.Path
) -> int:
    """Check that tensors and settings agree on the main sizes, and return the size of the vocabulary."""
    rows, hidden = (*shapes.get("model.embed_tokens.weight", ()), None, None)[:2]
    layers = {name.split(".")[2] for name in shapes if name.startswith("model.layers.")}
    tokens = metadata.get("tokenizer.ggml.tokens")
    pairs = {
        "embedding_length": (sizes["hidden_size"], hidden),
        "block_count": (sizes["num_hidden_layers"], len(layers)),
        "tokenizer.ggml.tokens": (len(tokens) if isinstance(tokens, list) else rows, rows),
    }
    for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        width = sizes[heads] * sizes["head_dim"]
        found = {shape[0] for name, shape in shapes.items() if f".self_attn.{part}." in name}
        pairs[f"heads of {part}"] = (width, found.pop() if len(found) == 1 else sorted(found))
    for name, (claimed, found) in pairs.items():
        if claimed != found:
            raise CheckpointError(
                f"the metadata contradict the tensors ({path}, {name}: {claimed} and {found}): {CONVERT}"
            )
    if sizes["head_dim"] % 2:
        raise CheckpointError(f"RoPE needs an even size of a head ({path}, {sizes['head_dim']}): {CONVERT}")
    return rows


def _rope_scaling(
    settings: dict[str, Any], head_dim: int, theta: float, factors: np.ndarray | None, path: pathlib.Path
) -> dict[str, Any] | None:
    """The scaling of RoPE: none, linear, or Llama 3's, which the file gives as a tensor."""
    kind, factor = (settings.get(name) for name in SCALING[:2])
    factor = settings.get("rope.scale_linear", 1.0) if factor is None else factor
    if kind not in (None, "none", "linear") or type(factor) not in (int, float) or not 0 <= factor < LARGEST:
        claimed = shown(f"{SCALING[0]} {kind!r}, {SCALING[1]} {factor!r}")
        raise CheckpointError(f"a scaling of RoPE that jaxgpt does not compute ({path}, {claimed}): {ANOTHER}")
    linear = {"rope_type": "linear", "factor": _shortest(factor)} if kind != "none" and factor not in (0, 1) else None
    if factors is None or np.all(factors == 1):
        return linear
    whole = float(np.round(np.max(factors)))
    if linear or factors.shape != (head_dim // 2,) or not _is_llama3(factors, theta, whole):
        raise CheckpointError(
            f"a scaling of RoPE that jaxgpt does not compute ({path}, rope_freqs.weight is not Llama 3's): {ANOTHER}"
        )
    return {"rope_type": "llama3", "factor": whole, **LLAMA3}


def _is_llama3(factors: np.ndarray, theta: float, factor: float) -> bool:
    """Whether these are the factors of Llama 3.1 to 3.3: `factor` for long waves, none for short ones.

    Source: transformers, modeling_rope_utils.py, _compute_llama3_parameters.
    """
    waves = 2 * np.pi * theta ** (np.arange(len(factors)) / len(factors))
    low, high, context = LLAMA3.values()
    smooth = np.clip((context / waves - low) / (high - low), 0, 1)
    return np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4)


def _token_ids(metadata: dict[str, Any], vocab_size: int, path: pathlib.Path) -> dict[str, int | list[int]]:
    """The ids of special tokens; where several end a text, `eos_token_id` is a list."""
    ids = {}
    for name in ("bos_token_id", *END, "padding_token_id"):
        value = metadata.get(f"tokenizer.ggml.{name}")
        if value is not None and (type(value) is not int or not 0 <= value < vocab_size):
            claimed = f"tokenizer.ggml.{name} {shown(repr(value))}"
            raise CheckpointError(f"not an id of the {vocab_size} tokens ({path}, {claimed}): {CONVERT}")
        ids[name] = value
    ends = list(dict.fromkeys(ids[name] for name in END if ids[name] is not None))
    found = {"bos_token_id": ids["bos_token_id"], "pad_token_id": ids["padding_token_id"]}
    found["eos_token_id"] = ends if len(ends) > 1 else ends[0] if ends else None
    return {name: value for name, value in found.items() if value is not None}
