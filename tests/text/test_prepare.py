import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import os
import pathlib
import shutil
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
from jaxgpt.text import corpus, documents, inputs, mixtures, prepare
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
    mixture = mixtures.parse_sources(str(out))
    np.testing.assert_array_equal(
        np.concatenate([piece[:-1] for piece in mixtures.consecutive(mixture, 10**5)]), tokens[:-1]
    )


def test_documents_of_characters_end_in_a_line_break(tmp_path):
    (tmp_path / "a.txt").write_text("banana 世界")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ["cab", "", "ab\n", "\n"]))
    out, tokens, ends = made(PrepareArgs(f"{tmp_path}/a.txt,{tmp_path}/b.jsonl", str(tmp_path / "out"), "char"))
    tokenizer = tokenizers.load(out / "tokenizer.json")
    assert tokenizer.alphabet == "".join(sorted(set("\nbanana 世界cab")))
    assert tokenizer.decode(tokens) == "banana 世界\ncab\nab\n\n" and tokens.dtype == np.uint8
    assert ends.tolist() == [10, 14, 14, 17, 18]


@pytest.mark.parametrize("ending", ["txt", "md", "", "txt.gz"])
@pytest.mark.parametrize("folder", [True, False])
def test_a_text_alone_has_the_characters_and_the_alphabet_of_the_text(tmp_path, ending, folder):
    path = tmp_path / "in" / f"a.{ending}".rstrip(".")
    path.parent.mkdir()
    path.write_bytes(gzip.compress(b"banana") if ending == "txt.gz" else b"banana")
    args = PrepareArgs(str(path.parent if folder and ending else path), str(tmp_path / "out"), "char", workers=1)
    out, tokens, ends = made(args)
    assert (tokens.tolist(), ends.tolist()) == ([1, 0, 2, 0, 2, 0], [6])
    assert tokenizers.load(out / "tokenizer.json").alphabet == "abn"


@pytest.mark.parametrize("alphabet, text", [("ab", "abba"), ("\nab", "ab\nba\n")])
def test_documents_end_in_a_line_break_if_a_given_alphabet_has_one(tmp_path, alphabet, text):
    CharTokenizer(alphabet).save(tmp_path / "given.json")
    (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n{"text": "ba"}\n')
    args = PrepareArgs(f"{tmp_path}/a.jsonl", str(tmp_path / "out"), str(tmp_path / "given.json"))
    assert CharTokenizer(alphabet).decode(made(args)[1]) == text


def test_the_cuts_between_pieces_change_nothing_about_line_breaks(tmp_path, monkeypatch):
    texts = ["one two three ", "four\n", " five " * 9, "", "\n\n", "six"]
    (tmp_path / "in").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "in" / f"{i}.txt").write_text(text)
    (tmp_path / "in" / "7.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    made_of = []
    for piece in (7, 16, 1000):
        monkeypatch.setattr(documents, "PIECE_BYTES", piece)
        monkeypatch.setattr(documents, "CUT_BYTES", 7)
        with pytest.warns(inputs.InputWarning, match=r"3\.txt"):
            made_of.append(made(PrepareArgs(str(tmp_path / "in"), str(tmp_path / str(piece)), "char", workers=1))[1:])
    for tokens, ends in made_of[:2]:
        np.testing.assert_array_equal(tokens, made_of[2][0])
        np.testing.assert_array_equal(ends, made_of[2][1])


@pytest.mark.full
def test_bpe_is_trained_on_the_input_and_serves_other_inputs(play, tmp_path):
    out, tokens, _ = made(PrepareArgs(str(play), str(tmp_path / "out"), "bpe", 1000))
    tokenizer = tokenizers.load(out / "tokenizer.json")
    assert tokenizer.vocab_size == 1000 and tokens[-1] == 999
    assert tokenizer.decode(tokens[:-1]) == play.read_text(encoding="utf-8")
    (tmp_path / "other.txt").write_text("Other words.")
    other, tokens, _ = made(PrepareArgs(f"{tmp_path}/other.txt", f"{tmp_path}/other", str(out / "tokenizer.json")))
    assert tokenizer.decode(tokens[:-1]) == "Other words."
    assert len(mixtures.parse_sources(f"{out}=1,{other}=2").spans) == 2


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
@pytest.mark.parametrize(
    "number, workers, code",
    [("SIGKILL", 2, -9), pytest.param("SIGTERM", 2, 75, marks=pytest.mark.long), ("SIGINT", 1, 130)],
)
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


def stop_after(monkeypatch, n, error):
    """Let `prepare` fail after `n` pieces, with everything before that on the disk if the error is one of the input."""
    encode, calls = prepare.encode, []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) > n:
            raise error
        return encode(*arguments)

    monkeypatch.setattr(prepare, "encode", fail)


