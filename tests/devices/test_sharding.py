import json
import os
import pathlib
import subprocess
import sys
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from meshes import MESHES

from jaxgpt import config, data, init, step, training
from jaxgpt.devices import sharding
from jaxgpt.devices.sharding import MeshConfig, MeshError
from jaxgpt.model import GPTConfig
from jaxgpt.runs import checkpoint

ONE = (1, 1, 1)
SOME = [ONE, (1, 2, 2), (2, 2, 2)]
SPLIT_IDS = [ONE, *(mesh for mesh in MESHES if mesh[2] > 1)]
FAKE = [type("Device", (), {"process_index": i // 4})() for i in range(8)]


def on_eight_devices(command, timeout=900):
    environ = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, *command], env=environ, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.full
@pytest.mark.parametrize(
    "meshes, head, dropout, vocabulary",
    [
        (SOME, "linear", 0.1, 65),  # ids that no axis divides
        pytest.param([ONE, (1, 1, 2)], "linear", 0.0, 22, marks=pytest.mark.long),  # ids that the axis divides
        pytest.param([ONE, (2, 1, 2)], "linear", 0.0, 64, marks=pytest.mark.long),  # ids that each axis divides
        ([ONE, (1, 2, 2)], "tied", 0.0, 1031),  # a prime number of ids, padded to whole tiles
        pytest.param([ONE, (4, 1, 1)], "tied", 0.0, 65, marks=pytest.mark.long),  # each device by itself
        *(
            pytest.param(MESHES if ids == 65 else SPLIT_IDS, head, 0.1, ids, marks=pytest.mark.long)
            for ids in (22, 64, 65, 1031)
            for head in ("linear", "tied")
        ),
    ],
)
def test_losses_are_the_same_on_every_mesh(meshes, head, dropout, vocabulary):
    for name, difference in differences_of_losses(meshes, head, dropout, vocabulary, {}).items():
        assert difference <= LOSSES_DIFFER_BY, name


MODERN = {"positions": "rope", "norm": "rmsnorm", "qk_norm": True, "n_kv_head": 4, "head_size": 16, "sliding_window": 9}
MODERN |= {"activation": "silu", "gated": True, "mlp_width": 96, "embedding_norm": True, "value_embeddings": True}


@pytest.mark.full
@pytest.mark.parametrize(
    "meshes",
    [
        [ONE, (2, 2, 2)],
        pytest.param([ONE, (2, 1, 1), (4, 1, 1)], marks=pytest.mark.long),  # each device by itself
        pytest.param(MESHES, marks=pytest.mark.long),
    ],
)
def test_losses_with_the_switches_of_todays_models_are_the_same_on_every_mesh(meshes):
    meshes = [mesh for mesh in meshes if 4 % mesh[2] == 0]  # four heads of keys and values
    dropout = 0.1 if (1, 2, 2) in meshes else 0.0
    for name, difference in differences_of_losses(meshes, "tied", dropout, 65, MODERN).items():
        assert difference <= LOSSES_DIFFER_BY, name


# float32, 30 steps: sums over devices are rounded in another order, and losses of 4 lie 5e-7 apart
LOSSES_DIFFER_BY = 5e-6


def differences_of_losses(meshes, head, dropout, vocabulary, switches):
    """The largest difference between the losses on each mesh and those on one device; NaN if one is NaN."""
    names = [",".join(map(str, mesh)) for mesh in meshes]
    script = str(pathlib.Path(__file__).with_name("mesh_losses.py"))
    done = on_eight_devices([script, head, str(dropout), str(vocabulary), json.dumps(switches), *names])
    assert "Involuntary full rematerialization" not in done.stderr
    found = {name: np.array(losses) for name, losses in json.loads(done.stdout).items()}
    assert set(found) == set(names)
    return {name: np.abs(losses - found["1,1,1"]).max() for name, losses in found.items()}


@pytest.mark.long
def test_a_run_moves_from_mesh_to_mesh(tiny_config, tmp_path):
    flags = ["--config", "configs/shakespeare_cpu.yaml", *tiny_config, "--model.dropout", "0"]
    for steps, axes in {"20": "122", "40": "211"}.items():
        axes = [word for name, size in zip(sharding.AXES, axes) for word in (f"--mesh.{name}", size)]
        axes += ["--optim.decay_steps", "40"]
        moved = ["-m", "jaxgpt", "train", *flags, *axes, "--run.dir", str(tmp_path / "moved"), "--train.steps", steps]
        said = on_eight_devices(moved).stdout
    assert "continued at step 20" in said and "on another mesh" in said
    training.train(config.load_config([*flags, "--mesh.data", "1", "--run.dir", str(tmp_path / "stayed")]))
    final = {}
    for name in ("moved", "stayed"):
        records = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        final[name] = [r["val_loss"] for r in records if r["kind"] == "final"][-1]
    assert final["moved"] == pytest.approx(final["stayed"], abs=1e-5)  # GELU's, as above; AdamW doubles few roundings


def files():
    larger = ("gpt2_350m", "gpt2_774m", "gpt2_1558m", "finetune_gpt2", "finetune_smollm2", "llama_1b")  # same blocks
    return sorted(path for path in pathlib.Path("configs").rglob("*.yaml") if path.stem not in larger)


@pytest.mark.parametrize("path", files(), ids=lambda path: path.stem)
def test_every_parameter_of_every_recipe_matches_one_rule_and_so_do_its_moments(path):
    resolved = training.resolve(config.load_config(["--config", str(path)]), 65)
    model = training.abstract_model(resolved, "cpu")
    spec = training.step_spec(resolved, model)
    specs = sharding.specs(jax.eval_shape(partial(step.init_state, tx=spec.tx), step.params_of(model)))
    rules, moments = (
        [(sharding.name_of(path), spec) for path, spec in jax.tree_util.tree_leaves_with_path(tree)]
        for tree in (specs.params, specs.opt_state)
    )
    assert {name for name, _ in moments} == {name for name, _ in rules} | {""}  # counters have no name
    assert all(spec == dict(rules).get(name, P()) for name, spec in moments)
    assert specs.step == P()


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(LookupError, match=r"0 rules match the parameter 'blocks\.0\.attn\.gate\.kernel'"):
        sharding.spec_of("blocks.0.attn.gate.kernel")


@pytest.mark.parametrize(
    "sizes, devices, shape",
    [
        ((-1, 1, 1), 1, (1, 1, 1)),
        ((-1, 1, 1), 8, (8, 1, 1)),
        ((-1, 4, 2), 8, (1, 4, 2)),
        ((1, -1, 2), 8, (1, 4, 2)),
    ],
)
def test_the_mesh_fills_what_is_there(sizes, devices, shape):
    found = sharding.sizes_of(MeshConfig(*sizes), devices)
    assert tuple(found.values()) == shape


@pytest.mark.parametrize("sizes, says", [((-1, 3, 1), "product divides 8"), ((4, 4, 1), "does not fit the 8 devices")])
def test_a_mesh_that_does_not_fit_names_the_numbers(sizes, says):
    with pytest.raises(MeshError, match=says):
        sharding.sizes_of(MeshConfig(*sizes), 8)


def test_no_process_is_left_without_a_device():
    with pytest.raises(MeshError, match="use all 8 devices"):
        sharding.make_mesh(MeshConfig(4), FAKE)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (-2, 1, 1), (-1, -1, 1)])
