"""Rematerialisation: memory saved by computing parts of a block again in the backward pass."""

from typing import Literal

import jax
from flax import nnx

from jaxgpt.devices.matmul import OUTPUT

Remat = Literal["none", "dots", "full"]


def call_block(block: nnx.Module, x, keys_values, start, rngs: nnx.Rngs | None, remat: Remat):
    """`block(x, keys_values, start, rngs)`, of which the backward pass computes again what `remat` says.

    Source: Chen et al. 2016, "Training deep nets with sublinear memory cost".
    """
    # Flax's random streams cannot be advanced inside of jax.checkpoint: a block gets a key of its own
    key = None if rngs is None else rngs.dropout()

    def call(x, keys_values, start, key):
        return block(x, keys_values, start, None if key is None else nnx.Rngs(dropout=key))

    if remat != "none":
        policies = jax.checkpoint_policies
        keep = {"dots": policies.save_only_these_names(OUTPUT), "full": policies.nothing_saveable}
        call = jax.checkpoint(call, policy=keep[remat])
    return call(x, keys_values, start, key)
