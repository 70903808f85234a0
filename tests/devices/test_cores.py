import dataclasses
import json
import os
import subprocess
import sys
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxgpt import training
from jaxgpt.config import load_config
from jaxgpt.devices import cores, sharding
from jaxgpt.devices.sharding import MeshConfig
from jaxgpt.model import GPTConfig
from jaxgpt.step import train_steps

SIZES = GPTConfig(block_size=64, n_layer=4, n_embd=128)


def divide(mesh, model, batch_size, n_devices):
    return cores.divide(mesh, model.block_parameters, batch_size, model.block_size, n_devices)


def run_python(code, **environ):
    environ = os.environ | {"JAX_PLATFORMS": "cpu"} | environ
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "n_devices, batch_size, taken",
    [(1, 12, 1), (2, 12, 2), (2, 13, 1), (8, 12, 6), (16, 12, 12), (10, 64, 8), (64, 7, 7)],
)
def test_as_many_cores_take_part_as_divide_the_batch(n_devices, batch_size, taken):
    assert divide(MeshConfig(), SIZES, batch_size, n_devices) == MeshConfig(taken, 1, 1)


@pytest.mark.parametrize("mesh", [MeshConfig(1), MeshConfig(2), MeshConfig(-1, 2), MeshConfig(-1, 1, 2)])
def test_a_configured_mesh_is_left_alone(mesh):
    assert divide(mesh, SIZES, 12, 8) == mesh


@pytest.mark.parametrize("rung, taken", [("bigram", 1), ("one_head", 1), ("residual", 8), ("scaled", 8)])
def test_steps_too_short_to_be_shared_take_one_core(rung, taken):
    config = load_config(["--config", f"configs/lecture/{rung}.yaml"])
    assert divide(MeshConfig(), config.model, config.data.batch_size, 8).data == taken


def test_copies_of_a_large_model_do_not_fill_the_memory():
    gpt2 = load_config(["--config", "configs/gpt2_124m.yaml"])
    taken = divide(MeshConfig(), gpt2.model, 64, 64).data
    parameters = gpt2.model.block_parameters
    assert parameters == 12 * 12 * 768**2
    assert taken * 16 * parameters <= 2**32 < 2 * taken * 16 * parameters
    wider = dataclasses.replace(gpt2.model, n_embd=7680)
    assert divide(MeshConfig(), wider, 64, 64).data == 1


@pytest.mark.full
@pytest.mark.parametrize(
    "environ, devices, data",
    [({}, cores.count(), 1), ({"JAX_NUM_CPU_DEVICES": "3"}, 3, -1),
     ({"XLA_FLAGS": "--xla_force_host_platform_device_count=5"}, 5, -1)],
)  # fmt: skip
def test_each_core_is_a_device_unless_the_environment_says_otherwise(environ, devices, data):
    ask = "import jax; from jaxgpt.devices import cores; from jaxgpt.devices.sharding import MeshConfig as M;"
    ask += "mesh = cores.as_devices(M(), 0, 12, 64); print(jax.device_count(), mesh.data)"
    assert run_python(ask, **environ) == f"{devices} {data}"


def test_a_backend_that_runs_keeps_its_devices():
    before = jax.device_count()
    mesh = cores.as_devices(MeshConfig(), SIZES.block_parameters, 12, 64)
    assert jax.device_count() == before and 12 % mesh.data == 0 and mesh.data <= before


def test_the_quota_of_a_container_counts(monkeypatch):
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    for text, expected in {"200000 100000\n": 2, "50000 100000": 1, "max 100000": 64, "": 64}.items():
        monkeypatch.setattr(cores.pathlib.Path, "read_text", lambda self, text=text: text)
        assert cores.count() == expected
    monkeypatch.delattr(cores.os, "sched_getaffinity")  # macOS and Windows
    monkeypatch.setattr(cores.os, "cpu_count", lambda: 6)
    assert cores.count() == 6


