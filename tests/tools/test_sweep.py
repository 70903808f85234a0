"""Sweeps: what varies, the runs side by side against runs alone, and what a sweep leaves."""

import contextlib
import dataclasses
import io
import json
import math
import pathlib
import shlex

import jax
import numpy as np
import pytest
from conftest import TINY

import jaxgpt
from jaxgpt import cli, training
from jaxgpt.config import Config, load_config
from jaxgpt.devices import sharding
from jaxgpt.devices.sharding import MeshConfig
from jaxgpt.errors import CheckpointError
from jaxgpt.init import first_state
from jaxgpt.runs import report
from jaxgpt.runs.directory import OtherRunError
from jaxgpt.settings.numbers import numbers
from jaxgpt.step import TRAIN, train_steps
from jaxgpt.text.source import open_source
from jaxgpt.tools import at_once, sweep, sweep_report
from jaxgpt.tools.side_by_side import names_that_vary, train_together, values_of
from jaxgpt.tools.sweep_folder import Folder
from jaxgpt.tools.sweep_runs import expand, parse_vary, structure, with_settings
from jaxgpt.tools.together import Program, Together

# a value of each number in the step that differs from its default
OTHER = {
    "seed": 7,
    "model.dropout": 0.3,
    "model.attention_dropout": 0.2,
    "optim.learning_rate": 3e-3,
    "optim.min_learning_rate": 5e-4,
    "optim.warmup_steps": 2,
    "optim.decay_steps": 6,
    "optim.weight_decay": 0.5,
    "optim.beta1": 0.8,
    "optim.beta2": 0.95,
    "optim.grad_clip": 0.1,
    "optim.ema_decay": 0.5,
    "optim.decay_fraction": 0.3,
    "optim.muon_learning_rate": 2e-2,
    "optim.muon_momentum": 0.8,
}
BASE = Config()


def test_every_number_in_the_step_has_a_value_here():
    assert OTHER.keys() == numbers(Config).keys()


@pytest.mark.parametrize("name", OTHER)
def test_runs_that_differ_in_a_number_train_side_by_side_and_those_that_differ_in_a_switch_do_not(name):
    base = with_settings(BASE, {"optim.optimizer": "muon", "optim.schedule": "wsd", "model.dropout": 0.1})
    base = with_settings(base, {"model.attention_dropout": 0.1, "optim.ema_decay": 0.9})
    other = with_settings(base, {name: OTHER[name]})
    assert structure(other) == structure(base)
    assert (other.seed, values_of(other)) != (base.seed, values_of(base))
    if name in ("optim.learning_rate", "optim.decay_fraction"):  # which cannot be 0
        return
    off = with_settings(base, {name: 0 if isinstance(OTHER[name], int) else 0.0})
    alike = structure(off) == structure(base)
    assert alike == (name not in ("model.dropout", "model.attention_dropout", "optim.grad_clip", "optim.ema_decay"))


@pytest.mark.parametrize(
    "name, value", [("model.n_layer", 2), ("data.batch_size", 3), ("train.steps", 9), ("optim.optimizer", "muon")]
)
def test_runs_that_differ_in_the_program_train_one_after_the_other(name, value):
    assert structure(with_settings(BASE, {name: value})) != structure(BASE)


