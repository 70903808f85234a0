"""Runs that differ in numbers only, trained side by side: with checkpoints and estimates as in a single run."""

import contextlib
import dataclasses
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt.config import Config
from jaxgpt.devices import sharding
from jaxgpt.devices.sharding import MeshConfig
from jaxgpt.devices.stopping import Stopped
from jaxgpt.files import screen
from jaxgpt.loop import boundary, calls, count, feed, longest
from jaxgpt.runs import init_from
from jaxgpt.runs.checkpoint import Checkpoints
from jaxgpt.step import (
    ESTIMATE,
    VAL,
    StepSpec,
    TrainState,
    all_finite,
    averaged,
    cast,
    evaluate,
)
from jaxgpt.text.source import Source
from jaxgpt.tools.side_by_side import RUNS, WHOLE, Group, estimate_together, train_together, values_of
from jaxgpt.training import new_state, specify


@dataclasses.dataclass
class Progress:
    """What is known of each run so far, as JSON types."""

    curves: list[list[list[float | None]]]
    """Step, train loss and validation loss of each estimate."""
    diverged: list[int | None]
    """The first step whose loss or gradient was not finite."""
    seconds: float = 0.0
    """Of all runs together, without compiling."""


class Outcome(NamedTuple):
    """A run after training."""

    state: TrainState
    step: int
    val_loss: float | None
    """Over the whole split; None if the run diverged."""
    curve: list[list[float | None]]
    diverged: int | None
    seconds: float
    """Its share of the time of all."""

    def facts(self) -> dict[str, Any]:
        """The part of its record in sweep.jsonl."""
        going = self.diverged is None
        losses = {"val_loss": self.val_loss, "train_loss": self.curve[-1][1] if going else None}
        about = {"seconds": self.seconds, "diverged": self.diverged, "curve": self.curve}
        return {"step": self.step if going else self.diverged, **losses, **about}


@dataclasses.dataclass
class Program:
    """The compiled step of a group, which serves one batch of its runs after the other."""

    config: Config
    """Resolved; that of one run."""
    names: list[str]
    """The numbers that are arrays."""
    lanes: int
    """Runs that it takes."""
    compiled: jax.stages.Compiled | None = None
    """`train_together`; None until it is compiled."""

    @cached_property
    def first_device(self) -> Mesh:
        """The mesh of a single run."""
        return sharding.make_mesh(MeshConfig(data=1))

    @cached_property
    def _specified(self) -> tuple[StepSpec, TrainState]:
        with jax.set_mesh(self.first_device):
            return specify(self.config, self.first_device)

    @property
    def shapes(self) -> TrainState:
        """The state of a single run."""
        return self._specified[1]

    @cached_property
    def group(self) -> Group:
        """What all runs share."""
        n = max(n for n in range(1, jax.device_count() + 1) if self.lanes % n == 0)
        mesh = jax.make_mesh((n,), (RUNS,), devices=jax.devices()[:n], axis_types=(AxisType.Auto,))
        shared = tuple((name, value) for name, value in values_of(self.config).items() if name not in self.names)
        return Group(self._specified[0], self.config.optim, shared, mesh)


