"""Frozen features: the output of the blocks before the first trained parameter, computed once per message and kept.

A classifier says at which Stage its frozen part ends (`feature_stage`) and computes it (`frozen_part`). Between runs
the hidden states after its blocks are kept on disk (feature_cache.py). Features are made from them in the passes in
which everything is computed without them, and are therefore the same to the bit.
"""

import time
from contextlib import suppress
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch

from .dataset import FEATURES
from .devices import free_memory
from .feature_cache import FeatureCache, circumstances
from .files import UsageError
from .messages import Stage, split_into_passes
from .placement import CPU, choose_placement, count_tokens, feature_bytes, hidden_state_bytes, memory_needs
from .table import changed_options, command_line

MIN_SECONDS = 5  # features that took less are not kept between runs


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
    was_training = classifier.training
    classifier.eval()
    for indices in split_into_passes(messages.lengths, classifier.device):
        with torch.no_grad():
            batch = compute(messages.batch(indices, classifier.device))
        if features is None:
            lengths = torch.ones_like(messages.lengths) if batch.stage is Stage.HEAD_INPUT else messages.lengths
            x = allocate(int(lengths.sum()), batch.x)
            features = replace(messages, stage=batch.stage, n_blocks=batch.n_blocks, x=x, lengths=lengths)
            if batch.residual is not None:
                features.residual = in_memory(x.device)(len(messages), batch.residual)
        tokens, is_real = features.token_indices(indices)
        device = features.x.device
        features.x[tokens[is_real].to(device)] = batch.x[is_real.to(classifier.device)].to(device)
        if batch.residual is not None:
            features.residual[indices.to(device)] = batch.residual.squeeze(1).to(device)
        if progress_bar is not None:
            progress_bar.update(len(indices))
    classifier.train(was_training)
    return features


