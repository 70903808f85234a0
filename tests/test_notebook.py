"""The notebooks: their cells as they are in the files, and, in minutes, what they do."""

import builtins
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import nbformat
import pytest

from jaxgpt.config import recipes

ROOT = pathlib.Path(__file__).parents[1]
LECTURE, BEYOND = (ROOT / "notebooks" / name for name in ("lecture.ipynb", "beyond_the_lecture.ipynb"))
PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"


@pytest.fixture(scope="module", params=[LECTURE, BEYOND], ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture(scope="module")
def notebook(path):
    return json.loads(path.read_text(encoding="utf-8"))


def sources(notebook, kind):
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


@pytest.fixture
def install(notebook, monkeypatch):
    """The first code cell, run where `import jaxgpt` works or does not; what it did to its surroundings."""
    code = compile(sources(notebook, "code")[0], "install cell", "exec")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv(PREALLOCATE, "to be taken back after the test")
    monkeypatch.delenv(PREALLOCATE)

    def run(importable):
        done, before = {"commands": [], "preallocate": None}, sys.path.copy()

        def import_(name, *args):
            if name.split(".")[0] not in ("jax", "jaxgpt"):
                return builtins.__import__(name, *args)
            done["preallocate"] = os.environ.get(PREALLOCATE)
            if not importable:
                raise ModuleNotFoundError(name)

        monkeypatch.setattr(subprocess, "run", lambda command, check: done["commands"].append(command))
        exec(code, {"__builtins__": vars(builtins) | {"__import__": import_}})
        done["new paths"] = [path for path in sys.path if path not in before]
        return done

    return run


def test_the_notebook_is_format_4_for_any_python_3_kernel(notebook):
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert notebook["metadata"] == {"kernelspec": kernel, "language_info": {"name": "python"}}
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) > 0


def test_the_notebook_is_what_nbformat_calls_valid(notebook):
    assert nbformat.validate(notebook) is None  # it raises what it finds
    with pytest.raises(nbformat.ValidationError):
        nbformat.validate({**notebook, "cells": [{"cell_type": "code"}]})


def test_the_notebook_is_committed_without_results(notebook):
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_every_code_cell_compiles(notebook):
    code = sources(notebook, "code")
    assert len(code) > 10
    for i, source in enumerate(code):
        python = re.sub(r"^%matplotlib inline$", "", source, flags=re.MULTILINE)  # IPython's only word in it
        assert compile(python, f"code cell {i}", "exec")


def test_the_badge_opens_this_notebook_of_the_repository_that_the_install_cell_names(path, notebook):
    badge = re.match(
        r"\[!\[Open in Colab\]\(https://colab\.research\.google\.com/assets/colab-badge\.svg\)\]"
        r"\(https://colab\.research\.google\.com/github/([^/]+/[^/]+)/blob/main/([^)]+)\)",
        sources(notebook, "markdown")[0],
    )
    assert badge and ROOT / badge[2] == path
    assert f'"git+https://github.com/{badge[1]}"' in sources(notebook, "code")[0]


def test_where_jaxgpt_can_be_imported_nothing_is_installed(install):
    done = install(importable=True)
    assert done["commands"] == [] and done["new paths"] == []


@pytest.mark.parametrize("before, then", [(None, "false"), ("true", "true")])
def test_memory_is_not_preallocated_once_jax_starts_unless_asked_for(install, monkeypatch, before, then):
    if before:
        monkeypatch.setenv(PREALLOCATE, before)
    assert install(importable=True)["preallocate"] == then


@pytest.mark.parametrize("place", ["clone", "clone/notebooks", "elsewhere"])
def test_a_missing_jaxgpt_comes_from_the_clone_around_or_else_the_public_repository(
    install, monkeypatch, tmp_path, place
):
    clone = tmp_path / "clone"
    for folder in (clone / "jaxgpt", clone / "notebooks", tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
    (clone / "jaxgpt" / "model.py").touch()
    monkeypatch.chdir(tmp_path / place)
    done = install(importable=False)

    source = ["git+https://github.com/jaxgpt/jaxgpt"] if place == "elsewhere" else ["--editable", str(clone)]
    # neither --upgrade nor a name of its own: a jax that is new enough stays as it is
    assert done["commands"] == [[sys.executable, "-m", "pip", "install", "--quiet", *source]]
    assert done["new paths"] == ([] if place == "elsewhere" else [str(clone)])


def test_the_notebook_imports_only_what_there_is(path):
    cells = nbformat.read(path, as_version=4).cells
    lines = [line for cell in cells if cell.cell_type == "code" for line in cell.source.splitlines()]
    imports = [line for line in lines if re.match(r"(from|import) jaxgpt\b", line)]
    assert len(imports) > 5
    exec("\n".join(imports), {})


def test_the_notebook_names_only_recipes_and_files_that_there_are(notebook):
    said = "\n".join(sources(notebook, "code") + sources(notebook, "markdown"))
    files = set(re.findall(r"(?<![\w/])(?:configs|docs|jaxgpt|notebooks)/[\w/]+\.(?:md|ipynb|py|yaml)\b", said))
    assert files and [name for name in files if not (ROOT / name).is_file()] == []
    assert set(re.findall(r"\bmodern/\w+(?![\w./])", said)) <= set(recipes())


def execute(path, monkeypatch):
    """Run a notebook from top to bottom in under five minutes: what it printed, and the number of its pictures."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    executed = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(executed, timeout=300, resources={"metadata": {"path": str(path.parent)}})
    began = time.perf_counter()
    client.execute()
    assert time.perf_counter() - began < 300

    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    return said, sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.long
def test_the_notebook_of_the_lecture_climbs_its_ladder(monkeypatch):
    said, pictures = execute(LECTURE, monkeypatch)
    rungs = {name.strip(): float(loss) for name, loss in re.findall(r"(?m)^(.+?) [\d,]+ param.* loss (\S+) ", said)}
    # the lecture's numbers, the counted bigrams' for positions; seeds and devices move them by 0.03
    expected = {
        "bigram": 2.49, "positions": 2.49, "one head": 2.40, "four heads": 2.29, "feed-forward": 2.25,
        "residual": 2.08, "layer norm": 2.06,
    }  # fmt: skip
    assert rungs == pytest.approx(expected, abs=0.05)
    assert float(re.search(r"GPT: validation loss ([\d.]+)", said)[1]) < 2.0
    assert pictures == 7


@pytest.mark.long
def test_the_notebook_beyond_the_lecture_shows_what_it_says(monkeypatch):
    said, pictures = execute(BEYOND, monkeypatch)
    losses = dict(re.findall(r"(?m)^(\w[\w ]*?) +validation loss ([\d.]+)$", said))
    expected = {"plain": 2.30, "new model": 2.02, "all": 1.90}  # seeds and devices move them by 0.03
    assert {name: float(loss) for name, loss in losses.items()} == pytest.approx(expected, abs=0.05)

    assert float(re.search(r"1,000 positions further on: ([\d.]+)", said)[1]) < 0.01
    first = dict(re.findall(r"(\w+\.\w+) +norm of its first gradient ([\d.]+)", said))
    assert {name for name, size in first.items() if float(size) > 0} == {"attn.proj", "mlp.proj"}
    speeds = [float(speed.replace(",", "")) for speed in re.findall(r"([\d,]+) characters/s", said)]
    assert len(speeds) == 4 and speeds[1] > 2 * speeds[0] and speeds[3] > 2 * speeds[2]  # one text, ten texts
    assert abs(float(re.search(r"difference +([-+][\d.]+)", said)[1])) < 0.02
    assert pictures == 6
