"""The lecture's models, GPT-2 and nanoGPT's recipe in plain PyTorch: what jaxgpt is compared and timed against.

Written from the definitions, with the lecture's names, and independent of jaxgpt's switches: each rung is built from
its own parts and states its own sizes. Only the last functions know how jaxgpt lays out its parameters.
"""

from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


def probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    """How likely each token is drawn: (..., V) -> (..., V); temperature 0 is certain of the likeliest."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    p = F.softmax(logits / temperature, dim=-1)
    if top_k is not None:
        likeliest = p.topk(min(top_k, p.shape[-1])).values
        p = p.where(p >= likeliest[..., -1:], 0)
        p = p / p.sum(-1, keepdim=True)
    if top_p is not None:
        descending = p.sort(descending=True).values
        short = (descending.cumsum(-1) < top_p).sum(-1, keepdim=True)  # so many do not reach top_p, one more does
        p = p.where(p >= descending.gather(-1, short.clamp(max=p.shape[-1] - 1)), 0)
        p = p / p.sum(-1, keepdim=True)
    return p


class LanguageModel(nn.Module):
    """What the models share: a loss, and generation that knows no cache."""

    block_size: int

    def loss(self, inputs, targets):
        return F.cross_entropy(self(inputs).flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, **rule):
        for _ in range(max_new_tokens):
            logits = self(tokens[:, -self.block_size :])[:, -1]
            tokens = torch.cat([tokens, torch.multinomial(probabilities(logits, **rule), 1)], dim=1)
        return tokens


class Bigram(LanguageModel):
    def __init__(self, vocab_size=65, block_size=8):
        super().__init__()
        self.block_size = block_size
        self.token_embedding_table = nn.Embedding(vocab_size, vocab_size)

    def forward(self, tokens):
        return self.token_embedding_table(tokens)


class Head(nn.Module):
    """One head of self-attention, as the lecture spells it out."""

    def __init__(self, n_embd, head_size, block_size, dropout):
        super().__init__()
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("future", torch.ones(block_size, block_size).triu(1).bool(), persistent=False)

    def forward(self, x):
        T = x.shape[1]
        k, q, v = self.key(x), self.query(x), self.value(x)
        scores = q @ k.mT / k.shape[-1] ** 0.5
        weights = scores.masked_fill(self.future[:T, :T], float("-inf")).softmax(dim=-1)
        return self.dropout(weights) @ v


class MultiHeadAttention(nn.Module):
    def __init__(self, n_head, n_embd, block_size, dropout=0.0, projection=True):
        super().__init__()
        self.heads = nn.ModuleList(Head(n_embd, n_embd // n_head, block_size, dropout) for _ in range(n_head))
        self.proj = nn.Linear(n_embd, n_embd) if projection else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.proj(torch.cat([head(x) for head in self.heads], dim=-1)))


class FusedAttention(nn.Module):
    """GPT-2's attention: query, key and value of all heads from one layer."""

    def __init__(self, n_head, n_embd, dropout, bias):
        super().__init__()
        self.n_head = n_head
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias)
        self.proj = nn.Linear(n_embd, n_embd, bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1))
        dropout = self.dropout.p if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.dropout(self.proj(out.transpose(1, 2).flatten(2)))


def feed_forward_layer(n_embd, dropout, activation, bias=True):
    wide = {"fc": nn.Linear(n_embd, 4 * n_embd, bias), "activation": activation}
    return nn.Sequential(OrderedDict(wide, proj=nn.Linear(4 * n_embd, n_embd, bias), dropout=nn.Dropout(dropout)))


class Block(nn.Module):
    def __init__(self, n_embd, sa, ffwd, norm=True, bias=True):
        super().__init__()
        self.ln1 = nn.LayerNorm(n_embd, bias=bias) if norm else nn.Identity()
        self.sa = sa
        self.ln2 = nn.LayerNorm(n_embd, bias=bias) if norm else nn.Identity()
        self.ffwd = ffwd

    def forward(self, x):
        x = x + self.sa(self.ln1(x))
        return x + self.ffwd(self.ln2(x))


class Lecture(LanguageModel):
    """Token and position tables, the blocks of a rung, and a head of its own."""

    def __init__(self, blocks=(), norm=False, n_embd=32, block_size=8, vocab_size=65):
        super().__init__()
        self.block_size = block_size
        self.token_embedding_table = nn.Embedding(vocab_size, n_embd)
        self.position_embedding_table = nn.Embedding(block_size, n_embd)
        self.blocks = nn.Sequential(*blocks)
        self.ln_f = nn.LayerNorm(n_embd) if norm else nn.Identity()
        self.lm_head = nn.Linear(n_embd, vocab_size)

    def forward(self, tokens):
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding_table(tokens) + self.position_embedding_table(places)
        return self.lm_head(self.ln_f(self.blocks(x)))


