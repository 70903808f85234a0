"""New models: their form without weights, and their first weights, drawn block by block."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxgpt.devices import sharding
from jaxgpt.model import GPT, Block, GPTConfig
from jaxgpt.step import INIT, TrainState, init_state, params_of, stream_key


class Draws:
    """The keys that `nnx.Rngs(params=key)` gives out, from draw `n` on.

    Flax counts in a Variable. Under jit, each change of one looks through all that was traced before: eight seconds for
    GPT-2 1558M, where this takes half a second.
    """

    def __init__(self, key: jax.Array, n: jax.Array | int = 0):
        self.key, self.n = key, n

    def params(self) -> jax.Array:
        """The next key."""
        key = jax.random.fold_in(self.key, self.n)
        self.n += 1
        return key


def abstract(config: GPTConfig) -> GPT:
    """The model with shapes and dtypes in place of its weights."""
    return nnx.eval_shape(lambda: GPT(config, rngs=Draws(jax.random.key(0))))


def abstract_state(model: GPT, tx: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and places of the state of such a model's training."""
    state = jax.eval_shape(partial(init_state, tx=tx), params_of(model))
    places = sharding.shardings(mesh, state)
    return jax.tree.map(lambda a, at: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=at), state, places)


def init_params(config: GPTConfig, key: jax.Array) -> dict[str, Any]:
    """The parameters of `GPT(config, rngs=nnx.Rngs(params=key))`, in float32, bit for bit.

    Two programs draw all of them, one for what is around the blocks and one for a block: XLA needs about 0.1 s for
    every matrix in a program. Under a mesh, each parameter is born with its sharding.

    Args:
        config: with its vocab_size.
        key: of all weights.
    """
    params = _around_blocks(key, config)
    if config.n_layer:
        tables = 1 + (config.positions == "learned")
        per_block = len(jax.tree.leaves(jax.eval_shape(partial(_block, config=config), key, 0)))
        params["blocks"] = {i: _block(key, jnp.uint32(tables + i * per_block), config) for i in range(config.n_layer)}
    return params


@partial(jax.jit, static_argnames="config")
def _around_blocks(key: jax.Array, config: GPTConfig) -> dict[str, Any]:
    """All parameters but those of the blocks, which XLA does not compute then."""
    params = params_of(GPT(config, rngs=Draws(key)))
    return sharding.pin({name: part for name, part in params.items() if name != "blocks"})


@partial(jax.jit, static_argnames="config")
def _block(key: jax.Array, n: jax.Array, config: GPTConfig) -> dict[str, Any]:
    """The parameters of a block that begins with the n-th draw."""
    params = params_of(Block(config, rngs=Draws(key, n)))
    return sharding.pin({"blocks": {0: params}})["blocks"][0]  # under the name that the sharding rules know


def init_model(config: GPTConfig, seed: int) -> GPT:
    """A new model, as training starts from it."""
    return nnx.merge(nnx.graphdef(abstract(config)), init_params(config, stream_key(seed, INIT)))


def first_state(config: GPTConfig, tx: optax.GradientTransformation, seed: int) -> TrainState:
    """The state of a new model before the first step."""
    return state_of(init_params(config, stream_key(seed, INIT)), tx)


@partial(jax.jit, static_argnames="tx", donate_argnames="params")
def state_of(params: dict[str, Any], tx: optax.GradientTransformation) -> TrainState:
    """The state of given parameters before the first step; their memory is taken over."""
    return sharding.pin(init_state(params, tx))
