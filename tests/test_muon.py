"""Muon against the papers' algorithm in NumPy, in whole runs, and on meshes."""

import contextlib
import dataclasses
import io
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY
from flax import nnx

import jaxgpt
from jaxgpt import init, muon, optim, step
from jaxgpt.devices import sharding
from jaxgpt.model import GPTConfig
from jaxgpt.optim import OptimConfig
from jaxgpt.runs.checkpoint import Checkpoints
from jaxgpt.runs.directory import OtherRunError
from jaxgpt.runs.loading import read_state

SMALL = GPTConfig(vocab_size=65, block_size=8, n_layer=1, n_head=2, n_embd=16, lm_head="linear", bias="all")
FLAGS = (*TINY, "--model.dropout", "0", "--optim.optimizer", "muon")


def example(rng):
    """A tree with the names of a model: matrices of three shapes, and all that Muon leaves to AdamW."""
    shapes = {
        "blocks": {
            0: {
                "attn": {"query": {"kernel": (4, 4)}, "key": {"kernel": (4, 2)}, "proj": {"kernel": (4, 4)}},
                "mlp": {"fc": {"kernel": (4, 16), "bias": (16,)}, "proj": {"kernel": (16, 4)}},
                "ln_1": {"scale": (4,)},
                "value_embedding": {"embedding": (7, 4)},
            }
        },
        "token_embedding_table": {"embedding": (7, 4)},
        "lm_head": {"kernel": (4, 7)},
    }
    return jax.tree.map(lambda shape: rng.normal(size=shape), shapes, is_leaf=lambda node: isinstance(node, tuple))


def test_it_takes_the_matrices_of_the_blocks_only():
    flat, _ = jax.tree_util.tree_flatten_with_path(muon.mask(example(np.random.default_rng(0))))
    taken = {sharding.name_of(path).removeprefix("blocks.0.") for path, yes in flat if yes}
    matrices = {f"{name}.kernel" for name in ("attn.query", "attn.key", "attn.proj", "mlp.fc", "mlp.proj")}
    assert taken == matrices


@pytest.mark.parametrize("rows, iterations", [(1, 2), (32, 3), (128, 3), (768, 4), (4096, 5)])
def test_each_polynomial_is_the_one_nearest_to_1_of_its_degree(rows, iterations):
    """By Chebyshev's theorem: it is as far from 1 at four points, one for each coefficient and one more, on alternating
    sides."""
    values = np.geomspace(0.1 / rows**0.5, 1, 20_001)
    found = muon.coefficients(rows)
    assert len(found) == iterations
    for a, b, c in found:
        s = np.linspace(values.min(), values.max(), 20_001)
        away = a * s + b * s**3 + c * s**5 - 1
        farthest = np.abs(away).max()
        signs = np.sign(away[np.abs(away) > (1 - 1e-5) * farthest])
        assert 1 + np.count_nonzero(np.diff(signs)) == 4
        values = a * values + b * values**3 + c * values**5
    assert 2 / 3 < values.min() and values.max() < 4 / 3


def newton_schulz(g):
    """The papers' listing, in float64."""
    x = g / np.linalg.norm(g)
    x = x.T if len(g) > len(g.T) else x
    for a, b, c in muon.coefficients(len(x)):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if len(g) > len(g.T) else x


def reference(params, gradients, config):
    """The parameters after each step, by the algorithms of Jordan, of Amsel and of Loshchilov and Hutter, in float64.

    The schedule: one step of warm-up, then a line from the peak to the minimum at step 6.
    """
    beta1, beta2, decay, momentum = config.beta1, config.beta2, config.weight_decay, config.muon_momentum
    leaves, structure = jax.tree.flatten(params)
    taken = [name.startswith("blocks") and name.endswith("kernel") for name in names(params)]
    buffers, m, v = ([np.zeros_like(p) for p in leaves] for _ in range(3))
    for t, gradient in enumerate(gradients):
        gradient = jax.tree.leaves(gradient)
        norm = np.sqrt(sum(np.sum(g * g) for g in gradient))
        rate = config.learning_rate / 2
        if t:
            rate = config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * (6 - t) / 5
        for i, g in enumerate(gradient):
            g = g * min(1, config.grad_clip / norm)
            decayed = decay * leaves[i] if leaves[i].ndim > 1 else 0
            if taken[i]:
                buffers[i] = momentum * buffers[i] + g
                way = 0.2 * np.sqrt(max(g.shape)) * newton_schulz(g + momentum * buffers[i])
                scale = (config.muon_learning_rate or config.learning_rate) / config.learning_rate
            else:
                m[i] = beta1 * m[i] + (1 - beta1) * g
                v[i] = beta2 * v[i] + (1 - beta2) * g * g
                way = m[i] / (1 - beta1 ** (t + 1)) / (np.sqrt(v[i] / (1 - beta2 ** (t + 1))) + 1e-8)
                scale = 1
            leaves[i] = leaves[i] - scale * rate * (way + decayed)
        yield jax.tree.unflatten(structure, leaves)


