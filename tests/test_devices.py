"""Which device runs, and how much memory it has."""

import pytest
import torch
from helpers import CPU

from additional_experiments import main
from runner import devices


def test_auto_device_prefers_an_accelerator(monkeypatch):
    there = {"cuda": True, "mps": True}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there["cuda"])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there["mps"])
    assert devices.resolve_device("auto").type == "cuda"
    there["cuda"] = False
    assert devices.resolve_device("auto").type == "mps"
    there["mps"] = False
    assert devices.resolve_device("auto").type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there(capsys):
    assert main(["--device", "cuda"]) == 2
    assert "--device cuda: PyTorch finds none here" in capsys.readouterr().err


def test_free_memory_in_a_container_and_without_linux(monkeypatch):
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    4000000 kB\n"}
    files |= {"/sys/fs/cgroup/memory.max": "3000000000\n", "/sys/fs/cgroup/memory.current": "1000000000\n"}

    def read_text(path):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(devices.Path, "read_text", read_text)
    assert devices.free_memory(CPU) == 2_000_000_000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert devices.free_memory(CPU) == 4_096_000_000
    del files["/proc/meminfo"]
    monkeypatch.setattr(devices.os, "sysconf", {"SC_PAGE_SIZE": 16384, "SC_PHYS_PAGES": 10**6}.get)
    assert devices.free_memory(CPU) == 16384 * 10**6 // 2
