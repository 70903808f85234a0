"""Import without torch or transformers: files written here by the safetensors library and by json."""

import functools
import json
import os
import pickle
import re
import subprocess
import sys
import types

import gpt2_folder
import numpy as np
import pytest
from flax import nnx
from gpt2_folder import CONFIG
from safetensors.numpy import save_file

import jaxgpt
from jaxgpt import cli
from jaxgpt.interop import gpt2, hub, importing, weights
from jaxgpt.tokenizer import CharTokenizer, TokenizerError


@pytest.fixture
def hf(tmp_path):
    """A function that writes a GPT-2 folder of 7 ids, with changes, and returns it and its tensors."""
    return functools.partial(gpt2_folder.write, tmp_path / "hf")


@pytest.mark.parametrize(
    "theirs, ours", [("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu", "gelu"), ("relu", "relu")]
)
def test_an_activation_is_read_as_what_transformers_computes(theirs, ours):
    assert gpt2.to_config(CONFIG | {"activation_function": theirs}, 7).activation == ours


def run_import(folder, tmp_path, *flags):
    return cli.main(["import", "--from", str(folder), "--run", str(tmp_path / "run"), *flags])


def error_of(capsys, code):
    err = capsys.readouterr().err
    assert err.startswith("jaxgpt: error: ") and err.count("\n") == 1 and "): " in err
    return code, err


def test_query_key_and_value_are_the_thirds_of_c_attn_and_nothing_is_transposed(hf, tmp_path, capsys):
    folder, tensors = hf()
    assert run_import(folder, tmp_path) == 0
    assert "7 ids" in capsys.readouterr().out
    params = gpt2.flat(nnx.to_pure_dict(nnx.state(jaxgpt.load(tmp_path / "run").model)))
    for part in ("weight", "bias"):
        whole = tensors[f"transformer.h.0.attn.c_attn.{part}"]
        ours = {"weight": "kernel", "bias": "bias"}[part]
        for i, name in enumerate(("query", "key", "value")):
            np.testing.assert_array_equal(params[f"blocks.0.attn.{name}.{ours}"], whole[..., 8 * i : 8 * i + 8])
    np.testing.assert_array_equal(params["blocks.0.mlp.fc.kernel"], tensors["transformer.h.0.mlp.c_fc.weight"])


def test_names_without_prefix_and_masks_are_understood(hf, tmp_path):
    folder, tensors = hf()
    short = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    masks = {"h.0.attn.bias": np.tril(np.ones((1, 1, 16, 16), np.float32)), "h.0.attn.masked_bias": np.float32([-1e4])}
    save_file(short | masks, folder / "model.safetensors")  # as the published gpt2 has them
    assert run_import(folder, tmp_path) == 0
    table = jaxgpt.load(tmp_path / "run").model.token_embedding_table.embedding[...]
    np.testing.assert_array_equal(table, tensors["transformer.wte.weight"])


@pytest.mark.parametrize(
    "config, tensors, alphabet, code, said",
    [
        ({"model_type": "bert"}, None, "abcdefg", 4, "model_type bert"),
        ({"layer_norm_epsilon": 1e-6}, None, "abcdefg", 4, "layer_norm_epsilon 1e-06"),
        ({"scale_attn_by_inverse_layer_idx": True}, None, "abcdefg", 4, "scale_attn_by_inverse_layer_idx True"),
        ({"activation_function": "silu"}, None, "abcdefg", 4, "activation_function silu"),
        ({"n_inner": 20}, None, "abcdefg", 4, "n_inner 20"),
        ({"n_head": 3}, None, "abcdefg", 4, "n_embd 8 is not divisible by n_head 3"),
        ({"n_layer": 2}, None, "abcdefg", 4, "12 missing: h.1.attn.c_attn.bias"),
        ({"n_positions": 8}, None, "abcdefg", 4, "wpe.weight, (16, 8)"),
        (None, {"transformer.ln_f.bias": None}, "abcdefg", 4, "1 missing: ln_f.bias"),
        (None, {"score.weight": np.zeros((2, 8), np.float32)}, "abcdefg", 4, "1 unexpected: score.weight"),
        (None, {"transformer.wte.weight": None}, "abcdefg", 4, "no GPT-2 weights"),
        (None, None, "abcdefgh", 2, "the model has 7 ids, the tokenizer 8"),
        (None, None, None, 2, "--tokenizer with gpt2, a tokenizer.json, or nanoGPT's meta.pkl"),
    ],
)
def test_what_is_not_this_gpt2_is_one_line_that_says_why(hf, tmp_path, capsys, config, tensors, alphabet, code, said):
    folder, _ = hf(config, tensors, alphabet)
    found, message = error_of(capsys, run_import(folder, tmp_path))
    assert found == code and said in message
    assert not (tmp_path / "run").exists()


