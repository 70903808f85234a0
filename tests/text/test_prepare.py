import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jaxgpt import cli
from jaxgpt import tokenizer as tokenizers
from jaxgpt.data import DataError
from jaxgpt.text import corpus, documents, prepare, token_folder
from jaxgpt.text.prepare import PrepareArgs, PrepareError
from jaxgpt.tokenizer import CharTokenizer, TokenizerError

FILES = ["dataset.json", "document_ends.npy", "tokenizer.json", "tokens.npy"]


@pytest.fixture(scope="module")
def gpt2():
    return tokenizers.gpt2()


@pytest.fixture(scope="module")
def play(tmp_path_factory):
    """A text file of 1.1 MB."""
    path = tmp_path_factory.mktemp("play") / "play.txt"
    path.write_text(corpus.load().text, encoding="utf-8")
    return path


def made(args):
    """The folder, the tokens and the documents' ends, as numpy reads them."""
    prepare.prepare(args)
    out = pathlib.Path(args.out)
    assert sorted(path.name for path in out.iterdir()) == FILES
    return out, np.load(out / "tokens.npy"), np.load(out / "document_ends.npy")


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


# What comes out


def test_a_text_becomes_the_tokens_of_the_whole_and_an_end(play, gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 70_000)
    _, tokens, ends = made(PrepareArgs(str(play), str(tmp_path / "out"), workers=1))
    np.testing.assert_array_equal(tokens[:-1], gpt2.encode(play.read_text(encoding="utf-8")))
    assert tokens[-1] == gpt2.end_of_text and tokens.dtype == np.uint16 and ends.tolist() == [len(tokens)]


@pytest.mark.full
def test_the_number_of_processes_and_the_size_of_the_pieces_change_nothing(play, tmp_path, monkeypatch):
    one = made(PrepareArgs(str(play), str(tmp_path / "one"), workers=1))
    monkeypatch.setattr(documents, "PIECE_BYTES", 100_000)
    two = made(PrepareArgs(str(play), str(tmp_path / "two"), workers=2))
    for a, b in zip(one[1:], two[1:]):
        np.testing.assert_array_equal(a, b)


def test_documents_of_all_kinds_stand_in_order_with_their_ends(gpt2, tmp_path):
    texts = {"a.jsonl": ["one", "", "two <|endoftext|>"], "b.parquet": ["drei", "vier 世界"], "c.txt": ["five\nsix\n"]}
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts["a.jsonl"]))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts["b.parquet"]}), tmp_path / "in" / "b.parquet")
    (tmp_path / "in" / "c.txt").write_text(texts["c.txt"][0])
    out, tokens, ends = made(PrepareArgs(str(tmp_path / "in"), str(tmp_path / "out"), workers=1))
    begins = [0, *ends[:-1]]
    assert all(tokens[end - 1] == 50_256 for end in ends) and ends[-1] == len(tokens)
    found = [gpt2.decode(tokens[a : b - 1]) for a, b in zip(begins, ends)]
    assert found == [text for each in texts.values() for text in each]
    facts = json.loads((out / "dataset.json").read_text())
    assert (facts["documents"], facts["tokens"], facts["vocab_size"]) == (6, len(tokens), 50_257)
    assert facts["sha256"] == hashlib.sha256(tokens.tobytes()).hexdigest()
    assert [file["size"] for file in facts["request"]["inputs"]] == [
        path.stat().st_size for path in sorted((tmp_path / "in").iterdir())
    ]


def test_the_folder_can_be_read(play, tmp_path):
    out, tokens, _ = made(PrepareArgs(str(play), str(tmp_path / "out"), workers=1))
    mixture = token_folder.parse_sources(str(out))
    np.testing.assert_array_equal(
        np.concatenate([piece[:-1] for piece in token_folder.consecutive(mixture, 10**5)]), tokens[:-1]
    )


