"""Text from a model: `generate`, and `stream`, which returns the same tokens in pieces.

The prompt is computed once (prefill). Then each new token is computed with a cache of the keys and values before it
(decode), until the window of block_size tokens is full. From then on the window slides, as in the lecture.
"""

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.errors import ArgumentError
from jaxgpt.model import GPT, Cache
from jaxgpt.settings.checks import check_key, check_number, check_prompt, check_stop

NOISE = 1 << 26  # maximum number of random values drawn at a time
CAPACITY = 1024  # tokens that the smallest cache of a model with a long window has room for
# tokens that one call computes at most: with few sizes, another length of prompt or text compiles nothing
PROMPT_PIECES = (256, 32)
PIECES = (64, 8)


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
        ArgumentError: a number is out of its range.
    """
    zero_or_more = "use a finite number, 0 (always the most likely token) or above"
    check_number("temperature", temperature, lambda t: math.isfinite(t) and t >= 0, zero_or_more)
    if top_k is not None:
        check_number("top_k", top_k, lambda k: operator.index(k) >= 1, "use a whole number of tokens, 1 or more")
    if top_p is not None:
        check_number("top_p", top_p, lambda p: 0 < p <= 1, "use a probability above 0 and up to 1")
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


def capacity_for(n: int, block_size: int) -> int:
    """Return the room of a cache for n tokens: a window of 131,072 is not allocated for a short text."""
    return min(block_size, max(CAPACITY, 1 << (n - 1).bit_length()))


def _empty(model: GPT, rows: int, capacity: int) -> Cache:
    """A cache that holds no tokens."""
    config, dtype = model.config, model.token_embedding_table.embedding.dtype
    zeros = jnp.zeros((rows * config.kv_heads, capacity, config.channels_per_head), dtype)
    return Cache(((zeros, zeros),) * config.n_layer, np.int32(0))


@jax.jit
def _prefill(model: GPT, tokens: jax.Array, cache: Cache) -> Cache:
    """The cache with (B, n) more tokens."""
    return model.hidden(tokens, cache)[1]


def _hidden(model: GPT, token: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """`model.hidden` of one more token per row, (B,), after a cache whose length is () or, per row, (B,)."""
    if jnp.ndim(cache.length) == 0:
        return model.hidden(token[:, None], cache)
    rows = len(token)
    by_row = jax.tree.map(lambda a: a.reshape(rows, -1, *a.shape[1:]), cache.layers)
    x, grown = jax.vmap(lambda token, *cache: model.hidden(token[None, None], Cache(*cache)))(
        token, by_row, cache.length
    )
    return x[:, 0], Cache(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), grown.layers), grown.length)


def _in_turn(step: Callable, carry: Any, noise: jax.Array, count: jax.Array) -> tuple[Any, jax.Array]:
    """`jax.lax.scan` of a step that draws a token per row, for the first `count` of n tokens.

    Returns:
        The carry, and (B, n) int32 tokens, 0 for those that are not computed.
    """

    def take(carry, x):
        i, noise = x
        return jax.lax.cond(i < count, step, lambda carry, noise: (carry, none), carry, noise)

    n, none = len(noise), jnp.zeros(noise.shape[1], jnp.int32)
    carry, tokens = jax.lax.scan(take, carry, (jnp.arange(n), noise))
    return carry, tokens.T


@partial(jax.jit, static_argnames="n")
def _decode(model: GPT, token: jax.Array, cache: Cache, key: jax.Array, rule: Rule, first, count, n: int):
    """Decode (B, n) new tokens, of which `count` are computed, from number `first` on, into the cache.

    Also return the last one and the cache.
    """

    def step(carry, noise):
        token, cache = carry
        x, cache = _hidden(model, token, cache)
        token = sample(model.logits(x)[:, 0], noise, rule)
        return (token, cache), token

    (token, cache), tokens = _in_turn(step, (token, cache), _noise(key, first, n, len(token), model), count)
    return tokens, token, cache


@jax.jit
def _extend(model: GPT, piece: jax.Array, first: jax.Array, length: jax.Array, cache: Cache) -> Cache:
    """Put (B, n) tokens, which follow a full window, into the cache of prompts.

    The first of them has number `first` of its prompt, of which `length` tokens count, () or, per row, (B,).
    """

    def step(i, cache):
        _, grown = _hidden(model, jax.lax.dynamic_index_in_dim(piece, i, 1, keepdims=False), cache)
        # what a row writes after its end is where its next token goes
        return Cache(grown.layers, jnp.where(first + i < length, grown.length, cache.length))

    return jax.lax.fori_loop(0, jnp.minimum(jnp.max(length) - first, piece.shape[1]), step, cache)


def _last_logits(model: GPT, window: jax.Array) -> jax.Array:
    """`model(window)[:, -1]`, where the last block computes only keys and values for the tokens before the last one.

    `python benchmarks/tricks.py last_block` measures what this gains.
    """
    x = model.embed(window)
    for i, block in enumerate(model.blocks):
        if i < len(model.blocks) - 1:
            x, _ = block(x, tokens=window)
        else:
            _, keys_values = block.attn(block.ln_1(x), tokens=window)  # XLA removes the unused attention output
            x, _ = block(x[:, -1:], keys_values, window.shape[1] - 1, tokens=window[:, -1:])
    return model.logits(model.ln_f(x[:, -1:]))[:, 0]


@partial(jax.jit, static_argnames="n")
def _slide(model: GPT, window: jax.Array, key: jax.Array, rule: Rule, first, count, n: int):
    """Like `_decode`, but after a full (B, block_size) window, which slides by one each; also return it.

    Positions are learned, so a token that moves gets new keys and values: a cache would be invalid.
    """

    def step(window, noise):
        token = sample(_last_logits(model, window), noise, rule)
        return jnp.concatenate([window[:, 1:], token[:, None]], axis=1), token

    window, tokens = _in_turn(step, window, _noise(key, first, n, len(window), model), count)
    return tokens, window


@partial(jax.jit, static_argnames="n")
def _slide_rows(model: GPT, window: tuple[jax.Array, jax.Array], key: jax.Array, rule: Rule, first, count, n: int):
    """`_slide` for rows of different lengths: `window` is (B, block_size) tokens, and the length of each row, (B,).

    A row fills its window before it slides.
    """

    def step(carry, noise):
        window, length = carry
        x, _ = model.hidden(window)
        last = jnp.take_along_axis(x, (length - 1)[:, None, None], axis=1)
        token = sample(model.logits(last)[:, 0], noise, rule)
        full = length == window.shape[1]
        window = jnp.where(full[:, None], jnp.roll(window, -1, axis=1), window)
        length = jnp.where(full, length, length + 1)
        here = jnp.arange(window.shape[1]) == (length - 1)[:, None]
        return (jnp.where(here, token[:, None], window), length), token

    window, tokens = _in_turn(step, window, _noise(key, first, n, len(window[0]), model), count)
    return tokens, window


def _join(prompt: Any, new: list[jax.Array], lengths: Any, xp: Any) -> Any:
    """Each row's prompt, its new tokens, then its padding: (B, T) and N new tokens -> (B, T + N) int32."""
    joined = xp.concatenate([xp.asarray(each, np.int32) for each in (prompt, *new)], axis=1)
    if lengths is None:
        return joined
    T = prompt.shape[1]
    position = xp.arange(joined.shape[1])
    order = xp.where(position >= T, 1, xp.where(position < lengths[:, None], 0, 2))
    return xp.take_along_axis(joined, xp.argsort(order, axis=1, stable=True), axis=1)


