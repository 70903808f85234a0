"""One Flax model with switches, for every rung of the lecture and for GPT-2.

Shapes in all files: B batch, T query time, S key time, C channels (n_embd), H heads, D head size, V vocabulary.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.devices.attention import Kernel, causal
from jaxgpt.devices.dropout import Dropout
from jaxgpt.devices.matmul import dot_general
from jaxgpt.devices.remat import Remat, call_block
from jaxgpt.devices.sharding import pin_batch
from jaxgpt.errors import ArgumentError

INIT_STDDEV = 0.02  # GPT-2's value, which the lecture adopts at its end
LAYER_NORM_EPSILON = 1e-5  # as in PyTorch and GPT-2; Flax defaults to 1e-6

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),  # erf form, torch.nn.GELU()
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),  # GPT-2's
}
ModuleList = getattr(nnx, "List", list)  # Flax 0.11 has no nnx.List and accepts a plain list


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
    """Attention kernel for training: xla (the lecture's lines), cudnn (NVIDIA GPU, bfloat16), splash (TPU), or auto
    (cudnn or splash where supported, else xla). Attention dropout always uses xla."""
    remat: Remat = "none"
    """Recompute in the backward pass to save memory: nothing, all but weight matmuls (dots), or whole blocks (full)."""

    def __post_init__(self):
        for name, minimum in (("vocab_size", 0), ("block_size", 1), ("n_layer", 0), ("n_head", 1), ("n_embd", 0)):
            if getattr(self, name) < minimum:
                raise ArgumentError(f"{name} is {getattr(self, name)}: use {minimum} or more")
        if not 0.0 <= self.dropout < 1.0:
            raise ArgumentError(f"dropout is {self.dropout}: use a probability from 0 up to but not including 1")
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


# cached, because an initializer is a static attribute of its layer: a new function object forces a recompilation
_normal = functools.cache(nnx.initializers.normal)
_uniform = functools.cache(lambda bound: functools.partial(jax.random.uniform, minval=-bound, maxval=bound))


def _table(config: GPTConfig, rows: int, rngs: nnx.Rngs):
    stddev = 1.0 if config.init == "torch" else INIT_STDDEV
    table = nnx.Embed(rows, config.width, embedding_init=_normal(stddev), rngs=rngs)
    table.dtype = None  # follow the parameters' dtype at each call; nnx.Embed fixes the dtype at construction
    return table


def _linear(config: GPTConfig, inputs: int, outputs: int, bias: bool, rngs: nnx.Rngs, stddev: float = INIT_STDDEV):
    kernel_init, bias_init = _normal(stddev), nnx.initializers.zeros_init()
    if config.init == "torch":
        kernel_init = bias_init = _uniform(inputs**-0.5)
    options = {"kernel_init": kernel_init, "bias_init": bias_init, "dot_general": dot_general}
    return nnx.Linear(inputs, outputs, use_bias=bias, rngs=rngs, **options)


def _linear_into_stream(config: GPTConfig, inputs: int, rngs: nnx.Rngs):
    if not config.projection:
        return _unchanged
    scale = (2 * config.n_layer) ** -0.5 if config.init == "scaled" else 1.0
    return _linear(config, inputs, config.width, config.bias != "none", rngs, INIT_STDDEV * scale)


def _layer_norm(config: GPTConfig, rngs: nnx.Rngs):
    if config.norm == "none":
        return _unchanged
    # the fast variance, E[x^2] - E[x]^2, loses digits when the mean is large
    options = {"epsilon": LAYER_NORM_EPSILON, "use_fast_variance": False}
    return nnx.LayerNorm(config.width, use_bias=config.bias != "none", rngs=rngs, **options)


def _unchanged(x):
    return x


def _flat(heads):
    return heads.reshape(-1, *heads.shape[2:])


def _replace(_stream, branch):
    return branch


class Attention(nnx.Module):
    """Causal self-attention with H heads: the tokens communicate.

    Source: Vaswani et al. 2017, "Attention is all you need", section 3.2.
    """

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        C = config.width
        self.n_head, self.kernel = config.n_head, config.attention
        self.query, self.key, self.value = (_linear(config, C, C, config.bias == "all", rngs) for _ in range(3))
        self.dropout = Dropout(config.dropout)
        self.proj = _linear_into_stream(config, C, rngs)

    def __call__(self, x, keys_values=None, start=0, rngs=None):
        """Attend: (B, T, C) -> (B, T, C), and the keys and values that the queries could see, each (B * H, S, D).

        Without `keys_values`, the T tokens attend to each other. With them, the tokens begin at position `start`.
        """
        B, T, C = x.shape
        q, k, v = (self._heads(layer(x)) for layer in (self.query, self.key, self.value))
        kv = _flat(k), _flat(v)
        if keys_values is None and self.kernel in ("cudnn", "splash") and (rngs is None or not self.dropout.rate):
            out = causal(q, k, v, self.kernel)
            return self.proj(out.swapaxes(1, 2).reshape(B, T, C)), kv
        if keys_values is not None:
            kv = tuple(jax.lax.dynamic_update_slice_in_dim(*pair, start, 1) for pair in zip(keys_values, kv))
            q, (k, v) = _flat(q), kv
        S = k.shape[-2]
        scores = jnp.einsum("...td,...sd->...ts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        visible = jnp.arange(S) <= start + jnp.arange(T)[:, None]  # (T, S): a lower triangle
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(x.dtype)
        weights = self.dropout(weights, rngs)
        out = jnp.einsum("...ts,...sd->...td", weights, v).reshape(B, self.n_head, T, -1)
        return self.proj(out.swapaxes(1, 2).reshape(B, T, C)), kv  # the heads are concatenated

    def _heads(self, x):
        return x.reshape(*x.shape[:2], self.n_head, -1).swapaxes(1, 2)


class MLP(nnx.Module):
    """The feed-forward layer: each token computes on its own."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        C, hidden = config.width, config.mlp_ratio * config.width
        self.fc = _linear(config, C, hidden, config.bias != "none", rngs)
        self.activation = ACTIVATIONS[config.activation]
        self.proj = _linear_into_stream(config, hidden, rngs)

    def __call__(self, x):
        """Transform each token: (B, T, C) -> (B, T, C)."""
        return self.proj(self.activation(self.fc(x)))


class Block(nnx.Module):
    """A transformer block: communication (attention), then computation (feed-forward)."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        self.ln_1 = _layer_norm(config, rngs)
        self.attn = Attention(config, rngs=rngs)
        self.ln_2 = _layer_norm(config, rngs)
        self.mlp = MLP(config, rngs=rngs) if config.mlp_ratio else None
        self.dropout = Dropout(config.dropout)
        self.join = operator.add if config.residual else _replace

    def __call__(self, x, keys_values=None, start=0, rngs=None):
        """Apply the block: (B, T, C) -> (B, T, C), and the keys and values of its attention layer."""
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
        V, C = config.vocab_size, config.width
        learned = config.positions == "learned"
        self.token_embedding_table = _table(config, V, rngs)
        self.position_embedding_table = _table(config, config.block_size, rngs) if learned else None
        self.dropout = Dropout(config.dropout if config.embedding_dropout else 0.0)
        self.blocks = ModuleList([Block(config, rngs=rngs) for _ in range(config.n_layer)])
        self.ln_f = _layer_norm(config, rngs)
        self.lm_head = _linear(config, C, V, config.bias != "none", rngs) if config.lm_head == "linear" else None

    def __call__(self, tokens: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Compute the logits of the next token at every position.

        Args:
            tokens: (B, T) integers in [0, vocab_size), T at most block_size.
            rngs: source of the dropout masks; None switches dropout off.

        Returns:
            (B, T, V) float32 logits.

        Raises:
            ValueError: T is greater than block_size.
        """
        x, _ = self.hidden(tokens, rngs=rngs)
        return self.logits(x)

    def hidden(self, tokens: jax.Array, cache: Cache | None = None, *, rngs: nnx.Rngs | None = None):
        """Compute the (B, T, C) stream that the head reads, and the Cache including these tokens.

        Args:
            tokens, rngs: as for `__call__`.
            cache: the tokens before these; the caller keeps cache.length + T within block_size.
        """
        chex.assert_rank(tokens, 2)
        chex.assert_type(tokens, int)
        T = tokens.shape[1]
        if T > self.config.block_size:
            raise ArgumentError(f"{T} tokens do not fit block_size {self.config.block_size}: pass only the last ones")
        start = jnp.int32(0) if cache is None else cache.length
        x = pin_batch(self.dropout(self.embed(tokens, start), rngs))
        layers = [None] * len(self.blocks) if cache is None else list(cache.layers)
        for i, block in enumerate(self.blocks):
            x, layers[i] = call_block(block, x, layers[i], start, rngs, self.config.remat)
            x = pin_batch(x)
        return self.ln_f(x), Cache(tuple(layers), start + T)

    def embed(self, tokens: jax.Array, start: jax.Array | int = 0) -> jax.Array:
        """Embed tokens and their positions, which begin at `start`: (B, T) -> (B, T, C)."""
        x = self.token_embedding_table(pin_batch(tokens))
        if self.position_embedding_table is not None:
            x = x + self.position_embedding_table(start + jnp.arange(tokens.shape[1]))
        return x

    def logits(self, x: jax.Array) -> jax.Array:
        """Apply the head to the output of `hidden`: (B, T, C) -> (B, T, V) float32."""
        if self.config.lm_head == "none":
            return x.astype(jnp.float32)
        if self.lm_head is None:
            table = self.token_embedding_table.embedding[...]
            logits = jnp.einsum("btc,vc->btv", x, table, preferred_element_type=jnp.float32)
        else:
            kernel, bias = self.lm_head.kernel[...], self.lm_head.bias
            logits = jnp.einsum("btc,cv->btv", x, kernel, preferred_element_type=jnp.float32)
            logits = logits if bias is None else logits + bias[...]
        return logits[..., : self.config.vocab_size]  # on a mesh, the tables may be padded
