"""One Flax model with switches, for every rung of the lecture and for GPT-2.

Shapes in all files: B batch, T query time, S key time, C channels (n_embd), H heads, K heads of keys and values, D head
size, V vocabulary. What a switch replaces is made in layers.py.
"""

import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.devices.attention import causal
from jaxgpt.devices.dropout import Dropout
from jaxgpt.devices.matmul import project
from jaxgpt.devices.remat import call_block
from jaxgpt.devices.sharding import pin_batch
from jaxgpt.errors import ArgumentError
from jaxgpt.gpt_config import GPTConfig as GPTConfig  # exported: also importable from here
from jaxgpt.layers import (
    ACTIVATIONS,
    ModuleList,
    SoftCap,
    has_bias,
    head_norm,
    into_stream,
    linear,
    norm,
    replace,
    rotation,
    table,
    unchanged,
)


class Cache(NamedTuple):
    """The keys and values of earlier tokens, for decoding one token at a time.

    `layers` holds two (B * K, S, D) arrays per layer, the keys, rotated to their positions, and the values. `length` ()
    int32 tokens were put in, token p at place p mod S, so that a full cache holds the last S of them. (XLA's CPU
    backend would copy (B, K, S, D) arrays for every token.)
    """

    layers: tuple[tuple[jax.Array, jax.Array], ...]
    length: jax.Array


class Attention(nnx.Module):
    """Causal self-attention with H heads: the tokens communicate.

    Source: Vaswani et al. 2017, "Attention is all you need", section 3.2. With fewer heads of keys and values than of
    queries: Ainslie et al. 2023, "GQA".
    """

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        H, K, D = config.n_head, config.kv_heads, config.channels_per_head
        self.head_size, self.kernel, self.window = D, config.attention, config.sliding_window
        bias = config.bias in ("all", "qkv")
        self.query, self.key, self.value = (
            linear(config.width, heads * D, bias, config.init, rngs) for heads in (H, K, K)
        )
        self.dropout = Dropout(config.attention_rate)
        self.proj = into_stream(config, H * D, rngs)
        self.query_norm, self.key_norm = head_norm(config, rngs), head_norm(config, rngs)
        self.rotate = rotation(config)
        tables = config.value_embeddings
        self.value_embedding_table = table(config.vocab_size, K * D, config.init, rngs) if tables else None

    def __call__(self, x, keys_values=None, start=0, rngs=None, documents=None, tokens=None):
        """Let each token attend to itself and to the tokens before it.

        Args:
            x: (B, T, C), the normalised stream.
            keys_values: those of earlier tokens, two (B * K, S, D) arrays with room for these T; None = there are none.
            start: () integer, the position of the first of the T tokens in `keys_values`.
            rngs: source of the dropout masks; None switches dropout off.
            documents: (B, T) integers; a token attends only to tokens of its own document. None = all are one.
            tokens: (B, T) integers; only value embeddings need them.

        Returns:
            (B, T, C), and the keys and values that the queries could see, each (B * K, S, D).
        """
        B, T, _ = x.shape
        q = self.rotate(self.query_norm(self._heads(self.query(x))), start)
        k = self.rotate(self.key_norm(self._heads(self.key(x))), start)
        v = self.value(x)
        if self.value_embedding_table is not None:
            v = (v + self.value_embedding_table(pin_batch(tokens))).astype(x.dtype)
        v = self._heads(v)
        kv = self._flat(k), self._flat(v)
        if keys_values is not None:  # decoding: the new keys and values go behind the earlier ones
            place = start % keys_values[0].shape[1]
            kv = tuple(jax.lax.dynamic_update_slice_in_dim(*pair, place, 1) for pair in zip(keys_values, kv))
            out = self._attend(self._flat(q), *kv, None, start, rngs)
        elif rngs is not None and self.dropout.rate:
            out = self._attend(q, k, v, documents, start, rngs)
        else:
            out = causal(q, k, v, self.kernel, self._attend, self.window, documents)
        out = out.reshape(B, -1, T, self.head_size).swapaxes(1, 2).reshape(B, T, -1)  # the heads are concatenated
        return self.proj(out), kv

    def _attend(self, q, k, v, documents=None, start=0, rngs=None):  # (..., H, T, D), (..., K, S, D) -> (..., H, T, D)
        T, (S, D), n = q.shape[-2], k.shape[-2:], q.shape[-3] // k.shape[-3]
        rows = q.reshape(*k.shape[:-2], n * T, D)  # the n query heads that share keys are rows of one product
        scores = jnp.einsum("...td,...sd->...ts", rows, k, preferred_element_type=jnp.float32) * D**-0.5
        visible = jnp.concatenate([self._visible(documents, start, T, S)] * n, axis=-2)
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(q.dtype)
        return jnp.einsum("...ts,...sd->...td", self.dropout(weights, rngs), v).reshape(q.shape)

    def _visible(self, documents, start, T, S):  # -> (T, S), or with documents (B, 1, T, S)
        keys, queries = jnp.arange(S), start + jnp.arange(T)[:, None]
        visible = keys <= queries  # a lower triangle
        if T == 1:  # a full cache holds the last S tokens: the position of the one at each place, below 0 if none is
            keys = queries - (queries - keys) % S
            visible = keys >= 0
        if self.window:
            visible &= keys > queries - self.window
        if documents is not None:
            visible &= documents[:, None, :, None] == documents[:, None, None, :]
        return visible

    def _heads(self, x):  # (B, T, C) -> (B, H, T, D)
        return x.reshape(*x.shape[:2], -1, self.head_size).swapaxes(1, 2)

    def _flat(self, heads):  # (B, H, T, D) -> (B * H, T, D)
        return heads.reshape(-1, *heads.shape[2:])


