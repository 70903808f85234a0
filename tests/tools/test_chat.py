import contextlib
import io
import itertools
import json
import os
import re
import select
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chat_templates import ask_here, chat_tokenizer
from flax import nnx
from random_run import keep

from jaxgpt import Config, GPTConfig, Run, cli, generate, sampling
from jaxgpt.errors import ArgumentError
from jaxgpt.init import init_model
from jaxgpt.sampling import make_rule
from jaxgpt.step import params_of
from jaxgpt.text.chat import ChatEncoder, Template
from jaxgpt.tools import chat, dialogue
from jaxgpt.tools.dialogue import Dialogue, Writer

GREEDY = make_rule(0.0)


@pytest.fixture(autouse=True)
def here(request, monkeypatch):
    """Templates are rendered in this process, which takes no time to start."""
    monkeypatch.setattr(Template, "_ask", ask_here)


class Echo:
    """A writer that answers with what it is told, and remembers the prompts."""

    def __init__(self, answer):
        self.answer, self.prompts = answer, []

    def write(self, prompt, max_new_tokens, rule, key, stop):
        self.prompts.append((prompt.tolist(), max_new_tokens))
        yield []
        for new in self.answer[:max_new_tokens]:
            yield [new]


def echo_dialogue(answer="the lark", window=100, max_new_tokens=20, **options):
    encoder = ChatEncoder(chat_tokenizer(), "run")
    writer = Echo(encoder.tokenizer.encode(answer).tolist())
    sizes = {"window": window, "max_new_tokens": max_new_tokens}
    return Dialogue(writer, encoder, **sizes, rule=GREEDY, seed=0, **options), writer


