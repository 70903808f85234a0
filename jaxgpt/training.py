"""`train(config)`: from a configuration to a trained run directory. The loop is in loop.py, the step in step.py."""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from jaxgpt.config import Config, ConfigError
from jaxgpt.devices import attention, chips, cores, processes, sharding
from jaxgpt.devices.stopping import stop_requests
from jaxgpt.files import lock, storage
from jaxgpt.init import abstract, abstract_frozen, abstract_state, first_state, init_adapters, state_of
from jaxgpt.layers import merged
from jaxgpt.loop import CompiledCall, Patience, TrainingLoop, compile_call
from jaxgpt.model import GPT, GPTConfig
from jaxgpt.optim import optimizer, schedule
from jaxgpt.runs import base, init_from, metrics, report, track
from jaxgpt.runs.directory import RunDirectory, open_run
from jaxgpt.runs.loading import Run, model_of, read_base
from jaxgpt.step import INIT, StepSpec, TrainState, averaged, cast, combined, evaluate, stream_key
from jaxgpt.text.source import Source, describe, open_source, watched


def train(config: Config) -> Run:
    """Train a new run, or continue the one in the run directory.

    Args:
        config: from `load_config`.

    Returns:
        The run at its last step.

    Raises:
        JaxgptError: the data, the configuration, the mesh or the run directory cannot be used; the subclass says which.
        NonFiniteError: the loss or the gradient was not finite; the last checkpoint is from before that.
        Stopped: a signal came; the run is saved, and the same call continues it.
        BusyError: another process trains in the run directory.
        StorageError: the run directory has no room or cannot be written.
    """
    if not isinstance(config, Config):
        raise ConfigError(f"not a configuration ({type(config).__name__}): pass what `jaxgpt.load_config` returns")
    started = time.perf_counter()
    with _mesh_and_lock(config) as mesh, contextlib.ExitStack() as stack:
        source = open_source(config.data)
        config = resolve(config, source.tokenizer.vocab_size)
        spec, shapes = specify(config, mesh)
        run = open_run(config, source.tokenizer, source.sha256)
        stack.callback(run.close)
        source.split(mesh, config.model.block_size)
        donor = init_from.check(config, source.tokenizer) if run.step is None else None
        run.begin(shapes)
        if run.step is None and config.lora.rank:
            init_from.keep_base(config)
        # in another thread, while weights are drawn and losses estimated
        compiled = stack.enter_context(_compiling(config, spec, source, shapes, run, mesh))
        state = new_state(config, donor, spec, shapes) if run.step is None else run.restore(shapes, spec.tx)
        frozen = read_frozen(config, mesh, run.manifest)
        emit = stack.enter_context(_sinks(run))
        start = start_record(config, mesh, source, state, frozen)
        peak = chips.Peak(list(mesh.devices.flat), config.run.peak_tflops)
        before = run.manifest.get("mesh", start["mesh"])
        emit({**start, "peak_unknown": peak.is_unknown, "mesh_before": before, "changed": run.changed})
        loop = TrainingLoop(
            config, spec, source, run, emit, start["mesh"], start["flops_per_token"], peak, started, frozen
        )
        with stop_requests() as stop_request:
            state = loop.run(state, stop_request, compiled)
        with watched(source, "val", sys.stdout if processes.is_first() else None) as pieces:
            loss = evaluate(cast(combined(averaged(state), frozen), spec), pieces, chunks=spec.loss_chunks)
        run.checkpoints.wait()  # "done" is printed only once everything is safe
        elapsed, last = time.perf_counter() - started, int(state.step)
        emit({"kind": "final", "step": last, "val_loss": loss, "uniform_loss": math.log(config.model.vocab_size),
              "elapsed_s": elapsed, "run_dir": config.run.dir, "sample": loop.sample(state, last),
              "next": "chat" if source.tokenizer.chat_template else "sample"})  # fmt: skip
    if frozen is None:
        model = nnx.merge(spec.graphdef, averaged(state))
    else:
        model = model_of(config.model, merged(frozen, averaged(state), config.lora))
    return Run(run.folder, config, source.tokenizer, model, last, source.sha256)


