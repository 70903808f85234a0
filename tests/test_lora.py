"""LoRA: adapters on a frozen base, which their run directory holds."""

import dataclasses
import errno
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from random_run import make_run
from switches import random_model

import jaxgpt
from jaxgpt import Config, GPTConfig, cli, init, step
from jaxgpt.config import ConfigError, RunConfig, load_config
from jaxgpt.devices import sharding
from jaxgpt.interop import peft
from jaxgpt.layers import AdaptedLinear, Linear, LoRAConfig, merged
from jaxgpt.optim import OptimConfig
from jaxgpt.runs import base, init_from, metrics
from jaxgpt.runs.checkpoint import Checkpoints
from jaxgpt.runs.directory import OtherRunError, open_run
from jaxgpt.runs.loading import read_base
from jaxgpt.tokenizer import CharTokenizer
from jaxgpt.tools import plan
from jaxgpt.training import abstract_model, resolve, specify, step_spec

LORA = LoRAConfig(rank=3, alpha=6.0, on="all")
SIZES = {"vocab_size": 11, "block_size": 8, "n_layer": 2, "n_head": 4, "n_embd": 16}
LLAMA = {"positions": "rope", "norm": "rmsnorm", "bias": "none", "activation": "silu", "gated": True}
LLAMA |= {"mlp_width": 24, "n_kv_head": 2, "lm_head": "tied"}
FORMS = {"gpt2": {"bias": "all", "lm_head": "tied", "activation": "gelu_tanh"}, "llama": LLAMA}
TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 11, (4, 9)))


def random_adapters(config, lora, seed=0):
    """Adapters of which both factors show."""
    rng, shapes = np.random.default_rng(seed), step.trained_of(init.abstract(config, lora))
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) / math.sqrt(a.shape[0]), jnp.float32), shapes)


def with_products(frozen, adapters, lora):
    """W + alpha / rank A B of every matrix that has an adapter, by NumPy."""
    weights, flat = dict(flatten_dict(jax.device_get(frozen))), flatten_dict(jax.device_get(adapters))
    for path in [path[:-1] for path in flat if path[-1] == "lora_a"]:
        product = flat[*path, "lora_a"].astype(np.float64) @ flat[*path, "lora_b"]
        weights[*path, "kernel"] = weights[*path, "kernel"] + lora.alpha / lora.rank * product
    return unflatten_dict(weights)


def spec_of(config, lora, **optim):
    resolved = resolve(Config(model=config, lora=lora, optim=OptimConfig(warmup_steps=0, **optim)), config.vocab_size)
    return step_spec(resolved, abstract_model(resolved, "cpu"))


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 2e-2)])  # bfloat16 keeps 8 bits
def test_an_adapted_layer_computes_and_learns_what_the_closed_form_says(dtype, tolerance):
    rng = np.random.default_rng(0)
    layer = AdaptedLinear(Linear(5, 7, rngs=nnx.Rngs(0)), LORA, nnx.Rngs(1))
    w, b, a = (np.asarray(each[...], np.float64) for each in (layer.kernel, layer.bias, layer.lora_a))
    assert a.shape == (5, 3) and not np.any(layer.lora_b[...]) and 0.5 < np.abs(a).max() * 5**0.5 < 1
    up, x, dy = (rng.normal(size=size) for size in ((3, 7), (2, 4, 5), (2, 4, 7)))
    layer.lora_b = nnx.LoRAParam(jnp.asarray(up, jnp.float32))
    graphdef, trained, frozen = nnx.split(layer, nnx.LoRAParam, ...)
    y, back = jax.vjp(lambda trained: nnx.merge(graphdef, trained, frozen)(jnp.asarray(x, dtype)), trained)
    gradient = nnx.to_pure_dict(back(jnp.asarray(dy, dtype))[0])
    assert y.dtype == dtype and set(gradient) == {"lora_a", "lora_b"}
    rows, grows = x.reshape(-1, 5), dy.reshape(-1, 7)
    expected = {"lora_a": 2 * rows.T @ grows @ up.T, "lora_b": 2 * (rows @ a).T @ grows}
    np.testing.assert_allclose(np.asarray(y, np.float64), x @ (w + 2 * a @ up) + b, atol=40 * tolerance)
    for name, value in expected.items():
        assert gradient[name].dtype == "float32"
        np.testing.assert_allclose(gradient[name], value, atol=tolerance * np.abs(value).max() * 2)


