"""Device meshes and shardings: each parameter is sharded by one rule, and batches are split along the data axes.

A mesh has three axes. `data` splits the batch, `fsdp` splits the batch and the parameters, and `tensor` splits the
heads and the hidden channels. XLA's partitioner inserts the collectives.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt.errors import ArgumentError
from jaxgpt.settings.checks import check_fields

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
SPLIT = ("tensor", "fsdp")  # in this order, gathering along fsdp leaves one contiguous part per device of tensor

# Every parameter matches exactly one rule. The vocabulary is not split in storage, as mesh axes need not divide it.
RULES = (
    (r"(token|position)_embedding_table\.embedding", P(None, SPLIT)),
    (r"lm_head\.kernel", P(SPLIT, None)),
    (r"blocks\.\d+\.attn\.value_embedding_table\.embedding", P(None, SPLIT)),
    (r"blocks\.\d+\.(attn\.(query|key|value)|mlp\.(fc|gate))\.kernel", P("fsdp", "tensor")),
    (r"blocks\.\d+\.(attn\.(query|key|value)|mlp\.(fc|gate))\.bias", P("tensor")),
    (r"blocks\.\d+\.(attn|mlp)\.proj\.kernel", P("tensor", "fsdp")),
    (r"blocks\.\d+\.(attn|mlp)\.proj\.bias|lm_head\.bias", P()),
    # adapters: the side of their rank is never split
    (r"blocks\.\d+\.(attn\.(query|key|value)|mlp\.(fc|gate))\.lora_a", P("fsdp", None)),
    (r"blocks\.\d+\.(attn\.(query|key|value)|mlp\.(fc|gate))\.lora_b", P(None, "tensor")),
    (r"blocks\.\d+\.(attn|mlp)\.proj\.lora_a", P("tensor", None)),
    (r"blocks\.\d+\.(attn|mlp)\.proj\.lora_b", P(None, "fsdp")),
    (r"(blocks\.\d+\.(ln_[12]|attn\.(query|key)_norm)|ln_f|embedding_norm)\.(scale|bias)", P()),
)


class MeshError(ArgumentError):
    """The mesh does not fit the devices, or does not divide the sizes of the model or the batch."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; their product is the number of devices used."""

    data: int = -1
    """Devices that split the batch; -1 = all remaining devices."""
    fsdp: int = 1
    """Devices that split the batch, the parameters and the optimizer state; -1 = all remaining devices."""
    tensor: int = 1
    """Devices that split the heads and the hidden channels; -1 = all remaining devices."""

    def __post_init__(self):
        check_fields(self)
        sizes = [getattr(self, axis) for axis in AXES]
        if sizes.count(-1) > 1:
            raise ArgumentError("mesh has several axes of -1: use -1 for only one of them")
        for axis, size in zip(AXES, sizes):
            if size != -1 and size < 1:
                raise ArgumentError(f"{axis} is {size}: use 1 or more devices, or -1 for all remaining devices")


