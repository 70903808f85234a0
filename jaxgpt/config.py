"""The configuration: sections of frozen dataclasses, filled from recipes and command-line flags.

A recipe is a YAML file. It is read as the same flags as on the command line, so both go through the same checks.
"""

import dataclasses
import difflib
import math
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import yaml
from etils import epath

from jaxgpt.data import DataConfig
from jaxgpt.devices.processes import DistributedConfig
from jaxgpt.devices.sharding import MeshConfig
from jaxgpt.errors import ArgumentError, CheckpointError
from jaxgpt.files import storage
from jaxgpt.layers import LoRAConfig
from jaxgpt.model import GPTConfig
from jaxgpt.optim import OptimConfig
from jaxgpt.settings.checks import Path, check_fields, check_seed
from jaxgpt.settings.flags import ConfigError, check_name, fields, parse, split_flags
from jaxgpt.settings.numbers import number

CONFIG, TOKENIZER = "config.yaml", "tokenizer.json"  # in a run directory


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length of training, intervals of evaluation and logging, and speed and memory settings."""

    steps: int = 2000
    """Total number of optimizer steps."""
    eval_interval: int = 250
    """Steps between loss estimates, each with a text sample."""
    eval_batches: int = 20
    """Random batches per split in each loss estimate during training."""
    log_interval: int = 10
    """Steps between progress lines, and between train records in metrics.jsonl; the first step has one, too."""
    sample_tokens: int = 300
    """Tokens of the text sample after each loss estimate and at the end; 0 = no samples."""
    steps_per_call: int = 10
    """Steps per compiled call; more is faster when steps are short."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; auto = float32 on CPU, bfloat16 on GPU and TPU. Parameters stay float32."""
    loss_chunks: int = 1
    """Pieces in which the logits and losses of a window are computed, a divisor of block_size; more = less memory."""
    deterministic: bool = False
    """Make sums on a GPU repeatable to the last bit, which is slower; sums on a CPU always are."""
    profile: Path | None = None
    """Folder for an xprof trace of the second to fourth compiled call (of steps_per_call steps)."""
    patience: int = 0
    """Stop after this many estimates in a row without a lower val loss; 0 = never stop. The best step is saved."""

    def __post_init__(self):
        check_fields(self)
        for name in ("steps", "eval_interval", "eval_batches", "log_interval", "steps_per_call", "loss_chunks"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} is {getattr(self, name)}: use 1 or more")
        for name, meaning in (("patience", "never stop early"), ("sample_tokens", "no samples")):
            if getattr(self, name) < 0:
                raise ArgumentError(f"{name} is {getattr(self, name)}: use 0 ({meaning}) or more")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Run directory and checkpoints."""

    dir: Path = ""
    """Run directory, on disk or in an object store (gs://...); the default is runs/<name of the recipe>."""
    resume: Literal["auto", "never", "must", "changed"] = "auto"
    """Continue the run in the directory: auto = if there is one; never = refuse if there is one; must = refuse if
    there is none; changed = if there is one, with the settings of this command where they differ."""
    init_from: Path = ""
    """Run directory whose best weights, model settings and tokenizer a new run starts from, at step 0."""
    checkpoint_interval: int = 250
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Number of latest checkpoints to keep; the one with the lowest val loss is also kept."""
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """Write the records of metrics.jsonl for TensorBoard as well, into the run directory, or to Weights & Biases."""
    peak_tflops: float = 0.0
    """Peak TFLOP/s of a device, of which MFU is a part; 0 = from a table, and measured on a CPU."""

    def __post_init__(self):
        check_fields(self)
        for name in ("checkpoint_interval", "keep"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} is {getattr(self, name)}: use 1 or more")
        if not 0 <= self.peak_tflops < math.inf:
            raise ArgumentError(f"peak_tflops is {self.peak_tflops}: use a number above 0, or 0 for the table's")


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run."""

    FOLDER: ClassVar[str] = "runs"  # of the default run directory

    seed: int = number(1337)
    """Random seed of the initial weights, batches, dropout and samples, from 0 to 2^32 - 1."""
    model: GPTConfig = dataclasses.field(default_factory=GPTConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)

    def __post_init__(self):
        check_fields(self)
        check_seed(self.seed)
        if self.lora.rank and self.optim.optimizer == "muon":
            raise ArgumentError(f"optimizer muon with lora.rank {self.lora.rank}: AdamW trains adapters, use adamw")
        if self.lora.rank and not self.model.n_layer:
            raise ArgumentError(f"n_layer 0 with lora.rank {self.lora.rank}: adapters need a model with blocks")


def load_config(argv: Sequence[str], cls: type = Config) -> Config:
    """Load the configuration that a command line describes; its flags override the recipe.

    Args:
        argv: `--config` with a file or the name of a recipe, and `--section.field VALUE` flags.
        cls: Config, or a subclass with additional flags.

    Returns:
        An instance of `cls`.

    Raises:
        ConfigError: a name is unknown, a value has the wrong type or is out of range, or a file cannot be read.
        CheckpointError: `run.init_from` is not a run directory.
    """
    if isinstance(argv, str):
        raise ConfigError(f"the command line is one text ({argv!r}): pass a list of words, such as ['--seed', '1']")
    flags = split_flags(argv, cls)
    recipe = flags.pop("config", None)
    path, name = find_recipe(recipe) if recipe else (None, "default")
    values = read_file(path) if path else {}
    if path and path.name == CONFIG and (path.parent / TOKENIZER).is_file():
        values["run.dir"] = str(path.parent)  # a run is where its files are now
    values |= flags
    if start := values.get("run.init_from"):
        values = {**inherited(start, values), **values}
    config = parse(cls, values, f"{path} and command line" if path else "command line")
    if not config.run.dir:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=f"{cls.FOLDER}/{name}"))
    return config


