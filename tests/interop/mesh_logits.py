"""Write the logits of an imported run on each mesh named on the command line: run by test_gpt2.py.

JAX_NUM_CPU_DEVICES=8 python tests/interop/mesh_logits.py RUN_DIR TOKENS.npy OUT.npz 1,1,1 2,2,2
"""

import sys

import jax
import numpy as np
from flax import nnx

import jaxgpt
from jaxgpt import step
from jaxgpt.devices import sharding
from jaxgpt.training import resolve, step_spec

run_dir, tokens, out, *meshes = sys.argv[1:]
jax.config.update("jax_default_matmul_precision", "highest")
run, tokens, found = jaxgpt.load(run_dir), np.load(tokens), {}
params = nnx.to_pure_dict(nnx.state(run.model))
spec = step_spec(resolve(run.config, run.tokenizer.vocab_size), run.model)
for name in meshes:
    mesh = sharding.make_mesh(sharding.MeshConfig(*map(int, name.split(","))))
    with jax.set_mesh(mesh):
        model = step.cast(jax.device_put(params, sharding.shardings(mesh, params)), spec)
        assert model.token_embedding_table.embedding.shape[0] == sharding.padded(1031, mesh.shape["tensor"])
        found[name] = jax.jit(lambda model, tokens: model(tokens))(model, tokens)
np.savez(out, **found)
