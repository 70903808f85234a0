"""Tokenizers of other models: what stands beside a tokenizer.json, and pre-tokenizers and decoders unlike GPT-2's."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import Config
from jaxgpt import tokenizer as tokenizers
from jaxgpt.errors import CheckpointError
from jaxgpt.files import tokenizer_files, tokenizer_settings
from jaxgpt.interop import hf_tokenizer
from jaxgpt.runs import loading
from jaxgpt.tokenizer import BPETokenizer, TokenizerError

TEXTS = ["the king of the night, 1234 kings", "the  king's knights\n\tare here"]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
SETTINGS = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}


def gpt2_like():
    library = BPETokenizer.train(TEXTS, 270)._tokenizer
    library.add_special_tokens(["<s>", "</s>"])
    return library


def llama3_like():
    """Split by a regex, then byte-level; with a post-processor that puts <s> before a text. Qwen adds NFC."""
    library = tokenizer_files.library()
    made = library.Tokenizer(library.models.BPE(ignore_merges=True))
    pattern = library.Regex(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+")
    byte_level = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = library.pre_tokenizers.Split(pattern, "isolated")
    made.normalizer = library.normalizers.NFC()
    made.pre_tokenizer = library.pre_tokenizers.Sequence([split, byte_level])
    made.decoder = library.decoders.ByteLevel()
    alphabet = sorted(tokenizer_files.bytes_as_characters())
    trainer = library.trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    made.add_special_tokens(["<s>", "</s>"])
    made.post_processor = library.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    return made


def llama2_like():
    """SentencePiece's BPE: spaces are ▁, one is put before a text, and bytes stand for what has no token."""
    library = tokenizer_files.library()
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"thekingofar", "▁t", "▁th"]
    ids = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("▁", "t"), ("▁t", "h")]
    model = library.models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    made = library.Tokenizer(model)
    normalizers, decoders = library.normalizers, library.decoders
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


KINDS = {"gpt2": gpt2_like, "llama3": llama3_like, "llama2": llama2_like}


@pytest.fixture(scope="module", params=KINDS)
def made(request):
    """A library's tokenizer, and ours of the same file with settings."""
    library = KINDS[request.param]()
    return library, tokenizers.from_json(library.to_str(), request.param, SETTINGS)


@settings(deadline=None, max_examples=60)
@given(text=st.text(st.sampled_from("thekingof  \n1'é日🙂▁<s>")) | st.text())
def test_a_text_has_the_ids_of_the_library_and_comes_back(made, text):
    library, ours = made
    text = library.normalizer.normalize_str(text) if "NFC" in str(library.normalizer) else text
    library.encode_special_tokens = True
    ids = ours.encode(text)
    assert ids.tolist() == library.encode(text, add_special_tokens=False).ids
    restored = text.replace("▁", " ") if ours._drops_first_space else text
    assert ours.decode(ids) == restored == library.decode(ids.tolist(), skip_special_tokens=False)
    assert ours.byte_lengths[ids].sum() == len(restored.encode()) + bool(text and ours._drops_first_space)


def test_special_tokens_are_ids_on_request_and_an_answer_goes_on_where_the_prompt_ends(made):
    library, ours = made
    library.encode_special_tokens = False
    text = "<s>the king</s>"
    ids = ours.encode(text, special_tokens=True)
    assert ids.tolist() == library.encode(text, add_special_tokens=False).ids and {ours.bos, ours.end_of_text} < {*ids}
    assert ours.decode(ids, skip_special_tokens=True) == "the king"
    assert ours.byte_lengths[[ours.bos, ours.end_of_text]].sum() == 0
    word = ours.encode("of the")[-3:] if ours._drops_first_space else ours.encode(" the")
    assert "".join(ours.decode_stream([word], continues=True)).endswith(" the"[-len(ours.decode(word)) :])
    if ours._drops_first_space:
        assert ours.decode(ours.encode("the")) == "the"
        assert "".join(ours.decode_stream([ours.encode("the")], continues=True)) == " the"


def test_the_settings_say_how_a_text_begins_and_ends(made):
    library, ours = made
    assert (ours.bos, ours.end_of_text) == (library.token_to_id("<s>"), library.token_to_id("</s>"))
    assert ours.ends == (ours.end_of_text,) and ours.start.tolist() == [ours.bos]
    assert ours.chat_template == TEMPLATE and ours.special == {"bos_token": "<s>", "eos_token": "</s>"}
    begun = library.post_processor is not None and "TemplateProcessing" in str(library.post_processor)
    assert ours.prefix.tolist() == ([ours.bos] if begun else [])
    for added in (False, True):  # the settings win over the post-processor, as in transformers
        again = tokenizers.from_json(library.to_str(), "", SETTINGS | {"add_bos_token": added})
        assert again.prefix.tolist() == ([ours.bos] if added else [])


