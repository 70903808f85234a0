import json
import os
import signal

import chex
import pytest
from flax import nnx

import jaxgpt
from jaxgpt import loop, training
from jaxgpt.devices.stopping import Stopped
from jaxgpt.loop import Patience
from jaxgpt.runs import checkpoint

# at steps 0, 5, 10 ...: two evaluations without a lower loss, one, then three
LOSSES = [3.0, 2.0, 2.0, 2.5, 1.5, 1.6, 1.4, 1.4, 1.5, 1.9, 0.5, 0.4]


def test_only_a_lower_loss_starts_the_count_again():
    watch, seen = Patience(), []
    for i, loss in enumerate([3.0, 2.0, 2.0, float("nan"), 1.9]):
        watch = watch.after(i, loss)
        seen.append((watch.best_step, watch.waited))
    assert seen == [(0, 0), (1, 0), (1, 1), (1, 2), (4, 0)]
    assert Patience(**json.loads(json.dumps(watch._asdict()))) == watch  # as a manifest keeps it


@pytest.mark.parametrize("waited, patience, spent", [(2, 3, False), (3, 3, True), (4, 3, True), (9, 0, False)])
def test_no_patience_is_patience_without_end(waited, patience, spent):
    assert Patience(1.0, 0, waited).is_spent(patience) == spent


@pytest.fixture
def told(monkeypatch):
    """Evaluations say what LOSSES say."""
    look = loop.TrainingLoop.estimate_and_sample

    def look_and_lie(job, state, step):
        look(job, state, step)
        return LOSSES[step // 5]

    monkeypatch.setattr(loop.TrainingLoop, "estimate_and_sample", look_and_lie)
    return look_and_lie


@pytest.fixture
def flags(tiny_config):
    return [*tiny_config, "--train.steps", "55", "--train.eval_interval", "5", "--run.checkpoint_interval", "20",
            "--run.keep", "1", "--train.patience", "3"]  # fmt: skip


def kept(folder):
    return checkpoint.Checkpoints(folder / "checkpoints").steps()


def params_of(folder, step):
    return nnx.to_pure_dict(nnx.state(jaxgpt.load(folder, step).model))


@pytest.mark.full
def test_training_stops_after_so_many_evaluations_and_keeps_the_best(told, flags, tmp_path, capsys):
    run = jaxgpt.train(jaxgpt.load_config(flags))
    assert run.step == 45 and kept(tmp_path / "run") == [30, 45]
    assert jaxgpt.load(tmp_path / "run").step == 30
    said = capsys.readouterr().out
    assert "no lower validation loss in 3 evaluations (--train.patience): step 30 is kept, with 1.4000" in said
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["best_step"]) for r in records if r["kind"] == "early_stop"] == [(45, 30)]
    assert [r["step"] for r in records if r["kind"] == "final"] == [45]


@pytest.mark.full
def test_the_same_command_does_not_train_on_and_more_patience_does(told, flags, tmp_path, monkeypatch):
    jaxgpt.train(jaxgpt.load_config(flags))
    with monkeypatch.context() as patch:
        patch.setattr(training, "compile_call", lambda *_: pytest.fail("compiled for nothing"))
        assert jaxgpt.train(jaxgpt.load_config(flags)).step == 45
    assert jaxgpt.train(jaxgpt.load_config([*flags, "--train.patience", "4"])).step == 55


@pytest.mark.full
@pytest.mark.parametrize("at", [15, 35, 40])
def test_an_interrupted_run_stops_where_an_uninterrupted_one_does(told, flags, tmp_path, monkeypatch, at):
    whole = [*flags, "--run.dir", str(tmp_path / "whole")]
    assert jaxgpt.train(jaxgpt.load_config(whole)).step == 45

    def look_and_signal(job, state, step):
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return told(job, state, step)

    monkeypatch.setattr(loop.TrainingLoop, "estimate_and_sample", look_and_signal)
    with pytest.raises(Stopped):
        jaxgpt.train(jaxgpt.load_config(flags))
    assert max(kept(tmp_path / "run")) == at
    monkeypatch.setattr(loop.TrainingLoop, "estimate_and_sample", told)
    assert jaxgpt.train(jaxgpt.load_config(flags)).step == 45
    assert kept(tmp_path / "run") == kept(tmp_path / "whole")
    chex.assert_trees_all_equal(*(params_of(tmp_path / name, 45) for name in ("run", "whole")))


@pytest.mark.full
def test_without_patience_a_run_goes_to_its_end_and_saves_when_it_always_did(told, flags, tmp_path):
    assert jaxgpt.train(jaxgpt.load_config([*flags, "--train.patience", "0", "--run.keep", "9"])).step == 55
    assert kept(tmp_path / "run") == [20, 40, 55]
