"""Where frozen features are to be: what they take, and what there is.

In all functions `messages` maps each split to its Messages, and of `classifier` only sizes are read: it may be on the
meta device.
"""

import torch

from runner.data.messages import Stage
from runner.machine import processes
from runner.machine.devices import free_memory

CPU = torch.device("cpu")


def count_tokens(messages):
    """Tokens of all splits."""
    return sum(int(split.lengths.sum()) for split in messages.values())


def feature_bytes(classifier, messages):
    """Bytes that the features of all splits take."""
    of_tokens = hidden_state_bytes(classifier, messages)
    of_messages = 4 * sum(map(len, messages.values())) * classifier.gpt.cfg.emb_dim
    match classifier.feature_stage:
        case Stage.TOKEN_IDS:
            return 0
        case Stage.HIDDEN_STATES:
            return of_tokens
        case Stage.STANDARDIZED:
            return (of_tokens // 2 if classifier.bf16 else of_tokens) + of_messages
        case Stage.HEAD_INPUT:
            return of_messages


def hidden_state_bytes(classifier, messages):
    """Bytes that the hidden states of all tokens take."""
    return 4 * count_tokens(messages) * classifier.gpt.cfg.emb_dim


def choose_placement(choice, size, device, reserved=0, is_room_on_disk=False):
    """Where `size` bytes of features are to be: "device", "host", "disk", or "off", recomputed each time.

    `choice` is the value of --features. `reserved` bytes of `device` will be needed for something else.
    """
    if choice != "auto":
        return choice
    for placement, holder in (("device", device), ("host", CPU)):
        if size <= (free_for_each(holder) - (reserved if holder == device else 0)) / 2:
            return placement
    return "disk" if is_room_on_disk else "off"


def free_for_each(holder):
    """Bytes that each process can allocate on `holder`: those of a host share its main memory."""
    return free_memory(holder) // (processes.local_world_size() if holder == CPU else 1)


def parameter_bytes(classifier, only_trained=False):
    """Bytes of the parameters, of all or of those that are trained."""
    parameters = [p for p in classifier.parameters() if p.requires_grad or not only_trained]
    return sum(p.numel() * p.element_size() for p in parameters)


def memory_needs(classifier, messages, placement, device, shard=False):
    """Bytes on `device` that each process of a run needs at least, item by item; activations are not included."""
    trained = parameter_bytes(classifier, only_trained=True)
    n_shards = processes.world_size() if shard else 1
    summed = trained if processes.world_size() > n_shards else 0  # a copy of the gradients, in one piece
    gathered = 0  # what is whole at a time: two of the modules that `processes.shard` divides
    if shard:
        gathered = 2 * max(map(parameter_bytes, (classifier.gpt.tok_emb, *classifier.gpt.trf_blocks)))
    is_there = placement == "device" or (placement == "host" and device == CPU)
    return {
        "weights": parameter_bytes(classifier) // n_shards + gathered,
        "gradients": trained // n_shards + summed,
        "optimizer": 2 * trained // n_shards,  # two moments of each parameter
        "frozen features": feature_bytes(classifier, messages) if is_there else 0,
    }
