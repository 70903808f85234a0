"""`jaxgpt replay`: repeat one step of a run, and name the first tensor that is not finite."""

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxgpt import loop as loops
from jaxgpt.config import ConfigError
from jaxgpt.data import DataError, batch
from jaxgpt.devices import sharding
from jaxgpt.devices.remat import call_block
from jaxgpt.errors import CheckpointError
from jaxgpt.model import GPT
from jaxgpt.runs import init_from, report
from jaxgpt.runs.checkpoint import Checkpoints
from jaxgpt.runs.loading import CHECKPOINTS, files_of, read_files, read_state
from jaxgpt.settings.checks import Path, check_fields
from jaxgpt.step import DROPOUT, TRAIN, StepSpec, TrainState, build, combined, loss_and_gradient, train_steps
from jaxgpt.text.source import Source, open_source
from jaxgpt.training import mesh_config, new_state, read_frozen, resolve, specify


@dataclasses.dataclass(frozen=True)
class ReplayArgs:
    """Repeat one step of a run, from the checkpoint before it or from the beginning, and name the first tensor that is
    not finite."""

    run: Path
    """Run directory."""
    step: int
    """Step to repeat, as the error or metrics.jsonl names it; the first step is 1."""

    def __post_init__(self):
        check_fields(self)


class Finding(NamedTuple):
    """The result of a replay."""

    step: int
    checkpoint: int
    """Step of the checkpoint that the replay started from; 0 is the beginning of the run."""
    loss: float
    """Loss of the step, in nats per token; NaN if a tensor is not finite."""
    first: str | None
    """Name of the first tensor that is not finite; None if all are finite."""
    values: str
    """How many of its values are NaN or infinite, as text."""


def replay(args: ReplayArgs) -> Finding:
    """Repeat one step of a run, and examine its tensors.

    Raises:
        ConfigError: the run has no such step.
        CheckpointError: this is not a run directory, or its settings changed and no checkpoint since then is left.
        DataError: the text is not the one that the run was trained on.
    """
    folder = files_of(args.run)
    config, _ = read_files(folder, args.run)
    if not 1 <= args.step <= config.train.steps:
        raise ConfigError(f"no such step (--step, {args.step}): use 1 to {config.train.steps}")
    mesh = sharding.make_mesh(mesh_config(config))
    with jax.set_mesh(mesh):
        source = open_source(config.data)
        config = resolve(config, source.tokenizer.vocab_size)
        spec, shapes = specify(config, mesh)
        source.split(mesh, config.model.block_size)
        since = _first_with_these_settings(folder, source)
        with Checkpoints(f"{args.run}/{CHECKPOINTS}") as checkpoints:
            undamaged = (n for n in checkpoints.steps() if n < args.step and not checkpoints.find_damage(n))
            start = max((n for n in undamaged if n >= since), default=0)
            facts = checkpoints.manifest(start) if start in checkpoints.steps() else {}
            if facts:
                state = read_state(checkpoints, start, shapes, spec.tx)
            elif not since:  # what training began with depends on the configuration alone
                donor = None if config.lora.rank else init_from.check(config, source.tokenizer)
                state = new_state(config, donor, spec, shapes)
            else:
                raise CheckpointError(
                    f"no checkpoint from step {since}, where the settings changed, to step {args.step} ({args.run}): "
                    "start the run again to get one"
                )
        frozen = read_frozen(config, mesh, facts)
        key, rows, n = jax.random.key(config.seed), loops.rows(config), loops.longest(config)
        for first in range(start, args.step - 1, n):
            count = loops.count(config, min(n, args.step - 1 - first))
            windows = source.windows(TRAIN, config.seed, first, n, rows)
            state, _ = train_steps(state, windows, key, frozen, count, spec=spec)
        windows = jax.tree.map(lambda a: a[0], source.windows(TRAIN, config.seed, args.step - 1, 1, rows))
        first, values, loss = _examine(tensors(state, batch(windows), key, spec, frozen))
        return Finding(args.step, start, loss, first, values)


def _first_with_these_settings(folder: pathlib.Path, source: Source) -> int:
    """The step from which the run has had its present settings and text; refuses another text."""
    records = report.read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
    starts = [record for record in records if record["kind"] == "start"]
    if starts and starts[-1]["corpus_sha256"] != source.sha256:
        raise DataError(
            f"not the text that the run was trained on ({source.name}, sha256 {source.sha256}, was "
            f"{starts[-1]['corpus_sha256']}): restore the file"
        )
    return max((record["step"] for record in starts if record.get("changed")), default=0)


def _examine(named: Iterable[tuple[str, jax.Array]]) -> tuple[str | None, str, float]:
    """The first tensor that is not finite, with a count of its values that are not; otherwise the loss."""
    losses = []
    for name, array in named:
        values = np.asarray(array, np.float32)
        losses += [values.mean()] if name == "loss" else []
        nans, infinite = int(np.isnan(values).sum()), int(np.isinf(values).sum())
        if nans + infinite:
            return name, f"{nans:,} NaN and {infinite:,} infinite of {values.size:,}", math.nan
    return None, "", float(np.mean(losses))


def tensors(
    state: TrainState, batch: tuple[jax.Array, ...], key: jax.Array, spec: StepSpec, frozen: Any = None
) -> Iterator[tuple[str, jax.Array]]:
    """Compute the tensors of one `train_step`, in the order of the computation.

    Args:
        state: state before the step.
        batch: from `data.batch`.
        key: the key of the run.
        spec, frozen: as for `train_step`.

    Yields:
        Name and value of each tensor.
    """
    yield from _named("parameter", state.params)
    dropout_key = jax.random.fold_in(jax.random.fold_in(key, DROPOUT), state.step)
    parts = spec.grad_accumulation
    cut = jax.tree.map(lambda a: a.reshape(parts, -1, a.shape[-1]), batch)
    for part in range(parts):
        rngs = nnx.Rngs(dropout=jax.random.fold_in(dropout_key, part))
        of_part = jax.tree.map(lambda a, part=part: a[part], cut)
        yield from _forward(build(spec, combined(state.params, frozen)), rngs, *of_part)
    _, grads = jax.jit(loss_and_gradient, static_argnames="spec")(state.params, batch, dropout_key, spec, frozen)
    yield from _named("gradient of", grads)
    yield "norm of the gradient", optax.tree.norm(grads)
    updates, _ = jax.jit(spec.tx.update)(grads, state.opt_state, state.params)
    yield from _named("updated", optax.apply_updates(state.params, updates))


def _forward(
    model: GPT, rngs: nnx.Rngs, inputs: jax.Array, targets: jax.Array, documents=None, weights=1.0
) -> Iterator[tuple[str, jax.Array]]:
    x = model.dropout(model.embed(inputs), rngs)
    yield "embeddings", x
    for i, block in enumerate(model.blocks):
        x, _ = call_block(block, x, None, jnp.int32(0), rngs, "none", documents, inputs)
        yield f"output of blocks.{i}", x
    logits = model.logits(model.ln_f(x))
    yield "logits", logits
    yield "loss", weights * optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def _named(kind: str, tree: Any) -> Iterator[tuple[str, jax.Array]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield f"{kind} {sharding.name_of(path)}", leaf