def turns_of(messages):
    first = [message["role"] for message in messages].index("user")
    return messages[:first], [messages[i : i + 2] for i in range(first, len(messages), 2)]


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("window, max_new_tokens", [(200, 20), (256, 100), (240, 500)])
def test_of_the_history_the_last_turns_that_fit_are_sent(system, window, max_new_tokens):
    talk, writer = echo_dialogue(window=window, max_new_tokens=max_new_tokens, system=system)
    encode = talk._encoder.encode
    for i in range(12):
        assert "".join(talk.answer(f"question {i} " + "and the queen " * (i % 3))) == "the lark"
        before, turns = turns_of(talk.messages[:-1])
        assert len(turns) == i + 1 and [m["content"] for m in before] == [system] * (system is not None)
        longest = window - min(max_new_tokens, window // 2)
        fit = [encode([*before, *itertools.chain(*turns[k:])]).tolist() for k in range(len(turns))]
        expected = next((ids for ids in fit if len(ids) <= longest), fit[-1])
        prompt, room = writer.prompts[-1]
        assert prompt == expected and room == min(max_new_tokens, window - len(prompt))
        assert talk.forgotten == fit.index(expected)
    assert 0 < talk.forgotten < 11


def test_a_message_that_fits_no_window_is_one_line_and_is_not_kept():
    talk, writer = echo_dialogue()
    list(talk.answer("hi"))
    with pytest.raises(ArgumentError, match=r"^the message does not fit \(\d+ tokens.*block_size 100$"):
        list(talk.answer("zq" * 60))
    assert len(talk.messages) == 2 and len(writer.prompts) == 1
    assert "".join(talk.answer("hi")) == "the lark"


def test_an_answer_that_is_ended_is_what_was_shown_of_it():
    talk, _ = echo_dialogue("the lark sang é")
    answer, shown = talk.answer("hi"), ""
    while len(shown) < 5:
        shown += next(answer)
    answer.close()
    assert talk.messages[-1] == {"role": "assistant", "content": shown} and "the lark sang é".startswith(shown)
    talk.reset()
    assert talk.messages == [] and "".join(talk.answer("hi")) == "the lark sang é"


@pytest.fixture
def speaker(monkeypatch):
    """A run that answers the same to everything: a bigram model of a chain of ids, from the header's last token on."""

    def make(answer, **settings):
        tokenizer = chat_tokenizer(**settings)
        chain = np.hstack([tokenizer.encode("\n"), tokenizer.encode(answer), tokenizer.end_of_text])
        table = np.full((tokenizer.vocab_size,) * 2, -1e9, np.float32)
        for before, after in itertools.pairwise(chain):
            table[before, after] = 0
        switches = {"positions": "none", "norm": "none", "lm_head": "none"}
        config = GPTConfig(vocab_size=tokenizer.vocab_size, block_size=256, n_layer=0, n_embd=0, **switches)
        model = init_model(config, seed=0)
        model.token_embedding_table.embedding = nnx.Param(jnp.asarray(table))
        run = Run(None, Config(model=config), tokenizer, model, 7, None)
        monkeypatch.setattr(chat, "load", lambda run_dir, step: run)

    return make


def test_each_line_of_stdin_is_a_message_and_only_replies_are_on_stdout(speaker, capsys, monkeypatch):
    speaker("hé, €")
    monkeypatch.setattr("sys.stdin", io.StringIO("the king?\n\n/reset\r\n  and now"))
    assert cli.main(["chat", "--run", "runs/x"]) == 0
    said = capsys.readouterr()
    assert said.out == "hé, €\n" * 3  # without a terminal, /reset is a message
    assert said.err == "run runs/x, step 7\n"


def test_no_stdin_is_a_dialogue_of_nothing(speaker, capsys, monkeypatch):
    speaker("hé")
    monkeypatch.setattr("sys.stdin", None)
    assert cli.main(["chat", "--run", "runs/x"]) == 0 and capsys.readouterr().out == ""


def test_a_run_without_a_template_names_sample(speaker, capsys):
    speaker("ab", template=None)
    assert cli.main(["chat", "--run", "runs/x"]) == 2
    assert capsys.readouterr().err == (
        "jaxgpt: error: no chat template (runs/x): continue a text with `jaxgpt sample`\n"
    )


@pytest.mark.parametrize(
    "flag, value", [("max_new_tokens", "0"), ("temperature", "-1"), ("seed", "-1"), ("top_k", "0")]
)
def test_numbers_out_of_their_range_are_refused_before_anything_is_read(capsys, flag, value):
    assert cli.main(["chat", "--run", "/nowhere", f"--{flag}", value]) == 2
    assert f"{flag} is {value}" in capsys.readouterr().err


def test_commands_on_a_terminal(capsys, tmp_path):
    talk, _ = echo_dialogue("é", system="Be brief.")
    file = tmp_path / "talks.jsonl"
    list(talk.answer("hi"))
    assert not chat._obeyed(talk, "/usr is what?") and not chat._obeyed(talk, "hi /reset")
    for line in (f"/save {file}", "/reset", f"/save {file}", "/save", f"/save {tmp_path}", "/help"):
        assert chat._obeyed(talk, line)
    said = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    system, *turn = said[0]["messages"]
    assert said[1] == {"messages": [system]} and system == {"role": "system", "content": "Be brief."}
    assert turn == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "é"}]
    err = capsys.readouterr().err
    assert f"saved ({file}, 3 messages)" in err and "write /save FILE" in err
    assert f"cannot write the dialogue ({tmp_path}, " in err and chat.HELP in err


POSITIONS = {"learned": {}, "rope": {"positions": "rope", "n_kv_head": 1, "sliding_window": 20}}


@pytest.fixture(scope="module", params=POSITIONS)
def model(request):
    """Weights far from uniform, so that a wrong cache shows."""
    config = GPTConfig(vocab_size=65, block_size=48, n_layer=2, n_head=2, n_embd=16, init="torch")
    return init_model(GPTConfig(**{**vars(config), **POSITIONS[request.param]}), seed=0)


@pytest.fixture
def small(monkeypatch):
    """Pieces and caches as small as the models."""
    monkeypatch.setattr(dialogue, "PROMPT_PIECES", (8, 4))
    monkeypatch.setattr(sampling, "CAPACITY", 8)


