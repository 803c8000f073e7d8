"""A device compared with the CPU before a run relies on it: the same computation on both, at the run's own shapes."""

import math

import torch

from runner.files import NonFiniteError, UserError
from runner.machine import processes
from runner.machine.devices import describe_system

TOLERANCE = {"fp32": 0.01, "tf32": 0.1, "bf16": 0.1}  # the most seen was 0.0001 in fp32, 0.02 in bf16
NEGLIGIBLE = 1e-3


def check_device(device, is_optional, precision, computation_on, console):
    """Return the device on which to run: `device`, unless it does not compute what the CPU computes.

    `computation_on(device)` returns a function that computes named results {name: tensor on the CPU} on a device, in
    float32 on the CPU. Where they differ by more than the tolerance of `precision`, the CPU is returned with a warning
    if the device `is_optional`, else UserError is raised.
    """
    if device.type == "cpu":
        return device
    expected = computation_on(torch.device("cpu"))()
    problem, agreement = compare_results(lambda: computation_on(device), expected, precision)
    problem = processes.from_any_rank(problem)
    if problem is None:
        console.info(f"Compared with the CPU: agrees, {agreement}")
        return device
    problem = f"{describe_system(device)} does not compute what the CPU computes: {problem}"
    if not is_optional:
        raise UserError(f"{problem}\nTry: --device cpu", status=1)
    console.warning(f"{problem}; it continues on the CPU")
    return torch.device("cpu")


def compare_results(make_computation, expected, precision):
    """Compare results with the expected ones, and return (how they differ or None, the largest deviation in words).

    The function that `make_computation()` returns is called twice, because a matmul that is wrong from time to time may
    be right once. An error of the device is a difference too, unless its memory is short.
    """
    try:
        compute = make_computation()
        deviation, name = max(largest_deviation(compute(), expected) for _ in range(2))
    except (NonFiniteError, RuntimeError, TypeError) as error:  # NotImplementedError is a RuntimeError
        if "out of memory" in str(error):
            raise
        return (str(error) or type(error).__name__).splitlines()[0], None
    is_wrong = deviation > TOLERANCE[precision]
    problem = f"{name} differs by {deviation:.1%} of the largest entry" if is_wrong else None
    return problem, f"largest deviation {deviation:.1e} ({name})"


def update_results(classifier, backward, optimizer, predict):
    """Return what an update of a classifier computes, {name: tensor on the CPU}, and take the update back.

    These are the logits and the loss that `backward()` returns, the gradients, the update that `optimizer` makes, and
    the logits that `predict()` returns after it.
    """
    logits, loss = backward()
    results = {"the logits": logits, "the loss": loss}
    trained = {name: p for name, p in classifier.named_parameters() if p.grad is not None}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer.step()
    for name, parameter in trained.items():
        results[f"the gradient of {name}"] = parameter.grad
        # AdamW moves every entry by the learning rate, also where the sign of the gradient is that of a rounding error.
        results[f"the update of {name}"] = (parameter.detach() - before[name]) * parameter.grad.abs()
    results["the logits after the update"] = predict()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(before[name])
    classifier.zero_grad()
    return {name: tensor.cpu() for name, tensor in results.items()}


def largest_deviation(found, expected):
    """Return (deviation, name) of the results {name: tensor} that differ most, relative to their largest entry.

    A gradient that is NEGLIGIBLE beside the largest one is rounding (that of the key bias always is, because it cancels
    in the softmax); its difference is relative to NEGLIGIBLE times the largest, and so is that of an update. NaN
    deviates by infinity.
    """
    sizes = {name: tensor.abs().max().item() for name, tensor in expected.items()}
    deviations = []
    for name, tensor in expected.items():
        difference = (found[name].float() - tensor).abs().max().item()
        kind = name.split(" of ")[0]  # "the gradient", "the update"
        least = NEGLIGIBLE * max(size for other, size in sizes.items() if other.split(" of ")[0] == kind)
        deviation = difference / max(sizes[name], least, torch.finfo(torch.float32).tiny)
        deviations.append((math.inf if math.isnan(deviation) else deviation, name))
    return max(deviations)
