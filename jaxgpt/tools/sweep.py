"""`jaxgpt sweep`: many runs that differ in some settings, side by side where a compiled step allows it."""

import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax

from jaxgpt import config as configs
from jaxgpt import training
from jaxgpt.config import Config, ConfigError
from jaxgpt.devices import chips, sharding
from jaxgpt.devices.sharding import MeshConfig
from jaxgpt.devices.stopping import Stopped, stop_requests
from jaxgpt.errors import ArgumentError, JaxgptError
from jaxgpt.files import lock, storage
from jaxgpt.files.screen import Lenient
from jaxgpt.loop import NonFiniteError, Patience
from jaxgpt.runs import metrics, report
from jaxgpt.runs.directory import open_run
from jaxgpt.settings.checks import Path
from jaxgpt.text.source import Source, open_source
from jaxgpt.tools import sweep_report
from jaxgpt.tools.at_once import limit
from jaxgpt.tools.side_by_side import names_that_vary
from jaxgpt.tools.sweep_folder import Folder
from jaxgpt.tools.sweep_report import Record
from jaxgpt.tools.sweep_runs import FIXED, Planned, expand, parse_vary, structure
from jaxgpt.tools.together import Outcome, Program, Together


@dataclasses.dataclass(frozen=True)
class SweepConfig(Config):
    """Train a run for every combination of some settings, and compare their losses. Takes all flags of train, and
    these."""

    FOLDER: ClassVar[str] = "runs/sweeps"

    vary: tuple[str, ...] = ()
    """FIELD=a,b,c: a setting and its values, such as optim.learning_rate=1e-3,2e-3 or seed=1,2,3."""
    at_once: int = 0
    """Most runs to train side by side; 0 = as many as fit the memory of the devices, or gain something."""
    keep: Literal["best", "all", "none"] = "best"
    """Runs whose directories are kept: that with the lowest validation loss, all, or none."""
    report: Path = ""
    """Folder of a sweep whose table is to be printed again. Nothing is trained."""

    def __post_init__(self):
        super().__post_init__()
        if self.at_once < 0:
            raise ArgumentError(f"at_once is {self.at_once}: use 1 or more, or 0 to have it chosen")


class OutOfMemoryError(JaxgptError, RuntimeError):
    """The runs side by side do not fit the memory of the devices."""

    exit_code = 9


def plain(config: SweepConfig) -> Config:
    """The configuration of the runs, without the flags of the sweep."""
    return Config(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Config)})


def flags_of(config: Config) -> dict[str, str]:
    """The flags that give a configuration, apart from where it runs."""
    values, default = configs.flat(config), configs.flat(Config())
    return {name: str(value) for name, value in values.items() if value != default[name] and not name.startswith(FIXED)}


def say(text: str) -> None:
    """Print a message, which may get lost."""
    print(text, file=Lenient(sys.stderr), flush=True)


def sweep(config: SweepConfig, command: dict[str, str] | None = None) -> list[Record]:
    """Train the runs of a sweep, or those that are left of it.

    Args:
        config: from `load_config(argv, SweepConfig)`.
        command: the flags that it came from, for the command line of the best run; None = from the configuration.

    Returns:
        The records of sweep.jsonl.

    Raises:
        ConfigError: what varies cannot, or there are several processes.
        OtherRunError: the folder belongs to another sweep.
        Stopped: a signal came; everything is saved, and the same call continues.
        OutOfMemoryError: the runs side by side need too much memory.
    """
    values = parse_vary(config.vary)
    planned = expand(plain(config), values)
    if storage.is_remote(config.run.dir):
        raise ConfigError(f"a sweep needs a local folder (--run.dir, {config.run.dir}): name one")
    if config.train.deterministic:
        chips.repeatable_sums()
    training.mesh_config(config)  # before jax starts: on a CPU, the cores become devices
    given = config.distributed
    if given.join == "always" or given.coordinator_address or given.num_processes:
        raise ConfigError("a sweep runs in one process (--distributed): leave these flags out")
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock.hold_lock(config.run.dir, "wait until it is done, or name another --run.dir"))
        stack.enter_context(storage.failures(config.run.dir))
        folder = Folder(config.run.dir)
        folder.check(plain(config), values, flags_of(plain(config)) if command is None else command)
        groups: dict[tuple, list[Planned]] = {}
        for run in planned:
            groups.setdefault(structure(run.config), []).append(run)
        product = " x ".join(f"{name} {len(each)}" for name, each in values.items())
        finished = f", {len(folder.records)} of them finished" if folder.records else ""
        parts = "1 group" if len(groups) == 1 else f"{len(groups)} groups"
        say(f"sweep    {len(planned)} runs ({product}) in {parts}{finished}: {config.run.dir}")
        for group in groups.values():
            train_group(group, folder, config)
        shutil.rmtree(folder.path / "checkpoints", ignore_errors=True)
        metrics.optional("sweep.png", sweep_report.draw)(folder.path)
    return folder.records


