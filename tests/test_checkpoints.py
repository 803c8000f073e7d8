"""Interrupted runs that are resumed, and what can go wrong with their checkpoints."""

import copy
import os
import re
import shutil
import signal
import sys
import time
import weakref
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import filelock
import pytest
import torch
from helpers import interrupt_at, no_file_above, records_in, save_random_weights
from safetensors.torch import load_file

import additional_experiments as ae
from runner.files import atomic_write
from runner.results.records import read_records
from runner.saved import checkpoints
from runner.saved.checkpoints import FORMAT, SIGNALS

NEEDS_POSIX = pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither these signals nor SIGKILL")
RESUMES = "interrupted; the same command resumes from run.ckpt\n"


def numbers(text):
    """What a run printed about its last seed, without times and where it resumed."""
    begins = ("Ep ", "Training accuracy", "Validation accuracy", "Test accuracy")
    lines = [line for line in text.splitlines() if line.startswith(begins)]
    [row] = [line.split("|") for line in text.splitlines() if re.match(r"\| -,? ", line)]
    return lines[-9:], row[:11] + row[12:]  # the twelfth cell is the time


def content_of(path="run.ckpt"):
    return torch.load(path, weights_only=True)


def files():
    """The names of the files that a run has left, but for those of locks."""
    return {path.name for path in Path().iterdir() if path.suffix != ".lock"}


# --- resumed at chosen moments (at others: test_distributed.py) ---


@pytest.mark.parametrize("minutes, is_saved", [(0.25, False), (0.002, True)])
def test_minutes_between_checkpoints(options, monkeypatch, minutes, is_saved):
    """In an epoch of half a second: 15 seconds are never over, 0.12 seconds are."""
    found, accumulate_gradients = set(), ae.accumulate_gradients

    def slow(*arguments):
        time.sleep(0.012)
        found.add(Path("run.ckpt").exists())
        return accumulate_gradients(*arguments)

    monkeypatch.setattr(ae, "accumulate_gradients", slow)
    options += ["--num_epochs", "1", "--checkpoint", "run.ckpt", "--checkpoint_minutes", str(minutes)]
    assert ae.main(options) == 0 and (True in found) == is_saved


@NEEDS_POSIX
@pytest.mark.parametrize(
    "further, owner, function, call, batches_done, number",
    [
        ("", ae, "mean_loss", 1, 1, signal.SIGTERM),  # in the first evaluation
        ("", ae, "confusion", 1, 43, signal.SIGTERM),  # between two epochs
        ("--accumulation_steps 8", ae, "mean_loss", 2, 8, signal.SIGINT),  # within a window, before its update
        ("--repeats 2", ae, "accumulate_gradients", 90, 4, signal.SIGINT),
        ("--repeats 2", torch, "save", 2, 86, signal.SIGTERM),
        ("", ae, "confusion", 6, None, signal.SIGINT),  # after training
        ("--trainable_layers lora --precision bf16", torch.optim.AdamW, "step", 4, 4, signal.SIGTERM),
    ],
)
def test_interrupted(options, monkeypatch, capfd, further, owner, function, call, batches_done, number):
    """`batches_done` are those in the checkpoint, None after training, which the last one then has finished."""
    options += [*further.split(), "--checkpoint"]
    assert ae.main([*options, "whole.ckpt"]) == 0
    expected, expected_records, whole = numbers(capfd.readouterr().out), records_in(), content_of("whole.ckpt")["state"]
    shutil.rmtree("results")
    before = [signal.getsignal(number) for number in SIGNALS]
    with monkeypatch.context() as patch:
        interrupt_at(patch, owner, function, call, number)
        assert ae.main([*options, "run.ckpt"]) == 128 + number
    assert capfd.readouterr().err == RESUMES
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert files() <= {"run.ckpt", "whole.ckpt", "results"}
    content = content_of()
    assert content["state"]["batches_done"] == (batches_done or whole["batches_done"])
    content["state"]["usage"] = dict(training=1000.0, total=2000.0, peak_memory=10**15)
    torch.save(content, "run.ckpt")

    if batches_done is None:
        monkeypatch.setattr(ae, "accumulate_gradients", None)
    assert ae.main([*options, "run.ckpt"]) == 0
    out, resumed = capfd.readouterr().out, content_of()["state"]
    assert numbers(out) == expected and "Resuming from run.ckpt after" in out and records_in() == expected_records
    for part in ("parameters", "optimizer", "order", "random_states"):
        torch.testing.assert_close(resumed[part], whole[part], rtol=0, atol=0)
    record = max(read_records(["results"])[0], key=lambda record: record.seconds)
    assert 1000 <= 60 * record.minutes < 1100 and 2000 <= record.seconds < 2100 and record.peak_memory_gb == 10**6
    assert 10**8 < whole["usage"]["peak_memory"] < 10**11


