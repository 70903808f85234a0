"""`jaxgpt export --format peft`: the adapters of a LoRA run as the library peft reads them."""

import json
import pathlib
from collections import defaultdict
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxgpt.config import ConfigError
from jaxgpt.interop import gpt2, llama, llama_config
from jaxgpt.layers import LoRAConfig
from jaxgpt.model import GPTConfig
from jaxgpt.runs.checkpoint import Checkpoints
from jaxgpt.runs.loading import CHECKPOINTS, Run, read_adapters

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def write(folder: pathlib.Path, run: Run) -> None:
    """Write adapter_model.safetensors and adapter_config.json.

    They belong to the model that `jaxgpt export` writes for the base, or that the base was imported from.

    Args:
        folder: an existing folder.
        run: a LoRA run.

    Raises:
        ConfigError: the run has no adapters.
        FormatError: transformers has no such model.
    """
    if not run.config.lora.rank:
        raise ConfigError(f"no adapters to export (--run, {run.config.run.dir}): leave out --format peft")
    with Checkpoints(f"{run.config.run.dir}/{CHECKPOINTS}") as checkpoints:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        lora, adapters = read_adapters(checkpoints, run.step, here)
    tensors = to_tensors(gpt2.flat(adapters), run.model.config)
    save_file(tensors, folder / TENSORS, {"format": "pt"})
    content = json.dumps(adapter_config(tensors, lora, run.model.config), indent=1)
    (folder / CONFIG).write_text(content + "\n", encoding="utf-8")


def names(config: GPTConfig) -> dict[str, str]:
    """Map our name of each parameter to transformers' full name.

    Raises:
        FormatError: transformers has no such model.
    """
    if config.positions == "rope":
        form, prefix = llama, "model."
        llama_config.check_form(config)
    else:
        form, prefix = gpt2, "transformer."
        gpt2.check_form(config)
    return {ours: prefix + theirs for ours, theirs in form.table(config.n_layer).items()}


def to_tensors(adapters: dict[str, np.ndarray], config: GPTConfig) -> dict[str, np.ndarray]:
    """Convert adapters to peft's tensors, which are (out, in).

    Of GPT-2, query, key and value are one matrix: their three adapters of rank R are one of rank 3 R, in which each B
    reads its own R of the 3 R products, and writes its own third.

    Args:
        adapters: dotted name -> array.
        config: of the model.

    Returns:
        peft's name -> float32 array.

    Raises:
        FormatError: transformers has no such model.
    """
    parts = defaultdict(list)  # by the name of their matrix, in the order in which query, key and value lie in it
    for ours, theirs in names(config).items():
        layer = ours.removesuffix(".kernel")
        if f"{layer}.lora_a" in adapters and layer != ours:
            a, b = (np.asarray(adapters[f"{layer}.lora_{letter}"]).T for letter in "ab")
            parts[f"base_model.model.{theirs.removesuffix('.weight')}"].append((a, b))
    tensors = {}
    for name, pairs in parts.items():
        every_a, every_b = zip(*pairs)
        tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(np.concatenate(every_a))
        tensors[f"{name}.lora_B.weight"] = np.array(jax.scipy.linalg.block_diag(*every_b))
    return tensors


def adapter_config(tensors: dict[str, np.ndarray], lora: LoRAConfig, config: GPTConfig) -> dict[str, Any]:
    """Return the content of adapter_config.json.

    Args:
        tensors: from `to_tensors`.
        lora: of the run.
        config: of the model.
    """
    ranks = {}
    for name, tensor in tensors.items():
        if name.endswith(".lora_A.weight"):  # base_model.model.transformer.h.0.attn.c_attn.lora_A.weight
            ranks[".".join(name.split(".")[5:-2])] = len(tensor)
    joined = {module: rank for module, rank in ranks.items() if rank != lora.rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "rank_pattern": joined,
        "alpha_pattern": {module: lora.alpha * rank / lora.rank for module, rank in joined.items()},
        "target_modules": list(ranks),
        "fan_in_fan_out": config.positions != "rope",  # GPT-2's matrices are (in, out)
        "lora_dropout": 0.0,
        "bias": "none",
    }
