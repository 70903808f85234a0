"""The training loop: steps in compiled calls, with evaluations, samples, checkpoints and signals between them."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgpt import sampling
from jaxgpt.config import Config
from jaxgpt.devices import chips, processes
from jaxgpt.devices.stopping import Stopped
from jaxgpt.errors import JaxgptError
from jaxgpt.runs import metrics
from jaxgpt.runs.directory import RunDirectory
from jaxgpt.step import (
    ESTIMATE,
    METRICS,
    SAMPLE,
    TRAIN,
    VAL,
    StepSpec,
    TrainState,
    all_finite,
    averaged,
    cast,
    combined,
    estimate_loss,
    stream_key,
    train_steps,
)
from jaxgpt.text.source import Source


class NonFiniteError(JaxgptError, ArithmeticError):
    """The loss or the gradient is not finite."""

    exit_code = 5

    def __init__(self, message: str, step: int | None = None):
        super().__init__(message)
        self.step = step


class Patience(NamedTuple):
    """What early stopping needs to know of the evaluations so far. Checkpoints keep it, so that resuming is exact."""

    best_loss: float | None = None
    """The lowest validation loss; None before the first evaluation."""
    best_step: int = 0
    """The step of the lowest validation loss."""
    waited: int = 0
    """Evaluations since then."""

    def after(self, step: int, val_loss: float) -> "Patience":
        """Return the state after one more evaluation."""
        if val_loss < (math.inf if self.best_loss is None else self.best_loss):
            return Patience(val_loss, step)
        return self._replace(waited=self.waited + 1)

    def is_spent(self, patience: int) -> bool:
        """Whether `patience` evaluations in a row brought no improvement; never if it is 0."""
        return 0 < patience <= self.waited


class CompiledCall(NamedTuple):
    """What `compile_call` returns."""

    call: jax.stages.Compiled
    """A function of the state, the windows, the run's key and the frozen parameters."""
    seconds: float
    """How long it took."""


