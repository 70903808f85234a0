"""`train(config)`: from a configuration to a trained run directory. The step itself is in step.py."""

import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxgpt import attention, data, distributed, metrics, report, sampling, sharding
from jaxgpt import corpus as corpora
from jaxgpt.checkpoint import Checkpoints
from jaxgpt.config import Config, ConfigError
from jaxgpt.model import GPT
from jaxgpt.optim import optimizer, schedule
from jaxgpt.run import Run, open_to_train
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
from jaxgpt.tokenizer import CharTokenizer


class NonFiniteError(ArithmeticError):
    """The loss or the gradient is no longer a number."""


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
    return nnx.eval_shape(lambda: GPT(model, rngs=nnx.Rngs(0)))


def make_recipe(config: Config, model: GPT) -> Recipe:
    """What a resolved configuration compiles to."""
    return Recipe(
        graphdef=nnx.graphdef(model),
        tx=optimizer(config.optim),
        schedule=schedule(config.optim),
        batch_size=config.data.batch_size,
        block_size=config.model.block_size,
        grad_accumulation=config.optim.grad_accumulation,
        dtype=jnp.dtype(config.train.dtype),
        loss_chunks=config.train.loss_chunks,
    )


@dataclasses.dataclass(frozen=True)
class Job:
    """The fixed parts of a run, and what is done at the boundaries of its loop."""

    config: Config
    recipe: Recipe
    splits: data.Splits
    tokenizer: CharTokenizer
    checkpoints: Checkpoints
    emit: metrics.Sink
    facts: dict[str, Any]
    key: jax.Array
    started: float

    def compile(self, state: TrainState, n: int):
        """`train_steps` for `n` steps, compiled ahead of the first call so that the time can be told apart."""
        began = time.perf_counter()
        compiled = train_steps.lower(state, self.splits.train, self.key, recipe=self.recipe, n=n).compile()
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
        tokens = n * config.data.batch_size * config.optim.grad_accumulation * config.model.block_size
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
        train, val = (
            float(estimate_loss(state.params, tokens, stream_key(self.config.seed, stream), recipe=self.recipe,
                                n=self.config.train.eval_batches))
            for tokens, stream in ((self.splits.train, ESTIMATE), (self.splits.val, VAL))
        )  # fmt: skip
        elapsed = time.perf_counter() - self.started
        self.emit({"kind": "eval", "step": step, "train_loss": train, "val_loss": val, "elapsed_s": elapsed})
        if step:
            text = self.sample(state, step)
            if distributed.is_first():
                with open(f"{self.config.run.dir}/samples.txt", "a", encoding="utf-8") as file:
                    file.write(f"--- step {step}, validation loss {val:.4f}\n{text}\n\n")
        return val

    def sample(self, state: TrainState, step: int, length: int = 300) -> str:
        """New text after a line break, or after the first character where the alphabet has none."""
        start = "\n" if "\n" in self.tokenizer.alphabet else self.tokenizer.alphabet[0]
        key = jax.random.fold_in(stream_key(self.config.seed, SAMPLE), step)
        out = sampling.generate(cast(state.params, self.recipe), self.tokenizer.encode(start)[None], key, length)
        return self.tokenizer.decode(np.asarray(out)[0, 1:])

    def save(self, state: TrainState, step: int, val_loss: float | None) -> None:
        """Checkpoint."""
        self.checkpoints.save(step, vars(state), {"val_loss": val_loss, **self.facts})


