"""Files of tensors, `.safetensors` with a description and a checksum: written at once, or rows as they come."""

import errno
import hashlib
import json
import math
import os
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from runner.files import UserError, atomic_write, sha256_of_tensors

# --- at once: checkpoints and saved classifiers ---


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
        except SafetensorError as error:  # raised for a full disk and the like
            raise OSError(str(error)) from error


def read_tensors(path, kind, version):
    """(description, tensors) of a file that `write_tensors` wrote. Nothing in it can run code.

    Raises UserError for a file that is damaged, of another kind or of another version of the format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as a {kind}: {error}") from None
    check_kind(path, metadata, kind, version)
    check_sha256(path, metadata, sha256_of_tensors(tensors, kind, str(version), metadata.get("description")))
    return json.loads(metadata["description"]), tensors


def check_kind(path, metadata, kind, version):
    """Raises UserError for a file of another kind or format, according to its metadata."""
    if metadata.get("kind") != kind:
        raise UserError(f"{path} is not a {kind} of this program")
    if metadata.get("format") != str(version):
        raise UserError(f"{path} is a {kind} in format {metadata.get('format')}; this program reads format {version}")


def check_sha256(path, metadata, sha256):
    """Raises UserError for a file whose content has another SHA-256 than its metadata say."""
    if metadata.get("sha256") != sha256:
        raise UserError(f"{path} is damaged: its SHA-256 differs from the one that it was written with")


# --- rows as they come: kept hidden states ---

# The header of a file of rows has a fixed length, so that it can be written last. (The format allows spaces in it.)
HEADER_BYTES = 65536


class FileRows:
    """A matrix (N, D) of float32 in a file, indexed like a tensor on the CPU; only the rows asked for are in memory.

    Rows are read and written, not mapped into memory: a map counts against a limit on the process's address space, and
    where the disk fails or the file was cut it kills the process, with no error to report.
    """

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, file, offset, shape):
        self.file, self.offset, self.shape = file, offset, tuple(shape)  # the file is binary and unbuffered
        self.nbytes = 4 * math.prod(shape)

    def __getitem__(self, indices):
        """The rows `indices`, of any shape (...), as a tensor (..., D). Raises OSError."""
        rows, inverse = indices.unique(return_inverse=True)
        found = torch.empty(len(rows), self.shape[1])
        for part in self.runs(rows, found):
            self.transfer(self.file.readinto, part, OSError(errno.EIO, "the file has become shorter"))
        return found[inverse]

    def __setitem__(self, indices, values):
        """Write `values` (n, D) to the rows `indices` (n,). Raises OSError."""
        for part in self.runs(indices, values):
            self.transfer(self.file.write, part, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    def transfer(self, call, part, error):
        """Have `call` read or write all of an array, in as many pieces as the file system wants. Raises `error`."""
        rest = memoryview(part).cast("B")
        while rest:
            done = call(rest)
            if not done:
                raise error
            rest = rest[done:]

    def runs(self, indices, values):
        """The parts of `values` (n, D) whose rows `indices` (n,) follow each other; the file is moved to each."""
        start = 0
        for end in [*((indices.diff() != 1).nonzero().flatten() + 1).tolist(), len(indices)]:
            self.file.seek(self.offset + 4 * self.shape[1] * int(indices[start]))
            yield values[start:end].numpy()
            start = end


@dataclass
class NewRows:
    """Matrices that are being written, and what is to stand beside them; None: the file is not to be kept."""

    rows: dict  # {name: FileRows}
    description: dict | None = None  # anything JSON can hold


class NotKept(Exception):
    """Ends `atomic_write` without a file."""


@contextmanager
def create_rows(path, kind, version, shapes):
    """Yields NewRows for matrices of `shapes`, {name: (N, D)}, in any order, to be filled, and to be described last.

    Its file is written to `path` whole or not at all. The disk's space is reserved at once. Raises OSError.
    """
    with suppress(NotKept), atomic_write(path) as temporary, open(temporary, "wb+", buffering=0) as file:
        new = NewRows(place_rows(file, shapes))
        reserve(file, file_size(shapes))
        yield new
        if new.description is None:
            raise NotKept
        metadata = dict(kind=kind, format=str(version), description=json.dumps(new.description))
        metadata["sha256"] = sha256_of_rows(file, metadata, new.rows)
        header = header_of(metadata, new.rows)
        file.seek(0)
        file.write(header)


def open_rows(file, kind, version):
    """(description, {name: FileRows}) of a file that `create_rows` wrote, open for reading and unbuffered.

    Raises UserError for a file that is damaged, of another kind or of another version of the format.
    """
    try:
        header = file.read(HEADER_BYTES)
        entries = json.loads(header[8:])
        metadata = entries.pop("__metadata__")
        rows = place_rows(file, {name: entry["shape"] for name, entry in entries.items()})
        if header_of(metadata, rows) != header:
            raise ValueError("its header is not one of this program")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file.name} cannot be read as a {kind}: {error}") from None
    check_kind(file.name, metadata, kind, version)
    check_sha256(file.name, metadata, sha256_of_rows(file, metadata, rows))
    return json.loads(metadata["description"]), rows


def file_size(shapes):
    """Bytes of a file with matrices of `shapes`, {name: (N, D)}."""
    return HEADER_BYTES + sum(4 * math.prod(shape) for shape in shapes.values())


def place_rows(file, shapes):
    """{name: FileRows} for matrices of `shapes`, {name: (N, D)}, one after the other behind the header."""
    rows, offset = {}, HEADER_BYTES
    for name, shape in shapes.items():
        rows[name] = FileRows(file, offset, shape)
        offset += rows[name].nbytes
    return rows


def header_of(metadata, rows):
    """The first HEADER_BYTES of a file of {name: FileRows}, in the format of `.safetensors`."""
    header = dict(__metadata__=metadata)
    for name, matrix in rows.items():
        start = matrix.offset - HEADER_BYTES
        header[name] = dict(dtype="F32", shape=matrix.shape, data_offsets=(start, start + matrix.nbytes))
    text = json.dumps(header).encode().ljust(HEADER_BYTES - 8)
    if len(text) > HEADER_BYTES - 8:
        raise OSError(errno.EFBIG, "the description is too long")
    return len(text).to_bytes(8, "little") + text


def sha256_of_rows(file, metadata, rows):
    """SHA-256 of what follows the header, of the names and shapes in it, and of the other metadata."""
    texts = [metadata.get(name) for name in ("kind", "format", "description")]
    described = hashlib.sha256(json.dumps([texts, {name: matrix.shape for name, matrix in rows.items()}]).encode())
    file.seek(HEADER_BYTES)
    return hashlib.file_digest(file, lambda: described).hexdigest()


def reserve(file, size):
    """Make an empty file `size` bytes long. Raises OSError where the disk has no room, if the system can tell."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)
