import base64
import dataclasses
import hashlib
import html.parser
import json
import pathlib
import random
import re
import shutil
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_run import make_run
from switches import MODERN, SIZES, SWITCHES, decoded, random_model

from jaxgpt import Config, GPTConfig, cli
from jaxgpt.config import RunConfig
from jaxgpt.data import DataConfig
from jaxgpt.interop import gpt2, page
from jaxgpt.interop.page import PageError
from jaxgpt.runs.loading import Run
from jaxgpt.sampling import generate
from jaxgpt.step import params_of
from jaxgpt.text import corpus
from jaxgpt.tokenizer import BPETokenizer, CharTokenizer

ALPHABET = CharTokenizer("\n abcdefg<é")
S = SIZES["block_size"]
BIGRAM = {"n_layer": 0, "n_embd": 0, "positions": "none", "norm": "none", "lm_head": "none"}
MODELS = {  # every switch of GPTConfig is on somewhere
    "bigram": BIGRAM,
    "one head": {"n_head": 1, "mlp_ratio": 0, "projection": False, "residual": False, "norm": "none"},
    "feed forward": {"mlp_ratio": 1, "projection": False, "residual": False, "norm": "none"},
    "lecture": {"positions": "none", "activation": "relu"},
    "gpt2": {"bias": "all", "lm_head": "tied", "activation": "gelu_tanh", "embedding_norm": True},
    "nanogpt": {"bias": "none", "lm_head": "tied", "activation": "gelu", "norm_weight": False, "qk_norm": True},
    "modern": MODERN,
    "llama": SWITCHES["llama"],
    "window": {"sliding_window": 3, "logit_softcap": 2.0, "norm": "rmsnorm", "value_embeddings": True, "n_kv_head": 2},
    "stretched": SWITCHES["rope linear"] | {"gated": True, "bias": "all"},
}
# of random weights whose greedy text has several tokens: most have one or two
SEEDS = dict(zip(MODELS, (5, 3, 10, 1, 4, 0, 3, 1, 7, 6)))


def run_of(folder, tokenizer=ALPHABET, data=None, corpus_sha256=None, seed=0, **model) -> Run:
    """A run with random weights, which is in no directory."""
    model = random_model(GPTConfig(**{**SIZES, **model, "vocab_size": tokenizer.vocab_size}), seed)
    config = Config(model=model.config, data=data or DataConfig(), run=RunConfig(dir=str(folder)))
    return Run(pathlib.Path(folder), config, tokenizer, model, 3, corpus_sha256)