@dataclasses.dataclass(frozen=True)
class Together:
    """The training of some runs side by side."""

    configs: list[Config]
    """Resolved; at most as many as the program takes, which the last one fills up."""
    program: Program
    source: Source
    """Its windows are on the first device."""
    say: Callable[[str], None]

    @cached_property
    def filled(self) -> list[Config]:
        """A configuration for each lane."""
        return self.configs + [self.configs[-1]] * (self.program.lanes - len(self.configs))

    @property
    def group(self) -> Group:
        """What all runs share."""
        return self.program.group

    def stack(self, trees: Sequence[Any]) -> Any:
        """Stack one tree per lane, and give each device its runs."""
        stacked = jax.tree.map(lambda *leaves: (np if isinstance(leaves[0], np.ndarray) else jnp).stack(leaves), *trees)
        return jax.device_put(stacked, NamedSharding(self.group.mesh, P(RUNS)))

    @cached_property
    def keys(self) -> jax.Array:
        """The key of each run."""
        return self.stack([jax.random.key(config.seed) for config in self.filled])

    @cached_property
    def varying(self) -> dict[str, jax.Array]:
        """The numbers that vary, (runs,) each."""
        values = list(map(values_of, self.filled))
        arrays = {
            name: np.array([each[name] for each in values], np.int32 if name in WHOLE else np.float32)
            for name in self.program.names
        }
        return jax.device_put(arrays, NamedSharding(self.group.mesh, P(RUNS)))

    def by_seed(self, windows_of: Callable[[int], Any]) -> Any:
        """Stack what belongs to the seed of each run; equal seeds have equal windows."""
        windows = {seed: windows_of(seed) for seed in dict.fromkeys(config.seed for config in self.filled)}
        return self.stack([windows[config.seed] for config in self.filled])

    @cached_property
    def watched(self) -> dict[str, Any]:
        """The windows of the loss estimates."""
        n, B = self.configs[0].train.eval_batches, self.configs[0].data.batch_size
        streams = {"train": ESTIMATE, "val": VAL}
        return {
            name: self.by_seed(lambda seed, stream=stream: self.source.windows(stream, seed, 0, n, B))
            for name, stream in streams.items()
        }

    def feed(self, step: int) -> Iterator[Any]:
        """Yield the training windows of each call from a step on, those that each run would see alone."""
        config = self.configs[0]
        seeds = {each.seed: each for each in self.filled}
        with contextlib.ExitStack() as stack:
            feeds = {seed: feed(each, self.source, step) for seed, each in seeds.items()}
            for each in feeds.values():
                stack.enter_context(contextlib.closing(each))
            for _ in calls(config, step):
                yield self.by_seed(lambda seed: next(feeds[seed]))

    def first_states(self) -> TrainState:
        """The states before the first step."""
        with jax.set_mesh(self.program.first_device):
            donor = init_from.check(self.configs[0], self.source.tokenizer)
            states = {}
            for config in self.filled:
                if config.seed not in states:
                    states[config.seed] = jax.device_get(new_state(config, donor, self.group.spec, self.program.shapes))
        return self.stack([jax.tree.map(np.asarray, states[config.seed]) for config in self.filled])

    def begin(self, checkpoints: Checkpoints) -> tuple[int, TrainState, Progress]:
        """The step to go on from, the states there, and what is known of the runs."""
        interval = self.configs[0].run.checkpoint_interval
        found = checkpoints.newest(interval)
        if found is None:
            states = self.first_states()
            checkpoints.check_space(states, -(-self.configs[0].train.steps // interval))
            return 0, states, Progress([[] for _ in self.configs], [None] * len(self.configs))
        facts = checkpoints.manifest(found)
        progress = Progress(**{field.name: facts[field.name] for field in dataclasses.fields(Progress)})
        lanes, where = self.program.lanes, NamedSharding(self.group.mesh, P(RUNS))
        shapes = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((lanes, *a.shape), a.dtype, sharding=where), self.program.shapes
        )
        self.say(f"continue step {found:,}")
        return found, TrainState(**checkpoints.restore(found, vars(shapes))), progress

    def note(self, progress: Progress, first: int, n: int, metrics: dict[str, jax.Array]) -> None:
        """Wait for the metrics of a call of n steps, and mark the runs that diverged in it."""
        metrics = jax.device_get(metrics)
        bad = ~np.isfinite(metrics["loss"] + metrics["grad_norm"])[:, :n]
        for i in range(len(self.configs)):
            if progress.diverged[i] is None and bad[i].any():
                progress.diverged[i] = first + int(bad[i].argmax()) + 1

    def estimate(self, progress: Progress, states: TrainState, step: int) -> None:
        """Estimate the losses of all runs."""
        losses = jax.device_get(estimate_together(averaged(states), self.watched, group=self.group))
        going = [i for i, diverged in enumerate(progress.diverged) if diverged is None]
        for i in going:
            pair = (float(losses[name][i]) for name in ("train", "val"))
            progress.curves[i].append([step, *(loss if math.isfinite(loss) else None for loss in pair)])
        val = [float(losses["val"][i]) for i in going]
        said = f"validation loss {min(val):.4f} to {max(val):.4f}" if val else "no run is left"
        diverged = len(self.configs) - len(going)
        self.say(f"step {step:,}/{self.configs[0].train.steps:,}  {said}{f', {diverged} diverged' if diverged else ''}")

    def run(self, folder: pathlib.Path, stop_request: Callable[[], int | None]) -> list[Outcome]:
        """Train to the last step, or until a signal comes; then everything is saved.

        Args:
            folder: for the checkpoints of all runs together.
            stop_request: the number of the signal that came, None while there was none.

        Raises:
            Stopped: there was a signal.
        """
        with Checkpoints(folder, keep=1) as checkpoints:
            states, progress = self.loop(checkpoints, stop_request)
        return [self.outcome(i, states, progress) for i in range(len(self.configs))]

    def loop(self, checkpoints: Checkpoints, stop_request) -> tuple[TrainState, Progress]:
        """The steps of `run`, like those of `loop.TrainingLoop`; returns the last states, on the host."""
        config = self.configs[0]
        steps, every = config.train.steps, config.run.checkpoint_interval
        step, states, progress = self.begin(checkpoints)
        waiting = []
        if step == 0:
            self.estimate(progress, states, step)
        began, before = time.perf_counter(), progress.seconds
        bar = screen.progress("together", steps, "steps", sys.stderr, done=step)
        with contextlib.closing(self.feed(step)) as feeding, bar as advance:
            for (first, n), windows in zip(calls(config, step), feeding):
                if self.program.compiled is None:
                    began += self.compile(states, windows)
                rest = self.keys, self.varying, count(config, n)
                states, metrics = self.program.compiled(states, windows, *rest)
                waiting.append((first, n, metrics))
                step = first + n
                if len(waiting) > 1:  # the metrics of a call are read after the next one has been dispatched
                    self.note(progress, *waiting.pop(0))
                advance(n)
                asked = stop_request()
                if step != boundary(config, first) and asked is None:
                    continue
                while waiting:
                    self.note(progress, *waiting.pop(0))
                if step % config.train.eval_interval == 0 or step == steps:
                    self.estimate(progress, states, step)
                progress.seconds = before + time.perf_counter() - began
                if step % every == 0 or step == steps or asked is not None:
                    facts = {"corpus_sha256": self.source.sha256, "val_loss": None, **dataclasses.asdict(progress)}
                    checkpoints.save(step, vars(states), facts)
                if asked is not None:
                    raise Stopped(asked, step)
        return jax.device_get(states), progress

    def compile(self, states: TrainState, windows: Any) -> float:
        """Compile `train_together` for all calls, and return the seconds that it took."""
        began, config = time.perf_counter(), self.configs[0]
        rest = self.keys, self.varying, count(config, longest(config))
        self.program.compiled = train_together.lower(states, windows, *rest, group=self.group).compile()
        seconds = time.perf_counter() - began
        self.say(f"compile  {seconds:.1f} s")
        return seconds

    def outcome(self, i: int, states: TrainState, progress: Progress) -> Outcome:
        """Evaluate a run over the whole split."""
        config, began = self.configs[i], time.perf_counter()
        state = jax.tree.map(lambda a: jnp.asarray(a[i]), states)
        diverged, loss = progress.diverged[i], None
        if diverged is None and not all_finite((state.params, state.opt_state)):
            diverged = int(state.step)
        if diverged is None:
            model = cast(averaged(state), self.group.spec)
            loss = evaluate(model, self.source.pieces("val"), chunks=config.train.loss_chunks)
            diverged = None if math.isfinite(loss) else int(state.step)
        seconds = progress.seconds / len(self.configs) + time.perf_counter() - began
        return Outcome(
            state, int(state.step), loss if diverged is None else None, progress.curves[i], diverged, seconds
        )
