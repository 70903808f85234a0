"""From a configuration to what is compiled: everything resolved, the model without weights, the optimizer."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxgpt.config import Config, ConfigError
from jaxgpt.devices import attention, sharding
from jaxgpt.init import abstract
from jaxgpt.model import GPT
from jaxgpt.optim import optimizer, schedule
from jaxgpt.step import Recipe


def resolve(config: Config, vocab_size: int, platform: str | None = None) -> Config:
    """Fill in what other parts decide: the vocabulary, the end of the schedule, the type to compute in.

    Args:
        config: as configured.
        vocab_size: the tokenizer's.
        platform: that will compute (cpu, gpu, tpu); None = this machine's.

    Raises:
        ConfigError: the configured vocab_size is not the tokenizer's.
    """
    if config.model.vocab_size not in (0, vocab_size):
        raise ConfigError(
            f"the tokenizer has {vocab_size} ids (--model.vocab_size, {config.model.vocab_size}): leave the flag out"
        )
    if config.model.block_size % config.train.loss_chunks:
        raise ConfigError(
            f"loss_chunks {config.train.loss_chunks} does not divide block_size {config.model.block_size} "
            "(--train.loss_chunks): use a divisor"
        )
    dtype = config.train.dtype
    if dtype == "auto":
        dtype = "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=vocab_size),
        optim=dataclasses.replace(config.optim, decay_steps=config.optim.decay_steps or config.train.steps),
        train=dataclasses.replace(config.train, dtype=dtype),
    )


def abstract_model(config: Config, platform: str) -> GPT:
    """The model of a resolved configuration without its weights, with the attention of a platform (cpu, gpu, tpu)."""
    model, dtype = config.model, jnp.dtype(config.train.dtype)
    kernel = attention.choose(model.attention, platform, dtype, model.block_size, model.width // model.n_head)
    model = dataclasses.replace(model, attention=kernel)
    return abstract(model)


def make_recipe(config: Config, model: GPT, mesh: Mesh | None = None) -> Recipe:
    """What a resolved configuration compiles to, on a mesh."""
    return Recipe(
        graphdef=nnx.graphdef(model),
        tx=optimizer(config.optim),
        schedule=schedule(config.optim),
        batch_size=config.data.batch_size,
        block_size=config.model.block_size,
        grad_accumulation=config.optim.grad_accumulation,
        dtype=jnp.dtype(config.train.dtype),
        loss_chunks=config.train.loss_chunks,
        apart=mesh is not None and sharding.works_apart(mesh, config.model.dropout),
    )
