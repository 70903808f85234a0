"""PRNG keys one after the other, for initial weights and for dropout, without Flax's counters."""

import jax


class Keys:
    """The same sequence of keys as `nnx.Rngs(key)`, from the n-th on.

    Flax keeps its counter in a Variable. Under jit, each update of a Variable searches everything traced before: eight
    seconds for GPT-2 1558M, against half a second here.

    Args:
        key: typed PRNG key.
        n: () integer, the number of keys already used.
    """

    def __init__(self, key: jax.Array, n: jax.Array | int = 0):
        self.key, self.n = key, n

    def params(self) -> jax.Array:
        """Return the next key, a () typed PRNG key."""
        key = jax.random.fold_in(self.key, self.n)
        self.n += 1
        return key

    dropout = params  # the name of the stream that a module asks for
