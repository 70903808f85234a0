"""`train(config)`: from a configuration to a trained run directory. The loop is in loop.py, the step in step.py."""

import contextlib
import math
import time
from typing import NamedTuple

import flax
import jax
import optax
from flax import nnx

from jaxgpt.config import Config
from jaxgpt.devices import chips, cores, processes, sharding
from jaxgpt.devices.stopping import stop_requests
from jaxgpt.files import lock, storage
from jaxgpt.init import abstract_state, first_state
from jaxgpt.loop import Job, run_steps
from jaxgpt.recipe import abstract_model, make_recipe, resolve
from jaxgpt.runs import init_from, metrics, report
from jaxgpt.runs.directory import Run, begin, facts_of, find_step, publish
from jaxgpt.step import Recipe, TrainState, cast, evaluate
from jaxgpt.text.source import Source, describe, open_source


def train(config: Config) -> Run:
    """Train as the configuration says, or continue the run that is in its directory.

    Returns:
        The run at its last step.

    Raises:
        ValueError: data, configuration or run directory do not fit; the subclasses say which.
        NonFiniteError: the loss or the gradient was not finite; the last checkpoint is from before.
        Stopped: a signal came; the run is saved and continues when train is called again.
        BusyError: another process trains in the run directory.
        StorageError: the run directory has no room or cannot be written.
    """
    started = time.perf_counter()
    processes.join(config.distributed)
    mesh = sharding.make_mesh(cores.share(config.mesh, config.model, config.data.batch_size))
    with contextlib.ExitStack() as stack:
        writer = lock.held(config.run.dir, "wait until it is done, or name another --run.dir")
        processes.from_first(lambda: stack.enter_context(writer))
        stack.enter_context(storage.failures(config.run.dir))
        stack.enter_context(jax.set_mesh(mesh))
        return _train(config, mesh, started)


class Setup(NamedTuple):
    """A run on a mesh before anything is allocated."""

    config: Config
    """Resolved."""
    source: Source
    recipe: Recipe
    like: TrainState
    """Shapes, dtypes and places of the state."""


def set_up(config: Config, mesh: jax.sharding.Mesh) -> Setup:
    """Find out what a configuration means.

    Raises:
        ValueError: data, configuration and mesh do not go together; the subclasses say which.
    """
    source = open_source(config.data)
    config = resolve(config, source.tokenizer.vocab_size)
    sharding.check_sizes(mesh, config.data.batch_size, config.model.width, config.model.n_head)
    model = abstract_model(config, jax.default_backend())
    recipe = make_recipe(config, model, mesh)
    return Setup(config, source, recipe, abstract_state(model, recipe.tx, mesh))


def _train(config: Config, mesh: jax.sharding.Mesh, started: float) -> Run:
    config, source, recipe, like = set_up(config, mesh)
    checkpoints, resumed = find_step(config, source.tokenizer, source.sha256)
    source.split(mesh, config.model.block_size)
    theirs = init_from.check(config, source.tokenizer)
    left = config.train.steps - (resumed or 0)
    processes.from_first(lambda: checkpoints.check_space(like, -(-left // config.run.checkpoint_interval)))
    folder = begin(config, source.tokenizer, resumed)
    if resumed is None and theirs is not None:
        state = init_from.initial_state(config, theirs, recipe.tx, like)
    elif resumed is None:
        state = first_state(config.model, recipe.tx, config.seed, like)
    else:
        state = TrainState(**checkpoints.restore(resumed, vars(like)))

    sinks = ()
    with contextlib.ExitStack() as stack:
        if processes.is_first():
            sinks = metrics.JsonLines(folder / "metrics.jsonl"), metrics.Console(config.train.steps)
            stack.callback(publish, config.run.dir, folder)
            stack.callback(report.draw_loss, folder, config.run.dir.rstrip("/").rpartition("/")[2])
        stack.callback(checkpoints.close)
        for sink in sinks:
            stack.callback(sink.close)

        def emit(record: metrics.Record) -> None:
            for sink in sinks:
                sink(record)

        key, facts = jax.random.key(config.seed), {"mesh": dict(mesh.shape)}
        if processes.is_first():
            facts |= facts_of(config, folder, source.sha256)
        start, peak = start_record(config, mesh, source, state), chips.Peak(list(mesh.devices.flat))
        job = Job(
            config, recipe, source, folder, checkpoints, emit, facts, key, start["flops_per_token"], peak, started
        )
        was = dict(mesh.shape) if resumed is None else checkpoints.manifest(resumed)["mesh"]
        emit({**start, "mesh_before": was})
        with stop_requests() as stop_request:
            state = run_steps(job, state, stop_request)
        loss = evaluate(cast(state.params, recipe), source.pieces("val"), chunks=recipe.loss_chunks)
        checkpoints.wait()  # "done" is said of what is safe
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
