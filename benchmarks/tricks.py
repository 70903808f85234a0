"""What each trick for CPUs gains: with it against without it, alternating rounds in one process.

python benchmarks/tricks.py TRICK [--config FILE] [--rounds N] [--steps N] [--batch N]
  matmul      training: the weight gradients of devices/matmul.py against those of a plain product
  devices     training: each core as a device against one device with all cores
  bfloat16    training: --train.dtype bfloat16 against float32
  muon        training: --optim.optimizer muon against adamw; what Muon costs, so the ratio is below 1
  dropout     training: a byte for each value's mask against nnx.Dropout's 32 bits
  parts       training: a large batch in parts against as a whole
  one_row     generation of one text: products in two parts, as devices/matmul.py has them, against whole ones
  last_block  generation past the window: the last block for the last token against all of it
  rolling     generation past the window: a cache that rolls against the window recomputed, with positions rope
Prints one JSON line: steps (or tokens) per second of both, and median and range of the paired ratios.
"""

import argparse
import dataclasses
import json
import math
import platform
import statistics
import sys
import time

import jax
import numpy as np
from flax import nnx

from jaxgpt import init, load_config, model, sampling, step
from jaxgpt.config import Config
from jaxgpt.devices import cores, matmul, sharding
from jaxgpt.devices.sharding import MeshConfig
from jaxgpt.training import mesh_config, resolve, step_spec

TRICKS = ["matmul", "devices", "bfloat16", "muon", "dropout", "parts", "one_row", "last_block", "rolling"]


class Training:
    """Calls of `n` training steps, as `jaxgpt train` makes them."""

    def __init__(self, config: Config, mesh: MeshConfig, n: int):
        self.n = n
        self.mesh = sharding.make_mesh(mesh)
        with jax.set_mesh(self.mesh):
            abstract = init.abstract(config.model)
            self.spec = step_spec(config, abstract, self.mesh)
            self.state = init.first_state(config.model, self.spec.tx, config.seed)
            shape = n, config.optim.grad_accumulation * config.data.batch_size, config.model.block_size + 1
            windows = np.random.default_rng(0).integers(0, 65, shape).astype(np.uint8)
            self.data = sharding.place(self.mesh, windows), jax.random.key(0)
            self.lowered = step.train_steps.lower(self.state, *self.data, spec=self.spec)
            self.call = self.lowered.compile()

    def __call__(self) -> int:
        self.state, _ = jax.block_until_ready(self.call(self.state, *self.data))
        return self.n


class Wide(nnx.Dropout):
    """Flax's."""

    def __call__(self, x, rngs):
        return x if rngs is None else super().__call__(x, deterministic=False, rngs=nnx.Rngs(rngs.dropout()))


def tokens(n: int) -> tuple:
    """How `sampling` is told to draw n tokens: a key, the rule, the first one's number, and how many."""
    return jax.random.key(0), sampling.make_rule(), jax.numpy.int32(0), jax.numpy.int32(n)


class Sliding:
    """Tokens past the window, which is recomputed."""

    def __init__(self, config: Config, last_logits, rows: int):
        self.model = init.init_model(config.model, config.seed)
        self.window = jax.numpy.zeros((rows, config.model.block_size), jax.numpy.int32)
        sampling._last_logits, ours = last_logits, sampling._last_logits
        self.args = self.model, self.window, *tokens(100)
        self.lowered = sampling._slide.lower(*self.args, n=100)
        self.call = self.lowered.compile()
        sampling._last_logits = ours
        jax.clear_caches()

    def __call__(self) -> int:
        return jax.block_until_ready(self.call(*self.args))[0].size


class Rolling:
    """Tokens past the window, whose cache rolls."""

    def __init__(self, config: Config, rows: int):
        model = init.init_model(config.model, config.seed)
        length = jax.numpy.int32(3 * config.model.block_size)
        cache = sampling._empty(model, rows, config.model.block_size)._replace(length=length)
        self.args = model, jax.numpy.zeros(rows, jax.numpy.int32), cache, *tokens(100)
        self.lowered = sampling._decode.lower(*self.args, n=100)
        self.call = self.lowered.compile()

    def __call__(self) -> int:
        return jax.block_until_ready(self.call(*self.args))[0].size


