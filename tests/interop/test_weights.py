"""Which file is read, and which of two weights in it."""

import functools
import json

import gpt2_folder
import numpy as np
import pytest
import torch_archive
from gpt2_folder import SHAPES
from safetensors.numpy import save_file

from jaxgpt.errors import CheckpointError
from jaxgpt.interop import gpt2, weights


@pytest.fixture
def hf(tmp_path):
    """A function that writes a GPT-2 folder of 7 ids, with changes, and returns it and its tensors."""
    return functools.partial(gpt2_folder.write, tmp_path / "hf")


SAFETENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PART, PICKLED_PART = "model-00001-of-00002.safetensors", "pytorch_model-00001-of-00002.bin"
EVERYTHING = (SAFETENSORS, INDEX, PICKLED, PICKLED_INDEX, "ckpt.pt", "step_1000.safetensors", "other.bin", "other.pt")


@pytest.mark.parametrize(
    "there, named, used",
    [
        # the file that is named
        *[(EVERYTHING, name, name) for name in EVERYTHING],
        ((SAFETENSORS, INDEX), PART, INDEX),  # it is one of those that the index lists
        # in a folder, the first of these, as in transformers; nanoGPT's where there are no others
        *[(EVERYTHING[i:], ".", EVERYTHING[i]) for i in range(5)],
        (("step_1000.safetensors", PICKLED), ".", PICKLED),
        # none
        (("step_1000.safetensors", "other.bin", "other.pt"), ".", None),
        (EVERYTHING, "missing.safetensors", None),
        (EVERYTHING, "config.json", None),
        (EVERYTHING, "tokenizer.json", None),
    ],
)
def test_the_file_that_is_named_is_used_and_in_a_folder_the_one_that_transformers_takes(hf, there, named, used):
    folder, tensors = hf()
    for file in folder.glob("*.safetensors"):
        file.unlink()
    for i, name in enumerate(there):
        values = {key: np.full_like(value, i + 1) for key, value in tensors.items()}
        if name.endswith(".index.json"):
            parts = (
                (PART, PART.replace("1-", "2-")) if name == INDEX else (PICKLED_PART, PICKLED_PART.replace("1-", "2-"))
            )
            where = {key: parts[key == "transformer.wte.weight"] for key in values}
            (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": where}))
            for part in parts:
                put(folder / part, {key: value for key, value in values.items() if where[key] == part})
        else:
            put(folder / name, values)
    if used is None:
        with pytest.raises(CheckpointError, match="no weights"):
            weights.find(str(folder / named))
        return
    found = weights.find(str(folder / named))
    assert {float(found.read(name).max()) for name in found.where} == {there.index(used) + 1.0}
    assert {float(found.read(name).min()) for name in found.where} == {there.index(used) + 1.0}
    assert len(found.where) == len(SHAPES) and found.folder == folder


def put(path, values):
    if path.suffix == ".safetensors":
        save_file(values, path)
    elif path.suffix == ".pt":
        torch_archive.write_nanogpt(path, values, {"n_layer": 1})
    else:
        torch_archive.write_state_dict(path, values)


HEAD, TABLE = "lm_head.weight", "transformer.wte.weight"
PLAIN = {name.removeprefix("transformer."): name for name in SHAPES}


@pytest.mark.parametrize("tie", [True, False, None])
@pytest.mark.parametrize("names", ["both", "both equal", "head only", "table only", "prefixed and plain"])
def test_of_two_weights_the_one_is_used_that_transformers_uses(hf, names, tie):
    """What transformers 5.24 was seen to take; `test_gpt2.py` compares."""
    folder, tensors = hf({} if tie is None else {"tie_word_embeddings": tie})
    table, head = tensors[TABLE], tensors[TABLE] + 1
    stored = {
        "both": tensors | {HEAD: head},
        "both equal": tensors | {HEAD: table.copy()},
        "head only": {name: value for name, value in tensors.items() if name != TABLE} | {HEAD: head},
        "table only": tensors,
        "prefixed and plain": tensors | {plain: tensors[name] + 2 for plain, name in PLAIN.items()},
    }[names]
    save_file(stored, folder / "model.safetensors")
    if names == "head only" and tie is False:
        with pytest.raises(CheckpointError, match="no GPT-2 weights"):
            weights.find(str(folder))
        return
    found = weights.find(str(folder))
    tied = tie is not False and names != "both"
    assert found.model(7).lm_head == ("tied" if tied else "linear")
    np.testing.assert_array_equal(found.read("wte.weight"), head if names == "head only" else table)
    if not tied and names not in ("table only", "prefixed and plain"):
        np.testing.assert_array_equal(found.read(HEAD), stored[HEAD])
    for plain, name in PLAIN.items():
        wins = 2 if names == "prefixed and plain" and plain < "transformer" else 0
        if name != TABLE:
            np.testing.assert_array_equal(found.read(plain), tensors[name] + wins)


@pytest.mark.parametrize(
    "index", ["[]", "{", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "[" * 100_000,
              '{"weight_map": {"a": "../model.safetensors"}}', '{"weight_map": {"a": "gone.safetensors"}}']
)  # fmt: skip
def test_an_index_that_leads_nowhere_is_refused(hf, tmp_path, index):
    folder, _ = hf()
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    (folder / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=r"\(.*(index.json|gone).*\): "):
        weights.find(str(folder))


def test_a_type_that_numpy_lacks_is_refused(hf):
    folder, _ = hf()
    data = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = {
        name: tensor | {"dtype": "F8_E4M3", "shape": [*tensor["shape"][:-1], 4 * tensor["shape"][-1]]}
        for name, tensor in json.loads(data[8 : 8 + size]).items()
    }
    header = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    with pytest.raises(CheckpointError, match="save the model in bfloat16"):
        weights.find(str(folder)).read("wte.weight")


@pytest.mark.parametrize("attention", [0.0, 0.1, 0.3])
def test_the_dropout_of_attention_comes_in_and_goes_out_as_gpt2_stores_it(attention):
    stored = {"model_type": "gpt2", "resid_pdrop": 0.1, "attn_pdrop": attention, "embd_pdrop": 0.1}
    config = gpt2.to_config(stored, 50)
    assert (config.dropout, config.attention_rate) == (0.1, attention)
    assert (config.attention_dropout is None) == (attention == 0.1)
    assert {name: gpt2.from_config(config, None)[name] for name in stored} == stored
