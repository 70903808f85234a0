"""The memory of a step with LoRA against a step that trains all weights, as XLA plans it for this machine's devices.

python benchmarks/lora_memory.py [--config FILE] [--lora.rank R] [--section.field VALUE ...]
The default is GPT-2 124M with rank 8 on all layers. Prints one JSON line with the bytes per device: of the state (the
weights and what the optimizer keeps), of the temporaries (activations and gradients), and of both.
"""

import dataclasses
import json
import sys

import jax

from jaxgpt import load_config
from jaxgpt.layers import LoRAConfig
from jaxgpt.tools import ahead
from jaxgpt.training import mesh_config, resolve

RECIPE = ["--config", "gpt2_124m", "--model.vocab_size", "50257", "--data.batch_size", "1"]
RECIPE += ["--optim.grad_accumulation", "1", "--lora.rank", "8", "--lora.on", "all", "--mesh.data", "1"]


def main() -> None:
    config = load_config(RECIPE + sys.argv[1:])
    config = resolve(dataclasses.replace(config, mesh=mesh_config(config)), config.model.vocab_size)
    target, found = ahead.find_target(None), {}
    for name, lora in {"full": LoRAConfig(), "lora": config.lora}.items():
        needs = ahead.compile_step(dataclasses.replace(config, lora=lora), target, None)
        found[name] = {"state": needs.arguments, "temporaries": needs.temporaries, "total": needs.total}
    ratio = found["full"]["total"] / found["lora"]["total"]
    settings = {"rank": config.lora.rank, "on": config.lora.on, "dtype": config.train.dtype}
    print(json.dumps({"device": jax.devices()[0].device_kind, **settings, **found, "ratio": ratio}))


if __name__ == "__main__":
    main()
