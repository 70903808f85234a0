"""Rematerialisation: saving memory by recomputing activations of a block in the backward pass."""

from typing import Literal

import jax
from flax import nnx

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
    # drawn outside, because a count that goes on inside jax.checkpoint would leave it
    key = None if rngs is None else rngs.dropout()

    def call(x, keys_values, start, key, documents, tokens):
        return block(x, keys_values, start, None if key is None else Keys(key), documents, tokens)

    if remat != "none":
        policies = jax.checkpoint_policies
        keep = {"dots": policies.save_only_these_names(OUTPUT), "full": policies.nothing_saveable}
        call = jax.checkpoint(call, policy=keep[remat])
    return call(x, keys_values, start, key, documents, tokens)
