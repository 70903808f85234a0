import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_run import keep

from jaxgpt import CharTokenizer, Config, GPTConfig
from jaxgpt.init import init_model
from jaxgpt.runs.loading import Run, computed_here
from jaxgpt.step import params_of
from jaxgpt.tools import chat, sample
from jaxgpt.tools.evaluate import EvalArgs, evaluate


def run_of(computed_in, kept_in=jnp.float32):
    """A run with this compute dtype (auto: of imported weights), whose weights are kept in another one."""
    config = Config(model=GPTConfig(vocab_size=11, block_size=4, n_layer=1, n_head=1, n_embd=8))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, dtype=computed_in))
    model = jax.tree.map(lambda a: a.astype(kept_in), init_model(config.model, seed=0))
    return Run(None, config, None, model, 0, None)


@pytest.mark.parametrize("platform, computed_in, expected", [
    ("gpu", "bfloat16", "bfloat16"), ("gpu", "auto", "bfloat16"), ("tpu", "auto", "bfloat16"),
    ("gpu", "float32", "float32"), ("cpu", "bfloat16", "float32"), ("cpu", "auto", "float32"),
])  # fmt: skip
def test_models_are_computed_in_the_dtype_of_training_but_on_a_cpu_in_float32(
    monkeypatch, platform, computed_in, expected
):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    model = computed_here(run_of(computed_in)).model
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params_of(model))} == {expected}


def test_weights_that_are_kept_in_bfloat16_are_widened_and_not_changed():
    run = run_of("auto", jnp.bfloat16)
    for wide, half in zip(jax.tree.leaves(computed_here(run).model), jax.tree.leaves(run.model), strict=True):
        assert wide.dtype == jnp.float32
        np.testing.assert_array_equal(wide, np.asarray(half, np.float32))


def test_eval_of_bfloat16_weights_computes_in_float32_on_a_cpu(tmp_path):
    run, text = run_of("auto", jnp.bfloat16), "abcdefghij\n" * 20
    (tmp_path / "text.txt").write_text(text)
    for name, model in (("half", run.model), ("wide", computed_here(run).model)):
        keep(tmp_path / name, run.config.model, params_of(model), CharTokenizer.from_text(text))
    half, wide = (
        evaluate(EvalArgs(run=str(tmp_path / name), path=str(tmp_path / "text.txt"), split="all"))
        for name in ("half", "wide")
    )
    assert half == wide


class SeenError(Exception):
    """Raised with the dtypes of the model that a command computes with."""


def see(model, *_, **__):
    raise SeenError({leaf.dtype.name for leaf in jax.tree.leaves(model)})


def test_sample_and_chat_compute_in_float32_on_a_cpu(tmp_path, monkeypatch):
    run = run_of("auto", jnp.bfloat16)
    keep(tmp_path / "run", run.config.model, params_of(run.model), CharTokenizer.from_text("abcdefghij\n"))
    monkeypatch.setattr(sample.sampling, "generate", see)
    monkeypatch.setattr(chat, "Writer", see)
    for command, args in ((sample.sample, sample.SampleArgs), (chat.chat, chat.ChatArgs)):
        with pytest.raises(SeenError, match=r"^\{'float32'\}$"):
            command(args(run=str(tmp_path / "run")))
