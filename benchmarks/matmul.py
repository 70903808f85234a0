"""Training with jaxgpt.matmul against training with a plain product: alternating rounds in one process.

python benchmarks/matmul.py [--config FILE] [--rounds N]
Prints one JSON line: steps a second of both, and median and range of the paired ratios.
"""

import argparse
import json
import platform
import statistics
import sys
import time

import jax
import numpy as np

from jaxgpt import load_config, matmul, step
from jaxgpt.recipe import make_recipe, resolve

STEPS = 10


def compiled(config, product):
    """A compiled call of STEPS training steps with this product in the linear layers, its state, and its data."""
    matmul.matmul, ours = product, matmul.matmul
    model = step.init_model(config.model, config.seed)
    recipe = make_recipe(config, model)
    state = step.init_state(model, recipe.tx)
    data = jax.device_put(np.random.default_rng(0).integers(0, 65, 100_000).astype(np.uint8)), jax.random.key(0)
    call = step.train_steps.lower(state, *data, recipe=recipe, n=STEPS).compile()
    matmul.matmul = ours
    return call, state, data


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/shakespeare_cpu.yaml")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    config = resolve(load_config(["--config", args.config]), 65)
    sides = {"jaxgpt.matmul": compiled(config, matmul.matmul), "plain": compiled(config, jax.numpy.matmul)}
    speeds = {name: [] for name in sides}
    for i in range(args.rounds + 1):
        for name in list(sides)[:: 1 if i % 2 else -1]:
            call, state, data = sides[name]
            began = time.perf_counter()
            state, _ = jax.block_until_ready(call(state, *data))
            sides[name] = call, state, data
            speeds[name].append(STEPS / (time.perf_counter() - began))
    first, second = (values[1:] for values in speeds.values())  # the first round warms up
    ratios = [a / b for a, b in zip(first, second)]
    result = {name: round(statistics.median(values[1:]), 2) for name, values in speeds.items()}
    result |= {"ratio": round(statistics.median(ratios), 3), "range": [round(min(ratios), 3), round(max(ratios), 3)]}
    machine = {
        "machine": platform.processor() or platform.machine(),
        "devices": str(jax.devices()),
        "jax": jax.__version__,
    }
    print(json.dumps({"unit": "steps/s", **result, **machine, "command": " ".join(sys.argv)}))


if __name__ == "__main__":
    main()
