"""Tests of system metrics: the description of the device, and the monitor."""

import sys
import threading

import pytest
import torch

from minigpt.tracking import system_metrics
from minigpt.tracking.system_metrics import Monitor, convert, describe_device, open_gpus, read_gpu


def test_description_of_a_cpu_names_its_threads():
    assert describe_device(torch.device("cpu")).endswith(f", {torch.get_num_threads()} threads")


def test_monitor_measures_at_intervals_and_at_its_end(monkeypatch):
    monkeypatch.setattr(system_metrics, "INTERVAL", 0.01)
    recorded, third = [], threading.Event()

    def record(values):
        recorded.append(values)
        if len(recorded) == 3:
            third.set()

    monitor = Monitor(record, torch.device("cpu"))
    third.wait()
    monitor.stop()
    count = len(recorded)
    monitor.stop()
    assert len(recorded) == count >= 3
    first = recorded[0]
    assert all(name.startswith("system/") for name in first)
    assert 0 < first["system/process_memory_usage_megabytes"] <= first["system/system_memory_usage_megabytes"] * 2
    assert 0 <= first["system/cpu_utilization_percentage"] <= 100


def test_full_disk_ends_only_the_monitor():
    def record(values):
        raise OSError(28, "No space left on device")

    Monitor(record, torch.device("cpu")).stop()


def test_nvml_units_are_converted_and_missing_values_omitted():
    readings = [
        {"utilization_percentage": 97, "memory_usage_megabytes": 40123 << 20, "power_usage_watts": 512_250},
        {"utilization_percentage": 0, "power_usage_watts": 61_900},
        {},
    ]
    assert convert(readings) == {
        "gpu_0_utilization_percentage": 97.0,
        "gpu_0_memory_usage_megabytes": 40123.0,
        "gpu_0_power_usage_watts": 512.25,
        "gpu_1_utilization_percentage": 0.0,
        "gpu_1_power_usage_watts": 61.9,
    }


def test_every_gpu_of_torch_is_measured():
    gpus = open_gpus()
    assert len(gpus) == torch.cuda.device_count()
    assert all(read_gpu(gpu).keys() <= system_metrics.GPU_METRICS.keys() for gpu in gpus)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_monitor_measures_the_machine_without_a_gpu_driver():
    recorded = []
    Monitor(recorded.append, torch.device("cuda")).stop()
    assert read_gpu(None) == {}
    assert "system/cpu_utilization_percentage" in recorded[0]
    assert not [name for name in recorded[0] if "gpu" in name]


def test_nvml_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_gpus() == []
