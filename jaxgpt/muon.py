"""Muon, the optimizer of the blocks' matrices: momentum, made orthogonal.

The step O of a matrix should lower the loss most among all steps that change no vector by more than its own length.
With the gradient G, that is the O with the largest sum of G * O under spectral norm 1: for the singular value
decomposition G = U S V', it is O = U V' (Bernstein and Newhouse). All its singular values are 1, where those of a
gradient span many orders of magnitude: directions that are rare in the data are learned as fast as the others.

A decomposition is slow, so U V' is approximated by Newton-Schulz iterations (Jordan et al.). An odd polynomial of a
matrix, p(X) = a X + b (X X') X + c (X X')^2 X, changes its singular values only: p(U S V') = U p(S) V'. The
coefficients are Jordan's. Their large slope at 0 lifts a small singular value 3.4 times per iteration. After five
iterations, values from 0.006 to 1 are between 0.68 and 1.13: not 1, but close enough for a step.

Of an orthogonal matrix, the root mean square of the entries is 1 / sqrt(max(rows, columns)). The step is scaled to
0.2, about that of AdamW's steps, so that one learning rate and one weight decay serve both (Liu et al.).

Sources: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; Bernstein and Newhouse 2024,
"Old optimizer, new norm: an anthology"; Liu et al. 2025, "Muon is scalable for LLM training".
"""

from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxgpt.devices import sharding

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
ROOT_MEAN_SQUARE = 0.2
EPSILON = 1e-12  # far below any gradient's norm, so that only a matrix of zeros keeps its length


def mask(params: Any) -> Any:
    """Mark the parameters that Muon trains: the matrices of the blocks' linear layers, without tables.

    Args:
        params: a tree of parameters.

    Returns:
        The same tree of booleans.
    """

    def is_matrix(path, _):
        name = sharding.name_of(path)
        return name.startswith("blocks.") and name.endswith(".kernel")

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def muon(learning_rate: optax.Schedule, momentum: float, weight_decay: float) -> optax.GradientTransformation:
    """Build Muon, with Nesterov momentum and decoupled weight decay.

    Args:
        learning_rate: a function from the step to the rate.
        momentum: part of the sum of earlier gradients that is kept at each step.
        weight_decay: as AdamW's.

    Returns:
        A transformation of a tree of matrices. Its state is one such tree, and the number of updates.
    """
    return optax.chain(
        optax.trace(momentum, nesterov=True),
        optax.stateless(lambda updates, _: orthogonal(updates)),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def orthogonal(updates: Any) -> Any:
    """Make each matrix of a tree orthogonal, and scale it. Matrices of equal shape are computed together.

    Args:
        updates: a tree of matrices, each (I, O) float32.

    Returns:
        A tree of the same shapes.
    """
    leaves, structure = jax.tree.flatten(updates)
    groups = defaultdict(list)
    for i, leaf in enumerate(leaves):
        groups[tuple(sorted(leaf.shape))].append(i)
    for (rows, columns), members in groups.items():
        stack = jnp.stack([leaves[i] if leaves[i].shape == (rows, columns) else leaves[i].T for i in members])
        stack = ROOT_MEAN_SQUARE * columns**0.5 * sharding.map_over_devices(newton_schulz, stack)
        for i, matrix in zip(members, jnp.unstack(stack)):
            leaves[i] = matrix if leaves[i].shape == (rows, columns) else matrix.T
    return jax.tree.unflatten(structure, leaves)


def newton_schulz(x: jax.Array) -> jax.Array:
    """Move the singular values of matrices towards 1, by five iterations of a polynomial.

    With A = X X' and Q = a I + b A + c A^2, an iteration is X <- Q X. As Q and A commute, A <- Q A Q is the next A:
    for wide matrices, it is cheaper to multiply only the small Q and A, and X once, by the product of all Q.

    Args:
        x: (n, R, C) float32 with R <= C.

    Returns:
        The same shape.
    """
    rows, columns = x.shape[1:]
    identity, (a, b, c) = jnp.eye(rows, dtype=x.dtype), COEFFICIENTS

    def product(p, q):
        # float32 on GPUs and TPUs, too: the form for wide matrices can enlarge what bfloat16 rounds a hundred times
        return jnp.matmul(p, q, precision=jax.lax.Precision.HIGHEST)

    def factor(gram):
        return a * identity + b * gram + c * product(gram, gram)

    x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + EPSILON)
    if columns < 1.5 * rows:  # 5 * (2 R R C + R R R) multiplications, below they are 2 R R C + 17 R R R
        for _ in range(ITERATIONS):
            x = product(factor(product(x, x.mT)), x)
        return x
    gram = product(x, x.mT)
    q = total = factor(gram)
    for _ in range(ITERATIONS - 1):
        gram = product(q, product(gram, q))
        q = factor(gram)
        total = product(q, total)
    return product(total, x)
