import dataclasses
import pathlib
import re
import typing

import numpy as np
import pytest

import jaxgpt
from jaxgpt import Config, GPTConfig, load_config, optim
from jaxgpt import config as configs
from jaxgpt.config import ConfigError
from jaxgpt.data import DataConfig
from jaxgpt.errors import ArgumentError
from jaxgpt.interop.export import ExportArgs
from jaxgpt.interop.importing import ImportArgs
from jaxgpt.runs import changes
from jaxgpt.settings import flags
from jaxgpt.settings.checks import Path
from jaxgpt.text.prepare import PrepareArgs
from jaxgpt.tools import failures
from jaxgpt.tools.evaluate import EvalArgs
from jaxgpt.tools.ladder import LadderArgs
from jaxgpt.tools.replay import ReplayArgs
from jaxgpt.tools.sample import SampleArgs

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def write(path, content):
    path.write_text(content, encoding="utf-8")
    return str(path)


def test_command_line_wins_over_file_and_file_over_default(tmp_path):
    file = write(tmp_path / "a.yaml", "model:\n  n_layer: 3\n  n_embd: 64\nseed: 5\n")
    config = load_config(["--model.n_layer", "2", "--config", file, "--optim.learning_rate=3e-4"])
    assert (config.model.n_layer, config.model.n_embd, config.model.n_head, config.seed) == (2, 64, 4, 5)
    assert config.optim.learning_rate == 3e-4


def test_base_is_inherited_and_overridden(tmp_path):
    write(tmp_path / "a.yaml", "model:\n  n_layer: 3\n  bias: all\n")
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "b.yaml", "base: ../a.yaml\nmodel:\n  n_layer: 1\n")
    config = load_config(["--config", write(tmp_path / "c.yaml", "base: sub/b.yaml\ntrain:\n  steps: 7\n")])
    assert (config.model.n_layer, config.model.bias, config.train.steps) == (1, "all", 7)


def test_run_directory_is_named_after_the_config_file(tmp_path):
    assert load_config(["--config", write(tmp_path / "mine.yaml", "")]).run.dir == "runs/mine"
    assert load_config(["--run.dir", "here"]).run.dir == "here"
    (tmp_path / "configs" / "ladder").mkdir(parents=True)
    below = write(tmp_path / "configs" / "ladder" / "rung.yaml", "")
    assert load_config(["--config", below]).run.dir == "runs/ladder/rung"


def test_a_recipe_is_found_by_its_name_wherever_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("shakespeare_cpu", "lecture/one_head"):
        by_name = load_config(["--config", name])
        assert by_name == load_config(["--config", str(CONFIGS / f"{name}.yaml")])
        assert by_name.run.dir == f"runs/{name}"
    with pytest.raises(ConfigError, match=r"no such config .*perhaps you meant shakespeare_cpu"):
        load_config(["--config", "shakespear_cpu"])
    with pytest.raises(ConfigError, match="perhaps you meant lecture/bigram"):
        load_config(["--config", "bigrm"])


def test_a_dumped_config_loads_as_the_same(tmp_path):
    config = load_config(["--config", str(CONFIGS / "lecture" / "scaled.yaml"), "--data.path", "a b.txt"])
    assert load_config(["--config", write(tmp_path / "config.yaml", configs.dump(config))]) == config


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_loads_and_opens_with_what_it_is(file, tmp_path, monkeypatch):
    for start in ("gpt2", "smollm2"):  # what the recipes for fine-tuning start from
        (tmp_path / "runs" / start).mkdir(parents=True)
        write(tmp_path / "runs" / start / "config.yaml", configs.dump(Config()))
    monkeypatch.chdir(tmp_path)
    assert isinstance(load_config(["--config", str(file)]), Config)
    title, *header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert title.startswith("# ") and len(title) < 120
    relative = file.relative_to(CONFIGS.parent).as_posix()
    assert any(line.startswith(f"#   python train.py --config {relative}") for line in header)
    said = "\n".join(header)
    run = all(word in said for word in ("# hardware: ", "# time: ", "# validation loss, whole split"))
    assert run or "# hardware, time, loss: not run yet" in said


def test_every_field_has_a_line_of_help():
    import inspect

    def check(cls):
        source = inspect.getsource(cls)
        for field in dataclasses.fields(cls):
            if dataclasses.is_dataclass(field.type):
                check(field.type)
            else:
                assert source.split(f"    {field.name}: ")[1].splitlines()[1].startswith('    """'), field.name

    check(Config)


@pytest.mark.parametrize("spelling", ["true", "True"])
def test_switches_take_a_word_or_stand_alone(spelling):
    assert load_config(["--model.residual", "false"]).model.residual is False
    assert load_config(["--model.embedding_dropout", spelling]).model.embedding_dropout is True
    assert load_config(["--model.embedding_dropout", "--seed", "2"]).model.embedding_dropout is True


