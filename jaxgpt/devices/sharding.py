"""Meshes of devices, and what lives where on them: one rule for each parameter, batches along the data axes.

A mesh has three axes. `data` splits the batch, `fsdp` the batch and the parameters, `tensor` the heads and the hidden
channels. XLA's partitioner writes the communication.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt.errors import ArgumentError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
SPLIT = ("tensor", "fsdp")  # in this order, gathering along fsdp leaves one part for each of tensor

# Every parameter matches one rule. The vocabulary, which no axis need divide, is not split in storage.
RULES = (
    (r"(token|position)_embedding_table\.embedding", P(None, SPLIT)),
    (r"lm_head\.kernel", P(SPLIT, None)),
    (r"blocks\.\d+\.(attn\.(query|key|value)|mlp\.fc)\.kernel", P("fsdp", "tensor")),
    (r"blocks\.\d+\.(attn\.(query|key|value)|mlp\.fc)\.bias", P("tensor")),
    (r"blocks\.\d+\.(attn|mlp)\.proj\.kernel", P("tensor", "fsdp")),
    (r"blocks\.\d+\.(attn|mlp)\.proj\.bias|lm_head\.bias", P()),
    (r"(blocks\.\d+\.ln_[12]|ln_f)\.(scale|bias)", P()),
)


class MeshError(ArgumentError):
    """The devices, the mesh, and the sizes of model and batch do not go together."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices share the work; the product of the axes is the number of devices used."""

    data: int = -1
    """Devices that split the batch; -1 = all that are left."""
    fsdp: int = 1
    """Devices that split the batch, and the parameters and the optimizer's state too; -1 = all that are left."""
    tensor: int = 1
    """Devices that split the heads and the hidden channels; -1 = all that are left."""

    def __post_init__(self):
        sizes = [getattr(self, axis) for axis in AXES]
        if sizes.count(-1) > 1:
            raise ArgumentError("mesh has several axes of -1: let one of them take all that are left")
        for axis, size in zip(AXES, sizes):
            if size != -1 and size < 1:
                raise ArgumentError(f"{axis} is {size}: use 1 or more devices, or -1 for all that are left")


