"""The switches beyond the lecture. Against PyTorch: test_switches_parity.py."""

import dataclasses
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec as P
from switches import LLAMA3, MODERN, SIZES, SWITCHES, TOGETHER, config_of, decoded, random_model, random_params

from jaxgpt import load_config
from jaxgpt.devices import remat, sharding
from jaxgpt.devices.matmul import named_matmul, project
from jaxgpt.errors import ArgumentError
from jaxgpt.init import abstract, init_model
from jaxgpt.interop import export, gpt2
from jaxgpt.layers import ACTIVATIONS, Rotary
from jaxgpt.model import GPT, Cache, GPTConfig
from jaxgpt.runs import metrics
from jaxgpt.step import params_of
from jaxgpt.tools import ahead, plan
from jaxgpt.training import resolve

V, T = SIZES["vocab_size"], SIZES["block_size"]


def count(config):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params_of(abstract(config))))


# tables of tokens and positions; two blocks with matrices, biases and two norms; the last norm; the head
C, D = 16, 4
PLAIN = V * C + T * C + 2 * (12 * C * C + 6 * C + 4 * C) + 2 * C + (C + 1) * V
COUNTS = {
    "rope": -T * C,
    "rope theta": -T * C,
    "rope linear": -T * C,
    "rope llama3": -T * C,
    "rmsnorm": -5 * C,
    "rmsnorm alone": -10 * C,
    "layernorm alone": -5 * C,
    "bias qkv": 2 * (3 * C - 6 * C) - 5 * C - V,
    "qk_norm": 2 * 2 * D,
    "relu2": 0,
    "gated": 2 * (4 * C * C + 4 * C) + 2 * 3 * C,
    "mlp_width": -2 * (64 - 24) * (2 * C + 1),
    "one kv head": -2 * 2 * C * 3 * D,
    "two kv heads": -2 * 2 * C * 2 * D + 2 * (C + 2 * 2 * D),
    "head_size": 2 * C * 6 * (4 + 2 + 2 + 4) - 2 * 4 * C * C,
    "sliding_window": 0,
    "logit_softcap": 0,
    "embedding_norm": 2 * C,
    "value_embeddings": 2 * (V * 2 * D - 2 * C * 2 * D),
    "zero": 0,
    "modern": -T * C - 2 * 6 * C - 10 * C - 2 * 2 * C * 3 * D + 2 * V * D - (C + 1) * V,
}


@pytest.mark.parametrize("switch", COUNTS)
def test_each_switch_has_the_parameters_of_its_closed_form(switch):
    assert count(config_of(switch)) == PLAIN + COUNTS[switch]


@pytest.mark.parametrize(
    "switch", [pytest.param(name, marks=[] if name in TOGETHER else [pytest.mark.long]) for name in SWITCHES]
)
def test_past_logits_see_the_tokens_that_they_should_and_no_others_also_through_the_cache(switch):
    config, t = config_of(switch), 6
    model, tokens = random_model(config), jnp.arange(T)[None]  # all different: row i of a table is position i
    graphdef, params = nnx.split(model)
    params = nnx.to_pure_dict(params)

    @jax.jit
    def whole_decoded_and_influence(params):
        def logit(tables):
            return nnx.merge(graphdef, unflatten_dict(flatten_dict(params) | tables))(tokens)[0, t, V - 1]

        tables = {path: leaf for path, leaf in flatten_dict(params).items() if path[-1] == "embedding"}
        tables = {path: leaf for path, leaf in tables.items() if path[0] != "position_embedding_table"}
        model = nnx.merge(graphdef, params)
        return model(tokens), decoded(model, tokens), jax.grad(logit)(tables)

    whole, by_one, influence = whole_decoded_and_influence(params)
    np.testing.assert_allclose(by_one, whole, atol=1e-5)  # float32 sums in another order
    seen = sum(np.abs(rows)[:T].sum(axis=1) for rows in influence.values()) > 0
    reach = config.n_layer * (config.sliding_window - 1) if config.sliding_window else T
    np.testing.assert_array_equal(seen, [t - reach <= i <= t for i in range(T)])


