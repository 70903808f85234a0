"""Several real processes on this machine, talking over the loopback interface."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import chex
import jax
import pytest
from flax import nnx
from random_run import make_run

import jaxgpt
from jaxgpt.devices import processes
from jaxgpt.devices.processes import DistributedConfig
from jaxgpt.files import lock
from jaxgpt.runs import checkpoint
from jaxgpt.text.prepare import PrepareArgs, prepare
from jaxgpt.tokenizer import CharTokenizer


def start(flags, devices=1, processes=1, own=([], [])):
    """`jaxgpt train` in each of some processes; `own` are the flags of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environ = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    started = []
    for i in range(processes):
        them = ["--distributed.coordinator_address", address, "--distributed.num_processes", str(processes)]
        them += ["--distributed.process_id", str(i)]
        command = [sys.executable, "-m", "jaxgpt", "train", "--config", "configs/shakespeare_cpu.yaml"]
        command += [*flags, *own[i], *(them if processes > 1 else [])]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, env=environ, **pipes))
    return started


def finish(started, seconds):
    """Exit codes and outputs, all within some seconds."""
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], outputs


def checkpoints_of(folder):
    return checkpoint.Checkpoints(folder / "checkpoints").steps()


def wait_for_checkpoint(folder, started):
    for _ in range(600):
        if checkpoints_of(folder):
            return
        if any(process.poll() is not None for process in started):
            break
        time.sleep(0.1)
    pytest.fail(f"no checkpoint: {finish(started, 20)}")


@pytest.mark.full
@pytest.mark.parametrize("kind", ["text", pytest.param("folder", marks=pytest.mark.long)])
def test_two_processes_compute_the_bits_of_one_with_two_devices(tiny_config, tmp_path, text_file, kind):
    if kind == "folder":
        prepare(PrepareArgs(str(text_file), str(tmp_path / "tokens"), tokenizer="char", workers=1))
        tiny_config = [*tiny_config, "--data.path", str(tmp_path / "tokens")]
    codes, outputs = finish(start([*tiny_config, "--run.dir", str(tmp_path / "two")], processes=2), 120)
    assert codes == [0, 0], outputs
    assert "done" in outputs[0] and "done" not in outputs[1]  # one of them writes
    codes, outputs = finish(start([*tiny_config, "--run.dir", str(tmp_path / "one")], devices=2), 120)
    assert codes == [0], outputs
    records = {}
    for name in ("one", "two"):
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        records[name] = [(r["kind"], r["step"], r.get("loss"), r.get("val_loss")) for r in lines if "step" in r]
    assert records["one"] == records["two"]
    params = [nnx.to_pure_dict(nnx.state(jaxgpt.load(tmp_path / name, 40).model)) for name in ("one", "two")]
    chex.assert_trees_all_equal(*params)


@pytest.mark.full
def test_all_processes_start_from_the_weights_that_the_first_one_chooses(tmp_path, text, text_file):
    """They need not see the same: the run that they start from may be training."""
    losses = {"first": {6: 1.0, 9: 2.0}, "second": {6: 2.0, 9: 1.0}}
    for name, measured in losses.items():
        params = make_run(tmp_path / name, CharTokenizer.from_text(text), n_layer=1)
        with checkpoint.Checkpoints(tmp_path / name / "checkpoints") as saved:
            for step, val_loss in measured.items():
                facts = {"val_loss": val_loss, "corpus_sha256": "none", "mesh": {}}
                saved.save(step, {"params": jax.tree.map(lambda a, step=step: step * a, params)}, facts)
        assert saved.best() == min(measured, key=measured.get)
    flags = ["--config", "configs/finetune_gpt2.yaml", "--data.path", str(text_file), "--data.batch_size", "4"]
    flags += ["--train.steps", "1", "--train.sample_tokens", "0", "--train.loss_chunks", "1"]
    flags += ["--train.eval_batches", "1", "--mesh.data", "1", "--mesh.fsdp", "2"]
    own = [["--run.init_from", str(tmp_path / name)] for name in losses]
    codes, outputs = finish(start([*flags, "--run.dir", str(tmp_path / "run")], processes=2, own=own), 120)
    assert codes == [0, 0], outputs
    begun = nnx.to_pure_dict(nnx.state(jaxgpt.load(tmp_path / "run", 0).model))  # half of each matrix from each process
    chex.assert_trees_all_equal(begun, jax.tree.map(lambda a: 6 * a, params))


@pytest.mark.full
def test_all_processes_know_that_the_run_directory_is_busy(tiny_config, tmp_path):
    with lock.hold_lock(tmp_path / "run", ""):
        codes, outputs = finish(start(tiny_config, processes=2), 60)
    assert codes == [6, 6] and all(f"pid {os.getpid()} on" in output for output in outputs), outputs


