import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgpt.devices.matmul import matmul
from jaxgpt.model import GPT, GPTConfig


@pytest.mark.parametrize("inputs, outputs", [(8, 32), (32, 8), (8, 8)])
def test_value_and_gradients_are_those_of_the_plain_product(inputs, outputs):
    keys = jax.random.split(jax.random.key(inputs + outputs), 3)
    x, w, out = (jax.random.normal(k, s) for k, s in zip(keys, [(3, 5, inputs), (inputs, outputs), (3, 5, outputs)]))
    (ours, of_ours), (plain, of_plain) = (jax.vjp(jax.jit(f), x, w) for f in (matmul, jnp.matmul))
    np.testing.assert_allclose(ours, plain, rtol=1e-6)
    for mine, theirs in zip(of_ours(out), of_plain(out)):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)  # float32 sums of 15 and 32 terms


@pytest.mark.parametrize("shape", [(1, 1, 256), (256,)])
def test_a_large_product_of_one_row_is_two_on_a_cpu_and_the_same(shape):
    x, w = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([shape, (256, 512)]))
    text = {p: jax.jit(matmul).trace(x, w).lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda", "tpu")}
    assert {p: "batching_dims" in lowered for p, lowered in text.items()} == {"cpu": True, "cuda": False, "tpu": False}
    np.testing.assert_allclose(jax.jit(matmul)(x, w), jnp.matmul(x, w), rtol=1e-5, atol=1e-4)  # sums of 256 terms
    assert "batching_dims" not in jax.jit(matmul).lower(jnp.stack([x, x]), w).as_text()  # of two rows


def _sum(x, w):
    return matmul(x, w).astype(jnp.float32).sum()


def test_products_of_bfloat16_are_summed_in_float32():
    x, w = jnp.ones((2, 4096), jnp.bfloat16) * 0.01, jnp.ones((4096, 2), jnp.bfloat16)
    y, gradients = jax.vjp(jax.jit(matmul), x, w)
    chex.assert_type([y, *gradients(y)], jnp.bfloat16)
    exact = 4096 * float(x[0, 0])  # summed in bfloat16 it would stop growing at 256 terms
    np.testing.assert_allclose(np.asarray(y, np.float32), exact, rtol=2**-8)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_all_products_have_float32_sums_and_results(platform):
    x, w = jax.ShapeDtypeStruct((5, 48), jnp.bfloat16), jax.ShapeDtypeStruct((48, 32), jnp.float32)
    traced = jax.jit(jax.value_and_grad(_sum, (0, 1))).trace(x, w)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    results = [line.rsplit("tensor<", 1)[1].split(">")[0] for line in products]
    assert len(results) == 3 and all(result.endswith("xf32") for result in results), results


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_barrier_is_for_cpus_only(platform):
    def loss(x, w):
        return matmul(x, w).sum()

    shapes = jax.ShapeDtypeStruct((15, 32), jnp.float32), jax.ShapeDtypeStruct((32, 8), jnp.float32)
    text = jax.jit(jax.grad(loss, 1)).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
    assert ("optimization_barrier" in text) == (platform == "cpu")


def count_of(name, jaxpr):
    """How often an operation is computed; equal blocks are one program, which is called for each of them."""
    values = (value for equation in jaxpr.eqns for value in equation.params.values())
    inner = [getattr(value, "jaxpr", value) for value in values]
    own = sum(equation.primitive.name == name for equation in jaxpr.eqns)
    return own + sum(count_of(name, part) for part in inner if hasattr(part, "eqns"))


@pytest.mark.full
def test_remat_of_all_but_the_matmuls_computes_none_of_them_again():
    def products(remat):
        config = GPTConfig(vocab_size=65, block_size=8, n_layer=2, n_head=2, n_embd=16, attention="xla", remat=remat)
        graphdef, params = nnx.split(GPT(config, rngs=nnx.Rngs(0)))
        tokens = jnp.zeros((1, 8), jnp.int32)
        gradient = jax.make_jaxpr(jax.grad(lambda params: nnx.merge(graphdef, params)(tokens).sum()))(params)
        return count_of("dot_general", gradient.jaxpr)

    # the scores and their product with the values in each layer, and then the four linear layers too
    assert products("dots") - products("none") == 2 * 2
    assert products("full") - products("none") >= 2 * (2 + 3)
