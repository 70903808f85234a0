"""The layers that the model is built of, with their initial weights: tables, linear layers, norms, activations.

At the end, LoRA: linear layers of a frozen model that learn through adapters.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxgpt.devices.matmul import named_matmul
from jaxgpt.errors import ArgumentError
from jaxgpt.gpt_config import GPTConfig
from jaxgpt.settings.checks import check_fields

INIT_STDDEV = 0.02  # GPT-2's value, which the lecture adopts at its end

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),  # erf form, torch.nn.GELU()
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),  # GPT-2's
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021, "Primer"
    "silu": jax.nn.silu,  # Llama's
}
ModuleList = getattr(nnx, "List", list)  # Flax 0.11 has no nnx.List and accepts a plain list

# cached, because an initializer is a static attribute of its layer: a new function object forces a recompilation
_normal = functools.cache(nnx.initializers.normal)
_uniform = functools.cache(lambda bound: functools.partial(jax.random.uniform, minval=-bound, maxval=bound))
_zeros = nnx.initializers.zeros_init()


def table(rows: int, channels: int, init: str, rngs: nnx.Rngs) -> nnx.Embed:
    """Make an embedding table: integers (...) in [0, rows) -> (..., channels).

    Args:
        rows: number of ids or positions.
        channels: C, channels of each row.
        init: `GPTConfig.init`.
        rngs: source of the initial weights.
    """
    embedding = nnx.Embed(rows, channels, embedding_init=_normal(1.0 if init == "torch" else INIT_STDDEV), rngs=rngs)
    embedding.dtype = None  # follow the parameters' dtype at each call; nnx.Embed fixes the dtype at construction
    return embedding


class Linear(nnx.Linear):
    """A linear layer that may have float32 parameters for bfloat16 activations; their gradients are float32 sums."""

    def __call__(self, x):
        """(..., I) -> (..., O) in the dtype of x."""
        y = named_matmul(x, self.kernel[...])
        return y if self.bias is None else (y + self.bias[...]).astype(x.dtype)


class LayerNorm(nnx.LayerNorm):
    """A layer norm that may have float32 parameters for bfloat16 activations; it computes in float32."""

    def __call__(self, x):
        """(..., C) -> (..., C) in the dtype of x."""
        return super().__call__(x).astype(x.dtype)


class RMSNorm(nnx.RMSNorm):
    """Vectors scaled to a mean square of 1, then by a learned scale if there is one; computed in float32.

    Source: Zhang and Sennrich 2019, "Root mean square layer normalization".
    """

    def __call__(self, x):
        """(..., C) -> (..., C) in the dtype of x."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (y if self.scale is None else y * self.scale[...]).astype(x.dtype)


def linear(inputs: int, outputs: int, bias: bool, init: str, rngs: nnx.Rngs, scale: float = 1.0) -> Linear:
    """Make a linear layer: (..., inputs) -> (..., outputs).

    Args:
        inputs: channels that it reads.
        outputs: channels that it writes.
        bias: whether it adds a bias vector.
        init: `GPTConfig.init`.
        rngs: source of the initial weights.
        scale: factor of the initial standard deviation, which may be 0; PyTorch's defaults have none.
    """
    kernel_init, bias_init = _normal(INIT_STDDEV * scale), _zeros
    if init == "torch":
        kernel_init = bias_init = _uniform(inputs**-0.5)
    elif init == "zero":
        kernel_init = _uniform((3 / inputs) ** 0.5) if scale else _zeros  # a variance of 1 / inputs
    options = {"kernel_init": kernel_init, "bias_init": bias_init}
    return Linear(inputs, outputs, use_bias=bias, rngs=rngs, **options)


def into_stream(config: GPTConfig, inputs: int, rngs: nnx.Rngs) -> Callable[[jax.Array], jax.Array]:
    """Make the linear layer at the end of a branch, which projects its output into the residual stream.

    Args:
        config: says whether there is one, and with which bias and initial weights.
        inputs: channels of the branch.
        rngs: source of the initial weights.
    """
    if not config.projection:
        return unchanged
    scale = {"scaled": (2 * config.n_layer) ** -0.5, "zero": 0.0}.get(config.init, 1.0)
    return linear(inputs, config.width, has_bias(config), config.init, rngs, scale)


