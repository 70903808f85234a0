"""jaxgpt against transformers and nanoGPT: their files in, ours out, the same logits and the same text."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxgpt
from jaxgpt import cli
from jaxgpt import tokenizer as tokenizers
from jaxgpt.interop import gpt2
from jaxgpt.tokenizer import BPETokenizer, CharTokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import foreign  # noqa: E402  needs both
from meshes import MESHES  # noqa: E402
from random_run import make_run  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("full_precision")]

ALPHABET = CharTokenizer("\n abcdefghijklmnopqrstuvwxyzABCDEFGH,.é")  # 39
SHAPES = {
    "small": {},
    "one layer": {"n_layer": 1, "n_head": 1, "n_embd": 16, "n_positions": 7},
    "deep": {"n_layer": 5, "n_head": 8, "n_embd": 48},
    "narrow inside": {"n_inner": 64},
    "relu": {"activation_function": "relu"},
    "erf": {"activation_function": "gelu"},
    "untied": {"tie_word_embeddings": False},
}


def imported(source, run_dir, *flags):
    assert cli.main(["import", "--from", str(source), "--run", str(run_dir), *flags]) == 0
    return jaxgpt.load(run_dir)


def tokens_for(model, rows=3):
    config = model.config
    return np.random.default_rng(1).integers(0, config.vocab_size, (rows, config.block_size), np.int32)


def theirs(model, tokens, dtype=torch.float32):
    with torch.no_grad():
        out = model.to(dtype)(torch.tensor(tokens).long())
    return getattr(out, "logits", out).numpy()


@pytest.mark.parametrize("shape", SHAPES)
def test_imported_logits_are_transformers(shape, tmp_path):
    model = foreign.gpt2(39, **SHAPES[shape])
    run = imported(foreign.save_gpt2(model, tmp_path / "hf", ALPHABET), tmp_path / "run")
    tokens = tokens_for(run.model)
    logits = jax.jit(lambda model, tokens: model(tokens))(run.model, tokens)
    # float32 sums in another order: up to 1e-5 in five layers
    np.testing.assert_allclose(logits, theirs(model, tokens), rtol=0, atol=5e-5)
    assert np.ptp(logits) > 1


@pytest.mark.parametrize("shape", ["small", "deep", "untied"])
def test_imported_logits_are_transformers_to_the_last_digits_of_float64(shape, tmp_path, request):
    model = foreign.gpt2(39, **SHAPES[shape])
    run = imported(foreign.save_gpt2(model, tmp_path / "hf", ALPHABET), tmp_path / "run")
    graphdef, state = nnx.split(run.model)
    request.getfixturevalue("float64")
    params = jax.tree.map(lambda p: jnp.asarray(np.asarray(p), jnp.float64), nnx.to_pure_dict(state))
    tokens = tokens_for(run.model)
    logits = nnx.merge(graphdef, params)(tokens)
    assert logits.dtype == jnp.float64
    expected = theirs(model, tokens, torch.float64)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"dtype": torch.float16}, {"shards": "20KB"}])
def test_half_precision_and_shards_are_read(options, tmp_path):
    model = foreign.gpt2(39)
    if "dtype" in options:
        foreign.save_gpt2(model.to(options["dtype"]), tmp_path / "hf", ALPHABET)
    else:
        foreign.save_gpt2(model, tmp_path / "hf", ALPHABET, max_shard_size=options["shards"])
        assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    run = imported(tmp_path / "hf", tmp_path / "run")
    tokens = tokens_for(run.model)
    np.testing.assert_allclose(run.model(tokens), theirs(model, tokens), rtol=0, atol=5e-5)


def test_a_pytorch_bin_is_read_where_there_is_no_safetensors(tmp_path):
    model = foreign.gpt2(39)
    foreign.save_gpt2(model, tmp_path / "hf", ALPHABET)
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "hf" / "pytorch_model.bin")
    run = imported(tmp_path / "hf", tmp_path / "run")
    tokens = tokens_for(run.model)
    np.testing.assert_allclose(run.model(tokens), theirs(model, tokens), rtol=0, atol=5e-5)


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 ties weights that differ")
@pytest.mark.parametrize("stored", ["head differs", "head only", "prefixed and plain", "two files"])
def test_where_there_are_two_weights_transformers_takes_the_same(stored, tmp_path):
    folder = foreign.save_gpt2(foreign.gpt2(39), tmp_path / "hf", ALPHABET)
    tensors = load_file(folder / "model.safetensors")
    table = tensors["transformer.wte.weight"]
    if stored == "head only":
        del tensors["transformer.wte.weight"]
    if stored in ("head differs", "head only"):
        tensors["lm_head.weight"] = table.flip(0).contiguous()
    elif stored == "prefixed and plain":
        tensors |= {name.removeprefix("transformer."): value.flip(0).contiguous() for name, value in tensors.items()}
    else:
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, "part.safetensors")})
        )
        save_file({name: value.flip(0).contiguous() for name, value in tensors.items()}, folder / "part.safetensors")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    run = imported(folder, tmp_path / "run")
    tokens = tokens_for(run.model)
    np.testing.assert_allclose(run.model(tokens), theirs(model, tokens), rtol=0, atol=5e-5)


def test_what_transformers_makes_of_our_tokenizers_is_read_again(text, tmp_path):
    for name, tokenizer in {"char": CharTokenizer.from_text(text), "bpe": bpe(text)}.items():
        make_run(tmp_path / name, tokenizer, **GPT2)
        folder = str(tmp_path / f"{name}_hf")
        assert cli.main(["export", "--run", str(tmp_path / name), "--to", folder]) == 0
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
        assert tokenizers.same(imported(folder, tmp_path / f"{name}_again").tokenizer, tokenizer)
        assert tokenizers.same(tokenizers.for_text(f"{folder}/tokenizer.json", ""), tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "bpe_hf")
    theirs.add_tokens(["日本", "New York"])
    theirs.add_special_tokens({"pad_token": "<pad>"})
    theirs.save_pretrained(tmp_path / "added")
    ours = tokenizers.load(tmp_path / "added" / "tokenizer.json")
    text += "日本 New York<pad>York<|endoftext|>日"
    given = {"add_special_tokens": False}
    assert ours.encode(text, special_tokens=True).tolist() == theirs.encode(text, **given)
    assert ours.encode(text).tolist() == theirs.encode(text, split_special_tokens=True, **given)
    assert ours.decode(ours.encode(text, special_tokens=True)) == text


def test_rows_of_padding_are_left_out_on_every_mesh(tmp_path):
    alphabet = CharTokenizer("".join(map(chr, range(33, 33 + 1031))))  # no axis of a mesh divides 1,031
    model = foreign.gpt2(1088, n_head=8, n_embd=64)
    run = imported(foreign.save_gpt2(model, tmp_path / "hf", alphabet), tmp_path / "run")
    assert run.model.config.vocab_size == 1031
    tokens = tokens_for(run.model, rows=8)
    np.save(tmp_path / "tokens.npy", tokens)
    names = [",".join(map(str, mesh)) for mesh in MESHES]
    command = [pathlib.Path(__file__).with_name("mesh_logits.py"), tmp_path / "run", tmp_path / "tokens.npy"]
    environ = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, *command, tmp_path / "out.npz", *names], env=environ, check=True, timeout=600)
    expected, found = theirs(model, tokens)[..., :1031], np.load(tmp_path / "out.npz")
    for name in names:
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=5e-5, err_msg=name)


@pytest.mark.parametrize("bias, compiled, rows", [(False, False, 39), (True, False, 39), (False, True, 64)])
def test_imported_logits_are_nanogpt_s(bias, compiled, rows, tmp_path):
    model = foreign.save_nanogpt(tmp_path / "ckpt.pt", rows, bias, compiled)
    ALPHABET.save(tmp_path / "alphabet.json")
    run = imported(tmp_path, tmp_path / "run", "--tokenizer", str(tmp_path / "alphabet.json"))
    assert (run.model.config.bias, run.model.config.lm_head) == ("all" if bias else "none", "tied")
    tokens = tokens_for(run.model)
    np.testing.assert_allclose(run.model(tokens), theirs(model, tokens)[..., :39], rtol=0, atol=5e-5)


def test_nanogpt_s_padded_vocabulary_takes_gpt2_s_tokenizer(tmp_path):
    model = foreign.save_nanogpt(tmp_path / "ckpt.pt", 50304, True, n_embd=8, n_layer=1)
    run = imported(tmp_path / "ckpt.pt", tmp_path / "run")
    assert run.tokenizer.encode("hello world").tolist() == [31373, 995]
    tokens = tokens_for(run.model, rows=1)
    np.testing.assert_allclose(run.model(tokens), theirs(model, tokens)[..., :50257], rtol=0, atol=5e-5)


def bpe(text):
    return BPETokenizer.train([text], 300)


NANO = {"lm_head": "tied", "bias": "none", "activation": "gelu"}
GPT2 = {"lm_head": "tied", "bias": "all", "activation": "gelu_tanh"}
LECTURE = {"lm_head": "tied", "bias": "no_qkv", "activation": "relu"}


@pytest.mark.parametrize(
    "kind, form", [("char", NANO), ("char", GPT2), ("char", LECTURE), ("bpe", NANO), ("bpe", GPT2), ("gpt2", GPT2)]
)
def test_transformers_loads_what_is_exported_and_writes_the_same_text(kind, form, text, tmp_path):
    make = {"char": CharTokenizer.from_text, "bpe": bpe, "gpt2": lambda _: tokenizers.gpt2()}[kind]
    make_run(tmp_path / "run", make(text), **form, block_size=256)
    assert cli.main(["export", "--run", str(tmp_path / "run"), "--to", str(tmp_path / "hf"), "--format", "hf"]) == 0

    load = transformers.GPT2LMHeadModel.from_pretrained
    model, report = load(tmp_path / "hf", output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    run = jaxgpt.load(tmp_path / "run")
    prompt = run.tokenizer.encode(text[:40])[None]
    np.testing.assert_allclose(
        run.model(prompt), theirs(model.eval(), prompt), rtol=0, atol=1e-4 * max(1, np.abs(run.model(prompt)).max())
    )
    ours = jaxgpt.generate(run.model, prompt, jax.random.key(0), 200, temperature=0)
    given = torch.tensor(prompt).long()
    always = {"max_new_tokens": 200, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        out = model.generate(given, attention_mask=torch.ones_like(given), **always)
    assert out.shape[1] == prompt.shape[1] + 200
    assert np.asarray(ours)[0].tolist() == out[0].tolist()

    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert loaded.encode(text, add_special_tokens=False) == run.tokenizer.encode(text).tolist()
    assert loaded.decode(loaded.encode(text, add_special_tokens=False)) == text
    assert loaded.decode(out[0]) == run.tokenizer.decode(out[0].tolist())


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_what_is_exported_can_be_imported_again(kind, text, tmp_path):
    make = {"char": CharTokenizer.from_text, "bpe": bpe}[kind]
    make_run(tmp_path / "run", make(text), **NANO)
    assert cli.main(["export", "--run", str(tmp_path / "run"), "--to", str(tmp_path / "hf")]) == 0
    again, run = imported(tmp_path / "hf", tmp_path / "again"), jaxgpt.load(tmp_path / "run")
    assert tokenizers.same(again.tokenizer, run.tokenizer)
    tokens = tokens_for(run.model)
    np.testing.assert_allclose(again.model(tokens), run.model(tokens), rtol=0, atol=1e-5)  # zeros added


def test_an_import_exports_the_tensors_that_it_came_from(tmp_path):
    model = foreign.gpt2(39)
    imported(foreign.save_gpt2(model, tmp_path / "hf", ALPHABET), tmp_path / "run")
    assert cli.main(["export", "--run", str(tmp_path / "run"), "--to", str(tmp_path / "out")]) == 0
    assert foreign.names_in(tmp_path / "out") == foreign.names_in(tmp_path / "hf")
    back = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(back[name], tensor), name
    stored, theirs = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("out", "hf"))
    assert gpt2.to_config(stored, 39) == gpt2.to_config(theirs, 39)


def test_the_configuration_is_gpt2_s(tmp_path):
    hf = transformers.GPT2Config()
    config = gpt2.to_config(hf.to_dict(), hf.vocab_size)
    file = pathlib.Path(__file__).parents[2] / "configs" / "gpt2_124m.yaml"
    recipe = jaxgpt.load_config(["--config", str(file)]).model
    changed = {"vocab_size": 50257, "dropout": 0.1}  # GPT-2's own dropout; nanoGPT's recipe has none
    assert config == dataclasses.replace(recipe, **changed)
