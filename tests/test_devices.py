"""Devices: which one runs, whether it computes what the CPU does, how much memory it has.

No accelerator is at hand; `pretended.py` says what a pretended one is.
"""

import re
import signal
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, interrupt_at
from pretended import pretended_device
from safetensors.torch import load_file

import additional_experiments as ae
from additional_experiments import main
from runner.data import features
from runner.files import UserError
from runner.machine import devices
from runner.results.records import read_records
from runner.rows import ROWS

KINDS = ["mps", "cuda"]


# --- which device ---


@pytest.mark.parametrize("kind", KINDS)
def test_auto_takes_the_accelerator(monkeypatch, kind):
    assert devices.resolve_device("auto") == (CPU, None)
    with pretended_device(monkeypatch, kind):
        assert devices.resolve_device("auto") == (torch.device(kind), None)
        assert devices.resolve_device("cpu") == (CPU, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there(capsys):
    assert main(["--device", "cuda"]) == 2
    reason = "Torch not compiled with CUDA enabled|Found no NVIDIA driver .*"  # of a CPU build, of a CUDA build
    assert re.match(f"error: --device cuda: ({reason}); use --device auto or cpu\n", capsys.readouterr().err)
    assert main(["--device", "mps"]) == 2
    assert "error: --device mps: PyTorch finds none here" in capsys.readouterr().err


def failing_with(message):
    def fail(name, args, result):
        raise RuntimeError(message)

    return fail


def test_a_gpu_that_pytorch_no_longer_supports(monkeypatch, capsys, options):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (5, 2))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    fault = failing_with("CUDA error: no kernel image is available for execution on the device\nCompile with ...")
    why = f"Pretended A100 has compute capability 5.2; PyTorch {torch.__version__} supports sm_75, sm_80"
    with pretended_device(monkeypatch, "cuda", fault):
        assert main([*options, "--device", "cuda"]) == 2
        assert capsys.readouterr().err == f"error: --device cuda: {why}; use --device auto or cpu\n"
        assert main([*options, "--device", "auto"]) == 0
    out, err = capsys.readouterr()
    assert err == f"warning: CUDA is not used: {why}\n"
    assert out.startswith("Device: CPU, ") and "| CPU, " in out


def test_a_driver_that_is_too_old_is_told(monkeypatch):
    def is_available():
        import warnings

        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old (found version 11040).")
        return False

    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.cuda, "init", init)
    device, why_not = devices.resolve_device("auto")
    assert device == CPU
    assert why_not == "CUDA is not used: The NVIDIA driver on your system is too old (found version 11040)."


@pytest.mark.parametrize("message", ["CUDA error: uncorrectable ECC error encountered\nmore", "MPS backend: lost\n"])
def test_a_device_that_fails_while_it_trains_costs_one_line(monkeypatch, capsys, options, message):
    def fail(*_):
        raise RuntimeError(message)

    monkeypatch.setattr(ae, "train", fail)
    assert main(options) == 1
    assert capsys.readouterr().err.startswith(f"error: the device failed: {message.splitlines()[0]}\nTry: ")


# --- the program on a pretended device ---

# Every configuration of the table but for the model size, each once; the toy size has rank 4 at most beside width 16.
CONFIGURATIONS = []
for row in ROWS.values():
    changed = {name: value for name, value in row.options.items() if name != "model_size"}
    if "lora_rank" in changed:
        changed["lora_rank"] = 4
    if changed not in CONFIGURATIONS:
        CONFIGURATIONS.append(changed)


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings", CONFIGURATIONS, ids=lambda settings: " ".join(map(str, settings.values())) or "row 1"
)
def test_every_configuration_gives_the_numbers_of_the_cpu(tiny_size, data_dir, monkeypatch, kind, settings):
    on_cpu = experiment(data_dir, device="cpu", **settings)
    expected = run(on_cpu)
    with pretended_device(monkeypatch, kind):
        found = run(replace(on_cpu, device="auto"))
    assert found.device_name == {"mps": f"MPS, {devices.platform.machine()}", "cuda": "Pretended A100"}[kind]
    assert_same_numbers(found, expected)


