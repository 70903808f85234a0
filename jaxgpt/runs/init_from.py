"""Starting a run from the weights of another run.

The model and the tokenizer are those of the other run; the optimizer state, the schedule and the text are new.
"""

import dataclasses
from typing import Any

import jax
import optax

from jaxgpt import tokenizer as tokenizers
from jaxgpt.config import TOKENIZER, Config, ConfigError
from jaxgpt.devices import processes
from jaxgpt.errors import CheckpointError
from jaxgpt.init import state_of
from jaxgpt.model import GPTConfig
from jaxgpt.runs import base
from jaxgpt.runs.changes import FREE
from jaxgpt.runs.checkpoint import Checkpoints
from jaxgpt.runs.loading import CHECKPOINTS, files_of, read_files, read_weights
from jaxgpt.step import TrainState
from jaxgpt.tokenizer import Tokenizer


def check(config: Config, tokenizer: Tokenizer) -> GPTConfig | None:
    """Check, before the directory of a new run is made, that it can start from the run that `run.init_from` names.

    Args:
        config: resolved configuration of the new run.
        tokenizer: tokenizer of the new run's text.

    Returns:
        The model configuration of the other run; None if `run.init_from` is not set.

    Raises:
        CheckpointError: `run.init_from` is not a run directory, or is damaged.
        ConfigError: the other run has a different model or tokenizer, or LoRA has no run to adapt.
    """
    start, rank = config.run.init_from, config.lora.rank
    if rank and not start:
        raise ConfigError(f"no weights to adapt (--lora.rank, {rank}): name the run that has them, --run.init_from RUN")
    if not start:
        return None
    their_config, their_tokenizer = read_files(files_of(start), start, "--run.init_from")
    if rank and their_config.lora.rank:
        raise ConfigError(
            f"the weights to adapt are themselves adapted (--run.init_from, {start}): continue that run with "
            f"--run.resume changed, or merge it: jaxgpt export --run {start} --to DIR, then jaxgpt import --from DIR"
        )
    ours, theirs = (dataclasses.asdict(model) for model in (config.model, their_config.model))
    if not tokenizers.same(tokenizer, their_tokenizer):
        raise ConfigError(
            f"the tokenizer differs from that of the weights (--run.init_from, {start}, {their_tokenizer.vocab_size} "
            f"ids, here {tokenizer.vocab_size}): leave out --data.tokenizer, and prepare folders with --tokenizer "
            f"{start}/{TOKENIZER}"
        )
    different = [name for name in ours if name not in FREE | {"block_size"} and ours[name] != theirs[name]]
    if ours["block_size"] > theirs["block_size"]:
        different.append("block_size")
    if different:
        fields = ", ".join(f"{name} {theirs[name]}, here {ours[name]}" for name in different)
        raise ConfigError(
            f"the model differs from that of the weights (--run.init_from, {start}, {fields}): leave these fields out"
        )
    return their_config.model


def initial_state(
    config: Config, theirs: GPTConfig, tx: optax.GradientTransformation, shapes: TrainState
) -> TrainState:
    """Make the state before the first step, with the best weights of the other run.

    Args:
        config: as given to `check`.
        theirs: as returned by `check`. A longer position table is cut to the first block_size rows.
        tx: the optimizer.
        shapes: shapes, dtypes and shardings of the state.

    Raises:
        CheckpointError: the other run has no checkpoint, or its weights cannot be read.
    """

    def their_shape(path, a):
        positions = any(getattr(entry, "key", None) == "position_embedding_table" for entry in path)
        shape = (theirs.block_size, *a.shape[1:]) if positions else a.shape
        return jax.ShapeDtypeStruct(shape, a.dtype, sharding=a.sharding)

    wanted = jax.tree_util.tree_map_with_path(their_shape, shapes.params)
    with Checkpoints(f"{config.run.init_from}/{CHECKPOINTS}") as checkpoints:

        def read(step: int) -> Any:
            return read_weights(checkpoints, step, wanted)

        if processes.is_multi_process():  # all of them read the step that the first one chooses
            step = processes.from_first(lambda: checkpoints.read_best(lambda step: step))
            restored = None if step is None else read(step)
        else:
            restored = checkpoints.read_best(read)
    if restored is None:
        raise CheckpointError(f"no checkpoint (--run.init_from, {config.run.init_from}): wait for its first one")
    params = jax.tree.map(
        lambda p, a: (p if p.shape == a.shape else p[: a.shape[0]]).astype(a.dtype), restored, shapes.params
    )
    return state_of(params, tx)


def keep_base(config: Config) -> None:
    """Take the best weights of the other run into the directory of a LoRA run, which then does not need it any more.

    Args:
        config: as given to `check`.

    Raises:
        CheckpointError: the other run has no checkpoint, or its checkpoints are damaged.
        StorageError: the run directory cannot be written.
    """

    def keep() -> bool | None:
        with Checkpoints(f"{config.run.init_from}/{CHECKPOINTS}") as checkpoints:
            return checkpoints.read_best(lambda step: base.keep(checkpoints.directory / str(step), config.run.dir))

    if processes.from_first(keep) is None:
        raise CheckpointError(f"no checkpoint (--run.init_from, {config.run.init_from}): wait for its first one")