def before(params, tokens, config):
    """The model as it was before there were any switches, written out: the lecture's form, and GPT-2's."""
    start = jnp.int32(0)
    x = jnp.take(params["token_embedding_table"]["embedding"], tokens, axis=0)
    x = x + jnp.take(params["position_embedding_table"]["embedding"], start + jnp.arange(T), axis=0)

    def dense(layer, x):
        y = named_matmul(x, layer["kernel"])
        return y + layer["bias"] if "bias" in layer else y

    def norm(layer, x):
        return nnx.merge(
            nnx.graphdef(nnx.LayerNorm(C, epsilon=1e-5, use_fast_variance=False, rngs=nnx.Rngs(0))), layer
        )(x)

    for i in range(config.n_layer):
        block = params["blocks"][i]
        h = norm(block["ln_1"], x)
        q, k, v = (
            dense(block["attn"][n], h).reshape(*tokens.shape, 4, 4).swapaxes(1, 2) for n in ("query", "key", "value")
        )
        scores = jnp.einsum("...td,...sd->...ts", q, k, preferred_element_type=jnp.float32) * D**-0.5
        visible = jnp.arange(T) <= start + jnp.arange(T)[:, None]
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        out = jnp.einsum("...ts,...sd->...td", weights, v).swapaxes(1, 2).reshape(x.shape)
        x = x + dense(block["attn"]["proj"], out)
        h = dense(block["mlp"]["fc"], norm(block["ln_2"], x))
        x = x + dense(block["mlp"]["proj"], ACTIVATIONS[config.activation](h))
    x = norm(params["ln_f"], x)
    if config.lm_head == "tied":
        return project("btc,vc->btv", x, params["token_embedding_table"]["embedding"])
    return project("btc,cv->btv", x, params["lm_head"]["kernel"]) + params["lm_head"]["bias"]


NEUTRAL = {"n_kv_head": 4, "head_size": 4, "mlp_width": 64, "sliding_window": T, "logit_softcap": 0.0}


@pytest.mark.parametrize("form", [{}, {"bias": "all", "lm_head": "tied", "activation": "gelu_tanh", "init": "scaled"}])
def test_with_every_switch_off_the_program_is_what_it_was_operation_by_operation(form, monkeypatch):
    monkeypatch.setattr(remat, "_call", remat._call.__wrapped__)  # each block is traced by itself, as it was
    config, tokens = GPTConfig(**SIZES | form), jnp.arange(2 * T).reshape(2, T) % V
    graphdef, params = nnx.graphdef(abstract(config)), params_of(abstract(config))
    now = jax.jit(lambda params: nnx.merge(graphdef, params)(tokens)).lower(params).as_text()
    assert now == jax.jit(lambda params: before(params, tokens, config)).lower(params).as_text()


def test_a_switch_at_its_neutral_value_leaves_the_program_as_it_is():
    tokens = jnp.zeros((1, T), jnp.int32)

    def program(config):
        return jax.jit(lambda model: model(tokens)).lower(abstract(config)).as_text()

    neutral = NEUTRAL | {"sliding_window": 0}
    assert program(GPTConfig(**SIZES, **neutral)) == program(GPTConfig(**SIZES))


def rotary(**fields):
    values = {"theta": 1e4, "scaling": "none", "factor": 1.0, "low_freq": 1.0, "high_freq": 4.0, "original_size": 8192}
    return Rotary(**values | fields)