def _cache_of(model: GPT, prompt: Any, length: Any, capacity: int, xp: Any) -> Cache:
    """The cache of the first `length` tokens, () or (B,), of (B, T) prompts.

    The padding is never attended to: attention is causal, and decoding overwrites it.
    """
    T, block_size = prompt.shape[1], model.config.block_size
    in_window, padded = min(T, block_size), xp.pad(prompt, ((0, 0), (0, max(PROMPT_PIECES))))
    cache, done = _empty(model, len(prompt), capacity), 0
    while done < in_window:
        n = min(_size(PROMPT_PIECES, in_window - done), capacity)
        start = min(done, capacity - n)  # a piece that would end outside the cache begins earlier
        cache = _prefill(model, padded[:, start : start + n], cache._replace(length=np.int32(start)))
        done = start + n
    cache = cache._replace(length=xp.minimum(length, np.int32(in_window)))
    for first in range(block_size, T, PROMPT_PIECES[-1]):
        piece = padded[:, first : first + PROMPT_PIECES[-1]]
        cache = _extend(model, piece, np.int32(first), length, cache)
    return cache


def _size(sizes: Sequence[int], left: int) -> int:
    """The largest size of which more than a half is needed, else the smallest."""
    return next((size for size in sizes if size < 2 * left), sizes[-1])


