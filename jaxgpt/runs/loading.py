"""A run after training: its configuration, its tokenizer and its model, loaded from the run directory."""

import atexit
import dataclasses
import hashlib
import os
import pathlib
import shutil
import tempfile
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from etils import epath
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxgpt import config as configs
from jaxgpt import tokenizer as tokenizers
from jaxgpt.config import CONFIG, TOKENIZER, Config
from jaxgpt.devices import chips
from jaxgpt.errors import ArgumentError, CheckpointError, shortened
from jaxgpt.files import storage, tokenizer_settings
from jaxgpt.init import abstract, state_of
from jaxgpt.layers import LoRAConfig, merged
from jaxgpt.model import GPT, GPTConfig
from jaxgpt.optim import OptimConfig, optimizer
from jaxgpt.runs import base, changes
from jaxgpt.runs.checkpoint import Checkpoints
from jaxgpt.step import TrainState, params_of, trained_of
from jaxgpt.tokenizer import Tokenizer

CHECKPOINTS = "checkpoints"
TOKENIZER_FILES = {"tokenizer_sha256": TOKENIZER, "tokenizer_config_sha256": tokenizer_settings.FILE}
Step = int | Literal["last"] | None
"""Which checkpoint to load: the one of a step, the last one, or the one with the lowest validation loss."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A loaded run; `model` has the parameters of `step`, or their average (`optim.ema_decay`): float32, or bfloat16 if
    they were imported so."""

    dir: pathlib.Path
    """Local folder of its small files."""
    config: Config
    tokenizer: Tokenizer
    model: GPT
    step: int
    corpus_sha256: str | None
    """Hash of the text that it was trained on; None if its weights were imported and not trained here."""

    def __reduce__(self):
        """Pickle the arrays in place of the model, whose activation functions cannot be pickled."""
        params = jax.device_get(params_of(self.model))
        return _unpickled, (self.dir, self.config, self.tokenizer, params, self.step, self.corpus_sha256)


def _unpickled(folder, config, tokenizer, params, step, corpus_sha256) -> Run:
    params = jax.tree.map(jnp.asarray, params)
    return Run(folder, config, tokenizer, model_of(config.model, params), step, corpus_sha256)


def model_of(config: GPTConfig, params: dict[str, Any]) -> GPT:
    """Return the model with these parameters, a nested dict of arrays."""
    return nnx.merge(nnx.graphdef(abstract(config)), params)


def computed_here(run: Run) -> Run:
    """Return a run with its weights in the dtype in which this machine computes them.

    That is the run's compute dtype on a GPU or TPU, where attention kernels and memory ask for bfloat16, and float32 on
    a CPU, where XLA takes 13 times as long for a product of one row in bfloat16.
    """
    on_cpu = jax.default_backend() == "cpu"
    dtype = "float32" if on_cpu else chips.compute_dtype(run.config.train.dtype)
    return dataclasses.replace(run, model=jax.tree.map(lambda a: a.astype(dtype), run.model))


def files_of(run_dir: str | os.PathLike) -> pathlib.Path:
    """Return a local folder with the small files of a run (all but checkpoints/); for an object store, it is a copy."""
    storage.check_store(run_dir)
    if not storage.is_remote(run_dir):
        return pathlib.Path(run_dir)
    folder, remote = pathlib.Path(tempfile.mkdtemp(prefix="jaxgpt-run-")), epath.Path(run_dir)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for path in remote.iterdir() if remote.exists() else ():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def load(run_dir: str | os.PathLike, step: Step = None) -> Run:
    """Load a run from its directory. The run may be training at the same time.

    Args:
        run_dir: the run directory.
        step: step of the checkpoint, or `last`; by default the one with the lowest validation loss.

    Raises:
        ArgumentError: an argument has another type.
        CheckpointError: this is not a run directory, or the checkpoint is missing or damaged.
    """
    if not isinstance(run_dir, str | os.PathLike) or not (step == "last" or isinstance(step, int | None)):
        given = shortened(f"{run_dir!r}, step {step!r}")
        remedy = "pass a path, and a whole number, 'last' or None"
        raise ArgumentError(f"not a run directory and a step ({given}): {remedy}")
    run_dir = os.path.expanduser(run_dir)
    folder = files_of(run_dir)
    config, tokenizer = read_files(folder, run_dir)
    params = params_of(abstract(config.model))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), params)

    def read(step: int) -> Run:
        facts = checkpoints.manifest(step)
        check_files(folder, config, facts)
        params = read_weights(checkpoints, step, as_kept(checkpoints, step, shapes))
        return Run(folder, config, tokenizer, model_of(config.model, params), step, facts["corpus_sha256"])

    with Checkpoints(f"{run_dir}/{CHECKPOINTS}") as checkpoints:
        run = read(step) if isinstance(step, int) else checkpoints.read_best(read, last=step == "last")
    if run is None:
        raise CheckpointError(f"no checkpoint ({run_dir}): wait for the first one, or train again")
    return run


