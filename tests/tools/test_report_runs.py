import json
import pathlib

import pytest

from jaxgpt import cli
from jaxgpt import config as configs
from jaxgpt.config import Config, OptimConfig, RunConfig, TrainConfig
from jaxgpt.data import DataConfig
from jaxgpt.model import GPTConfig
from jaxgpt.runs import report as pictures

START = {"kind": "start", "step": 0, "corpus_sha256": "c", "parameters": 4225}
EVALS = [
    {"kind": "eval", "step": step, "train_loss": 2.9 - step / 100, "val_loss": 3 - step / 100, "elapsed_s": 60.0 + step}
    for step in (0, 20, 40)
]
FINAL = {"kind": "final", "step": 40, "val_loss": 2.61234, "elapsed_s": 110.0}


def make(folder, *records, settings=None):
    """A run directory with what `report` reads."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(configs.dump(settings or Config(run=RunConfig(dir=str(folder)))))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def compare(tmp_path, capsys, monkeypatch):
    """Run the command; returns the exit code, the cells of its table, and what it said on stderr."""
    monkeypatch.setattr(pictures, "draw_runs", lambda path, runs: pathlib.Path(path).write_text(str(runs)))

    def call(*runs, to="new/runs.png"):
        flags = [word for run in runs for word in ("--run", str(run))]
        code = cli.main(["report", *flags, "--to", str(tmp_path / to)])
        out, err = capsys.readouterr()
        return code, [[cell.strip() for cell in line.strip("|").split(" | ")] for line in out.splitlines()], err

    return call


def test_the_table_has_the_settings_that_differ_and_the_losses(compare, tmp_path):
    first = Config(
        optim=OptimConfig(learning_rate=0.01), data=DataConfig(path="/here/a.txt"), train=TrainConfig(steps=40)
    )
    second = Config(
        model=GPTConfig(n_layer=2),
        optim=OptimConfig(learning_rate=0.02),
        data=DataConfig(path="/there/a.txt"),
        train=TrainConfig(steps=80),
        run=RunConfig(dir="elsewhere", init_from="x|y"),
    )
    runs = [
        make(tmp_path / "a" / "run$", START, *EVALS, FINAL, settings=first),
        make(tmp_path / "b" / "run$", {**START, "parameters": 8}, *EVALS, settings=second),
    ]
    code, rows, err = compare(*runs)
    assert code == 0 and "picture  " in err and "Traceback" not in err
    assert rows[0] == ["run", "a/run$", "b/run$"]
    assert set(map(tuple, rows[2:])) == {
        ("model.n_layer", str(GPTConfig().n_layer), "2"),
        ("optim.learning_rate", "0.01", "0.02"),
        ("train.steps", "40", "80"),
        ("run.init_from", "", "x\\|y"),
        ("parameters", "4,225", "8"),
        ("step", "40", "40"),
        ("time", "1:50", "1:40"),
        ("train loss (estimate)", "2.5000", "2.5000"),
        ("validation loss (estimate)", "2.6000", "2.6000"),
        ("validation loss (whole split)", "2.6123", ""),
    }
    assert (tmp_path / "new" / "runs.png").exists() and len(list((tmp_path / "new").iterdir())) == 1


def test_more_runs_than_rows_stand_below_each_other_and_an_earlier_picture_is_replaced(compare, tmp_path):
    runs = [make(tmp_path / f"run{i}", START, *EVALS, FINAL) for i in range(8)]
    for _ in range(2):
        code, rows, _ = compare(*runs, to="runs.png")
        assert code == 0 and [row[0] for row in rows[2:]] == [f"run{i}" for i in range(8)]
    assert rows[0][:2] == ["run", "parameters"] and rows[2][-1] == "2.6123"


def test_losses_on_different_texts_are_not_to_be_compared(compare, tmp_path):
    runs = [make(tmp_path / name, {**START, "corpus_sha256": name}, *EVALS) for name in "ab"]
    with pytest.warns(UserWarning, match="different texts"):
        assert compare(*runs)[0] == 0


def test_a_run_that_went_on_after_its_end_has_no_loss_over_the_whole_split_yet(compare, tmp_path):
    more = [{**START, "step": 40}, {**EVALS[-1], "step": 60, "elapsed_s": 20.0}]
    _, rows, _ = compare(make(tmp_path / "run", START, *EVALS, FINAL, *more))
    found = dict(rows[2:])
    assert found["step"] == "60" and found["time"] == "2:10" and found["validation loss (whole split)"] == ""


def test_a_run_of_an_older_version_counts_with_the_defaults_of_what_it_lacks(compare, tmp_path):
    old, new = (make(tmp_path / name, START, *EVALS) for name in ("old", "new"))
    lines = (old / "config.yaml").read_text().splitlines()
    older = [
        line for line in lines if line.split(":")[0].strip() not in ("rope_theta", "track", "ema_decay", "patience")
    ]
    assert len(older) == len(lines) - 4
    (old / "config.yaml").write_text("\n".join(older).replace("init_from: ''", "init_from: /gone"))
    code, rows, _ = compare(old, new)
    assert code == 0 and rows[2] == ["run.init_from", "/gone", ""] and rows[3][0] == "parameters"


DAMAGED = {
    "not there": (lambda run: [path.unlink() for path in run.iterdir()], "no config.yaml"),
    "no metrics": (lambda run: (run / "metrics.jsonl").unlink(), "no metrics.jsonl"),
    "empty metrics": (lambda run: (run / "metrics.jsonl").write_text(""), "no loss estimate yet"),
    "no estimate": (lambda run: (run / "metrics.jsonl").write_text(json.dumps(START)), "no loss estimate yet"),
    "not finite": (
        lambda run: (run / "metrics.jsonl").write_text(json.dumps({**EVALS[0], "val_loss": None})),
        "no loss estimate yet",
    ),
    "other records": (
        lambda run: (run / "metrics.jsonl").write_text(json.dumps({"kind": "eval", "loss": 1})),
        "cannot read the run",
    ),
    "other types": (
        lambda run: (run / "metrics.jsonl").write_text(json.dumps({**EVALS[0], "val_loss": "low"})),
        "cannot read the run",
    ),
    "a newer version": (
        lambda run: (run / "config.yaml").write_text("model:\n  telepathy: 'true'\n"),
        "unknown option",
    ),
    "no YAML": (lambda run: (run / "config.yaml").write_text("a: [\n"), "not YAML"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_run_that_cannot_be_shown_is_one_line_with_its_name_and_exit_code_4(compare, tmp_path, damage):
    spoil, says = DAMAGED[damage]
    good, bad = (make(tmp_path / name, START, *EVALS) for name in ("good", "$bad\n"))
    spoil(bad)
    code, rows, err = compare(good, bad, to="runs.png")
    assert code == 4 and rows == [] and err.count("\n") == 1 and says in err and "--run, " in err and "$bad" in err
    assert not (tmp_path / "runs.png").exists()


@pytest.mark.parametrize(("to", "code"), [("runs.jpg", 2), ("runs", 2), ("folder.png", 2), ("file/runs.png", 7)])
def test_a_picture_that_cannot_be_written_is_one_line(compare, tmp_path, to, code):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    found, rows, err = compare(make(tmp_path / "run", START, *EVALS), to=to)
    assert (found, rows) == (code, []) and err.count("\n") == 1 and str(tmp_path / to.split("/")[0]) in err


def test_run_and_to_must_be_given_and_the_home_folder_is_expanded(capsys, compare, tmp_path, monkeypatch):
    assert cli.main(["report", "--to", "a.png"]) == 2 and "--run" in capsys.readouterr().err
    monkeypatch.setenv("HOME", str(tmp_path))
    make(tmp_path / "run", START, *EVALS)
    assert compare("~/run")[0] == 0
