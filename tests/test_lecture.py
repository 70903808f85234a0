import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import lecture
from jaxgpt.model import GPT, Attention, GPTConfig

shapes = st.tuples(st.integers(1, 3), st.integers(1, 8), st.integers(1, 3))  # B, T, C
seeds = st.integers(0, 2**32 - 1)
averages = pytest.mark.parametrize(
    "average", [lecture.average_loop, lecture.average_matmul, lecture.average_softmax], ids=lambda f: f.__name__
)
some = settings(max_examples=8, deadline=None, derandomize=True)  # few, as every new shape is compiled
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}  # float32, sums of a few numbers of size one


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def head(n_head, query, key, value):
    """Attention without projection and with these (C, C) kernels."""
    C = len(value)
    config = GPTConfig(vocab_size=2, n_embd=C, n_head=n_head, mlp_ratio=0, projection=False)
    attention = Attention(config, rngs=nnx.Rngs(0))
    for layer, kernel in zip((attention.query, attention.key, attention.value), (query, key, value)):
        layer.kernel = nnx.Param(jnp.asarray(kernel, jnp.float32))
    return jax.jit(lambda x: attention(x)[0])


# The three averages


@averages
@given(shapes, seeds)
@some
def test_each_trick_averages_the_past(average, shape, seed):
    x = normal(seed, *shape)
    means = np.cumsum(x, axis=1, dtype=np.float64) / np.arange(1, shape[1] + 1)[:, None]
    np.testing.assert_allclose(jax.jit(average)(x), means, **ROUNDING)


@averages
def test_the_future_never_matters(average):
    x = normal(0, 2, 6, 3)
    changed = x.copy()
    changed[:, 4:] = 1e30
    np.testing.assert_array_equal(average(changed)[:, :4], average(x)[:, :4])
    assert not np.array_equal(average(changed)[:, 4], average(x)[:, 4])


@averages
def test_averages_keep_the_dtype(average):
    assert average(jnp.ones((1, 3, 2), jnp.bfloat16)).dtype == jnp.bfloat16


@averages
def test_averages_refuse_what_is_not_a_batch_of_float_sequences(average):
    with pytest.raises(AssertionError):
        average(jnp.ones((3, 2)))
    with pytest.raises(AssertionError):
        average(jnp.ones((1, 3, 2), jnp.int32))


def test_scores_of_another_length_are_refused():
    with pytest.raises(AssertionError):
        lecture.average_softmax(jnp.ones((1, 3, 2)), jnp.zeros((1, 1)))


@given(shapes, seeds)
@some
def test_scores_weigh_the_past_by_their_exponentials(shape, seed):
    B, T, C = shape
    x, scores = normal(seed, B, T, C), normal(seed + 1, B, T, T)
    out, shared = (np.asarray(jax.jit(lecture.average_softmax)(x, s)) for s in (scores, scores[0]))
    for t in range(T):
        weights = np.exp(scores[:, t, : t + 1])
        weights /= weights.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(out[:, t], np.einsum("bs,bsc->bc", weights, x[:, : t + 1]), **ROUNDING)
        np.testing.assert_allclose(shared[:, t], np.einsum("s,bsc->bc", weights[0], x[:, : t + 1]), **ROUNDING)


def test_causal_weights_are_a_distribution_over_the_past():
    weights = np.asarray(lecture.causal_weights(normal(0, 2, 3, 5, 5)))
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-6)
    assert np.array_equal(weights > 0, np.broadcast_to(np.tri(5, dtype=bool), weights.shape))


# The step from there to self-attention


@pytest.mark.parametrize("n_head", [1, 3])
@given(shapes, seeds)
@some
def test_attention_with_nothing_to_ask_is_the_causal_average(n_head, shape, seed):
    x = normal(seed, *shape[:2], 6)
    nothing = np.zeros((6, 6))
    np.testing.assert_allclose(
        head(n_head, nothing, nothing, np.eye(6))(x), jax.jit(lecture.average_loop)(x), **ROUNDING
    )


