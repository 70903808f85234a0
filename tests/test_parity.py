"""jaxgpt against PyTorch: the same weights and batches give the same logits, losses, gradients, steps and samples."""

import dataclasses
import math
import pathlib
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxgpt import GPT, GPTConfig, data, generate, load_config, sampling
from jaxgpt.step import TRAIN, TrainState, token_losses, train_steps
from jaxgpt.training import resolve, step_spec

torch = pytest.importorskip("torch")
import torch_reference as reference  # noqa: E402  needs torch

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("full_precision")]

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
# those of configs/modern are in test_switches_parity.py
ALL = sorted(
    str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml") if "modern" not in path.parts
)
# GPT-2's sizes are too large: "gpt2" is a small one; tests/interop/test_llama.py compares Llamas with transformers
FILES = [name for name in ALL if not any(family in name for family in ("gpt2", "llama", "smollm2"))]
V = 65
QUICKLY = {"xla_backend_optimization_level": 0}  # compiling takes longer than running

# GPT-2's form has no recipe of its own: its sizes here on top of nanoGPT's
GPT2 = {"n_layer": 2, "n_head": 4, "n_embd": 48, "block_size": 24}
GPT2_FLAGS = {f"model.{k}": v for k, v in GPT2.items()} | {"optim.warmup_steps": 10, "optim.grad_accumulation": 1}
KEY_BIAS = ("key", "bias")  # adds the same to all scores of a query, which softmax does not see: no gradient
TEN_MILLION = ("lecture/scaled", "shakespeare")  # parameters: they get less to do
# for 100 steps, which would take minutes with as many channels and layers as in the files
SMALL = {"n_layer": 2, "n_embd": 48, "block_size": 24, "dropout": 0.0}
SHORT = {"lecture/colab": SMALL, "lecture/scaled": SMALL, "shakespeare_cpu": SMALL, "shakespeare": SMALL}


@pytest.fixture(autouse=True)
def one_thread():
    """PyTorch's threads would fight XLA's over these small arrays."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def configuration(name, sizes=None, flags=None):
    """A recipe of configs/, or GPT-2's form, without dropout."""
    chosen = {"train.dtype": "float32", "model.dropout": 0} | {f"model.{k}": v for k, v in (sizes or {}).items()}
    if name == "gpt2":
        name, chosen = "gpt2_124m", GPT2_FLAGS | chosen
    words = [word for key, value in (chosen | (flags or {})).items() for word in (f"--{key}", str(value))]
    return resolve(load_config(["--config", str(CONFIGS / f"{name}.yaml"), *words]), V)


def torch_model(name, sizes=None):
    """The reference of the same name, in float64."""
    build = partial(reference.GPT2, **GPT2) if name == "gpt2" else reference.REFERENCES[name]
    return build(**sizes or {}).double().eval()


def random_leaves(model, seed):
    """{path: float32 array} for a jaxgpt model, so that everything shows in the logits.

    Biases and scales are not at 0 and 1; the stream is small enough for layer norm's epsilon to matter, and layers keep
    their input's size, so that scores, GELUs and ReLUs are used where they bend.
    """
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        match path[-1]:
            case "kernel":
                values = rng.normal(size=shape) * shape[0] ** -0.5
            case "embedding":
                values = rng.normal(size=shape) * 0.1
            case "scale":
                values = 1 + 0.3 * rng.normal(size=shape)
            case "bias":
                values = 0.3 * rng.normal(size=shape)
        return values.astype(np.float32)

    return {path: draw(path, leaf.shape) for path, leaf in flatten_dict(nnx.to_pure_dict(nnx.state(model))).items()}


