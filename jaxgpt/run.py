"""A run directory: opened to train in, or loaded to use what was trained."""

import dataclasses
import pathlib
import tempfile

import jax
from etils import epath
from flax import nnx

from jaxgpt import config as configs
from jaxgpt import distributed
from jaxgpt import tokenizer as tokenizers
from jaxgpt.checkpoint import CheckpointError, Checkpoints
from jaxgpt.config import Config
from jaxgpt.model import GPT
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
        CheckpointError: the directory is not a run's, or there is no such checkpoint.
    """
    folder = files_of(run_dir)
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"not a run directory ({run_dir}, no {CONFIG}): name one that `jaxgpt train` made")
    config, tokenizer = read_files(folder)
    checkpoints = Checkpoints(f"{run_dir}/{CHECKPOINTS}")
    if step is None:
        step = checkpoints.best()
    if step is None:
        raise CheckpointError(f"no checkpoint ({run_dir}): wait for the first one, or train again")
    abstract = nnx.eval_shape(lambda: GPT(config.model, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), nnx.to_pure_dict(state))
    params = checkpoints.restore(step, {"params": like})["params"]
    checkpoints.close()
    model, sha256 = nnx.merge(graphdef, params), checkpoints.manifest(step)["corpus_sha256"]
    return Run(folder, config, tokenizer, model, step, sha256)


def read_files(run_dir: pathlib.Path) -> tuple[Config, Tokenizer]:
    """The configuration and the tokenizer of a run directory.

    Raises:
        CheckpointError: a file is damaged.
    """
    try:
        config = configs.load_config(["--config", str(run_dir / CONFIG)])
        return config, tokenizers.load(run_dir / TOKENIZER)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"damaged run directory ({run_dir}, {error}): restore the file, or train again") from None


def open_to_train(
    config: Config, tokenizer: Tokenizer, corpus_sha256: str
) -> tuple[pathlib.Path, Checkpoints, int | None]:
    """Make the run directory, or check that it is this run's.

    Returns:
        The folder of its small files, its checkpoints, and the step to continue from (None: a new run).

    Raises:
        OtherRunError: the directory holds a run of another configuration or corpus, or `run.resume` is never.
        CheckpointError: `run.resume` is must, and there is nothing to continue.
    """
    folder = files_of(config.run.dir)
    checkpoints = Checkpoints(f"{config.run.dir}/{CHECKPOINTS}", config.run.keep)
    latest = max(checkpoints.steps(), default=None)
    if latest is None and config.run.resume == "must":
        raise CheckpointError(
            f"nothing to resume ({config.run.dir}): drop --run.resume must, or name another --run.dir"
        )
    if (folder / CONFIG).is_file():
        if config.run.resume == "never":
            raise OtherRunError(f"there is a run already ({config.run.dir}): name another --run.dir")
        was, its_tokenizer = read_files(folder)
        different = configs.differences(was, config)
        learned_from = corpus_sha256 if latest is None else checkpoints.manifest(latest)["corpus_sha256"]
        if learned_from is None:  # imported weights, that learned nothing here yet: only the model is decided
            different = [field for field in different if field.startswith("model.")]
            different += [] if tokenizers.same(its_tokenizer, tokenizer) else ["the tokenizer"]
        elif learned_from != corpus_sha256:
            different.append("the text itself")
        if different:
            raise OtherRunError(
                f"the run directory is another run's ({config.run.dir}; {', '.join(different)}): "
                "name another --run.dir, or repeat that run's settings"
            )
    distributed.meet("the run directory is checked")
    if distributed.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder / TOKENIZER)
        (folder / CONFIG).write_text(configs.dump(config), encoding="utf-8")
        publish(config.run.dir, folder)
    return folder, checkpoints, latest
