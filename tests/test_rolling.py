"""The cache of a model with rotary positions rolls: each layer attends to the last block_size keys."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgpt import GPT, GPTConfig, generate
from jaxgpt.init import init_model

S, LONG = 8, 64
PLAIN = GPTConfig(vocab_size=11, block_size=S, n_layer=2, n_head=2, n_embd=16, positions="rope", init="torch")
MODERN = dataclasses.replace(
    PLAIN, n_kv_head=1, qk_norm=True, norm="rmsnorm", value_embeddings=True, activation="relu2", sliding_window=3
)


def reference(model: GPT) -> GPT:
    """The same weights with room for the whole text, in which each layer sees as many keys as its cache would hold."""
    window = model.config.sliding_window or S
    long = dataclasses.replace(model.config, block_size=LONG, sliding_window=window)
    return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: GPT(long, rngs=nnx.Rngs(0)))), nnx.state(model))


def by_hand(model: GPT, prompt: np.ndarray, n: int) -> np.ndarray:
    """Greedy text by the whole model for every token, which keeps no cache."""
    whole, tokens = nnx.jit(reference(model)), prompt
    for _ in range(n):
        padded = np.zeros((len(tokens), LONG), np.int32)
        padded[:, : tokens.shape[1]] = tokens  # what comes later is not seen
        last = np.asarray(whole(jnp.asarray(padded)))[:, tokens.shape[1] - 1]
        tokens = np.concatenate([tokens, last.argmax(-1)[:, None].astype(tokens.dtype)], axis=1)
    return tokens


@pytest.fixture(scope="module", params=[PLAIN, MODERN], ids=["plain", "modern"])
def model(request):
    return init_model(request.param, 0)


@pytest.mark.parametrize("T", [1, 5, S, S + 1, 21, 43])
def test_the_cache_rolls_as_attention_over_the_last_keys_of_each_layer(model, T):
    prompt = np.random.default_rng(T).integers(0, 11, (2, T)).astype(np.int32)
    ours = generate(model, jnp.asarray(prompt), jax.random.key(0), 20, temperature=0)
    np.testing.assert_array_equal(ours, by_hand(model, prompt, 20))


@pytest.mark.full
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_of_different_lengths_roll_as_they_would_alone(model, temperature):
    lengths = [1, S - 1, S, S + 1, 20]
    prompts = np.random.default_rng(1).integers(0, 11, (5, 20)).astype(np.int32)
    rule = {"temperature": temperature, "lengths": jnp.asarray(lengths)}
    together = np.asarray(generate(model, jnp.asarray(prompts), jax.random.key(1), 14, **rule))
    for b, length in enumerate(lengths):
        batch = jnp.asarray(np.repeat(prompts[b : b + 1, :length], 5, axis=0))  # the noise depends on the row
        alone = generate(model, batch, jax.random.key(1), 14, temperature=temperature)
        np.testing.assert_array_equal(together[b, : length + 14], alone[b])
