import itertools
import os
from types import SimpleNamespace

import pytest
import torch
from helpers.workspace import ROOT, python

from minigpt.errors import UserError
from minigpt.runtime import device
from minigpt.runtime.device import choose_device, compute_dtype, free_device, peak_flops

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_missing_cuda_is_reported():
    with pytest.raises(UserError, match=r"train\.device: cuda is not available \(CUDA devices found: 0\)"):
        choose_device("cuda")
    assert choose_device("auto") == CPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_auto_chooses_cuda_if_available():
    assert choose_device("auto") == torch.device("cuda", 0)
    with pytest.raises(UserError, match=r"cuda:99 is not available"):
        choose_device("cuda:99")


def test_concurrent_processes_reserve_different_devices(tmp_path, monkeypatch):
    """The devices are invented, because the locks of several GPUs need several GPUs."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))  # inherited by the other process
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"gpu-{index}"))
    other = (
        "import sys; from types import SimpleNamespace; import torch; from minigpt.runtime import device\n"
        "torch.cuda.get_device_properties = lambda index: SimpleNamespace(uuid=f'gpu-{index}')\n"
        "print(device.free_device(int(sys.argv[1])))"
    )
    assert free_device(2) == 0
    assert python("-c", other, "2", cwd=ROOT).stdout == "1\n"
    assert free_device(2) == 1  # the other process has ended
    assert free_device(2) == 0  # none is free
    (tmp_path / f"minigpt-{os.getuid()}" / "gpu-2.lock").mkdir()
    assert free_device(3) == 0  # the third device's lock cannot be taken


def test_explicit_dtype_is_used():
    assert compute_dtype("float32", CPU) is None
    assert compute_dtype("bfloat16", CPU) == torch.bfloat16
    assert compute_dtype("float16", CPU) == torch.float16


def test_auto_is_the_cpu_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)  # of no use: it has no float64
    assert choose_device("auto") == choose_device("cpu") == CPU


@pytest.mark.parametrize(
    "name, teraflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("Tesla T4", None),
    ],
)
def test_rate_of_a_gpu_is_that_of_its_whole_name(name, teraflops):
    assert peak_flops(name) == (teraflops and teraflops * 1e12)


@pytest.mark.parametrize(
    "vendor, amx, avx512_bf16", itertools.product(("AuthenticAMD", "GenuineIntel"), *[(False, True)] * 2)
)
def test_auto_dtype_on_a_cpu_is_bfloat16_where_it_is_faster(monkeypatch, vendor, amx, avx512_bf16):
    info = {"vendor_id": vendor, "flags": "avx512f avx512_bf16" if avx512_bf16 else "avx512f"}
    monkeypatch.setattr(device, "cpu_info", lambda *fields: info[fields[0]])
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    faster = amx or (avx512_bf16 and vendor == "AuthenticAMD")
    assert compute_dtype("auto", CPU) == (torch.bfloat16 if faster else None)
