"""New models: their shapes alone (abstract), and their initial weights or adapters, drawn block by block."""

from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxgpt.devices import sharding
from jaxgpt.devices.keys import Keys
from jaxgpt.layers import LoRAConfig, adapt
from jaxgpt.model import GPT, Block, GPTConfig
from jaxgpt.step import INIT, TrainState, init_state, params_of, stream_key, trained_of


def abstract(config: GPTConfig, lora: LoRAConfig | None = None) -> GPT:
    """Build a model with shapes and dtypes in place of its weights.

    Args:
        config: with its vocab_size.
        lora: which adapters its blocks have; None = none.

    Returns:
        The model, whose parameters are `jax.ShapeDtypeStruct`s.
    """
    return nnx.merge(*_structure(config, lora))


@lru_cache(maxsize=8)
def _structure(config: GPTConfig, lora: LoRAConfig | None) -> tuple[nnx.GraphDef, nnx.State]:
    """The structure of a model, and its shapes; made once, as it takes 50 ms."""

    def make() -> GPT:
        rngs = Keys(jax.random.key(0))
        model = GPT(config, rngs=rngs)
        for block in model.blocks if lora is not None and lora.rank else ():
            adapt(block, lora, rngs)
        return model

    return nnx.split(nnx.eval_shape(make))


def abstract_state(model: GPT, tx: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> TrainState:
    """Build the training state with shapes, dtypes and shardings in place of its arrays.

    Args:
        model: from `abstract`.
        tx: the optimizer.
        mesh: the mesh that the shardings refer to.

    Returns:
        The state, whose leaves are `jax.ShapeDtypeStruct`s.
    """
    return _placed(jax.eval_shape(partial(init_state, tx=tx), trained_of(model)), mesh)


def abstract_frozen(config: GPTConfig, lora: LoRAConfig, mesh: jax.sharding.Mesh) -> dict[str, Any] | None:
    """Build the parameters that LoRA does not train, with shapes, dtypes and shardings in place of their arrays.

    Args:
        config: with its vocab_size.
        lora: of the run.
        mesh: the mesh that the shardings refer to.

    Returns:
        A nested dict of `jax.ShapeDtypeStruct`s; None without LoRA.
    """
    return _placed(params_of(abstract(config)), mesh) if lora.rank else None


def _placed(shapes: Any, mesh: jax.sharding.Mesh) -> Any:
    shardings = sharding.shardings(mesh, shapes)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)


def init_params(config: GPTConfig, key: jax.Array) -> dict[str, Any]:
    """Draw the parameters of `GPT(config, rngs=nnx.Rngs(params=key))`, equal to the last bit.

    All blocks share one compiled program, and everything else has a second one, because XLA needs about 0.1 s for every
    matrix in a program. Under a mesh, each parameter is created with its sharding.

    Args:
        config: with its vocab_size.
        key: typed PRNG key from which all weights are drawn.

    Returns:
        A nested dict of float32 arrays.
    """
    params = _outside_blocks(key, config)
    if config.n_layer:
        tables = 1 + (config.positions == "learned")
        per_block = len(jax.tree.leaves(jax.eval_shape(partial(_block, config=config), key, jnp.uint32(0))))
        params["blocks"] = {i: _block(key, jnp.uint32(tables + i * per_block), config) for i in range(config.n_layer)}
    return params


@partial(jax.jit, static_argnames="config")
def _outside_blocks(key: jax.Array, config: GPTConfig) -> dict[str, Any]:
    """All parameters outside the blocks; XLA removes the computation of the others, which nothing uses."""
    params = params_of(GPT(config, rngs=Keys(key)))
    return sharding.pin({name: part for name, part in params.items() if name != "blocks"})


@partial(jax.jit, static_argnames="config")
def _block(key: jax.Array, n: jax.Array, config: GPTConfig) -> dict[str, Any]:
    """The parameters of a block whose first key is the n-th."""
    params = params_of(Block(config, rngs=Keys(key, n)))
    return sharding.pin({"blocks": {0: params}})["blocks"][0]  # the sharding rules match this name


def init_adapters(config: GPTConfig, lora: LoRAConfig, key: jax.Array) -> dict[str, Any]:
    """Draw the adapters of a model, with which it still computes what it computes without them.

    Args:
        config: of the model.
        lora: rank and layers of the adapters.
        key: typed PRNG key from which all are drawn.

    Returns:
        A nested dict of float32 arrays.
    """
    blocks = range(config.n_layer)
    return {"blocks": {i: _block_adapters(jax.random.fold_in(key, i), config, lora) for i in blocks}}


@partial(jax.jit, static_argnames=("config", "lora"))
def _block_adapters(key: jax.Array, config: GPTConfig, lora: LoRAConfig) -> dict[str, Any]:
    """The adapters of a block; XLA removes the computation of its other parameters."""
    rngs = Keys(key)
    block = Block(config, rngs=rngs)
    adapt(block, lora, rngs)
    return sharding.pin({"blocks": {0: trained_of(block)}})["blocks"][0]


def init_model(config: GPTConfig, seed: int) -> GPT:
    """Make a new model, equal to the one that training starts from.

    Args:
        config: with its vocab_size.
        seed: of the run.

    Returns:
        The model with float32 parameters.
    """
    return nnx.merge(nnx.graphdef(abstract(config)), init_params(config, stream_key(seed, INIT)))


def first_state(config: GPTConfig, tx: optax.GradientTransformation, seed: int) -> TrainState:
    """Make the training state of a new model before the first step.

    Args:
        config: with its vocab_size.
        tx: the optimizer.
        seed: of the run.

    Returns:
        The state at step 0.
    """
    return state_of(init_params(config, stream_key(seed, INIT)), tx)


@partial(jax.jit, static_argnames="tx", donate_argnames="params")
def state_of(params: dict[str, Any], tx: optax.GradientTransformation) -> TrainState:
    """Make the training state of given parameters before the first step.

    Args:
        params: nested dict of arrays; their buffers are donated.
        tx: the optimizer.

    Returns:
        The state at step 0.
    """
    return sharding.pin(init_state(params, tx))
