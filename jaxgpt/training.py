"""`train(config)`: from a configuration to a trained run directory. The step itself is in step.py."""

import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import flax
import jax
import numpy as np
import optax
from flax import nnx

from jaxgpt import distributed, init_from, metrics, patience, report, sampling, sharding
from jaxgpt.checkpoint import Checkpoints
from jaxgpt.config import Config
from jaxgpt.patience import Patience
from jaxgpt.recipe import abstract_model, make_recipe, resolve
from jaxgpt.run import Run, open_to_train, publish
from jaxgpt.source import Source, describe, open_source
from jaxgpt.step import (
    ESTIMATE,
    INIT,
    SAMPLE,
    VAL,
    Recipe,
    TrainState,
    cast,
    estimate_loss,
    evaluate,
    new_state,
    stream_key,
    train_steps,
)
from jaxgpt.stopping import Stopped, stop_requests


class NonFiniteError(ArithmeticError):
    """The loss or the gradient is no longer a number."""


@dataclasses.dataclass(frozen=True)
class Job:
    """The fixed parts of a run, and what is done at the boundaries of its loop."""

    config: Config
    recipe: Recipe
    source: Source
    folder: pathlib.Path
    checkpoints: Checkpoints
    emit: metrics.Sink
    facts: dict[str, Any]
    key: jax.Array
    started: float

    @property
    def rows(self) -> int:
        """Windows that a step sees."""
        return self.config.data.batch_size * self.config.optim.grad_accumulation

    def compile(self, state: TrainState, tokens: jax.Array, n: int):
        """`train_steps` for `n` steps, compiled ahead of the first call so that the time can be told apart."""
        began = time.perf_counter()
        compiled = train_steps.lower(state, tokens, self.key, recipe=self.recipe, n=n).compile()
        self.emit({"kind": "compile", "seconds": time.perf_counter() - began})
        return compiled

    def log(self, first: int, chunk: dict[str, jax.Array], began: float) -> float:
        """Wait for a chunk of steps that starts at step `first`, record it, and return the time at which it ended.

        Raises:
            NonFiniteError: a loss or gradient norm in it is not finite.
        """
        chunk = jax.device_get(chunk)
        now, config = time.perf_counter(), self.config
        n = len(chunk["loss"])
        tokens = n * self.rows * config.model.block_size
        pace = {"tokens_per_second": tokens / (now - began), "mfu": None, "elapsed_s": now - self.started}
        for i in range(n):
            row = {"step": first + i + 1} | {
                name: float(chunk[name][i]) for name in ("loss", "learning_rate", "grad_norm")
            }
            if not math.isfinite(row["loss"] + row["grad_norm"]):
                raise NonFiniteError(
                    f"not a finite number ({', '.join(f'{name} {value:.6g}' for name, value in row.items())}): "
                    "lower --optim.learning_rate; the last checkpoint is intact"
                )
            if row["step"] % config.train.log_interval == 0:
                self.emit({"kind": "train", **row, **pace})
        return now

    def look(self, state: TrainState, step: int) -> float:
        """Estimate both losses, add a sample to samples.txt, and return the validation loss."""
        seed, n, B = self.config.seed, self.config.train.eval_batches, self.config.data.batch_size
        train, val = (
            float(estimate_loss(state.params, self.source.sample(split, seed, n, B), stream_key(seed, stream),
                                recipe=self.recipe, n=n))
            for split, stream in (("train", ESTIMATE), ("val", VAL))
        )  # fmt: skip
        elapsed = time.perf_counter() - self.started
        self.emit({"kind": "eval", "step": step, "train_loss": train, "val_loss": val, "elapsed_s": elapsed})
        if step:
            text = self.sample(state, step)
            if distributed.is_first():
                with open(self.folder / "samples.txt", "a", encoding="utf-8") as file:
                    file.write(f"--- step {step}, validation loss {val:.4f}\n{text}\n\n")
        return val

    def sample(self, state: TrainState, step: int, length: int = 300) -> str:
        """New text."""
        tokenizer, key = self.source.tokenizer, jax.random.fold_in(stream_key(self.config.seed, SAMPLE), step)
        out = sampling.generate(cast(state.params, self.recipe), tokenizer.start[None], key, length)
        return tokenizer.decode(np.asarray(out)[0, len(tokenizer.start) :])

    def save(self, state: TrainState, step: int, val_loss: float | None, watch: Patience) -> None:
        """Checkpoint; the small files go with it."""
        if distributed.is_first():
            publish(self.config.run.dir, self.folder)
        self.checkpoints.save(step, vars(state), {"val_loss": val_loss, "patience": watch._asdict(), **self.facts})


