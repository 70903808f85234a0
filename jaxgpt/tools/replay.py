"""`jaxgpt replay`: repeat a step of a run, and name the first tensor in it that is not finite."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxgpt import loop as loops
from jaxgpt.config import Config, ConfigError
from jaxgpt.data import DataError
from jaxgpt.devices import cores, sharding
from jaxgpt.devices.remat import call_block
from jaxgpt.model import GPT
from jaxgpt.runs.checkpoint import CheckpointError, Checkpoints
from jaxgpt.runs.directory import CHECKPOINTS, files_of, read_files
from jaxgpt.step import DROPOUT, Recipe, TrainState, batch_of, build, loss_and_gradient, train_steps
from jaxgpt.training import Setup, set_up


@dataclasses.dataclass(frozen=True)
class ReplayArgs:
    """Repeat a step of a run from the checkpoint before it, and name the first tensor that is not finite."""

    run: str
    """Run directory."""
    step: int
    """The step, as the error or metrics.jsonl names it, counted from 1."""


class Finding(NamedTuple):
    """What a replay found."""

    step: int
    checkpoint: int
    """The step whose checkpoint it began from; 0 = a new model's."""
    loss: float
    """Of the step, in nats a token; NaN if something is not finite."""
    first: str | None
    """The first tensor that is not finite, None if all are."""
    values: str
    """How many of its values are NaN and infinite."""


def replay(args: ReplayArgs) -> Finding:
    """Repeat a step.

    Raises:
        ConfigError: the step is not one of the run.
        CheckpointError: the directory is not a run's, or the checkpoints before the step are gone.
        DataError: the text is not the one that the run learned from.
    """
    config, _ = read_files(files_of(args.run), args.run)
    if not 1 <= args.step <= config.train.steps:
        raise ConfigError(f"no such step (--step, {args.step}): use 1 to {config.train.steps}")
    mesh = sharding.make_mesh(cores.share(config.mesh, config.model, config.data.batch_size))
    with jax.set_mesh(mesh):
        setup = set_up(config, mesh)
        before, checkpoint = _state_before(args, setup, mesh)
        return _examine(setup, before, args.step, checkpoint)


def _state_before(args: ReplayArgs, setup: Setup, mesh: jax.sharding.Mesh) -> tuple[TrainState, int]:
    config, source, recipe, like = setup
    checkpoints = Checkpoints(f"{args.run}/{CHECKPOINTS}")
    from_step = max((n for n in checkpoints.steps() if n < args.step and not checkpoints.damage(n)), default=None)
    if from_step is None:
        raise CheckpointError(f"no checkpoint before step {args.step} ({args.run}): start the run again to get one")
    sha256 = checkpoints.manifest(from_step)["corpus_sha256"]
    if sha256 not in (None, source.sha256):
        raise DataError(f"not the text that the run learned from ({source.name}, sha256 {source.sha256}, was {sha256})")
    source.split(mesh, config.model.block_size)
    state = TrainState(**checkpoints.restore(from_step, vars(like)))
    checkpoints.close()
    key, cut = jax.random.key(config.seed), list(_calls_up_to(config, from_step, args.step - 1))
    for (_, n), tokens in zip(cut, source.feed(cut, config.seed, recipe.rows)):
        state, _ = train_steps(state, tokens, key, recipe=recipe, n=n)
    return state, from_step


def _calls_up_to(config: Config, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The calls that training makes; the one that goes beyond `end` step by step."""
    for first, n in loops.calls(config, start):
        if first + n <= end:
            yield first, n
        else:
            yield from ((step, 1) for step in range(first, end))
            return


def _examine(setup: Setup, state: TrainState, number: int, checkpoint: int) -> Finding:
    config, source, recipe, _ = setup
    key, losses = jax.random.key(config.seed), []
    tokens = next(source.feed([(number - 1, 1)], config.seed, recipe.rows))
    batch = batch_of(state.step, tokens[0] if tokens.ndim == 3 else tokens, key, recipe)
    for name, array in tensors(state, batch, key, recipe):
        values = np.asarray(array, np.float32)
        losses += [values.mean()] if name == "loss" else []
        nans, infinite = int(np.isnan(values).sum()), int(np.isinf(values).sum())
        if nans + infinite:
            said = f"{nans:,} NaN and {infinite:,} infinite of {values.size:,}"
            return Finding(number, checkpoint, math.nan, name, said)
    return Finding(number, checkpoint, float(np.mean(losses)), None, "")


def tensors(
    state: TrainState, batch: tuple[jax.Array, jax.Array], key: jax.Array, recipe: Recipe
) -> Iterator[tuple[str, jax.Array]]:
    """The tensors of one `train_step` by name, in the order in which they are computed.

    Args:
        state, batch, key, recipe: as `train_step` has them.
    """
    yield from _named("parameter", state.params)
    dropout_key = jax.random.fold_in(jax.random.fold_in(key, DROPOUT), state.step)
    parts = recipe.grad_accumulation
    cut = [a.reshape(parts, -1, recipe.block_size) for a in batch]
    for part in range(parts):
        rngs = nnx.Rngs(dropout=jax.random.fold_in(dropout_key, part))
        yield from _forward(build(recipe, state.params), cut[0][part], cut[1][part], rngs)
    _, grads = jax.jit(loss_and_gradient, static_argnames="recipe")(state.params, batch, dropout_key, recipe)
    yield from _named("gradient of", grads)
    yield "norm of the gradient", optax.tree.norm(grads)
    updates, _ = jax.jit(recipe.tx.update)(grads, state.opt_state, state.params)
    yield from _named("updated", optax.apply_updates(state.params, updates))


def _forward(model: GPT, inputs: jax.Array, targets: jax.Array, rngs: nnx.Rngs) -> Iterator[tuple[str, jax.Array]]:
    x = model.dropout(model.embed(inputs), rngs)
    yield "embeddings", x
    for i, block in enumerate(model.blocks):
        x, _ = call_block(block, x, None, jnp.int32(0), rngs, "none")
        yield f"output of blocks.{i}", x
    logits = model.logits(model.ln_f(x))
    yield "logits", logits
    yield "loss", optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def _named(kind: str, tree: Any) -> Iterator[tuple[str, jax.Array]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield f"{kind} {sharding.name_of(path)}", leaf
