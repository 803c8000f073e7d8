"""Frozen features: the output of the blocks before the first trained parameter, computed once per message and kept.

A classifier says at which Stage its frozen part ends (`feature_stage`) and computes it (`frozen_part`).
"""

import time
from dataclasses import replace

import torch

from .devices import free_memory
from .messages import Stage, split_into_passes


def feature_bytes(classifier, messages):
    """Bytes that the features of all splits take; `messages` maps each split to its Messages."""
    n_messages = sum(len(split) for split in messages.values())
    n_tokens = sum(int(split.lengths.sum()) for split in messages.values())
    emb_dim = classifier.gpt.cfg.emb_dim
    match classifier.feature_stage:
        case Stage.TOKEN_IDS:
            return 0
        case Stage.HIDDEN_STATES:
            return 4 * n_tokens * emb_dim
        case Stage.STANDARDIZED:
            return (2 if classifier.bf16 else 4) * n_tokens * emb_dim + 4 * n_messages * emb_dim
        case Stage.HEAD_INPUT:
            return 4 * n_messages * emb_dim


def choose_placement(choice, size, device, reserved=0):
    """The torch.device that is to hold `size` bytes of features, or None: they are recomputed each time.

    `choice` is the value of --features. `reserved` bytes of `device` will be needed for something else.
    """
    placements = {"device": device, "host": torch.device("cpu"), "off": None}
    if choice != "auto":
        return placements[choice]
    for placement in (device, placements["host"]):
        if size <= (free_memory(placement) - (reserved if placement == device else 0)) / 2:
            return placement
    return None


def compute_features(classifier, messages, placement, progress_bar=None):
    """Messages with what the frozen blocks make of them in place of their token ids, kept on `placement`.

    Each message runs once, together with others of similar length.
    """
    stage = classifier.feature_stage
    lengths = torch.ones_like(messages.lengths) if stage is Stage.HEAD_INPUT else messages.lengths
    features = replace(messages, stage=stage, x=None, lengths=lengths)
    was_training = classifier.training
    classifier.eval()
    for indices in split_into_passes(messages.lengths, classifier.device):
        batch = classifier.frozen_part(messages.batch(indices, classifier.device))
        if features.x is None:
            emb_dim = batch.x.shape[2]
            features.x = torch.empty(int(lengths.sum()), emb_dim, dtype=batch.x.dtype, device=placement)
            if batch.residual is not None:
                features.residual = torch.empty(len(messages), emb_dim, dtype=batch.residual.dtype, device=placement)
        tokens, is_real = features.token_indices(indices)
        features.x[tokens[is_real].to(placement)] = batch.x[is_real.to(classifier.device)].to(placement)
        if batch.residual is not None:
            features.residual[indices.to(placement)] = batch.residual.squeeze(1).to(placement)
        if progress_bar is not None:
            progress_bar.update(len(indices))
    classifier.train(was_training)
    return features


def precompute_features(classifier, messages, choice, console):
    """{split: Messages} with their features, if there are frozen blocks and there is room for what they give.

    `choice` is the value of --features; a line on `console` says what was done.
    """
    if classifier.feature_stage is Stage.TOKEN_IDS:
        return messages
    size = feature_bytes(classifier, messages)
    placement = choose_placement(choice, size, classifier.device)
    title = f"Frozen features: {classifier.n_frozen_blocks} of {len(classifier.gpt.trf_blocks)} blocks"
    if placement is None:
        console.info(f"{title}, recomputed each time (they would take {size / 1e9:.2f} GB)")
        return messages

    start = time.perf_counter()
    n_messages = sum(len(split) for split in messages.values())
    n_tokens = sum(int(split.lengths.sum()) for split in messages.values())
    with console.progress("features", n_messages, "message") as bar:
        features = {name: compute_features(classifier, split, placement, bar) for name, split in messages.items()}
    seconds = time.perf_counter() - start
    where = "host memory" if classifier.device.type != "cpu" else "memory"
    console.info(
        f"{title}, {n_messages:,} messages, {n_tokens:,} tokens, computed once in {seconds:.0f} s "
        f"({size / 1e9:.2f} GB, kept {f'in {where}' if placement.type == 'cpu' else 'on the device'})"
    )
    return features


def memory_needs(classifier, messages, choice, device):
    """Bytes on `device` that a run needs at least, item by item; activations are not included.

    `classifier` may be on the meta device: only sizes are read.
    """
    weights = sum(p.numel() * p.element_size() for p in classifier.parameters())
    trained = sum(p.numel() * p.element_size() for p in classifier.parameters() if p.requires_grad)
    features = feature_bytes(classifier, messages)
    placement = choose_placement(choice, features, device, reserved=weights)
    return {
        "weights": weights,
        "gradients": trained,
        "optimizer": 2 * trained,  # two moments of each parameter
        "frozen features": features if placement is not None and placement.type == device.type else 0,
    }


def warn_if_memory_is_short(classifier, messages, choice, device, console):
    """Warn before a run that cannot fit into the memory of `device`; arguments as in `memory_needs`."""
    needs, free = memory_needs(classifier, messages, choice, device), free_memory(device)
    if sum(needs.values()) > free:
        items = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in needs.items())
        console.warning(f"this run needs {sum(needs.values()) / 1e9:.2f} GB and {free / 1e9:.2f} GB are free: {items}")
