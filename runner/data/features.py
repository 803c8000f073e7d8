"""Frozen features: the output of the blocks before the first trained parameter, computed once per message and kept.

A classifier says at which Stage its frozen part ends (`feature_stage`) and computes it (`frozen_part`). Between runs
the hidden states after its blocks are kept in files (feature_files.py). Whatever is computed is computed in the same
passes, and is therefore the same to the bit. In the arguments `messages` maps each split to its Messages.
"""

import inspect
import math
import platform
import secrets
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from runner.data.datasets import FEATURES
from runner.data.feature_files import FeatureFiles, States
from runner.data.messages import Stage, split_into_passes
from runner.files import UserError, sha256_of, sha256_of_json, sha256_of_tensors
from runner.machine import processes
from runner.machine.devices import describe_device, free_memory

CPU = torch.device("cpu")
MIN_SECONDS = 5  # features that take less are not kept between runs


# --- computing ---


@torch.no_grad()
def compute_features(classifier, messages, compute, out, progress_bar=None):
    """The Messages of a split with what `compute` makes of them, a Batch to a Batch, in place of what they hold.

    Each message runs once, together with others of similar length. `out` is the device on which the result is kept, or
    a matrix (N, D) to which it is written.
    """
    features = None

    def compute_pass(indices):
        """What is kept of a pass: x of its tokens (N, D), and perhaps the residual (B, 1, D)."""
        nonlocal features
        batch = classifier(messages.batch(indices, classifier.device), compute)
        if features is None:
            lengths = torch.ones_like(messages.lengths) if batch.stage is Stage.HEAD_INPUT else messages.lengths
            shape = int(lengths.sum()), batch.x.shape[-1]
            x = batch.x.new_empty(shape, device=out) if isinstance(out, torch.device) else out
            features = replace(messages, stage=batch.stage, n_blocks=batch.n_blocks, x=x, lengths=lengths)
            if batch.residual is not None:
                features.residual = batch.residual.new_empty(len(messages), shape[1], device=x.device)
        _, is_real = features.token_indices(indices)
        x = batch.x[is_real.to(classifier.device)]
        return [x] if batch.residual is None else [x, batch.residual]

    was_training = classifier.training
    classifier.eval()
    passes = split_into_passes(messages.lengths, classifier.device)
    for indices, (x, *residual) in processes.in_turns(passes, compute_pass):
        tokens, is_real = features.token_indices(indices)
        device = features.x.device
        features.x[tokens[is_real].to(device)] = x.to(device)
        if residual:
            features.residual[indices.to(device)] = residual[0].squeeze(1).to(device)
        if progress_bar is not None:
            progress_bar.update(len(indices))
    classifier.train(was_training)
    return features


def compute_random_pass(classifier, messages, n_blocks):
    """(split, message indices, hidden states (N, D) after `n_blocks`, on the CPU) of one pass.

    The pass is drawn from the system's randomness: PyTorch's belongs to the numbers of the run.
    """
    device = classifier.device
    passes = [(split, own) for split, part in messages.items() for own in split_into_passes(part.lengths, device)]
    split, indices = processes.from_main(secrets.choice(passes))
    part = messages[split].select(indices)
    return split, indices, compute_features(classifier, part, lambda b: classifier.run_blocks(b, n_blocks), CPU).x


def takes_long(classifier, messages):
    """Whether the full blocks will take MIN_SECONDS, judged from one pass."""
    start = time.perf_counter()
    *_, x = compute_random_pass(classifier, messages, classifier.n_full_blocks)
    per_token = (time.perf_counter() - start) / len(x) / processes.world_size()
    return processes.from_main(per_token * shape_of_states(classifier, messages)[0] >= MIN_SECONDS)


# --- what they take: of a classifier only sizes are read here, it may be on the meta device ---


def shape_of_states(classifier, messages):
    """The number of tokens of all splits, and D."""
    return sum(len(part.x) for part in messages.values()), classifier.gpt.cfg.emb_dim


