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


def init_params(config: GPTConfig, key: jax.Array, places: dict[str, Any] | None = None) -> dict[str, Any]:
    """The parameters of `GPT(config, rngs=nnx.Rngs(params=key))`, in float32, bit for bit.

    One compiled function draws every block: XLA takes a tenth of a second for each matrix of a program.

    Args:
        config: with its vocab_size.
        key: of all weights.
        places: the sharding of each parameter; None = the default device.
    """

    def around_blocks(key):
        params = params_of(GPT(config, rngs=Draws(key)))
        return {name: part for name, part in params.items() if name != "blocks"}  # what blocks draw is not computed

    def block(key, n):
        return params_of(Block(config, rngs=Draws(key, n)))

    around, blocks = dict(places or {}), None
    if config.n_layer and places:
        blocks = around.pop("blocks")[0]
    params = jax.jit(around_blocks, out_shardings=around or None)(key)
    if config.n_layer:
        draw, tables = jax.jit(block, out_shardings=blocks), 1 + (config.positions == "learned")
        per_block = len(jax.tree.leaves(jax.eval_shape(block, key, 0)))
        params["blocks"] = {i: draw(key, jnp.uint32(tables + i * per_block)) for i in range(config.n_layer)}
    return params


def init_model(config: GPTConfig, seed: int) -> GPT:
    """A new model, as training starts from it."""
    return nnx.merge(nnx.graphdef(abstract(config)), init_params(config, stream_key(seed, INIT)))


def first_state(config: GPTConfig, tx: optax.GradientTransformation, seed: int, like: TrainState) -> TrainState:
    """The state before the first step, born where `like` says."""
    places = jax.tree.map(lambda a: a.sharding, like)
    params = init_params(config, stream_key(seed, INIT), places.params)
    return jax.jit(partial(init_state, tx=tx), out_shardings=places, donate_argnums=0)(params)
