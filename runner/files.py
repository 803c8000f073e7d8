"""Errors that a user sees, checksums, atomic writes.

The lowest module of the project: it imports no other.
"""

import errno
import glob
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

# --- errors that a user sees, as one line and without a traceback ---


class UserError(Exception):
    """What a user can do something about; `status` is the exit status: 2 for an option or a file, 1 for the rest."""

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


class NonFiniteError(UserError):
    """A loss, a logit or a parameter is infinite or not a number: the run cannot be trusted."""

    def __init__(self, message):
        super().__init__(message, status=1)


# --- checksums and values ---


def sha256_of(path):
    """SHA-256 of a file's content, in hexadecimal. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(content):
    """SHA-256 of what JSON can hold, in whatever order its entries are."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sha256_of_tensors(tensors, *texts):
    """SHA-256 of tensors on the CPU with their names, types and shapes, and of further texts."""
    sha256 = hashlib.sha256(json.dumps(texts).encode())
    for name, tensor in sorted(tensors.items()):
        sha256.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        sha256.update(tensor.detach().reshape(-1).view(torch.uint8).numpy())
    return sha256.hexdigest()


def require_finite(tensors, what):
    """Raises NonFiniteError that names the first of the tensors, {name: tensor}, that holds an infinity or a NaN."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        # One pass, without a copy of a float32 tensor: a NaN is passed on, an infinity is at one of the ends.
        if not all(end.isfinite() for end in tensor.float().aminmax()):
            raise NonFiniteError(f"{what} {name} has values that are infinite or not a number")


# --- whole or not at all ---


def resolve(path):
    """The Path that `path` leads to, through whatever links. Raises OSError for a link that leads back to itself."""
    path = Path(os.path.realpath(path))
    if path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return path


@contextmanager
def atomic_write(path):
    """A temporary path to write to; at the end its file, flushed to disk, replaces `path`. After an error it does not.

    Where `path` is a link, the file that it leads to is replaced. Raises OSError, also for a device or a pipe.
    """
    path = resolve(path)
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    # The name is short, so that `path` may be as long as the file system allows, and keeps the suffix, which tells
    # matplotlib the format.
    temporary = path.with_name(f".{secrets.token_hex(4)}.part{path.suffix[:8]}")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)  # safetensors replaces the file by one that only its owner can read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path, content):
    """Write `content` (bytes) to `path`, whole or not at all. Raises OSError."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


# --- used by modules that are being replaced; goes with them ---


@contextmanager
def replace_folder(path, check):
    """A temporary folder to write files to, which at the end takes the place of `path`, and after an error does not.

    `check(folder)` raises OSError for a folder that is not to be replaced. It sees the one that was at `path` when that
    is moved aside and nobody writes into it any more by this name. A killed process leaves a folder beside it, from
    which the next writer restores what was at `path`, if it is not there. Raises OSError.
    """
    path = Path(path).resolve()
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.part/old"):  # of one killed between the two moves
        if not path.exists():
            os.replace(left, path)
    remove_left_overs(path.parent, glob.escape(path.name))
    outer = part_folder(path)
    new, old = outer / "new", outer / "old"
    try:
        new.mkdir(parents=True)
        yield new
        for file in new.iterdir():
            flush(file)
        if path.exists():
            os.replace(path, old)
            check(old)
        os.replace(new, path)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(outer, ignore_errors=True)


def part_folder(path):
    """Where this process writes what is to be at `path`; `remove_left_overs` knows its name."""
    return path.with_name(f"{path.name}.{host_name()}.{os.getpid()}.{secrets.token_hex(4)}.part")


def flush(path, mode=None):
    """Flush a file to disk, and give it a mode, by default that of a new file."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    with suppress(PermissionError):  # some file systems know no modes
        os.chmod(path, 0o666 & ~current_umask() if mode is None else mode)


LEFT_OVER_AFTER = 24 * 3600  # seconds without a write after which no writer can still be at work


def remove_left_overs(parent, names):
    """Remove the folders that killed writers left in the folder `parent`; `names` is a pattern of what they wrote.

    They are those of this host, and those to which nothing was written for a day. A process number means nothing on
    another host, nor in another container of this one.
    """
    for folder in parent.glob(f"{names}.*.part"):
        if not re.search(r"\.\d+(\.[0-9a-f]{8})?\.part$", folder.name):
            continue  # somebody else's
        *_, host, process_number, _ = ["", "", *folder.name.removesuffix(".part").split(".")]
        is_ours = host == host_name() and process_number.isdigit()
        with suppress(OSError):  # another one may be removing it too
            last_write = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if time.time() - last_write > LEFT_OVER_AFTER or is_ours and not is_running(int(process_number)):
                shutil.rmtree(folder, ignore_errors=True)


def host_name():
    """This host, and where there are containers this one, as one word without dots."""
    with suppress(OSError):  # Linux: processes with another namespace have other numbers
        return f"{platform.node()}-{os.stat('/proc/self/ns/pid').st_ino}".replace(".", "-")
    return platform.node().replace(".", "-")


def is_running(process_number):
    """Whether a process of this number may be running here; if unknown, as on Windows, it may."""
    if os.name != "posix":
        return True
    try:
        os.kill(process_number, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def current_umask():
    """The umask of this process, which can only be read by setting it."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


def append_bytes(descriptor, content, size):
    """Append `content` (bytes) to an open file of `size` bytes, all of it or none. Raises OSError."""
    try:
        if os.write(descriptor, content) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
    except OSError:
        with suppress(OSError):
            os.ftruncate(descriptor, size)
        raise
