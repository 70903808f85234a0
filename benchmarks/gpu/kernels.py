"""A training step of GPT-2 124M in several forms: speed, MFU and memory. One JSON line a form.

python benchmarks/gpu/kernels.py [--rounds 3] [--seconds 1] [--profile] [--section.field VALUE ...]
The forms take turns. Those that need little memory come first in the first round, so
that the most memory in use so far is what the form at hand needs. --profile adds where the time of the fastest goes.
"""

import argparse
import collections
import concurrent.futures
import json
import pathlib
import statistics
import sys
import tempfile
import time

import jax

sys.path.append(str(pathlib.Path(__file__).parent.parent))
import loader
from compare import machine
from turns import until

from jaxgpt import load_config
from jaxgpt.config import Config
from jaxgpt.devices import chips, sharding
from jaxgpt.files.compiled import keep_compiled
from jaxgpt.init import first_state
from jaxgpt.step import train_steps
from jaxgpt.text.source import open_source
from jaxgpt.training import mesh_config, resolve, specify, start_record

RECIPE = ["--config", "gpt2_124m", "--optim.grad_accumulation", "1"]
FORMS = {  # what differs from the recipe
    "recipe": [],
    "loss in one piece": ["--train.loss_chunks", "1"],
    "plain attention": ["--model.attention", "xla"],
    "remat dots": ["--model.remat", "dots"],
    "remat dots, loss in one piece": ["--model.remat", "dots", "--train.loss_chunks", "1"],
}


class Form:
    """A step of one form, and what was measured of it."""

    def __init__(self, name: str, config: Config, lowered: jax.stages.Lowered):
        self.name, self.config, self._lowered = name, config, lowered
        self.rates, self.record = [], {"part": "kernels", "form": name, "flags": FORMS[name]}

    def compile(self) -> None:
        """Compile it, and note what XLA says of its memory."""
        began = time.perf_counter()
        try:
            self.step = self._lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            self.record["error"] = str(error).splitlines()[0]
            return
        self.record["compile_s"] = round(time.perf_counter() - began, 1)
        sizes = self.step.memory_analysis()
        held = (sizes.argument_size_in_bytes, sizes.output_size_in_bytes, -sizes.alias_size_in_bytes)
        self.record["compiled_bytes"] = sum(held) + sizes.temp_size_in_bytes

    def work(self, state, windows, key, seconds: float):
        """Steps for some seconds; a loss is awaited after the next call has been dispatched. Returns the state."""
        waiting = None

        def call():
            nonlocal state, waiting
            state, chunk = self.step(state, windows, key)
            jax.block_until_ready(waiting)
            waiting = chunk["loss"]
            return windows.shape[1] * self.config.model.block_size

        began = time.perf_counter()
        tokens, _ = until(seconds, call)
        jax.block_until_ready(state)
        self.rates.append(tokens / (time.perf_counter() - began))
        self.record["loss"] = round(float(waiting[-1]), 3)
        return state


def make(flags: list[str], folder: str):
    """The forms, and the state, windows and key that all of them take; the FLOPs of a token."""
    loader.make(pathlib.Path(folder), 0.02)
    flags = [*RECIPE, "--data.path", folder, *flags]
    config = load_config(flags)
    source = open_source(config.data)
    config = resolve(config, source.tokenizer.vocab_size)
    mesh = sharding.make_mesh(mesh_config(config))
    with jax.set_mesh(mesh):
        source.split(mesh, config.model.block_size)
        spec, _ = specify(config, mesh)
        state, key = first_state(config.model, spec.tx, config.seed), jax.random.key(config.seed)
        windows = next(source.feed(iter([(0, 1)]), config.seed, config.data.batch_size))
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
        forms = []
        for name, changed in FORMS.items():
            form = resolve(load_config([*flags, *changed]), source.tokenizer.vocab_size)
            forms.append(Form(name, form, train_steps.lower(shapes, windows, key, spec=specify(form, mesh)[0])))
        flops = start_record(config, mesh, source, state)["flops_per_token"]
    return forms, (state, windows, key), flops


def where_time_goes(form: Form, given, steps: int = 3) -> dict:
    """Milliseconds a step in the kernels that take longest, as jax's profiler saw them on the device."""
    state, windows, key = given
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                state, _ = form.step(state, windows, key)
            jax.block_until_ready(state)
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        spent = collections.Counter()
        for plane in planes:
            if "/device:GPU" in plane.name:
                for line in plane.lines:
                    if line.name.startswith("Stream"):
                        for event in line.events:
                            spent[event.name] += event.duration_ns / 1e6 / steps
    top = {name[:100]: round(ms, 3) for name, ms in spent.most_common(40)}
    return {"part": "profile", "form": form.name, "ms_per_step": round(sum(spent.values()), 2), "kernels": top}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--profile", action="store_true")
    args, flags = parser.parse_known_args()
    keep_compiled()
    with tempfile.TemporaryDirectory(prefix="jaxgpt-kernels-") as folder:
        forms, (state, windows, key), flops = make(flags, folder)
    for form in forms[:2]:  # XLA tries out kernels on the GPU, for which it should be quiet; the others find them tuned
        form.compile()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(Form.compile, forms[2:]))
    device = jax.devices()[0]
    chip = chips.find(device.device_kind)
    measured = sorted((form for form in forms if "error" not in form.record), key=lambda f: f.record["compiled_bytes"])
    for i in range(args.rounds):
        for form in measured[:: 1 if i % 2 == 0 else -1]:
            if i == 0:
                state = form.work(state, windows, key, 0.0)  # warms up
                form.rates.clear()
                form.record["peak_bytes"] = (device.memory_stats() or {}).get("peak_bytes_in_use")
            state = form.work(state, windows, key, args.seconds)
    for form in forms:
        if form.rates:
            pace = statistics.median(form.rates)
            form.record |= {"tokens_per_second": round(pace), "range": [round(min(form.rates)), round(max(form.rates))]}
            form.record["mfu"] = round(pace * flops / chip.flops, 3) if chip else None
        known = {"batch": windows.shape[1], "dtype": form.config.train.dtype, "device": device.device_kind}
        print(json.dumps({**form.record, **known, **machine(), "command": " ".join(sys.argv)}), flush=True)
    if args.profile:
        fastest = max(measured, key=lambda form: statistics.median(form.rates))
        print(json.dumps(where_time_goes(fastest, (state, windows, key))), flush=True)


if __name__ == "__main__":
    main()