@pytest.mark.parametrize(
    "vary, message",
    [
        ((), "nothing varies"),
        (("optim.learnin_rate=1",), "perhaps you meant --optim.learning_rate"),
        (("optim.learning_rate=1e-3,fast",), "'fast' .*use a number"),
        (("train.steps=1.5",), "'1.5' .*use a whole number"),
        (("seed=1", "seed=2"), "a setting twice"),
        (("seed=1,2,1",), "a value twice"),
        (("seed=",), "no values"),
        (("seed",), "no values"),
        (("run.dir=a,b",), "cannot vary"),
        (("vary=1",), "unknown option"),
    ],
)
def test_what_cannot_vary_is_one_line(vary, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_vary(vary)
    assert error.value.exit_code == 2 and "\n" not in str(error.value)


def test_a_combination_that_cannot_train_is_refused_before_any_run():
    with pytest.raises(ValueError, match=r"min_learning_rate 0\.0001 is above"):
        expand(BASE, {"seed": [1], "optim.learning_rate": [1e-3, 1e-5]})


def test_a_sweep_is_the_product_of_all_values_in_order():
    planned = expand(BASE, {"optim.learning_rate": [1e-3, 2e-3], "seed": [1, 2]})
    assert [(run.config.optim.learning_rate, run.config.seed) for run in planned] == [
        (1e-3, 1), (1e-3, 2), (2e-3, 1), (2e-3, 2)
    ]  # fmt: skip
    assert len({run.config.run.dir for run in planned}) == 4


def test_the_folder_of_another_sweep_is_refused(tmp_path):
    config = Config(run=dataclasses.replace(BASE.run, dir=str(tmp_path)))
    Folder(str(tmp_path)).check(config, {"seed": [1, 2]}, {})
    Folder(str(tmp_path)).check(config, {"seed": [1, 2]}, {})
    longer = with_settings(config, {"train.steps": 9})
    for other, values, message in (
        (config, {"seed": [1, 3]}, r"--vary seed \(was \[1, 2\], now \[1, 3\]\)"),
        (config, {"optim.beta1": [0.9]}, "--vary seed .*--vary optim.beta1"),
        (longer, {"seed": [1, 2]}, "train.steps .was 2000, now 9"),
        (with_settings(config, {"run.resume": "never"}), {"seed": [1, 2]}, "there is a sweep already"),
    ):
        with pytest.raises(OtherRunError, match=message) as error:
            Folder(str(tmp_path)).check(other, values, {})
        assert error.value.exit_code == 6
    (tmp_path / "config.yaml").touch()
    with pytest.raises(OtherRunError, match="belongs to a run"):
        Folder(str(tmp_path)).check(config, {"seed": [1, 2]}, {})


@pytest.mark.parametrize(
    "freedom, expected",  # from a printed table of Student's distribution
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_the_quantiles_are_student_s(freedom, expected):
    assert sweep_report.t_quantile(freedom) == pytest.approx(expected, abs=5e-4)


def record(number, loss, **settings):
    return {"run": number, "settings": settings, "seed": settings.get("seed", 1337), "val_loss": loss, "run_dir": None,
            "curve": [[0, 3.0, 3.0], [9, loss, loss]]}  # fmt: skip


# two rates with three seeds each, of which one diverged
RECORDS = [
    record(i, loss, **{"optim.learning_rate": rate, "seed": seed})
    for i, (rate, seed, loss) in enumerate(
        [(1e-3, 1, 2.0), (1e-3, 2, 2.2), (1e-3, 3, 2.4), (2e-3, 1, 1.9), (2e-3, 2, 1.8), (2e-3, 3, 2.1)], 1
    )
]


def test_the_table_has_mean_deviation_and_range_over_seeds():
    lines = sweep_report.table([*RECORDS[:5], record(6, None, **RECORDS[5]["settings"])]).splitlines()
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]] == [
        ["0.001", "2.2000", "0.2000", "2.0000 to 2.4000", "3"],
        ["0.002", "1.8500", "0.0707", "1.8000 to 1.9000", "3, 1 diverged"],
    ]


def test_the_interval_of_a_difference_is_that_of_a_paired_t_test():
    # differences 0.1, 0.4, 0.3: mean 0.2667, deviation 0.15275, t = 4.3027 with 2 degrees of freedom
    half = 4.30265 * 0.152753 / math.sqrt(3)
    said = sweep_report.difference(RECORDS)
    assert said.startswith("optim.learning_rate 0.001 minus optim.learning_rate 0.002: +0.2667 (95 % interval")
    assert f"{0.266667 - half:+.4f} to {0.266667 + half:+.4f}, 3 paired seeds" in said
    assert "no interval" in sweep_report.difference([RECORDS[0], RECORDS[3]])
    assert sweep_report.difference(RECORDS[:3]) == ""


