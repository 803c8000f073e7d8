"""Files of kept hidden states: a folder that runs share, one after another and at the same time.

A file `KEY-NN-blocks-SECONDSs.npy` holds the hidden states of all messages after NN blocks, (tokens, D) in float32,
which took so many seconds to compute. It is written under another name, so a file of this name is whole.
"""

import math
import os
import re
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from runner.data.messages import Stage

NAME = re.compile(r"[0-9a-f]{16}-(\d\d)-blocks-([\d.]+)s\.npy")


@dataclass
class KeptStates:
    """The hidden states of all messages after `n_blocks`, mapped from a file; without a file there are none."""

    x: torch.Tensor | None = None  # (tokens, D), read from the disk where it is indexed
    n_blocks: int = 0
    seconds: float = 0.0  # that computing them took, from the first block on
    path: Path | None = None

    def continue_from(self, messages):
        """{split: Messages} with these states, if there are any, in place of token ids."""
        if self.x is None:
            return messages
        parts = self.x.split([len(part.x) for part in messages.values()])
        return {
            split: replace(part, stage=Stage.HIDDEN_STATES, x=x, n_blocks=self.n_blocks)
            for (split, part), x in zip(messages.items(), parts)
        }


class FeatureFiles:
    """The folder, which holds `max_bytes` at most: the least recently used files are removed first."""

    def __init__(self, folder, max_bytes):
        self.folder, self.max_bytes = Path(folder), max_bytes

    def deepest(self, key, n_blocks):
        """The newest path with the most blocks, but no more than `n_blocks`; None if there is none. Raises OSError."""
        paths = [path for path in self.folder.glob(f"{key}-*.npy") if int(NAME.fullmatch(path.name)[1]) <= n_blocks]
        return max(paths, key=lambda path: (path.name[:19], path.stat().st_mtime), default=None)

    def open(self, path):
        """The KeptStates in a file. Raises OSError."""
        n_blocks, seconds = NAME.fullmatch(path.name).groups()
        states = KeptStates(map_rows(path, "r"), int(n_blocks), float(seconds), path)
        with suppress(OSError):  # another user's file
            os.utime(path)  # the time of its last use
        return states

    def part(self, key, n_blocks):
        """The path under which a file is written."""
        return self.folder / f"{key}-{n_blocks:02}-blocks.part"

    @contextmanager
    def turn(self, part, console):
        """Within it no other process writes to `part`, and after it nothing is there. Raises OSError.

        Waits for a process that does, and says so.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(part.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            console.info("Frozen features: waiting for another run, which computes them")
            lock.acquire()
        try:
            yield
        finally:
            # The lock's file too is removed while it is held: whoever waits sees that it is gone, and makes a new one.
            for path in (part, lock.lock_file):
                with suppress(OSError):
                    os.unlink(path)
            lock.release()

    def create(self, part, shape):
        """A new file for a matrix of `shape`, as a tensor to be filled. Raises OSError where the disk is full."""
        size = 4 * math.prod(shape)
        self.make_room(size)
        with open(part, "wb") as file:
            np.lib.format.write_array_header_1_0(file, dict(descr="<f4", fortran_order=False, shape=shape))
            reserve(file, size)
        return map_rows(part, "r+")

    def publish(self, part, seconds):
        """Give a file that is filled its name, and return it. Nobody may have it mapped any more. Raises OSError."""
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        return part.replace(f"{part.with_suffix('')}-{seconds:.1f}s.npy")

    def make_room(self, size):
        """Remove the least recently used files until there is room for `size` bytes.

        Where the system removes a file that is in use, who has mapped it can still read it. A `.part` was left by a
        process that was killed, or it is the newest.
        """
        paths = [path for path in self.folder.glob("*-blocks*") if path.suffix in (".npy", ".part")]
        files = {path: path.stat() for path in paths}
        total = size + sum(facts.st_size for facts in files.values())
        for path in sorted(files, key=lambda path: files[path].st_mtime):
            if total > self.max_bytes:
                with suppress(OSError):  # Windows removes nothing that is mapped
                    path.unlink()
                    total -= files[path].st_size


def map_rows(path, mode):
    """The matrix in an .npy file as a tensor. Raises OSError, also for a file that is none."""
    try:
        array = np.lib.format.open_memmap(path, mode=mode)
    except ValueError as error:
        raise OSError(f"{path}: {error}") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, that nothing may be written to what is mapped for reading
        return torch.from_numpy(array)


def reserve(file, size):
    """Append `size` zeros. Raises OSError where the disk is full: later, writing to the map would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), file.tell(), size)
    else:
        for start in range(0, size, 1 << 20):
            file.write(bytes(min(1 << 20, size - start)))
