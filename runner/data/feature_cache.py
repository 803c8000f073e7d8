"""Hidden states after frozen blocks, on disk: kept between runs, and shared by runs at the same time.

There is one file for each key and number of blocks. The key is a hash of the circumstances: everything that a number
could depend on. So what is read is, bit for bit, what computing it would give, and a change of any circumstance finds
nothing.
"""

import errno
import inspect
import os
import re
import secrets
import shutil
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from runner.data.messages import Stage
from runner.data.tensor_files import create_rows, file_size, open_rows
from runner.files import UserError, remove_left_overs, sha256_of, sha256_of_json, sha256_of_tensors
from runner.locks import LockFile, lock_path, try_lock
from runner.machine import processes
from runner.machine.devices import describe_device

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
    return {
        "weights": weights.sha256 or f"random, seed {experiment.seed}",
        "model size": experiment.model_size,
        "causal mask": classifier.gpt.cfg.causal,
        "token ids": sha256_of_tensors(tensors),
        "precision": experiment.precision,
        "device": f"{device.type}: {describe_device(device)}",
        "shards": processes.is_divided(classifier.gpt.final_norm.weight),  # their blocks are not fused
        "threads": torch.get_num_threads(),
        "PyTorch": torch.__version__,
        "libraries": [torch.__config__.show(), torch.backends.cudnn.version() if device.type == "cuda" else None],
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(NUMERICAL) and not name.startswith("TORCH_NCCL_")
        },
        "code": sorted(code_of(classifier)),
        "format": VERSION,
    }


def code_of(classifier):
    """SHA-256 of each file with code that computes: a reader may have changed it."""
    classes = {parent for module in classifier.modules() for parent in type(module).__mro__}
    paths = {Path(__file__).with_name(name) for name in ("features.py", "messages.py")}
    for one in classes:
        if one.__module__.split(".")[0] not in ("torch", "builtins"):
            try:
                paths.add(Path(inspect.getsourcefile(one)))
            except TypeError:  # typed into a notebook, say: never the same again
                return {secrets.token_hex()}
    return set(map(sha256_of, paths))


def key_of(circumstances):
    """The key of circumstances: what the names of their files begin with."""
    return sha256_of_json(circumstances)[:16]


# --- the files ---


class NothingKept:
    """What stands for HiddenStates where there are none."""

    n_blocks, seconds, path, n_before = 0, 0.0, None, None

    def continue_from(self, messages):
        """The messages as they are."""
        return messages

    def close(self):
        """There is nothing to close."""


class HiddenStates:
    """The hidden states in one file, which nobody removes as long as this object is there.

    Raises FileNotFoundError, UserError for a file that is damaged or of something else, and OSError.
    """

    def __init__(self, path, circumstances, n_blocks):
        self.path, self.n_blocks = path, n_blocks
        self.n_before = None  # of states that this run has written: from how many blocks it went on
        self.file = open(path, "rb", buffering=0)
        try:
            with suppress(BlockingIOError):  # it is being removed, and will be gone below
                try_lock(self.file, wait=False, shared=True)
            if not os.path.samestat(os.fstat(self.file.fileno()), path.stat()):
                raise FileNotFoundError
            self.description, self.rows = open_rows(self.file, KIND, VERSION)
            if (self.description.get("circumstances"), self.description.get("blocks")) != (circumstances, n_blocks):
                raise UserError(f"{path} is of other circumstances than its name says")
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

    @property
    def size(self):
        """Bytes of the states."""
        return sum(rows.nbytes for rows in self.rows.values())

    def __str__(self):
        return f"{self.path} ({self.size / 1e9:.2f} GB, computed on {self.description['date']} in {self.seconds:.0f} s)"