def test_the_report_names_the_best_run_s_command_and_what_is_left(tmp_path):
    values = {"optim.learning_rate": [1e-3, 2e-3], "seed": [1, 2, 3, 4]}
    facts = {"vary": values, "settings": {}, "command": {"config": "my recipe.yaml", "train.steps": "9"}}
    (tmp_path / "sweep.json").write_text(json.dumps(facts))
    (tmp_path / "sweep.jsonl").write_text("".join(json.dumps(each) + "\n" for each in RECORDS))
    said = sweep_report.report(tmp_path)
    assert "2 of 8 runs" in said and sweep_report.table(RECORDS) in said
    (line,) = [line for line in said.splitlines() if line.startswith("best")]
    words = shlex.split(line.partition(": ")[2])
    assert words[:2] == ["jaxgpt", "train"] and words[2:6] == ["--config", "my recipe.yaml", "--train.steps", "9"]
    assert words[6:] == ["--optim.learning_rate", "0.002", "--seed", "2"]
    with pytest.raises(CheckpointError, match="no sweep"):
        sweep_report.report(tmp_path / "none")


@pytest.mark.full
def test_each_kind_of_setting_is_drawn(tmp_path):
    for vary, records in (
        ({"optim.learning_rate": [1e-3, 2e-3], "seed": [1, 2, 3]}, RECORDS),
        ({"seed": [1]}, [record(1, 2.0, seed=1)]),
        (
            {"model.norm": ["none", "rmsnorm"]},
            [record(1, 2.0, **{"model.norm": "none"}), record(2, None, **{"model.norm": "rmsnorm"})],
        ),
    ):
        (tmp_path / "sweep.json").write_text(json.dumps({"vary": vary}))
        (tmp_path / "sweep.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
        assert sweep_report.draw(tmp_path).stat().st_size > 10_000


def test_rates_are_marked_where_they_are():
    from matplotlib.figure import Figure

    axes, rates = Figure().subplots(), [5e-4, 1e-3, 4e-3]
    records = [record(i, 2.0, **{"optim.learning_rate": rate}) for i, rate in enumerate(rates)]
    sweep_report._draw_losses(axes, "optim.learning_rate", rates, records)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.0005", "0.001", "0.004"]
    assert axes.get_xticklabels(minor=True) == []


def flags_of(text_file, folder, *more):
    (folder / "recipe.yaml").touch()
    flags = ["--config", str(folder / "recipe.yaml"), "--data.path", str(text_file), *TINY]
    return [*flags, "--run.dir", str(folder / "sweep"), *more]


def run_alone(config, source, n):
    """The losses of the first n steps of a run, and its state after them, by `train_steps`."""
    mesh = sharding.make_mesh(MeshConfig(data=1))
    with jax.set_mesh(mesh):
        spec, _ = training.specify(config, mesh)
        state = first_state(config.model, spec.tx, config.seed)
        windows = source.windows(TRAIN, config.seed, 0, n, config.data.batch_size)
        state, metrics = train_steps(state, windows, jax.random.key(config.seed), spec=spec)
    return np.asarray(metrics["loss"]), np.asarray(metrics["learning_rate"]), jax.device_get(state)


@pytest.mark.full
@pytest.mark.parametrize(
    "optimizer, every",
    [("adamw", 3), *(pytest.param(name, 1, marks=pytest.mark.long) for name in ("adamw", "muon"))],
)
def test_each_run_of_a_sweep_is_the_run_alone_to_rounding(optimizer, every, text_file, tmp_path):
    """Every number in the step differs in one of the runs; a wrong one would be seen in its rates or its weights."""
    flags = flags_of(
        text_file, tmp_path, "--optim.optimizer", optimizer, "--optim.schedule", "wsd", "--optim.ema_decay", "0.9"
    )
    base = with_settings(load_config([*flags, "--train.steps_per_call", "8"]), {"model.attention_dropout": 0.1})
    source = open_source(base.data)
    source.split(sharding.make_mesh(MeshConfig(data=1)), base.model.block_size)
    names = [name for name in OTHER if optimizer == "adamw" or name.startswith(("optim.muon_", "optim.weight", "seed"))]
    names = names[::every]
    configs = [
        training.resolve(with_settings(base, {name: OTHER[name]}), source.tokenizer.vocab_size) for name in names
    ]
    program = Program(configs[0], names_that_vary(configs), len(names) + len(names) % 2)
    job = Together(configs, program, source, lambda _: None)
    assert job.group.mesh.size == 2
    states, metrics = train_together(job.first_states(), next(job.feed(0)), job.keys, job.varying, group=job.group)
    for i, config in enumerate(configs):
        losses, rates, state = run_alone(config, source, 8)
        np.testing.assert_allclose(metrics["learning_rate"][i], rates, rtol=1e-6)
        np.testing.assert_allclose(metrics["loss"][i], losses, rtol=1e-5)  # rounding, after 8 small steps
        ours = jax.tree.map(lambda a: np.asarray(a)[i], states)  # noqa: B023
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(state), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)


