"""jaxgpt's side of compare.py: training or generation as users get them, a slice at a time.

Started by compare.py, which also says what to do: `python benchmarks/jax_side.py SPECIFICATION`.
"""

import itertools
import tempfile
import time

import jax
import numpy as np
from turns import serve, until

from jaxgpt import generate, load_config
from jaxgpt.devices import chips, processes, sharding
from jaxgpt.files.compiled import keep_compiled
from jaxgpt.init import first_state, init_params
from jaxgpt.loop import TrainingLoop, compile_call, count, longest, rows
from jaxgpt.runs import metrics
from jaxgpt.step import INIT, cast, stream_key
from jaxgpt.text.source import open_source
from jaxgpt.training import abstract_model, mesh_config, resolve, specify, start_record, step_spec


def prepare(config, mesh):
    """The loop of a run without a directory, and its first state."""
    source = open_source(config.data)
    config = resolve(config, source.tokenizer.vocab_size)
    spec, _ = specify(config, mesh)
    source.split(mesh, config.model.block_size)
    state = first_state(config.model, spec.tx, config.seed)
    with tempfile.NamedTemporaryFile() as file:  # it has no name any more, but is written as that of a run
        sinks = metrics.JsonLines(file.name), metrics.Console(config.train.steps)

    def emit(record):
        for sink in sinks:
            sink(record)

    record = start_record(config, mesh, source, state)
    emit({**record, "mesh_before": record["mesh"], "changed": {}})
    peak, flops = chips.Peak(list(mesh.devices.flat)), record["flops_per_token"]
    return (
        TrainingLoop(config, spec, source, None, emit, record["mesh"], flops, peak, time.perf_counter()),
        record,
        state,
    )


def train(spec):
    """Steps in calls of steps_per_call; a call's metrics are read after the next one has been dispatched."""
    config = load_config(spec["flags"])
    processes.join(config.distributed)
    mesh = sharding.make_mesh(mesh_config(config))
    with jax.set_mesh(mesh):
        loop, record, state = prepare(config, mesh)
        n = longest(loop.config)
        feed = loop.source.feed(((first, n) for first in itertools.count(0, n)), loop.config.seed, rows(loop.config))
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
        compiled, took = compile_call(loop.config, loop.spec, loop.source, shapes, None)
        loop.emit({"kind": "compile", "seconds": took})
        rest = loop.key, None, count(loop.config, n)
        state, chunk = compiled(state, next(feed), *rest)
        first_loss, step = float(chunk["loss"][0]), n

    def work(seconds):
        nonlocal state, step
        waiting, ended = [], time.perf_counter()

        def call():
            nonlocal state, step, ended
            state, chunk = compiled(state, next(feed), *rest)
            waiting.append((step, n, chunk))
            step += n
            if len(waiting) > 1:
                ended = loop.log(*waiting.pop(0), ended)
            return n

        with jax.set_mesh(mesh):
            began = time.perf_counter()
            amount, _ = until(seconds, call)
            last = waiting[0][2]
            loop.log(*waiting.pop(0), ended)
            jax.block_until_ready(state)
            spent = time.perf_counter() - began
        return {"amount": amount, "seconds": spent, "loss": float(np.mean(last["loss"]))}

    work(0.5)
    facts = {name: record[name] for name in ("parameters", "flops_per_token")} | {"steps_per_call": n}
    return facts | {"tokens_per_step": rows(loop.config) * loop.config.model.block_size, "first_loss": first_loss}, work


def write(spec):
    """`generate` again and again, as `jaxgpt sample` calls it, on one device."""
    config = resolve(load_config(spec["flags"]), spec["vocab_size"])
    static = step_spec(config, abstract_model(config, jax.default_backend()))
    params = init_params(config.model, stream_key(config.seed, INIT))
    model = cast(params, static)
    prompt = np.random.default_rng(0).integers(0, spec["vocab_size"], (spec["batch"], spec["prompt"]), np.int32)
    calls = itertools.count()

    def call():
        tokens = generate(model, prompt, jax.random.key(next(calls)), spec["new_tokens"])
        assert np.asarray(tokens).shape == (spec["batch"], spec["prompt"] + spec["new_tokens"])
        return spec["batch"] * spec["new_tokens"]

    def work(seconds):
        amount, spent = until(seconds, call)
        return {"amount": amount, "seconds": spent}

    work(0.5)
    return {"parameters": sum(leaf.size for leaf in jax.tree.leaves(params))}, work


def start(spec):
    """The facts of a kind of work and the function that does it, warm."""
    keep_compiled()
    began = time.perf_counter()
    facts, work = {"train": train, "generate": write}[spec["kind"]](spec)
    devices = [device.device_kind for device in jax.devices()]
    return facts | {"devices": devices, "warm_up_s": round(time.perf_counter() - began, 1)}, work


if __name__ == "__main__":
    serve(start)
