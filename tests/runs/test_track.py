import json
import struct
import sys
import tempfile
import types

import pytest

from jaxgpt import training
from jaxgpt.config import Config, RunConfig
from jaxgpt.runs import report, track
from jaxgpt.runs.metrics import MetricsWarning
from jaxgpt.runs.report import read_metrics, that_count
from jaxgpt.tools import at_once

START = {
    "kind": "start", "step": 0, "devices": ["cpu"], "mesh": {"data": 1}, "mesh_before": {"data": 1}, "parameters": 10,
    "batch": [2, 4], "steps": 40, "dtype": "float32", "corpus": "c", "tokens": 9, "vocab_size": 3, "alphabet": "abc",
    "run_dir": "r", "init_from": None, "versions": {"jax": "1"}, "changed": {},
}  # fmt: skip
FINAL = {"kind": "final", "step": 40, "val_loss": 1.5, "uniform_loss": 2.0, "elapsed_s": 9.0, "run_dir": "r"}


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Drawing takes longer than all the rest."""
    monkeypatch.setattr(report, "draw_loss", lambda *_: None)


def leg(first, last, shift=0.0):
    """The records of a run from a step to another: estimates at 20 and 40, and a train record every 10 steps."""
    yield {**START, "step": first}
    yield {"kind": "compile", "seconds": 2.0}
    for step in range(first, last + 1, 10):
        if step > first:
            yield {"kind": "train", "step": step, "loss": 4 - step / 20 + shift, "learning_rate": 0.5, "grad_norm": 2.0,
                   "tokens_per_second": 8.0, "mfu": None, "elapsed_s": 1.0 + step}  # fmt: skip
        if step % 20 == 0 and (step > first or step == 0):
            yield {"kind": "eval", "step": step, "train_loss": 3.0, "val_loss": 3.5 + shift, "elapsed_s": 2.0 + step}


def run_of(tmp_path, tracker, step=None):
    config = Config(run=RunConfig(dir=str(tmp_path / "run"), track=tracker))
    (tmp_path / "run").mkdir(exist_ok=True)
    return types.SimpleNamespace(config=config, folder=tmp_path / "run", step=step)


def emitted(run, records):
    """Send records to all sinks of a run."""
    with training._sinks(run) as emit:
        for record in records:
            emit(dict(record))


def train_killed_and_continued(tmp_path, tracker, shift=0.0):
    """A run that is killed at step 30 and goes on from its checkpoint of step 10."""
    emitted(run_of(tmp_path, tracker), leg(0, 30))
    emitted(run_of(tmp_path, tracker, 10), [*leg(10, 40, shift), {**FINAL, "sample": "a\nb $x$"}])


def events(folder):
    """The events in a folder, as TensorBoard reads them: files by name, and a session's start drops later steps.

    A record of a file is its length, a checksum, its content and a checksum.
    """
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found = []
    for file in sorted(folder.glob("events.out.tfevents.*")):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (size,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + size])
            at += 16 + size
            if event.session_log.status == SessionLog.START:
                found = [each for each in found if each.step < event.step]
            elif event.summary.value:
                found.append(event)
        assert at == len(content)
    return found


def expected(run_dir):
    """What the sinks should hold of metrics.jsonl: each number with its step."""
    step, found = 0, []
    for record in that_count(read_metrics(run_dir)):
        step, kind = record.get("step", step), record["kind"]
        numbers = {name: value for name, value in record.items() if name != "step" and isinstance(value, int | float)}
        if kind != "start":
            found += [(f"{kind}/{name}", step, value) for name, value in numbers.items() if name != "elapsed_s"]
    return found


@pytest.mark.parametrize("shift", [0.0, 0.25])  # with --run.resume changed, repeated steps have other numbers
def test_event_files_hold_the_records_of_metrics_jsonl_and_each_step_once(tmp_path, shift):
    pytest.importorskip("tensorboardX")
    train_killed_and_continued(tmp_path, "tensorboard", shift)
    found = events(tmp_path / "run")
    scalars = [(v.tag, e.step, v.simple_value) for e in found for v in e.summary.value if not v.HasField("tensor")]
    scalars = [each for each in scalars if not each[0].endswith("elapsed_s")]
    assert sorted(scalars) == sorted(expected(tmp_path / "run"))
    steps = [step for tag, step, _ in scalars if tag == "train/loss"]
    assert steps == [10, 20, 30, 40]
    assert [value for tag, _, value in scalars if tag == "train/loss"] == [
        3.5,
        *(4 - s / 20 + shift for s in (20, 30, 40)),
    ]
    texts = {v.tag: v.tensor.string_val[0].decode() for e in found for v in e.summary.value if v.HasField("tensor")}
    assert (
        texts["final/sample/text_summary"] == "    a\n    b $x$" and '"alphabet": "abc"' in texts["start/text_summary"]
    )


class FakeRun:
    """The run of the package wandb: it refuses a step that is lower than the last one, as that does with a warning."""

    def __init__(self, settings):
        self.settings, self.id, self.rows, self.ended = settings, settings["id"] or "abc123", [], False
        self.summary, self.config = {}, types.SimpleNamespace(update=self.configure)

    def configure(self, values, allow_val_change):
        assert allow_val_change
        self.values = values

    def log(self, row, step):
        assert not self.rows or step >= self.rows[-1][0]
        self.rows.append((step, row))

    def finish(self):
        self.ended = True


@pytest.fixture
def wandb(monkeypatch):
    """In place of the package; `.runs` are those that were begun."""
    fake = types.ModuleType("wandb")
    fake.runs, fake.Settings = [], lambda **given: given
    fake.init = lambda **given: fake.runs.append(FakeRun(given)) or fake.runs[-1]
    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_weights_and_biases_gets_each_step_once_and_a_continued_run_keeps_its_id(tmp_path, wandb):
    train_killed_and_continued(tmp_path, "wandb")
    first, second = wandb.runs
    assert first.settings["project"] == "jaxgpt" and first.settings["name"] == "run" and first.settings["id"] is None
    assert second.settings["id"] == first.id == "abc123" and second.settings["resume"] == "allow"
    rows = [*first.rows, *second.rows]
    sent = [(name, step, value) for step, row in rows for name, value in row.items() if "elapsed" not in name]
    assert sorted(each for each in sent if not isinstance(each[2], str)) == sorted(
        each for each in expected(tmp_path / "run") if not each[0].startswith("compile")
    )
    assert second.rows[0][0] == 40 and dict(second.rows[-1][1])["final/sample"] == "a\nb $x$"
    assert first.summary == {"compile/seconds": 2.0} and first.values["start"]["alphabet"] == "abc"
    assert first.values["model"]["block_size"] and first.ended and second.ended


def failing(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("tracker", "broken", "says"),
    [
        ("tensorboard", ("tensorboardX", None), "pip install 'jaxgpt[tensorboard]'"),
        ("wandb", ("wandb", None), "pip install 'jaxgpt[wandb]'"),
        ("wandb", ("wandb.init", failing), "No space left"),
        ("wandb", ("FakeRun.log", failing), "No space left"),
        ("wandb", ("FakeRun.finish", failing), "No space left"),
        ("tensorboard", ("EventsWriter.__init__", failing), "No space left"),
        ("tensorboard", ("EventsWriter.flush", failing), "No space left"),
    ],
)
def test_a_tracker_that_fails_is_reported_once_and_the_records_go_on(
    tmp_path, wandb, monkeypatch, tracker, broken, says
):
    name, value = broken
    if name.startswith("EventsWriter"):
        writer = pytest.importorskip("tensorboardX.event_file_writer").EventsWriter
        monkeypatch.setattr(writer, name.rpartition(".")[2], value)
    elif name == "wandb.init":
        wandb.init = value
    elif name.startswith("FakeRun"):
        monkeypatch.setattr(FakeRun, name.rpartition(".")[2], value)
    else:
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, f"{name}.summary", None)
    with pytest.warns(MetricsWarning) as warned:
        emitted(run_of(tmp_path, tracker), leg(0, 40))
    said = [str(each.message) for each in warned if each.category is MetricsWarning]
    assert {each.split(" ")[1] for each in said} == {tracker} and all(says in each for each in said)
    assert len(said) <= 2  # one for the records, one for closing
    assert [record["step"] for record in read_metrics(tmp_path / "run") if record["kind"] == "train"] == [
        10,
        20,
        30,
        40,
    ]


def test_no_tracker_is_the_default_and_runs_side_by_side_have_none(tmp_path):
    assert track.of(Config(), tmp_path, None) is None
    assert at_once.limit(Config(), 4)[0] == 4
    assert at_once.limit(run_of(tmp_path, "wandb").config, 4) == (1, "--run.track wandb needs it")


@pytest.mark.full
def test_weights_and_biases_writes_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_DIR", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where it keeps files until the process ends
    pytest.importorskip("wandb", reason="needs the package wandb: pip install 'jaxgpt[wandb]'")
    train_killed_and_continued(tmp_path, "wandb")
    written = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    ident = json.loads((tmp_path / "run" / track.WANDB).read_text())["id"]
    assert len(written) == 2 and all(ident in file.name for file in written)
    first, second = (file.read_bytes() for file in written)
    assert b"train/loss" in first and b"final/val_loss" in second and b"a\\nb $x$" in second