@contextlib.contextmanager
def _mesh_and_lock(config: Config) -> Iterator[Mesh]:
    """Make the mesh of a run, and hold the lock of its directory meanwhile (in the first of several processes)."""
    if config.train.deterministic:
        chips.repeatable_sums()
    processes.join(config.distributed)
    mesh = sharding.make_mesh(mesh_config(config))
    with contextlib.ExitStack() as stack:
        writer = lock.hold_lock(config.run.dir, "wait until it is done, or name another --run.dir")
        processes.from_first(lambda: stack.enter_context(writer))
        stack.enter_context(storage.failures(config.run.dir))
        stack.enter_context(jax.set_mesh(mesh))
        yield mesh


@contextlib.contextmanager
def _sinks(run: RunDirectory) -> Iterator[metrics.Sink]:
    """Yield a function that writes a record to metrics.jsonl, to the console and to the tracker that `run.track` names,
    in the first process only."""
    sinks = []
    with contextlib.ExitStack() as stack:
        if processes.is_first():
            title = run.config.run.dir.rstrip("/").rpartition("/")[2]
            stack.callback(metrics.optional("loss.png", report.draw_loss), run.folder, title)
            file, console = metrics.JsonLines(run.folder / "metrics.jsonl"), metrics.Console(run.config.train.steps)
            stack.callback(file.close)
            stack.callback(metrics.optional("progress bar", console.close))
            sinks = [file, metrics.optional("progress on the screen", console)]
            if tracker := track.of(run.config, run.folder, run.step):
                stack.callback(metrics.optional(run.config.run.track, tracker.close))
                sinks.append(metrics.optional(run.config.run.track, tracker))

        def emit(record: metrics.Record) -> None:
            for sink in sinks:
                sink(record)

        yield emit


@contextlib.contextmanager
def _compiling(
    config: Config, spec: StepSpec, source: Source, shapes: TrainState, run: RunDirectory, mesh: Mesh
) -> Iterator[Future[CompiledCall] | None]:
    """Compile the steps of a run in another thread; yields a future of them, None if the run has ended already."""

    def compile_steps() -> CompiledCall:
        with jax.set_mesh(mesh):  # each thread has its own
            return compile_call(config, spec, source, shapes, abstract_frozen(config.model, config.lora, mesh))

    with ThreadPoolExecutor(1) as threads:
        spent = Patience(**run.manifest.get("patience", {})).is_spent(config.train.patience)
        ended = spent or (run.step or 0) >= config.train.steps
        yield None if ended else threads.submit(compile_steps)


def new_state(config: Config, donor: GPTConfig | None, spec: StepSpec, shapes: TrainState) -> TrainState:
    """Make the state before the first step, with new weights or adapters, or the weights that `run.init_from` names.

    Args:
        config: resolved.
        donor: the model settings of that run, from `init_from.check`; None for new weights.
        spec: from `specify`.
        shapes: from `specify`.
    """
    if config.lora.rank:
        return state_of(init_adapters(config.model, config.lora, stream_key(config.seed, INIT)), spec.tx)
    if donor is not None:
        return init_from.initial_state(config, donor, spec.tx, shapes)
    return first_state(config.model, spec.tx, config.seed)


