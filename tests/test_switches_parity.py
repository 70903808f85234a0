"""The switches beyond the lecture against PyTorch: alone and in any combination, with and without the cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from switches import SIZES, SWITCHES, config_of, decoded, random_params

from jaxgpt.init import abstract
from jaxgpt.model import GPTConfig

torch = pytest.importorskip("torch")
import torch_modern as reference  # noqa: E402  needs torch

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("full_precision", "float64")]

QUICKLY = {"xla_backend_optimization_level": 0}  # compiling takes longer than running
KEY_BIAS = ("key", "bias")  # adds the same to all scores of a query, which softmax does not see: no gradient


def ours(config, params, tokens, documents):
    """Logits, gradients of a loss by path, and the logits through the cache."""
    graphdef, probe = nnx.graphdef(abstract(config)), jnp.asarray(np.random.default_rng(9).normal(size=11))

    def everything(params):
        def loss(params):
            logits = nnx.merge(graphdef, params)(tokens, documents=documents)
            return jnp.sin(logits * probe).sum(), logits

        (_, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        by_one = decoded(nnx.merge(graphdef, params), tokens) if documents is None else logits
        return logits, gradients, by_one

    nested = unflatten_dict({path: jnp.asarray(value, jnp.float64) for path, value in params.items()})
    logits, gradients, by_one = jax.jit(everything, compiler_options=QUICKLY)(nested)
    return logits, flatten_dict(gradients), by_one


def theirs(config, params, tokens, documents):
    """Logits and gradients of the same loss."""
    leaves = {path: torch.tensor(value, dtype=torch.float64, requires_grad=True) for path, value in params.items()}
    tokens, documents = (a if a is None else torch.tensor(np.asarray(a)).long() for a in (tokens, documents))
    logits = reference.logits(dataclasses.asdict(config), leaves, tokens, documents)
    torch.sin(logits * torch.tensor(np.random.default_rng(9).normal(size=11))).sum().backward()
    gradients = {
        path: np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.numpy() for path, leaf in leaves.items()
    }
    return logits.detach().numpy(), gradients


def check(config, seed, with_documents=False):
    params, rng = random_params(config, seed), np.random.default_rng(seed)
    tokens = rng.integers(0, 11, (2, 8), np.int32)
    documents = np.sort(rng.integers(0, 3, (2, 8), np.int32)) if with_documents else None
    logits, gradients, by_one = ours(config, params, tokens, documents)
    expected, their_gradients = theirs(config, params, tokens, documents)
    # sums of float64 in other orders; an RMSNorm of small vectors makes rounding larger
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-11)
    np.testing.assert_allclose(by_one, expected, rtol=0, atol=1e-11)
    assert set(gradients) == set(their_gradients)
    for path, gradient in their_gradients.items():
        size = np.abs(gradient).max()
        np.testing.assert_allclose(gradients[path], gradient, rtol=0, atol=1e-11 * max(size, 1), err_msg=str(path))
    return gradients


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("switch", SWITCHES)
def test_each_switch_agrees_in_logits_and_gradients_and_through_the_cache(switch, with_documents):
    for path, gradient in check(config_of(switch), 1, with_documents).items():
        if path[-2:] != KEY_BIAS or switch == "llama":
            assert np.abs(gradient).max() > 1e-6, f"{path} has no gradient to compare"


ROPE = st.fixed_dictionaries(
    {"positions": st.just("rope"), "rope_theta": st.sampled_from([10_000.0, 50.0])}
) | st.fixed_dictionaries(
    {
        "positions": st.just("rope"),
        "rope_scaling": st.sampled_from(["linear", "llama3"]),
        "rope_factor": st.floats(1, 16),
    }
)
ROPE |= st.fixed_dictionaries(
    {
        "positions": st.just("rope"),
        "rope_scaling": st.just("llama3"),
        "rope_factor": st.floats(1, 16),
        "rope_low_freq": st.floats(0.25, 2),
        "rope_high_freq": st.floats(2.5, 8),
        "rope_original_size": st.integers(4, 400),
    }
)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    positions=ROPE | st.sampled_from([{"positions": "learned"}, {"positions": "none"}]),
    norm=st.sampled_from(["layernorm", "rmsnorm"]),
    norm_eps=st.sampled_from([1e-6, 1e-5, 1e-2]),
    bias=st.sampled_from(["all", "no_qkv", "none", "qkv"]),
    activation=st.sampled_from(list(reference.ACTIVATIONS)),
    mlp=st.sampled_from([{"mlp_ratio": 0}, {"mlp_ratio": 2}, {"mlp_width": 12, "gated": True}, {"gated": True}]),
    sizes=st.fixed_dictionaries(
        {
            "n_kv_head": st.sampled_from([0, 1, 2, 4]),
            "head_size": st.sampled_from([0, 2, 6]),
            "sliding_window": st.integers(0, 8),
            "logit_softcap": st.sampled_from([0.0, 1.0, 30.0]),
            "lm_head": st.sampled_from(["linear", "tied"]),
        }
    ),
    flags=st.fixed_dictionaries(
        {name: st.booleans() for name in ("norm_weight", "qk_norm", "embedding_norm", "value_embeddings")}
    ),
    with_documents=st.booleans(),
)
def test_any_combination_agrees(seed, positions, norm, norm_eps, bias, activation, mlp, sizes, flags, with_documents):
    fields = {"norm": norm, "norm_eps": norm_eps, "bias": bias, "activation": activation, **positions, **mlp}
    gradients = check(GPTConfig(**SIZES | {"n_layer": 1} | fields | sizes | flags), seed, with_documents)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())  # two NaN would count as equal above
