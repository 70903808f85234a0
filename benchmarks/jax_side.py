"""jaxgpt's side of compare.py: training or generation as users get them, a slice at a time.

Started by compare.py, which also says what to do: `python benchmarks/jax_side.py SPECIFICATION`.
"""

import itertools
import os
import time

import jax
import numpy as np
from turns import serve, until

from jaxgpt import generate, load_config
from jaxgpt.cli import keep_compiled
from jaxgpt.devices import chips, cores, processes, sharding
from jaxgpt.init import first_state, init_params
from jaxgpt.loop import Job
from jaxgpt.recipe import abstract_model, make_recipe, resolve
from jaxgpt.runs import metrics
from jaxgpt.step import INIT, cast, stream_key
from jaxgpt.training import set_up, start_record


def prepare(config, mesh):
    """The job of a run without a directory, and its first state."""
    config, source, recipe, like = set_up(config, mesh)
    source.split(mesh, config.model.block_size)
    state = first_state(config.model, recipe.tx, config.seed, like)
    sinks = metrics.JsonLines(os.devnull), metrics.Console(config.train.steps)

    def emit(record):
        for sink in sinks:
            sink(record)

    key, started = jax.random.key(config.seed), time.perf_counter()
    flops = start_record(config, mesh, source, state)["flops_per_token"]
    peak = chips.Peak(list(mesh.devices.flat))
    return Job(config, recipe, source, None, None, emit, {}, key, flops, peak, started), state


def train(spec):
    """Steps in calls of steps_per_call; a call's metrics are read after the next one has been dispatched."""
    config = load_config(spec["flags"])
    processes.join(config.distributed)
    mesh = sharding.make_mesh(cores.share(config.mesh, config.model, config.data.batch_size))
    with jax.set_mesh(mesh):
        job, state = prepare(config, mesh)
        record = start_record(job.config, mesh, job.source, state)
        job.emit({**record, "mesh_before": record["mesh"]})
        n = job.config.train.steps_per_call
        feed = job.source.feed(((first, n) for first in itertools.count(0, n)), job.config.seed, job.recipe.rows)
        like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
        tokens = next(feed)
        compiled = job.compile(like, tokens, n)
        state, chunk = compiled(state, tokens, job.key)
        first_loss, step = float(chunk["loss"][0]), n

    def work(seconds):
        nonlocal state, step
        waiting, ended = [], time.perf_counter()

        def call():
            nonlocal state, step, ended
            state, chunk = compiled(state, next(feed), job.key)
            waiting.append((step, chunk))
            step += n
            if len(waiting) > 1:
                ended = job.log(*waiting.pop(0), ended)
            return n

        with jax.set_mesh(mesh):
            began = time.perf_counter()
            amount, _ = until(seconds, call)
            last = waiting[0][1]
            job.log(*waiting.pop(0), ended)
            jax.block_until_ready(state)
            spent = time.perf_counter() - began
        return {"amount": amount, "seconds": spent, "loss": float(np.mean(last["loss"]))}

    work(0.5)
    facts = {name: record[name] for name in ("parameters", "flops_per_token")} | {"steps_per_call": n}
    return facts | {"tokens_per_step": job.recipe.rows * job.config.model.block_size, "first_loss": first_loss}, work


def write(spec):
    """`generate` again and again, as `jaxgpt sample` calls it, on one device."""
    config = resolve(load_config(spec["flags"]), spec["vocab_size"])
    recipe = make_recipe(config, abstract_model(config, jax.default_backend()))
    params = init_params(config.model, stream_key(config.seed, INIT))
    model = cast(params, recipe)
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
