"""A run directory that is trained in: opened once, it says where to continue, and saves and publishes."""

import dataclasses
import importlib.metadata
import os
import warnings
from functools import cached_property
from typing import Any

import jax
import optax
from etils import epath

from jaxgpt import config as configs
from jaxgpt import tokenizer as tokenizers
from jaxgpt.config import CONFIG, TOKENIZER, Config
from jaxgpt.devices import processes
from jaxgpt.errors import CheckpointError, JaxgptError
from jaxgpt.files import storage
from jaxgpt.runs import base, changes
from jaxgpt.runs.checkpoint import Checkpoints, CheckpointWarning
from jaxgpt.runs.loading import CHECKPOINTS, check_files, files_of, read_files, read_state, tokenizer_hashes
from jaxgpt.step import TrainState
from jaxgpt.tokenizer import Tokenizer

AVERAGE = "optim.ema_decay"
OPTIMIZER = "optim.optimizer"
RANDOM = "jax_default_prng_impl", "jax_enable_x64", "jax_threefry_partitionable"


class OtherRunError(JaxgptError, ValueError):
    """The run directory belongs to another run."""

    exit_code = 6


class RunDirectory:
    """A run directory that this process trains in.

    Attributes:
        config: the resolved configuration.
        checkpoints: its checkpoints.
        step: the step to continue from; None for a new run.
        manifest: the manifest of that step; empty for a new run.
        changed: with `run.resume changed`, the old and the new value of each setting that differs from that step's.
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
                With `run.resume changed`, only of another model or tokenizer, or if only one of both keeps an average.
            CheckpointError: `run.resume` is must and there is no checkpoint, or no checkpoint is usable.
        """
        self.config, self._tokenizer, self._corpus_sha256 = config, tokenizer, corpus_sha256
        self.checkpoints = Checkpoints(f"{config.run.dir}/{CHECKPOINTS}", config.run.keep)
        self.folder = files_of(config.run.dir)
        self._begun = False
        self.step = processes.from_first(self._step_to_continue_from)
        self.manifest = {} if self.step is None else self.checkpoints.manifest(self.step)
        self.changed = {}
        if config.run.resume == "changed" and "config" in self.manifest:
            self.changed = changes.changes(self.manifest["config"], configs.flat(config))
        if self.manifest.get("corpus_sha256") != corpus_sha256:
            self.manifest.pop("patience", None)  # losses of different texts cannot be compared

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
            run = dataclasses.replace(self.config.run, resume="auto")  # the flag is about this start, not about the run
            storage.write(self.folder / CONFIG, configs.dump(dataclasses.replace(self.config, run=run)))
            self._publish()
        self._begun = True

    def restore(self, shapes: TrainState, tx: optax.GradientTransformation) -> TrainState:
        """Read the state of `step`.

        Args:
            shapes: its shapes, dtypes and shardings.
            tx: the optimizer.

        Raises:
            CheckpointError: the checkpoint is damaged, or holds different arrays.
        """
        return read_state(self.checkpoints, self.step, shapes, tx)

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
            **tokenizer_hashes(self.folder),
            "circumstances": circumstances(),
        }
        if self._corpus_sha256 is not None:  # imported weights may be trained with any configuration
            identity["config"] = configs.flat(self.config)
        if self.config.lora.rank:
            identity["base"] = base.identity(self.config.run.dir)
        return identity

    def _step_to_continue_from(self) -> int | None:
        """Check that the directory belongs to this run, and find the step to continue from; None for a new run."""
        config, resume = self.config, self.config.run.resume
        began = (self.folder / CONFIG).is_file()
        if began and resume == "never":
            raise OtherRunError(f"there is a run already ({config.run.dir}): name another --run.dir")
        only_step_0 = began and self.checkpoints.steps() == [0]
        imported = only_step_0 and self.checkpoints.manifest(0)["corpus_sha256"] is None
        if began:
            before, tokenizer = read_files(self.folder, config.run.dir)
            settings = configs.flat(before)
            if imported:  # no optimizer has worked on it yet
                settings |= {AVERAGE: config.optim.ema_decay, OPTIMIZER: config.optim.optimizer}
            self._refuse_others(settings, tokenizer, None, free=imported or resume == "changed")
        found = self.checkpoints.newest(config.run.checkpoint_interval)
        if found is None and resume == "must":
            raise CheckpointError(f"nothing to resume ({config.run.dir}): drop --run.resume must or change --run.dir")
        if found is None:
            return None
        facts = self.checkpoints.manifest(found)
        if "config" in facts and resume != "changed":
            self._refuse_others(facts["config"], self._tokenizer, facts["corpus_sha256"], free=False)
        if began:
            check_files(self.folder, config, facts)
        _warn_of_other_circumstances(facts.get("circumstances", {}))
        return found

    def _refuse_others(self, before: dict[str, Any], tokenizer: Tokenizer, text: str | None, free: bool) -> None:
        """Refuse the run that has these settings, this tokenizer and this text, if it is another one.

        Args:
            before: its settings.
            tokenizer: its tokenizer.
            text: the hash of its text; None if it is not known.
            free: whether all may have changed but what its weights mean and which arrays its state has.
        """
        now, ours, run_dir = configs.flat(self.config), self._corpus_sha256, self.config.run.dir
        fixed = changes.model_differences(before, now)
        if bool(before.get(AVERAGE)) != bool(now[AVERAGE]):  # a state cannot gain or lose its average
            fixed.append(f"{AVERAGE} (was {before.get(AVERAGE, 0.0)}, now {now[AVERAGE]})")
        if (optimizer := before.get(OPTIMIZER, "adamw")) != now[OPTIMIZER]:  # its moments mean nothing to another one
            fixed.append(f"{OPTIMIZER} (was {optimizer}, now {now[OPTIMIZER]})")
        if not tokenizers.same(tokenizer, self._tokenizer):
            fixed.append(f"the tokenizer (its own: --data.tokenizer {run_dir}/{TOKENIZER})")
        different = fixed
        if not free:
            different = changes.differences(before, now) + [each for each in fixed if each.startswith("the tokenizer")]
            different += [] if text in (None, ours) else [f"the text itself, sha256 (was {text}, now {ours})"]
        if different:
            changed = "" if fixed else ", or continue it with these settings: --run.resume changed"
            raise OtherRunError(
                f"the run directory belongs to another run ({run_dir}; {', '.join(different)}): "
                f"name another --run.dir, or use the settings of that run{changed}"
            )


