"""Files of hidden states: a folder that runs share, one after another and at the same time.

A file `KEY-NN-blocks-SECONDSs.npy` holds the hidden states of all messages after NN blocks, (tokens, D) in float32,
which took so many seconds to compute. It is written under another name, so a file of this name is whole.
"""

import os
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from runner.data.messages import Stage


@dataclass
class States:
    """Messages as they are after `n_blocks`: token ids where it is 0, else hidden states, mapped from the file."""

    messages: dict  # {split: Messages}
    n_blocks: int = 0
    seconds: float = 0.0  # that computing them took, from the first block on
    path: Path | None = None  # of the file; beside token ids, of one that cannot be used


class FeatureFiles:
    """The folder, which holds `max_bytes` at most: the least recently used files are removed first."""

    def __init__(self, folder, max_bytes):
        self.folder, self.max_bytes = Path(folder), max_bytes

    def by_last_use(self, *patterns):
        """[(time of the last use, size, path), ...], the oldest first, of what other runs have not just removed."""
        found = []
        for path in (path for pattern in patterns for path in self.folder.glob(pattern)):
            with suppress(FileNotFoundError):
                facts = path.stat()
                found.append((facts.st_mtime, facts.st_size, path))
        return sorted(found)

    def deepest(self, key, n_blocks):
        """The newest path with the most blocks, but no more than `n_blocks`; None if there is none. Raises OSError."""
        found = [(path.name[:19], used, path) for used, _, path in self.by_last_use(f"{key}-*.npy")]
        return max((file for file in found if file[0] <= f"{key}-{n_blocks:02}"), default=[None])[-1]

    def open(self, path, messages):
        """The States of `messages` in a file. Raises OSError."""
        _, n_blocks, _, seconds = path.stem.split("-")
        of_splits = map_rows(path, "r").split([len(part.x) for part in messages.values()])
        with suppress(OSError):  # another user's file
            os.utime(path)  # the time of its last use
        mapped = {
            split: replace(part, stage=Stage.HIDDEN_STATES, x=x, n_blocks=int(n_blocks))
            for (split, part), x in zip(messages.items(), of_splits)
        }
        return States(mapped, int(n_blocks), float(seconds[:-1]), path)

    @contextmanager
    def locked(self, part, console):
        """Within it no other process writes to `part`: waits for one that does. After it nothing is there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = lock_of(part)
        try:
            lock.acquire()
        except Timeout:
            console.info("Frozen features: waiting for another run, which computes them")
            lock.acquire(timeout=-1)
        try:
            yield
        finally:
            # The lock's file too is removed while it is held: whoever waits sees that it is gone, and makes a new one.
            for path in (part, lock.lock_file):
                with suppress(OSError):
                    os.unlink(path)
            lock.release()

    def create(self, part, shape):
        """A new file for a matrix (n, D), as a tensor to be filled. Raises OSError where the disk is full."""
        row = bytes(4 * shape[1])  # if the disk were full later, writing to the map would kill the process
        part.unlink(missing_ok=True)  # of a run that was killed
        self.make_room(shape[0] * len(row))
        with open(part, "wb") as file:
            np.lib.format.write_array_header_1_0(file, dict(descr="<f4", fortran_order=False, shape=shape))
            for _ in range(shape[0]):
                file.write(row)
        return map_rows(part, "r+")

    def publish(self, part, seconds):
        """Give a file that is filled its name, and return it. Nobody may have it mapped any more. Raises OSError."""
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        return part.replace(f"{part.with_suffix('')}-{seconds:.1f}s.npy")

    def make_room(self, size):
        """Remove the least recently used files until there is room for `size` bytes. Raises OSError.

        Where the system removes a file that is in use, who has mapped it can still read it. What another run is writing
        stays, so there may be too much for a while.
        """
        if size > self.max_bytes:
            raise OSError("they would take more than --feature_cache_gb")
        files = self.by_last_use("*-blocks*.npy", "*-blocks.part")
        total = size + sum(file_size for _, file_size, _ in files)
        for _, file_size, path in files:
            if total > self.max_bytes:
                with suppress(OSError, Timeout), lock_of(path) as lock:  # Windows removes nothing that is mapped
                    path.unlink(missing_ok=True)
                    total -= file_size
                    os.unlink(lock.lock_file)


def lock_of(path):
    """The lock of a file, which is not waited for. A soft lock would outlast a killed run."""
    return FileLock(path.with_suffix(".lock"), timeout=0, fallback_to_soft=False)


def map_rows(path, mode):
    """The matrix in an .npy file as a tensor. Raises OSError, also for a file that is none."""
    try:
        array = np.lib.format.open_memmap(path, mode=mode)
    except ValueError as error:
        raise OSError(f"{path}: {error}") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, that nothing may be written to what is mapped for reading
        return torch.from_numpy(array)
