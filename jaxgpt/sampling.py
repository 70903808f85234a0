"""Text from a model: prefill once, decode with a cache while the window lasts, then slide the window."""

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

NOISE = 1 << 26  # random numbers drawn at a time


class Rule(NamedTuple):
    """How a token is chosen from the logits; None leaves a rule out. The numbers are traced: no recompilation."""

    temperature: np.float32
    top_k: np.int32 | None
    top_p: np.float32 | None


def make_rule(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Rule:
    """Check the numbers of a rule.

    Raises:
        ValueError: a number is out of its range.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ArgumentError(
            f"temperature is {temperature}: use a finite number, 0 (always the likeliest token) or above"
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
    """Temperature, then top-k, then top-p: excluded tokens get -inf.

    Args:
        logits: (B, V) float32.
        rule: temperature above 0 divides the logits; top_k keeps the k likeliest tokens (and ties); top_p keeps the
            fewest likeliest tokens whose probabilities reach p.

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
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # of the likelier tokens
        least = jnp.min(jnp.where(before < rule.top_p, descending, jnp.inf), axis=-1)
        logits = jnp.where(logits < least[:, None], -jnp.inf, logits)
    return logits


def sample(logits: jax.Array, noise: jax.Array, rule: Rule) -> jax.Array:
    """Choose a token for each row: (B, V) float32 logits -> (B,) int32; temperature 0 takes the likeliest.

    With Gumbel noise (B, V), the largest sum is a draw from the softmax. This is `jax.random.categorical`, but for the
    noise, which is drawn outside of the loop over tokens: there it is a hundred small operations a token.

    Source: Gumbel 1954, "Statistical theory of extreme values", as in Maddison et al. 2014, "A* sampling".
    """
    drawn = jnp.argmax(filter_logits(logits, rule) + noise, axis=-1)
    return jnp.where(rule.temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)


def _noise(key: jax.Array, first: jax.Array, n: int, rows: int, model: GPT) -> jax.Array:
    """For new tokens `first` and on, each from a key of its own: (n, B, V)."""
    shape = rows, model.config.vocab_size
    return jax.vmap(lambda i: jax.random.gumbel(jax.random.fold_in(key, i), shape))(first + jnp.arange(n))


def _empty(model: GPT, rows: int) -> Cache:
    """A cache of no tokens."""
    config, dtype = model.config, model.token_embedding_table.embedding.dtype
    none = jnp.zeros((rows * config.n_head, config.block_size, config.width // config.n_head), dtype)
    return Cache(((none, none),) * config.n_layer, np.int32(0))


@jax.jit
def _prefill(model: GPT, window: jax.Array, length: jax.Array) -> Cache:
    """The cache of the first `length` tokens of a (B, T) window.

    What stands behind them is never looked at: attention is causal, and decoding overwrites it.
    """
    _, cache = model.hidden(window)
    room = [(0, 0), (0, model.config.block_size - window.shape[1]), (0, 0)]
    return Cache(jax.tree.map(lambda a: jnp.pad(a, room), cache.layers), length)


@partial(jax.jit, static_argnames="n")
def _decode(model: GPT, token: jax.Array, cache: Cache, key: jax.Array, rule: Rule, first: jax.Array, n: int):
    """`n` further tokens (B, n), numbers `first` and on, while the cache has room; the last of them, and the cache."""

    def step(carry, noise):
        token, cache = carry
        x, cache = model.hidden(token[:, None], cache)
        token = sample(model.logits(x)[:, 0], noise, rule)
        return (token, cache), token

    (token, cache), tokens = jax.lax.scan(step, (token, cache), _noise(key, first, n, len(token), model))
    return tokens.T, token, cache


def _last_logits(model: GPT, window: jax.Array) -> jax.Array:
    """`model(window)[:, -1]`: the last block needs keys and values of all tokens, the rest only of the last one.

    1.28x the tokens a second of configs/shakespeare_cpu.yaml on two cores: `python benchmarks/tricks.py last_block`.
    """
    x = model.embed(window)
    for i, block in enumerate(model.blocks):
        if i < len(model.blocks) - 1:
            x, _ = block(x)
        else:
            _, seen = block.attn(block.ln_1(x))  # what this attends to is not used, so XLA leaves it out
            x, _ = block(x[:, -1:], seen, window.shape[1] - 1)
    return model.logits(model.ln_f(x[:, -1:]))[:, 0]


@partial(jax.jit, static_argnames="n")
def _slide(model: GPT, window: jax.Array, key: jax.Array, rule: Rule, first: jax.Array, n: int):
    """`n` further tokens (B, n) after a full (B, block_size) window, cropped for each as the lecture does; the window.

    Positions are learned, so a token that moves in the window has other keys and values: no cache is valid here.
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
    """`generate`, handed out as it goes: yields the new tokens as (B, 1 to chunk) int32."""
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
    rows, cached = len(window), window.shape[1] - 1  # all but the last token, which decoding begins with
    room = config.block_size - cached if cached < config.block_size - 1 else 0  # a full window slides at once
    if room and cached:
        width = min(config.block_size, 1 << (cached - 1).bit_length())  # few widths, few compilations
        cache = _prefill(model, jnp.pad(window[:, :-1], ((0, 0), (0, width - cached))), np.int32(cached))
    elif room:
        cache = _empty(model, rows)
    seen, done, most = [window], 0, max(NOISE // (rows * config.vocab_size), 1)
    while done < max_new_tokens and room:
        n = min(chunk, most, max_new_tokens - done, room)
        tokens, token, cache = _decode(model, token, cache, key, rule, np.int32(done), n)
        seen.append(tokens)
        done, room = done + n, room - n
        yield tokens
    if done < max_new_tokens:
        window = jnp.concatenate(seen, axis=1)[:, -config.block_size :]
    while done < max_new_tokens:
        n = min(chunk, most, max_new_tokens - done)
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
    """Continue each prompt.

    Args:
        model: a GPT; its weights are arguments of the compiled functions.
        prompt: (B, T) integers in [0, vocab_size), T at least 1; only the last block_size of them are seen.
        key: a typed PRNG key; new token i is drawn with fold_in(key, i).
        max_new_tokens: N, new tokens a prompt.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens only.
        top_p: draw from the fewest likeliest tokens whose probabilities reach p.

    Returns:
        (B, T + N) int32, the prompt first.

    Raises:
        ValueError: an argument is out of its range.
    """
    rules = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    new = stream(model, prompt, key, max_new_tokens, **rules, chunk=max_new_tokens)
    return jnp.concatenate([jnp.asarray(prompt, jnp.int32), *new], axis=1)