def test_a_source_that_is_not_there_or_damaged_is_named(hf, tmp_path, capsys):
    code, message = error_of(capsys, run_import(tmp_path / "nowhere", tmp_path))
    assert code == 4 and str(tmp_path / "nowhere") in message and "gpt2-xl" in message
    folder, _ = hf()
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    code, message = error_of(capsys, run_import(folder, tmp_path))
    assert code == 4 and "damaged safetensors" in message
    (folder / "model.safetensors").unlink()
    assert "put model.safetensors beside" in error_of(capsys, run_import(folder, tmp_path))[1]
    (folder / "config.json").write_text("[")
    assert "config.json" in error_of(capsys, run_import(folder, tmp_path))[1]


def test_a_directory_with_something_in_it_is_left_alone(hf, tmp_path, capsys):
    folder, _ = hf()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("")
    code, message = error_of(capsys, run_import(folder, tmp_path))
    assert code == 6 and "name another" in message and len(list((tmp_path / "run").iterdir())) == 1


def test_nanogpt_s_meta_pkl_is_the_alphabet_and_runs_no_code(hf, tmp_path, capsys):
    folder, _ = hf(alphabet=None)
    meta = tmp_path / "meta.pkl"
    alphabet = "\nabcdef"
    itos = dict(enumerate(alphabet))
    meta.write_bytes(pickle.dumps({"vocab_size": 7, "itos": itos, "stoi": {c: i for i, c in itos.items()}}))
    assert run_import(folder, tmp_path, "--tokenizer", str(meta)) == 0
    assert jaxgpt.load(tmp_path / "run").tokenizer.alphabet == alphabet

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    capsys.readouterr()
    meta.write_bytes(pickle.dumps(Evil()))
    run = ["import", "--from", str(folder), "--run", str(tmp_path / "other"), "--tokenizer", str(meta)]
    code, message = error_of(capsys, cli.main(run))
    assert code == 4 and "mkdir" in message and not (tmp_path / "made").exists()


ALPHABET = "\nabcdef"
ITOS = dict(enumerate(ALPHABET))
META = {"vocab_size": 7, "itos": ITOS, "stoi": {c: i for i, c in ITOS.items()}}


@pytest.mark.parametrize(
    "rows, meta, says",
    [
        (7, META, None),
        (64, META, None),  # padded as nanoGPT pads GPT-2's table
        (7, {"itos": ITOS}, None),
        (7, {"itos": list(ALPHABET)}, None),
        (35, META, "meta.pkl has 7 characters, the weights 35 ids"),
        (128, META, "meta.pkl has 7 characters, the weights 128 ids"),
        (6, META, "meta.pkl has 7 characters, the weights 6 ids"),
        (7, META | {"vocab_size": 65}, "vocab_size is not that of itos"),
        (64, META | {"vocab_size": 64}, "vocab_size is not that of itos"),
        (7, META | {"stoi": {c: 6 - i for i, c in ITOS.items()}}, "stoi is not that of itos"),
        (7, META | {"itos": ITOS | {6: "g"}}, "stoi is not that of itos"),
        (7, {"itos": ITOS | {6: "gh"}}, "texts of several characters"),
        (7, {"itos": ITOS | {5: "", 6: "ef"}}, "texts of several characters"),
        (7, {"itos": ITOS | {6: "a"}}, "not nanoGPT's meta.pkl"),
        (7, {"itos": ITOS | {6: 6}}, "not nanoGPT's meta.pkl"),
        (7, {"stoi": {}}, "not nanoGPT's meta.pkl"),
        (7, ["itos"], "not nanoGPT's meta.pkl"),
    ],
)
def test_a_meta_pkl_of_another_text_or_in_two_minds_is_refused(tmp_path, rows, meta, says):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    opened = weights.Weights({"wte.weight": (np.zeros, (rows, 8))}, None, True, tmp_path)
    args = importing.ImportArgs(from_="ckpt.pt", run="run", tokenizer=str(tmp_path / "meta.pkl"))
    if says is None:
        assert importing.find_tokenizer(args, opened).alphabet == ALPHABET
        return
    with pytest.raises(TokenizerError, match=rf"{re.escape(says)}.*\): "):
        importing.find_tokenizer(args, opened)


