import dataclasses
import pathlib

import pytest

from jaxgpt import Config, load_config
from jaxgpt import config as configs
from jaxgpt.config import ConfigError

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
    (tmp_path / "runs" / "gpt2").mkdir(parents=True)
    write(tmp_path / "runs" / "gpt2" / "config.yaml", configs.dump(Config()))  # what finetune_gpt2.yaml starts from
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
    same = load_config(["--run.dir", "else", "--train.steps", "9", "--train.log_interval", "3", "--run.keep", "5"])
    assert configs.differences(ours, configs.flat(same)) == []
    other = configs.flat(load_config(["--model.n_layer", "2", "--seed", "1"]))
    assert configs.differences(ours, other) == ["seed (was 1337, now 1)", "model.n_layer (was 4, now 2)"]


def test_a_field_that_came_later_had_its_default_before():
    now = configs.flat(load_config([]))
    before = {name: value for name, value in now.items() if name != "model.n_layer"}
    assert configs.differences(before, now) == []
    assert configs.differences(before, {**now, "model.n_layer": 9}) == ["model.n_layer (was 4, now 9)"]
