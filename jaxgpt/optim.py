"""AdamW, the learning rate schedule and the decay mask."""

import dataclasses
import functools

import jax
import optax

from jaxgpt.checks import check_fields
from jaxgpt.errors import ArgumentError


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

    def __post_init__(self):
        check_fields(self)
        minimums = {"min_learning_rate": 0, "warmup_steps": 0, "decay_steps": 0, "weight_decay": 0, "grad_clip": 0}
        for name, bound in {**minimums, "grad_accumulation": 1}.items():
            if not getattr(self, name) >= bound:
                raise ArgumentError(f"{name} is {getattr(self, name)}: use {bound} or more")
        if not self.learning_rate > 0:
            raise ArgumentError(f"learning_rate is {self.learning_rate}: use a number above 0")
        for name in ("beta1", "beta2"):
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


@functools.cache
def optimizer(config: OptimConfig, steps: int = 0) -> optax.GradientTransformation:
    """Build the optimizer: gradient clipping, then AdamW.

    Args:
        config: as for `schedule`.
        steps: as for `schedule`.

    Returns:
        The optax transformation.

    Source: Loshchilov and Hutter 2019, "Decoupled weight decay regularization".
    """
    adamw = optax.adamw(
        schedule(config, steps), b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay, mask=decay_mask
    )
    return optax.chain(optax.clip_by_global_norm(config.grad_clip) if config.grad_clip else optax.identity(), adamw)
