"""Devices and systems that are not at hand, pretended.

An accelerator is tensors that say `mps` or `cuda` and hold their values on the CPU. It computes what the CPU does, and
is as strict as an accelerator: a computation with tensors of both devices raises, as does a float64 on `mps` (with
PyTorch's own message). What it has to wait for is counted: copies from and to it, and questions for a value. A fault
can be planted: `falsify(name, args, result)` sees what each operation gave.
"""

import errno
import os
import signal
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# The operations that autocast runs in bfloat16.
IN_BF16 = {F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.einsum, torch.bmm}
STAND_IN = torch.device("meta", 7)  # what PyTorch itself is told, as it knows no pretended device
NO_FLOAT64 = "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
NO_FLOAT64 += "Please use float32 instead."


class PretendedTensor(torch.Tensor):
    """A tensor on the pretended device; `inner` holds its values on the CPU."""

    kind, counts, falsify = "mps", Counter(), None
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        if inner.dtype == torch.float64 and cls.kind == "mps":
            raise TypeError(NO_FLOAT64)
        like = dict(strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype)
        tensor = torch.Tensor._make_wrapper_subclass(cls, inner.shape, device=STAND_IN, **like)
        tensor.inner = inner
        return tensor

    def set_data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.inner = value.inner

    device = property(lambda self: torch.device(self.kind))
    data = property(torch.Tensor.data.__get__, set_data)

    def cpu(self):
        return self.to("cpu")

    def tolist(self):
        count("question")
        return self.inner.detach().tolist()

    def numpy(self):
        raise TypeError(f"can't convert {self.kind}:0 device type tensor to numpy")

    def __reduce_ex__(self, protocol):
        return self.inner.__reduce_ex__(protocol)  # in a file it is read for the CPU

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def count(what):
    PretendedTensor.counts[what] += 1


def unwrap(value):
    return value.inner if isinstance(value, PretendedTensor) else value


def compute(function, args, kwargs):
    """One operation of PyTorch, on the CPU's values; its result is on the device where its arguments are."""
    name = function._schema.name.removeprefix("aten::")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    pretended = [tensor for tensor in tensors if isinstance(tensor, PretendedTensor)]
    wanted = kwargs.get("device")
    on_device = bool(pretended) if wanted is None else wanted == STAND_IN
    if wanted is not None:
        kwargs = kwargs | dict(device=torch.device("cpu") if on_device else wanted)
    if name in ("copy_", "_to_copy"):
        source = args[1] if name == "copy_" else args[0]
        on_device = isinstance(args[0], PretendedTensor) if name == "copy_" else on_device
        if isinstance(source, PretendedTensor) != on_device:
            count("to the device" if on_device else "from the device")
    elif name == "_local_scalar_dense":
        count("question") if pretended else None
        return function(*map(unwrap, args), **kwargs)
    elif pretended and "index" not in name and any(t.dim() > 0 and not isinstance(t, PretendedTensor) for t in tensors):
        raise RuntimeError(f"Expected all tensors to be on the same device, in {name}")
    by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
    if pretended and (by_mask or name in ("nonzero", "masked_select")):  # the size of the result depends on values
        count("question")
    result = function(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    to_host = name == "_to_copy" and pretended and not on_device
    if (on_device or to_host) and PretendedTensor.falsify is not None:
        result = PretendedTensor.falsify(name, args, result)
    known = {id(tensor.inner): tensor for tensor in pretended}  # what is computed in place stays the same tensor

    def wrap(value):
        if not isinstance(value, torch.Tensor) or isinstance(value, PretendedTensor) or not on_device:
            return value
        return known.get(id(value)) if id(value) in known and name != "_to_copy" else PretendedTensor(value)

    return tree_map(wrap, result)


class Dispatch(TorchDispatchMode):
    """Operations without a pretended argument, such as those that make a tensor."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


class Functions(TorchFunctionMode):
    """PyTorch does not know the device: below this it is called STAND_IN. Autocast is done here."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kind = PretendedTensor.kind
        if function is torch.device or function is torch.Tensor.device.__get__:
            return function(*args, **(kwargs or {}))

        def translate(value):
            is_device = isinstance(value, torch.device) or value.__class__ is str
            return STAND_IN if is_device and str(value).split(":")[0] == kind else value

        args, kwargs = tree_map(translate, args), {name: translate(value) for name, value in (kwargs or {}).items()}
        if function in IN_BF16 and torch.is_autocast_enabled(kind):

            def lower(value):
                is_float = isinstance(value, PretendedTensor) and value.dtype == torch.float32
                return value.to(torch.bfloat16) if is_float else value

            args, kwargs = tree_map(lower, args), tree_map(lower, kwargs)
        return function(*args, **kwargs)


@contextmanager
def pretended_device(monkeypatch, kind, falsify=None):
    """Within it PyTorch has one device of this kind, "mps" or "cuda"; yields the counts of copies and questions."""
    if kind == "cuda" and torch.version.cuda is not None:
        pytest.skip("a CUDA build of PyTorch asks its runtime for the device, which cannot be pretended")
    monkeypatch.setattr(PretendedTensor, "kind", kind)
    monkeypatch.setattr(PretendedTensor, "counts", Counter())
    monkeypatch.setattr(PretendedTensor, "falsify", staticmethod(falsify) if falsify else None)
    state = torch.zeros(16, dtype=torch.uint8)
    if kind == "mps":
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: True)
        answers = dict(recommended_max_memory=12 * 10**9, current_allocated_memory=10**8, driver_allocated_memory=10**8)
    else:
        monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
        answers = dict(is_available=True, device_count=1, get_device_name="Pretended A100", is_bf16_supported=True)
        answers |= dict(mem_get_info=(40 * 10**9, 40 * 10**9), max_memory_allocated=10**9, synchronize=None)
        answers |= dict(memory_reserved=0, memory_allocated=0)
    answers |= dict(get_rng_state=state, set_rng_state=None)
    for name, answer in answers.items():
        monkeypatch.setattr(getattr(torch, kind), name, lambda *_, answer=answer, **__: answer)
    with Functions(), Dispatch():
        yield PretendedTensor.counts


@contextmanager
def pretended_windows(monkeypatch):
    """Within it a file that this process has open or mapped can be neither replaced nor removed; there is no SIGHUP."""

    def refuse_in_use(path):
        path = os.path.realpath(path)
        in_use = [os.path.realpath(f"/proc/self/fd/{descriptor}") for descriptor in os.listdir("/proc/self/fd")]
        if path in in_use or f" {path}\n" in Path("/proc/self/maps").read_text():
            raise PermissionError(errno.EACCES, "The process cannot access the file because it is being used", path)

    def guard(name, n_paths):
        function = getattr(os, name)

        def guarded(*arguments, **keywords):
            if not keywords:  # with dir_fd they are shutil's, of folders
                for path in arguments[:n_paths]:
                    refuse_in_use(path)
            return function(*arguments, **keywords)

        monkeypatch.setattr(os, name, guarded)

    for name, n_paths in dict(replace=2, rename=2, unlink=1, remove=1).items():
        guard(name, n_paths)
    monkeypatch.delattr(signal, "SIGHUP")
    yield