class MLP(nnx.Module):
    """The feed-forward layer: each token computes on its own."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        self.fc = linear(config.width, config.hidden, has_bias(config), config.init, rngs)
        self.activation = ACTIVATIONS[config.activation]
        self.proj = into_stream(config, config.hidden, rngs)

    def __call__(self, x):
        """Transform each token.

        Args:
            x: (B, T, C), the normalised stream.

        Returns:
            (B, T, C).
        """
        return self.proj(self.activation(self.fc(x)))


class GatedMLP(MLP):
    """A feed-forward layer whose hidden channels are multiplied by a gate.

    Source: Shazeer 2020, "GLU variants improve transformer".
    """

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.gate = linear(config.width, config.hidden, has_bias(config), config.init, rngs)

    def __call__(self, x):
        """Like `MLP`."""
        return self.proj(self.activation(self.gate(x)) * self.fc(x))


class Block(nnx.Module):
    """A transformer block: communication (attention), then computation (feed-forward)."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        self.ln_1 = norm(config, rngs)
        self.attn = Attention(config, rngs=rngs)
        self.ln_2 = norm(config, rngs)
        feed_forward = GatedMLP if config.gated else MLP
        self.mlp = feed_forward(config, rngs=rngs) if config.mlp_ratio else None
        self.dropout = Dropout(config.dropout)
        self.join = operator.add if config.residual else replace

    def __call__(self, x, keys_values=None, start=0, rngs=None, documents=None, tokens=None):
        """Let the tokens communicate, then let each compute.

        Args:
            x: (B, T, C), the stream.
            keys_values, start, rngs, documents, tokens: as for `Attention`.

        Returns:
            The stream after the block, (B, T, C), and the keys and values of its attention layer.
        """
        attended, keys_values = self.attn(self.ln_1(x), keys_values, start, rngs, documents, tokens)
        x = self.join(x, self.dropout(attended, rngs))
        if self.mlp is not None:
            x = self.join(x, self.dropout(self.mlp(self.ln_2(x)), rngs))
        return x, keys_values


