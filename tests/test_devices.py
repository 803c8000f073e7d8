"""Devices: which one runs, whether it computes what the CPU does, how much memory it has.

No accelerator is at hand; `pretended.py` says what a pretended one is.
"""

import platform
import re
import signal
import sys
from dataclasses import replace

import pytest
import torch
from helpers import CPU, interrupt_at
from pretended import pretended_device
from safetensors.torch import load_file

import additional_experiments as ae
from additional_experiments import main
from runner.data import features, messages
from runner.files import UserError
from runner.machine import devices
from runner.results.records import read_records
from runner.rows import ROWS

# --- which device ---


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("kind", ["mps", "cuda"])
def test_a_device_that_is_not_there(capsys, kind):
    assert main(["--device", kind]) == 2
    assert re.fullmatch(f"error: --device {kind}: .+; use --device auto or cpu\n", capsys.readouterr().err)


def test_a_device_on_which_nothing_can_be_computed(monkeypatch, capsys, options):
    """As a GPU that PyTorch no longer supports."""
    why = "no kernel image is available for execution on the device"

    def fail(name, args, result):
        raise RuntimeError(f"{why}\nCompile with ...")

    with pretended_device(monkeypatch, "cuda", fail):
        assert main([*options, "--device", "cuda"]) == 2
        assert capsys.readouterr().err == f"error: --device cuda: {why}; use --device auto or cpu\n"
        assert main([*options, "--device", "auto"]) == 0
    out, err = capsys.readouterr()
    assert err == f"warning: CUDA is not used: {why}\n"
    assert out.startswith("Device: CPU, ") and "| CPU, " in out


# --- the program on a pretended device ---

# Rows that take different paths: others change the size, the length, the weights or a scale. Rank 4 beside width 16.
CONFIGURATIONS = [ROWS[number].options for number in (1, 2, 3, 4, 5, 14, 15, 16, 17, 19)]
CONFIGURATIONS.append(dict(trainable_layers="lora", lora_rank=4))


def experiment(data_dir, **settings):
    defaults = dict(model_size="gpt2-tiny (1M)", weights="random", num_epochs=1, learning_rate=5e-4)
    return ae.Experiment(**defaults | dict(data_dir=str(data_dir)) | settings)


def run(experiment, **run_options):
    """The Record of a run that leaves nothing."""
    options = dict(quiet=True, feature_cache="", results="") | run_options
    return ae.run(experiment, ae.RunOptions(**options))[0]


def assert_same_numbers(found, expected, tolerance=1e-4):
    for name in ("train_losses", "val_losses"):
        assert getattr(found.history, name) == pytest.approx(getattr(expected.history, name), abs=tolerance)
    assert found.test == expected.test


@pytest.mark.parametrize(
    "settings", CONFIGURATIONS, ids=lambda settings: " ".join(map(str, settings.values())) or "row 1"
)
def test_every_configuration_gives_the_numbers_of_the_cpu(tiny_size, data_dir, monkeypatch, settings):
    """On MPS, the stricter of the two kinds; CUDA takes no other path but those of the tests below."""
    on_cpu = experiment(data_dir, device="cpu", **settings)
    with pretended_device(monkeypatch, "mps"):
        found = run(replace(on_cpu, device="auto"))
    assert (found.device_name, found.peak_memory_gb) == (f"MPS, {platform.machine()}", 0.1)
    assert_same_numbers(found, run(on_cpu))


@pytest.mark.parametrize(
    "kind, precision, layers", [("mps", "bf16", "last_block"), ("cuda", "bf16", "lora"), ("cuda", "tf32", "last_block")]
)
def test_reduced_precision(tiny_size, data_dir, monkeypatch, capsys, kind, precision, layers):
    """The comparison with the CPU sees it, because there it is in float32."""
    expected, types = run(experiment(data_dir, device="cpu", trainable_layers=layers)), set()
    with pretended_device(monkeypatch, kind, lambda *call: types.add(getattr(call[2], "dtype", None)) or call[2]):
        reduced = experiment(data_dir, device=kind, trainable_layers=layers, precision=precision)
        found = run(reduced, quiet=False)
    deviation = float(re.search(r"largest deviation (\S+)", capsys.readouterr().out)[1])
    assert (torch.bfloat16 in types) == (deviation > 1e-3) == (precision == "bf16")
    assert found.history.train_losses == pytest.approx(expected.history.train_losses, abs=0.05)
    assert torch.get_float32_matmul_precision() == ("high" if precision == "tf32" else "highest")
    torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send this signal on Windows")