def written(writer, prompt, n, rule=GREEDY, key=None, stop=()):
    return [new for piece in writer.write(np.array(prompt), n, rule, key, stop) for new in piece]


def generated(model, prompt, n, key=jax.random.key(0), **rule):  # noqa: B008
    return np.asarray(generate(model, np.array(prompt)[None], key, n, **rule))[0, len(prompt) :].tolist()


@pytest.mark.full
@pytest.mark.usefixtures("small")
def test_only_tokens_from_the_first_that_differs_on_are_prefilled_and_the_answer_is_that_of_a_fresh_prompt(model):
    rng, writer = np.random.default_rng(0), Writer(model)
    first = rng.integers(0, 65, 9).tolist()
    answer = written(writer, first, 5)
    assert writer.prefilled == 9 and answer == generated(model, first, 5, temperature=0.0)
    held = first + answer[:-1]
    assert writer.tokens == held
    # the dialogue goes on; the history is another from token 3 on; all is as before; it is shorter; it fills the window
    prompts = [held + rng.integers(0, 65, 7).tolist()]
    prompts.append([*prompts[0][:3], (prompts[0][3] + 1) % 65, *rng.integers(0, 65, 20).tolist()])
    prompts += [prompts[-1], prompts[-1][:5], rng.integers(0, 65, 45).tolist()]
    prompts.append([prompts[-1][0], (prompts[-1][1] + 1) % 65, *rng.integers(0, 65, 45).tolist()])
    for prompt in prompts:
        before = writer.tokens
        differs = next((i for i, (a, b) in enumerate(zip(prompt, before)) if a != b), min(len(prompt), len(before)))
        n = min(3, 48 - len(prompt))  # the last piece of the last prompt would end behind the window
        assert written(writer, prompt, n) == generated(model, prompt, n, temperature=0.0)
        assert writer.prefilled == len(prompt) - min(differs, len(prompt) - 1)
    key = jax.random.key(3)
    drawn = written(writer, first, 20, make_rule(0.9, 40), key)
    assert drawn == generated(model, first, 20, key, temperature=0.9, top_k=40)
    stop = drawn[12]
    assert written(writer, first, 20, make_rule(0.9, 40), key, {stop}) == drawn[: drawn.index(stop)]


@pytest.mark.full
@pytest.mark.usefixtures("small")
def test_another_length_of_prompt_or_answer_compiles_nothing(model):
    writer = Writer(model)
    written(writer, range(11), 9)
    written(writer, [1], 1)
    assert writer._capacity == 32
    before = [program._cache_size() for program in (writer._read, writer._write)]
    for length, n in ((1, 4), (3, 3), (13, 5), (20, 10)):
        written(writer, np.arange(length) + length, n)
    written(Writer(init_model(model.config, seed=1)), range(11), 9)  # nor do other weights
    assert [program._cache_size() for program in (writer._read, writer._write)] == before


