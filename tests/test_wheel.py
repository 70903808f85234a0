"""The wheel as a package index would serve it: its metadata, and that it trains without a clone."""

import json
import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = pytest.mark.full


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT))
    run(sys.executable, "-m", "twine", "check", "--strict", *map(str, folder.iterdir()))
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_holds_the_package_and_every_recipe_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {f"jaxgpt/{path.relative_to(ROOT / 'jaxgpt')}" for path in (ROOT / "jaxgpt").rglob("*.py")}
    recipes = {f"jaxgpt/configs/{path.relative_to(ROOT / 'configs')}" for path in (ROOT / "configs").rglob("*.yaml")}
    pages = {f"jaxgpt/interop/page/{path.name}" for path in (ROOT / "jaxgpt" / "interop" / "page").iterdir()}
    assert names == package | recipes | pages


def test_the_metadata_names_what_an_index_shows(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = archive.read(name).decode()
    shown = [
        "License-Expression: MIT",
        "Requires-Python: >=3.11",
        "Provides-Extra: bpe",
        "Provides-Extra: tpu",
        "Classifier: Programming Language :: Python :: 3.13",
        "Description-Content-Type: text/markdown",
    ]
    for line in shown:
        assert line in metadata, line
    assert "License-File: LICENSE" in metadata and "# jaxgpt" in metadata


@pytest.mark.long
def test_a_wheel_in_an_empty_environment_trains_outside_of_any_clone(wheel, tmp_path, text):
    run(sys.executable, "-m", "venv", str(tmp_path / "env"))
    programs = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    run(str(programs / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(wheel))
    (tmp_path / "my.txt").write_text(text, encoding="utf-8")
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    here = {"cwd": tmp_path, "env": environ}
    jaxgpt = str(programs / "jaxgpt")
    listed = subprocess.run([jaxgpt, "train"], capture_output=True, text=True, **here)
    assert listed.returncode == 2 and "--config shakespeare_cpu" in listed.stdout
    flags = ["--data.path", "my.txt", "--train.steps", "2", "--model.n_layer", "1", "--train.steps_per_call", "1"]
    assert "done" in run(jaxgpt, "train", "--config", "shakespeare_cpu", *flags, **here)
    records = (tmp_path / "runs" / "shakespeare_cpu" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(records[-1])["kind"] == "final"
    assert run(jaxgpt, "sample", "--run", "runs/shakespeare_cpu", "--max_new_tokens", "20", **here)
