"""The configuration: sections of frozen dataclasses, from YAML files and command-line flags.

A YAML file is turned into the same flags as the command line, so both meet the same checks.
"""

import contextlib
import dataclasses
import difflib
import io
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import tyro
import yaml
from etils import epath

from jaxgpt.data import DataConfig
from jaxgpt.devices.processes import DistributedConfig
from jaxgpt.devices.sharding import MeshConfig
from jaxgpt.model import GPTConfig
from jaxgpt.optim import OptimConfig
from jaxgpt.runs.checkpoint import CheckpointError, RunConfig


class ConfigError(ValueError):
    """A flag, file or value that does not fit."""


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
                raise ValueError(f"{name} is {getattr(self, name)}: use 1 or more")
        if self.patience < 0:
            raise ValueError(f"patience is {self.patience}: use 0 (never stop early) or more")


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


def fields(cls: type) -> dict[str, type]:
    """All fields of a dataclass of sections, as flags name them (`model.n_layer`), with their types."""
    found = {}
    for field in dataclasses.fields(cls):
        inner = fields(field.type) if dataclasses.is_dataclass(field.type) else {"": field.type}
        outer = field.name.rstrip("_")  # where a flag is a word of Python, such as --from
        found |= {f"{outer}.{name}".rstrip("."): kind for name, kind in inner.items()}
    return found


def load_config(argv: Sequence[str], cls: type = Config, prog: str = "jaxgpt train") -> Config:
    """The configuration of a command line: `--config FILE` and `--section.field VALUE` flags, which win over the file.

    Args:
        argv: the flags.
        cls: Config, or a subclass whose own flags the command has besides.
        prog: as `--help` names the command.

    Raises:
        ConfigError: an unknown name, a value of the wrong type or out of range, a file that cannot be read.
        CheckpointError: `run.init_from` names no run directory.
        SystemExit: after `--help`.
    """
    flags = split_flags(argv, cls)
    path = flags.pop("config", None)
    from_file = read_file(pathlib.Path(path)) if path else {}
    values = {**from_file, **flags}
    if start := values.get("run.init_from"):
        values = {**inherited(start, values), **values}
    config = parse(cls, values, prog, f"{path} and command line" if path else "command line")
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


def parse_flags(cls: type, argv: Sequence[str], prog: str) -> Any:
    """A dataclass from a command line.

    Raises:
        ConfigError: an unknown flag, or a value that does not fit.
    """
    return parse(cls, split_flags(argv, cls), prog, "command line")


def split_flags(argv: Sequence[str], cls: type) -> dict[str, str]:
    """`--name value` and `--name=value` -> {name: value}; the last one wins, and a bare switch of `cls` is true.

    Raises:
        ConfigError: something else stands on the command line.
    """
    known, flags, rest = fields(cls), {}, list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"unexpected argument (command line, {word!r}): write flags as --name VALUE")
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name != "config":
            _check_name(name, known, "command line")
        if not equals:
            bare = not rest or (rest[0].startswith("--") and known.get(name) is bool)
            if bare and known.get(name) is not bool:
                raise ConfigError(f"no value (command line, --{name}): write --{name} VALUE")
            value = "True" if bare else rest.pop(0)
        flags[name] = value
    return flags


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
            _check_name(flag, fields(Config), str(path))
            if not isinstance(value, str):
                raise ConfigError(f"not a single value ({path}, {flag}): write `{flag.split('.')[-1]}: value`")
            values[flag] = value
    return values


def _check_name(name: str, known: Iterable[str], where: str) -> None:
    if name in known:
        return
    short = {flag.split(".")[-1]: flag for flag in known}
    near = difflib.get_close_matches(name, known, 1) or difflib.get_close_matches(name.split(".")[-1], short, 1)
    remedy = f"perhaps you meant --{short.get(near[0], near[0])}" if near else "--help lists all"
    raise ConfigError(f"unknown option ({where}, {'--' if where == 'command line' else ''}{name}): {remedy}")


def parse(cls: type, values: dict[str, str], prog: str, where: str) -> Any:
    """A dataclass from the texts of its flags, with tyro's type checks.

    Raises:
        ConfigError: a value has the wrong type or is out of range; the message is one line.
    """
    spelled = {"true": "True", "false": "False", "null": "None", "": "None"}  # YAML's words in tyro's spelling
    kinds = fields(cls)
    args = []
    for name, value in values.items():
        args += [f"--{name}", value if kinds[name] is str else spelled.get(value.lower(), value)]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return run_tyro(cls, args, prog)
    except SystemExit:
        # tyro draws a box: title, line, message, line, general help
        pieces = re.split("[─-]{8,}", complaint.getvalue())
        message = " ".join(re.sub("[│╭╮╰╯]", " ", pieces[min(1, len(pieces) - 1)]).split()).rstrip(".")
        # what our own checks raise arrives as `Error parsing SECTION: WHAT: REMEDY`
        if ours := re.fullmatch(r"Error parsing (\w+): (.*?): (.*)", message):
            raise ConfigError(f"{ours[2]} ({where}, {ours[1]}): {ours[3]}") from None
        raise ConfigError(f"{message.removeprefix('Error parsing ')} ({where}): see `{prog} --help`") from None


def run_tyro(cls: type, args: Sequence[str], prog: str) -> Any:
    """tyro with our flag style: underscores, and `--flag True` for switches."""
    return tyro.cli(cls, args=args, prog=prog, use_underscores=True, config=(tyro.conf.FlagConversionOff,))


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