def feature_bytes(classifier, messages):
    """Bytes that the features of all splits take."""
    of_tokens = 4 * math.prod(shape_of_states(classifier, messages))
    of_messages = 4 * sum(map(len, messages.values())) * classifier.gpt.cfg.emb_dim
    return {
        Stage.TOKEN_IDS: 0,
        Stage.HIDDEN_STATES: of_tokens,
        Stage.STANDARDIZED: (of_tokens // 2 if classifier.bf16 else of_tokens) + of_messages,
        Stage.HEAD_INPUT: of_messages,
    }[classifier.feature_stage]


# --- of a run ---


def circumstances(classifier, messages, seed, experiment, weights):
    """What the hidden states depend on, but for the number of blocks: what is cheap to name. A pass finds the rest."""
    tensors = {f"{split} {name}": getattr(part, name) for split, part in messages.items() for name in ("x", "lengths")}
    code = {__file__, *map(inspect.getfile, (classifier.run_blocks, classifier.gpt.blocks, Stage))}
    return {
        "weights": weights.sha256 or f"random, seed {seed}",
        "model": repr(classifier.gpt.cfg),  # sizes and mask
        "token ids": sha256_of_tensors(tensors),
        "precision": experiment.precision,
        "device": describe_device(classifier.device),  # of a CPU the threads too
        "processor": [platform.machine(), torch.backends.cpu.get_cpu_capability()],
        "shards": processes.is_divided(classifier.gpt.final_norm.weight),  # their blocks are not fused
        "PyTorch": torch.__version__,
        "code": sorted(map(sha256_of, code)),
    }


class FrozenFeatures:
    """The frozen features of a run, seed after seed: where they are, and how they come there.

    `seconds` is how long those of the last seed took when they were first computed. Raises UserError for options that
    cannot be combined.
    """

    def __init__(self, experiment, run_options, weights, console):
        self.experiment, self.weights, self.console = experiment, weights, console
        self.n_shards = processes.world_size() if run_options.shard else 1
        self.features, self.seconds, self.files = None, 0.0, None
        if run_options.feature_cache != "":
            folder = run_options.feature_cache or Path(experiment.data_dir, FEATURES)
            self.files = FeatureFiles(folder, run_options.feature_cache_gb * 1e9)
        elif experiment.features == "disk":
            raise UserError('--features disk needs a --feature_cache; "" is none')

    def placement(self, classifier, messages, device, reserved=0):
        """Where the features go, the same for all processes: "device", "host", "disk", or "off", recomputed each time.

        `reserved` bytes of `device` will be needed for something else.
        """
        choice, size = self.experiment.features, feature_bytes(classifier, messages)
        if choice in ("disk", "off"):
            return choice
        placement = "host" if choice == "memory" else "disk" if self.files else "off"
        for memory, holder in (("host", CPU), ("device", device)):
            if size <= (free_memory(holder) - (reserved if holder == device else 0)) / 2:
                placement = memory
        return processes.from_main(placement)

    def warn_if_memory_is_short(self, sizes, messages, device):
        """Warn if what a run needs, but for activations, is not free. `sizes` is the classifier, perhaps on meta."""
        weights = sum(p.nbytes for p in sizes.parameters()) // self.n_shards
        trained = sum(p.nbytes for p in sizes.parameters() if p.requires_grad) // self.n_shards
        needs = {"weights": weights, "gradients": trained, "optimizer": 2 * trained}  # AdamW's two moments
        placement, free = self.placement(sizes, messages, device, weights), free_memory(device)
        if placement == "device" or placement == "host" and device == CPU:
            needs["frozen features"] = feature_bytes(sizes, messages)
        if (needed := sum(needs.values())) > free:
            listed = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in needs.items())
            self.console.warning(f"each process needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free: {listed}")

    def of(self, classifier, messages, seed):
        """{split: Messages} with their features, if there are frozen blocks and there is room for what they give.

        Those of an earlier seed are returned again, unless the weights change with the seed. A line on the console says
        where they are and how they came there. Raises UserError where the weights file was changed.
        """
        if classifier.feature_stage is Stage.TOKEN_IDS:
            return messages
        if self.features is not None and not self.weights.is_random:
            return self.features
        self.features = None  # there may be no room for those of two seeds
        placement, where = self.placement(classifier, messages, classifier.device), "on disk"
        start, states, n_read = time.perf_counter(), States(messages), 0
        if placement != "off" and self.files is not None:
            try:
                states, n_read = self.hidden_states(classifier, messages, seed, placement == "disk")
            except OSError as error:
                self.console.warning(f"frozen features are not kept: {error}")
        features, continued = states.messages, time.perf_counter()
        if placement in ("device", "host") or placement == "disk" and classifier.feature_stage is Stage.HEAD_INPUT:
            holder = CPU if placement == "host" else classifier.device
            where = f"in {holder.type} memory"
            features = self.compute(classifier, features, classifier.frozen_part, dict.fromkeys(messages, holder))
        now, size = time.perf_counter(), feature_bytes(classifier, messages) / 1e9
        self.seconds, outcome = 0.0, f"recomputed each time (they would take {size:.2f} GB)"
        if features is not messages:
            self.seconds = states.seconds + now - continued
            begun = f"continued from {n_read} blocks" if n_read else "computed"
            begun = f"read from {states.path}" if n_read == classifier.n_full_blocks else begun
            kept = f" and kept in {states.path}" if n_read < states.n_blocks else ""
            outcome = f"{begun} in {now - start:.0f} s{kept}; {size:.2f} GB {where}"
        blocks = f"{classifier.n_frozen_blocks} of {len(classifier.gpt.trf_blocks)} blocks"
        counts = f"{sum(map(len, messages.values())):,} messages, {shape_of_states(classifier, messages)[0]:,} tokens"
        self.console.info(f"Frozen features: {blocks}, {counts}, {outcome}")
        self.features = features
        return features

    def hidden_states(self, classifier, messages, seed, is_kept):
        """(States, the number of blocks that were read and not computed).

        They are after all full blocks if `is_kept` or if these take long, else those of the deepest file. Raises
        OSError, in all processes, where they cannot be kept.
        """
        facts = circumstances(classifier, messages, seed, self.experiment, self.weights)
        of_all = processes.gather(facts)
        if differ := [name for name in facts if any(other[name] != of_all[0][name] for other in of_all)]:
            raise OSError(f"the processes of this run differ in {', '.join(differ)}")
        key, depth = sha256_of_json(facts)[:16], classifier.n_full_blocks
        found = self.read(classifier, messages, key, States(messages))
        if found.n_blocks == depth or not (is_kept or takes_long(classifier, found.messages)):
            return found, found.n_blocks
        part = self.files.folder / f"{key}-{depth:02}-blocks.part"
        with ExitStack() as stack:
            processes.in_main(stack.enter_context, self.files.locked(part, self.console))
            found = self.read(classifier, messages, key, found)  # what another run has written meanwhile
            states = found if found.n_blocks == depth else self.write(classifier, found, part)
            return states, found.n_blocks

    def read(self, classifier, messages, key, known):
        """The States of the deepest file in the folder; `known`, if they are of this file or there is none.

        A file is used only if one pass, computed anew, is equal to the bit; else a warning and the messages alone.
        """
        path = processes.in_main(self.files.deepest, key, classifier.n_full_blocks)
        if path in (None, known.path):
            return known
        try:
            with processes.agreed():
                states = self.files.open(path, messages)
            split, indices, computed = compute_random_pass(classifier, messages, states.n_blocks)
            with processes.agreed():
                if not states.messages[split].select(indices).x.equal(computed):
                    raise OSError(f"{path} does not hold what is computed here")
            return states
        except OSError as error:
            self.console.warning(f"frozen features: {error}; they are computed again")
            return States(messages, path=path)

    def write(self, classifier, states, part):
        """From these States to those after all full blocks, in a new file: all compute, process 0 writes to `part`.

        Raises OSError, and UserError where the weights file was changed, in all processes.
        """
        start, depth = time.perf_counter(), classifier.n_full_blocks
        shape = shape_of_states(classifier, states.messages)
        with processes.agreed():  # what process 0 writes, the others forget
            rows = self.files.create(part, shape) if processes.rank() == 0 else torch.empty(shape, device="meta")
        with processes.agreed():
            part.stat()  # all see the folder of process 0
        outs = dict(zip(states.messages, rows.split([len(one.x) for one in states.messages.values()])))
        self.compute(classifier, states.messages, lambda batch: classifier.run_blocks(batch, depth), outs)
        del rows, outs  # a file that is mapped cannot be renamed everywhere
        with processes.agreed():
            self.weights.require_unchanged()
        path = processes.in_main(self.files.publish, part, states.seconds + time.perf_counter() - start)
        with processes.agreed():
            return self.files.open(path, states.messages)

    def compute(self, classifier, messages, compute, outs):
        """`compute_features` for each split; `outs` is {split: out}."""
        with self.console.progress("features", sum(map(len, messages.values())), "message") as bar:
            return {
                split: compute_features(classifier, part, compute, outs[split], bar) for split, part in messages.items()
            }