def names(tree):
    return [sharding.name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"grad_clip": 100.0, "weight_decay": 0.5, "beta1": 0.7, "muon_momentum": 0.8, "muon_learning_rate": 0.06},
    ],
)
def test_updates_are_those_of_the_papers(fields):
    """The first clips all steps, the second some of them."""
    config = OptimConfig(0.02, 0.005, warmup_steps=1, optimizer="muon", schedule="linear")
    config, rng = dataclasses.replace(config, **fields), np.random.default_rng(0)
    params = example(rng)
    gradients = [jax.tree.map(lambda g, s=scale: s * g, example(rng)) for scale in (1, 30, 0.01, 1, 5, 1)]
    tx = optim.optimizer(config, 6)
    ours = jax.tree.map(jnp.float32, params)
    state, update = tx.init(ours), jax.jit(tx.update)
    for gradient, expected in zip(gradients, reference(params, gradients, config)):
        updates, state = update(jax.tree.map(jnp.float32, gradient), state, ours)
        ours = optax.apply_updates(ours, updates)
        chex.assert_trees_all_close(ours, jax.tree.map(np.float32, expected), rtol=0, atol=1e-5)  # float32


@pytest.mark.parametrize("rows, columns", [(1, 1), (8, 8), (16, 23), (16, 24), (32, 128)])
def test_singular_values_come_near_1_and_singular_vectors_stay(rows, columns):
    rng, values = (
        np.random.default_rng(0),
        np.geomspace(0.06, 1, rows),
    )  # the least is above a tenth of the root mean square
    u, v = (np.linalg.qr(rng.normal(size=(2, size, rows)))[0] for size in (rows, columns))
    x = jax.jit(muon.newton_schulz)(jnp.float32(3e-5 * (u * values) @ v.mT))
    moved = u.mT @ np.asarray(x, np.float64) @ v  # diagonal, if the vectors are the same
    found = np.diagonal(moved, axis1=1, axis2=2)
    np.testing.assert_allclose(moved, found[..., None] * np.eye(rows), atol=1e-4)  # float32
    assert 2 / 3 < found.min() and found.max() < 4 / 3


def test_a_matrix_of_zeros_stays_zero_and_a_tiny_one_does_not():
    rng = np.random.default_rng(0)
    stack = jnp.float32(rng.normal(size=(3, 4, 9)) * np.array([0, 1, 1e-10])[:, None, None])
    zero, _, tiny = np.linalg.svd(np.asarray(muon.newton_schulz(stack)), compute_uv=False)
    assert (zero == 0).all() and tiny.min() > 0.6


def test_matrices_of_equal_shape_are_multiplied_together():
    def products(layers):
        block = [jnp.ones((16, 16)), jnp.ones((16, 16)), jnp.ones((16, 32)), jnp.ones((32, 16))]
        return str(jax.make_jaxpr(muon.orthogonal)(layers * block)).count("dot_general")

    assert products(1) == products(3) == 3 * 3 + (4 * 3 - 1)


def state_on(mesh, config):
    """The shapes of a state on a mesh, and what a step makes of it."""
    model, tx = init.abstract(SMALL), optim.optimizer(config, 10)
    per_device = sharding.takes_mean_over_devices(mesh, 0.0)
    spec = step.StepSpec(
        nnx.graphdef(model), tx, optim.schedule(config, 10), 1, jnp.dtype("float32"), per_device_gradients=per_device
    )
    state = init.abstract_state(model, tx, mesh)
    windows = jax.ShapeDtypeStruct((1, 2, 9), jnp.uint8)
    return state, jax.eval_shape(partial(step.train_steps, spec=spec), state, windows, jax.random.key(0))[0]


def test_a_step_keeps_the_form_of_the_state_and_each_moment_has_its_parameter_s_name():
    """On two CPU devices, where the update is one of two branches, which must return the same form."""
    mesh = sharding.make_mesh(sharding.MeshConfig(2))
    with jax.set_mesh(mesh):
        before, after = state_on(mesh, OptimConfig(optimizer="muon", ema_decay=0.9))
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    parameters = names(before.params)
    matrices = [name for name in parameters if name.startswith("blocks") and name.endswith("kernel")]
    moments = [name for name in names(before.opt_state) if name]
    for name in parameters:  # a matrix has a momentum, anything else has two moments; and each has an average
        assert moments.count(name) == (2 if name in matrices else 3)
    assert len(moments) == 3 * len(parameters) - len(matrices)