def both_models(name, seed, dtype, sizes=None, flags=None):
    """Configuration, jaxgpt's graph definition and parameters, and PyTorch's model of the same random weights."""
    config = configuration(name, sizes, flags)
    model = nnx.eval_shape(lambda: GPT(config.model, rngs=nnx.Rngs(0)))  # the form only
    values = random_leaves(model, seed)
    theirs = torch_model(name, sizes)
    reference.set_leaves(theirs, values)
    held = [parameter[rows] for parts in reference.leaves(theirs).values() for parameter, rows in parts]
    assert sum(part.numel() for part in held) == sum(parameter.numel() for parameter in theirs.parameters())
    assert len({part.data_ptr() for part in held}) == len(held)  # none left out, none twice
    params = unflatten_dict({path: jnp.asarray(value, dtype) for path, value in values.items()})
    return config, model, params, theirs


def random_tokens(seed, B, T):
    """Inputs and targets, (B, T) int32 of NumPy."""
    return np.random.default_rng([seed, 1]).integers(0, V, (2, B, T), np.int32)


def losses_of(logits, inputs, targets):
    """jaxgpt's loss of given logits."""
    done = types.SimpleNamespace(hidden=lambda inputs, **_: (None, None), logits=lambda _, padded: logits)
    return token_losses(done, inputs, targets)


