"""PyTorch's archive, written here byte by byte: torch itself need not be installed."""

import collections
import pickle
import sys
import types
import zipfile
from unittest import mock

import numpy as np

FAKE = {name: types.ModuleType(name) for name in ("torch", "torch._utils")}
KINDS = {
    name: type(name, (), {"__module__": "torch"})
    for name in ("FloatStorage", "HalfStorage", "BFloat16Storage", "LongStorage")
}
vars(FAKE["torch"]).update(KINDS)


class Stored:
    """Pickled as PyTorch pickles a tensor: a call of _rebuild_tensor_v2 with a persistent id."""

    def __init__(self, kind, key, shape, strides, offset=0):
        self.kind, self.key, self.args = kind, key, (offset, shape, strides, False, collections.OrderedDict())


class Storage:
    def __init__(self, stored):
        self.stored = stored


def in_torch(name, module="torch._utils"):
    """A function that is pickled as one of torch's, by its name."""

    def function():
        raise AssertionError

    function.__module__, function.__qualname__ = module, name
    setattr(FAKE[module], name, function)
    return function


REBUILD = in_torch("_rebuild_tensor_v2")


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        if isinstance(value, Storage):
            return ("storage", KINDS[value.stored.kind], value.stored.key, "cuda:0", 0)
        return None

    def reducer_override(self, value):
        if isinstance(value, Stored):
            return REBUILD, (Storage(value), *value.args)
        return NotImplemented


def write(path, content, storages=(), folder="archive", byteorder=b"little"):
    """Write an archive of some content, and of the arrays behind its tensors."""
    with mock.patch.dict(sys.modules, FAKE), zipfile.ZipFile(path, "w") as archive:
        with archive.open(f"{folder}/data.pkl", "w") as file:
            Pickler(file, protocol=2).dump(content)
        archive.writestr(f"{folder}/byteorder", byteorder)
        for key, values in dict(storages).items():
            archive.writestr(f"{folder}/data/{key}", values.tobytes())
    return path


def tensors(arrays):
    """Tensors of these float32 arrays, and the storages behind them; the same array twice is one storage."""
    storages = {str(id(array)): array for array in arrays.values()}
    found = {
        name: Stored("FloatStorage", str(id(a)), a.shape, tuple(s // 4 for s in a.strides))
        for name, a in arrays.items()
    }
    return collections.OrderedDict(found), storages


def write_state_dict(path, arrays):
    """Write a pytorch_model.bin."""
    return write(path, *tensors(arrays))


def write_nanogpt(path, arrays, args, **others):
    """Write nanoGPT's ckpt.pt from the arrays of its state_dict and its model_args."""
    model, storages = tensors({name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()})
    return write(path, {"model": model, "model_args": args, "iter_num": 1, **others}, storages)
