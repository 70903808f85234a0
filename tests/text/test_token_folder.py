import collections
import hashlib
import itertools
import json
import os
import shutil

import chex
import numpy as np
import pytest

from jaxgpt.data import DataError
from jaxgpt.text import mixtures, token_folder, verified
from jaxgpt.text.mixtures import Mixture, Span
from jaxgpt.tokenizer import CharTokenizer


def make_folder(path, tokens, alphabet="abc"):
    """A token folder written with numpy alone."""
    path.mkdir()
    np.save(path / "tokens.npy", tokens)
    np.save(path / "document_ends.npy", np.array([len(tokens)]))
    CharTokenizer(alphabet).save(path / "tokenizer.json")
    facts = {
        "format": 1,
        "dtype": tokens.dtype.name,
        "tokens": len(tokens),
        "vocab_size": 60_000,
        "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
        "tokenizer_sha256": hashlib.sha256((path / "tokenizer.json").read_bytes()).hexdigest(),
    }
    (path / "dataset.json").write_text(json.dumps(facts))
    return str(path)


@pytest.fixture
def two(tmp_path):
    """Two folders whose tokens tell where they stand: 0 to 999 and 10,000 to 12,999."""
    a = make_folder(tmp_path / "a", np.arange(1000, dtype=np.uint16))
    b = make_folder(tmp_path / "b", np.arange(10_000, 13_000, dtype=np.uint16))
    return mixtures.parse_sources(f"{a}=0.7,{b}=2.1")