class FrozenFeatures:
    """The frozen features of a run, seed after seed: where they are, and how they come there.

    Raises UsageError for options that cannot be combined.
    """

    def __init__(self, experiment, run_options, weights, console):
        self.experiment, self.weights, self.console = experiment, weights, console
        self.features, self.n_computed = None, 0
        folder, self.cache = run_options.feature_cache, None
        if folder is None:
            folder = Path(experiment.data_dir, FEATURES)
        if folder != "":
            self.cache = FeatureCache(folder, run_options.feature_cache_gb * 1e9, console)
        elif experiment.features == "disk":
            raise UsageError('--features disk needs a --feature_cache; "" is none')

    def placement(self, classifier, messages, device, reserved=0):
        """`choose_placement` for these messages. Raises UsageError where the disk is chosen and the cache too small."""
        size = hidden_state_bytes(classifier, messages)
        is_room = self.cache is not None and self.experiment.features == "auto" and size <= self.cache.room()
        choice = self.experiment.features
        if choice == "disk" and size > self.cache.max_bytes:
            raise UsageError(
                f"--features disk: they take {size / 1e9:.2f} GB, and --feature_cache_gb allows "
                f"{self.cache.max_bytes / 1e9:g}"
            )
        return choose_placement(choice, feature_bytes(classifier, messages), device, reserved, is_room)

    def warn_if_memory_is_short(self, classifier, messages, device):
        """Warn before a run that cannot fit into the memory of `device`; of `classifier` only sizes are read."""
        weights = sum(p.numel() * p.element_size() for p in classifier.parameters())
        placement = self.placement(classifier, messages, device, reserved=weights)
        needs = memory_needs(classifier, messages, placement, device)
        free = free_memory(device)
        if sum(needs.values()) > free:
            items = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in needs.items())
            needed = f"{sum(needs.values()) / 1e9:.2f} GB and {free / 1e9:.2f} GB are free"
            self.console.warning(f"this run needs {needed}: {items}")

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
        placement = self.placement(classifier, messages, classifier.device)
        start, size = time.perf_counter(), feature_bytes(classifier, messages)
        if placement == "off":
            features, how = messages, f"recomputed each time (they would take {size / 1e9:.2f} GB)"
        elif self.cache is None or hidden_state_bytes(classifier, messages) > self.cache.max_bytes:
            features = self.finish(classifier, messages, placement)
            how = f"computed in {time.perf_counter() - start:.0f} s ({size / 1e9:.2f} GB)"
            how += "" if self.cache is None else ", more than --feature_cache_gb to keep"
        else:
            features, how = self.make_with_cache(classifier, messages, placement, seed)
        blocks = f"{classifier.n_frozen_blocks} of {len(classifier.gpt.trf_blocks)} blocks"
        counts = f"{sum(map(len, messages.values())):,} messages, {count_tokens(messages):,} tokens"
        self.console.info(f"Frozen features: {blocks}, {counts}, {how}")
        return features

    def make_with_cache(self, classifier, messages, placement, seed):
        """({split: Messages}, how they came about): read, continued from fewer blocks, or computed, and kept."""
        start, depth = time.perf_counter(), classifier.n_full_blocks
        facts = circumstances(classifier, messages, replace(self.experiment, seed=seed), self.weights)
        is_to_keep = seed == self.experiment.seed or not self.weights.is_random  # a later run may ask for them
        kept = self.cache.open_deepest(facts, depth)
        if kept.n_blocks < depth and (is_to_keep or placement == "disk"):
            path = self.cache.path(facts, depth)
            with self.cache.turn(path):
                if path.exists():  # another process has computed them meanwhile
                    kept = self.cache.open_deepest(facts, depth)
                if kept.n_blocks < depth:
                    return self.compute_and_keep(classifier, messages, kept, placement, facts, is_to_keep)
        features = self.finish(classifier, kept.continue_from(messages), placement)
        if placement != "disk":
            kept.close()
        if kept.n_blocks == classifier.n_frozen_blocks:
            return features, f"read from {kept}"
        how = f"{begun_from(kept)} in {time.perf_counter() - start:.0f} s"
        if 0 < kept.n_blocks == depth:
            return features, f"{how}, read from {kept}"
        return features, f"{how} ({feature_bytes(classifier, messages) / 1e9:.2f} GB)"

    def compute_and_keep(self, classifier, messages, kept, placement, facts, is_to_keep):
        """What `make_with_cache` returns; the hidden states are written to the cache, or a warning says why not."""
        start, depth, features = time.perf_counter(), classifier.n_full_blocks, None
        path, source = self.cache.path(facts, depth), kept.continue_from(messages)
        shapes = {split: (int(part.lengths.sum()), classifier.gpt.cfg.emb_dim) for split, part in messages.items()}
        try:
            with self.cache.create(path, shapes) as new:
                states = self.run(
                    classifier,
                    source,
                    lambda batch: classifier.run_blocks(batch, depth),
                    lambda split: lambda *_: new.rows[split],
                )
                if placement != "disk":
                    features = self.finish(classifier, states, placement)
                seconds = time.perf_counter() - start
                if placement == "disk" or (is_to_keep and seconds >= MIN_SECONDS):
                    new.description = dict(
                        options=command_line(changed_options(self.experiment)),
                        date=date.today().isoformat(),
                        seconds=round(kept.seconds + seconds, 1),
                        blocks=depth,
                        circumstances=facts,
                    )
            if placement == "disk":
                written = self.cache.open_deepest(facts, depth)
                features = self.finish(classifier, written.continue_from(messages), placement)
                if not is_to_keep:
                    with suppress(OSError):
                        path.unlink()
        except OSError as error:
            if placement == "disk" or time.perf_counter() - start >= MIN_SECONDS:
                self.console.warning(f"frozen features are not kept: {error}")
        if features is None and placement == "disk":
            return source, "recomputed each time"
        if features is None:
            features = self.finish(classifier, source, placement)
        how = f"{begun_from(kept)} in {time.perf_counter() - start:.0f} s"
        if path.exists():
            return features, f"{how} and kept in {path} ({hidden_state_bytes(classifier, messages) / 1e9:.2f} GB)"
        return features, f"{how} ({feature_bytes(classifier, messages) / 1e9:.2f} GB)"

    def finish(self, classifier, messages, placement):
        """The features of messages with token ids or hidden states, at `placement`.

        On the disk hidden states stay where they are, and what little is to be made of them is made for each batch.
        """
        allocate = in_memory(CPU if placement == "host" else classifier.device)
        if placement == "disk":
            allocate = self.cache.scratch_rows
            if classifier.feature_stage is not Stage.HEAD_INPUT:
                return messages
        return self.run(classifier, messages, classifier.frozen_part, lambda split: allocate)

    def run(self, classifier, messages, compute, allocate):
        """`compute_features` for each split; `allocate` is a function of its name."""
        with self.console.progress("features", sum(map(len, messages.values())), "message") as bar:
            return {
                split: compute_features(classifier, part, compute, allocate(split), bar)
                for split, part in messages.items()
            }


def begun_from(kept):
    """With what computing began, in words."""
    return f"continued from {kept.n_blocks} blocks" if kept.n_blocks else "computed"
