import json
import shutil

import chex
import pytest
import yaml
from flax import nnx

import jaxgpt
from jaxgpt import cli, optim
from jaxgpt.config import load_config
from jaxgpt.runs import directory
from jaxgpt.runs.checkpoint import CheckpointWarning
from jaxgpt.runs.directory import OtherRunError


def records(run_dir, kind):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def last(run_dir):
    """The last start record, and the records of training that follow it."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    begin = max(i for i, record in enumerate(lines) if record["kind"] == "start")
    return lines[begin], [record for record in lines[begin:] if record["kind"] == "train"]


@pytest.fixture
def again(trained, trained_copy):
    """Train in a copy of the trained run, with more flags."""
    return lambda *flags: jaxgpt.train(load_config([*trained[1], "--run.dir", str(trained_copy), *flags]))


CHANGED = ("--run.resume", "changed")


@pytest.mark.parametrize(
    "flags, changed",
    [
        (["--train.steps", "50"], {"train.steps": [40, 50]}),
        (["--train.steps", "45", "--optim.learning_rate", "5e-4"],
         {"train.steps": [40, 45], "optim.learning_rate": [1e-3, 5e-4]}),
        (["--train.steps", "45", "--data.batch_size", "2", "--optim.grad_accumulation", "2"],
         {"train.steps": [40, 45], "data.batch_size": [4, 2], "optim.grad_accumulation": [1, 2]}),
        (["--train.steps", "45", "--model.dropout", "0.2", "--model.remat", "dots", "--seed", "3"],
         {"seed": [1337, 3], "model.dropout": [0.1, 0.2], "model.remat": ["none", "dots"], "train.steps": [40, 45]}),
        (["--train.steps", "45", "--optim.grad_clip", "0", "--train.eval_interval", "5"],
         {"optim.grad_clip": [1.0, 0.0], "train.steps": [40, 45], "train.eval_interval": [20, 5]}),
    ],
)  # fmt: skip
def test_a_run_goes_on_with_changed_settings_and_says_which(again, trained_copy, flags, changed):
    with pytest.raises(OtherRunError, match=r"--run.resume changed") as refused:
        again(*flags)
    decides = {"train.steps": "optim.decay_steps", "model.remat": None, "train.eval_interval": None}
    for name in changed:
        assert (wanted := decides.get(name, name)) is None or f"{wanted} (was " in str(refused.value)
    assert refused.value.exit_code == 6 and len(records(trained_copy, "start")) == 1
    run = again(*flags, *CHANGED)
    start, train = last(trained_copy)
    assert (start["step"], start["changed"]) == (40, changed)
    assert train[0]["step"] == 45 and run.step == changed["train.steps"][1]
    stored = load_config(["--config", str(trained_copy / "config.yaml")])
    assert stored.run.resume == "auto" and stored.optim.decay_steps == 0
    for name, (_, now) in changed.items():
        section, _, field = name.rpartition(".")
        assert getattr(getattr(stored, section) if section else stored, field) == now
    assert last(trained_copy)[0]["changed"] == changed  # from here on it is an ordinary run with these settings
    again(*flags)
    assert last(trained_copy)[0]["changed"] == {} and last(trained_copy)[0]["step"] == run.step


def test_steps_and_moments_go_on_and_the_schedule_is_the_new_one_at_the_global_step(again, trained, trained_copy):
    whole = [r["learning_rate"] for r in records(trained[0], "train")]
    again("--train.steps", "80", *CHANGED)
    rate = {r["step"]: r["learning_rate"] for r in last(trained_copy)[1]}
    config = load_config([*trained[1], "--train.steps", "80"])
    expected = optim.schedule(config.optim, 80)
    assert rate == pytest.approx({step: float(expected(step - 1)) for step in rate}, rel=1e-6)
    assert rate[45] > 2 * whole[-1]


def test_a_change_of_batch_with_the_same_windows_changes_only_how_they_are_added_up(trained, tmp_path):
    """What out of memory advises: half the batch, twice the accumulation, from the same checkpoint."""
    losses = []
    for name, flags in {"same": [], "halved": ["--data.batch_size", "2", "--optim.grad_accumulation", "2"]}.items():
        shutil.copytree(trained[0], tmp_path / name)
        flags = [*flags, "--train.steps", "50", "--model.dropout", "0", "--run.dir", str(tmp_path / name), *CHANGED]
        jaxgpt.train(load_config([*trained[1], *flags]))
        losses.append([r["loss"] for r in last(tmp_path / name)[1]])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)  # float32 sums in another order


@pytest.mark.parametrize("flags", [["--model.n_layer", "2"], ["--model.bias", "all"], ["--model.block_size", "8"]])
def test_another_model_cannot_continue_a_run(again, trained_copy, flags):
    before = (trained_copy / "config.yaml").read_bytes()
    with pytest.raises(OtherRunError, match=flags[0][2:]) as refused:
        again(*flags, *CHANGED)
    assert "--run.resume changed" not in str(refused.value)
    assert (trained_copy / "config.yaml").read_bytes() == before


def test_another_text_can_be_trained_on_if_it_has_the_run_s_tokenizer(again, trained_copy, tmp_path, text):
    (tmp_path / "other.txt").write_text(text[::-1])
    (tmp_path / "strange.txt").write_text(text + "\u4e2d")
    more = ("--train.steps", "60", "--data.path")
    with pytest.raises(OtherRunError, match="the tokenizer"):
        again(*more, str(tmp_path / "strange.txt"), *CHANGED)
    with pytest.raises(OtherRunError, match=r"the text itself.*--run.resume changed"):
        again("--data.path", str(tmp_path / "other.txt"))
    again(*more, str(tmp_path / "other.txt"), *CHANGED)
    run = jaxgpt.load(trained_copy)
    assert run.step == 60  # losses on the first text, however low, do not count for the second
    assert cli.main(["eval", "--run", str(trained_copy)]) == 0


def test_a_change_that_was_killed_before_its_first_checkpoint_is_made_again(again, trained_copy):
    flags = ("--train.steps", "60", "--optim.learning_rate", "5e-4")
    text = (trained_copy / "config.yaml").read_text()
    (trained_copy / "config.yaml").write_text(text.replace("learning_rate: 0.001", "learning_rate: 0.0005", 1))
    assert jaxgpt.load(trained_copy).step in (30, 40)  # it can be read meanwhile
    with pytest.raises(OtherRunError, match=r"--run\.resume changed"):
        again(*flags)
    again(*flags, *CHANGED)
    assert last(trained_copy)[0]["changed"]["optim.learning_rate"] == [1e-3, 5e-4]


def test_changed_begins_a_run_where_there_is_none(trained, tmp_path):
    flags = [*trained[1], "--run.dir", str(tmp_path / "new"), *CHANGED]
    assert jaxgpt.train(load_config(flags)).step == 40
    assert last(tmp_path / "new")[0]["changed"] == {}


def test_the_flag_that_began_a_run_is_not_kept_in_its_config(trained, tmp_path):
    flags = [*trained[1], "--run.dir", str(tmp_path / "new"), "--train.steps", "10"]
    jaxgpt.train(load_config([*flags, "--run.resume", "never"]))
    again = load_config(["--config", str(tmp_path / "new" / "config.yaml")])
    assert again.run.resume == "auto" and jaxgpt.train(again).step == 10


@pytest.mark.parametrize("way", ["relative", "absolute", "moved", "copied", "linked"])
def test_a_text_is_known_by_its_content_wherever_it_is(trained, trained_copy, tmp_path, monkeypatch, way):
    original = trained[0].parent / "my.txt"
    place = tmp_path / "elsewhere" / "x.txt"
    place.parent.mkdir()
    place.symlink_to(original) if way == "linked" else shutil.copy(original, place)
    monkeypatch.chdir(place.parent)
    path = "./x.txt" if way in ("relative", "linked") else str(place)
    flags = [*trained[1], "--run.dir", str(trained_copy), "--data.path", path]
    assert jaxgpt.train(load_config(flags)).step == 40
    place.unlink()
    place.write_text(original.read_text() + "a")
    with pytest.raises(OtherRunError, match="the text itself, sha256"):
        jaxgpt.train(load_config(flags))


def test_a_run_is_where_its_files_are(trained, tmp_path, monkeypatch):
    """Moved, copied or renamed, `--config DIR/config.yaml` continues the run in DIR; a flag names another place."""
    shutil.copytree(trained[0], tmp_path / "renamed")
    monkeypatch.chdir(tmp_path)
    for named in ("renamed/config.yaml", str(tmp_path / "renamed" / "config.yaml"), "./renamed/../renamed/config.yaml"):
        config = load_config(["--config", named])
        assert (tmp_path / config.run.dir).resolve() == tmp_path / "renamed"
        assert jaxgpt.train(config).step == 40
    assert load_config(["--config", "renamed/config.yaml", "--run.dir", "new"]).run.dir == "new"
    assert jaxgpt.load("renamed").config.run.dir == "renamed"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["renamed"]
    assert records(tmp_path / "renamed", "start")[-1]["step"] == 40
    shutil.copy("renamed/config.yaml", "config.yaml")  # a recipe of this name is no run directory
    stored = yaml.safe_load((tmp_path / "config.yaml").read_text())["run"]["dir"]
    assert load_config(["--config", "config.yaml"]).run.dir == stored != "."


@pytest.mark.parametrize("name", directory.RANDOM)
def test_a_run_continued_with_other_random_numbers_says_so(again, trained_copy, monkeypatch, name):
    given = {"jax_default_prng_impl": "rbg", "jax_enable_x64": True, "jax_threefry_partitionable": False}[name]
    facts = directory.circumstances()
    assert facts[name] != str(given)
    monkeypatch.setattr(directory, "circumstances", lambda: {**facts, name: str(given)})
    with pytest.warns(CheckpointWarning, match=f"random numbers differ .*{name} was {facts[name]}, now {given}"):
        again()


def test_a_file_that_cannot_be_read_is_not_called_damaged(trained_copy, monkeypatch):
    import pathlib

    opened = pathlib.Path.open

    def refuse(self, *args, **kwargs):
        if self.name == "config.yaml":
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(pathlib.Path, "open", refuse)
    with pytest.raises(jaxgpt.errors.CheckpointError, match=r"cannot read .*config.yaml, Permission denied") as error:
        jaxgpt.load(trained_copy)
    assert "damaged" not in str(error.value)


def test_a_trained_run_can_be_pickled(trained):
    import pickle

    run = jaxgpt.load(trained[0])
    again = pickle.loads(pickle.dumps(run))
    assert (again.dir, again.config, again.step) == (run.dir, run.config, run.step)
    assert again.tokenizer.decode(again.tokenizer.encode("the king")) == "the king"
    chex.assert_trees_all_equal(*(nnx.to_pure_dict(nnx.state(each.model)) for each in (run, again)))
