import time
import types

import jax
import numpy as np
import pytest

from jaxgpt.devices import chips, sharding


def device(kind, platform):
    return types.SimpleNamespace(device_kind=kind, platform=platform)


def test_the_peak_of_several_chips_is_the_sum_of_what_the_table_says():
    assert chips.Peak([device("TPU v5 lite", "tpu")] * 8).flops == 8 * 197e12
    assert chips.Peak([device("NVIDIA H200", "gpu")]).flops == 989e12


def test_a_chip_that_is_not_in_the_table_has_no_peak_and_none_is_measured(monkeypatch):
    monkeypatch.setattr(chips, "matmul_flops", lambda: pytest.fail("a GPU was measured like a CPU"))
    peak = chips.Peak([device("NVIDIA H200", "gpu"), device("Some GPU", "gpu")])
    peak.measure()
    assert peak.flops is None and peak.is_unknown


def test_a_peak_that_is_given_counts_for_each_device():
    peak = chips.Peak([device("Some GPU", "gpu")] * 2, 100.0)
    assert peak.flops == 2e14 and not peak.is_unknown
    assert chips.Peak(jax.devices()[:1], 1e-6).part(2e6) == 2


def test_no_two_chips_share_a_name_or_a_kind():
    kinds = [kind for chip in chips.CHIPS for kind in chip.kinds]
    assert len(kinds) == len(set(kinds)) and len({chip.name for chip in chips.CHIPS}) == len(chips.CHIPS)


def test_a_cpu_is_measured_once_for_all_its_devices():
    peak = chips.Peak(jax.devices()[:1] * 2)
    assert peak.flops is None and not peak.is_unknown
    with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(2))):  # as in a run
        peak.measure()
    assert peak.flops == chips.matmul_flops() > 1e9


def test_a_peak_that_is_exceeded_was_measured_beside_other_programs_and_is_measured_again(monkeypatch):
    cpu, gpu = chips.Peak(jax.devices()[:1]), chips.Peak([device("NVIDIA H200", "gpu")])
    cpu.measure()
    assert cpu.part(cpu.flops / 2) == 0.5 and gpu.part(2 * 989e12) == 2
    before = cpu.flops
    assert cpu.part(2 * before) is None and cpu.flops is None
    monkeypatch.setattr(jax, "block_until_ready", lambda _: time.sleep(0.05))  # a product takes that long now
    cpu.measure()
    assert cpu.flops < 2 * 1024**3 / 0.05
    chips.matmul_flops.cache_clear()


def test_the_measured_product_is_not_above_numpy_s_by_much():
    square = np.ones((1024, 1024), np.float32)
    times = []
    for _ in range(20):
        began = time.perf_counter()
        square @ square
        times.append(time.perf_counter() - began)
    assert 1 / 20 < chips.matmul_flops() / (2 * 1024**3 / min(times)) < 20  # the units are right; machines are noisy