@dataclasses.dataclass(frozen=True)
class TrainingLoop:
    """The training loop of a run: compiled calls, with evaluations, samples and checkpoints between them."""

    config: Config
    """Resolved."""
    spec: StepSpec
    source: Source
    run_dir: RunDirectory
    emit: metrics.Sink
    mesh: dict[str, int]
    """The size of each mesh axis."""
    flops_per_token: int
    peak: chips.Peak
    started: float
    """When the run began, by time.perf_counter()."""
    frozen: dict[str, Any] | None = None
    """The parameters that LoRA does not train."""
    last: dict[str, float] = dataclasses.field(default_factory=dict)
    """The last step that was recorded, and its loss."""

    @cached_property
    def key(self) -> jax.Array:
        """The run's key."""
        return jax.random.key(self.config.seed)

    def log(self, first: int, n: int, chunk: dict[str, jax.Array], began: float) -> float:
        """Wait for the metrics of a call, record them, and return the time at which they came.

        Args:
            first: the step before the first one of the call.
            n: the steps of the call.
            chunk: what `train_steps` returned.
            began: when the devices began to work on the call.

        Raises:
            NonFiniteError: a loss or a gradient norm is not finite.
        """
        chunk = jax.device_get(chunk)
        now, config = time.perf_counter(), self.config
        speed = n * rows(self.config) * config.model.block_size / (now - began)
        mfu = self.peak.part(speed * self.flops_per_token)
        pace = {"tokens_per_second": speed, "mfu": mfu, "elapsed_s": now - self.started}
        for i in range(n):
            row = {"step": first + i + 1} | {name: float(chunk[name][i]) for name in METRICS}
            if not math.isfinite(row["loss"] + row["grad_norm"]):
                raise self.not_finite(", ".join(f"{name} {value:.6g}" for name, value in row.items()), row["step"])
            self.last.update(step=row["step"], loss=row["loss"])
            if row["step"] == 1 or row["step"] % config.train.log_interval == 0:
                self.emit({"kind": "train", **row, **pace})
        return now

    def not_finite(self, what: str, step: int) -> NonFiniteError:
        """The error that ends a run at this step."""
        last = "no loss before it" if not self.last else "last loss {loss:.6g} at step {step:,}".format(**self.last)
        return NonFiniteError(
            f"not a finite number ({what}; {last}): lower --optim.learning_rate, the last checkpoint is intact; "
            f"`jaxgpt replay --run {self.config.run.dir} --step {step}` finds where it began",
            step,
        )

    def estimate_and_sample(self, state: TrainState, step: int) -> float:
        """Estimate both losses, add a sample to samples.txt, and return the validation loss."""
        seed, n, B = self.config.seed, self.config.train.eval_batches, self.config.data.batch_size
        windows = (self.source.windows(stream, seed, 0, n, B) for stream in (ESTIMATE, VAL))
        params = combined(averaged(state), self.frozen)
        train, val = (float(estimate_loss(params, batches, spec=self.spec)) for batches in windows)
        elapsed = time.perf_counter() - self.started
        self.emit({"kind": "eval", "step": step, "train_loss": train, "val_loss": val, "elapsed_s": elapsed})
        if step and self.config.train.sample_tokens:
            text = self.sample(state, step)
            if processes.is_first():
                with open(self.run_dir.folder / "samples.txt", "a", encoding="utf-8") as file:
                    file.write(f"--- step {step}, validation loss {val:.4f}\n{text}\n\n")
        return val

    def sample(self, state: TrainState, step: int) -> str:
        """A new text of `train.sample_tokens` tokens."""
        length = self.config.train.sample_tokens
        if not length:
            return ""
        tokenizer, key = self.source.tokenizer, jax.random.fold_in(stream_key(self.config.seed, SAMPLE), step)
        model = cast(combined(averaged(state), self.frozen), self.spec)
        out = sampling.generate(model, tokenizer.start[None], key, length)
        return tokenizer.decode(np.asarray(out)[0, len(tokenizer.start) :])

    def save(self, state: TrainState, step: int, val_loss: float | None, patience: Patience) -> None:
        """Write a checkpoint.

        Raises:
            NonFiniteError: finite gradients gave an update that left something that is not finite.
        """
        if not all_finite((state.params, state.opt_state)):
            raise self.not_finite(f"parameters after step {step}", step + 1)
        self.run_dir.save(step, vars(state), val_loss=val_loss, patience=patience._asdict(), mesh=self.mesh)

    def run(
        self, state: TrainState, stop_request: Callable[[], int | None], compiled: Future[CompiledCall] | None
    ) -> TrainState:
        """Train to the last step, or until patience is spent, or until a signal comes; then everything is saved.

        Args:
            state: to start from; its memory is taken over.
            stop_request: the number of the signal that came, None while there was none.
            compiled: from `compile_call`, which may still be at work; None if the run has ended already.

        Raises:
            Stopped: there was a signal.
            NonFiniteError: the loss, the gradient or the parameters were not finite.
        """
        config, every = self.config.train, self.config.run.checkpoint_interval
        step, ended, waiting = int(state.step), 0.0, []
        patience = Patience(**self.run_dir.manifest.get("patience", {}))
        if compiled is None:
            return state
        if step == 0:
            loss = self.estimate_and_sample(state, step)
            patience = patience.after(step, loss)
            if config.patience:  # later steps may be no better than the first weights
                self.save(state, step, loss, patience)
        planned = traced(calls(self.config, step), config.profile, self.run_dir.checkpoints.wait)
        call, seconds = compiled.result()
        self.emit({"kind": "compile", "seconds": seconds})
        with contextlib.closing(feed(self.config, self.source, step)) as feeding:
            for (first, n), windows in zip(planned, feeding):
                ended = ended if waiting else time.perf_counter()
                state, chunk = call(state, windows, self.key, self.frozen, count(self.config, n))
                waiting.append((first, n, chunk))
                step = first + n
                # the metrics of a call are read after the next one has been dispatched, but the first loss at once
                if len(waiting) > 1 or first == 0:
                    ended = self.log(*waiting.pop(0), ended)
                asked = stop_request()
                if step != boundary(self.config, first) and asked is None:
                    continue
                while waiting:
                    ended = self.log(*waiting.pop(0), ended)
                self.peak.measure()
                val_loss, best = None, False
                if step % config.eval_interval == 0 or step == config.steps:
                    val_loss = self.estimate_and_sample(state, step)
                    asked = stop_request() if asked is None else asked
                if step % config.eval_interval == 0:  # not at another last step: a longer run would not evaluate there
                    patience = patience.after(step, val_loss)
                    best = config.patience and patience.best_step == step
                done = step == config.steps or patience.is_spent(config.patience)
                if step % every == 0 or done or best or asked is not None:
                    self.save(state, step, val_loss, patience)
                if done:
                    break
                if asked is not None:
                    raise Stopped(asked, step)
        if patience.is_spent(config.patience):
            self.emit({"kind": "early_stop", "step": step, **patience._asdict()})
        return state


