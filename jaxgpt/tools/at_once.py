"""How many runs of a sweep train at once: as many as fit the memory of the devices, or gain something on a CPU."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Sequence

import jax

from jaxgpt.config import Config
from jaxgpt.devices.chips import Chip
from jaxgpt.devices.sharding import MeshConfig
from jaxgpt.tools import ahead, plan

MARGIN = 0.8  # of the memory, since the need is an estimate
# On a CPU, only small runs gain side by side: `python benchmarks/sweep.py` measured 1.2x for 6e7 FLOPs per step in the
# blocks, for two runs per core and no more for further ones, and between 0.98x and 1.14x from 6e8 on
SMALL, PER_CORE = 1e8, 2


def limit(config: Config, at_once: int) -> tuple[int, str]:
    """Find how many runs of this kind to train at once, and why.

    Args:
        config: resolved.
        at_once: as configured; 0 = choose.
    """
    if (config.mesh.data, config.mesh.fsdp, config.mesh.tensor) != (-1, 1, 1):
        return 1, "--mesh gives each run several devices"
    for name, value in (("lora.rank", config.lora.rank), ("train.patience", config.train.patience)):
        if value:
            return 1, f"--{name} {value} needs it"
    if config.run.track != "none":
        return 1, f"--run.track {config.run.track} needs it"
    return (at_once, "--at_once") if at_once else most_at_once(config, jax.devices())


def most_at_once(config: Config, devices: Sequence[jax.Device]) -> tuple[int, str]:
    """Find how many runs of this size to train side by side.

    Args:
        config: resolved configuration of one of them.
        devices: over which they are spread.

    Returns:
        The number, which is 1 if they gain nothing, and the reason.
    """
    platform, model = devices[0].platform, config.model
    each, room = memory_of_run(config, platform), _room(devices)
    most, why = max(int(MARGIN * room / each), 1), f"{_size(each)} each of {_size(room)} per device, estimated"
    if platform == "cpu":
        flops = 6 * model.block_parameters * config.data.batch_size * model.block_size
        if flops > SMALL:
            return 1, f"runs of this size, {flops:.1e} FLOPs per step, gain nothing side by side on a CPU"
        most, why = min(most, PER_CORE), f"more than {PER_CORE} per core gain nothing on a CPU"
    return most * len(devices), why


def memory_of_run(config: Config, platform: str) -> int:
    """Estimate the bytes of memory that a run takes on its device, as `jaxgpt plan` does without a compiler."""
    alone = dataclasses.replace(config, mesh=MeshConfig(data=1))
    chip = Chip(platform, (), 1.0, 1, 1.0, platform)  # only the need is asked for, not whether it fits
    target = ahead.Target(platform, None, 1, chip, platform)
    return ahead.estimate_step(alone, target, plan.count_parameters(alone)).total


def _room(devices: Sequence[jax.Device]) -> int:
    """The bytes of memory that each device has for a sweep: on a CPU, a share of half of the machine's."""
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 8 << 30
    with contextlib.suppress(OSError, ValueError):  # no limit, or none that can be read
        memory = min(memory, int(pathlib.Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory // 2 // len(devices)


def _size(n: float) -> str:
    return f"{n / 1e9:,.3g} GB" if n >= 1e9 else f"{n / 1e6:,.3g} MB"
