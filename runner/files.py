"""Errors that a user sees, checksums, locks, files that are written whole or not at all, files of tensors.

The lowest module of the project: it imports no other.
"""

import errno
import glob
import hashlib
import json
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

# --- errors that a user sees, as one line and without a traceback ---


class UsageError(ValueError):
    """An option, a combination of options or an input file that cannot be used."""


class FileError(ValueError):
    """A file is damaged, or is not the file that it should be."""


class FetchError(RuntimeError):
    """Something could not be downloaded."""


class OutputError(RuntimeError):
    """Training finished, but not everything that was asked for could be written."""


# --- checksums ---


def sha256_of(path):
    """SHA-256 of a file's content, in hexadecimal. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_tensors(tensors, *texts):
    """SHA-256 of tensors on the CPU with their names, types and shapes, and of further texts."""
    sha256 = hashlib.sha256(json.dumps(texts).encode())
    for name, tensor in sorted(tensors.items()):
        sha256.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        sha256.update(tensor.detach().reshape(-1).view(torch.uint8).numpy())
    return sha256.hexdigest()


# --- whole or not at all ---


@contextmanager
def atomic_write(path):
    """A temporary path to write to; at the end its file, flushed to disk, replaces `path`. After an error it does not.

    The temporary file lies in a folder next to `path`. A killed process leaves that folder behind; the next writer
    of `path` removes it. Raises OSError.
    """
    path = Path(path).resolve()  # of a link the file that it points to is replaced
    for left_over in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
        if not is_running(left_over.suffixes[-2][1:]):
            shutil.rmtree(left_over, ignore_errors=True)
    folder = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        folder.mkdir()
        yield folder / path.name
        with open(folder / path.name, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(folder / path.name, 0o666 & ~umask)  # some writers make files that nobody else may read
        os.replace(folder / path.name, path)
        if os.name == "posix":  # the new name is to outlast a power failure too
            descriptor = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_running(process_number):
    """Whether another process of this number may be running; where that cannot be told, as on Windows, it may."""
    if os.name != "posix" or not process_number.isdigit():
        return True
    try:
        os.kill(int(process_number), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return int(process_number) != os.getpid()


def write_bytes(path, content):
    """Write `content` (bytes) to `path`, whole or not at all. Raises OSError."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


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


@contextmanager
def locked(file):
    """Hold an exclusive lock on an open file; it ends with the process, however that ends."""
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX)
    else:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
    try:
        yield
    finally:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_UN)
        else:
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)


# --- files of tensors: checkpoints and saved classifiers ---


def write_tensors(path, kind, version, description, tensors):
    """Write named tensors and a description (anything JSON can hold) as a .safetensors file, whole or not at all.

    `kind` says what the file is, `version` the version of that kind's format. Raises OSError.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = dict(kind=kind, format=str(version), description=json.dumps(description))
    metadata["sha256"] = sha256_of_tensors(tensors, *metadata.values())
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # its word for a full disk and the like
            raise OSError(str(error)) from error


def read_tensors(path, kind, version):
    """(description, tensors) of a file that `write_tensors` wrote. Nothing in it can run code.

    Raises FileError for a file that is damaged, of another kind or of another version of the format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path} cannot be read as a {kind}: {error}") from None
    if metadata.get("kind") != kind:
        raise FileError(f"{path} is not a {kind} of this program")
    if metadata.get("format") != str(version):
        raise FileError(f"{path} is a {kind} in format {metadata.get('format')}; this program reads format {version}")
    if sha256_of_tensors(tensors, kind, str(version), metadata.get("description")) != metadata.get("sha256"):
        raise FileError(f"{path} is damaged: its SHA-256 differs from the one that it was written with")
    return json.loads(metadata["description"]), tensors
