"""Ahead-of-time compilation of the training step, for the devices of this machine or for absent TPUs.

Nothing is put on a device: the compiler gets only shapes. The TPU compiler is in the libtpu wheel and needs no TPU.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt import step
from jaxgpt.config import Config, ConfigError
from jaxgpt.data import Windows
from jaxgpt.devices import attention, chips, sharding
from jaxgpt.init import abstract_frozen
from jaxgpt.tools import traffic
from jaxgpt.training import specify

MOST_CHIPS = 256
ABSENT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",  # otherwise libtpu queries the metadata server of a Google machine
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another process may be compiling or training
}


class Target(NamedTuple):
    """The devices to plan for."""

    name: str
    devices: list[jax.Device] | None
    """None if there is no compiler for them."""
    n: int
    chip: chips.Chip | None
    platform: str
    """JAX's name: cpu, gpu or tpu."""

    @property
    def room(self) -> int | None:
        """Bytes of memory per device that JAX uses; by default, it reserves only a part of a GPU's memory."""
        return self.chip and int(self.chip.memory * (0.75 if self.platform == "gpu" else 1))


@dataclasses.dataclass(frozen=True)
class Needs:
    """The memory and traffic of one device for one step; unknown numbers are None."""

    arguments: int
    """Bytes of state, frozen parameters and tokens."""
    temporaries: int | None
    """Bytes of the rest: activations, gradients, and the program."""
    moved: int | None
    """Bytes per step between chip and memory."""
    moved_at_most: bool
    """Whether `moved` is XLA's count, which includes data that stays on the chip."""
    fits: bool | None
    """Whether a step fits: as a TPU's compiler found; otherwise, whether `total` fits the chip's memory."""

    @property
    def total(self) -> int | None:
        """Bytes of memory."""
        return None if self.temporaries is None else self.arguments + self.temporaries


def find_target(name: str | None) -> Target:
    """Find the devices that `--target` names.

    Args:
        name: `v5e:2x4` (TPU, chips along each axis), `h200:8` (number of GPUs), or None for this machine's devices.

    Raises:
        ConfigError: there is no such target, or its compiler is not installed.
    """
    if name is None:
        devices = jax.devices()
        kind = devices[0].device_kind
        return Target(f"{len(devices)} x {kind}", devices, len(devices), chips.find(kind), devices[0].platform)
    found = re.fullmatch(r"([\w-]+):(\d+(?:x\d+)*)", name)
    chip = chips.named(found[1]) if found else None
    n = math.prod(map(int, found[2].split("x"))) if found else 0
    axes = 0 if chip is None or chip.platform == "gpu" else 3 if chip.name in ("v4", "v5p") else 2
    if chip is None or not 1 <= n <= MOST_CHIPS or found[2].count("x") != max(axes - 1, 0) or chip.name == "v4":
        gpus = ", ".join(chip.name for chip in chips.CHIPS if chip.platform == "gpu")
        raise ConfigError(
            f"no such target (--target, {name}): write v5e:2x4, v6e:2x4 or v5p:2x2x1 with up to {MOST_CHIPS} chips "
            f"in total, v5e:1x1 for one chip, or h200:8 (GPUs: {gpus}), or leave it out for this machine"
        )
    return Target(name, _topology(name) if axes else None, n, chip, chip.platform)


