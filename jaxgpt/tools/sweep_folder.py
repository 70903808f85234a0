"""The folder of a sweep: whose it is, and what is finished in it."""

import contextlib
import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

from jaxgpt import config as configs
from jaxgpt.config import Config, ConfigError
from jaxgpt.errors import CheckpointError
from jaxgpt.files import storage
from jaxgpt.runs import changes
from jaxgpt.runs.directory import OtherRunError
from jaxgpt.tools import sweep_report
from jaxgpt.tools.sweep_report import Record
from jaxgpt.tools.sweep_runs import Planned

TEXT = {"data.name", "data.path", "data.tokenizer", "data.verify"}  # compared by content, since files may move


class Folder:
    """The folder of a sweep: its settings, and the records of the runs that are finished."""

    def __init__(self, path: str):
        self.path = pathlib.Path(path)
        self.facts, self.records = sweep_report.read(self.path)

    def check(self, config: Config, values: dict[str, list[Any]], command: dict[str, str]) -> None:
        """Check that the folder is new or belongs to this sweep, and write the settings.

        Raises:
            OtherRunError: it belongs to another sweep or to a run, or `run.resume` is never.
            CheckpointError: `run.resume` is must, and there is none.
        """
        resume, where = config.run.resume, config.run.dir
        settings = {name: value for name, value in configs.flat(config).items() if name not in values}
        facts = json.loads(json.dumps({"vary": values, "settings": settings, "command": command}))
        if (self.path / configs.CONFIG).exists():
            raise OtherRunError(f"the directory belongs to a run ({where}): name another --run.dir")
        if resume == "changed":
            raise ConfigError("a sweep keeps its settings (--run.resume, changed): name another --run.dir")
        if resume == "must" and not self.facts:
            raise CheckpointError(f"nothing to resume ({where}): drop --run.resume must or change --run.dir")
        if self.facts and resume == "never":
            raise OtherRunError(f"there is a sweep already ({where}): name another --run.dir")
        different = _differences(self.facts, facts) if self.facts else []
        if different:
            raise OtherRunError(
                f"the directory belongs to another sweep ({where}; {', '.join(different)}): "
                "name another --run.dir, or use the settings of that sweep"
            )
        storage.write(self.path / sweep_report.FACTS, json.dumps(facts, indent=1) + "\n")
        self.facts = facts

    def check_text(self, run: Planned, sha256: str | None) -> None:
        """Refuse another text than that of the finished runs with the same data settings.

        Raises:
            OtherRunError: it is another one.
        """
        for record in self.records:
            same = all(record["settings"].get(name) == run.settings.get(name) for name in TEXT)
            if same and record["corpus_sha256"] != sha256:
                raise OtherRunError(
                    f"the directory belongs to another sweep ({self.path}; the text itself, sha256 (was "
                    f"{record['corpus_sha256']}, now {sha256})): name another --run.dir"
                )

    def done(self, run: Planned) -> bool:
        """Whether a run is finished."""
        return any(record["run"] == run.number for record in self.records)

    def add(self, records: Sequence[Record], keep: str) -> None:
        """Write the records of runs that have just finished, all or none, and remove the directories not to be kept."""
        self.records = sorted([*self.records, *records], key=lambda record: record["run"])
        best = sweep_report.best(self.records)
        for record in self.records:
            if keep == "none" or record["val_loss"] is None or (keep == "best" and record is not best):
                record["run_dir"] = None
        lines = [json.dumps(record) + "\n" for record in self.records]
        storage.write(self.path / sweep_report.RECORDS, "".join(lines))
        kept = {pathlib.Path(record["run_dir"]).name for record in self.records if record["run_dir"]}
        for record in self.records:
            if (name := f"{record['run']:03}") not in kept:
                shutil.rmtree(self.path / "runs" / name, ignore_errors=True)
        for folder in (self.path / "runs", self.path):
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if it is empty


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The settings in which two sweeps differ."""
    old, new = before["vary"], now["vary"]
    names = [name for name in (*old, *(name for name in new if name not in old)) if old.get(name) != new.get(name)]
    found = [f"--vary {name} (was {old.get(name)}, now {new.get(name)})" for name in names]
    if list(old) != list(new) and not found:
        found = [f"--vary (was {list(old)}, now {list(new)})"]
    moved = changes.changes(before["settings"], {**before["settings"], **now["settings"]}).items()
    ignored = (*TEXT, "mesh.", "train.log_interval", "train.profile", *old, *new)
    return found + [f"{name} (was {a}, now {b})" for name, (a, b) in moved if not name.startswith(ignored)]
