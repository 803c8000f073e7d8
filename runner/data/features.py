"""Frozen features: the output of the frozen blocks, computed once per message and kept for later runs.

A classifier says at which Stage its frozen part ends (`feature_stage`) and computes it (`frozen_part`). The hidden
states after its blocks are kept in files for later runs; a run that needs more blocks continues from there. Runs share
the folder without locks: two that compute the same states replace each other's file by an equal one.
"""

import inspect
import os
import platform
import secrets
import time
import warnings
from collections import deque
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from runner.data.messages import MessagePool, Stage, run_passes, split_into_passes
from runner.files import atomic_write, make_room, sha256_of, sha256_of_json, sha256_of_tensors
from runner.machine import processes
from runner.machine.devices import describe_device, free_memory

CPU = torch.device("cpu")
MIN_SECONDS = 5  # features that are computed faster are not kept
FILE_NAMES = r"[0-9a-f]{16}-\d\d\.npy|\.[0-9a-f]{8}-[0-9a-f]{8}\.part\.npy"  # the second is of a killed run

# --- computing ---


def compute_passes(classifier, pool, indices, method):
    """Yield (message indices (B,), [x (N, D) of their tokens, perhaps the residual (B, 1, D)]) for each pass.

    The passes are over the messages `indices` (n,) of a pool; `method` of the classifier takes and returns a Batch.
    """

    def compute(batch):
        batch = classifier(batch, method)
        x = batch.x.flatten(0, 1) if batch.key_mask is None else batch.x[batch.key_mask[:, 0, 0]]
        return [x] if batch.residual is None else [x, batch.residual]

    return run_passes(classifier, pool, indices, compute)


def compute_features(classifier, pool, device, progress_bar=None):
    """Return a MessagePool with the output of the classifier's frozen part, held on `device`."""
    stage, features = classifier.feature_stage, None
    lengths = torch.ones_like(pool.lengths) if stage is Stage.HEAD_INPUT else pool.lengths
    for indices, (x, *residual) in compute_passes(classifier, pool, torch.arange(len(pool)), classifier.frozen_part):
        if features is None:
            tensors = [x.new_empty(int(lengths.sum()), x.shape[1], device=device)]
            tensors += [one.new_empty(len(pool), one.shape[2], device=device) for one in residual]
            n_blocks = classifier.n_frozen_blocks
            features = MessagePool(stage, tensors[0], lengths, pool.positions, *tensors[1:], n_blocks=n_blocks)
        tokens, is_real = features.token_indices(indices)
        features.x[tokens[is_real].to(device)] = x.to(device)
        if residual:
            features.residual[indices.to(device)] = residual[0].squeeze(1).to(device)
        if progress_bar is not None:
            progress_bar.update(len(indices))
    return features


def compute_random_pass(classifier, pool, n_blocks):
    """Return (message indices, hidden states (N, D) after `n_blocks` on the CPU, seconds) of one pass of a pool."""
    start, passes = time.perf_counter(), split_into_passes(pool.lengths, classifier.device)
    indices = processes.from_rank0(secrets.choice(list(passes)))  # PyTorch's random state is part of a run's numbers
    [(_, [x])] = compute_passes(classifier, pool, indices, lambda batch: classifier.run_blocks(batch, n_blocks))
    return indices, x.cpu(), time.perf_counter() - start


# --- size and placement (only shapes of the classifier are read, so it may be on the meta device) ---