def _topology(name: str) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(f"no TPU compiler here (--target, {name}): pip install 'jaxgpt[tpu-compile]'")
    for key, value in ABSENT_TPU.items():
        os.environ.setdefault(key, value)
    jax.config.update("jax_platforms", "cpu")  # do not claim a TPU or GPU of this machine
    from jax.experimental import topologies

    # libtpu would otherwise take a single chip for a part of a larger host
    host = {"chips_per_host_bounds": [1, 1, 1]} if name.endswith((":1x1", ":1x1x1")) else {}
    try:
        return list(topologies.get_topology_desc(name, platform="tpu", **host).devices)
    except (RuntimeError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise ConfigError(f"libtpu knows no such target (--target, {name}, {why}): try 1x1, 2x2, 2x4, 16x16") from None


def kernel_of(config: Config, platform: str) -> attention.Kernel:
    """Return the attention kernel that training would use.

    Args:
        config: resolved configuration.
        platform: cpu, gpu or tpu.
    """
    model = config.model
    if model.attention_rate:  # no kernel has dropout
        return "xla"
    sizes = model.block_size, model.channels_per_head
    kernel = attention.choose(model.attention, platform, jnp.dtype(config.train.dtype), *sizes)
    return "xla" if kernel == "cudnn" and config.data.documents == "separate" else kernel  # it takes no documents


def compile_step(config: Config, target: Target, tokens: int | None) -> Needs:
    """Compile one step of `train_steps`, as training does.

    Args:
        config: resolved configuration.
        target: a target with devices.
        tokens: number of tokens of the training split if each device holds it; None if batches come from the host.

    Raises:
        MeshError: the mesh does not fit the devices, the batch or the model.
    """
    mesh = sharding.make_mesh(config.mesh, target.devices)
    with jax.set_mesh(mesh):
        spec, state = specify(config, mesh, target.platform)
        frozen = abstract_frozen(config.model, config.lora, mesh)
        dtype = np.min_scalar_type(config.model.vocab_size - 1)
        windows, key = _shapes(config, dtype, mesh, tokens is not None)
        lowered = step.train_steps.lower(state, windows, key, frozen, spec=spec)
    split = (tokens or 0) * dtype.itemsize
    held = split + sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                       for leaf in jax.tree.leaves((state, windows, frozen)))  # fmt: skip
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        match = re.search(r"temporaries \(([\d.]+)([KMG])\)", str(error))
        temporaries = match and int(float(match[1]) * 1024 ** ("KMG".index(match[2]) + 1))
        return Needs(held, temporaries, None, False, False)
    memory = compiled.memory_analysis()
    temporaries = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    temporaries += max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)  # the donated state is reused
    fits = True if target.platform == "tpu" else target.room and held + temporaries <= target.room
    return Needs(split + memory.argument_size_in_bytes, temporaries, *_moved(compiled), fits)


def _moved(compiled: jax.stages.Compiled) -> tuple[int | None, bool]:
    try:
        return traffic.bytes_moved(compiled.as_text()), False
    except jax.errors.JaxRuntimeError:  # jaxlib cannot read the newer program format of some libtpu versions
        counted = (compiled.cost_analysis() or {}).get("bytes accessed")
        return counted and int(counted), True


def _shapes(config: Config, dtype: np.dtype, mesh: jax.sharding.Mesh, replicated: bool):
    """The windows of one step and the key of `train_steps`, as `ShapeDtypeStruct`s with shardings."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    rows = config.data.batch_size * config.optim.grad_accumulation
    shape, where = (1, rows, config.model.block_size + 1), P() if replicated else P(None, sharding.BATCH)
    windows = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, where))
    if config.data.documents == "separate":
        windows = Windows(windows, jax.ShapeDtypeStruct(shape, np.int32, sharding=windows.sharding))
    return windows, jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(mesh, P()))


def estimate_step(config: Config, target: Target, parameters: int, adapters: int = 0) -> Needs:
    """Estimate, without a compiler, the memory of one step from the sizes of the arrays that it keeps.

    Args:
        config: resolved configuration.
        target: a target without devices.
        parameters: number of parameters of the model.
        adapters: number of those that LoRA trains; 0 = all are trained.

    Returns:
        A rough estimate, without traffic.
    """
    sizes = sharding.sizes_of(config.mesh, target.n)
    model = config.model
    item = jnp.dtype(config.train.dtype).itemsize
    trained = adapters or parameters
    # with two moments, and perhaps an average, all float32
    numbers = parameters + (3 if config.optim.ema_decay else 2) * trained
    if config.optim.optimizer == "muon":  # which has one moment
        numbers -= model.n_layer * (model.attention_parameters + model.feed_forward_parameters)
    state = 4 * numbers // (sizes["fsdp"] * sizes["tensor"])
    copies = (4 * trained + item * parameters) // sizes["tensor"]  # gradients, and parameters cast to the compute dtype
    # channels per token that a layer keeps: of the stream (twice), its norms and the outputs of the branches; queries,
    # keys and values, and what attention makes of them; hidden channels before and after their activation and gate
    C, D, hidden = model.width, model.channels_per_head, model.hidden
    qkv, hidden_arrays = (model.n_head + 2 * model.kv_heads) * D, 1 + model.gated
    kept = {
        "none": 5 * C + qkv + model.n_head * D + 2 * hidden_arrays * hidden,
        "dots": 3 * C + qkv + hidden_arrays * hidden,
        "full": C,
    }[model.remat] * model.n_layer
    if model.remat == "none" and kernel_of(config, target.platform) == "xla":
        kept += 2 * model.n_head * model.block_size * model.n_layer
    logits = 4 * model.vocab_size // config.train.loss_chunks
    tokens = config.data.batch_size * model.block_size // (sizes["data"] * sizes["fsdp"])
    temporaries = copies + tokens * (item * kept + logits) // sizes["tensor"]
    return Needs(state, temporaries, None, False, state + temporaries <= target.room)
