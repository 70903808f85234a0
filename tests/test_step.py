import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxgpt import data, init, optim, step
from jaxgpt.config import ConfigError, load_config
from jaxgpt.model import GPTConfig
from jaxgpt.step import StepSpec, TrainState
from jaxgpt.training import resolve

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 65, 500), jnp.uint8)


def make(grad_accumulation=1, dropout=0.0, dtype="float32", **optim_fields):
    config = GPTConfig(vocab_size=65, block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=dropout)
    model = first_model(config)
    optim_config = optim.OptimConfig(warmup_steps=0, decay_steps=100, **optim_fields)
    tx, schedule = optim.optimizer(optim_config), optim.schedule(optim_config)
    spec = StepSpec(nnx.graphdef(model), tx, schedule, grad_accumulation, jnp.dtype(dtype))
    return spec, jax.tree.map(jnp.copy, step.init_state(step.params_of(model), tx))  # a step donates what it is given


@functools.cache
def first_model(config):
    return init.init_model(config, seed=0)


def run(spec, state, n, tokens=TOKENS, seed=0, rows=4, count=None):
    """Some steps on the windows that they draw themselves from the tokens."""
    steps = int(state.step) + jnp.arange(n)
    windows = data.windows(step.stream_key(seed, step.TRAIN), tokens, steps, rows, 8)
    return step.train_steps(state, windows, jax.random.key(seed), None, count, spec=spec)


def test_metrics_have_one_float32_a_step_and_the_state_counts_them():
    state, metrics = run(*make(), n=3)
    assert metrics.keys() == {"loss", "learning_rate", "grad_norm"}
    chex.assert_shape(list(metrics.values()), (3,))
    chex.assert_type(list(metrics.values()), jnp.float32)
    assert int(state.step) == 3
    chex.assert_type(jax.tree.leaves(state.params), jnp.float32)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_an_update_that_is_not_finite_is_not_applied(ema_decay):
    spec, state = make(learning_rate=1e30, grad_clip=0.0, ema_decay=ema_decay)
    with jax.debug_nans(False):
        state, first = run(spec, state, n=1)
        before = jax.device_get(state)
        state, later = run(spec, state, n=3)
    assert np.isfinite(first["loss"]).all() and not np.isfinite(later["loss"]).any()
    chex.assert_trees_all_equal(jax.device_get((state.params, state.opt_state)), (before.params, before.opt_state))
    assert int(state.step) == 4


@pytest.mark.parametrize("parts", [1, 2])
def test_the_average_is_over_the_weights_after_each_step_and_does_not_change_them(parts):
    spec, state = make(parts, learning_rate=0.1, ema_decay=0.8)
    plain_spec, plain = make(parts, learning_rate=0.1)
    assert step.averaged(state) is not state.params
    chex.assert_trees_all_equal(step.averaged(state), state.params)
    weights = []
    for _ in range(5):
        state, _ = run(spec, state, n=1, rows=8)
        plain, _ = run(plain_spec, plain, n=1, rows=8)
        weights.append(jax.device_get(state.params))
    counts = [0.2 * 0.8 ** (5 - i) / (1 - 0.8**5) for i in range(1, 6)]
    expected = jax.tree.map(lambda *each: np.tensordot(counts, np.float64(each), 1), *weights)
    chex.assert_trees_all_close(step.averaged(state), expected, rtol=1e-5, atol=1e-6)  # float32 against float64
    chex.assert_trees_all_close(state.params, plain.params, rtol=1e-5, atol=1e-5)  # fused in another way
    assert step.averaged(plain) is plain.params


def test_all_finite_sees_one_value_in_a_tree():
    tree = {"a": jnp.ones((3, 4)), "count": jnp.int32(3), "b": [jnp.zeros(5)]}
    assert bool(step.all_finite(tree))
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        with jax.debug_nans(False):
            assert not bool(step.all_finite(tree | {"b": [jnp.zeros(5).at[2].set(bad)]}))


def test_loss_of_a_step_is_the_cross_entropy_of_its_batch():
    spec, state = make()
    (windows,) = data.windows(step.stream_key(0, step.TRAIN), TOKENS, jnp.arange(1), 4, 8)
    inputs, targets = data.inputs_and_targets(windows)
    logits = np.asarray(step.build(spec, state.params)(inputs), np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    expected = np.mean(log_z - np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0])
    _, metrics = run(spec, state, n=3)
    assert float(metrics["loss"][0]) == pytest.approx(expected, rel=1e-6)


def test_accumulating_gradients_equals_one_large_batch():
    (large, metrics), (parts, metrics_of_parts) = (run(*make(parts), n=1, rows=8) for parts in (1, 4))
    chex.assert_trees_all_close(metrics, metrics_of_parts, rtol=1e-5)
    # the first moment is a tenth of the gradient; the same sums in another order
    ours, theirs = (optax.tree.get(state.opt_state, "mu") for state in (parts, large))
    chex.assert_trees_all_close(ours, theirs, atol=1e-8, rtol=1e-4)


@pytest.mark.full
def test_the_same_steps_come_out_however_they_are_cut_into_calls():
    spec, state = make(dropout=0.5)
    whole, metrics = run(spec, state, n=4)
    for counts in ((2, 2), (1, 3), (4,)):
        _, state = make(dropout=0.5)
        losses = []
        for count in counts:
            state, some = run(spec, state, n=4, count=np.int32(count))
            losses += some["loss"][:count].tolist()
            assert all((each[count:] == 0).all() and each.shape == (4,) for each in some.values())
        assert int(state.step) == 4 and losses == metrics["loss"].tolist()
        chex.assert_trees_all_equal(whole, state)


