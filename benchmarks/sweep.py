"""What training runs side by side gains: N runs in one compiled step against one run after the other.

python benchmarks/sweep.py [--config RECIPE ...] [--runs N ...] [--rounds N] [--steps N]
One run after the other is trained as `jaxgpt train` does, with the cores sharing each batch where that gains; the runs
side by side as `jaxgpt sweep` does, spread over the cores. Both train in turns in one process. Prints one JSON line for
each recipe and number of runs: steps of a single run per second of both, and median and range of the paired ratios.
"""

import argparse
import dataclasses
import json
import platform
import sys
import time
import types

import jax
import numpy as np
from tricks import Training
from turns import spread

from jaxgpt import load_config
from jaxgpt.config import Config
from jaxgpt.tools.side_by_side import names_that_vary, train_together
from jaxgpt.tools.together import Program, Together
from jaxgpt.training import mesh_config, resolve

RECIPES = ["lecture/layernorm", "shakespeare_cpu", "lecture/colab"]


class SideBySide:
    """Calls of `n` training steps of several runs, as `jaxgpt sweep` makes them."""

    def __init__(self, config: Config, runs: int, n: int):
        rates = [config.optim.learning_rate * (1 + i / runs) for i in range(runs)]
        configs = [
            dataclasses.replace(config, seed=i, optim=dataclasses.replace(config.optim, learning_rate=rate))
            for i, rate in enumerate(rates)
        ]
        self.n = n * runs
        program = Program(configs[0], names_that_vary(configs), runs)
        self.job = Together(configs, program, types.SimpleNamespace(tokenizer=None), print)
        self.states = self.job.first_states()
        shape = n, config.optim.grad_accumulation * config.data.batch_size, config.model.block_size + 1
        rng = np.random.default_rng(0)
        self.windows = self.job.stack([rng.integers(0, 65, shape).astype(np.uint8) for _ in configs])
        arguments = self.states, self.windows, self.job.keys, self.job.varying
        self.call = train_together.lower(*arguments, group=self.job.group).compile()

    def __call__(self) -> int:
        out = self.call(self.states, self.windows, self.job.keys, self.job.varying)
        self.states, _ = jax.block_until_ready(out)
        return self.n


def speed(side: Training | SideBySide) -> float:
    """Steps of a single run per second."""
    began = time.perf_counter()
    done = side()
    return done / (time.perf_counter() - began)


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", default=RECIPES)
    parser.add_argument("--runs", nargs="+", type=int, default=[2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="training steps a call")
    args = parser.parse_args()
    for name in args.config:
        config = load_config(["--config", name])
        mesh = mesh_config(config)  # before jax starts: the cores become devices
        config = resolve(config, 65)
        flops = 6 * config.model.block_parameters * config.data.batch_size * config.model.block_size
        single = Training(config, mesh, args.steps)
        for runs in args.runs:
            together, speeds = SideBySide(config, runs, args.steps), []
            for i in range(args.rounds + 1):
                sides = (single, together)[:: 1 if i % 2 else -1]
                measured = {side: speed(side) for side in sides}
                speeds.append((measured[single], measured[together]))
            speeds = speeds[1:]  # the first round warms up
            result = {
                "config": name,
                "flops_per_step": flops,
                "runs": runs,
                "devices_used": together.job.group.mesh.size,
            }
            result |= {"one_by_one": spread([a for a, _ in speeds]), "together": spread([b for _, b in speeds])}
            result |= {"ratio": spread([b / a for a, b in speeds])}
            machine = {"machine": platform.processor() or platform.machine(), "devices": str(jax.devices())}
            print(json.dumps(result | machine | {"jax": jax.__version__, "command": " ".join(sys.argv)}), flush=True)


if __name__ == "__main__":
    main()
