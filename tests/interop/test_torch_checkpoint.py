"""PyTorch's archive, written here byte by byte: torch itself need not be installed."""

import collections
import os
import pickle
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest

from jaxgpt.errors import CheckpointError
from jaxgpt.interop.torch_checkpoint import TorchFile


class Stored:
    """Pickled as PyTorch pickles a tensor: a call of _rebuild_tensor_v2 with a persistent id."""

    def __init__(self, kind, key, shape, strides, offset=0):
        self.kind, self.key, self.args = kind, key, (offset, shape, strides, False, collections.OrderedDict())


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes an archive of some content and storages."""
    fake = {name: types.ModuleType(name) for name in ("torch", "torch._utils")}
    kinds = {}
    for name in ("FloatStorage", "HalfStorage", "BFloat16Storage", "LongStorage"):
        kinds[name] = type(name, (), {"__module__": "torch"})
        setattr(fake["torch"], name, kinds[name])

    def _rebuild_tensor_v2():
        raise AssertionError

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    fake["torch._utils"]._rebuild_tensor_v2 = _rebuild_tensor_v2

    class Storage:
        def __init__(self, stored):
            self.stored = stored

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if isinstance(value, Storage):
                return ("storage", kinds[value.stored.kind], value.stored.key, "cuda:0", 0)
            return None

        def reducer_override(self, value):
            if isinstance(value, Stored):
                return _rebuild_tensor_v2, (Storage(value), *value.args)
            return NotImplemented

    def write(content, storages=(), folder="archive", byteorder=b"little"):
        path = tmp_path / "ckpt.pt"
        with monkeypatch.context() as patch:
            for name, module in fake.items():
                patch.setitem(sys.modules, name, module)
            with zipfile.ZipFile(path, "w") as archive:
                with archive.open(f"{folder}/data.pkl", "w") as file:
                    Pickler(file, protocol=2).dump(content)
                archive.writestr(f"{folder}/byteorder", byteorder)
                for key, values in dict(storages).items():
                    archive.writestr(f"{folder}/data/{key}", values.tobytes())
        return path

    return write


def test_tensors_of_every_kind_come_back_with_their_shape_and_order(write):
    values = {"FloatStorage": np.float32, "HalfStorage": np.float16, "BFloat16Storage": ml_dtypes.bfloat16}
    values["LongStorage"] = np.int64
    storages = {str(i): np.arange(12).astype(dtype) for i, dtype in enumerate(values.values())}
    tensors = {name: Stored(name, str(i), (2, 3), (3, 1), offset=4) for i, name in enumerate(values)}
    tensors["transposed"] = Stored("FloatStorage", "0", (3, 2), (1, 3))
    tensors["scalar"] = Stored("FloatStorage", "0", (), (), offset=5)
    file = TorchFile(write({"model": collections.OrderedDict(tensors), "sizes": {"bias": False}}, storages, "ckpt"))
    for name, dtype in values.items():
        found = file.read(file.content["model"][name])
        assert found.dtype == dtype
        np.testing.assert_array_equal(found.astype(int), [[4, 5, 6], [7, 8, 9]])
    np.testing.assert_array_equal(file.read(file.content["model"]["transposed"]), [[0, 3], [1, 4], [2, 5]])
    assert file.read(file.content["model"]["scalar"]) == 5
    assert file.content["sizes"] == {"bias": False}


class Evil:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "function, name",
    [(os.mkdir, f"{os.mkdir.__module__}.mkdir"), (eval, "__builtin__.eval"), (getattr, "__builtin__.getattr")],
)
def test_a_call_hidden_in_the_file_is_refused_by_its_name_and_never_made(write, tmp_path, function, name):
    target = tmp_path / "made"
    args = {"mkdir": (str(target),), "eval": (f"__import__('os').mkdir({str(target)!r})",), "getattr": ("", "upper")}
    path = write({"model": Evil(function, *args[function.__name__])})
    with pytest.raises(CheckpointError, match=f"refused to run code .*{name}.*save only tensors"):
        TorchFile(path)
    assert not target.exists()
    with zipfile.ZipFile(path) as archive:  # the same file does make the folder where a pickle is trusted
        pickle.loads(archive.read("archive/data.pkl"))
    assert target.exists() == (function is not getattr)


def test_other_files_are_refused_with_the_remedy(write, tmp_path):
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"model": 1}))
    with pytest.raises(CheckpointError, match=r"not PyTorch's zip archive .*old.pt.*weights_only=True"):
        TorchFile(tmp_path / "old.pt")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a.txt", "")
    with pytest.raises(CheckpointError, match=r"0 data.pkl"):
        TorchFile(tmp_path / "other.zip")
    with pytest.raises(CheckpointError, match="big-endian"):
        TorchFile(write({}, byteorder=b"big"))
    path = write({})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02garbage")
    with pytest.raises(CheckpointError, match=r"damaged file .*copy it again"):
        TorchFile(path)


@pytest.mark.parametrize(
    "shape, strides, offset", [((5,), (1,), 0), ((2,), (1,), 3), ((2,), (1,), -1), ((2,), (9,), 0), ((2,), (-1,), 0)]
)
def test_a_tensor_that_reaches_outside_its_storage_is_refused(write, shape, strides, offset):
    file = TorchFile(write([Stored("FloatStorage", "0", shape, strides, offset)], {"0": np.zeros(4, np.float32)}))
    with pytest.raises(CheckpointError, match="damaged file"):
        file.read(file.content[0])


def test_a_missing_or_changed_storage_is_damage(write):
    tensor = Stored("FloatStorage", "0", (4,), (1,))
    file = TorchFile(write([tensor]))
    with pytest.raises(CheckpointError, match="damaged file"):
        file.read(file.content[0])
    path = write([tensor], {"0": np.full(4, 7, np.float32)})
    data = path.read_bytes()
    at = data.index(np.full(4, 7, np.float32).tobytes())
    path.write_bytes(data[:at] + b"\x01" + data[at + 1 :])
    file = TorchFile(path)
    with pytest.raises(CheckpointError, match="damaged file"):
        file.read(file.content[0])