def boundary(config: Config, step: int) -> int:
    """The next step after `step` at which something is evaluated or saved."""
    each = config.train.eval_interval, config.run.checkpoint_interval
    return min(*(step // every * every + every for every in each), config.train.steps)


def calls(config: Config, step: int) -> Iterator[tuple[int, int]]:
    """The first step and the number of steps of each call, from `step` on.

    Up to each boundary in calls of steps_per_call, the rest one by one: bits depend on the cut, so a run that continues
    is cut like one that was never stopped.
    """
    most = config.train.steps_per_call
    while step < config.train.steps:
        n = most if boundary(config, step) - step >= most else 1
        yield step, n
        step += n


def run_steps(job: Job, state: TrainState, stop_request: Callable[[], int | None]) -> TrainState:
    """Train to the last step, until patience is spent, or to the next call after a signal; all that was done is saved.

    Raises:
        Stopped: there was a signal.
    """
    config, every = job.config.train, job.config.run.checkpoint_interval
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
    step, ended, waiting, compiled = int(state.step), 0.0, [], {}
    watch = patience.from_manifest(job.checkpoints.manifest(step)) if step else Patience()
    if watch.spent(config.patience):
        return state
    if step == 0:
        loss = job.look(state, step)
        watch = watch.after(step, loss)
        if config.patience:  # what comes may be no better than what it starts from
            job.save(state, step, loss, watch)
    cut = calls(job.config, step)
    with contextlib.closing(job.source.feed(calls(job.config, step), job.config.seed, job.rows)) as feed:
        for (first, n), tokens in zip(cut, feed):
            if n not in compiled:
                compiled[n] = job.compile(like, tokens, n)
            ended = ended if waiting else time.perf_counter()
            state, chunk = compiled[n](state, tokens, job.key)
            waiting.append((first, chunk))
            step = first + n
            if len(waiting) > 1:  # a call's metrics are read after the next one has been dispatched
                ended = job.log(*waiting.pop(0), ended)
            asked = stop_request()
            at_boundary = step == boundary(job.config, first)
            if not at_boundary and asked is None:
                continue
            while waiting:
                ended = job.log(*waiting.pop(0), ended)
            val_loss, best = None, False
            if step % config.eval_interval == 0 or step == config.steps:
                val_loss = job.look(state, step)
                asked = stop_request() if asked is None else asked
            if step % config.eval_interval == 0:  # not at an odd last step: a run with more steps would not look there
                watch = watch.after(step, val_loss)
                best = config.patience and watch.best_step == step
            done = step == config.steps or watch.spent(config.patience)
            if step % every == 0 or done or best or asked is not None:
                job.save(state, step, val_loss, watch)
            if done:
                break
            if asked is not None:
                raise Stopped(asked, step)
    if watch.spent(config.patience):
        job.emit({"kind": "early_stop", "step": step, **watch._asdict()})
    return state


def train(config: Config) -> Run:
    """Train as the configuration says, or continue the run that is in its directory.

    Returns:
        The run at its last step.

    Raises:
        ValueError: data, configuration or run directory do not fit; the subclasses say which.
        NonFiniteError: the loss or the gradient was not finite; the last checkpoint is from before.
        Stopped: a signal came; the run is saved and continues when train is called again.
    """
    started = time.perf_counter()
    distributed.join(config.distributed)
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        return _train(config, mesh, started)


def _train(config: Config, mesh: jax.sharding.Mesh, started: float) -> Run:
    source = open_source(config.data)
    config = resolve(config, source.tokenizer.vocab_size)
    sharding.check_sizes(mesh, config.data.batch_size, config.model.width, config.model.n_head)
    source.split(mesh, config.model.block_size)
    theirs = init_from.check(config, source.tokenizer)
    folder, checkpoints, resumed = open_to_train(config, source.tokenizer, source.sha256)
    recipe = make_recipe(config, abstract_model(config, jax.default_backend()))
    new = partial(new_state, config.model, recipe.tx, stream_key(config.seed, INIT))
    like = jax.eval_shape(new)
    shardings = sharding.shardings(mesh, like)
    if resumed is None and theirs is not None:
        state = init_from.initial_state(config, theirs, recipe.tx, like, shardings)
    elif resumed is None:
        state = jax.jit(new, out_shardings=shardings)()
    else:
        like = jax.tree.map(lambda a, at: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=at), like, shardings)
        state = TrainState(**checkpoints.restore(resumed, vars(like)))

    sinks = ()
    with contextlib.ExitStack() as stack:
        if distributed.is_first():
            sinks = metrics.JsonLines(folder / "metrics.jsonl"), metrics.Console(config.train.steps)
            stack.callback(publish, config.run.dir, folder)
            stack.callback(report.draw_loss, folder, config.run.dir.rstrip("/").rpartition("/")[2])
        stack.callback(checkpoints.close)
        for sink in sinks:
            stack.callback(sink.close)

        def emit(record: metrics.Record) -> None:
            for sink in sinks:
                sink(record)

        facts, key = {"corpus_sha256": source.sha256, "mesh": dict(mesh.shape)}, jax.random.key(config.seed)
        job = Job(config, recipe, source, folder, checkpoints, emit, facts, key, started)
        was = dict(mesh.shape) if resumed is None else checkpoints.manifest(resumed)["mesh"]
        emit({**start_record(config, mesh, source, state), "mesh_before": was})
        with stop_requests() as stop_request:
            state = run_steps(job, state, stop_request)
        loss = evaluate(cast(state.params, recipe), source.pieces("val"), chunks=recipe.loss_chunks)
        spent, last = time.perf_counter() - started, int(state.step)
        emit({"kind": "final", "step": last, "val_loss": loss, "uniform_loss": math.log(config.model.vocab_size),
              "elapsed_s": spent, "run_dir": config.run.dir, "sample": job.sample(state, last)})  # fmt: skip
    model = nnx.merge(recipe.graphdef, state.params)
    return Run(folder, config, source.tokenizer, model, last, source.sha256)


def start_record(config: Config, mesh: jax.sharding.Mesh, source: Source, state: TrainState) -> metrics.Record:
    """What is known before the first step."""
    model, batch = config.model, config.data.batch_size * config.optim.grad_accumulation
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    positions = model.block_size * model.width if model.positions == "learned" else 0
    return {
        "kind": "start",
        "step": int(state.step),
        "devices": [device.device_kind for device in mesh.devices.flat],
        "mesh": dict(mesh.shape),
        "parameters": parameters,
        "flops_per_token": metrics.flops_per_token(
            parameters - positions, model.n_layer, model.width, model.block_size
        ),
        "batch": [batch, model.block_size],
        "steps": config.train.steps,
        "dtype": config.train.dtype,
        **describe(source),
        "run_dir": config.run.dir,
        "init_from": config.run.init_from or None,
        "versions": {library.__name__: library.__version__ for library in (jax, flax, optax)},
    }
