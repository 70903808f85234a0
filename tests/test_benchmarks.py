"""The programs that the figures come from still run; compare.py has tests of its own."""

import json
import pathlib
import string
import subprocess
import sys

import pytest

import jaxgpt
from jaxgpt.interop.export import ExportArgs, export

ROOT = pathlib.Path(__file__).parent.parent
SMALL = ["--config", str(ROOT / "configs/lecture/one_head.yaml"), "--rounds", "1"]

pytestmark = pytest.mark.full


def result_of(program, *flags):
    command = [sys.executable, str(ROOT / "benchmarks" / program), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# a recipe for which each makes a difference, small enough otherwise
TRICKS = {
    "matmul": "base: lecture/one_head.yaml",
    "rolling": "base: modern/rope.yaml",
    "devices": "base: lecture/layernorm.yaml",
    "bfloat16": "base: lecture/one_head.yaml",
    "muon": "base: lecture/one_head.yaml",
    "dropout": "base: lecture/one_head.yaml\nmodel: {dropout: 0.2}",
    "parts": "base: lecture/one_head.yaml\ndata: {batch_size: 32768}",
    "last_block": "base: lecture/one_head.yaml",
    "one_row": "base: modern/rope.yaml\nmodel: {n_layer: 1, n_embd: 320}",
}
QUICK = "matmul", "rolling"


@pytest.mark.parametrize(
    "trick", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.long) for name in TRICKS]
)
def test_every_trick_is_measured(trick, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(TRICKS[trick].replace("base: ", f"base: {ROOT}/configs/"))
    found = result_of("tricks.py", trick, "--config", str(recipe), "--rounds", "1", "--steps", "2")
    assert found["trick"] == trick and found["with"] > 0 and found["without"] > 0 and found["ratio"] > 0


def test_a_trick_that_makes_no_difference_is_not_measured():
    command = [sys.executable, str(ROOT / "benchmarks/tricks.py"), "dropout", *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.splitlines()[-1].endswith("error: with and without are the same program: use another recipe")


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


@pytest.mark.parity
def test_answers_are_measured_beside_those_of_transformers(tmp_path):
    pytest.importorskip("transformers")
    text, run, folder = tmp_path / "text.txt", tmp_path / "run", tmp_path / "hf"
    text.write_text((string.ascii_letters + " .\n") * 100)
    flags = f"--data.path={text} --data.tokenizer=char --data.train_fraction=0.5 --data.batch_size=2 --run.dir={run} "
    flags += "--model.block_size=96 --model.n_layer=1 --model.n_head=2 --model.n_embd=16 --optim.grad_accumulation=1"
    jaxgpt.train(jaxgpt.load_config(["--config=gpt2_124m", "--train.steps=1", *flags.split()]))
    export(ExportArgs(run=str(run), to=str(folder)))
    found = result_of("chat.py", f"--run={run}", f"--hf={folder}", "--new_tokens=4", "--rounds=2", "--seconds=0.1")
    assert found["agreed_tokens"] == 4 and found["ratio"]["median"] > 0
    assert found["of_memory"]["median"] > 0 and found["memory_bytes_per_s"]["median"] > 1e8