def test_home_folders_are_understood(hf, tmp_path, monkeypatch, capsys):
    hf()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.main(["import", "--from", "~/hf", "--run", "~/run", "--tokenizer=~/hf/tokenizer.json"]) == 0
    assert cli.main(["export", "--run", "~/run", "--to", "~/out"]) == 0
    assert cli.main(["import", "--from=~/out/model.safetensors", "--run=~/again"]) == 0
    assert {"run", "out", "again"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    "flags, code, says",
    [
        ({"from": "https://huggingface.co/gpt2"}, 4, "no weights found (--from, https://huggingface.co/gpt2)"),
        ({"from": "file"}, 4, "no weights found (--from, file)"),
        ({"from": "file/below"}, 4, "no weights found (--from, file/below)"),
        ({"from": ""}, 4, "no weights found"),
        ({"run": "https://example.org/run"}, 2, "not a path (https://example.org/run)"),
        ({"run": "file"}, 6, "the run directory is a file (--run, file)"),
        ({"run": "file/below"}, 7, "cannot write (file/below"),
        ({"tokenizer": "https://example.org/tokenizer.json"}, 2, "no tokenizer (--tokenizer, https"),
        ({"tokenizer": "hf"}, 2, "no tokenizer (--tokenizer, hf)"),
        ({"tokenizer": "file"}, 2, "not a tokenizer file (file)"),
    ],
)
def test_a_path_of_another_kind_is_named_and_nothing_is_written(hf, tmp_path, monkeypatch, capsys, flags, code, says):
    hf()
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    words = [f"--{name}={value}" for name, value in ({"from": "hf", "run": "run"} | flags).items()]
    found, message = error_of(capsys, cli.main(["import", *words]))
    assert found == code and says in message
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.fixture
def gpt2_run(hf, tmp_path, text):
    """Imported weights with the alphabet of the test's text."""
    alphabet = CharTokenizer.from_text(text)
    rows = {"transformer.wte.weight": np.random.default_rng(1).normal(size=(40, 8)).astype(np.float32) * 0.1}
    hf(tensors=rows, alphabet=alphabet.alphabet)
    assert run_import(tmp_path / "hf", tmp_path) == 0
    return tmp_path / "run"


@pytest.mark.full
def test_an_imported_run_is_sampled_evaluated_and_trained_on(gpt2_run, text_file, tmp_path, capsys):
    assert cli.main(["sample", "--run", str(gpt2_run), "--prompt", "the", "--max_new_tokens", "5"]) == 0
    capsys.readouterr()
    assert cli.main(["eval", "--run", str(gpt2_run)]) == 3
    assert "add --path FILE" in capsys.readouterr().err
    assert cli.main(["eval", "--run", str(gpt2_run), "--path", str(text_file)]) == 0
    before = json.loads(capsys.readouterr().out)
    flags = ["--data.path", str(text_file), "--train.steps", "30", "--optim.learning_rate", "1e-2"]
    flags += ["--optim.warmup_steps", "2"]
    train = ["train", "--config", str(gpt2_run / "config.yaml"), *flags, "--train.eval_interval", "15"]
    assert cli.main(train) == 0
    assert "step  0/30" in capsys.readouterr().out
    assert cli.main(["eval", "--run", str(gpt2_run)]) == 0  # the text is its own now
    after = json.loads(capsys.readouterr().out)
    assert (before["step"], after["step"]) == (0, 30)
    assert after["nats_per_token"] < before["nats_per_token"] - 0.1


def test_another_tokenizer_of_as_many_ids_does_not_train_imported_weights(gpt2_run, text_file, tmp_path, capsys):
    alphabet = jaxgpt.load(gpt2_run).tokenizer.alphabet
    CharTokenizer(alphabet[::-1]).save(tmp_path / "reversed.json")
    train = ["train", "--config", str(gpt2_run / "config.yaml"), "--data.path", str(text_file)]
    code, message = error_of(capsys, cli.main([*train, "--data.tokenizer", str(tmp_path / "reversed.json")]))
    assert code == 6 and "the tokenizer" in message


def test_the_four_names_are_pinned_to_commits_and_others_need_one():
    assert set(hub.PINNED) == {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"}
    assert all(hub.NAME.fullmatch(pinned) for pinned in hub.PINNED.values())
    assert hub.is_name("me/model@" + "0" * 40)
    assert not any(map(hub.is_name, ["me/model", "me/model@main", "runs/gpt2", "gpt3", "../x@" + "0" * 40 + "0"]))


def test_a_name_is_fetched_at_its_commit_and_as_safetensors_only(hf, tmp_path, monkeypatch):
    folder, _ = hf()
    asked = {}

    def snapshot_download(repository, **options):
        asked.update(options, repository=repository)
        return str(folder)

    library = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    assert run_import("gpt2-large", tmp_path) == 0
    assert (asked["repository"], len(asked["revision"])) == ("openai-community/gpt2-large", 40)
    assert not any(name.endswith((".bin", ".pt", ".py", "*")) for name in asked["allow_patterns"])


@pytest.mark.parametrize("library", [None, types.SimpleNamespace()])
def test_a_name_out_of_reach_says_what_to_do_instead(tmp_path, monkeypatch, capsys, library):
    def offline(*_, **__):
        raise ConnectionError("no route to the hub\nat all")

    if library is not None:
        library.snapshot_download = offline
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    code, message = error_of(capsys, run_import("gpt2", tmp_path))
    assert code == 3 and ("pip install 'jaxgpt[hub]'" if library is None else "no route to the hub at all") in message
    assert "folder" in message


WITHOUT_TORCH = """
import sys

class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Nowhere())
from jaxgpt import cli
sys.exit(cli.main())
"""


@pytest.mark.full
def test_importing_needs_no_torch(hf, tmp_path):
    folder, _ = hf()
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, "import", "--from", str(folder), "--run", str(tmp_path / "run")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
