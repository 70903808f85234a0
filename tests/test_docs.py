"""Every command in README.md and docs/ runs as it is written, or is listed with the reason why no test runs it.

The full tier runs the first of each kind, the long tier all.
"""

import itertools
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from jaxgpt.tools.ladder import RUNGS

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
QUICK = {
    "--train.steps": "20",
    "--train.eval_interval": "10",
    "--train.eval_batches": "1",
    "--run.checkpoint_interval": "10",
}
# a part of the command, and why it is not run here
NOT_RUN = {
    "python3 -m venv": "sets up an environment; .ci/run does the same",
    "jaxgpt sweep": "takes minutes; tests/tools/test_sweep.py sweeps",
    "pip install -e": "changes the environment; .ci/run installs all extras that the tests need",
    "runs/pirate": "needs SmolLM2's weights; tests/test_lora.py trains and exports adapters",
    "jaxgpt ladder": "takes a minute and a half; tests/tools/test_ladder.py runs it",
    "--target v5e": "needs the TPU compiler; tests/tools/test_plan.py runs it where that is installed",
    "--from ": "needs downloads or files of the reader's; tests/interop/test_importing.py imports",
    "finetune_gpt2": "needs GPT-2's weights; tests/runs/test_init_from.py runs the recipe",
    "smollm2": "needs SmolLM2's weights; tests/text/test_dialogues.py trains on dialogues",
    "gpt2_124m.yaml --data.path": "needs accelerators; tests/test_lowering.py lowers it",
    "modern/laptop.yaml": "takes minutes; modern/quick.yaml runs, which is the same with smaller windows",
    "gcloud": "needs a TPU pod; tests/devices/test_processes.py runs several processes",
    "for i in 0 1": "needs two machines",
    "done; wait": "needs two machines",
    "--step ": "needs a run that failed; tests/tools/test_replay.py replays",
    "--run runs/gpt2": "needs GPT-2's weights",
}


def commands():
    """Each line of a bash block that starts a program, with its page."""
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                command = line.split("  #")[0].strip()
                if command and not command.startswith("#"):
                    yield page.name, command


def why_not(command):
    return next((reason for part, reason in NOT_RUN.items() if part in command), None)


RUN = dict.fromkeys(command for _, command in commands() if not why_not(command))
FIRST = {tuple(command.split()[:2]): command for command in reversed(RUN)}.values()  # of each program and its command