@pytest.mark.full
@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("on", ["attention", "all"])
@pytest.mark.parametrize("form", FORMS)
def test_a_model_with_adapters_is_the_merged_one_and_so_are_its_gradients(form, on):
    config, lora = GPTConfig(**SIZES | FORMS[form]), dataclasses.replace(LORA, on=on)
    frozen, adapters = step.params_of(random_model(config)), random_adapters(config, lora)
    plain, adapted = spec_of(config, LoRAConfig()), spec_of(config, lora)
    whole = merged(frozen, adapters, lora)
    chex.assert_trees_all_close(whole, with_products(frozen, adapters, lora), rtol=1e-5, atol=1e-5)
    logits = [step.build(spec, params)(TOKENS[:, :-1]) for spec, params in
              ((adapted, step.combined(adapters, frozen)), (plain, whole))]  # fmt: skip
    np.testing.assert_allclose(*logits, atol=2e-5)
    assert np.abs(logits[1] - step.build(plain, frozen)(TOKENS[:, :-1])).max() > 0.1
    batch, key = (TOKENS[:, :-1], TOKENS[:, 1:]), jax.random.key(0)
    loss, gradient = step.loss_and_gradient(adapters, batch, key, adapted, frozen)
    same, of_weights = step.loss_and_gradient(whole, batch, key, plain)
    assert float(loss) == pytest.approx(float(same), abs=1e-5)
    assert jax.tree.structure(gradient) == jax.tree.structure(adapters)
    flat, of_weights = flatten_dict(adapters), flatten_dict(of_weights)
    for path, value in flatten_dict(gradient).items():  # by the chain rule from the gradient of W + alpha / rank A B
        g, a, b = of_weights[*path[:-1], "kernel"], flat[*path[:-1], "lora_a"], flat[*path[:-1], "lora_b"]
        expected = 2 * (g @ b.T if path[-1] == "lora_a" else a.T @ g)
        np.testing.assert_allclose(value, expected, atol=1e-5 + 1e-4 * np.abs(expected).max(), err_msg=str(path))


@pytest.mark.parametrize("form", FORMS)
def test_the_state_has_the_adapters_and_their_moments_alone(form):
    config, mesh = GPTConfig(**SIZES | FORMS[form]), sharding.make_mesh(sharding.MeshConfig(1))
    C, D, hidden, heads = 16, 4, config.hidden, 4 + 2 * config.kv_heads
    sides = {"attention": [C + 4 * D, C + 4 * D, *[C + config.kv_heads * D] * 2]}
    sides["all"] = sides["attention"] + [C + hidden] * (2 + config.gated)
    assert sum(sides["attention"]) == 5 * C + heads * D
    for on, each in sides.items():
        resolved = resolve(Config(model=config, lora=LoRAConfig(rank=5, on=on)), 11)
        spec, state = specify(resolved, mesh)
        floats = [sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree) if leaf.ndim)
                  for tree in (state.params, state.opt_state)]  # fmt: skip
        assert floats == [config.n_layer * 5 * sum(each), 2 * config.n_layer * 5 * sum(each)]
        frozen = init.abstract_frozen(config, resolved.lora, mesh)
        assert jax.tree.structure(frozen) == jax.tree.structure(step.params_of(init.abstract(config)))
        everything = step.combined(state.params, frozen)
        assert jax.tree.structure(everything) == jax.tree.structure(
            step.params_of(nnx.merge(spec.graphdef, everything))
        )


def test_without_a_rank_nothing_is_different():
    mesh, model = sharding.make_mesh(sharding.MeshConfig(1)), GPTConfig(**SIZES)
    default, off = (specify(resolve(Config(model=model, lora=lora), 11), mesh)
                    for lora in (LoRAConfig(), LoRAConfig(rank=0, alpha=3.0, on="all")))  # fmt: skip
    assert default == off  # what the compiled functions depend on
    params = step.params_of(random_model(model))
    assert jax.tree.structure(params) == jax.tree.structure(default[1].params)
    assert step.combined(params, None) is params and init.abstract_frozen(model, LoRAConfig(), mesh) is None


