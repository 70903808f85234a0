"""The switches beyond the lecture, one by one and together: fields of GPTConfig by a name, for the tests."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxgpt import GPT, GPTConfig
from jaxgpt.init import abstract
from jaxgpt.model import Cache
from jaxgpt.step import params_of

SIZES = {"vocab_size": 11, "block_size": 8, "n_layer": 2, "n_head": 4, "n_embd": 16}
LLAMA3 = {"positions": "rope", "rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_size": 16}
MODERN = {  # the model of configs/modern
    "positions": "rope",
    "norm": "rmsnorm",
    "norm_weight": False,
    "qk_norm": True,
    "activation": "relu2",
    "bias": "none",
    "n_kv_head": 1,
    "embedding_norm": True,
    "value_embeddings": True,
    "lm_head": "tied",
    "init": "zero",
}
LLAMA = {"positions": "rope", "norm": "rmsnorm", "bias": "qkv", "activation": "silu", "gated": True, "mlp_width": 24}
SWITCHES = {
    "rope": {"positions": "rope"},
    "rope theta": {"positions": "rope", "rope_theta": 50.0},
    "rope linear": {"positions": "rope", "rope_scaling": "linear", "rope_factor": 3.0},
    "rope llama3": LLAMA3,
    "rmsnorm": {"norm": "rmsnorm", "norm_eps": 1e-2},
    "rmsnorm alone": {"norm": "rmsnorm", "norm_weight": False},
    "layernorm alone": {"norm_weight": False, "norm_eps": 1e-2},
    "bias qkv": {"bias": "qkv"},
    "qk_norm": {"qk_norm": True},
    "relu2": {"activation": "relu2"},
    "gated": {"activation": "silu", "gated": True, "bias": "all"},
    "mlp_width": {"mlp_width": 24},
    "one kv head": {"n_kv_head": 1},
    "two kv heads": {"n_kv_head": 2, "bias": "all"},
    "head_size": {"head_size": 6, "n_kv_head": 2},
    "sliding_window": {"sliding_window": 3},
    "logit_softcap": {"logit_softcap": 2.0},
    "embedding_norm": {"embedding_norm": True},
    "value_embeddings": {"value_embeddings": True, "n_kv_head": 2},
    "zero": {"init": "zero"},
    "modern": MODERN,
    "llama": LLAMA | LLAMA3 | {"n_kv_head": 2, "qk_norm": True, "head_size": 6, "sliding_window": 5, "lm_head": "tied"},
}
TOGETHER = ("modern", "llama", "sliding_window")  # in which every switch is on somewhere; each alone takes longer


def config_of(switch: str, **fields) -> GPTConfig:
    """A tiny model with one of the switches."""
    return GPTConfig(**SIZES | SWITCHES[switch] | fields)


def random_params(config: GPTConfig, seed: int) -> dict:
    """{path: float32 array}, in which every parameter shows in the logits: no bias is 0, no scale is 1."""
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        noise = rng.normal(size=shape)
        spread = {"kernel": shape[0] ** -0.5, "embedding": 0.5, "bias": 0.3, "scale": 0.3}[path[-1]]
        return (spread * noise + (path[-1] == "scale")).astype(np.float32)

    shapes = flatten_dict(params_of(abstract(config)))
    return {path: draw(path, leaf.shape) for path, leaf in shapes.items()}


def random_model(config: GPTConfig, seed: int = 0) -> GPT:
    """A model with these parameters."""
    params = jax.tree.map(jnp.asarray, unflatten_dict(random_params(config, seed)))
    return nnx.merge(nnx.graphdef(abstract(config)), params)


def decoded(model: GPT, tokens: jax.Array) -> jax.Array:
    """The logits of tokens that are fed one by one through the cache, (B, T, V)."""
    config = model.config
    empty = jnp.zeros((len(tokens) * config.kv_heads, config.block_size, config.channels_per_head))

    def one(cache, token):
        x, cache = model.hidden(token[:, None], cache)
        return cache, model.logits(x)[:, 0]

    _, logits = jax.lax.scan(one, Cache(((empty, empty),) * config.n_layer, jnp.int32(0)), tokens.T)
    return logits.swapaxes(0, 1)