def test_what_was_written_behind_the_journal_is_dropped(play, tmp_path, monkeypatch):
    args = PrepareArgs(str(play), str(tmp_path / "out"), "char", workers=1)
    monkeypatch.setattr(documents, "PIECE_BYTES", 100_000)
    with monkeypatch.context() as patch:
        stop_after(patch, 4, RuntimeError("power cut"))
        with pytest.raises(RuntimeError, match="power cut"):
            prepare.prepare(args)
    assert json.loads((tmp_path / "out" / "journal.json").read_text())["pieces"] == 0
    assert (tmp_path / "out" / "tokens.npy").stat().st_size > 300_000
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


# The same text in another place, and another text in the same place


LINES = [json.dumps({"text": f"line {i:02} abc"}) + "\n" for i in range(20)]  # four pieces of five lines


@pytest.fixture
def corpus_of(tmp_path, monkeypatch):
    """A function that writes a folder of two files, and the arguments to prepare it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(documents, "PIECE_BYTES", len("".join(LINES[:5])))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b.txt").write_text("the end 0123456789")

    def write(lines, tokenizer="char", **more):
        (tmp_path / "in" / "a.jsonl").write_text("".join(lines))
        if tokenizer == "given":
            CharTokenizer("".join(sorted(set("\n".join(LINES) + "the end")))).save(tmp_path / "given.json")
            tokenizer = str(tmp_path / "given.json")
        size = {"bpe": 260}.get(tokenizer)
        return PrepareArgs("in", "out", tokenizer, vocab_size=size, workers=1, **more)

    return write


def moved(tmp_path, how):
    """The input under another name."""
    if how == "moved":
        (tmp_path / "in").rename(tmp_path / "elsewhere")
    elif how == "copied":
        shutil.copytree(tmp_path / "in", tmp_path / "elsewhere", copy_function=shutil.copyfile)
    elif how == "touched":
        os.utime(tmp_path / "in" / "a.jsonl", (1, 1))
    return {"relative": "./in/", "absolute": str(tmp_path / "in"), "named": "in/a.jsonl,in/b.txt", "touched": "in"}.get(
        how, "elsewhere"
    )


@pytest.mark.parametrize("how", ["relative", "absolute", "named", "moved", "copied", "touched"])
@pytest.mark.parametrize("tokenizer", ["char", "bpe", "given"])
def test_the_same_text_in_another_place_is_the_same(corpus_of, tmp_path, monkeypatch, capsys, tokenizer, how):
    args = corpus_of(LINES, tokenizer)
    whole = contents(made(dataclasses.replace(args, out="whole"))[0])
    with monkeypatch.context() as patch:
        stop_after(patch, 3, DataError("no more"))
        with pytest.raises(DataError):
            prepare.prepare(args)
    args = dataclasses.replace(args, input=moved(tmp_path, how))
    with monkeypatch.context() as patch:
        stop_after(patch, 2, RuntimeError("pieces were repeated"))
        out, *_ = made(args)
    found = contents(out)
    facts, wanted = (json.loads(each.pop("dataset.json")) for each in (found, whole))
    assert found == whole
    for each in (facts, wanted):
        del each["request"]["inputs"]
    assert facts == wanted
    capsys.readouterr()
    for each in (args, dataclasses.replace(args, out="whole")):
        prepare.prepare(each)  # is finished
        assert "nothing to do" in capsys.readouterr().err


BROKEN = '{"text": "line\n'


@pytest.mark.parametrize("at", [0, 7, 19])
@pytest.mark.parametrize("tokenizer", ["char", "bpe", "given"])
def test_after_a_repair_of_the_input_the_same_command_goes_on(corpus_of, monkeypatch, tokenizer, at):
    args = corpus_of([*LINES[:at], BROKEN, *LINES[at + 1 :]], tokenizer)
    with pytest.raises(DataError, match=f"line {at + 1}, not JSON"):
        prepare.prepare(args)
    corpus_of(LINES, tokenizer)
    with monkeypatch.context() as patch:
        stop_after(patch, 5 - at // 5 if tokenizer == "given" else 5, RuntimeError("pieces were repeated"))
        out, *_ = made(args)
    assert contents(out) == contents(made(dataclasses.replace(args, out="again"))[0])


@pytest.mark.parametrize("tokenizer", ["char", "bpe", "given"])
@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_with_work_of_another_text_is_refused_and_left_as_it_is(
    corpus_of, tmp_path, monkeypatch, tokenizer, finished
):
    args = corpus_of(LINES, tokenizer)
    if not finished:
        stop_after(monkeypatch, 3, DataError("no more"))
    with contextlib.nullcontext() if finished else pytest.raises(DataError):
        prepare.prepare(args)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    corpus_of([LINES[1], LINES[0], *LINES[2:]], tokenizer)
    remedy = r"from another text|with another text"
    with pytest.raises(PrepareError, match=rf"the folder was (made|begun) ({remedy}) \(out, .*\): delete it, or name"):
        prepare.prepare(args)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_another_text_behind_the_pieces_that_are_done_is_refused_if_it_changes_the_tokenizer(corpus_of, monkeypatch):
    args = corpus_of(LINES)
    stop_after(monkeypatch, 3, DataError("no more"))
    with pytest.raises(DataError):
        prepare.prepare(args)
    corpus_of([*LINES[:-1], LINES[-1].replace("abc", "xyz")])
    with pytest.raises(PrepareError, match="begun with another text"):
        prepare.prepare(args)


@pytest.mark.parametrize("finished", [True, False])
def test_a_second_text_beside_one_that_was_alone_is_another_text(tmp_path, monkeypatch, finished):
    """The first one would now end in a line break."""
    monkeypatch.setattr(documents, "PIECE_BYTES", 10)
    (tmp_path / "a.txt").write_text("one two three four five six")
    (tmp_path / "b.txt").write_text("seven")
    args = PrepareArgs(str(tmp_path / "a.txt"), str(tmp_path / "out"), "char", workers=1)
    with monkeypatch.context() as patch, contextlib.nullcontext() if finished else pytest.raises(DataError):
        stop_after(patch, 9 if finished else 2, DataError("no more"))
        prepare.prepare(args)
    with pytest.raises(PrepareError, match=r"another text \("):
        prepare.prepare(dataclasses.replace(args, input=f"{tmp_path}/a.txt,{tmp_path}/b.txt"))


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("change", [{"tokenizer": "given"}, {"text_field": "body"}, {"tokenizer": "bpe"}])
def test_a_folder_with_work_of_other_settings_is_refused(corpus_of, monkeypatch, finished, change):
    args = corpus_of(LINES)
    if not finished:
        stop_after(monkeypatch, 1, DataError("no more"))
    with contextlib.nullcontext() if finished else pytest.raises(DataError):
        prepare.prepare(args)
    name = next(iter(change))
    tokenizer = change.get("tokenizer", "char")
    other = dataclasses.replace(corpus_of(LINES, tokenizer), **({} if "tokenizer" in change else change))
    with pytest.raises(PrepareError, match=rf"with other settings \(out, {name}.*\): delete it, or name another --out"):
        prepare.prepare(other)


@pytest.mark.parametrize("change", [{"tokenizer": "given"}, {"text_field": "body"}])
def test_where_nothing_is_done_yet_other_settings_begin_anew(corpus_of, monkeypatch, capsys, change):
    with monkeypatch.context() as patch:
        stop_after(patch, 0, DataError("no more"))
        with pytest.raises(DataError):
            prepare.prepare(corpus_of(LINES))
    lines = [line.replace('"text"', '"body"') for line in LINES] if "text_field" in change else LINES
    tokenizer = change.get("tokenizer", "char")
    args = dataclasses.replace(corpus_of(lines, tokenizer), **({} if "tokenizer" in change else change))
    out, *_ = made(args)
    assert "beginning anew" in capsys.readouterr().err
    assert contents(out) == contents(made(dataclasses.replace(args, out="again"))[0])


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_an_older_version_continues_as_it_began(corpus_of, tmp_path, monkeypatch, capsys, finished):
    """It has no hashes of the texts, no fractions of seconds, and no line breaks between its documents."""
    args = corpus_of(LINES)
    with monkeypatch.context() as patch:
        if not finished:
            stop_after(patch, 2, DataError("no more"))
        patch.setattr(prepare.inputs, "is_one_text", lambda files: True)
        with contextlib.nullcontext() if finished else pytest.raises(DataError):
            prepare.prepare(args)
    path = tmp_path / "out" / ("dataset.json" if finished else "journal.json")
    facts = json.loads(path.read_text())
    del facts["texts"], facts["request"]["line_ends"]
    for file in facts["request"]["inputs"]:
        file["modified"] = int(file["modified"])
    path.write_text(json.dumps(facts))
    out, tokens, _ = made(args)
    texts = [json.loads(line)["text"] for line in LINES] + ["the end 0123456789"]
    assert tokenizers.load(out / "tokenizer.json").decode(tokens) == "".join(texts)
    assert ("nothing to do" in capsys.readouterr().err) is finished
    prepare.prepare(args)
    os.utime(tmp_path / "in" / "b.txt", (1, 1))
    with pytest.raises(PrepareError, match="from another text"):  # which cannot be told any more
        prepare.prepare(args)


@pytest.mark.parametrize("name", ["journal.json", "dataset.json"])
@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", "[" * 100_000, '{"request": {"inputs": 7}}', '{"request": {"inputs": []}, "pieces": "x"}'],
)
def test_what_another_program_wrote_is_not_taken_for_ours(corpus_of, tmp_path, name, content):
    args = corpus_of(LINES)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text(content)
    with pytest.raises(PrepareError, match=rf"not written by jaxgpt prepare \(out/{name}\): delete"):
        prepare.prepare(args)
    assert (tmp_path / "out" / name).read_text() == content


def test_a_kill_before_the_first_journal_is_there_leaves_a_folder_to_continue_in(corpus_of, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "journal.json.tmp").write_text('{"requ')
    _, tokens, ends = made(corpus_of(LINES))
    assert len(ends) == len(LINES) + 1 and ends[-1] == len(tokens)


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


# The screen


class ClosedPipe(io.StringIO):
    """What nobody reads any more."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    flush = close = lambda self: self.write("")


@pytest.mark.parametrize(
    "screen",
    [None, ClosedPipe(), io.TextIOWrapper(io.BytesIO(), "ascii"), io.TextIOWrapper(io.BytesIO(), "cp1252")],
    ids=["none", "closed", "ascii", "cp1252"],
)
def test_a_screen_that_shows_nothing_does_not_stop_the_work(tmp_path, monkeypatch, screen):
    folder = tmp_path / "文["  # so that its files are markup to rich: [/b]
    folder.mkdir()
    (folder / "a]:smile:.txt").write_text("some text")
    args = PrepareArgs(str(folder / "a]:smile:.txt"), str(folder / "b]"), "char", workers=1)
    monkeypatch.setattr(sys, "stderr", screen)
    for _ in range(2):  # the second time says that there is nothing to do
        _, tokens, ends = made(args)
        assert len(tokens) == len("some text") == ends[-1]
