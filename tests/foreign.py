"""GPT-2 and nanoGPT files made on the spot: small models, random weights. Needs torch and transformers."""

import json

import torch
import transformers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from jaxgpt.interop import hf_tokenizer

transformers.logging.set_verbosity_error()
SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}


def randomise(model, seed=0):
    """Weights that all show in the logits: no bias is 0, no scale 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "ln_" in name and name.endswith("weight") else 0.2 * noise)
    return model.eval()


def gpt2(vocab_size, seed=0, **options):
    """transformers' GPT-2."""
    config = GPT2Config(vocab_size=vocab_size, attn_implementation="eager", **{**SIZES, **options})
    return randomise(GPT2LMHeadModel(config), seed)


def save_gpt2(model, folder, tokenizer, **options):
    """The folder that transformers leaves, with a tokenizer of ours."""
    model.save_pretrained(folder, **options)
    hf_tokenizer.write(folder, tokenizer, model.config.n_positions)
    return folder


class Attention(nn.Module):
    def __init__(self, C, H, bias):
        super().__init__()
        self.H = H
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C, bias=bias), nn.Linear(C, C, bias=bias)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.H, -1)).transpose(1, 2) for part in self.c_attn(x).split(x.shape[-1], 2))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, C, bias):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(C, 4 * C, bias=bias), nn.Linear(4 * C, C, bias=bias)

    def forward(self, x):
        return self.c_proj(nn.functional.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, C, H, bias):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(C, bias=bias), nn.LayerNorm(C, bias=bias)
        self.attn, self.mlp = Attention(C, H, bias), MLP(C, bias)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """nanoGPT's model, written from its definition, with the names of its state_dict."""

    def __init__(self, args):
        super().__init__()
        C = args["n_embd"]
        blocks = [Block(C, args["n_head"], args["bias"]) for _ in range(args["n_layer"])]
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(args["vocab_size"], C),
                "wpe": nn.Embedding(args["block_size"], C),
                "h": nn.ModuleList(blocks),
                "ln_f": nn.LayerNorm(C, bias=args["bias"]),
            }
        )
        self.lm_head = nn.Linear(C, args["vocab_size"], bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, tokens):
        x = self.transformer.wte(tokens) + self.transformer.wpe(torch.arange(tokens.shape[1]))
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


def save_nanogpt(path, vocab_size, bias, compiled=False, **options):
    """A ckpt.pt as nanoGPT's train.py writes it after a step of AdamW, and its model."""
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24, **options}
    args = {**sizes, "bias": bias, "vocab_size": vocab_size, "dropout": 0.0}
    model = randomise(NanoGPT(args))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    loss = model(torch.zeros(1, 4, dtype=torch.long)).square().mean()
    loss.backward()
    optimizer.step()
    state = {("_orig_mod." if compiled else "") + name: value for name, value in model.state_dict().items()}
    state |= {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 24, 24).tril() for i in range(2)} if not bias else {}
    checkpoint = {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "model_args": args,
        "iter_num": 1,
        "best_val_loss": loss.detach(),  # a tensor there, too
        "config": {"dataset": "shakespeare_char", "learning_rate": 1e-3, "compile": compiled, "betas": (0.9, 0.95)},
    }
    torch.save(checkpoint, path)
    return model


def names_in(folder):
    """The tensors that a folder of safetensors holds, from the file's own header."""
    data = (folder / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {name for name in header if name != "__metadata__"}
