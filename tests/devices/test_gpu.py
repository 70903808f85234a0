"""What only a GPU can show: `pytest -m gpu`, or `benchmarks/gpu.sh tests`; skipped where jax has none.

Runs whose bits are compared are processes of their own, because XLA's flags are read once. What is only reported is
printed, as one JSON line each.
"""

import concurrent.futures
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_sums
from flax.traverse_util import flatten_dict

import jaxgpt
from jaxgpt import init, loop, step, training
from jaxgpt.devices import chips, sharding
from jaxgpt.errors import ArgumentError
from jaxgpt.model import GPTConfig

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share the GPU
pytestmark = pytest.mark.gpu
HERE = pathlib.Path(__file__).parent
KERNEL = "__cudnn$fmha"  # the custom calls of cuDNN's fused attention start so
SIZES = [
    *("--config", "shakespeare_cpu"),
    *("--model.n_layer", "2", "--model.n_head", "2", "--model.n_embd", "128", "--model.block_size", "256"),
    *("--data.batch_size", "8", "--optim.warmup_steps", "5", "--train.sample_tokens", "0", "--train.log_interval", "1"),
    *("--train.steps", "20", "--train.eval_interval", "20", "--train.eval_batches", "2", "--train.steps_per_call", "5"),
    *("--run.checkpoint_interval", "10"),
]
DROPOUT = ["--model.dropout", "0.2", "--model.attention_dropout", "0"]
CONFIG = GPTConfig(vocab_size=65, block_size=256, n_layer=2, n_head=2, n_embd=128, bias="all", init="torch")


@pytest.fixture(autouse=True)
def on_a_gpu():
    if jax.default_backend() != "gpu":
        pytest.skip(f"jax has no GPU here, its backend is {jax.default_backend()}")


def report(**values):
    print(json.dumps({"part": "tests", **values, "device": jax.devices()[0].device_kind, "jax": jax.__version__}))


@pytest.fixture
def programs(monkeypatch):
    """The compiled training steps of the runs of a test, as text."""
    texts = []

    def keep(*args):
        compiled = loop.compile_call(*args)
        texts.append(compiled.call.as_text())
        return compiled

    monkeypatch.setattr(training, "compile_call", keep)
    return texts


@pytest.mark.parametrize("rates", [[], DROPOUT])
def test_training_takes_the_kernel_and_leaves_a_model_that_can_be_called(tmp_path, text_file, programs, rates):
    flags = ["--data.path", str(text_file), "--run.dir", str(tmp_path / "run"), *SIZES, *rates]
    with contextlib.redirect_stdout(io.StringIO()):
        trained = jaxgpt.train(jaxgpt.load_config(flags))
    calls = set(re.findall(r'custom_call_target="([^"]*)"', "".join(programs)))
    assert any(call.startswith(KERNEL) and call.endswith("Backward") for call in calls), calls
    for run in (trained, jaxgpt.load(tmp_path / "run", 20)):
        logits = run.model(jnp.ones((1, 7), jnp.int32))
        assert logits.shape == (1, 7, run.config.model.vocab_size) and jnp.isfinite(logits).all()
        start = run.tokenizer.start
        tokens = jaxgpt.generate(run.model, start[None], jax.random.key(0), 20)
        assert len(run.tokenizer.decode(np.asarray(tokens)[0, len(start) :])) == 20


def lowered_step(flags):
    """The training step of a configuration, not compiled, as text."""
    config = training.resolve(jaxgpt.load_config([*SIZES, *flags]), 65)
    mesh = sharding.make_mesh(training.mesh_config(config))
    with jax.set_mesh(mesh):
        spec, shapes = training.specify(config, mesh)
        windows = jax.ShapeDtypeStruct((2, 8, 257), jnp.uint8)
        return step.train_steps.lower(shapes, windows, jax.random.key(0), spec=spec).as_text()


@pytest.mark.parametrize(
    "flags, taken",
    [
        ([], True),
        (DROPOUT, True),
        (["--model.remat", "dots"], True),
        (["--model.dropout", "0.2"], False),  # attention has dropout too
        (["--model.attention", "xla"], False),
        (["--train.dtype", "float32"], False),
        (["--model.n_head", "32"], False),  # heads of 4 channels
    ],
)
def test_the_kernel_is_in_the_step_where_it_computes_the_same(flags, taken):
    assert (KERNEL in lowered_step(flags)) is taken


def loss_and_gradient(kernel, dtype, fields):
    """Of one batch, with its matrices and activations in a dtype."""
    config = dataclasses.replace(CONFIG, attention=kernel, **fields)
    params = init.init_params(config, jax.random.key(0))
    windows = np.random.default_rng(1).integers(0, 65, (8, 257)).astype(np.int32)
    function = jax.jit(step.loss_and_gradient, static_argnames="spec")
    spec = test_sums.spec_of(config, dtype=dtype)
    loss, gradient = function(params, (windows[:, :-1], windows[:, 1:]), jax.random.key(0), spec)
    return float(loss), np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(jax.device_get(gradient))])