@pytest.mark.long
def test_all_processes_know_that_a_checkpoint_is_damaged(tiny_config, tmp_path):
    codes, outputs = finish(start(tiny_config, processes=2), 120)
    assert codes == [0, 0], outputs
    (tmp_path / "run" / "checkpoints" / "40" / "state" / "_METADATA").write_bytes(b"")
    codes, outputs = finish(start(tiny_config, processes=2), 120)
    assert codes == [0, 0], outputs
    assert "continued at step 30" in outputs[0] and "checkpoint 40 is damaged" not in outputs[1]
    assert "set aside as 40.corrupt" in outputs[0] and checkpoints_of(tmp_path / "run")[-1] == 40


@pytest.mark.full
@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.long)])
def test_when_one_process_is_killed_the_other_leaves_with_8_and_the_checkpoint_is_good(tiny_config, tmp_path, victim):
    endless = [*tiny_config, "--train.steps", "1000000", "--optim.decay_steps", "40"]
    started = start(endless, processes=2)
    wait_for_checkpoint(tmp_path / "run", started)
    started[victim].kill()
    began = time.monotonic()
    codes, outputs = finish(started, 35)
    assert time.monotonic() - began < 35
    if victim == 1 or jax.__version_info__ >= (0, 10):
        assert codes[1 - victim] == 8, outputs[1 - victim]
        assert "jaxgpt: error: another process of the run is gone" in outputs[1 - victim]
    else:  # without its coordinator an older jax may end the process itself, in a way that nothing can catch
        assert codes[1] in (8, 1)
    last = max(checkpoints_of(tmp_path / "run"))
    assert jaxgpt.load(tmp_path / "run", last).step == last


@pytest.mark.full
@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.long)]
)
def test_a_signal_to_one_process_saves_and_stops_all(tiny_config, tmp_path, number, code):
    endless = [*tiny_config, "--train.steps", "1000000", "--optim.decay_steps", "40"]
    started = start(endless, processes=2)
    wait_for_checkpoint(tmp_path / "run", started)
    tables = [path for path in map(pathlib.Path, ("/proc/net/tcp", "/proc/net/tcp6")) if path.exists()]
    if tables:  # in hexadecimal; state 0A listens
        port = next(word for word in started[0].args if word.startswith("127.0.0.1:")).split(":")[1]
        rows = [row.split() for table in tables for row in table.read_text().splitlines()]
        hosts = [row[1].split(":")[0] for row in rows if row[1].endswith(f":{int(port):04X}") and row[3] == "0A"]
        assert [host[-8:] for host in hosts] == ["0100007F"]  # 127.0.0.1 and nowhere else
    started[1].send_signal(number)
    codes, outputs = finish(started, 60)
    assert codes == [75, code], outputs
    stopped = {int(re.search(r"saved at step ([\d,]+)", output)[1].replace(",", "")) for output in outputs}
    assert stopped == {max(checkpoints_of(tmp_path / "run"))}


@pytest.mark.full
def test_a_process_number_that_cannot_be_is_refused(tiny_config):
    lonely = ["--distributed.coordinator_address", "127.0.0.1:9", "--distributed.num_processes", "2"]
    codes, outputs = finish(start([*tiny_config, *lonely, "--distributed.process_id", "5"]), 30)
    assert codes == [2] and "process_id is 5: use 0 to 1" not in outputs[0] and "use 0 to 1" in outputs[0]


@pytest.mark.long
@pytest.mark.parametrize("process_id", ["0", "1"])
def test_processes_that_never_meet_leave_with_8(tiny_config, process_id):
    lonely = ["--distributed.coordinator_address", "127.0.0.1:9999", "--distributed.num_processes", "2"]
    codes, outputs = finish(start([*tiny_config, *lonely, "--distributed.process_id", process_id]), 150)
    assert codes == [8] and "never connected" in outputs[0]


@pytest.mark.long
def test_a_process_that_hangs_is_given_up_within_35_seconds(tiny_config, tmp_path):
    endless = [*tiny_config, "--train.steps", "1000000", "--optim.decay_steps", "40"]
    started = start(endless, processes=2)
    wait_for_checkpoint(tmp_path / "run", started)
    started[1].send_signal(signal.SIGSTOP)
    assert started[0].wait(timeout=35) == 8
    started[1].kill()


@pytest.mark.parametrize(
    "environ, multi_process",
    [
        ({}, False),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, False),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, True),
        ({"SLURM_NTASKS": "4"}, False),  # an allocation, but no srun
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "t1k-0,t1k-1"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}, True),
    ],
)
def test_clusters_are_recognised_and_a_laptop_is_none(environ, multi_process):
    assert processes.expected(DistributedConfig(), environ) == multi_process
    assert not processes.expected(DistributedConfig(join="never"), environ)
    assert processes.expected(DistributedConfig(join="always"), environ)


@pytest.mark.parametrize(
    "fields, remedy",
    [
        ({"heartbeat_timeout": 0}, "use 1 second or more"),
        ({"coordinator_address": "here"}, "write HOST:PORT"),
        ({"num_processes": 2}, "give both or none"),
        ({"num_processes": 2, "process_id": 2}, "use 0 to 1"),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(fields, remedy):
    with pytest.raises(ValueError, match=remedy):
        DistributedConfig(**fields)
