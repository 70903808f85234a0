import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import sampling
from jaxgpt.init import init_model
from jaxgpt.model import GPTConfig
from jaxgpt.sampling import filter_logits, generate, make_rule, sample, stream

# weights far from uniform, so that a wrong cache shows
MODEL = init_model(GPTConfig(vocab_size=65, block_size=8, n_layer=2, n_head=2, n_embd=16, init="torch"), seed=0)


@jax.jit
def lecture_logits(model, tokens, last):
    return model(tokens)[:, last]


def lecture_generate(model, prompt, key, n, rule):
    """The lecture's loop: crop to block_size, all positions anew for each token (padded behind: one shape)."""
    tokens = np.asarray(prompt)
    for i in range(n):
        window = tokens[:, -model.config.block_size :]
        length = window.shape[1]
        padded = np.pad(window, ((0, 0), (0, model.config.block_size - length)))
        logits = filter_logits(lecture_logits(model, padded, length - 1), rule)
        new = jax.random.categorical(jax.random.fold_in(key, i), logits).astype(jnp.int32)
        tokens = np.concatenate([tokens, new[:, None]], axis=1)
    return tokens


MORE = [pytest.param(*case, marks=pytest.mark.full) for case in [(1, 4), (2, 1), (5, 4), (12, 6)]]


@pytest.mark.parametrize("length, n", [(1, 20), (3, 1), (7, 5), (8, 10), *MORE])
def test_cached_tokens_are_those_of_the_lecture_s_loop(length, n):
    prompt = jax.random.randint(jax.random.key(length), (3, length), 0, 65)
    out = generate(MODEL, prompt, jax.random.key(1), n, temperature=0.8, top_k=20)
    chex.assert_shape(out, (3, length + n))
    chex.assert_type(out, jnp.int32)
    expected = lecture_generate(MODEL, prompt, jax.random.key(1), n, make_rule(0.8, 20))
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("chunk", [pytest.param(1, marks=pytest.mark.full), 3, 16])
def test_streaming_gives_the_tokens_of_generate(chunk):
    prompt = jnp.array([[1, 2, 3]])
    pieces = list(stream(MODEL, prompt, jax.random.key(5), 17, top_p=0.9, chunk=chunk))
    assert all(piece.shape[1] <= chunk for piece in pieces)
    whole = generate(MODEL, prompt, jax.random.key(5), 17, top_p=0.9)
    np.testing.assert_array_equal(jnp.concatenate([prompt, *pieces], axis=1), whole)


def test_rows_of_a_batch_and_keys_give_different_texts():
    prompt = jnp.zeros((2, 1), jnp.int32)
    one, other = (np.asarray(generate(MODEL, prompt, jax.random.key(seed), 20)) for seed in (1, 2))
    assert (one[0] != one[1]).any() and (one != other).any()
    np.testing.assert_array_equal(one, generate(MODEL, prompt, jax.random.key(1), 20))


@pytest.mark.full
def test_new_weights_keys_and_numbers_do_not_trace_again():
    prompt = jnp.zeros((2, 3), jnp.int32)
    generate(MODEL, prompt, jax.random.key(0), 12, temperature=1.0, top_k=5, top_p=0.5)
    functions = (sampling._prefill, sampling._decode, sampling._slide)
    before = [f._cache_size() for f in functions]
    other = init_model(MODEL.config, seed=9)
    generate(other, prompt + 1, jax.random.key(1), 12, temperature=0.3, top_k=7, top_p=0.9)
    assert [f._cache_size() for f in functions] == before
    assert min(before) > 0


def reference_probabilities(logits, temperature, top_k, top_p):
    """The definitions, one row, in NumPy float64."""
    logits = np.asarray(logits, np.float64) / temperature
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities)
    if top_k is not None:
        probabilities[order[top_k:]] = 0
        probabilities /= probabilities.sum()
    if top_p is not None:
        total = np.cumsum(probabilities[order])
        needed = int(np.searchsorted(total, top_p * (1 - 1e-6))) + 1  # the fewest whose sum reaches p
        probabilities[order[needed:]] = 0
        probabilities /= probabilities.sum()
    return probabilities