def error_of(call, *arguments):
    """The message, after checking that it is one line of the form `what (where, value): remedy`."""
    with pytest.raises(DataError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message and " (" in message and "): " in message
    return message


# Opening


def test_a_folder_is_read_as_a_whole_once_and_again_when_it_changes(tmp_path, monkeypatch):
    path, read, scan = make_folder(tmp_path / "a", np.arange(1000, dtype=np.uint16)), [], verified.scan
    hashed = token_folder.sha256_of
    monkeypatch.setattr(verified, "scan", lambda file, *rest: read.append(file.name) or scan(file, *rest))
    monkeypatch.setattr(token_folder, "sha256_of", lambda file: read.append(file.name) or hashed(file))
    whole = ["tokens.npy", "tokenizer.json"]

    def open_again(again=False):
        read.clear()
        return token_folder.open_token_folder(path, again)

    first = open_again()
    assert read == whole
    assert open_again() == first and read == []
    assert open_again(again=True) == first and read == whole
    os.utime(tmp_path / "a" / "tokens.npy")
    assert open_again() == first and read == whole
    shutil.copy(tmp_path / "a" / "tokenizer.json", tmp_path / "copy")
    os.replace(tmp_path / "copy", tmp_path / "a" / "tokenizer.json")
    assert open_again() == first and read == whole
    stat = (tmp_path / "a" / "tokens.npy").stat()
    with open(tmp_path / "a" / "tokens.npy", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    os.utime(
        tmp_path / "a" / "tokens.npy", ns=(stat.st_atime_ns, stat.st_mtime_ns)
    )  # the size and this time are as before
    for _ in range(2):  # what is damaged is not remembered
        assert "sha256" in error_of(open_again)


def test_a_read_finds_the_first_id_beyond_the_vocabulary_in_any_block(tmp_path, monkeypatch):
    monkeypatch.setattr(verified, "BLOCK_BYTES", 64)
    tokens = np.arange(1000, dtype=np.uint16)
    tokens.tofile(tmp_path / "tokens")
    for vocab_size in (1, 32, 33, 700, 999, 1000):
        found = verified.scan(tmp_path / "tokens", 0, tokens.dtype, vocab_size)
        beyond = (vocab_size, vocab_size) if vocab_size < 1000 else None
        assert found == (hashlib.sha256(tokens.tobytes()).hexdigest(), beyond)
    assert verified.scan(tmp_path / "tokens", 20, tokens.dtype, 500)[1] == (490, 500)


def test_a_folder_tells_what_it_holds(tmp_path):
    tokens = np.arange(1000, dtype=np.uint16)
    path = make_folder(tmp_path / "a", tokens)
    folder = token_folder.open_token_folder(path)
    assert (folder.name, folder.tokens, folder.dtype, folder.vocab_size) == (path, 1000, np.uint16, 60_000)
    assert folder.sha256 == hashlib.sha256(tokens.tobytes()).hexdigest()
    assert folder.tokenizer == tmp_path / "a" / "tokenizer.json"
    np.testing.assert_array_equal(folder.read([0, 990], 10), [tokens[:10], tokens[990:]])


@pytest.mark.parametrize("damage", ["flip", "cut", "grow"])
def test_damaged_tokens_are_named_with_both_hashes(tmp_path, damage):
    tokens = np.arange(1000, dtype=np.uint16)
    path = make_folder(tmp_path / "a", tokens)
    data = (tmp_path / "a" / "tokens.npy").read_bytes()
    bad = {"flip": data[:500] + b"\xff" + data[501:], "cut": data[:-2], "grow": data + b"\0\0"}[damage]
    (tmp_path / "a" / "tokens.npy").write_bytes(bad)
    message = error_of(token_folder.open_token_folder, path)
    assert hashlib.sha256(tokens.tobytes()).hexdigest() in message
    assert (
        hashlib.sha256(bad[len(data) - 2000 :]).hexdigest() in message and f"{len(bad) - len(data) + 2000}" in message
    )


@pytest.mark.parametrize("at", [0, 999, 1_100_000])
def test_an_id_beyond_the_vocabulary_is_named_with_its_place(tmp_path, at):
    tokens = np.full(1_200_000, 59_999, np.uint16)
    tokens[at:] = [60_000 + i % 2 for i in range(len(tokens) - at)]
    message = error_of(token_folder.open_token_folder, make_folder(tmp_path / "a", tokens))
    assert f"token {at:,} is 60000, the last id is 59999" in message


def test_another_tokenizer_in_the_folder_is_noticed(tmp_path):
    path = make_folder(tmp_path / "a", np.arange(10, dtype=np.uint16))
    CharTokenizer("xyz").save(tmp_path / "a" / "tokenizer.json")
    assert "tokenizer.json" in error_of(token_folder.open_token_folder, path)


@pytest.mark.parametrize("file", ["dataset.json", "tokens.npy", "tokenizer.json"])
def test_an_unfinished_folder_is_refused(tmp_path, file):
    path = make_folder(tmp_path / "a", np.arange(10, dtype=np.uint16))
    (tmp_path / "a" / file).unlink()
    assert path in error_of(token_folder.open_token_folder, path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 2}'])
def test_a_description_that_is_none_is_refused(tmp_path, text):
    path = make_folder(tmp_path / "a", np.arange(10, dtype=np.uint16))
    (tmp_path / "a" / "dataset.json").write_text(text)
    assert "dataset.json" in error_of(token_folder.open_token_folder, path)


def test_a_header_that_contradicts_the_description_is_refused(tmp_path):
    path = make_folder(tmp_path / "a", np.arange(10, dtype=np.uint16))
    np.save(tmp_path / "a" / "tokens.npy", np.arange(10, dtype=np.uint16).view(np.uint8))  # the same bytes
    assert "uint8" in error_of(token_folder.open_token_folder, path)


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A folder on an object store: gs://bucket lies in a folder of its own here."""
    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bucket").mkdir()
    make_folder(tmp_path / "bucket" / "a", np.arange(1000, dtype=np.uint16))
    local = token_folder.epath.Path
    monkeypatch.setattr(
        token_folder.epath, "Path", lambda path: local(str(path).replace("gs://bucket", str(tmp_path / "bucket")))
    )
    return tmp_path / "bucket" / "a"


def test_an_equals_sign_in_the_name_of_a_remote_folder_is_part_of_it(remote):
    remote.rename(remote.with_name("lang=en"))
    (span,) = mixtures.parse_sources("gs://bucket/lang=en").spans
    assert span.folder.name == "gs://bucket/lang=en"


def test_processes_that_copy_a_folder_at_the_same_time_all_get_it(remote, monkeypatch):
    """One was faster: its copy is there when ours is complete."""
    replace = os.replace

    def replace_after_another(source, target):
        shutil.copytree(source, target)
        replace(source, target)

    monkeypatch.setattr(token_folder.os, "replace", replace_after_another)
    assert token_folder.open_token_folder("gs://bucket/a").tokens == 1000


def test_a_remote_folder_is_copied_once(remote, tmp_path):
    folder = token_folder.open_token_folder("gs://bucket/a")
    assert folder.path.is_relative_to(tmp_path / "cache") and folder.name == "gs://bucket/a"
    (remote / "tokens.npy").unlink()
    assert token_folder.open_token_folder("gs://bucket/a") == folder
    np.testing.assert_array_equal(folder.read([3], 5), [[3, 4, 5, 6, 7]])
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1


def test_a_damaged_copy_is_made_again_and_a_damaged_original_is_not_kept(remote, tmp_path):
    folder = token_folder.open_token_folder("gs://bucket/a")
    (folder.path / "tokens.npy").write_bytes((folder.path / "tokens.npy").read_bytes()[:-1])
    assert token_folder.open_token_folder("gs://bucket/a") == folder
    (folder.path / "tokens.npy").unlink()
    (remote / "tokens.npy").write_bytes((remote / "tokens.npy").read_bytes()[:-1])
    error_of(token_folder.open_token_folder, "gs://bucket/a")
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


# Sources and splits


def test_weights_are_normalised(two):
    assert two.weights == pytest.approx((0.25, 0.75))
    assert [(span.start, span.stop) for span in two.spans] == [(0, 1000), (0, 3000)]


@pytest.mark.parametrize(
    "path", ["a=0,b=1", "a=-1,b=1", "a=nan,b=1", "a=inf,b=1", "a=0.5,b", "a=x", "=1", "a=", "lang=en/a.txt", "a=1,"]
)
def test_a_weight_is_a_positive_number(path):
    message = error_of(mixtures.parse_sources, path)
    assert repr(path) in message and "no such file or folder" in message and "DIR=WEIGHT" in message


@pytest.mark.parametrize("name", ["lang=en", "a=0.5", "a=0.5,b=0.5", "=1", "a=1,"])
def test_an_equals_sign_in_the_name_of_a_folder_that_exists_is_part_of_it(tmp_path, monkeypatch, name):
    path = make_folder(tmp_path / name, np.arange(10, dtype=np.uint16))
    monkeypatch.setenv("HOME", str(tmp_path))
    for written in (path, f"~/{name}"):
        (span,) = mixtures.parse_sources(written).spans
        assert span.folder.path == tmp_path / name


def test_a_folder_of_a_mixture_may_have_an_equals_sign_in_its_name_and_a_tilde_before_it(tmp_path, monkeypatch):
    for name in ("lang=en", "lang=fr"):
        make_folder(tmp_path / name, np.arange(10, dtype=np.uint16))
    monkeypatch.setenv("HOME", str(tmp_path))
    mixture = mixtures.parse_sources("~/lang=en=1,~/lang=fr=3")
    assert [span.folder.path.name for span in mixture.spans] == ["lang=en", "lang=fr"]
    assert mixture.weights == (0.25, 0.75)


def test_folders_of_different_tokenizers_do_not_mix(tmp_path):
    a = make_folder(tmp_path / "a", np.arange(10, dtype=np.uint16))
    b = make_folder(tmp_path / "b", np.arange(10, dtype=np.uint16), alphabet="abd")
    assert a in (message := error_of(mixtures.parse_sources, f"{a}=1,{b}=1")) and b in message


def test_the_leading_part_of_each_folder_is_for_training(two):
    train, val = mixtures.split(two, 0.9, 8)
    assert [span[1:] for span in train.spans] == [(0, 900), (0, 2700)]
    assert [span[1:] for span in val.spans] == [(900, 1000), (2700, 3000)]
    assert train.weights == val.weights == two.weights


def test_a_split_shorter_than_a_window_is_named_with_its_numbers(two):
    message = error_of(mixtures.split, two, 0.9, 100)
    assert "100 in the validation split, 101 needed" in message and two.spans[0].folder.name in message


# Batches


def test_a_batch_depends_on_seed_stream_and_step_only(two):
    def read(*key):
        return mixtures.read_windows(two, *key, batch_size=6, block_size=8)

    keys = list(itertools.product([1337, -1, -2], [0, 1], [0, 1, 10**12]))
    batches = {key: read(*key) for key in keys}
    for key in reversed(keys):
        np.testing.assert_array_equal(read(*key), batches[key])
    assert len({batch.tobytes() for batch in batches.values()}) == len(keys)


def test_the_windows_of_a_step_stay_what_they_are(two):
    """A run that continues with another numpy must see the same data: these came from numpy 2.4."""
    which, starts = mixtures.draw_windows(two, 1337, 0, 5, batch_size=4, block_size=8)
    assert (which.tolist(), starts.tolist()) == ([1, 1, 1, 0], [256, 2931, 501, 665])


def test_rows_of_a_part_are_those_of_the_whole(two):
    whole = mixtures.read_windows(two, 0, 0, 3, batch_size=12, block_size=8)
    rows = [slice(i, i + 4) for i in (0, 4, 8)]
    parts = [mixtures.read_windows(two, 0, 0, 3, batch_size=12, block_size=8, rows=each) for each in rows]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    chex.assert_shape(whole, (12, 9))
    chex.assert_type(whole, np.uint16)
    np.testing.assert_array_equal(np.diff(whole.astype(int), axis=1), 1)


def test_every_window_can_be_drawn_and_none_crosses_the_cut(two):
    folder = two.spans[0].folder
    mixture = Mixture((Span(folder, 100, 120),), (1.0,))
    windows = mixtures.read_windows(mixture, 0, 0, 0, batch_size=2000, block_size=8)
    counts = collections.Counter(windows[:, 0].tolist())
    assert set(counts) == set(range(100, 112)) and windows.max() == 119  # 12 windows of 8 inputs and a last target
    assert min(counts.values()) > 0.6 * 2000 / 12  # 5 sigma of 2,000 draws of 12


def test_folders_are_drawn_by_their_weights(two):
    n = 20_000
    which, _ = mixtures.draw_windows(two, 0, 0, 0, n, 8)
    sigma = (n * 0.25 * 0.75) ** 0.5
    assert abs((which == 0).sum() - 0.25 * n) < 4 * sigma
    windows = mixtures.read_windows(two, 0, 0, 0, 100, 8)
    np.testing.assert_array_equal(windows[:, 0] >= 10_000, which[:100] == 1)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(two):
    file = two.spans[0].folder.path / "tokens.npy"
    file.write_bytes(file.read_bytes()[:-100])
    assert "shorter" in error_of(two.spans[0].folder.read, [980], 10)


@pytest.mark.parametrize("size", [1, 7, 99, 100, 5000])
def test_pieces_in_order_predict_each_token_but_the_first_of_a_span_once(two, size):
    _, val = mixtures.split(two, 0.9, 8)
    pieces = list(mixtures.consecutive(val, size))
    assert max(map(len, pieces)) <= size + 1 and min(map(len, pieces)) > 1
    targets = np.concatenate([piece[1:] for piece in pieces])
    np.testing.assert_array_equal(targets, [*range(901, 1000), *range(12_701, 13_000)])
    np.testing.assert_array_equal(np.concatenate([piece[:-1] for piece in pieces]), targets - 1)
