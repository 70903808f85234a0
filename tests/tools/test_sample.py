import contextlib
import itertools
import os
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgpt import Config, Run, cli
from jaxgpt.errors import ArgumentError
from jaxgpt.init import init_model
from jaxgpt.model import GPTConfig
from jaxgpt.tokenizer import BPETokenizer, CharTokenizer
from jaxgpt.tools import sample
from jaxgpt.tools.sample import SampleArgs, before_first

END = "<|endoftext|>"


def first_of(text, stops):
    """The definition, for a text as a whole."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


def test_a_text_in_pieces_ends_where_the_whole_text_does_and_holds_back_only_a_beginning():
    draw = np.random.default_rng(0)

    def word(most):
        return "".join(draw.choice(["a", "b"], draw.integers(1, most)))

    for _ in range(300):
        pieces, stops = [word(5) for _ in range(draw.integers(1, 8))], tuple(word(6) for _ in range(draw.integers(3)))
        asked, said = [], ""
        for piece in before_first(stops, (asked.append(piece) or piece for piece in pieces)):
            said += piece
            seen = "".join(asked)
            assert said == first_of(seen, stops)[: len(said)]
            if not any(stop in seen for stop in stops):
                held = seen[len(said) :]
                assert not held or any(stop.startswith(held) for stop in stops)
        assert said == first_of("".join(pieces), stops)
        if len(asked) < len(pieces):
            assert any(stop in "".join(asked) for stop in stops)


@pytest.fixture(scope="module")
def bpe():
    """A tokenizer of all bytes, a few merges and the end of text."""
    return BPETokenizer.train(["the king and the queen"] * 9, 270)


@pytest.fixture
def speaker(bpe, monkeypatch):
    """A run that says the same tokens after each start, whatever is drawn: a bigram model of a chain of ids."""

    def make(*text, tokenizer=bpe):
        ids = [tokenizer.end_of_text if part == END else tokenizer.encode(part) for part in text]
        chain = np.hstack([tokenizer.start, *ids, tokenizer.encode("!"), tokenizer.encode("!")])
        table = np.full((tokenizer.vocab_size,) * 2, -1e9, np.float32)
        for before, after in reversed(list(itertools.pairwise(chain))):  # the first of several wins
            table[before] = -1e9
            table[before, after] = 0
        switches = {"positions": "none", "norm": "none", "lm_head": "none"}
        config = GPTConfig(vocab_size=tokenizer.vocab_size, block_size=8, n_layer=0, n_embd=0, **switches)
        model = init_model(config, seed=0)
        model.token_embedding_table.embedding = nnx.Param(jnp.asarray(table))
        run = Run(None, Config(model=config), tokenizer, model, 7, None)
        monkeypatch.setattr(sample, "load", lambda run_dir, step: run)

    return make


def said(capsys, *flags):
    """What the command prints, which is the same when it is streamed."""
    argv = ["sample", "--run", "x", "--max_new_tokens", "40", *flags]
    outs = []
    for more in ([], ["--stream"]):
        assert cli.main([*argv, *more]) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1]
    return outs[0].removesuffix("\n")


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], "hé, wor"),  # neither the start token nor the end of the text is printed
        (["--ignore_eos", "true"], f"hé, wor{END}" * 4 + "hé,"),  # 40 tokens
        (["--stop", "wo"], "hé, "),
        (["--stop", "zz", "--stop", "r", "--stop=wo"], "hé, "),
        (["--stop", f"r{END}hé", "--ignore-eos"], "hé, wo"),
        (["--stop", END, "--ignore_eos", "true"], "hé, wor"),
        (["--stop", "h"], ""),
        (["--stop", "r!"], "hé, wor"),  # held back, and then printed
        (["--prompt", "wo"], "wor"),
        (["--prompt", "wo", "--stop", "wo", "--stop", "or"], "wor"),  # the prompt does not count
        (["--prompt", END], END + "LD" + "!" * 38),
        (["--prompt", END, "--special_tokens", "true"], END + "hé, wor"),
        (["--prompt", ""], "hé, wor"),
    ],
)
def test_a_text_ends_before_its_first_stop_text_or_at_the_end_of_text(speaker, capsys, flags, expected):
    speaker("hé, wor", END, ">", "LD")  # the last token of the end of text as ordinary text is `>`
    assert said(capsys, *flags) == expected


@pytest.mark.parametrize("prompt", ["null", "None", "none", "true", "1e3", "~", "--stop", " "])
def test_a_prompt_is_the_text_that_was_given(speaker, capsys, prompt):
    speaker("hé")
    assert said(capsys, "--prompt", prompt, "--max_new_tokens", "1").startswith(prompt)


def test_each_of_several_texts_ends_on_its_own(trained, capsys):
    argv = ["sample", "--run", str(trained[0]), "--prompt", "the king", "--max_new_tokens", "60", "--num_samples", "3"]
    assert cli.main(argv) == 0
    whole = capsys.readouterr().out.removesuffix("\n").split("\n" + "-" * 15 + "\n")
    assert len(whole) == 3 and {len(text) for text in whole} == {68}
    stops = [whole[0][20:22], whole[1][30:33]]
    assert cli.main([*argv, "--stop", stops[0], "--stop", stops[1]]) == 0
    texts = capsys.readouterr().out.removesuffix("\n").split("\n" + "-" * 15 + "\n")
    assert texts == ["the king" + first_of(text[8:], stops) for text in whole] and len(texts[0]) <= 20


@pytest.mark.parametrize("seed", [-1, 1 << 32, 4294968633, 99999999999999999999])
def test_seeds_that_jax_would_not_tell_apart_are_refused(capsys, seed):
    assert cli.main(["sample", "--run", "/nowhere", "--seed", str(seed)]) == 2
    assert f"seed is {seed} (command line): use a whole number from 0 to 4294967295" in capsys.readouterr().err
    with pytest.raises(ArgumentError, match=f"^seed is {seed}"):
        SampleArgs("x", seed=seed)


def test_every_seed_of_32_bits_is_taken(speaker, capsys):
    speaker("hé")
    assert [said(capsys, "--seed", str(seed))[:2] for seed in (0, (1 << 32) - 1)] == ["hé"] * 2


def test_an_empty_stop_text_is_refused(capsys):
    assert cli.main(["sample", "--run", "/nowhere", "--stop", "a", "--stop", ""]) == 2
    assert "stop is ''" in capsys.readouterr().err


@pytest.mark.parametrize("content, words", [(None, "No such file"), ("folder", "directory"), (b"na\xefve", "byte 2")])
def test_a_prompt_file_that_cannot_be_read_is_one_line(tmp_path, capsys, content, words):
    path = tmp_path / "prompt.txt"
    if content == "folder":
        path.mkdir()
    elif content:
        path.write_bytes(content)
    assert cli.main(["sample", "--run", "/nowhere", "--prompt_file", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"jaxgpt: error: cannot read the prompt ({path}, ") and error.count("\n") == 1
    assert words in error and "UTF-8 text file" in error


@pytest.mark.parametrize(
    "content, expected", [("", "hé, wor"), ("wo", "wor"), ("\ufeffwo", "wor"), ("w\nwo", "w\nwor")]
)
def test_a_prompt_file_is_the_prompt_and_an_empty_one_starts_a_new_text(
    speaker, tmp_path, capsys, monkeypatch, content, expected
):
    speaker("hé, wor", END)
    (tmp_path / "prompt.txt").write_text(content, encoding="utf-8")
    assert said(capsys, "--prompt_file", str(tmp_path / "prompt.txt")) == expected
    monkeypatch.setenv("HOME", str(tmp_path))
    assert said(capsys, "--prompt_file=~/prompt.txt") == expected


def test_the_error_about_an_unknown_character_is_short(speaker, capsys):
    speaker("a", tokenizer=CharTokenizer("!a\n" + "".join(map(chr, range(0x4E00, 0x4E00 + 20_000)))[:300]))
    assert cli.main(["sample", "--run", "x", "--prompt", "a" * 5000 + "é"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "unknown character 'é' (position 5000)" in error and len(error) < 1100


@pytest.fixture
def unread():
    """A stream whose reader has gone away."""
    read, write = os.pipe()
    os.close(read)
    with contextlib.suppress(BrokenPipeError), open(write, "w") as stream:
        yield stream


def test_messages_that_nobody_reads_do_not_keep_the_text_back(speaker, capsys, monkeypatch, unread):
    speaker("hé")
    for stderr in (unread, None):
        monkeypatch.setattr("sys.stderr", stderr)
        assert cli.main(["sample", "--run", "x", "--max_new_tokens", "2"]) == 0
        assert capsys.readouterr().out.startswith("h")


def test_when_nobody_reads_on_nothing_more_is_computed(speaker, monkeypatch, unread):
    speaker("hé")
    monkeypatch.setattr("sys.stdout", unread)
    assert cli.main(["sample", "--run", "x", "--stream", "--max_new_tokens", "1000000000"]) == 0


def test_a_process_without_stdout_samples_for_nobody(speaker, monkeypatch):
    speaker("hé")
    monkeypatch.setattr("sys.stdout", None)
    assert cli.main(["sample", "--run", "x", "--max_new_tokens", "2"]) == 0


def test_characters_that_the_terminal_cannot_show_are_escaped(speaker, tmp_path, monkeypatch):
    speaker("hé")
    for more in ([], ["--stream"]):
        with open(tmp_path / "out", "w", encoding="ascii") as stdout:
            monkeypatch.setattr("sys.stdout", stdout)
            assert cli.main(["sample", "--run", "x", "--max_new_tokens", "3", *more]) == 0
        assert pathlib.Path(tmp_path / "out").read_text() == "h\\xe9\n"


def test_a_character_that_two_pieces_share_is_whole(speaker, capsys):
    text = "abcdefgéhijklmnopqrstu€"  # the pieces are 8 and 16 tokens long, and é and € are two and three of them
    speaker(text, END)
    assert said(capsys) == text
