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


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate, which begins with a linear warm-up; all counts are in optimizer steps."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    min_learning_rate: float = 1e-4
    """Learning rate after the decay; 0 for a schedule to 0."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    decay_steps: int = 0
    """Step at which the decay ends; 0 = train.steps."""
    weight_decay: float = 0.1
    """Decoupled weight decay, applied to matrices and tables only."""
    beta1: float = 0.9
    """Decay rate of AdamW's first moment."""
    beta2: float = 0.99
    """Decay rate of AdamW's second moment."""
    grad_clip: float = 1.0
    """Maximum global norm of the gradient; 0 = no clipping."""
    grad_accumulation: int = 1
    """Batches per step, whose gradients are averaged."""
    ema_decay: float = 0.0
    """Evaluate, sample and export an exponential moving average of the weights, over about 1 / (1 - ema_decay) steps;
    0 = the weights themselves. Training goes on from the weights themselves."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Update rule: AdamW; or Muon for the matrices of the blocks, and AdamW for all else."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Learning rate after the warm-up: a cosine or a line down to min_learning_rate; wsd, the peak and then a line down
    during the last decay_fraction of the steps (warm-up, stable, decay); or constant, always the peak."""
    decay_fraction: float = 0.7
    """Fraction of all steps, at the end of the run, during which the rate of schedule wsd falls; 1 = linear."""
    muon_learning_rate: float = 0.0
    """Peak learning rate of Muon, whose minimum is scaled with it; 0 = learning_rate."""
    muon_momentum: float = 0.95
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


@functools.cache  # one object per config, so that a second train() in the same process reuses the compiled step
def schedule(config: OptimConfig, steps: int = 0) -> optax.Schedule:
    """Build the learning rate schedule: linear warm-up, then what `OptimConfig.schedule` says, then constant.

    Args:
        config: the settings.
        steps: of the whole run; the decay ends there if decay_steps is 0.

    Returns:
        A function from the step, counted from 0, to the learning rate.

    Raises:
        ArgumentError: the final rate is above the peak rate.

    Source: nanoGPT's get_lr, with warm-up counted from 1 so that the first step changes the parameters; for wsd, Hu et
    al. 2024, "MiniCPM", section 4.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    floor = peak if config.schedule == "constant" else config.min_learning_rate
    if floor > peak:
        raise ArgumentError(
            f"min_learning_rate {floor} is above learning_rate {peak} (optim): "
            "lower it; for a constant rate, use --optim.schedule constant"
        )
    end = max(config.decay_steps or steps, warmup + 1)
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(peak / (warmup + 1), peak, warmup, decay_steps=end, end_value=floor)
    falling = min(end - warmup, end * config.decay_fraction if config.schedule == "wsd" else end)

    def rate(step):
        warm = jnp.minimum((step + 1) / (warmup + 1), 1)
        return warm * (peak - (peak - floor) * jnp.clip(1 - (end - step) / falling, 0, 1))

    return rate


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


def average_weights(decay: float) -> optax.GradientTransformation:
    """Build the last part of an optimizer, which keeps an exponential moving average of the weights.

    After t updates the average is sum_i (1 - decay) decay^(t - i) p_i / (1 - decay^t), where p_i are the weights after
    update i: like Adam's moments, it is corrected so that the first weights do not count. Before the first update it is
    the first weights. After a change of the decay it is still a weighted mean of earlier weights.

    Args:
        decay: above 0 and below 1.

    Returns:
        A transformation that leaves the updates as they are.

    Source: Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging"; Kingma and Ba 2015,
    "Adam", section 7.2.
    """

    def init(params):
        # copies, because a step donates the weights and the average
        return AverageState(jnp.int32(0), jax.tree.map(jnp.copy, params))

    def update(updates, state, params):
        count = optax.safe_increment(state.count)
        weight = (decay - 1) / jnp.expm1(count * math.log(decay))  # (1 - decay) / (1 - decay^t), also for decays near 1
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
    clip = optax.clip_by_global_norm(config.grad_clip) if config.grad_clip else optax.identity()
    rate = schedule(config, steps)
    adamw = optax.adamw(rate, b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay, mask=decay_mask)
    parts = [clip, *(_with_muon(config, rate, adamw) if config.optimizer == "muon" else [adamw])]
    if config.ema_decay:
        parts.append(average_weights(config.ema_decay))
    return optax.chain(*parts)


def _with_muon(config: OptimConfig, rate: optax.Schedule, adamw: optax.GradientTransformation) -> list:
    """Muon for the parameters that it takes, and AdamW for the others; each state has the moments of its own."""
    factor = config.muon_learning_rate / config.learning_rate or 1.0

    def others(params):
        return jax.tree.map(operator.not_, muon.mask(params))

    for_matrices = muon.muon(lambda step: factor * rate(step), config.muon_momentum, config.weight_decay)
    return [optax.masked(for_matrices, muon.mask), optax.masked(adamw, others)]
