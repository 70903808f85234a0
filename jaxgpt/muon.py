"""Muon, the optimizer of the blocks' matrices: momentum, made orthogonal.

The step O of a matrix should lower the loss most among all steps that change no vector by more than its own length.
With the gradient G, that is the O with the largest sum of G * O under spectral norm 1: for the singular value
decomposition G = U S V', it is O = U V' (Bernstein and Newhouse). All its singular values are 1, where those of a
gradient span many orders of magnitude: directions that are rare in the data are learned as fast as the others.

A decomposition is slow, so U V' is approximated by Newton-Schulz iterations (Jordan et al.). An odd polynomial of a
matrix, p(X) = a X + b (X X') X + c (X X')^2 X, changes its singular values only: p(U S V') = U p(S) V'. Each iteration
has its own coefficients: those whose largest distance from 1 is smallest over all values that the iterations before
it can leave (Amsel et al.). So three iterations do for 128 rows, and four for 768, where the same coefficients each
time take five.

Of an orthogonal matrix, the root mean square of the entries is 1 / sqrt(max(rows, columns)). The step is scaled to
0.2, about that of AdamW's steps, so that one learning rate and one weight decay serve both (Liu et al.).

Sources: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; Bernstein and Newhouse 2024,
"Old optimizer, new norm: an anthology"; Liu et al. 2025, "Muon is scalable for LLM training"; Amsel et al. 2025, "The
Polar Express: optimal matrix sign methods and their application to the Muon algorithm".
"""

import functools
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgpt.devices import sharding

SMALLEST = 0.1  # singular value that is moved near 1, as a part of the root mean square of a matrix's values
NEAR = 1 / 3  # how far from 1 the values may end
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


@functools.cache
def coefficients(rows: int) -> list[tuple[float, float, float]]:
    """Compute a, b and c of each iteration, by the algorithm of Remez.

    On an interval, the polynomial that is nearest to 1 everywhere is as far from 1 at both ends as at its two turning
    points, on alternating sides. The interval that it leaves is the next iteration's.

    Args:
        rows: of the matrices, the smaller side. With norm 1, their singular values have root mean square
            1 / sqrt(rows).

    Returns:
        The coefficients of as many iterations as bring values from SMALLEST of that mean on to within NEAR of 1.
    """
    found, low, high = [], SMALLEST / rows**0.5, 1.0
    while 1 - low > NEAR:
        turning = np.array([3 * low + high, low + 3 * high]) / 4
        for _ in range(30):
            s = np.array([low, *turning, high])
            a, b, c, _ = np.linalg.solve(np.stack([s, s**3, s**5, [1, -1, 1, -1]], axis=1), np.ones(4))
            turning = np.sqrt((-3 * b + np.array([-1, 1]) * np.sqrt(9 * b * b - 20 * a * c)) / (10 * c))
        low = a * low + b * low**3 + c * low**5
        high = 2 - low
        found.append((float(a), float(b), float(c)))
    return found


def newton_schulz(x: jax.Array) -> jax.Array:
    """Move the singular values of matrices towards 1, by one polynomial after the other.

    With A = X X' and Q = a I + b A + c A^2, an iteration is X <- Q X. As Q and A commute, A <- Q A Q is the next A:
    for wide matrices, it is cheaper to multiply only the small Q and A, and X once, by the product of all Q.

    Args:
        x: (n, R, C) float32 with R <= C.

    Returns:
        The same shape.
    """
    rows, columns = x.shape[1:]
    identity, (first, *others) = jnp.eye(rows, dtype=x.dtype), coefficients(rows)

    def product(p, q):
        # float32 on GPUs and TPUs, too: the form for wide matrices can enlarge what bfloat16 rounds a hundred times
        return jnp.matmul(p, q, precision=jax.lax.Precision.HIGHEST)

    def factor(gram, a, b, c):
        return a * identity + b * gram + c * product(gram, gram)

    x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + EPSILON)
    if columns < 1.5 * rows:  # n (2 R R C + R R R) multiplications, below they are 2 R R C + (4 n - 3) R R R
        for each in (first, *others):
            x = product(factor(product(x, x.mT), *each), x)
        return x
    gram = product(x, x.mT)
    q = total = factor(gram, *first)
    for each in others:
        gram = product(q, product(gram, q))
        q = factor(gram, *each)
        total = product(q, total)
    return product(total, x)
