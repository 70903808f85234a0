"""Text from a model: prefill once, decode with a cache until the context is full, then slide the window."""

import math
import operator
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.errors import ArgumentError
from jaxgpt.model import GPT, Cache

NOISE = 1 << 26  # maximum number of random values drawn at a time


class Rule(NamedTuple):
    """How to choose a token from the logits; None switches a filter off.

    The numbers are traced, so changing one does not recompile.
    """

    temperature: np.float32
    top_k: np.int32 | None
    top_p: np.float32 | None


def make_rule(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Rule:
    """Check the numbers of a rule and build it.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: number of tokens to draw from, at least 1; None for all.
        top_p: probability in (0, 1] that the tokens to draw from must reach; None for all.

    Returns:
        The rule, with numbers clipped to the range of their dtypes.

    Raises:
        ValueError: a number is out of its range.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ArgumentError(
            f"temperature is {temperature}: use a finite number, 0 (always the most likely token) or above"
        )
    if top_k is not None and operator.index(top_k) < 1:
        raise ArgumentError(f"top_k is {top_k}: use 1 or more tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ArgumentError(f"top_p is {top_p}: use a probability above 0 and up to 1")
    return Rule(
        np.float32(min(temperature, float(np.finfo(np.float32).max))),
        None if top_k is None else np.int32(min(top_k, np.iinfo(np.int32).max)),
        None if top_p is None else np.float32(top_p),
    )


def filter_logits(logits: jax.Array, rule: Rule) -> jax.Array:
    """Apply temperature, then top-k, then top-p; excluded tokens get -inf.

    Args:
        logits: (B, V) float32.
        rule: a temperature above 0 divides the logits; top_k keeps the k most likely tokens (and ties); top_p keeps the
            smallest set of most likely tokens whose probabilities sum to p or more.

    Returns:
        (B, V) float32.

    Source: Holtzman et al. 2020, "The curious case of neural text degeneration", for top-p.
    """
    chex.assert_rank(logits, 2)
    logits = logits / jnp.where(rule.temperature > 0, rule.temperature, 1.0)
    if rule.top_k is not None:
        descending = jnp.sort(logits, axis=-1, descending=True)
        kth = descending[:, jnp.minimum(rule.top_k, logits.shape[-1]) - 1]
        logits = jnp.where(logits < kth[:, None], -jnp.inf, logits)
    if rule.top_p is not None:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # total probability of the more likely tokens
        smallest = jnp.min(jnp.where(before < rule.top_p, descending, jnp.inf), axis=-1)
        logits = jnp.where(logits < smallest[:, None], -jnp.inf, logits)
    return logits


def sample(logits: jax.Array, noise: jax.Array, rule: Rule) -> jax.Array:
    """Choose one token per row.

    This is `jax.random.categorical`, except that the noise is drawn outside the loop over tokens. Inside it, drawing
    takes about a hundred small operations per token.

    Args:
        logits: (B, V) float32.
        noise: (B, V) float32 Gumbel noise; the argmax of logits plus noise is a draw from the softmax.
        rule: as for `filter_logits`; temperature 0 takes the most likely token.

    Returns:
        (B,) int32.

    Source: Gumbel 1954, "Statistical theory of extreme values", as in Maddison et al. 2014, "A* sampling".
    """
    drawn = jnp.argmax(filter_logits(logits, rule) + noise, axis=-1)
    return jnp.where(rule.temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)


def _noise(key: jax.Array, first: jax.Array, n: int, rows: int, model: GPT) -> jax.Array:
    """Gumbel noise for the n new tokens from number `first` on, each with its own key: (n, B, V) float32."""
    shape = rows, model.config.vocab_size
    return jax.vmap(lambda i: jax.random.gumbel(jax.random.fold_in(key, i), shape))(first + jnp.arange(n))


def _empty(model: GPT, rows: int) -> Cache:
    """A cache that holds no tokens."""
    config, dtype = model.config, model.token_embedding_table.embedding.dtype
    zeros = jnp.zeros((rows * config.n_head, config.block_size, config.width // config.n_head), dtype)
    return Cache(((zeros, zeros),) * config.n_layer, np.int32(0))


@jax.jit
def _prefill(model: GPT, window: jax.Array, length: jax.Array) -> Cache:
    """The cache of the first `length` tokens of a padded (B, T) window.

    The padding is never attended to: attention is causal, and decoding overwrites it.
    """
    _, cache = model.hidden(window)
    padding = [(0, 0), (0, model.config.block_size - window.shape[1]), (0, 0)]
    return Cache(jax.tree.map(lambda a: jnp.pad(a, padding), cache.layers), length)


@partial(jax.jit, static_argnames="n")
def _decode(model: GPT, token: jax.Array, cache: Cache, key: jax.Array, rule: Rule, first: jax.Array, n: int):
    """Decode (B, n) new tokens, from number `first` on, into the cache; also return the last one and the cache."""

    def step(carry, noise):
        token, cache = carry
        x, cache = model.hidden(token[:, None], cache)
        token = sample(model.logits(x)[:, 0], noise, rule)
        return (token, cache), token

    (token, cache), tokens = jax.lax.scan(step, (token, cache), _noise(key, first, n, len(token), model))
    return tokens.T, token, cache


def _last_logits(model: GPT, window: jax.Array) -> jax.Array:
    """`model(window)[:, -1]`, where the last block computes only keys and values for the tokens before the last one.

    1.28x the tokens per second of configs/shakespeare_cpu.yaml on two cores: `python benchmarks/tricks.py last_block`.
    """
    x = model.embed(window)
    for i, block in enumerate(model.blocks):
        if i < len(model.blocks) - 1:
            x, _ = block(x)
        else:
            _, keys_values = block.attn(block.ln_1(x))  # XLA removes the unused attention output
            x, _ = block(x[:, -1:], keys_values, window.shape[1] - 1)
    return model.logits(model.ln_f(x[:, -1:]))[:, 0]


@partial(jax.jit, static_argnames="n")
def _slide(model: GPT, window: jax.Array, key: jax.Array, rule: Rule, first: jax.Array, n: int):
    """Decode (B, n) new tokens after a full (B, block_size) window, which slides by one each; also return it.

    Positions are learned, so a token that moves gets new keys and values: a cache would be invalid.
    """

    def step(window, noise):
        token = sample(_last_logits(model, window), noise, rule)
        return jnp.concatenate([window[:, 1:], token[:, None]], axis=1), token

    window, tokens = jax.lax.scan(step, window, _noise(key, first, n, len(window), model))
    return tokens.T, window


def stream(
    model: GPT,
    prompt: jax.Array,
    key: jax.Array,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    chunk: int = 16,
) -> Iterator[jax.Array]:
    """Generate like `generate`, but yield the new tokens as soon as they are there.

    Args:
        model: as for `generate`.
        prompt: as for `generate`.
        key: as for `generate`.
        max_new_tokens: as for `generate`.
        temperature: as for `generate`.
        top_k: as for `generate`.
        top_p: as for `generate`.
        chunk: maximum number of tokens per piece.

    Yields:
        (B, n) int32, n from 1 to chunk.

    Raises:
        ValueError: an argument is out of its range.
    """
    config, rule = model.config, make_rule(temperature, top_k, top_p)
    chex.assert_rank(prompt, 2)
    chex.assert_type(prompt, int)
    if prompt.shape[1] == 0:
        raise ArgumentError("the prompt is empty: give at least one token, a line break for instance")
    if max_new_tokens < 1:
        raise ArgumentError(f"max_new_tokens is {max_new_tokens}: use 1 or more")
    if not isinstance(prompt, jax.core.Tracer) and not (0 <= prompt.min() and prompt.max() < config.vocab_size):
        raise ArgumentError(
            f"a token of the prompt is not in the vocabulary: use ids from 0 to {config.vocab_size - 1}"
        )

    window, token = (jnp.asarray(part, jnp.int32) for part in (prompt[:, -config.block_size :], prompt[:, -1]))
    rows, cached = len(window), window.shape[1] - 1  # decoding starts with the last token
    room = config.block_size - cached if cached < config.block_size - 1 else 0  # a full window slides from the start
    if room and cached:
        width = min(config.block_size, 1 << (cached - 1).bit_length())  # powers of two, for few compilations
        cache = _prefill(model, jnp.pad(window[:, :-1], ((0, 0), (0, width - cached))), np.int32(cached))
    elif room:
        cache = _empty(model, rows)
    pieces, done, limit = [window], 0, max(NOISE // (rows * config.vocab_size), 1)
    while done < max_new_tokens and room:
        n = min(chunk, limit, max_new_tokens - done, room)
        tokens, token, cache = _decode(model, token, cache, key, rule, np.int32(done), n)
        pieces.append(tokens)
        done, room = done + n, room - n
        yield tokens
    if done < max_new_tokens:
        window = jnp.concatenate(pieces, axis=1)[:, -config.block_size :]
    while done < max_new_tokens:
        n = min(chunk, limit, max_new_tokens - done)
        tokens, window = _slide(model, window, key, rule, np.int32(done), n)
        done += n
        yield tokens


def generate(
    model: GPT,
    prompt: jax.Array,
    key: jax.Array,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> jax.Array:
    """Continue each prompt by max_new_tokens tokens.

    Args:
        model: the GPT, in the compute dtype.
        prompt: (B, T) integers in [0, vocab_size), T at least 1; the model sees only the last block_size of them.
        key: typed PRNG key; new token i is drawn with fold_in(key, i).
        max_new_tokens: N, new tokens per prompt.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw only from the k most likely tokens.
        top_p: draw only from the smallest set of most likely tokens whose probabilities sum to p or more.

    Returns:
        (B, T + N) int32, each prompt followed by its new tokens.

    Raises:
        ValueError: an argument is out of its range.
    """
    rules = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    new = stream(model, prompt, key, max_new_tokens, **rules, chunk=max_new_tokens)
    return jnp.concatenate([jnp.asarray(prompt, jnp.int32), *new], axis=1)
