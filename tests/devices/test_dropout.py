import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgpt.devices.dropout import Dropout


def dropped(rate, shape, seed=0):
    """Which of so many ones are zeroed, after a look at what the others have become."""
    out = np.asarray(Dropout(rate)(jnp.ones(shape), nnx.Rngs(dropout=seed)))
    kept = np.float32(256 / (256 - min(max(round(256 * rate), 1), 255)))
    assert set(np.unique(out)) <= {np.float32(0), kept}
    return out == 0


@pytest.mark.parametrize(("rate", "probability"), [(0.2, 51 / 256), (0.5, 0.5), (0.001, 1 / 256), (0.999, 255 / 256)])
def test_as_many_are_dropped_as_the_nearest_256th_says(rate, probability):
    n = 1_000_000
    spread = (probability * (1 - probability) / n) ** 0.5
    assert dropped(rate, (n // 500, 500)).mean() == pytest.approx(probability, abs=4 * spread)


def test_the_values_that_share_a_word_are_drawn_apart():
    four = dropped(0.3, (250_000, 4)).astype(float)
    np.testing.assert_allclose(np.corrcoef(four.T), np.eye(4), atol=4 / 500)


@pytest.mark.parametrize("shape", [(1,), (7, 5), (2, 3, 66)])
def test_any_width_has_its_masks(shape):
    masks = np.stack([dropped(0.5, shape, seed) for seed in range(40)])
    assert masks.any(axis=0).all() and not masks.all(axis=0).any()


def test_nothing_happens_without_keys_or_rate():
    x = jnp.arange(6.0, dtype=jnp.bfloat16)
    assert Dropout(0.5)(x, None) is x and Dropout(0.0)(x, nnx.Rngs(dropout=0)) is x
    assert Dropout(0.5)(x, nnx.Rngs(dropout=0)).dtype == jnp.bfloat16


def test_the_gradient_passes_where_the_value_did():
    x = jnp.ones((4, 64))
    out, back = jax.vjp(lambda x: Dropout(0.4)(x, nnx.Rngs(dropout=3)), x)
    np.testing.assert_array_equal(back(jnp.ones_like(x))[0], out)
