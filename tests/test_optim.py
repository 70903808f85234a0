import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt import optim
from jaxgpt.optim import OptimConfig


def closed_form(name, step, peak, floor, warmup, end, fraction):
    """The learning rate at a step, from the description of the schedule."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if name == "constant":
        return peak
    start = max(warmup, end - fraction * end) if name == "wsd" else warmup
    passed = min(max((step - start) / (end - start), 0), 1)
    return floor + (peak - floor) * (0.5 * (1 + math.cos(math.pi * passed)) if name == "cosine" else 1 - passed)


@pytest.mark.parametrize("warmup, end", [(100, 2000), (0, 50), (1, 3), (40, 50)])
@pytest.mark.parametrize(
    "name, floor, fraction",
    [
        ("cosine", 1e-4, 0.7),
        ("linear", 1e-4, 0.7),
        ("linear", 0.0, 0.7),
        ("wsd", 1e-4, 0.7),
        ("wsd", 0.0, 0.3),
        ("wsd", 0.0, 1.0),
        ("constant", 1e-4, 0.7),
        ("constant", 2e-3, 0.7),  # the floor is not used
    ],
)
def test_each_schedule_is_its_closed_form_at_every_step(name, floor, fraction, warmup, end):
    config = OptimConfig(1e-3, floor, warmup, schedule=name, decay_fraction=fraction)
    steps = np.arange(end + 50)
    expected = [closed_form(name, step, 1e-3, floor, warmup, end, fraction) for step in steps]
    for schedule in (optim.schedule(config, end), optim.schedule(dataclasses.replace(config, decay_steps=end), 7)):
        # float32 against float64: a cosine near its end is a difference of numbers near 1
        np.testing.assert_allclose(schedule(jnp.asarray(steps)), expected, rtol=2e-6, atol=1e-10)
        assert float(schedule(jnp.int32(warmup))) == np.float32(1e-3)


BITS = [(6e-4, 6e-5, 0, 777), (3e-3, 0.0, 1, 2001), (0.1, 0.1, 7, 8)]


@pytest.mark.parametrize(
    "peak, floor, warmup, end",
    [(1e-3, 1e-4, 100, 2000), *(pytest.param(*each, marks=pytest.mark.full) for each in BITS)],
)
def test_the_cosine_keeps_the_bits_of_optax_s(peak, floor, warmup, end):
    steps = jnp.arange(2100)
    before = optax.warmup_cosine_decay_schedule(peak / (warmup + 1), peak, warmup, end, floor)
    now = optim.schedule(OptimConfig(peak, floor, warmup), end)
    np.testing.assert_array_equal(now(steps), before(steps))
    np.testing.assert_array_equal(jax.jit(now)(steps), jax.jit(before)(steps))


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_a_run_shorter_than_its_warm_up_only_warms_up(name):
    schedule = optim.schedule(OptimConfig(1e-3, 1e-4, warmup_steps=100, decay_steps=20, schedule=name))
    np.testing.assert_allclose([schedule(0), schedule(19)], [1e-3 / 101, 2e-2 / 101], rtol=1e-5)


def test_equal_rates_make_the_schedule_constant():
    schedule = optim.schedule(OptimConfig(1e-2, 1e-2, warmup_steps=0, decay_steps=3000))
    np.testing.assert_allclose([schedule(step) for step in (0, 1, 1500, 3000, 5000)], 1e-2, rtol=1e-6)


def test_only_matrices_and_tables_are_decayed():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "scale": jnp.ones(2), "embedding": jnp.ones((3, 2))}
    assert optim.decay_mask(params) == {"kernel": True, "bias": False, "scale": False, "embedding": True}
    tx = optim.optimizer(OptimConfig(1e-1, 1e-1, warmup_steps=0, decay_steps=10, weight_decay=0.5, grad_clip=0))
    zero = {name: jnp.zeros_like(p) for name, p in params.items()}
    after = optax.apply_updates(params, tx.update(zero, tx.init(params), params)[0])
    # no gradient: what changes is lr * decay * parameter
    for name, expected in (("kernel", 0.95), ("embedding", 0.95), ("bias", 1.0), ("scale", 1.0)):
        np.testing.assert_allclose(after[name], expected, rtol=1e-6)


def test_updates_are_those_of_adamw_s_definition():
    """Loshchilov and Hutter 2019, algorithm 2, as a NumPy loop in float64."""
    rate, decay, beta1, beta2, epsilon = 1e-2, 0.3, 0.8, 0.95, 1e-8
    settings = OptimConfig(rate, rate, 0, 10, weight_decay=decay, beta1=beta1, beta2=beta2, grad_clip=0)
    tx, p = optim.optimizer(settings), np.array([[1.0, -2.0]])
    params, m, v = {"kernel": jnp.asarray(p, jnp.float32)}, 0.0, 0.0
    state = tx.init(params)
    for t, g in enumerate(np.array([[[0.5, -1.0]], [[-0.25, 3.0]], [[2.0, 0.1]]]), 1):
        updates, state = tx.update({"kernel": jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        step = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + epsilon)
        p = p - rate * (step + decay * p)
        np.testing.assert_allclose(params["kernel"], p, rtol=1e-5)  # float32 against float64


@pytest.mark.full
@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_the_numbers_of_a_schedule_may_be_arrays(name, warmup):
    n, steps = optim.numbers(OptimConfig(1e-3, 1e-4, warmup, schedule=name), 100), np.arange(120)
    expected = [closed_form(name, step, 1e-3, 1e-4, warmup, 100, 0.7) for step in steps]
    rates = jax.jit(lambda n, steps: optim.schedule_of(name, n)(steps))(n, steps)
    np.testing.assert_allclose(rates, expected, rtol=2e-6, atol=1e-10)


@pytest.mark.full
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_numbers_of_an_optimizer_may_be_arrays(optimizer):
    config = OptimConfig(3e-3, 1e-4, 2, weight_decay=0.3, beta2=0.95, optimizer=optimizer, ema_decay=0.9)
    params = {"blocks": {0: {"mlp": {"fc": {"kernel": jnp.ones((2, 4)), "bias": jnp.ones(4)}}}}}
    grads = jax.tree.map(lambda p: jnp.arange(p.size, dtype=jnp.float32).reshape(p.shape) - 3, params)

    def after(n):
        tx = optim.optimizer_of(config, n)
        state, p = tx.init(params), params
        for _ in range(3):
            updates, state = tx.update(grads, state, p)
            p = optax.apply_updates(p, updates)
        return p, state

    n = optim.numbers(config, 10)
    # 1 - beta2 is rounded to float32 once more
    chex.assert_trees_all_close(jax.jit(after)(optim.Numbers(*map(jnp.float32, n))), after(n), rtol=1e-4)


@pytest.mark.parametrize("clip, expected", [(1.0, [0.6, 0.8]), (0.0, [3.0, 4.0]), (10.0, [3.0, 4.0])])
def test_gradients_are_clipped_to_their_global_norm(clip, expected):
    tx = optim.optimizer(OptimConfig(grad_clip=clip, beta1=0.5, warmup_steps=0, decay_steps=10))
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    _, state = tx.update({"a": jnp.array([3.0]), "b": jnp.array([4.0])}, tx.init(params), params)
    mu = optax.tree_utils.tree_get(state, "mu")  # half of the clipped gradient after one step
    np.testing.assert_allclose([2 * mu["a"][0], 2 * mu["b"][0]], expected, rtol=1e-6)


def mean_of_weights(weights, decay):
    """The definition: weight i of t counts (1 - decay) decay^(t - i) / (1 - decay^t), in float64."""
    t = len(weights)
    counts = [(1 - decay) * decay ** (t - i) / (1 - decay**t) for i in range(1, t + 1)]
    return sum(count * np.asarray(each, np.float64) for count, each in zip(counts, weights, strict=True))


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.9999])
def test_the_average_is_the_mean_of_the_weights_after_each_update(decay):
    tx = optim.average_weights(decay)
    p, rng, weights = {"kernel": jnp.array([[1.0, -2.0]])}, np.random.default_rng(0), []
    state = tx.init(p)
    np.testing.assert_array_equal(state.average["kernel"], p["kernel"])
    assert state.average["kernel"] is not p["kernel"]  # a step donates both
    for _ in range(30):
        updates = {"kernel": jnp.asarray(rng.normal(size=(1, 2)), jnp.float32)}
        kept, state = tx.update(updates, state, p)
        assert kept is updates
        p = optax.apply_updates(p, updates)
        weights.append(p["kernel"])
        np.testing.assert_allclose(state.average["kernel"], mean_of_weights(weights, decay), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("decay", [0.3, 0.99, 0.99999])
def test_an_average_of_equal_weights_is_these_weights_after_any_number_of_updates(decay):
    tx, p = optim.average_weights(decay), {"kernel": jnp.array([1.0, 0.1, -3e-5])}

    def step(state, _):
        return tx.update(jax.tree.map(jnp.zeros_like, p), state, p)[1], None

    state = jax.jit(lambda state: jax.lax.scan(step, state, length=20_000)[0])(tx.init(p))
    assert int(state.count) == 20_000
    np.testing.assert_array_equal(state.average["kernel"], p["kernel"])


def test_without_a_decay_the_optimizer_keeps_nothing_more():
    config, params = OptimConfig(), {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    adamw = optax.adamw(optim.schedule(config), weight_decay=0.1, mask=optim.decay_mask)
    plain = optax.chain(optax.clip_by_global_norm(1.0), adamw).init(params)
    chex.assert_trees_all_equal(optim.optimizer(config).init(params), plain)
    averaging = optim.optimizer(OptimConfig(ema_decay=0.9)).init(params)
    more = len(jax.tree.leaves(averaging)) - len(jax.tree.leaves(plain))
    assert more == len(params) + 1  # the average, and the number of updates


@pytest.mark.parametrize(
    "fields",
    [
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"grad_accumulation": 0},
        {"ema_decay": 1.0},
        {"ema_decay": -0.1},
        {"ema_decay": math.nan},
        {"decay_fraction": 0.0},
        {"decay_fraction": 1.1},
        {"decay_fraction": math.nan},
        {"muon_learning_rate": -1e-3},
        {"muon_learning_rate": math.nan},
        {"muon_momentum": 1.0},
        {"optimizer": "sgd"},
        {"schedule": "step"},
    ],
)
def test_numbers_that_cannot_train_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        OptimConfig(**fields)