def test_rotations_keep_norms_and_scores_depend_on_distances_only():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 8)).astype(np.float32)
    turn = rotary()
    for start in (0, 3, 100_000):
        np.testing.assert_allclose(np.linalg.norm(turn(q, start)), np.linalg.norm(q), rtol=1e-6)
    score = [float((turn(q, at + 5) * turn(k, at)).sum()) for at in (0, 7, 1000)]
    np.testing.assert_allclose(score, score[0], atol=2e-3)  # angles of 1,000 radians have a rounding of 6e-5
    assert abs(float((turn(q, 6) * turn(k, 0)).sum()) - score[0]) > 0.01
    np.testing.assert_array_equal(turn(q, 0), q)
    pair = turn(jnp.eye(8)[:1], 1)[0]  # channel 0 is paired with channel 4, and turns by one radian
    np.testing.assert_allclose(pair, [math.cos(1), 0, 0, 0, math.sin(1), 0, 0, 0], atol=1e-6)


def test_frequencies_are_those_of_the_published_formulas():
    plain = rotary().frequencies(8)
    np.testing.assert_allclose(plain, [1, 0.1, 0.01, 0.001])
    np.testing.assert_allclose(rotary(scaling="linear", factor=4.0).frequencies(8), plain / 4)
    # wavelengths 6.3, 63, 628, 6283; a context of 1,000: below 250 as it is, above 1,000 divided, between them both
    smooth = (1000 / (2 * math.pi / 0.01) - 1) / 3
    stretched = rotary(scaling="llama3", factor=8.0, original_size=1000).frequencies(8)
    np.testing.assert_allclose(stretched, [1, 0.1, (1 - smooth) * 0.01 / 8 + smooth * 0.01, 0.001 / 8])


def test_bfloat16_queries_are_rotated_in_float32():
    q = jnp.ones((4, 8), jnp.bfloat16)
    exact = rotary()(q.astype(jnp.float32), 5000)
    assert rotary()(q, 5000).dtype == jnp.bfloat16
    np.testing.assert_allclose(rotary()(q, 5000).astype(jnp.float32), exact, atol=0.01)  # of values up to 1.4


def test_heads_that_share_keys_are_heads_with_equal_keys():
    shared, apart = config_of("two kv heads"), GPTConfig(**SIZES, bias="all")
    params = random_params(shared, 2)
    model = random_model(shared, 2)

    def repeated(path, leaf):
        if path[-2] in ("key", "value"):
            return np.repeat(leaf.reshape(*leaf.shape[:-1], 2, D), 2, axis=-2).reshape(*leaf.shape[:-1], 4 * D)
        return leaf

    params = {path: jnp.asarray(repeated(path, leaf)) for path, leaf in params.items()}
    same = nnx.merge(nnx.graphdef(abstract(apart)), unflatten_dict(params))
    tokens = jnp.arange(T)[None]
    (x, cache), (expected, _) = jax.jit(lambda *models: [model.hidden(tokens) for model in models])(model, same)
    np.testing.assert_allclose(x, expected, atol=1e-5)  # float32 products of other shapes
    assert {a.shape for a in jax.tree.leaves(cache.layers)} == {(2, T, D)}


def test_documents_do_not_see_each_other():
    model, tokens = random_model(config_of("llama")), jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6]])
    documents = jnp.asarray([[7, 7, 7, 2, 2, 2, 2, 2]])

    @jax.jit
    def packed_and_apart(model):
        apart = jnp.concatenate([model(tokens[:, :3]), model(tokens[:, 3:])], axis=1)
        return model(tokens, documents=documents), apart, model(tokens)

    packed, apart, whole = packed_and_apart(model)
    np.testing.assert_allclose(packed, apart, atol=1e-5)  # rotations depend on distances only
    assert np.abs(packed - whole).max() > 1e-3


def test_documents_need_an_id_for_each_token_and_no_cache():
    model, tokens = random_model(config_of("rope", n_layer=0)), jnp.zeros((1, 8), jnp.int32)
    documents = jnp.zeros((1, 8), jnp.int32)
    for wrong in ({"documents": documents[:, 1:]}, {"documents": documents, "cache": Cache((), jnp.int32(0))}):
        with pytest.raises(ArgumentError, match="documents of shape"):
            model.hidden(tokens, **wrong)