def has_bias(config: GPTConfig) -> bool:
    """Whether the layers other than query, key and value have bias vectors."""
    return config.bias in ("all", "no_qkv")


def norm(config: GPTConfig, rngs: nnx.Rngs) -> Callable[[jax.Array], jax.Array]:
    """Make a norm of the stream: (..., C) -> the same shape, each vector normalised.

    Args:
        config: says which.
        rngs: needed by Flax; the initial scale is 1.
    """
    options = {"epsilon": config.norm_eps, "use_scale": config.norm_weight, "rngs": rngs}
    if config.norm == "rmsnorm":
        return RMSNorm(config.width, **options)
    # the fast variance, E[x^2] - E[x]^2, loses digits when the mean is large
    options |= {"use_bias": has_bias(config), "use_fast_variance": False}
    return unchanged if config.norm == "none" else LayerNorm(config.width, **options)


def head_norm(config: GPTConfig, rngs: nnx.Rngs) -> Callable[[jax.Array], jax.Array]:
    """Make the norm of each head's queries or keys, which bounds their scores: (..., D) -> the same shape.

    Args:
        config: says whether there is one.
        rngs: needed by Flax; the initial scale is 1.

    Source: Henry et al. 2020, "Query-key normalization for transformers"; with RMSNorm, as in Qwen3.
    """
    options = {"epsilon": config.norm_eps, "use_scale": config.norm_weight, "rngs": rngs}
    return RMSNorm(config.channels_per_head, **options) if config.qk_norm else unchanged


@dataclasses.dataclass(frozen=True)  # a static attribute: equal settings must compare equal, or the model recompiles
class Rotary:
    """Rotate each pair of channels of queries and keys by an angle that grows with the token's position.

    The score of a query and a key then depends on the distance between them only. Channel i is paired with i + D/2.

    Source: Su et al. 2021, "RoFormer"; for llama3, the Llama 3.1 models, as in transformers' modeling_rope_utils.
    """

    theta: float
    scaling: str
    factor: float
    low_freq: float
    high_freq: float
    original_size: int

    def frequencies(self, D: int) -> np.ndarray:
        """Compute the angle by which each pair turns from one token to the next: (D/2,) float64, in radians."""
        frequencies = self.theta ** (-np.arange(0, D, 2) / D)
        if self.scaling == "none":
            return frequencies
        kept = 0.0  # the part of a frequency that is not divided
        if self.scaling == "llama3":
            turns = self.original_size * frequencies / (2 * math.pi)  # within the original context
            kept = np.clip((turns - self.low_freq) / (self.high_freq - self.low_freq), 0, 1)
        return kept * frequencies + (1 - kept) * frequencies / self.factor

    def __call__(self, heads: jax.Array, start: jax.Array | int = 0) -> jax.Array:
        """Rotate queries or keys.

        Args:
            heads: (..., T, D), D even.
            start: () integer, the position of the first token.

        Returns:
            The same shape and dtype; computed in float32, because bfloat16 does not tell large positions apart.
        """
        T, D = heads.shape[-2:]
        positions = (start + jnp.arange(T)).astype(jnp.float32)
        angles = positions[:, None] * jnp.asarray(self.frequencies(D), jnp.float32)  # (T, D/2)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        a, b = jnp.split(heads, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(heads.dtype)


def rotation(config: GPTConfig) -> Callable[..., jax.Array]:
    """Make the rotation of queries and keys, or what leaves them as they are."""
    if config.positions != "rope":
        return unchanged
    fields = ("theta", "scaling", "factor", "low_freq", "high_freq", "original_size")
    return Rotary(*(getattr(config, f"rope_{name}") for name in fields))