@pytest.mark.full
@pytest.mark.usefixtures("small")
def test_a_call_that_is_interrupted_costs_the_cache_and_nothing_else(model, monkeypatch):
    writer = Writer(model)
    whole = written(writer, range(11), 5)

    def interrupted(*args):
        program(*args)
        raise KeyboardInterrupt

    for name in ("_read", "_write"):
        program = getattr(writer, name)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(writer, name, interrupted)
            written(writer, range(20, 31), 5)
        assert written(writer, range(11), 5) == whole


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A run that goes on saying a and b."""
    folder, tokenizer = tmp_path_factory.mktemp("chat") / "run", chat_tokenizer()
    switches = {"positions": "rope", "lm_head": "linear", "bias": "all"}
    sizes = {"block_size": 1 << 15, "n_layer": 1, "n_head": 1, "n_embd": 8}
    config = GPTConfig(vocab_size=tokenizer.vocab_size, **sizes, **switches)
    params = params_of(init_model(config, seed=0))
    bias = np.full(tokenizer.vocab_size, -1e9, np.float32)
    bias[tokenizer.encode("ab")] = 0
    params["lm_head"]["bias"] = jnp.asarray(bias)
    keep(folder, config, params, tokenizer)
    return folder


class Terminal:
    """`jaxgpt chat` in a pseudo-terminal; its stderr goes to a file."""

    # a shell gives what it starts the terminal, and Ctrl-C, which is ignored where the tests run in the background
    CONTROL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.executable, sys.argv[1:])
"""

    def __init__(self, stderr, *flags):
        self.master, slave = os.openpty()
        command = [sys.executable, "-m", "jaxgpt", "chat", *flags]
        with open(stderr, "wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", self.CONTROL, *command], stdin=slave, stdout=slave, stderr=file,
                start_new_session=True, env={**os.environ, "TERM": "dumb"},
            )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def type(self, text):
        os.write(self.master, text.encode())

    def wait_for(self, pattern, seconds=90):
        """What was shown up to the end of a pattern."""
        ends = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < ends and self.process.poll() is None, repr(self.seen)
            if select.select([self.master], [], [], 1)[0]:
                self.seen += os.read(self.master, 1 << 16).decode()
        shown, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return shown

    def interrupt(self, pattern):
        """Press Ctrl-C until a pattern is shown: a signal just before Python waits for a key is seen later."""
        for _ in range(29):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                return self.wait_for(pattern, seconds=3)
        return self.wait_for(pattern, seconds=3)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal(talker, tmp_path):
    opened = []

    def start(*flags):
        opened.append(Terminal(tmp_path / "stderr", "--run", str(talker), *flags))
        opened[-1].wait_for("> $")
        return opened[-1]

    yield start
    for each in opened:
        each.close()


@pytest.mark.full
def test_a_dialogue_on_a_terminal(terminal, tmp_path):
    screen, file = terminal("--max_new_tokens", "30000"), tmp_path / "talks.jsonl"

    def saved():
        screen.type(f"/save {file}\n")
        screen.wait_for("> $")
        return json.loads(file.read_text().splitlines()[-1])["messages"]

    screen.type("who?\n")
    shown = screen.wait_for("[ab]{20}")  # text arrives while the answer is being written
    assert "> " not in shown
    screen.type("\x03")
    shown += screen.wait_for(r"\n> $")
    begun = saved()
    assert [message["role"] for message in begun] == ["user", "assistant"] and begun[0]["content"] == "who?"
    assert 20 <= len(begun[1]["content"]) < 30_000 and set(begun[1]["content"]) == {"a", "b"}
    assert begun[1]["content"] in shown.replace("^C", "")
    screen.type("and you?\n")  # the next question works
    screen.wait_for("[ab]{20}")
    screen.type("\x03")
    screen.wait_for(r"\n> $")
    whole = saved()
    assert whole[:2] == begun and whole[2]["content"] == "and you?" and len(whole) == 4
    screen.type("/reset\n")
    screen.wait_for("> $")
    assert saved() == []
    screen.type("nonsense")
    screen.wait_for("nonsense")
    screen.interrupt(r"\n> $")  # what was typed is dropped
    assert screen.process.poll() is None
    screen.type("who?\x1b[D\x7fm\n")  # left, backspace: readline edits the line
    screen.wait_for("[ab]{20}")
    screen.type("\x03")
    screen.wait_for(r"\n> $")
    assert saved()[0]["content"] == "whm?"
    screen.type("\x04")
    assert screen.process.wait(60) == 0
    err = (tmp_path / "stderr").read_text()
    assert "step 3\n" in err and "/help" in err and "Traceback" not in err


@pytest.mark.full
def test_ctrl_c_at_the_empty_prompt_ends_the_program(terminal, tmp_path):
    screen = terminal()
    for _ in range(30):  # a signal just before Python waits for a key is seen at the next one
        screen.type("\x03")
        with contextlib.suppress(subprocess.TimeoutExpired):
            screen.process.wait(3)
            break
    assert screen.process.poll() == 0 and "Traceback" not in (tmp_path / "stderr").read_text()
