"""Hidden states after frozen blocks, on disk: kept between runs, and shared by runs at the same time.

There is one file for each key and number of blocks. The key is a hash of the circumstances: everything that a number
could depend on. So what is read is, bit for bit, what computing it would give, and a change of any circumstance finds
nothing.
"""

import hashlib
import inspect
import json
import os
import re
import shutil
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from .devices import describe_device, describe_processor
from .files import FileError, remove_left_overs, sha256_of, sha256_of_tensors
from .locks import LockFile, lock_path, try_lock
from .messages import Stage
from .tensor_files import FileRows, create_rows, open_rows

KIND, VERSION = "file of hidden states", 1
FILE_NAME = re.compile(r"[0-9a-f]{16}-\d+-blocks\.safetensors")  # what the cache may remove

# --- the key ---

# Environment variables with which libraries choose how they compute.
NUMERICAL = (
    "ATEN_",
    "CUBLAS_",
    "CUDNN_",
    "DNNL_",
    "MKL_",
    "NVIDIA_TF32_",
    "ONEDNN_",
    "OPENBLAS_",
    "PYTORCH_",
    "TORCH_",
)


def circumstances(classifier, messages, experiment, weights):
    """All that the hidden states of the frozen blocks depend on, but for the number of blocks, by name, as JSON."""
    device = classifier.device
    tensors = {f"{split}/x": part.x for split, part in messages.items()}
    tensors |= {f"{split}/lengths": part.lengths for split, part in messages.items()}
    code = {inspect.getsourcefile(type(part)) for part in (classifier, classifier.gpt)}  # a reader may have changed it
    code |= {Path(__file__).with_name(name) for name in ("features.py", "messages.py")}
    return {
        "weights": weights.sha256 or f"random, seed {experiment.seed}",
        "model size": experiment.model_size,
        "causal mask": classifier.gpt.cfg.causal,
        "token ids": sha256_of_tensors(tensors),
        "precision": experiment.precision,
        "device": f"{device.type}: {describe_device(device)}",
        "processor": describe_processor(),
        "threads": torch.get_num_threads(),
        "PyTorch": torch.__version__,
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(NUMERICAL)},
        "code": sorted(map(sha256_of, code)),
        "format": VERSION,
    }


def key_of(circumstances):
    """The key of circumstances: what the names of their files begin with."""
    return hashlib.sha256(json.dumps(circumstances, sort_keys=True).encode()).hexdigest()[:16]


# --- the files ---


class NothingKept:
    """What stands for HiddenStates where there are none."""

    n_blocks, seconds = 0, 0.0

    def continue_from(self, messages):
        """The messages as they are."""
        return messages

    def close(self):
        """There is nothing to close."""


class HiddenStates:
    """The hidden states in one file, which nobody removes as long as this object is there.

    Raises FileNotFoundError, FileError for a file that is damaged or of something else, and OSError.
    """

    def __init__(self, path, circumstances, n_blocks):
        self.path, self.n_blocks = path, n_blocks
        self.file = open(path, "rb", buffering=0)
        try:
            with suppress(BlockingIOError):  # it is being removed, and will be gone below
                try_lock(self.file, wait=False, shared=True)
            if not os.path.samestat(os.fstat(self.file.fileno()), path.stat()):
                raise FileNotFoundError
            self.description, self.rows = open_rows(self.file, KIND, VERSION)
            if (self.description.get("circumstances"), self.description.get("blocks")) != (circumstances, n_blocks):
                raise FileError(f"{path} is of other circumstances than its name says")
        except BaseException:
            self.file.close()
            raise
        with suppress(OSError):  # somebody else's file
            os.utime(path)  # most recently used

    def continue_from(self, messages):
        """{split: Messages} with the hidden states of the file in place of token ids."""
        return {
            split: replace(part, stage=Stage.HIDDEN_STATES, x=self.rows[split], n_blocks=self.n_blocks)
            for split, part in messages.items()
        }

    def close(self):
        """From now on the file may be removed; what `continue_from` returned can no longer be used."""
        self.file.close()

    @property
    def seconds(self):
        """How long computing them took, from the first block on."""
        return self.description["seconds"]

    def __str__(self):
        size = sum(rows.nbytes for rows in self.rows.values())
        return f"{self.path} ({size / 1e9:.2f} GB, computed on {self.description['date']} in {self.seconds:.0f} s)"


class FeatureCache:
    """The folder of all files, which holds `max_bytes` at most; the least recently used are removed first."""

    def __init__(self, folder, max_bytes, console):
        self.folder, self.max_bytes, self.console = Path(folder), max_bytes, console

    def path(self, circumstances, n_blocks):
        """The path of the file with the states after `n_blocks`, whether or not it is there."""
        return self.folder / f"{key_of(circumstances)}-{n_blocks:02}-blocks.safetensors"

    def room(self):
        """Bytes that may be written: half of what is free on the disk, and no more than the cache may hold."""
        folder = next(path for path in (self.folder.resolve(), *self.folder.resolve().parents) if path.exists())
        return min(self.max_bytes, shutil.disk_usage(folder).free // 2)

    def open_deepest(self, circumstances, n_blocks):
        """The HiddenStates after `n_blocks`, or after as many of them as there are, or NothingKept.

        A file that cannot be used is told, and removed.
        """
        for depth in range(n_blocks, 0, -1):
            path = self.path(circumstances, depth)
            try:
                if path.exists():
                    return HiddenStates(path, circumstances, depth)
            except FileNotFoundError:
                continue
            except (FileError, OSError) as error:
                self.console.warning(f"frozen features: {error}; they are computed again")
                if isinstance(error, FileError):
                    with suppress(OSError):
                        path.unlink()
        return NothingKept()

    @contextmanager
    def turn(self, path):
        """Wait until no other process is computing what belongs at `path`; within, none begins to.

        Where no lock can be written, nothing can, which `create` will find.
        """
        lock, is_told = LockFile(lock_path(path)), False
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            while holder := lock.acquire():
                if not is_told:
                    self.console.info(f"Frozen features: waiting for {holder}, which computes them")
                is_told = True
                time.sleep(0.2)
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def create(self, path, shapes):
        """Yields tensor_files.NewRows for a file at `path`, and removes others to make room if it is kept."""
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_left_overs(self.folder, "*-blocks.safetensors")
        with create_rows(path, KIND, VERSION, shapes) as new:
            yield new
            if new.description is not None:
                self.make_room(new.file_size, path)

    def make_room(self, size, new_path):
        """Remove the least recently used files until there is room for `size` bytes, but none that is in use."""
        files = []
        with suppress(OSError):  # another process removes some too
            for path in self.folder.iterdir():
                if FILE_NAME.fullmatch(path.name) and path != new_path:
                    files.append((path.stat().st_mtime, path.stat().st_size, path))
        total = size + sum(file_size for _, file_size, _ in files)
        for _, file_size, path in sorted(files):
            if total <= self.max_bytes:
                break
            if remove_if_unused(path):
                total -= file_size

    def scratch_rows(self, n_rows, like):
        """FileRows (n_rows, D) of a file that is gone when they are; D is that of the tensor `like` (..., D)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileRows(tempfile.TemporaryFile(dir=self.folder, buffering=0), 0, (n_rows, like.shape[-1]))


def remove_if_unused(path):
    """Remove a file unless a process reads it; whether it is gone."""
    try:
        with open(path, "rb+", buffering=0) as file:  # some network file systems lock only what is open for writing
            try_lock(file, wait=False)
            path.unlink()
        return True
    except OSError:  # in use, or somebody else's
        return False