def feature_bytes(classifier, pool):
    """Return how many bytes the frozen features of a pool take."""
    of_tokens = 4 * len(pool.x) * classifier.gpt.cfg.emb_dim
    of_messages = 4 * len(pool) * classifier.gpt.cfg.emb_dim
    return {
        Stage.TOKEN_IDS: 0,
        Stage.HIDDEN_STATES: of_tokens,
        Stage.STANDARDIZED: (of_tokens // 2 if classifier.bf16 else of_tokens) + of_messages,
        Stage.HEAD_INPUT: of_messages,
    }[classifier.feature_stage]


# --- keeping ---


def cache_key_facts(classifier, pool, weights, seed):
    """Return all that hidden states depend on, {name: value}, as far as it is cheap to find out."""
    code = {__file__, *map(inspect.getfile, (classifier.run_blocks, classifier.gpt.blocks, Stage))}
    return {
        "weights": weights.sha256 or f"random, seed {seed}",
        "model": asdict(replace(classifier.gpt.cfg, activation_checkpointing=False)),
        "messages": sha256_of_tensors(dict(x=pool.x, lengths=pool.lengths)),
        "precision": [classifier.bf16, torch.get_float32_matmul_precision()],
        "device": describe_device(classifier.device),  # with the number of threads of a CPU
        "processor": [platform.machine(), torch.backends.cpu.get_cpu_capability()],
        "shards": processes.is_sharded(classifier.gpt.final_norm.weight),  # their blocks are not fused
        "PyTorch": torch.__version__,
        "code": sorted(map(sha256_of, code)),
    }


class FrozenFeatures:
    """The frozen features of a run. Its seeds share them, unless the weights change with the seed.

    Files `KEY-NN.npy` in `folder` (None: none are kept) hold the hidden states (N, D) after NN blocks in float32, then
    eight bytes that NumPy ignores: the seconds that computing them took. The key is a hash of `cache_key_facts`. The
    folder holds at most `max_bytes`; the least recently used files are removed. `seconds` is how long computing the
    features of the last seed took when they were first needed, possibly by an earlier run.
    """

    def __init__(self, choice, folder, max_bytes, weights, console):
        self.choice, self.weights, self.console = choice, weights, console
        self.folder, self.max_bytes = folder and Path(folder), max_bytes
        self.features, self.seconds = None, 0.0

    def placement(self, size, device):
        """Return where features of `size` bytes go: "device", "host" (main memory), "disk", or "off" (recomputed)."""
        if self.choice in ("disk", "off"):
            return self.choice
        placement = "host" if self.choice == "memory" else "disk" if self.folder else "off"
        for name, holder in (("host", CPU), ("device", device)):
            if size <= free_memory(holder) / 2:
                placement = name
        return processes.from_rank0(placement)

    def load_or_compute(self, classifier, pool, seed):
        """Return the MessagePool with its frozen features, or `pool` itself without frozen blocks or without room.

        A line on the console says where the features are and how they came there. Raises UserError if the weights file
        was changed.
        """
        if classifier.feature_stage is Stage.TOKEN_IDS:
            return pool
        if self.features is not None and not self.weights.is_random:
            return self.features
        self.features = None  # there may be no room for those of two seeds
        start, size = time.perf_counter(), feature_bytes(classifier, pool)
        placement = self.placement(size, classifier.device)
        states, seconds, how, kept = pool, 0.0, "computed", ""
        if placement != "off" and self.folder:
            try:
                states, seconds, how, kept = self.load_or_write(classifier, pool, seed, placement == "disk")
            except OSError as error:
                advice = "; --feature_cache DIR names another folder" * (error.errno is not None)  # the system's
                self.console.warning(f"frozen features are not kept: {error}{advice}")
        features, continued, where = states, time.perf_counter(), "on disk"
        if placement in ("device", "host") or placement == "disk" and classifier.feature_stage is Stage.HEAD_INPUT:
            holder = CPU if placement == "host" else classifier.device
            where = f"in {holder.type} memory"
            with self.console.progress("features", len(pool), "message") as bar:
                features = compute_features(classifier, states, holder, bar)
            seconds += time.perf_counter() - continued
        outcome = f"{how} in {time.perf_counter() - start:.0f} s{kept}; {size / 1e9:.2f} GB {where}"
        if features is pool:
            outcome, seconds = f"recomputed each time (they would take {size / 1e9:.2f} GB)", 0.0
        blocks = f"{classifier.n_frozen_blocks} of {len(classifier.gpt.trf_blocks)} blocks"
        counts = f"{len(pool):,} distinct messages, {len(pool.x):,} tokens"
        self.console.info(f"Frozen features: {blocks}, {counts}, {outcome}")
        self.features, self.seconds = features, seconds
        return features

    def load_or_write(self, classifier, pool, seed, must_keep):
        """Return (MessagePool of hidden states, seconds they took, how they were computed, where they are kept).

        They are after all full blocks if computing these takes long or if `must_keep`, else those of a file, or `pool`.
        Raises OSError on all ranks if they cannot be kept.
        """
        facts, start = cache_key_facts(classifier, pool, self.weights, seed), time.perf_counter()
        of_ranks = processes.all_gather(facts)
        if differ := [name for name in facts if any(other[name] != of_ranks[0][name] for other in of_ranks)]:
            raise OSError(f"the processes of this run differ in {', '.join(differ)}")
        key, depth = sha256_of_json(facts)[:16], classifier.n_full_blocks
        path, states, seconds = self.folder / f"{key}-{depth:02}.npy", pool, 0.0
        found = [other for other in self.folder.glob(f"{key}-??.npy") if other.name <= path.name]
        deepest = processes.from_rank0(max(found, default=None))
        try:
            if deepest is not None:
                states, seconds = self.load(deepest, classifier, pool)
        except OSError as error:
            self.console.warning(f"frozen features: {error}; they are computed again")
        if states.n_blocks == depth:
            return states, seconds, f"read from {deepest}", ""
        how = f"continued from {states.n_blocks} blocks" if states.n_blocks else "computed"
        _, x, seconds_of_pass = compute_random_pass(classifier, states, depth)
        estimate = seconds_of_pass / len(x) * len(pool.x) / processes.world_size()
        if not must_keep and processes.from_rank0(estimate) < MIN_SECONDS:
            return states, seconds, how, ""
        self.write(path, classifier, states, start - seconds)
        return *self.load(path, classifier, pool), how, f" and kept in {path}"

    def load(self, path, classifier, pool):
        """Return (MessagePool of hidden states mapped from a file, seconds that computing them took).

        A file is used only if it is whole, and if one pass, chosen at random and computed again, is bit-identical.
        Otherwise raises OSError on all ranks.
        """
        shape, n_blocks = (len(pool.x), classifier.gpt.cfg.emb_dim), int(path.stem[-2:])
        with processes.raise_on_all_ranks(), warnings.catch_warnings(action="ignore"):  # that the tensor is read-only
            try:  # mapped for reading only: a private copy counts as memory, even before anything is written to it
                mapped = np.load(path, mmap_mode="r")
                [seconds] = np.fromfile(path, "<f8", offset=mapped.offset + mapped.nbytes).tolist()
                x = torch.from_numpy(mapped).view(shape)
            except Exception:  # of many types
                raise OSError(f"{path} is damaged") from None
        states = replace(pool, stage=Stage.HIDDEN_STATES, x=x, n_blocks=n_blocks)
        indices, computed, _ = compute_random_pass(classifier, pool, n_blocks)
        with processes.raise_on_all_ranks():
            tokens, is_real = states.token_indices(indices)
            if not states.x[tokens[is_real]].equal(computed):
                raise OSError(f"{path} does not hold what is computed here")
        with suppress(OSError):  # the file of another user
            os.utime(path)  # the time of its last use
        return states, seconds

    def write(self, path, classifier, states, started):
        """Write the hidden states after all full blocks; `started` is when that began (time.perf_counter).

        All ranks compute, rank 0 writes. Raises OSError, and UserError if the weights file was changed, on all ranks.
        """
        shape, depth = (len(states.x), classifier.gpt.cfg.emb_dim), classifier.n_full_blocks
        width, is_writer = 4 * shape[1], processes.rank() == 0  # bytes of a token
        processes.call_on_rank0(make_room, self.folder, FILE_NAMES, width * shape[0], self.max_bytes)
        with processes.raise_on_all_ranks():
            self.folder.stat()  # raises if a rank has another folder
        of_all = torch.arange(len(states))
        passes = compute_passes(classifier, states, of_all, lambda batch: classifier.run_blocks(batch, depth))
        with processes.raise_on_all_ranks(), self.console.progress("features", len(states), "message") as bar:
            try:
                with atomic_write(path) if is_writer else nullcontext(os.devnull) as temporary:
                    with open(temporary, "wb") as file:
                        np.lib.format.write_array_header_1_0(file, dict(descr="<f4", fortran_order=False, shape=shape))
                        begin = file.tell()
                        for indices, (x,) in passes:
                            parts = x.cpu().split(states.lengths[indices].tolist())
                            for start, part in zip(states.starts[indices].tolist(), parts, strict=True):
                                file.seek(begin + width * start)
                                file.write(part.numpy())
                            bar.update(len(indices))
                        file.seek(0, os.SEEK_END)
                        file.write(np.float64(time.perf_counter() - started).tobytes())
                    self.weights.require_unchanged()
            except OSError:
                if processes.world_size() > 1:  # the others wait for this rank in each of the passes that are left
                    deque(passes, maxlen=0)
                raise
