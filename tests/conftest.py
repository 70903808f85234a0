"""Fixtures. Two devices, as on two cores; compiled functions are kept in the cache that the command line uses."""

import contextlib
import io
import os
import pathlib
import random
import shutil
import sys
import tempfile
import threading
import types

import jax
import jax.numpy as jnp
import pytest

import jaxgpt
from jaxgpt.files import download
from jaxgpt.text import verified

if os.environ.get("JAXGPT_TEST_OPTIMIZED") != "1":  # XLA compiles in half the time; processes that tests start, too
    fast = "--xla_backend_optimization_level=0"
    if jax.__version_info__[:2] == (0, 10):  # later versions have no such flag, and abort
        fast += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {fast}".strip()
if "JAX_NUM_CPU_DEVICES" not in os.environ:
    jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_compilation_cache_dir", str(download.cache_dir() / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(download.cache_dir() / "inductor"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Workers that have nothing left take tests from the others: 10 seconds of two minutes."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def temporary_folder(tmp_path_factory):
    """Where temporary files of the suite are; a test that leaves one there fails the suite."""
    before, folder = tempfile.tempdir, tmp_path_factory.mktemp("temporary")
    verified.records = lambda: tmp_path_factory.getbasetemp() / "verified"  # of folders that are gone soon
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
    yield
    tempfile.tempdir = before
    # what is copied from an object store, and what other libraries keep, stays until the process ends
    left = {path.name for path in folder.iterdir() if not path.name.startswith(("jaxgpt-run-", "data-gym-cache"))}
    assert not left, f"left in the temporary folder: {left}"


@pytest.fixture(scope="module", autouse=True)
def compiled_functions_are_not_kept_for_ever():
    """Each one takes memory maps, of which Linux allows a process 65,530: XLA dies of the next one."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def no_thread_is_left():
    """Threads that save or read ahead end with the test that started them."""
    yield
    ours = [t.name for t in threading.enumerate() if t.name.startswith(("checkpoint", "prefetch", "metadata_store"))]
    assert not ours, f"still running: {ours}"


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


TINY = [
    *("--model.block_size", "16", "--model.n_layer", "1", "--model.n_head", "2", "--model.n_embd", "16"),
    *("--data.batch_size", "4", "--model.dropout", "0.1", "--optim.warmup_steps", "5"),
    *("--train.steps", "40", "--train.eval_interval", "20", "--train.eval_batches", "2"),
    *("--train.steps_per_call", "5", "--train.log_interval", "5", "--run.checkpoint_interval", "10"),
]


@pytest.fixture
def tiny_config(tmp_path, text_file):
    """The flags of a run that takes a second."""
    return ["--data.path", str(text_file), "--run.dir", str(tmp_path / "run"), *TINY]


@pytest.fixture(scope="session")
def trained(tmp_path_factory, text):
    """A finished run with checkpoints 30 and 40, which no test changes, and its flags without --run.dir."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "my.txt").write_text(text, encoding="utf-8")
    (folder / "recipe.yaml").write_text("")
    flags = ["--config", str(folder / "recipe.yaml"), "--data.path", str(folder / "my.txt"), *TINY]
    with contextlib.redirect_stdout(io.StringIO()):
        jaxgpt.train(jaxgpt.load_config([*flags, "--run.dir", str(folder / "run")]))
    return folder / "run", flags


@pytest.fixture
def trained_copy(trained, tmp_path):
    """A copy of that run directory, to damage or to continue."""
    return pathlib.Path(shutil.copytree(trained[0], tmp_path / "run"))


@pytest.fixture
def full_precision():
    """Products of float32 with all of its bits, also where jax would take fewer."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def float64(monkeypatch):
    """jaxgpt in float64 throughout, also where it asks for float32 by name (logits, scores, losses).

    What is left of the rounding is so small that no tolerance has to hide a wrong epsilon. In float32, a ReLU whose
    input is 1e-7 from zero opens on one side only, and after 100 steps of Adam single weights differ by half their way.
    """
    wide = types.SimpleNamespace(**vars(jnp) | {"float32": jnp.float64})
    for name, module in list(sys.modules.items()):
        if name.startswith("jaxgpt.") and getattr(module, "jnp", None) is jnp:
            monkeypatch.setattr(module, "jnp", wide)
    enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64  # before jax 0.8
    with enable_x64(True):
        yield