def test_with_zero_init_every_block_starts_as_the_identity():
    config = GPTConfig(**SIZES | MODERN | {"n_layer": 1, "n_embd": 256, "head_size": 64})
    model, tokens = init_model(config, 0), jnp.arange(T)[None]
    (block,) = model.blocks
    x = model.embed(tokens)
    np.testing.assert_array_equal(jax.jit(block)(x, tokens=tokens)[0], x)
    for layer in (block.attn.query, block.attn.value, block.mlp.fc):
        bound = (3 / 256) ** 0.5
        assert 0.99 * bound < np.abs(layer.kernel[...]).max() <= bound
        assert np.std(layer.kernel[...]) == pytest.approx(256**-0.5, rel=0.03)
    for layer in (block.attn.proj, block.mlp.proj):
        assert not np.any(layer.kernel[...])
    for rows in (model.token_embedding_table, block.attn.value_embedding_table):
        assert np.std(rows.embedding[...]) == pytest.approx(0.02, rel=0.1)


def test_logits_are_bounded_smoothly():
    capped, free = (random_model(config_of("logit_softcap", logit_softcap=cap)) for cap in (0.5, 0.0))
    tokens = jnp.arange(T)[None]
    assert np.abs(free(tokens)).max() > 1
    np.testing.assert_allclose(capped(tokens), 0.5 * np.tanh(free(tokens) / 0.5), atol=1e-6)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("weight", [True, False])
def test_norms_are_their_definitions_with_the_epsilon_given(norm, weight):
    config = GPTConfig(**SIZES, norm=norm, norm_weight=weight, norm_eps=0.5, bias="none")
    x = np.random.default_rng(0).normal(1, 1, (3, 16)).astype(np.float32)
    layer = GPT(config, rngs=nnx.Rngs(0)).ln_f
    scale = np.arange(16) / 8 if weight else 1.0
    if weight:
        layer.scale[...] = jnp.asarray(scale)
    centred = x - x.mean(-1, keepdims=True) if norm == "layernorm" else x
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 0.5) * scale
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, atol=1e-5)
    assert layer(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("switch", SWITCHES)
def test_the_parameters_of_the_blocks_are_those_of_their_matrices(switch):
    config = config_of(switch)
    leaves = flatten_dict(params_of(abstract(config))["blocks"])
    matrices = [math.prod(leaf.shape) for path, leaf in leaves.items() if path[-1] == "kernel"]
    assert config.block_parameters == sum(matrices)


@pytest.mark.full
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_what_is_recomputed_knows_tokens_and_documents(remat):
    tokens, documents = jnp.arange(T)[None], jnp.asarray([[0, 0, 0, 1, 1, 1, 1, 1]])

    def gradients(remat):
        graphdef, params = nnx.split(random_model(config_of("modern", remat=remat)))
        loss = lambda params: jnp.square(nnx.merge(graphdef, params)(tokens, documents=documents)).mean()  # noqa: E731
        return nnx.to_pure_dict(jax.jit(jax.grad(loss))(params))

    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), gradients(remat), gradients("none"))


def test_flops_count_what_is_multiplied():
    def flops(**fields):
        config = GPTConfig(**SIZES, **fields)
        return metrics.flops_per_token(config, count(config)), count(config)

    plain, parameters = flops()
    assert plain == 6 * (parameters - T * C) + 12 * 2 * C * T
    for fields, tables, attention in (
        ({"positions": "rope"}, 0, C * T),
        ({"value_embeddings": True, "n_kv_head": 2}, T * C + 2 * V * 2 * D, C * T),
        ({"sliding_window": 3}, T * C, C * 3),
        ({"head_size": 6, "n_kv_head": 1}, T * C, 4 * 6 * T),
    ):
        found, parameters = flops(**fields)
        assert found == 6 * (parameters - tables) + 12 * 2 * attention


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_parameter_matches_one_rule_and_its_shape_is_split_along_it(switch):
    config = config_of(switch, n_kv_head=SWITCHES[switch].get("n_kv_head", 0) and 2)
    params = params_of(abstract(config))
    mesh = jax.sharding.AbstractMesh((1, 2, 2), sharding.AXES)
    sharding.check_sizes(mesh, 8, *config.split_sizes)
    for leaf, place in zip(jax.tree.leaves(params), jax.tree.leaves(sharding.shardings(mesh, params))):
        place.shard_shape(leaf.shape)  # raises if the axes do not divide it


