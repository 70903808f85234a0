import math
import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgpt import load_config
from jaxgpt.errors import ArgumentError
from jaxgpt.layers import ACTIVATIONS
from jaxgpt.model import GPT, Cache, GPTConfig
from jaxgpt.step import token_losses

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
SMALL = GPTConfig(vocab_size=65, block_size=8, n_layer=2, n_head=2, n_embd=16)
RUNGS = {
    "lecture/bigram": 4_225,
    "lecture/positions": 4_481,
    "lecture/one_head": 7_553,
    "lecture/four_heads": 7_553,
    "lecture/feed_forward": 8_609,
    "lecture/residual": 41_921,
    "lecture/layernorm": 42_369,
    "lecture/colab": 209_729,
    "lecture/scaled": 10_788_929,
    "shakespeare_cpu": 804_096,
}


def config_of(recipe: str) -> GPTConfig:
    config = load_config(["--config", str(CONFIGS / f"{recipe}.yaml"), "--model.vocab_size", "65"])
    return config.model


def count(config: GPTConfig) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.eval_shape(lambda: nnx.state(GPT(config, rngs=nnx.Rngs(0))))))


@pytest.mark.parametrize("recipe", RUNGS)
def test_each_recipe_has_the_parameter_count_of_its_source(recipe):
    assert count(config_of(recipe)) == RUNGS[recipe]


def test_gpt2_124m_has_openai_s_parameter_count():
    gpt2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "lm_head": "tied", "bias": "all", "activation": "gelu_tanh"}
    assert count(GPTConfig(vocab_size=50_257, block_size=1024, **gpt2)) == 124_439_808


DEEP = {"lecture/colab", "shakespeare_cpu"}  # more layers of the same
SOME_RUNGS = [
    pytest.param(name, marks=[pytest.mark.full] if name in DEEP else []) for name in RUNGS if "scaled" not in name
]


@pytest.mark.parametrize("recipe", SOME_RUNGS)
def test_each_recipe_maps_tokens_to_float32_logits(recipe):
    config = config_of(recipe)
    model = GPT(config, rngs=nnx.Rngs(0))
    logits = model(jnp.zeros((3, config.block_size), jnp.int32))
    chex.assert_shape(logits, (3, config.block_size, 65))
    chex.assert_type(logits, jnp.float32)
    chex.assert_shape(model(jnp.zeros((1, 1), jnp.uint8)), (1, 1, 65))


def test_attributes_carry_the_names_of_the_lecture():
    model = GPT(SMALL, rngs=nnx.Rngs(0))
    chex.assert_shape(model.token_embedding_table.embedding[...], (65, 16))
    chex.assert_shape(model.position_embedding_table.embedding[...], (8, 16))
    chex.assert_shape(model.lm_head.kernel[...], (16, 65))
    assert {"ln_1", "attn", "ln_2", "mlp"} <= set(vars(model.blocks[0]))
    assert model.config is SMALL


@pytest.mark.parametrize(
    "init, recipe", [("normal", "lecture/layernorm"), pytest.param("scaled", "shakespeare_cpu", marks=pytest.mark.full)]
)
def test_untrained_model_is_as_good_as_guessing_uniformly(init, recipe):
    config = config_of(recipe)
    assert config.init == init
    inputs, targets = jax.random.randint(jax.random.key(0), (2, 64, config.block_size), 0, 65)
    loss = token_losses(GPT(config, rngs=nnx.Rngs(1)), inputs, targets).mean()
    assert abs(loss - math.log(65)) < 0.05


@pytest.mark.parametrize("t", [0, 3, 7])
def test_past_logits_have_no_gradient_of_future_tokens(t):
    graphdef, params = nnx.split(GPT(SMALL, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(params)
    tokens = jnp.arange(8)[None]  # all different, so that row i of the table is what stands at position i

    def logit(table):
        mine = params | {"token_embedding_table": {"embedding": table}}
        return nnx.merge(graphdef, mine)(tokens)[0, t].sum()

    rows = np.abs(jax.grad(logit)(params["token_embedding_table"]["embedding"])[:8]).sum(axis=1)
    assert (rows[: t + 1] > 0).all()
    assert (rows[t + 1 :] == 0).all()


def test_stream_and_head_have_the_documented_shapes():
    model = GPT(SMALL, rngs=nnx.Rngs(0))
    x, cache = model.hidden(jnp.zeros((3, 5), jnp.int32))
    chex.assert_shape(x, (3, 5, 16))
    chex.assert_shape(jax.tree.leaves(cache.layers), (6, 5, 8))
    chex.assert_shape(model.logits(x), (3, 5, 65))
    out, keys_values = model.blocks[0].attn(x)
    chex.assert_shape([out, model.blocks[0].mlp(x), model.blocks[0](x)[0]], (3, 5, 16))
    chex.assert_shape(keys_values, (6, 5, 8))


def test_tokens_fed_one_by_one_through_the_cache_give_the_same_logits():
    model = GPT(SMALL, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(1), (3, 8), 0, 65)
    empty = jnp.zeros((6, 8, 8))
    cache = Cache(((empty, empty), (empty, empty)), jnp.int32(0))
    for t in range(8):
        x, cache = model.hidden(tokens[:, t : t + 1], cache)
        # both sum in float32, in another order
        np.testing.assert_allclose(model.logits(x)[:, 0], model(tokens)[:, t], atol=2e-6)
    chex.assert_shape(cache.layers[0][0], (6, 8, 8))
    assert int(cache.length) == 8


@pytest.mark.parametrize(
    "name, definition",
    [
        ("relu", lambda x: max(x, 0.0)),
        ("gelu", lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2)))),  # Hendrycks and Gimpel 2016, section 2
        ("gelu_tanh", lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
        ("relu2", lambda x: max(x, 0.0) ** 2),
        ("silu", lambda x: x / (1 + math.exp(-x))),
    ],
)
def test_activations_are_their_definitions(name, definition):
    x = np.linspace(-4, 4, 81)  # the two forms of GELU differ by up to 5e-4
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x, jnp.float32)), list(map(definition, x)), atol=2e-6)


