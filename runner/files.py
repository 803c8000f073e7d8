"""Errors that a user sees, checksums, files that are whole or absent.

The lowest module of the project: it imports no other.
"""

import hashlib
import json
import os
import re
import secrets
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import safetensors
import torch

# --- errors that a user sees, as one line and without a traceback ---


class UserError(Exception):
    """An error that a user can act on. `status` is the exit status: 2 for an option or a file, else 1."""

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


class NonFiniteError(UserError):
    """A loss, a logit or a parameter is infinite or NaN, so the run cannot be trusted."""

    def __init__(self, message):
        super().__init__(message, status=1)


def is_out_of_memory(error):
    """Return whether an exception says that memory is short, of a device or main memory."""
    words = ("out of memory", "allocate memory", "DefaultCPUAllocator", "ALLOC_FAILED")  # in RuntimeErrors of PyTorch
    return isinstance(error, MemoryError) or any(one in str(error) for one in words)


@contextmanager
def refuse_damaged(path, advice=""):
    """Raise UserError, which says that the file `path` is damaged, where values in the block do not fit."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} is damaged ({type(error).__name__}: {reason}){advice}") from None


def require_finite(tensors, what):
    """Raise NonFiniteError, which names the tensor, if one of {name: tensor} has an infinite value or a NaN."""
    for name, tensor in tensors.items():
        # Unlike isfinite, aminmax makes no copy. It returns a NaN if there is one, and an infinity is an extreme.
        is_checked = tensor.is_floating_point() and tensor.numel()
        if is_checked and not all(end.float().isfinite() for end in tensor.aminmax()):
            raise NonFiniteError(f"{what} {name} has values that are infinite or not a number")


# --- checksums ---


def sha256_of(path):
    """Return the SHA-256 of a file's content, in hexadecimal. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(content):
    """Return the SHA-256 of what JSON can hold; the order of dictionary entries does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sha256_of_tensors(tensors):
    """Return the SHA-256 of tensors on the CPU {name: tensor}, with their names, types and shapes."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        sha256.update(tensor.detach().reshape(-1).view(torch.uint8).numpy())
    return sha256.hexdigest()


# --- safetensors ---


def read_safetensors(path):
    """Return ({name: tensor}, metadata) of a `.safetensors` file. A tensor is read from the disk when it is used.

    On Windows, which cannot map files of several GB (safetensors issue 693), all are read at once with safetensors 0.8
    or later. Raises UserError for a file that is missing, truncated or of another format.
    """
    is_mapped = sys.platform != "win32" or safetensors.__version__ < "0.8"
    try:
        with safetensors.safe_open(path, framework="pt", **({} if is_mapped else dict(backend="pread"))) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as a .safetensors file: {error}") from error


# --- whole or absent ---


@contextmanager
def atomic_write(path):
    """Yield a temporary path; at the end its file is flushed to disk and replaces `path`, unless there was an error.

    If `path` is a link, the file that it points to is replaced. Raises OSError.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f"{temporary_prefix(path)}{secrets.token_hex(4)}.part{path.suffix[:8]}")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)  # safetensors replaces the file by one that only its owner can read
        rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_prefix(path):
    """Return the prefix of temporary files for `path`: short, since the name of `path` may have the maximum length."""
    return f".{hashlib.sha256(path.name.encode()).hexdigest()[:8]}-"


def rename(source, target):
    """Rename a file over another. Windows denies this while a virus scanner has the target open: retry for 2 s."""
    give_up = time.monotonic() + (2 if sys.platform == "win32" else 0)
    while True:
        try:
            return os.replace(source, target)
        except PermissionError:
            if time.monotonic() >= give_up:
                raise
            time.sleep(0.05)


def remove_leftovers(path):
    """Remove the temporary files for `path` that killed processes have left. No other process may be writing `path`."""
    path = Path(os.path.realpath(path))
    for leftover in path.parent.glob(f"{temporary_prefix(path)}*.part*"):
        with suppress(OSError):
            leftover.unlink()


def write_bytes(path, content):
    """Write `content` (bytes) to `path`, whole or not at all. Raises OSError."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def make_room(folder, names, size, max_bytes):
    """Create `folder` and remove the least recently used files until `size` bytes more fit into `max_bytes`.

    Only files whose names match the regular expression `names` count and are removed. A process that has mapped a
    removed file can go on reading it. A temporary file of the last hour stays: it may still be being written. Raises
    OSError if `size` alone is too much.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if size > max_bytes:
        raise OSError("they would take more than --feature_cache_gb")
    found = []
    for path in folder.iterdir():
        if re.fullmatch(names, path.name):
            with suppress(FileNotFoundError):  # another process has just removed it
                found.append((path.stat().st_mtime, path.stat().st_size, path))
    total = size + sum(file_size for _, file_size, _ in found)
    for used, file_size, path in sorted(found):
        if total > max_bytes and not (path.name.startswith(".") and used > time.time() - 3600):
            with suppress(OSError):  # Windows removes no file that is mapped
                path.unlink()
                total -= file_size