def test_adapters_are_drawn_from_the_seed_and_begin_as_no_change():
    config = GPTConfig(**SIZES)
    first, again, other = (init.init_adapters(config, LORA, jax.random.key(seed)) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    assert jax.tree.structure(first) == jax.tree.structure(step.trained_of(init.abstract(config, LORA)))
    flat, drawn = flatten_dict(first), [leaf for path, leaf in flatten_dict(first).items() if path[-1] == "lora_a"]
    assert not any(np.any(leaf) for path, leaf in flat.items() if path[-1] == "lora_b")
    assert len({leaf.tobytes() for leaf in map(np.asarray, drawn)}) == len(drawn)
    assert not np.array_equal(drawn[0], flatten_dict(other)[next(iter(flat))])


def test_every_adapter_has_one_sharding_rule_that_splits_it_as_its_matrix():
    for form in FORMS.values():
        for path in flatten_dict(step.trained_of(init.abstract(GPTConfig(**SIZES | form), LORA))):
            rows, columns = sharding.spec_of(".".join(map(str, (*path[:-1], "kernel"))))
            expected = {"lora_a": (rows, None), "lora_b": (None, columns)}[path[-1]]
            assert tuple(sharding.spec_of(".".join(map(str, path)))) == expected


@pytest.mark.full
@pytest.mark.usefixtures("full_precision")
def test_losses_are_the_same_on_every_mesh_and_the_base_stays_as_it_is():
    config = GPTConfig(**SIZES | LLAMA)
    frozen = step.params_of(random_model(config))
    found = {}
    for sizes in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)):
        mesh = sharding.make_mesh(sharding.MeshConfig(*sizes))
        resolved = Config(model=config, lora=LORA, optim=OptimConfig(warmup_steps=0, learning_rate=0.1))
        resolved = dataclasses.replace(resolved, data=dataclasses.replace(resolved.data, batch_size=4))
        with jax.set_mesh(mesh):
            spec, shapes = specify(resolve(resolved, 11), mesh)
            placed = jax.device_put(frozen, sharding.shardings(mesh, frozen))
            state = init.state_of(init.init_adapters(config, LORA, jax.random.key(0)), spec.tx)
            split = [leaf for leaf in jax.tree.leaves(state.params) if not leaf.is_fully_replicated]
            assert bool(split) == (sizes[1] * sizes[2] > 1)
            windows = jnp.broadcast_to(TOKENS.astype(jnp.uint8), (4, 4, 9))
            state, measured = step.train_steps(state, windows, jax.random.key(0), placed, spec=spec)
            chex.assert_trees_all_equal(jax.device_get(placed), jax.device_get(frozen))
            kept = jax.tree.map(lambda a, at: a.sharding.is_equivalent_to(at.sharding, a.ndim), state, shapes)
            assert all(jax.tree.leaves(kept))
            evaluated = step.evaluate(step.cast(step.combined(state.params, placed), spec), TOKENS.reshape(-1), 4)
            found[sizes] = [*map(float, measured["loss"]), *map(float, measured["grad_norm"]), evaluated]
    one = found.pop((1, 1, 1))
    assert one[3] < one[0] - 0.1
    for sizes, losses in found.items():
        assert losses == pytest.approx(one, rel=1e-4), sizes  # sums in another order


def test_flops_of_a_frozen_matrix_have_no_weight_gradient():
    config = GPTConfig(**SIZES)
    attention, looked_up = 12 * 2 * 4 * 4 * 8, 8 * 16
    assert metrics.flops_per_token(config, 1000, 0) == 6 * (1000 - looked_up) + attention
    assert metrics.flops_per_token(config, 1000, 900) == 4 * (900 - looked_up) + 6 * 100 + attention


