import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgpt.devices import attention
from jaxgpt.model import GPT, GPTConfig

CONFIG = GPTConfig(vocab_size=65, block_size=256, n_layer=1, n_head=2, n_embd=128, init="torch", attention="xla")


def loss_and_gradient(config, tokens):
    model = GPT(config, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)

    def loss(params):
        return jnp.square(nnx.merge(graphdef, params)(tokens)).mean()

    with jax.default_matmul_precision("highest"):
        return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.full
def test_splash_attention_computes_what_the_lines_of_the_lecture_compute():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 65, (2, 256)), jnp.int32)
    plain = loss_and_gradient(CONFIG, tokens)
    fused = loss_and_gradient(dataclasses.replace(CONFIG, attention="splash"), tokens)
    # float32; sums over 256 keys in another order, and the kernel's exponentials
    chex.assert_trees_all_close(plain, fused, rtol=1e-4, atol=1e-6)


def test_splash_attention_is_causal():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 2, 128, 64))
    before = attention.causal(q, k, v, "splash")
    after = attention.causal(q, k.at[:, :, 100:].set(9.0), v.at[:, :, 100:].set(9.0), "splash")
    np.testing.assert_array_equal(before[:, :, :100], after[:, :, :100])
    assert (before[:, :, 100:] != after[:, :, 100:]).any()
    chex.assert_shape(before, (1, 2, 128, 64))


def test_splash_attention_names_the_windows_that_it_takes():
    with pytest.raises(ValueError, match="multiple of 128, not 100"):
        attention.causal(*jnp.zeros((3, 1, 1, 100, 64)), "splash")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there it works")
def test_cudnn_attention_without_a_gpu_says_what_to_do():
    with pytest.raises(ValueError, match=r"use --model\.attention auto"):
        attention.causal(*jnp.zeros((3, 1, 1, 128, 64), jnp.bfloat16), "cudnn")


@pytest.mark.full
def test_attention_dropout_is_never_dropped_by_a_kernel():
    dropout = dataclasses.replace(CONFIG, dropout=0.5, attention="splash")
    model, x = GPT(dropout, rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (1, 128, 128))
    attend = model.blocks[0].attn
    with_masks = [attend(x, rngs=nnx.Rngs(dropout=i))[0] for i in (1, 1, 2)]
    np.testing.assert_array_equal(with_masks[0], with_masks[1])
    assert (with_masks[0] != with_masks[2]).any()


@pytest.mark.parametrize(
    "platform, dtype, block_size, head_size, kernel",
    [
        ("cpu", "float32", 1024, 64, "xla"),
        ("gpu", "bfloat16", 1024, 64, "cudnn"),
        ("gpu", "float32", 1024, 64, "xla"),  # cuDNN's kernel takes half precision only
        ("gpu", "bfloat16", 1024, 4, "xla"),
        ("tpu", "bfloat16", 1024, 64, "splash"),
        ("tpu", "bfloat16", 100, 64, "xla"),
        ("tpu", "bfloat16", 1024, 32, "xla"),
    ],
)
def test_auto_takes_the_kernel_of_the_device_where_it_fits(platform, dtype, block_size, head_size, kernel):
    assert attention.choose("auto", platform, jnp.dtype(dtype), block_size, head_size) == kernel
    assert attention.choose("xla", platform, jnp.dtype(dtype), block_size, head_size) == "xla"
