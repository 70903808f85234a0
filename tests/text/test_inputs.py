import warnings

import pytest

from jaxgpt.data import DataError
from jaxgpt.text import inputs


@pytest.fixture
def folder(tmp_path):
    """A function that makes a folder of files with the given names, each with one character."""

    def make(*names, empty=()):
        for name in (*names, *empty):
            path = tmp_path / "texts" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("" if name in empty else "x")
        return tmp_path / "texts"

    return make


def names_in(folder, paths=None):
    return [file.path.removeprefix(f"{folder}/") for file in inputs.list_files(str(paths or folder))]


def error_of(paths):
    """The message, after checking that it is one line of the form `what (where, value): remedy`, and not long."""
    with pytest.raises(DataError) as caught:
        inputs.list_files(str(paths))
    message = str(caught.value)
    assert "\n" not in message and " (" in message and "): " in message and len(message) < 700
    return message


def test_a_folder_is_read_in_the_order_of_its_names(folder):
    texts = folder("b.txt", "a.jsonl", "sub/c.txt", "sub/sub/d.parquet")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names_in(texts) == ["a.jsonl", "b.txt", "sub/c.txt", "sub/sub/d.parquet"]


@pytest.mark.parametrize(
    "name", ["a.txt", "a.TXT", "a.md", "a.Md", "a.jsonl", "a.JSONL", "a.jsonl.gz", "a.json.gz", "a.txt.GZ", "a.Parquet"]
)
def test_a_file_is_known_by_its_ending_in_any_case(folder, name):
    assert names_in(folder(name)) == [name]


def test_hidden_files_and_folders_are_passed_over_in_folders_and_read_if_they_are_named(folder):
    hidden = [".git/a.txt", ".ipynb_checkpoints/a-checkpoint.txt", "._a.txt", "sub/._b.md", ".hidden/sub/c.txt"]
    texts = folder("a.txt", "sub/b.md", *hidden)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names_in(texts) == ["a.txt", "sub/b.md"]
    assert names_in(texts, texts / ".hidden") == [".hidden/sub/c.txt"]
    assert names_in(texts, texts / "._a.txt") == ["._a.txt"]


def test_what_else_is_left_out_is_said_once_with_a_number_and_the_first_names(folder):
    texts = folder("a.txt", "paper.pdf", "sub/b.json", "c.html", "d.csv", empty=["e.txt", "sub/f.md"])
    with pytest.warns(inputs.InputWarning) as said:
        assert names_in(texts) == ["a.txt"]
    first, second = (str(each.message) for each in said)
    assert f"({texts}, 4 files: c.html, d.csv, paper.pdf, ...): save them as" in first
    assert f"left out as empty ({texts}, 2 files: e.txt, sub/f.md): " in second


def test_a_file_that_is_named_is_read_whatever_its_ending(folder):
    texts = folder("README", "data.json", "a.txt")
    assert names_in(texts, f"{texts}/README,{texts}/data.json") == ["README", "data.json"]


@pytest.mark.parametrize("paths", ["a,b.txt", "lang=en,fr/c.txt", "lang=en,fr"])
def test_a_comma_in_a_name_that_exists_is_part_of_it(folder, paths):
    texts = folder("a,b.txt", "a", "b.txt", "lang=en,fr/c.txt", "lang=en/d.txt", "fr/e.txt")
    assert names_in(texts, texts / paths) == ["a,b.txt" if paths == "a,b.txt" else "lang=en,fr/c.txt"]


def test_the_home_folder_is_meant_by_a_tilde_in_each_part(folder, monkeypatch):
    texts = folder("a.txt", "b/c.txt")
    monkeypatch.setenv("HOME", str(texts))
    assert names_in(texts, "~/a.txt,~/b,") == ["a.txt", "b/c.txt"]


@pytest.mark.parametrize(
    "paths, says",
    [
        ("texts/missing.txt", "No such file"),
        ("texts/empty.txt", "0 bytes"),
        ("texts/only_empty", "nothing to read"),
        ("texts/only_other", "nothing to read"),
        ("texts/nothing", "nothing to read"),
        ("", "no input"),
        (",", "no input"),
        ("https://example.org/a.txt", "cannot read from https://"),
        ("texts/a.txt,ftp://example.org/" + "a" * 10_000, "cannot read from ftp://"),
        ("texts/" + "a" * 10_000, "cannot read the input"),
        (("texts/" + "a" * 200 + ",") * 100, "cannot read the input"),
    ],
)
def test_an_input_that_cannot_be_read_is_named(folder, monkeypatch, paths, says):
    texts = folder("a.txt", "only_other/a.pdf", empty=["empty.txt", "only_empty/a.txt", "only_empty/b.md"])
    (texts / "nothing").mkdir()
    monkeypatch.chdir(texts.parent)
    assert says in error_of(paths)


def test_a_link_to_nowhere_is_named(folder):
    texts = folder("a.txt")
    (texts / "b.txt").symlink_to(texts / "gone.txt")
    assert str(texts / "b.txt") in error_of(texts)
