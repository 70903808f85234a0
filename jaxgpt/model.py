"""One Flax model with switches, for every rung of the lecture and for GPT-2.

Shapes in all files: B batch, T query time, S key time, C channels (n_embd), H heads, D head size, V vocabulary.
"""

import dataclasses
import operator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.devices.attention import Kernel, causal
from jaxgpt.devices.dropout import Dropout
from jaxgpt.devices.matmul import project
from jaxgpt.devices.remat import Remat, call_block
from jaxgpt.devices.sharding import pin_batch
from jaxgpt.errors import ArgumentError
from jaxgpt.layers import ACTIVATIONS, ModuleList, layer_norm, linear, replace, table, unchanged
from jaxgpt.settings.checks import check_fields


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Sizes and switches of the model; the switches default to the lecture's finished GPT."""

    vocab_size: int = 0
    """Number of token ids; 0 = as many as the tokenizer has."""
    block_size: int = 64
    """Maximum context length in tokens."""
    n_layer: int = 4
    """Number of blocks; 0 leaves only the embedding tables and the head."""
    n_head: int = 4
    """Attention heads per block."""
    n_embd: int = 128
    """Channels of the residual stream; 0 = vocab_size (the bigram model, whose token table holds the logits)."""
    dropout: float = 0.0
    """Probability of zeroing attention weights and branch outputs, in [0, 1), rounded to the nearest 1/256."""
    attention_dropout: float | None = None
    """Probability of zeroing attention weights; none = dropout. With 0, fused attention kernels can train."""
    positions: Literal["learned", "none"] = "learned"
    """Position information: a learned embedding table, or none."""
    lm_head: Literal["linear", "tied", "none"] = "linear"
    """Source of the logits: a linear layer, the token table (tied, GPT-2), or the stream itself (none, bigram)."""
    mlp_ratio: int = 4
    """Hidden channels of the feed-forward layer as a multiple of n_embd; 0 = no feed-forward layer."""
    projection: bool = True
    """Linear layers that project attention and feed-forward outputs back into the residual stream."""
    residual: bool = True
    """Skip connections around the attention and feed-forward layers."""
    norm: Literal["layernorm", "none"] = "layernorm"
    """Layer norm before the attention layer, the feed-forward layer and the head, or none."""
    activation: Literal["relu", "gelu", "gelu_tanh"] = "relu"
    """Feed-forward nonlinearity: relu (lecture), gelu (erf form, nanoGPT), gelu_tanh (GPT-2)."""
    bias: Literal["all", "no_qkv", "none"] = "no_qkv"
    """Bias vectors in all layers (GPT-2), in all but query, key and value (no_qkv, lecture), or in none (nanoGPT)."""
    embedding_dropout: bool = False
    """Also apply dropout to the embeddings (GPT-2)."""
    init: Literal["normal", "scaled", "torch"] = "normal"
    """Initial weights: normal; scaled = normal, divided by sqrt(2 n_layer) in projections into the stream (GPT-2);
    torch = PyTorch's defaults, which the lecture uses until its last rungs."""
    attention: Kernel = "auto"
    """Attention kernel: xla (the lecture's lines), cudnn (NVIDIA GPU, bfloat16), splash (TPU), or auto (cudnn or splash
    where supported, else xla). Attention dropout, and what a kernel does not take, always use xla."""
    remat: Remat = "none"
    """Recompute in the backward pass to save memory: nothing, all but weight matmuls (dots), or whole blocks (full)."""

    def __post_init__(self):
        check_fields(self)
        for name, minimum in (("vocab_size", 0), ("block_size", 1), ("n_layer", 0), ("n_head", 1), ("n_embd", 0)):
            if getattr(self, name) < minimum:
                raise ArgumentError(f"{name} is {getattr(self, name)}: use {minimum} or more")
        for name in ("dropout", "attention_dropout"):
            if not 0.0 <= (getattr(self, name) or 0.0) < 1.0:
                probability = "use a probability from 0 up to but not including 1"
                raise ArgumentError(f"{name} is {getattr(self, name)}: {probability}")
        if self.n_layer and self.n_embd % self.n_head:
            raise ArgumentError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: change one of them")
        if self.mlp_ratio < 0 or (self.mlp_ratio > 1 and not self.projection):
            raise ArgumentError(f"mlp_ratio is {self.mlp_ratio}: use 0 or more, and at most 1 without projection")
        if self.lm_head == "none" and self.vocab_size and self.width != self.vocab_size:
            raise ArgumentError(f"lm_head none takes the stream as logits, but n_embd is {self.n_embd}: use n_embd 0")

    @property
    def width(self) -> int:
        """Channels C of the residual stream."""
        return self.n_embd or self.vocab_size

    @property
    def attention_rate(self) -> float:
        """Probability of zeroing attention weights: attention_dropout, or dropout if that is not set."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout

    @property
    def block_parameters(self) -> int:
        """Approximate parameter count of all blocks: their matrices, for the usual feed-forward width."""
        return 12 * self.n_layer * self.width**2


class Cache(NamedTuple):
    """The keys and values of earlier tokens, for decoding one token at a time.

    `layers` holds two (B * H, S, D) arrays per layer, the keys and the values. Their first `length` () int32 positions
    are filled. (XLA's CPU backend would copy (B, H, S, D) arrays for every token.)
    """

    layers: tuple[tuple[jax.Array, jax.Array], ...]
    length: jax.Array


def _into_stream(config: GPTConfig, inputs: int, rngs: nnx.Rngs):
    """The linear layer at the end of a branch, which projects its output into the residual stream."""
    scale = (2 * config.n_layer) ** -0.5 if config.init == "scaled" else 1.0
    return linear(inputs, config.width, config.bias != "none", config.init, rngs, scale)


def _norm(config: GPTConfig, rngs: nnx.Rngs):
    return unchanged if config.norm == "none" else layer_norm(config.width, config.bias != "none", rngs)


class Attention(nnx.Module):
    """Causal self-attention with H heads: the tokens communicate.

    Source: Vaswani et al. 2017, "Attention is all you need", section 3.2.
    """

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        C = config.width
        self.n_head, self.kernel = config.n_head, config.attention
        self.query, self.key, self.value = (linear(C, C, config.bias == "all", config.init, rngs) for _ in range(3))
        self.dropout = Dropout(config.attention_rate)
        self.proj = _into_stream(config, C, rngs) if config.projection else unchanged

    def __call__(self, x, keys_values=None, start=0, rngs=None):
        """Let each token attend to itself and to the tokens before it.

        Args:
            x: (B, T, C), the normalised stream.
            keys_values: those of earlier tokens, two (B * H, S, D) arrays with room for these T; None = there are none.
            start: () integer, the position of the first of the T tokens in `keys_values`.
            rngs: source of the dropout masks; None switches dropout off.

        Returns:
            (B, T, C), and the keys and values that the queries could see, each (B * H, S, D).
        """
        B, T, C = x.shape
        q, k, v = (self._heads(layer(x)) for layer in (self.query, self.key, self.value))
        kv = self._flat(k), self._flat(v)
        if keys_values is not None:
            kv = tuple(jax.lax.dynamic_update_slice_in_dim(*pair, start, 1) for pair in zip(keys_values, kv))
            out = self._attend(self._flat(q), *kv, start, rngs)
        elif rngs is not None and self.dropout.rate:
            out = self._attend(q, k, v, start, rngs)
        else:
            out = causal(q, k, v, self.kernel, plain=self._attend)
        out = out.reshape(B, self.n_head, T, -1).swapaxes(1, 2).reshape(B, T, C)  # the heads are concatenated
        return self.proj(out), kv

    def _attend(self, q, k, v, start=0, rngs=None):  # (..., T, D), (..., S, D) -> (..., T, D)
        T, S = q.shape[-2], k.shape[-2]
        scores = jnp.einsum("...td,...sd->...ts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        visible = jnp.arange(S) <= start + jnp.arange(T)[:, None]  # (T, S): a lower triangle
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(q.dtype)
        return jnp.einsum("...ts,...sd->...td", self.dropout(weights, rngs), v)

    def _heads(self, x):  # (B, T, C) -> (B, H, T, D)
        return x.reshape(*x.shape[:2], self.n_head, -1).swapaxes(1, 2)

    def _flat(self, heads):  # (B, H, T, D) -> (B * H, T, D)
        return heads.reshape(-1, *heads.shape[2:])


class MLP(nnx.Module):
    """The feed-forward layer: each token computes on its own."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        C, hidden = config.width, config.mlp_ratio * config.width
        self.fc = linear(C, hidden, config.bias != "none", config.init, rngs)
        self.activation = ACTIVATIONS[config.activation]
        self.proj = _into_stream(config, hidden, rngs) if config.projection else unchanged

    def __call__(self, x):
        """Transform each token.

        Args:
            x: (B, T, C), the normalised stream.

        Returns:
            (B, T, C).
        """
        return self.proj(self.activation(self.fc(x)))


class Block(nnx.Module):
    """A transformer block: communication (attention), then computation (feed-forward)."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        self.ln_1 = _norm(config, rngs)
        self.attn = Attention(config, rngs=rngs)
        self.ln_2 = _norm(config, rngs)
        self.mlp = MLP(config, rngs=rngs) if config.mlp_ratio else None
        self.dropout = Dropout(config.dropout)
        self.join = operator.add if config.residual else replace

    def __call__(self, x, keys_values=None, start=0, rngs=None):
        """Let the tokens communicate, then let each compute.

        Args:
            x: (B, T, C), the stream.
            keys_values, start, rngs: as for `Attention`.

        Returns:
            The stream after the block, (B, T, C), and the keys and values of its attention layer.
        """
        attended, keys_values = self.attn(self.ln_1(x), keys_values, start, rngs)
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
        self.ln_f = _norm(config, rngs)
        linear_head = config.lm_head == "linear"
        self.lm_head = linear(C, V, config.bias != "none", config.init, rngs) if linear_head else None

    def __call__(self, tokens: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Compute the logits of the next token at every position.

        Args:
            tokens: (B, T) integers in [0, vocab_size), T at most block_size.
            rngs: source of the dropout masks; None switches dropout off.

        Returns:
            (B, T, V) float32 logits.

        Raises:
            ArgumentError: the tokens are no (B, T) array of integers, or T is greater than block_size.
        """
        x, _ = self.hidden(tokens, rngs=rngs)
        return self.logits(x)

    def hidden(self, tokens: jax.Array, cache: Cache | None = None, *, rngs: nnx.Rngs | None = None):
        """Compute the stream that the head reads.

        Args:
            tokens, rngs: as for `__call__`.
            cache: the tokens before these; the caller keeps cache.length + T within block_size.

        Returns:
            (B, T, C), and the Cache including these tokens.

        Raises:
            ArgumentError: as for `__call__`.
        """
        T = self._length(tokens)
        start = jnp.int32(0) if cache is None else cache.length
        x = pin_batch(self.dropout(self.embed(tokens, start), rngs))
        layers = [None] * len(self.blocks) if cache is None else list(cache.layers)
        for i, block in enumerate(self.blocks):
            x, layers[i] = call_block(block, x, layers[i], start, rngs, self.config.remat)
            x = pin_batch(x)
        return self.ln_f(x), Cache(tuple(layers), start + T)

    def _length(self, tokens) -> int:
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
            The sum of both embeddings, (B, T, C), rounded to `dtype`.
        """
        x = self.token_embedding_table(pin_batch(tokens))
        if self.position_embedding_table is not None:
            x = x + self.position_embedding_table(start + jnp.arange(tokens.shape[1]))
        return x if self.dtype is None else x.astype(self.dtype)

    def logits(self, x: jax.Array) -> jax.Array:
        """Apply the head.

        Args:
            x: (B, T, C), from `hidden`.

        Returns:
            (B, T, V) float32.
        """
        if self.config.lm_head == "none":
            return x.astype(jnp.float32)
        if self.lm_head is None:
            logits = project("btc,vc->btv", x, self.token_embedding_table.embedding[...])
        else:
            logits, bias = project("btc,cv->btv", x, self.lm_head.kernel[...]), self.lm_head.bias
            logits = logits if bias is None else logits + bias[...]
        return logits[..., : self.config.vocab_size]  # on a mesh, the tables may be padded
