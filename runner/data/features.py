"""Frozen features: the output of the blocks before the first trained parameter, computed once per message and kept.

A classifier says at which Stage its frozen part ends (`feature_stage`) and computes it (`frozen_part`). Between runs
the hidden states after its blocks are kept on disk (feature_cache.py). Features are made from them in the passes in
which everything is computed without them, and are therefore the same to the bit.
"""

import time
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch

from runner.data.datasets import FEATURES
from runner.data.feature_cache import FeatureCache, NothingKept, circumstances, exists
from runner.data.messages import Stage, split_into_passes
from runner.data.placement import (
    CPU,
    choose_placement,
    count_tokens,
    feature_bytes,
    free_for_each,
    hidden_state_bytes,
    memory_needs,
    parameter_bytes,
)
from runner.data.tensor_files import NewRows
from runner.files import UserError
from runner.machine import processes
from runner.wording import changed_options, command_line

MIN_SECONDS = 5  # features that take less are not kept between runs


# --- computing ---


def in_memory(device):
    """Makes the tensors of `compute_features`: on `device`."""
    return lambda n_rows, like: torch.empty(n_rows, like.shape[-1], dtype=like.dtype, device=device)


def compute_features(classifier, messages, compute, allocate, progress_bar=None):
    """Messages with what `compute` makes of them, a Batch to a Batch, in place of what they hold.

    Each message runs once, together with others of similar length. `allocate(n_rows, like)` makes what the result is
    to be written to: a matrix (n_rows, D) of the type and the D of the tensor `like` (..., D), in memory or in a file.
    """
    features = None

    @torch.no_grad()
    def run(indices):
        """What there is to keep of a pass: x of its tokens (N, D), and perhaps the residual (B, D)."""
        nonlocal features
        batch = classifier(messages.batch(indices, classifier.device), compute)
        if features is None:
            lengths = torch.ones_like(messages.lengths) if batch.stage is Stage.HEAD_INPUT else messages.lengths
            x = allocate(int(lengths.sum()), batch.x)
            features = replace(messages, stage=batch.stage, n_blocks=batch.n_blocks, x=x, lengths=lengths)
            if batch.residual is not None:
                features.residual = in_memory(x.device)(len(messages), batch.residual)
        _, is_real = features.token_indices(indices)
        x = batch.x[is_real.to(classifier.device)]
        return [x] if batch.residual is None else [x, batch.residual.squeeze(1)]

    was_training = classifier.training
    classifier.eval()
    for indices, (x, *residual) in processes.in_turns(split_into_passes(messages.lengths, classifier.device), run):
        tokens, is_real = features.token_indices(indices)
        device = features.x.device
        features.x[tokens[is_real].to(device)] = x.to(device)
        if residual:
            features.residual[indices.to(device)] = residual[0].to(device)
        if progress_bar is not None:
            progress_bar.update(len(indices))
    classifier.train(was_training)
    return features


