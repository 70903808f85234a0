"""A run directory: opened to train in it, or loaded to use what was trained."""

import atexit
import dataclasses
import hashlib
import importlib.metadata
import os
import pathlib
import shutil
import tempfile
import warnings
from functools import cached_property
from typing import Any

import jax
from etils import epath
from flax import nnx

from jaxgpt import config as configs
from jaxgpt import tokenizer as tokenizers
from jaxgpt.config import Config
from jaxgpt.devices import processes
from jaxgpt.errors import CheckpointError, JaxgptError
from jaxgpt.files import storage
from jaxgpt.init import abstract
from jaxgpt.model import GPT
from jaxgpt.runs.checkpoint import Checkpoints, CheckpointWarning
from jaxgpt.step import TrainState, params_of
from jaxgpt.tokenizer import Tokenizer

CONFIG, TOKENIZER, CHECKPOINTS = "config.yaml", "tokenizer.json", "checkpoints"


class OtherRunError(JaxgptError, ValueError):
    """The run directory belongs to another run."""

    exit_code = 6


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run directory holds; `model` has the float32 parameters of `step`."""

    dir: pathlib.Path
    """Of its small files, on this machine."""
    config: Config
    tokenizer: Tokenizer
    model: GPT
    step: int
    corpus_sha256: str | None
    """Of the text that it learned from; None where weights were imported and nothing was learned here."""


def files_of(run_dir: str | pathlib.Path) -> pathlib.Path:
    """The local folder of a run's small files: its directory, or a fresh copy if that is on an object store (gs://)."""
    if "://" not in str(run_dir):
        return pathlib.Path(run_dir)
    folder, remote = pathlib.Path(tempfile.mkdtemp(prefix="jaxgpt-run-")), epath.Path(run_dir)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for path in remote.iterdir() if remote.exists() else ():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def load(run_dir: str | pathlib.Path, step: int | None = None) -> Run:
    """Load a run, from its directory alone.

    Args:
        run_dir: the run directory.
        step: which checkpoint; the one with the lowest validation loss by default.

    Raises:
        CheckpointError: the directory is not a run's, or there is no such checkpoint, or it is damaged.
    """
    folder = files_of(run_dir)
    config, tokenizer = read_files(folder, str(run_dir))
    with Checkpoints(f"{run_dir}/{CHECKPOINTS}") as checkpoints:
        if step is None:
            step = checkpoints.best_undamaged()
        if step is None:
            raise CheckpointError(f"no checkpoint ({run_dir}): wait for the first one, or train again")
        facts = checkpoints.manifest(step)
        _check_files(folder, config, facts)
        model = abstract(config.model)
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), params_of(model))
        params = checkpoints.restore(step, {"params": shapes})["params"]
    return Run(folder, config, tokenizer, nnx.merge(nnx.graphdef(model), params), step, facts["corpus_sha256"])


def read_files(folder: pathlib.Path, named: str) -> tuple[Config, Tokenizer]:
    """The configuration and the tokenizer of a run directory.

    Args:
        folder: of its small files.
        named: how an error is to name it.

    Raises:
        CheckpointError: it is no run directory, or a file is damaged.
    """
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"not a run directory ({named}, no {CONFIG}): name one that `jaxgpt train` made")
    try:
        config = configs.load_config(["--config", str(folder / CONFIG)])
        return config, tokenizers.load(folder / TOKENIZER)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"damaged run directory ({named}, {error}): restore the file, or train again") from None


def _check_files(folder: pathlib.Path, config: Config, facts: dict[str, Any]) -> None:
    """The small files must be those of the checkpoint: another alphabet or activation would be wrong without a word.

    Raises:
        CheckpointError: they are not.
    """
    now = configs.flat(config)
    wrong = configs.differences(facts.get("config", now), now)
    found = _sha256(folder / TOKENIZER)
    if found != facts.get("tokenizer_sha256", found):
        wrong.append(f"{TOKENIZER} (sha256 was {facts['tokenizer_sha256']}, now {found})")
    if wrong:
        raise CheckpointError(
            f"the run directory was changed since checkpoint {facts['step']} ({folder}; {', '.join(wrong)}): "
            "restore the file, or train again"
        )