def read_weights(checkpoints: Checkpoints, step: int, shapes: dict[str, Any]) -> dict[str, Any]:
    """Read the weights that a run is used with: their average if the run keeps one, with adapters merged into them.

    Args:
        checkpoints: the run's.
        step: a valid step.
        shapes: shapes, dtypes and shardings of the parameters; with adapters, the dtypes are those of the base.

    Raises:
        CheckpointError: the step does not exist, is damaged, or holds different arrays; or the base is not usable.
    """
    facts = checkpoints.manifest(step)
    if "base" not in facts:
        return _read_trained(checkpoints, step, shapes)
    place = jax.tree.leaves(shapes)[0].sharding
    if isinstance(place, NamedSharding):
        place = NamedSharding(place.mesh, PartitionSpec())
    lora, adapters = read_adapters(checkpoints, step, place)
    return merged(read_base(checkpoints.directory.parent, facts["base"], shapes), adapters, lora)


def read_adapters(
    checkpoints: Checkpoints, step: int, place: jax.sharding.Sharding
) -> tuple[LoRAConfig, dict[str, Any]]:
    """Read the adapters of a LoRA run, or their average if the run keeps one.

    Args:
        checkpoints: the run's.
        step: a valid step.
        place: where the arrays are to be.

    Returns:
        The settings of LoRA, and a nested dict of float32 arrays.

    Raises:
        CheckpointError: the step does not exist, is damaged, or holds different arrays.
    """
    settings = checkpoints.manifest(step)["config"]
    model, lora = _section(GPTConfig, "model.", settings), _section(LoRAConfig, "lora.", settings)
    shapes = trained_of(abstract(model, lora))
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), shapes)
    return lora, _read_trained(checkpoints, step, shapes)


def read_base(run_dir: str | os.PathLike, named: dict[str, Any], shapes: dict[str, Any]) -> dict[str, Any]:
    """Read the frozen weights of a LoRA run, in the dtypes in which its base has them.

    Args:
        run_dir: the run directory.
        named: the base by its hash, from a manifest or `base.identity`.
        shapes: shapes and shardings of the parameters. A longer position table is cut to the first rows.

    Raises:
        CheckpointError: the base is missing, damaged, another one, or of another model.
    """
    with Checkpoints(f"{run_dir}/{base.BASE}") as checkpoints:
        base.verify(checkpoints, named)
        kept = as_kept(checkpoints, named["step"], shapes)
        frozen = _read_trained(checkpoints, named["step"], base.uncut(checkpoints, named["step"], kept))
    return jax.tree.map(lambda p, like: p if p.shape == like.shape else p[: like.shape[0]], frozen, shapes)


def _read_trained(checkpoints: Checkpoints, step: int, shapes: dict[str, Any]) -> dict[str, Any]:
    """The parameters that a step has, or their average if the run keeps one."""
    settings = checkpoints.manifest(step).get("config", {})  # imported weights have none
    if not settings.get("optim.ema_decay"):
        params = checkpoints.restore(step, {"params": as_kept(checkpoints, step, shapes)})["params"]
        return jax.tree.map(lambda p, like: p.astype(like.dtype), params, shapes)
    config = _section(OptimConfig, "optim.", settings)
    unread = jax.tree.map(lambda _: None, jax.eval_shape(optimizer(config).init, shapes))
    restored = checkpoints.restore(step, {"opt_state": optax.tree.set(unread, average=shapes)})
    return optax.tree.get(restored["opt_state"], "average")


