"""Trackers: sinks that show the records of a run in TensorBoard, or in Weights & Biases. Each is an extra.

The first record, the `start`, opens them. So whatever goes wrong is a failed write, which does not end a run.
"""

import dataclasses
import json
import os
import pathlib
import time
from typing import Any

from jaxgpt.config import Config
from jaxgpt.runs.metrics import Record
from jaxgpt.runs.report import read_metrics

WANDB = "wandb.json"  # in the run directory: the id of the run there
PROJECT = "jaxgpt"  # unless $WANDB_PROJECT names another


def of(config: Config, folder: pathlib.Path, step: int | None) -> "TensorBoard | WandB | None":
    """Return the tracker that `run.track` names; None if it names none.

    Args:
        config: resolved.
        folder: local folder of the run's small files.
        step: the step that the run continues from; None for a new run.
    """
    kinds = {"tensorboard": TensorBoard, "wandb": WandB}
    return kinds[config.run.track](config, folder, step) if config.run.track != "none" else None


class TensorBoard:
    """Write event files to the run directory, one per start: `tensorboard --logdir runs` shows all runs."""

    def __init__(self, config: Config, folder: pathlib.Path, step: int | None):
        self._folder, self._step, self._first = folder, step or 0, 0 if step is None else step + 1
        self._writer = None

    def __call__(self, record: Record) -> None:
        try:
            from tensorboardX.summary import scalar, text
        except ImportError as error:
            raise _missing("tensorboard", error) from None
        if self._writer is None:
            self._open()
        self._step = record.get("step", self._step)
        numbers, words = named(record)
        for name, value in numbers.items():
            self._write(summary=scalar(name, value))
        for name, value in words.items():
            self._write(summary=text(name, "    " + value.replace("\n", "\n    ")))  # indented: shown as it is
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()

    def _open(self) -> None:
        from tensorboardX.event_file_writer import EventsWriter  # SummaryWriter's thread hides a full disk, then hangs
        from tensorboardX.proto.event_pb2 import SessionLog

        self._writer = EventsWriter(str(self._folder / "events"), f".{time.time_ns()}")
        # TensorBoard forgets what an earlier file has of the steps that are now repeated
        self._write(step=self._first, session_log=SessionLog(status=SessionLog.START))

    def _write(self, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(**{"wall_time": time.time(), "step": self._step, **content}))


class WandB:
    """Send the records to Weights & Biases, as its package is set up: $WANDB_MODE, $WANDB_PROJECT and so on.

    The run there is continued by its id. It keeps what it has of a step, so that a step is not sent twice.
    """

    def __init__(self, config: Config, folder: pathlib.Path, step: int | None):
        self._config, self._folder, self._run = config, folder, None
        self._sent: dict[str, int] = {}  # the last step of each kind

    def __call__(self, record: Record) -> None:
        if self._run is None:
            self._open(record)
        kind, step = record["kind"], record.get("step")
        numbers, words = named(record)
        if step is None:
            self._run.summary.update({**numbers, **words})
        elif kind != "start" and step > self._sent.get(kind, -1):
            self._run.log({**numbers, **words}, step=step)

    def close(self) -> None:
        """Send what is left."""
        if self._run is not None:
            self._run.finish()

    def _open(self, start: Record) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb", error) from None
        file, known = self._folder / WANDB, None
        if file.is_file():
            known = json.loads(file.read_text(encoding="utf-8"))["id"]
            self._sent = {r["kind"]: r["step"] for r in read_metrics(self._folder) if r["kind"] in ("train", "eval")}
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", pathlib.PurePath(self._config.run.dir).name),
            id=known,
            resume="allow" if known else None,
            settings=wandb.Settings(console="off"),  # or it would take over the screen
        )
        self._run.config.update({**dataclasses.asdict(self._config), "start": start}, allow_val_change=True)
        file.write_text(json.dumps({"id": self._run.id}), encoding="utf-8")


def named(record: Record) -> tuple[dict[str, float], dict[str, str]]:
    """Return the numbers of a record as `kind/field`, and its texts; of a `start`, everything is one text."""
    kind = record["kind"]
    if kind == "start":
        return {}, {kind: json.dumps(record, indent=1)}
    fields = {f"{kind}/{name}": value for name, value in record.items() if name not in ("kind", "step")}
    numbers = {name: value for name, value in fields.items() if isinstance(value, int | float)}
    return numbers, {name: value for name, value in fields.items() if isinstance(value, str)}


def _missing(extra: str, error: ImportError) -> ImportError:
    return ImportError(f"{error}; pip install 'jaxgpt[{extra}]'")
