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
from runner.data.feature_files import FeatureFiles, KeptStates
from runner.data.messages import Stage, split_into_passes
from runner.files import UserError, sha256_of, sha256_of_json, sha256_of_tensors
from runner.machine import processes
from runner.machine.devices import describe_device, free_memory

CPU = torch.device("cpu")
MIN_SECONDS = 5  # features that take less are not kept between runs


# --- computing ---


def in_memory(device):
    """Makes the tensors of `compute_features`: on `device`."""
    return lambda n_rows, like: torch.empty(n_rows, like.shape[-1], dtype=like.dtype, device=device)


def compute_features(classifier, messages, compute, allocate, progress_bar=None):
    """The Messages of a split with what `compute` makes of them, a Batch to a Batch, in place of what they hold.

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


def compute_random_pass(classifier, messages, n_blocks):
    """The hidden states after `n_blocks` of the tokens of one pass, (N, D) on the CPU, after its split and indices.

    The pass is drawn from the system's randomness: PyTorch's belongs to the numbers of the run.
    """
    device = classifier.device
    passes = [(split, own) for split, part in messages.items() for own in split_into_passes(part.lengths, device)]
    split, indices = processes.from_main(secrets.choice(passes))
    part = messages[split].select(indices)
    computed = compute_features(classifier, part, lambda batch: classifier.run_blocks(batch, n_blocks), in_memory(CPU))
    return split, indices, computed.x


def expected_seconds(classifier, messages):
    """How long the full blocks will take, from one pass."""
    start, (n_tokens, _) = time.perf_counter(), shape_of_states(classifier, messages)
    *_, x = compute_random_pass(classifier, messages, classifier.n_full_blocks)
    return (time.perf_counter() - start) / len(x) * n_tokens / processes.world_size()


# --- what they take, and where they go ---
#
# Of a classifier only sizes are read here: it may be on the meta device.


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


def free_for_each(holder):
    """Bytes that each process can allocate on `holder`: those of a host share its main memory."""
    return free_memory(holder) // (processes.local_world_size() if holder == CPU else 1)


def choose_placement(choice, size, device, reserved=0, fits_on_disk=False):
    """Where `size` bytes of features go: "device", "host", "disk", or "off", recomputed each time.

    `choice` is the value of --features. `reserved` bytes of `device` will be needed for something else.
    """
    if choice in ("disk", "off"):
        return choice
    for placement, holder in (("device", device), ("host", CPU)):
        if size <= (free_for_each(holder) - (reserved if holder == device else 0)) / 2:
            return placement
    return "host" if choice == "memory" else "disk" if fits_on_disk else "off"


# --- kept between runs ---


def circumstances(classifier, messages, seed, experiment, weights):
    """What the hidden states after frozen blocks depend on, but for the number of blocks: as much as is cheap to name.

    The rest is found when a pass is computed anew.
    """
    tensors = {f"{split}/x": part.x for split, part in messages.items()}
    tensors |= {f"{split}/lengths": part.lengths for split, part in messages.items()}
    code = {inspect.getfile(one) for one in (classifier.run_blocks, classifier.gpt.blocks, compute_features, Stage)}
    return {
        "weights": weights.sha256 or f"random, seed {seed}",
        "model size": experiment.model_size,
        "causal mask": classifier.gpt.cfg.causal,
        "token ids": sha256_of_tensors(tensors),
        "precision": experiment.precision,
        "device": f"{classifier.device.type}: {describe_device(classifier.device)}",  # of a CPU the threads too
        "processor": [platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability()],
        "shards": processes.is_divided(classifier.gpt.final_norm.weight),  # their blocks are not fused
        "PyTorch": torch.__version__,
        "code": sorted(map(sha256_of, code)),
    }


def in_all(call):
    """What `call()` gives in this process; an OSError of any process is raised in all of them."""
    value = problem = None
    try:
        value = call()
    except OSError as error:
        problem = str(error)
    if problem := processes.from_any(problem):
        raise OSError(problem)
    return value


def in_main(call):
    """What `call()` gives in process 0, the only one that calls it, for all; an OSError is raised in all of them."""
    return processes.from_main(in_all(lambda: call() if processes.rank() == 0 else None))


class FrozenFeatures:
    """The frozen features of a run, seed after seed: where they are, and how they come there.

    `seconds` is how long those of the last seed took when they were first computed. Raises UserError for options that
    cannot be combined.
    """

    def __init__(self, experiment, run_options, weights, console):
        self.experiment, self.weights, self.console = experiment, weights, console
        self.n_shards = processes.world_size() if run_options.shard else 1
        self.features, self.seconds, self.files = None, 0.0, None
        folder = run_options.feature_cache
        if folder is None:
            folder = Path(experiment.data_dir, FEATURES)
        if folder != "":
            self.files = FeatureFiles(folder, run_options.feature_cache_gb * 1e9)
        elif experiment.features == "disk":
            raise UserError('--features disk needs a --feature_cache; "" is none')

    def may_be_kept(self, classifier, messages):
        """Whether the folder of kept files, if there is one, may hold those of these messages."""
        return self.files is not None and 4 * math.prod(shape_of_states(classifier, messages)) <= self.files.max_bytes

    def placement(self, classifier, messages, device, reserved=0):
        """`choose_placement` for these messages, the same for all processes."""
        size, fits_on_disk = feature_bytes(classifier, messages), self.may_be_kept(classifier, messages)
        return processes.from_main(choose_placement(self.experiment.features, size, device, reserved, fits_on_disk))

    def warn_if_memory_is_short(self, sizes, messages, device):
        """Warn before a run whose needs, but for activations, exceed what is free on its device.

        `sizes` is the classifier, perhaps on the meta device.
        """
        weights = sum(p.nbytes for p in sizes.parameters()) // self.n_shards
        trained = sum(p.nbytes for p in sizes.parameters() if p.requires_grad) // self.n_shards
        needs = {"weights": weights, "gradients": trained, "optimizer": 2 * trained}  # AdamW's two moments
        placement, free = self.placement(sizes, messages, device, weights), free_for_each(device)
        if placement == "device" or placement == "host" and device == CPU:
            needs["frozen features"] = feature_bytes(sizes, messages)
        if (needed := sum(needs.values())) > free:
            who = "each process of this run" if processes.world_size() > 1 else "this run"
            listed = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in needs.items())
            self.console.warning(f"{who} needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free: {listed}")

    def of(self, classifier, messages, seed):
        """{split: Messages} with their features, if there are frozen blocks and there is room for what they give.

        Those of an earlier seed are returned again, unless the weights change with the seed. Raises UserError where the
        weights file was changed.
        """
        if classifier.feature_stage is Stage.TOKEN_IDS:
            return messages
        if self.features is None or self.weights.is_random:
            self.features = None  # there may be no room for those of two seeds
            self.features = self.make(classifier, messages, seed)
        return self.features

    def make(self, classifier, messages, seed):
        """What `of` returns; a line on the console says where they are and how they came there."""
        placement = self.placement(classifier, messages, classifier.device)
        start, states, begun, kept, where = time.perf_counter(), KeptStates(), "computed", "", "on disk"
        if placement != "off" and self.files is not None:
            try:
                states, begun, kept = self.hidden_states(classifier, messages, placement, seed)
            except OSError as error:
                self.console.warning(f"frozen features are not kept: {error}")
        features, continued = states.continue_from(messages), time.perf_counter()
        is_small = classifier.feature_stage is Stage.HEAD_INPUT
        if placement in ("device", "host") or placement == "disk" and is_small:
            holder = CPU if placement == "host" else classifier.device
            where = f"in {holder.type} memory"
            features = self.run(classifier, features, classifier.frozen_part, in_memory(holder))
        now, size = time.perf_counter(), feature_bytes(classifier, messages) / 1e9
        self.seconds, outcome = 0.0, f"recomputed each time (they would take {size:.2f} GB)"
        if features is not messages:
            self.seconds = states.seconds + now - continued
            outcome = f"{begun} in {now - start:.0f} s{kept}; {size:.2f} GB {where}"
        blocks = f"{classifier.n_frozen_blocks} of {len(classifier.gpt.trf_blocks)} blocks"
        counts = f"{sum(map(len, messages.values())):,} messages, {shape_of_states(classifier, messages)[0]:,} tokens"
        self.console.info(f"Frozen features: {blocks}, {counts}, {outcome}")
        return features

    def hidden_states(self, classifier, messages, placement, seed):
        """The KeptStates after all full blocks, read, or written if they take long; else the deepest there are.

        And how they came about, in words for before and after the time. Raises OSError, in all processes, where they
        cannot be kept.
        """
        if not self.may_be_kept(classifier, messages):
            raise OSError("they would take more than --feature_cache_gb")
        facts = circumstances(classifier, messages, seed, self.experiment, self.weights)
        of_main = processes.from_main(facts)
        differ = ", ".join(name for name in facts if facts[name] != of_main[name])
        if differ := processes.from_any(differ or None):
            raise OSError(f"the processes of this run differ in {differ}")

        key, depth, kept = sha256_of_json(facts)[:16], classifier.n_full_blocks, ""
        path = in_main(lambda: self.files.deepest(key, depth))
        found = states = self.find(path, classifier, messages)
        if found.n_blocks < depth:
            is_slow = expected_seconds(classifier, found.continue_from(messages)) >= MIN_SECONDS
            if placement == "disk" or processes.from_main(is_slow):
                part = self.files.part(key, depth)
                with ExitStack() as stack:
                    in_main(lambda: stack.enter_context(self.files.turn(part, self.console)))
                    if (newer := in_main(lambda: self.files.deepest(key, depth))) != path:  # written meanwhile
                        found = states = self.find(newer, classifier, messages)
                    if found.n_blocks < depth:
                        states = self.write(classifier, messages, found, part)
                        kept = f" and kept in {states.path}"
        if found.n_blocks == depth:
            return states, f"read from {states.path}", ""
        return states, f"continued from {found.n_blocks} blocks" if found.n_blocks else "computed", kept

    def find(self, path, classifier, messages):
        """The KeptStates in a file; none if a process cannot read it, or if a pass computed anew is not the same."""
        if path is None:
            return KeptStates()
        try:
            states = in_all(lambda: self.files.open(path))
            split, indices, computed = compute_random_pass(classifier, messages, states.n_blocks)
            kept = states.continue_from(messages)[split].select(indices).x
            if processes.from_any(None if kept.equal(computed) else "differs"):
                raise OSError(f"{path} does not hold what is computed here")
            return states
        except OSError as error:
            self.console.warning(f"frozen features: {error}; they are computed again")
            return KeptStates()

    def write(self, classifier, messages, states, part):
        """From these KeptStates to those after all full blocks, in a new file: all compute, process 0 writes to `part`.

        Raises OSError in all processes, and UserError where the weights file was changed.
        """
        start = time.perf_counter()
        self.fill(classifier, states.continue_from(messages), part)
        self.weights.require_unchanged()
        seconds = states.seconds + time.perf_counter() - start
        path = in_main(lambda: self.files.publish(part, seconds))
        return in_all(lambda: self.files.open(path))

    def fill(self, classifier, messages, part):
        """Write the hidden states after all full blocks to a new file. When this returns it is no longer mapped."""
        shape, depth = shape_of_states(classifier, messages), classifier.n_full_blocks
        nothing = torch.empty(shape, device="meta")  # what process 0 writes, the others forget
        rows = in_all(lambda: self.files.create(part, shape) if processes.rank() == 0 else nothing)
        in_all(part.stat)  # all see the folder of process 0
        of_splits = iter(rows.split([len(split.x) for split in messages.values()]))
        self.run(classifier, messages, lambda batch: classifier.run_blocks(batch, depth), lambda *_: next(of_splits))

    def run(self, classifier, messages, compute, allocate):
        """`compute_features` for each split."""
        with self.console.progress("features", sum(map(len, messages.values())), "message") as bar:
            return {
                split: compute_features(classifier, part, compute, allocate, bar) for split, part in messages.items()
            }
