"""`jaxgpt export`: write the model of a run in formats that other programs read without jaxgpt."""

import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export as jax_export
from safetensors.numpy import save_file

from jaxgpt.config import ConfigError
from jaxgpt.devices.sharding import name_of
from jaxgpt.files.download import DownloadError
from jaxgpt.init import abstract
from jaxgpt.interop import gpt2, hf_tokenizer
from jaxgpt.model import GPT, GPTConfig
from jaxgpt.runs.loading import Run, Step, load
from jaxgpt.settings.checks import Path, check_fields
from jaxgpt.step import params_of

TENSORS, CONFIG, PROGRAM = "model.safetensors", "config.json", "model.stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")


@dataclasses.dataclass(frozen=True)
class ExportArgs:
    """Write the model of a run for other programs. The format hf refuses what GPT-2's format cannot represent."""

    run: Path
    """Run directory."""
    to: Path
    """Folder to create."""
    format: Literal["hf", "safetensors", "stablehlo"] = "hf"
    """hf: for transformers' GPT2LMHeadModel and AutoTokenizer. safetensors: the arrays under jaxgpt's own names.
    stablehlo: these arrays, and an exported program for cpu, cuda and tpu that needs only jax."""
    step: Step = None
    """Step of the checkpoint; by default the one with the lowest validation loss."""

    def __post_init__(self):
        check_fields(self)


def export(args: ExportArgs) -> list[str]:
    """Write the folder, completely or not at all.

    Returns:
        The names of the files.

    Raises:
        ConfigError: the folder exists and is not empty, or is not a folder of this machine.
        CheckpointError: the run cannot be loaded.
        FormatError: the format cannot represent the model.
    """
    if "://" in args.to:
        raise ConfigError(f"not a local folder (--to, {args.to}): name one, and copy its files from there")
    target = pathlib.Path(args.to).absolute()
    if target.exists() and not target.is_dir():
        raise ConfigError(f"not a folder (--to, {args.to}): name another")
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"the folder is not empty (--to, {args.to}): name another, or empty it")
    run = load(args.run, args.step)
    write = {"hf": write_huggingface, "safetensors": write_safetensors, "stablehlo": write_stablehlo}[args.format]
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        write(fresh, run)
        for path, mode in ((fresh, 0o777), *((path, 0o666) for path in fresh.iterdir())):
            path.chmod(mode & ~_umask())  # temporary files are private to this user
        os.replace(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return sorted(path.name for path in target.iterdir())


def write_huggingface(folder: pathlib.Path, run: Run) -> None:
    """Write config.json, model.safetensors and the tokenizer as transformers saves them.

    Args:
        folder: an existing folder.
        run: the run to export.

    Raises:
        FormatError: GPT-2's format cannot represent the model.
    """
    config = gpt2.from_config(run.model.config, run.tokenizer.end_of_text)
    tensors = gpt2.to_tensors(params_of(run.model), run.model.config)
    save_file(tensors, folder / TENSORS, {"format": "pt"})
    _write_json(folder / CONFIG, config)
    hf_tokenizer.write(folder, run.tokenizer, run.model.config.block_size)


def write_safetensors(folder: pathlib.Path, run: Run) -> None:
    """Write the arrays under our names, the GPTConfig as config.json, and the tokenizer.

    Args:
        folder: an existing folder.
        run: the run to export.
    """
    save_file(arrays(run.model), folder / TENSORS)
    _write_json(folder / CONFIG, dataclasses.asdict(run.model.config))
    hf_tokenizer.write(folder, run.tokenizer, run.model.config.block_size)


def write_stablehlo(folder: pathlib.Path, run: Run) -> None:
    """Write the same files, and a program of jax.export that takes the arrays and the tokens.

    The arrays stay outside the program, since constants inside it are limited to 2 GB.

    Args:
        folder: an existing folder.
        run: the run to export.

    Raises:
        DownloadError: the library to export with is not installed.
    """
    write_safetensors(folder, run)
    try:
        (folder / PROGRAM).write_bytes(program(run.model.config).serialize())
    except ImportError as error:
        raise DownloadError(
            f"no library to export with (--format stablehlo, {error}): pip install 'jaxgpt[stablehlo]'"
        ) from None


def program(config: GPTConfig) -> jax_export.Exported:
    """Export the forward pass as a program.

    Args:
        config: the model.

    Returns:
        A program of {name: array} and (B, T) int32 tokens, T at most block_size, that returns (B, T, V) float32 logits.
    """
    config = dataclasses.replace(config, attention="xla", remat="none")  # every platform supports these
    shapes = gpt2.shapes(config)
    graphdef = nnx.graphdef(abstract(config))

    def logits(arrays, tokens):
        params = jax.tree_util.tree_map_with_path(lambda path, _: arrays[name_of(path)], shapes)
        return nnx.merge(graphdef, params)(tokens)

    sizes = jax_export.symbolic_shape("b, t", constraints=[f"t <= {config.block_size}"])
    structs = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in gpt2.flat(shapes).items()}
    return jax_export.export(jax.jit(logits), platforms=PLATFORMS)(structs, jax.ShapeDtypeStruct(sizes, jnp.int32))


def arrays(model: GPT) -> dict[str, np.ndarray]:
    """Return the float32 parameters of a model by their dotted names."""
    return {name: np.ascontiguousarray(leaf) for name, leaf in gpt2.flat(params_of(model)).items()}


def _write_json(path: pathlib.Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
