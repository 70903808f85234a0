import json
import math
import pathlib

import chex
import jax
import numpy as np
import pytest
from flax import nnx
from random_run import SMALL, make_run

import jaxgpt
from jaxgpt import cli, step
from jaxgpt.config import ConfigError
from jaxgpt.devices import sharding
from jaxgpt.errors import CheckpointError
from jaxgpt.interop import gpt2
from jaxgpt.runs import init_from
from jaxgpt.runs.checkpoint import Checkpoints
from jaxgpt.text.source import open_source
from jaxgpt.tokenizer import BPETokenizer, CharTokenizer
from jaxgpt.training import resolve, specify

RECIPE = str(pathlib.Path(__file__).parents[2] / "configs" / "finetune_gpt2.yaml")
SHORT = {
    "train.steps": 6,
    "train.eval_interval": 3,
    "train.eval_batches": 1,
    "run.checkpoint_interval": 3,
    "run.keep": 9,
}


@pytest.fixture
def start(tmp_path, text):
    """A run with the tokenizer of the text."""
    return make_run(tmp_path / "start", CharTokenizer.from_text(text), n_layer=1)


@pytest.fixture
def flags(tmp_path, text_file):
    """The recipe, short, and from the run `start`."""
    chosen = SHORT | {"run.dir": tmp_path / "run", "run.init_from": tmp_path / "start", "data.path": text_file}
    return ["--config", RECIPE, *(word for name, value in chosen.items() for word in (f"--{name}", str(value)))]


def records(folder, kind):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def test_the_model_and_the_tokenizer_are_the_other_run_s_and_the_recipe_wins_where_it_speaks(start, flags, tmp_path):
    config = jaxgpt.load_config(flags)
    assert (config.model.n_embd, config.model.bias, config.model.block_size) == (32, "all", 24)
    assert config.model.dropout == 0.1 and config.data.tokenizer == str(tmp_path / "start" / "tokenizer.json")
    assert jaxgpt.load_config([*flags, "--model.dropout", "0.3"]).model.dropout == 0.3


@pytest.mark.full
def test_a_run_starts_with_the_other_s_weights_at_step_0_of_its_own_schedule(start, flags, tmp_path, capsys):
    run = jaxgpt.train(jaxgpt.load_config(flags))
    assert f"new, from the weights of {tmp_path / 'start'}" in capsys.readouterr().out
    first = Checkpoints(tmp_path / "run" / "checkpoints").manifest(0)
    assert first["step"] == 0 and (tmp_path / "run" / "checkpoints" / "0").is_dir()
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(jaxgpt.load(tmp_path / "run", 0).model)), start)
    assert run.step == 6 and [r["step"] for r in records(tmp_path / "run", "train")] == [1]  # log_interval is 10
    begun = records(tmp_path / "run", "eval")[0]
    model = jaxgpt.load(tmp_path / "start").model
    text_ids = run.tokenizer.encode(pathlib.Path(run.config.data.path).read_text())
    whole = step.evaluate(model, np.asarray(text_ids[int(0.9 * len(text_ids)) :]))
    assert begun["step"] == 0 and begun["val_loss"] == pytest.approx(whole, rel=0.1)  # a few windows of the split
    assert records(tmp_path / "run", "final")[0]["val_loss"] < whole


@pytest.mark.full
def test_the_optimizer_is_new(start, flags, tmp_path):
    jaxgpt.train(jaxgpt.load_config([*flags, "--train.log_interval", "1"]))
    rates = [record["learning_rate"] for record in records(tmp_path / "run", "train")]
    assert rates == pytest.approx(
        [3e-5 * i / 51 for i in range(1, 7)], rel=1e-5
    )  # the first steps of the recipe's warm-up


@pytest.mark.full
def test_a_run_needs_the_other_only_to_start(start, flags, tmp_path):
    whole = jaxgpt.train(jaxgpt.load_config([*flags, "--run.dir", str(tmp_path / "whole")]))
    jaxgpt.train(jaxgpt.load_config([*flags, "--train.steps", "3", "--optim.decay_steps", "6"]))
    (tmp_path / "start").rename(tmp_path / "gone")
    assert jaxgpt.load(tmp_path / "run").step in (0, 3)
    own = tmp_path / "run" / "config.yaml"
    tokenizer = ["--data.tokenizer", str(tmp_path / "run" / "tokenizer.json")]
    # the tokenizer is known by its content, so the run's own copy serves as well
    run = jaxgpt.train(jaxgpt.load_config(["--config", str(own), "--train.steps", "6", *tokenizer]))
    chex.assert_trees_all_equal(*(nnx.state(each.model) for each in (run, whole)))


@pytest.mark.full
def test_a_shorter_context_takes_the_first_positions(start, flags, tmp_path):
    run = jaxgpt.train(jaxgpt.load_config([*flags, "--model.block_size", "16"]))
    found = nnx.to_pure_dict(nnx.state(jaxgpt.load(tmp_path / "run", 0).model))
    table = gpt2.flat(found)["position_embedding_table.embedding"]
    assert run.config.model.block_size == 16 and table.shape == (16, SMALL["n_embd"])
    np.testing.assert_array_equal(table, gpt2.flat(start)["position_embedding_table.embedding"][:16])


