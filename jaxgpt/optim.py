"""AdamW, the learning rate schedule, the decay mask, and the average of the weights."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxgpt.errors import ArgumentError
from jaxgpt.settings.checks import check_fields


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay; all counts are in optimizer steps."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    min_learning_rate: float = 1e-4
    """Learning rate after the cosine decay; set it to learning_rate for a constant rate."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    decay_steps: int = 0
    """Step at which the cosine decay ends; 0 = train.steps."""
    weight_decay: float = 0.1
    """AdamW's weight decay, applied to matrices and tables only."""
    beta1: float = 0.9
    """Decay rate of the first moment."""
    beta2: float = 0.99
    """Decay rate of the second moment."""
    grad_clip: float = 1.0
    """Maximum global norm of the gradient; 0 = no clipping."""
    grad_accumulation: int = 1
    """Batches per step, whose gradients are averaged."""
    ema_decay: float = 0.0
    """Evaluate, sample and export an exponential moving average of the weights, over about 1 / (1 - ema_decay) steps;
    0 = the weights themselves. Training goes on from the weights themselves."""

    def __post_init__(self):
        check_fields(self)
        minimums = {"min_learning_rate": 0, "warmup_steps": 0, "decay_steps": 0, "weight_decay": 0, "grad_clip": 0}
        for name, bound in {**minimums, "grad_accumulation": 1}.items():
            if not getattr(self, name) >= bound:
                raise ArgumentError(f"{name} is {getattr(self, name)}: use {bound} or more")
        if not self.learning_rate > 0:
            raise ArgumentError(f"learning_rate is {self.learning_rate}: use a number above 0")
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ArgumentError(f"{name} is {getattr(self, name)}: use a number from 0 up to but not including 1")


@functools.cache  # one object per config, so that a second train() in the same process reuses the compiled step
def schedule(config: OptimConfig, steps: int = 0) -> optax.Schedule:
    """Build the learning rate schedule: linear warm-up, cosine decay, then constant.

    Args:
        config: the settings.
        steps: of the whole run; the cosine decay ends there if decay_steps is 0.

    Returns:
        A function from the step, counted from 0, to the learning rate.

    Raises:
        ArgumentError: the final rate is above the peak rate.

    Source: nanoGPT's get_lr, with warm-up counted from 1 so that the first step changes the parameters.
    """
    if config.min_learning_rate > config.learning_rate:
        raise ArgumentError(
            f"min_learning_rate {config.min_learning_rate} is above learning_rate {config.learning_rate} (optim): "
            "lower it; for a constant rate, set both to the same value"
        )
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (config.warmup_steps + 1),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(config.decay_steps or steps, config.warmup_steps + 1),
        end_value=config.min_learning_rate,
    )


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
    the first weights. If a run is continued with another decay, it is still a mean of weights.

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
        share = (decay - 1) / jnp.expm1(count * math.log(decay))  # (1 - decay) / (1 - decay^t), also for decays near 1
        weights = optax.apply_updates(params, updates)
        # not (1 - share) * a + share * p: what 1 - share is rounded by would scale the average
        average = jax.tree.map(lambda a, p: a + share * (p - a), state.average, weights)
        return updates, AverageState(count, average)

    return optax.GradientTransformation(init, update)


@functools.cache
def optimizer(config: OptimConfig, steps: int = 0) -> optax.GradientTransformation:
    """Build the optimizer: gradient clipping, then AdamW, then the average of the weights if there is to be one.

    Args:
        config: as for `schedule`.
        steps: as for `schedule`.

    Returns:
        The optax transformation.

    Source: Loshchilov and Hutter 2019, "Decoupled weight decay regularization".
    """
    clip = optax.clip_by_global_norm(config.grad_clip) if config.grad_clip else optax.identity()
    update = optax.adamw(
        schedule(config, steps), b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay, mask=decay_mask
    )
    parts = [clip, update]
    if config.ema_decay:
        parts.append(average_weights(config.ema_decay))
    return optax.chain(*parts)
