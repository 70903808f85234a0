"""Starting a run from another run's weights: its model and its tokenizer, a new optimizer, schedule and text."""

import dataclasses
from typing import Any

import jax
import optax

from jaxgpt import tokenizer as tokenizers
from jaxgpt.errors import CheckpointError
from jaxgpt.runs.checkpoint import Checkpoints
from jaxgpt.config import Config, ConfigError
from jaxgpt.model import GPTConfig
from jaxgpt.runs.directory import CHECKPOINTS, TOKENIZER, files_of, read_files
from jaxgpt.init import state_of
from jaxgpt.step import TrainState
from jaxgpt.tokenizer import Tokenizer

FREE = {"dropout", "embedding_dropout", "init", "attention", "remat", "block_size"}  # the weights do not decide these


def check(config: Config, tokenizer: Tokenizer) -> GPTConfig | None:
    """Compare a new run with the one that it starts from, before its directory is made.

    Args:
        config: resolved.
        tokenizer: of the run's text.

    Returns:
        The model of the other run; None where the run starts from no other.

    Raises:
        CheckpointError: the other run is not there, or has no checkpoint.
        ConfigError: its model or its tokenizer is another one.
    """
    start = config.run.init_from
    if not start:
        return None
    their_config, their_tokenizer = read_files(files_of(start), f"--run.init_from, {start}")
    ours, theirs = (dataclasses.asdict(model) for model in (config.model, their_config.model))
    if not tokenizers.same(tokenizer, their_tokenizer):
        raise ConfigError(
            f"another tokenizer than the weights' (--run.init_from, {start}, {their_tokenizer.vocab_size} ids, here "
            f"{tokenizer.vocab_size}): leave out --data.tokenizer, and prepare folders with --tokenizer "
            f"{start}/{TOKENIZER}"
        )
    different = [name for name in ours if name not in FREE and ours[name] != theirs[name]]
    if ours["block_size"] > theirs["block_size"]:
        different.append("block_size")
    if different:
        said = ", ".join(f"{name} {theirs[name]}, here {ours[name]}" for name in different)
        raise ConfigError(f"another model than the weights' (--run.init_from, {start}, {said}): leave these fields out")
    return their_config.model


def initial_state(config: Config, theirs: GPTConfig, tx: optax.GradientTransformation, like: TrainState) -> TrainState:
    """The state before the first step, with the other run's best weights.

    Args:
        config: as given to `check`.
        theirs: what `check` returned. Of a longer position table only the first block_size rows are taken.
        tx: the optimizer.
        like: the state's shapes, dtypes and places.

    Raises:
        CheckpointError: the weights cannot be read.
    """

    def described(path, a):
        positions = any(getattr(entry, "key", None) == "position_embedding_table" for entry in path)
        shape = (theirs.block_size, *a.shape[1:]) if positions else a.shape
        return jax.ShapeDtypeStruct(shape, a.dtype, sharding=a.sharding)

    wanted = jax.tree_util.tree_map_with_path(described, like.params)
    with Checkpoints(f"{config.run.init_from}/{CHECKPOINTS}") as checkpoints:
        step = checkpoints.best_undamaged()
        if step is None:
            raise CheckpointError(f"no checkpoint (--run.init_from, {config.run.init_from}): wait for its first one")
        params = checkpoints.restore(step, {"params": wanted})["params"]
    params = jax.tree.map(lambda p, a: p if p.shape == a.shape else p[: a.shape[0]], params, like.params)
    return state_of(params, tx)
