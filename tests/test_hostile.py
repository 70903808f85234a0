"""What strangers send: files, flags and prompts that are wrong in any way end in one line and an exit code."""

import collections
import copy
import functools
import hashlib
import json
import pathlib
import pickle
import re
import tempfile

import numpy as np
import pytest
import yaml
from etils import epath
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jaxgpt import config, sampling
from jaxgpt import tokenizer as tokenizers
from jaxgpt.interop import gpt2, torch_checkpoint, weights
from jaxgpt.runs import manifest
from jaxgpt.tools import failures

CHARACTERS = tokenizers.CharTokenizer("abc\n")
BYTES = tokenizers.BPETokenizer.train(["the king of the night"], 265)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
known = st.sampled_from(sorted(config.fields(config.Config)))
sections = st.sampled_from(["seed", "model", "data", "optim", "train", "mesh", "run", "base", "distributed"])
names = st.sampled_from(sorted(name.split(".")[-1] for name in config.fields(config.Config))) | st.text(max_size=6)


def in_words(function, *arguments, code):
    """The result of a call, or its error as the command line tells it: one line and one of these exit codes."""
    try:
        return function(*arguments)
    except Exception as error:
        found, message = failures.describe(error)
        assert found in code, (found, message)
        assert message and not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", message)
        return None


FOLDER = tempfile.TemporaryDirectory()  # for one example after the other


def written(content, name="file"):
    """The path of a file with this text or these bytes."""
    path = pathlib.Path(FOLDER.name) / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(sections, trees | st.dictionaries(names, scalars, max_size=3), max_size=3) | trees | st.binary())
@example({"model": {"n_layer": "!!python/object/apply:os.system ['exit 1']"}})
@example({"seed": {"\n\x1b[2J": None}})
def test_config_files(content):
    text = content if isinstance(content, bytes) else yaml.safe_dump(content, allow_unicode=True)
    found = in_words(config.load_config, ["--config", str(written(text, "c.yaml"))], code={2})
    assert found is None or config.load_config(["--config", str(written(config.dump(found), "c.yaml"))]) == found


@settings(max_examples=300, deadline=None)
@given(st.lists(known.map("--{}".format) | st.text(max_size=10) | scalars.map(str), max_size=4))
def test_flags(words):
    words = [word for word in words if word not in ("--help", "-h")]
    found = in_words(config.load_config, words, code={2, 4} if "--run.init_from" in words else {2})
    assert found is None or all(word.startswith("--") for word in words[:1])


@settings(max_examples=400, deadline=None)
@given(trees | st.dictionaries(st.sampled_from(["kind", "type", "alphabet", "model", "vocab", "merges"]), trees))
@example({"kind": "char", "alphabet": "aa"})
@example({"alphabet": ["a", "b"]})
def test_tokenizer_files(content):
    found = in_words(tokenizers.load, written(json.dumps(content), "tokenizer.json"), code={2})
    assert found is None or found.vocab_size > 0


BPE = json.loads(BYTES._tokenizer.to_str())


def places(tree, path=()):
    """The path of each value in a tree of dicts and lists, except of the 265 in a vocabulary."""
    if path and path[-1] == "vocab":
        return [path]
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(found for key, value in inner for found in places(value, (*path, key)))]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(places(BPE)[1:]), trees | st.sampled_from([*BPE["model"]["vocab"], 2**32 - 1, -1]))
@example(("model", "vocab"), BPE["model"]["vocab"] | {"far": 2**32 - 1})
@example(("added_tokens", 0, "content"), "")
def test_tokenizer_files_with_one_wrong_value(place, value):
    form = copy.deepcopy(BPE)
    functools.reduce(lambda tree, key: tree[key], place[:-1], form)[place[-1]] = value
    found = in_words(tokenizers.load, written(json.dumps(form), "tokenizer.json"), code={2})
    if found is not None:
        ids = found.encode("the night, <|endoftext|> 🙂")
        assert found.decode(ids) == "the night, <|endoftext|> 🙂"
        assert found.byte_lengths[ids].sum() == len("the night, <|endoftext|> 🙂".encode())


GPT2 = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 7}
GPT2 |= {"n_inner": None, "activation_function": "gelu", "resid_pdrop": 0.1, "tie_word_embeddings": True}


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(GPT2)), trees, min_size=1, max_size=2) | trees)
@example({"n_embd": 0})
@example({"n_embd": "8"})
@example({"activation_function": []})
def test_configurations_of_imported_models(changes):
    folder = pathlib.Path(FOLDER.name)
    save_file({"wte.weight": np.zeros((7, 8), np.float32)}, folder / "model.safetensors")
    content = GPT2 | changes if isinstance(changes, dict) else changes
    written(json.dumps(content), "config.json")
    found = in_words(weights.find, str(folder), code={4})
    model = None if found is None else in_words(found.model, 7, code={4})
    assert model is None or model.vocab_size == 7
    sizes = {"block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 8, "dropout": 0.0, "bias": True}
    in_words(gpt2.nanogpt_config, sizes | changes if isinstance(changes, dict) else sizes, 7, True, True, code={4})


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.binary(max_size=2))
def test_pickles(at, patch):
    """Whatever its bytes, a pickle gives plain data and stand-ins for what it names, or is refused."""
    data = pickle.dumps({"itos": {0: "a", 1: "b"}, "value": [np.float64(1.5), {2}, pathlib.Path("a")]}, protocol=2)
    place = at % len(data)
    path = written(data[:place] + patch + data[place + len(patch) :], "meta.pkl")
    with open(path, "rb") as file:
        found = in_words(torch_checkpoint.unpickle, file, path, code={4})
    assert types_in(found) <= INERT
    if patch == data[place : place + len(patch)]:
        assert found["itos"] == {0: "a", 1: "b"} and found["value"][0] == 1.5


