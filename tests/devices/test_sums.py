"""Sums over tokens, parts and devices are taken in float32, whatever type the activations have."""

import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental.compilation_cache import compilation_cache

from jaxgpt import init, optim, step
from jaxgpt.devices import remat, sharding
from jaxgpt.devices.matmul import WIDE
from jaxgpt.model import GPTConfig

V, T, ROWS = 22, 32, 64  # 2,048 tokens: each id occurs 93 times, and each bias sums all of them
CONFIG = GPTConfig(vocab_size=V, block_size=T, n_layer=2, n_head=2, n_embd=32, bias="all", init="torch")
TABLE, POSITIONS = ("token_embedding_table", "embedding"), ("position_embedding_table", "embedding")


@pytest.fixture(autouse=True, scope="module")
def blocks_traced_one_by_one():
    """Else XLA rounds more activations at the ends of the blocks on one device than on several: this is about sums."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remat, "_call", remat._call.__wrapped__)
        yield


def spec_of(config, parts=1, per_device=False, dtype="bfloat16"):
    settings = optim.OptimConfig(decay_steps=10)
    graphdef = nnx.graphdef(init.abstract(config))
    schedule = optim.schedule(settings)
    return step.StepSpec(graphdef, optim.optimizer(settings), schedule, parts, jnp.dtype(dtype), 1, per_device)


@functools.cache
def problem():
    """Parameters that are not tiny, and a batch."""
    params = init.init_params(CONFIG, jax.random.key(0))
    windows = np.random.default_rng(1).integers(0, V, (ROWS, T + 1)).astype(np.int32)
    return jax.device_get(params), (windows[:, :-1], windows[:, 1:])


def one_for_each_token(params):
    """The parameters with a bias and a table row of its own for each token: their gradients are the cotangents."""
    flat = flatten_dict(params)
    inputs = problem()[1][0]
    flat[TABLE] = flat[TABLE][inputs.reshape(-1)]
    for path in flat:
        if path[-1] == "bias" and "ln_" not in str(path):
            flat[path] = np.broadcast_to(flat[path], (ROWS, T, *flat[path].shape))
    return unflatten_dict(flat), np.arange(ROWS * T).reshape(ROWS, T)


@functools.cache
def expected(sizes):
    """The cotangents of one pass over the batch as a whole, summed in float64.

    They are those of a program for the same mesh: another one rounds activations elsewhere.
    """
    params, (inputs, targets) = problem()
    wide, ids = one_for_each_token(params)
    spec = spec_of(CONFIG)
    with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(*sizes))):
        _, cotangents = jax.jit(step.loss_and_gradient, static_argnames="spec")(
            wide, (ids, targets), jax.random.key(0), spec
        )
    cotangents = {path: np.asarray(leaf, np.float64) for path, leaf in flatten_dict(cotangents).items()}
    sums = {p: a.sum((0, 1)) for p, a in cotangents.items() if p[-1] == "bias" and "ln_" not in str(p)}
    table = np.zeros((V, CONFIG.n_embd))
    np.add.at(table, inputs.reshape(-1), cotangents[TABLE])
    rows = cotangents[TABLE].reshape(ROWS, T, -1)
    return sums | {TABLE: table, POSITIONS: rows.sum(0)}


def gradients(parts, sizes, per_device):
    mesh = sharding.make_mesh(sharding.MeshConfig(*sizes))
    params, batch = problem()
    with jax.set_mesh(mesh):
        gradient = functools.partial(step.loss_and_gradient, spec=spec_of(CONFIG, parts, per_device))
        if per_device:
            gradient = sharding.mean_over_devices(gradient)
        _, found = jax.jit(gradient)(params, batch, jax.random.key(0))
        return flatten_dict(jax.device_get(found))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    "sizes, per_device",
    [
        ((1, 1, 1), False),
        ((2, 1, 1), False),
        ((2, 1, 1), True),
        pytest.param((1, 2, 1), False, marks=pytest.mark.full),
        pytest.param((1, 1, 2), False, marks=pytest.mark.full),
    ],
)
def test_gradients_of_tables_and_biases_are_exact_sums_of_bfloat16_cotangents(parts, sizes, per_device):
    found = gradients(parts, sizes, per_device)
    sums = expected((1, 1, 1) if per_device else sizes)
    assert len(sums) == 2 * 6 + 1 + 2
    for path, exact in sums.items():
        if path[-2] == "key":
            continue  # softmax does not see this bias: its gradient is rounding alone
        assert found[path].dtype == np.float32
        error = np.linalg.norm(found[path] - exact) / np.linalg.norm(exact)
        assert error < 2e-3, f"{path}: {error:.2%}"


def primitives(jaxpr, found):
    """The name and the types of what goes in and out, for each operation of a program and of those inside it."""
    for eqn in jaxpr.eqns:
        found.append((eqn.primitive.name, [v.aval for v in eqn.invars], [v.aval for v in eqn.outvars]))
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                    primitives(getattr(inner, "jaxpr", inner), found)
    return found


@pytest.mark.parametrize("head", ["linear", "tied"])
def test_nothing_that_becomes_a_gradient_is_summed_in_bfloat16(head):
    """No reduction or scatter over tokens has a bfloat16 result, nor has the product that is a gradient of a matrix."""
    config = CONFIG.__class__(**{**CONFIG.__dict__, "lm_head": head})
    params = jax.eval_shape(lambda: init.init_params(config, jax.random.key(0)))
    traced = jax.make_jaxpr(functools.partial(step.loss_and_gradient, spec=spec_of(config)))
    program = traced(params, problem()[1], jax.random.key(0))
    shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
    for name, _, outs in primitives(program.jaxpr, []):
        summed = name in ("reduce_sum", "scatter-add", "dot_general", "add_any", "psum")
        for out in outs:
            assert not (summed and out.dtype == jnp.bfloat16 and out.shape in shapes), (name, out)


def test_a_tied_table_gets_the_gradients_of_both_its_uses():
    params, batch = problem()
    flat = {path: leaf for path, leaf in flatten_dict(params).items() if path[0] != "lm_head"}
    tied = CONFIG.__class__(**{**CONFIG.__dict__, "lm_head": "tied"})
    apart = flat | {("lm_head", "kernel"): flat[TABLE].T, ("lm_head", "bias"): np.zeros(V, np.float32)}
    gradient = jax.jit(step.loss_and_gradient, static_argnames="spec")
    together, separate = (
        flatten_dict(gradient(unflatten_dict(each), batch, jax.random.key(0), spec_of(config))[1])
        for each, config in ((flat, tied), (apart, CONFIG))
    )
    np.testing.assert_allclose(
        together[TABLE], separate[TABLE] + separate[("lm_head", "kernel")].T, rtol=1e-4, atol=1e-6
    )


@contextlib.contextmanager
def without_cache():
    enabled = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # jax looks at the setting only once
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


@pytest.mark.full
@pytest.mark.skipif(not WIDE, reason="jax before 0.10 needs float32 operands on a CPU, and so gathers them")
@pytest.mark.parametrize("switches", [{"lm_head": "linear"}, {"lm_head": "tied", "value_embeddings": True}], ids=str)
def test_devices_send_each_other_bfloat16_matrices_and_float32_gradients(switches, tmp_path):
    """With fsdp, in the program right after the partitioner: XLA's CPU backend widens what it sends after that."""
    config = dataclasses.replace(CONFIG, n_layer=1, **switches)
    spec = spec_of(config)
    mesh = sharding.make_mesh(sharding.MeshConfig(1, 2))
    with jax.set_mesh(mesh):
        state = init.abstract_state(init.abstract(config), spec.tx, mesh)
        windows = jax.ShapeDtypeStruct((1, ROWS, T + 1), np.uint8)
        lowered = step.train_steps.lower(state, windows, jax.eval_shape(jax.random.key, 0), spec=spec)
        with without_cache():  # a program from the cache is not partitioned again
            lowered.compile({"xla_dump_to": str(tmp_path), "xla_dump_hlo_pass_re": "spmd.*"})
    (dump,) = tmp_path.glob("*after_spmd-partitioning*")
    sent = re.findall(r"= (\w+)\[([\d,]*)\]\S* ([\w-]+)\(.*channel_id=", dump.read_text())
    matrices = [leaf for leaf in jax.tree.leaves(state.params) if not leaf.sharding.is_fully_replicated]
    assert {op for _, _, op in sent} == {"all-gather", "all-reduce"}
    gathered = [dtype for dtype, _, op in sent if op == "all-gather"]
    assert len(gathered) >= len(matrices) and set(gathered) == {"bf16"}
    assert {dtype for dtype, _, op in sent if op == "all-reduce"} == {"f32"}