def sizes_of(config: MeshConfig, n_devices: int) -> dict[str, int]:
    """The size of each axis on so many devices.

    Raises:
        MeshError: there are too few devices, or a number that the axes do not divide.
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
    """The mesh of a configuration, on all devices (jax's by default) or on the first ones that it takes.

    Raises:
        MeshError: the devices do not fit, or a process would have none.
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


def check_sizes(mesh: Mesh, batch_size: int, width: int, n_head: int) -> None:
    """Find what a mesh cannot divide.

    Raises:
        MeshError: naming the size, the axis and the remedy.
    """
    for name, size, axes in (
        ("data.batch_size", batch_size, BATCH),
        ("model.n_embd", width, SPLIT),
        ("model.n_head", n_head, ("tensor",)),
    ):
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            near = sorted({max(size // parts, 1) * parts, (size // parts + 1) * parts})
            raise MeshError(
                f"{name.split('.')[1]} {size} is not divisible by the {parts} devices of the mesh axes "
                f"{' x '.join(axes)} (--{name}): use {' or '.join(map(str, near))}, or "
                f"--mesh.{axes[0]} {math.gcd(size, parts)}"
            )


def name_of(path: tuple) -> str:
    """The dotted name of a leaf; a moment of the optimizer has its parameter's."""
    return ".".join(str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey))


def spec_of(name: str) -> P:
    """The axes along which a parameter is split.

    Raises:
        LookupError: not exactly one rule matches the name.
    """
    found = [spec for pattern, spec in RULES if re.fullmatch(pattern, name)]
    if len(found) != 1:
        raise LookupError(f"{len(found)} rules match the parameter {name!r}")
    return found[0]


def specs(tree: Any) -> Any:
    """The PartitionSpec of each leaf of a tree of parameters, moments and counters."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: spec_of(name_of(path)) if leaf.ndim else P(), tree)


def shardings(mesh: Mesh, tree: Any) -> Any:
    """The same on a mesh, for `out_shardings` and for restoring."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree))


def _mesh() -> AbstractMesh | None:
    """The mesh over which XLA's partitioner is at work; None inside of `mean_over_devices`."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or AxisType.Manual in mesh.axis_types else mesh


def takes_mean_over_devices(mesh: Mesh, dropout: float) -> bool:
    """Whether a step on this mesh takes `mean_over_devices`: CPU devices that share nothing but the batch.

    On GPU and TPU the partitioner does as well. Dropout masks are drawn for the whole batch, which a device alone
    does not see.
    """
    cpus = all(device.platform == "cpu" for device in mesh.devices.flat)
    return cpus and mesh.shape["data"] == mesh.size > 1 and not dropout


def mean_over_devices(function: Callable[..., Any]) -> Callable[..., Any]:
    """Under jit: `function(shared, batch, key)` on each device's part of the batch, and the mean of what they return.

    The mean of all arrays is taken as one of a long vector. The partitioner would take one for each parameter, and
    lose on a CPU what the second core gains: 1.2x against 1.0x of configs/shakespeare_cpu.yaml on two cores.
    """

    def mean(*args):
        vector, restore = ravel_pytree(function(*args))
        return restore(jax.lax.pmean(vector, "data"))

    return jax.shard_map(mean, in_specs=(P(), P("data"), P()), out_specs=P(), check_vma=False)


def pin(tree: Any) -> Any:
    """Under jit: keep a tree of parameters where its rules say. Without a mesh, nothing."""
    if _mesh() is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, specs(tree))


def pin_batch(x: jax.Array) -> jax.Array:
    """Under jit: split (B, ...) activations along the batch. Without a mesh, or where it does not divide B, nothing."""
    mesh = _mesh()
    if mesh is None or x.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH):
        return x
    return jax.lax.with_sharding_constraint(x, P(BATCH))


def padded(vocab_size: int, tensor: int) -> int:
    """The rows that a table of `vocab_size` is computed with: divisible by `tensor`, and large ones by 128 too.

    Matrix units work on tiles of up to 128; a small vocabulary would be mostly padding.
    """
    multiple = tensor if vocab_size < 1024 else math.lcm(128, tensor)
    return -(-vocab_size // multiple) * multiple


def for_compute(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters as the model computes with them: tables and head split along a padded vocabulary.

    The model cuts the logits of the padding off again.
    """
    mesh = _mesh()
    if mesh is None:
        return params
    # leaf -> the axis of the vocabulary, None where there is none
    axes = {"token_embedding_table.embedding": 0, "lm_head.kernel": 1, "lm_head.bias": 0}

    def lay_out(path, leaf):
        name = name_of(path)
        if name == "position_embedding_table.embedding":
            return jax.lax.with_sharding_constraint(leaf, P())
        if (axis := axes.get(name)) is None:
            return leaf
        widths = [(0, 0)] * leaf.ndim
        widths[axis] = (0, padded(leaf.shape[axis], mesh.shape["tensor"]) - leaf.shape[axis])
        spec = P(*("tensor" if i == axis else None for i in range(leaf.ndim)))
        if leaf.ndim == 1:
            return jax.lax.with_sharding_constraint(jnp.pad(leaf, widths), spec)
        # Gather along fsdp, pad, and only then exchange channels for ids: for one larger move, or a move of a number of
        # ids that the devices do not divide, the partitioner would gather everything.
        channels = P(*("tensor" if i != axis else None for i in range(2)))
        leaf = jnp.pad(jax.lax.with_sharding_constraint(leaf, channels), widths)
        return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(leaf, channels), spec)

    return jax.tree_util.tree_map_with_path(lay_out, params)


def place(mesh: Mesh, array: np.ndarray) -> jax.Array:
    """Put an array that every process has on each device of the mesh."""
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, P()), lambda index: array[index])
