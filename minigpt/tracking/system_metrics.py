"""The machine that a training runs on: what it is, and how busy it is."""

from __future__ import annotations

import platform
import subprocess
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from minigpt.runtime.cpu import cpu_info

if TYPE_CHECKING:
    import torch

SECONDS = 10.0
"""Between two measurements."""

GPU_FIELDS = {
    "utilization.gpu": "utilization_percentage",
    "memory.used": "memory_usage_megabytes",
    "power.draw": "power_usage_watts",
}
"""What nvidia-smi is asked, and what MLflow's page calls it."""


def describe(device: torch.device) -> str:
    """The device in words: a GPU's name, or the model of the CPU and the threads that torch runs on it."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_info('model name') or platform.machine()}, {torch.get_num_threads()} threads"


class Monitor:
    """Measures the load beside a training: in a thread of its own, which sleeps nearly always.

    The names are those of MLflow's system metrics, so that its page shows them under that heading.

    Args:
        tell: is called with values by name: percentages, megabytes (2**20 bytes), watts.
        device: of the training; the visible GPUs are measured if it is one.
    """

    def __init__(self, tell: Callable[[dict[str, float]], None], device: torch.device) -> None:
        import psutil

        self._tell, self._process, self._psutil = tell, psutil.Process(), psutil
        self._gpus = visible_gpus() if device.type == "cuda" else []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Measure once more, and no more after that."""
        self._stopped.set()
        self._thread.join()

    def load(self) -> dict[str, float]:
        """How busy the machine is now."""
        memory = self._psutil.virtual_memory()
        values = {
            "cpu_utilization_percentage": self._psutil.cpu_percent(),
            "system_memory_usage_megabytes": round((memory.total - memory.available) / 2**20, 1),
            "system_memory_usage_percentage": memory.percent,
            "process_memory_usage_megabytes": round(self._process.memory_info().rss / 2**20, 1),
        }
        if self._gpus:
            values |= gpu_load(ask_gpus(self._gpus))
        return {f"system/{name}": value for name, value in values.items()}

    def _run(self) -> None:
        self._psutil.cpu_percent()  # each call in a thread gives the load since the one before
        stopped = False
        while not stopped:
            stopped = self._stopped.wait(SECONDS)
            try:
                self._tell(self.load())
            except OSError:  # the disk is full: the training itself will say so
                return


def visible_gpus() -> list[str]:
    """What nvidia-smi calls the GPUs that torch sees, in torch's order."""
    import torch

    return [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(torch.cuda.device_count())]


def ask_gpus(gpus: list[str]) -> str:
    """The answer of nvidia-smi: a line for each GPU, its values separated by commas; empty if it has none."""
    ask = [
        "nvidia-smi",
        f"--id={','.join(gpus)}",
        f"--query-gpu={','.join(GPU_FIELDS)}",
        "--format=csv,noheader,nounits",
    ]
    try:
        return subprocess.run(ask, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def gpu_load(answer: str) -> dict[str, float]:
    """The values in an answer of nvidia-smi; it writes ``[N/A]`` for what a GPU does not measure."""
    values = {}
    for index, line in enumerate(answer.splitlines()):
        for name, value in zip(GPU_FIELDS.values(), line.split(","), strict=False):
            if value.strip().replace(".", "", 1).isdigit():
                values[f"gpu_{index}_{name}"] = float(value)
    return values
