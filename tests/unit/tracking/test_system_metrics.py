import threading

import torch

from minigpt.tracking import system_metrics


def test_the_device_in_words():
    assert system_metrics.describe(torch.device("cpu")).endswith(f", {torch.get_num_threads()} threads")


def test_a_monitor_measures_at_intervals_and_at_its_end(monkeypatch):
    monkeypatch.setattr(system_metrics, "SECONDS", 0.01)
    told, often = [], threading.Event()

    def tell(load):
        told.append(load)
        if len(told) == 3:
            often.set()

    monitor = system_metrics.Monitor(tell, torch.device("cpu"))
    often.wait()
    monitor.stop()
    count = len(told)
    monitor.stop()
    assert len(told) == count >= 3
    assert all(name.startswith("system/") for name in told[0])
    assert 0 < told[0]["system/process_memory_usage_megabytes"] <= told[0]["system/system_memory_usage_megabytes"] * 2
    assert 0 <= told[0]["system/cpu_utilization_percentage"] <= 100


def test_a_full_disk_ends_the_measuring_and_nothing_else():
    def tell(load):
        raise OSError(28, "No space left on device")

    system_metrics.Monitor(tell, torch.device("cpu")).stop()


def test_what_nvidia_smi_answers_is_read_and_gaps_are_left_out():
    assert system_metrics.gpu_load("97, 40123, 512.25\n0, [N/A], 61.90\n") == {
        "gpu_0_utilization_percentage": 97.0,
        "gpu_0_memory_usage_megabytes": 40123.0,
        "gpu_0_power_usage_watts": 512.25,
        "gpu_1_utilization_percentage": 0.0,
        "gpu_1_power_usage_watts": 61.9,
    }
