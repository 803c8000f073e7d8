"""Compare a device with the CPU before a run relies on it: the same computation on both, at the run's own shapes."""

import math

import torch

from runner.files import NonFiniteError, UserError, is_out_of_memory
from runner.machine import processes
from runner.machine.devices import describe_system

TOLERANCE = {"fp32": 0.01, "tf32": 0.1, "bf16": 0.1}  # the most seen was 0.0001 in fp32, 0.02 in bf16
NEGLIGIBLE = 1e-3


def check_device(device, is_optional, precision, compute_on, console):
    """Return the device on which to run: `device`, unless it does not compute what the CPU computes.

    `compute_on(device)` returns named results {name: tensor on the CPU}, which the CPU computes in float32. Where they
    differ by more than the tolerance of `precision`, the CPU is returned with a warning if the device `is_optional`,
    else UserError is raised.
    """
    if device.type == "cpu":
        return device
    expected = compute_on(torch.device("cpu"))
    problem, agreement = compare_results(lambda: compute_on(device), expected, precision)
    problem = processes.from_any_rank(problem)
    if problem is None:
        console.info(f"Compared with the CPU: agrees, {agreement}")
        return device
    problem = f"{describe_system(device)} does not compute what the CPU computes: {problem}"
    if not is_optional:
        raise UserError(f"{problem}\nTry: --device cpu", status=1)
    console.warning(f"{problem}; it continues on the CPU")
    return torch.device("cpu")


def compare_results(compute, expected, precision):
    """Compare results with the expected ones, and return (how they differ or None, the largest deviation in words).

    They are computed twice, because a matmul that fails only sometimes may be right once. A device error counts as a
    difference, unless the device is out of memory.
    """
    try:
        first, second = (deviations(compute(), expected) for _ in range(2))
    except (NonFiniteError, RuntimeError, TypeError) as error:  # NotImplementedError is a RuntimeError
        if is_out_of_memory(error):
            raise
        return (str(error) or type(error).__name__).splitlines()[0], None
    largest = {name: max(first[name], second[name]) for name in first}
    for name, deviation in largest.items():  # in the order of computation, since errors propagate
        if deviation > TOLERANCE[precision]:
            return f"{name}: a difference of {deviation:.1%}, relative to the largest entry", None
    name = max(largest, key=largest.get)
    return None, f"largest deviation {largest[name]:.1e} ({name})"


def first_update(classifier, accumulate_gradients, optimizer):
    """Update a classifier, and return what was computed, {name: tensor}.

    These are the logits and the loss that `accumulate_gradients()` returns, the gradients, and the update that
    `optimizer` makes. AdamW moves an entry by the learning rate even where the sign of its gradient is that of a
    rounding error, so each entry of the update is weighted by the size of its gradient.
    """
    logits, loss = accumulate_gradients()
    results = {"the logits": logits, "the loss": loss}
    trained = {name: p for name, p in classifier.named_parameters() if p.grad is not None}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer.step()
    for name, parameter in trained.items():
        results[f"the gradient of {name}"] = parameter.grad
        results[f"the update of {name}"] = (parameter.detach() - before[name]) * parameter.grad.abs()
    return results


def deviations(found, expected):
    """Return {name: largest difference of the results {name: tensor}, relative to their largest entry}.

    A gradient that is NEGLIGIBLE beside the largest one is rounding (that of the key bias always is, because it cancels
    in the softmax); its difference is relative to NEGLIGIBLE times the largest, and so is that of an update. NaN
    deviates by infinity.
    """
    sizes = {name: tensor.abs().max().item() for name, tensor in expected.items()}
    relative = {}
    for name, tensor in expected.items():
        difference = (found[name].float() - tensor).abs().max().item()
        kind = name.split(" of ")[0]  # "the gradient", "the update"
        least = NEGLIGIBLE * max(size for other, size in sizes.items() if other.split(" of ")[0] == kind)
        deviation = difference / max(sizes[name], least, torch.finfo(torch.float32).tiny)
        relative[name] = math.inf if math.isnan(deviation) else deviation
    return relative
