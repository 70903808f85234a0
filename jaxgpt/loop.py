"""The loop of a run: steps in compiled calls, and what is done between them."""

import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jaxgpt import patience, sampling
from jaxgpt.config import Config
from jaxgpt.devices import chips, processes
from jaxgpt.devices.stopping import Stopped
from jaxgpt.patience import Patience
from jaxgpt.runs import metrics
from jaxgpt.runs.checkpoint import Checkpoints
from jaxgpt.runs.directory import publish
from jaxgpt.step import SAMPLE, Recipe, TrainState, all_finite, cast, estimate_loss, stream_key, train_steps
from jaxgpt.text.source import Source


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
    flops_per_token: int
    peak: chips.Peak
    started: float
    last: dict[str, float] = dataclasses.field(default_factory=dict)
    """The last step that was recorded, and its loss."""

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
        tokens = n * self.recipe.rows * config.model.block_size
        speed, peak = tokens / (now - began), self.peak.flops
        mfu = peak and speed * self.flops_per_token / peak
        pace = {"tokens_per_second": speed, "mfu": mfu, "elapsed_s": now - self.started}
        for i in range(n):
            row = {"step": first + i + 1} | {
                name: float(chunk[name][i]) for name in ("loss", "learning_rate", "grad_norm")
            }
            if not math.isfinite(row["loss"] + row["grad_norm"]):
                raise self.not_finite(", ".join(f"{name} {value:.6g}" for name, value in row.items()), row["step"])
            self.last.update(step=row["step"], loss=row["loss"])
            if row["step"] % config.train.log_interval == 0:
                self.emit({"kind": "train", **row, **pace})
        return now

    def not_finite(self, what: str, step: int) -> NonFiniteError:
        """The error that ends a run at this step."""
        last = "no loss before it" if not self.last else "last loss {loss:.6g} at step {step:,}".format(**self.last)
        return NonFiniteError(
            f"not a finite number ({what}; {last}): lower --optim.learning_rate, the last checkpoint is intact; "
            f"`jaxgpt replay --run {self.config.run.dir} --step {step}` finds where it began"
        )

    def look(self, state: TrainState, step: int) -> float:
        """Estimate both losses, add a sample to samples.txt, and return the validation loss."""
        seed, n, B = self.config.seed, self.config.train.eval_batches, self.config.data.batch_size
        windows = (self.source.sample(split, seed, n, B) for split in ("train", "val"))
        train, val = (float(estimate_loss(state.params, batches, recipe=self.recipe)) for batches in windows)
        elapsed = time.perf_counter() - self.started
        self.emit({"kind": "eval", "step": step, "train_loss": train, "val_loss": val, "elapsed_s": elapsed})
        if step:
            text = self.sample(state, step)
            if processes.is_first():
                with open(self.folder / "samples.txt", "a", encoding="utf-8") as file:
                    file.write(f"--- step {step}, validation loss {val:.4f}\n{text}\n\n")
        return val

    def sample(self, state: TrainState, step: int, length: int = 300) -> str:
        """New text."""
        tokenizer, key = self.source.tokenizer, jax.random.fold_in(stream_key(self.config.seed, SAMPLE), step)
        out = sampling.generate(cast(state.params, self.recipe), tokenizer.start[None], key, length)
        return tokenizer.decode(np.asarray(out)[0, len(tokenizer.start) :])

    def save(self, state: TrainState, step: int, val_loss: float | None, watch: Patience) -> None:
        """Checkpoint; the small files go with it.

        Raises:
            NonFiniteError: an update, itself of finite gradients, left something that is not finite.
        """
        if not all_finite((state.params, state.opt_state)):
            raise self.not_finite(f"parameters after step {step}", step + 1)
        if processes.is_first():
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


def traced(calls: Iterator[tuple[int, int]], folder: str | None) -> Iterator[tuple[int, int]]:
    """The calls; while the second to the fourth of them are dispatched, jax's profiler writes a trace to the folder."""
    with contextlib.ExitStack() as tracing:
        for i, call in enumerate(calls):
            if folder and i == 1:
                tracing.enter_context(jax.profiler.trace(folder))
            if i == 4:
                tracing.close()
            yield call


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
    cut = traced(calls(job.config, step), config.profile)
    with contextlib.closing(job.source.feed(calls(job.config, step), job.config.seed, job.recipe.rows)) as feed:
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
            job.peak.measure()
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
