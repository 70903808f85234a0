"""Seconds to trace and to compile the training step of deeper and deeper models; no weights are made.

python benchmarks/depth.py [--config RECIPE] [--layers N ...] [--rounds N]
Prints one JSON line for each depth, with medians and ranges. Nothing is read from the cache of compiled functions.
"""

import argparse
import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp
from compare import machine

from jaxgpt import load_config, step, training
from jaxgpt.devices import sharding


def seconds(recipe: str, layers: int) -> tuple[float, float]:
    """Trace, and compile, the step of a recipe with so many layers."""
    config = load_config(["--config", recipe, "--model.n_layer", str(layers)])
    config = training.resolve(config, config.model.vocab_size or 65)
    mesh = sharding.make_mesh(sharding.MeshConfig(1))
    jax.clear_caches()
    with jax.set_mesh(mesh):
        spec, shapes = training.specify(config, mesh)
        rows = config.optim.grad_accumulation * config.data.batch_size
        windows = jax.ShapeDtypeStruct((1, rows, config.model.block_size + 1), jnp.uint16)
        key, began = jax.random.key(0), time.perf_counter()
        traced = step.train_steps.trace(shapes, windows, key, spec=spec)
        between = time.perf_counter()
        traced.lower().compile()
    return between - began, time.perf_counter() - between


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="gpt2_124m")
    parser.add_argument("--layers", nargs="+", type=int, default=[6, 12, 24, 48])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    for layers in args.layers:
        rounds = [seconds(args.config, layers) for _ in range(args.rounds)]
        record = {"what": "depth", "config": args.config, "layers": layers}
        for name, values in zip(("trace", "compile"), zip(*rounds)):
            record[name] = {
                "median": round(statistics.median(values), 2),
                "range": [round(f(values), 2) for f in (min, max)],
            }
        print(json.dumps(record | machine() | {"command": " ".join(["python", *sys.argv])}), flush=True)


if __name__ == "__main__":
    main()
