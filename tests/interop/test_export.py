import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from random_run import make_run
from safetensors.numpy import load_file

import jaxgpt
from jaxgpt import cli
from jaxgpt.interop import gpt2
from jaxgpt.interop.gpt2 import FormatError
from jaxgpt.model import GPTConfig
from jaxgpt.tokenizer import CharTokenizer

ALPHABET = CharTokenizer("\n abcdefg,é")
ROOT = pathlib.Path(__file__).parents[2]

# what someone without jaxgpt would write
READER = """
import sys
sys.modules["jaxgpt"] = sys.modules["flax"] = None
import jax, numpy as np
from jax import export
from safetensors.numpy import load_file
folder, tokens, out = sys.argv[1:]
program = export.deserialize(open(f"{folder}/model.stablehlo", "rb").read())
print(*program.platforms)
np.save(out, program.call(load_file(f"{folder}/model.safetensors"), np.load(tokens)))
"""


def run_export(tmp_path, *flags):
    return cli.main(["export", "--run", str(tmp_path / "run"), "--to", str(tmp_path / "out"), *flags])


@pytest.mark.full
def test_stablehlo_runs_without_our_package_on_any_batch_and_length(tmp_path):
    make_run(tmp_path / "run", ALPHABET, bias="no_qkv", lm_head="linear")
    assert run_export(tmp_path, "--format", "stablehlo") == 0
    model = jaxgpt.load(tmp_path / "run").model
    for shape in ((1, 1), (3, 24)):
        tokens = np.random.default_rng(0).integers(0, ALPHABET.vocab_size, shape, np.int32)
        np.save(tmp_path / "tokens.npy", tokens)
        command = [sys.executable, "-c", READER, tmp_path / "out", tmp_path / "tokens.npy", tmp_path / "logits.npy"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["cpu", "cuda", "tpu"]
        # the same operations, compiled in one piece: fused sums differ in the last digits
        np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), model(tokens), rtol=0, atol=1e-4)


def test_stablehlo_takes_no_more_than_the_context(tmp_path):
    make_run(tmp_path / "run", ALPHABET)
    assert run_export(tmp_path, "--format", "stablehlo") == 0
    program = jax.export.deserialize((tmp_path / "out" / "model.stablehlo").read_bytes())
    arrays = load_file(tmp_path / "out" / "model.safetensors")
    assert program.call(arrays, np.zeros((1, 24), np.int32)).shape == (1, 24, ALPHABET.vocab_size)
    with pytest.raises(ValueError, match="refining shapes"):
        program.call(arrays, np.zeros((1, 25), np.int32))


def test_safetensors_have_our_names_and_the_exact_values(tmp_path):
    params = gpt2.flat(make_run(tmp_path / "run", ALPHABET, residual=False, norm="none", positions="none"))
    assert run_export(tmp_path, "--format", "safetensors") == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == params.keys() and "blocks.0.attn.query.kernel" in found
    for name, value in params.items():
        np.testing.assert_array_equal(found[name], value)
    config = GPTConfig(**json.loads((tmp_path / "out" / "config.json").read_text()))
    assert config == jaxgpt.load(tmp_path / "run").model.config


@pytest.mark.parametrize(
    "switch, value",
    [("residual", False), ("norm", "none"), ("positions", "none"), ("mlp_ratio", 0), ("n_layer", 0)],
)
def test_a_model_that_gpt2_cannot_be_is_refused_with_the_switch(tmp_path, capsys, switch, value):
    make_run(tmp_path / "run", ALPHABET, **{switch: value})
    assert run_export(tmp_path, "--format", "hf") == 2
    err = capsys.readouterr().err
    assert f"{switch} {value}" in err and "export safetensors or stablehlo" in err and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]  # nothing half-written


def test_every_rung_is_exported_or_refused_with_a_reason():
    fits = []
    for file in sorted((ROOT / "configs").rglob("*.yaml")):
        config = jaxgpt.load_config(["--config", str(file), "--run.init_from", ""]).model
        try:
            gpt2.check_form(config)
            fits.append(file.stem)
        except FormatError as error:
            assert "GPT-2's format cannot represent this model" in str(error)
    assert {"shakespeare", "shakespeare_cpu", "gpt2_124m", "gpt2_1558m"} <= set(fits)
    assert not {"bigram", "positions", "one_head", "four_heads", "feed_forward", "residual"} & set(fits)


def test_a_head_with_a_bias_is_refused_and_one_of_zeros_is_not(tmp_path, capsys):
    params = make_run(tmp_path / "run", ALPHABET, lm_head="linear")
    assert run_export(tmp_path) == 2
    assert "GPT-2's head has no bias" in capsys.readouterr().err
    params["lm_head"]["bias"][:] = 0
    config = jaxgpt.load(tmp_path / "run").model.config
    np.testing.assert_array_equal(gpt2.to_tensors(params, config)["lm_head.weight"], params["lm_head"]["kernel"].T)


def test_a_folder_that_is_there_is_left_alone_and_a_missing_run_is_named(tmp_path, capsys):
    make_run(tmp_path / "run", ALPHABET)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    assert run_export(tmp_path) == 2
    assert "the folder is not empty" in capsys.readouterr().err
    assert cli.main(["export", "--run", str(tmp_path / "nowhere"), "--to", str(tmp_path / "new")]) == 4
    (tmp_path / "out" / "mine").unlink()
    assert run_export(tmp_path) == 0
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o644}
    assert run_export(tmp_path, "--format", "onnx") == 2


@pytest.mark.parametrize("to", ["file", "gs://bucket/out", "https://example.org/out", "file/below"])
def test_a_target_that_is_no_folder_of_this_machine_is_named_and_nothing_is_written(tmp_path, monkeypatch, capsys, to):
    make_run(tmp_path / "run", ALPHABET)
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", "--run", "run", "--to", to]) in (2, 7)
    err = capsys.readouterr().err
    assert to.removesuffix("/below") in err and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_library_that_is_missing_is_named_with_its_extra(tmp_path, capsys, monkeypatch):
    make_run(tmp_path / "run", ALPHABET)
    for name in [name for name in sys.modules if name.split(".")[0] == "flatbuffers"] + ["flatbuffers"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "jax._src.export.serialization", raising=False)
    assert run_export(tmp_path, "--format", "stablehlo") == 3
    assert "pip install 'jaxgpt[stablehlo]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
