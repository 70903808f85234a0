"""Where the weights of a model lie: in the files of transformers, nanoGPT or llama.cpp, or on Hugging Face's hub."""

import functools
import json
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxgpt.errors import CheckpointError
from jaxgpt.files import tokenizer_settings
from jaxgpt.files.screen import progress
from jaxgpt.interop import gguf_file, gpt2, hub, llama, llama_config
from jaxgpt.interop.torch_checkpoint import Tensor, TorchFile
from jaxgpt.model import GPTConfig
from jaxgpt.tokenizer import Tokenizer, from_json

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # each may be in several files, which an index lists
INDEX = ".index.json"
SHARD = re.compile(r"(.*)-\d{5}-of-\d{5}(\.safetensors|\.bin)")
NANOGPT = "ckpt.pt"
SMOLLM2 = "smollm2"
GPT2_TABLE = "wte.weight"
Location = tuple[Callable[[Any], np.ndarray], Any]  # a function that reads a tensor, and its argument


class Weights(NamedTuple):
    """The weights of a model in its files; values are read only by `read`."""

    where: dict[str, Location]
    """By GPT-2's or Llama's name of each tensor."""
    model: Callable[[int], GPTConfig]
    """Returns the configuration for a number of ids."""
    transposed: bool
    folder: pathlib.Path
    table: str = GPT2_TABLE
    """The name of the token embedding, which tells the two forms apart."""
    tokenizer: Callable[[], Tokenizer] | None = None
    """Makes the tokenizer that is in the same file; None if it has none."""

    def read(self, name: str) -> np.ndarray:
        """Read the values of a tensor by its name in `where`."""
        return _values(self.where[name])

    def params(self, model: GPTConfig, dtype: Any) -> dict[str, Any]:
        """Read all tensors, one by one, as the parameters of a model in a dtype: a nested dict of NumPy arrays."""
        with progress("read", len(self.where), "tensors", sys.stderr) as advance:

            def read(name: str) -> np.ndarray:
                advance(1)
                return self.read(name)

            if self.table == llama.TABLE:
                return llama.to_params(self.where, read, model, dtype)
            return gpt2.to_params(self.where, read, model, self.transposed, dtype)

    @property
    def rows(self) -> int:
        """The number of rows of the vocabulary, of which some may be padding."""
        return len(np.atleast_1d(self.read(self.table)))


def find(source: str) -> Weights:
    """Find the weights that `--from` names.

    Raises:
        CheckpointError: there are no weights of a known format.
        DownloadError: the model cannot be downloaded.
    """
    path = pathlib.Path(source)
    if not path.exists() and source == SMOLLM2:
        path = gguf_file.smollm2()
    elif not path.exists() and hub.is_name(source):
        path = hub.fetch(source)
    if path.is_file() and path.suffix == ".gguf":
        return gguf(path)
    file = _file_in(path) if path.is_dir() else path
    if file.is_file() and file.suffix == ".pt":
        return nanogpt(file)
    if file.is_file() and file.name.removesuffix(INDEX).endswith((".safetensors", ".bin")):
        return huggingface(file)
    raise CheckpointError(
        f"no weights found (--from, {source}): name a folder with config.json and {WEIGHTS[0]}, a .gguf file, "
        f"nanoGPT's {NANOGPT}, {SMOLLM2}, {', '.join(hub.PINNED)}, or OWNER/NAME@COMMIT on the hub"
    )


def huggingface(file: pathlib.Path) -> Weights:
    """Open weights that transformers saved, and the config.json beside them.

    Of two names for the same weight, the one is taken that transformers takes.

    Args:
        file: a safetensors file, a PyTorch archive, an index of several files, or one of them.

    Raises:
        CheckpointError: a file is missing, damaged, or of another model.
    """
    stored, found = _json(file.with_name("config.json")), {}
    for part in _parts(file):
        found |= _tensors(part)
    if stored.get("model_type", "gpt2") != "gpt2" or llama_config.is_ours(stored):
        where = {llama.plain(name): found[name] for name in sorted(found, reverse=True)}
        return _llama(where, stored, file)
    where = {gpt2.plain(name): found[name] for name in sorted(found, reverse=True)}
    tied = stored.get("tie_word_embeddings", True)
    if tied and GPT2_TABLE not in where and "lm_head.weight" in where:
        where[GPT2_TABLE] = where["lm_head.weight"]
    stored["tie_word_embeddings"] = tied and not _has_a_head(where)
    return Weights(_checked(where, file), lambda ids: gpt2.to_config(stored, ids), False, file.parent)


def gguf(path: pathlib.Path) -> Weights:
    """Open llama.cpp's file of one model, which has its configuration and tokenizer in it.

    Raises:
        CheckpointError: the file is damaged, or of another model.
        DownloadError: the library that reads it is not installed.
    """
    file = gguf_file.open_gguf(path)

    def tokenizer() -> Tokenizer:
        settings = tokenizer_settings.checked(file.tokenizer_config, str(path))
        return from_json(json.dumps(file.tokenizer, ensure_ascii=False), str(path), settings)

    where = {llama.plain(name): (file.read, name) for name in file.shapes}
    return _llama(where, file.config, path)._replace(tokenizer=tokenizer)


