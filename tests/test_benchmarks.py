"""The programs that the figures come from still run; compare.py has tests of its own."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SMALL = ["--config", str(ROOT / "configs/lecture/one_head.yaml"), "--rounds", "1"]

pytestmark = pytest.mark.full


def result_of(program, *flags):
    command = [sys.executable, str(ROOT / "benchmarks" / program), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


REST = ["devices", "bfloat16", "muon", "dropout", "last_block", "one_row"]  # as matmul or as rolling


@pytest.mark.parametrize("trick", ["matmul", "rolling", *(pytest.param(name, marks=pytest.mark.long) for name in REST)])
def test_every_trick_is_measured(trick):
    rope = ["--config", str(ROOT / "configs/modern/rope.yaml")] if trick in ("rolling", "one_row") else []
    found = result_of("tricks.py", trick, *SMALL, *rope, "--steps", "2")
    assert found["trick"] == trick and found["with"] > 0 and found["without"] > 0 and found["ratio"] > 0


@pytest.mark.parametrize("what", ["steps", pytest.param("runs", marks=pytest.mark.long)])
def test_recipes_are_measured_beside_each_other(what, tmp_path):
    recipe, short = (
        str(ROOT / "configs/lecture/bigram.yaml"),
        ("--train.steps", "40", "--train.log_interval", "10", "--train.steps_per_call", "10") if what == "runs" else (),
    )
    kept = ("--dir", str(tmp_path)) if what == "runs" else ()
    found = result_of("recipes.py", what, recipe, "--rounds", "2", *kept, *short)
    assert found["recipe"] == recipe and found["seconds"] > 0 and found["ratio"] == 1
    assert what == "steps" or (len(found["losses"]) == 2 and found["losses"][0] != found["losses"][1])
    assert len(list(tmp_path.glob("bigram-*/loss.png"))) == 2 * bool(kept)


@pytest.mark.long
def test_the_cost_of_float32_sums_is_measured():
    found = result_of("sums.py", *SMALL, "--steps", "2")
    assert found["sums"] == "all" and found["wall"]["ratio"]["median"] > 0 and found["cpu"]["ratio"]["median"] > 0


def test_the_time_to_trace_and_compile_deeper_models_is_measured():
    found = result_of("depth.py", *SMALL, "--layers", "2")
    assert found["layers"] == 2 and found["trace"]["median"] > 0 and found["compile"]["median"] > 0


def test_saves_are_measured(tmp_path):
    found = result_of("saves.py", *SMALL, "--steps", "50", "--folder", str(tmp_path))
    assert found["orbax_s"][0] > 0 and found["save_s"][0] > 0 and found["rounds"] == 1


def test_what_runs_side_by_side_gain_is_measured():
    recipe = str(ROOT / "configs/lecture/one_head.yaml")
    found = result_of("sweep.py", "--config", recipe, "--runs", "2", "--rounds", "1", "--steps", "2")
    assert found["runs"] == 2 and found["ratio"]["median"] > 0 and found["flops_per_step"] > 0
