"""A run directory with random weights, as if trained."""

import jax
import numpy as np

from jaxgpt import Config, GPTConfig
from jaxgpt.config import RunConfig
from jaxgpt.interop import gpt2
from jaxgpt.runs.checkpoint import Checkpoints
from jaxgpt.runs.directory import CHECKPOINTS, open_run

SMALL = {"block_size": 24, "n_layer": 2, "n_head": 4, "n_embd": 32, "lm_head": "tied", "bias": "all"}


def make_run(folder, tokenizer, **model):
    """Weights that all show in the logits; one checkpoint, of step 3."""
    rng = np.random.default_rng(0)
    config = GPTConfig(vocab_size=tokenizer.vocab_size, **{**SMALL, **model})

    def draw(path, like):
        noise = rng.normal(size=like.shape)
        return (1 + 0.3 * noise if gpt2.name_of(path).endswith("scale") else 0.2 * noise).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, gpt2.shapes(config))
    keep(folder, config, params, tokenizer)
    return params


def keep(folder, config, params, tokenizer):
    """A run directory with these weights as its checkpoint of step 3."""
    open_run(Config(model=config, run=RunConfig(dir=str(folder))), tokenizer, None).begin(params)
    checkpoints = Checkpoints(f"{folder}/{CHECKPOINTS}")
    facts = {"val_loss": None, "corpus_sha256": "none", "mesh": {"data": 1, "fsdp": 1, "tensor": 1}}
    checkpoints.save(3, {"params": params}, facts)
    checkpoints.close()