@pytest.mark.full
def test_accumulating_gradients_equals_one_large_batch_and_bad_steps_are_left_out():
    config, model = OptimConfig(optimizer="muon", warmup_steps=0), init.init_model(SMALL, 0)
    tx, rng = optim.optimizer(config, 10), np.random.default_rng(0)
    windows = jnp.asarray(rng.integers(0, 65, (2, 8, 9)), jnp.uint8)
    after = {}
    for parts in (1, 4):
        spec = step.StepSpec(nnx.graphdef(model), tx, optim.schedule(config, 10), parts, jnp.dtype("float32"))
        run = partial(step.train_steps, windows=windows, key=jax.random.key(0), spec=spec)
        after[parts], metrics = run(jax.tree.map(jnp.copy, step.init_state(step.params_of(model), tx)))
        assert np.isfinite(metrics["loss"]).all()
    # the same sums in another order; Newton-Schulz iterations enlarge what is rounded in small directions
    chex.assert_trees_all_close(after[1].params, after[4].params, atol=2e-5, rtol=0)
    bad = after[4]
    bad.params["ln_f"]["scale"] = bad.params["ln_f"]["scale"].at[0].set(jnp.nan)
    before = jax.device_get(bad)
    with jax.debug_nans(False):
        bad, _ = run(bad)
    chex.assert_trees_all_equal(jax.device_get((bad.params, bad.opt_state)), (before.params, before.opt_state))


def train(folder, *more):
    with contextlib.redirect_stdout(io.StringIO()):
        return jaxgpt.train(jaxgpt.load_config(["--run.dir", str(folder), *FLAGS, *more]))


def saved(folder):
    """The state of the last checkpoint."""
    config = jaxgpt.load(folder, "last").config
    tx = optim.optimizer(config.optim, config.train.steps)
    like = jax.eval_shape(partial(init.first_state, config.model, tx, 0))
    with Checkpoints(pathlib.Path(folder) / "checkpoints") as checkpoints:
        return read_state(checkpoints, config.train.steps, like, tx)


@pytest.mark.full
@pytest.mark.parametrize(
    "more", [(), pytest.param(("--optim.ema_decay", "0.9", "--mesh.data", "1"), marks=pytest.mark.long)]
)
def test_a_continued_run_has_the_same_bits(tmp_path, text_file, more):
    """With one device, and with one for each core, on which the update is inside of a conditional."""
    more = ("--data.path", str(text_file), "--optim.schedule", "wsd", "--optim.decay_steps", "40", *more)
    train(tmp_path / "whole", *more)
    for steps in ("20", "40"):
        train(tmp_path / "parts", *more, "--train.steps", steps)
    chex.assert_trees_all_equal(saved(tmp_path / "whole"), saved(tmp_path / "parts"))
    losses = [
        [record["loss"] for record in map(json.loads, path.read_text().splitlines()) if record["kind"] == "train"]
        for path in (tmp_path / "whole" / "metrics.jsonl", tmp_path / "parts" / "metrics.jsonl")
    ]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("changed", [(), ("--run.resume", "changed")])
def test_a_run_keeps_its_optimizer(trained, tmp_path, changed):
    folder = shutil.copytree(trained[0], tmp_path / "run")
    with pytest.raises(OtherRunError, match=r"optim.optimizer \(was adamw, now muon\)") as refused:
        train(folder, *trained[1], "--optim.optimizer", "muon", "--train.steps", "50", *changed)
    assert ("--run.resume changed" in str(refused.value)) is False


@pytest.mark.long
def test_on_a_mesh_losses_are_the_same_and_each_device_orthogonalises_its_share():
    meshes = ["1,1,1", "2,1,1", "1,2,1", "1,4,1", "2,2,2"]
    command = [sys.executable, str(pathlib.Path(__file__).with_name("muon_on_meshes.py")), *meshes]
    environ = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "Involuntary full rematerialization" not in done.stderr
    found = json.loads(done.stdout)
    for mesh in meshes:
        # sums over devices are rounded in another order: 2e-6
        np.testing.assert_allclose(found[mesh]["losses"], found["1,1,1"]["losses"], rtol=0, atol=5e-6, err_msg=mesh)
        devices = math.prod(int(size) for size in mesh.split(","))
        square, wide = (math.ceil(n / devices) for n in (8, 4))  # matrices per device
        assert found[mesh]["flops"] == 2 * 64**3 * (9 * square + (2 * 4 + 9) * wide)
