import gc
import weakref

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.devices.dropout import RateArray
from jaxgpt.devices.keys import Keys
from jaxgpt.model import GPT, GPTConfig

SIZES = {"vocab_size": 65, "block_size": 8, "n_layer": 3, "n_head": 2, "n_embd": 16}


def test_equal_blocks_are_traced_once():
    graphdef, params = nnx.split(GPT(GPTConfig(**SIZES, dropout=0.1), rngs=nnx.Rngs(0)))

    def loss(params, key):
        return nnx.merge(graphdef, params)(jnp.zeros((1, 8), jnp.int32), rngs=Keys(key)).sum()

    traced = jax.make_jaxpr(loss)(params, jax.random.key(0))
    blocks = [equation.params["jaxpr"] for equation in traced.eqns if equation.params.get("name") == "_call"]
    assert len(blocks) == 3 and len(set(map(id, blocks))) == 1


def test_no_trace_keeps_a_rate_that_is_an_array():
    graphdef, params = nnx.split(GPT(GPTConfig(**SIZES, dropout=0.1), rngs=nnx.Rngs(0)))
    rates = []

    def loss(params, key, rate):
        model = nnx.merge(graphdef, params)
        for block in model.blocks:
            block.dropout.rate = RateArray(rate)
            rates.append(weakref.ref(block.dropout.rate))
        return model(jnp.zeros((1, 8), jnp.int32), rngs=Keys(key)).sum()

    jax.jit(loss).lower(params, jax.random.key(0), jnp.float32(0.2))
    gc.collect()
    assert len(rates) == 3 and not any(rate() for rate in rates)
