"""A CPU machine can lower for the others: what they would be given to compile."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from switches import SWITCHES, TOGETHER, config_of

from jaxgpt import init, optim, sampling, step
from jaxgpt.model import Cache, GPTConfig

CONFIG = GPTConfig(vocab_size=65, block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=0.1)


def lowered_step(model_config, platform, loss_chunks=1):
    """The text of a call of up to two training steps in bfloat16."""
    model = init.init_model(model_config, seed=0)
    config = optim.OptimConfig(decay_steps=10)
    tx, schedule = optim.optimizer(config), optim.schedule(config)
    spec = step.StepSpec(nnx.graphdef(model), tx, schedule, 1, jnp.dtype(jnp.bfloat16), loss_chunks)
    windows = jnp.zeros((2, 4, model_config.block_size + 1), jnp.uint8)
    state = step.init_state(step.params_of(model), tx)
    traced = step.train_steps.trace(state, windows, jax.random.key(0), None, np.int32(2), spec=spec)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_training_step_lowers_for_every_platform_and_computes_in_bfloat16(platform):
    text = lowered_step(CONFIG, platform)
    assert "dot_general" in text and "xbf16>" in text and "stablehlo.while" in text


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_generation_lowers_for_every_platform(platform):
    model, key, rule = init.init_model(CONFIG, seed=0), jax.random.key(0), sampling.make_rule(0.8, 10, 0.9)
    tokens, layer = jnp.zeros((3, 8), jnp.int32), jnp.zeros((6, 8, 8))
    cache = Cache(((layer, layer),), jnp.int32(4))
    for traced in (
        sampling._prefill.trace(model, tokens, cache._replace(length=jnp.int32(0))),
        sampling._decode.trace(model, tokens[:, 0], cache, key, rule, jnp.int32(1), jnp.int32(3), 3),
        sampling._slide.trace(model, tokens, key, rule, jnp.int32(5), jnp.int32(3), 3),
    ):
        assert "dot_general" in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.full
@pytest.mark.parametrize(
    "kernel, platform, call", [("cudnn", "cuda", "__cudnn$fmhaSoftmaxBackward"), ("splash", "tpu", "tpu_custom_call")]
)
def test_the_step_of_gpt2_lowers_with_the_attention_kernel_of_the_platform(monkeypatch, kernel, platform, call):
    if kernel == "cudnn":  # jax asks the machine for its cuDNN while it traces
        monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    sizes = {"vocab_size": 65, "block_size": 128, "n_layer": 1, "n_head": 2, "n_embd": 128}
    config = GPTConfig(**sizes, lm_head="tied", bias="all", activation="gelu_tanh", attention=kernel, remat="dots")
    assert call in lowered_step(config, platform, loss_chunks=4)
    assert call not in lowered_step(dataclasses.replace(config, attention="xla"), platform)


@pytest.mark.full
@pytest.mark.parametrize(
    "switch", [pytest.param(name, marks=[] if name in TOGETHER else [pytest.mark.long]) for name in SWITCHES]
)
def test_every_switch_lowers_for_every_platform(switch):
    config, tokens = config_of(switch), jnp.zeros((2, 8), jnp.int32)
    model, documents = init.abstract(config), jnp.zeros((2, 8), jnp.int32)

    def loss(params):
        return nnx.merge(nnx.graphdef(model), params)(tokens, documents=documents).sum()

    lowered = jax.jit(jax.grad(loss)).trace(step.params_of(model)).lower(lowering_platforms=("cpu", "cuda", "tpu"))
    assert "dot_general" in lowered.as_text()


PARTS = {"n_kv_head": {"n_kv_head": 1}, "sliding_window": {"sliding_window": 100}, "documents": {}}


@pytest.mark.full
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "kernel, platform, call, takes",
    [
        ("cudnn", "cuda", "__cudnn$fmhaSoftmaxBackward", {"n_kv_head", "sliding_window"}),
        ("splash", "tpu", "tpu_custom_call", {"n_kv_head", "sliding_window", "documents"}),
    ],
)
def test_each_kernel_takes_what_the_table_of_the_docs_says(monkeypatch, kernel, platform, call, takes, part):
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    sizes = {"vocab_size": 65, "block_size": 128, "n_layer": 1, "n_head": 2, "n_embd": 128}
    model = init.abstract(GPTConfig(**sizes, **PARTS[part], attention=kernel))
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), step.params_of(model))
    tokens = jnp.zeros((2, 128), jnp.int32)

    def loss(params):
        documents = tokens if part == "documents" else None
        return nnx.merge(nnx.graphdef(model), params)(tokens, documents=documents).sum()

    text = jax.jit(jax.grad(loss)).trace(params).lower(lowering_platforms=(platform,)).as_text()
    assert (call in text) == (part in takes)
    assert ("sliding_window_length\\22: 100" in text) == (kernel == "cudnn" and part == "sliding_window")