@pytest.mark.parametrize("on_embeddings", [False, True])
def test_embeddings_are_dropped_only_where_the_configuration_says_so(on_embeddings):
    sizes = {"vocab_size": 65, "block_size": 8, "n_layer": 0, "n_embd": 16, "norm": "none"}
    model = GPT(GPTConfig(**sizes, dropout=0.5, embedding_dropout=on_embeddings), rngs=nnx.Rngs(0))
    x, _ = model.hidden(jnp.arange(8)[None], rngs=nnx.Rngs(dropout=1))
    assert (np.asarray(x) == 0).any() == on_embeddings


def test_dropout_acts_only_with_rngs_and_by_their_key():
    model = GPT(GPTConfig(vocab_size=65, block_size=8, n_embd=16, n_head=2, dropout=0.5), rngs=nnx.Rngs(0))
    tokens = jnp.zeros((1, 8), jnp.int32)
    first, again, other = (model(tokens, rngs=nnx.Rngs(dropout=jax.random.key(seed))) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and (first != model(tokens)).any()


def test_bfloat16_weights_still_give_float32_logits_near_the_exact_ones():
    model = GPT(SMALL, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    half = nnx.merge(graphdef, jax.tree.map(lambda p: p.astype(jnp.bfloat16), params))
    tokens = jnp.arange(8)[None]
    chex.assert_type(half.hidden(tokens)[0], jnp.bfloat16)
    chex.assert_type(half(tokens), jnp.float32)
    scale = float(jnp.abs(model(tokens)).max())
    np.testing.assert_allclose(half(tokens), model(tokens), atol=0.03 * scale)  # 8 bits of mantissa, a few layers


def test_layer_norm_is_exact_where_the_mean_is_large():
    norm = GPT(SMALL, rngs=nnx.Rngs(0)).ln_f
    x = 100 + np.random.default_rng(0).normal(size=(4, 16))
    x = x.astype(np.float32).astype(np.float64)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    # a hundred times float32's last digit; with the fast variance the difference is 3e-3
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, atol=1e-4)


def test_projections_into_the_stream_start_smaller_with_scaled_init():
    model = GPT(GPTConfig(vocab_size=65, n_layer=8, n_embd=128, init="scaled"), rngs=nnx.Rngs(0))
    block = model.blocks[0]
    for kernel, stddev in ((block.attn.proj, 0.005), (block.mlp.proj, 0.005), (block.mlp.fc, 0.02)):
        assert np.std(kernel.kernel[...]) == pytest.approx(stddev, rel=0.03)


def test_torch_init_draws_linear_layers_within_one_over_root_fan_in():
    model = GPT(GPTConfig(vocab_size=65, n_embd=128, init="torch"), rngs=nnx.Rngs(0))
    for array, bound in ((model.lm_head.kernel[...], 128**-0.5), (model.lm_head.bias[...], 128**-0.5)):
        assert bound * 0.9 < np.abs(array).max() <= bound
    assert np.std(model.token_embedding_table.embedding[...]) == pytest.approx(1, rel=0.03)


def test_model_refuses_what_is_not_a_batch_of_tokens():
    model = GPT(SMALL, rngs=nnx.Rngs(0))
    for kind, wrong in {
        "int32 of shape (8,)": jnp.zeros(8, jnp.int32),
        "float32 of shape (1, 8)": jnp.zeros((1, 8)),
        "bool of shape (1, 8)": jnp.zeros((1, 8), bool),
        "list of shape ?": [[0, 1]],
        "str of shape ?": "ROMEO",
    }.items():
        with pytest.raises(ArgumentError, match=re.escape(f"tokens are {kind}: pass an array of integers (B, T)")):
            model(wrong)
    with pytest.raises(ValueError, match="9 tokens do not fit block_size 8"):
        model(jnp.zeros((1, 9), jnp.int32))
    with pytest.raises(ValueError, match="vocab_size"):
        GPT(GPTConfig(), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"n_embd": 30, "n_head": 4}, "n_embd 30 is not divisible by n_head 4"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": float("nan")}, "dropout is nan"),
        ({"block_size": 0}, "block_size is 0"),
        ({"n_layer": -1}, "n_layer is -1"),
        ({"mlp_ratio": 4, "projection": False}, "mlp_ratio is 4"),
        ({"lm_head": "none", "vocab_size": 65}, "n_embd is 128"),
    ],
)
def test_sizes_that_do_not_fit_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**fields)
