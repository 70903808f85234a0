"""A run directory: opened to train in, or loaded to use what was trained."""

import dataclasses
import hashlib
import importlib.metadata
import os
import pathlib
import tempfile
import warnings
from typing import Any

import jax
from etils import epath
from flax import nnx

from jaxgpt import config as configs
from jaxgpt.devices import processes
from jaxgpt.files import storage
from jaxgpt import tokenizer as tokenizers
from jaxgpt.runs.checkpoint import CheckpointError, Checkpoints, CheckpointWarning
from jaxgpt.config import Config
from jaxgpt.init import abstract
from jaxgpt.model import GPT
from jaxgpt.step import params_of
from jaxgpt.tokenizer import Tokenizer

CONFIG, TOKENIZER, CHECKPOINTS = "config.yaml", "tokenizer.json", "checkpoints"


class OtherRunError(ValueError):
    """The run directory belongs to another run."""


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
    for path in remote.iterdir() if remote.exists() else ():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def publish(run_dir: str, folder: pathlib.Path) -> None:
    """Copy the small files to the run's directory, if they are not there."""
    if "://" in run_dir:
        remote = epath.Path(run_dir)
        remote.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            (remote / path.name).write_bytes(path.read_bytes())


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
    checkpoints = Checkpoints(f"{run_dir}/{CHECKPOINTS}")
    if step is None:
        step = checkpoints.best_undamaged()
    if step is None:
        raise CheckpointError(f"no checkpoint ({run_dir}): wait for the first one, or train again")
    facts = checkpoints.manifest(step)
    _check_files(folder, config, facts)
    model = abstract(config.model)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), params_of(model))
    params = checkpoints.restore(step, {"params": like})["params"]
    checkpoints.close()
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


def facts_of(config: Config, folder: pathlib.Path, corpus_sha256: str | None) -> dict[str, Any]:
    """What a manifest says of the run that a checkpoint belongs to; `folder` has its small files."""
    return {
        "corpus_sha256": corpus_sha256,
        "tokenizer_sha256": _sha256(folder / TOKENIZER),
        "config": configs.flat(config),
        "circumstances": circumstances(),
    }


def circumstances() -> dict[str, Any]:
    """What decides the last bits of a run besides its configuration, corpus and mesh."""
    threads = os.environ.get("NPROC")  # as XLA counts those of a CPU
    if threads is None:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    names = "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"
    kinds = sorted({device.device_kind for device in jax.devices()})
    versions = {name: importlib.metadata.version(name) for name in names}
    return {"device": ", ".join(kinds), "threads": int(threads), "versions": versions}


def find_step(config: Config, tokenizer: Tokenizer, corpus_sha256: str) -> tuple[Checkpoints, int | None]:
    """Check that the run directory is this run's; all that is written there are names of damaged checkpoints.

    Returns:
        Its checkpoints, and the step to continue from (None: a new run).

    Raises:
        OtherRunError: the directory holds a run of another configuration or corpus, or `run.resume` is never.
        CheckpointError: `run.resume` is must and there is nothing to continue, or there is and it is all damaged.
    """
    checkpoints = Checkpoints(f"{config.run.dir}/{CHECKPOINTS}", config.run.keep)
    return checkpoints, processes.from_first(lambda: _find_step(config, tokenizer, corpus_sha256, checkpoints))


def _find_step(config: Config, tokenizer: Tokenizer, corpus_sha256: str, checkpoints: Checkpoints) -> int | None:
    folder, now = files_of(config.run.dir), configs.flat(config)
    began = (folder / CONFIG).is_file()
    if began and config.run.resume == "never":
        raise OtherRunError(f"there is a run already ({config.run.dir}): name another --run.dir")
    imported = began and checkpoints.steps() == [0] and checkpoints.manifest(0)["corpus_sha256"] is None
    if began:
        was, its_tokenizer = read_files(folder, config.run.dir)
        different = configs.differences(configs.flat(was), now)
        if imported:  # weights that learned nothing here yet: only the model is decided
            different = [field for field in different if field.startswith("model.")]
            different += [] if tokenizers.same(its_tokenizer, tokenizer) else ["the tokenizer"]
        _refuse(config, different)
    found = checkpoints.newest(config.run.checkpoint_interval)
    if found is None:
        if config.run.resume == "must":
            raise CheckpointError(
                f"nothing to resume ({config.run.dir}): drop --run.resume must, or name another --run.dir"
            )
        return None
    facts = checkpoints.manifest(found)
    before, text = facts.get("config", now), "the text itself, sha256"
    learned_from = corpus_sha256 if imported else facts["corpus_sha256"]
    _refuse(config, configs.differences({**before, text: learned_from}, {**now, text: corpus_sha256}))
    if began:
        _check_files(folder, config, facts)
    was, here = (_flat(each) for each in (facts.get("circumstances", {}), circumstances()))
    if other := [
        f"{name} was {was[name]}, now {here[name]}" for name in here if was.get(name, here[name]) != here[name]
    ]:
        warnings.warn(
            f"the last bits may differ from those of a run that was never stopped ({'; '.join(other)}): "
            "continue where it began if that matters",
            CheckpointWarning,
            stacklevel=2,
        )
    return found


def _refuse(config: Config, different: list[str]) -> None:
    if different:
        raise OtherRunError(
            f"the run directory is another run's ({config.run.dir}; {', '.join(different)}): "
            "name another --run.dir, or repeat that run's settings"
        )


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    versions = facts.get("versions", {})
    return {name: value for name, value in facts.items() if name != "versions"} | versions


def begin(config: Config, tokenizer: Tokenizer, resumed: int | None) -> pathlib.Path:
    """Write the small files; returns their folder. A run that goes on keeps its tokenizer.json, byte for byte."""
    folder = files_of(config.run.dir)
    if processes.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        if resumed is None or not (folder / TOKENIZER).exists():
            tokenizer.save(folder / (TOKENIZER + ".tmp"))
            storage.replace(folder / (TOKENIZER + ".tmp"), folder / TOKENIZER)
        storage.write(folder / CONFIG, configs.dump(config))
        publish(config.run.dir, folder)
    return folder