def test_a_plan_counts_moments_and_gradients_of_the_adapters_only():
    flags = ["--model.vocab_size", "100", "--model.n_embd", "64", "--target", "h100:1", "--search", "false"]
    whole, lora = (plan.plan(load_config([*flags, *more], plan.PlanConfig)) for more in ((), ("--lora.rank", "2")))
    assert lora["adapters"] == 4 * 2 * 4 * (64 + 64) and lora["parameters"] == whole["parameters"] + lora["adapters"]
    assert whole["arguments"] == 3 * 4 * whole["parameters"] and whole["adapters"] == 0
    assert lora["arguments"] == 4 * (lora["parameters"] + 2 * lora["adapters"])
    assert lora["flops_a_step"] < 0.8 * whole["flops_a_step"]
    assert f"of which {lora['adapters']:,} are adapters" in plan.table(lora)


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--lora.rank", "-1"], r"rank is -1 .*lora\): use 1 or more, or 0"),
        (["--lora.rank", "2", "--lora.alpha", "0"], "alpha is 0.0 .*use a finite number above 0"),
        (["--lora.alpha", "inf"], "alpha is inf .*use a finite number above 0"),
        (["--lora.on", "head"], "--lora.on is 'head' .*'attention', 'all'"),
        (["--lora.rank", "2", "--optim.optimizer", "muon"], r"optimizer muon with lora.rank 2 .*use adamw"),
        (["--lora.rank", "2", "--model.n_layer", "0"], r"n_layer 0 with lora.rank 2 .*blocks"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(flags, says):
    with pytest.raises(ConfigError, match=says):
        load_config(flags)


ALPHABET = CharTokenizer("abcdefghijk")


@pytest.fixture(scope="module")
def donor(tmp_path_factory):
    """A run to adapt, with a checkpoint of step 3, which no test changes."""
    folder = tmp_path_factory.mktemp("donor") / "donor"
    make_run(folder, ALPHABET, **FORMS["llama"])
    return folder


def make_adapted(folder, donor, lora=LORA, **model):
    """A LoRA run with random adapters, as if trained; one checkpoint, of step 5."""
    theirs = load_config(["--config", str(donor / "config.yaml")]).model
    run = RunConfig(dir=str(folder), init_from=str(donor))
    config = Config(model=dataclasses.replace(theirs, **model), run=run, lora=lora)
    init_from.check(config, ALPHABET)
    adapters = random_adapters(config.model, lora)
    run = open_run(config, ALPHABET, "none")
    run.begin(adapters)
    init_from.keep_base(config)
    run.save(5, {"params": adapters}, val_loss=None, mesh={})
    run.close()
    return adapters


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, donor):
    """The directory of such a run, which no test changes."""
    folder = tmp_path_factory.mktemp("adapted") / "run"
    make_adapted(folder, donor)
    return folder


def files(folder):
    return {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}


def test_a_loaded_run_is_merged_wherever_it_is_and_without_the_other(tmp_path, donor, adapted):
    theirs = jaxgpt.load(donor)
    expected = with_products(step.params_of(theirs.model), random_adapters(theirs.config.model, LORA), LORA)
    shutil.copytree(adapted, tmp_path / "elsewhere")
    config = tmp_path / "elsewhere/config.yaml"
    config.write_text(config.read_text().replace(str(donor), "gone"))
    run = jaxgpt.load(tmp_path / "elsewhere")
    assert run.step == 5 and run.config.lora == LORA and not nnx.to_pure_dict(nnx.state(run.model, nnx.LoRAParam))
    chex.assert_trees_all_close(step.params_of(run.model), expected, rtol=1e-5, atol=1e-6)


def test_checkpoints_hold_the_adapters_and_name_the_base_which_is_linked(donor, adapted):
    facts = json.loads((adapted / "checkpoints/5/manifest.json").read_text())
    names = {name.split("'")[-2] for name in facts["arrays"]}
    assert names == {"lora_a", "lora_b"} and facts["base"] == base.identity(adapted)
    assert facts["base"]["step"] == 3 and len(facts["base"]["sha256"]) == 64
    theirs, ours = files(donor / "checkpoints/3"), files(adapted / "base/3")
    assert theirs.keys() == ours.keys() and all(os.path.samefile(theirs[name], ours[name]) for name in theirs)