@pytest.fixture(scope="session")
def clone(tmp_path_factory):
    """A copy of what the pages need, with a text, a folder of texts and trained runs."""
    folder = tmp_path_factory.mktemp("clone") / "jaxgpt"
    shutil.copytree(ROOT / "configs", folder / "configs")
    shutil.copytree(ROOT / "jaxgpt", folder / "jaxgpt", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", folder)
    own = "ROMEO: To be, or not to be\n" + "".join(page.read_text(encoding="utf-8") for page in PAGES)
    (folder / "my.txt").write_text(own, encoding="utf-8")
    (folder / "texts").mkdir()
    (folder / "texts" / "one.txt").write_text(own, encoding="utf-8")
    for more in ("", " --data.path my.txt --run.dir runs/mine"):
        in_clone(folder, quickly(f"python train.py --config configs/shakespeare_cpu.yaml{more}")).check_returncode()
    train = "python train.py --config configs/lecture/bigram.yaml --data.path my.txt --run.dir runs/first_look"
    in_clone(folder, quickly(train)).check_returncode()
    return folder


def quickly(command):
    """A training command as it is written, and shorter: the last of two equal flags wins."""
    flags = QUICK | ({"--model.n_layer": "1"} if "shakespeare_cpu" in command else {})
    return f"{command} {' '.join(f'{name} {value}' for name, value in flags.items())}"


def in_clone(folder, command):
    """Run a command as a reader in an active environment does."""
    here = str(pathlib.Path(sys.executable).parent)
    path = os.pathsep.join([here, os.environ["PATH"]])
    environ = {**os.environ, "PATH": path, "PYTHONPATH": str(folder), "MPLBACKEND": "agg"}
    environ.pop("XLA_FLAGS", None)  # these compute more than they compile
    return subprocess.run(command, cwd=folder, env=environ, shell=True, capture_output=True, text=True, timeout=300)


def test_the_first_two_blocks_of_the_readme_are_one_line_each():
    blocks = re.findall(r"```(?:bash)?\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks[0].count("\n") == blocks[1].count("\n") == 1
    assert blocks[0].strip().endswith("&& .venv/bin/python train.py --config configs/shakespeare_cpu.yaml")
    assert blocks[1].strip().endswith("&& .venv/bin/pytest -n 2")


def test_every_page_is_in_the_navigation_and_every_reason_is_needed():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if page.name not in nav] == []
    assert [part for part in NOT_RUN if not any(part in command for _, command in commands())] == []


def test_every_file_of_the_package_is_on_the_map():
    front = re.findall(r"^  (\w+\.py) ", PAGES[0].read_text(encoding="utf-8"), re.MULTILINE)
    wings = re.findall(r"`(\w+\.py)`", (ROOT / "docs" / "extending.md").read_text(encoding="utf-8"))
    assert sorted(front) == sorted(path.name for path in (ROOT / "jaxgpt").glob("[!_]*.py"))
    assert {path.name for path in (ROOT / "jaxgpt").glob("*/[!_]*.py")} <= set(wings)


def opening(recipe):
    """The comment at the beginning of a recipe."""
    lines = (ROOT / "configs" / recipe).read_text(encoding="utf-8").splitlines()
    return "\n".join(itertools.takewhile(lambda line: line.startswith("#"), lines))


def rows_about_recipes():
    """Each row of a table about a recipe, with the path of the recipe; the ladder's rows have the name of a rung."""
    for page in ("recipes.md", "lecture.md", "modern.md"):
        for line in (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines():
            rung = re.sub(r"[ -]", "_", line[2:].partition(" |")[0]).replace("layer_norm", "layernorm")
            found = re.search(r"configs/([\w/]+\.yaml)", line)
            if line.startswith("|") and found:
                yield found[1], line
            elif line.startswith("|") and " to " in line and rung in RUNGS:
                yield f"lecture/{rung}.yaml", line


def test_each_recipe_opens_with_its_command_hardware_time_and_loss_or_says_that_it_was_not_run():
    for path in (ROOT / "configs").rglob("*.yaml"):
        recipe = path.relative_to(ROOT / "configs").as_posix()
        lines = opening(recipe).splitlines()
        assert any(line.startswith(f"#   python train.py --config configs/{recipe}") for line in lines), recipe
        measured = [
            any(line.startswith(f"# {word}") for line in lines) for word in ("hardware: ", "time: ", "validation loss")
        ]
        assert all(measured) or any(line.startswith("# hardware, time, loss: not run yet") for line in lines), recipe


def test_figures_and_flags_of_a_recipe_are_the_same_on_the_pages_and_in_its_file():
    rows = list(rows_about_recipes())
    assert len({recipe for recipe, _ in rows}) == len(list((ROOT / "configs").rglob("*.yaml")))
    figure = re.compile(r"\d\.\d{3}|\d:\d\d|\b\d+ s\b|(?<=`)--[^`]+|estimated: \d+ GB")
    different = [(recipe, text) for recipe, row in rows for text in figure.findall(row) if text not in opening(recipe)]
    assert different == []


@pytest.mark.full
@pytest.mark.parametrize("command", [pytest.param(c, marks=[] if c in FIRST else pytest.mark.long) for c in RUN])
def test_commands_run_as_written(clone, command):
    done = in_clone(clone, quickly(command) if "train.py" in command else command)
    assert done.returncode == 0, f"{command}: {done.stdout[-800:]}{done.stderr[-800:]}"
