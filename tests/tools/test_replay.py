import json
import shutil

import jax
import numpy as np
import pytest

import jaxgpt
from jaxgpt import cli, loop, training
from jaxgpt.config import ConfigError
from jaxgpt.devices import sharding
from jaxgpt.errors import CheckpointError
from jaxgpt.runs import checkpoint
from jaxgpt.tools import replay
from jaxgpt.tools.replay import ReplayArgs


def recorded(run_dir):
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}


@pytest.mark.full
@pytest.mark.parametrize("accumulation", [2])
def test_a_repeated_step_has_the_loss_that_training_recorded(tiny_config, tmp_path, accumulation):
    flags = ["--optim.grad_accumulation", str(accumulation)]
    jaxgpt.train(jaxgpt.load_config([*tiny_config, *flags]))  # dropout is on
    losses = recorded(tmp_path / "run")
    for step, before in {35: 30, 40: 30}.items():
        found = replay.replay(ReplayArgs(str(tmp_path / "run"), step))
        assert found.checkpoint == before and found.first is None
        assert found.loss == pytest.approx(losses[step], rel=1e-6)
    assert losses[35] != losses[40]


@pytest.mark.full
def test_the_first_tensor_that_is_not_finite_is_named(tiny_config, tmp_path, capsys):
    run = tmp_path / "run"
    jaxgpt.train(jaxgpt.load_config([*tiny_config, "--model.n_layer", "2"]))
    checkpoints = checkpoint.Checkpoints(run / "checkpoints")
    facts = checkpoints.manifest(30)
    config = jaxgpt.load_config(["--config", str(run / "config.yaml")])
    config = training.resolve(config, jaxgpt.load(run).tokenizer.vocab_size)
    _, shapes = training.specify(config, sharding.make_mesh(sharding.MeshConfig(1)))
    state = checkpoints.restore(30, vars(shapes))
    kernel = state["params"]["blocks"][1]["mlp"]["fc"]["kernel"]
    state["params"]["blocks"][1]["mlp"]["fc"]["kernel"] = kernel.at[0, 0].set(np.nan).at[3, 1].set(np.inf)
    checkpoints.save(32, state, {name: facts[name] for name in ("val_loss", "corpus_sha256", "mesh")})
    checkpoints.close()
    with jax.debug_nans(False):
        found = replay.replay(ReplayArgs(str(run), 33))
        assert found.first == "parameter blocks.1.mlp.fc.kernel" and found.checkpoint == 32
        size = 16 * 64
        assert found.values == f"1 NaN and 1 infinite of {size:,}"
        assert cli.main(["replay", "--run", str(run), "--step", "33"]) == 0
    assert "not finite: parameter blocks.1.mlp.fc.kernel (1 NaN and 1 infinite" in capsys.readouterr().out


@pytest.mark.full
def test_a_run_that_stopped_says_how_to_find_the_cause_and_that_finds_it(tiny_config, tmp_path):
    flags = ["--optim.learning_rate", "1e30", "--optim.grad_clip", "0", "--run.checkpoint_interval", "1"]
    with jax.debug_nans(False):
        with pytest.raises(loop.NonFiniteError, match=r"last loss 3\.\d+ at step 1\): .*replay --run .*run --step 2`"):
            jaxgpt.train(jaxgpt.load_config([*tiny_config, *flags]))
        found = replay.replay(ReplayArgs(str(tmp_path / "run"), 2))
    # the parameters of step 1 are huge, not infinite: a layer's product is what overflows
    assert found.first.split(" ")[0] in ("embeddings", "output", "logits") and found.checkpoint == 1
    assert not np.isfinite(found.loss)


@pytest.mark.parametrize(
    "step, error, says",
    [
        (0, ConfigError, r"no such step \(--step, 0\): use 1 to 40"),
        (41, ConfigError, r"no such step \(--step, 41\): use 1 to 40"),
    ],
)
def test_steps_that_cannot_be_repeated_are_refused(trained, step, error, says):
    with pytest.raises(error, match=says):
        replay.replay(ReplayArgs(str(trained[0]), step))


@pytest.mark.full
def test_a_step_before_the_first_checkpoint_is_repeated_from_the_beginning(trained, trained_copy):
    losses = recorded(trained[0])  # checkpoints 30 and 40 are left
    assert losses[5] != losses[10]
    for step in (5, 10, 30):  # checkpoint 30 is of after step 30
        found = replay.replay(ReplayArgs(str(trained[0]), step))
        assert (found.checkpoint, found.first) == (0, None)
        assert found.loss == pytest.approx(losses[step], rel=1e-6)
    (trained_copy / "metrics.jsonl").unlink()
    shutil.rmtree(trained_copy / "checkpoints")
    assert replay.replay(ReplayArgs(str(trained_copy), 5)).loss == pytest.approx(losses[5], rel=1e-6)


@pytest.mark.full
def test_a_step_from_before_the_settings_changed_is_not_repeated_with_the_new_ones(trained, trained_copy):
    flags = ["--run.dir", str(trained_copy), "--optim.learning_rate", "5e-4", "--run.resume", "changed"]
    jaxgpt.train(jaxgpt.load_config([*trained[1], *flags, "--train.steps", "45"]))
    found = replay.replay(ReplayArgs(str(trained_copy), 45))
    assert found.checkpoint == 40 and found.loss == pytest.approx(recorded(trained_copy)[45], rel=1e-6)
    with pytest.raises(CheckpointError, match="no checkpoint from step 40, where the settings changed, to step 35"):
        replay.replay(ReplayArgs(str(trained_copy), 35))


def test_a_folder_that_is_no_run_cannot_be_replayed(tmp_path):
    with pytest.raises(CheckpointError, match="not a run directory"):
        replay.replay(ReplayArgs(str(tmp_path), 5))
