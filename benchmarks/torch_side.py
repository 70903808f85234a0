"""PyTorch's side of compare.py: the training step and the generation of nanoGPT and the lecture, a slice at a time.

Started by compare.py, which also says what to do: `python benchmarks/torch_side.py SPECIFICATION`. The models are the
references of tests/torch_reference.py, or nanoGPT's own where a clone of it is given.
"""

import contextlib
import importlib.util
import math
import pathlib
import sys
import time

import numpy as np
import torch
from turns import serve, until

sys.path.append(str(pathlib.Path(__file__).parent.parent / "tests"))
import torch_reference as reference

torch.backends.cuda.matmul.allow_tf32 = True  # as nanoGPT does, and as jax computes float32 on a GPU
torch.backends.cudnn.allow_tf32 = True


def build(spec):
    """The model of a specification on its device."""
    sizes, V = spec["config"]["model"], spec["vocab_size"]
    # nanoGPT pads GPT-2's vocabulary for speed, and so does jaxgpt inside its step
    rows = V if V < 1024 else -(-V // 64) * 64
    shape = {name: sizes[name] for name in ("n_layer", "n_head", "n_embd", "block_size", "dropout")}
    bias = sizes["bias"] == "all"
    if spec["nanogpt"]:
        where = importlib.util.spec_from_file_location("nanogpt_model", pathlib.Path(spec["nanogpt"], "model.py"))
        theirs = sys.modules[where.name] = importlib.util.module_from_spec(where)  # torch.compile looks there
        where.loader.exec_module(theirs)
        model = theirs.GPT(theirs.GPTConfig(**shape, vocab_size=rows, bias=bias))
    elif spec["reference"] == "lecture/bigram":
        model = reference.Bigram(V, sizes["block_size"])
    elif spec["reference"].startswith("lecture/"):
        model = reference.REFERENCES[spec["reference"]](**shape)
    else:
        gelu = {"gelu": "none", "gelu_tanh": "tanh"}[sizes["activation"]]
        model = reference.GPT2(**shape, bias=bias, gelu=gelu, vocab_size=rows)
    return model.to(spec["device"])


def parameters_of(model, spec):
    """How many parameters the model has, without the rows that only pad its vocabulary."""
    table = model.transformer.wte if spec["nanogpt"] else model.token_embedding_table
    padding = table.num_embeddings - spec["vocab_size"]
    return sum(p.numel() for p in model.parameters()) - padding * table.embedding_dim


def loss_function(model, spec):
    """(inputs, targets) -> loss, compiled where that is wanted: as one graph, head and loss included."""
    loss = (lambda inputs, targets: model(inputs, targets)[1]) if spec["nanogpt"] else model.loss
    return torch.compile(loss) if spec["compile"] else loss


def autocast(spec):
    """Where the forward pass computes in bfloat16, as nanoGPT's does; float32 needs nothing."""
    if spec["config"]["train"]["dtype"] == "float32":
        return contextlib.nullcontext()
    return torch.autocast(spec["device"], torch.bfloat16)


def optimizer_of(model, config):
    """AdamW in its fused form, on matrices and tables with weight decay."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": config["weight_decay"]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config["learning_rate"], betas=(config["beta1"], config["beta2"]), fused=True)


def learning_rate(config, step):
    """nanoGPT's get_lr: linear warm-up, half a cosine down, then constant."""
    if step < config["warmup_steps"]:
        return config["learning_rate"] * (step + 1) / (config["warmup_steps"] + 1)
    done = min((step - config["warmup_steps"]) / max(config["decay_steps"] - config["warmup_steps"], 1), 1)
    least = config["min_learning_rate"]
    return least + (config["learning_rate"] - least) * (1 + math.cos(math.pi * done)) / 2


def splits_of(spec):
    """Training and validation split: tokens in memory where they are few, else mapped from the file."""
    tokens = np.asarray(np.load(spec["tokens"], mmap_mode="r"))
    cut = int(spec["config"]["data"]["train_fraction"] * len(tokens))
    parts = tokens[:cut], tokens[cut:]
    few = len(tokens) < 1e8
    return tuple(torch.from_numpy(part.astype(np.int64)) if few else part for part in parts)


def get_batch(tokens, spec):
    """Random windows: a slice for each, as the lecture and nanoGPT do it, or all in one gather."""
    B, T = spec["config"]["data"]["batch_size"], spec["config"]["model"]["block_size"]
    if not torch.is_tensor(tokens):  # nanoGPT's lines
        ix = torch.randint(len(tokens) - T, (B,)).tolist()
        x, y = (torch.stack([torch.from_numpy(tokens[i + d : i + d + T].astype(np.int64)) for i in ix]) for d in (0, 1))
    elif spec["get_batch"] == "gather":
        windows = tokens[torch.randint(len(tokens) - T, (B, 1)) + torch.arange(T + 1)]
        x, y = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    else:  # the lecture's lines
        ix = torch.randint(len(tokens) - T, (B,))
        x = torch.stack([tokens[i : i + T] for i in ix])
        y = torch.stack([tokens[i + 1 : i + T + 1] for i in ix])
    if spec["device"] == "cpu":
        return x, y
    return tuple(a.pin_memory().to(spec["device"], non_blocking=True) for a in (x, y))


class Trainer:
    """nanoGPT's training loop, one step at a time."""

    def __init__(self, spec):
        torch.manual_seed(spec["config"]["seed"])
        self.spec, self.config, self.step_number = spec, spec["config"]["optim"], 0
        self.train_split, self.val_split = splits_of(spec)
        self.model = build(spec).train()
        self.loss_of = loss_function(self.model, spec)
        if spec["nanogpt"]:
            wanted = (self.config[name] for name in ("weight_decay", "learning_rate"))
            betas = self.config["beta1"], self.config["beta2"]
            self.optimizer = self.model.configure_optimizers(*wanted, betas, spec["device"])
        else:
            self.optimizer = optimizer_of(self.model, self.config)
        self.batch = get_batch(self.train_split, spec)

    def step(self):
        """One optimizer step; its loss as a tensor, which nobody has waited for."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step_number)
        n = self.config["grad_accumulation"]
        for _ in range(n):
            with autocast(self.spec):
                loss = self.loss_of(*self.batch)
            self.batch = get_batch(self.train_split, self.spec)  # while a GPU still computes
            (loss / n).backward()
        if self.config["grad_clip"]:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config["grad_clip"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step_number += 1
        return loss.detach()


def train(spec):
    """Steps, their loss printed every log_interval."""
    trainer = Trainer(spec)
    every = spec["config"]["train"]["log_interval"]

    def step():
        nonlocal loss
        loss = trainer.step()
        if trainer.step_number % every == 0:
            print(f"iter {trainer.step_number}: loss {loss.item():.4f}")
        return 1

    def work(seconds):
        began = time.perf_counter()
        amount, _ = until(seconds, step)
        last = loss.item()  # waits for the device
        return {"amount": amount, "seconds": time.perf_counter() - began, "loss": last}

    loss = trainer.step()
    first_loss = loss.item()
    work(0.5)
    optim, data = trainer.config, spec["config"]["data"]
    tokens = data["batch_size"] * optim["grad_accumulation"] * spec["config"]["model"]["block_size"]
    facts = {"parameters": parameters_of(trainer.model, spec), "tokens_per_step": tokens, "first_loss": first_loss}
    return facts | {"fused_adamw": bool(trainer.optimizer.defaults.get("fused"))}, work


def write(spec):
    """The loop of the lecture and of nanoGPT: all tokens of the window anew for each token, without a cache."""
    torch.manual_seed(spec["config"]["seed"])
    model = build(spec).eval()
    if spec["compile"]:
        model.compile()  # in place: the model's own generate calls it
    prompt = torch.randint(spec["vocab_size"], (spec["batch"], spec["prompt"]), device=spec["device"])

    def call():
        with autocast(spec):
            tokens = model.generate(prompt, spec["new_tokens"])
        assert tokens.cpu().shape == (spec["batch"], spec["prompt"] + spec["new_tokens"])
        return spec["batch"] * spec["new_tokens"]

    def work(seconds):
        amount, spent = until(seconds, call)
        return {"amount": amount, "seconds": spent}

    call()  # compiles for one token, for two, and then for any number
    work(0.5)
    return {"parameters": parameters_of(model, spec)}, work


def start(spec):
    """The facts of a kind of work and the function that does it, warm."""
    began = time.perf_counter()
    facts, work = {"train": train, "generate": write}[spec["kind"]](spec)
    devices = [torch.cuda.get_device_name() if spec["device"] == "cuda" else f"cpu, {torch.get_num_threads()} threads"]
    return facts | {"devices": devices, "warm_up_s": round(time.perf_counter() - began, 1)}, work


if __name__ == "__main__":
    serve(start)