def recipes() -> dict[str, pathlib.Path]:
    """The recipes that ship with the package: the file of each name, such as `lecture/bigram`."""
    installed = pathlib.Path(__file__).parent / "configs"
    folder = installed if installed.is_dir() else installed.parent.with_name("configs")  # in a clone
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in sorted(folder.rglob("*.yaml"))}


def find_recipe(named: str) -> tuple[pathlib.Path, str]:
    """Find what `--config` names.

    Args:
        named: a file, or the name of a recipe that ships with the package.

    Returns:
        The file, and the name of the recipe: its path below a folder `configs`, elsewhere the name of the file.

    Raises:
        ConfigError: there is no such file and no such recipe.
    """
    path, known = pathlib.Path(os.path.expanduser(named)), recipes()
    if path.is_file():
        # the parts of the path after its last folder `configs`
        inner = path.parts[len(path.parts) - path.parts[::-1].index("configs") :] if "configs" in path.parts else ()
        return path, pathlib.PurePath(*(inner or (path.name,))).with_suffix("").as_posix()
    if named in known:
        return known[named], named
    near = difflib.get_close_matches(path.stem, [name.rpartition("/")[2] for name in known], 1)
    near = sorted((name for name in known if near and name.endswith(near[0])), key=len)
    meant = f"perhaps you meant {near[0]}; " if near else ""
    raise ConfigError(f"no such config (--config, {named}): {meant}`jaxgpt train` lists the recipes")


def inherited(run_dir: str, values: Iterable[str]) -> dict[str, str]:
    """Read the settings that a run inherits from the run whose weights it starts from: the model and the tokenizer.

    Args:
        run_dir: the run that has the weights.
        values: names of the settings that are given already. The config.yaml of a run gives all of them, so a run can
            continue without `run_dir`.

    Returns:
        The inherited values by flag name; empty if all of them are given.

    Raises:
        ConfigError: the config.yaml of the run cannot be read.
        CheckpointError: `run_dir` is not a run directory.
    """
    names = {name for name in fields(Config) if name.startswith("model.")} | {"data.tokenizer"}
    if names <= set(values):
        return {}
    storage.check_store(run_dir)
    file = epath.Path(os.path.expanduser(run_dir)) / CONFIG
    if not file.exists():
        raise CheckpointError(
            f"no run to start from (--run.init_from, {run_dir}): make it with "
            f"`jaxgpt import --from gpt2 --run {run_dir}`, or name another run directory"
        )
    model = {name: value for name, value in read_file(file).items() if name.startswith("model.")}
    return model | {"data.tokenizer": str(file.with_name(TOKENIZER))}


def read_file(path: pathlib.Path, seen: tuple[pathlib.Path, ...] = ()) -> dict[str, str]:
    """Read a recipe; its values override those of the recipe that its `base:` names.

    Args:
        path: the YAML file.
        seen: the recipes that led to this one through `base:`.

    Returns:
        The text of each value by flag name.

    Raises:
        ConfigError: the file cannot be read, is not a recipe, or is its own base.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader) or {}
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"no such config ({path}, {reason}): see configs/ for the available recipes") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}" if mark else "somewhere"
        if isinstance(error, _DuplicateKeyError):
            raise ConfigError(f"duplicate key ({path}, {line}, {error.problem}): remove one of the two") from None
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


class _DuplicateKeyError(yaml.MarkedYAMLError):
    """A mapping has a key twice."""


class _Loader(yaml.BaseLoader):
    """A loader that leaves scalars as text, and refuses duplicate keys, of which YAML silently drops the first."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise _DuplicateKeyError(problem=key.value, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def dump(config: Config) -> str:
    """Write a configuration as YAML.

    Args:
        config: the configuration.

    Returns:
        YAML that `load_config` reads back.
    """
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def flat(config: Config) -> dict[str, Any]:
    """Flatten a configuration.

    Args:
        config: the configuration, or an instance of a subclass.

    Returns:
        Each value by flag name.
    """
    values = {}
    for name in fields(type(config)):
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        values[name] = value
    return values