def _rolls(model: GPT) -> bool:
    """Whether the cache of a full window goes on: distances are all that its positions mean."""
    return model.config.positions == "rope"


def _pieces(model, prompt, key, max_new_tokens, rule, lengths, sizes, xp) -> Iterator[jax.Array]:
    """The new tokens of `stream`, as if there were no stop tokens.

    What is not compiled is computed with `xp`: NumPy, which compiles nothing, or under jax.jit jax.numpy.
    """
    block_size, prompt = model.config.block_size, xp.asarray(prompt, np.int32)
    rows, T = prompt.shape
    limit = max(NOISE // (rows * model.config.vocab_size), 1)
    token, length = prompt[:, -1], np.int32(T - 1)  # decoding starts with the last token, after `length` others
    if lengths is not None:
        # the padding may be any integers, and ids outside the table would put NaN into the cache
        prompt = xp.where(xp.arange(T) < lengths[:, None], prompt, 0)
        length = lengths - 1
        token = xp.take_along_axis(prompt, length[:, None], axis=1)[:, 0]
    # a full window slides at once
    room = max_new_tokens if _rolls(model) else block_size - T + 1 if T < block_size else 0
    if room:
        capacity = capacity_for(T + max_new_tokens, block_size)
        cache = _cache_of(model, prompt[:, :-1], length, capacity, xp)
    new, done = [], 0

    def first_of(piece: jax.Array, n: int) -> jax.Array:
        new.append(piece if n == piece.shape[1] else _array(xp.asarray(piece)[:, :n]))
        return new[-1]

    while done < max_new_tokens and room:
        left = min(max_new_tokens - done, room)
        size = min(_size(sizes, left), limit)
        n = min(size, left)
        tokens, token, cache = _decode(model, token, cache, key, rule, np.int32(done), np.int32(n), size)
        done, room = done + n, room - n
        yield first_of(tokens, n)
    if done == max_new_tokens:
        return
    text, slide = _join(prompt, new, lengths, xp), _slide
    window = text[:, -block_size:]
    if lengths is not None:
        first = xp.maximum(lengths + done - block_size, 0)
        window = xp.take_along_axis(text, first[:, None] + xp.arange(block_size), axis=1)
        window, slide = (window, xp.minimum(lengths + done, block_size)), _slide_rows
    while done < max_new_tokens:
        size = min(_size(sizes, max_new_tokens - done), limit)
        n = min(size, max_new_tokens - done)
        tokens, window = slide(model, window, key, rule, np.int32(done), np.int32(n), size)
        done += n
        yield first_of(tokens, n)


def _fill(last: Any, new: Any, stop: Any, xp: Any) -> tuple[Any, Any, Any]:
    """Fill each row of (B, n) new tokens with its first stop token, from that token on.

    `last`, (B,), are the tokens before them: a row whose last token is a stop token has ended already. Also return the
    new last tokens, and whether all rows have ended.
    """
    seen = xp.concatenate([last[:, None], xp.asarray(new)], axis=1)
    found = xp.isin(seen, stop)
    filler = xp.take_along_axis(seen, xp.argmax(found, axis=1)[:, None], axis=1)
    ended = xp.cumsum(found, axis=1) > 0
    seen = xp.where(ended, filler, seen)
    return _array(seen[:, 1:]), seen[:, -1], ended[:, -1].all()


def _until_stop(pieces: Iterable[jax.Array], rows: int, stop: Any, xp: Any) -> Iterator[jax.Array]:
    """The pieces up to the one in which the last row ends; each row is filled with its first stop token."""
    last = xp.full(rows, -1, np.int32)  # a stop token in the prompt does not count
    for piece in pieces:
        new, last, ended = _fill(last, piece, stop, xp)
        yield new
        if xp is np and ended:
            return


def _array(value: Any) -> jax.Array:
    """An array of JAX; `jnp.asarray` would compile something for each shape."""
    return jax.device_put(value) if isinstance(value, np.ndarray) else value


def _check_model(model: Any) -> None:
    if not isinstance(model, GPT):
        remedy = "its .model" if isinstance(getattr(model, "model", None), GPT) else "a jaxgpt.GPT"
        raise ArgumentError(f"model is of type {type(model).__name__}: use {remedy}")


def stream(
    model: GPT,
    prompt: jax.Array,
    key: jax.Array,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    lengths: jax.Array | None = None,
    stop: int | Sequence[int] | None = None,
    chunk: int = 16,
) -> Iterator[jax.Array]:
    """Generate like `generate`, but return the new tokens in pieces, as soon as they are computed.

    Args:
        model, prompt, key, max_new_tokens, temperature, top_k, top_p, lengths: as for `generate`.
        stop: as for `generate`; no piece follows the one in which the last row ends.
        chunk: maximum number of tokens per piece; the last one, and the one that fills the window, may have fewer.

    Returns:
        An iterator of (B, n) int32 arrays, n from 1 to chunk. A piece is computed when it is asked for.

    Raises:
        ArgumentError: an argument has a wrong type or shape, or is out of its range.
    """
    check_number("chunk", chunk, lambda n: operator.index(n) >= 1, "use a whole number, 1 or more")
    rule = make_rule(temperature, top_k, top_p)
    return _checked_pieces(model, prompt, key, max_new_tokens, rule, lengths, stop, (operator.index(chunk),))


def _checked_pieces(model, prompt, key, max_new_tokens, rule, lengths, stop, sizes) -> Iterator[jax.Array]:
    """The new tokens, in pieces of these sizes."""
    _check_model(model)
    vocab_size, whole = model.config.vocab_size, "use a whole number, 1 or more, which is static under jax.jit"
    check_number("max_new_tokens", max_new_tokens, lambda n: operator.index(n) >= 1, whole)
    lengths = check_prompt(prompt, lengths, vocab_size)
    stop, key = check_stop(stop, vocab_size), check_key(key)
    xp = _numpy_for(model, prompt, key, lengths)
    lengths = None if lengths is None else xp.asarray(lengths, np.int32)
    pieces = _pieces(model, prompt, key, operator.index(max_new_tokens), rule, lengths, sizes, xp)
    return pieces if stop is None else _until_stop(pieces, len(prompt), xp.asarray(stop), xp)


def _numpy_for(*values: Any) -> Any:
    """NumPy, or jax.numpy if any of the values is known only when a function that is being compiled runs."""
    return jnp if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values)) else np


def generate(
    model: GPT,
    prompt: jax.Array,
    key: jax.Array,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    lengths: jax.Array | None = None,
    stop: int | Sequence[int] | None = None,
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
        lengths: (B,) integers from 1 to T, the number of tokens of each prompt; what follows them is padding, which may
            be any integers. None = T each.
        stop: token ids; after the first of them among its new tokens, a row is filled with it. None never stops.

    Returns:
        (B, T + N) int32, each prompt followed by its new tokens; a shorter prompt's padding comes last, unchanged.

    Raises:
        ArgumentError: an argument has a wrong type or shape, or is out of its range.
    """
    rule = make_rule(temperature, top_k, top_p)
    new = list(_checked_pieces(model, prompt, key, max_new_tokens, rule, lengths, stop, PIECES))
    xp = _numpy_for(new, prompt, lengths)
    if missing := max_new_tokens - sum(piece.shape[1] for piece in new):  # all rows have ended
        new.append(xp.repeat(xp.asarray(new[-1])[:, -1:], missing, axis=1))
    return _array(_join(xp.asarray(prompt), new, None if lengths is None else xp.asarray(lengths), xp))
