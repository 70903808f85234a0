"""`jaxgpt export`: write the model of a run in formats that other programs read without jaxgpt."""

import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any, Literal

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
from jaxgpt.interop import gpt2, hf_tokenizer, llama, llama_config, page, peft
from jaxgpt.model import GPT, GPTConfig
from jaxgpt.runs.loading import Run, Step, load
from jaxgpt.settings.checks import Path, check_fields
from jaxgpt.step import params_of

TENSORS, CONFIG, PROGRAM = "model.safetensors", "config.json", "model.stablehlo"
GENERATION = "generation_config.json"
PLATFORMS = ("cpu", "cuda", "tpu")


@dataclasses.dataclass(frozen=True)
class ExportArgs:
    """Write the model of a run for other programs. The format hf refuses what the formats of GPT-2, Llama, Mistral,
    Qwen2 and Qwen3 cannot represent."""

    run: Path
    """Run directory."""
    to: Path
    """Folder to create; with format html, FILE.html."""
    format: Literal["hf", "peft", "safetensors", "stablehlo", "html"] = "hf"
    """hf: for transformers' AutoModelForCausalLM and AutoTokenizer. peft: the adapters of a LoRA run, for the library
    peft. safetensors: the arrays under jaxgpt's own names. stablehlo: these arrays, and an exported program for cpu,
    cuda and tpu that needs only jax. html: a page that runs the model in any browser, offline."""
    step: Step = None
    """Step of the checkpoint; by default the one with the lowest validation loss."""
    dtype: page.Dtype = "float32"
    """Type of the weights in a page; float16 halves its size (format html)."""

    def __post_init__(self):
        check_fields(self)


def export(args: ExportArgs) -> list[str]:
    """Write the folder or the page, completely or not at all.

    Returns:
        The names of the files.

    Raises:
        ConfigError: the folder exists and is not empty, or is not a folder of this machine; the page exists.
        CheckpointError: the run cannot be loaded.
        FormatError: the format cannot represent the model.
        PageError: the page cannot run the model.
    """
    if args.format == "html":
        return [_export_page(args)]
    if args.dtype != "float32":
        raise ConfigError(f"only pages have another type (--dtype, {args.dtype}): add --format html, or leave it out")
    if "://" in args.to:
        raise ConfigError(f"not a local folder (--to, {args.to}): name one, and copy its files from there")
    target = pathlib.Path(args.to).absolute()
    if target.exists() and not target.is_dir():
        raise ConfigError(f"not a folder (--to, {args.to}): name another")
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"the folder is not empty (--to, {args.to}): name another, or empty it")
    run = load(args.run, args.step)
    writers = {"hf": write_huggingface, "peft": peft.write}
    writers |= {"safetensors": write_safetensors, "stablehlo": write_stablehlo}
    write = writers[args.format]
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


def _export_page(args: ExportArgs) -> str:
    """Write the page, completely or not at all; return its name."""
    target = pathlib.Path(args.to).absolute()
    if "://" in args.to or target.suffix.lower() != ".html":
        raise ConfigError(f"not an HTML file of this machine (--to, {args.to}): name a FILE.html")
    if target.exists():
        raise ConfigError(f"the file exists (--to, {args.to}): name another, or delete it")
    run = load(args.run, args.step)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        fresh = pathlib.Path(folder) / target.name
        page.write(fresh, run, args.dtype)
        os.replace(fresh, target)
    return target.name


def write_huggingface(folder: pathlib.Path, run: Run) -> None:
    """Write config.json, model.safetensors and the tokenizer as transformers saves them.

    Args:
        folder: an existing folder.
        run: the run to export.

    Raises:
        FormatError: none of the formats can represent the model.
    """
    model, tokenizer, params = run.model.config, run.tokenizer, params_of(run.model)
    dtype = run.model.token_embedding_table.embedding.dtype
    if model.positions == "rope":
        config = llama_config.from_config(model, dtype, tokenizer.ends, tokenizer.bos)
        tensors = llama.to_tensors(params, model)
        _write_json(folder / GENERATION, {name: config[name] for name in ("bos_token_id", "eos_token_id")})
    else:
        config = gpt2.from_config(model, tokenizer.end_of_text, dtype)
        tensors = gpt2.to_tensors(params, model)
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
        exported = program(run.model.config, run.model.token_embedding_table.embedding.dtype)
        (folder / PROGRAM).write_bytes(exported.serialize())
    except ImportError as error:
        raise DownloadError(
            f"no library to export with (--format stablehlo, {error}): pip install 'jaxgpt[stablehlo]'"
        ) from None


def program(config: GPTConfig, dtype: Any = jnp.float32) -> jax_export.Exported:
    """Export the forward pass as a program.

    Args:
        config: the model.
        dtype: of its parameters.

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
    structs = {name: jax.ShapeDtypeStruct(leaf.shape, dtype) for name, leaf in gpt2.flat(shapes).items()}
    return jax_export.export(jax.jit(logits), platforms=PLATFORMS)(structs, jax.ShapeDtypeStruct(sizes, jnp.int32))


def arrays(model: GPT) -> dict[str, np.ndarray]:
    """Return the parameters of a model by their dotted names."""
    return {name: np.ascontiguousarray(leaf) for name, leaf in gpt2.flat(params_of(model)).items()}


def _write_json(path: pathlib.Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