def swept(flags):
    """A sweep by the command line: its exit code, and what it printed on stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["sweep", *flags])
    return code, out.getvalue(), err.getvalue()


def records_of(flags):
    last = len(flags) - flags[::-1].index("--run.dir")
    return sweep_report.read(pathlib.Path(flags[last]))[1]


@pytest.mark.full
def test_a_sweep_leaves_what_the_page_names_and_its_best_run_can_be_sampled(text_file, tmp_path, capsys):
    vary = ("--at_once", "4", "--vary", "optim.learning_rate=1e-3,1e-2", "--vary", "seed=1,2")
    flags = flags_of(text_file, tmp_path, *vary)
    code, out, err = swept(flags)
    assert code == 0, err
    folder = tmp_path / "sweep"
    assert {path.name for path in folder.iterdir()} == {"sweep.json", "sweep.jsonl", "sweep.png", "runs"}
    records = records_of(flags)
    fields = {"run", "settings", "seed", "step", "val_loss", "train_loss", "seconds", "at_once", "diverged", "curve"}
    assert [r["run"] for r in records] == [1, 2, 3, 4] and all(fields < r.keys() for r in records)
    assert [[step for step, *_ in r["curve"]] for r in records] == [[0, 20, 40]] * 4
    assert all(r["at_once"] == 4 and r["step"] == 40 and r["seconds"] > 0 for r in records)
    best = min(records, key=lambda r: r["val_loss"])
    assert (
        [r["run_dir"] for r in records if r["run_dir"]] == [best["run_dir"]] == [str(folder / f"runs/00{best['run']}")]
    )
    # that run alone, by the command line that the sweep prints
    (line,) = [line for line in out.splitlines() if line.startswith("best")]
    command = shlex.split(line.partition(": ")[2])
    assert cli.main([*command[1:], "--run.dir", str(tmp_path / "alone")]) == 0
    found = report.read_metrics(tmp_path / "alone")
    evals = {r["step"]: [r["train_loss"], r["val_loss"]] for r in found if r["kind"] == "eval"}
    for step, *losses in best["curve"]:
        np.testing.assert_allclose(losses, evals[step], rtol=1e-5 if not step else 1e-3)
    assert found[-1]["val_loss"] == pytest.approx(best["val_loss"], rel=1e-3)
    # the kept directory is an ordinary one: it gives the loss of its record, a text, and goes on
    run = jaxgpt.load(best["run_dir"])
    assert run.step == 40 and run.config.seed == best["seed"]
    capsys.readouterr()
    assert cli.main(["eval", "--run", best["run_dir"]]) == 0
    assert json.loads(capsys.readouterr().out)["nats_per_token"] == pytest.approx(best["val_loss"], rel=1e-6)
    assert cli.main(["sample", "--run", best["run_dir"], "--max_new_tokens", "5"]) == 0
    more = ["--run.resume", "changed", "--train.steps", "45"]
    assert cli.main(["train", "--config", f"{best['run_dir']}/config.yaml", *more]) == 0
    # nothing is trained again, and the report is the same
    again = swept(flags)
    assert again[:2] == (0, out) and "together" not in again[2]
    assert swept(["--report", str(folder)])[:2] == (0, out)
    assert swept([*flags[:-1], "seed=1,3"])[0] == 6
    assert swept([*flags, "--vary", "optim.learnin_rate=1"])[0] == 2


@pytest.mark.full
def test_an_interrupted_sweep_goes_on_and_ends_as_if_it_had_not_been(text_file, tmp_path, monkeypatch):
    flags = flags_of(
        text_file, tmp_path, "--vary", "optim.learning_rate=1e-3,1e-2", "--vary", "seed=1,2,3", "--at_once", "4"
    )
    whole = [*flags, "--run.dir", str(tmp_path / "whole")]
    assert swept(whole)[0] == 0
    assert {record["step"] for record in records_of(whole)} == {40}  # calls of one to five steps, each of them counted
    notes, note = [], Together.note

    def killed(self, progress, first, *rest):
        notes.append(first)
        if len(notes) == 6:
            raise SystemExit(3)  # nothing is saved, as with a kill
        note(self, progress, first, *rest)

    monkeypatch.setattr(Together, "note", killed)
    assert swept(flags)[0] == 1
    monkeypatch.setattr(Together, "note", note)
    saved = [int(path.name) for path in (tmp_path / "sweep" / "checkpoints").glob("*/*") if path.name.isdecimal()]
    assert saved == [10] or saved == [20]

    asked = iter([None] * 3 + [15])
    monkeypatch.setattr(sweep, "stop_requests", lambda: contextlib.nullcontext(lambda: next(asked)))
    code, _, err = swept(flags)
    assert code == 75 and f"continue step {saved[0]}" in err and "run the same command again" in err
    monkeypatch.undo()
    code, _, err = swept(flags)
    assert code == 0 and "continue step" in err

    def facts(records):
        return [[r[name] for name in ("run", "settings", "step", "val_loss", "train_loss", "curve")] for r in records]

    assert facts(records_of(flags)) == facts(records_of(whole))
    best = min(records_of(flags), key=lambda r: r["val_loss"])  # in the second half: the best of the first one is gone
    assert best["run"] > 3 and [r["run"] for r in records_of(flags) if r["run_dir"]] == [best["run"]]
    assert [path.name for path in (tmp_path / "sweep" / "runs").iterdir()] == [f"{best['run']:03}"]


@pytest.mark.full
def test_a_run_that_diverges_is_marked_and_the_others_go_on(text_file, tmp_path):
    flags = flags_of(
        text_file, tmp_path, "--vary", "optim.learning_rate=1e-3,1e38", "--vary", "seed=1,2", "--keep", "all"
    )
    code, out, err = swept(flags)
    assert code == 0 and "2 diverged" in out and "2 diverged" in err
    first, second, *lost = records_of(flags)
    assert all(r["val_loss"] is None and r["run_dir"] is None and 1 < r["diverged"] <= 5 for r in lost)
    assert first["val_loss"] < 3.1 and jaxgpt.load(first["run_dir"]).step == jaxgpt.load(second["run_dir"]).step == 40
    alone = [*flags, "--run.dir", str(tmp_path / "alone"), "--at_once", "1"]
    assert swept(alone)[0] == 0
    for ours, theirs in zip(records_of(flags), records_of(alone), strict=True):
        assert ours["diverged"] == theirs["diverged"]
        assert ours["val_loss"] is None or ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-3)


@pytest.mark.long
def test_groups_run_one_after_the_other_and_none_is_kept_unless_asked_for(text_file, tmp_path):
    vary = ("--vary", "model.dropout=0,0.1,0.2", "--vary", "model.n_embd=8,16", "--keep", "none")
    flags = flags_of(text_file, tmp_path, *vary, "--train.steps", "10")
    code, _, err = swept(flags)
    assert code == 0 and "in 4 groups" in err
    assert [r["at_once"] for r in records_of(flags)] == [1, 1, 2, 2, 2, 2]
    assert not (tmp_path / "sweep" / "runs").exists()


@pytest.mark.full
def test_a_size_that_gains_nothing_on_a_cpu_runs_one_after_the_other():
    def resolved(name):
        return training.resolve(load_config(["--config", name]), 65)

    small, _ = at_once.most_at_once(resolved("lecture/layernorm"), jax.devices())
    large, why = at_once.most_at_once(resolved("shakespeare_cpu"), jax.devices())
    assert small == 2 * jax.device_count() == 4 and large == 1 and "gain nothing" in why
    assert at_once.limit(with_settings(resolved("lecture/layernorm"), {"train.patience": 2}), 8)[0] == 1
    assert at_once.limit(resolved("gpt2_124m"), 8) == (8, "--at_once")
