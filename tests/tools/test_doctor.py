import re
import types

import chex
import flax
import jax
import jaxlib
import numpy as np
import optax
import orbax.checkpoint
import pytest

from jaxgpt.files import download
from jaxgpt.tools import doctor


@pytest.fixture
def machine(tmp_path):
    """Makes a machine without accelerator, with the files, variables and packages that are named."""

    def make(*files, environ=None, packages=(), missing=(), devices=None, **facts):
        root = tmp_path / "root"
        for file in files:
            path, _, content = file.partition(":")
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(content, encoding="utf-8")
        facts = {"cache": lambda: tmp_path / "cache", "system": "Linux x86_64"} | facts
        version = dict.fromkeys({*doctor.PACKAGES, *packages} - {*missing}, "1.2.3").get
        return doctor.Machine(root, environ or {}, devices or jax_on("cpu"), version, **facts)

    return make


def jax_on(platform, kind="some kind"):
    return lambda: [types.SimpleNamespace(platform=platform, device_kind=kind)] * 2


def fails(error):
    def devices():
        raise error

    return devices


def topic(name, machine):
    """The one finding of a topic."""
    (finding,) = [finding for finding in doctor.examine(machine) if finding.topic == name]
    return finding


def test_nothing_is_to_be_done_on_a_machine_without_accelerator(machine):
    findings = doctor.examine(machine())
    assert [finding.remedy for finding in findings] == [None] * 7
    assert findings[3].found == "none"


@pytest.mark.parametrize(
    "file, kind, remedy",
    [
        ("dev/nvidia0", "NVIDIA GPU", 'pip install "jaxgpt[cuda12]", or "jaxgpt[cuda13]"'),
        ("dev/nvidiactl", "NVIDIA GPU", 'pip install "jaxgpt[cuda12]", or "jaxgpt[cuda13]"'),
        ("dev/accel0", "TPU", 'pip install "jaxgpt[tpu]"'),
        ("dev/kfd", "AMD GPU", "install jax for ROCm"),
    ],
)
def test_an_accelerator_that_jax_leaves_idle_is_found_with_the_extra_to_install(machine, file, kind, remedy):
    finding = topic("accelerator", machine(file))
    assert finding.found.startswith(kind) and finding.found.endswith("yet jax runs on cpu")
    assert finding.remedy.startswith(remedy)


def test_an_accelerator_that_jax_uses_needs_no_remedy(machine):
    finding = topic("accelerator", machine("dev/nvidia0", "dev/kfd", devices=jax_on("gpu")))
    assert finding.remedy is None and finding.found.startswith("NVIDIA GPU")
    assert topic("accelerator", machine("dev/accel0", "tmp/libtpu_lockfile", devices=jax_on("tpu"))).remedy is None


def test_nvidia_smi_on_the_path_is_a_sign_of_a_gpu_that_may_not_have_reached_the_container(machine, tmp_path):
    for name in ("nvidia-smi", "nvidia-smi.exe"):
        (tmp_path / name).touch(mode=0o755)
    path = {"PATH": str(tmp_path)}
    finding = topic("accelerator", machine(environ=path))
    assert "nvidia-smi" in finding.found and "--gpus all" in finding.remedy
    assert "WSL2" in topic("accelerator", machine(environ=path, system="Windows AMD64")).remedy
    assert "cuda12" in topic("accelerator", machine("dev/dxg", environ=path)).remedy


def test_the_driver_without_a_device_file_is_no_reason_to_install_anything(machine):
    finding = topic("accelerator", machine("proc/driver/nvidia/version"))
    assert "--gpus all" in finding.remedy and "pip" not in finding.remedy


def test_vfio_and_a_google_card_make_a_tpu_only_together(machine):
    assert topic("accelerator", machine("dev/vfio/0")).found == "none"
    assert topic("accelerator", machine("sys/bus/pci/devices/05/vendor:0x8086\n")).found == "none"
    assert topic("accelerator", machine("sys/bus/pci/devices/06/vendor:0x1ae0\n")).found.startswith("TPU")


def test_a_google_network_card_is_no_tpu(machine):
    card = "sys/bus/pci/devices/06/vendor:0x1ae0\n"
    assert topic("accelerator", machine(card, "dev/vfio/vfio", "dev/accel/accel0")).found == "none"


