"""Calling the blocks: traced once for all that are equal, with rematerialisation, which saves memory by recomputing
activations in the backward pass.

With 24 equal layers, tracing the training step takes 1.5 s in place of 5.0 s, `python benchmarks/depth.py`; what XLA
compiles has the same operations.
"""

from functools import partial
from typing import Literal

import jax
from flax import nnx

from jaxgpt.devices.dropout import RateArray
from jaxgpt.devices.keys import Keys
from jaxgpt.devices.matmul import OUTPUT

Remat = Literal["none", "dots", "full"]


def call_block(block: nnx.Module, x, keys_values, start, rngs: Keys | None, remat: Remat, documents=None, tokens=None):
    """Call a block, choosing which activations the backward pass recomputes.

    Args:
        block: a block of the model, called with x, keys_values, start, rngs, documents and tokens.
        x: (B, T, C) floating.
        keys_values: the block's key/value cache, or None.
        start: () int32, position of the first token of x.
        rngs: the `dropout` stream is used; None without dropout.
        remat: none = keep all activations; dots = recompute all but the matmul results; full = recompute all.
        documents, tokens: (B, T) integers, or None.

    Returns:
        The result of the block.

    Source: Chen et al. 2016, "Training deep nets with sublinear memory cost".
    """
    key = None if rngs is None else rngs.dropout()  # drawn here: a count that goes on inside jax.jit would leave it
    rates = block.dropout.rate, block.attn.dropout.rate  # arrays of `jaxgpt sweep` must not be kept with the trace
    call = _call.__wrapped__ if any(isinstance(rate, RateArray) for rate in rates) else _call
    return call(*nnx.split(block), remat, x, keys_values, start, key, documents, tokens)


@partial(jax.jit, static_argnames=("graphdef", "remat"))
def _call(graphdef: nnx.GraphDef, params: nnx.State, remat: Remat, x, keys_values, start, key, documents, tokens):
    def call(params, x, keys_values, start, key, documents, tokens):
        block = nnx.merge(graphdef, params)
        return block(x, keys_values, start, None if key is None else Keys(key), documents, tokens)

    if remat != "none":
        policies = jax.checkpoint_policies
        keep = {"dots": policies.save_only_these_names(OUTPUT), "full": policies.nothing_saveable}
        call = jax.checkpoint(call, policy=keep[remat])
    return call(params, x, keys_values, start, key, documents, tokens)