class FrozenFeatures:
    """The frozen features of a run, seed after seed: where they are, and how they come there.

    Raises UserError for options that cannot be combined.
    """

    def __init__(self, experiment, run_options, weights, console):
        self.experiment, self.weights, self.console = experiment, weights, console
        self.shard = run_options.shard
        self.features = None
        self.seconds = 0.0  # what they took when they were first computed
        folder, self.cache = run_options.feature_cache, None
        if folder is None:
            folder = Path(experiment.data_dir, FEATURES)
        if folder != "":
            self.cache = FeatureCache(folder, run_options.feature_cache_gb * 1e9, console)
        elif experiment.features == "disk":
            raise UserError('--features disk needs a --feature_cache; "" is none')

    def placement(self, classifier, messages, device, reserved=0, is_on_disk=False):
        """`choose_placement` for these messages. Raises UserError where the disk is chosen and the cache too small."""
        choice, size = self.experiment.features, hidden_state_bytes(classifier, messages)
        is_frozen = classifier.feature_stage is not Stage.TOKEN_IDS
        if choice == "disk" and is_frozen and size > self.cache.max_bytes:
            allowed = f"--feature_cache_gb allows {self.cache.max_bytes / 1e9:g}"
            raise UserError(f"--features disk: they take {size / 1e9:.2f} GB, and {allowed}")
        is_room = is_on_disk or (choice == "auto" and self.cache is not None and size <= self.cache.room())
        placement = choose_placement(choice, feature_bytes(classifier, messages), device, reserved, is_room)
        return processes.from_main(placement)

    def warn_if_memory_is_short(self, classifier, messages, device):
        """Warn before a run that cannot fit into memory, that of `device` or of the host; of `classifier` only sizes
        are read."""
        reserved = parameter_bytes(classifier) // (processes.world_size() if self.shard else 1)
        placement = self.placement(classifier, messages, device, reserved)
        needs = {device: memory_needs(classifier, messages, placement, device, self.shard)}
        if placement == "host" and device != CPU:
            needs[CPU] = {"frozen features in main memory": feature_bytes(classifier, messages)}
        who = "each process of this run" if processes.world_size() > 1 else "this run"
        for holder, sizes in needs.items():
            if sum(sizes.values()) > (free := free_for_each(holder)):
                items = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in sizes.items())
                needed = f"{sum(sizes.values()) / 1e9:.2f} GB and {free / 1e9:.2f} GB are free"
                self.console.warning(f"{who} needs {needed}: {items}")

    def of(self, classifier, messages, seed):
        """{split: Messages} with their features, if there are frozen blocks and there is room for what they give.

        Those of an earlier seed are returned again, unless the weights change with the seed.
        """
        if classifier.feature_stage is Stage.TOKEN_IDS:
            return messages
        if self.features is None or self.weights.is_random:
            self.features = None  # there may be no room for those of two seeds
            self.features = self.make(classifier, messages, seed)
        return self.features

    def make(self, classifier, messages, seed):
        """What `of` returns; a line on the console says how it came about."""
        start, facts, is_on_disk = time.perf_counter(), None, False
        self.seconds = 0.0
        if self.cache is not None and hidden_state_bytes(classifier, messages) <= self.cache.max_bytes:
            facts = circumstances(classifier, messages, replace(self.experiment, seed=seed), self.weights)
            is_on_disk = exists(self.cache.path(facts, classifier.n_full_blocks))
        placement = self.placement(classifier, messages, classifier.device, is_on_disk=is_on_disk)
        states, features, finishing = NothingKept(), messages, time.perf_counter()
        if placement != "off":
            if facts is not None:
                states = self.hidden_states(classifier, messages, placement, facts, seed)
                finishing = time.perf_counter()
            try:
                features = self.finish(classifier, states.continue_from(messages), placement)
            except OSError as error:
                if processes.world_size() > 1:  # the others are waiting for what this process has to compute
                    raise
                self.console.warning(f"frozen features: {states.path} cannot be read: {error}; they are computed again")
                states = NothingKept()
                features = self.finish(classifier, messages, placement)
            self.seconds = states.seconds + time.perf_counter() - finishing
        how = self.describe(classifier, messages, features, states, time.perf_counter() - start)
        blocks = f"{classifier.n_frozen_blocks} of {len(classifier.gpt.trf_blocks)} blocks"
        counts = f"{sum(map(len, messages.values())):,} messages, {count_tokens(messages):,} tokens"
        self.console.info(f"Frozen features: {blocks}, {counts}, {how}")
        if placement != "disk":
            states.close()
        return features

    def describe(self, classifier, messages, features, states, seconds):
        """How the features came about, in words."""
        size = feature_bytes(classifier, messages)
        if features is messages:
            return f"recomputed each time (they would take {size / 1e9:.2f} GB)"
        took = f"in {seconds:.0f} s"
        if states.n_blocks == 0:
            too_large = self.cache is not None and hidden_state_bytes(classifier, messages) > self.cache.max_bytes
            why = ", more than --feature_cache_gb to keep" if too_large else ""
            return f"computed {took} ({size / 1e9:.2f} GB){why}"
        if states.n_before is not None:
            begun = f"continued from {states.n_before} blocks" if states.n_before else "computed"
            where = f"kept in {states.path}" if exists(states.path) else "on disk"
            return f"{begun} {took} and {where} ({states.size / 1e9:.2f} GB)"
        if states.n_blocks == classifier.n_frozen_blocks:
            return f"read from {states}"
        return f"continued from {states.n_blocks} blocks {took}, read from {states}"

    def hidden_states(self, classifier, messages, placement, facts, seed):
        """The HiddenStates after all full blocks, read, or written if they take long; else those there are."""
        depth, path = classifier.n_full_blocks, self.cache.path(facts, classifier.n_full_blocks)
        is_to_keep = seed == self.experiment.seed or not self.weights.is_random  # a later run may ask for them
        states = self.open_deepest(facts, depth)
        if states.n_blocks == depth:
            return states
        is_slow = is_to_keep and expected_seconds(classifier, states.continue_from(messages)) >= MIN_SECONDS
        if processes.from_main(is_slow) or placement == "disk":
            with self.cache.turn(path) if processes.rank() == 0 else nullcontext():
                if processes.from_main(exists(path)):  # another run has computed them meanwhile
                    states = self.open_deepest(facts, depth)
                if states.n_blocks < depth:
                    states = self.write(classifier, messages, states, facts, is_needed=placement == "disk")
            if not is_to_keep and processes.rank() == 0:
                with suppress(OSError):
                    path.unlink()
        return states

    def open_deepest(self, facts, depth):
        """`FeatureCache.open_deepest`; NothingKept where it is not the same file for all processes."""
        states = self.cache.open_deepest(facts, depth)
        deepest, shallowest = processes.largest(states.n_blocks, -states.n_blocks)
        if deepest != -shallowest:
            self.cache.warn(f"frozen features: not all hosts see the same {self.cache.folder}; it is not used")
            states.close()
            states = NothingKept()
        return states

    def write(self, classifier, messages, states, facts, is_needed):
        """From HiddenStates to those after all full blocks, in a new file; after a warning, the same ones.

        All processes compute, and process 0 writes.
        """
        start, depth = time.perf_counter(), classifier.n_full_blocks
        shapes = {split: (int(part.lengths.sum()), classifier.gpt.cfg.emb_dim) for split, part in messages.items()}
        problem, is_computed = None, False
        try:
            with ExitStack() as stack:
                new = NewRows(dict.fromkeys(shapes, NoRows()))
                if processes.rank() == 0:
                    try:
                        path = self.cache.path(facts, depth)
                        new = stack.enter_context(self.cache.create(path, shapes, is_needed))
                    except OSError as error:
                        problem = str(error)
                if problem := processes.from_main(problem):
                    raise OSError(problem)
                self.run(
                    classifier,
                    states.continue_from(messages),
                    lambda batch: classifier.run_blocks(batch, depth),
                    lambda split: lambda *_: new.rows[split],
                )
                is_computed = True
                new.description = dict(
                    options=command_line(changed_options(self.experiment)),
                    date=date.today().isoformat(),
                    seconds=round(states.seconds + time.perf_counter() - start, 1),
                    blocks=depth,
                    circumstances=facts,
                )
        except OSError as error:
            if processes.world_size() > 1 and problem is None and not is_computed:  # the others wait for passes
                raise
            problem = str(error)
        if problem := processes.from_main(problem):
            self.console.warning(f"frozen features are not kept: {problem}")
            return states
        written = self.open_deepest(facts, depth)
        written.n_before = states.n_blocks
        return written

    def finish(self, classifier, messages, placement):
        """The features of messages with token ids or hidden states, at `placement`.

        On the disk hidden states stay where they are, and what little is to be made of them is made for each batch;
        inputs of the head are no larger than token ids, and always in memory.
        """
        if placement == "disk" and classifier.feature_stage is not Stage.HEAD_INPUT:
            return messages
        allocate = in_memory(classifier.device if placement == "device" else CPU)
        return self.run(classifier, messages, classifier.frozen_part, lambda split: allocate)

    def run(self, classifier, messages, compute, allocate):
        """`compute_features` for each split; `allocate` is a function of its name."""
        with self.console.progress("features", sum(map(len, messages.values())), "message") as bar:
            return {
                split: compute_features(classifier, part, compute, allocate(split), bar)
                for split, part in messages.items()
            }


class NoRows:
    """What stands for the rows of a file in a process that does not write it."""

    device = CPU

    def __setitem__(self, indices, values):
        """Another process writes them."""


def expected_seconds(classifier, messages):
    """How long the full blocks will take, from one pass in the middle."""
    passes = list(split_into_passes(messages["train"].lengths, classifier.device))
    indices = passes[len(passes) // 2]
    start = time.perf_counter()
    with torch.no_grad():
        batch = messages["train"].batch(indices, classifier.device)
        x = classifier(batch, lambda batch: classifier.run_blocks(batch, classifier.n_full_blocks)).x
    float(x.sum())  # an accelerator answers when it has finished
    seconds_per_token = (time.perf_counter() - start) / int(messages["train"].lengths[indices].sum())
    return seconds_per_token * count_tokens(messages) / processes.world_size()
