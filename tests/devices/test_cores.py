import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxgpt.config import load_config
from jaxgpt.devices import cores, sharding
from jaxgpt.devices.sharding import MeshConfig
from jaxgpt.model import GPTConfig

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
    device = type("Device", (), {"platform": platform})()
    mesh = type("Mesh", (), {})()
    mesh.devices = np.full(axes, device)
    mesh.size, mesh.shape = mesh.devices.size, dict(zip(sharding.AXES, axes))
    assert sharding.takes_mean_over_devices(mesh, dropout) == apart


def test_nothing_is_constrained_where_a_device_works_by_itself():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        run = jax.shard_map(sharding.pin_batch, in_specs=P("data"), out_specs=P("data"), check_vma=False)
        np.testing.assert_array_equal(jax.jit(run)(jnp.arange(4)), np.arange(4))
