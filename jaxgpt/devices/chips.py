"""Peak speed, memory and bandwidth of GPUs and TPUs: the denominators of MFU and of the roofline in plan.py."""

import dataclasses
import functools
import os
import re
import time

import jax
import jax.numpy as jnp

from jaxgpt.errors import ArgumentError

REPEATABLE = "--xla_gpu_deterministic_ops=true"


@dataclasses.dataclass(frozen=True)
class Chip:
    """The vendor's figures for one JAX device."""

    name: str
    """Name for `jaxgpt plan --target`."""
    kinds: tuple[str, ...]
    """Values of JAX's `device_kind` for this chip."""
    flops: float
    """Peak dense bfloat16 FLOP/s."""
    memory: int
    """Bytes of device memory."""
    bandwidth: float
    """Bytes/s between the chip and its memory."""
    platform: str
    """JAX's name for the platform: gpu or tpu."""


def _tpu(name: str, kinds: tuple[str, ...], tera_flops: float, gibibytes: int, gigabytes_per_s: float) -> Chip:
    # Google's pages give HBM in GB but mean GiB, as the compiler's own limits show
    return Chip(name, kinds, tera_flops * 1e12, gibibytes << 30, gigabytes_per_s * 1e9, "tpu")


def _gpu(name: str, kinds: tuple[str, ...], tera_flops: float, gigabytes: int, gigabytes_per_s: float) -> Chip:
    return Chip(name, kinds, tera_flops * 1e12, gigabytes * 10**9, gigabytes_per_s * 1e9, "gpu")


# Google: https://docs.cloud.google.com/tpu/docs/v4, .../v5e, .../v5p, .../v6e, .../tpu7x, where a chip is two devices
# NVIDIA: the data sheets at https://www.nvidia.com/en-us/data-center/ a100/, h100/, h200/, l4/, l40s/, tesla-t4/,
# products/a10-gpu/, hgx/ (B200), gb200-nvl72/; for GeForce, with float32 sums, the appendices of the white papers
# "NVIDIA Ampere GA102 GPU architecture", "NVIDIA Ada GPU architecture" and "NVIDIA RTX Blackwell GPU architecture".
# Dense: half of the figures "with sparsity". A T4 has no bfloat16, its figure is float16's.
# AMD: https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html
CHIPS = (
    _tpu("v4", ("TPU v4",), 275, 32, 1228),
    _tpu("v5e", ("TPU v5 lite", "TPU v5e"), 197, 16, 819),
    _tpu("v5p", ("TPU v5", "TPU v5p"), 459, 95, 2765),
    _tpu("v6e", ("TPU v6 lite", "TPU v6e"), 918, 32, 1640),
    _tpu("v7x", ("TPU7x", "TPU v7x"), 1153.5, 96, 3690),
    _gpu("t4", ("Tesla T4", "NVIDIA T4"), 65, 16, 320),
    _gpu("rtx3090", ("NVIDIA GeForce RTX 3090",), 71, 24, 936),
    _gpu("rtx4090", ("NVIDIA GeForce RTX 4090",), 165.2, 24, 1008),
    _gpu("rtx5090", ("NVIDIA GeForce RTX 5090",), 209.5, 32, 1792),
    _gpu("a10", ("NVIDIA A10",), 125, 24, 600),
    _gpu("l4", ("NVIDIA L4",), 121, 24, 300),
    _gpu("l40s", ("NVIDIA L40S",), 362, 48, 864),
    _gpu("a100-40gb", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), 312, 40, 1555),
    _gpu("a100-pcie", ("NVIDIA A100 80GB PCIe",), 312, 80, 1935),
    _gpu("a100", ("NVIDIA A100-SXM4-80GB",), 312, 80, 2039),
    _gpu("h100-pcie", ("NVIDIA H100 PCIe",), 756, 80, 2000),
    _gpu("h100-nvl", ("NVIDIA H100 NVL",), 835, 94, 3900),
    _gpu("h100", ("NVIDIA H100 80GB HBM3",), 989, 80, 3350),
    _gpu("h200", ("NVIDIA H200",), 989, 141, 4800),
    _gpu("b200", ("NVIDIA B200",), 2250, 180, 7700),
    _gpu("gb200", ("NVIDIA GB200",), 2500, 186, 8000),
    _gpu("mi300x", ("AMD Instinct MI300X", "AMD Instinct MI300X OAM"), 1307, 192, 5300),
)