class GPT(nnx.Module):
    """The language model: from tokens to the logits of the next token.

    Source: Radford et al. 2019, "Language models are unsupervised multitask learners"; Karpathy, "Let's build GPT".
    """

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        if not config.vocab_size:
            raise ArgumentError("vocab_size is 0: give GPTConfig the tokenizer's vocab_size")
        self.config = config
        self.dtype = None  # of the activations; None = as the parameters
        V, C = config.vocab_size, config.width
        learned = config.positions == "learned"
        self.token_embedding_table = table(V, C, config.init, rngs)
        self.position_embedding_table = table(config.block_size, C, config.init, rngs) if learned else None
        self.dropout = Dropout(config.dropout if config.embedding_dropout else 0.0)
        self.blocks = ModuleList([Block(config, rngs=rngs) for _ in range(config.n_layer)])
        self.ln_f = norm(config, rngs)
        linear_head = config.lm_head == "linear"
        self.lm_head = linear(C, V, has_bias(config), config.init, rngs) if linear_head else None
        self.embedding_norm = norm(config, rngs) if config.embedding_norm else unchanged
        self.softcap = SoftCap(config.logit_softcap) if config.logit_softcap else unchanged

    def __call__(
        self, tokens: jax.Array, *, documents: jax.Array | None = None, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        """Compute the logits of the next token at every position.

        Args:
            tokens: (B, T) integers in [0, vocab_size), T at most block_size.
            documents: (B, T) integers; a token attends only to tokens of its own document. None = all are one.
            rngs: source of the dropout masks; None switches dropout off.

        Returns:
            (B, T, V) float32 logits.

        Raises:
            ArgumentError: the tokens are not a (B, T) array of integers, T is greater than block_size, or the documents
                have another shape or come with a cache.
        """
        x, _ = self.hidden(tokens, documents=documents, rngs=rngs)
        return self.logits(x)

    def hidden(self, tokens: jax.Array, cache: Cache | None = None, *, documents=None, rngs: nnx.Rngs | None = None):
        """Compute the stream that the head reads.

        Args:
            tokens, documents, rngs: as for `__call__`.
            cache: the tokens before these; it must have room for all T, unless T is 1.

        Returns:
            (B, T, C), and the Cache including these tokens.

        Raises:
            ArgumentError: as for `__call__`.
        """
        T = self._checked_length(tokens)
        if documents is not None and (cache is not None or jnp.shape(documents) != tokens.shape):
            raise ArgumentError(
                f"documents of shape {jnp.shape(documents)}, {'no' if cache is None else 'a'} cache: "
                f"pass one for each token, {tokens.shape}, and no cache"
            )
        start = jnp.int32(0) if cache is None else cache.length
        # pin_batch: on a mesh, each device keeps its rows of the batch; elsewhere it is the identity
        x = pin_batch(self.dropout(self.embed(tokens, start), rngs))
        layers = [None] * len(self.blocks) if cache is None else list(cache.layers)
        for i, block in enumerate(self.blocks):
            x, layers[i] = call_block(block, x, layers[i], start, rngs, self.config.remat, documents, tokens)
            x = pin_batch(x)
        return self.ln_f(x), Cache(tuple(layers), start + T)

    def _checked_length(self, tokens) -> int:
        if getattr(tokens, "ndim", None) != 2 or not jnp.issubdtype(getattr(tokens, "dtype", None), jnp.integer):
            kind = f"{getattr(tokens, 'dtype', type(tokens).__name__)} of shape {getattr(tokens, 'shape', '?')}"
            raise ArgumentError(f"tokens are {kind}: pass an array of integers (B, T), such as ids[None]")
        if tokens.shape[1] > self.config.block_size:
            limit = f"block_size {self.config.block_size}"
            raise ArgumentError(f"{tokens.shape[1]} tokens do not fit {limit}: pass only the last ones")
        return tokens.shape[1]

    def embed(self, tokens: jax.Array, start: jax.Array | int = 0) -> jax.Array:
        """Look up the tokens and their positions.

        Args:
            tokens: (B, T) integers.
            start: () integer, the position of the first token.

        Returns:
            The sum of both embeddings, normalised if a switch says so: (B, T, C), rounded to `dtype`.
        """
        x = self.token_embedding_table(pin_batch(tokens))
        if self.position_embedding_table is not None:
            x = x + self.position_embedding_table(start + jnp.arange(tokens.shape[1]))
        x = self.embedding_norm(x)
        return x if self.dtype is None else x.astype(self.dtype)

    def logits(self, x: jax.Array, padded: bool = False) -> jax.Array:
        """Apply the head.

        Args:
            x: (B, T, C), from `hidden`.
            padded: on a mesh, the tables may be padded: keep the logits of the padding, as -inf. Cutting them off, and
                their gradient, would copy all logits.

        Returns:
            (B, T, V) float32, or a larger V if `padded`.
        """
        if self.config.lm_head == "none":
            logits = x.astype(jnp.float32)
        elif self.lm_head is None:
            logits = project("btc,vc->btv", x, self.token_embedding_table.embedding[...])
        else:
            logits, bias = project("btc,cv->btv", x, self.lm_head.kernel[...]), self.lm_head.bias
            logits = logits if bias is None else logits + bias[...]
        V, logits = self.config.vocab_size, self.softcap(logits)
        if padded and logits.shape[-1] > V:
            return jnp.where(jnp.arange(logits.shape[-1]) < V, logits, -jnp.inf)
        return logits[..., :V]
