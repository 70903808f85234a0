"""benchmarks/compare.py: both sides do the same work, take turns, and are compared round by round."""

import pathlib
import re
import sys
import time

import jax
import pytest

from jaxgpt import load_config
from jaxgpt.devices import sharding
from jaxgpt.loop import rows
from jaxgpt.runs import metrics
from jaxgpt.text.corpus import SHAKESPEARE_ALPHABET

sys.path.append(str(pathlib.Path(__file__).parent.parent / "benchmarks"))
import comparison
import turns
import whole_runs
from compare import WORKS, main, parse

SMALL = ["--model.n_layer", "2", "--model.n_embd", "16", "--model.block_size", "8", "--data.batch_size", "4"]
SLEEPER = """
import time
from turns import serve, until

def piece():
    time.sleep(0.01)
    return 3

def prepare(spec):
    if spec.get("broken"):
        raise ValueError("no such model")
    print("a library talks")
    return {"spec": spec}, lambda seconds: dict(zip(("amount", "seconds"), until(seconds, piece)))

serve(prepare)
"""


class Recorder:
    """A side that notes when it is asked to work, and works at a given rate."""

    def __init__(self, name, rate, asked):
        self.name, self.rate, self.asked = name, rate, asked

    def go(self, seconds):
        self.asked.append((self.name, seconds))
        return {"amount": self.rate * seconds, "seconds": seconds, "cpu_s": 0.0}


def test_sides_work_forwards_and_backwards_by_turns_and_the_warm_up_does_not_count():
    asked = []
    sides = {name: Recorder(name, rate, asked) for name, rate in (("a", 3.0), ("b", 2.0), ("c", 1.0))}
    answers = turns.take_turns(sides, rounds=3, seconds=4.0)

    assert "".join(name for name, _ in asked) == "abc" + "cba" + "abc" + "cba"
    assert [seconds for _, seconds in asked] == [1.0] * 3 + [4.0] * 9
    assert {name: [answer["rate"] for answer in side] for name, side in answers.items()} == {
        "a": [3.0] * 3, "b": [2.0] * 3, "c": [1.0] * 3
    }  # fmt: skip


def test_ratios_are_paired_within_a_round_and_taken_against_the_better_side():
    # the machine is half as fast in the second round: rates halve, ratios of one round do not
    rates = {"ours": [12.0, 6.0, 13.0], "eager": [4.0, 2.0, 4.0], "compiled": [6.0, 3.0, 5.0]}
    record = turns.compare(rates)
    assert record["sides"]["ours"] == {"median": 12.0, "range": [6.0, 13.0]}
    assert record["ratios"]["eager"] == {"median": 3.0, "range": [3.0, 3.25]}
    assert record["better"] == "compiled"
    assert record["ratio"] == {"median": 2.0, "range": [2.0, 2.6]}


def test_of_times_the_shorter_is_the_faster():
    record = turns.compare({"ours": [2.0, 4.0], "slow": [8.0, 8.0], "quick": [3.0, 6.0]}, lower_is_better=True)
    assert record["ratios"]["slow"] == {"median": 3.0, "range": [2.0, 4.0]}
    assert (record["better"], record["ratio"]["median"]) == ("quick", 1.5)


def test_what_other_programs_used_is_what_is_left_of_the_busy_time(monkeypatch):
    monkeypatch.setattr(turns, "busy", lambda: 14.0)
    assert turns.others(before=10.0, own=2.0, seconds=4.0) == 0.5
    assert turns.others(before=0.0, own=2.0, seconds=4.0) is None  # where there is no /proc/stat
    assert (comparison.most([0.1, 0.5, 0.2]), comparison.most([0.1, None])) == (0.5, None)


@pytest.fixture
def sleeper(tmp_path):
    """A program that serves; its folder finds turns.py through PYTHONPATH."""
    path = tmp_path / "sleeper.py"
    path.write_text(SLEEPER)
    return str(path), {"PYTHONPATH": str(pathlib.Path(turns.__file__).parent)}


