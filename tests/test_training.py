import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
import types

import chex
import jax
import numpy as np
import pytest
from flax import nnx

import jaxgpt
from jaxgpt import init, loop, optim, step, training
from jaxgpt.devices import chips
from jaxgpt.devices.stopping import Stopped, stop_requests
from jaxgpt.errors import ArgumentError, CheckpointError
from jaxgpt.files import storage
from jaxgpt.runs import checkpoint, loading
from jaxgpt.runs import directory as run_module
from jaxgpt.runs.directory import OtherRunError


def records(run_dir, kind):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def params_of(run_dir, step):
    return nnx.to_pure_dict(nnx.state(jaxgpt.load(run_dir, step).model))


def opt_state_of(config, step_number):
    config = training.resolve(config, jaxgpt.load(config.run.dir).config.model.vocab_size)
    params = init.init_params(config.model, jax.random.key(0))
    like = vars(step.init_state(params, optim.optimizer(config.optim)))
    return checkpoint.Checkpoints(f"{config.run.dir}/checkpoints").restore(step_number, like)["opt_state"]


def test_a_run_learns_and_leaves_what_the_readme_names(tiny_config, tmp_path):
    run = jaxgpt.train(jaxgpt.load_config([*tiny_config, "--train.steps", "200", "--optim.learning_rate", "1e-2"]))
    folder = tmp_path / "run"
    names = {"config.yaml", "tokenizer.json", "metrics.jsonl", "samples.txt", "loss.png", "checkpoints"}
    assert {path.name for path in folder.iterdir()} == names
    assert run.step == 200 and run.config.model.vocab_size == run.tokenizer.vocab_size
    evals = records(folder, "eval")
    assert [e["step"] for e in evals] == list(range(0, 201, 20))
    assert evals[0]["val_loss"] == pytest.approx(math.log(run.tokenizer.vocab_size), abs=0.1)
    assert evals[-1]["val_loss"] < 0.75 * evals[0]["val_loss"]
    samples = (folder / "samples.txt").read_text().split("--- step ")[1:]
    assert [sample.split(",")[0] for sample in samples] == [str(n) for n in range(20, 201, 20)]


@pytest.mark.full
def test_a_second_run_of_a_process_finds_its_step_compiled(tiny_config, tmp_path, monkeypatch):
    traced, train_step = [], step.train_step
    monkeypatch.setattr(step, "train_step", lambda *args: traced.append(1) or train_step(*args))
    config = [*tiny_config, "--optim.beta1", "0.8"]  # which no other test has
    for seed in ("0", "1"):
        jaxgpt.train(jaxgpt.load_config([*config, "--run.dir", str(tmp_path / seed), "--seed", seed]))
        assert len(traced) == 1
    assert records(tmp_path / "0", "train")[0]["loss"] != records(tmp_path / "1", "train")[0]["loss"]


def test_metrics_have_the_documented_fields(tiny_config, tmp_path):
    jaxgpt.train(jaxgpt.load_config(tiny_config))
    start = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"kind", "devices", "mesh", "parameters", "flops_per_token", "versions"} <= start.keys()
    assert start["kind"] == "start" and start["parameters"] == sum(
        leaf.size for leaf in jax.tree.leaves(params_of(tmp_path / "run", 40))
    )
    train = records(tmp_path / "run", "train")
    assert [r["step"] for r in train] == [1, *range(5, 41, 5)]
    fields = {"kind", "step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu", "elapsed_s"}
    assert all(r.keys() == fields for r in train)
    # a CPU's peak is measured at the first boundary, where nothing else is computed
    assert train[-1]["mfu"] is not None
    for r in filter(lambda r: r["mfu"] is not None, train):
        achieved = r["tokens_per_second"] * start["flops_per_token"]
        assert r["mfu"] == pytest.approx(achieved / chips.matmul_flops()) and 0 < r["mfu"] < 1
    assert train[1]["learning_rate"] == pytest.approx(5e-3 / 6)  # step 5 of 5 of warm-up, counted from 1
    (compiled,) = records(tmp_path / "run", "compile")  # once, for calls of one, four and five steps
    assert compiled["seconds"] > 0
    evals = records(tmp_path / "run", "eval")
    assert all(r.keys() == {"kind", "step", "train_loss", "val_loss", "elapsed_s"} for r in evals)


@pytest.mark.parametrize(
    "start, expected", [(0, [(0, 1), (1, 10), (11, 1), (12, 8), (20, 4), (24, 1)]), (20, [(20, 4), (24, 1)])]
)
def test_calls_end_at_boundaries_and_the_first_step_is_one_by_itself(start, expected):
    intervals = ("--train.eval_interval", "12", "--run.checkpoint_interval", "20")
    config = jaxgpt.load_config([*intervals, "--train.steps", "25", "--train.steps_per_call", "10"])
    assert list(loop.calls(config, start)) == expected
    frequent = dataclasses.replace(config, run=dataclasses.replace(config.run, checkpoint_interval=4))
    assert loop.longest(config) == 10 and loop.longest(frequent) == 4  # no more windows are read than a call can take


