import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import jaxgpt
from jaxgpt import cli
from jaxgpt.files import lock
from jaxgpt.files.lock import BusyError, LockWarning
from jaxgpt.files.storage import StorageError
from jaxgpt.text.prepare import PrepareArgs, prepare

HOLD = """
import sys, time
from jaxgpt.files import lock
with lock.hold_lock(sys.argv[1], ""):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path/run."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.full
def test_a_second_process_leaves_at_once_with_6_and_says_who_is_there(tiny_config, holder, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("")
    began = time.monotonic()
    assert cli.main(["train", "--config", str(tmp_path / "recipe.yaml"), *tiny_config]) == 6
    assert time.monotonic() - began < 1
    error = capsys.readouterr().err
    assert f"another process is writing here ({tmp_path / 'run'}, pid {holder.pid} on " in error and " since 2" in error
    assert [path.name for path in (tmp_path / "run").iterdir()] == [lock.LOCK]


@pytest.mark.full
def test_the_lock_of_a_killed_process_is_taken_over(tiny_config, holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / lock.LOCK).exists()
    jaxgpt.train(jaxgpt.load_config([*tiny_config, "--train.steps", "5"]))
    assert not (tmp_path / "run" / lock.LOCK).exists()


@pytest.mark.full
def test_prepare_has_the_same_lock(holder, text_file, tmp_path, capsys):
    argv = ["prepare", "--input", str(text_file), "--tokenizer", "char", "--workers", "1"]
    assert cli.main([*argv, "--out", str(tmp_path / "run")]) == 6
    assert f"pid {holder.pid}" in capsys.readouterr().err
    assert cli.main([*argv, "--out", str(tmp_path / "other")]) == 0
    assert not (tmp_path / "other" / lock.LOCK).exists()


def test_sampling_needs_no_lock(trained_copy):
    with lock.hold_lock(trained_copy, ""):
        assert jaxgpt.load(trained_copy).step == 40


def test_only_one_of_many_at_the_same_time_gets_it(tmp_path):
    """Also while the holder removes the file: each of 8 threads tries 200 times."""
    inside, most, taken = [], [], []

    def work():
        for _ in range(200):
            try:
                with lock.hold_lock(tmp_path / "run", ""):
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(0.0002)
                    inside.pop()
                    taken.append(1)
            except BusyError:
                time.sleep(0.0001)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(taken) > 8


def test_a_folder_that_got_nothing_is_removed_and_one_that_did_is_not(tmp_path):
    with lock.hold_lock(tmp_path / "a" / "run", ""):
        pass
    assert not (tmp_path / "a" / "run").exists()
    with lock.hold_lock(tmp_path / "a" / "run", ""):
        (tmp_path / "a" / "run" / "x").write_text("")
    assert [path.name for path in (tmp_path / "a" / "run").iterdir()] == ["x"]


def test_an_object_store_has_no_lock(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with lock.hold_lock("gs://bucket/run", ""), lock.hold_lock("gs://bucket/run", ""):
        assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(lock.errno.ENOLCK, os.strerror(lock.errno.ENOLCK))

    monkeypatch.setattr(lock, "_lock", refuse)
    with pytest.warns(LockWarning, match="start only one process here"), lock.hold_lock(tmp_path / "run", ""):
        pass


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=rf"{tmp_path / 'file' / 'run'}, Not a directory, .* free\)"):
        lock.hold_lock(tmp_path / "file" / "run", "").__enter__()


def test_a_finished_token_folder_needs_no_lock(text_file, tmp_path):
    args = PrepareArgs(str(text_file), str(tmp_path / "out"), "char", workers=1)
    facts = prepare(args)
    with lock.hold_lock(tmp_path / "out", ""):
        assert prepare(args) == facts
