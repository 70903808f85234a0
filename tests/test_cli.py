import importlib
import io
import itertools
import json
import os
import pathlib
import pkgutil
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import jaxgpt
from jaxgpt import cli
from jaxgpt.errors import JaxgptError, JaxgptWarning
from jaxgpt.files import download
from jaxgpt.runs import manifest
from jaxgpt.tools import failures

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def run_dir(trained):
    """A small trained run, which is only read."""
    return trained[0]


def error_of(capsys, argv):
    """The exit code and the only line on stderr of a command that fails."""
    code = cli.main(argv)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    lines = [line for line in captured.err.splitlines() if not line.startswith("run ")]
    assert lines[0].startswith("jaxgpt: error: ")
    return code, "\n".join(lines)


def test_help_names_every_command_and_exit_code(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in cli.COMMANDS)
    assert all(re.search(rf"\s{code} [a-zC]", out) for code in (0, 1, 2, 3, 4, 5, 6, 7, 9, 75, 130))


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_command_explains_its_flags(command, capsys):
    assert cli.main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert {"train": "--model.n_layer", "ladder": "--seeds", "prepare": "--input", "doctor": "usage"}.get(
        command, "--run"
    ) in out


def test_train_without_a_recipe_lists_each_of_them_once(capsys, monkeypatch, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").write_text("# A recipe of my own\n")
    names = [file.relative_to(ROOT / "configs").with_suffix("") for file in (ROOT / "configs").rglob("*.yaml")]
    for folder, others in ((ROOT, []), (tmp_path, ["configs/mine.yaml"])):
        monkeypatch.chdir(folder)
        assert cli.main(["train"]) == 2
        said = capsys.readouterr()
        assert said.err == "jaxgpt: error: no recipe (--config): choose one of those above\n"
        listed = re.findall(r"^  --config (\S+)", said.out, re.MULTILINE)
        assert sorted(listed) == sorted([*(name.as_posix() for name in names), *others])


def test_a_recipe_without_its_flag_is_answered_with_the_flag(capsys):
    code, line = error_of(capsys, ["train", "configs/shakespeare_cpu.yaml"])
    assert code == 2 and line.endswith("write --config configs/shakespeare_cpu.yaml")


@pytest.mark.parametrize(
    "argv, remedy",
    [(["trian"], "`jaxgpt train`"), (["train", "--config", "x", "--modl.n_layr", "1"], "--model.n_layer")],
)
def test_mistyped_words_are_answered_with_the_right_ones(capsys, argv, remedy):
    code, message = error_of(capsys, argv)
    assert code == 2 and remedy in message


def test_what_happens_is_said_in_plain_lines_without_a_terminal(tiny_config, capsys, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("")
    assert cli.main(["train", "--config", str(file), *tiny_config]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    order = [
        "devices",
        "model",
        "corpus",
        "step",
        "run",
        "compile",
        "step  0/40",
        "step  5/40",
        "done",
        "sample",
        "more",
    ]
    assert [out.index(word) for word in order] == sorted(out.index(word) for word in order)
    assert f"jaxgpt sample --run {tmp_path / 'run'}" in out


@pytest.mark.full
def test_a_run_that_learned_nothing_says_so(tiny_config, capsys, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("")
    flags = ["--optim.learning_rate", "3", "--optim.min_learning_rate", "3"]
    assert cli.main(["train", "--config", str(file), *tiny_config, *flags]) == 0
    assert "warning  nothing was learned" in capsys.readouterr().out
    assert cli.main(["train", "--config", str(file), *tiny_config, "--run.dir", str(tmp_path / "other")]) == 0
    assert "nothing was learned" not in capsys.readouterr().out


def test_evaluating_on_another_text_is_refused(run_dir, capsys):
    file = run_dir.parent / "my.txt"
    text = file.read_text()
    file.write_text(text[::-1])
    code, message = error_of(capsys, ["eval", "--run", str(run_dir)])
    file.write_text(text)
    assert code == 3 and "not the text" in message


def test_only_the_text_goes_to_stdout(run_dir, capsys):
    argv = ["sample", "--run", str(run_dir), "--prompt", "the king", "--max_new_tokens", "30", "--seed", "3"]
    assert cli.main(argv) == 0
    whole = capsys.readouterr().out
    assert whole.startswith("the king") and len(whole) == len("the king") + 30 + 1
    assert cli.main([*argv, "--stream"]) == 0
    assert capsys.readouterr().out == whole
    assert cli.main([*argv, "--seed", "4"]) == 0
    assert capsys.readouterr().out != whole


@pytest.mark.full
@pytest.mark.parametrize("more", [[], ["--stream"]])
def test_a_reader_that_leaves_early_is_no_error(run_dir, more):
    command = [sys.executable, "-m", "jaxgpt", "sample", "--run", str(run_dir), "--max_new_tokens", "40", *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read().splitlines() == [f"run {run_dir}, step 40"] and process.wait() == 0


def test_several_samples_are_separated_by_dashes(run_dir, capsys):
    assert cli.main(["sample", "--run", str(run_dir), "--num_samples", "3", "--max_new_tokens", "5"]) == 0
    assert capsys.readouterr().out.count("\n---------------\n") == 2


def test_the_prompt_can_be_a_file(run_dir, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("the queen")
    assert cli.main(["sample", "--run", str(run_dir), "--prompt_file", str(tmp_path / "prompt.txt")]) == 0
    assert capsys.readouterr().out.startswith("the queen")


def test_eval_is_one_json_line_of_the_whole_split(run_dir, capsys):
    assert cli.main(["eval", "--run", str(run_dir), "--split", "train"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result.keys() == {"split", "step", "tokens", "nats_per_token", "bits_per_byte"}
    assert (result["split"], result["step"], result["tokens"]) == ("train", 40, 17_999)
    # one byte a character here
    assert result["bits_per_byte"] == pytest.approx(result["nats_per_token"] / np.log(2))


@pytest.mark.parametrize(
    "flags, code, message",
    [
        (["--prompt", "été"], 2, "unknown character 'é' (position 0)"),
        (["--temperature", "-1"], 2, "temperature is -1.0"),
        (["--temperature", "hot"], 2, "--temperature"),
        (["--top_p", "2"], 2, "top_p is 2.0"),
        (["--top_k", "0"], 2, "top_k is 0"),
        (["--max_new_tokens", "0"], 2, "max_new_tokens is 0"),
        (["--num_samples", "2", "--stream"], 2, "--stream"),
        (["--prompt_file", "/nowhere"], 2, "/nowhere"),
        (["--tempreature", "1"], 2, "perhaps you meant --temperature"),
    ],
)
def test_a_sample_that_cannot_be_drawn_is_one_line(run_dir, capsys, flags, code, message):
    assert (error := error_of(capsys, ["sample", "--run", str(run_dir), *flags]))[0] == code
    assert message in error[1] and "\n" not in error[1]


def test_errors_have_the_documented_exit_codes(capsys, tmp_path, tiny_config, text_file):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("")
    train = ["train", "--config", str(recipe), *tiny_config]
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xfa" * 100)
    (tmp_path / "short.txt").write_text("to be")
    for name, words in {
        "nowhere.txt": "no such file",
        "empty.txt": "empty",
        "binary.txt": "UTF-8",
        "short.txt": "tokens",
    }.items():
        code, message = error_of(capsys, [*train, "--data.path", str(tmp_path / name)])
        assert code == 3 and words in message and "\n" not in message, name
    assert not (tmp_path / "run").exists()
    assert error_of(capsys, ["sample", "--run", str(tmp_path)])[0] == 4
    assert error_of(capsys, ["eval", "--run", str(tmp_path / "nowhere")])[0] == 4
    assert cli.main(train) == 0
    capsys.readouterr()
    code, message = error_of(capsys, [*train, "--model.n_layer", "2"])
    assert code == 6 and "model.n_layer (was 1, now 2)" in message


def test_a_folder_that_cannot_be_written_is_a_storage_error(capsys, tmp_path, tiny_config):
    (tmp_path / "recipe.yaml").write_text("")
    (tmp_path / "file").write_text("")
    argv = ["train", "--config", str(tmp_path / "recipe.yaml"), *tiny_config]
    code, message = error_of(capsys, [*argv, "--run.dir", str(tmp_path / "file" / "run")])
    assert code == 7 and str(tmp_path / "file") in message


def test_doctor_prints_what_jax_found_and_takes_no_flags(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {topic} " in out or f"! {topic} " in out for topic in ("python", "packages", "devices", "cache"))
    assert error_of(capsys, ["doctor", "--fast"])[0] == 2


def test_a_bug_asks_for_debug_which_shows_the_traceback(capsys, monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "eval", lambda argv: 1 / 0)
    assert error_of(capsys, ["eval"]) == (
        1,
        "jaxgpt: error: ZeroDivisionError: division by zero\n"
        "This is a bug in jaxgpt: repeat the command with --debug and report what it prints.",
    )
    assert cli.main(["--debug", "eval"]) == 1
    assert "Traceback" in capsys.readouterr().err


def start(argv):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, *argv], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(path, words, process):
    for _ in range(1200):
        if path.exists() and words in path.read_text():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    raise AssertionError(f"{words} never came")


@pytest.mark.full
@pytest.mark.parametrize("argv, code, left_out", [(["sample", "--run", "none"], 4, True), (["trian"], 2, False)])
def test_garbage_is_searched_for_again_after_the_imports_but_not_in_them(argv, code, left_out):
    script = f"import gc; from jaxgpt.cli import main; print(main({argv}), gc.isenabled(), gc.get_freeze_count() > 0)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == [str(code), "True", str(left_out)], done.stderr


@pytest.mark.full
@pytest.mark.parametrize(
    "number, code",
    [
        (signal.SIGTERM, 75),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.long),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.long),  # test_kills.py kills
    ],
)
def test_a_stopped_process_carries_on_when_its_command_is_repeated(tiny_config, tmp_path, number, code):
    (tmp_path / "recipe.yaml").write_text("")
    argv = ["train.py", "--config", str(tmp_path / "recipe.yaml"), *tiny_config, "--train.steps", "20000"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    process = start(argv)
    wait_for(metrics, '"step": 60,', process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in err
    if code > 0:
        assert "run the same command again" in err and (tmp_path / "run" / "loss.png").exists()
    process = start(argv)
    wait_for(
        metrics,
        f'"step": {max(jaxgpt.runs.checkpoint.Checkpoints(tmp_path / "run" / "checkpoints").steps())}, "dev',
        process,
    )
    process.kill()
    process.communicate()


@pytest.mark.full
def test_the_module_and_the_script_are_the_same_door():
    flags = ["--config", "configs/shakespeare_cpu.yaml", "--no_such", "1"]
    found = set()
    for door in (["-m", "jaxgpt", "train"], ["train.py"]):
        process = start([*door, *flags])
        out, err = process.communicate(timeout=60)
        found.add((process.returncode, out, err))
    assert found == {(2, "", "jaxgpt: error: unknown option (command line, --no_such): --help lists all\n")}


def test_the_cache_is_private_and_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path / "cache"))
    assert download.cache_dir() == tmp_path / "cache"


@pytest.mark.full
def test_an_error_starts_no_backend():
    """A wrong flag is answered where jax itself cannot start, too."""
    environ = {**os.environ, "JAX_PLATFORMS": "nowhere"}
    command = [sys.executable, "-m", "jaxgpt", "train", "--modle.n_layer", "2"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("jaxgpt: error: ") and "Traceback" not in done.stderr


@pytest.mark.full
def test_control_characters_are_harmless_on_a_terminal_and_unchanged_in_a_file(tmp_path, capsys, monkeypatch):
    text = tmp_path / "my.txt"
    text.write_text("a\x1b[31m\x07b\x9b0c\n\t" * 300, encoding="utf-8")
    run = ["--run.dir", str(tmp_path / "run"), "--data.path", str(text), "--model.n_layer", "0", "--train.steps", "2"]
    config = pathlib.Path("configs/lecture/bigram.yaml")
    assert cli.main(["train", "--config", str(config), *run, "--train.eval_interval", "2"]) == 0
    assert not set(capsys.readouterr().out) & set("\x1b\x07\x9b")
    said = {}
    for terminal, stream in itertools.product((False, True), repeat=2):
        monkeypatch.setattr(type(cli.sys.stdout), "isatty", lambda _, terminal=terminal: terminal)
        argv = ["sample", "--run", str(tmp_path / "run"), "--max_new_tokens", "200", *(["--stream"] if stream else [])]
        assert cli.main(argv) == 0
        said[terminal, stream] = capsys.readouterr().out
    assert said[False, False] == said[False, True] and set(said[False, True]) >= set("\x1b\x07\x9b\n\t")
    for stream in (False, True):
        escaped = said[False, stream].replace("\x1b", "\\x1b").replace("\x07", "\\x07").replace("\x9b", "\\x9b")
        assert said[True, stream] == escaped


def broken(*_, **__):
    raise RuntimeError("no such luck")


@pytest.mark.parametrize(
    "what, name",
    [
        ("progress on the screen", "jaxgpt.runs.metrics.Console.__call__"),
        ("loss.png", "jaxgpt.runs.report.draw_loss"),
        ("progress bar", "jaxgpt.runs.metrics.Console.close"),
    ],
)
def test_what_only_shows_progress_may_fail_without_harm(tiny_config, tmp_path, monkeypatch, what, name):
    monkeypatch.setattr(name, broken)
    with pytest.warns(UserWarning, match=f"no {what} .*no such luck") as warned:
        run = jaxgpt.train(jaxgpt.load_config([*tiny_config, "--train.steps", "10"]))
    assert run.step == 10 and len([each for each in warned if "no such luck" in str(each.message)]) == 1
    assert jaxgpt.load(tmp_path / "run").step == 10


class Failing(io.StringIO):
    """A stdout that can take nothing: its reader is gone, its disk is full, or its terminal knows only ASCII."""

    encoding = "ascii"

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        text.encode(self.encoding)
        if self.error:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize(
    "error, terminal",
    [
        (None, False),
        (BrokenPipeError(32, "pipe"), True),
        pytest.param(None, True, marks=pytest.mark.full),
        pytest.param(BrokenPipeError(32, "pipe"), False, marks=pytest.mark.full),
        pytest.param(OSError(28, "full"), False, marks=pytest.mark.full),
        pytest.param(OSError(5, "gone"), True, marks=pytest.mark.full),
    ],
)
def test_training_saves_and_leaves_with_0_whatever_becomes_of_stdout(
    tiny_config, tmp_path, monkeypatch, error, terminal
):
    text = tmp_path / "\u4e2d\u6587.txt"
    text.write_text("\u4e2d\u6587\u5b57\u7b26\n" * 500, encoding="utf-8")
    run_dir = tmp_path / "\u8fd0\u884c a$\\x$b"
    flags = ["--data.path", str(text), "--run.dir", str(run_dir), "--train.steps", "10"]
    stdout = Failing(error)
    stdout.isatty = lambda: terminal
    (tmp_path / "recipe.yaml").write_text("")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert cli.main(["train", "--config", str(tmp_path / "recipe.yaml"), *tiny_config, *flags]) == 0
    assert jaxgpt.load(run_dir).step == 10 and (run_dir / "loss.png").stat().st_size > 5000
    assert not (tmp_path / "\u8fd0\u884c a$").exists()  # where tensorstore would put the arrays
    if not error:
        assert "\\u8fd0" in stdout.getvalue() and "done" in stdout.getvalue()


@pytest.mark.full
def test_ctrl_c_in_a_pipe_whose_reader_has_gone_saves(tiny_config, tmp_path):
    """A terminal sends Ctrl-C to `train | tee` as a whole, and tee is gone first."""
    (tmp_path / "recipe.yaml").write_text("")
    argv = ["train.py", "--config", str(tmp_path / "recipe.yaml"), *tiny_config, "--train.steps", "20000"]
    process = start(argv)
    wait_for(tmp_path / "run" / "metrics.jsonl", '"step": 60,', process)
    process.stdout.close()
    time.sleep(0.5)
    assert process.poll() is None  # it trains on
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    assert process.wait(timeout=60) == 130 and said.startswith("stopped and saved at step ")
    assert jaxgpt.load(tmp_path / "run").step > 0


@pytest.mark.full
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("command, code", [("sample", 7), ("eval", 7), ("train", 0)])
def test_a_result_that_cannot_be_written_is_an_error_and_progress_is_not(trained, trained_copy, command, code):
    run = ["--config", str(trained_copy / "config.yaml")] if command == "train" else ["--run", str(trained_copy)]
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "jaxgpt", command, *run]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert ("No space left on device" in done.stderr) == (code == 7)


def test_a_read_only_cache_is_one_warning(trained, tmp_path, monkeypatch):
    (tmp_path / "xla").mkdir()
    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    settings = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        with pytest.warns(JaxgptWarning) as warned:
            assert cli.main(["sample", "--run", str(trained[0]), "--max_new_tokens", "7"]) == 0
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    assert len(warned) == 1 and f"{tmp_path / 'xla'}, read-only" in str(warned[0].message)
    assert not list((tmp_path / "xla").iterdir())


class Odd(Exception):
    pass


@pytest.mark.parametrize(
    "error, code, words",
    [
        (ValueError("of a library"), 1, "ValueError: of a library"),
        (TypeError("of a library"), 1, "TypeError"),
        (RuntimeError("abort: Barrier shut down"), 1, "RuntimeError"),
        (KeyError("https://"), 1, "KeyError"),
        (Odd("what"), 1, "Odd: what"),
        (SystemExit(1), 1, "SystemExit"),
        (FileNotFoundError(2, "No such file", "x"), 1, "FileNotFoundError"),
        (PermissionError(13, "Permission denied", "x"), 7, "cannot write (x, Permission denied"),
        (OSError(36, "File name too long", "x"), 7, "cannot write (x, File name too long"),
        (OSError(28, "No space left", "x"), 7, "free space, or name another folder"),
        (OSError(19, "No such device", "x"), 7, "cannot write (x, No such device"),
        (MemoryError("8 GB"), 9, "out of memory (8 GB): halve --data.batch_size"),
        (RuntimeError("Unable to initialize backend 'cuda': none"), 2, "set JAX_PLATFORMS"),
        (KeyboardInterrupt(), 130, "Ctrl-C"),
    ],
)
def test_only_errors_meant_for_users_and_the_system_s_are_no_bugs(error, code, words):
    found, line = failures.describe(error)
    assert found == code and words in line


def test_every_error_of_ours_says_its_code_and_derives_from_the_one_base():
    """An exception class of this package is a JaxgptError, or is caught where it is raised."""
    inner = {"DamagedError", "OtherFormatError", "_DuplicateKeyError", "_Refused"}
    for name in [module.name for module in pkgutil.walk_packages(jaxgpt.__path__, "jaxgpt.")]:
        if name != "jaxgpt.__main__":
            for cls in vars(importlib.import_module(name)).values():
                if isinstance(cls, type) and issubclass(cls, Exception) and cls.__module__.startswith("jaxgpt."):
                    ours = issubclass(cls, JaxgptError | Warning)
                    assert ours or cls.__name__ in inner, cls
                    if issubclass(cls, JaxgptError) and cls.__name__ not in ("JaxgptError", "Stopped"):
                        assert issubclass(cls, ValueError | TypeError | RuntimeError | ArithmeticError), cls
                        assert cls.exit_code in (2, 3, 4, 5, 6, 7, 8, 9), cls


@pytest.mark.parametrize("place", ["https://host/run", "ftp://host/run", "file:///tmp/run", "gs://bucket/run"])
@pytest.mark.parametrize("command", ["train", "sample", "init_from"])
def test_an_address_that_cannot_be_a_run_directory_is_one_line(tiny_config, tmp_path, capsys, place, command):
    (tmp_path / "recipe.yaml").write_text("")
    train = ["train", "--config", str(tmp_path / "recipe.yaml"), *tiny_config]
    argv = {"train": [*train, "--run.dir", place], "sample": ["sample", "--run", place]}
    code, line = error_of(capsys, argv.get(command, [*train, "--run.init_from", place]))
    remedy = "pip install gcsfs" if place.startswith("gs") else "use a local path, or an object store (gs://"
    assert code == 2 and place in line and remedy in line and "\n" not in line


def test_a_name_that_is_too_long_for_the_disk_is_one_line(tiny_config, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("")
    argv = ["train", "--config", str(tmp_path / "recipe.yaml"), *tiny_config]
    code, line = error_of(capsys, [*argv, "--run.dir", str(tmp_path / ("x" * 300))])
    assert code == 7 and "File name too long" in line and "\n" not in line


def test_eval_says_which_step_it_takes_and_can_take_the_last(trained, trained_copy, capsys):
    """The best step is 30 or 40 by its estimate; the other one is made the best in a copy."""
    path = trained_copy / "checkpoints" / "30" / "manifest.json"
    facts = json.loads(path.read_text())
    facts.pop("sha256")
    path.write_text(manifest._sealed({**facts, "val_loss": 0.5}))
    steps, losses = [], []
    for flags in ([], ["--step", "last"], ["--step", "30"], ["--step", "40"]):
        assert cli.main(["eval", "--run", str(trained_copy), *flags]) == 0
        said = capsys.readouterr()
        steps.append(json.loads(said.out)["step"])
        losses.append(json.loads(said.out)["nats_per_token"])
        assert f"step {steps[-1]}" in said.err and ("see --step last" in said.err) == (not flags)
    assert steps == [30, 40, 30, 40] and losses[0] == losses[2] != losses[1] == losses[3]
    for wrong, remedy in {
        "lst": "a whole number or last",
        "2.5": "a whole number or last",
        "35": "saved steps are 30, 40",
    }.items():
        assert remedy in error_of(capsys, ["eval", "--run", str(trained_copy), "--step", wrong])[1]
    capsys.readouterr()
    assert cli.main(["sample", "--run", str(trained_copy), "--step", "last", "--max_new_tokens", "1"]) == 0
    assert "step 40" in capsys.readouterr().err


def test_a_text_of_a_few_tokens_can_be_evaluated_as_a_whole(trained, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("the king")
    assert cli.main(["eval", "--run", str(trained[0]), "--path", str(tmp_path / "short.txt"), "--split", "all"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 7