def sizes_of(config: MeshConfig, n_devices: int) -> dict[str, int]:
    """Return the size of each mesh axis, with -1 filled in.

    Args:
        config: as configured.
        n_devices: number of devices available.

    Raises:
        MeshError: the axes need more devices, or do not divide their number.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if fixed > n_devices or (-1 in sizes.values() and n_devices % fixed):
        raise MeshError(
            f"a mesh of {_words(sizes)} does not fit the {n_devices} devices (--mesh): "
            f"use axes whose product divides {n_devices}"
        )
    return {axis: n_devices // fixed if size == -1 else size for axis, size in sizes.items()}


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """Make the mesh of a configuration.

    Args:
        config: as configured.
        devices: the mesh uses the first ones, as many as it needs; None = `jax.devices()`.

    Raises:
        MeshError: the mesh does not fit the devices, or some process would have no device in it.
    """
    devices = jax.devices() if devices is None else devices
    sizes = sizes_of(config, len(devices))
    used = devices[: math.prod(sizes.values())]
    if len({device.process_index for device in used}) != len({device.process_index for device in devices}):
        raise MeshError(
            f"a mesh of {_words(sizes)} leaves processes without a device (--mesh): use all {len(devices)} devices"
        )
    shape = tuple(sizes.values())
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=used)


def _words(sizes: dict[str, int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in sizes.items())


def check_sizes(
    mesh: Mesh, batch_size: int, width: int, n_head: int, n_kv_head: int = 0, mlp_width: int = 0, values: int = 0
) -> None:
    """Check that the mesh divides the sizes of the model and the batch.

    Args:
        mesh: the mesh of the training step.
        batch_size: windows per step.
        width: n_embd of the model.
        n_head: heads per block.
        n_kv_head: heads of keys and values, 0 = n_head.
        mlp_width: hidden channels, 0 = a multiple of width.
        values: channels of the value embeddings, 0 = there are none.

    Raises:
        MeshError: a mesh axis does not divide one of the sizes.
    """
    for name, flag, size, axes in (
        ("batch_size", "data.batch_size", batch_size, BATCH),
        ("n_embd", "model.n_embd", width, SPLIT),
        ("n_head", "model.n_head", n_head, ("tensor",)),
        ("n_kv_head", "model.n_kv_head", n_kv_head, ("tensor",)),
        ("mlp_width", "model.mlp_width", mlp_width, ("tensor",)),
        ("n_kv_head * head_size", "model.head_size", values, SPLIT),
    ):
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            near = sorted({max(size // parts, 1) * parts, (size // parts + 1) * parts})
            raise MeshError(
                f"{name} {size} is not divisible by the {parts} devices of the mesh axes "
                f"{' x '.join(axes)} (--{flag}): use {' or '.join(map(str, near))}, or "
                f"--mesh.{axes[0]} {math.gcd(size, parts)}"
            )


def name_of(path: tuple) -> str:
    """Return the dotted name of a leaf; an optimizer moment has the name of its parameter."""
    return ".".join(str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey))


def spec_of(name: str) -> P:
    """Return the PartitionSpec of the parameter with this name.

    Raises:
        LookupError: not exactly one rule matches the name.
    """
    found = [spec for pattern, spec in RULES if re.fullmatch(pattern, name)]
    if len(found) != 1:
        raise LookupError(f"{len(found)} rules match the parameter {name!r}")
    return found[0]


def specs(tree: Any) -> Any:
    """Return the PartitionSpec of each leaf of a tree of parameters, optimizer moments and counters."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: spec_of(name_of(path)) if leaf.ndim else P(), tree)


def shardings(mesh: Mesh, tree: Any) -> Any:
    """Return the NamedSharding of each leaf on a mesh, for `out_shardings` and for restoring a checkpoint."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree))


def _mesh() -> AbstractMesh | None:
    """The mesh that XLA's partitioner splits the work over; None inside `mean_over_devices`."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or AxisType.Manual in mesh.axis_types else mesh


def takes_mean_over_devices(mesh: Mesh, dropout: float) -> bool:
    """Whether a step on this mesh uses `mean_over_devices`: only if CPU devices split the batch and nothing else.

    On GPU and TPU the partitioner is just as fast. With dropout it cannot be used, because the masks are drawn for the
    whole batch, of which a single device sees only a part.
    """
    cpus = all(device.platform == "cpu" for device in mesh.devices.flat)
    return cpus and mesh.shape["data"] == mesh.size > 1 and not dropout


def mean_over_devices(function: Callable[..., Any]) -> Callable[..., Any]:
    """Under jit: run `function(shared, batch, key, ...)` on each device's part of the batch, and average the results.

    All arrays are averaged in one collective, as one long vector. The partitioner would use one collective per
    parameter, which on a CPU costs as much as the second core gains: on two cores, 1.0x instead of 1.2x the steps per
    second of configs/shakespeare_cpu.yaml.
    """

    def mean(*args):
        vector, restore = ravel_pytree(function(*args))
        return restore(jax.lax.pmean(vector, "data"))

    def call(shared, batch, *others):
        in_specs = (P(), P("data"), *(P() for _ in others))
        return jax.shard_map(mean, in_specs=in_specs, out_specs=P(), check_vma=False)(shared, batch, *others)

    return call


def pin(tree: Any) -> Any:
    """Under jit: constrain a tree of parameters to the shardings of its rules. Without a mesh, do nothing."""
    if _mesh() is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, specs(tree))


def pin_batch(x: jax.Array) -> jax.Array:
    """Under jit: split (B, ...) activations along the batch. Without a mesh, or if it does not divide B, do nothing."""
    mesh = _mesh()
    if mesh is None or x.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH):
        return x
    return jax.lax.with_sharding_constraint(x, P(BATCH))


