"""Where the weights of a model lie: in the files of transformers or nanoGPT, or on Hugging Face's hub."""

import json
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxgpt.errors import CheckpointError
from jaxgpt.interop import gpt2, hub
from jaxgpt.interop.torch_checkpoint import Tensor, TorchFile
from jaxgpt.model import GPTConfig

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # each may be in several files, which an index lists
INDEX = ".index.json"
SHARD = re.compile(r"(.*)-\d{5}-of-\d{5}(\.safetensors|\.bin)")
NANOGPT = "ckpt.pt"
Location = tuple[Callable[[Any], np.ndarray], Any]  # a function that reads a tensor, and its argument


class Weights(NamedTuple):
    """The weights of a model in its files; values are read only by `read`."""

    where: dict[str, Location]
    """By GPT-2's name of each tensor."""
    model: Callable[[int], GPTConfig]
    """Returns the configuration for a number of ids."""
    transposed: bool
    folder: pathlib.Path

    def read(self, name: str) -> np.ndarray:
        """Read the values of a tensor by GPT-2's name."""
        return _values(self.where[name])

    @property
    def rows(self) -> int:
        """The number of rows of the vocabulary, of which some may be padding."""
        return len(np.atleast_1d(self.read("wte.weight")))


def find(source: str) -> Weights:
    """Find the weights that `--from` names.

    Raises:
        CheckpointError: there are no weights of a known format.
        DownloadError: the model cannot be downloaded.
    """
    path = pathlib.Path(source)
    if not path.exists() and hub.is_name(source):
        path = hub.fetch(source)
    file = _file_in(path) if path.is_dir() else path
    if file.is_file() and file.suffix == ".pt":
        return nanogpt(file)
    if file.is_file() and file.name.removesuffix(INDEX).endswith((".safetensors", ".bin")):
        return huggingface(file)
    raise CheckpointError(
        f"no weights found (--from, {source}): name a folder with config.json and {WEIGHTS[0]}, nanoGPT's {NANOGPT}, "
        f"{', '.join(hub.PINNED)}, or OWNER/NAME@COMMIT on the hub"
    )


def huggingface(file: pathlib.Path) -> Weights:
    """Open weights that transformers saved, and the config.json beside them.

    Of two names for the same weight, the one is taken that transformers takes.

    Args:
        file: a safetensors file, a PyTorch archive, an index of several files, or one of them.

    Raises:
        CheckpointError: a file is missing, damaged, or not GPT-2's.
    """
    stored, found = _json(file.with_name("config.json")), {}
    for part in _parts(file):
        found |= _tensors(part)
    where = {gpt2.plain(name): found[name] for name in sorted(found, reverse=True)}
    tied = stored.get("tie_word_embeddings", True)
    if tied and "wte.weight" not in where and "lm_head.weight" in where:
        where["wte.weight"] = where["lm_head.weight"]
    stored["tie_word_embeddings"] = tied and not _has_a_head(where)
    return Weights(_checked(where, file), lambda ids: gpt2.to_config(stored, ids), False, file.parent)


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
        file = safe_open(path, framework="np")
        return {name: (file.get_tensor, name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"damaged safetensors ({path}, {error}): copy the file again") from None


def _state_dict(file: TorchFile, state: Any) -> dict[str, Location]:
    tensors = state.items() if isinstance(state, dict) else ()
    return {str(name): (file.read, tensor) for name, tensor in tensors if isinstance(tensor, Tensor)}


def _has_a_head(where: dict[str, Location]) -> bool:
    """Whether the head has other values than the token embedding."""
    head, embedding = where.get("lm_head.weight"), where.get("wte.weight")
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
    if "wte.weight" not in where:
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
