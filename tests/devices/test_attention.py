import dataclasses
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxgpt
from jaxgpt import training
from jaxgpt.config import ConfigError
from jaxgpt.devices import attention, chips
from jaxgpt.errors import ArgumentError
from jaxgpt.model import GPT, GPTConfig

CONFIG = GPTConfig(vocab_size=65, block_size=256, n_layer=1, n_head=2, n_embd=128, init="torch", attention="xla")


def loss_and_gradient(config, tokens, documents=None):
    model = GPT(config, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)

    def loss(params):
        return jnp.square(nnx.merge(graphdef, params)(tokens, documents=documents)).mean()

    with jax.default_matmul_precision("highest"):
        return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.full
def test_splash_attention_computes_what_the_lines_of_the_lecture_compute():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 65, (2, 256)), jnp.int32)
    plain = loss_and_gradient(CONFIG, tokens)
    fused = loss_and_gradient(dataclasses.replace(CONFIG, attention="splash"), tokens)
    # float32; sums over 256 keys in another order, and the kernel's exponentials
    chex.assert_trees_all_close(plain, fused, rtol=1e-4, atol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize(
    "fields, with_documents", [({"n_kv_head": 1}, False), ({"sliding_window": 70}, False), ({}, True),
                               ({"n_kv_head": 1, "sliding_window": 70, "positions": "rope", "qk_norm": True}, True)]
)  # fmt: skip
def test_splash_attention_shares_keys_and_keeps_to_windows_and_documents(fields, with_documents):
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 65, (2, 256)), jnp.int32)
    documents = jnp.asarray(np.sort(rng.integers(0, 3, (2, 256))), jnp.uint8) if with_documents else None
    config = dataclasses.replace(CONFIG, **fields)
    plain = loss_and_gradient(config, tokens, documents)
    fused = loss_and_gradient(dataclasses.replace(config, attention="splash"), tokens, documents)
    chex.assert_trees_all_close(plain, fused, rtol=1e-4, atol=1e-6)  # as above
    assert plain[0] != loss_and_gradient(CONFIG, tokens)[0]


def test_splash_attention_is_causal():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 2, 128, 64))
    before = attention.causal(q, k, v, "splash", plain)
    after = attention.causal(q, k.at[:, :, 100:].set(9.0), v.at[:, :, 100:].set(9.0), "splash", plain)
    np.testing.assert_array_equal(before[:, :, :100], after[:, :, :100])
    assert (before[:, :, 100:] != after[:, :, 100:]).any()
    chex.assert_shape(before, (1, 2, 128, 64))
    assert (before != plain(q, k, v)).any()  # rounded in another order: it was the kernel


def plain(q, k, v):
    scores = jnp.einsum("bhtd,bhsd->bhts", q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf))
    return jnp.einsum("bhts,bhsd->bhtd", weights, v)


@pytest.mark.full
@pytest.mark.parametrize("T", [65, 192, 259])
@pytest.mark.parametrize("fields", [{}, {"n_kv_head": 1, "sliding_window": 50, "positions": "rope"}])
def test_queries_in_parts_compute_what_all_at_once_compute(monkeypatch, T, fields):
    config = dataclasses.replace(CONFIG, block_size=T, n_embd=32, **fields)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 65, (2, T)), jnp.int32)
    in_parts = loss_and_gradient(config, tokens)
    monkeypatch.setattr(attention, "SHORT", T)
    jax.clear_caches()  # of the traced blocks
    at_once = loss_and_gradient(config, tokens)
    chex.assert_trees_all_close(in_parts, at_once, rtol=1e-4, atol=1e-6)  # float32; sums over fewer keys
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (in_parts, at_once)), strict=True))


def test_queries_in_parts_take_five_eighths_of_the_scores():
    q = jnp.zeros((1, 1, 256, 8))
    sizes = []
    attention._in_parts(q, q, q, lambda q, k, v, start: sizes.append((q.shape[2], k.shape[2], start)) or q)
    assert sizes == [(64, 64, 0), (64, 128, 64), (64, 192, 128), (64, 256, 192)]