def _llama(where: dict[str, Location], stored: dict[str, Any], file: pathlib.Path) -> Weights:
    """The weights of a model of Llama's form, once they are seen to be what its configuration says."""
    llama_config.to_config(stored, 1)  # what it refuses is told before what the tensors contradict
    if llama.TABLE not in where:
        raise CheckpointError(f"no token embedding ({file}, {llama.TABLE}): import a folder saved by transformers")
    weights = Weights(where, lambda ids: llama_config.to_config(stored, ids), False, file.parent, llama.TABLE)
    if (rows := weights.rows) != stored.get("vocab_size", rows):
        raise CheckpointError(
            f"config.json contradicts a tensor ({file}, vocab_size {stored['vocab_size']}, {rows} rows of "
            f"{llama.TABLE}): restore the file"
        )
    if stored.get("tie_word_embeddings") and _has_a_head(where, llama.TABLE):
        raise CheckpointError(
            f"config.json contradicts the tensors ({file}, tie_word_embeddings, but {llama.HEAD} differs from "
            f"{llama.TABLE}): set it to false if the head is right, or save the model again"
        )
    return weights


def nanogpt(path: pathlib.Path) -> Weights:
    """Open nanoGPT's ckpt.pt. The activation is assumed to be nn.GELU, since the file does not name it.

    Raises:
        CheckpointError: the file is damaged, is not nanoGPT's, or holds more than tensors and plain data.

    Source: github.com/karpathy/nanoGPT, train.py and model.py.
    """
    file = TorchFile(path)
    content = file.content if isinstance(file.content, dict) else {}
    tensors, stored = _state_dict(file, content.get("model")), content.get("model_args")
    where = _checked({gpt2.plain(name): tensor for name, tensor in tensors.items()}, path)
    if not isinstance(stored, dict):
        raise CheckpointError(f"no model_args ({path}): import nanoGPT's {NANOGPT}")
    tied, bias = not _has_a_head(where), "ln_f.bias" in where
    return Weights(where, lambda ids: gpt2.nanogpt_config(stored, ids, tied, bias), True, path.parent)


def _file_in(folder: pathlib.Path) -> pathlib.Path:
    """The weights in a folder: those that transformers would take, else nanoGPT's."""
    if (folder / "config.json").is_file():
        for name in (name + end for name in WEIGHTS for end in ("", INDEX)):
            if (folder / name).is_file():
                return folder / name
        if not (folder / NANOGPT).is_file():
            raise CheckpointError(f"no weights ({folder}): put {WEIGHTS[0]} beside config.json")
    return folder / NANOGPT


def _parts(file: pathlib.Path) -> list[pathlib.Path]:
    """The files of the weights that one of their files, or their index, names."""
    shard = SHARD.fullmatch(file.name)
    index = file.with_name(shard[1] + shard[2] + INDEX) if shard else file
    if not index.name.endswith(INDEX) or not index.is_file():
        return [file]
    listed = _json(index).get("weight_map")
    names = list(listed.values()) if isinstance(listed, dict) else []
    if not names or not all(isinstance(name, str) and pathlib.PurePath(name).name == name for name in names):
        raise CheckpointError(f"not an index of weights ({index}): save the model again")
    return [file.with_name(name) for name in sorted(set(names))] if not shard or file.name in names else [file]


def _tensors(path: pathlib.Path) -> dict[str, Location]:
    """The tensors of a file, by the names that they have there."""
    if path.suffix == ".bin":
        file = TorchFile(path)
        return _state_dict(file, file.content)
    try:
        with safe_open(path, framework="np") as file:
            return {name: (functools.partial(_from_safetensors, path), name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"damaged safetensors ({path}, {error}): copy the file again") from None


def _from_safetensors(path: pathlib.Path, name: str) -> np.ndarray:
    """Read a tensor. The file is opened for each, or all that was read of it would stay in memory."""
    with safe_open(path, framework="np") as file:
        return file.get_tensor(name)


def _state_dict(file: TorchFile, state: Any) -> dict[str, Location]:
    tensors = state.items() if isinstance(state, dict) else ()
    return {str(name): (file.read, tensor) for name, tensor in tensors if isinstance(tensor, Tensor)}


def _has_a_head(where: dict[str, Location], table: str = GPT2_TABLE) -> bool:
    """Whether the head has other values than the token embedding."""
    head, embedding = where.get("lm_head.weight"), where.get(table)
    if head is None or embedding is None or head == embedding:
        return False
    return not np.array_equal(_values(head), _values(embedding))


def _values(tensor: Location) -> np.ndarray:
    function, argument = tensor
    try:
        return function(argument)
    except (AttributeError, TypeError, SafetensorError) as error:  # a type of 8 bits, which NumPy lacks
        raise CheckpointError(f"cannot read a tensor ({argument}, {error}): save the model in bfloat16") from None


def _checked(where: dict[str, Location], path: pathlib.Path) -> dict[str, Location]:
    if GPT2_TABLE not in where:
        raise CheckpointError(f"no GPT-2 weights ({path}): import nanoGPT's ckpt.pt, or a folder saved by transformers")
    return where


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(stored, dict):
            return stored
        error = "not a JSON object"
    except (OSError, ValueError, RecursionError) as caught:
        error = caught
    raise CheckpointError(f"cannot read the file ({path}, {error}): restore it") from None