def sides(trick: str, config: Config, n: int, rows: int) -> dict[str, Training | Sliding | Rolling]:
    """With the trick, and without it."""
    ours = mesh_config(config)
    config = resolve(config, config.model.vocab_size or 65)
    match trick:
        case "matmul":
            with_it = Training(config, ours, n)
            matmul.matmul, kept = jax.numpy.matmul, matmul.matmul
            jax.clear_caches()
            without = Training(config, ours, n)
            matmul.matmul = kept
        case "devices":
            with_it, without = Training(config, ours, n), Training(config, MeshConfig(1), n)
        case "bfloat16":
            half = dataclasses.replace(config, train=dataclasses.replace(config.train, dtype="bfloat16"))
            with_it, without = Training(half, ours, n), Training(config, ours, n)
        case "muon":
            with_muon = dataclasses.replace(config, optim=dataclasses.replace(config.optim, optimizer="muon"))
            with_it, without = Training(with_muon, ours, n), Training(config, ours, n)
        case "dropout":
            with_it = Training(config, ours, n)
            model.Dropout, kept = Wide, model.Dropout
            init._structure.cache_clear()  # of the model with ours
            without = Training(config, ours, n)
            model.Dropout = kept
        case "parts":
            with_it = Training(config, ours, n)
            cores.PART, kept = math.inf, cores.PART
            without = Training(config, ours, n)
            cores.PART = kept
        case "one_row":
            with_it = Rolling(config, rows)
            matmul.LARGE, kept = math.inf, matmul.LARGE
            jax.clear_caches()
            without = Rolling(config, rows)
            matmul.LARGE = kept
        case "last_block":
            with_it = Sliding(config, sampling._last_logits, rows)
            without = Sliding(config, lambda model, window: model(window)[:, -1], rows)
        case "rolling":
            with_it, without = Rolling(config, rows), Sliding(config, sampling._last_logits, rows)
    return {"with": with_it, "without": without}


def check_different(measured: dict[str, Training | Sliding | Rolling]) -> None:
    """End here if two sides are the same program: what is replaced may not be used by the recipe, or be in a cache."""
    programs: dict[str, str] = {}
    for name, side in measured.items():
        if (other := programs.setdefault(side.lowered.as_text(), name)) != name:
            sys.exit(f"{sys.argv[0]}: error: {other} and {name} are the same program: use another recipe")


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trick", choices=TRICKS)
    parser.add_argument("--config", default="configs/shakespeare_cpu.yaml")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20, help="training steps a call")
    parser.add_argument("--batch", type=int, default=1, help="texts that are generated at a time")
    args = parser.parse_args()
    measured = sides(args.trick, load_config(["--config", args.config]), args.steps, args.batch)
    check_different(measured)
    speeds = {name: [] for name in measured}
    for i in range(args.rounds + 1):
        for name in list(measured)[:: 1 if i % 2 else -1]:
            began = time.perf_counter()
            done = measured[name]()
            speeds[name].append(done / (time.perf_counter() - began))
    first, second = (values[1:] for values in speeds.values())  # the first round warms up
    ratios = [a / b for a, b in zip(first, second)]
    result = {name: round(statistics.median(values[1:]), 2) for name, values in speeds.items()}
    result |= {"ratio": round(statistics.median(ratios), 3), "range": [round(min(ratios), 3), round(max(ratios), 3)]}
    machine = {
        "machine": platform.processor() or platform.machine(),
        "devices": str(jax.devices()),
        "jax": jax.__version__,
    }
    unit = "tokens/s" if args.trick in ("one_row", "last_block", "rolling") else "steps/s"
    print(json.dumps({"trick": args.trick, "unit": unit, **result, **machine, "command": " ".join(sys.argv)}))


if __name__ == "__main__":
    main()
