"""System metrics: a description of the training device, and the load of the machine over time."""

import platform
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
import torch

from minigpt.runtime.cpu import cpu_info

INTERVAL = 10.0  # seconds between two measurements
# Names in MLflow, and the divisors that convert NVML's units (percent, bytes, milliwatts).
GPU_METRICS = {"utilization_percentage": 1, "memory_usage_megabytes": 2**20, "power_usage_watts": 1000}


def describe_device(device: torch.device) -> str:
    """Return the name of a GPU, or the model of the CPU and the number of torch's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_info('model name') or platform.machine()}, {torch.get_num_threads()} threads"


class Monitor:
    """Measures the load of the machine in a thread, which sleeps nearly all the time.

    It calls ``record`` with percentages, megabytes (2**20 bytes) and watts. They have the names of MLflow's system
    metrics, so that its page shows them under that heading. If the device is a GPU, all visible GPUs are measured.
    """

    def __init__(self, record: Callable[[dict[str, float]], None], device: torch.device) -> None:
        self._record, self._process = record, psutil.Process()
        self._gpus = open_gpus() if device.type == "cuda" else []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Measure a last time and end the thread."""
        self._stopped.set()
        self._thread.join()

    def measure(self) -> dict[str, float]:
        """Return the current load."""
        memory = psutil.virtual_memory()
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": round((memory.total - memory.available) / 2**20, 1),
            "system_memory_usage_percentage": memory.percent,
            "process_memory_usage_megabytes": round(self._process.memory_info().rss / 2**20, 1),
        }
        values |= convert([read_gpu(gpu) for gpu in self._gpus])
        return {f"system/{name}": value for name, value in values.items()}

    def _run(self) -> None:
        psutil.cpu_percent()  # each later call returns the mean load since the previous call
        stopped = False
        with suppress(OSError):  # the disk is full, which the training itself reports
            while not stopped:
                stopped = self._stopped.wait(INTERVAL)
                self._record(self.measure())


def open_gpus() -> list[Any]:
    """Return NVML handles of the GPUs that torch sees, in torch's order; none without NVML or a driver."""
    try:
        import pynvml
    except ImportError:
        return []
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        # NVML's indices ignore CUDA_VISIBLE_DEVICES; UUIDs do not depend on it.
        uuids = [torch.cuda.get_device_properties(index).uuid for index in range(torch.cuda.device_count())]
        return [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}") for uuid in uuids]
    return []


def read_gpu(gpu: Any) -> dict[str, int]:
    """Return the GPU_METRICS that a GPU measures, in NVML's units."""
    import pynvml as nvml

    values = {}
    with suppress(nvml.NVMLError):
        values["utilization_percentage"] = nvml.nvmlDeviceGetUtilizationRates(gpu).gpu
    with suppress(nvml.NVMLError):
        # Unlike version 1, version 2 does not count the memory that the driver reserves.
        values["memory_usage_megabytes"] = nvml.nvmlDeviceGetMemoryInfo(gpu, version=nvml.nvmlMemory_v2).used
    with suppress(nvml.NVMLError):
        values["power_usage_watts"] = nvml.nvmlDeviceGetPowerUsage(gpu)
    return values


def convert(readings: list[dict[str, int]]) -> dict[str, float]:
    """Convert the readings of all GPUs from NVML's units to metrics by name."""
    return {
        f"gpu_{index}_{name}": round(value / GPU_METRICS[name], 2)
        for index, reading in enumerate(readings)
        for name, value in reading.items()
    }
