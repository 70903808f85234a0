import contextlib
import hashlib
import json
import math
import pathlib
import shutil

import chex
import numpy as np
import pytest
from flax import nnx

import jaxgpt
from jaxgpt import cli, step
from jaxgpt.data import DataConfig, DataError
from jaxgpt.devices import sharding
from jaxgpt.devices.sharding import MeshConfig
from jaxgpt.devices.stopping import Stopped
from jaxgpt.text import mixtures, source
from jaxgpt.text.prepare import PrepareArgs, prepare
from jaxgpt.tokenizer import CharTokenizer


@pytest.fixture
def folder(tmp_path, text_file):
    """A prepared folder with a BPE of 300 ids."""
    prepare(PrepareArgs(str(text_file), str(tmp_path / "tokens"), tokenizer="bpe", vocab_size=300, workers=1))
    return tmp_path / "tokens"


@pytest.fixture
def flags(tiny_config, folder):
    return [*tiny_config, "--data.path", str(folder), "--data.train_fraction", "0.8"]


def records(run_dir, kind):
    lines = (pathlib.Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def opened(path):
    found = source.open_source(DataConfig(path=str(path), train_fraction=0.8))
    found.split(sharding.make_mesh(MeshConfig(1)), 16)
    return found


@pytest.mark.full
def test_a_run_learns_from_a_folder_and_evaluates_the_whole_split(flags, tmp_path, capsys):
    more = ["--train.steps", "150", "--train.eval_batches", "10", "--optim.learning_rate", "1e-2"]
    run = jaxgpt.train(jaxgpt.load_config([*flags, *more]))
    evals = records(run.dir, "eval")
    assert evals[0]["val_loss"] == pytest.approx(math.log(300), abs=0.1)
    assert evals[-1]["val_loss"] < 0.7 * evals[0]["val_loss"]
    assert records(run.dir, "start")[0]["vocab_size"] == 300
    capsys.readouterr()
    assert cli.main(["eval", "--run", str(run.dir)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["nats_per_token"] == pytest.approx(evals[-1]["val_loss"], abs=0.1)
    val = np.concatenate([np.asarray(piece)[1:] for piece in opened(tmp_path / "tokens").pieces("val")])
    size = len(run.tokenizer.decode(val).replace("<|endoftext|>", "").encode())
    assert result["tokens"] == len(val)
    assert result["bits_per_byte"] == pytest.approx(result["nats_per_token"] * len(val) / math.log(2) / size)
    assert cli.main(["sample", "--run", str(run.dir), "--max_new_tokens", "20"]) == 0
    assert capsys.readouterr().out


@pytest.mark.full
@pytest.mark.parametrize("more", [[], ["--data.sampling", "epochs", "--data.documents", "separate"]])
def test_an_interrupted_run_on_a_folder_ends_in_the_bits_of_an_uninterrupted_one(flags, more, tmp_path, monkeypatch):
    from jaxgpt import loop

    flags += more
    whole = jaxgpt.train(jaxgpt.load_config([*flags, "--run.dir", str(tmp_path / "whole")]))
    config, look = jaxgpt.load_config(flags), loop.TrainingLoop.estimate_and_sample

    def look_and_stop(job, state, at):
        if at == 20:
            raise Stopped(15, at)
        return look(job, state, at)

    monkeypatch.setattr(loop.TrainingLoop, "estimate_and_sample", look_and_stop)
    with pytest.raises(Stopped):
        jaxgpt.train(config)
    monkeypatch.undo()
    again = jaxgpt.train(config)
    assert records(again.dir, "start")[1]["step"] == 10
    chex.assert_trees_all_equal(*(nnx.to_pure_dict(nnx.state(run.model)) for run in (whole, again)))


def test_a_step_sees_the_batch_that_the_seed_gives_it(folder):
    found = opened(folder)
    calls = [(0, 5), (5, 5), (10, 1)]
    fed = np.concatenate([np.asarray(windows) for windows in found.feed(calls, seed=3, rows=4)])
    chex.assert_shape(fed, (11, 4, 17))
    for i in range(11):
        expected = mixtures.read_windows(found.splits.train, 3, step.TRAIN, i, 4, 16)
        np.testing.assert_array_equal(fed[i], expected)


def test_losses_are_estimated_on_the_same_batches_of_each_split(folder):
    found = opened(folder)
    train, val = (np.asarray(found.windows(stream, 3, 0, 2, 4)) for stream in (step.ESTIMATE, step.VAL))
    chex.assert_shape([train, val], (2, 4, 17))
    np.testing.assert_array_equal(val, found.windows(step.VAL, 3, 0, 2, 4))
    assert (train != val).any()
    feed = found.feed([(0, 2)], seed=3, rows=4)
    assert (train != np.asarray(next(feed))).any()  # not what is trained on first


def test_a_text_and_a_folder_hand_out_the_same_shapes(folder, text_file):
    text = source.open_source(DataConfig(path=str(text_file)))
    text.split(sharding.make_mesh(MeshConfig(1)), 16)
    for stream in (step.TRAIN, step.ESTIMATE, step.VAL):
        for each in (text, opened(folder)):
            found = each.windows(stream, 3, 5, 2, 4)
            chex.assert_shape(found, (2, 4, 17))
            np.testing.assert_array_equal(found[1], each.windows(stream, 3, 6, 1, 4)[0])  # a step has its own batch
    (fed,) = text.feed([(5, 2)], seed=3, rows=4)
    np.testing.assert_array_equal(fed, text.windows(step.TRAIN, 3, 5, 2, 4))


def test_a_mixture_of_folders_has_one_fingerprint_that_its_weights_decide(folder):
    one, other = (source.open_source(DataConfig(path=f"{folder}=0.7,{folder}={w}")).sha256 for w in (0.3, 0.2))
    assert one != other != opened(folder).sha256
    assert opened(folder).sha256 == json.loads((folder / "dataset.json").read_text())["sha256"]


@pytest.mark.full
def test_another_folder_is_refused_on_evaluation(flags, folder, capsys):
    run = jaxgpt.train(jaxgpt.load_config(flags))
    dataset = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(dataset | {"sha256": "0" * 64}))
    capsys.readouterr()
    assert cli.main(["eval", "--run", str(run.dir)]) == 3
    assert "0" * 64 in capsys.readouterr().err


# What --data.path names


@pytest.mark.parametrize("name", ["lang=en", "a=0.5", "a=0.5,b=0.5", "k=v.txt"])
@pytest.mark.parametrize("tilde", [True, False])
def test_an_equals_sign_in_the_name_of_a_file_or_folder_that_exists_is_part_of_it(
    folder, text_file, tmp_path, monkeypatch, name, tilde
):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    path = f"~/{name}" if tilde else str(home / name)
    shutil.copytree(folder, home / name)
    assert source.open_source(DataConfig(path=path)).sha256 == opened(folder).sha256
    shutil.rmtree(home / name)
    shutil.copy(text_file, home / name)
    assert source.open_source(DataConfig(path=path)).sha256 == hashlib.sha256(text_file.read_bytes()).hexdigest()


@pytest.mark.parametrize("path", ["lang=en", "lang=en/a.txt", "a=0.5,b", "a=-1", "a=0.5,"])
def test_a_name_that_is_no_file_and_no_mixture_is_told_with_both_readings(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no such file or folder, and not a mixture \(.*DIR=WEIGHT,DIR=WEIGHT"):
        source.open_source(DataConfig(path=path))


@pytest.mark.parametrize("path", ["a" * 10_000, "a=" + "b" * 10_000, "a=1," * 10_000, "a=0.5,~/b" * 1000, "文" * 5000])
def test_a_message_about_a_path_is_short_however_long_the_path_is(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        source.open_source(DataConfig(path=path))
    assert len(str(caught.value)) < 700


# Texts that are too short


def short(tmp_path, kind, text):
    """A source with this text, and its name."""
    path = tmp_path / "short.txt"
    path.write_text(text)
    if kind == "folder":
        prepare(PrepareArgs(str(path), str(tmp_path / "tokens"), "char", workers=1))
        path = tmp_path / "tokens"
    return source.open_source(DataConfig(path=str(path), train_fraction=0.5)), str(path)


@pytest.mark.parametrize("kind", ["text", "folder"])
def test_a_split_that_is_too_short_is_named_with_its_text_and_numbers(tmp_path, kind):
    found, name = short(tmp_path, kind, "abcdefgh")
    with pytest.raises(DataError, match=rf"too few tokens for a window.*\({name}, 4 in the train split, 17 needed"):
        found.split(None, 16)


@pytest.mark.parametrize("kind", ["text", "folder"])
@pytest.mark.parametrize("text", ["ab", "abc", "abcdefgh"])
def test_a_whole_text_needs_no_splits(tmp_path, kind, text):
    found, _ = short(tmp_path, kind, text)
    (tokens,) = found.pieces("all")
    assert found.tokenizer.decode(tokens) == text


@pytest.mark.parametrize("kind", ["text", "folder"])
@pytest.mark.parametrize("split", ["train", "val", "all"])
def test_the_bar_of_an_evaluation_ends_at_its_total(tmp_path, monkeypatch, kind, split):
    found, _ = short(tmp_path, kind, "abcdefghi" * 8)
    found.split(None, 5)
    monkeypatch.setattr(source, "EVALUATED", 20)
    totals, parts = [], []

    @contextlib.contextmanager
    def progress(title, total, unit, stream):
        totals.append(total)
        yield parts.append

    monkeypatch.setattr(source, "progress", progress)
    with source.watched(found, split, None) as pieces:
        first = next(pieces)
        assert parts == []  # it is handed out, and not yet evaluated
        list(pieces)
    assert totals == [sum(parts)] == [{"train": 35, "val": 35, "all": 71}[split]]
    assert parts[0] == len(first) - 1 and (len(parts) > 1) == (kind == "folder")


@pytest.mark.parametrize("kind", ["text", "folder"])
def test_one_token_is_nothing_to_predict(tmp_path, kind):
    found, name = short(tmp_path, kind, "a")
    with pytest.raises(DataError, match=rf"nothing to predict \({name}, 1 token\)"):
        list(found.pieces("all"))


def test_a_character_that_the_tokenizer_lacks_is_named_with_the_text(tmp_path):
    (tmp_path / "other.txt").write_text("abz")
    with pytest.raises(DataError, match=r"other.txt\): unknown character 'z'"):
        source.open_source(DataConfig(path=str(tmp_path / "other.txt")), CharTokenizer("abc"))
