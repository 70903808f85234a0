"""One compiled step for several runs that differ in numbers only, spread over the devices."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxgpt.config import Config
from jaxgpt.devices.dropout import Dropout, RateArray
from jaxgpt.optim import Numbers, OptimConfig, numbers, optimizer_of, schedule_of
from jaxgpt.step import StepSpec, TrainState, estimate_loss, in_turn, train_step

RUNS = "runs"  # the only axis of the mesh
WHOLE = {"warmup", "rising", "end"}  # the numbers that are whole


class Group(NamedTuple):
    """What the runs of one compiled step share; static."""

    spec: StepSpec
    optim: OptimConfig
    shared: tuple[tuple[str, float], ...]
    """The numbers that are equal in all runs."""
    mesh: Mesh


def values_of(config: Config) -> dict[str, float]:
    """Return the numbers in the step of a run, apart from its seed.

    Raises:
        ArgumentError: they do not fit together.
    """
    rates = {"dropout": config.model.dropout, "attention_dropout": config.model.attention_rate}
    return {**rates, **numbers(config.optim, config.train.steps)._asdict()}


def names_that_vary(configs: Sequence[Config]) -> list[str]:
    """Return the names of the numbers that differ between runs."""
    values = list(map(values_of, configs))
    return [name for name in values[0] if len({each[name] for each in values}) > 1]


def over_runs(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Under jit: call a function for each run; each device computes its own runs, and sends nothing to the others."""

    def on_device(*args):
        if len(jax.tree.leaves(args)[0]) > 1:
            return jax.vmap(function)(*args)
        return jax.tree.map(lambda a: a[None], function(*jax.tree.map(lambda a: a[0], args)))

    return jax.shard_map(on_device, mesh=mesh, in_specs=P(RUNS), out_specs=P(RUNS), check_vma=False)


def spec_of_run(group: Group, params: dict[str, Any], varying: dict[str, jax.Array]) -> StepSpec:
    """Inside the compiled step: the StepSpec of one run, with arrays in place of the numbers that vary."""
    values = {**dict(group.shared), **varying}
    n = Numbers(**{name: values[name] for name in Numbers._fields})
    spec = group.spec._replace(tx=optimizer_of(group.optim, n), schedule=schedule_of(group.optim.schedule, n))
    if not {"dropout", "attention_dropout"} & varying.keys():
        return spec
    model = nnx.merge(spec.graphdef, params)

    def set_rate(layer: Dropout, name: str) -> None:
        if layer.rate and name in varying:  # a layer that is switched off stays so
            layer.rate = RateArray(varying[name])

    set_rate(model.dropout, "dropout")
    for block in model.blocks:
        set_rate(block.dropout, "dropout")
        set_rate(block.attn.dropout, "attention_dropout")
    return spec._replace(graphdef=nnx.graphdef(model))


@partial(jax.jit, static_argnames="group", donate_argnames="states")
def train_together(states: TrainState, windows, keys: jax.Array, varying, count=None, *, group: Group):
    """Take optimizer steps of each run in one compiled call, as `step.train_steps` does for one.

    Args:
        states: before the steps, each array with an axis of runs in front; their buffers are donated.
        windows: (runs, n, rows, T + 1) integers, or Windows of that shape.
        keys: (runs,) typed PRNG keys, one per run.
        varying: the numbers that vary, a dict of (runs,) each.
        count: () int32, take only so many steps, with the first windows; None = n.
        group: static.

    Returns:
        The states after the steps, and each metric of `train_step` as (runs, n) float32, 0 for steps not taken.
    """

    def one(state, windows, key, varying):
        spec = spec_of_run(group, state.params, varying)
        return in_turn(lambda state, batch: train_step(state, batch, key, spec), state, windows, count)

    return over_runs(one, group.mesh)(states, windows, keys, varying)


@partial(jax.jit, static_argnames="group")
def estimate_together(params: dict[str, Any], windows: dict[str, Any], *, group: Group) -> dict[str, jax.Array]:
    """Estimate the losses of each run: (runs,) float32 for each of the named windows; see `step.estimate_loss`."""

    def one(params, windows):
        return {name: estimate_loss(params, each, spec=group.spec) for name, each in windows.items()}

    return over_runs(one, group.mesh)(params, windows)