def as_kept(checkpoints: Checkpoints, step: int, shapes: dict[str, Any]) -> dict[str, Any]:
    """Return the shapes with the dtypes that the parameters of a checkpoint have: bfloat16, if they were imported so.

    Args:
        checkpoints: the run's.
        step: a valid step.
        shapes: shapes, dtypes and shardings of the parameters.
    """
    stored = checkpoints.manifest(step)["arrays"]

    def kept(path, like):
        name = "['params']" + jax.tree_util.keystr(path)
        dtype = jnp.bfloat16 if stored.get(name, "").startswith("bfloat16[") else like.dtype
        return jax.ShapeDtypeStruct(like.shape, dtype, sharding=like.sharding)

    return jax.tree_util.tree_map_with_path(kept, shapes)


def _section(cls: type, prefix: str, settings: dict[str, Any]) -> Any:
    return cls(**{name.removeprefix(prefix): value for name, value in settings.items() if name.startswith(prefix)})


def read_state(checkpoints: Checkpoints, step: int, shapes: TrainState, tx: optax.GradientTransformation) -> TrainState:
    """Read the state to continue from. Imported weights come without what the optimizer `tx` knows of them.

    Args:
        checkpoints: the run's.
        step: a valid step.
        shapes: shapes, dtypes and shardings of the state.
        tx: the optimizer.

    Raises:
        CheckpointError: the step does not exist, is damaged, or holds different arrays.
    """
    if checkpoints.manifest(step)["corpus_sha256"] is None:
        return state_of(_read_trained(checkpoints, step, shapes.params), tx)
    return TrainState(**checkpoints.restore(step, vars(shapes)))


def read_files(folder: pathlib.Path, run_dir: str, flag: str = "") -> tuple[Config, Tokenizer]:
    """Read the configuration and the tokenizer of a run.

    Args:
        folder: local folder of its small files.
        run_dir: the run directory.
        flag: the flag that names it, for error messages.

    Raises:
        CheckpointError: this is not a run directory, or a file is damaged or cannot be read.
    """
    named = f"{flag}, {run_dir}" if flag else run_dir
    try:
        if not (folder / CONFIG).is_file():
            raise CheckpointError(f"not a run directory ({named}, no {CONFIG}): name one that `jaxgpt train` made")
        for name in (CONFIG, TOKENIZER):
            (folder / name).open("rb").close()
        config = configs.load_config(["--config", str(folder / CONFIG), f"--run.dir={run_dir}"])
        return config, tokenizers.load(folder / TOKENIZER)
    except OSError as error:
        file = pathlib.Path(error.filename or folder).name
        raise CheckpointError(f"cannot read the run directory ({named}, {file}, {error.strerror}): fix that") from None
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"damaged run directory ({named}, {error}): restore the file, or train again") from None


def check_files(folder: pathlib.Path, config: Config, facts: dict[str, Any]) -> None:
    """Refuse small files that do not fit a checkpoint: another alphabet would go unnoticed and give wrong text.

    Args:
        folder: local folder of the small files.
        config: from its config.yaml.
        facts: the manifest of the checkpoint.

    Raises:
        CheckpointError: the model's settings or the tokenizer are not those of the checkpoint.
    """
    now = configs.flat(config)
    wrong = changes.model_differences(facts.get("config", now), now)
    then = tokenizer_hashes(folder) | {name: facts[name] for name in TOKENIZER_FILES if name in facts}
    for name, found in tokenizer_hashes(folder).items():
        if found != then[name]:
            wrong.append(f"{TOKENIZER_FILES[name]} (sha256 was {then[name]}, now {found})")
    if wrong:
        raise CheckpointError(
            f"the run directory was changed since checkpoint {facts['step']} ({folder}; {', '.join(wrong)}): "
            "restore the file, or train again"
        )


def tokenizer_hashes(folder: pathlib.Path) -> dict[str, str | None]:
    """Return the hex digests of the files of a run's tokenizer, by the manifest's names; None if there is no file."""
    paths = {name: folder / file for name, file in TOKENIZER_FILES.items()}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None for name, path in paths.items()
    }