@pytest.mark.parametrize("name", ["COLAB_TPU_ADDR", "TPU_NAME"])
def test_a_tpu_is_known_by_its_environment_variables(machine, name):
    assert "jaxgpt[tpu]" in topic("accelerator", machine(environ={name: "local"})).remedy


@pytest.mark.parametrize("name, value", [("JAX_PLATFORMS", "cpu"), ("JAX_PLATFORM_NAME", "cpu")])
def test_a_variable_that_forces_the_cpu_is_named_before_any_install(machine, name, value):
    facts = machine("dev/nvidia0", environ={name: value})
    assert topic("accelerator", facts).remedy == f"unset {name}, which is {value}"
    assert topic("variables", facts).found == f"{name}={value}"


def test_a_variable_that_forces_the_cpu_is_fine_where_there_is_nothing_else(machine):
    assert not any(finding.remedy for finding in doctor.examine(machine(environ={"JAX_PLATFORMS": "cpu"})))


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_hidden_gpu_is_to_be_shown(machine, hidden):
    remedy = topic("accelerator", machine("dev/nvidia0", environ={"CUDA_VISIBLE_DEVICES": hidden})).remedy
    assert remedy.startswith("unset CUDA_VISIBLE_DEVICES")
    remedy = topic("accelerator", machine("dev/nvidia0", environ={"CUDA_VISIBLE_DEVICES": "0"})).remedy
    assert remedy.startswith("pip install")


@pytest.mark.parametrize(
    "file, plugin, platform",
    [("nvidia0", "jax-cuda12-plugin", "cuda"), ("nvidia0", "jax-cuda13-plugin", "cuda"), ("accel0", "libtpu", "tpu")],
)
def test_a_plugin_that_is_there_is_not_installed_again(machine, file, plugin, platform):
    facts = machine(f"dev/{file}", packages=[plugin])
    assert topic("accelerator", facts).remedy == f"JAX_PLATFORMS={platform} jaxgpt doctor says why"
    assert f"{plugin} 1.2.3" in topic("packages", facts).found


def test_a_tpu_that_another_process_holds_is_told_by_its_lock_file(machine):
    finding = topic("accelerator", machine("dev/accel0", "tmp/libtpu_lockfile", packages=["libtpu"]))
    assert "libtpu_lockfile" in finding.remedy and "end it or restart the runtime" in finding.remedy


def test_colab_and_apple_silicon_are_told_what_they_have(machine):
    colab = topic("accelerator", machine(environ={"COLAB_RELEASE_TAG": "x"}))
    assert "Change runtime type" in colab.found and colab.remedy is None
    apple = topic("accelerator", machine(system="Darwin arm64"))
    assert "CPU of Apple silicon" in apple.found and apple.remedy is None
    assert topic("accelerator", machine(system="Darwin x86_64")).found == "none"


def test_preallocation_is_told_on_a_gpu_with_what_is_set_now(machine):
    environ = {"XLA_CLIENT_MEM_FRACTION": ".3", "XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_FLAGS": "x"}
    found = topic("gpu memory", machine(devices=jax_on("gpu"), environ=environ)).found
    assert "XLA_PYTHON_CLIENT_PREALLOCATE=false or XLA_CLIENT_MEM_FRACTION=.5" in found
    assert found.endswith("set now: XLA_CLIENT_MEM_FRACTION=.3, XLA_PYTHON_CLIENT_PREALLOCATE=true")
    assert topic("gpu memory", machine(devices=jax_on("gpu"))).found.endswith("set now: none")


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_preallocation_is_not_told_elsewhere(machine, platform):
    findings = doctor.examine(machine(devices=jax_on(platform)))
    assert not any("PREALLOCATE" in finding.found for finding in findings)


def test_devices_are_counted_by_kind_with_their_backend(machine):
    assert topic("devices", machine(devices=jax_on("gpu", "H100"))).found == "2 x H100 (backend gpu)"