def _sha256(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class RunDirectory:
    """A run directory that this process trains in; `open_run` makes it.

    Attributes:
        config: the configuration of the run, resolved.
        checkpoints: its checkpoints.
        step: the step to continue from; None for a new run.
        manifest: what the checkpoint of that step says of itself; empty for a new run.
        folder: where its small files are on this machine.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, corpus_sha256: str | None):
        self.config, self._tokenizer, self._corpus_sha256 = config, tokenizer, corpus_sha256
        self.checkpoints = Checkpoints(f"{config.run.dir}/{CHECKPOINTS}", config.run.keep)
        self.folder = files_of(config.run.dir)
        self._begun = False
        self.step = processes.from_first(self._step_to_continue_from)
        self.manifest = {} if self.step is None else self.checkpoints.manifest(self.step)

    def begin(self, shapes: Any) -> None:
        """Check that there is room for the checkpoints, and write the small files.

        A run that continues keeps its tokenizer.json, byte for byte.

        Args:
            shapes: arrays of the state, or their descriptions.

        Raises:
            StorageError: there is too little space, or the directory cannot be written.
        """
        left = self.config.train.steps - (self.step or 0)
        saves = -(-left // self.config.run.checkpoint_interval)
        processes.from_first(lambda: self.checkpoints.check_space(shapes, saves))
        if processes.is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.step is None or not (self.folder / TOKENIZER).exists():
                self._tokenizer.save(self.folder / (TOKENIZER + ".tmp"))
                storage.replace(self.folder / (TOKENIZER + ".tmp"), self.folder / TOKENIZER)
            storage.write(self.folder / CONFIG, configs.dump(self.config))
            self._publish()
        self._begun = True

    def restore(self, shapes: TrainState) -> TrainState:
        """The state of `step`.

        Args:
            shapes: the shapes, dtypes and shardings that it is to have.

        Raises:
            CheckpointError: the checkpoint is damaged, or holds other arrays.
        """
        return TrainState(**self.checkpoints.restore(self.step, vars(shapes)))

    def save(self, step: int, state: dict[str, Any], **facts: Any) -> None:
        """Write a checkpoint in the background; the small files go with it.

        Args:
            step: the steps that the state has behind it.
            state: a dict of pytrees of arrays.
            **facts: what the manifest says besides what identifies the run, in JSON's types; `val_loss` is among it.

        Raises:
            StorageError: this checkpoint or the one before cannot be written.
        """
        if processes.is_first():
            self._publish()
            facts = {**self._identity, **facts}
        self.checkpoints.save(step, state, facts)

    def close(self) -> None:
        """Wait for the last checkpoint, and publish the small files.

        Raises:
            StorageError: one of them cannot be written.
        """
        try:
            self.checkpoints.close()
        finally:
            if processes.is_first() and self._begun:
                self._publish()

    def _publish(self) -> None:
        """Copy the small files to the run directory if that is on an object store."""
        if storage.is_remote(self.config.run.dir):
            remote = epath.Path(self.config.run.dir)
            remote.mkdir(parents=True, exist_ok=True)
            for path in self.folder.iterdir():
                (remote / path.name).write_bytes(path.read_bytes())

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What a manifest says of the run that its checkpoint belongs to."""
        identity = {
            "corpus_sha256": self._corpus_sha256,
            "tokenizer_sha256": _sha256(self.folder / TOKENIZER),
            "circumstances": circumstances(),
        }
        if self._corpus_sha256 is not None:  # imported weights may be trained with any settings
            identity["config"] = configs.flat(self.config)
        return identity

    def _step_to_continue_from(self) -> int | None:
        """Check that the directory is this run's, and find the step to continue from; None for a new run."""
        config, now = self.config, configs.flat(self.config)
        began = (self.folder / CONFIG).is_file()
        if began and config.run.resume == "never":
            raise OtherRunError(f"there is a run already ({config.run.dir}): name another --run.dir")
        imported = (
            began and self.checkpoints.steps() == [0] and self.checkpoints.manifest(0)["corpus_sha256"] is None
        )
        if began:
            before, its_tokenizer = read_files(self.folder, config.run.dir)
            different = configs.differences(configs.flat(before), now)
            if imported:  # nothing was learned here yet: only the model is decided
                different = [field for field in different if field.startswith("model.")]
                different += [] if tokenizers.same(its_tokenizer, self._tokenizer) else ["the tokenizer"]
            _refuse(config, different)
        found = self.checkpoints.newest(config.run.checkpoint_interval)
        if found is None:
            if config.run.resume == "must":
                raise CheckpointError(
                    f"nothing to resume ({config.run.dir}): drop --run.resume must, or name another --run.dir"
                )
            return None
        facts = self.checkpoints.manifest(found)
        text, sha256 = "the text itself, sha256", self._corpus_sha256
        before = facts.get("config", now) | {text: sha256 if imported else facts["corpus_sha256"]}
        _refuse(config, configs.differences(before, {**now, text: sha256}))
        if began:
            _check_files(self.folder, config, facts)
        _warn_of_other_circumstances(facts.get("circumstances", {}))
        return found


def open_run(config: Config, tokenizer: Tokenizer, corpus_sha256: str | None) -> RunDirectory:
    """Open a run directory to train in it. Writes nothing, except that damaged checkpoints are renamed.

    Args:
        config: resolved.
        tokenizer: of the text.
        corpus_sha256: of the text; None where weights are imported and nothing is learned.

    Raises:
        OtherRunError: the directory holds a run of another configuration or corpus, or `run.resume` is never.
        CheckpointError: `run.resume` is must and there is nothing to continue, or all of it is damaged.
    """
    return RunDirectory(config, tokenizer, corpus_sha256)


def _refuse(config: Config, different: list[str]) -> None:
    if different:
        raise OtherRunError(
            f"the run directory is another run's ({config.run.dir}; {', '.join(different)}): "
            "name another --run.dir, or repeat that run's settings"
        )


def circumstances() -> dict[str, Any]:
    """What decides the last bits of a run besides its configuration, corpus and mesh."""
    threads = os.environ.get("NPROC")  # as XLA counts those of a CPU
    if threads is None:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    names = "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"
    kinds = sorted({device.device_kind for device in jax.devices()})
    versions = {name: importlib.metadata.version(name) for name in names}
    return {"device": ", ".join(kinds), "threads": int(threads), "versions": versions}


def _warn_of_other_circumstances(before: dict[str, Any]) -> None:
    before, here = _flat(before), _flat(circumstances())
    if other := [
        f"{name} was {before[name]}, now {value}" for name, value in here.items() if before.get(name, value) != value
    ]:
        warnings.warn(
            f"the last bits may differ from those of a run that was never stopped ({'; '.join(other)}): "
            "continue where it began if that matters",
            CheckpointWarning,
            stacklevel=2,
        )


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    versions = facts.get("versions", {})
    return {name: value for name, value in facts.items() if name != "versions"} | versions