@pytest.mark.parametrize("fields", [{}, {"n_kv_head": 1}, {"sliding_window": 100}])
def test_the_kernel_is_as_close_to_float32_as_the_lines_of_the_lecture(full_precision, fields):
    exact, direction = loss_and_gradient("xla", "float32", fields)
    errors = {}
    for kernel in ("xla", "cudnn"):
        loss, gradient = loss_and_gradient(kernel, "bfloat16", fields)
        distance = np.linalg.norm(gradient - direction) / np.linalg.norm(direction)
        errors[kernel] = {"loss": abs(loss - exact), "gradient": float(distance)}
    report(test="kernel against float32", **fields, loss=exact, errors=errors)
    assert errors["cudnn"] != errors["xla"]  # it was the kernel
    assert errors["cudnn"]["loss"] < 4e-3  # half a step of bfloat16 at 1; the mean of 2,048 losses is closer
    assert errors["cudnn"]["gradient"] < 1.5 * errors["xla"]["gradient"] + 1e-4


def run(command, **variables):
    """A process on this GPU, or on the CPU if JAX_PLATFORMS says so; its exit code and what it said."""
    environ = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **variables}
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=environ)
    return done.returncode, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("parts", [1, 2])
def test_gradients_of_tables_and_biases_are_exact_sums(parts):
    """As in test_sums.py, on one GPU."""
    found, errors = test_sums.gradients(parts, (1, 1, 1), False), {}
    for path, exact in test_sums.expected((1, 1, 1)).items():
        if path[-2] != "key":  # its gradient is rounding alone
            errors[".".join(map(str, path))] = float(np.linalg.norm(found[path] - exact) / np.linalg.norm(exact))
    worst = max(errors, key=errors.get)
    report(test="sums", parts=parts, worst=worst, error=errors[worst], table=errors["token_embedding_table.embedding"])
    assert errors[worst] < 2e-3  # sums in bfloat16 would be 4 to 36 % off


def losses(run_dir):
    """Each step's, to the last bit."""
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


def test_float32_losses_of_20_steps_are_those_of_the_cpu(tmp_path, text_file):
    exact = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    flags = ["-m", "jaxgpt", "train", "--data.path", text_file, *SIZES, "--train.dtype", "float32", "--run.dir"]
    folders = [tmp_path / platform for platform in ("cuda", "cpu")]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        ends = list(pool.map(lambda folder: run([*flags, folder], **exact, JAX_PLATFORMS=folder.name), folders))
    assert [code for code, _ in ends] == [0, 0], ends
    found = map(losses, folders)
    gpu, cpu = (np.array([each[n] for n in range(1, 21)]) for each in found)
    report(test="float32 against the CPU", largest=float(np.abs(gpu - cpu).max()), last=[gpu[-1], cpu[-1]])
    np.testing.assert_allclose(gpu, cpu, rtol=1e-4)  # sums in another order; Adam magnifies what is almost zero
    assert gpu[-1] < gpu[0] - 0.3


def whole(flags):
    """A run, not interrupted if it is new."""
    return run(["-m", "jaxgpt", "train", *flags])


def interrupted(flags):
    """A run that is killed after the checkpoint of step 10, then continued by the same command."""
    code, said = run([HERE.parent / "kill_at.py", "after the manifest", "1", "train", *flags])
    return whole(flags) if code == -signal.SIGKILL else (code, said)


@pytest.mark.parametrize("deterministic", ["true", "false"])
def test_runs_end_in_the_same_bits_also_when_interrupted(tmp_path, text_file, deterministic):
    """With `train.deterministic`; what happens without it is reported."""
    flags = ["--data.path", text_file, *SIZES, *DROPOUT, "--train.deterministic", deterministic]
    folders = [tmp_path / name for name in ("whole", "again", "interrupted")]
    ways = whole, whole, interrupted
    with concurrent.futures.ThreadPoolExecutor() as pool:
        ends = list(pool.map(lambda way, folder: way([*flags, "--run.dir", folder]), ways, folders))
    assert [code for code, _ in ends] == [0, 0, 0], ends
    starts = (folders[2] / "metrics.jsonl").read_text().count('"kind": "start"')
    assert starts == 2  # it was interrupted
    bits = [losses(folder) for folder in folders]
    weights = [flatten_dict(step.params_of(jaxgpt.load(folder, 20).model)) for folder in folders]
    same = {
        name: bits[0] == bits[i] and all(np.array_equal(leaf, weights[i][path]) for path, leaf in weights[0].items())
        for i, name in ((1, "repeated"), (2, "interrupted"))
    }
    apart = max(abs(bits[0][20] - each[20]) for each in bits)
    report(test="same bits", deterministic=deterministic, same=same, last_losses_differ_by=apart)
    if deterministic == "true":
        assert same == {"repeated": True, "interrupted": True}


def test_a_backend_that_is_running_cannot_be_made_repeatable(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    with pytest.raises(ArgumentError, match=r"train\.deterministic.*XLA_FLAGS="):
        chips.repeatable_sums()