class Parsed(html.parser.HTMLParser):
    """What a browser finds in a page: the elements, and the texts in those that have no markup."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self.inside = [], [], {}, ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.inside = dict(attributes).get("id", tag)

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        self.texts[self.inside] = self.texts.get(self.inside, "") + data


@pytest.mark.parametrize(
    "text", ["<script>", "</script>", "<!--", "{{weights}}", "</SCRIPT >", "]]>", "\u2028", "'\"&lt;", "</style>"]
)
def test_a_string_of_a_run_is_data_and_never_markup(text):
    plain, found = (Parsed(page.html({"name": name, text: [name]}, b"1234")) for name in ("name", text))
    assert found.tags == plain.tags and found.attributes == plain.attributes
    assert json.loads(found.texts["run"]) == {"name": text, text: [text]}
    assert base64.b64decode(found.texts["weights"]).rstrip(b"\0") == b"1234"


def test_the_policy_allows_the_script_and_the_style_of_the_page_and_nothing_from_outside():
    found = Parsed(page.html({}, b""))
    (policy,) = (value for name, value in found.attributes if name == "content" and "default-src" in value)
    texts = {tag: found.texts[tag].encode() for tag in ("script", "style")}
    hashes = {tag: base64.b64encode(hashlib.sha256(text).digest()).decode() for tag, text in texts.items()}
    assert dict(rule.split(" ", 1) for rule in policy.split("; ")) == {
        "default-src": "'none'",
        "script-src": f"'sha256-{hashes['script']}'",
        "style-src": f"'sha256-{hashes['style']}'",
        "worker-src": "blob:",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert all(value.startswith("data:") for name, value in found.attributes if name in ("src", "href", "action"))
    assert not [name for name, _ in found.attributes if name == "style" or name.startswith("on")]


def test_a_model_that_is_too_large_is_refused_with_its_size():
    config = GPTConfig(vocab_size=65, n_layer=1, n_head=1, n_embd=2048)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(gpt2.shapes(config)))
    with pytest.raises(PageError, match=rf"{parameters:,} parameters, at most 25,000,000"):
        page.check(config)


def test_the_page_knows_every_switch_and_refuses_another_by_name(monkeypatch):
    for field in dataclasses.fields(GPTConfig):
        known = page.KNOWN[field.name]  # a new switch: does page.js compute it?
        assert known is page.ANY or set(known) == set(typing.get_args(field.type)), field.name
    monkeypatch.delitem(page.KNOWN, "qk_norm")
    page.check(GPTConfig(**SIZES))
    with pytest.raises(PageError, match="qk_norm True"):
        page.check(GPTConfig(**SIZES, qk_norm=True))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_weights_are_in_the_page_with_matrices_as_outputs_by_inputs(tmp_path, dtype):
    run = run_of(tmp_path / "run", n_layer=1)
    page.write(tmp_path / "page.html", run, dtype)
    found = Parsed((tmp_path / "page.html").read_text(encoding="utf-8"))
    values = np.frombuffer(base64.b64decode(found.texts["weights"]), np.dtype(dtype).newbyteorder("<"))
    content, params, start = json.loads(found.texts["run"]), gpt2.flat(params_of(run.model)), 0
    assert [name for name, _ in content["tensors"]] == list(params)
    for name, size in content["tensors"]:
        expected = np.asarray(params[name]).astype(dtype)
        expected = expected.T if name.endswith("kernel") else expected
        np.testing.assert_array_equal(values[start : start + size], expected.ravel(), err_msg=name)
        start += size
    assert content["parameters"] == start and not values[start:].any()


def test_weights_that_float16_cannot_hold_are_refused(tmp_path):
    run = run_of(tmp_path / "run", n_layer=0)
    embedding = run.model.token_embedding_table.embedding
    embedding[...] = embedding[...].at[0, 0].set(1e5)
    with pytest.raises(PageError, match="up to 100000"):
        page.write(tmp_path / "page.html", run, "float16")
    page.write(tmp_path / "page.html", run, "float32")


FORM = {  # of GPT-2's tokenizer.json
    "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    "model": {"type": "BPE", "vocab": {}, "merges": []},
}


@pytest.mark.parametrize(
    "change, added, named",
    [
        ({"pre_tokenizer": {"type": "Sequence"}}, {}, "pre_tokenizer Sequence"),
        ({"pre_tokenizer": {"type": "ByteLevel", "use_regex": False}}, {}, "use_regex false"),
        ({"normalizer": {"type": "NFC"}}, {}, "normalizer"),
        ({"model": {"type": "Unigram"}}, {}, "model Unigram"),
        ({}, {"lstrip": True}, "'<tool>' with lstrip"),
    ],
)
def test_a_tokenizer_that_the_page_would_read_otherwise_is_refused_by_name(change, added, named):
    token = {"content": "<tool>", "single_word": False, "lstrip": False, "rstrip": False}
    page._check_tokenizer(FORM, [token])
    with pytest.raises(PageError, match=re.escape(named)):
        page._check_tokenizer(FORM | change, [token | added])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--format", "html", "--to", "page"], "name a FILE.html"),
        (["--format", "html", "--to", "gs://bucket/page.html"], "name a FILE.html"),
        (["--format", "html", "--to", "mine.html"], "the file exists"),
        (["--dtype", "float16", "--to", "out"], "add --format html"),
        (["--format", "html", "--dtype", "int8", "--to", "new.html"], "dtype"),
    ],
)
def test_a_page_that_cannot_be_written_is_one_line_and_nothing_changes(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.html").write_text("mine")
    assert cli.main(["export", "--run", "run", *flags]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("mine.html", "mine")]


def test_the_beginning_of_the_validation_text_is_in_the_page_if_the_text_has_not_changed(tmp_path, text, text_file):
    tokenizer = CharTokenizer.from_text(text)
    data = DataConfig(path=str(text_file))
    run = run_of(tmp_path / "run", tokenizer, data, corpus.load(path=str(text_file)).sha256, **BIGRAM)
    assert tokenizer.decode(page._validation(run)) == text[18_000:20_000]
    text_file.write_text(text + text[0], encoding="utf-8")
    assert page._validation(run) == []
    text_file.unlink()
    assert page._validation(run) == page._validation(dataclasses.replace(run, corpus_sha256=None)) == []


@pytest.mark.full
def test_the_command_writes_one_file_and_no_other(tmp_path, capsys):
    make_run(tmp_path / "run", ALPHABET, n_layer=1)
    flags = ["--run", str(tmp_path / "run"), "--format", "html", "--to", str(tmp_path / "new" / "page.html")]
    assert cli.main(["export", *flags]) == 0
    assert capsys.readouterr().out.strip().endswith("page.html")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]
    assert (tmp_path / "new" / "page.html").stat().st_mode & 0o777 == 0o644
    content = json.loads(Parsed((tmp_path / "new" / "page.html").read_text(encoding="utf-8")).texts["run"])
    assert (content["name"], content["step"], content["validation"]) == ("run", 3, [])


# What follows runs the pages.


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    if not (program := next(filter(None, map(shutil.which, names)), None)):
        pytest.skip("no Chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


OUTSIDE = "https://example.org/"  # to which a test lets a page send a request


@pytest.fixture
def open_page(browser, tmp_path):
    """A function that opens the page of a run. Nothing may go wrong in it, and no request may leave it."""
    faults, requests = [], []
    context = browser.new_context(viewport={"width": 390, "height": 844})
    context.set_default_timeout(30_000)

    def opened(run, dtype="float32"):
        page.write(tmp_path / "page.html", run, dtype)
        tab = context.new_page()
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.on("console", lambda message: faults.append(message.text))
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("dialog", lambda dialog: faults.append(dialog.message))
        tab.goto((tmp_path / "page.html").as_uri())
        tab.locator("#go", has_text="Write").wait_for()  # it has written a first text
        return tab

    yield opened
    context.close()
    assert [fault for fault in faults if OUTSIDE not in fault] == []
    assert [url for url in requests if not url.startswith(((tmp_path / "page.html").as_uri(), "blob:"))] == []


def call(tab, method, *arguments):
    """What `await window.jaxgpt.METHOD(...)` returns."""
    plain = "value => Array.isArray(value) ? value.map((row) => (row.length >= 0 ? Array.from(row) : row)) : value"
    return tab.evaluate(f"async (all) => ({plain})(await window.jaxgpt.{method}(...all))", list(arguments))


def write(tab, prompt, length):
    """Let the page write a text, by its controls; return the elements of its tokens."""
    for name, value in (("prompt", prompt), ("length", str(length)), ("temperature", "0")):
        tab.locator(f"#{name}").fill(value)
    tab.locator("#go").click()
    tab.locator(f"#written .token >> nth={len(ALPHABET.encode(prompt)) + length - 1}").wait_for()
    tab.locator("#go", has_text="Write").wait_for()
    return tab.locator("#written .token")


@jax.jit
def logits_of(model, tokens):
    return model(tokens)


def logits_after(model, tokens):
    """The logits after each of (T,) tokens, past the window too: (T, V)."""
    if model.config.positions == "rope":
        return np.asarray(decoded(model, tokens[None])[0])
    windows = jnp.stack([tokens[t - S : t] for t in range(S + 1, len(tokens) + 1)])
    return np.concatenate([logits_of(model, tokens[None, :S])[0], logits_of(model, windows)[:, -1]])


def attention_of(model, tokens, layer):
    """The attention weights of a layer for (T,) tokens, computed row by row: (H, T, T)."""
    config, T = model.config, len(tokens)
    x = model.embed(tokens[None])
    for block in model.blocks[:layer]:
        x, _ = block(x, tokens=tokens[None])
    attn, x = model.blocks[layer].attn, model.blocks[layer].ln_1(x)
    q, k = (
        np.asarray(attn.rotate(norm(attn._heads(heads(x))), 0))[0]
        for norm, heads in ((attn.query_norm, attn.query), (attn.key_norm, attn.key))
    )
    k = np.repeat(k, config.n_head // config.kv_heads, axis=0)
    weights = np.zeros((config.n_head, T, T))
    for t in range(T):
        first = max(t + 1 - config.span, 0)
        scores = np.exp(np.einsum("hd,hsd->hs", q[:, t], k[:, first : t + 1]) / np.sqrt(config.channels_per_head))
        weights[:, t, first : t + 1] = scores / scores.sum(axis=1, keepdims=True)
    return weights


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_text_logits_probabilities_and_attention_are_those_of_jax(open_page, tmp_path, name):
    run = run_of(tmp_path / "run", seed=SEEDS[name], **MODELS[name])
    prompt, n = jnp.asarray(ALPHABET.encode("abc")), 2 * S + 5  # past the window, whose length is S
    tokens = generate(run.model, prompt[None], jax.random.key(0), n, temperature=0.0)[0]
    expected, text = logits_after(run.model, tokens), ALPHABET.decode(np.asarray(tokens))
    assert len(set(text[3:])) >= 3
    tab = open_page(run)
    assert call(tab, "complete", "abc", {"maxNewTokens": n, "temperature": 0}) == text[3:]
    np.testing.assert_allclose(call(tab, "logits", text[:S]), expected[:S], rtol=0, atol=1e-4)

    spans = write(tab, "abc", n)
    assert tab.locator("#written").text_content() == text
    for t in (1, S - 1, S, 2 * S + 3):  # the token at t was read after the logits of t - 1
        spans.nth(t).hover()
        shown = tab.locator("#card .line").evaluate_all(
            "lines => lines.map((line) => Number(line.dataset.probability))"
        )
        probabilities = np.asarray(jax.nn.softmax(expected[t - 1]))
        taken = [] if probabilities[tokens[t]] >= np.sort(probabilities)[-10] else [probabilities[tokens[t]]]
        np.testing.assert_allclose(shown, [*np.sort(probabilities)[::-1][:10], *taken], rtol=0, atol=1e-4)
    if not run.model.blocks:
        return
    layer, head = run.config.model.n_layer - 1, run.config.model.n_head - 1
    tab.locator("input[value=attention]").check(force=True)
    tab.locator("#layer").select_option(index=layer)
    tab.locator("#head").select_option(index=head)
    for t in (S - 1, S + 2):  # a text that is longer is read in windows that overlap by half
        spans.nth(t).focus()
        tab.locator("#status", has_text=f"token {t + 1}, attends").wait_for()
        values = "all => all.map((span) => [span.place, Number(span.style.getPropertyValue('--weight'))])"
        seen = dict(tab.locator("#written .seen").evaluate_all(values))
        start = 0 if t < S else S // 2
        weights = attention_of(run.model, tokens[start : start + S], layer)[head, t - start]
        found = [seen.get(start + s, 0.0) for s in range(S)]
        np.testing.assert_allclose(found, weights, rtol=0, atol=1e-4)
        assert sum(seen.values()) == pytest.approx(1, abs=1e-4)


@pytest.mark.full
def test_float16_weights_are_the_rounded_ones(open_page, tmp_path):
    run = run_of(tmp_path / "run", bias="all")
    found = call(open_page(run, "float16"), "logits", "abcdefg<")
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.float16).astype(jnp.float32), run.model)
    np.testing.assert_allclose(found, logits_of(rounded, ALPHABET.encode("abcdefg<")[None])[0], rtol=0, atol=1e-4)
    run = run_of(tmp_path / "run", **BIGRAM)  # its table holds the logits
    table = run.model.token_embedding_table.embedding
    table[...] = table[...].at[:5].multiply(1e-5)  # less than float16 has with all of its bits
    found = call(open_page(run, "float16"), "logits", "\n abcdef")
    np.testing.assert_array_equal(found, np.asarray(table)[:8].astype(np.float16))


def lines_with_emoji(draw):
    """1,000 lines of letters, digits, signs, emoji, and spaces of all kinds."""
    parts = [
        "the",
        "don't",
        "I'LL",
        "we've",
        "x1",
        "42",
        "½",
        "Ⅷ",
        "naïve",
        "Straße",
        "東京",
        "привет",
        "हिन्दी",
        "e\u0301",
    ]
    parts += [
        "🙂",
        "👩‍👩‍👧",
        "🇫🇷",
        "👍🏽",
        "❤️",
        "...",
        "?!",
        "<|endoftext|>",
        "<tool>",
        "<tool>s",
        "_",
        "'",
        "''s",
        "\ufeff",
    ]
    spaces = ["", " ", " ", " ", "  ", "   ", "\t", "\u00a0", "\u3000", "\u2028", "\u0085", "\r", "\u200b", " \u00a0 "]
    return ["".join(draw.choice(parts) + draw.choice(spaces) for _ in range(draw.randint(1, 12))) for _ in range(1000)]


@pytest.mark.full
def test_ids_of_bpe_are_those_of_the_tokenizers_library(open_page, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    lines = lines_with_emoji(random.Random(0))
    trained = BPETokenizer.train(lines, 600)
    trained.save(tmp_path / "tokenizer.json")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.add_tokens(["<tool>", "<tool>s"])
    tokenizer = BPETokenizer(library)
    run = run_of(tmp_path / "run", tokenizer, n_layer=1)
    tab = open_page(run)
    found = tab.evaluate("lines => Promise.all(lines.map((line) => window.jaxgpt.encode(line)))", lines)
    assert found == [tokenizer.encode(line).tolist() for line in lines]
    assert any(tokenizer.vocab_size - 1 in ids for ids in found) and max(map(len, found)) < max(map(len, lines))
    prompt = jnp.asarray(tokenizer.encode("naïve 🙂"))  # random weights write parts of characters
    new = np.asarray(generate(run.model, prompt[None], jax.random.key(0), 40, temperature=0.0))[0, len(prompt) :]
    ends = np.flatnonzero(new == tokenizer.end_of_text)
    expected = tokenizer.decode(new[: ends[0]] if len(ends) else new)
    assert call(tab, "complete", "naïve 🙂", {"maxNewTokens": 40, "temperature": 0}) == expected
    run = run_of(tmp_path / "run", tokenizer, **BIGRAM)
    table, a = run.model.token_embedding_table.embedding, tokenizer.encode("a")[0]
    b = tokenizer.encode("b")[0]
    table[...] = table[...].at[a, b].set(99.0).at[b, tokenizer.end_of_text].set(99.0)
    assert call(open_page(run), "complete", "a") == "b"  # it ends at the end of text


@pytest.mark.full
def test_a_run_named_script_and_a_text_with_markup_are_shown_as_they_are_and_nothing_is_sent(open_page, tmp_path):
    markup = "</script><script>alert(1)</script><img src=x onerror=alert(2)> <!-- & &lt;\n"
    (tmp_path / "my.txt").write_text(markup * 300, encoding="utf-8")
    data, tokenizer = DataConfig(path=str(tmp_path / "my.txt")), CharTokenizer.from_text(markup)
    sha256 = corpus.load(path=str(tmp_path / "my.txt")).sha256
    tab = open_page(run_of(tmp_path / "<script>", tokenizer, data, sha256, **BIGRAM))
    assert tab.title() == tab.locator("#name").text_content() == "<script>"
    tab.locator("input[value=validation]").check(force=True)
    tab.locator("#validation .token >> nth=1999").wait_for()
    text = (markup * 300)[int(0.9 * 300 * len(markup)) :]
    assert tab.locator("#validation").text_content() == text[:2000]
    assert tab.locator("script").count() == 3 and tab.locator("img").count() == 0  # the weights were taken out
    violation = "new Promise((yes) => (addEventListener('securitypolicyviolation', (e) => yes(e.effectiveDirective)), "
    assert tab.evaluate(violation + f"fetch('{OUTSIDE}').catch(() => 0)))") == "connect-src"


@pytest.mark.full
def test_the_page_is_usable_from_the_keyboard_and_on_a_phone(open_page, tmp_path):
    run = run_of(tmp_path / "run")
    tab = open_page(run)
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    tab.locator("#length").fill("100000")
    tab.locator("#prompt").fill("abc")
    tab.keyboard.press("Control+Enter")
    tab.locator("#written .token >> nth=200").wait_for()
    tab.locator("#go", has_text="Stop").click()
    tab.locator("#go", has_text="Write").wait_for()
    assert 200 < tab.locator("#written .token").count() < 50_000
    tab.set_viewport_size({"width": 390, "height": 500})
    tab.locator("#written .token").first.focus()
    for _ in range(3):
        tab.keyboard.press("ArrowRight")
    assert tab.evaluate("document.activeElement.place") == 3
    assert tab.locator("#card").is_visible() and tab.locator("#card .line").count() in (10, 11)
    assert tab.evaluate("document.activeElement.getAttribute('aria-describedby')") == "card"
    covered = "document.activeElement.getBoundingClientRect().bottom > card.getBoundingClientRect().top"
    assert not tab.evaluate(covered)
    span = tab.locator("#written .token").nth(150)
    span.evaluate("span => span.scrollIntoView({ block: 'end' })")
    span.click()
    assert tab.evaluate("document.activeElement.place") == 150 and tab.locator("#card").is_visible()
    assert not tab.evaluate(covered)
    tab.keyboard.press("Escape")
    assert not tab.locator("#card").is_visible()
    least = int(jnp.argmin(logits_of(run.model, ALPHABET.encode("ab")[None])[0, 1]))
    write(tab, f"ab{ALPHABET.decode([least])}", 1).nth(2).focus()  # a token that is not among the ten likeliest
    assert tab.locator("#card .line").count() == 11 and tab.locator("#card .taken").count() == 1
    tab.locator("#prompt").fill("abcz")
    tab.locator("#go").click()
    tab.locator("#problem", has_text='does not know the character "z"').wait_for()
