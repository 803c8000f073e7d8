"""Several processes for one run, as torchrun starts them: their group, what they share, and shards of the classifier.

Every process makes the same draws and the same batches and computes its share of them. Process 0 alone prints and
writes. Without torchrun there is one process, and nothing here does anything.
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

# What process 0 may do alone, while the others wait for it: a download, a checkpoint on a slow disk. Only after this
# time a process that is silent, but not gone, is given up.
TIMEOUT = timedelta(minutes=60)

# --- the group ---


def is_launched():
    """Whether torchrun has started this process."""
    return dist.is_torchelastic_launched()


def number_from_torchrun(name, alone):
    """What torchrun has put into an environment variable; `alone` for the only process."""
    return int(os.environ[name]) if is_launched() else alone


# The number of this process, 0 for the one that prints and writes, and how many there are; the same on this host.
rank, local_rank = partial(number_from_torchrun, "RANK", 0), partial(number_from_torchrun, "LOCAL_RANK", 0)
world_size = partial(number_from_torchrun, "WORLD_SIZE", 1)
local_world_size = partial(number_from_torchrun, "LOCAL_WORLD_SIZE", 1)


@contextmanager
def process_group():
    """Within it the processes that torchrun has started work together."""
    if not is_launched():
        yield
        return
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo", timeout=TIMEOUT)
    yield
    with suppress(RuntimeError):  # who is through first closes connections that others may still read from
        barrier()
        dist.destroy_process_group()


# --- agreement ---


def largest(*numbers):
    """The largest of each of these numbers in all processes."""
    if world_size() > 1:
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        numbers = tensor.tolist()
    return numbers


def barrier():
    """Wait until all processes are here, on the CPU: also with NCCL, which would keep an accelerator busy."""
    largest(0)


def gather(value):
    """What each process has, anything that can be pickled, in the order of the processes."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def from_main(value):
    """The value of process 0."""
    return gather(value)[0]


def from_any(value):
    """The first value that is not None, in the order of the processes; None if there is none."""
    return next((found for found in gather(value) if found is not None), None)


@contextmanager
def agreed():
    """A UserError or OSError that one process raises within is raised by all: they go on, or end, together."""
    problem = None
    try:
        yield
    except (UserError, OSError) as error:
        problem = error
    if problem := from_any(problem):
        raise problem


def in_main(call, *arguments):
    """What `call(*arguments)` gives in process 0, the only one that calls it, for all; errors as with `agreed`."""
    with agreed():
        value = call(*arguments) if rank() == 0 else None
    return from_main(value)


@contextmanager
def main_first():
    """`agreed`, and process 0 goes first: the others find what it has downloaded."""
    with agreed():
        if rank() > 0:
            barrier()
        try:
            yield
        finally:
            if rank() == 0:
                barrier()


# --- shares of the work ---


def own_share(indices, weights):
    """This process's messages of a pass, (B,) with their weights (B,): every world_size()-th.

    Where none is left it is one of weight 0: all processes are to have gradients of the same parameters.
    """
    own = slice(rank(), None, world_size())
    if len(indices[own]) == 0:
        return indices[:1], torch.zeros_like(weights[:1])
    return indices[own], weights[own]


def sum_gradients(parameters):
    """Replace the gradients by their sums over all processes. (Those of shards are summed when they are computed.)"""
    gradients = [p.grad for p in parameters if p.grad is not None and not is_divided(p.grad)]
    if world_size() > 1 and gradients:
        flat = parameters_to_vector(gradients)
        dist.all_reduce(flat)
        vector_to_parameters(flat, gradients)


def in_turns(passes, compute):
    """Yields (pass, compute(pass)) for each of `passes`, in order; each is computed by one process and sent to all.

    `compute` returns a list of tensors, each with the same type and number of dimensions for every pass.
    """
    passes = iter(passes)
    while turn := list(islice(passes, world_size())):
        # Who is left without a pass computes another's: where shards are gathered, all have to take part.
        own = compute(turn[min(rank(), len(turn) - 1)])
        for owner, one in enumerate(turn):
            yield one, [broadcast(tensor, owner) for tensor in own]


def broadcast(tensor, owner):
    """The tensor of process `owner`, which differs from this one's in its values and its shape."""
    if world_size() > 1:
        shape = torch.tensor(tensor.shape)
        dist.broadcast(shape, owner)
        tensor = tensor.contiguous() if rank() == owner else tensor.new_empty(shape.tolist())
        dist.broadcast(tensor, owner)
    return tensor


# --- shards ---
#
# PyTorch's modules for them are imported where they are used: they take most of a second.


def shard(classifier, device):
    """Divide a Classifier among the processes: each holds a part of every parameter (FSDP2), on `device`.

    A block is whole only while it computes. Of weights in a memory-mapped file no process ever holds the whole: each
    module is copied just before it is divided, the largest one first.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (world_size(),))
    for module in (classifier.gpt.tok_emb, *classifier.gpt.trf_blocks, classifier):
        for parameter in module.parameters():
            if not is_divided(parameter):
                parameter.data = parameter.data.to(device, copy=True, memory_format=torch.contiguous_format)
        # By default the outermost module stays whole after an evaluation, and knows nothing of the next update.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)  # the loss weights are absolute: gradients are summed, not averaged
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    for block in classifier.gpt.trf_blocks:
        register_fsdp_forward_method(block, "forward_normalized")


def is_divided(tensor):
    """Whether a tensor is a DTensor, of which this process holds a shard."""
    return hasattr(tensor, "full_tensor")


def full(tensor):
    """A tensor as process 0 writes it: of shards the whole, on the CPU; the other processes get nothing.

    All processes have to call it.
    """
    if is_divided(tensor):
        whole = tensor.detach().full_tensor()
        return whole.cpu() if rank() == 0 else whole.new_empty(0)
    return tensor


def divided_like(tensor, parameter):
    """The inverse of `full`: this process's shard of a whole tensor, if it belongs to a parameter with shards."""
    if is_divided(parameter) and tensor.shape == parameter.shape:
        from torch.distributed.tensor import distribute_tensor

        whole = tensor.to(parameter.device)
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return tensor