@pytest.mark.parametrize("kernel", ["auto", "xla", "cudnn", "splash"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("T", [7, 128])
def test_a_model_can_be_called_with_any_kernel_dtype_and_length(kernel, dtype, T):
    """Also with the kernel of another platform, or of the types and lengths of training."""
    config = dataclasses.replace(CONFIG, attention=kernel)
    model = GPT(config, rngs=nnx.Rngs(0))
    params = jax.tree.map(lambda a: a.astype(dtype), nnx.state(model))
    logits = nnx.merge(nnx.graphdef(model), params)(jnp.ones((2, T), jnp.int32))
    expected = GPT(dataclasses.replace(config, attention="xla"), rngs=nnx.Rngs(0))(jnp.ones((2, T), jnp.int32))
    np.testing.assert_allclose(logits, expected, atol={"float32": 1e-4, "bfloat16": 0.1}[dtype])


@pytest.mark.parametrize(
    "kernel, dtype, T, D, fits",
    [
        ("splash", "float32", 128, 64, True),
        ("splash", "bfloat16", 100, 64, False),
        ("cudnn", "bfloat16", 100, 64, True),
        ("cudnn", "float32", 128, 64, False),
        ("cudnn", "bfloat16", 128, 4, False),
        ("cudnn", "bfloat16", 128, 256, False),
        ("xla", "float32", 128, 64, False),
    ],
)
def test_a_kernel_is_used_only_for_what_it_takes(kernel, dtype, T, D, fits):
    assert attention.fits(kernel, jnp.dtype(dtype), T, D) is fits
    if not fits:
        q = jnp.ones((1, 1, T, D), dtype)
        found = attention.causal(q, q, q, kernel, lambda q, *_, start=0: q + 1)
        np.testing.assert_array_equal(found, q + 1)


@pytest.mark.parametrize(
    "flags", [["--model.attention", "cudnn"], ["--model.attention", "splash", "--model.block_size", "100"]]
)
def test_training_refuses_a_kernel_that_it_could_not_use(flags):
    config = training.resolve(jaxgpt.load_config(flags), 65)
    with pytest.raises(ConfigError, match=r"attention here \(--model.attention; cpu, float32.*use auto"):
        training.abstract_model(config, "cpu")


@pytest.mark.parametrize("capability, old", [("7.5", True), ("8.0", False), ("12.0", False), ("gfx90a", False)])
def test_a_gpu_without_bfloat16_trains_in_float32_with_the_lines_of_the_lecture(monkeypatch, capability, old):
    device = types.SimpleNamespace(compute_capability=capability, platform="gpu")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert chips.is_old_gpu() is old
    config = training.resolve(jaxgpt.load_config(["--model.block_size", "128"]), 65)
    assert config.train.dtype == ("float32" if old else "bfloat16")
    assert training.abstract_model(config, "gpu").config.attention == ("xla" if old else "cudnn")
    assert attention.fits("cudnn", jnp.dtype("bfloat16"), 128, 64) is not old


def test_attention_dropout_is_the_dropout_unless_it_is_set():
    def rates(**fields):
        config = GPTConfig(vocab_size=5, n_layer=1, n_head=1, n_embd=8, **fields)
        (block,) = GPT(config, rngs=nnx.Rngs(0)).blocks
        return block.attn.dropout.rate, block.dropout.rate

    assert rates(dropout=0.25) == (0.25, 0.25)
    assert rates(dropout=0.25, attention_dropout=0.0) == (0.0, 0.25)
    assert rates(attention_dropout=0.5) == (0.5, 0.0)
    with pytest.raises(ArgumentError, match=r"attention_dropout is 1\.0"):
        GPTConfig(attention_dropout=1.0)


@pytest.mark.full
def test_a_kernel_trains_with_dropout_if_attention_has_none():
    """The masks of the branches are drawn as they are without the kernel."""
    config = dataclasses.replace(CONFIG, dropout=0.5, attention_dropout=0.0)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 65, (2, 128)), jnp.int32)
    out = [
        GPT(dataclasses.replace(config, attention=kernel), rngs=nnx.Rngs(0))(tokens, rngs=nnx.Rngs(dropout=1))
        for kernel in ("xla", "splash")
    ]
    np.testing.assert_allclose(*out, atol=1e-4)
    assert np.abs(out[0] - out[1]).max() > 0  # it was the kernel


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
