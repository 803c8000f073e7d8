"""Where a run computes: the device, its precision, its memory and its random state."""

import importlib.util
import os
import platform
import re
import sys
from contextlib import suppress
from pathlib import Path

import torch

from runner.files import UserError
from runner.machine import processes


def resolve_device(name):
    """The torch.device that `--device` names, of several processes this one's.

    Raises UserError where there is none of that kind, or not one for each process.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, is_available in available.items() if is_available)
    if not available[name]:
        raise UserError(f"--device {name}: PyTorch finds none here; use --device auto")
    n_processes = processes.local_world_size()
    if name == "mps" and n_processes > 1:
        raise UserError("--device mps is for one process; use --device cpu with several")
    if name != "cuda" or not processes.is_launched():
        return torch.device(name)
    if n_processes > (n_devices := torch.cuda.device_count()):
        raise UserError(f"{n_processes} processes cannot have a CUDA device each: this host has {n_devices}")
    torch.cuda.set_device(processes.local_rank())
    return torch.device("cuda", processes.local_rank())


def describe_devices(device):
    """The devices of all processes, which are alike, by name: `2 × NVIDIA A100-SXM4-40GB`, or one's name alone."""
    n_processes = processes.world_size()
    return f"{n_processes} × {describe_device(device)}" if n_processes > 1 else describe_device(device)


def describe_device(device):
    """The device by name: `NVIDIA A100-SXM4-40GB`, `MPS, arm64`, `CPU, 8 threads`."""
    match device.type:
        case "cuda":
            return torch.cuda.get_device_name(device)
        case "mps":
            return f"MPS, {platform.machine()}"
        case _:
            n_threads = torch.get_num_threads()
            return f"CPU, {n_threads} thread{'s' if n_threads > 1 else ''}"


def is_accelerator(device):
    """Whether a device is to be compared with the CPU."""
    return device.type != "cpu"


def describe_disagreement(found, expected, precision, device):
    """What to warn of where logits (B, K) that `device` has found are not those `expected`, the CPU's; or None.

    They may differ by 1% of the range of the CPU's, with reduced precision by 10%.
    """
    difference = (found.float().cpu() - expected).abs().max().item()
    spread = (expected.max() - expected.min()).item()
    if difference <= (0.01 if precision == "fp32" else 0.1) * spread:  # also not where it is NaN
        return None
    system = f"CUDA {torch.version.cuda}" if device.type == "cuda" else f"macOS {platform.mac_ver()[0]}"
    whose = f"the device of {processes.describe_process()}" if processes.world_size() > 1 else "this device"
    return (
        f"{whose} does not compute what the CPU does: logits of two messages differ by up to "
        f"{difference:.2g}, and the CPU's range over {spread:.2g} ({describe_device(device)}, PyTorch "
        f"{torch.__version__}, {system}); do not trust the results before --device cpu has confirmed them"
    )


def describe_processor():
    """The processor and the instructions that PyTorch uses: on others, the last digits of a product differ."""
    facts = [platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability()]
    with suppress(OSError):  # Linux, of the first processor
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        facts += re.findall(r"^(?:model|model name|cpu family|CPU part|flags|Features)\s*: (.*)", first, re.M)
    return ", ".join(facts)


def set_precision(precision, device):
    """Allow or forbid TF32 in float32 products. Raises UserError for `tf32` on a device without it."""
    if precision == "tf32" and device.type != "cuda":
        raise UserError(f"--precision tf32 is for CUDA; the device is {device}")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def free_memory(device):
    """Bytes that can still be allocated on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        free = int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024
    except (OSError, TypeError):  # only Linux says what is available: elsewhere half of all memory
        has_sysconf = hasattr(os, "sysconf")  # not on Windows, which is taken to have 8 GB
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if has_sysconf else 4 * 10**9
    return min([free, *free_in_control_groups()])


def free_in_control_groups(groups=Path("/proc/self/cgroup"), root=Path("/sys/fs/cgroup")):
    """Bytes below each memory limit that holds for this process: its Linux control group's and those above it.

    Page cache counts as free, since the kernel drops it before it refuses memory. `groups` lists the groups of this
    process, in version 1 one for each resource; `root` is where they are mounted. In a container the path of a group
    may be that on the host, while only the container's own part is mounted: what is not there is skipped.
    (Linux documentation, admin-guide/cgroup-v2 and cgroup-v1/memory.)
    """
    try:
        lines = [line.split(":", 2) for line in groups.read_text().splitlines()]
    except OSError:
        return []
    free = []
    for _, resources, group in lines:
        if resources == "":  # version 2
            mount, limit, used, cache = root, "memory.max", "memory.current", r"^(?:in)?active_file (\d+)"
        elif "memory" in resources.split(","):
            mount, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = r"^total_(?:in)?active_file (\d+)"
        else:
            continue
        path = mount / group.lstrip("/")
        for folder in (path, *path.parents):
            if not folder.is_relative_to(mount):
                break
            with suppress(OSError, ValueError):  # no such file, or "max"
                in_use = int((folder / used).read_text())
                in_cache = sum(map(int, re.findall(cache, (folder / "memory.stat").read_text(), re.M)))
                free.append(int((folder / limit).read_text()) - max(in_use - in_cache, 0))
    return free


def reset_peak_memory(device):
    """Reset the peak of `peak_memory`. Returns the earlier peak in bytes if it could not be reset, else 0."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return 0
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux
        return 0
    except OSError:
        return 0 if device.type == "mps" else process_peak() or 0


def peak_memory(device, known_above=0):
    """The most memory that this process has held, in bytes: of the device, or main memory; None where unknown.

    `known_above` is what `reset_peak_memory` returned: an earlier part of the process has held as much.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    peak = process_peak()
    return peak if peak is not None and peak > known_above else None


def process_peak():
    """The most main memory that this process has held, in bytes, since the last reset; None where unknown."""
    with suppress(OSError, TypeError):  # Linux
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    if not importlib.util.find_spec("resource"):  # Windows
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def random_states(device):
    """The states of PyTorch's random generators, of the CPU and of `device`, by device type."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = getattr(torch, device.type).get_rng_state()
    return states


def set_random_states(states):
    """Restore what `random_states` gave."""
    for kind, state in states.items():
        generator = torch if kind == "cpu" else getattr(torch, kind)
        generator.set_rng_state(state.clone())