@NEEDS_POSIX
@pytest.mark.parametrize("seconds, number, batches_done", [(2, signal.SIGINT, 43), (2, signal.SIGTERM, 50), (0, 2, 43)])
def test_a_second_signal(options, monkeypatch, capfd, seconds, number, batches_done):
    """While the first one is saving. Ctrl-C ends at once; SIGTERM, which is sent again at once, only a while later."""
    monkeypatch.setattr(checkpoints, "SECONDS_BETWEEN_SIGNALS", seconds)
    interrupt_at(monkeypatch, ae, "accumulate_gradients", 50, signal.SIGTERM)
    interrupt_at(monkeypatch, torch, "save", 2, number)
    assert ae.main([*options, "--checkpoint", "run.ckpt"]) == (130 if batches_done == 43 else 143)
    assert capfd.readouterr().err == RESUMES and files() == {"run.ckpt"}
    assert content_of()["state"]["batches_done"] == batches_done


@NEEDS_POSIX
def test_an_ignored_signal_stays_ignored_and_another_thread_handles_none(options, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupt_at(monkeypatch, ae, "accumulate_gradients", 3, signal.SIGHUP)
    assert ae.main([*options, "--checkpoint", "run.ckpt"]) == 0
    assert signal.signal(signal.SIGHUP, before) is signal.SIG_IGN
    with ThreadPoolExecutor() as pool:
        assert pool.submit(ae.main, [*options, "--checkpoint", "run.ckpt"]).result() == 0


# --- finished runs ---


def test_a_finished_run_is_not_trained_again(options, monkeypatch, capfd):
    """It writes what is newly asked for: here the classifier that it would have written before."""
    options += ["--checkpoint", "run.ckpt"]
    assert ae.main([*options, "--save_model", "before.safetensors"]) == 0
    expected = numbers(capfd.readouterr().out)
    monkeypatch.setattr(ae, "accumulate_gradients", None)
    assert ae.main([*options, "--save_model", "after.safetensors"]) == 0
    assert numbers(capfd.readouterr().out) == expected
    torch.testing.assert_close(load_file("after.safetensors"), load_file("before.safetensors"), rtol=0, atol=0)


@NEEDS_POSIX
def test_repeats_and_their_records(options, monkeypatch, capfd):
    """Seed 123 is finished, 124 is interrupted, 125 is asked for then. Without its record seed 123 is missed."""
    assert ae.main([*options, "--seed", "124", "--results", "expected"]) == 0
    options += ["--checkpoint", "run.ckpt"]
    assert ae.main(options) == 0
    capfd.readouterr()
    with monkeypatch.context() as patch:
        interrupt_at(patch, ae, "accumulate_gradients", 4, signal.SIGINT)
        assert ae.main([*options, "--repeats", "2", "--skip_finished"]) == 130
    assert "Resuming" not in capfd.readouterr().out and content_of()["state"]["batches_done"] == 4  # of seed 124
    Path("results").rename("moved")
    before = Path("run.ckpt").read_bytes()
    assert ae.main([*options, "--repeats", "3"]) == 2
    out, err = capfd.readouterr()
    assert err.startswith("error: run.ckpt is of a later seed, and there is no record of seed 123 in results; delete ")
    assert "Ep 1" not in out and Path("run.ckpt").read_bytes() == before
    assert ae.main([*options, "--repeats", "3", "--results", "moved"]) == 0
    out, records = capfd.readouterr().out, records_in("moved")
    assert "Finished before: moved/" in out and "Resuming from run.ckpt after 4 batches" in out and "n=3" in out
    assert [record["seed"] for record in records] == [123, 124, 125] and records[1:2] == records_in("expected")
    assert ae.main([*options, "--save_model", "trained.safetensors"]) == 2
    assert capfd.readouterr().err == "error: run.ckpt is of a run with seed 125, not 123; delete it to start over\n"


# --- other runs, and files that are no use ---


@pytest.fixture
def interrupted(options, monkeypatch, capfd):
    """The options of a run whose checkpoint run.ckpt holds more than its first epoch."""
    options += ["--checkpoint", "run.ckpt"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, ae, "accumulate_gradients", 50, signal.SIGINT)
        assert ae.main(options) == 130
    capfd.readouterr()
    return options


def test_checkpoint_of_another_run(interrupted, data_dir, tmp_path, capfd):
    shutil.copytree(data_dir, "other")
    with open("other/test.csv", "a") as file:
        file.write("0,one more\n")
    weights, before = save_random_weights(tmp_path / "w", emb_dim=16), Path("run.ckpt").read_bytes()
    for further, told in {
        ("--learning_rate", "0.1"): "learning_rate 5e-05, not 0.1",
        ("--seed", "7"): "seed 123, not 7",
        ("--precision", "bf16"): "precision fp32, not bf16",
        ("--weights", weights): "weights random, not ",
        ("--data_dir", "other"): "data ",
    }.items():
        assert ae.main([*interrupted, *further]) == 2
        out, err = capfd.readouterr()
        assert re.search(f"error: run.ckpt is of a run with {told}.*; delete it to start over\n$", err)
        assert "Ep 1" not in out and Path("run.ckpt").read_bytes() == before


def test_what_changes_no_number_may_change(interrupted, data_dir, tmp_path, capfd):
    """The folder of the data, a GPU that is not there any more. What may change the last digits is told."""
    content = content_of()
    content["state"]["environment"]["device"] = "MPS, arm64"
    content["state"]["random_states"]["mps"] = torch.zeros(16, dtype=torch.uint8)
    torch.save(content, "run.ckpt")
    moved = shutil.copytree(data_dir, tmp_path / "moved")
    further = ["--data_dir", str(moved), "--features", "off", "--activation_checkpointing", "--device", "auto"]
    assert ae.main([*interrupted, *further, "--plot", "run.svg"]) == 0
    out, err = capfd.readouterr()
    told = "warning: run.ckpt is resumed with CPU.*, recomputed; before: MPS, arm64.*, kept; last digits may differ\n"
    assert re.fullmatch(told, err)
    assert ae.main([option for option in interrupted if option not in ("--checkpoint", "run.ckpt")]) == 0
    assert numbers(capfd.readouterr().out) == numbers(out)


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_checkpoint_that_cannot_be_used(quick, capfd):
    """Cut, other files of PyTorch's, of an older format, one that would run code, another archive, a text."""
    old = dict(identity=dict(format=FORMAT - 1), state={})
    for content in ({}, {"parameters": torch.ones(1)}, old | dict(state=None), old, RunsCode(), "archive", None):
        torch.save(content, "run.ckpt")
        if content == "archive":
            with zipfile.ZipFile("run.ckpt", "w") as archive:
                archive.writestr("a.txt", "a")
        if content == {}:
            Path("run.ckpt").write_bytes(Path("run.ckpt").read_bytes()[:-10])
        if content is None:
            Path("run.ckpt").write_text("my diary\n" * 100)
        before = Path("run.ckpt").read_bytes()
        assert ae.main([*quick, "--checkpoint", "run.ckpt"]) == 2
        problem = rf"of a run with format {FORMAT - 1}, not {FORMAT}" if content is old else r"damaged, .* \(\w+\)"
        told = rf"error: run.ckpt is {problem}; (name another file, or )?delete (it|this one) to start over\n"
        assert re.fullmatch(told, capfd.readouterr().err) and Path("run.ckpt").read_bytes() == before
    assert files() == {"run.ckpt"}


def test_full_disk(interrupted, capfd):
    """No file may grow beyond 10,000 bytes: the record fits, the checkpoint does not, and the last good one stays."""
    before = Path("run.ckpt").read_bytes()
    with no_file_above(10_000):
        assert ae.main(interrupted) == 1
    out, err = capfd.readouterr()
    assert err.startswith("warning: the checkpoint run.ckpt could not be written: [Errno 27] File too large\n")
    assert "Test accuracy: " in out and len(records_in()) == 1 and Path("run.ckpt").read_bytes() == before
    assert files() == {"run.ckpt", "results"}


def test_a_flipped_bit_is_found(interrupted, capfd):
    """In the tensors: PyTorch reads them without comparing checksums."""
    content = Path("run.ckpt").read_bytes()
    order = content_of()["state"]["order"].numpy().tobytes()
    for place in (content.index(order), len(content) // 2):
        damaged = bytearray(content)
        damaged[place] ^= 4
        Path("run.ckpt").write_bytes(damaged)
        assert ae.main(interrupted) == 2
        out, err = capfd.readouterr()
        assert err.count("\n") == 1 and "run.ckpt is damaged" in err and "Ep 2" not in out


def test_damaged_states_are_refused(interrupted, capfd):
    def cut(state):
        name = next(name for name, tensor in state["parameters"].items() if tensor.ndim == 2)
        state["parameters"][name] = state["parameters"][name][:1]  # would be broadcast

    damages = [cut, lambda state: state.pop("order"), lambda state: state.update(usage=3)]
    damages += [lambda state: state["history"].update(more=[]), lambda state: state["optimizer"].clear()]
    damages += [lambda state: state["random_states"].update(cpu=torch.zeros(3, dtype=torch.uint8))]
    before = content_of()
    for damage in damages:
        content = copy.deepcopy(before)
        damage(content["state"])
        torch.save(content, "run.ckpt")
        assert ae.main(interrupted) == 2
        assert re.fullmatch(r"error: run.ckpt is damaged \(.*\); delete it to start over\n", capfd.readouterr().err)


def test_memory_that_is_short_while_a_checkpoint_is_restored_is_no_damage(interrupted, monkeypatch, capfd):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    monkeypatch.setattr(checkpoints.processes, "shard_like", Mock(side_effect=error))
    assert ae.main(interrupted) == 1
    err = capfd.readouterr().err
    assert err.startswith("error: out of memory\nTry: ") and "damaged" not in err and Path("run.ckpt").exists()


def test_a_restored_checkpoint_frees_its_memory(interrupted, monkeypatch):
    """It may be as large as what the run itself needs."""
    saved, load, train = [], torch.load, ae.train

    def noting(*arguments, **settings):
        content = load(*arguments, **settings)
        saved.extend(map(weakref.ref, content["state"]["parameters"].values()))
        return content

    def checked(*arguments):
        assert saved and not any(tensor() is not None for tensor in saved)
        train(*arguments)

    monkeypatch.setattr(torch, "load", noting)
    monkeypatch.setattr(ae, "train", checked)
    assert ae.main(interrupted) == 0


def test_ctrl_c_while_a_checkpoint_is_read(interrupted, monkeypatch, capfd):
    monkeypatch.setattr(torch, "load", Mock(side_effect=KeyboardInterrupt))
    assert ae.main(interrupted) == 130
    assert capfd.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), RuntimeError("can't allocate memory")])
