import chex
import jax
import pytest
from flax import nnx

from jaxgpt import init
from jaxgpt.model import GPT, Block, GPTConfig
from jaxgpt.step import params_of

SMALL = {"vocab_size": 11, "block_size": 8, "n_head": 2, "n_embd": 16}
FORMS = {
    "lecture": {"n_layer": 2},
    "GPT-2": {"n_layer": 2, "init": "scaled", "bias": "all", "lm_head": "tied"},
    "PyTorch's weights": {"n_layer": 2, "init": "torch", "norm": "none"},
    "no positions": {"n_layer": 2, "positions": "none", "bias": "none", "mlp_ratio": 0},
    "zero": {"n_layer": 2, "init": "zero", "norm": "rmsnorm", "qk_norm": True, "gated": True, "value_embeddings": True},
    "bigram": {"n_layer": 0, "n_embd": 0, "lm_head": "none", "positions": "none"},
}


MORE = {"zero", "GPT-2", "PyTorch's weights", "no positions"}


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=[pytest.mark.full] if form in MORE else []) for form in FORMS]
)
def test_weights_are_those_of_the_model_made_as_a_whole(form):
    config, key = GPTConfig(**SMALL | FORMS[form]), jax.random.key(5)
    whole = jax.jit(lambda: params_of(GPT(config, rngs=nnx.Rngs(params=key))))()
    chex.assert_trees_all_equal(init.init_params(config, key), whole)
    form = jax.tree.map(lambda a: (a.shape, a.dtype), whole)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params_of(init.abstract(config))) == form


def test_as_many_blocks_are_compiled_for_many_layers_as_for_two(monkeypatch):
    made = []
    monkeypatch.setattr(init, "Block", lambda *args, **options: made.append(1) or Block(*args, **options))
    for n_layer in (2, 5):
        made.clear()
        sizes = SMALL | {"n_embd": 12}  # which no other test compiles
        params = init.init_params(GPTConfig(**sizes, n_layer=n_layer), jax.random.key(0))
        assert len(params["blocks"]) == n_layer and len(made) == 2  # for its shapes, and to be compiled
