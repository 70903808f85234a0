"""Fixtures. Two devices, as on two cores; compiled functions are kept in the cache that the command line uses."""

import os
import random

import jax
import pytest

from jaxgpt import download

if "JAX_NUM_CPU_DEVICES" not in os.environ:
    jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_compilation_cache_dir", str(download.cache_dir() / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(scope="session")
def text() -> str:
    """20,000 characters of sentences that a small model learns something from."""
    draw = random.Random(0)
    words = ["the", "king", "and", "queen", "of", "night", "did", "hear", "a", "lark", "that", "sang", "to", "Romeo"]
    return "".join(draw.choice(words) + draw.choice([" ", " ", " ", ",\n", ".\n"]) for _ in range(5000))[:20_000]


@pytest.fixture
def text_file(tmp_path, text):
    """The same as a file."""
    path = tmp_path / "my.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def tiny_config(tmp_path, text_file):
    """The flags of a run that takes a second."""
    return [
        *("--data.path", str(text_file), "--run.dir", str(tmp_path / "run")),
        *("--model.block_size", "16", "--model.n_layer", "2", "--model.n_head", "2", "--model.n_embd", "16"),
        *("--data.batch_size", "4", "--model.dropout", "0.1", "--optim.warmup_steps", "5"),
        *("--train.steps", "40", "--train.eval_interval", "20", "--train.eval_batches", "2"),
        *("--train.steps_per_call", "5", "--train.log_interval", "5", "--run.checkpoint_interval", "10"),
    ]
