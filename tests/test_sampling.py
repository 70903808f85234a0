import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import sampling
from jaxgpt.errors import ArgumentError
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


@pytest.mark.full
def test_a_piece_of_a_prompt_that_would_end_outside_the_window_begins_earlier():
    model = init_model(dataclasses.replace(MODEL.config, block_size=40), seed=0)
    prompt = jax.random.randint(jax.random.key(0), (2, 39), 0, 65)
    out = generate(model, prompt, jax.random.key(1), 3)
    np.testing.assert_array_equal(out, lecture_generate(model, prompt, jax.random.key(1), 3, make_rule()))


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


@pytest.mark.parametrize("n, capacity", [(5, 1024), (1024, 1024), (1025, 2048), (9000, 8192)])
def test_a_cache_is_as_long_as_the_text_and_not_as_the_window(n, capacity):
    assert sampling.capacity_for(n, 8192) == capacity
    assert sampling.capacity_for(n, 8) == 8


@pytest.mark.full
def test_a_shorter_cache_gives_the_same_text(monkeypatch):
    prompt, lengths = jnp.array([[1, 0], [3, 4]]), jnp.array([1, 2])
    whole = [generate(MODEL, prompt, jax.random.key(0), 2, lengths=given) for given in (None, lengths)]
    monkeypatch.setattr(sampling, "CAPACITY", 1)
    assert sampling.capacity_for(4, MODEL.config.block_size) == 4
    shorter = [generate(MODEL, prompt, jax.random.key(0), 2, lengths=given) for given in (None, lengths)]
    chex.assert_trees_all_equal(whole, shorter)


@pytest.mark.full
def test_tokens_of_a_piece_that_nobody_asked_for_are_not_computed():
    key, rule, first = jax.random.key(0), make_rule(), np.int32(0)
    window, token, cache = np.ones((2, 8), np.int32), np.ones(2, np.int32), sampling._empty(MODEL, 2, 8)
    few, _, cache = sampling._decode(MODEL, token, cache, key, rule, first, np.int32(3), 7)
    assert cache.length == 3 and few[:, :3].any() and not few[:, 3:].any()
    for slide, before in ((sampling._slide, window), (sampling._slide_rows, (window, np.array([8, 4])))):
        few, after = slide(MODEL, before, key, rule, first, np.int32(3), 7)
        all_of_them, _ = slide(MODEL, before, key, rule, first, np.int32(7), 7)
        np.testing.assert_array_equal(few, np.pad(all_of_them[:, :3], ((0, 0), (0, 4))))
        chex.assert_trees_all_equal(after, slide(MODEL, before, key, rule, first, np.int32(3), 3)[1])


@pytest.mark.full
@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_another_length_of_prompt_or_text_compiles_nothing(positions):
    """Counting single operations, too."""
    model = init_model(dataclasses.replace(MODEL.config, positions=positions), seed=0)

    def text(T, n, **more):
        return generate(model, np.ones((2, T), np.int32), jax.random.key(0), n, stop=[64], **more)

    for T, n in [(3, 4), (3, 100), (20, 4), (20, 100)]:  # each size of a piece, in the window and past it
        for lengths in (None, np.array([1, T])):
            text(T, n, lengths=lengths)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    jax.jit(lambda x: x * 3)(1.0)
    assert compiled, "compiling is not noticed"
    compiled.clear()
    for T, n in [(1, 1), (2, 5), (5, 33), (8, 9), (9, 70), (13, 7), (30, 140)]:
        assert text(T, n).shape == text(T, n, lengths=np.array([1, T])).shape == (2, T + n)
    assert not compiled


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


def alone(row, n):
    """The n likeliest next tokens, one by one, without a cache, a batch or padding that counts."""
    row, block_size = list(row), MODEL.config.block_size
    for _ in range(n):
        window = row[-block_size:]
        padded = np.array([window + [0] * (block_size - len(window))])
        row.append(int(np.argmax(lecture_logits(MODEL, padded, len(window) - 1))))
    return row


# width of the prompts and number of new tokens: within the window of 8, up to its end, past it, and longer than it
SHAPES = [(5, 3), (4, 5), (6, 9), (13, 7)]


def padded_prompts(T, padding):
    """Four prompts of at most T tokens, with padding, and their lengths."""
    draw = np.random.default_rng(T)
    lengths = np.array([1, T, *draw.integers(1, T + 1, 2)], np.int32)
    prompt = draw.integers(0, 65, (4, T), dtype=np.int32)
    return np.where(np.arange(T) < lengths[:, None], prompt, padding), lengths