def run_steps(job: Job, state: TrainState, stop_request: Callable[[], int | None]) -> TrainState:
    """Train to the last step, or to the next call after a signal is asked for; all that was done is saved.

    Raises:
        Stopped: there was a signal.
    """
    config, every = job.config.train, job.config.run.checkpoint_interval
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
    compiled = cache(partial(job.compile, like))
    step, ended, asked = int(state.step), 0.0, None
    if step == 0:
        job.look(state, step)
    while step < config.steps and asked is None:
        # up to the next boundary in calls of steps_per_call, the rest one by one; a call's metrics are read after the
        # next one has been dispatched
        boundary = min(*(step // each * each + each for each in (config.eval_interval, every)), config.steps)
        waiting = []
        while step < boundary and asked is None:
            n = config.steps_per_call if boundary - step >= config.steps_per_call else 1
            call = compiled(n)
            ended = ended if waiting else time.perf_counter()
            state, chunk = call(state, job.splits.train, job.key)
            waiting.append((step, chunk))
            step += n
            if len(waiting) > 1:
                ended = job.log(*waiting.pop(0), ended)
            asked = stop_request()
        for each in waiting:
            ended = job.log(*each, ended)
        val_loss = None
        if step == boundary and (step % config.eval_interval == 0 or step == config.steps):
            val_loss = job.look(state, step)
        asked = stop_request() if asked is None else asked
        if step % every == 0 or step == config.steps or asked is not None:
            job.save(state, step, val_loss)
    if asked is not None and step < config.steps:
        raise Stopped(asked, step)
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
    corpus = corpora.load(config.data.name, config.data.path)
    tokenizer = CharTokenizer(corpus.alphabet) if corpus.alphabet else CharTokenizer.from_text(corpus.text)
    config = resolve(config, tokenizer.vocab_size)
    sharding.check_sizes(mesh, config.data.batch_size, config.model.width, config.model.n_head)
    ids = tokenizer.encode(corpus.text)
    splits = data.split(ids, config.data.train_fraction, tokenizer.vocab_size, config.model.block_size)
    splits = data.Splits(*(sharding.place(mesh, np.asarray(tokens)) for tokens in splits))
    checkpoints, resumed = open_to_train(config, tokenizer, corpus.sha256)
    recipe = make_recipe(config, abstract_model(config, jax.default_backend()))
    new = partial(new_state, config.model, recipe.tx, stream_key(config.seed, INIT))
    like = jax.eval_shape(new)
    shardings = sharding.shardings(mesh, like)
    if resumed is None:
        state = jax.jit(new, out_shardings=shardings)()
    else:
        like = jax.tree.map(lambda a, at: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=at), like, shardings)
        state = TrainState(**checkpoints.restore(resumed, vars(like)))

    sinks = ()
    with contextlib.ExitStack() as stack:
        if distributed.is_first():
            sinks = metrics.JsonLines(f"{config.run.dir}/metrics.jsonl"), metrics.Console(config.train.steps)
            stack.callback(report.draw_loss, config.run.dir)
        stack.callback(checkpoints.close)
        for sink in sinks:
            stack.callback(sink.close)

        def emit(record: metrics.Record) -> None:
            for sink in sinks:
                sink(record)

        facts, key = {"corpus_sha256": corpus.sha256, "mesh": dict(mesh.shape)}, jax.random.key(config.seed)
        job = Job(config, recipe, splits, tokenizer, checkpoints, emit, facts, key, started)
        was = dict(mesh.shape) if resumed is None else checkpoints.manifest(resumed)["mesh"]
        emit({**start_record(config, mesh, corpus, tokenizer, state), "mesh_before": was})
        with stop_requests() as stop_request:
            state = run_steps(job, state, stop_request)
        loss = evaluate(cast(state.params, recipe), splits.val)
        spent, last = time.perf_counter() - started, config.train.steps
        emit({"kind": "final", "step": last, "val_loss": loss, "uniform_loss": math.log(tokenizer.vocab_size),
              "elapsed_s": spent, "run_dir": config.run.dir, "sample": job.sample(state, last)})  # fmt: skip
    model = nnx.merge(recipe.graphdef, state.params)
    return Run(pathlib.Path(config.run.dir), config, tokenizer, model, config.train.steps, corpus.sha256)


def start_record(
    config: Config, mesh: jax.sharding.Mesh, corpus: corpora.Corpus, tokenizer: CharTokenizer, state: TrainState
) -> metrics.Record:
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
        "corpus": corpus.name,
        "corpus_sha256": corpus.sha256,
        "characters": len(corpus.text),
        "alphabet": tokenizer.alphabet,
        "run_dir": config.run.dir,
        "versions": {library.__name__: library.__version__ for library in (jax, flax, optax)},
    }