def open_run(config: Config, tokenizer: Tokenizer, corpus_sha256: str | None) -> RunDirectory:
    """Open a run directory to train in it; see `RunDirectory.__init__`."""
    return RunDirectory(config, tokenizer, corpus_sha256)


def circumstances() -> dict[str, Any]:
    """Return what affects the numbers of a run beside its settings.

    The device kinds, the number of threads and the library versions affect its last bits, and jax's own settings the
    random numbers.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = int(os.environ.get("NPROC", cores))  # counted as XLA counts them
    names = "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"
    kinds = sorted({device.device_kind for device in jax.devices()})
    versions = {name: importlib.metadata.version(name) for name in names}
    random = {name: str(getattr(jax.config, name)) for name in RANDOM}
    return {"device": ", ".join(kinds), "threads": threads, **random, "versions": versions}


def _warn_of_other_circumstances(before: dict[str, Any]) -> None:
    old, new = _flat(before), _flat(circumstances())
    changed = [f"{name} was {old[name]}, now {new[name]}" for name in new if old.get(name, new[name]) != new[name]]
    if changed:
        differ = "random numbers" if any(name in line for name in RANDOM for line in changed) else "last bits may"
        message = f"the {differ} differ from those of a run that was never interrupted ({'; '.join(changed)}): "
        message += "continue under the original circumstances if that matters"
        warnings.warn(message, CheckpointWarning, stacklevel=2)


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    versions = facts.get("versions", {})
    return {name: value for name, value in facts.items() if name != "versions"} | versions
