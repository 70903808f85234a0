"""A run directory: open it to train in it, or load it to use the trained model."""

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
    """A loaded run; `model` has the float32 parameters of `step`."""

    dir: pathlib.Path
    """Local folder of its small files."""
    config: Config
    tokenizer: Tokenizer
    model: GPT
    step: int
    corpus_sha256: str | None
    """Hash of the text that it was trained on; None if its weights were imported and not trained here."""


def files_of(run_dir: str | pathlib.Path) -> pathlib.Path:
    """Return a local folder with the small files of a run (all but checkpoints/); for an object store, it is a copy."""
    if "://" not in str(run_dir):
        return pathlib.Path(run_dir)
    folder, remote = pathlib.Path(tempfile.mkdtemp(prefix="jaxgpt-run-")), epath.Path(run_dir)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for path in remote.iterdir() if remote.exists() else ():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def load(run_dir: str | pathlib.Path, step: int | None = None) -> Run:
    """Load a run from its directory.

    Args:
        run_dir: the run directory.
        step: step of the checkpoint; by default the one with the lowest validation loss.

    Raises:
        CheckpointError: this is not a run directory, or the checkpoint is missing or damaged.
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
    """Read the configuration and the tokenizer of a run.

    Args:
        folder: local folder of its small files.
        named: the name of the run directory in error messages.

    Raises:
        CheckpointError: this is not a run directory, or a file is damaged.
    """
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"not a run directory ({named}, no {CONFIG}): name one that `jaxgpt train` made")
    try:
        config = configs.load_config(["--config", str(folder / CONFIG)])
        return config, tokenizers.load(folder / TOKENIZER)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"damaged run directory ({named}, {error}): restore the file, or train again") from None


def _check_files(folder: pathlib.Path, config: Config, facts: dict[str, Any]) -> None:
    """Refuse small files that changed since the checkpoint: another alphabet would go unnoticed and give wrong text."""
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
    """A run directory that this process trains in.

    Attributes:
        config: the resolved configuration.
        checkpoints: its checkpoints.
        step: the step to continue from; None for a new run.
        manifest: the manifest of that step; empty for a new run.
        folder: local folder of its small files.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, corpus_sha256: str | None):
        """Open a run directory. Writes nothing, except that damaged checkpoints are renamed.

        Args:
            config: the resolved configuration.
            tokenizer: the tokenizer of the text.
            corpus_sha256: hash of the text; None if weights are imported and not trained here.

        Raises:
            OtherRunError: the directory belongs to a run of another configuration or text, or `run.resume` is never.
            CheckpointError: `run.resume` is must and there is no checkpoint, or no checkpoint is usable.
        """
        self.config, self._tokenizer, self._corpus_sha256 = config, tokenizer, corpus_sha256
        self.checkpoints = Checkpoints(f"{config.run.dir}/{CHECKPOINTS}", config.run.keep)
        self.folder = files_of(config.run.dir)
        self._begun = False
        self.step = processes.from_first(self._step_to_continue_from)
        self.manifest = {} if self.step is None else self.checkpoints.manifest(self.step)

    def begin(self, shapes: Any) -> None:
        """Check that there is room for the checkpoints, and write the configuration and, in a new run, the tokenizer.

        Args:
            shapes: the state, as arrays or `ShapeDtypeStruct`s.

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
        """Read the state of `step`, with the shapes, dtypes and shardings of `shapes`.

        Raises:
            CheckpointError: the checkpoint is damaged, or holds different arrays.
        """
        return TrainState(**self.checkpoints.restore(self.step, vars(shapes)))

    def save(self, step: int, state: dict[str, Any], **facts: Any) -> None:
        """Write a checkpoint in the background, and publish the small files.

        Args:
            step: number of optimizer steps that led to the state.
            state: a dict of pytrees of arrays.
            **facts: further entries of the manifest, as JSON types, including `val_loss`.

        Raises:
            StorageError: this checkpoint or the previous one cannot be written.
        """
        if processes.is_first():
            self._publish()
            facts = {**self._identity, **facts}
        self.checkpoints.save(step, state, facts)

    def close(self) -> None:
        """Wait for the last checkpoint, and publish the small files.

        Raises:
            StorageError: a file cannot be written.
        """
        try:
            self.checkpoints.close()
        finally:
            if processes.is_first() and self._begun:
                self._publish()

    def _publish(self) -> None:
        """Copy the small files to the run directory if it is on an object store."""
        if storage.is_remote(self.config.run.dir):
            remote = epath.Path(self.config.run.dir)
            remote.mkdir(parents=True, exist_ok=True)
            for path in self.folder.iterdir():
                (remote / path.name).write_bytes(path.read_bytes())

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """The entries of a manifest that identify the run."""
        identity = {
            "corpus_sha256": self._corpus_sha256,
            "tokenizer_sha256": _sha256(self.folder / TOKENIZER),
            "circumstances": circumstances(),
        }
        if self._corpus_sha256 is not None:  # imported weights may be trained with any configuration
            identity["config"] = configs.flat(self.config)
        return identity

    def _step_to_continue_from(self) -> int | None:
        """Check that the directory belongs to this run, and find the step to continue from; None for a new run."""
        config, now = self.config, configs.flat(self.config)
        began = (self.folder / CONFIG).is_file()
        if began and config.run.resume == "never":
            raise OtherRunError(f"there is a run already ({config.run.dir}): name another --run.dir")
        only_step_0 = began and self.checkpoints.steps() == [0]
        imported = only_step_0 and self.checkpoints.manifest(0)["corpus_sha256"] is None
        if began:
            before, its_tokenizer = read_files(self.folder, config.run.dir)
            different = configs.differences(configs.flat(before), now)
            if imported:  # not trained here yet, so only the model and the tokenizer are fixed
                different = [field for field in different if field.startswith("model.")]
                different += [] if tokenizers.same(its_tokenizer, self._tokenizer) else ["the tokenizer"]
            _refuse(config, different)
        found = self.checkpoints.newest(config.run.checkpoint_interval)
        if found is None and config.run.resume == "must":
            raise CheckpointError(f"nothing to resume ({config.run.dir}): drop --run.resume must or change --run.dir")
        if found is None:
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
    """Open a run directory to train in it; see `RunDirectory.__init__`."""
    return RunDirectory(config, tokenizer, corpus_sha256)


def _refuse(config: Config, different: list[str]) -> None:
    if different:
        raise OtherRunError(
            f"the run directory belongs to another run ({config.run.dir}; {', '.join(different)}): "
            "name another --run.dir, or use the configuration of that run"
        )


def circumstances() -> dict[str, Any]:
    """Return the device kinds, the number of threads and the library versions: they affect the last bits of a run."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = int(os.environ.get("NPROC", cores))  # counted as XLA counts them
    names = "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"
    kinds = sorted({device.device_kind for device in jax.devices()})
    versions = {name: importlib.metadata.version(name) for name in names}
    return {"device": ", ".join(kinds), "threads": threads, "versions": versions}


def _warn_of_other_circumstances(before: dict[str, Any]) -> None:
    old, new = _flat(before), _flat(circumstances())
    changed = [f"{name} was {old[name]}, now {new[name]}" for name in new if old.get(name, new[name]) != new[name]]
    if changed:
        message = f"the last bits may differ from those of a run that was never interrupted ({'; '.join(changed)}): "
        message += "continue under the original circumstances if that matters"
        warnings.warn(message, CheckpointWarning, stacklevel=2)


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    versions = facts.get("versions", {})
    return {name: value for name, value in facts.items() if name != "versions"} | versions