def read_frozen(config: Config, mesh: Mesh, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """Read the weights that LoRA adapts, from the run directory.

    Args:
        config: resolved.
        mesh: of the run.
        manifest: of the checkpoint to continue from; empty at the start of a run.

    Returns:
        A nested dict of arrays; None without LoRA.

    Raises:
        CheckpointError: the base is missing, damaged, another one, or of another model.
    """
    shapes, run_dir = abstract_frozen(config.model, config.lora, mesh), config.run.dir
    return shapes and read_base(run_dir, manifest.get("base") or base.identity(run_dir), shapes)


def resolve(config: Config, vocab_size: int, platform: str | None = None) -> Config:
    """Fill in the settings that depend on the tokenizer and on the machine: vocab_size and the compute dtype.

    Args:
        config: as configured.
        vocab_size: the tokenizer's.
        platform: the platform that will compute (cpu, gpu, tpu); None = this machine's.

    Raises:
        ConfigError: the configured vocab_size is not the tokenizer's, or loss_chunks does not divide block_size.
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
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=vocab_size),
        train=dataclasses.replace(config.train, dtype=chips.compute_dtype(config.train.dtype, platform)),
    )


def mesh_config(config: Config) -> sharding.MeshConfig:
    """Choose the mesh of a run on this machine; on a CPU, the cores become devices."""
    model = config.model
    return cores.as_devices(config.mesh, model.block_parameters, config.data.batch_size, model.block_size)


def abstract_model(config: Config, platform: str) -> GPT:
    """Build the model of a resolved configuration without weights, for the attention of a platform (cpu, gpu, tpu).

    Raises:
        ConfigError: the attention kernel that the configuration names cannot be used there.
    """
    model, dtype = config.model, jnp.dtype(config.train.dtype)
    sizes = dtype, model.block_size, model.channels_per_head
    kernel = attention.choose(model.attention, platform, *sizes)
    wrong_platform = platform not in {"cudnn": ("gpu",), "splash": ("tpu", "cpu")}.get(kernel, (platform,))
    if kernel != "xla" and (wrong_platform or not attention.fits(kernel, *sizes)):
        raise ConfigError(
            f"no {kernel} attention here (--model.attention; {platform}, {dtype}, block_size {sizes[1]}, heads of "
            f"{sizes[2]} channels): use auto"
        )
    return abstract(dataclasses.replace(model, attention=kernel), config.lora)


def specify(config: Config, mesh: Mesh, platform: str | None = None) -> tuple[StepSpec, TrainState]:
    """Build the static arguments of the compiled functions, and the shapes, dtypes and shardings of the state.

    Args:
        config: resolved.
        mesh: of devices, which need not be on this machine.
        platform: the platform of these devices (cpu, gpu, tpu); None = this machine's.

    Raises:
        MeshError: the mesh does not divide the batch or the model.
    """
    sharding.check_sizes(mesh, config.data.batch_size, *config.model.split_sizes)
    model = abstract_model(config, platform or jax.default_backend())
    spec = step_spec(config, model, mesh)
    return spec, abstract_state(model, spec.tx, mesh)


def step_spec(config: Config, model: GPT, mesh: Mesh | None = None) -> StepSpec:
    """Build the static arguments of the compiled functions, for a model with or without weights."""
    dropout = max(config.model.dropout, config.model.attention_rate)
    window = 4 * config.model.block_size * max(config.model.hidden, config.model.width)
    parts = 1 if mesh is None else cores.parts(mesh, config.data.batch_size, window)
    return StepSpec(
        graphdef=nnx.graphdef(model),
        tx=optimizer(config.optim, config.train.steps),
        schedule=schedule(config.optim, config.train.steps),
        grad_accumulation=config.optim.grad_accumulation * parts,
        dtype=jnp.dtype(config.train.dtype),
        loss_chunks=config.train.loss_chunks,
        per_device_gradients=mesh is not None and sharding.takes_mean_over_devices(mesh, dropout),
    )


def start_record(
    config: Config, mesh: Mesh, source: Source, state: TrainState, frozen: dict[str, Any] | None = None
) -> metrics.Record:
    """Build the first record of metrics.jsonl: what is known before the first step."""
    model, batch = config.model, config.data.batch_size * config.optim.grad_accumulation
    trained, fixed = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state.params, frozen))
    return {
        "kind": "start",
        "step": int(state.step),
        "devices": [device.device_kind for device in mesh.devices.flat],
        "mesh": dict(mesh.shape),
        "parameters": trained + fixed,
        **({"adapters": trained} if fixed else {}),
        "flops_per_token": metrics.flops_per_token(model, trained + fixed, fixed),
        "batch": [batch, model.block_size],
        "steps": config.train.steps,
        "dtype": config.train.dtype,
        **describe(source),
        "run_dir": config.run.dir,
        "init_from": config.run.init_from or None,
        "versions": {library.__name__: library.__version__ for library in (jax, flax, optax)},
    }
