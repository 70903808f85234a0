"""PyTorch's archive, read without torch."""

import argparse
import collections
import datetime
import functools
import os
import pathlib
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch_archive
from torch_archive import Stored

import jaxgpt
from jaxgpt import cli
from jaxgpt.errors import CheckpointError
from jaxgpt.interop.torch_checkpoint import TorchFile, _Unused
from jaxgpt.tokenizer import CharTokenizer


@pytest.fixture
def write(tmp_path):
    """A function that writes an archive of some content and storages."""
    return functools.partial(torch_archive.write, tmp_path / "ckpt.pt")


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


# nanoGPT's ckpt.pt

ARGS = {"block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 8, "dropout": 0.1, "bias": True, "vocab_size": 7}
SHAPES = {
    "wte.weight": (7, 8), "wpe.weight": (16, 8), "ln_f.weight": (8,), "ln_f.bias": (8,),
    "h.0.ln_1.weight": (8,), "h.0.ln_1.bias": (8,), "h.0.ln_2.weight": (8,), "h.0.ln_2.bias": (8,),
    "h.0.attn.c_attn.weight": (24, 8), "h.0.attn.c_attn.bias": (24,),
    "h.0.attn.c_proj.weight": (8, 8), "h.0.attn.c_proj.bias": (8,),
    "h.0.mlp.c_fc.weight": (32, 8), "h.0.mlp.c_fc.bias": (32,),
    "h.0.mlp.c_proj.weight": (8, 32), "h.0.mlp.c_proj.bias": (8,),
}  # fmt: skip


def nanogpt_arrays(bias=True):
    rng = np.random.default_rng(0)
    arrays = {f"transformer.{name}": rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    arrays["lm_head.weight"] = arrays["transformer.wte.weight"]
    return {name: array for name, array in arrays.items() if bias or not name.endswith(".bias")}


def import_nanogpt(tmp_path, source="ckpt.pt"):
    CharTokenizer("abcdefg").save(tmp_path / "abc.json")
    flags = [
        "--from",
        str(tmp_path / source),
        "--run",
        str(tmp_path / "run"),
        "--tokenizer",
        str(tmp_path / "abc.json"),
    ]
    return cli.main(["import", *flags])


VARIANTS = {
    "today's": ("", {}),
    "compiled": ("_orig_mod.", {}),
    "DDP": ("module.", {}),
    "compiled, DDP": ("module._orig_mod.", {}),
    "DDP, compiled": ("_orig_mod.module.", {}),
    "older, without bias": ("", {"bias": None}),
    "numbers of NumPy": ("", {"n_layer": np.int64(1), "n_embd": np.int32(8), "dropout": np.float32(0.5)}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_wrapping_of_nanogpt_s_model_is_the_same_model(variant, tmp_path):
    prefix, changes = VARIANTS[variant]
    arrays = nanogpt_arrays()
    args = {name: value for name, value in (ARGS | changes).items() if value is not None}
    named = {prefix + name: array for name, array in arrays.items()}
    torch_archive.write_nanogpt(tmp_path / "ckpt.pt", named, args)
    assert import_nanogpt(tmp_path) == 0
    model = jaxgpt.load(tmp_path / "run").model
    assert (model.config.bias, model.config.lm_head, model.config.n_layer) == ("all", "tied", 1)
    assert model.config.dropout == changes.get("dropout", np.float64(0.1))
    block = model.blocks[0]
    expected = arrays["transformer.h.0.mlp.c_fc.weight"].T
    np.testing.assert_array_equal(block.mlp.fc.kernel[...], expected)
    np.testing.assert_array_equal(block.mlp.fc.bias[...], arrays["transformer.h.0.mlp.c_fc.bias"])


def test_a_model_without_biases_is_still_one_where_the_arguments_do_not_say_so(tmp_path):
    args = {name: value for name, value in ARGS.items() if name != "bias"}
    torch_archive.write_nanogpt(tmp_path / "ckpt.pt", nanogpt_arrays(bias=False), args)
    assert import_nanogpt(tmp_path, ".") == 0  # the folder, nanoGPT's out_dir
    assert jaxgpt.load(tmp_path / "run").model.config.bias == "none"


HARMLESS = [
    pathlib.PurePosixPath("out"), pathlib.Path("out"), argparse.Namespace(lr=1e-3), {1, 2}, frozenset("ab"), 1j, b"raw",
    bytearray(b"raw"), range(3), collections.defaultdict(int, a=1), collections.Counter("aab"), collections.deque([1]),
    datetime.datetime(2024, 1, 2), datetime.timedelta(1), np.float64(1.5), np.bool_(True), np.str_("a"), np.arange(3),
    np.random.default_rng(0).bit_generator.state, np.dtype("float32"), float, slice(1, 2),
    np.datetime64("2024-01-01"), np.array(["a"], object),
]  # fmt: skip


@pytest.mark.parametrize("value", HARMLESS, ids=lambda value: type(value).__name__)
def test_a_harmless_value_is_read_as_a_number_or_as_nothing(value, write):
    (found,) = TorchFile(write([value])).content
    if isinstance(value, np.float64 | np.bool_ | bytes):
        assert found == value and type(found) in (float, bool, bytes)
    elif not isinstance(value, dict | np.dtype):
        assert isinstance(found, _Unused) or found is _Unused


def test_harmless_values_among_the_settings_are_no_obstacle(tmp_path):
    extra = {"config": {"values": HARMLESS}, "device": torch_archive.in_torch("device", "torch")}
    torch_archive.write_nanogpt(tmp_path / "ckpt.pt", nanogpt_arrays(), ARGS, **extra)
    assert import_nanogpt(tmp_path) == 0


@pytest.mark.parametrize(
    "change, says",
    [
        ({"args": {"n_layer": 2}}, "12 missing"),
        ({"args": {"n_head": 3}}, "n_head 3"),
        ({"args": {"bias": False}}, "unexpected"),
        ({"args": {"n_embd": "8"}}, "n_embd"),
        ({"extra": {"transformer.h.0.attn.rope": np.ones(4)}}, "1 unexpected: h.0.attn.rope"),
        ({"extra": {"transformer.wpe.weight": np.ones((8, 8))}}, "wpe.weight, (8, 8)"),
    ],
)
def test_what_changes_the_computation_stays_refused(change, says, tmp_path, capsys):
    arrays = nanogpt_arrays() | change.get("extra", {})
    torch_archive.write_nanogpt(tmp_path / "ckpt.pt", arrays, ARGS | change.get("args", {}))
    assert import_nanogpt(tmp_path) == 4
    assert says in capsys.readouterr().err and not (tmp_path / "run").exists()