PLAIN = {type(None), bool, int, float, complex, str, bytes, bytearray, dict, list, tuple, set, frozenset}
STAND_INS = [torch_checkpoint._Unused, *torch_checkpoint.KNOWN.values()]
INERT = PLAIN | {
    collections.OrderedDict,
    torch_checkpoint.Tensor,
    torch_checkpoint._Unused,
    torch_checkpoint._NumberType,
}


def types_in(value) -> set[type]:
    """The types of all values in a tree of plain data; a name that was not called is its stand-in itself."""
    if any(value is each for each in STAND_INS):
        return set()
    inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    inside = inner if isinstance(value, dict | list | tuple | set | frozenset) else ()
    return {type(value)}.union(*map(types_in, inside))


@settings(max_examples=400, deadline=None)
@given(trees, st.integers(0, 10**6), st.binary(min_size=1, max_size=3))
def test_manifests(content, at, patch):
    folder = epath.Path(FOLDER.name) / "manifests"
    folder.mkdir(exist_ok=True)
    (folder / "array").write_bytes(b"12345")
    manifest.write(folder, {"step": 3, "facts": json.loads(json.dumps(content, allow_nan=False, default=str))} if not
                   has_nan(content) else {"step": 3})  # fmt: skip
    assert manifest.read(folder)["step"] == 3
    manifest.verify(folder)
    sealed = (folder / manifest.MANIFEST).read_bytes()
    place = at % len(sealed)
    changed = sealed[:place] + patch + sealed[place + len(patch) :]
    if changed != sealed:
        (folder / manifest.MANIFEST).write_bytes(changed)
        with pytest.raises(manifest.DamagedError):
            manifest.verify(folder)


@settings(max_examples=200, deadline=None)
@given(trees | st.dictionaries(st.sampled_from(["array", "../secret", "/dev/null", ""]), trees), trees)
@example({"array": {"size": 5, "sha256": 7}}, 1)
@example({"array": {"size": "5"}}, None)
def test_a_sealed_manifest_of_any_content_is_damage_or_another_format(files, form):
    """Whoever can write a manifest can seal it: nothing in it is trusted for having the right sha256."""
    folder = epath.Path(FOLDER.name) / "sealed"
    folder.mkdir(exist_ok=True)
    (folder / "array").write_bytes(b"12345")
    content = json.loads(json.dumps({"format": form, "step": 3, "files": files}))  # NaN is NaN in JSON too
    for each in (content, content | {"format": manifest.FORMAT}):
        (folder / manifest.MANIFEST).write_text(manifest._sealed(each))
        with pytest.raises((manifest.DamagedError, manifest.OtherFormatError)):
            manifest.verify(folder)


EMPTY = {"size": 0, "sha256": hashlib.sha256().hexdigest()}


@pytest.mark.parametrize(
    "files, says",
    [
        (None, "lists no files"),
        ({"array": 5}, "lists no files"),
        ({"array": {}}, "array has size"),
        ({"../other": EMPTY}, "other is missing"),
        ({"/dev/null": EMPTY}, "null is missing"),
    ],
)
def test_a_manifest_that_a_stranger_sealed_leads_nowhere(files, says, tmp_path):
    (tmp_path / "3").mkdir()
    for name in ("other", "3/array"):
        (tmp_path / name).write_bytes(b"")
    sealed = manifest._sealed({"format": manifest.FORMAT, "step": 3, "files": files})
    (tmp_path / "3" / manifest.MANIFEST).write_text(sealed)
    with pytest.raises(manifest.DamagedError, match=says):
        manifest.verify(epath.Path(tmp_path / "3"))


def test_links_are_not_followed(tmp_path):
    folder = epath.Path(tmp_path / "3")
    folder.mkdir()
    (folder / "array").write_bytes(b"12345")
    manifest.write(folder, {"step": 3})
    (tmp_path / "3" / "again").symlink_to(folder)
    with pytest.raises(manifest.DamagedError, match="not part of this checkpoint: again"):
        manifest.verify(folder)
    (tmp_path / "3" / "again").unlink()
    (tmp_path / "3" / "array").rename(tmp_path / "other")
    (tmp_path / "3" / "array").symlink_to(tmp_path / "other")
    with pytest.raises(manifest.DamagedError, match="array is a link"):
        manifest.verify(folder)


def has_nan(content):
    """Whether JSON could not hold it."""
    try:
        json.dumps(content, allow_nan=False)
    except ValueError:
        return True
    return False


@settings(max_examples=400, deadline=None)
@given(st.floats(), st.none() | st.integers(), st.none() | st.floats())
def test_sampling_arguments(temperature, top_k, top_p):
    rule = in_words(sampling.make_rule, temperature, top_k, top_p, code={2})
    good = 0 <= temperature < float("inf") and (top_k is None or top_k >= 1) and (top_p is None or 0 < top_p <= 1)
    assert (rule is not None) == good


@settings(max_examples=300, deadline=None)
@given(st.text() | st.text("abc\n") | st.text(st.characters(categories=["Cs", "L"])))
def test_prompts(text):
    surrogates = any("\ud800" <= character <= "\udfff" for character in text)
    found = in_words(BYTES.encode, text, code={2})
    assert (found is None) == surrogates and (surrogates or BYTES.decode(found) == text)
    ids = in_words(CHARACTERS.encode, text, code={2})
    assert (ids is not None) == (set(text) <= set("abc\n"))
    assert ids is None or CHARACTERS.decode(np.asarray(ids)) == text