def map_over_devices(function: Callable[[jax.Array], jax.Array], stack: jax.Array) -> jax.Array:
    """Under jit: apply a function to a stack of matrices, of which each device computes its share.

    Args:
        function: maps (N, I, O) to the same shape, each matrix by itself.
        stack: (n, I, O), the matrices of the blocks, sharded by their rules.

    Returns:
        (n, I, O), sharded as they are.
    """
    mesh = _mesh()
    if mesh is None or mesh.size == 1:
        return function(stack)
    # One mesh axis after the other moves from the matrices to the stack, or back: each device sends only what another
    # one needs. In one step, the partitioner would gather the whole stack on each device.
    ways = P(None, "fsdp", "tensor"), P("fsdp", None, "tensor"), P(("fsdp", "tensor")), P(("fsdp", "tensor", "data"))
    x = jnp.pad(stack, ((0, -len(stack) % mesh.size), (0, 0), (0, 0)))
    for spec in ways:
        x = jax.lax.with_sharding_constraint(x, spec)
    x = function(x)
    for spec in reversed(ways):
        x = jax.lax.with_sharding_constraint(x, spec)
    return x[: len(stack)]


def whole_batches(rows: int) -> int:
    """Return the smallest number of rows, from `rows` on, that the devices of the mesh can split."""
    mesh = _mesh()
    parts = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH)
    return -(-rows // parts) * parts


def padded(vocab_size: int, tensor: int) -> int:
    """Return the padded vocabulary size: a multiple of `tensor`, and also of a matrix unit's tile if it is large.

    A small vocabulary is not padded to whole tiles, because most of the result would be padding.
    """
    multiple = tensor if vocab_size < 1024 else math.lcm(128, tensor)
    return -(-vocab_size // multiple) * multiple


def for_compute(params: dict[str, Any], dtype: jnp.dtype | None = None) -> dict[str, Any]:
    """Under jit: lay out the parameters for the forward pass, with embeddings and head split along a padded vocabulary.

    The model drops the logits of the padding. The matrices of the blocks stay as they are: the partitioner gathers them
    where they are multiplied, after they were rounded.

    Args:
        params: nested dict of parameters.
        dtype: of what the devices send each other; None = as the parameters. Gradients have the parameters' dtype.
    """
    mesh = _mesh()
    if mesh is None:
        return params
    # the array axis of the vocabulary in the leaves that have one
    axes = {"token_embedding_table.embedding": 0, "lm_head.kernel": 1, "lm_head.bias": 0}

    def lay_out(path, leaf):
        name = name_of(path)
        if name == "position_embedding_table.embedding":
            return jax.lax.with_sharding_constraint(leaf, P())
        if name.endswith("value_embedding_table.embedding"):  # by heads, as the values that they are added to
            return jax.lax.with_sharding_constraint(leaf, P(None, "tensor"))
        if (axis := axes.get(name)) is None:
            return leaf
        widths = [(0, 0)] * leaf.ndim
        widths[axis] = (0, padded(leaf.shape[axis], mesh.shape["tensor"]) - leaf.shape[axis])
        spec = P(*("tensor" if i == axis else None for i in range(leaf.ndim)))
        if leaf.ndim == 1:
            return jax.lax.with_sharding_constraint(jnp.pad(leaf, widths), spec)
        # Gather along fsdp, pad, and only then move the split from channels to ids. The partitioner would gather the
        # whole array if we did all in one step, or if the devices did not divide the number of ids.
        channels = P(*("tensor" if i != axis else None for i in range(2)))
        leaf = jnp.pad(jax.lax.with_sharding_constraint(leaf, channels), widths)
        return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(leaf, channels), spec)

    def lay_out_rounded(path, leaf):
        name = name_of(path)
        moves = mesh.size > mesh.shape["data"] and name.endswith(("embedding", "lm_head.kernel"))
        if not moves or dtype in (None, leaf.dtype):
            return lay_out(path, leaf)
        return _rounded_first(dtype, spec_of(name), partial(lay_out, path), leaf)

    return jax.tree_util.tree_map_with_path(lay_out_rounded, params)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _rounded_first(dtype, spec, move, leaf):
    """`move(leaf)`, rounded before it moves; its gradient, a sum over devices, is not rounded."""
    # without the constraint, the partitioner would move the array and then round it
    return move(jax.lax.with_sharding_constraint(leaf.astype(dtype), spec)).astype(leaf.dtype)


_rounded_first.defvjp(
    lambda dtype, spec, move, leaf: (_rounded_first(dtype, spec, move, leaf), leaf),
    lambda dtype, spec, move, leaf, gradient: jax.linear_transpose(move, leaf)(gradient),
)


def place(mesh: Mesh, array: np.ndarray) -> jax.Array:
    """Replicate an array on all devices of the mesh; every process must hold the same array."""
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, P()), lambda index: array[index])