def test_a_live_worker_counts_its_work_and_uses_no_processor_while_it_waits(sleeper):
    program, env = sleeper
    worker = turns.Worker(program, {"n": 1}, env)
    try:
        assert worker.facts == {"spec": {"n": 1}}
        first = worker.go(0.05)
        time.sleep(0.2)
        second = worker.go(0.05)
    finally:
        worker.close()
    assert first["seconds"] >= 0.05 and first["amount"] % 3 == 0
    assert 3 <= first["amount"] <= 3 * (first["seconds"] / 0.01 + 1)  # a piece sleeps for 10 ms and counts 3
    assert second["idle_s"] >= 0.2
    assert second["idle_cpu_s"] < 0.05 * second["idle_s"]


def test_the_error_of_a_worker_that_ends_is_shown(sleeper):
    program, env = sleeper
    with pytest.raises(turns.WorkerError, match=r"exit code 1(.|\n)*ValueError: no such model"):
        turns.Worker(program, {"broken": True}, env)


def test_the_losses_on_the_screen_of_jaxgpt_and_nanogpt_are_recognised(capsys):
    console = metrics.Console(2000)
    console._tokens_per_step = 768
    console({"kind": "eval", "step": 250, "train_loss": 2.4285, "val_loss": 2.4379, "elapsed_s": 1.0})
    console({"kind": "train", "step": 20, "loss": 3.5621, "tokens_per_second": 16_765.0, "mfu": None})
    final = {
        "kind": "final",
        "val_loss": 1.9049,
        "uniform_loss": 4.17,
        "elapsed_s": 108.0,
        "run_dir": "r",
        "sample": "x",
    }
    console(final)
    evaluated, trained, *rest = capsys.readouterr().out.splitlines()
    done = next(line for line in rest if line.startswith("done"))

    assert [whole_runs.to_first_loss(line) for line in (evaluated, trained, done)] == [False, True, False]
    assert whole_runs.to_first_loss("iter 0: loss 4.2047, time 31.98ms, mfu -100.00%")
    assert not whole_runs.to_first_loss("step 0: train loss 4.2068, val loss 4.2057")
    for line, loss in ((evaluated, 2.4379), (done, 1.9049), ("step 250: train loss 1.9, val loss 2.0911", 2.0911)):
        assert whole_runs.last_validation_loss(line) == loss
        assert whole_runs.to_validation_loss(loss)(line)
        assert not whole_runs.to_validation_loss(loss - 0.0001)(line)
    assert not whole_runs.to_validation_loss(9)(trained)


def test_a_command_is_ended_at_the_line_that_is_enough(tmp_path):
    talk = "import time; print('one'); print('two', flush=True); time.sleep(60); print('three')"
    seen = whole_runs.watch([sys.executable, "-c", talk], "two\n".__eq__, str(tmp_path), {})
    assert seen.lines == "one\ntwo\n"
    assert seen.seconds < 30


def test_the_error_of_a_command_that_fails_is_shown(tmp_path):
    with pytest.raises(whole_runs.RunError, match=r"exit code 3(.|\n)*no such text"):
        fail = "import sys; sys.stderr.write('no such text'); sys.exit(3)"
        whole_runs.watch([sys.executable, "-c", fail], "two\n".__eq__, str(tmp_path), {})