def test_sizes_that_mean_nothing_are_refused(sizes):
    with pytest.raises(ValueError, match=r"use 1 or more|several axes"):
        MeshConfig(*sizes)


@pytest.mark.parametrize(
    "sizes, says",
    [
        ((8, 1, 1), "batch_size 12 .* 8 devices .* data x fsdp .*use 8 or 16, or --mesh.data 4"),
        ((1, 1, 8), "n_head 4 .* 8 devices .* tensor .*use 8, or --mesh.tensor 4"),
        ((1, 3, 1), "n_embd 128 .* 3 devices .*use 126 or 129"),
    ],
)
def test_what_a_mesh_cannot_divide_is_named_with_the_remedy(sizes, says):
    mesh = jax.sharding.AbstractMesh(sizes, sharding.AXES)
    with pytest.raises(MeshError, match=says):
        sharding.check_sizes(mesh, batch_size=12, width=128, n_head=4)
    sharding.check_sizes(jax.sharding.AbstractMesh((2, 2, 4), sharding.AXES), 12, 128, 4)


@pytest.mark.parametrize("size, tensor, rows", [(65, 1, 65), (65, 2, 66), (50257, 1, 50304), (50257, 3, 50304)])
def test_vocabularies_are_padded_for_mesh_and_tiles(size, tensor, rows):
    assert sharding.padded(size, tensor) == rows


