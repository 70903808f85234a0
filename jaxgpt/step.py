"""The training state, the jitted train step and the evaluation, as pure functions of state, tokens and key."""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxgpt import data
from jaxgpt.devices import sharding
from jaxgpt.devices.keys import Keys
from jaxgpt.model import GPT

# one PRNG stream per purpose, so that no key is used twice
INIT, TRAIN, VAL, ESTIMATE, DROPOUT, SAMPLE = range(6)
METRICS = "loss", "learning_rate", "grad_norm"


@partial(jax.tree_util.register_dataclass, data_fields=["step", "params", "opt_state"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes: `step` () int32, a nested dict of float32 parameters, and optax's state.

    The parameters are those that are trained: all, or with LoRA the adapters.
    """

    step: jax.Array
    params: dict[str, Any]
    opt_state: optax.OptState


class StepSpec(NamedTuple):
    """The static arguments of the compiled functions."""

    graphdef: nnx.GraphDef
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    grad_accumulation: int
    dtype: jnp.dtype
    loss_chunks: int = 1
    per_device_gradients: bool = False  # of each device's part of the batch: sharding.mean_over_devices


def stream_key(seed: int, stream: int) -> jax.Array:
    """Derive the key of one PRNG stream.

    Args:
        seed: of the run.
        stream: one of the constants above, such as INIT.

    Returns:
        () typed PRNG key.
    """
    return jax.random.fold_in(jax.random.key(seed), stream)


def params_of(model: nnx.Module) -> dict[str, Any]:
    """Extract the parameters of a model.

    Args:
        model: a GPT or one of its modules.

    Returns:
        A nested dict of arrays, the form used by TrainState and by checkpoints.
    """
    return nnx.to_pure_dict(nnx.state(model))


def trained_of(model: nnx.Module) -> dict[str, Any]:
    """Extract the parameters that a step changes: the adapters if the model has any, else all; see `params_of`."""
    return nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam)) or params_of(model)


def combined(params: dict[str, Any], frozen: dict[str, Any] | None) -> dict[str, Any]:
    """Join the adapters of a model and its frozen parameters.

    Args:
        params: nested dict of the parameters that are trained.
        frozen: nested dict of the others; None if there are none.

    Returns:
        The nested dict of all.
    """
    return params if frozen is None else unflatten_dict(flatten_dict(frozen) | flatten_dict(params))


def init_state(params: dict[str, Any], tx: optax.GradientTransformation) -> TrainState:
    """Make the state before the first step.

    Args:
        params: nested dict of float32 parameters.
        tx: the optimizer.

    Returns:
        The state at step 0.
    """
    return TrainState(jnp.int32(0), params, tx.init(params))


def averaged(state: TrainState) -> dict[str, Any]:
    """Return the weights to evaluate, sample and export: their average if the optimizer keeps one, else the weights.

    Args:
        state: before, between or after steps.

    Returns:
        A nested dict of float32 parameters; the next step takes over their buffers.
    """
    return optax.tree.get(state.opt_state, "average", state.params)


def build(spec: StepSpec, params: dict[str, Any]) -> GPT:
    """Assemble the model for training: its activations have the compute dtype.

    The parameters stay float32, so that their gradients, sums over tokens, parts and devices, are float32 too. Matrices
    are rounded where they are multiplied, and before devices send them to each other.

    Args:
        spec: static; gives the model's structure and the compute dtype.
        params: nested dict of float32 parameters.

    Returns:
        The model.
    """
    model = nnx.merge(spec.graphdef, sharding.for_compute(params, spec.dtype))
    model.dtype = spec.dtype
    return model


@partial(jax.jit, static_argnames="spec")
def cast(params: dict[str, Any], spec: StepSpec) -> GPT:
    """Assemble the model for evaluation and sampling: no gradients are needed, so all parameters are rounded once.

    Args:
        params: nested dict of float32 parameters.
        spec: static.

    Returns:
        The model, whose parameters have the compute dtype.
    """
    params = jax.tree.map(lambda p: p.astype(spec.dtype), params)
    return nnx.merge(spec.graphdef, sharding.for_compute(params))


def token_losses(
    model: GPT,
    inputs: jax.Array,
    targets: jax.Array,
    rngs: nnx.Rngs | None = None,
    chunks: int = 1,
    documents: jax.Array | None = None,
) -> jax.Array:
    """Compute the cross-entropy of each token.

    Args:
        model: in the compute dtype.
        inputs: (B, T) integers.
        targets: (B, T) integers.
        rngs: source of the dropout masks; None switches dropout off.
        chunks: number of pieces into which T is divided, a divisor of T. Only one piece's logits are in memory at a
            time; the backward pass recomputes them.
        documents: (B, T) integers; a token sees only tokens of its own document. None = all are of the same one.

    Returns:
        (B, T) float32 losses in nats.
    """
    chex.assert_equal_shape([inputs, targets])
    x, _ = model.hidden(inputs, documents=documents, rngs=rngs)

    def losses(x, targets):
        return optax.softmax_cross_entropy_with_integer_labels(model.logits(x, padded=True), targets)

    if chunks == 1:
        return losses(x, targets)
    pieces = (jnp.stack(jnp.split(a, chunks, axis=1)) for a in (x, targets))
    per_piece = jax.lax.map(lambda piece: jax.checkpoint(losses)(*piece), tuple(pieces))
    return jnp.concatenate(list(per_piece), axis=1)


def mean_loss(model: GPT, inputs, targets, documents=None, weights=None, *, rngs=None, chunks: int = 1) -> jax.Array:
    """Compute the mean loss of a batch.

    Args:
        model, inputs, targets, documents, rngs, chunks: as for `token_losses`.
        weights: (B, T) float32 of each target, from `data.batch`; None = all are 1.

    Returns:
        () float32 in nats per token.
    """
    losses = token_losses(model, inputs, targets, rngs, chunks, documents)
    return losses.mean() if weights is None else (losses * weights).mean()


def loss_and_gradient(
    params: dict[str, Any], batch: tuple[jax.Array, ...], key: jax.Array, spec: StepSpec, frozen: Any = None
):
    """Compute the mean loss of a step and its gradient; the grad_accumulation parts are computed one by one.

    Args:
        params: nested dict of float32 parameters.
        batch: from `data.batch`: inputs and targets, each (grad_accumulation * B, T) integers, and perhaps more.
        key: typed PRNG key for dropout.
        spec: static.
        frozen: nested dict of the parameters that are not trained; None if all are.

    Returns:
        The loss, () float32 in nats per token, and the gradient, a tree like `params`.
    """
    parts = spec.grad_accumulation

    def loss_of(params, part, *batch):
        rngs = Keys(jax.random.fold_in(key, part))
        return mean_loss(build(spec, combined(params, frozen)), *batch, rngs=rngs, chunks=spec.loss_chunks)

    def add_part(total, part):
        loss_and_grads = jax.value_and_grad(loss_of)(params, *part)
        return jax.tree.map(jnp.add, total, loss_and_grads), None

    stacked = [jnp.arange(parts), *jax.tree.map(lambda a: a.reshape(parts, -1, a.shape[-1]), batch)]
    if parts == 1:
        return jax.value_and_grad(loss_of)(params, *jax.tree.map(lambda a: a[0], stacked))
    zero = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
    return jax.tree.map(lambda a: a / parts, jax.lax.scan(add_part, zero, stacked)[0])


def train_step(state: TrainState, batch: tuple[jax.Array, ...], key: jax.Array, spec: StepSpec, frozen: Any = None):
    """Take one optimizer step; if the loss or the gradient is not finite, parameters and moments stay unchanged.

    Args:
        state: before the step.
        batch: as for `loss_and_gradient`.
        key: typed PRNG key of the run; dropout depends on it and on state.step only.
        spec: static.
        frozen: as for `loss_and_gradient`.

    Returns:
        The state after the step, and a dict of () float32 metrics: `loss` before the update, `learning_rate`, and
        `grad_norm` before clipping.
    """
    dropout_key = jax.random.fold_in(jax.random.fold_in(key, DROPOUT), state.step)

    def differentiate(params, batch, key, frozen):
        return loss_and_gradient(params, batch, key, spec, frozen)

    if spec.per_device_gradients:
        differentiate = sharding.mean_over_devices(differentiate)
    loss, grads = differentiate(state.params, batch, dropout_key, frozen)
    norm = optax.tree.norm(grads)

    def update(params, opt_state):
        updates, opt_state = spec.tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    finite, old = jnp.isfinite(loss + norm), (state.params, state.opt_state)
    if spec.per_device_gradients:  # CPU only: cond halves the compile time there; on a GPU it would wait for the host
        new = jax.lax.cond(finite, update, lambda *old: old, *old)
    else:
        new = jax.tree.map(partial(jnp.where, finite), update(*old), old)
    params, opt_state = sharding.pin(new)
    metrics = dict(zip(METRICS, (loss, spec.schedule(state.step), norm)))
    return TrainState(state.step + 1, params, opt_state), metrics


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Check that no floating-point array of a tree contains a NaN or an infinity.

    Args:
        tree: any pytree of arrays.

    Returns:
        () bool.
    """
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.array([jnp.isfinite(leaf).all() for leaf in floats]).all()


def in_turn(step: Callable, state: TrainState, windows: jax.Array | data.Windows, count: jax.Array | None):
    """Take the steps of `train_steps`, each by `step(state, batch)`, which returns what `train_step` does."""
    n = len(jax.tree.leaves(windows)[0])

    def take(i, carry):
        state, metrics = carry
        state, new = step(state, data.batch(jax.tree.map(lambda a: a[i], windows)))
        return state, {name: metrics[name].at[i].set(new[name]) for name in METRICS}

    none_yet = dict.fromkeys(METRICS, jnp.zeros(n, jnp.float32))
    return jax.lax.fori_loop(0, n if count is None else count, take, (state, none_yet))


@partial(jax.jit, static_argnames="spec", donate_argnames="state")
def train_steps(
    state: TrainState, windows: jax.Array | data.Windows, key: jax.Array, frozen=None, count=None, *, spec: StepSpec
):
    """Take optimizer steps in one compiled call.

    Args:
        state: before the steps; its buffers are donated.
        windows: (n, grad_accumulation * B, T + 1) unsigned integers, or Windows of that shape: those of each step.
        key: typed PRNG key of the run.
        frozen: nested dict of the parameters that are not trained, which are not donated; None if all are.
        count: () int32, take only so many steps, with the first windows; None = n.
        spec: static.

    Returns:
        The state after the steps, and each metric of `train_step` as (n,) float32, 0 for steps not taken.
    """
    state, metrics = in_turn(lambda state, batch: train_step(state, batch, key, spec, frozen), state, windows, count)
    return sharding.pin(state), metrics  # pinned again: the result of the loop is the input of the next call


@partial(jax.jit, static_argnames="spec")
def estimate_loss(params: dict[str, Any], windows: jax.Array | data.Windows, *, spec: StepSpec) -> jax.Array:
    """Estimate the loss of a split from some random windows: a quick value for watching a run.

    Args:
        params: nested dict of float32 parameters.
        windows: (n, B, T + 1) integers, or Windows of that shape; pass the same ones each time to compare estimates.
        spec: static.

    Returns:
        The mean loss of the n batches, () float32 in nats per token.
    """
    model = build(spec, params)

    def loss(windows):
        return mean_loss(model, *data.batch(windows), chunks=spec.loss_chunks)

    return jax.lax.map(loss, windows).mean()


@partial(jax.jit, static_argnames=("batch_size", "chunks"))
def _sums(model: GPT, split: data.Windows, batch_size: int, chunks: int) -> jax.Array:
    """The summed loss of each consecutive batch, (n_batches,) float32 in nats."""
    T = model.config.block_size

    def nats(i):
        inputs, targets, documents, counted = data.consecutive_batch(split, i, batch_size, T)
        return jnp.sum(token_losses(model, inputs, targets, None, chunks, documents), where=counted)

    return jax.lax.map(nats, jnp.arange(data.consecutive_batches(len(split.tokens), batch_size, T)))


def evaluate(
    model: GPT,
    tokens: jax.Array | data.Windows | Iterable[jax.Array | data.Windows],
    batch_size: int = 64,
    chunks: int = 1,
) -> float:
    """Evaluate the model on a whole split: the number to quote.

    Args:
        model: in the compute dtype.
        tokens: (N,) integers, or Windows of that shape, or several such pieces. Consecutive windows predict every token
            of a piece but the first, and but those that do not count (`Windows.counted`), exactly once.
        batch_size: windows per batch, rounded up to a multiple of the devices that share it.
        chunks: as for `token_losses`.

    Returns:
        The mean loss in nats per token.

    Raises:
        DataError: no target counts; for example, each token is a document by itself.
    """
    nats, count, batch_size = 0.0, 0, sharding.whole_batches(batch_size)
    for piece in [tokens] if isinstance(tokens, jax.Array | np.ndarray | data.Windows) else tokens:
        piece = data.Windows.of(piece)
        nats += np.sum(np.asarray(_sums(model, jax.tree.map(jnp.asarray, piece), batch_size, chunks), np.float64))
        count += len(piece.tokens) - 1 if piece.counted is None else int(piece.counted.sum())
    if not count:
        raise data.DataError(
            "nothing to predict (no token that counts follows another one of its document): use --data.documents packed"
        )
    return float(nats / count)