def test_one_head_is_average_softmax_with_scores_from_the_data():
    x, query, key, value = normal(0, 2, 7, 16), normal(1, 16, 16), normal(2, 16, 16), normal(3, 16, 16)
    query, key, value = query / 4, key / 4, value / 4  # keeps unit variance
    scores = np.einsum("btd,bsd->bts", x @ query, x @ key) / 16**0.5
    expected = lecture.average_softmax(x @ value, scores)
    np.testing.assert_allclose(head(1, query, key, value)(x), expected, rtol=1e-4, atol=1e-5)


# Why the scores are divided by sqrt(D): "it is important that they be diffuse at initialization"


def score_variance(weights):
    """Variance of the scores that a softmax over the past turned into these (H, T, T) weights.

    Their logarithms are the scores up to a constant in each row, which the variance inside a row does not see.
    """
    T = weights.shape[-1]
    rows = [np.log(weights[:, t, : t + 1]).var(axis=-1, ddof=1) for t in range(T // 2, T)]
    return np.mean(rows)


@pytest.mark.parametrize("D", [16, 64, 256])
def test_scores_have_variance_head_size_until_they_are_scaled(D):
    q, k = normal(0, 400, D), normal(1, 400, D)
    scores = q @ k.T
    # an estimate from 400 queries and 400 keys strays by a few percent
    assert scores.var() == pytest.approx(D, rel=0.1)
    assert (scores * D**-0.5).var() == pytest.approx(1, rel=0.1)


def test_unscaled_scores_sharpen_the_softmax_towards_one_hot():
    def mean_largest_weight(D, scale):
        scores = normal(0, 200, D) @ normal(1, 200, D).T * scale
        return float(lecture.causal_weights(scores)[100:].max(axis=-1).mean())

    heads = (4, 16, 64, 256)
    sharp = [mean_largest_weight(D, 1.0) for D in heads]
    diffuse = [mean_largest_weight(D, D**-0.5) for D in heads]
    assert sharp == sorted(sharp) and sharp[0] < 0.3 and sharp[-1] > 0.8
    assert max(diffuse) < 0.15


@pytest.mark.parametrize("H, D", [(1, 16), (1, 64), (4, 16), (4, 64)])
def test_our_attention_scales_scores_to_variance_one_by_the_size_of_its_heads(H, D):
    C = H * D
    x = np.tile(np.eye(D, dtype=np.float32), H)[None]  # (1, T = D, C): a head's values are one-hot, and so show weights
    query, key = normal(0, C, C) * H**-0.5, normal(1, C, C) * H**-0.5  # x has H ones a row: unit-variance q and k
    out = head(H, query, key, np.eye(C))(x)
    weights = np.asarray(out).reshape(D, H, D).swapaxes(0, 1)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
    # the fewest pairs are those of one head of 16, and a wrong power of D or C for D is a factor of 4 at the least
    assert score_variance(weights) == pytest.approx(1, rel=0.4)


# Why a position alone does not help


@pytest.mark.parametrize("n_layer", [0, 1])
def test_a_token_sees_others_only_through_attention(n_layer):
    V, T = 7, 5
    config = GPTConfig(vocab_size=V, block_size=T, n_embd=8, n_head=1, n_layer=n_layer, init="torch")
    model = GPT(config, rngs=nnx.Rngs(0))
    graphdef, params = nnx.graphdef(model), nnx.to_pure_dict(nnx.state(model))
    tokens = jnp.array([[3, 0, 6, 2, 5]])  # all different, so that each has a row of the table to itself

    def logits(table):
        return nnx.merge(graphdef, params | {"token_embedding_table": {"embedding": table}})(tokens)[0]

    gradient = jax.jit(jax.jacrev(logits))(params["token_embedding_table"]["embedding"])  # (T, V, V, C)
    gradient = gradient[:, :, tokens[0]]  # (T, V, S, C)
    reaches = np.asarray(jnp.any(gradient != 0, axis=(1, 3)))
    assert np.array_equal(reaches, np.tri(T, dtype=bool) if n_layer else np.eye(T, dtype=bool))


def test_positions_shift_the_logits_of_equal_tokens():
    config = GPTConfig(vocab_size=7, block_size=4, n_embd=8, n_layer=0, init="torch")
    logits = np.asarray(GPT(config, rngs=nnx.Rngs(0))(jnp.full((1, 4), 3)))[0]
    assert all(not np.allclose(logits[t], logits[0]) for t in range(1, 4))
