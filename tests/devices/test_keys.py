"""Keys one after the other."""

import jax
import numpy as np
from flax import nnx

from jaxgpt.devices.keys import Keys


def test_keys_are_those_of_flax_s_counters():
    """So initial weights and dropout masks are those of `nnx.Rngs`, also from the n-th key on."""
    key = jax.random.key(3)
    theirs, ours = nnx.Rngs(params=key, dropout=key), Keys(key)
    expected = [jax.random.key_data(theirs.dropout()) for _ in range(4)]
    np.testing.assert_array_equal([jax.random.key_data(ours.dropout()) for _ in range(4)], expected)
    np.testing.assert_array_equal(jax.random.key_data(Keys(key, 2).params()), expected[2])