def test_matrices_and_value_tables_are_split_and_norms_of_heads_are_not():
    specs = {
        "blocks.0.mlp.gate.kernel": P("fsdp", "tensor"),
        "blocks.3.mlp.gate.bias": P("tensor"),
        "blocks.0.attn.value_embedding_table.embedding": P(None, ("tensor", "fsdp")),
        "blocks.0.attn.query_norm.scale": P(),
        "blocks.0.attn.key_norm.scale": P(),
        "embedding_norm.scale": P(),
    }
    assert {name: sharding.spec_of(name) for name in specs} == specs


@pytest.mark.parametrize(
    "fields, said",
    [
        (
            {"n_kv_head": 2},
            "n_kv_head 2 is not divisible by the 4 devices of .* tensor .*: use 4, or --mesh.tensor 2",
        ),
        ({"mlp_width": 34}, "mlp_width 34 is not divisible by the 4 devices"),
        (
            {"value_embeddings": True, "head_size": 3, "n_head": 4},
            r"n_kv_head \* head_size 12 is not divisible by the 8",
        ),
    ],
)
def test_what_a_mesh_cannot_split_is_an_error_that_says_so(fields, said):
    config = GPTConfig(**SIZES | fields)
    with pytest.raises(sharding.MeshError, match=said):
        sharding.check_sizes(jax.sharding.AbstractMesh((1, 2, 4), sharding.AXES), 8, *config.split_sizes)


@pytest.mark.full
@pytest.mark.parametrize("switch", ["modern", "llama"])
def test_an_exported_program_takes_any_batch_and_length(switch):
    pytest.importorskip("flatbuffers")
    model, tokens = random_model(config_of(switch)), jnp.asarray([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], jnp.int32)
    exported = jax.export.deserialize(export.program(model.config).serialize())
    np.testing.assert_allclose(exported.call(export.arrays(model), tokens), model(tokens), atol=1e-5)


def test_a_plan_counts_what_is_recomputed_and_kept():
    """GPT-2 124M with 4 heads of keys and values, a gate and a window, beside itself; figures by hand."""
    flags = ["--config", "gpt2_124m", "--model.remat", "dots", "--model.attention", "xla"]
    more = ["--model.n_kv_head", "4", "--model.gated", "true", "--model.mlp_width", "2048"]
    plain, shared, window = (
        resolve(load_config([*flags, *given]), 50257, "gpu")
        for given in ([], more, [*more, "--model.sliding_window", "256"])
    )
    head = 2 * 50257 * 768  # the loss is computed in parts, and so again
    assert plan.computed_again(plain) == plan.computed_again(shared) == 4 * 12 * 1024 * 768 + head
    assert plan.computed_again(window) == 4 * 12 * 256 * 768 + head
    whole = [dataclasses.replace(c, model=dataclasses.replace(c.model, remat="full")) for c in (plain, shared)]
    matrices = [12 * 768**2, 2 * 768**2 + 2 * 768 * 256 + 3 * 768 * 2048]
    assert [plan.computed_again(c) for c in whole] == [4 * 12 * 1024 * 768 + head + 2 * 12 * m for m in matrices]
    target = ahead.find_target("h200:1")
    kept = [ahead.estimate_step(c, target, 0).temporaries for c in (plain, shared)]
    tokens = plain.data.batch_size * 1024
    assert kept[0] - kept[1] == tokens * 2 * 12 * (2 * (768 - 256) + 4 * 768 - 2 * 2048)  # bytes of bfloat16


