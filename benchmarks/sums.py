"""What it costs to sum gradients in float32: a step in bfloat16 with those sums against one that sums some in bfloat16.

python benchmarks/sums.py [--config FILE] [--rounds N] [--steps N] [--section.field VALUE ...]
The other step rounds parameters before the loss, so that their gradients are sums in bfloat16: those of the matrices of
the blocks and of the head, of the embedding tables, of the biases and norms, or all of them. All take turns in one
process, on one device. Prints one JSON line for each: milliseconds per step of both, by the clock and of the processor,
median and range of the paired ratios (above 1: float32 takes longer), and how many cores were busy with anything else.
"""

import argparse
import json
import platform
import sys
import time

import jax
from flax import nnx
from tricks import Training, check_different
from turns import busy, others, spread

from jaxgpt import load_config, step
from jaxgpt.devices import sharding
from jaxgpt.devices.sharding import MeshConfig
from jaxgpt.training import resolve

VOCAB_SIZE = 65


def matrix(name: str) -> bool:
    """The matrices of linear layers."""
    return name.endswith("kernel")


def table(name: str) -> bool:
    """The embedding tables."""
    return name.endswith("embedding")


KINDS = {
    "matrices": matrix,
    "tables": table,
    "vectors": lambda name: not (matrix(name) or table(name)),
    "all": lambda name: True,
}


def rounding(kind: str):
    """A `step.build` that rounds the parameters of a kind before the loss."""

    def build(spec, params):
        def rounded(path, leaf):
            return leaf.astype(spec.dtype) if KINDS[kind](sharding.name_of(path)) else leaf

        params = jax.tree_util.tree_map_with_path(rounded, params)
        model = nnx.merge(spec.graphdef, sharding.for_compute(params))
        model.dtype = spec.dtype
        return model

    return build


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/shakespeare_cpu.yaml")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10, help="training steps a call")
    args, flags = parser.parse_known_args()
    config = resolve(load_config(["--config", args.config, "--train.dtype", "bfloat16", *flags]), VOCAB_SIZE)
    measured = {"float32": Training(config, MeshConfig(1), args.steps)}
    kept = step.build
    for kind in KINDS:
        step.build = rounding(kind)
        jax.clear_caches()
        measured[kind] = Training(config, MeshConfig(1), args.steps)
    step.build = kept
    check_different(measured)
    times = {name: [] for name in measured}
    before, own, start = busy(), time.process_time(), time.perf_counter()
    for i in range(args.rounds + 1):  # the first round warms up
        for name in list(measured)[:: 1 if i % 2 else -1]:
            began = time.perf_counter(), time.process_time()
            done = measured[name]()
            ended = time.perf_counter(), time.process_time()
            if i:
                times[name].append([1e3 * (b - a) / done for a, b in zip(began, ended)])
    machine = {
        "machine": platform.processor() or platform.machine(),
        "devices": str(jax.devices()),
        "jax": jax.__version__,
        "others": others(before, time.process_time() - own, time.perf_counter() - start),
        "command": " ".join(sys.argv),
    }
    for kind in KINDS:
        result = {"sums": kind, "unit": "ms/step"}
        for i, clock in enumerate(("wall", "cpu")):
            ours, theirs = ([each[i] for each in times[name]] for name in ("float32", kind))
            paired = spread([a / b for a, b in zip(ours, theirs)])
            result[clock] = {"float32": spread(ours)["median"], "bfloat16": spread(theirs)["median"], "ratio": paired}
        print(json.dumps(result | machine))


if __name__ == "__main__":
    main()