def test_characters_have_no_end_and_the_alphabet_of_the_input(tmp_path):
    (tmp_path / "a.txt").write_text("banana 世界")
    (tmp_path / "b.txt").write_text("cab")
    out, tokens, ends = made(PrepareArgs(f"{tmp_path}/a.txt,{tmp_path}/b.txt", str(tmp_path / "out"), "char"))
    tokenizer = tokenizers.load(out / "tokenizer.json")
    assert tokenizer.alphabet == "".join(sorted(set("banana 世界cab")))
    assert tokenizer.decode(tokens) == "banana 世界cab" and tokens.dtype == np.uint8
    assert ends.tolist() == [9, 12]


@pytest.mark.full
def test_bpe_is_trained_on_the_input_and_serves_other_inputs(play, tmp_path):
    out, tokens, _ = made(PrepareArgs(str(play), str(tmp_path / "out"), "bpe", 1000))
    tokenizer = tokenizers.load(out / "tokenizer.json")
    assert tokenizer.vocab_size == 1000 and tokens[-1] == 999
    assert tokenizer.decode(tokens[:-1]) == play.read_text(encoding="utf-8")
    (tmp_path / "other.txt").write_text("Other words.")
    other, tokens, _ = made(PrepareArgs(f"{tmp_path}/other.txt", f"{tmp_path}/other", str(out / "tokenizer.json")))
    assert tokenizer.decode(tokens[:-1]) == "Other words."
    assert len(token_folder.parse_sources(f"{out}=1,{other}=2").spans) == 2


