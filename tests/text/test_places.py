import pytest
from etils import epath

from jaxgpt.data import DataConfig, DataError
from jaxgpt.text import corpus, inputs, places, source, token_folder
from jaxgpt.text.prepare import PrepareArgs, prepare
from jaxgpt.tools import failures

URLS = ["https://example.org/a.txt", "http://example.org/a?b=0.5", "file:///tmp/a.txt", "HTTPS://a", "://a", "a b://c"]
DOORS = {
    "text": lambda url: source.open_source(DataConfig(path=url)),
    "folder": token_folder.open_token_folder,
    "mixture": lambda url: source.open_source(DataConfig(path=f"{url}=0.5,{url}=0.5")),
    "corpus": lambda url: corpus.load(path=url),
    "input": inputs.list_files,
    "several inputs": lambda url: inputs.list_files(f"{url},{url}"),
    "prepare": lambda url: prepare(PrepareArgs(url, "out", "char")),
}


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("door", DOORS)
def test_an_address_that_cannot_be_read_is_one_line_with_the_remedy(tmp_path, monkeypatch, door, url):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="download it") as caught:
        DOORS[door](url)
    assert failures.describe(caught.value)[0] == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("door", [door for door in DOORS if door != "corpus"])
@pytest.mark.parametrize("error", [ImportError("Please install gcsfs"), ConnectionError("refused"), KeyError("token")])
def test_whatever_the_library_of_an_object_store_raises_is_one_line(tmp_path, monkeypatch, door, error):
    """Each store has a library of its own, whose errors have no class in common."""

    def fail(*_, **__):
        raise error

    for method in ("is_dir", "exists", "read_text", "open", "stat"):
        monkeypatch.setattr(type(epath.Path("gs://bucket")), method, fail)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"gs://bucket/a.*: (check|install)"):
        DOORS[door]("gs://bucket/a")


def test_other_errors_of_local_files_stay_what_they_are():
    with pytest.raises(ZeroDivisionError), places.reading("a.txt", "--input"):
        raise ZeroDivisionError
