"""AdamW, or Muon for the blocks' matrices; learning rate schedules, the decay mask, and the average of the weights."""

import dataclasses
import functools
import math
import operator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxgpt import muon
from jaxgpt.errors import ArgumentError
from jaxgpt.settings.checks import check_fields
from jaxgpt.settings.numbers import number


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate, which begins with a linear warm-up; all counts are in optimizer steps."""

    learning_rate: float = number(1e-3)
    """Peak learning rate."""
    min_learning_rate: float = number(1e-4)
    """Learning rate after the decay; 0 for a schedule to 0."""
    warmup_steps: int = number(100)
    """Steps of linear warm-up."""
    decay_steps: int = number(0)
    """Step at which the decay ends; 0 = train.steps."""
    weight_decay: float = number(0.1)
    """Decoupled weight decay, applied to matrices and tables only."""
    beta1: float = number(0.9)
    """Decay rate of AdamW's first moment."""
    beta2: float = number(0.99)
    """Decay rate of AdamW's second moment."""
    grad_clip: float = number(1.0, zero_is_off=True)
    """Maximum global norm of the gradient; 0 = no clipping."""
    grad_accumulation: int = 1
    """Batches per step, whose gradients are averaged."""
    ema_decay: float = number(0.0, zero_is_off=True)
    """Evaluate, sample and export an exponential moving average of the weights, over about 1 / (1 - ema_decay) steps;
    0 = the weights themselves. Training goes on from the weights themselves."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Update rule: AdamW; or Muon for the matrices of the blocks, and AdamW for all else."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Learning rate after the warm-up: a cosine or a line down to min_learning_rate; wsd, the peak and then a line down
    during the last decay_fraction of the steps (warm-up, stable, decay); or constant, always the peak."""
    decay_fraction: float = number(0.7)
    """Fraction of all steps, at the end of the run, during which the rate of schedule wsd falls; 1 = linear."""
    muon_learning_rate: float = number(0.0)
    """Peak learning rate of Muon, whose minimum is scaled with it; 0 = learning_rate."""
    muon_momentum: float = number(0.95)
    """Decay rate of the sum of gradients that Muon keeps."""

    def __post_init__(self):
        check_fields(self)
        minimums = dict.fromkeys(("min_learning_rate", "warmup_steps", "decay_steps", "weight_decay", "grad_clip"), 0)
        for name, bound in {**minimums, "muon_learning_rate": 0, "grad_accumulation": 1}.items():
            if not getattr(self, name) >= bound:
                raise ArgumentError(f"{name} is {getattr(self, name)}: use {bound} or more")
        if not self.learning_rate > 0:
            raise ArgumentError(f"learning_rate is {self.learning_rate}: use a number above 0")
        for name in ("beta1", "beta2", "ema_decay", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ArgumentError(f"{name} is {getattr(self, name)}: use a number from 0 up to but not including 1")
        if not 0 < self.decay_fraction <= 1:
            raise ArgumentError(f"decay_fraction is {self.decay_fraction}: use a number above 0 and up to 1")


class Numbers(NamedTuple):
    """The numbers of the optimizer, derived from its settings.

    They are Python numbers in a single run, whose compiled step has them as constants. The compiled step of a sweep
    takes those that differ between its runs as arrays, so nothing below may branch on one of them.
    """

    peak: float
    floor: float
    warmup: int
    rising: int
    """Steps of the warm-up, at least 1."""
    end: int
    falling: float
    """Steps of the decay; the cosine takes all steps after the warm-up."""
    weight_decay: float
    beta1: float
    beta2: float
    grad_clip: float
    ema_decay: float
    muon_factor: float
    """Muon's learning rate as a multiple of AdamW's."""
    muon_momentum: float


def numbers(config: OptimConfig, steps: int = 0) -> Numbers:
    """Derive the numbers of the optimizer.

    Args:
        config: the settings.
        steps: of the whole run; the decay ends there if decay_steps is 0.

    Raises:
        ArgumentError: the final rate is above the peak rate.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    floor = peak if config.schedule == "constant" else config.min_learning_rate
    if floor > peak:
        raise ArgumentError(
            f"min_learning_rate {floor} is above learning_rate {peak} (optim): "
            "lower it; for a constant rate, use --optim.schedule constant"
        )
    end = max(config.decay_steps or steps, warmup + 1)
    return Numbers(
        peak=peak,
        floor=floor,
        warmup=warmup,
        rising=max(warmup, 1),
        end=end,
        falling=min(end - warmup, end * config.decay_fraction if config.schedule == "wsd" else end),
        weight_decay=config.weight_decay,
        beta1=config.beta1,
        beta2=config.beta2,
        grad_clip=config.grad_clip,
        ema_decay=config.ema_decay,
        muon_factor=config.muon_learning_rate / config.learning_rate or 1.0,
        muon_momentum=config.muon_momentum,
    )


@functools.cache  # one object per config, so that a second train() in the same process reuses the compiled step
def schedule(config: OptimConfig, steps: int = 0) -> optax.Schedule:
    """Build the learning rate schedule: linear warm-up, then what `OptimConfig.schedule` says, then constant.

    Args:
        config: the settings.
        steps: as for `numbers`.

    Returns:
        A function from the step, counted from 0, to the learning rate.

    Raises:
        ArgumentError: the final rate is above the peak rate.

    Source: nanoGPT's get_lr, with warm-up counted from 1 so that the first step changes the parameters; for wsd, Hu et
    al. 2024, "MiniCPM", section 4.
    """
    return schedule_of(config.schedule, numbers(config, steps))


def schedule_of(name: str, n: Numbers) -> optax.Schedule:
    """Build the schedule of this name, as `schedule` does, from numbers that may be arrays."""

    def cosine(step):
        # in the order of optax's warmup_cosine_decay_schedule, whose bits earlier runs have
        warm = (n.peak / (n.warmup + 1) - n.peak) * (1 - jnp.clip(step, 0, n.rising) / n.rising) + n.peak
        length, least = n.end - n.warmup, n.floor / n.peak
        part = 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(step - n.warmup, length) / length))
        return jnp.where(step < n.warmup, warm, n.peak * ((1 - least) * part + least))

    def line(step):
        warm = jnp.minimum((step + 1) / (n.warmup + 1), 1)
        return warm * (n.peak - (n.peak - n.floor) * jnp.clip(1 - (n.end - step) / n.falling, 0, 1))

    return cosine if name == "cosine" else line


def decay_mask(params) -> dict:
    """Build the decay mask.

    Args:
        params: a tree of parameters.

    Returns:
        The same tree with True for matrices and tables, and False for biases and norms.
    """
    return jax.tree.map(lambda p: p.ndim >= 2, params)


class AverageState(NamedTuple):
    """The state of `average_weights`: the number of updates, () int32, and a tree like the parameters."""

    count: jax.Array
    average: Any


def average_weights(decay: float | jax.Array) -> optax.GradientTransformation:
    """Build the last part of an optimizer, which keeps an exponential moving average of the weights.

    After t updates the average is sum_i (1 - decay) decay^(t - i) p_i / (1 - decay^t), where p_i are the weights after
    update i: like Adam's moments, it is corrected so that the first weights do not count. Before the first update it is
    the first weights. After a change of the decay it is still a weighted mean of earlier weights.

    Args:
        decay: above 0 and below 1, also as a () array.

    Returns:
        A transformation that leaves the updates as they are.

    Source: Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging"; Kingma and Ba 2015,
    "Adam", section 7.2.
    """

    # near 1, the logarithm of a float32 loses all its digits, but the difference from 1 is exact
    log = jnp.log1p(decay - 1) if isinstance(decay, jax.Array) else math.log(decay)

    def init(params):
        # copies, because a step donates the weights and the average
        return AverageState(jnp.int32(0), jax.tree.map(jnp.copy, params))

    def update(updates, state, params):
        count = optax.safe_increment(state.count)
        weight = (decay - 1) / jnp.expm1(count * log)  # (1 - decay) / (1 - decay^t), also for decays near 1
        weights = optax.apply_updates(params, updates)
        # (1 - weight) * a + weight * p would scale the average by the rounding error of 1 - weight
        average = jax.tree.map(lambda a, p: a + weight * (p - a), state.average, weights)
        return updates, AverageState(count, average)

    return optax.GradientTransformation(init, update)


@functools.cache
def optimizer(config: OptimConfig, steps: int = 0) -> optax.GradientTransformation:
    """Build the optimizer: gradient clipping, then AdamW or Muon, then the average of the weights if one is kept.

    Args:
        config: as for `schedule`.
        steps: as for `schedule`.

    Returns:
        The optax transformation.

    Source: Loshchilov and Hutter 2019, "Decoupled weight decay regularization"; for Muon, see `jaxgpt.muon`.
    """
    return optimizer_of(config, numbers(config, steps))


def optimizer_of(config: OptimConfig, n: Numbers) -> optax.GradientTransformation:
    """Build the optimizer, as `optimizer` does, from numbers that may be arrays; the settings only choose its parts."""
    clip = optax.clip_by_global_norm(n.grad_clip) if config.grad_clip else optax.identity()
    rate = schedule_of(config.schedule, n)
    adamw = optax.adamw(rate, b1=n.beta1, b2=n.beta2, weight_decay=n.weight_decay, mask=decay_mask)
    parts = [clip, *(_with_muon(n, rate, adamw) if config.optimizer == "muon" else [adamw])]
    if config.ema_decay:
        parts.append(average_weights(n.ema_decay))
    return optax.chain(*parts)


def _with_muon(n: Numbers, rate: optax.Schedule, adamw: optax.GradientTransformation) -> list:
    """Muon for the parameters that it takes, and AdamW for the others; each state has the moments of its own."""

    def others(params):
        return jax.tree.map(operator.not_, muon.mask(params))

    for_matrices = muon.muon(lambda step: n.muon_factor * rate(step), n.muon_momentum, n.weight_decay)
    return [optax.masked(for_matrices, muon.mask), optax.masked(adamw, others)]
