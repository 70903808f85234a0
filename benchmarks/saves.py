"""What a trusted checkpoint costs: hashing and manifest beside orbax's save, and what the training loop loses.

python benchmarks/saves.py [--config FILE] [--rounds 5] [--steps 100] [--folder DIR]
Trains the recipe's model on random tokens. A round times, one after the other, a save by orbax alone, a save by
jaxgpt until it is valid, and steps with and without a save among them.
Prints one JSON line, of each figure [median, least, most] over the rounds: `orbax_s` and `save_s`, seconds;
`manifest_share`, the part of a save that hashing, syncing and writing the manifest take; `verify_share`, reading and
hashing all files again before they are restored, against a save; `blocked_s`, seconds for which the loop stands still,
and `blocked_share`, against the time of checkpoint_interval steps; `lost_share`, with the slower steps beside it.
"""

import argparse
import json
import os
import pathlib
import platform
import shutil
import statistics
import sys
import tempfile
import time
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxgpt import init, load_config, step, training
from jaxgpt.runs import manifest
from jaxgpt.runs.checkpoint import Checkpoints


def timed(function, *args):
    """Seconds that a call takes, and its result."""
    began = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - began, result


def steps_of(config, calls: int, state, windows, key, compiled, save=None):
    """Seconds of that many calls, with a save before the first one, and of the save alone."""
    began = time.perf_counter()
    blocked = timed(save, state)[0] if save else 0.0
    for _ in range(calls):
        state, _ = compiled(state, windows, key)
    jax.block_until_ready(state)
    return time.perf_counter() - began, blocked, state


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/shakespeare_cpu.yaml")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--folder", help="where to write; the temporary folder by default")
    args = parser.parse_args()
    config = training.resolve(load_config(["--config", args.config]), 65)
    spec = training.step_spec(config, training.abstract_model(config, jax.default_backend()))
    key, per_call = jax.random.key(0), config.train.steps_per_call
    shape = per_call, config.optim.grad_accumulation * config.data.batch_size, config.model.block_size + 1
    windows = jax.numpy.asarray(np.random.default_rng(0).integers(0, 65, shape, dtype=np.uint8))
    state = step.init_state(init.init_params(config.model, key), spec.tx)
    compiled = step.train_steps.lower(state, windows, key, spec=spec).compile()
    _, _, state = steps_of(config, 5, state, windows, key, compiled)
    found = {name: [] for name in ("orbax_s", "save_s", "manifest_share", "verify_share", "blocked_s",
                                   "blocked_share", "lost_share")}  # fmt: skip
    folder = pathlib.Path(tempfile.mkdtemp(prefix="jaxgpt-saves-", dir=args.folder))
    facts = {"val_loss": None, "corpus_sha256": "0" * 64}
    plain, ours = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler()), Checkpoints(folder / "ours")
    spent, write = [], manifest.write

    def timed_write(*arguments):
        spent.append(timed(write, *arguments)[0])

    def save_plain(name):
        plain.save(folder / "plain" / name, args=ocp.args.PyTreeSave(vars(state)))
        plain.wait_until_finished()

    def save_ours(number):
        ours.save(number, vars(state), facts)
        ours.wait()

    with mock.patch.object(manifest, "write", timed_write):
        for i in range(-1, args.rounds):  # the first one makes threads and is not counted
            save_plain_s, _ = timed(save_plain, str(i + 2))
            save_s, _ = timed(save_ours, 3 * i + 4)
            reader = Checkpoints(folder / "ours")
            verify_s, damage = timed(reader.find_damage, 3 * i + 4)
            reader.close()
            assert damage is None
            calls = max(args.steps // per_call, 1)
            without, _, state = steps_of(config, calls, state, windows, key, compiled)
            ours.wait()
            with_save, blocked, state = steps_of(
                config, calls, state, windows, key, compiled, lambda s, i=i: ours.save(3 * i + 5, vars(s), facts)
            )
            ours.wait()
            interval = without / (calls * per_call) * config.run.checkpoint_interval
            figures = (save_plain_s, save_s, spent[-2] / save_s, verify_s / save_s, blocked, blocked / interval,
                       max(with_save - without, 0) / interval)  # fmt: skip
            if i >= 0:
                for name, figure in zip(found, figures):
                    found[name].append(figure)
    ours.close()
    plain.close()
    size = sum(path.stat().st_size for path in (folder / "ours" / str(3 * i + 5)).rglob("*") if path.is_file())
    shutil.rmtree(folder)
    result = {name: [round(f(values), 4) for f in (statistics.median, min, max)] for name, values in found.items()}
    machine = {"machine": platform.processor() or platform.machine(), "cpus": os.cpu_count()}
    about = {"megabytes": round(size / 1e6, 1), "checkpoint_interval": config.run.checkpoint_interval}
    print(json.dumps({**result, **about, **machine, "rounds": args.rounds, "command": " ".join(sys.argv)}))


if __name__ == "__main__":
    main()