def test_a_tokenizer_keeps_its_settings_wherever_it_goes(made, tmp_path):
    _, ours = made
    ours.save(tmp_path / "tokenizer.json")
    hf_tokenizer.write((tmp_path / "export").mkdir() or tmp_path / "export", ours, 16)
    copies = [tokenizers.load(tmp_path / "tokenizer.json"), tokenizers.load(tmp_path / "export/tokenizer.json")]
    for copy in (*copies, pickle.loads(pickle.dumps(ours))):
        assert tokenizers.same(copy, ours) and copy.settings == ours.settings and copy.ends == ours.ends
        np.testing.assert_array_equal(copy.encode("the <s> king"), ours.encode("the <s> king"))
    assert not tokenizers.same(ours, tokenizers.from_json(ours._tokenizer.to_str(), "", {"eos_token": "<s>"}))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tokenizer.json").write_text(gpt2_like().to_str())

    def write(**files):
        for name, content in files.items():
            path = tmp_path / {"template": "chat_template.jinja"}.get(name, f"{name}.json")
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path / "tokenizer.json"

    return write


def test_without_settings_the_end_of_text_is_gpt2s(folder):
    found = tokenizers.load(folder())
    assert found.end_of_text == found._tokenizer.token_to_id("<|endoftext|>")
    assert found.bos is None and found.chat_template is None and found.special == {} == found.settings


def test_settings_are_read_from_all_files_in_which_transformers_has_them(folder):
    eos = {"content": "</s>", "lstrip": False, "special": True}
    config = {"eos_token": eos, "chat_template": [{"name": "tool_use", "template": "t"},
                                                  {"name": "default", "template": "d"}]}  # fmt: skip
    found = tokenizers.load(folder(tokenizer_config=config, special_tokens_map={"bos_token": "<s>", "eos_token": "x"}))
    assert found.special == {"bos_token": "<s>", "eos_token": "</s>"} and found.chat_template == "d"
    found = tokenizers.load(folder(template=TEMPLATE, generation_config={"eos_token_id": [5, found.end_of_text]}))
    assert found.chat_template == TEMPLATE and found.ends == (found.end_of_text, 5)
    assert (
        tokenizers.load(
            folder(tokenizer_config={}, special_tokens_map={}, generation_config={"eos_token_id": 7})
        ).end_of_text
        == 7
    )


@pytest.mark.parametrize(
    "files, said",
    [
        ({"tokenizer_config": "{"}, "cannot read the tokenizer's settings"),
        ({"tokenizer_config": "[]"}, "not a JSON object"),
        ({"tokenizer_config": {"chat_template": 3}}, "chat_template"),
        ({"tokenizer_config": {"eos_token": "<none>"}}, "eos_token '<none>'"),
        ({"generation_config": {"eos_token_id": ["2"]}}, "eos_token_id"),
        ({"generation_config": {"eos_token_id": [9999]}}, "use ids from 0 to 271"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(folder, files, said):
    with pytest.raises(TokenizerError, match=said) as caught:
        tokenizers.load(folder(**files))
    assert "): " in str(caught.value) and "\n" not in str(caught.value)


def test_the_settings_of_a_run_are_checked_like_its_tokenizer(tmp_path):
    BPETokenizer(gpt2_like(), "", SETTINGS).save(tmp_path / "tokenizer.json")
    facts = {"step": 3, **loading.tokenizer_hashes(tmp_path)}
    loading.check_files(tmp_path, Config(), facts)
    for change in (lambda path: path.write_text("{}"), lambda path: path.unlink()):
        change(tmp_path / tokenizer_settings.FILE)
        with pytest.raises(CheckpointError, match=r"tokenizer_config\.json \(sha256 was"):
            loading.check_files(tmp_path, Config(), facts)
    older = {"step": 3, "tokenizer_sha256": facts["tokenizer_sha256"]}  # of a run from before
    loading.check_files(tmp_path, Config(), older)


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_an_exported_tokenizer_with_its_template(kind, tmp_path):
    import transformers

    ours = BPETokenizer(KINDS[kind](), "", SETTINGS)
    hf_tokenizer.write(tmp_path, ours, 16)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos, ours.end_of_text) and len(theirs) == ours.vocab_size
    for text in ("the king of 1234 knights", "<s>the  king</s>\n é日"):
        ids = ours.encode(text, special_tokens=True)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids.tolist()
        assert theirs(text)["input_ids"] == [*ours.prefix, *ids]
        assert theirs.decode(ids) == ours.decode(ids)
    dialogue = [{"role": "user", "content": "the king"}]
    assert theirs.apply_chat_template(dialogue, tokenize=False) == "<s>the king</s>"