def test_a_file_that_cannot_be_read_is_not_to_be_deleted(interrupted, monkeypatch, capfd, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    assert ae.main(interrupted) == 1
    assert capfd.readouterr().err == f"error: the checkpoint run.ckpt cannot be read: {error}\n"


def test_a_weights_file_that_changes_during_a_run(options, tmp_path, monkeypatch, capfd):
    """Nothing of such a run is left: no record, no classifier, and with a checkpoint not even that."""
    options[options.index("random")] = path = save_random_weights(tmp_path / "weights", emb_dim=16)
    capfd.readouterr()
    options += ["--trainable_layers", "lora", "--save_model", "trained.safetensors"]
    told = f"error: the weights file {path} was changed while this run used it\n"
    confusion = ae.confusion
    for further in ([], ["--checkpoint", "run.ckpt"]):
        with monkeypatch.context() as patch:
            patch.setattr(ae, "confusion", lambda *given: os.utime(path, (0, 0)) or confusion(*given))
            assert ae.main([*options, *further]) == 1
        assert capfd.readouterr().err == told and files() <= {"results"} and not list(Path().glob("results/*"))
        os.utime(path)


def test_a_killed_save_leaves_nothing_for_ever(options):
    Path("run.ckpt").touch()
    with atomic_write(Path("run.ckpt")) as left, atomic_write(Path("other.ckpt")) as of_other:
        for temporary in (left, of_other):
            shutil.copy(temporary, f"{temporary}.copy")
    os.rename(f"{left}.copy", left)
    os.rename(f"{of_other}.copy", of_other)
    Path("run.ckpt").unlink()
    assert ae.main([*options, "--checkpoint", "run.ckpt"]) == 0
    assert not left.exists() and of_other.exists()


# --- two runs at once ---


def test_a_checkpoint_belongs_to_one_run_at_a_time(options, monkeypatch, capfd):
    """Whatever its settings, and through whatever link. The lock ends with the run."""
    options += ["--checkpoint", "run.ckpt"]
    Path("link.ckpt").symlink_to("run.ckpt")
    told = f"error: another run uses the checkpoint {Path('run.ckpt').resolve()}; wait, or use another file\n"

    def start_others(*arguments):
        for further in ([], ["--seed", "7"], ["--checkpoint", "link.ckpt"]):
            assert ae.main([*options, *further]) == 2 and capfd.readouterr().err == told
        train(*arguments)

    train = ae.train
    monkeypatch.setattr(ae, "train", start_others)
    assert ae.main(options) == 0
    assert ae.main([*options, "--seed", "7"]) == 2  # refused for its settings now
    assert "is of a run with seed 123, not 7" in capfd.readouterr().err


def test_a_file_system_without_locks_is_told(options, monkeypatch, capfd):
    def acquire(lock):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    assert ae.main([*options, "--checkpoint", "run.ckpt"]) == 0
    told = "warning: the checkpoint is not locked ([Errno 38] Function not implemented); use it in one run at a time\n"
    assert told in capfd.readouterr().err


# --- numbers that are not finite ---


@pytest.mark.parametrize(
    "further, what", [("", "an output"), ("--accumulation_steps 2 --trainable_layers all", "a training loss")]
)
def test_what_is_not_finite_ends_the_run(options, capfd, further, what):
    """No record, no classifier, and no checkpoint that could only fail again."""
    options += ["--learning_rate", "1e18", *further.split(), "--save_model", "trained.safetensors"]
    assert ae.main([*options, "--checkpoint", "run.ckpt", "--checkpoint_minutes", "0"]) == 1
    out, err = capfd.readouterr()
    assert re.match(rf"error: training diverged, at step \d{{6}}: {what}.* not finite\nTry: ", err), err
    assert "Test accuracy" not in out and files() <= {"run.ckpt"}
    if Path("run.ckpt").exists():
        assert all(tensor.isfinite().all() for tensor in content_of()["state"]["parameters"].values())


@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_the_checkpoint_before_it_is_kept(interrupted, monkeypatch, capfd, value):
    """Not overwritten, neither with values that are not finite nor with values that lead to them again."""
    before, step, calls = Path("run.ckpt").read_bytes(), torch.optim.AdamW.step, []

    @torch.no_grad()
    def diverge(optimizer, *arguments):
        step(optimizer, *arguments)
        calls.append("step")
        if len(calls) == 5:
            optimizer.param_groups[0]["params"][0].fill_(value)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", diverge)
        assert ae.main(interrupted) == 1
    assert "error: training diverged, at step 000055: a training loss is not finite\n" in capfd.readouterr().err
    assert Path("run.ckpt").read_bytes() == before and not Path("results").exists()
    assert ae.main(interrupted) == 0