class FeatureCache:
    """The folder of all files, which holds `max_bytes` at most; the least recently used are removed first."""

    def __init__(self, folder, max_bytes, console):
        self.folder, self.max_bytes, self.console = Path(folder), max_bytes, console
        self.told = set()  # warnings

    def path(self, circumstances, n_blocks):
        """The path of the file with the states after `n_blocks`, whether or not it is there."""
        return self.folder / f"{key_of(circumstances)}-{n_blocks:02}-blocks.safetensors"

    def room(self):
        """Bytes that may be written: half of what is free on the disk, and no more than the cache may hold."""
        folder = Path(os.path.abspath(self.folder))
        for path in (folder, *folder.parents):
            if exists(path):
                return min(self.max_bytes, shutil.disk_usage(path).free // 2)
        return 0

    def open_deepest(self, circumstances, n_blocks):
        """The HiddenStates after `n_blocks`, or after as many of them as there are, or NothingKept.

        A file that cannot be used is told, and removed if it is damaged.
        """
        for depth in range(n_blocks, 0, -1):
            path = self.path(circumstances, depth)
            try:
                if exists(path):
                    return HiddenStates(path, circumstances, depth)
            except FileNotFoundError:
                continue
            except (UserError, OSError) as error:
                self.warn(f"frozen features: {error}; they are computed again")
                if isinstance(error, UserError):
                    remove_if_unused(path)
        return NothingKept()

    def warn(self, text):
        """Print a warning, once."""
        if text not in self.told:
            self.console.warning(text)
        self.told.add(text)

    @contextmanager
    def turn(self, path):
        """Wait until no other process is computing what belongs at `path`; within, none begins to.

        Where no lock can be written, nothing can, which `create` will find.
        """
        lock, is_told = None, False
        try:
            with suppress(OSError, RuntimeError):  # which Python 3.11 and 3.12 raise for links in a circle
                self.folder.mkdir(parents=True, exist_ok=True)
                lock = LockFile(lock_path(path))
                while holder := lock.acquire():
                    if not is_told:
                        self.console.info(f"Frozen features: waiting for {holder}, which computes them")
                    is_told = True
                    time.sleep(0.2)
            yield
        finally:
            if lock is not None:
                lock.release()

    @contextmanager
    def create(self, path, shapes, is_needed=False):
        """Yields tensor_files.NewRows for a file at `path`, for which others make room.

        Raises OSError, also where those are in use, unless the file `is_needed`.
        """
        try:
            self.folder.resolve()
        except RuntimeError as error:
            raise OSError(errno.ELOOP, str(error)) from None
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_left_overs(self.folder, "*-blocks.safetensors")
        for left in self.folder.glob(".*-blocks.safetensors.lock"):  # of killed runs
            lock = LockFile(left)
            with suppress(OSError):
                if lock.acquire() is None:
                    lock.release()
        if not self.make_room(file_size(shapes), path) and not is_needed:
            raise OSError(f"{self.folder} is full of features in use")
        with create_rows(path, KIND, VERSION, shapes) as new:
            yield new

    def make_room(self, size, new_path):
        """Remove the least recently used files, but none that is in use; whether there is room for `size` bytes now."""
        files = []
        for path in self.folder.iterdir():
            if FILE_NAME.fullmatch(path.name) and path != new_path:
                with suppress(OSError):  # another process has removed it
                    files.append((path.stat().st_mtime, path.stat().st_size, path))
        total = size + sum(file_bytes for _, file_bytes, _ in files)
        for _, file_bytes, path in sorted(files):
            if total > self.max_bytes and remove_if_unused(path):
                total -= file_bytes
        return total <= self.max_bytes


def exists(path):
    """Whether there is something at a path, as far as that can be known."""
    try:
        return Path(path).exists()
    except (OSError, RuntimeError):
        return False


def remove_if_unused(path):
    """Remove a file unless a process reads it; whether it is gone."""
    try:
        if os.name == "nt":  # which removes nothing that is open
            path.unlink()
            return True
        with open(path, "rb+", buffering=0) as file:  # some network file systems lock only what is open for writing
            try_lock(file, wait=False)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):  # and no other process has just replaced it
                path.unlink()
                return True
    except OSError:  # in use, or somebody else's
        pass
    return False
