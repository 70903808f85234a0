"""The cores of a CPU as devices of jax, which share the batch of a step like any other devices.

1.2x the steps a second of configs/shakespeare_cpu.yaml on two cores, 2x those of the lecture's deeper rungs:
`python benchmarks/tricks.py devices`.
"""

import contextlib
import dataclasses
import os
import pathlib

import jax

from jaxgpt.devices.sharding import MeshConfig
from jaxgpt.model import GPTConfig

WORTH = 30e6  # FLOPs of a step in the blocks; below, devices wait for each other longer than they compute
STATE = 4 << 30  # bytes that the devices' copies of the parameters and their moments may take together


def count() -> int:
    """The cores that this process may use, as far as affinity and the container's quota tell."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # ValueError: no quota, or another form of it
        quota, period = map(int, pathlib.Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cores = min(cores, max(quota // period, 1))
    return cores


def share(mesh: MeshConfig, model: GPTConfig, batch_size: int) -> MeshConfig:
    """Make each core a device, and say how many of them a run takes.

    Nothing on GPUs and TPUs, in several processes, and where the environment says how many devices a CPU is to have.
    """
    told = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if jax.distributed.is_initialized() or told or "JAX_NUM_CPU_DEVICES" in os.environ:
        return mesh
    if jax.config.jax_num_cpu_devices < 1:
        with contextlib.suppress(RuntimeError):  # a backend is running
            jax.config.update("jax_num_cpu_devices", count())
    return mesh if jax.default_backend() != "cpu" else divide(mesh, model, batch_size, jax.device_count())


def divide(mesh: MeshConfig, model: GPTConfig, batch_size: int, n_devices: int) -> MeshConfig:
    """The mesh with its -1 for `data` filled in for the cores of one CPU.

    As many of them as divide the batch; one, if a step is too short to be shared; fewer, if the model is large.

    Args:
        mesh: as configured; one with a say of its own is left alone.
        model: its sizes.
        batch_size: windows a step.
        n_devices: cores that are devices.
    """
    if (mesh.data, mesh.fsdp, mesh.tensor) != (-1, 1, 1):
        return mesh
    in_blocks = 12 * model.n_layer * model.width**2  # parameters, without the vocabulary's
    if 6 * in_blocks * batch_size * model.block_size < WORTH:
        return dataclasses.replace(mesh, data=1)
    most = min(n_devices, batch_size, max(STATE // (16 * in_blocks), 1))
    return dataclasses.replace(mesh, data=max(n for n in range(1, most + 1) if batch_size % n == 0))
