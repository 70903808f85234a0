"""Print the losses of 30 steps on each mesh named on the command line, as JSON: run by test_sharding.py.

JAX_NUM_CPU_DEVICES=8 python tests/devices/mesh_losses.py linear 0.1 65 1,1,1 2,2,2
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgpt import data, init, step
from jaxgpt.devices import sharding
from jaxgpt.model import GPTConfig
from jaxgpt.optim import OptimConfig, optimizer, schedule

VOCABULARY = int(sys.argv[3])  # accumulation is on
CONFIG = GPTConfig(
    vocab_size=VOCABULARY,
    block_size=16,
    n_layer=1,
    n_head=8,
    n_embd=64,
    dropout=float(sys.argv[2]),
    lm_head=sys.argv[1],
    bias="all",
    activation="gelu_tanh",
)
OPTIM = OptimConfig(warmup_steps=3, decay_steps=30, grad_accumulation=2)


def losses(sizes: list[int]) -> list[float]:
    mesh = sharding.make_mesh(sharding.MeshConfig(*sizes))
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 2000).astype(np.uint8)
    with jax.set_mesh(mesh):
        model = init.abstract(CONFIG)
        per_device = sharding.takes_mean_over_devices(mesh, CONFIG.dropout)
        tx = optimizer(OPTIM)
        spec = step.StepSpec(nnx.graphdef(model), tx, schedule(OPTIM), 2, jnp.dtype("float32"), 1, per_device)
        like = init.abstract_state(model, tx, mesh)
        state = init.first_state(CONFIG, tx, 0)
        key = step.stream_key(0, step.TRAIN)
        windows = data.windows(key, sharding.place(mesh, tokens), jnp.arange(30), 16, 16)
        state, metrics = step.train_steps(state, windows, jax.random.key(0), spec=spec)
        kept = jax.tree.map(lambda a, at: a.sharding.is_equivalent_to(at.sharding, a.ndim), state, like)
        assert all(jax.tree.leaves(kept)), "a step moved the state"
        split = [leaf for leaf in jax.tree.leaves(state.params) if not leaf.is_fully_replicated]
        assert bool(split) == (sizes[1] * sizes[2] > 1)
        final = step.evaluate(step.cast(state.params, spec), jnp.asarray(tokens), batch_size=8)
        return [*np.asarray(metrics["loss"]).tolist(), *np.asarray(metrics["grad_norm"]).tolist(), final]


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    print(json.dumps({mesh: losses([int(size) for size in mesh.split(",")]) for mesh in sys.argv[4:]}))
