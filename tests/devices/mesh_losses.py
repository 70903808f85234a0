"""Print the losses of 30 steps on each mesh named on the command line, as JSON: run by test_sharding.py.

JAX_NUM_CPU_DEVICES=8 python tests/devices/mesh_losses.py linear 0.1 65 '{"n_kv_head": 4}' 1,1,1 2,2,2
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
    **{"bias": "all", "activation": "gelu_tanh"} | json.loads(sys.argv[4]),
)
OPTIM = OptimConfig(warmup_steps=3, decay_steps=30, grad_accumulation=2)


def losses(sizes: list[int]) -> list[float]:
    mesh = sharding.make_mesh(sharding.MeshConfig(*sizes))
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 2000).astype(np.min_scalar_type(VOCABULARY - 1))
    with jax.set_mesh(mesh):
        model = init.abstract(CONFIG)
        per_device = sharding.takes_mean_over_devices(mesh, CONFIG.dropout)
        tx = optimizer(OPTIM)
        spec = step.StepSpec(nnx.graphdef(model), tx, schedule(OPTIM), 2, jnp.dtype("float32"), 1, per_device)
        like = init.abstract_state(model, tx, mesh)
        state = init.first_state(CONFIG, tx, 0)
        key = step.stream_key(0, step.TRAIN)
        windows = data.windows(key, sharding.place(mesh, tokens), jnp.arange(30), 16, 16)
        compiled = step.train_steps.lower(state, windows[:10], jax.random.key(0), spec=spec).compile()
        metrics = []
        for call in range(3):  # of one program, which takes the state only where the call before must have left it
            state, measured = compiled(state, windows[10 * call : 10 * call + 10], jax.random.key(0))
            metrics.append(measured)
            kept = jax.tree.map(lambda a, at: a.sharding.is_equivalent_to(at.sharding, a.ndim), state, like)
            assert all(jax.tree.leaves(kept)), "a step moved the state"
        split = [leaf for leaf in jax.tree.leaves(state.params) if not leaf.is_fully_replicated]
        assert bool(split) == (sizes[1] * sizes[2] > 1)
        final = step.evaluate(step.cast(state.params, spec), jnp.asarray(tokens), batch_size=8)
        return [*(float(x) for name in ("loss", "grad_norm") for each in metrics for x in each[name]), final]


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    print(json.dumps({mesh: losses([int(size) for size in mesh.split(",")]) for mesh in sys.argv[5:]}))
