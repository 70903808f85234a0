"""Real processes, really killed: the same command again ends in the bits of a run that nothing stopped."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import chex
import orbax.checkpoint as ocp
import pytest
from kill_at import POINTS

from jaxgpt.runs.checkpoint import Checkpoints

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")

INTERVAL, STEPS = 20, 400
FLAGS = f"""--model.block_size 16 --model.n_layer 2 --model.n_head 2 --model.n_embd 32 --model.dropout 0.1
--data.batch_size 4 --train.steps {STEPS} --train.eval_interval 100 --train.eval_batches 1 --train.steps_per_call 5
--train.log_interval 5 --run.checkpoint_interval {INTERVAL}"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text):
    """The command without --run.dir, and the run directory that it leaves when nothing stops it."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "my.txt").write_text(text, encoding="utf-8")
    (folder / "recipe.yaml").write_text("")
    command = ["train", "--config", str(folder / "recipe.yaml"), "--data.path", str(folder / "my.txt"), *FLAGS.split()]
    done = start(command, folder / "run")
    assert done.wait(timeout=120) == 0, done.stderr.read()
    return command, folder / "run"


def start(command, run_dir, *at):
    """The command, to be killed at a point if one is named."""
    program = [str(pathlib.Path(__file__).with_name("kill_at.py")), *at] if at else ["-m", "jaxgpt"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *program, *command, "--run.dir", str(run_dir)], **pipes)


def records(run_dir):
    """Of metrics.jsonl; only its last line may be cut off."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines() if (run_dir / "metrics.jsonl").exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def reached(run_dir):
    return max((r["step"] for r in records(run_dir) if r["kind"] == "train"), default=0)


def check_resumed(run_dir, before):
    """The last start lost the steps since the last finished checkpoint, and the one before the last was finished."""
    begun = [r["step"] for r in records(run_dir) if r["kind"] == "start"][-1]
    last_save_begun = (before - 1) // INTERVAL * INTERVAL
    assert begun >= last_save_begun - INTERVAL, (begun, before)


def check_same_bits(run_dir, other):
    """Parameters and optimizer state of the last step, as orbax alone reads them."""
    states = [
        ocp.PyTreeCheckpointer().restore(each / "checkpoints" / str(STEPS) / "state") for each in (run_dir, other)
    ]
    chex.assert_trees_all_equal(*states)
    assert {"params", "opt_state", "step"} == states[0].keys()


def finish(command, run_dir):
    process = start(command, run_dir)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0 and "Traceback" not in said, said


@pytest.mark.full
@pytest.mark.parametrize(
    "points", [[*POINTS][::3], pytest.param([*POINTS], marks=pytest.mark.long)], ids=["every third one", "all"]
)
def test_killed_at_every_named_point_one_after_the_other(whole, tmp_path, points):
    """The second time it gets there, where it gets there twice: then there is a checkpoint to lose."""
    command, run_dir = whole[0], tmp_path / "run"
    once = {"before the first small file", "between config.yaml and its name", "after the last step"}
    for point in sorted(points, key=lambda point: point == "after the last step"):
        before = reached(run_dir)
        process = start(command, run_dir, point, "1" if point in once else "2")
        said = process.communicate(timeout=120)[1]
        assert process.returncode == -signal.SIGKILL, (point, said)
        assert "jaxgpt: error" not in said and "Traceback" not in said, said
        if reached(run_dir):
            check_resumed(run_dir, before)
    finish(command, run_dir)
    check_same_bits(run_dir, whole[1])
    assert Checkpoints(run_dir / "checkpoints").steps()[-2:] == [STEPS - INTERVAL, STEPS]
    assert not list(run_dir.rglob("*.tmp")) and not (run_dir / "lock.json").exists()


def kill_at_random(whole, tmp_path, kills, seed):
    """Kill the command that often at random moments after it has begun to train, then let it end with the same bits.

    Returns:
        How often it was killed.
    """
    command, run_dir, draw, killed = whole[0], tmp_path / "run", random.Random(seed), 0
    while killed < kills:
        before, starts = reached(run_dir), sum(r["kind"] == "start" for r in records(run_dir))
        process = start(command, run_dir)
        while sum(r["kind"] == "start" for r in records(run_dir)) == starts and process.poll() is None:
            time.sleep(0.01)
        check_resumed(run_dir, before)
        time.sleep(draw.expovariate(1 / 0.4))
        process.kill()
        said = process.communicate()[1]
        if process.returncode == 0:  # it was faster: check it, and begin again
            check_same_bits(run_dir, whole[1])
            shutil.rmtree(run_dir)
            continue
        assert process.returncode == -signal.SIGKILL, said
        killed += 1
    finish(command, run_dir)
    check_same_bits(run_dir, whole[1])
    return killed


@pytest.mark.long
def test_killed_at_12_random_moments(whole, tmp_path):
    assert kill_at_random(whole, tmp_path, 12, seed=6) == 12


@pytest.mark.long
def test_killed_at_100_random_moments(whole, tmp_path):
    assert kill_at_random(whole, tmp_path, 100, seed=60) == 100