@pytest.mark.parametrize("kind, precision", [("mps", "bf16"), ("cuda", "bf16"), ("cuda", "tf32")])
@pytest.mark.parametrize("layers", ["last_block", "last_two_blocks", "lora"])
def test_reduced_precision(tiny_size, data_dir, monkeypatch, kind, precision, layers):
    expected = run(experiment(data_dir, device="cpu", trainable_layers=layers))
    lowered = []
    with pretended_device(monkeypatch, kind, lambda name, args, result: lowered.append(result) or result):
        found = run(experiment(data_dir, device=kind, trainable_layers=layers, precision=precision))
    in_bf16 = [result for result in lowered if isinstance(result, torch.Tensor) and result.dtype == torch.bfloat16]
    assert bool(in_bf16) == (precision == "bf16")
    assert found.history.train_losses == pytest.approx(expected.history.train_losses, abs=0.05)
    assert torch.get_float32_matmul_precision() == ("high" if precision == "tf32" else "highest")
    torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send this signal on Windows")
@pytest.mark.parametrize("kind", KINDS)
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
            interrupt_at(patch, torch.optim.AdamW, "step", 3, signal.SIGINT)
            assert main(on_device) == 130
        assert main([*on_device, "--save_model", "trained.safetensors", "--export", "export"]) == 0
        assert "Resuming from run.ckpt after 3 batches" in capsys.readouterr().out
        assert main(["--load_model", "trained.safetensors", *messages, "--device", kind]) == 0
        assert capsys.readouterr().out.splitlines() == answers
        assert main(["--load_model", "trained.safetensors", "--export", "again"]) == 0
    [found], [expected] = (read_records([folder])[0] for folder in ("on_device", "on_cpu"))
    assert found.device == kind
    assert_same_numbers(found, expected)
    found, again, expected = (load_file(f"{folder}/model.safetensors") for folder in ("export", "again", "cpu_export"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found, again, rtol=0, atol=0)


@pytest.mark.parametrize("kind, layers", [("mps", "last_block"), ("cuda", "last_two_blocks"), ("cuda", "last_layer")])
def test_features_in_each_placement(tiny_size, data_dir, monkeypatch, capsys, kind, layers):
    expected = run(experiment(data_dir, device="cpu", trainable_layers=layers))
    monkeypatch.setattr(features, "MIN_SECONDS", 0)
    is_small = layers == "last_layer"  # one vector for each message
    placements = [("memory", 10**9, f" in {kind} memory"), ("auto", 0, " in cpu memory"), ("off", 10**9, " recomputed")]
    placements.append(("disk", 10**9, f" in {kind} memory" if is_small else " on disk"))
    for choice, free_on_device, where in placements:
        with pretended_device(monkeypatch, kind), monkeypatch.context() as patch:
            free = {kind: free_on_device, "cpu": 10**9}
            patch.setattr(features, "free_memory", lambda device, free=free: free[device.type])
            on_device = experiment(data_dir, device=kind, trainable_layers=layers, features=choice)
            found = run(on_device, quiet=False, feature_cache="kept")
        [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Frozen features: ")]
        assert where in line
        assert_same_numbers(found, expected)


@pytest.mark.parametrize("layers, copies", [("last_block", 5), ("all", 4)])
def test_what_an_update_waits_for(tiny_size, data_dir, monkeypatch, layers, copies):
    """Each copy to the device and each question for a value costs an accelerator more than the arithmetic.

    To the device go x, positions, labels and weights, and of standardized features the indices of the residual; the one
    question is whether the loss is finite.
    """
    with pretended_device(monkeypatch, "cuda") as counts:
        in_updates = Counter()
        accumulate_gradients = ae.accumulate_gradients

        def counted(*arguments):
            before = counts.copy()
            result = accumulate_gradients(*arguments)
            for (what, _), n in (counts - before).items():
                in_updates[what] += n
            in_updates["updates"] += 1
            return result

        monkeypatch.setattr(ae, "accumulate_gradients", counted)
        monkeypatch.setattr(ae, "check_device", lambda *arguments: arguments[4])
        run(experiment(data_dir, device="cuda", trainable_layers=layers))
    n = in_updates.pop("updates")
    assert in_updates == {"to the device": copies * n, "question": n}


# --- a device that disagrees with the CPU ---


def wrong_gradient(name, args, result):
    """The gradient of a norm's scale, as on MPS over inputs that take none (pytorch issue 183825)."""
    if name == "native_layer_norm_backward":
        return (result[0], result[1] * 1.5 if result[1] is not None else None, result[2])
    return result


def wrong_logit(name, args, result):
    """One logit of the head."""
    if name == "addmm" and result.ndim == 2 and result.shape[1] == 2:
        result = result.clone()
        result[-1, 0] += 0.1
    return result


class ChangingProduct:
    """A product that is wrong in every second call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, name, args, result):
        if name == "addmm" and result.ndim == 2 and result.shape[1] == 2:
            self.calls += 1
            return result * 1.2 if self.calls % 2 == 0 else result
        return result


def infinite(name, args, result):
    return torch.full_like(result, torch.inf) if name == "addmm" else result


FAULTS = [
    (wrong_gradient, r"the gradient of gpt\.[\w.]+norm\d?\.weight differs by 50.0%"),
    (wrong_logit, "the logits differs by"),
    (ChangingProduct(), "the logits differs by"),
    (infinite, "a training loss is not finite"),
]


@pytest.mark.parametrize("fault, what", FAULTS, ids=["gradient", "logit", "changing product", "infinite"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_device_that_disagrees_ends_the_run(options, tmp_path, monkeypatch, capsys, kind, fault, what):
    command = [*options, "--results", str(tmp_path / "results")]
    with pretended_device(monkeypatch, kind, fault):
        assert main([*command, "--device", kind]) == 1
        out, err = capsys.readouterr()
        assert not (tmp_path / "results").exists() and "Training completed" not in out
        assert re.search(f"error: .* does not compute what the CPU does .*: {what}", err), err
        assert err.endswith("\nTry: --device cpu\n")
        assert main([*command, "--device", "auto"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("warning: ") and err.endswith("; the run goes on on the CPU\n")
    assert "| CPU, " in out and len(list((tmp_path / "results").iterdir())) == 1


def wrong_without_input_gradient(name, args, result):
    """What PyTorch on MPS did: a norm's own gradients are right only where its input takes one (issue 183825)."""
    is_wrong = name == "native_layer_norm_backward" and not args[-1][0]
    return (result[0], result[1] * 2, result[2] * 2) if is_wrong else result


@pytest.mark.parametrize("layers", ["last_block", "last_two_blocks"])
def test_a_norm_over_frozen_features_learns_on_mps_all_the_same(tiny_size, data_dir, monkeypatch, layers):
    on_cpu = experiment(data_dir, device="cpu", trainable_layers=layers)
    expected = run(on_cpu)
    with pretended_device(monkeypatch, "mps", wrong_without_input_gradient):
        assert_same_numbers(run(replace(on_cpu, device="mps")), expected)
    with pretended_device(monkeypatch, "cuda", wrong_without_input_gradient):
        with pytest.raises(UserError, match="does not compute what the CPU does.* gradient of .*norm"):
            run(replace(on_cpu, device="cuda"))


def test_on_mps_products_and_attention_take_forms_without_known_faults(tiny_size, data_dir, monkeypatch):
    linear, attention, products, parts = F.linear, F.scaled_dot_product_attention, [], []
    monkeypatch.setattr(F, "linear", lambda x, *rest: products.append(x.dim()) or linear(x, *rest))

    def noting(*tensors, **masks):
        parts.extend((part.dtype, part.is_contiguous()) for part in tensors if part.device.type == "mps")
        return attention(*tensors, **masks)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
    with pretended_device(monkeypatch, "mps"):
        run(experiment(data_dir, device="mps", trainable_layers="last_two_blocks", precision="bf16"))
    assert set(products) == {2} and set(parts) == {(torch.float32, True)}


def test_the_comparison_takes_the_first_window_and_leaves_the_random_state(tiny_size, data_dir):
    messages = dict.fromkeys(ae.SPLITS, range(43))
    torch.manual_seed(123)
    expected = list(ae.make_loaders(messages, 8)["train"])[:2]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    window = ae.first_window(experiment(data_dir, accumulation_steps=2), messages)
    assert [batch.tolist() for batch in window] == [batch.tolist() for batch in expected]
    assert torch.equal(torch.get_rng_state(), state)


def test_deviations():
    expected = {"the logits": torch.tensor([2.0, -4.0]), "the gradient of a": torch.tensor([1e-9, 1.0])}
    assert devices.largest_deviation(expected, expected)[0] == 0
    found = {name: tensor.clone() for name, tensor in expected.items()}
    found["the logits"][0] += 0.4
    assert devices.largest_deviation(found, expected) == (pytest.approx(0.1), "the logits")
    found["the gradient of a"][0] = torch.nan
    assert devices.largest_deviation(found, expected) == (float("inf"), "the gradient of a")


def test_negligible_gradients_are_rounding():
    expected = {"the gradient of a": torch.tensor([1.0]), "the gradient of b": torch.tensor([1e-9])}
    found = {"the gradient of a": torch.tensor([1.0]), "the gradient of b": torch.tensor([3e-9])}
    assert devices.largest_deviation(found, expected) == (pytest.approx(2e-6), "the gradient of b")


# --- memory ---


def test_free_memory_is_what_the_system_and_the_control_groups_leave(monkeypatch):
    monkeypatch.setattr(devices, "free_in_control_groups", lambda: [])
    assert devices.free_memory(CPU) > 10**8
    monkeypatch.setattr(devices, "free_in_control_groups", lambda: [3, 2])
    assert devices.free_memory(CPU) == 2


GB = 10**9


def write_group(folder, limit, used, cache):
    """The files of a control group, as the kernel shows them."""
    folder.mkdir(parents=True)
    stat = f"anon {used - cache}\nfile {cache}\ninactive_anon 7\nactive_file {cache // 4}\n"
    stat += f"inactive_file {cache - cache // 4}\n"
    for name, value in {"memory.max": limit, "memory.current": used, "memory.stat": stat}.items():
        (folder / name).write_text(f"{value}\n")


def test_page_cache_of_a_container_counts_as_free(tmp_path):
    write_group(tmp_path / "box", limit=4 * GB, used=3_900_000_000, cache=3_400_000_000)
    groups = tmp_path / "cgroup"
    groups.write_text("5:cpu,cpuacct:/box\n0::/box\n")
    assert devices.free_in_control_groups(groups, tmp_path) == [3_500_000_000]


def test_limits_above_a_group_hold_too(tmp_path):
    write_group(tmp_path / "outer", limit=2 * GB, used=1 * GB, cache=0)
    write_group(tmp_path / "outer" / "inner", limit="max", used=1 * GB, cache=0)
    groups = tmp_path / "cgroup"
    groups.write_text("0::/outer/inner\n")
    assert devices.free_in_control_groups(groups, tmp_path) == [1 * GB]


def test_a_group_whose_path_is_that_on_the_host(tmp_path):
    """In a container only its own part is mounted, at the root."""
    write_group(tmp_path / "root", limit=2 * GB, used=1 * GB, cache=0)
    groups = tmp_path / "cgroup"
    groups.write_text("0::/docker/0123456789ab\n")
    assert devices.free_in_control_groups(groups, tmp_path / "root") == [1 * GB]


def test_no_control_groups(tmp_path):
    assert devices.free_in_control_groups(tmp_path / "missing", tmp_path) == []


# --- peak memory ---


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux resets the peak of a process")
def test_peak_memory_of_a_later_run_is_its_own():
    size = 400_000_000
    block = bytearray(size)
    block[::4096] = b"1" * len(block[::4096])
    del block
    known_above = devices.reset_peak_memory(CPU)
    before = devices.peak_memory(CPU, known_above)
    block = bytearray(size // 4)
    block[::4096] = b"1" * len(block[::4096])
    grown = devices.peak_memory(CPU, known_above) - before
    assert known_above == 0 and size // 5 < grown < size // 2


def test_peak_memory_that_cannot_be_told(monkeypatch):
    """Without a reset the peak of the process may be that of an earlier run: unknown, unless it grows."""
    monkeypatch.setattr(devices, "process_peak", lambda: 1000)
    monkeypatch.setattr(devices.Path, "write_text", lambda *_: (_ for _ in ()).throw(PermissionError()))
    known_above = devices.reset_peak_memory(CPU)
    assert devices.peak_memory(CPU, known_above) is None
    monkeypatch.setattr(devices, "process_peak", lambda: 1001)
    assert devices.peak_memory(CPU, known_above) == 1001