def train_group(group: list[Planned], folder: Folder, config: SweepConfig) -> None:
    """Train the unfinished runs of a group, side by side or one after the other."""
    left = [run for run in group if not folder.done(run)]
    if not left:
        return
    first = left[0]
    source = open_source(first.config.data)
    resolved = training.resolve(group[0].config, source.tokenizer.vocab_size)
    folder.check_text(first, source.sha256)
    most, why = limit(resolved, config.at_once)
    if len(group) == 1:
        most, why = 1, "the only one of its group"
    if most == 1:
        say(f"alone    {len(left)} runs, one after the other: {why}")
        for run in left:
            folder.add([train_alone(run, source.sha256)], config.keep)
        return
    rounds = math.ceil(len(left) / most)
    size = math.ceil(len(left) / rounds)
    devices = min(jax.device_count(), size)
    say(f"together {len(left)} runs, {size} at once on {devices} x {jax.devices()[0].device_kind}: {why}")
    source.split(sharding.make_mesh(MeshConfig(data=1)), resolved.model.block_size)
    names = names_that_vary([run.config for run in group])
    program = Program(resolved, names, math.ceil(size / devices) * devices)
    for i in range(0, len(left), size):
        with stop_requests() as stop_request:
            records = train_side_by_side(left[i : i + size], program, source, folder, config, stop_request)
            folder.add(records, config.keep)
            if (asked := stop_request()) is not None:
                raise Stopped(asked, len(folder.records), "run")


def record_of(run: Planned, sha256: str | None, **more: Any) -> Record:
    """The record of a run."""
    about = {"run": run.number, "settings": run.settings, "seed": run.config.seed}
    return {**about, **more, "corpus_sha256": sha256, "run_dir": run.config.run.dir}


def train_alone(run: Planned, sha256: str | None) -> Record:
    """Train a run as `jaxgpt train` does, which also continues it."""
    say(f"run      {run.number}: {sweep_report.words(run.settings)}")
    diverged = None
    with contextlib.redirect_stdout(Lenient(sys.stderr)):
        try:
            training.train(run.config)
        except NonFiniteError as error:
            say(f"diverged {error}")
            diverged = error.step
    found = report.read_metrics(run.config.run.dir)
    evals = {r["step"]: [r["step"], r["train_loss"], r["val_loss"]] for r in found if r["kind"] == "eval"}
    curve = [evals[step] for step in sorted(evals)]
    final = next((r for r in reversed(found) if r["kind"] == "final"), None)
    if diverged is None:
        losses = {"step": final["step"], "val_loss": final["val_loss"], "train_loss": curve[-1][1]}
    else:
        losses = {"step": diverged, "val_loss": None, "train_loss": None}
    seconds = max((r.get("elapsed_s", 0.0) for r in found), default=0.0)
    return record_of(run, sha256, **losses, seconds=seconds, at_once=1, diverged=diverged, curve=curve)


def train_side_by_side(
    runs: list[Planned],
    program: Program,
    source: Source,
    folder: Folder,
    config: SweepConfig,
    stop_request: Callable[[], int | None],
) -> list[Record]:
    """Train some runs in one compiled step, and save those that may be kept."""
    resolved = [training.resolve(run.config, source.tokenizer.vocab_size) for run in runs]
    job = Together(resolved, program, source, say)
    # another choice of runs, or another text, must not find these checkpoints
    identity = json.dumps([[run.number for run in runs], program.lanes, program.names, source.sha256])
    checkpoints = folder.path / "checkpoints" / hashlib.sha256(identity.encode()).hexdigest()[:16]
    try:
        outcomes = job.run(checkpoints, stop_request)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemoryError(
            f"out of memory ({program.lanes} runs at once): use --at_once {max(program.lanes // 2, 1)}, or fewer"
        ) from error
    records = [
        record_of(run, source.sha256, **outcome.facts(), at_once=len(runs)) for run, outcome in zip(runs, outcomes)
    ]
    best = sweep_report.best([*folder.records, *records])
    for config_of_run, outcome, record in zip(resolved, outcomes, records):
        if outcome.diverged is None and (config.keep == "all" or (config.keep == "best" and record is best)):
            save(config_of_run, outcome, source)
        else:
            record["run_dir"] = None
    return records


def save(config: Config, outcome: Outcome, source: Source) -> None:
    """Write a finished run as an ordinary run directory."""
    shutil.rmtree(config.run.dir, ignore_errors=True)  # of an attempt that was interrupted
    mesh = sharding.make_mesh(MeshConfig(data=1))
    run = open_run(config, source.tokenizer, source.sha256)
    try:
        run.begin(outcome.state)
        start = training.start_record(config, mesh, source, outcome.state, None)
        lines = [{**start, "step": 0, "mesh_before": start["mesh"], "changed": {}}]
        lines += [{"kind": "eval", "step": s, "train_loss": t, "val_loss": v} for s, t, v in outcome.curve]
        lines += [{"kind": "final", "step": outcome.step, "val_loss": outcome.val_loss, "run_dir": config.run.dir}]
        write = metrics.JsonLines(run.folder / "metrics.jsonl")
        for line in lines:
            write({**line, **({} if line["kind"] == "start" else {"elapsed_s": outcome.seconds})})
        write.close()
        facts = {"val_loss": outcome.curve[-1][2] if outcome.curve else None, "patience": Patience()._asdict()}
        run.save(outcome.step, vars(outcome.state), **facts, mesh=start["mesh"])
    finally:
        run.close()
    metrics.optional("loss.png", report.draw_loss)(run.folder)