IN_THE_WAY = {
    "rope": "positions rope",
    "rmsnorm": "norm rmsnorm",
    "layernorm alone": "norm_weight False",
    "qk_norm": "qk_norm True",
    "relu2": "activation relu2",
    "gated": "gated True",
    "mlp_width": "mlp_width 24",
    "one kv head": "n_kv_head 1",
    "head_size": "head_size 6",
    "sliding_window": "sliding_window 3",
    "logit_softcap": "logit_softcap 2.0",
    "embedding_norm": "embedding_norm True",
    "value_embeddings": "value_embeddings True",
}


@pytest.mark.parametrize("switch", IN_THE_WAY)
def test_gpt2s_format_refuses_by_name_what_it_has_no_place_for(switch):
    with pytest.raises(gpt2.FormatError, match=re.escape(IN_THE_WAY[switch])):
        gpt2.check_form(config_of(switch))


def test_gpt2s_format_takes_switches_at_their_neutral_values():
    gpt2.check_form(GPTConfig(**SIZES, **NEUTRAL))
    gpt2.check_form(config_of("bias qkv"))
    gpt2.check_form(config_of("zero"))


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"n_kv_head": 3}, "n_head 4 is not divisible by n_kv_head 3: use a divisor of n_head, or 0 for n_head"),
        ({"n_kv_head": 8}, "n_head 4 is not divisible by n_kv_head 8"),
        ({"n_kv_head": -1}, "n_kv_head is -1: use 0 (the default) or more"),
        ({"positions": "rope", "head_size": 5}, "heads have 5 channels: positions rope needs an even head_size"),
        ({"positions": "rope", "n_embd": 12}, "heads have 3 channels: positions rope needs an even head_size"),
        ({"sliding_window": 9}, "sliding_window is 9: use at most block_size 8, or 0 for all keys"),
        ({"mlp_width": 32, "mlp_ratio": 0}, "mlp_width is 32: mlp_ratio 0 leaves the feed-forward layer out: use 0"),
        ({"gated": True, "mlp_ratio": 0}, "gated is True: mlp_ratio 0 leaves the feed-forward layer out: use false"),
        ({"mlp_width": 32, "projection": False}, "mlp_width is 32: use 0 or n_embd 16 without projection"),
        ({"head_size": 6, "projection": False, "mlp_ratio": 1}, "n_head 4 * head_size 6 is not n_embd 16"),
        ({"rope_theta": 5e5}, "rope_theta is 500000.0: use it with positions rope, or leave it out"),
        ({"rope_scaling": "linear"}, "rope_scaling is linear: use it with positions rope, or leave it out"),
        ({"positions": "rope", "rope_factor": 8.0}, "rope_factor is 8.0: use it with rope_scaling linear or llama3"),
        ({"positions": "rope", "rope_original_size": 4}, "rope_original_size is 4: use it with rope_scaling llama3"),
        (LLAMA3 | {"rope_low_freq": 4.0}, "rope_low_freq is 4.0: use less than rope_high_freq 4.0"),
        (LLAMA3 | {"rope_factor": 0.0}, "rope_factor is 0.0: use a finite number above 0"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0: use a finite number above 0"),
        ({"norm": "none", "embedding_norm": True}, "embedding_norm is True: use it with norm layernorm or rmsnorm"),
        ({"logit_softcap": float("inf")}, "logit_softcap is inf: use a finite number above 0, or 0 for none"),
        ({"activation": "swiglu"}, "activation is 'swiglu': use one of 'relu', 'gelu', 'gelu_tanh', 'relu2', 'silu'"),
    ],
)
def test_bad_combinations_are_refused_by_name(fields, said):
    with pytest.raises(ArgumentError, match=re.escape(said)):
        GPTConfig(**SIZES | fields)