@pytest.mark.full
def test_a_profile_is_a_trace_of_training_steps(tiny_config, tmp_path):
    jaxgpt.train(jaxgpt.load_config([*tiny_config, "--train.profile", str(tmp_path / "trace")]))
    (trace,) = (tmp_path / "trace").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    names = {event.name for plane in planes for line in plane.lines for event in line.events}
    assert any("train_steps" in name for name in names), sorted(names)[:50]


@pytest.mark.parametrize("interrupted_at", [10, pytest.param(25, marks=pytest.mark.full)])
def test_an_interrupted_run_ends_in_the_bits_of_an_uninterrupted_one(
    tiny_config, tmp_path, monkeypatch, interrupted_at
):
    whole = jaxgpt.load_config([*tiny_config, "--run.dir", str(tmp_path / "whole")])
    jaxgpt.train(whole)
    config = jaxgpt.load_config(tiny_config)
    log = loop.TrainingLoop.log

    def log_and_die(job, first, *rest):
        if first >= interrupted_at:
            raise SystemExit("killed")
        return log(job, first, *rest)

    monkeypatch.setattr(loop.TrainingLoop, "log", log_and_die)
    with pytest.raises(SystemExit):
        jaxgpt.train(config)
    monkeypatch.undo()
    assert max(checkpoint.Checkpoints(tmp_path / "run" / "checkpoints").steps()) < 40
    jaxgpt.train(config)
    assert len(records(tmp_path / "run", "start")) == 2
    assert records(tmp_path / "run", "start")[1]["step"] == interrupted_at // 10 * 10
    chex.assert_trees_all_equal(params_of(tmp_path / "run", 40), params_of(tmp_path / "whole", 40))
    chex.assert_trees_all_equal(opt_state_of(config, 40), opt_state_of(whole, 40))


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.full)])
def test_a_signal_saves_and_the_same_config_carries_on(tiny_config, tmp_path, monkeypatch, number):
    config = jaxgpt.load_config(tiny_config)
    look = loop.TrainingLoop.estimate_and_sample

    def look_and_signal(job, state, at):
        if at == 20:
            os.kill(os.getpid(), number)
        return look(job, state, at)

    monkeypatch.setattr(loop.TrainingLoop, "estimate_and_sample", look_and_signal)
    with pytest.raises(Stopped, match="step 20") as stopped:
        jaxgpt.train(config)
    assert stopped.value.signal_number == number
    assert (tmp_path / "run" / "loss.png").stat().st_size > 1000
    monkeypatch.undo()
    assert jaxgpt.train(config).step == 40
    assert records(tmp_path / "run", "start")[1]["step"] == 20


def test_signals_are_collected_once_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with stop_requests() as request:
        assert request() is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert request() == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == before  # a second one acts as usual
    assert signal.getsignal(signal.SIGTERM) == before
    seen = []
    thread = threading.Thread(target=lambda: seen.append(stop_requests().__enter__()()))
    thread.start()
    thread.join()
    assert seen == [None]  # outside the main thread nothing is installed


@pytest.mark.full
def test_steps_that_do_not_divide_are_all_run_once(tiny_config, tmp_path):
    odd = ["--train.steps", "17", "--train.log_interval", "1", "--run.checkpoint_interval", "7"]
    assert jaxgpt.train(jaxgpt.load_config([*tiny_config, *odd])).step == 17
    assert [r["step"] for r in records(tmp_path / "run", "train")] == list(range(1, 18))
    assert checkpoint.Checkpoints(tmp_path / "run" / "checkpoints").steps() == [14, 17]


def test_a_finished_run_is_left_as_it_is(tiny_config, tmp_path):
    config = jaxgpt.load_config(tiny_config)
    jaxgpt.train(config)
    before = (tmp_path / "run" / "checkpoints" / "40" / "manifest.json").read_bytes()
    jaxgpt.train(config)
    assert (tmp_path / "run" / "checkpoints" / "40" / "manifest.json").read_bytes() == before
    assert len(records(tmp_path / "run", "train")) == 9


@pytest.mark.full
def test_more_steps_continue_a_run_whose_schedule_is_given(tiny_config):
    argv = [*tiny_config, "--optim.decay_steps", "40"]
    jaxgpt.train(jaxgpt.load_config(argv))
    assert jaxgpt.train(jaxgpt.load_config([*argv, "--train.steps", "50"])).step == 50


