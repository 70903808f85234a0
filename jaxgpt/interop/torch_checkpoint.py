"""A reader for PyTorch's files that needs no PyTorch and runs no code from them.

`torch.save` writes a zip archive: one pickle of the whole object, and the bytes of each tensor beside it. A pickle may
name any function to call. This reader accepts the few names that tensors and numbers need, and turns tensors into
descriptions. A few other names of harmless values, such as a path among the settings, become stand-ins that do nothing.
Any other name is refused before anything is called.
"""

import collections
import io
import math
import pathlib
import pickle
import re
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxgpt.errors import CheckpointError

STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class Tensor(NamedTuple):
    """A description of a tensor, to be read by `TorchFile.read`. Offset and strides count elements."""

    dtype: np.dtype
    storage: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _describe(storage, offset, shape, strides, *_) -> Tensor:
    """A replacement for torch._utils._rebuild_tensor_v2."""
    return Tensor(*storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


class _NumberType:
    """A replacement for numpy.dtype, of which only numbers are understood."""

    def __init__(self, name: str, *_):
        self.name, self.order = name, "="

    def __setstate__(self, state):
        self.order = state[1]


def _number(kind: _NumberType, data: bytes) -> Any:
    """A replacement for NumPy's function that makes a scalar."""
    dtype = kind.order + kind.name
    return np.frombuffer(data, dtype)[0].item() if re.fullmatch("[<>=|](b1|[iu][1248]|f[248])", dtype) else _Unused()


class _Unused:
    """A stand-in for a harmless value that no model needs. It takes any arguments and content, and forgets them."""

    def __init__(self, *_, **__):
        pass

    __setstate__ = __setitem__ = append = extend = add = __init__


KNOWN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _describe,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    **{("torch", name): np.dtype(dtype) for name, dtype in STORAGES.items()},
    ("_codecs", "encode"): lambda text, *_: text.encode("latin1"),  # how older pickles hold bytes
    ("numpy", "dtype"): _NumberType,
    **{(f"numpy.{core}.multiarray", "scalar"): _number for core in ("core", "_core")},
}
HARMLESS = {
    **dict.fromkeys(
        ("builtins", "__builtin__"),
        "bool bytearray complex dict float frozenset int list long range set slice str tuple unicode xrange",
    ),
    "argparse": "Namespace",
    "collections": "Counter defaultdict deque",
    "datetime": "date datetime time timedelta timezone",
    "numpy": "ndarray",
    **dict.fromkeys(("numpy.core.multiarray", "numpy._core.multiarray"), "_reconstruct"),
    **dict.fromkeys(("pathlib", "pathlib._local"), "Path PosixPath PurePosixPath PureWindowsPath WindowsPath"),
    "torch": "Size bfloat16 bool device float16 float32 float64 int16 int32 int64 int8 uint8",
    "types": "SimpleNamespace",
}


class _Refused(pickle.UnpicklingError):
    """The pickle names something that tensors do not need."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if name in HARMLESS.get(module, "").split():
            return _Unused
        if (module, name) not in KNOWN:
            raise _Refused(f"{module}.{name}")
        return KNOWN[module, name]

    def persistent_load(self, saved):
        _, dtype, key, *_ = saved  # "storage", type, file name, device, length
        return dtype, str(key)


def unpickle(file, path: str | pathlib.Path) -> Any:
    """Read a pickle of plain data and tensors.

    Args:
        file: a binary file.
        path: the name of the file in error messages.

    Returns:
        The plain data, with a `Tensor` in place of each tensor.

    Raises:
        CheckpointError: the pickle is damaged, or holds more than tensors, plain data and `HARMLESS` values.
    """
    try:
        return _Unpickler(file).load()
    except _Refused as error:
        raise CheckpointError(
            f"refused to run code from the file ({path}, {error}): save only tensors, numbers and strings"
        ) from None
    except Exception as error:  # a damaged pickle can raise any exception
        raise CheckpointError(f"damaged file ({path}, {_said(error)}): copy it again") from None


class TorchFile:
    """A file that `torch.save` wrote; `content` is plain data, with a `Tensor` in place of each tensor."""

    def __init__(self, path: str | pathlib.Path):
        """Open a file.

        Raises:
            CheckpointError: the file is no such archive, is damaged, or holds more than tensors and plain data.
        """
        self.path = path
        remedy = "rewrite it with a recent PyTorch: torch.save(torch.load(FILE, weights_only=True), FILE)"
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except zipfile.BadZipFile:
            raise CheckpointError(f"not PyTorch's zip archive ({path}): {remedy}") from None
        except OSError as error:
            raise CheckpointError(f"cannot read the file ({path}, {error.strerror}): restore it") from None
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(f"not PyTorch's zip archive ({path}, {len(pickles)} data.pkl): {remedy}")
        self._folder = pickles[0].removesuffix("data.pkl")
        if self._folder + "byteorder" in names and self._bytes("byteorder") != b"little":
            raise CheckpointError(f"written on a big-endian machine ({path}): save it again on a little-endian one")
        self.content = unpickle(io.BytesIO(self._bytes("data.pkl")), path)

    def read(self, tensor: Tensor) -> np.ndarray:
        """Read the values of a tensor of `content`, as a read-only array.

        Raises:
            CheckpointError: the archive does not hold the values.
        """
        data, size = self._bytes(f"data/{tensor.storage}"), tensor.dtype.itemsize
        if not math.prod(tensor.shape):
            return np.empty(tensor.shape, tensor.dtype)
        strides = [size * stride for stride in tensor.strides]
        try:
            return np.ndarray(tensor.shape, tensor.dtype, data, size * tensor.offset, strides)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"damaged file ({self.path}, {_said(error)}): copy it again") from None

    def _bytes(self, name: str) -> bytes:
        try:
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(self._folder + name)
        except (KeyError, zipfile.BadZipFile, OSError) as error:
            raise CheckpointError(f"damaged file ({self.path}, {_said(error)}): copy it again") from None


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
