import chex
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import tokenizer as tokenizers
from jaxgpt.corpus import SHAKESPEARE_ALPHABET
from jaxgpt.tokenizer import CharTokenizer, UnknownCharacterError


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