def test_a_directory_of_another_run_is_refused_untouched(tiny_config, tmp_path, text_file):
    jaxgpt.train(jaxgpt.load_config(tiny_config))
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(OtherRunError, match=r"model.n_embd \(was 16, now 32\)"):
        jaxgpt.train(jaxgpt.load_config([*tiny_config, "--model.n_embd", "32"]))
    with pytest.raises(OtherRunError, match="there is a run already"):
        jaxgpt.train(jaxgpt.load_config([*tiny_config, "--run.resume", "never"]))
    text_file.write_text(text_file.read_text()[::-1])
    with pytest.raises(OtherRunError, match="the text itself"):
        jaxgpt.train(jaxgpt.load_config(tiny_config))
    assert files == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_resume_must_needs_something_to_resume(tiny_config, tmp_path):
    with pytest.raises(CheckpointError, match="nothing to resume"):
        jaxgpt.train(jaxgpt.load_config([*tiny_config, "--run.resume", "must"]))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(tiny_config, tmp_path):
    argv = [*tiny_config, "--optim.learning_rate", "1e30", "--optim.grad_clip", "0"]
    with jax.debug_nans(False), pytest.raises(loop.NonFiniteError, match=r"step .*learning_rate"):
        jaxgpt.train(jaxgpt.load_config(argv))
    checkpoints = checkpoint.Checkpoints(tmp_path / "run" / "checkpoints")
    for saved in checkpoints.steps():
        chex.assert_tree_all_finite(params_of(tmp_path / "run", saved))


def test_load_gives_the_best_step_and_any_other(trained):
    losses = {e["step"]: e["val_loss"] for e in records(trained[0], "eval") if e["step"]}
    run = jaxgpt.load(trained[0])
    assert run.step == min(losses, key=losses.get)
    assert jaxgpt.load(trained[0], step=30).step == 30
    tokens = run.tokenizer.encode("the king")[None]
    chex.assert_shape(run.model(tokens), (1, 8, run.tokenizer.vocab_size))
    assert step.evaluate(run.model, np.tile(tokens[0], 9)) > 0


@pytest.mark.parametrize("damage", ["config.yaml", "tokenizer.json"])
def test_a_directory_that_is_no_run_is_named(trained_copy, damage):
    with pytest.raises(CheckpointError, match="not a run directory"):
        jaxgpt.load(trained_copy.parent)
    (trained_copy / damage).write_text("{")
    with pytest.raises(CheckpointError, match="damaged run directory"):
        jaxgpt.load(trained_copy)


def test_a_vocabulary_other_than_the_text_s_is_refused(tiny_config):
    with pytest.raises(ValueError, match="the tokenizer has"):
        jaxgpt.train(jaxgpt.load_config([*tiny_config, "--model.vocab_size", "99"]))


@pytest.mark.full
def test_a_run_on_an_object_store_leaves_everything_there_and_continues_from_it(tiny_config, tmp_path, monkeypatch):
    local = checkpoint.epath.Path  # gs://bucket lies in a folder here

    def path(name):
        return local(str(name).replace("gs://bucket", str(tmp_path / "bucket")))

    for module in (checkpoint, run_module, loading):
        monkeypatch.setattr(module, "epath", types.SimpleNamespace(Path=path))
    monkeypatch.setitem(storage.STORES, "gs", "json")
    flags = [*tiny_config, "--run.dir", "gs://bucket/run", "--optim.decay_steps", "40"]
    jaxgpt.train(jaxgpt.load_config([*flags, "--train.steps", "20"]))
    folder = tmp_path / "bucket" / "run"
    names = {"config.yaml", "tokenizer.json", "metrics.jsonl", "samples.txt", "loss.png", "checkpoints"}
    assert {path.name for path in folder.iterdir()} == names
    jaxgpt.train(jaxgpt.load_config(flags))
    assert [r["step"] for r in records(folder, "start")] == [0, 20]
    assert [r["step"] for r in records(folder, "final")] == [20, 40]
    whole = jaxgpt.train(jaxgpt.load_config([*flags, "--run.dir", str(tmp_path / "whole")]))
    chex.assert_trees_all_equal(*(nnx.state(run.model) for run in (jaxgpt.load("gs://bucket/run", 40), whole)))
    assert not (tmp_path / "gs:").exists()


def test_samples_can_be_switched_off(tiny_config, tmp_path, capsys):
    jaxgpt.train(jaxgpt.load_config([*tiny_config, "--train.steps", "20", "--train.sample_tokens", "0"]))
    assert not (tmp_path / "run" / "samples.txt").exists()
    assert records(tmp_path / "run", "final")[0]["sample"] == ""
    out = capsys.readouterr().out
    assert "sample   " not in out and "samples.txt" not in out and "more     jaxgpt sample" in out


def test_repeatable_sums_are_asked_for_before_a_backend_starts(tiny_config, monkeypatch):
    flags = [*tiny_config, "--train.deterministic", "true"]
    jax.devices()
    with pytest.raises(ArgumentError, match=r"XLA_FLAGS=--xla_gpu_deterministic_ops=true before"):
        jaxgpt.train(jaxgpt.load_config(flags))
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} {chips.REPEATABLE}")
    assert jaxgpt.train(jaxgpt.load_config([*flags, "--train.steps", "10"])).step == 10


@pytest.mark.full
def test_the_flag_for_repeatable_sums_is_set_in_a_new_process():
    code = "import os; from jaxgpt.devices import chips; chips.repeatable_sums(); chips.repeatable_sums()"
    environ = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", f"{code}; print(os.environ['XLA_FLAGS'])"]
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    assert done.stdout.strip() == chips.REPEATABLE, done.stderr
