"""Which device runs, and how much memory it has."""

import sys

import pytest
import torch
from helpers import CPU

from additional_experiments import main
from runner.machine import devices


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


def test_free_memory_with_and_without_linux(monkeypatch):
    def read_text(path):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    4000000 kB\n"}
    monkeypatch.setattr(devices.Path, "read_text", read_text)
    assert devices.free_memory(CPU) == 4_096_000_000
    monkeypatch.setattr(devices, "free_in_control_groups", lambda: [5_000_000_000, 2_000_000_000])
    assert devices.free_memory(CPU) == 2_000_000_000
    del files["/proc/meminfo"]
    monkeypatch.setattr(devices, "free_in_control_groups", lambda: [])
    monkeypatch.setattr(devices.os, "sysconf", {"SC_PAGE_SIZE": 16384, "SC_PHYS_PAGES": 10**6}.get)
    assert devices.free_memory(CPU) == 16384 * 10**6 // 2


GB = 10**9


def write_group(folder, version, limit, used, cache):
    """The files of a control group, as the kernel shows them."""
    folder.mkdir(parents=True)
    if version == 2:
        values = {"memory.max": limit, "memory.current": used}
        stat = f"anon {used - cache}\nfile {cache}\ninactive_anon 7\nactive_file {cache // 4}\n"
        stat += f"inactive_file {cache - cache // 4}\n"
    else:
        values = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used}
        stat = f"cache 5\nactive_file 5\ntotal_inactive_file {cache // 4}\ntotal_active_file {cache - cache // 4}\n"
    for name, value in (values | {"memory.stat": stat}).items():
        (folder / name).write_text(f"{value}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_page_cache_of_a_container_counts_as_free(tmp_path, version):
    root = tmp_path if version == 2 else tmp_path / "memory"
    write_group(root / "box", version, limit=4 * GB, used=3_900_000_000, cache=3_400_000_000)
    groups = tmp_path / "cgroup"
    groups.write_text("0::/box\n" if version == 2 else "5:cpu,cpuacct:/box\n4:memory:/box\n0::/\n")
    assert devices.free_in_control_groups(groups, tmp_path) == [3_500_000_000]


def test_limits_above_a_group_hold_too(tmp_path):
    write_group(tmp_path / "outer", 2, limit=2 * GB, used=1 * GB, cache=0)
    write_group(tmp_path / "outer" / "inner", 2, limit="max", used=1 * GB, cache=0)
    groups = tmp_path / "cgroup"
    groups.write_text("0::/outer/inner\n")
    assert devices.free_in_control_groups(groups, tmp_path) == [1 * GB]


def test_a_group_whose_path_is_that_on_the_host(tmp_path):
    """In a container only its own part is mounted, at the root."""
    write_group(tmp_path / "memory", 1, limit=2 * GB, used=1 * GB, cache=0)
    groups = tmp_path / "cgroup"
    groups.write_text("4:memory:/docker/0123456789ab\n")
    assert devices.free_in_control_groups(groups, tmp_path) == [1 * GB]


def test_no_control_groups(tmp_path):
    assert devices.free_in_control_groups(tmp_path / "missing", tmp_path) == []


# --- peak memory ---


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux resets the peak of a process")
def test_peak_memory_of_a_later_run_is_its_own():
    size = 400_000_000
    block = bytearray(size)
    block[::4096] = b"1" * len(block[::4096])
    del block
    known_above = devices.reset_peak_memory(CPU)
    before = devices.peak_memory(CPU, known_above)
    block = bytearray(size // 4)
    block[::4096] = b"1" * len(block[::4096])
    grown = devices.peak_memory(CPU, known_above) - before
    assert known_above == 0 and size // 5 < grown < size // 2


def test_peak_memory_that_cannot_be_told(monkeypatch):
    """Without a reset the peak of the process may be that of an earlier run: unknown, unless it grows."""
    monkeypatch.setattr(devices, "process_peak", lambda: 1000)
    monkeypatch.setattr(devices.Path, "write_text", lambda *_: (_ for _ in ()).throw(PermissionError()))
    known_above = devices.reset_peak_memory(CPU)
    assert devices.peak_memory(CPU, known_above) is None
    monkeypatch.setattr(devices, "process_peak", lambda: 1001)
    assert devices.peak_memory(CPU, known_above) == 1001
