"""The device on which a run computes: which one, its precision, its memory, its random state."""

import platform
import re
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from runner.files import UserError
from runner.machine import processes

# --- the device ---


def resolve_device(name):
    """Return (torch.device that --device names, why `auto` did not take a better one or None), after a trial matmul.

    Each rank gets its own device. Raises UserError if PyTorch cannot compute on such a device, or if there are fewer of
    them than ranks.
    """
    is_available = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    why_not = None
    for kind in [kind for kind in is_available if is_available[kind]] if name == "auto" else [name]:
        device = device_of_rank(kind)
        try:
            ones = torch.ones(2, 2, device=device)
            (ones @ ones).sum().item()
            return device, why_not
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0].split(". ")[0]
            if name != "auto" or processes.is_launched():  # all ranks must compute on devices of one kind
                raise UserError(f"--device {kind}: {reason}; use --device auto or cpu") from None
            why_not = f"{kind.upper()} is not used: {reason}"


def device_of_rank(kind):
    """Return the torch.device of this rank, of a kind ("cpu", "mps", "cuda"). Raises UserError if there are too few."""
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
    """Return the name of the devices of all ranks, which are alike: `2 × NVIDIA A100-SXM4-40GB`."""
    n = processes.world_size()
    return f"{n} × " * (n > 1) + describe_device(device)


def describe_device(device):
    """Return the name of a device: `NVIDIA A100-SXM4-40GB`, `MPS, arm64`, `CPU, 8 threads`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"MPS, {platform.machine()}"
    n_threads = torch.get_num_threads()
    return f"CPU, {n_threads} thread{'s' if n_threads > 1 else ''}"


def describe_system(device):
    """Return the name of a device with the versions on which its results depend."""
    system = f"CUDA {torch.version.cuda}" if device.type == "cuda" else f"macOS {platform.mac_ver()[0]}"
    return f"{describe_device(device)} (PyTorch {torch.__version__}, {system})"


# --- precision ---


def set_precision(precision, device):
    """Allow or forbid TF32 in float32 matmuls. Raises UserError for `tf32` on a device other than CUDA."""
    if precision == "tf32" and device.type != "cuda":
        raise UserError(f"--precision tf32 is for CUDA; the device is {device}")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


# --- memory ---


def free_memory(device):
    """Return how many bytes this rank can still allocate on `device`. The ranks of a host share its main memory.

    Memory that PyTorch holds on the device for later tensors is free.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return min([psutil.virtual_memory().available, *free_in_control_groups()]) // processes.local_world_size()


def describe_short_memory(model, device, is_sharded):
    """Return a line if training a model, which may be on the meta device, needs more memory than is free; or None.

    Activations and frozen features are not counted.
    """
    n_shards = processes.world_size() if is_sharded else 1
    weights = sum(p.nbytes for p in model.parameters()) // n_shards
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad) // n_shards
    needs = dict(weights=weights, gradients=trained, optimizer=2 * trained)  # AdamW keeps two moments
    if (needed := sum(needs.values())) <= (free := free_memory(device)):
        return None
    listed = ", ".join(f"{what} {n / 1e9:.2f} GB" for what, n in needs.items())
    return f"training needs {needed / 1e9:.2f} GB in each process, but only {free / 1e9:.2f} GB are free: {listed}"


def free_in_control_groups(groups=Path("/proc/self/cgroup"), root=Path("/sys/fs/cgroup")):
    """Return the free bytes below each memory limit of this process's Linux control group (v2) and its ancestors.

    The page cache counts as free, since the kernel drops it before it refuses memory. `groups` names the group of this
    process, `root` is where groups are mounted (Linux documentation, admin-guide/cgroup-v2).
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
    """Return the most memory in bytes that this process has held so far, of the device or main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- random state ---


def random_generators(device):
    """Return {device type: PyTorch's module with its random generator} for the CPU and for `device`."""
    return {kind: torch if kind == "cpu" else getattr(torch, kind) for kind in ("cpu", device.type)}
