"""`jaxgpt report`: several runs side by side, as a picture of their losses and a table of what differs."""

import dataclasses
import os
import pathlib
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxgpt import config as configs
from jaxgpt.config import CONFIG, Config, ConfigError
from jaxgpt.errors import CheckpointError, JaxgptWarning, one_line, shortened
from jaxgpt.files import storage
from jaxgpt.files.screen import Lenient, clock
from jaxgpt.runs import report as pictures
from jaxgpt.runs.loading import files_of
from jaxgpt.settings.checks import Path, check_fields
from jaxgpt.settings.flags import parse

METRICS = "metrics.jsonl"
WHERE = ("run.", "distributed.")  # settings that do not change what a run learns
TEXT = {"data.name", "data.path", "data.tokenizer", "data.verify"}  # compared by content, since files may move
LONGEST = 60  # characters of a name or of a value


@dataclasses.dataclass(frozen=True)
class ReportArgs:
    """Draw the losses of runs over their steps and over time. stdout gets a table of the settings that differ, with
    the losses."""

    run: tuple[Path, ...]
    """Run directory."""
    to: Path
    """Picture to write, FILE.png; an earlier one is replaced."""

    def __post_init__(self):
        check_fields(self)
        object.__setattr__(self, "run", tuple(map(os.path.expanduser, self.run)))


class Known(NamedTuple):
    """What a run directory tells of a run."""

    settings: dict[str, Any]
    records: list[dict[str, Any]]
    """Those that count."""

    def last(self, kind: str) -> dict[str, Any]:
        """The last record of a kind; empty if there is none."""
        return next((record for record in reversed(self.records) if record["kind"] == kind), {})


def report(args: ReportArgs) -> str:
    """Write the picture, and return the table.

    Raises:
        ConfigError: `to` is no PNG file of this machine.
        CheckpointError: a run directory cannot be read, or its run has no estimate of the loss yet.
        StorageError: the picture cannot be written.
    """
    target = pathlib.Path(args.to).absolute()
    if "://" in args.to or target.suffix.lower() != ".png" or target.is_dir():
        raise ConfigError(f"not a picture on this machine (--to, {args.to}): name a FILE.png")
    runs, names = [read(run) for run in args.run], short_names(args.run)
    texts = {run.last("start").get("corpus_sha256") for run in runs}
    if len(texts) > 1:
        warnings.warn(
            "the runs learned from different texts, so their losses cannot be compared: "
            "`jaxgpt eval --path FILE --split all` gives bits per byte of the same text",
            JaxgptWarning,
            stacklevel=2,
        )
    with storage.failures(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f".{target.stem}.tmp.png")
        pictures.draw_runs(fresh, [(name, run.records) for name, run in zip(names, runs)])
        os.replace(fresh, target)
    print(f"picture  {args.to}", file=Lenient(sys.stderr))
    return table(names, runs, same_text=len(texts) == 1)


def read(run_dir: str) -> Known:
    """Read the settings and the metrics of a run, which an older or newer version may have written.

    Raises:
        CheckpointError: this is no run directory, a file cannot be read, or there is no estimate of the loss yet.
    """
    folder = files_of(run_dir)
    for name in (CONFIG, METRICS):
        if not os.path.isfile(folder / name):
            raise CheckpointError(f"not a trained run (--run, {run_dir}, no {name}): name one that `jaxgpt train` made")
    try:  # not load_config, which would look for the run that this one started from
        settings = configs.flat(parse(Config, configs.read_file(folder / CONFIG), str(folder / CONFIG)))
        run = Known(settings, pictures.that_count(pictures.read_metrics(folder)))
        estimates = [r["val_loss"] and float(r["val_loss"]) for r in run.records if r["kind"] == "eval"]
        known = any(loss is not None for loss in estimates) and losses(run)
    except (OSError, ValueError, TypeError, KeyError) as error:
        why = f"{run_dir}, {shortened(one_line(str(error)), 300)}"
        remedy = "repair the file, or use the version of jaxgpt that wrote it"
        raise CheckpointError(f"cannot read the run (--run, {why}): {remedy}") from None
    if not known:
        raise CheckpointError(f"no loss estimate yet (--run, {run_dir}): wait for the first one")
    return run


def short_names(runs: Sequence[str]) -> list[str]:
    """Return the last part of each path, or as many parts as tell the runs apart."""
    parts = [tuple(run.rstrip("/").split("/")) if "://" in run else pathlib.Path(run).absolute().parts for run in runs]
    n = 1
    while len({each[-n:] for each in parts}) < len(set(parts)):
        n += 1
    return [shortened(one_line("/".join(each[-n:])), LONGEST) for each in parts]


def table(names: Sequence[str], runs: Sequence[Known], same_text: bool) -> str:
    """Format the settings that differ and the losses as a Markdown table, with the longer of both lists downwards."""
    columns = [settings_that_differ(runs, same_text), *map(losses, runs)]
    rows = [["run", *columns[0], *columns[1]]]
    for name, run, found in zip(names, runs, columns[1:]):
        rows.append([name, *(_word(run.settings[setting]) for setting in columns[0]), *found.values()])
    if len(rows[0]) > len(rows):
        rows = list(zip(*rows))
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [f"| {' | '.join(f'{cell:{width}}' for cell, width in zip(row, widths))} |" for row in rows]
    lines.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    return "\n".join(lines)


def settings_that_differ(runs: Sequence[Known], same_text: bool) -> list[str]:
    """The names of the settings that are not equal in all runs; of equal texts, where they lie does not count."""
    first = runs[0].settings
    names = [name for name in first if any(run.settings[name] != first[name] for run in runs)]
    return [
        name
        for name in names
        if name == "run.init_from" or not (name.startswith(WHERE) or (same_text and name in TEXT))
    ]


def losses(run: Known) -> dict[str, str]:
    """The size of a run, how far it is, and its losses, as words."""
    last, final = run.last("eval"), run.last("final")
    step = max(r["step"] for r in run.records if r["kind"] in ("train", "eval"))
    done = final.get("step") == step
    seconds = (final if done else last).get("elapsed_s")
    return {
        "parameters": _word(run.last("start").get("parameters"), ","),
        "step": f"{step:,}",
        "time": "" if seconds is None else clock(seconds),
        "train loss (estimate)": _word(last.get("train_loss"), ".4f"),
        "validation loss (estimate)": _word(last["val_loss"], ".4f"),
        "validation loss (whole split)": _word(final.get("val_loss"), ".4f") if done else "",
    }


def _word(value: Any, form: str = "") -> str:
    return "none" if value is None else shortened(one_line(format(value, form)), LONGEST)