@pytest.mark.full
@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(-400, 400), min_size=2, max_size=30, unique=True),
    st.floats(0.1, 3.0),
    st.none() | st.integers(1, 40),
    st.none() | st.floats(0.05, 0.99),
)
def test_probabilities_are_those_of_the_definitions(hundredths, temperature, top_k, top_p):
    logits = np.array(hundredths, np.float32)[None] / 100
    expected = reference_probabilities(logits[0], temperature, top_k, top_p)
    ours = jax.nn.softmax(filter_logits(jnp.asarray(logits), make_rule(temperature, top_k, top_p)))[0]
    edge = np.abs(np.cumsum(np.sort(reference_probabilities(logits[0], temperature, top_k, None))[::-1]) - (top_p or 2))
    if edge.min() > 1e-5:  # a sum that meets p to the last float32 bit may fall on either side
        np.testing.assert_allclose(ours, expected, atol=2e-6)


def test_drawn_tokens_follow_the_filtered_probabilities():
    logits = jnp.array([2.0, 1.5, 1.0, 0.0, -1.0])
    tiled, rule = jnp.tile(logits, (20_000, 1)), make_rule(0.7, 4, 0.9)
    draws = sample(tiled, jax.random.gumbel(jax.random.key(0), tiled.shape), rule)
    chex.assert_shape(filter_logits(tiled, rule), (20_000, 5))
    chex.assert_shape(draws, (20_000,))
    expected = reference_probabilities(logits, 0.7, 4, 0.9)
    assert (expected > 0).sum() == 3
    frequencies = np.bincount(draws, minlength=5) / 20_000
    np.testing.assert_allclose(frequencies, expected, atol=4 * 0.5 / 20_000**0.5)  # 4 standard errors
    assert (frequencies[expected == 0] == 0).all()


def test_temperature_zero_takes_the_likeliest_token():
    prompt = jnp.zeros((2, 1), jnp.int32)
    greedy = generate(MODEL, prompt, jax.random.key(0), 12, temperature=0.0)
    np.testing.assert_array_equal(greedy, generate(MODEL, prompt, jax.random.key(1), 12, temperature=0.0))
    for i in range(1, 12):
        last = min(i, 8) - 1
        window = np.pad(np.asarray(greedy)[:, max(0, i - 8) : i], ((0, 0), (0, max(0, 8 - i))))
        np.testing.assert_array_equal(greedy[:, i], lecture_logits(MODEL, window, last).argmax(-1))


def test_top_k_beyond_the_vocabulary_keeps_all():
    logits = jnp.arange(5.0)[None]
    np.testing.assert_array_equal(filter_logits(logits, make_rule(top_k=10**12)), logits)


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"max_new_tokens": 0},
    ],
)
def test_numbers_out_of_range_are_named(arguments):
    with pytest.raises(ValueError, match=f"^{next(iter(arguments))} is"):
        generate(MODEL, jnp.zeros((1, 1), jnp.int32), jax.random.key(0), **{"max_new_tokens": 3, **arguments})


@pytest.mark.parametrize(
    "prompt, message", [(np.zeros((1, 0), int), "empty"), ([[65]], "0 to 64"), ([[-1]], "0 to 64")]
)
def test_prompts_that_the_model_cannot_read_are_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        generate(MODEL, jnp.asarray(prompt, jnp.int32), jax.random.key(0), 3)


def test_shapes_are_asserted_at_entry():
    with pytest.raises(AssertionError):
        generate(MODEL, jnp.zeros(3, jnp.int32), jax.random.key(0), 3)
    with pytest.raises(AssertionError):
        generate(MODEL, jnp.zeros((1, 3)), jax.random.key(0), 3)
    with pytest.raises(AssertionError):
        filter_logits(jnp.zeros(5), make_rule())