@pytest.mark.parametrize(
    "argv, message",
    [
        (
            ["--model.n_layr", "3"],
            r"unknown option \(command line, --model.n_layr\): perhaps you meant --model.n_layer",
        ),
        (["--run.peak_tflops", "-1"], r"peak_tflops is -1.0 \(command line, run\): use a number above 0"),
        (["--n_layer", "3"], "perhaps you meant --model.n_layer"),
        (["--learning-rate", "3"], "perhaps you meant --optim.learning_rate"),
        (["--zzz", "3"], "--help lists all"),
        (["--model.n_layer", "x"], "--model.n_layer.*'x'"),
        (["--model.n_layer", "2.5"], "--model.n_layer.*'2.5'"),
        (["--model.lm_head", "tide"], "'tide'.*'tied'"),
        (["--model.residual", "maybe"], "'maybe'"),
        (["--model.n_head", "3"], r"n_embd 128 is not divisible by n_head 3 \(command line, model\): change one"),
        (["--train.steps", "0"], "steps is 0"),
        (["--model.n_layer"], "write --model.n_layer VALUE"),
        (["n_layer=3"], "write flags as --name VALUE"),
        (["--config", "nowhere.yaml"], "no such config"),
    ],
)
def test_a_wrong_command_line_is_one_line_with_the_remedy(argv, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(argv)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        ("model:\n  n_layr: 3\n", r"unknown option \(.*bad.yaml, model.n_layr\): perhaps you meant --model.n_layer"),
        ("modle:\n  n_layer: 3\n", "perhaps you meant --model.n_layer"),
        ("model:\n  n_layer: three\n", "n_layer.*'three'"),
        ("model:\n  n_layer: [1, 2]\n", "not a single value.*model.n_layer"),
        ("model: [1, 2]\n", "unknown option.*model"),
        ("model:\n\t- :", "not YAML.*line 2"),
        ("just text", "no sections"),
        ("- 1\n- 2\n", "no sections"),
        ("base: bad.yaml\n", "its own base"),
        ("base: nowhere.yaml\n", "no such config"),
        ("seed: 1\nmodel:\n  n_layer: 1\nseed: 2\n", r"duplicate key \(.*bad.yaml, line 4, seed\)"),
        ("model:\n  n_layer: 1\nmodel:\n  n_head: 1\n", r"duplicate key \(.*bad.yaml, line 3, model\)"),
        ("model:\n  n_layer: 1\n  n_head: 1\n  n_layer: 1\n", r"duplicate key \(.*bad.yaml, line 4, n_layer\)"),
        ("seed: !!python/object/apply:os.system ['true']\n", "not a single value"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(tmp_path, content, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(["--config", write(tmp_path / "bad.yaml", content)])
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(["--config", str(tmp_path / "bad.yaml")])


def test_only_fields_that_decide_the_numbers_count_as_different():
    ours = configs.flat(load_config([]))
    same = ["--run.dir", "else", "--train.steps", "9", "--train.log_interval", "3", "--run.keep", "5"]
    same += ["--optim.decay_steps", "2000", "--data.path", "moved.txt"]  # which is where the cosine ended before
    assert changes.differences(ours, configs.flat(load_config(same))) == []
    more = configs.flat(load_config(["--train.steps", "9"]))
    assert changes.differences(ours, more) == ["optim.decay_steps (was 2000, now 9) because train.steps differs"]
    other = configs.flat(load_config(["--model.n_layer", "2", "--seed", "1"]))
    assert changes.differences(ours, other) == ["seed (was 1337, now 1)", "model.n_layer (was 4, now 2)"]


def test_a_field_that_came_later_had_its_default_before():
    now = configs.flat(load_config([]))
    before = {name: value for name, value in now.items() if name != "model.n_layer"}
    assert changes.differences(before, now) == []
    assert changes.differences(before, {**now, "model.n_layer": 9}) == ["model.n_layer (was 4, now 9)"]


COMMANDS = [Config, SampleArgs, EvalArgs, ReplayArgs, LadderArgs, ImportArgs, ExportArgs, PrepareArgs]


def paths_of(cls):
    return [name for name, kind in flags.fields(cls).items() if Path in (kind, *typing.get_args(kind))]


@pytest.mark.parametrize("cls", COMMANDS, ids=lambda cls: cls.__name__)
def test_home_is_meant_by_a_tilde_in_every_path(cls, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    required = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
    values = {name.rstrip("_"): "1" for name in required if not dataclasses.is_dataclass(cls.__annotations__[name])}
    assert paths_of(cls)
    for name in paths_of(cls):
        built = flags.parse(cls, {**values, name: "~/x"}, "here")
        for part in name.split("."):
            built = getattr(built, part if hasattr(built, part) else part + "_")
        assert built == "/somewhere/x", name


def test_no_field_that_holds_a_path_is_a_plain_text():
    """What `--help` calls a file or a folder has the type in which `~` is expanded."""
    plain = {"PrepareArgs.input"}  # several, with commas between them: they are expanded one by one
    plain |= {"DataConfig.name", "EvalArgs.name", "LadderArgs.name", "PrepareArgs.text_field"}  # they only mention one
    for cls in COMMANDS:
        for section in [cls, *(kind for kind in typing.get_type_hints(cls).values() if dataclasses.is_dataclass(kind))]:
            docs = flags._docstrings(section)
            for field in dataclasses.fields(section):
                a_path = re.search(r"\b([Ff]older|[Ff]ile|[Dd]irectory)\b", docs.get(field.name, "").split(".")[0])
                text = field.type is str or str in typing.get_args(field.type)
                assert not (a_path and text) or f"{section.__name__}.{field.name}" in plain, field.name


def test_the_home_is_meant_from_python_too(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert configs.RunConfig(dir="~/x").dir == configs.RunConfig(dir=pathlib.Path("~/x")).dir == "/somewhere/x"
    assert DataConfig(path="~/x").path == "/somewhere/x" and DataConfig(path=None).path is None


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: GPTConfig(n_layer="3"), "n_layer is '3': use a whole number"),
        (lambda: GPTConfig(n_layer=2.0), "n_layer is 2.0: use a whole number"),
        (lambda: GPTConfig(dropout="0.1"), "dropout is '0.1': use a number"),
        (lambda: GPTConfig(positions="rotary"), "positions is 'rotary': use one of 'learned', 'none'"),
        (lambda: GPTConfig(residual="no"), "residual is 'no': use true or false"),
        (lambda: DataConfig(path=3), "path is 3: use a path or None"),
        (lambda: DataConfig(batch_size=None), "batch_size is None: use a whole number"),
        (lambda: Config(model=3), "model is 3: use GPTConfig"),
        (lambda: Config(model=DataConfig()), "model is DataConfig.*: use GPTConfig"),
        (lambda: Config(seed="1"), "seed is '1': use a whole number"),
        (lambda: configs.RunConfig(resume=True), "resume is True: use one of"),
        (lambda: load_config("--seed 1"), "one text.*: pass a list of words"),
        (lambda: jaxgpt.train(None), "not a configuration.*load_config"),
        (lambda: jaxgpt.train("configs/shakespeare_cpu.yaml"), "not a configuration.*load_config"),
        (lambda: jaxgpt.load(None), "not a run directory"),
        (lambda: jaxgpt.load("runs/x", "best"), "a whole number, 'last' or None"),
    ],
)
def test_a_mistake_from_python_names_the_argument_and_the_remedy(make, message):
    with pytest.raises(ArgumentError, match=message) as error:
        make()
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_numbers_of_numpy_are_numbers():
    assert GPTConfig(n_layer=np.int64(3), dropout=np.float32(0.5)).n_layer == 3
    assert GPTConfig(dropout=0).dropout == 0


@pytest.mark.parametrize("seed, fits", [(0, 1), (2**32 - 1, 1), (2**32, 0), (-1, 0), (99999999999999999999, 0)])
def test_a_seed_is_one_that_jax_tells_from_the_others(seed, fits, tmp_path):
    doors = [
        lambda: Config(seed=seed),
        lambda: load_config(["--seed", str(seed)]),
        lambda: load_config(["--config", write(tmp_path / "a.yaml", f"seed: {seed}")]),
        lambda: flags.parse(SampleArgs, {"run": "x", "seed": str(seed)}, "here"),
    ]
    for door in doors:
        if fits:
            assert door().seed == seed
        else:
            with pytest.raises(ArgumentError, match=r"seed is .*: use a whole number from 0 to 4294967295"):
                door()


@pytest.mark.parametrize("word", ["true", "True", "null", "None", "", "~", "1.0"])
def test_free_text_is_never_taken_for_another_value(word):
    assert flags.parse(SampleArgs, {"run": "x", "prompt": word}, "here").prompt == word
    assert flags.parse(SampleArgs, {"run": "x"}, "here").prompt is None


def test_a_minimum_above_the_peak_rate_is_an_error_that_names_both():
    both = r"min_learning_rate 0.1 is above learning_rate 0.01.*lower it"
    with pytest.raises(ArgumentError, match=both):
        optim.schedule(optim.OptimConfig(learning_rate=0.01, min_learning_rate=0.1), 10)
    optim.schedule(optim.OptimConfig(learning_rate=0.01, min_learning_rate=0.01), 10)


def test_the_cosine_ends_with_the_run_unless_told_otherwise():
    given = optim.OptimConfig(warmup_steps=0, decay_steps=0)
    for steps in (10, 20):
        rate = optim.schedule(given, steps)
        assert float(rate(steps)) == pytest.approx(given.min_learning_rate)
        assert float(rate(steps - 1)) > 1.01 * given.min_learning_rate
    rate = optim.schedule(dataclasses.replace(given, decay_steps=10), 20)
    assert float(rate(10)) == pytest.approx(given.min_learning_rate)


@pytest.mark.parametrize("text", ["x" * 50_000, "ä\x1b" * 30_000])
def test_an_error_line_is_short_however_long_its_cause(text):
    for error in (ConfigError(f"no such thing (here, {text}): do this"), ArgumentError(text)):
        code, line = failures.describe(error)
        assert code == 2 and len(line) < 1100 and line.endswith(str(error)[-100:].replace("\x1b", "\\x1b")[-100:])