def test_a_jax_that_does_not_start_is_a_finding_of_one_line(machine):
    broken = fails(RuntimeError("no CUDA-capable device\nat line 1\nat line 2"))
    facts = machine("dev/nvidia0", devices=broken)
    devices, accelerator = topic("devices", facts), topic("accelerator", facts)
    assert devices.found == "jax does not start (no CUDA-capable device)"
    assert devices.remedy == "set JAX_PLATFORMS=cpu to use the CPU"
    assert accelerator.found.endswith("yet jax does not start") and "cuda12" in accelerator.remedy
    told = topic("accelerator", machine("dev/nvidia0", devices=broken, packages=["jax-cuda12-plugin"]))
    assert told.remedy == "see devices"


def test_an_error_without_words_is_named_by_its_type(machine):
    finding = topic("devices", machine(devices=fails(AssertionError()), environ={"JAX_PLATFORMS": "cuda"}))
    assert finding == doctor.Finding("devices", "jax does not start (AssertionError)", "unset JAX_PLATFORMS")


def test_the_cores_are_those_that_training_takes(machine, monkeypatch):
    monkeypatch.setattr(doctor.cores, "count", lambda: 6)
    assert topic("cores", machine()).found == "6"


def test_the_cache_is_measured_and_left_as_it_is(machine, tmp_path):
    assert topic("cache", machine()).found == f"{tmp_path / 'cache'}, 0.0 MB, 0 compiled functions"
    assert not (tmp_path / "cache").exists()
    (tmp_path / "cache/xla").mkdir(parents=True)
    (tmp_path / "cache/corpus").write_bytes(bytes(2_000_000))
    (tmp_path / "cache/xla/f-cache").write_bytes(bytes(500_000))
    (tmp_path / "cache/xla/f-atime").touch()
    assert topic("cache", machine()).found == f"{tmp_path / 'cache'}, 2.5 MB, 1 compiled functions"
    assert sorted(path.name for path in (tmp_path / "cache").rglob("*")) == ["corpus", "f-atime", "f-cache", "xla"]


def test_a_cache_that_cannot_be_written_is_named(machine, tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file/jaxgpt"
    finding = topic("cache", machine(cache=lambda: folder))
    assert str(folder) in finding.found
    assert finding.remedy == "set JAXGPT_CACHE to a folder that you may write"


def test_a_machine_without_a_cache_folder_is_told_to_name_one(machine):
    finding = topic("cache", machine(cache=fails(download.DownloadError("no cache folder (JAXGPT_CACHE, x): set it"))))
    assert finding == doctor.Finding("cache", "no cache folder (JAXGPT_CACHE, x)", "set it")


def test_all_versions_are_told_and_a_missing_package_is_too(machine):
    found = topic("packages", machine()).found
    names = ["jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "chex", "numpy"]
    assert found == ", ".join(f"{name} 1.2.3" for name in names)
    assert ", chex (missing), numpy 1.2.3" in topic("packages", machine(missing=["chex"])).found


def test_the_report_of_this_machine_has_one_aligned_line_a_topic(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_OF_NO_MEANING", "two\nlines")
    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path))
    lines = doctor.report().splitlines()
    topics = [line[2:15].strip() for line in lines]
    known = ["python", "packages", "devices", "accelerator", "gpu memory", "cores", "cache", "variables"]
    assert topics == [name for name in known if name in topics] and len(topics) >= len(known) - 1
    assert all(line[:2] in ("  ", "! ") and line[14] == " " and line[15] != " " for line in lines)
    assert "JAX_OF_NO_MEANING=two lines" in lines[-1]
    assert lines[-2] == f"  cache        {tmp_path}, 0.0 MB, 0 compiled functions"
    assert "Traceback" not in "".join(lines)


def test_the_report_marks_what_has_a_remedy(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path / "file/jaxgpt"))
    (line,) = [line for line in doctor.report().splitlines() if line[2:].startswith("cache ")]
    assert line.startswith("! cache        cannot use the folder (")
    assert line.endswith("): set JAXGPT_CACHE to a folder that you may write")


def test_the_report_tells_the_versions_that_python_imports():
    versions = {library.__name__: library.__version__ for library in (jax, jaxlib, flax, optax, chex, np)}
    versions["orbax-checkpoint"] = orbax.checkpoint.__version__
    report = doctor.report()
    assert len(versions) == 7
    for name, version in versions.items():
        assert re.search(rf" {name} {re.escape(version)}(,|$)", report, re.MULTILINE), name