@pytest.mark.full
def test_a_sample_of_a_long_input_is_taken_from_all_over_it(tmp_path, monkeypatch):
    lines = [f"{'abcdefghij'[i // 100]}{i} " for i in range(1000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    monkeypatch.setattr(documents, "PIECE_BYTES", 200)
    monkeypatch.setattr(prepare, "SAMPLE_BYTES", 1200)
    seen = []
    monkeypatch.setattr(
        prepare.BPETokenizer,
        "train",
        lambda texts, size: seen.extend(texts) or CharTokenizer("".join(sorted(set("".join(lines))))),
    )
    made(PrepareArgs(f"{tmp_path}/a.txt", f"{tmp_path}/out", "bpe", 300))
    assert len(seen) == 5 and 800 < len("".join(seen)) < 1400
    assert [text.split()[0][0] for text in seen] == list("acegi")  # pieces 0, 5, 10, 15 and 20 of 25


# Interrupted


COMMAND = """
import sys
from jaxgpt import cli
from jaxgpt.text import documents
from jaxgpt.text import prepare
if __name__ == "__main__":
    prepare.JOURNAL_SECONDS, documents.PIECE_BYTES = 0.0, 50_000
    sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def whole(play, tmp_path_factory):
    """The files of a command that nothing stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE_BYTES", 50_000)
        return contents(made(PrepareArgs(str(play), str(tmp_path_factory.mktemp("whole") / "out"), workers=1))[0])


@pytest.mark.full
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("number, workers, code", [("SIGKILL", 2, -9), ("SIGTERM", 2, 75), ("SIGINT", 1, 130)])
def test_a_command_that_was_stopped_carries_on_to_the_same_files(play, whole, tmp_path, number, workers, code):
    (tmp_path / "command.py").write_text(COMMAND)
    out = tmp_path / "out"
    argv = [sys.executable, str(tmp_path / "command.py"), "prepare", "--input", str(play), "--workers", str(workers)]
    process = subprocess.Popen([*argv, "--out", str(out)], stderr=subprocess.PIPE, text=True)
    while not (out / "journal.json").exists() or json.loads((out / "journal.json").read_text())["pieces"] < 3:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(getattr(signal, number))
    _, said = process.communicate(timeout=60)  # ends when the last of its processes has closed the pipe
    assert process.returncode == code, said
    assert "Traceback" not in said and not (out / "dataset.json").exists()
    assert code < 0 or "run the same command again" in said
    assert 3 <= json.loads((out / "journal.json").read_text())["pieces"] < 23
    subprocess.run([*argv, "--out", str(out), "--workers", "1"], check=True, capture_output=True)
    assert contents(out) == whole


def test_what_was_written_behind_the_journal_is_dropped(play, tmp_path, monkeypatch):
    args = PrepareArgs(str(play), str(tmp_path / "out"), "char", workers=1)
    monkeypatch.setattr(documents, "PIECE_BYTES", 100_000)
    encode, calls = prepare.encode_piece, []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise RuntimeError("power cut")
        return encode(*arguments)

    monkeypatch.setattr(prepare, "encode_piece", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        prepare.prepare(args)
    assert json.loads((tmp_path / "out" / "journal.json").read_text())["pieces"] == 0
    assert (tmp_path / "out" / "tokens.npy").stat().st_size > 300_000
    monkeypatch.setattr(prepare, "encode_piece", encode)
    out, _, _ = made(args)
    again, _, _ = made(PrepareArgs(str(play), str(tmp_path / "again"), "char", workers=1))
    assert contents(out) == contents(again)


def test_a_finished_folder_is_left_as_it_is(play, tmp_path, capsys):
    args = PrepareArgs(str(play), str(tmp_path / "out"), "char")
    before = contents(made(args)[0])
    times = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in FILES}
    capsys.readouterr()
    prepare.prepare(args)
    assert "nothing to do" in capsys.readouterr().err and contents(tmp_path / "out") == before
    assert times == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in FILES}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("change", ["inputs", "tokenizer", "text_field"])
def test_a_folder_of_another_command_is_refused(tmp_path, finished, change):
    (tmp_path / "a.txt").write_text("some text")
    args = {"input": str(tmp_path / "a.txt"), "out": str(tmp_path / "out"), "tokenizer": "char"}
    out, _, _ = made(PrepareArgs(**args))
    if not finished:
        facts = json.loads((out / "dataset.json").read_text())
        (out / "dataset.json").unlink()
        journal = {"request": facts["request"], "pieces": 0, "tokens": 0, "documents": 0}
        (out / "journal.json").write_text(json.dumps(journal))
    if change == "inputs":
        (tmp_path / "a.txt").write_text("another text")
    other = {"tokenizer": "gpt2", "text_field": "body"}
    with pytest.raises(PrepareError, match=rf"{change}\): delete it, or name another --out"):
        prepare.prepare(PrepareArgs(**{**args, **({change: other[change]} if change in other else {})}))


def test_a_folder_with_something_else_in_it_is_not_touched(play, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(PrepareError, match="not empty"):
        prepare.prepare(PrepareArgs(str(play), str(tmp_path), "char"))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# Mistakes


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"workers": 0}, "--workers, 0"),
        ({"out": "gs://bucket/out"}, "--out, gs://bucket/out"),
        ({"tokenizer": "bpe"}, "--vocab_size"),
        ({"vocab_size": 1000}, "--vocab_size"),
    ],
)
def test_flags_that_do_not_fit_are_refused_before_anything_is_made(play, tmp_path, flags, says):
    with pytest.raises(PrepareError, match=says):
        prepare.prepare(PrepareArgs(**{"input": str(play), "out": str(tmp_path / "out"), **flags}))
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_tokenizer_is_refused(play, tmp_path):
    with pytest.raises(TokenizerError, match=r"--tokenizer, 'gpt5'\): use gpt2, char, bpe or a tokenizer.json"):
        prepare.prepare(PrepareArgs(str(play), str(tmp_path / "out"), "gpt5"))


def test_a_character_outside_a_given_alphabet_is_named_with_its_file(tmp_path):
    CharTokenizer("abc").save(tmp_path / "abc.json")
    (tmp_path / "a.txt").write_text("abz")
    with pytest.raises(DataError, match=r"a.txt\): unknown character 'z'"):
        prepare.prepare(PrepareArgs(f"{tmp_path}/a.txt", f"{tmp_path}/out", str(tmp_path / "abc.json")))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"caf\xe9", "byte 0xe9 at offset 3"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2"),
        ("a.jsonl", b"\n\n", "no text in the input"),
        ("a.txt", b"", "0 bytes"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_3(tmp_path, capsys, name, content, says):
    (tmp_path / name).write_bytes(content)
    argv = ["prepare", "--input", str(tmp_path / name), "--out", str(tmp_path / "out"), "--tokenizer", "char"]
    assert cli.main(argv) == 3
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("jaxgpt: error: ")]
    assert len(lines) == 1 and says in lines[0]
    assert not (tmp_path / "out" / "dataset.json").exists()