def test_seed_and_step_change_batch_and_dropout():
    spec, _ = make(dropout=0.5)

    def loss(at, seed, tokens=TOKENS):
        fresh = make(dropout=0.5)[1]
        state = TrainState(jnp.int32(at), fresh.params, fresh.opt_state)
        return float(run(spec, state, 1, tokens, seed)[1]["loss"][0])

    assert loss(0, 0) == loss(0, 0)
    assert len({loss(0, 0), loss(1, 0), loss(0, 1)}) == 3
    only_window = jnp.zeros(9, jnp.uint8)  # no other batch can be drawn: what differs between steps is dropout
    assert loss(0, 0, only_window) != loss(1, 0, only_window)


@pytest.mark.full
def test_one_batch_can_be_learned_by_heart():
    spec, state = make(learning_rate=1e-2, min_learning_rate=1e-2, weight_decay=0.0)
    _, metrics = run(spec, state, n=200, tokens=TOKENS[:9], rows=1)
    assert metrics["loss"][0] > 0.9 * math.log(65)
    assert metrics["loss"][-1] < 0.02


def test_other_weights_windows_and_keys_trace_the_step_once(monkeypatch):
    traced, train_step = [], step.train_step
    monkeypatch.setattr(step, "train_step", lambda *args: traced.append(1) or train_step(*args))
    spec, state = make(beta1=0.8)  # a spec that no other test compiles
    for seed in range(3):
        state, _ = run(spec, state, n=2, seed=seed)
    assert int(state.step) == 6 and len(traced) == 1
    state, _ = run(spec, state, n=3)  # another number of windows is another program
    assert len(traced) == 2
    for count in (1, 2):
        state, _ = run(spec, state, n=3, count=np.int32(count))
    assert int(state.step) == 12 and len(traced) == 3


@pytest.mark.skipif(jax.config.jax_debug_nans, reason="jax keeps donated arrays to find the NaN")
def test_the_old_state_is_donated():
    spec, state = make()
    run(spec, state, n=3)
    assert state.params["lm_head"]["kernel"].is_deleted()


@pytest.mark.full
def test_bfloat16_trains_like_float32_with_float32_parameters():
    states, losses = zip(*(run(*make(dtype=dtype), n=20) for dtype in ("bfloat16", "float32")))
    chex.assert_type(jax.tree.leaves(states[0].params), jnp.float32)
    np.testing.assert_allclose(losses[0]["loss"], losses[1]["loss"], rtol=0.01)  # 8 bits of mantissa
    assert (losses[0]["loss"] != losses[1]["loss"]).any()


@pytest.mark.parametrize("n", [9, 64, 500])
def test_evaluation_is_the_mean_over_all_tokens_but_the_first(n):
    model = init.init_model(GPTConfig(vocab_size=65, block_size=8, n_layer=1, n_head=2, n_embd=16), seed=3)
    tokens = np.asarray(TOKENS[:n], np.int32)
    chex.assert_shape(step.token_losses(model, tokens[None, :8], tokens[None, 1:9]), (1, 8))
    losses, nats = jax.jit(step.token_losses), []
    for start in range(0, n - 1, 8):
        window = tokens[None, start : start + 9]
        nats += np.asarray(losses(model, window[:, :-1], window[:, 1:]))[0].tolist()
    assert len(nats) == n - 1
    assert step.evaluate(model, TOKENS[:n], batch_size=3) == pytest.approx(np.mean(nats), rel=1e-6)


def test_the_quick_estimate_agrees_with_the_whole_split():
    spec, state = make()
    estimate = step.estimate_loss(
        state.params, data.windows(jax.random.key(0), TOKENS, jnp.arange(20), 16, 8), spec=spec
    )
    chex.assert_shape(estimate, ())
    assert float(estimate) == pytest.approx(step.evaluate(step.build(spec, state.params), TOKENS), abs=0.02)


def test_inputs_and_targets_must_have_one_shape():
    spec, state = make()
    with pytest.raises(AssertionError):
        step.token_losses(step.build(spec, state.params), jnp.zeros((2, 8), jnp.int32), jnp.zeros((2, 7), jnp.int32))


def gradients(vocab_size, loss_chunks=1, **fields):
    """Loss and gradients of one batch, and the numbers that the forward pass keeps for the backward pass."""
    config = GPTConfig(vocab_size, block_size=128, n_layer=2, n_head=2, n_embd=16, dropout=0.1, **fields)
    graphdef, params = nnx.split(init.init_model(config, seed=0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, vocab_size, (8, 129)))

    def loss(params):
        model, rngs = nnx.merge(graphdef, params), nnx.Rngs(dropout=jax.random.key(1))
        return step.token_losses(model, *data.inputs_and_targets(tokens), rngs, loss_chunks).mean()

    kept = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
    return jax.jit(jax.value_and_grad(loss))(params), sum(leaf.size for leaf in jax.tree.leaves(kept))


@pytest.mark.full
def test_a_loss_in_chunks_is_the_same_in_less_memory():
    plain, most = gradients(vocab_size=2048)
    chunked, least = gradients(vocab_size=2048, loss_chunks=8)
    chex.assert_trees_all_close(plain, chunked, rtol=1e-5, atol=1e-7)  # float32, other sums
    assert least < most - 8 * 128 * 2048  # the logits


@pytest.mark.full
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_computes_the_same_with_the_same_dropout_in_less_memory(remat):
    plain, most = gradients(vocab_size=64)
    again, least = gradients(vocab_size=64, remat=remat)
    chex.assert_trees_all_close(plain, again, rtol=1e-5, atol=1e-7)  # float32, fused in another way
    assert least < most


def test_chunks_that_do_not_divide_the_windows_are_refused():
    with pytest.raises(ConfigError, match=r"loss_chunks 3 does not divide block_size 64.*use a divisor"):
        resolve(load_config(["--train.loss_chunks", "3"]), 65)