@pytest.mark.parametrize("T, n", SHAPES)
@pytest.mark.parametrize("padding", [0, -1, 99])  # what follows a prompt need not be in the vocabulary
def test_a_padded_row_is_what_it_would_be_alone_and_its_padding_comes_last(T, n, padding):
    prompt, lengths = padded_prompts(T, padding)
    out = np.asarray(generate(MODEL, prompt, jax.random.key(0), n, temperature=0, lengths=lengths))
    for b, length in enumerate(lengths):
        assert out[b].tolist() == alone(prompt[b, :length], n) + [padding] * (T - length)


@pytest.mark.parametrize("T, n", SHAPES)
def test_a_padded_row_draws_what_that_row_of_an_unpadded_batch_draws(T, n):
    prompt, lengths = padded_prompts(T, 7)
    key, rule = jax.random.key(3), {"temperature": 0.8, "top_k": 20}
    out = np.asarray(generate(MODEL, prompt, key, n, **rule, lengths=lengths))
    for b, length in enumerate(lengths):
        batch = np.tile(prompt[b, :length], (4, 1))
        expected = lecture_generate(MODEL, batch, key, n, make_rule(**rule))
        np.testing.assert_array_equal(out[b, : length + n], expected[b])


def cut(new, stop):
    """Each row up to its first stop token, which fills the rest."""
    rows = []
    for row in np.asarray(new).tolist():
        first = next((i for i, token in enumerate(row) if token in stop), len(row) - 1)
        rows.append(row[:first] + [row[first]] * (len(row) - first))
    return np.array(rows)


@pytest.mark.parametrize("stop", [(), (0,), range(20), (33, 2, 2), range(65)])
@pytest.mark.parametrize("padded", [False, True])
def test_after_its_first_stop_token_a_row_is_filled_with_it(stop, padded):
    prompt, lengths = padded_prompts(6, 64)
    if not padded:
        lengths = np.full(4, 6)
    prompt[np.arange(4), lengths - 1] = 0  # a stop token in a prompt stops nothing
    key, n, more = jax.random.key(1), 90, {"lengths": lengths} if padded else {}
    expected = np.array(generate(MODEL, prompt, key, n, **more))
    new = lengths[:, None] + np.arange(n)  # columns
    filled = cut(np.take_along_axis(expected, new, axis=1), stop)
    np.put_along_axis(expected, new, filled, axis=1)
    np.testing.assert_array_equal(generate(MODEL, prompt, key, n, **more, stop=stop), expected)

    pieces = list(stream(MODEL, prompt, key, n, **more, stop=stop))
    streamed = np.concatenate(pieces, axis=1)
    np.testing.assert_array_equal(streamed, filled[:, : streamed.shape[1]])
    found = np.isin(filled, list(stop))
    last = max(np.where(found.any(axis=1), found.argmax(axis=1), n - 1))  # when the last row ends
    assert streamed.shape[1] - pieces[-1].shape[1] <= last < streamed.shape[1], "no piece too few, and none too many"


def test_one_stop_token_needs_no_sequence_and_none_never_stops():
    prompt, key = jnp.zeros((2, 1), jnp.int32), jax.random.key(0)
    whole = generate(MODEL, prompt, key, 12)
    np.testing.assert_array_equal(generate(MODEL, prompt, key, 12, stop=None), whole)
    for stop in (np.int32(whole[0, 5]), int(whole[0, 5])):
        np.testing.assert_array_equal(generate(MODEL, prompt, key, 12, stop=stop)[:, 1:], cut(whole[:, 1:], [stop]))


def test_generate_can_be_compiled_as_a_whole():
    prompt, lengths = padded_prompts(6, 1)
    key, stop = jax.random.key(1), jnp.array([3, 4])

    def all_of(model, prompt, key, lengths, stop):
        return generate(model, prompt, key, 9, temperature=0.8, lengths=lengths, stop=stop)

    np.testing.assert_array_equal(
        jax.jit(all_of)(MODEL, prompt, key, lengths, stop), all_of(MODEL, prompt, key, lengths, stop)
    )
    np.testing.assert_array_equal(
        jax.jit(generate, static_argnums=3)(MODEL, prompt, key, 9), generate(MODEL, prompt, key, 9)
    )


def test_keys_in_the_old_form_draw_the_same():
    prompt = jnp.zeros((2, 1), jnp.int32)
    np.testing.assert_array_equal(
        generate(MODEL, prompt, jax.random.PRNGKey(5), 9), generate(MODEL, prompt, jax.random.key(5), 9)
    )


class LoadedRun:
    """Stands for jaxgpt.Run, which has its model as an attribute."""

    model = MODEL


