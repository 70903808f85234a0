"""The training state, the jitted step and the evaluation: pure functions of state, tokens and key."""

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxgpt import data
from jaxgpt.devices import sharding
from jaxgpt.model import GPT

# one PRNG stream a purpose, so that no key is used twice
INIT, TRAIN, VAL, ESTIMATE, DROPOUT, SAMPLE = range(6)


@partial(jax.tree_util.register_dataclass, data_fields=["step", "params", "opt_state"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes: `step` () int32, the float32 parameters as a nested dict, optax's state."""

    step: jax.Array
    params: dict[str, Any]
    opt_state: optax.OptState


class StepSpec(NamedTuple):
    """What the compiled functions are specialised for: all that is static in them."""

    graphdef: nnx.GraphDef
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    grad_accumulation: int
    dtype: jnp.dtype
    loss_chunks: int = 1
    per_device_gradients: bool = False  # each device differentiates its own part: sharding.mean_over_devices


def stream_key(seed: int, stream: int) -> jax.Array:
    """The typed PRNG key of one purpose."""
    return jax.random.fold_in(jax.random.key(seed), stream)


def params_of(model: nnx.Module) -> dict[str, Any]:
    """The parameters as a nested dict, as TrainState and checkpoints have them."""
    return nnx.to_pure_dict(nnx.state(model))


def init_state(params: dict[str, Any], tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.int32(0), params, tx.init(params))


def build(spec: StepSpec, params: dict[str, Any]) -> GPT:
    """The model with these parameters, in the type to compute in."""
    params = jax.tree.map(lambda p: p.astype(spec.dtype), params)
    return nnx.merge(spec.graphdef, sharding.for_compute(params))


@partial(jax.jit, static_argnames="spec")
def cast(params: dict[str, Any], spec: StepSpec) -> GPT:
    """`build` in a call of its own, for what is done with the model outside of a step."""
    return build(spec, params)


def token_losses(
    model: GPT, inputs: jax.Array, targets: jax.Array, rngs: nnx.Rngs | None = None, chunks: int = 1
) -> jax.Array:
    """Cross-entropy of each token, in nats.

    Args:
        model: in the type to compute in.
        inputs: (B, T) integers.
        targets: (B, T) integers.
        rngs: the source of the dropout masks; None switches dropout off.
        chunks: pieces of the windows, a divisor of T. The (B, T, V) logits of a piece exist only while it is computed,
            in the backward pass once more.

    Returns:
        (B, T) float32.
    """
    chex.assert_equal_shape([inputs, targets])
    x, _ = model.hidden(inputs, rngs=rngs)

    def losses(x, targets):
        return optax.softmax_cross_entropy_with_integer_labels(model.logits(x), targets)

    if chunks == 1:
        return losses(x, targets)
    pieces = (jnp.stack(jnp.split(a, chunks, axis=1)) for a in (x, targets))
    found = jax.lax.map(lambda piece: jax.checkpoint(losses)(*piece), tuple(pieces))
    return jnp.concatenate(list(found), axis=1)


def loss_and_gradient(params: dict[str, Any], batch: tuple[jax.Array, jax.Array], key: jax.Array, spec: StepSpec):
    """The mean loss over a batch, () float32, and its gradient: in grad_accumulation parts, one after the other.

    Args:
        params: float32.
        batch: inputs and targets, each (grad_accumulation * B, T) integers.
        key: for dropout.
        spec: static.
    """
    parts = spec.grad_accumulation

    def loss_of(params, part, inputs, targets):
        rngs = nnx.Rngs(dropout=jax.random.fold_in(key, part))
        return token_losses(build(spec, params), inputs, targets, rngs, spec.loss_chunks).mean()

    def add_part(total, part):
        mine = jax.value_and_grad(loss_of)(params, *part)
        return jax.tree.map(jnp.add, total, mine), None

    cut = [jnp.arange(parts), *(a.reshape(parts, -1, a.shape[-1]) for a in batch)]
    if parts == 1:
        return jax.value_and_grad(loss_of)(params, *(a[0] for a in cut))
    zero = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
    return jax.tree.map(lambda a: a / parts, jax.lax.scan(add_part, zero, cut)[0])


def train_step(state: TrainState, batch: tuple[jax.Array, jax.Array], key: jax.Array, spec: StepSpec):
    """One optimizer step; where loss or gradient is not finite, parameters and moments stay as they are.

    Args:
        state: before the step.
        batch: inputs and targets, each (grad_accumulation * B, T) integers.
        key: the run's key; dropout is a function of it and of state.step.
        spec: static.

    Returns:
        The state after the step; `loss` before the update, `learning_rate` and `grad_norm` before clipping, () float32.
    """
    dropout_key = jax.random.fold_in(jax.random.fold_in(key, DROPOUT), state.step)
    differentiate = partial(loss_and_gradient, spec=spec)
    if spec.per_device_gradients:
        differentiate = sharding.mean_over_devices(differentiate)
    loss, grads = differentiate(state.params, batch, dropout_key)
    norm = optax.tree.norm(grads)

    def update(params, opt_state):
        updates, opt_state = spec.tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    finite, old = jnp.isfinite(loss + norm), (state.params, state.opt_state)
    if spec.per_device_gradients:  # on a CPU, where this halves the time to compile; a GPU would have to ask its host
        new = jax.lax.cond(finite, update, lambda *old: old, *old)
    else:
        new = jax.tree.map(partial(jnp.where, finite), update(*old), old)
    params, opt_state = sharding.pin(new)
    measured = {"loss": loss, "learning_rate": spec.schedule(state.step), "grad_norm": norm}
    return TrainState(state.step + 1, params, opt_state), measured


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether there is neither NaN nor infinity in the floating arrays of a tree, () bool."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.array([jnp.isfinite(leaf).all() for leaf in floats]).all()


@partial(jax.jit, static_argnames="spec", donate_argnames="state")
def train_steps(state: TrainState, windows: jax.Array, key: jax.Array, *, spec: StepSpec):
    """Some steps in one call.

    Args:
        state: before the steps; its memory is taken over.
        windows: (n, grad_accumulation * B, T + 1) unsigned integers, the batch of each step.
        key: the run's key.
        spec: static.

    Returns:
        The state after the steps, and each metric of `train_step` as (n,) float32.
    """

    def one(state, windows):
        return train_step(state, data.inputs_and_targets(windows), key, spec)

    return jax.lax.scan(one, state, windows)


@partial(jax.jit, static_argnames="spec")
def estimate_loss(params: dict[str, Any], windows: jax.Array, *, spec: StepSpec) -> jax.Array:
    """Mean loss () float32 over some batches, the same ones each time: quick, for watching.

    Args:
        params: float32.
        windows: (n, B, T + 1) integers.
        spec: static.
    """
    model = build(spec, params)

    def loss(windows):
        return token_losses(model, *data.inputs_and_targets(windows), chunks=spec.loss_chunks).mean()

    return jax.lax.map(loss, windows).mean()


@partial(jax.jit, static_argnames=("batch_size", "chunks"))
def _sums(model: GPT, tokens: jax.Array, batch_size: int, chunks: int) -> jax.Array:
    T = model.config.block_size

    def nats(i):
        inputs, targets, real = data.consecutive_batch(tokens, i, batch_size, T)
        return jnp.sum(token_losses(model, inputs, targets, chunks=chunks), where=real)

    return jax.lax.map(nats, jnp.arange(data.consecutive_batches(len(tokens), batch_size, T)))


def evaluate(model: GPT, tokens: jax.Array | Iterable[jax.Array], batch_size: int = 64, chunks: int = 1) -> float:
    """Mean loss over a whole split, in nats a token: the number to quote.

    Args:
        model: in the type to compute in.
        tokens: (N,) integers, or several such pieces; all but the first of a piece are predicted once, in consecutive
            windows of block_size.
        batch_size: windows at a time.
        chunks: pieces of the windows in which head and loss are computed.
    """
    nats, count = 0.0, 0
    for piece in [tokens] if isinstance(tokens, jax.Array | np.ndarray) else tokens:
        nats += np.sum(np.asarray(_sums(model, jnp.asarray(piece), batch_size, chunks), np.float64))
        count += len(piece) - 1
    return float(nats / count)