@partial(jax.jit, static_argnames="graphdef", compiler_options=QUICKLY)
def logits_loss_and_gradients(params, inputs, targets, graphdef):
    def loss(params):
        logits = nnx.merge(graphdef, params)(inputs)
        return losses_of(logits, inputs, targets).mean(), logits

    (loss, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return logits, loss, gradients


def test_every_configuration_file_has_a_reference():
    assert set(FILES) == set(reference.REFERENCES)


@pytest.mark.parametrize(
    "name, parameters",
    [("bigram", 4225), ("positions", 4481), ("one_head", 7553), ("four_heads", 7553), ("feed_forward", 8609)]
    + [("residual", 41921), ("layernorm", 42369), ("colab", 209729), ("scaled", 10788929)],
)
def test_the_references_have_as_many_parameters_as_the_lecture_says(name, parameters):
    assert sum(p.numel() for p in reference.REFERENCES[f"lecture/{name}"]().parameters()) == parameters


@pytest.mark.parametrize(
    "name, seed", [(name, seed) for name in [*FILES, "gpt2"] for seed in range(1 if name in TEN_MILLION else 3)]
)
def test_logits_loss_and_every_gradient_agree(name, seed, float64):
    config, model, params, theirs = both_models(name, seed, jnp.float64)
    inputs, targets = random_tokens(seed, 1 if name in TEN_MILLION else 3, config.model.block_size)
    logits, loss, gradients = logits_loss_and_gradients(params, inputs, targets, nnx.graphdef(model))
    inputs, targets = torch.tensor(inputs).long(), torch.tensor(targets).long()
    their_loss = theirs.loss(inputs, targets)
    their_loss.backward()

    # sums of float64 in other orders: up to 1e-14 apart
    np.testing.assert_allclose(logits, theirs(inputs).detach(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(loss, their_loss.item(), rtol=1e-12)
    gradients, their_gradients = flatten_dict(gradients), reference.get_leaves(theirs, lambda p: p.grad)
    assert set(gradients) == set(their_gradients)
    for path, gradient in their_gradients.items():
        size = np.abs(gradient).max()
        if path[-2:] == KEY_BIAS:
            assert max(size, np.abs(gradients[path]).max()) < 1e-15
            continue
        assert size > 1e-6, f"{path} has no gradient to compare"
        np.testing.assert_allclose(gradients[path], gradient, rtol=0, atol=1e-12 * size, err_msg=str(path))


@pytest.mark.parametrize("name", [*FILES, "gpt2"])
def test_logits_and_loss_agree_in_float32_on_less_than_a_full_window(name):
    config, model, params, theirs = both_models(name, 3, jnp.float32)
    inputs, targets = random_tokens(3, 2, config.model.block_size - 3)
    logits = jax.jit(nnx.merge(nnx.graphdef(model), params).__call__)(inputs)
    losses = losses_of(logits, inputs, targets)
    inputs, targets = torch.tensor(inputs).long(), torch.tensor(targets).long()

    # 6e-8 of the stream is lost with each operation; up to 7e-6 in six layers
    assert logits.dtype == losses.dtype == jnp.float32
    np.testing.assert_allclose(logits, theirs(inputs).detach(), rtol=0, atol=5e-5)
    np.testing.assert_allclose(losses.mean(), theirs.loss(inputs, targets).item(), rtol=0, atol=1e-5)


def learning_rate(config, step):
    """Linear warm-up that ends at the peak, half a cosine down to the minimum, then the minimum."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    done = min((step - config.warmup_steps) / max(config.decay_steps - config.warmup_steps, 1), 1)
    return (
        config.min_learning_rate
        + (config.learning_rate - config.min_learning_rate) * (1 + math.cos(math.pi * done)) / 2
    )


def torch_steps(model, config, batches):
    """AdamW on the batches; the loss, learning rate and gradient norm of each step."""
    tables_and_matrices = [p for p in model.parameters() if p.ndim >= 2]
    biases_and_norms = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": tables_and_matrices, "weight_decay": config.weight_decay},
        {"params": biases_and_norms, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2))
    measured = {"loss": [], "learning_rate": [], "grad_norm": []}
    for step, (inputs, targets) in enumerate(zip(*batches)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.zero_grad()
        loss = model.loss(inputs, targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        optimizer.step()
        for name, value in zip(measured, (loss.item(), group["lr"], norm.item())):
            measured[name].append(value)
    return measured


@pytest.mark.parametrize("name", [*FILES, "gpt2"])
def test_a_hundred_steps_of_training_agree(name, float64):
    flags = {"data.batch_size": 4}
    if not name.startswith("lecture/"):  # warm-up, cosine and what follows within the 100 steps
        flags |= {"optim.warmup_steps": 10, "optim.decay_steps": 80}
    config, model, params, theirs = both_models(name, 4, jnp.float64, SHORT.get(name), flags)
    spec = step_spec(config, model)._replace(dtype=jnp.dtype(jnp.float64))
    key, tokens = jax.random.key(4), jnp.asarray(np.random.default_rng(4).integers(0, V, 1000), jnp.uint8)
    windows = data.windows(jax.random.fold_in(key, TRAIN), tokens, jnp.arange(100), 4, config.model.block_size)
    whole = torch.tensor(np.asarray(windows)).long()
    batches = [whole[..., :-1], whole[..., 1:]]
    before = reference.get_leaves(theirs)

    state = TrainState(jnp.int32(0), params, spec.tx.init(params))
    compiled = train_steps.lower(state, windows, key, spec=spec).compile(QUICKLY)
    state, measured = compiled(state, windows, key)
    decay_steps = config.optim.decay_steps or config.train.steps
    expected = torch_steps(theirs, dataclasses.replace(config.optim, decay_steps=decay_steps), batches)

    if config.optim.grad_clip:
        assert max(expected["grad_norm"]) > 2 * config.optim.grad_clip, "nothing to clip"
    # optax computes the schedule in float32, which costs 5e-7 where the cosine ends; PyTorch divides by the norm + 1e-6
    # when it clips. What is left after 100 steps: up to 6e-8 of a norm and 6e-9 in a parameter
    for metric, values in expected.items():
        np.testing.assert_allclose(measured[metric], values, rtol=2e-6, err_msg=metric)
    after, their_after = flatten_dict(jax.device_get(state.params)), reference.get_leaves(theirs)
    assert set(after) == set(their_after)
    for path, value in their_after.items():
        if path[-2:] != KEY_BIAS:
            assert np.abs(value - before[path]).max() > 5e-3, f"{path} has not moved"
        np.testing.assert_allclose(after[path], value, rtol=0, atol=1e-7, err_msg=str(path))


@jax.jit
def chances(logits, rule):
    return jax.nn.softmax(sampling.filter_logits(logits, rule), axis=-1)


@settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 2**32 - 1),
    temperature=st.floats(0.125, 8, width=32),
    top_k=st.none() | st.integers(1, V + 5),
    top_p=st.none() | st.floats(0.0078125, 1, width=32),
)
def test_probabilities_agree_for_any_temperature_top_k_and_top_p(seed, temperature, top_k, top_p):
    logits = np.random.default_rng(seed).normal(0, 3, (4, V)).astype(np.float32)
    theirs = partial(reference.probabilities, torch.tensor(logits).double(), temperature, top_k)
    if top_p is not None:  # float32 cannot tell which token is the last one where the sum all but equals top_p
        assume(torch.allclose(theirs(top_p * (1 - 3e-6)), theirs(top_p * (1 + 3e-6)), rtol=0, atol=1e-5))
    # logits of up to 100 after the division have a rounding of 1e-5, and so has their exponential's relative size
    np.testing.assert_allclose(
        chances(logits, sampling.make_rule(temperature, top_k, top_p)), theirs(top_p), rtol=0, atol=3e-5
    )


@pytest.mark.parametrize("name", ["lecture/layernorm", "gpt2"])
def test_the_likeliest_continuation_is_the_same_far_beyond_the_window(name):
    config, model, params, theirs = both_models(name, 5, jnp.float32)
    prompt, _ = random_tokens(5, 3, 5)
    model = nnx.merge(nnx.graphdef(model), params)
    ours = generate(model, prompt, jax.random.key(0), 3 * config.model.block_size, temperature=0)
    theirs = theirs.generate(torch.tensor(prompt).long(), 3 * config.model.block_size, temperature=0)
    np.testing.assert_array_equal(ours, theirs)


def test_dropout_has_the_mean_and_variance_of_pytorchs():
    # a model whose logits are nothing but dropout on a table of ones
    off = {"n_layer": 0, "n_embd": 0, "positions": "none", "norm": "none", "lm_head": "none"}
    rate = 51 / 256  # ours is taken to the nearest 256th
    model = GPT(
        GPTConfig(vocab_size=100, block_size=100, dropout=rate, embedding_dropout=True, **off), rngs=nnx.Rngs(0)
    )
    model.token_embedding_table.embedding[...] = jnp.ones((100, 100))
    ours = np.asarray(model(jnp.zeros((100, 100), int), rngs=nnx.Rngs(dropout=5)))
    torch.manual_seed(5)
    theirs = torch.nn.Dropout(rate)(torch.ones(100, 100, 100)).numpy()

    kept = np.float32(1 / (1 - rate))
    assert set(np.unique(ours)) == set(np.unique(theirs)) == {0, kept}
    # five standard errors of a difference, from 10^6 elements
    variance = rate / (1 - rate)
    assert abs(ours.mean() - theirs.mean()) < 5 * (2 * variance / 1e6) ** 0.5
    fourth_moment = rate + (1 - rate) * (kept - 1) ** 4
    assert abs(ours.var() - theirs.var()) < 5 * (2 * (fourth_moment - variance**2) / 1e6) ** 0.5


@pytest.mark.parametrize("name", ["lecture/layernorm", "gpt2"])
def test_dropout_spreads_the_logits_as_it_does_in_pytorch(name):
    n, sizes = 4000, {"n_layer": 2, "dropout": 0.2}
    _, model, params, theirs = both_models(name, 6, jnp.float32, sizes)
    inputs, _ = random_tokens(6, 1, 8)
    model = nnx.merge(nnx.graphdef(model), params)
    draw = jax.jit(lambda model, tokens: model(tokens, rngs=nnx.Rngs(dropout=7)))
    ours = np.asarray(draw(model, inputs.repeat(n, axis=0)))
    torch.manual_seed(7)
    theirs = theirs.train()(torch.tensor(inputs).long().repeat(n, 1)).detach().numpy()

    variance = theirs.var(axis=0)
    distance = np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) / np.sqrt(2 * variance / n)
    assert distance.max() < 5  # standard errors, over some hundred logits
    # the variance over all logits of a position, from 4,000 draws each: up to 2 % apart by chance
    np.testing.assert_allclose(ours.var(axis=0).sum(axis=-1), variance.sum(axis=-1), rtol=0.05)