def find(device_kind: str) -> Chip | None:
    """Return the chip with this `device_kind`; None for a CPU and for a chip that is not in the table."""
    return next((chip for chip in CHIPS if device_kind in chip.kinds), None)


def repeatable_sums() -> None:
    """Tell XLA, before a backend starts, to add up on GPUs in the same order each time. Kernels are then not tuned.

    Raises:
        ArgumentError: a backend is running already, without that flag.
    """
    if has_repeatable_sums():
        return
    devices = jax.config.jax_num_cpu_devices
    try:
        jax.config.update("jax_num_cpu_devices", devices + 2)  # jax refuses another number once a backend is running
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:
        raise ArgumentError(
            f"jax is running already (train.deterministic): set the environment variable XLA_FLAGS={REPEATABLE} before "
            "the process starts"
        ) from None
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {REPEATABLE}".strip()


def has_repeatable_sums() -> bool:
    """Whether XLA was told to add up on GPUs in the same order each time."""
    return REPEATABLE in os.environ.get("XLA_FLAGS", "")


def is_old_gpu() -> bool:
    """Whether this machine's GPU is from before compute capability 8.0, such as a T4: it has neither bfloat16 nor
    cuDNN's fused attention."""
    if jax.default_backend() != "gpu":
        return False
    capability = re.fullmatch(r"(\d+)\.\d+", str(getattr(jax.local_devices()[0], "compute_capability", "")))
    return capability is not None and int(capability[1]) < 8


def compute_dtype(configured: str, platform: str | None = None) -> str:
    """Choose the dtype in which a model is computed: float32 or bfloat16.

    Args:
        configured: `train.dtype`; auto = bfloat16 where the device has it, which CPUs and old GPUs have not.
        platform: the platform that will compute (cpu, gpu, tpu); None = this machine's.
    """
    if configured != "auto":
        return configured
    without = (platform or jax.default_backend()) == "cpu" or (platform is None and is_old_gpu())
    return "float32" if without else "bfloat16"


class Peak:
    """Peak FLOP/s of a list of devices together, as `flops`; None if it is unknown."""

    def __init__(self, devices: list[jax.Device], tera_flops: float = 0.0):
        """Look the devices up.

        Args:
            devices: of a mesh.
            tera_flops: the peak of each, in TFLOP/s; 0 = that of the table, if it is there.
        """
        self._devices, self._given = devices, bool(tera_flops)
        found = [find(device.device_kind) for device in devices]
        self.flops = sum(chip.flops for chip in found) if all(found) else None
        if tera_flops:
            self.flops = tera_flops * 1e12 * len(devices)

    @property
    def is_unknown(self) -> bool:
        """Whether the peak is neither known nor can be measured."""
        return self.flops is None and self._devices[0].platform != "cpu"

    def measure(self) -> None:
        """On a CPU, measure the peak with a large matmul. Call it while nothing else is computing."""
        if self.flops is None and jax.process_count() == 1 and self._devices[0].platform == "cpu":
            self.flops = matmul_flops()

    def part(self, flops: float) -> float | None:
        """Return which part of the peak a speed in FLOP/s is; None if the peak is unknown.

        A measured peak that is below the speed is forgotten: other programs ran while it was measured.
        """
        if self.flops and flops > self.flops and self._devices[0].platform == "cpu" and not self._given:
            self.flops = None
            matmul_flops.cache_clear()
        return self.flops and flops / self.flops


@functools.cache
def matmul_flops(n: int = 1024, seconds: float = 0.3) -> float:
    """Measure the FLOP/s of float32 matmuls on all cores of the CPU.

    Args:
        n: the matrices are (n, n).
        seconds: how long to repeat the matmul.

    Returns:
        FLOP/s of the fastest repetition.
    """
    alone = jax.make_mesh((1,), ("cpu",), devices=jax.local_devices(backend="cpu")[:1])  # not the step's mesh
    with jax.set_mesh(alone):
        square = jnp.ones((n, n))
        product = jax.jit(jnp.matmul).lower(square, square).compile()
    until, best = time.perf_counter() + seconds, float("inf")
    while (began := time.perf_counter()) < until:
        jax.block_until_ready(product(square, square))
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def named(name: str) -> Chip | None:
    """Return the chip with this short name; None if there is none."""
    return next((chip for chip in CHIPS if chip.name == name), None)
