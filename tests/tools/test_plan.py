import importlib.util
import json
import pathlib

import jax
import pytest

from jaxgpt import cli, step, training
from jaxgpt import config as configs
from jaxgpt.devices import chips
from jaxgpt.optim import optimizer as optimizer_of
from jaxgpt.text import corpus
from jaxgpt.tools import ahead, plan
from jaxgpt.tools.ahead import Needs

ROOT = pathlib.Path(__file__).parents[2]
GPT2 = ["--config", str(ROOT / "configs/gpt2_124m.yaml")]
SHAKESPEARE = ["--config", str(ROOT / "configs/shakespeare_cpu.yaml")]
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed"
)


def record_of(capsys, argv):
    """What `jaxgpt plan --json` prints."""
    assert cli.main(["plan", *argv, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def error_of(capsys, argv):
    """The line on stderr of a plan that cannot be made."""
    assert cli.main(["plan", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def test_gpt2_on_eight_h200_costs_what_its_closed_forms_say(capsys):
    r = record_of(capsys, [*GPT2, "--target", "h200:8", "--mfu", "0.5", "--data.batch_size", "64",
                           "--optim.grad_accumulation", "2", "--train.steps", "1000"])  # fmt: skip
    # 12 layers of 12 C^2 + 13 C, the tied table, positions and the last norm
    C, V, T = 768, 50257, 1024
    counted = 12 * (12 * C * C + 13 * C) + V * C + 2 * C
    assert r["parameters"] == counted + T * C == 124_439_808
    assert r["tokens_a_step"] == 64 * 2 * T
    assert r["flops_a_step"] == (6 * counted + 12 * 12 * C * T) * 64 * 2 * T
    assert r["flops_computed_again"] == 2 * V * C * 64 * 2 * T  # the head: the loss is in chunks
    seconds = r["flops_a_step"] / 8 / (0.5 * 989e12)
    assert r["tokens_a_second"] == pytest.approx(r["tokens_a_step"] / seconds)
    assert r["hours"] == pytest.approx(1000 * seconds / 3600)
    assert r["estimated"] and r["fits"] and r["moved"] is None and r["epoch_tokens"] is None


def test_devices_that_the_mesh_leaves_out_do_not_count(capsys):
    whole, half = (record_of(capsys, [*GPT2, "--target", "h200:8", "--mesh.data", n]) for n in ("8", "4"))
    assert (whole["devices"], half["devices"]) == (8, 4)
    assert half["tokens_a_second"] == whole["tokens_a_second"] / 2


@pytest.mark.parametrize("optimizer, ema_decay", [("adamw", "0"), ("muon", "0"), ("muon", "0.9")])
def test_an_estimate_counts_the_numbers_that_the_optimizer_keeps(optimizer, ema_decay):
    flags = ["--config", str(ROOT / "configs/modern/shakespeare_cpu.yaml")]
    flags += ["--optim.optimizer", optimizer, "--optim.ema_decay", ema_decay]
    config = training.resolve(configs.load_config(flags), 65)
    model = training.abstract_model(config, "gpu")
    state = jax.eval_shape(lambda p: step.init_state(p, optimizer_of(config.optim)), step.params_of(model))
    floats = sum(4 * leaf.size for leaf in jax.tree.leaves(state) if leaf.dtype == "float32")
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert ahead.estimate_step(config, ahead.find_target("h100:1"), parameters).arguments == floats


def test_remat_full_computes_the_forward_pass_of_the_blocks_again():
    config = configs.load_config([*GPT2, "--model.remat", "full", "--train.loss_chunks", "1"])
    C, T = 768, 1024
    # a matmul costs 2 FLOPs a weight and token; scores and their product with the values 2 T C each
    assert plan.computed_again(config) == 12 * (2 * 12 * C * C + 4 * T * C)


@pytest.mark.full
def test_the_plan_of_a_small_run_is_what_its_training_compiles(capsys, tiny_config, text_file):
    flags = [*SHAKESPEARE, *tiny_config, "--model.attention", "xla"]
    r = record_of(capsys, flags)
    assert r["epoch_tokens"] == int(0.9 * len(text_file.read_text()))
    assert (
        r["tokens_a_step"] == 4 * 16 and r["batch_a_device"] == 4 and r["devices"] == 1
    )  # too short to be shared by cores
    run = training.train(configs.load_config(flags))
    assert r["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(training.nnx.state(run.model)))
    # float32 parameters, two moments, two counters of optax's and the step; the tokens; a step's windows; the key
    assert r["arguments"] == pytest.approx(12 * r["parameters"] + r["epoch_tokens"] + 4 * 17 + 12 + 8, abs=64)
    assert r["temporaries"] > 0 and r["moved"] > 7 * 4 * r["parameters"]  # AdamW alone
    assert r["fits"] is None and r["fitting_batch_a_device"] is None and r["hours"] is None  # no table knows this CPU


@pytest.mark.full
def test_accumulated_batches_move_their_bytes_each(capsys, tiny_config):
    flags = [*SHAKESPEARE, *tiny_config, "--data.batch_size", "64"]
    once, thrice = (record_of(capsys, [*flags, "--optim.grad_accumulation", str(n)])["moved"] for n in (1, 3))
    assert 2 * once < thrice < 4 * once


@pytest.mark.full
def test_the_table_says_each_thing_on_a_line(capsys, tiny_config):
    assert cli.main(["plan", *SHAKESPEARE, *tiny_config]) == 0
    out = capsys.readouterr().out
    topics = [line.split()[0] for line in out.splitlines()]
    assert topics == ["target", "mesh", "model", "step", "epoch", "memory", "traffic", "pace"]


def test_what_does_not_fit_is_an_answer_with_a_remedy(capsys):
    flags = [*GPT2, "--config", str(ROOT / "configs/gpt2_1558m.yaml"), "--target", "l4:1"]
    assert cli.main(["plan", *flags]) == 0
    out = capsys.readouterr().out
    assert "DOES NOT FIT 18 GB" in out and "--model.remat dots" in out and "none found that fits" in out


@pytest.mark.parametrize("target", ["v5e", "v5e-8", "v5e:8", "v5e:2x2x2", "v5p:2x2", "v5e:32x32", "v9x:2x2", "h200:0",
                                    "h200:2x2", "h200:"])  # fmt: skip
def test_a_target_that_is_none_is_explained_in_one_line(capsys, target):
    line = error_of(capsys, [*GPT2, f"--target={target}"])
    assert f"no such target (--target, {target}): write v5e:2x4" in line


def test_without_the_compiler_the_remedy_is_named(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = error_of(capsys, [*GPT2, "--target", "v5e:2x4"])
    assert line.endswith("(--target, v5e:2x4): pip install 'jaxgpt[tpu-compile]'")


def test_a_batch_that_does_not_divide_and_an_unknown_vocabulary_are_named(capsys):
    assert "use 8 or 16" in error_of(capsys, [*GPT2, "--target", "h200:8", "--data.batch_size", "12"])
    argv = ["--config", GPT2[1], "--data.path", "not/here", "--data.tokenizer", "char", "--target", "h200:8"]
    assert "--model.vocab_size, 50257" in error_of(capsys, argv)
    assert "mfu is 1.5 (" in error_of(capsys, [*GPT2, "--mfu", "1.5"])


def test_a_prepared_folder_is_known_by_its_description(tmp_path, capsys):
    facts = {"format": 1, "dtype": "uint16", "tokens": 1_000_000, "vocab_size": 300}
    (tmp_path / "dataset.json").write_text(json.dumps(facts | {"sha256": "0", "tokenizer_sha256": "0"}))
    r = record_of(capsys, ["--config", GPT2[1], "--data.path", str(tmp_path), "--target", "h200:8"])
    assert r["epoch_tokens"] == 999_500 and r["parameters"] == 124_439_808 - (50257 - 300) * 768


def test_the_lengths_of_the_named_corpora_are_theirs():
    assert len(corpus.load("shakespeare").text) == plan.CHARACTERS["shakespeare"]


@pytest.mark.parametrize("start", [1, 8, 96, 512])
def test_the_search_finds_the_largest_batch_with_few_questions(start):
    asked, room = [], 5000

    def needs_of(batch):  # bends a little, as the compiler's numbers do
        asked.append(batch)
        temporaries = 1000 + 30 * batch + 40 * (batch % 3)
        return Needs(500, temporaries, None, False, 500 + temporaries <= room)

    found = plan.largest_batch(needs_of, room, start, needs_of(start))
    assert found == 96 and len(asked) <= 5
    room = 1500
    assert plan.largest_batch(needs_of, room, start, needs_of(start)) is None


def test_the_table_of_chips_knows_jaxs_names():
    assert chips.find("TPU v5 lite") is chips.named("v5e") and chips.find("NVIDIA H200") is chips.named("h200")
    assert chips.find("cpu") is None and chips.named("cpu") is None
    kinds = [kind for chip in chips.CHIPS for kind in chip.kinds]
    assert len(set(kinds)) == len(kinds)


@needs_libtpu
@pytest.mark.parametrize("name, kind, n", [("v5e:1x1", "v5e", 1), ("v5p:2x2x1", "v5p", 4), ("v6e:16x16", "v6e", 256)])
def test_topologies_have_the_chips_of_the_table(name, kind, n):
    target = ahead.find_target(name)
    assert len(target.devices) == target.n == n and target.platform == "tpu"
    assert {chips.find(device.device_kind) for device in target.devices} == {chips.named(kind)}


@needs_libtpu
def test_a_shape_that_no_tpu_has_is_explained_in_one_line(capsys):
    assert "libtpu knows no such target (--target, v5e:3x3" in error_of(capsys, [*GPT2, "--target", "v5e:3x3"])


@needs_libtpu
@pytest.mark.long
def test_the_step_compiles_for_tpus_on_a_mesh(capsys):
    flags = [*GPT2, "--model.n_layer", "2", "--target", "v5e:2x4", "--data.batch_size", "16", "--search", "False",
             "--optim.grad_accumulation", "1"]  # fmt: skip
    whole = record_of(capsys, flags)
    split = record_of(capsys, [*flags, "--mesh.fsdp", "4"])
    assert whole["attention"] == "splash" and whole["fits"]
    assert split["arguments"] < 0.3 * whole["arguments"]
    assert whole["roofline_s"] == max(whole["compute_s"], whole["traffic_s"])
    plain = record_of(capsys, [*flags, "--model.attention", "xla"])
    assert plain["moved"] > 1.1 * whole["moved"]
    at_once = record_of(capsys, [*flags, "--train.loss_chunks", "1"])
    assert at_once["temporaries"] > 1.3 * whole["temporaries"]


@needs_libtpu
@pytest.mark.long
def test_what_the_tpu_has_no_room_for_is_sized_by_its_compiler(capsys):
    flags = [*GPT2, "--model.n_layer", "1", "--target", "v5e:1x1", "--optim.grad_accumulation", "1"]
    r = record_of(capsys, [*flags, "--data.batch_size", "2048", "--train.loss_chunks", "1"])
    assert r["fits"] is False and r["temporaries"] > chips.named("v5e").memory and r["moved"] is None
    assert 0 < r["fitting_batch_a_device"] < 2048
