"""A page that runs the model of a run in a browser: one HTML file with the weights in it, which needs no server.

`page/page.js` has the model in JavaScript, `page/screen.js` what is on the screen.
"""

import base64
import dataclasses
import hashlib
import json
import pathlib
import re
import tempfile
from typing import Any, Literal

import jax
import numpy as np

from jaxgpt.data import Windows
from jaxgpt.errors import JaxgptError, one_line
from jaxgpt.interop import gpt2
from jaxgpt.layers import rotation
from jaxgpt.model import GPTConfig
from jaxgpt.runs.loading import Run
from jaxgpt.step import params_of
from jaxgpt.text import source
from jaxgpt.tokenizer import CharTokenizer, Tokenizer

Dtype = Literal["float32", "float16"]
SOURCES = pathlib.Path(__file__).parent / "page"
LIMIT = 25_000_000  # parameters: 133 MB as text, and about 100 tokens per second on a laptop
VALIDATION_BYTES = 2_000  # of the validation text, in a page

# the fields of GPTConfig that page.js computes or that only training needs, with the values that page.js knows
ANY = None
KNOWN = {
    **dict.fromkeys(("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "mlp_ratio", "mlp_width"), ANY),
    **dict.fromkeys(("n_kv_head", "head_size", "sliding_window", "logit_softcap", "norm_eps", "norm_weight"), ANY),
    **dict.fromkeys(("projection", "residual", "qk_norm", "gated", "embedding_norm", "value_embeddings"), ANY),
    **dict.fromkeys(("rope_theta", "rope_scaling", "rope_factor", "rope_low_freq", "rope_high_freq"), ANY),
    **dict.fromkeys(("rope_original_size", "dropout", "attention_dropout", "embedding_dropout"), ANY),
    **dict.fromkeys(("init", "attention", "remat"), ANY),
    "positions": ("learned", "none", "rope"),
    "lm_head": ("linear", "tied", "none"),
    "norm": ("layernorm", "rmsnorm", "none"),
    "activation": ("relu", "gelu", "gelu_tanh", "relu2", "silu"),
    "bias": ("all", "no_qkv", "none", "qkv"),
}


class PageError(JaxgptError, ValueError):
    """The page cannot run the model."""


def write(path: pathlib.Path, run: Run, dtype: Dtype = "float32") -> None:
    """Write a page with the model of a run, and with the beginning of its validation text where that is at hand.

    Args:
        path: the HTML file.
        run: the run to export.
        dtype: type of the weights in the file; the page computes in float32.

    Raises:
        PageError: the page cannot run the model.
    """
    check(run.model.config)
    tensors = _tensors(run, dtype)
    content = {
        "name": pathlib.PurePath(run.config.run.dir).name or run.dir.resolve().name,
        "step": run.step,
        "parameters": sum(tensor.size for tensor in tensors.values()),
        "config": _config(run.model.config),
        "dtype": dtype,
        "tensors": [[name, tensor.size] for name, tensor in tensors.items()],
        "tokenizer": _tokenizer(run.tokenizer),
        "validation": _validation(run),
    }
    values = b"".join(tensor.tobytes() for tensor in tensors.values())
    path.write_text(html(content, values), encoding="utf-8", newline="\n")


def check(config: GPTConfig) -> None:
    """Refuse a model that the page cannot run.

    Raises:
        PageError: it is too large, or it has a switch that page.js does not know.
    """
    for field in dataclasses.fields(config):
        value, known = getattr(config, field.name), KNOWN.get(field.name, (field.default,))
        if known is not ANY and value not in known:
            remedy = "export hf or safetensors instead"
            raise PageError(f"a page cannot run this model (--format html, {field.name} {value}): {remedy}")
    parameters = sum(leaf.size for leaf in jax.tree.leaves(gpt2.shapes(config)))
    if parameters > LIMIT:
        size = f"{parameters:,} parameters, at most {LIMIT:,}"
        raise PageError(f"too large for a page (--format html, {size}): export a smaller run, or choose another format")


def html(content: dict[str, Any], values: bytes) -> str:
    """Put a page together.

    Args:
        content: the facts about the run. Strings in it stay data: no `<` of theirs reaches the HTML.
        values: the weights, one tensor after the other.

    Returns:
        The page. Its Content-Security-Policy allows the scripts and styles of this package and no request.
    """
    style, script, model, page = (
        (SOURCES / name).read_text(encoding="utf-8") for name in ("style.css", "screen.js", "page.js", "page.html")
    )
    parts = {
        "style": style,
        "style_hash": _sha256(style),
        "script": script,
        "script_hash": _sha256(script),
        "model": model,
        "run": json.dumps(content).replace("<", "\\u003c"),
        "weights": base64.b64encode(values + bytes(-len(values) % 12)).decode(),  # whole groups of 3 and of 4 bytes
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], page)  # in one pass: the parts are not searched


def _config(config: GPTConfig) -> dict[str, Any]:
    """The fields of a GPTConfig with the values that it derives from them."""
    derived = {name: getattr(config, name) for name in ("width", "kv_heads", "span")}
    if config.n_layer:
        derived["channels_per_head"] = config.channels_per_head
        if config.positions == "rope":
            frequencies = rotation(config).frequencies(config.channels_per_head)
            derived["frequencies"] = frequencies.astype(np.float32).tolist()
    return dataclasses.asdict(config) | derived


def _tensors(run: Run, dtype: Dtype) -> dict[str, np.ndarray]:
    """The parameters by their dotted names, matrices as (outputs, inputs)."""
    tensors = {}
    for name, leaf in gpt2.flat(params_of(run.model)).items():
        values = np.asarray(leaf, np.float32)
        with np.errstate(over="ignore"):
            stored = (values.T if name.endswith("kernel") else values).astype(np.dtype(dtype).newbyteorder("<"))
        if dtype == "float16" and np.isinf(stored).any() and np.isfinite(values).all():
            largest = f"{name} up to {np.abs(values).max():g}"
            raise PageError(f"weights are too large for float16 (--dtype, {largest}): use --dtype float32")
        tensors[name] = np.ascontiguousarray(stored)
    return tensors


def _tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """What page.js needs of a tokenizer."""
    common = {"start": tokenizer.start.tolist(), "end": tokenizer.end_of_text}
    if isinstance(tokenizer, CharTokenizer):
        return {"alphabet": tokenizer.alphabet, **common}
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "tokenizer.json"
        tokenizer.save(file)
        form = json.loads(file.read_text(encoding="utf-8"))
    model = form["model"]
    matched = [token for token in form["added_tokens"] if not token["special"]]  # special ones are text in a prompt
    _check_tokenizer(form, matched)
    tokens: list[str | None] = [None] * tokenizer.vocab_size
    for token, i in model["vocab"].items():
        tokens[i] = token
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return {
        "tokens": tokens,
        "merges": merges,
        "added": [[token["content"], token["id"]] for token in form["added_tokens"]],
        "matched": [token["content"] for token in matched],
        "whole": bool(model.get("ignore_merges")),
        **common,
    }


def _check_tokenizer(form: dict[str, Any], matched: list[dict[str, Any]]) -> None:
    """Refuse a tokenizer.json that page.js would read in another way than the tokenizers library."""
    before, model = form["pre_tokenizer"] or {}, form["model"]
    wrong = {
        f"model {model['type']}": model["type"] != "BPE",
        f"pre_tokenizer {before.get('type')}": before.get("type") != "ByteLevel",
        "use_regex false": not before.get("use_regex", True),
        "add_prefix_space": before.get("add_prefix_space"),
        "normalizer": form["normalizer"],
        "continuing_subword_prefix": model.get("continuing_subword_prefix"),
        "end_of_word_suffix": model.get("end_of_word_suffix"),
    }
    for token in matched:
        flags = [flag for flag in ("single_word", "lstrip", "rstrip") if token[flag]]
        wrong[f"added token {token['content']!r} with {', '.join(flags)}"] = bool(flags)
    if found := next((name for name, is_wrong in wrong.items() if is_wrong), None):
        name = one_line(found)
        raise PageError(f"a page cannot use this tokenizer (tokenizer.json, {name}): use char, gpt2 or bpe")


def _validation(run: Run) -> list[int]:
    """The first tokens of the validation split; none where the text that the run was trained on is not at hand."""
    if run.corpus_sha256 is None:
        return []
    try:
        text = source.open_source(run.config.data, run.tokenizer)
        if text.sha256 != run.corpus_sha256:
            return []
        text.split(None, run.model.config.block_size)
        tokens = np.asarray(Windows.of(next(iter(text.pieces("val")))).tokens)
    except (JaxgptError, OSError):
        return []
    tokens = tokens[:VALIDATION_BYTES].astype(int)
    return tokens[np.cumsum(run.tokenizer.byte_lengths[tokens]) <= VALIDATION_BYTES].tolist()


def _sha256(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
