"""`optim.ema_decay` in whole runs: what uses the average, and how such runs continue and move between meshes."""

import contextlib
import dataclasses
import io
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from safetensors.numpy import load_file

import jaxgpt
from jaxgpt import init, optim, sampling, step
from jaxgpt.data import inputs_and_targets
from jaxgpt.devices import sharding
from jaxgpt.interop import export
from jaxgpt.runs import init_from
from jaxgpt.runs.checkpoint import Checkpoints
from jaxgpt.runs.directory import OtherRunError, open_run
from jaxgpt.text.source import open_source
from jaxgpt.training import resolve, specify

DECAY, STEPS = 0.8, 6
CHANGED = ("--run.resume", "changed")


def train(folder, text_path, *more):
    """Train in a folder, on one device, with an average and a checkpoint of every step."""
    flags = [
        *("--data.path", str(text_path), *TINY, "--model.dropout", "0", "--optim.learning_rate", "1e-2"),
        *("--optim.ema_decay", str(DECAY), "--optim.decay_steps", str(STEPS), "--train.steps", str(STEPS)),
        *("--train.steps_per_call", "1", "--train.eval_interval", "3", "--run.checkpoint_interval", "1"),
        *("--run.keep", "99", "--run.dir", str(folder), "--mesh.data", "1"),
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        return jaxgpt.train(jaxgpt.load_config([*flags, *more]))


@pytest.fixture(scope="module")
def text_path(tmp_path_factory, text):
    """The text of the runs below."""
    path = tmp_path_factory.mktemp("text") / "my.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, text_path):
    """A finished run, which no test changes."""
    return train(tmp_path_factory.mktemp("ema") / "run", text_path)


def saved(run, at=STEPS):
    """The whole state of a step, by name."""
    config = run.config
    like = step.init_state(init.init_params(config.model, jax.random.key(0)), optim.optimizer(config.optim))
    with Checkpoints(run.dir / "checkpoints") as checkpoints:
        return checkpoints.restore(at, vars(like))


def weights_of(run):
    return step.params_of(run.model)


def records(run, kind):
    lines = (run.dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def mean_of(weights):
    """The definition of the average after the last of these updates, in float64."""
    t = len(weights)
    counts = [(1 - DECAY) * DECAY ** (t - i) / (1 - DECAY**t) for i in range(1, t + 1)]
    return jax.tree.map(lambda *each: np.tensordot(counts, np.float64(each), 1), *weights)


def test_train_and_load_return_the_average_of_the_weights_of_each_step(run):
    raw = [saved(run, i)["params"] for i in range(1, STEPS + 1)]
    for at in (1, 3, STEPS):
        found = weights_of(jaxgpt.load(run.dir, at))
        chex.assert_trees_all_close(found, mean_of(raw[:at]), rtol=1e-5, atol=1e-6)  # float32 against float64
    chex.assert_trees_all_equal(weights_of(run), found)
    assert np.abs(raw[-1]["lm_head"]["kernel"] - found["lm_head"]["kernel"]).max() > 1e-3


def test_losses_and_samples_are_those_of_the_average(run):
    source, seed, T = open_source(run.config.data), run.config.seed, run.config.model.block_size
    source.split(None, T)
    (final,) = records(run, "final")
    assert final["val_loss"] == pytest.approx(step.evaluate(run.model, source.pieces("val")), rel=1e-6)
    for record in records(run, "eval")[1:]:
        model = jaxgpt.load(run.dir, record["step"]).model
        for name, stream in {"train_loss": step.ESTIMATE, "val_loss": step.VAL}.items():
            drawn = source.windows(stream, seed, 0, 2, 4).reshape(8, T + 1)
            loss = step.token_losses(model, *inputs_and_targets(drawn)).mean()
            assert record[name] == pytest.approx(float(loss), rel=1e-6)
    key, start = jax.random.fold_in(step.stream_key(seed, step.SAMPLE), STEPS), run.tokenizer.start
    out = np.asarray(sampling.generate(run.model, start[None], key, 300))[0, len(start) :]
    assert final["sample"] == run.tokenizer.decode(out)
    assert final["sample"] in (run.dir / "samples.txt").read_text()


def test_an_export_has_the_average(run, tmp_path):
    export.export(export.ExportArgs(run.dir, tmp_path / "out", "safetensors", STEPS))
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = {sharding.name_of(path): a for path, a in jax.tree_util.tree_leaves_with_path(weights_of(run))}
    chex.assert_trees_all_equal(found, expected)


@pytest.mark.parametrize("ema_decay", ["0", "0.5"])
def test_another_run_starts_from_the_average(run, tmp_path, text_path, ema_decay):
    """On another mesh, and with a shorter block, which takes the first rows of the positions."""
    flags = ["--data.path", str(text_path), "--run.init_from", str(run.dir), "--run.dir", str(tmp_path / "new")]
    flags += ["--model.block_size", "8", "--optim.ema_decay", ema_decay, "--mesh.data", "1", "--mesh.fsdp", "2"]
    config = jaxgpt.load_config(flags)
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        config = resolve(config, run.tokenizer.vocab_size)
        spec, shapes = specify(config, mesh)
        state = init_from.initial_state(config, init_from.check(config, run.tokenizer), spec.tx, shapes)
    expected = jax.device_get(weights_of(jaxgpt.load(run.dir)))
    positions = expected["position_embedding_table"]
    positions["embedding"] = positions["embedding"][:8]
    chex.assert_trees_all_equal(jax.device_get(state.params), expected)
    chex.assert_trees_all_equal(step.averaged(state), state.params)
    placed = jax.tree.map(lambda a, like: a.sharding.is_equivalent_to(like.sharding, a.ndim), state, shapes)
    assert all(jax.tree.leaves(placed))


def test_a_run_that_was_stopped_ends_in_the_bits_of_one_that_was_not(run, tmp_path, text_path):
    train(tmp_path / "run", text_path, "--train.steps", "3")
    stopped = train(tmp_path / "run", text_path)
    chex.assert_trees_all_equal(saved(stopped), saved(run))


@pytest.mark.parametrize(
    "meshes",
    [["fsdp", "data", "none"], ["data"], ["fsdp"]],
    ids=", ".join,
)
@pytest.mark.long
def test_the_average_is_the_same_on_every_mesh_and_from_mesh_to_mesh(run, tmp_path, text_path, meshes):
    sizes = {"none": ("1", "1"), "data": ("2", "1"), "fsdp": ("1", "2")}
    for i, mesh in enumerate(meshes, 1):
        data, fsdp = sizes[mesh]
        axes = ["--mesh.data", data, "--mesh.fsdp", fsdp]
        moved = train(tmp_path / "run", text_path, *axes, "--train.steps", str(STEPS * i // len(meshes)))
        assert weights_of(moved)["lm_head"]["kernel"].is_fully_replicated == (mesh != "fsdp")
    # sums over devices are rounded in another order, and Adam's first steps double few roundings
    chex.assert_trees_all_close(saved(moved)["params"], saved(run)["params"], rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(
        jax.device_get(weights_of(moved)), jax.device_get(weights_of(run)), rtol=1e-4, atol=1e-4
    )


def test_a_run_goes_on_with_another_decay(run, tmp_path, text_path):
    folder, flags = shutil.copytree(run.dir, tmp_path / "run"), ("--optim.ema_decay", "0.3", "--train.steps", "7")
    with pytest.raises(OtherRunError, match=r"optim.ema_decay \(was 0.8, now 0.3\).*--run.resume changed"):
        train(folder, text_path, *flags)
    changed = train(folder, text_path, *flags, *CHANGED)
    assert records(changed, "start")[-1]["changed"]["optim.ema_decay"] == [0.8, 0.3]
    share = (1 - 0.3) / (1 - 0.3**7)
    old, new = weights_of(run), saved(changed, 7)["params"]
    expected = jax.tree.map(lambda a, p: (1 - share) * np.float64(a) + share * np.float64(p), old, new)
    chex.assert_trees_all_close(weights_of(changed), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("before, now", [("0.8", "0"), ("0", "0.8")])
@pytest.mark.parametrize("more", [(), CHANGED], ids=["", "changed"])
def test_a_run_neither_gains_nor_loses_its_average(run, trained, tmp_path, before, now, more):
    folder = shutil.copytree(run.dir if before == "0.8" else trained[0], tmp_path / "run")
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(OtherRunError, match=rf"optim.ema_decay \(was {float(before)}, now {float(now)}\)") as refused:
        flags = ["--config", str(folder / "config.yaml"), "--optim.ema_decay", now, "--train.steps", "99"]
        jaxgpt.train(jaxgpt.load_config([*flags, *more]))
    assert refused.value.exit_code == 6 and "--run.resume changed" not in str(refused.value)
    assert str(refused.value).count("optim.ema_decay") == 1
    assert files == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_imported_weights_can_be_trained_with_an_average(run, tmp_path, text_path):
    """What `jaxgpt import` leaves: one checkpoint, whose optimizer knew nothing of an average."""
    folder, config = tmp_path / "run", run.config
    config = dataclasses.replace(
        config, optim=optim.OptimConfig(), run=dataclasses.replace(config.run, dir=str(folder))
    )
    params = jax.tree.map(jnp.copy, weights_of(run))
    state = {"step": jnp.int32(0), "params": params, "opt_state": optim.optimizer(config.optim).init(params)}
    directory = open_run(config, run.tokenizer, None)
    directory.begin(state)
    directory.save(0, state, val_loss=None, mesh=dict.fromkeys(sharding.AXES, 1))
    directory.close()
    chex.assert_trees_all_equal(weights_of(jaxgpt.load(folder)), params)
    trained = train(folder, text_path, "--train.steps", "1")
    chex.assert_trees_all_close(weights_of(trained), saved(trained, 1)["params"], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(weights_of(jaxgpt.load(folder, 1)), weights_of(trained))
    chex.assert_trees_all_equal(weights_of(jaxgpt.load(folder, 0)), params)
