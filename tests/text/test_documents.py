import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxgpt import tokenizer as tokenizers
from jaxgpt.data import DataError
from jaxgpt.text import documents, inputs

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
    pieces = list(documents.pieces(inputs.list_files(str(path))))
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
    pieces = list(documents.pieces(inputs.list_files(str(tmp_path))))
    assert [len(documents.read(piece, "body")) for piece in pieces] == [10, 10, 5]
    assert read_all(tmp_path / "a.parquet", "body") == [(text, True) for text in texts]
    assert sum(piece.size for piece in pieces) == (tmp_path / "a.parquet").stat().st_size


@SMALL
@given(
    texts=st.lists(WORDS, min_size=1, max_size=20),
    piece=st.integers(16, 60),
    cut=st.integers(4, 16),
    packed=st.booleans(),
    ending=st.sampled_from(["txt", "jsonl"]),
)
def test_a_compressed_file_has_the_pieces_of_the_file_that_it_was_made_from(
    tmp_path, sizes, texts, piece, cut, packed, ending
):
    sizes(piece, cut)
    content = "".join(texts) if ending == "txt" else "".join(json.dumps({"text": text}) + "\n" for text in texts)
    plain, compressed = tmp_path / f"a.{ending}", tmp_path / f"a.{ending}.gz"
    plain.write_bytes(content.encode())
    compressed.write_bytes(gzip.compress(content.encode()))
    for line_ends in (False, True):
        found = []
        for path in (plain, compressed):
            pieces = list(documents.pieces(inputs.list_files(str(path))))
            assert sum(each.size for each in pieces) == path.stat().st_size
            found.append([documents.read(each, "text", line_ends) for each in pieces])
        while found[0][-1] == []:  # only a line that is longer than a piece leaves such a piece behind it
            found[0].pop()
        assert found[0] == found[1]


def test_a_compressed_file_is_unpacked_as_its_pieces_are_asked_for(tmp_path, sizes):
    sizes(1000, 100)
    line = json.dumps({"text": "a" * 80}).encode() + b"\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line * 10_000))
    for piece in documents.pieces(inputs.list_files(str(tmp_path / "a.jsonl.gz"))):
        assert len(piece.block.data) < 1000 + len(line)
        assert documents.read(piece, "text")


@SMALL
@given(texts=st.lists(WORDS | st.just(""), min_size=1, max_size=9), piece=st.integers(8, 60))
@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet"])
def test_with_line_ends_each_document_that_is_not_empty_ends_in_a_line_break(tmp_path, sizes, texts, piece, ending):
    sizes(piece, min(piece, 16))
    path = tmp_path / f"a.{ending}"
    if ending == "txt":
        texts = ["".join(texts) or " "]
        path.write_bytes(texts[0].encode())
    elif ending == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=2)
    found, parts = [], ""
    for piece in documents.pieces(inputs.list_files(str(path))):
        for text, is_end in documents.read(piece, "text", line_ends=True):
            parts += text
            if is_end:
                found.append(parts)
                parts = ""
    assert not parts
    assert found == [text if text.endswith("\n") or not text else text + "\n" for text in texts]


def test_inputs_on_an_object_store_are_read_like_files(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("hello")
    local = epath.Path
    monkeypatch.setattr(epath, "Path", lambda path: local(path.replace("gs://bucket", str(tmp_path))))
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


@pytest.mark.parametrize("ending", ["txt", "jsonl"])
@pytest.mark.parametrize("damage", ["cut", "flip", "other"])
def test_a_damaged_compressed_file_is_named(tmp_path, ending, damage):
    path = tmp_path / f"a.{ending}.gz"
    good = gzip.compress(b'{"text": "fine"}\n' * 1000)
    path.write_bytes({"cut": good[:-20], "flip": good[:40] + b"\0\0\0\0" + good[44:], "other": b"no gzip"}[damage])
    assert error_of(path).startswith("damaged gzip")


def test_a_bad_line_of_a_compressed_file_is_named(tmp_path, sizes):
    sizes(20, 1)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "fine"}\n\n{"text": "fine"}\n{"text": 7}\n'))
    assert "line 4," in error_of(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_a_file_that_becomes_shorter_is_an_error(tmp_path, sizes, ending):
    sizes(100, 10)
    path = tmp_path / f"a.{ending}"
    path.write_text('{"text": "fine"}\n' * 100)
    *_, last = documents.pieces(inputs.list_files(str(path)))
    path.write_text('{"text": "fine"}\n' * 50)
    with pytest.raises(DataError, match=r"became shorter \(.*of 1,700 bytes\): wait"):
        documents.read(last, "text")


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    import sys

    (tmp_path / "a.parquet").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'jaxgpt[parquet]'" in error_of(tmp_path / "a.parquet")