@pytest.mark.parametrize(
    "more, said",
    [
        (["--model.n_embd", "64"], "n_embd 32, here 64"),
        (["--model.activation", "gelu"], "activation relu, here gelu"),
        (["--model.block_size", "32"], "block_size 24, here 32"),
        (["--data.tokenizer", "TOKENIZER"], "the tokenizer differs from that of the weights"),
    ],
)
def test_another_model_or_tokenizer_is_refused_before_anything_is_made(start, flags, tmp_path, text, more, said):
    CharTokenizer("".join(sorted(set(text)))[::-1]).save(tmp_path / "other.json")
    more = [word.replace("TOKENIZER", str(tmp_path / "other.json")) for word in more]
    with pytest.raises(ConfigError, match=said):
        jaxgpt.train(jaxgpt.load_config([*flags, *more]))
    assert not (tmp_path / "run").exists()


def test_a_run_to_start_from_that_is_not_there_is_named_with_the_command_that_makes_it(flags, tmp_path, capsys):
    assert cli.main(["train", *flags]) == 4
    message = capsys.readouterr().err
    assert f"jaxgpt import --from gpt2 --run {tmp_path / 'start'}" in message and message.count("\n") == 1


def test_a_run_without_a_checkpoint_cannot_be_started_from(start, flags, tmp_path):
    (tmp_path / "start" / "checkpoints" / "3" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint"):
        jaxgpt.train(jaxgpt.load_config(flags))


@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_weights_land_in_the_places_of_a_mesh(start, flags, axis):
    config = jaxgpt.load_config([*flags, "--mesh.data", "1", f"--mesh.{axis}", "2"])
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        tokenizer = open_source(config.data).tokenizer
        config = resolve(config, tokenizer.vocab_size)
        spec, shapes = specify(config, mesh)
        moved = init_from.initial_state(config, init_from.check(config, tokenizer), spec.tx, shapes).params
    assert moved["blocks"][0]["mlp"]["fc"]["kernel"].sharding.shard_shape((32, 128)) != (32, 128)
    places = sharding.shardings(mesh, moved)
    same = jax.tree.map(lambda a, place: a.sharding.is_equivalent_to(place, a.ndim), moved, places)
    assert all(jax.tree.leaves(same))
    chex.assert_trees_all_equal(jax.device_get(moved), start)


@pytest.mark.full
def test_bits_per_byte_count_bytes_of_the_same_text_whatever_the_tokenizer(tmp_path, text, text_file, capsys):
    (tmp_path / "text.txt").write_text(text + "é", encoding="utf-8")
    tokenizers = {"char": CharTokenizer.from_text(text + "é"), "bpe": BPETokenizer.train([text], 300)}
    for name, tokenizer in tokenizers.items():
        make_run(tmp_path / name, tokenizer)
        argv = ["eval", "--run", str(tmp_path / name), "--path", str(tmp_path / "text.txt"), "--split", "all"]
        assert cli.main(argv) == 0
        found = json.loads(capsys.readouterr().out)
        ids = tokenizer.encode(text + "é")
        size = len((text + "é").encode()) - len(tokenizer.decode(ids[:1]).encode())  # the first one is not predicted
        assert (found["split"], found["tokens"]) == ("all", len(ids) - 1)
        assert found["bits_per_byte"] == pytest.approx(found["nats_per_token"] * (len(ids) - 1) / math.log(2) / size)
    both = ["--name", "shakespeare", "--path", str(text_file)]
    assert cli.main(["eval", "--run", str(tmp_path / "char"), *both]) == 2
    assert cli.main(["eval", "--run", str(tmp_path / "char"), "--split", "test"]) == 2


def test_a_prepared_folder_is_evaluated_if_its_tokens_are_the_run_s(tmp_path, text, text_file, capsys):
    tokenizer = CharTokenizer.from_text(text)
    make_run(tmp_path / "run", tokenizer)
    for name, alphabet in {"same": tokenizer.alphabet, "other": tokenizer.alphabet[::-1]}.items():
        CharTokenizer(alphabet).save(tmp_path / f"{name}.json")
        spec = ["--tokenizer", str(tmp_path / f"{name}.json"), "--workers", "1"]
        assert cli.main(["prepare", "--input", str(text_file), "--out", str(tmp_path / name), *spec]) == 0
    capsys.readouterr()
    found = []
    for path in (text_file, tmp_path / "same"):
        assert cli.main(["eval", "--run", str(tmp_path / "run"), "--path", str(path), "--split", "all"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    assert cli.main(["eval", "--run", str(tmp_path / "run"), "--path", str(tmp_path / "other")]) == 3
    assert "the folder was prepared with another tokenizer" in capsys.readouterr().err