@pytest.mark.full
def test_where_there_are_no_hard_links_the_base_is_a_copy(donor, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "run/base/9").mkdir(parents=True)  # of a start that was killed
    make_adapted(tmp_path / "run", donor)
    theirs, ours = files(donor / "checkpoints/3"), files(tmp_path / "run/base/3")
    assert theirs.keys() == ours.keys() and not any(os.path.samefile(theirs[name], ours[name]) for name in theirs)
    assert os.listdir(tmp_path / "run/base") == ["3"]
    assert jaxgpt.load(tmp_path / "run").step == 5


@pytest.mark.full
def test_a_base_in_bfloat16_stays_in_it_and_a_shorter_context_cuts_its_positions(tmp_path):
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), make_run(tmp_path / "donor", ALPHABET, **FORMS["gpt2"]))
    shutil.rmtree(tmp_path / "donor/checkpoints")
    with Checkpoints(tmp_path / "donor/checkpoints") as checkpoints:
        checkpoints.save(3, {"params": params}, {"val_loss": None, "corpus_sha256": None})
    make_adapted(tmp_path / "run", tmp_path / "donor", block_size=16)
    mesh = sharding.make_mesh(sharding.MeshConfig(1))
    config = load_config(["--config", str(tmp_path / "run/config.yaml")])
    shapes = init.abstract_frozen(config.model, LORA, mesh)
    frozen = read_base(tmp_path / "run", base.identity(tmp_path / "run"), shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype(jnp.bfloat16)}
    assert frozen["position_embedding_table"]["embedding"].shape == (16, 32)
    loaded = step.params_of(jaxgpt.load(tmp_path / "run").model)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.bfloat16)}
    expected = with_products(
        jax.tree.map(lambda p: p.astype(np.float32), frozen), random_adapters(config.model, LORA), LORA
    )
    chex.assert_trees_all_close(jax.tree.map(lambda p: p.astype(np.float32), loaded), expected, rtol=2**-8, atol=1e-6)


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "harm, says",
    [
        (lambda run: damage(max(files(run / "base").values(), key=lambda file: file.stat().st_size)), "is damaged"),
        (lambda run: shutil.rmtree(run / "base"), "base is missing"),
        (lambda run: damage(run / "base/3/manifest.json"), "not the base of this run"),
        (lambda run: (run / "base/3").rename(run / "base/4"), "not the base of this run"),
    ],
    ids=["damaged", "missing", "manifest", "another step"],
)
def test_a_base_that_is_not_the_one_of_the_run_is_refused_in_one_line(adapted, tmp_path, capsys, harm, says):
    run = shutil.copytree(adapted, tmp_path / "run")
    harm(run)
    assert cli.main(["sample", "--run", str(run)]) == 4
    message = capsys.readouterr().err
    assert says in message and "restore base/ from a copy" in message and message.count("\n") == 1


@pytest.mark.parametrize(
    "change, says",
    [
        ({"lora": LORA, "run": RunConfig(dir="new")}, r"no weights to adapt \(--lora.rank, 3\)"),
        ({"lora": LORA, "run": RunConfig(dir="new", init_from="RUN")}, "the weights to adapt are themselves adapted"),
        ({"lora": LORA, "n_embd": 64}, "n_embd 32, here 64"),
        ({"lora": LORA, "n_kv_head": 4}, "n_kv_head 2, here 4"),
    ],
)
def test_a_base_that_does_not_fit_is_refused_before_anything_is_made(adapted, donor, change, says):
    change = dict(change)
    run = change.pop("run", RunConfig(dir="new", init_from=str(donor)))
    run = dataclasses.replace(run, init_from=run.init_from.replace("RUN", str(adapted)))
    lora, theirs = change.pop("lora"), load_config(["--config", str(donor / "config.yaml")]).model
    with pytest.raises(ConfigError, match=says):
        init_from.check(Config(model=dataclasses.replace(theirs, **change), run=run, lora=lora), ALPHABET)