def compile_call(config: Config, spec: StepSpec, source: Source, shapes: TrainState, frozen: Any) -> CompiledCall:
    """Compile `train_steps` for the calls of a run and the devices of the current mesh.

    Args:
        config: resolved.
        spec: static.
        source: after `split`.
        shapes: shapes, dtypes and shardings of the state.
        frozen: those of the parameters that LoRA does not train, or these parameters.
    """
    began, n = time.perf_counter(), longest(config)
    windows = source.windows(TRAIN, config.seed, 0, n, rows(config))
    lowered = train_steps.lower(shapes, windows, jax.random.key(config.seed), frozen, count(config, n), spec=spec)
    return CompiledCall(lowered.compile(), time.perf_counter() - began)


def rows(config: Config) -> int:
    """Windows per step."""
    return config.optim.grad_accumulation * config.data.batch_size


def boundary(config: Config, step: int) -> int:
    """The next step after `step` at which something is evaluated or saved."""
    each = config.train.eval_interval, config.run.checkpoint_interval
    return min(*(step // every * every + every for every in each), config.train.steps)


def calls(config: Config, step: int) -> Iterator[tuple[int, int]]:
    """The first step and the number of steps of each call, from `step` on.

    The first step is a call by itself, so that its loss is there at once. The result does not depend on this division.
    """
    while step < config.train.steps:
        n = min(longest(config) if step else 1, boundary(config, step) - step)
        yield step, n
        step += n


def longest(config: Config) -> int:
    """The steps of the longest call: steps_per_call, or as many as there are between two boundaries."""
    train = config.train
    return min(train.steps_per_call, train.eval_interval, config.run.checkpoint_interval, train.steps)


def count(config: Config, n: int) -> np.int32 | None:
    """The `count` of `train_steps` for a call of n steps; None where each call is one step, which needs no loop."""
    return None if longest(config) == 1 else np.int32(n)


def feed(config: Config, source: Source, step: int) -> Iterator[Any]:
    """Yield the windows of each of the `calls`, always those of the longest one, so that one program serves all."""
    full = ((first, longest(config)) for first, _ in calls(config, step))
    return source.feed(full, config.seed, rows(config))


def traced(calls: Iterator[tuple[int, int]], folder: str | None, wait: Callable[[], None]) -> Iterator[tuple[int, int]]:
    """Yield the calls; a trace of the second to the fourth is written to `folder`, if there is one.

    `wait` returns when nothing is being saved: with saving threads around, jax 0.7 has died at the end of a trace.
    """
    with contextlib.ExitStack() as tracing:
        for i, call in enumerate(calls):
            if folder and i == 1:
                wait()
                tracing.enter_context(jax.profiler.trace(folder))
                tracing.callback(wait)
            if i == 4:
                tracing.close()
            yield call
