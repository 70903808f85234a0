"""CPU cores as JAX devices, which split the batch of a step like any other devices, and compute large ones in parts.

On two cores the devices give 1.1x the steps per second of configs/shakespeare_cpu.yaml, and 1.6x those of the lecture's
deeper rungs: `python benchmarks/tricks.py devices`. The parts give 1.14x those of configs/lecture/scaled.yaml, in a
fifth of the memory: `python benchmarks/tricks.py parts --config lecture/scaled`.
"""

import contextlib
import dataclasses
import os
import pathlib

import jax
from jax.sharding import Mesh

from jaxgpt.devices.sharding import MeshConfig

WORTH = 30e6  # FLOPs per step in the blocks; below this, devices wait for each other longer than they compute
PART = 16 << 20  # bytes of the widest activation in a part of a batch
STATE = 4 << 30  # bytes that all the devices' copies of the parameters and optimizer moments may take together


def count() -> int:
    """Return the number of cores that CPU affinity and the container's quota allow this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # ValueError: no quota, or an unknown format
        quota, period = map(int, pathlib.Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cores = min(cores, max(quota // period, 1))
    return cores


def as_devices(mesh: MeshConfig, block_parameters: int, batch_size: int, block_size: int) -> MeshConfig:
    """Expose each CPU core as a JAX device, and return the mesh with as many of them as the run should use.

    The mesh is returned unchanged on GPUs and TPUs, with several processes, and if the environment already sets the
    number of CPU devices.

    Args:
        mesh: as configured.
        block_parameters: number of parameters in the model's blocks, without the embeddings and the head.
        batch_size: windows per step.
        block_size: tokens per window.
    """
    told = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if jax.distributed.is_initialized() or told or "JAX_NUM_CPU_DEVICES" in os.environ:
        return mesh
    if jax.config.jax_num_cpu_devices < 1:
        with contextlib.suppress(RuntimeError):  # a backend is already running
            jax.config.update("jax_num_cpu_devices", count())
    if jax.default_backend() != "cpu":
        return mesh
    return divide(mesh, block_parameters, batch_size, block_size, jax.device_count())


def divide(mesh: MeshConfig, block_parameters: int, batch_size: int, block_size: int, n_devices: int) -> MeshConfig:
    """Choose how many cores of one CPU share the batch, and return the mesh with that size for `data`.

    It is the largest number of cores that divides the batch. It is 1 if the steps are too short to be worth splitting,
    and smaller if the copies of a large model would fill the memory.

    Args:
        mesh: as configured; if its sizes are not the defaults, it is returned unchanged.
        block_parameters: number of parameters in the model's blocks, without the embeddings and the head.
        batch_size: windows per step.
        block_size: tokens per window.
        n_devices: number of cores exposed as devices.
    """
    if (mesh.data, mesh.fsdp, mesh.tensor) != (-1, 1, 1):
        return mesh
    if 6 * block_parameters * batch_size * block_size < WORTH:
        return dataclasses.replace(mesh, data=1)
    most = min(n_devices, batch_size, max(STATE // (16 * block_parameters), 1))
    return dataclasses.replace(mesh, data=max(n for n in range(1, most + 1) if batch_size % n == 0))


def parts(mesh: Mesh, batch_size: int, window: int) -> int:
    """Choose in how many parts, one after the other, CPU devices compute a batch; other devices take it as a whole.

    For the activations of a large batch, the system provides and clears gigabytes in each call. A part finds those of
    the part before it, which are still in a cache or near.

    Args:
        mesh: of the run; each of its devices takes equally many windows of each part.
        batch_size: windows per batch.
        window: bytes that the widest activation of a window takes.
    """
    if any(device.platform != "cpu" for device in mesh.devices.flat):
        return 1
    each = mesh.shape["data"] * mesh.shape["fsdp"]
    possible = [n for n in range(1, batch_size + 1) if batch_size % (n * each) == 0]
    return next((n for n in possible if batch_size // n * window <= PART), possible[-1])
