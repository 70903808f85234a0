import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxgpt import tokenizer as tokenizers
from jaxgpt.data import DataError
from jaxgpt.text import documents

SMALL = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)


@pytest.fixture
def sizes(monkeypatch):
    def set_sizes(piece, cut):
        monkeypatch.setattr(documents, "PIECE_BYTES", piece)
        monkeypatch.setattr(documents, "CUT_BYTES", cut)

    return set_sizes


@pytest.fixture(scope="module")
def gpt2():
    return tokenizers.gpt2()


def read_all(path, field="text"):
    pieces = list(documents.pieces(documents.list_files(str(path))))
    return [found for piece in pieces for found in documents.read(piece, field)]


def error_of(path, field="text"):
    """The message, after checking that it is one line of the form `what (where, value): remedy`."""
    with pytest.raises(DataError) as caught:
        read_all(path, field)
    message = str(caught.value)
    assert "\n" not in message and " (" in message and "): " in message and str(path) in message
    return message


WORDS = st.text(alphabet=st.sampled_from("ab,.  \n\n\té世🙂\u3000\x85"), min_size=1)


@SMALL
@given(text=WORDS, piece=st.integers(8, 40), cut=st.integers(4, 40))
def test_the_pieces_of_a_text_are_the_text(tmp_path, sizes, text, piece, cut):
    sizes(piece, min(cut, piece))
    (tmp_path / "a.txt").write_bytes(text.encode())
    found = read_all(tmp_path / "a.txt")
    assert "".join(part for part, _ in found) == text
    assert [end for _, end in found] == [False] * (len(found) - 1) + [True]
    assert len(found) == -(-len(text.encode()) // piece)


@SMALL
@given(
    words=st.lists(st.sampled_from(["it's", "a", "12", "é", "世界", "!?", "🙂", "\t", "\r"])), piece=st.integers(32, 90)
)
@pytest.mark.parametrize("space", [" ", "\n", " \n ", "\n\n\n"])
def test_the_ids_of_the_pieces_are_the_ids_of_the_text(tmp_path, sizes, gpt2, words, piece, space):
    text = space.join(["first", *words, "last"])
    sizes(piece, 32)
    (tmp_path / "a.txt").write_bytes(text.encode())
    ids = [gpt2.encode(part) for part, _ in read_all(tmp_path / "a.txt")]
    np.testing.assert_array_equal(np.concatenate(ids), gpt2.encode(text))


@SMALL
@given(
    texts=st.lists(st.text(max_size=30), max_size=20),
    piece=st.integers(1, 60),
    ascii=st.booleans(),
    last=st.sampled_from(["", "\n", "\n \n"]),
)
def test_the_lines_of_a_jsonl_file_are_read_once_each_and_in_order(tmp_path, sizes, texts, piece, ascii, last):
    sizes(piece, 1)
    lines = [json.dumps({"id": i, "text": text}, ensure_ascii=ascii) for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_bytes(("\n".join(lines) + last).encode() or b"\n")
    assert read_all(tmp_path / "a.jsonl") == [(text, True) for text in texts]


def test_the_rows_of_a_parquet_file_are_documents(tmp_path):
    texts = [f"text {i} 世界" for i in range(25)]
    table = pyarrow.table({"id": range(25), "body": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=10)
    pieces = list(documents.pieces(documents.list_files(str(tmp_path))))
    assert [len(documents.read(piece, "body")) for piece in pieces] == [10, 10, 5]
    assert read_all(tmp_path / "a.parquet", "body") == [(text, True) for text in texts]
    assert sum(piece.size for piece in pieces) == (tmp_path / "a.parquet").stat().st_size


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.jsonl", "sub/c.txt", "a.md"):
        (tmp_path / name).write_text('{"text": "x"}')
    (tmp_path / "more.md").write_text("named, so read")
    files = documents.list_files(f"{tmp_path},{tmp_path / 'more.md'}")
    names = [tmp_path / name for name in ("a.jsonl", "b.txt", "sub/c.txt", "more.md")]
    assert [file.path for file in files] == [str(name) for name in names]


def test_inputs_on_an_object_store_are_read_like_files(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("hello")
    local = documents.epath.Path
    monkeypatch.setattr(documents.epath, "Path", lambda path: local(path.replace("gs://bucket", str(tmp_path))))
    assert read_all("gs://bucket/a.txt") == [("hello", True)]


def test_a_byte_order_mark_is_dropped_at_the_beginning_only(tmp_path, sizes):
    sizes(8, 4)
    (tmp_path / "a.txt").write_bytes("\ufeff12345\ufeff67890".encode())
    assert [text for text, _ in read_all(tmp_path / "a.txt")] == ["12345", "\ufeff67890"]


@pytest.mark.parametrize("piece", [4, 16, 1000])
def test_the_first_byte_that_is_no_utf8_is_named(tmp_path, sizes, piece):
    sizes(piece, 4)
    (tmp_path / "a.txt").write_bytes("naïve text, then ".encode() + b"\xe9t\xe9")
    assert "byte 0xe9 at offset 18" in error_of(tmp_path / "a.txt")


@pytest.mark.parametrize("piece", [10, 1000])
@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": ', "not JSON"),
        ("7", "no field 'text'"),
        ('{"body": "x"}', "no field 'text'"),
        ('{"text": null}', "not a string but NoneType"),
        ('{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "\xe9"}', "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, sizes, piece, line, says):
    sizes(piece, 1)
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n\n{"text": "fine"}\n' + line + b'\n{"text": "fine"}\n')
    message = error_of(tmp_path / "a.jsonl")
    assert "line 4," in message and says in message


def test_a_bad_row_of_parquet_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b", None]}), path, row_group_size=2)
    assert "row 0 of row group 1" in error_of(path)
    assert "no column 'body'" in error_of(path, "body") and "it has text" in error_of(path, "body")
    path.write_bytes(path.read_bytes()[:-10])
    assert "not parquet" in error_of(path)


@pytest.mark.parametrize(
    "name, says", [("missing.txt", "No such file"), ("empty.txt", "0 bytes"), ("folder", "nothing")]
)
def test_an_input_without_text_is_named(tmp_path, name, says):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    assert says in error_of(tmp_path / name)


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    import sys

    (tmp_path / "a.parquet").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'jaxgpt[parquet]'" in error_of(tmp_path / "a.parquet")
