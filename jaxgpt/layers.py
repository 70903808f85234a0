"""The layers that the model is built of, with their initial weights: tables, linear layers, norms, activations."""

import functools
from collections.abc import Callable

import jax
from flax import nnx

from jaxgpt.devices.matmul import named_matmul

INIT_STDDEV = 0.02  # GPT-2's value, which the lecture adopts at its end
LAYER_NORM_EPSILON = 1e-5  # as in PyTorch and GPT-2; Flax defaults to 1e-6

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),  # erf form, torch.nn.GELU()
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),  # GPT-2's
}
ModuleList = getattr(nnx, "List", list)  # Flax 0.11 has no nnx.List and accepts a plain list

# cached, because an initializer is a static attribute of its layer: a new function object forces a recompilation
_normal = functools.cache(nnx.initializers.normal)
_uniform = functools.cache(lambda bound: functools.partial(jax.random.uniform, minval=-bound, maxval=bound))


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


def linear(inputs: int, outputs: int, bias: bool, init: str, rngs: nnx.Rngs, scale: float = 1.0) -> Linear:
    """Make a linear layer: (..., inputs) -> (..., outputs).

    Args:
        inputs: channels that it reads.
        outputs: channels that it writes.
        bias: whether it adds a bias vector.
        init: `GPTConfig.init`.
        rngs: source of the initial weights.
        scale: factor of the initial standard deviation; PyTorch's defaults have none.
    """
    kernel_init, bias_init = _normal(INIT_STDDEV * scale), nnx.initializers.zeros_init()
    if init == "torch":
        kernel_init = bias_init = _uniform(inputs**-0.5)
    options = {"kernel_init": kernel_init, "bias_init": bias_init}
    return Linear(inputs, outputs, use_bias=bias, rngs=rngs, **options)


def layer_norm(channels: int, bias: bool, rngs: nnx.Rngs) -> LayerNorm:
    """Make a layer norm: (..., channels) -> the same shape, each vector with mean 0 and variance 1, then scaled.

    Args:
        channels: C.
        bias: whether it adds a bias vector.
        rngs: needed by Flax; the initial scale is 1.
    """
    # the fast variance, E[x^2] - E[x]^2, loses digits when the mean is large
    options = {"epsilon": LAYER_NORM_EPSILON, "use_fast_variance": False}
    return LayerNorm(channels, use_bias=bias, rngs=rngs, **options)


def unchanged(x: jax.Array) -> jax.Array:
    """The layer that does nothing, in place of one that is switched off."""
    return x


def replace(stream: jax.Array, branch: jax.Array) -> jax.Array:
    """Take the output of a branch in place of the stream, in place of the sum when residuals are switched off."""
    return branch
