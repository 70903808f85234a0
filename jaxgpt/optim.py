"""AdamW, its schedule and what it decays."""

import dataclasses
import functools

import jax
import optax

from jaxgpt.errors import ArgumentError


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with warm-up and cosine decay; all counts in optimizer steps."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    min_learning_rate: float = 1e-4
    """Learning rate after the decay; equal to learning_rate for a constant one."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    decay_steps: int = 0
    """Step at which the cosine ends; 0 = train.steps."""
    weight_decay: float = 0.1
    """AdamW's decay, on matrices and tables only."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.99
    """Decay of the second moment."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient; 0 = no clipping."""
    grad_accumulation: int = 1
    """Batches whose gradients are averaged for one step."""

    def __post_init__(self):
        least = {"min_learning_rate": 0, "warmup_steps": 0, "decay_steps": 0, "weight_decay": 0, "grad_clip": 0}
        for name, bound in {**least, "grad_accumulation": 1}.items():
            if not getattr(self, name) >= bound:
                raise ArgumentError(f"{name} is {getattr(self, name)}: use {bound} or more")
        if not self.learning_rate > 0:
            raise ArgumentError(f"learning_rate is {self.learning_rate}: use a number above 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ArgumentError(f"{name} is {getattr(self, name)}: use a number from 0 up to but not including 1")


@functools.cache  # the same one for the same config: a second train() of a process finds its step compiled
def schedule(config: OptimConfig) -> optax.Schedule:
    """The learning rate of a step (from 0): linear warm-up, cosine decay, then constant.

    Source: nanoGPT's get_lr, warm-up counted from 1 so that the first step moves.
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (config.warmup_steps + 1),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(config.decay_steps, config.warmup_steps + 1),
        end_value=config.min_learning_rate,
    )


def decay_mask(params) -> dict:
    """True for matrices and tables, False for biases and norms; the same tree as `params`."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)


@functools.cache
def optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Clip, then AdamW. Source: Loshchilov and Hutter 2019, "Decoupled weight decay regularization"."""
    adamw = optax.adamw(
        schedule(config), b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay, mask=decay_mask
    )
    return optax.chain(optax.clip_by_global_norm(config.grad_clip) if config.grad_clip else optax.identity(), adamw)