@pytest.mark.parametrize("resume", ["auto", "changed"])
@pytest.mark.parametrize("change", [{"rank": 4}, {"on": "attention"}, {"alpha": 7.0}, {"rank": 0}])
def test_a_run_goes_on_with_the_adapters_that_it_has(adapted, resume, change):
    config = load_config(["--config", str(adapted / "config.yaml"), "--run.resume", resume])
    name, value = next(iter(change.items()))
    other = dataclasses.replace(config, lora=dataclasses.replace(LORA, **change))
    with pytest.raises(OtherRunError, match=rf"lora.{name} \(was {getattr(LORA, name)}, now {value}\)"):
        open_run(other, ALPHABET, "none")
    open_run(config, ALPHABET, "none").close()


@pytest.mark.full
def test_a_run_that_is_trained_as_a_whole_can_start_from_an_adapted_one(adapted, tmp_path, monkeypatch):
    config = resolve(load_config(["--run.init_from", str(adapted), "--run.dir", str(tmp_path / "new")]), 11)
    mesh = sharding.make_mesh(sharding.MeshConfig(1))
    with jax.set_mesh(mesh):
        spec, shapes = specify(config, mesh)
        state = init_from.initial_state(config, init_from.check(config, ALPHABET), spec.tx, shapes)
        theirs = step.params_of(jaxgpt.load(adapted).model)
        chex.assert_trees_all_close(state.params, theirs, rtol=1e-6, atol=1e-6)
        narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), theirs)  # as of a base in bfloat16
        monkeypatch.setattr(init_from, "read_weights", lambda *_: jax.device_put(narrow, jax.devices()[0]))
        state = init_from.initial_state(config, init_from.check(config, ALPHABET), spec.tx, shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("form", FORMS)
def test_peft_s_tensors_are_products_of_the_same_values(form):
    config = GPTConfig(**SIZES | FORMS[form])
    adapters = {".".join(map(str, path)): leaf for path, leaf in flatten_dict(random_adapters(config, LORA)).items()}
    tensors = peft.to_tensors(adapters, config)
    stated = peft.adapter_config(tensors, LORA, config)
    attn = "transformer.h.1.attn.c_attn" if form == "gpt2" else "model.layers.1.self_attn.q_proj"
    a, b = (tensors[f"base_model.model.{attn}.lora_{letter}.weight"] for letter in "AB")
    thirds = ("query", "key", "value") if form == "gpt2" else ("query",)
    expected = [adapters[f"blocks.1.attn.{n}.lora_a"] @ adapters[f"blocks.1.attn.{n}.lora_b"] for n in thirds]
    np.testing.assert_allclose((b @ a).T, np.concatenate(expected, 1), atol=1e-5)
    ranks, alphas = ({"attn.c_attn": 9}, {"attn.c_attn": 18.0}) if form == "gpt2" else ({}, {})
    assert (stated["r"], stated["lora_alpha"]) == (3, 6.0)
    assert (stated["rank_pattern"], stated["alpha_pattern"]) == (ranks, alphas)
    assert len(stated["target_modules"]) == (4 if form == "gpt2" else 7)


def test_a_run_without_adapters_has_none_to_export(donor, tmp_path, capsys):
    assert cli.main(["export", "--run", str(donor), "--to", str(tmp_path / "out"), "--format", "peft"]) == 2
    assert "no adapters to export" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.fixture
def flags(tmp_path, donor, text_file):
    """A short LoRA run from a copy of `donor`, with a text of its letters."""
    shutil.copytree(donor, tmp_path / "donor")
    rng = np.random.default_rng(0)
    text_file.write_text("".join(rng.choice(list("abcdefghijk"), 3000, p=np.arange(1, 12) / 66)), encoding="utf-8")
    chosen = {"run.dir": tmp_path / "run", "run.init_from": tmp_path / "donor", "data.path": text_file, "lora.rank": 3}
    chosen |= {"lora.on": "all", "data.batch_size": 4, "optim.warmup_steps": 0, "optim.learning_rate": 0.01}
    chosen |= {"train.steps": 6, "train.eval_interval": 3, "train.eval_batches": 1, "train.sample_tokens": 5}
    chosen |= {"run.checkpoint_interval": 3, "run.keep": 9, "train.steps_per_call": 3, "train.log_interval": 1}
    return [word for name, value in chosen.items() for word in (f"--{name}", str(value))]


@pytest.mark.full
@pytest.mark.parametrize(
    "more",
    [(), pytest.param(("--optim.ema_decay", "0.5", "--optim.grad_accumulation", "2"), marks=pytest.mark.long)],
    ids=["", "ema"],
)
def test_an_adapted_run_learns_and_continues_to_the_same_bits(flags, tmp_path, more, capsys):
    whole = jaxgpt.train(load_config([*flags, *more, "--run.dir", str(tmp_path / "whole")]))
    assert "are adapters and trained" in capsys.readouterr().out
    half = [*flags, *more, "--train.steps", "3", "--optim.decay_steps", "6"]
    jaxgpt.train(load_config(half))
    shutil.rmtree(tmp_path / "donor")
    (tmp_path / "run").rename(tmp_path / "moved")
    own = ["--config", str(tmp_path / "moved/config.yaml"), "--train.steps", "6"]
    run = jaxgpt.train(load_config([*own, "--data.tokenizer", str(tmp_path / "moved/tokenizer.json")]))
    chex.assert_trees_all_equal(step.params_of(run.model), step.params_of(whole.model))
    loaded = jaxgpt.load(tmp_path / "moved", "last")
    chex.assert_trees_all_equal(step.params_of(loaded.model), step.params_of(run.model))
    losses = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert losses[0]["adapters"] == losses[0]["parameters"] - sum(
        map(np.size, jax.tree.leaves(step.params_of(run.model)))
    )
    final, train = losses[-1]["val_loss"], [each["loss"] for each in losses if each["kind"] == "train"]
    assert final < train[0]
    assert cli.main(["eval", "--run", str(tmp_path / "moved"), "--step", "last"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["nats_per_token"] == pytest.approx(final, abs=1e-5)
    assert cli.main(["replay", "--run", str(tmp_path / "moved"), "--step", "5"]) == 0
    assert float(capsys.readouterr().out.split("loss ")[1]) == pytest.approx(train[4], abs=2e-4)
    assert cli.main(["export", "--run", str(tmp_path / "moved"), "--to", str(tmp_path / "hf"), "--step", "last"]) == 0
    from safetensors.numpy import load_file

    exported = load_file(tmp_path / "hf/model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    np.testing.assert_array_equal(exported.T, loaded.model.blocks[0].mlp.fc.kernel[...])


@pytest.mark.parity
@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("on", ["attention", "all"])
@pytest.mark.parametrize("form", FORMS)
def test_peft_computes_the_same_logits_on_the_exported_base(tmp_path, form, on, capsys):
    torch, transformers, library = (pytest.importorskip(name) for name in ("torch", "transformers", "peft"))
    make_run(tmp_path / "donor", ALPHABET, **FORMS[form])
    make_adapted(tmp_path / "run", tmp_path / "donor", dataclasses.replace(LORA, on=on))
    for source, kind in (("donor", "hf"), ("run", "hf"), ("run", "peft")):
        out = str(tmp_path / f"{source}-{kind}")
        assert cli.main(["export", "--run", str(tmp_path / source), "--to", out, "--format", kind]) == 0
    tokens = np.asarray(TOKENS)
    ours = np.asarray(jaxgpt.load(tmp_path / "run").model(jnp.asarray(tokens)))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "donor-hf").eval()
    with torch.no_grad():
        before = plain(torch.from_numpy(tokens)).logits.numpy()
        theirs = library.PeftModel.from_pretrained(plain, tmp_path / "run-peft").eval()(torch.from_numpy(tokens)).logits
        whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run-hf").eval()(torch.from_numpy(tokens))
    assert np.abs(before - ours).max() > 0.1
    np.testing.assert_allclose(theirs.numpy(), ours, atol=2e-4)
    np.testing.assert_allclose(whole.logits.numpy(), ours, atol=2e-4)


@pytest.mark.full
def test_the_memory_of_lora_is_measured():
    root = pathlib.Path(__file__).parent.parent
    small = ["--model.n_layer", "1", "--model.n_embd", "96", "--model.vocab_size", "65", "--data.batch_size", "2"]
    command = [sys.executable, str(root / "benchmarks/lora_memory.py"), *small, "--lora.rank", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["lora"]["state"] < found["full"]["state"] / 2.5 and found["ratio"] > 1