def test_every_work_is_explained_and_names_a_recipe_that_exists(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse(["--help"])
    said = capsys.readouterr().out
    for name, (what, cases) in WORKS.items():
        assert re.search(rf"^  {name} +{re.escape(what)}$", said, re.MULTILINE)
        for case in cases:
            assert (comparison.HERE.parent / "configs" / f"{case.config}.yaml").is_file()


@pytest.fixture
def one_thread():
    """PyTorch's threads would fight XLA's over these small arrays."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def compared(tmp_path, text):
    """A function of a work's name and flags -> its first comparison, without the processes."""
    path = tmp_path / "lecture.txt"
    path.write_text(SHAKESPEARE_ALPHABET + text)  # the references have the lecture's 65 characters

    def make(work, *flags):
        args, flags = parse([work, "--text", str(path), *flags])
        return comparison.Comparison(WORKS[work][1][0], args, flags, tmp_path)

    return make


def test_jaxgpts_side_is_made_of_what_training_is_made_of(compared):
    import jax_side

    config = load_config(compared("recipe", *SMALL).flags)
    mesh = sharding.make_mesh(sharding.MeshConfig(1))
    with jax.set_mesh(mesh):
        loop, record, _ = jax_side.prepare(config, mesh)
    assert rows(loop.config) == 4 and record["parameters"] > 0
    loop.emit({"kind": "train", "step": 20, "loss": 1.0, "tokens_per_second": 9.0, "mfu": None})  # it can log


@pytest.mark.parity
@pytest.mark.parametrize("work, flags", [("bigram", ()), ("ladder", ()), ("recipe", SMALL)])
def test_both_sides_have_the_same_model_see_as_many_tokens_a_step_and_learn(compared, one_thread, work, flags):
    import jax_side
    import torch_side

    found = compared(work, "--train.steps_per_call", "20", *flags)
    ours, our_work = jax_side.train({"flags": found.flags})
    theirs, their_work = torch_side.train(found.torch_spec(compiled=False, seed=1))
    comparison.check_same_work({"ours": ours, "theirs": theirs})
    for facts, work in ((ours, our_work), (theirs, their_work)):
        done = work(0.5)
        assert done["amount"] >= 20 and done["seconds"] >= 0.5
        assert facts["first_loss"] > 4 and done["loss"] < 3  # the logarithm of 65 is 4.2


@pytest.mark.parity
def test_both_sides_write_as_many_tokens_with_the_same_model(compared, one_thread):
    import jax_side
    import torch_side

    found = compared("generate", *SMALL, "--model.block_size", "64")
    spec = found.torch_spec(compiled=False, seed=1)
    ours, our_work = jax_side.write({"flags": found.flags} | spec)
    theirs, their_work = torch_side.write(spec)
    assert ours["parameters"] == theirs["parameters"]
    for work in (our_work, their_work):
        done = work(0.1)
        assert done["amount"] % 63 == 0 and done["amount"] > 0  # a window, without the token of the prompt


@pytest.mark.parity
def test_a_clone_s_model_is_in_the_module_where_torch_compile_looks_for_it(compared, tmp_path):
    import torch_side

    clone = "import torch, types\n\nGPTConfig = types.SimpleNamespace\n\nclass GPT(torch.nn.Linear):\n"
    (tmp_path / "model.py").write_text(clone + "    def __init__(self, config):\n        super().__init__(1, 1)\n")
    model = torch_side.build(compared("recipe").torch_spec(compiled=True, seed=1) | {"nanogpt": str(tmp_path)})
    assert sys.modules[type(model).__module__].GPT is type(model)


def test_another_recipe_on_our_side_leaves_the_other_side_as_it_is(compared, tmp_path, capsys):
    found, same = compared("loss", "--ours", "modern/quick"), compared("loss")
    ours = load_config(found.command("jaxgpt", 7, tmp_path)[4:])
    assert (ours.optim.optimizer, ours.train.steps, ours.seed) == ("muon", 300, 7)
    assert found.config == same.config and same.config.train.steps == 2000
    assert found.command("pytorch eager", 7, tmp_path) == same.command("pytorch eager", 7, tmp_path)
    with pytest.raises(SystemExit, match="2"):
        parse(["recipe", "--ours", "modern/quick"])
    assert "for startup and loss" in capsys.readouterr().err


def test_sides_that_differ_are_not_compared():
    same = {"parameters": 42, "tokens_per_step": 8}
    comparison.check_same_work({"ours": same, "theirs": dict(same)})
    with pytest.raises(turns.WorkerError, match=r"same work \(parameters, .*43"):
        comparison.check_same_work({"ours": same, "theirs": same | {"parameters": 43}})


def test_a_wrong_clone_or_flag_is_answered_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["recipe", "--nanogpt", str(tmp_path)])
    assert "not a clone of nanoGPT" in capsys.readouterr().err
    assert main(["recipe", "--model.n_layers", "2"]) == 2
    assert "perhaps you meant --model.n_layer" in capsys.readouterr().err.splitlines()[-1]