@pytest.mark.parametrize("kind", [pytest.param("mps", marks=pytest.mark.slow), "cuda"])
def test_a_run_is_resumed_and_its_classifier_used(options, monkeypatch, capsys, kind):
    messages = ["--classify", "You have won", "ok, see you"]
    command = [*options, "--num_epochs", "1", "--batch_size", "8", "--trainable_token_pos", "flexible"]
    command += ["--trainable_layers", "lora", "--results"]
    on_cpu = [*command, "on_cpu", "--save_model", "cpu.safetensors", "--export", "cpu_export"]
    assert main(on_cpu) == 0 and main(["--load_model", "cpu.safetensors", *messages]) == 0
    answers = capsys.readouterr().out.splitlines()[-2:]
    with pretended_device(monkeypatch, kind):
        on_device = [*command, "on_device", "--device", kind, "--checkpoint", "run.ckpt"]
        with monkeypatch.context() as patch:
            interrupt_at(patch, torch.optim.AdamW, "step", 6, signal.SIGINT)  # three are of the comparison
            assert main(on_device) == 130
        assert main([*on_device, "--save_model", "trained.safetensors", "--export", "export"]) == 0
        out = capsys.readouterr().out
        assert "Resuming from run.ckpt after 3 batches" in out and "the CPU: agrees, largest" in out
        assert main(["--load_model", "trained.safetensors", *messages, "--device", kind]) == 0
        assert capsys.readouterr().out.splitlines() == answers
        predicted = ae.load_classifier("trained.safetensors", device=kind).predict(messages[1:])
        assert main(["--load_model", "trained.safetensors", "--export", "again"]) == 0
    found = zip(predicted[0], predicted[1].numpy().max(1), messages[1:], strict=True)
    assert [f"{label}\t{probability:.4f}\t{text}" for label, probability, text in found] == answers
    [found], [expected] = (read_records([folder])[0] for folder in ("on_device", "on_cpu"))
    assert found.device == kind and found.run_id == f"{expected.run_id}-{kind}"
    assert main([*command, "on_device", "--skip_finished"]) == 0
    assert f"Finished before: on_device/{found.run_id}.json" in capsys.readouterr().out
    assert_same_numbers(found, expected)
    found, again, expected = (load_file(f"{folder}/model.safetensors") for folder in ("export", "again", "cpu_export"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found, again, rtol=0, atol=0)


@pytest.mark.parametrize("kind, layers", [("mps", "last_block"), ("cuda", "last_layer")])
def test_features_in_each_placement(tiny_size, data_dir, monkeypatch, capsys, kind, layers):
    expected = run(experiment(data_dir, device="cpu", trainable_layers=layers))
    monkeypatch.setattr(features, "MIN_SECONDS", 0)
    is_small = layers == "last_layer"  # one vector for each message
    on_disk = f" in {kind} memory" if is_small else " on disk"
    placements = [("memory", 10**9, 10**9, f" in {kind} memory"), ("auto", 0, 10**9, " in cpu memory")]
    placements += [("off", 10**9, 10**9, " recomputed"), ("disk", 10**9, 10**9, on_disk), ("auto", 0, 0, on_disk)]
    for choice, free_on_device, free_on_host, where in placements:
        with pretended_device(monkeypatch, kind), monkeypatch.context() as patch:
            free = {kind: free_on_device, "cpu": free_on_host}
            patch.setattr(features, "free_memory", lambda device, free=free: free[device.type])
            on_device = experiment(data_dir, device=kind, trainable_layers=layers, features=choice)
            found = run(on_device, quiet=False, feature_cache="kept")
        [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Frozen features: ")]
        assert where in line
        assert_same_numbers(found, expected)


@pytest.mark.parametrize("layers", ["last_block", "all"])
def test_an_update_waits_for_the_device_once(tiny_size, data_dir, monkeypatch, layers):
    """To know whether its loss is finite."""
    waits, accumulate_gradients = [], ae.accumulate_gradients
    with pretended_device(monkeypatch, "cuda") as counts:

        def counted(*arguments):
            before = counts["question"] + counts["from the device"]
            result = accumulate_gradients(*arguments)
            waits.append(counts["question"] + counts["from the device"] - before)
            return result

        monkeypatch.setattr(ae, "accumulate_gradients", counted)
        monkeypatch.setattr(ae, "check_device", lambda device, *_: device)
        run(experiment(data_dir, device="cuda", trainable_layers=layers))
    assert waits == [1] * 5


# --- a device that disagrees with the CPU ---


def wrong_gradient(name, args, result):
    """The gradient of a norm's scale, as on MPS over inputs that take none (pytorch issue 183825)."""
    if name == "native_layer_norm_backward":
        return (result[0], result[1] * 1.5 if result[1] is not None else None, result[2])
    return result


def wrong_logits(name, args, result, calls=[]):
    """Those of every second call, by 5%."""
    if name == "addmm" and result.shape[1] == 2:
        calls.append(name)
        return result * 1.05 if len(calls) % 2 == 0 else result
    return result


def infinite(name, args, result):
    return torch.full_like(result, torch.inf) if name == "addmm" else result


@pytest.mark.parametrize(
    "kind, fault, what",
    [
        ("mps", wrong_gradient, r"the gradient of gpt\.[\w.]+norm\d?\.weight: a difference of \d"),
        ("cuda", wrong_logits, "the logits( after the update)?: a difference of 5.0%"),
        ("cuda", infinite, "a training loss is not finite"),
    ],
)
def test_a_device_that_disagrees_ends_the_run(options, tmp_path, monkeypatch, capsys, kind, fault, what):
    command = [*options, "--results", str(tmp_path / "results")]
    with pretended_device(monkeypatch, kind, fault):
        assert main([*command, "--device", kind]) == 1
        out, err = capsys.readouterr()
        assert not (tmp_path / "results").exists() and "Training completed" not in out
        assert re.search(f"error: .* does not compute what the CPU computes: {what}", err), err
        assert err.endswith("\nTry: --device cpu\n")
        assert main([*command, "--device", "auto"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("warning: ") and err.endswith("; it continues on the CPU\n")
    assert "| CPU, " in out and len(list((tmp_path / "results").iterdir())) == 1


def test_tf32_does_not_continue_on_the_cpu(options, monkeypatch, capsys):
    with pretended_device(monkeypatch, "cuda", infinite):
        assert main([*options, "--device", "auto", "--precision", "tf32"]) == 1
    torch.set_float32_matmul_precision("highest")
    err = capsys.readouterr().err
    assert "does not compute what the CPU computes" in err and "continues" not in err


def without_gradients(name, found):
    return found.startswith(name) and not torch.is_grad_enabled()


FAULTS = {
    "attention without gradients": lambda name, _: without_gradients("bmm", name),
    "embedding": lambda name, _: name == "embedding",
    "large matmuls": lambda name, result: name == "addmm" and result.numel() > 30_000,
    "index_put": lambda name, _: name == "index_put_",
    "softmax": lambda name, _: name == "_softmax",
    "layer norm in evaluation": lambda name, _: without_gradients("native_layer_norm", name),
    "copy to the host": lambda name, result: name == "_to_copy" and type(result) is torch.Tensor,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_device_with_a_single_fault_is_found(tiny_size, data_dir, monkeypatch, fault):
    """What is wrong is wrong by 5%."""

    def falsify(name, args, result):
        if not FAULTS[fault](name, result):
            return result
        first, *others = result if isinstance(result, tuple) else (result,)
        first = first.mul_(1.05) if name.endswith("_") else first * 1.05
        return (first, *others) if others else first

    monkeypatch.setitem(messages.TOKENS_PER_PASS, "mps", 700)
    with pretended_device(monkeypatch, "mps", falsify):
        with pytest.raises(UserError, match="does not compute what the CPU computes"):
            run(experiment(data_dir, device="mps"))


def test_a_device_on_which_an_update_changes_nothing_is_found(tiny_size, data_dir, monkeypatch):
    """As in pytorch issue 118115."""
    step = torch.optim.AdamW.step

    def step_on_cpu(self, closure=None):
        if self.param_groups[0]["params"][0].device.type == "cpu":
            step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", step_on_cpu)
    with pretended_device(monkeypatch, "mps"):
        with pytest.raises(UserError, match="the update of .*: a difference of 100.0%"):
            run(experiment(data_dir, device="mps", trainable_layers="all"))


@pytest.mark.parametrize("error", [RuntimeError("MPS: assertion failed\nmore"), TypeError("no")])
def test_a_device_whose_first_update_raises_is_passed_over(options, monkeypatch, capsys, error):
    def fail(name, args, result):
        if name == "native_layer_norm":
            raise error
        return result

    with pretended_device(monkeypatch, "mps", fail):
        assert main([*options, "--device", "auto"]) == 0
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and str(error).splitlines()[0] in err and "| CPU, " in out


def test_a_device_whose_memory_is_short_is_not_passed_over(options, monkeypatch, capsys):
    """The run would take hours on the CPU; with a smaller batch it may fit."""

    def fail(name, args, result):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")

    monkeypatch.setattr(ae, "resolve_device", lambda name: (torch.device("cuda"), None))
    with pretended_device(monkeypatch, "cuda", fail):
        assert main([*options, "--device", "auto"]) == 1
    assert "error: out of memory\nTry: " in capsys.readouterr().err


def test_the_first_classified_messages_are_compared_with_the_cpu(options, monkeypatch, capsys):
    assert main([*options, "--save_model", "trained.safetensors"]) == 0
    command = ["--load_model", "trained.safetensors", "--classify", "You have won"]
    assert main(command) == 0
    answer = capsys.readouterr().out.splitlines()[-1]

    def wrong(name, args, result):
        return result * 1.05 if name == "addmm" else result

    with pretended_device(monkeypatch, "cuda", wrong):
        assert main([*command, "--device", "cuda"]) == 1
        assert "does not compute what the CPU computes: the logits: a difference of " in capsys.readouterr().err
        assert main([*command, "--device", "auto"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [answer] and err.endswith("; it continues on the CPU\n")


def test_a_norm_over_frozen_features_learns_on_mps_all_the_same(tiny_size, data_dir, monkeypatch):
    """As PyTorch on MPS did: a norm's own gradients are right only where its input takes one (issue 183825)."""

    def wrong_without_input_gradient(name, args, result):
        is_wrong = name == "native_layer_norm_backward" and not args[-1][0]
        return (result[0], result[1] * 2, result[2] * 2) if is_wrong else result

    on_cpu = experiment(data_dir, device="cpu")
    expected = run(on_cpu)
    with pretended_device(monkeypatch, "mps", wrong_without_input_gradient):
        assert_same_numbers(run(replace(on_cpu, device="mps")), expected)
    with pretended_device(monkeypatch, "cuda", wrong_without_input_gradient):
        with pytest.raises(UserError, match="does not compute what the CPU computes.* gradient of .*norm"):
            run(replace(on_cpu, device="cuda"))


# --- memory ---


def test_free_memory_is_what_the_system_and_the_control_groups_leave(monkeypatch, tmp_path):
    """The limits above a group hold too; page cache counts as free."""
    root, own = tmp_path / "root", tmp_path / "cgroup"
    groups = [("", 2000, 1000, 0), ("outer", 4000, 1000, 0), ("outer/without", "max", 1000, 0)]
    groups.append(("outer/inner", 4000, 3900, 3400))
    for folder, limit, used, cache in groups:
        stat = f"file {cache}\ninactive_anon 7\nactive_file {cache // 4}\ninactive_file {cache - cache // 4}"
        (root / folder).mkdir(parents=True)
        for name, value in dict(max=limit, current=used, stat=stat).items():
            (root / folder / f"memory.{name}").write_text(f"{value}\n")
    in_container = "/docker/0123456789ab"  # a path on the host: in a container only its own part is mounted
    expected = {"/outer/inner": [3500, 3000, 1000], "/outer/without": [3000, 1000], in_container: [1000]}
    for group, free in expected.items():
        own.write_text(f"5:cpu,cpuacct:/box\n0::{group}\n")
        assert devices.free_in_control_groups(own, root) == free
    assert devices.free_in_control_groups(tmp_path / "missing", root) == []

    assert devices.free_memory(CPU) > 10**8
    monkeypatch.setattr(devices, "free_in_control_groups", lambda: [3, 2])
    assert devices.free_memory(CPU) == 2
