"""Where a run computes: the device, whether it can be trusted, its precision, its memory, its random state."""

import math
import platform
import re
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from runner.files import NonFiniteError, UserError
from runner.machine import processes

# --- the device ---


def resolve_device(name):
    """(the torch.device that `--device` names, why `auto` passed over another one or None): a product is tried.

    Of several processes it is this one's. Raises UserError where PyTorch cannot compute on a device of that kind, or
    there is not one for each process.
    """
    is_available = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    why_not = None
    for kind in [kind for kind in is_available if is_available[kind]] if name == "auto" else [name]:
        device = own_device(kind)
        try:
            ones = torch.ones(2, 2, device=device)
            (ones @ ones).sum().item()
            return device, why_not
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0].split(". ")[0]
            if name != "auto" or processes.is_launched():  # all processes compute on devices of one kind
                raise UserError(f"--device {kind}: {reason}; use --device auto or cpu") from None
            why_not = f"{kind.upper()} is not used: {reason}"


def own_device(kind):
    """This process's torch.device of a kind. Raises UserError where there are fewer than processes."""
    n_processes = processes.local_world_size()
    if kind == "mps" and n_processes > 1:
        raise UserError("--device mps is for one process; use --device cpu with several")
    if kind != "cuda" or not processes.is_launched():
        return torch.device(kind)
    if n_processes > (n_devices := torch.cuda.device_count()):
        raise UserError(f"{n_processes} processes cannot have a CUDA device each: this host has {n_devices}")
    torch.cuda.set_device(processes.local_rank())
    return torch.device(kind, processes.local_rank())


def describe_devices(device):
    """The devices of all processes, which are alike: `2 × NVIDIA A100-SXM4-40GB`, or one's name alone."""
    n = processes.world_size()
    return f"{n} × " * (n > 1) + describe_device(device)


def describe_device(device):
    """The device by name: `NVIDIA A100-SXM4-40GB`, `MPS, arm64`, `CPU, 8 threads`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"MPS, {platform.machine()}"
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
    try:
        deviation, name = max(largest_deviation(compute(), expected) for _ in range(2))
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
    deviations = []
    for name, tensor in expected.items():
        difference = (found[name].float() - tensor).abs().max().item()
        deviation = difference / max(sizes[name], least, torch.finfo(torch.float32).tiny)
        deviations.append((math.inf if math.isnan(deviation) else deviation, name))
    return max(deviations)


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
    """Bytes that this process can still allocate on `device`: the processes of a host share its main memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return min([psutil.virtual_memory().available, *free_in_control_groups()]) // processes.local_world_size()


def free_in_control_groups(groups=Path("/proc/self/cgroup"), root=Path("/sys/fs/cgroup")):
    """Bytes below each memory limit of this process's Linux control group (version 2) and of those above it.

    Page cache counts as free, since the kernel drops it before it refuses memory. `groups` says which group this is,
    `root` is where groups are mounted. (Linux documentation, admin-guide/cgroup-v2.)
    """
    free = []
    with suppress(OSError, StopIteration):
        own = next(line for line in groups.read_text().splitlines() if line.startswith("0::"))
        path = root / own.removeprefix("0::").lstrip("/")
        for group in (path, *path.parents):
            with suppress(OSError, ValueError):  # it has no limit, or, in a container, is not mounted
                limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
                cache = re.findall(r"^(?:in)?active_file (\d+)", (group / "memory.stat").read_text(), re.M)
                free.append(limit - max(used - sum(map(int, cache)), 0))
    return free


def peak_memory(device):
    """The most memory that this process has held so far, in bytes: of the device, or main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

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
