"""The sizes and switches of the model, and the checks that they fit together."""

import dataclasses
import math
from typing import Literal

from jaxgpt.devices.attention import Kernel
from jaxgpt.devices.remat import Remat
from jaxgpt.errors import ArgumentError
from jaxgpt.settings.checks import check_fields
from jaxgpt.settings.numbers import number

# the fields that mean something only with these values of another field
NEEDS = {
    "rope_theta": ("positions", ("rope",)),
    "rope_scaling": ("positions", ("rope",)),
    "rope_factor": ("rope_scaling", ("linear", "llama3")),
    "rope_low_freq": ("rope_scaling", ("llama3",)),
    "rope_high_freq": ("rope_scaling", ("llama3",)),
    "rope_original_size": ("rope_scaling", ("llama3",)),
    "embedding_norm": ("norm", ("layernorm", "rmsnorm")),
}


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
    dropout: float = number(0.0, zero_is_off=True)
    """Probability of zeroing attention weights and branch outputs, in [0, 1), rounded to the nearest 1/256."""
    attention_dropout: float | None = number(None, zero_is_off=True)
    """Probability of zeroing attention weights; none = dropout. With 0, fused attention kernels can train."""
    positions: Literal["learned", "none", "rope"] = "learned"
    """Position information: a learned embedding table, none, or rotations of queries and keys (rope, Llama)."""
    lm_head: Literal["linear", "tied", "none"] = "linear"
    """Source of the logits: a linear layer, the token table (tied, GPT-2), or the stream itself (none, bigram)."""
    mlp_ratio: int = 4
    """Hidden channels of the feed-forward layer as a multiple of n_embd; 0 = no feed-forward layer."""
    projection: bool = True
    """Linear layers that project attention and feed-forward outputs back into the residual stream."""
    residual: bool = True
    """Skip connections around the attention and feed-forward layers."""
    norm: Literal["layernorm", "none", "rmsnorm"] = "layernorm"
    """Norm before the attention layer, the feed-forward layer and the head: layernorm, none, or rmsnorm (Llama)."""
    activation: Literal["relu", "gelu", "gelu_tanh", "relu2", "silu"] = "relu"
    """Feed-forward nonlinearity: relu (lecture), gelu (erf form, nanoGPT), gelu_tanh (GPT-2), relu2 (the square of
    relu, Primer), silu (Llama, with gated)."""
    bias: Literal["all", "no_qkv", "none", "qkv"] = "no_qkv"
    """Bias vectors in all layers (GPT-2), in all but query, key and value (no_qkv, lecture), in none (nanoGPT), or
    only in query, key and value (qkv, Qwen2)."""
    embedding_dropout: bool = False
    """Also apply dropout to the embeddings (GPT-2)."""
    init: Literal["normal", "scaled", "torch", "zero"] = "normal"
    """Initial weights: normal; scaled = normal, divided by sqrt(2 n_layer) in projections into the stream (GPT-2);
    torch = PyTorch's defaults, which the lecture uses until its last rungs; zero = 0 in projections into the stream,
    uniform by fan-in in the other linear layers."""
    attention: Kernel = "auto"
    """Attention kernel: xla (the lecture's lines), cudnn (NVIDIA GPU, bfloat16), splash (TPU), or auto (cudnn or splash
    where supported, else xla). Attention dropout, and what a kernel does not take, always use xla."""
    remat: Remat = "none"
    """Recompute in the backward pass to save memory: nothing, all but weight matmuls (dots), or whole blocks (full)."""
    rope_theta: float = 10_000.0
    """Base of the rotations' wavelengths (positions rope)."""
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    """Stretch the rotations to longer contexts: none, linear (positions divided by rope_factor), or llama3 (only long
    wavelengths are divided)."""
    rope_factor: float = 1.0
    """Factor of rope_scaling."""
    rope_low_freq: float = 1.0
    """llama3 divides wavelengths above rope_original_size / rope_low_freq by the whole rope_factor."""
    rope_high_freq: float = 4.0
    """llama3 leaves wavelengths below rope_original_size / rope_high_freq as they are."""
    rope_original_size: int = 8192
    """Context length in tokens before llama3 stretches it."""
    norm_weight: bool = True
    """Learned scale in every norm."""
    norm_eps: float = 1e-5
    """Added to the variance or mean square in every norm; GPT-2 has 1e-5, some Llamas 1e-6."""
    qk_norm: bool = False
    """RMSNorm of each head's queries and keys (Qwen3)."""
    gated: bool = False
    """Multiply the hidden channels by the activation of a second linear layer (SwiGLU, with activation silu)."""
    mlp_width: int = 0
    """Hidden channels of the feed-forward layer; 0 = mlp_ratio * n_embd."""
    n_kv_head: int = 0
    """Heads of keys and values, each shared by n_head / n_kv_head query heads; 0 = n_head."""
    head_size: int = 0
    """Channels per head; 0 = n_embd / n_head."""
    sliding_window: int = 0
    """Keys that a token attends to, its own included; 0 = all before it."""
    logit_softcap: float = 0.0
    """Bound c of the logits, which become c tanh(logits / c); 0 = no bound."""
    embedding_norm: bool = False
    """Norm after the embeddings, of the same kind as the other norms."""
    value_embeddings: bool = False
    """A token table in each block, whose rows are added to the values."""

    def __post_init__(self):
        check_fields(self)
        for name, minimum in (("vocab_size", 0), ("block_size", 1), ("n_layer", 0), ("n_head", 1), ("n_embd", 0)):
            self._check(name, getattr(self, name) >= minimum, f"use {minimum} or more")
        for name in ("dropout", "attention_dropout"):
            probability = "use a probability from 0 up to but not including 1"
            self._check(name, 0.0 <= (getattr(self, name) or 0.0) < 1.0, probability)
        for name in ("mlp_width", "n_kv_head", "head_size", "sliding_window"):
            self._check(name, getattr(self, name) >= 0, "use 0 (the default) or more")
        for name in ("norm_eps", "rope_theta", "rope_factor", "rope_low_freq", "rope_high_freq", "rope_original_size"):
            self._check(name, 0 < getattr(self, name) < math.inf, "use a finite number above 0")
        self._check("logit_softcap", 0 <= self.logit_softcap < math.inf, "use a finite number above 0, or 0 for none")
        self._check_attention()
        self._check_feed_forward()
        if self.lm_head == "none" and self.vocab_size and self.width != self.vocab_size:
            raise ArgumentError(f"lm_head none takes the stream as logits, but n_embd is {self.n_embd}: use n_embd 0")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, (other, values) in NEEDS.items():
            fits = getattr(self, name) == defaults[name] or getattr(self, other) in values
            self._check(name, fits, f"use it with {other} {' or '.join(values)}, or leave it out")

    def _check(self, name: str, fits: bool, remedy: str) -> None:
        if not fits:
            raise ArgumentError(f"{name} is {getattr(self, name)}: {remedy}")

    def _check_attention(self) -> None:
        if self.n_layer and not self.head_size and self.n_embd % self.n_head:
            raise ArgumentError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: change one of them")
        if self.n_head % self.kv_heads:
            divides = f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}"
            raise ArgumentError(f"{divides}: use a divisor of n_head, or 0 for n_head")
        if self.positions == "rope" and self.n_layer and self.channels_per_head % 2:
            raise ArgumentError(f"heads have {self.channels_per_head} channels: positions rope needs an even head_size")
        if self.head_size and not self.projection and self.n_head * self.head_size != self.width:
            together = f"n_head {self.n_head} * head_size {self.head_size} is not n_embd {self.width}"
            raise ArgumentError(f"{together}: use head_size 0 without projection")
        fits = self.sliding_window <= self.block_size
        self._check("sliding_window", fits, f"use at most block_size {self.block_size}, or 0 for all keys")
        needed = self.rope_scaling != "llama3" or self.rope_low_freq < self.rope_high_freq
        self._check("rope_low_freq", needed, f"use less than rope_high_freq {self.rope_high_freq}")

    def _check_feed_forward(self) -> None:
        if self.mlp_ratio < 0 or (self.mlp_ratio > 1 and not self.projection and not self.mlp_width):
            raise ArgumentError(f"mlp_ratio is {self.mlp_ratio}: use 0 or more, and at most 1 without projection")
        left_out = "mlp_ratio 0 leaves the feed-forward layer out"
        self._check("mlp_width", self.mlp_ratio or not self.mlp_width, f"{left_out}: use 0, or another mlp_ratio")
        self._check("gated", bool(self.mlp_ratio) or not self.gated, f"{left_out}: use false, or another mlp_ratio")
        fits = self.projection or self.mlp_width in (0, self.width)
        self._check("mlp_width", fits, f"use 0 or n_embd {self.width} without projection")

    @property
    def width(self) -> int:
        """Channels C of the residual stream."""
        return self.n_embd or self.vocab_size

    @property
    def attention_rate(self) -> float:
        """Probability of zeroing attention weights: attention_dropout, or dropout if that is not set."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout

    @property
    def kv_heads(self) -> int:
        """Heads K of keys and values per block."""
        return self.n_kv_head or self.n_head

    @property
    def channels_per_head(self) -> int:
        """Channels D of a head."""
        return self.head_size or self.width // self.n_head

    @property
    def hidden(self) -> int:
        """Hidden channels of the feed-forward layer; 0 without one."""
        return self.mlp_width or self.mlp_ratio * self.width

    @property
    def span(self) -> int:
        """Keys that the last token of a window attends to."""
        return self.sliding_window or self.block_size

    @property
    def attention_parameters(self) -> int:
        """Parameter count of the matrices of one attention layer."""
        heads = self.n_head * (1 + self.projection) + 2 * self.kv_heads
        return self.width * heads * self.channels_per_head

    @property
    def feed_forward_parameters(self) -> int:
        """Parameter count of the matrices of one feed-forward layer."""
        return self.width * self.hidden * (1 + self.gated + self.projection)

    @property
    def block_parameters(self) -> int:
        """Approximate parameter count of all blocks: their matrices, with projections, and 4 n_embd for mlp_ratio."""
        attention = 2 * (self.n_head + self.kv_heads) * self.channels_per_head
        feed_forward = (2 + self.gated) * (self.mlp_width or 4 * self.width)
        return self.n_layer * self.width * (attention + feed_forward)

    @property
    def value_channels(self) -> int:
        """Channels of the value embeddings of a block; 0 without any."""
        return self.kv_heads * self.channels_per_head if self.value_embeddings else 0

    @property
    def split_sizes(self) -> tuple[int, ...]:
        """The sizes that a mesh must divide, as `sharding.check_sizes` takes them."""
        return self.width, self.n_head, self.n_kv_head, self.mlp_width, self.value_channels

    @property
    def looked_up(self) -> int:
        """Parameter count of the tables that no matrix product reads: positions, and the value embeddings."""
        positions = self.block_size * self.width if self.positions == "learned" else 0
        return positions + self.n_layer * self.vocab_size * self.value_channels
