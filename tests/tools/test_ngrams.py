import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxgpt import data
from jaxgpt.init import init_model
from jaxgpt.model import GPTConfig
from jaxgpt.optim import OptimConfig, optimizer, schedule
from jaxgpt.step import TRAIN, StepSpec, build, evaluate, init_state, params_of, stream_key, train_steps
from jaxgpt.text import corpus
from jaxgpt.tokenizer import CharTokenizer
from jaxgpt.tools import ngrams

V = 4
texts = st.lists(st.integers(0, V - 1), min_size=3, max_size=40).map(np.array)
orders = st.integers(1, 3)
some = settings(deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def splits():
    text = corpus.load("shakespeare").text
    return data.split(CharTokenizer(corpus.SHAKESPEARE_ALPHABET).encode(text), 0.9, 65, 8)


def train(config, tokens, steps, learning_rate, batch_size=1024):
    optim = OptimConfig(
        learning_rate, min_learning_rate=0, warmup_steps=0, decay_steps=steps, weight_decay=0, grad_clip=0
    )
    model, tx = init_model(config, 0), optimizer(optim)
    spec = StepSpec(nnx.graphdef(model), tx, schedule(optim), 1, jnp.dtype("float32"))
    windows = data.windows(stream_key(0, TRAIN), tokens, jnp.arange(steps), batch_size, config.block_size)
    state, _ = train_steps(init_state(params_of(model), tx), windows, jax.random.key(0), spec=spec)
    return build(spec, state.params)


def least_loss(counts):
    """Nats a token of the best prediction from the leading axes of a (..., V) table of counts."""
    total = np.broadcast_to(counts.sum(axis=-1, keepdims=True), counts.shape)
    met = counts > 0
    return np.sum(counts[met] * np.log(total[met] / counts[met])) / counts.sum()


def by_position(tokens, block_size, vocab_size):
    """Counts of (position, token, next token) in the windows that `evaluate` reads: (T, V, V)."""
    counts = np.zeros((block_size, vocab_size, vocab_size))
    np.add.at(counts, (np.arange(len(tokens) - 1) % block_size, tokens[:-1], tokens[1:]), 1)
    return counts


# The count tables


@given(texts, texts, orders, st.sampled_from([0.0, 0.1, 1.0]))
@some
def test_the_loss_is_that_of_dictionaries_filled_by_hand(text, other, n, smoothing):
    followed, seen = Counter(), Counter()
    for i in range(n - 1, len(text)):
        context = tuple(text[i - n + 1 : i])
        followed[context, text[i]] += 1
        seen[context] += 1
    nats = []
    for i in range(n - 1, len(other)):
        context = tuple(other[i - n + 1 : i])
        times, of = followed[context, other[i]] + smoothing, seen[context] + smoothing * V
        nats.append(-math.log(times / of) if times else math.inf)
    # float64: only the order of the sum differs
    assert ngrams.loss(text, other, n, V, smoothing) == pytest.approx(sum(nats) / len(nats), rel=1e-12, abs=1e-12)


@given(texts)
@some
def test_the_unigram_loss_of_a_text_on_itself_is_its_entropy(text):
    shares = np.array([np.mean(text == token) for token in set(text.tolist())])
    assert ngrams.loss(text, text, 1, V) == pytest.approx(-np.sum(shares * np.log(shares)), abs=1e-12)


@given(texts)
@some
def test_more_context_never_costs_nats_on_the_text_that_was_counted(text):
    # in total: a longer context also leaves one token less to predict, so the means need not be ordered
    total = [(len(text) - n + 1) * ngrams.loss(text, text, n, V) for n in (1, 2, 3)]
    assert total[2] <= total[1] + 1e-9 and total[1] <= total[0] + 1e-9


@given(texts, texts, orders)
@some
def test_smoothing_makes_the_unseen_finite(text, other, n):
    met, asked = ngrams.count(text, n, V), ngrams.count(other, n, V)
    assume(np.any((asked > 0) & (met == 0)))
    assert ngrams.loss(text, other, n, V) == math.inf
    assert math.isfinite(ngrams.loss(text, other, n, V, smoothing=0.1))


@given(texts, orders)
@some
def test_endless_smoothing_is_a_uniform_guess(text, n):
    assert ngrams.loss(text, text, n, V, smoothing=1e12) == pytest.approx(math.log(V), abs=1e-9)


def test_counts_name_context_first_and_every_integer_dtype_counts_alike():
    text = [0, 1, 0, 1, 2]
    for dtype in (np.uint8, np.uint16, np.int32, np.int64):
        counts = ngrams.count(np.array(text, dtype), 2, 3)
        assert counts.tolist() == [[0, 2, 0], [1, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize("text", [[0, 4, 1], [0, -1, 1], [0]])
def test_tokens_out_of_range_and_texts_too_short_are_refused(text):
    with pytest.raises(ValueError):
        ngrams.count(np.array(text), 2, V)


# The corpus, and models trained on it


def test_shakespeare_grows_more_certain_with_each_character_of_context(splits):
    """The lecture's Tiny Shakespeare, whose lines are nearly the same, has 3.347, 2.484 and 2.046."""
    train, val = map(np.asarray, splits)
    losses = [ngrams.loss(train, val, n, 65, smoothing=0.1) for n in (1, 2, 3)]
    np.testing.assert_allclose(losses, [3.347, 2.484, 2.046], atol=0.005)


@pytest.mark.long
def test_a_bigram_model_learns_the_count_table(splits):
    config = GPTConfig(
        vocab_size=65, block_size=8, n_layer=0, n_embd=0, positions="none", lm_head="none", mlp_ratio=0,
        projection=False, residual=False, norm="none",
    )  # fmt: skip
    model = train(config, splits.train, steps=500, learning_rate=0.3)
    least = ngrams.loss(splits.train, splits.train, 2, 65)
    reached = evaluate(model, splits.train)
    # never below the closed form, but for float32; above it what Adam leaves of rare pairs and of the batches' noise
    assert least - 1e-5 < reached < least + 0.005
    # between the smoothings that one would try, 0.01 and 1, the validation loss of the table spans 0.006
    assert evaluate(model, splits.val) == pytest.approx(ngrams.loss(splits.train, splits.val, 2, 65, 0.1), abs=0.006)


def test_knowing_the_position_too_saves_no_more_than_chance_on_shakespeare(splits):
    tokens = np.asarray(splits.train)
    counts = by_position(tokens, 8, 65)
    saved = ngrams.loss(tokens, tokens, 2, 65) - least_loss(counts)
    # Wilks: were positions independent of the text, 2 N saved would be chi-squared, on average its degrees of freedom
    pairs = counts.sum(axis=0)
    freedom = (8 - 1) * ((pairs > 0).sum() - (pairs.sum(axis=1) > 0).sum())
    assert 0 < saved < 1.1 * freedom / (2 * len(tokens))


@pytest.mark.full
def test_positions_without_attention_do_not_beat_the_count_table_of_position_and_token():
    """On a text where each token mostly repeats the one two before it, which one token of context cannot tell."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, 20_000)
    for t in range(2, len(tokens)):
        if rng.random() < 0.9:
            tokens[t] = tokens[t - 2]
    tokens = tokens.astype(np.uint8)
    least = least_loss(by_position(tokens, 8, V))
    assert least == pytest.approx(ngrams.loss(tokens, tokens, 2, V), abs=0.01)

    def reached(n_layer):
        config = GPTConfig(vocab_size=V, block_size=8, n_embd=16, n_head=1, n_layer=n_layer, mlp_ratio=0, init="torch")
        return evaluate(train(config, jnp.asarray(tokens), steps=200, learning_rate=0.03, batch_size=256), tokens)

    assert least - 1e-5 < reached(n_layer=0) < least + 0.02
    assert reached(n_layer=1) < least - 0.3  # one head of attention does