@pytest.mark.full
@pytest.mark.parametrize("lm_head", ["tied", "linear"])
def test_padding_is_never_seen_and_changes_nothing(lm_head):
    model_config = GPTConfig(vocab_size=1030, block_size=8, n_layer=1, n_head=2, n_embd=16, lm_head=lm_head)
    model = init.init_model(model_config, 0)
    graphdef, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    tokens = jnp.arange(1022, 1030, dtype=jnp.int32)[None]

    def loss(params):
        model = nnx.merge(graphdef, sharding.for_compute(params))
        assert model(tokens).shape == (1, 8, 1030)
        return step.token_losses(model, tokens, tokens).mean()

    plain = jax.value_and_grad(loss)(params)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(1))):
        assert jax.eval_shape(sharding.for_compute, params)["token_embedding_table"]["embedding"].shape == (1152, 16)
        padded = jax.jit(jax.value_and_grad(loss))(params)
    chex.assert_trees_all_close(plain, padded, rtol=1e-5, atol=1e-7)  # float32 in another order


@pytest.mark.full
def test_a_checkpoint_has_the_shapes_of_the_model_on_any_mesh(tiny_config, tmp_path):
    training.train(config.load_config(tiny_config))
    manifest = checkpoint.Checkpoints(tmp_path / "run" / "checkpoints").manifest(40)
    assert manifest["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1}
    assert manifest["arrays"]["['params']['token_embedding_table']['embedding']"] == "float32[22, 16]"


@pytest.mark.parametrize("rows", [3, 4])
def test_each_device_evaluates_its_part_of_the_windows_whatever_their_number(rows, monkeypatch):
    config = GPTConfig(vocab_size=65, block_size=8, n_layer=1, n_head=2, n_embd=16)
    tokens, flops, used, sums = jnp.arange(500) % 65, [], [], step._sums
    monkeypatch.setattr(
        step, "_sums", lambda model, tokens, n, chunks: used.append(n) or sums(model, tokens, n, chunks)
    )
    for mesh in (sharding.make_mesh(sharding.MeshConfig(n)) for n in (1, 2)):
        with jax.set_mesh(mesh):
            model = init.init_model(config, 0)
            assert step.evaluate(model, tokens, rows) == pytest.approx(step.evaluate(model, tokens, 1), rel=1e-5)
            cost = sums.lower(model, data.Windows(tokens), used[-2], 1).compile().cost_analysis()
            flops.append(cost["flops"] / used[-2])  # per window
    assert flops[1] < 0.6 * flops[0]


@pytest.mark.parametrize("sizes, rows", [((1, 1, 1), 64), ((3, 1, 1), 66), ((3, 2, 1), 66), ((256, 1, 1), 256)])
def test_a_batch_is_rounded_up_to_what_the_devices_can_split(sizes, rows):
    with jax.sharding.use_abstract_mesh(AbstractMesh(sizes, sharding.AXES)):
        assert sharding.whole_batches(64) == rows
