"""Real full and read-only file systems, and writes that the kernel refuses."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

import jaxgpt
from jaxgpt.files import storage
from jaxgpt.files.storage import StorageError
from jaxgpt.runs.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parents[2]


def mounts() -> bool:
    """Whether a file system can be mounted here, in a namespace of its own."""
    try:
        return not subprocess.run(
            ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True
        ).returncode
    except OSError:
        return False


needs_mount = pytest.mark.skipif(not mounts(), reason="no file system can be mounted here")


@pytest.fixture
def command(tiny_config, tmp_path):
    (tmp_path / "recipe.yaml").write_text("")
    argv = ["train", "--config", str(tmp_path / "recipe.yaml"), *tiny_config, "--train.steps", "20000"]
    return [sys.executable, "-m", "jaxgpt", *argv, "--run.dir", str(tmp_path / "disk" / "run")]


def on_a_small_disk(tmp_path, options, command, meanwhile=":"):
    """Run a command with a small file system at tmp_path/disk, of which tmp_path/kept is a copy afterwards."""
    (tmp_path / "disk").mkdir()
    script = f"""mount -t tmpfs -o {options} tmpfs {tmp_path}/disk
    ({meanwhile}) &
    {shlex.join(command)}; code=$?
    cp -r {tmp_path}/disk {tmp_path}/kept; exit $code"""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], env=environ, capture_output=True, text=True, timeout=200
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("jaxgpt: error: ")]
    assert "Traceback" not in done.stderr and len(errors) == 1, done.stderr
    return done, errors[0]


@pytest.mark.full
@needs_mount
def test_a_disk_that_fills_during_a_run_is_exit_7_and_the_earlier_steps_continue(command, tmp_path):
    run = tmp_path / "disk" / "run"
    fill = f"until [ -e {run}/checkpoints/30/manifest.json ]; do sleep 0.05; done; cat /dev/zero > {run}/../fill"
    done, error = on_a_small_disk(tmp_path, "size=4m", command, meanwhile=fill)
    assert done.returncode == 7 and str(run) in error
    # what was cut off may have been removed by then
    assert re.search(r"No space left on device, 0\.\d\d MB free", error), error
    shutil.copytree(tmp_path / "kept" / "run", run)
    checkpoints = Checkpoints(run / "checkpoints")
    steps = checkpoints.steps()
    assert steps and all(checkpoints.find_damage(step) is None for step in steps)
    argv = [*command[4:], "--train.steps", str(steps[-1] + 10), "--optim.decay_steps", "20000"]
    assert jaxgpt.train(jaxgpt.load_config(argv)).step == steps[-1] + 10  # the same command where there is room


@pytest.mark.full
@needs_mount
def test_a_disk_without_room_is_found_before_compiling(command, tmp_path):
    done, error = on_a_small_disk(tmp_path, "size=150k", command)
    assert done.returncode == 7 and "too little space" in error and "3 checkpoints of" in error
    assert "compile" not in done.stdout and not (tmp_path / "kept" / "run").exists()


@pytest.mark.full
@needs_mount
def test_a_read_only_disk_is_found_before_compiling(command, tmp_path):
    done, error = on_a_small_disk(tmp_path, "ro", command)
    assert done.returncode == 7 and "Read-only file system" in error and str(tmp_path / "disk" / "run") in error
    assert "compile" not in done.stdout


@pytest.mark.full
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
def test_a_write_that_the_kernel_refuses_is_exit_7_and_the_step_does_not_count(command, tmp_path):
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    program = f"import os, resource, sys; {limit}; os.execv(sys.argv[1], sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, cwd=ROOT)
    errors = [line for line in done.stderr.splitlines() if line.startswith("jaxgpt: error: ")]
    assert done.returncode == 7 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    assert "File too large" in errors[0] and " free)" in errors[0]
    assert Checkpoints(tmp_path / "disk" / "run" / "checkpoints").steps() == []


def test_an_error_that_is_not_the_disk_s_stays_what_it_is():
    for error in (ValueError("shapes"), FileNotFoundError(2, "none"), StorageError("known")):
        with pytest.raises(type(error)) as raised, storage.failures("/somewhere"):
            raise error
        assert raised.value is error


def test_a_file_is_the_old_one_until_it_is_the_new_one(tmp_path, monkeypatch):
    storage.write(tmp_path / "a", "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr(os, name, fail)
            storage.write(tmp_path / "a", "new")
        assert (tmp_path / "a").read_text() == "old"
    storage.write(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new" and os.listdir(tmp_path) == ["a"]


def test_free_space_is_known_for_a_folder_that_is_not_there_yet(tmp_path):
    assert storage.free(tmp_path / "a" / "b") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert storage.free("gs://bucket/run") is None
