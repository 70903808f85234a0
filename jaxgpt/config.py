"""The configuration: sections of frozen dataclasses, from YAML files and command-line flags.

A YAML file is turned into the same flags as the command line, so both meet the same checks.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import yaml
from etils import epath

from jaxgpt.data import DataConfig
from jaxgpt.devices.processes import DistributedConfig
from jaxgpt.devices.sharding import MeshConfig
from jaxgpt.errors import ArgumentError, CheckpointError
from jaxgpt.flags import ConfigError, check_name, fields, parse, split_flags
from jaxgpt.model import GPTConfig
from jaxgpt.optim import OptimConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long to train, and how often to look."""

    steps: int = 2000
    """Optimizer steps in all."""
    eval_interval: int = 250
    """Steps between evaluations, each with a sample."""
    eval_batches: int = 20
    """Random batches of each split that an evaluation during training averages."""
    log_interval: int = 10
    """Steps between lines of progress and records in metrics.jsonl."""
    steps_per_call: int = 10
    """Steps compiled into one call; more is faster where steps are short."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type to compute in; auto = float32 on a CPU, bfloat16 on GPU and TPU. Parameters stay float32."""
    loss_chunks: int = 1
    """Pieces of the windows in which head and loss are computed, a divisor of block_size; more = less memory."""
    profile: str | None = None
    """Folder for a trace of the second to fourth call of steps_per_call steps, which xprof opens."""
    patience: int = 0
    """Evaluations in a row without a lower validation loss after which training stops; 0 = never. The best is saved."""

    def __post_init__(self):
        for name in ("steps", "eval_interval", "eval_batches", "log_interval", "steps_per_call", "loss_chunks"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} is {getattr(self, name)}: use 1 or more")
        if self.patience < 0:
            raise ArgumentError(f"patience is {self.patience}: use 0 (never stop early) or more")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Where a run is kept, and how often."""

    dir: str = ""
    """Run directory, also on an object store (gs://...); the default is runs/<name of the config file>."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Continue the run in the directory if there is one, refuse to, or insist on it."""
    init_from: str = ""
    """Run directory to start a new run from: its best weights, its model and its tokenizer, but step 0."""
    checkpoint_interval: int = 250
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """How many of the latest checkpoints are kept; the one with the best validation loss is kept besides."""

    def __post_init__(self):
        for name in ("checkpoint_interval", "keep"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} is {getattr(self, name)}: use 1 or more")


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    seed: int = 1337
    """Decides initial weights, batches, dropout and samples."""
    model: GPTConfig = dataclasses.field(default_factory=GPTConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)


def load_config(argv: Sequence[str], cls: type = Config) -> Config:
    """The configuration that a command line means: `--config FILE` and `--section.field VALUE`. Flags win.

    Args:
        argv: the flags.
        cls: Config, or a subclass with further flags of its own.

    Raises:
        ConfigError: a name is unknown, a value has the wrong type or is out of range, or a file cannot be read.
        CheckpointError: `run.init_from` names no run directory.
    """
    flags = split_flags(argv, cls)
    path = flags.pop("config", None)
    from_file = read_file(pathlib.Path(path)) if path else {}
    values = {**from_file, **flags}
    if start := values.get("run.init_from"):
        values = {**inherited(start, values), **values}
    config = parse(cls, values, f"{path} and command line" if path else "command line")
    if not config.run.dir:
        name = pathlib.Path(path).stem if path else "default"
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=f"runs/{name}"))
    return config


def inherited(run_dir: str, values: Iterable[str]) -> dict[str, str]:
    """What a run that starts from another one's weights takes over: the model section and the tokenizer.

    Args:
        run_dir: the run with the weights.
        values: the names that are decided already. A run's own config.yaml decides all, so the other run is not needed
            to load it.
    """
    taken = {name for name in fields(Config) if name.startswith("model.")} | {"data.tokenizer"}
    if taken <= set(values):
        return {}
    file = epath.Path(run_dir) / "config.yaml"
    if not file.exists():
        raise CheckpointError(
            f"no run to start from (--run.init_from, {run_dir}): make it with "
            f"`jaxgpt import --from gpt2 --run {run_dir}`, or name another run directory"
        )
    model = {name: value for name, value in read_file(file).items() if name.startswith("model.")}
    return model | {"data.tokenizer": str(file.with_name("tokenizer.json"))}


def read_file(path: pathlib.Path, seen: tuple[pathlib.Path, ...] = ()) -> dict[str, str]:
    """The values of a YAML file by flag name, above those of the file that its `base:` names."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader) or {}  # all scalars stay text
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"no such config ({path}, {reason}): see configs/ for the recipes there are") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}" if mark else "somewhere"
        raise ConfigError(f"not YAML ({path}, {line}): write `section:` and indented `field: value` lines") from None
    if path.resolve() in seen:
        raise ConfigError(f"a config that is its own base ({path}): remove one `base:` line")
    if not isinstance(content, dict):
        raise ConfigError(f"no sections ({path}): write `section:` and indented `field: value` lines")
    values = {}
    if base := content.pop("base", None):
        values = read_file(path.parent / str(base), (*seen, path.resolve()))
    for section, entries in content.items():
        for name, value in entries.items() if isinstance(entries, dict) else [(None, entries)]:
            flag = section if name is None else f"{section}.{name}"
            check_name(flag, fields(Config), str(path))
            if not isinstance(value, str):
                raise ConfigError(f"not a single value ({path}, {flag}): write `{flag.split('.')[-1]}: value`")
            values[flag] = value
    return values


def dump(config: Config) -> str:
    """The configuration as YAML that `load_config` reads."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def flat(config: Config) -> dict[str, Any]:
    """All values by the names of their flags."""
    found = {}
    for name in fields(type(config)):
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        found[name] = value
    return found


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The fields that decide the numbers of a run and differ, as `name (was X, now Y)`.

    Args:
        before: what `flat` gave; a field that there was not yet had what is its default now.
        now: what `flat` gives.
    """
    free = {"run.", "mesh.", "distributed.", "model.attention", "model.remat", "train.loss_chunks"}
    free |= {"train.steps", "train.eval", "train.log", "train.profile", "train.patience"}
    before = {**flat(Config()), **before}
    return [
        f"{name} (was {before[name]}, now {value})"
        for name, value in now.items()
        if before[name] != value and not any(name.startswith(prefix) for prefix in free)
    ]
