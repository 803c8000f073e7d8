"""Several processes for one run, as torchrun starts them: collectives, shares of the work, and sharded parameters.

Every rank draws the same random numbers, makes the same batches and computes its share of them. Only rank 0 prints and
writes. Without torchrun there is one process, and every function here returns what it was given.
"""

import os
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from itertools import islice

import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from runner.files import UserError

# The other ranks wait for rank 0 while it downloads, or writes a checkpoint to a slow disk. A rank that does not answer
# for longer than this ends the run.
TIMEOUT = timedelta(minutes=60)

# --- the group ---


def is_launched():
    """Return whether torchrun started this process."""
    return dist.is_torchelastic_launched()


def torchrun_variable(name, default):
    """Return a number that torchrun passes in the environment, or `default` without torchrun."""
    return int(os.environ[name]) if is_launched() else default


# As in torch.distributed: the index of this process among all, or among those of this host, and how many there are.
rank, local_rank = partial(torchrun_variable, "RANK", 0), partial(torchrun_variable, "LOCAL_RANK", 0)
world_size = partial(torchrun_variable, "WORLD_SIZE", 1)
local_world_size = partial(torchrun_variable, "LOCAL_WORLD_SIZE", 1)


@contextmanager
def process_group():
    """Join the processes that torchrun started into one group, until the end of the `with` block."""
    if not is_launched():
        yield
        return
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo", timeout=TIMEOUT)
    yield
    with suppress(RuntimeError):  # the first rank to leave closes connections that others may still read from
        barrier()
        dist.destroy_process_group()


# --- collectives ---


def all_reduce_max(*numbers):
    """Return the maximum over all ranks of each of these numbers."""
    if world_size() > 1:
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        numbers = tensor.tolist()
    return numbers


def barrier():
    """Wait until all ranks are here. The barrier is on the CPU: one of NCCL would keep the GPU busy."""
    all_reduce_max(0)


def all_gather(value):
    """Return a list of the value of each rank; values are anything that can be pickled."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def from_rank0(value):
    """Return the value of rank 0."""
    return all_gather(value)[0]


def from_any_rank(value):
    """Return the value of the first rank that has one other than None, or None."""
    return next((found for found in all_gather(value) if found is not None), None)


@contextmanager
def raise_on_all_ranks():
    """Raise a UserError or OSError of the block on every rank, so that all ranks go on or end together."""
    problem = None
    try:
        yield
    except (UserError, OSError) as error:
        problem = error
    if problem := from_any_rank(problem):
        raise problem


def call_on_rank0(function, *arguments):
    """Call `function(*arguments)` on rank 0 only and return its result, or raise its UserError or OSError, on all."""
    with raise_on_all_ranks():
        value = function(*arguments) if rank() == 0 else None
    return from_rank0(value)


@contextmanager
def rank0_first():
    """Run the block on rank 0, then on the others, which find what it has downloaded. Raises on all ranks."""
    with raise_on_all_ranks():
        if rank() > 0:
            barrier()
        try:
            yield
        finally:
            if rank() == 0:
                barrier()


# --- shares of the work ---


def rank_share(indices, weights):
    """Return this rank's messages of a pass: every world_size()-th of the indices (B,), and of their weights (B,).

    A rank without a message gets one of weight 0, because all ranks must have gradients of the same parameters.
    """
    share = slice(rank(), None, world_size())
    if len(indices[share]) == 0:
        return indices[:1], torch.zeros_like(weights[:1])
    return indices[share], weights[share]


def sum_gradients(parameters):
    """Replace the gradients by their sums over all ranks. FSDP has already summed those of sharded parameters."""
    gradients = [p.grad for p in parameters if p.grad is not None and not is_sharded(p.grad)]
    if world_size() > 1 and gradients:
        flat = parameters_to_vector(gradients)
        dist.all_reduce(flat)
        vector_to_parameters(flat, gradients)


def distribute_passes(passes, compute):
    """Yield (pass, compute(pass)) for each of `passes` in order; one rank computes each and broadcasts the result.

    `compute` returns a list of tensors, each with the same type and number of dimensions for every pass.
    """
    passes = iter(passes)
    while turn := list(islice(passes, world_size())):
        # A rank without a pass repeats another one's, because FSDP gathers the parameters on all ranks.
        computed = compute(turn[min(rank(), len(turn) - 1)])
        for owner, one in enumerate(turn):
            yield one, [broadcast(tensor, owner) for tensor in computed]


def broadcast(tensor, owner):
    """Return the tensor of rank `owner`, whose shape may differ from this rank's."""
    if world_size() > 1:
        shape = torch.tensor(tensor.shape)
        dist.broadcast(shape, owner)
        tensor = tensor.contiguous() if rank() == owner else tensor.new_empty(shape.tolist())
        dist.broadcast(tensor, owner)
    return tensor


# --- sharded parameters (FSDP2) ---
#
# The modules of PyTorch for them are imported where they are used: importing them takes most of a second.


def shard(classifier, device):
    """Shard the parameters of a Classifier over all ranks, on `device` (FSDP2).

    FSDP gathers a block only while the block computes. Weights in a memory-mapped file are copied module by module, so
    that no rank ever holds the whole model.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (world_size(),))
    for module in (classifier.gpt.tok_emb, *classifier.gpt.trf_blocks, classifier):
        for parameter in module.parameters():
            if not is_sharded(parameter):
                parameter.data = parameter.data.to(device, copy=True, memory_format=torch.contiguous_format)
        # By default the root module stays gathered after an evaluation, and misses the next update.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)  # the loss weights are absolute: gradients are summed, not averaged
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
    for block in classifier.gpt.trf_blocks:
        register_fsdp_forward_method(block, "forward_normalized")


def is_sharded(tensor):
    """Return whether a tensor is a DTensor, of which this rank holds a shard."""
    return hasattr(tensor, "full_tensor")


def gather_full(tensor):
    """Return a sharded tensor in full and on the CPU on rank 0, empty on the others; any other tensor as it is.

    This is a collective: all ranks must call it.
    """
    if is_sharded(tensor):
        full = tensor.detach().full_tensor()
        return full.cpu() if rank() == 0 else full.new_empty(0)
    return tensor


def shard_like(tensor, parameter):
    """Return this rank's shard of a full tensor where `parameter` is sharded: the inverse of `gather_full`."""
    if is_sharded(parameter) and tensor.shape == parameter.shape:
        from torch.distributed.tensor import distribute_tensor

        full = tensor.to(parameter.device)
        return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return tensor
