"""What jaxgpt writes of a tokenizer, and what others make of that, is read by every door with the same ids."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import tokenizer as tokenizers
from jaxgpt.interop import hf_tokenizer, importing
from jaxgpt.interop.weights import Weights
from jaxgpt.tokenizer import BPETokenizer, CharTokenizer, TokenizerError

ADDED = ["日本", "New York", "  "]
WORDS = [*ADDED, "<|endoftext|>", "<|user|>", "<|", "a", "New", " ", "日", "🙂"]
SPECIAL_TEXT = st.lists(st.sampled_from(WORDS)).map("".join)


def trained():
    return BPETokenizer.train(["the king of the night, <|endoftext|> the king"], 270)


def extended():
    theirs = trained()._tokenizer
    theirs.add_tokens(ADDED)
    theirs.add_special_tokens(["<|user|>"])
    return BPETokenizer(theirs)


RESAVED = {  # what transformers 5.24 changes in a tokenizer.json that it loads and saves
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {},
    }
}


def export_and_resave(tokenizer, folder):
    """What `AutoTokenizer.from_pretrained(folder).save_pretrained(folder)` makes of an exported tokenizer."""
    hf_tokenizer.write(folder, tokenizer, 16)
    form = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")) | RESAVED
    (folder / "tokenizer.json").write_text(json.dumps(form, indent=2, ensure_ascii=False), encoding="utf-8")


KINDS = {
    "characters": lambda: CharTokenizer('\n <|endoftx>abcé日🙂"\\\u2028\x7f'),
    "trained": trained,
    "extended": extended,
}
FORMS = {
    "saved": lambda tokenizer, folder: tokenizer.save(folder / "tokenizer.json"),
    "exported": lambda tokenizer, folder: hf_tokenizer.write(folder, tokenizer, 16),
    "saved again by transformers": lambda tokenizer, folder: export_and_resave(tokenizer, folder),
}
DOORS = {
    "load": lambda path: tokenizers.load(path),
    "--data.tokenizer": lambda path: tokenizers.for_text(str(path), "another text"),
    "import": lambda path: importing.find_tokenizer(
        importing.ImportArgs(from_="", run=""), Weights({}, None, False, path.parent)
    ),
    "import --tokenizer": lambda path: importing.find_tokenizer(
        importing.ImportArgs(from_="", run="", tokenizer=str(path)), Weights({}, None, False, path.parent)
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_we_write_is_read_by_every_door_with_the_same_ids(form, kind, tmp_path):
    tokenizer = KINDS[kind]()
    FORMS[form](tokenizer, tmp_path)
    loaded = [door(tmp_path / "tokenizer.json") for door in DOORS.values()]
    text = st.text(tokenizer.alphabet) if kind == "characters" else SPECIAL_TEXT | st.text()

    @settings(deadline=None, max_examples=30)
    @given(text)
    def check(text):
        for each in loaded:
            for special_tokens in (False, True):
                ids = tokenizer.encode(text, special_tokens)
                np.testing.assert_array_equal(each.encode(text, special_tokens), ids)
                assert each.decode(ids) == text

    check()
    for each in loaded:
        assert tokenizers.same(each, tokenizer) and each.end_of_text == tokenizer.end_of_text
        np.testing.assert_array_equal(each.byte_lengths, tokenizer.byte_lengths)


def test_gpt2_s_form_in_two_files_is_read_and_tokenizer_json_wins(tmp_path):
    gpt2, bpe = tokenizers.gpt2(), trained()
    model = json.loads(gpt2._tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = ["#version: 0.2", *map(" ".join, model["merges"])]
    (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for path in ("vocab.json", "tokenizer.json"):  # import looks beside the weights; the other doors are told
        found = DOORS["import"](tmp_path / path)
        assert tokenizers.same(found, gpt2) and found.end_of_text == 50_256 and found.byte_lengths[50_256] == 0
    assert tokenizers.same(DOORS["--data.tokenizer"](tmp_path / "vocab.json"), gpt2)
    bpe.save(tmp_path / "tokenizer.json")
    assert tokenizers.same(DOORS["import"](tmp_path / "vocab.json"), bpe)
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 50257}')
    with pytest.raises(TokenizerError, match=r"added_tokens\.json.*make a tokenizer.json"):
        tokenizers.load(tmp_path / "vocab.json")
    (tmp_path / "added_tokens.json").unlink()
    (tmp_path / "merges.txt").write_text("a b\nzzz zzzz\n")
    with pytest.raises(TokenizerError, match="the merges do not fit"):
        tokenizers.load(tmp_path / "vocab.json")
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(TokenizerError, match=r"merges\.txt"):
        tokenizers.load(tmp_path / "vocab.json")