class GPT2(LanguageModel):
    """GPT-2 (Radford et al. 2019): tied head, dropout on the embeddings too.

    Without biases and with the erf form of GELU it is what nanoGPT trains on Shakespeare.
    """

    def __init__(self, n_layer, n_head, n_embd, block_size, dropout=0.0, bias=True, gelu="tanh", vocab_size=65):
        super().__init__()
        self.block_size = block_size
        self.token_embedding_table = nn.Embedding(vocab_size, n_embd)
        self.position_embedding_table = nn.Embedding(block_size, n_embd)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential()
        for _ in range(n_layer):
            sa = FusedAttention(n_head, n_embd, dropout, bias)
            ffwd = feed_forward_layer(n_embd, dropout, nn.GELU(approximate=gelu), bias)
            self.blocks.append(Block(n_embd, sa, ffwd, bias=bias))
        self.ln_f = nn.LayerNorm(n_embd, bias=bias)
        init_normal(self)
        for block in self.blocks:
            for layer in (block.sa.proj, block.ffwd.proj):
                nn.init.normal_(layer.weight, std=0.02 / (2 * n_layer) ** 0.5)

    def forward(self, tokens):
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.token_embedding_table(tokens) + self.position_embedding_table(places))
        return F.linear(self.ln_f(self.blocks(x)), self.token_embedding_table.weight)


def init_normal(model):
    """N(0, 0.02) for tables and layers, zero for biases."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
    return model


def plain(n_head, **after):
    """Heads, and perhaps a layer after them, without projections and skip connections."""
    sa = MultiHeadAttention(n_head, n_embd=32, block_size=8, projection=False)
    return Lecture([nn.Sequential(OrderedDict(sa=sa, **after))])


def feed_forward():
    return plain(4, ffwd=nn.Sequential(OrderedDict(fc=nn.Linear(32, 32), activation=nn.ReLU())))


def final(norm=True, n_layer=3, n_head=4, n_embd=32, block_size=8, dropout=0.0):
    """The lecture's finished form, which grows from the residual rung to the scaled model."""
    blocks = []
    for _ in range(n_layer):
        sa = MultiHeadAttention(n_head, n_embd, block_size, dropout)
        blocks.append(Block(n_embd, sa, feed_forward_layer(n_embd, dropout, nn.ReLU()), norm))
    model = Lecture(blocks, norm, n_embd, block_size)
    return init_normal(model) if norm else model


BIG = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "dropout": 0.2}

# by the name of jaxgpt's configuration; sizes can be given anew
REFERENCES = {
    "lecture/bigram": Bigram,
    "lecture/positions": Lecture,
    "lecture/one_head": partial(plain, 1),
    "lecture/four_heads": partial(plain, 4),
    "lecture/feed_forward": feed_forward,
    "lecture/residual": partial(final, norm=False),
    "lecture/layernorm": final,
    "lecture/colab": partial(final, n_layer=4, n_embd=64, block_size=32),
    "lecture/scaled": partial(final, **BIG),
    "shakespeare_cpu": partial(GPT2, n_layer=4, n_head=4, n_embd=128, block_size=64, bias=False, gelu="none"),
    "shakespeare": partial(GPT2, **BIG, bias=False, gelu="none"),
}


def leaves(model):
    """The path of each of jaxgpt's leaves -> what holds it in PyTorch: parameters and rows of them, to be joined."""
    names = {nn.Embedding: "embedding", nn.LayerNorm: "scale", nn.Linear: "kernel"}
    found = {}

    def add(path, *layers, rows=slice(None)):
        if type(layers[0]) in names:
            found[*path, names[type(layers[0])]] = [(layer.weight, rows) for layer in layers]
            if getattr(layers[0], "bias", None) is not None:
                found[*path, "bias"] = [(layer.bias, rows) for layer in layers]

    for name in ("token_embedding_table", "position_embedding_table", "ln_f", "lm_head"):
        add([name], getattr(model, name, None))
    for i, block in enumerate(getattr(model, "blocks", [])):
        at = ("blocks", i)
        for name, ours in (("ln1", "ln_1"), ("ln2", "ln_2")):
            add([*at, ours], getattr(block, name, None))
        for j, name in enumerate(("query", "key", "value")):
            if isinstance(block.sa, FusedAttention):
                C = block.sa.c_attn.in_features
                add([*at, "attn", name], block.sa.c_attn, rows=slice(j * C, (j + 1) * C))
            else:
                add([*at, "attn", name], *(getattr(head, name) for head in block.sa.heads))
        add([*at, "attn", "proj"], block.sa.proj)
        for name in ("fc", "proj"):
            add([*at, "mlp", name], getattr(getattr(block, "ffwd", None), name, None))
    return found


@torch.no_grad()
def set_leaves(model, values):
    """Copy jaxgpt's parameters, {path: array}, into the model; each must have its place and each place its array."""
    places = leaves(model)
    if set(places) != set(values):
        raise ValueError(f"only one of the models has {sorted(set(places) ^ set(values), key=str)}")
    for path, parts in places.items():
        value = torch.tensor(values[path])
        value = value.mT if path[-1] == "kernel" else value  # PyTorch's layers are (out, in)
        parts = [parameter[rows] for parameter, rows in parts]
        for part, mine in zip(parts, value.split([len(part) for part in parts])):
            if part.shape != mine.shape:
                raise ValueError(f"{path} is {tuple(mine.shape)} there and {tuple(part.shape)} here")
            part.copy_(mine)


def get_leaves(model, of=lambda parameter: parameter.detach()):
    """The inverse, {path: array}: of the parameters, or of what `of` takes from each."""
    joined = {path: torch.cat([of(part)[rows] for part, rows in parts]) for path, parts in leaves(model).items()}
    return {path: (value.mT if path[-1] == "kernel" else value).numpy() for path, value in joined.items()}