GOOD = np.array([[1, 2, 3], [4, 5, 6]], np.int32)
MISTAKES = [
    ({"model": MODEL.config}, ["GPTConfig", "jaxgpt.GPT"]),
    ({"model": LoadedRun()}, ["LoadedRun", ".model"]),
    ({"model": None}, ["NoneType"]),
    ({"prompt": GOOD[0]}, ["(3,)", "(B, T)", "[None]"]),
    ({"prompt": jnp.asarray(GOOD)[0]}, ["(3,)", "(B, T)"]),
    ({"prompt": GOOD[None]}, ["(1, 2, 3)", "(B, T)"]),
    ({"prompt": GOOD.tolist()}, ["list", "(2, 3)", "array"]),
    ({"prompt": [[1], [2, 3]]}, ["list", "array"]),
    ({"prompt": "ROMEO:"}, ["str", "encode"]),
    ({"prompt": None}, ["NoneType", "encode"]),
    ({"prompt": 5}, ["int", "(B, T)"]),
    ({"prompt": GOOD.astype(np.float32)}, ["float32", "(2, 3)", "integers"]),
    ({"prompt": GOOD > 2}, ["bool", "(2, 3)", "integers"]),
    ({"prompt": GOOD[:0]}, ["empty", "(0, 3)"]),
    ({"prompt": GOOD[:, :0]}, ["empty", "(2, 0)"]),
    ({"prompt": GOOD + 60}, ["66", "0 to 64"]),
    ({"prompt": jnp.asarray(GOOD - 2)}, ["-1", "0 to 64"]),
    ({"key": 0}, ["int", "jax.random.key(0)"]),
    ({"key": None}, ["NoneType", "jax.random.key(0)"]),
    ({"key": jax.random.split(jax.random.key(0))}, ["(2,)", "jax.random.key(0)"]),
    ({"key": np.zeros(3, np.uint32)}, ["(3,)", "jax.random.key(0)"]),
    ({"key": np.zeros((2, 2), np.uint32)}, ["(2, 2)", "jax.random.key(0)"]),
    ({"key": np.zeros(2)}, ["float64", "jax.random.key(0)"]),
    *(({"max_new_tokens": n}, [str(n), "1 or more"]) for n in (0, -3, 2.5, "7", None)),
    *(({"temperature": x}, [str(x), "finite"]) for x in (-0.1, float("nan"), float("inf"), "hot", None)),
    ({"temperature": 10**400}, ["1000", "finite"]),
    *(({"top_k": k}, [str(k), "1 or more"]) for k in (0, -1, 5.0, "5")),
    *(({"top_p": p}, [str(p), "up to 1"]) for p in (0, 1.1, -0.5, float("nan"), "0.9", (0.5,))),
    ({"lengths": np.array([3])}, ["(1,)", "(2,)"]),
    ({"lengths": np.array([[3], [2]])}, ["(2, 1)", "(2,)"]),
    ({"lengths": 3}, ["int", "(2,)"]),
    ({"lengths": np.array([3.0, 2.0])}, ["float64", "integers"]),
    ({"lengths": np.array([3, 4])}, ["from 3 to 4", "1 to 3"]),
    ({"lengths": jnp.array([0, 2])}, ["from 0 to 2", "1 to 3"]),
    ({"stop": 65}, ["65", "0 to 64"]),
    ({"stop": [3, -1]}, ["-1", "0 to 64"]),
    ({"stop": [None]}, ["object"]),
    ({"stop": "x"}, ["end_of_text"]),
    ({"stop": 1.5}, ["float64", "integers"]),
    ({"stop": [[1], [2, 3]]}, ["list"]),
    ({"stop": [[1, 2]]}, ["(1, 2)"]),
]


@pytest.mark.parametrize("wrong, words", MISTAKES)
def test_a_mistake_in_python_is_named_with_its_argument_and_a_remedy(wrong, words):
    good = {"model": MODEL, "prompt": GOOD, "key": jax.random.key(0), "max_new_tokens": 3}
    for function in (generate, stream):  # stream, too, before its first piece is asked for
        with pytest.raises(ArgumentError) as caught:
            function(**{**good, **wrong})
        said = str(caught.value)
        assert said.startswith(f"{next(iter(wrong))} ") and ": " in said and "\n" not in said and len(said) < 300
        assert all(word in said for word in words), said


@pytest.mark.parametrize("chunk", [0, -1, 1.5])
def test_a_stream_in_pieces_of_nothing_is_refused(chunk):
    with pytest.raises(ArgumentError, match=f"^chunk is {chunk}: use a whole number, 1 or more"):
        stream(MODEL, GOOD, jax.random.key(0), 3, chunk=chunk)


def test_what_is_traced_is_not_read():
    """Values that jax.jit does not know are not checked; shapes are."""
    with pytest.raises(ArgumentError, match=r"max_new_tokens is .*static under jax.jit"):
        jax.jit(generate)(MODEL, GOOD, jax.random.key(0), 3)
    with pytest.raises(ArgumentError, match=r"^prompt is of dtype int32 and shape \(3,\)"):
        jax.jit(generate, static_argnums=3)(MODEL, GOOD[0], jax.random.key(0), 3)


def test_shapes_of_logits_are_asserted():
    with pytest.raises(AssertionError):
        filter_logits(jnp.zeros(5), make_rule())