@pytest.mark.full
def test_the_mean_over_devices_is_that_of_the_whole_batch_and_one_all_reduce():
    code = """
import json, jax, jax.numpy as jnp, numpy as np
from jaxgpt.devices import sharding
mesh = sharding.make_mesh(sharding.MeshConfig(4))
rows = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)

def f(shared, batch, key):
    x = batch[0]
    return jnp.mean(x @ shared["w"]), {"w": jnp.mean(x[:, :, None] * jnp.ones(2), 0), "b": x.sum() / len(x)}

with jax.set_mesh(mesh):
    apart = jax.jit(sharding.mean_over_devices(f))
    args = {"w": jnp.ones((3, 2))}, (rows,), jax.random.key(0)
    found = jax.tree.leaves(apart(*args))
    text = apart.lower(*args).compile().as_text()
whole = jax.tree.leaves(f(*args))
print(json.dumps([max(float(np.abs(a - b).max()) for a, b in zip(found, whole)), text.count(" all-reduce(")]))
"""
    difference, all_reduces = json.loads(run_python(code, JAX_NUM_CPU_DEVICES="4"))
    assert difference < 1e-6  # sums of float32 in another order
    assert all_reduces == 1


@pytest.mark.parametrize(
    "platform, axes, dropout, apart",
    [("cpu", (2, 1, 1), 0.0, True), ("cpu", (1, 1, 1), 0.0, False), ("cpu", (2, 2, 1), 0.0, False),
     ("cpu", (2, 1, 1), 0.1, False), ("gpu", (2, 1, 1), 0.0, False)],
)  # fmt: skip
def test_devices_work_apart_where_only_the_batch_is_split(platform, axes, dropout, apart):
    assert sharding.takes_mean_over_devices(mesh_of(platform, axes), dropout) == apart


def mesh_of(platform, axes):
    """What a mesh is asked for."""
    devices = np.full(axes, types.SimpleNamespace(platform=platform))
    return types.SimpleNamespace(devices=devices, size=devices.size, shape=dict(zip(sharding.AXES, axes)))


@pytest.mark.parametrize(
    "platform, axes, batch_size, megabytes, parts",
    [("cpu", (2, 1, 1), 64, 1.5, 8), ("cpu", (1, 1, 1), 64, 1.5, 8), ("cpu", (2, 1, 1), 10, 1.6, 1),
     ("cpu", (2, 2, 1), 12, 30, 3), ("cpu", (2, 1, 2), 12, 4, 3), ("cpu", (1, 1, 1), 7, 3, 7),
     ("gpu", (1, 1, 1), 64, 1.5, 1), ("tpu", (4, 2, 1), 64, 1.5, 1)],
)  # fmt: skip
def test_cores_compute_a_large_batch_in_parts_of_which_each_takes_as_much(platform, axes, batch_size, megabytes, parts):
    mesh = mesh_of(platform, axes)
    assert cores.parts(mesh, batch_size, int(megabytes * 2**20)) == parts
    assert batch_size % (parts * axes[0] * axes[1]) == 0


@pytest.mark.parametrize("recipe, parts", [("lecture/scaled", 8), ("shakespeare_cpu", 1), ("modern/laptop_long", 1)])
def test_the_recipes_for_a_cpu_stay_whole_and_the_scaled_model_does_not(recipe, parts):
    config = training.resolve(load_config(["--config", recipe]), 65)
    spec = training.step_spec(config, training.abstract_model(config, "cpu"), mesh_of("cpu", (2, 1, 1)))
    assert spec.grad_accumulation == parts


def test_a_step_in_parts_is_the_step_as_a_whole(monkeypatch):
    sizes = ("--model.block_size", "16", "--model.n_layer", "1", "--model.n_head", "2", "--model.n_embd", "16")
    config = load_config([*sizes, "--data.batch_size", "8", "--optim.grad_accumulation", "2"])
    config = training.resolve(config, 65)
    mesh = sharding.make_mesh(MeshConfig(data=2))
    windows = np.random.default_rng(0).integers(0, 65, (1, 16, 17)).astype(np.uint8)
    found = {}
    with jax.set_mesh(mesh):
        for limit in (cores.PART, 2 * 4 * 16 * 64):  # the second one is of two windows
            monkeypatch.setattr(cores, "PART", limit)
            spec, shapes = training.specify(config, mesh)
            state = training.new_state(config, None, spec, shapes)
            state, metrics = train_steps(state, sharding.place(mesh, windows), jax.random.key(0), spec=spec)
            found[spec.grad_accumulation] = metrics | {"moments": optax.tree.get(state.opt_state, "mu")}
    assert list(found) == [2, 8]
    chex.assert_trees_all_close(found[2], found[8], rtol=1e-4, atol=1e-8)


def test_nothing_is_constrained_where_a_device_works_by_itself():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        run = jax.shard_map(sharding.pin_batch, in_specs=P("data"), out_specs=P("data"), check_vma=False)
        np.testing.assert_array_equal(jax.jit(run)(jnp.arange(4)), np.arange(4))