@dataclasses.dataclass(frozen=True)
class SoftCap:
    """Bound logits smoothly to (-bound, bound).

    Source: Gemma Team 2024, "Gemma 2", section 2.
    """

    bound: float

    def __call__(self, logits: jax.Array) -> jax.Array:
        """(...) float32 -> (...) float32."""
        return self.bound * jnp.tanh(logits / self.bound)


def unchanged(x: jax.Array, *_) -> jax.Array:
    """The identity, in place of a layer that is switched off."""
    return x


def replace(stream: jax.Array, branch: jax.Array) -> jax.Array:
    """Return the output of a branch instead of its sum with the stream, where skip connections are switched off."""
    return branch


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """LoRA: the weights of another run are frozen, and small matrices beside theirs, the adapters, are trained."""

    rank: int = 0
    """Rank of the adapters, which are trained beside the frozen weights of run.init_from; 0 = train all weights."""
    alpha: float = 16.0
    """Scale of the adapters: alpha / rank times their product is added to a frozen matrix."""
    on: Literal["attention", "all"] = "attention"
    """Layers that have adapters: query, key, value and projection of attention, or the feed-forward layers as well."""

    def __post_init__(self):
        check_fields(self)
        if self.rank < 0:
            raise ArgumentError(f"rank is {self.rank}: use 1 or more, or 0 to train all weights")
        if not 0 < self.alpha < math.inf:
            raise ArgumentError(f"alpha is {self.alpha}: use a finite number above 0")


class AdaptedLinear(Linear):
    """A linear layer with an adapter: x W + bias + alpha / rank (x A) B, of which only A and B are trained.

    B begins as 0, so that the first step starts from the frozen model. A begins as PyTorch's linear layers do.

    Source: Hu et al. 2021, "LoRA: low-rank adaptation of large language models", section 4.1.
    """

    def __init__(self, layer: Linear, config: LoRAConfig, rngs: nnx.Rngs):
        inputs, outputs = layer.kernel.shape
        self.kernel, self.bias = layer.kernel, layer.bias
        self.lora_a = nnx.LoRAParam(_uniform(inputs**-0.5)(rngs.params(), (inputs, config.rank)))
        self.lora_b = nnx.LoRAParam(jnp.zeros((config.rank, outputs)))
        self.scale = config.alpha / config.rank

    def __call__(self, x):
        """(..., I) -> (..., O) in the dtype of x."""
        change = named_matmul(named_matmul(x, self.lora_a[...]), self.lora_b[...])
        return super().__call__(x) + (self.scale * change).astype(x.dtype)


def adapt(block: nnx.Module, config: LoRAConfig, rngs: nnx.Rngs) -> None:
    """Give the linear layers of a block adapters.

    Args:
        block: of the model; it is changed.
        config: says which layers.
        rngs: source of the adapters' initial weights.
    """
    parts = [block.attn] if config.on == "attention" or block.mlp is None else [block.attn, block.mlp]
    for part in parts:
        for name, layer in list(vars(part).items()):
            if isinstance(layer, Linear):
                setattr(part, name, AdaptedLinear(layer, config, rngs))


def merged(frozen: dict[str, Any], adapters: dict[str, Any], config: LoRAConfig) -> dict[str, Any]:
    """Add the adapters to the matrices that they belong to: W + alpha / rank A B.

    Args:
        frozen: nested dict of the parameters of a model without adapters, in any floating dtypes.
        adapters: nested dict of float32 adapters.
        config: that they were trained with.

    Returns:
        A nested dict like `frozen`.
    """
    weights, trained = flatten_dict(frozen), flatten_dict(adapters)
    for path in trained:
        if path[-1] == "lora_a":
            kernel, b = (*path[:-1], "kernel"), trained[*path[:-1], "lora_b"]
            weights[kernel] = _merged(weights[kernel], trained[path], b, config.alpha / config.rank)
    return unflatten_dict(weights)


@jax.jit
def _merged(w, a, b, scale):
    return (w + scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)).astype(w.dtype)
