"""`jaxgpt doctor`: report what jaxgpt finds on this machine, with a remedy for each problem."""

import dataclasses
import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax

from jaxgpt.devices import cores
from jaxgpt.files import download

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "chex", "numpy")
PLUGINS = {"jax-cuda12-plugin": "NVIDIA GPU", "jax-cuda13-plugin": "NVIDIA GPU", "libtpu": "TPU"}
NVIDIA_NODES = ("dev/nvidia0", "dev/nvidiactl", "dev/dxg")  # WSL2 has dev/dxg, even without an NVIDIA GPU
INSTALL = {
    "NVIDIA GPU": 'pip install "jaxgpt[cuda12]", or "jaxgpt[cuda13]" with driver 580 or newer',
    "TPU": 'pip install "jaxgpt[tpu]"',
    "AMD GPU": "install jax for ROCm as its documentation says",
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report; `remedy` is None if there is no problem."""

    topic: str
    found: str
    remedy: str | None = None


def installed(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclasses.dataclass(frozen=True)
class Machine:
    """The sources of the facts; by default this machine."""

    root: Path = Path("/")
    environ: Mapping[str, str] = dataclasses.field(default_factory=lambda: os.environ)
    devices: Callable[[], Sequence[jax.Device]] = jax.devices
    version: Callable[[str], str | None] = installed
    cache: Callable[[], Path] = download.cache_dir
    system: str = f"{platform.system()} {platform.machine()}"

    def variables(self, *prefixes: str) -> str:
        """Return the environment variables whose names start with one of the prefixes, as text."""
        return ", ".join(f"{k}={v}" for k, v in sorted(self.environ.items()) if k.startswith(prefixes)) or "none"

    def read(self, path: str | Path) -> str:
        """Return the text of a file below the root, or an empty text if it cannot be read."""
        try:
            return (self.root / path).read_text(encoding="utf-8").strip()
        except OSError:
            return ""


def report() -> str:
    """Report on this machine, one line per topic; `!` marks the lines with a remedy."""
    lines = []
    for finding in examine(Machine()):
        mark, remedy = ("!", f": {finding.remedy}") if finding.remedy else (" ", "")
        text = " ".join(f"{finding.found}{remedy}".split())  # a variable or a path may contain line breaks
        lines.append(f"{mark} {finding.topic:<12} {text}")
    return "\n".join(lines)


def examine(machine: Machine) -> list[Finding]:
    """Examine a machine: one finding per topic."""
    versions = {name: machine.version(name) for name in (*PACKAGES, *PLUGINS)}
    packages = ", ".join(f"{k} {v or '(missing)'}" for k, v in versions.items() if v or k in PACKAGES)
    backend, devices = _devices(machine)
    memory = (
        "jax reserves 75 % of it at start; to reserve less, set XLA_PYTHON_CLIENT_PREALLOCATE=false or "
        "XLA_CLIENT_MEM_FRACTION=.5 before jax starts; "
        f"set now: {machine.variables('XLA_PYTHON_CLIENT_', 'XLA_CLIENT_')}"
    )
    return [
        Finding("python", f"{platform.python_version()}, {platform.platform()}"),
        Finding("packages", packages),
        devices,
        _accelerator(machine, backend),
        *([Finding("gpu memory", memory)] if backend == "gpu" else []),
        Finding("cores", str(cores.count())),
        _cache(machine),
        Finding("variables", machine.variables("JAX_", "XLA_")),
    ]


def _devices(machine: Machine) -> tuple[str | None, Finding]:
    try:
        found = machine.devices()
    except Exception as error:  # a plug-in can raise any exception; jax raises an assertion without text
        reason = str(error).partition("\n")[0] or type(error).__name__
        forced = machine.environ.get("JAX_PLATFORMS")
        remedy = "unset JAX_PLATFORMS" if forced else "set JAX_PLATFORMS=cpu to use the CPU"
        return None, Finding("devices", f"jax does not start ({reason})", remedy)
    kinds = ", ".join(f"{count} x {kind}" for kind, count in Counter(device.device_kind for device in found).items())
    return found[0].platform, Finding("devices", f"{kinds} (backend {found[0].platform})")


def _accelerator(machine: Machine, backend: str | None) -> Finding:
    kind, sign = _hardware(machine)
    if kind is None:
        colab = "; Colab has some: Runtime > Change runtime type" if "COLAB_RELEASE_TAG" in machine.environ else ""
        apple = "; jax runs on the CPU of Apple silicon" if machine.system == "Darwin arm64" else ""
        return Finding("accelerator", f"none{colab}{apple}")
    if backend not in (None, "cpu"):
        return Finding("accelerator", f"{kind} ({sign})")
    found = f"{kind} ({sign}), yet jax {'runs on cpu' if backend else 'does not start'}"
    return Finding("accelerator", found, _remedy(machine, kind, backend))


def _hardware(machine: Machine) -> tuple[str, str] | tuple[None, None]:
    """The first accelerator found, and the file or variable that reveals it."""
    root, environ = machine.root, machine.environ
    google = any(machine.read(vendor) == "0x1ae0" for vendor in root.glob("sys/bus/pci/devices/*/vendor"))
    signs = {
        "NVIDIA GPU": [
            *(root / node for node in (*NVIDIA_NODES[:2], "proc/driver/nvidia/version") if (root / node).exists()),
            shutil.which("nvidia-smi", path=environ.get("PATH", "")),
        ],
        "TPU": [
            *root.glob("dev/accel[0-9]*"),  # dev/accel, a folder, belongs to other vendors
            *(root.glob("dev/vfio/[0-9]*") if google else ()),  # either alone also occurs on machines without a TPU
            *(name for name in ("COLAB_TPU_ADDR", "TPU_NAME") if environ.get(name)),
        ],
        "AMD GPU": [*root.glob("dev/kfd")],
    }
    return next(((kind, str(sign)) for kind in signs for sign in signs[kind] if sign), (None, None))


def _remedy(machine: Machine, kind: str, backend: str | None) -> str:
    """The remedy that lets jax use the accelerator."""
    environ, nvidia = machine.environ, kind == "NVIDIA GPU"
    lock = machine.root / "tmp/libtpu_lockfile"
    for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME"):
        if environ.get(name, "").startswith("cpu"):
            return f"unset {name}, which is {environ[name]}"
    if kind == "TPU" and lock.exists():
        return (
            f"a process holds it ({lock}); end it or restart the runtime; if there is no such process, delete the file"
        )
    if nvidia and machine.system.startswith("Windows"):
        return "use WSL2, as jax has no GPU support on Windows itself"
    if nvidia and environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "unset CUDA_VISIBLE_DEVICES, which hides it"
    if nvidia and not any((machine.root / node).exists() for node in NVIDIA_NODES):
        return "no /dev/nvidia0 here; pass the GPU into the container (docker run --gpus all) or repair the driver"
    if any(machine.version(plugin) for plugin, of in PLUGINS.items() if of == kind):
        return f"JAX_PLATFORMS={'cuda' if nvidia else 'tpu'} jaxgpt doctor says why" if backend else "see devices"
    return INSTALL[kind]


def _cache(machine: Machine) -> Finding:
    try:
        folder = machine.cache()
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=nearest):  # permission bits say little about root, Windows and full disks
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except download.DownloadError as error:
        return Finding("cache", *str(error).rsplit(": ", 1))
    except OSError as error:
        problem = f"cannot use the folder ({folder}, {error.strerror or error})"
        return Finding("cache", problem, "set JAXGPT_CACHE to a folder that you may write")
    compiled = sum(1 for _ in folder.glob("xla/*-cache"))
    return Finding("cache", f"{folder}, {size / 1e6:.1f} MB, {compiled} compiled functions")
