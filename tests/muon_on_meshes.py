"""Print the losses of 20 steps of Muon on each mesh, and the FLOPs of its products per device: run by test_muon.py.

JAX_NUM_CPU_DEVICES=8 python tests/muon_on_meshes.py 1,1,1 2,2,2
"""

import json
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgpt import data, init, optim, step
from jaxgpt.devices import sharding
from jaxgpt.model import GPTConfig

# 8 square matrices, and 4 wide ones, which 8 devices do not divide. No ReLU: one unit so near 0 that rounding decides
# whether it is passed on changes the losses by 3.5e-5, whatever the mesh or the optimizer does.
CONFIG = GPTConfig(vocab_size=65, block_size=16, n_layer=2, n_head=8, n_embd=64, lm_head="tied", activation="gelu")
OPTIM = optim.OptimConfig(optimizer="muon", warmup_steps=3, decay_steps=20)


def products(hlo: str) -> int:
    """The FLOPs of the Newton-Schulz iterations in a compiled module: of all products with full precision."""
    arrays = re.findall(r"%?([\w.-]+) = f32\[([\d,]+)\]", hlo)
    shapes = {name: [int(n) for n in sizes.split(",")] for name, sizes in arrays}
    flops = 0
    for line in re.findall(r".* dot\(.*operand_precision=\{highest,highest\}.*", hlo):
        result, first = re.search(r"= f32\[([\d,]+)\].* dot\((?:f32\S+ )?%?([\w.-]+),", line).groups()
        axis = re.search(r"lhs_contracting_dims=\{(\d)\}", line)[1]
        flops += 2 * math.prod(int(n) for n in result.split(",")) * shapes[first][int(axis)]
    return flops


def measure(sizes: list[int]) -> dict:
    mesh = sharding.make_mesh(sharding.MeshConfig(*sizes))
    tokens = np.random.default_rng(0).integers(0, 65, 2000).astype(np.uint8)
    with jax.set_mesh(mesh):
        model, tx = init.abstract(CONFIG), optim.optimizer(OPTIM)
        per_device = sharding.takes_mean_over_devices(mesh, 0.0)
        spec = step.StepSpec(
            nnx.graphdef(model), tx, optim.schedule(OPTIM), 1, jnp.dtype("float32"), per_device_gradients=per_device
        )
        like = init.abstract_state(model, tx, mesh)
        state = init.first_state(CONFIG, tx, 0)
        key = step.stream_key(0, step.TRAIN)
        windows = data.windows(key, sharding.place(mesh, tokens), jnp.arange(20), 8, 16)
        call = step.train_steps.lower(state, windows, jax.random.key(0), spec=spec).compile()
        state, metrics = call(state, windows, jax.random.key(0))
        kept = jax.tree.map(lambda a, at: a.sharding.is_equivalent_to(at.sharding, a.ndim), state, like)
        assert all(jax.tree.leaves(kept)), "a step moved the state"
        return {"losses": np.asarray(metrics["loss"]).tolist(), "flops": products(call.as_text())}


if __name__ == "__main__":
    print(json.dumps({mesh: measure([int(size) for size in mesh.split(",")]) for mesh in sys.argv[1:]}))
