"""Where a run computes: the device, whether it can be trusted, its precision, its memory, its random state."""

import math
import platform
import re
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from runner.files import NonFiniteError, UserError
from runner.machine import processes

# --- the device ---


def resolve_device(name):
    """(the torch.device that `--device` names, why `auto` passed over another one or None).

    Of several processes it is this one's. Raises UserError where there is none of that kind, where PyTorch cannot use
    it, or where there is not one for each process.
    """
    passed_over = []
    for kind in ("cuda", "mps", "cpu") if name == "auto" else (name,):
        is_there, problem = find(kind)
        if is_there and problem is None:
            return own_device(kind), "; ".join(passed_over) or None
        if name != "auto" or (is_there and processes.is_launched()):  # all processes compute on devices of one kind
            raise UserError(f"--device {kind}: {problem or 'PyTorch finds none here'}; use --device auto or cpu")
        if is_there:
            passed_over.append(f"{kind.upper()} is not used: {problem}")


def find(kind):
    """(whether there is a device of this kind, why PyTorch cannot compute on one or None): a product is tried."""
    if kind == "cpu":
        return True, None
    with warnings.catch_warnings(record=True) as caught:  # of a driver that is too old PyTorch only warns
        warnings.simplefilter("always")
        is_available = torch.cuda.is_available() if kind == "cuda" else torch.backends.mps.is_available()
        try:
            if is_available:
                ones = torch.ones(2, 2, device=kind)
                (ones @ ones).sum().item()
                return True, None
            if kind == "cuda":
                torch.cuda.init()  # raises what is missing
        except (RuntimeError, AssertionError) as error:
            return is_available or bool(caught), describe_failure(error)
    return False, None


def describe_failure(error):
    """Why a device cannot be used, in one line, from PyTorch's error."""
    if "no kernel image" in str(error):
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        supported = ", ".join(torch.cuda.get_arch_list())
        name = torch.cuda.get_device_name()
        return f"{name} has compute capability {capability}; PyTorch {torch.__version__} supports {supported}"
    return str(error).splitlines()[0]


def own_device(kind):
    """This process's device of a kind that PyTorch can use. Raises UserError where there are fewer than processes."""
    n_processes = processes.local_world_size()
    if kind == "mps" and n_processes > 1:
        raise UserError("--device mps is for one process; use --device cpu with several")
    if kind != "cuda" or not processes.is_launched():
        return torch.device(kind)
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


def describe_system(device):
    """The device with the versions on which its products depend."""
    system = f"CUDA {torch.version.cuda}" if device.type == "cuda" else f"macOS {platform.mac_ver()[0]}"
    return f"{describe_device(device)} (PyTorch {torch.__version__}, {system})"


# --- compared with the CPU ---

TOLERANCE = {"fp32": 0.01, "tf32": 0.1, "bf16": 0.1}  # of bf16, 0.02 was the most seen, of float32 below 0.0001
NEGLIGIBLE = 1e-3


def compare_results(compute, expected, precision):
    """Compare what `compute()` gives with what is `expected`, {name: tensor}: (why they differ or None, by how much).

    It is called twice: a product that changes from call to call may be right once.
    """
    deviation, name = 0.0, ""
    try:
        for _ in range(2):
            deviation, name = max((deviation, name), largest_deviation(compute(), expected))
    except (NonFiniteError, NotImplementedError) as error:
        return str(error).splitlines()[0], None
    is_wrong = deviation > TOLERANCE[precision]
    return f"{name} differs by {deviation:.1%} of the largest entry" if is_wrong else None, f"{deviation:.1e} ({name})"


def largest_deviation(found, expected):
    """(how far, which): the largest difference between results {name: tensor}, relative to the tensor's largest entry.

    A gradient that is NEGLIGIBLE beside the largest one is rounding (that of the key's bias is nothing else: it cancels
    in the softmax); its difference is relative to NEGLIGIBLE times the largest. NaN is infinitely far.
    """
    sizes = {name: tensor.abs().max().item() for name, tensor in expected.items()}
    least = NEGLIGIBLE * max((size for name, size in sizes.items() if "gradient" in name), default=0.0)
    worst = (0.0, next(iter(expected)))
    for name, tensor in expected.items():
        difference = (found[name].float() - tensor).abs().max().item()
        if difference != 0:
            deviation = difference / max(sizes[name], least, torch.finfo(torch.float32).tiny)
            worst = max(worst, (math.inf if math.isnan(deviation) else deviation, name))
    return worst


# --- precision ---


def set_precision(precision, device):
    """Allow or forbid TF32 in float32 products. Raises UserError for `tf32` on a device without it."""
    if precision == "tf32" and device.type != "cuda":
        raise UserError(f"--precision tf32 is for CUDA; the device is {device}")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


# --- memory ---


def release_memory(device):
    """Give back what PyTorch keeps for later tensors, so that `free_memory` counts it as free."""
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()


def free_memory(device):
    """Bytes that can still be allocated on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return min([psutil.virtual_memory().available, *free_in_control_groups()])


def free_in_control_groups(groups=Path("/proc/self/cgroup"), root=Path("/sys/fs/cgroup")):
    """Bytes below each memory limit of this process's Linux control group (version 2) and of those above it.

    Page cache counts as free, since the kernel drops it before it refuses memory. `groups` says which group this is,
    `root` is where groups are mounted. In a container the path may be that on the host, while only the container's own
    part is mounted: what is not there is skipped. (Linux documentation, admin-guide/cgroup-v2.)
    """
    with suppress(OSError, StopIteration):
        lines = groups.read_text().splitlines()
        path = root / next(line for line in lines if line.startswith("0::")).removeprefix("0::").lstrip("/")
        return [free for folder in (path, *path.parents) if folder.is_relative_to(root) for free in free_in(folder)]
    return []


def free_in(group):
    """[bytes below the memory limit of one control group], or [] where it has none."""
    with suppress(OSError, ValueError):  # no such file, or "max"
        limit = int((group / "memory.max").read_text())
        cache = re.findall(r"^(?:in)?active_file (\d+)", (group / "memory.stat").read_text(), re.M)
        return [limit - max(int((group / "memory.current").read_text()) - sum(map(int, cache)), 0)]
    return []


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
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- random state ---


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
