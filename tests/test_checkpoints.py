"""Interrupted runs that are resumed, at chosen and at random moments, and what can go wrong with their checkpoints."""

import os
import random
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import filelock
import pytest
import torch
from conftest import TINY, TINY_SIZE
from helpers import interrupt_at, no_file_above, processes, records_in, save_random_weights
from safetensors.torch import load_file

import additional_experiments as ae
from previous_chapters import GPT_SIZES
from runner.saved import checkpoints
from runner.saved.checkpoints import FORMAT, SIGNALS

CONFIGURATIONS = {
    "last_block": "",
    "all": "--trainable_layers all --trainable_token_pos flexible",
    "lora": "--trainable_layers lora --precision bf16",
    "repeats": "--repeats 2",
    "accumulation": "--accumulation_steps 8",
    "accumulation, all": "--accumulation_steps 3 --trainable_layers all",
}
NEEDS_POSIX = pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither these signals nor SIGKILL")
RESUMES = "interrupted; the same command resumes from run.ckpt\n"


def numbers(text):
    """What a run printed, without times and where it resumed."""
    begins = ("Ep ", "Training accuracy", "Validation accuracy", "Test accuracy")
    lines = [line for line in text.splitlines() if line.startswith(begins)]
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| - |")]
    return lines, [row[:11] + row[12:] for row in rows]  # the twelfth cell is the time


def content_of(path="run.ckpt"):
    return torch.load(path, weights_only=True)


def files():
    """The names of the files that a run has left, but for those of locks."""
    return {path.name for path in Path().iterdir() if path.suffix != ".lock"}


# --- SIGKILL ---


def run_in_folder(folder, options):
    """A run in a process of its own, which prints into out.txt of its folder."""
    os.chdir(folder)
    GPT_SIZES[TINY] = TINY_SIZE
    with open("out.txt", "w") as out, redirect_stdout(out), redirect_stderr(out):
        sys.exit(ae.main(options))


def start(folder, options):
    folder.mkdir(exist_ok=True)
    process = processes().Process(target=run_in_folder, args=(folder, options))
    process.start()
    return process


def finish(folder, options):
    """What a run prints that ends well."""
    process = start(folder, options)
    process.join()
    out = (folder / "out.txt").read_text()
    assert process.exitcode == 0, out
    return out


@NEEDS_POSIX
@pytest.mark.parametrize("name", ["last_block", "all", "repeats", "accumulation, all"])
def test_killed_at_random_moments(options, tmp_path, name):
    """A random moment, perhaps before there is a checkpoint, and just after the first, when its lock is still there."""
    options = [*options, *CONFIGURATIONS[name].split(), "--checkpoint", "run.ckpt", "--checkpoint_minutes", "0.002"]
    begin = time.perf_counter()
    whole = finish(tmp_path / "whole", options)
    moment = random.uniform(0.2, 1) * (time.perf_counter() - begin)
    for folder in (tmp_path / "at random", tmp_path / "has saved"):
        process = start(folder, options)
        if folder.name == "at random":
            process.join(moment)
        while folder.name == "has saved" and process.is_alive() and not (folder / "run.ckpt").exists():
            time.sleep(0.001)
        process.kill()
        process.join()
        out = finish(folder, options)
        assert folder.name == "at random" or "Resuming from" in out
        assert numbers(out) == numbers(whole), f"killed after {moment} s"
        assert records_in(folder / "results") == records_in(tmp_path / "whole" / "results")


# --- other signals, at chosen moments ---


@NEEDS_POSIX
@pytest.mark.parametrize(
    "name, owner, function, call, batches_done, number",
    [
        ("last_block", ae, "mean_loss", 1, 1, signal.SIGTERM),  # in the first evaluation
        ("last_block", torch.optim.AdamW, "step", 43, 43, signal.SIGINT),  # the last update of an epoch
        ("last_block", ae, "accuracy", 1, 43, signal.SIGTERM),  # between two epochs
        ("accumulation", ae, "mean_loss", 2, 8, signal.SIGINT),  # within a window, before its update
        ("repeats", ae, "accumulate_gradients", 90, 4, signal.SIGINT),
        ("repeats", torch, "save", 2, 86, signal.SIGTERM),
        ("last_block", ae, "confusion", 2, None, signal.SIGINT),  # after training
    ],
)
def test_interrupted(options, monkeypatch, capfd, name, owner, function, call, batches_done, number):
    """`batches_done` are those in the checkpoint, None after training, which the last one then has finished."""
    options += CONFIGURATIONS[name].split()
    assert ae.main(options) == 0
    expected, expected_records = numbers(capfd.readouterr().out), records_in()
    shutil.rmtree("results")
    options += ["--checkpoint", "run.ckpt"]
    before = [signal.getsignal(number) for number in SIGNALS]
    with monkeypatch.context() as patch:
        interrupt_at(patch, owner, function, call, number)
        assert ae.main(options) == 128 + number
    assert capfd.readouterr().err == (RESUMES if batches_done else "interrupted\n")
    assert content_of()["state"]["batches_done"] == (batches_done or 86)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert files() <= {"run.ckpt", "results"}

    if batches_done is None:
        monkeypatch.setattr(ae, "accumulate_gradients", None)
    assert ae.main(options) == 0
    out = capfd.readouterr().out
    assert numbers(out) == expected and "Resuming from run.ckpt after" in out
    assert records_in() == expected_records


@NEEDS_POSIX
def test_a_second_signal_ends_at_once(options, monkeypatch, capfd):
    """Here while the first one is saving: what was saved before is what is resumed."""
    interrupt_at(monkeypatch, ae, "accumulate_gradients", 50, signal.SIGTERM)
    interrupt_at(monkeypatch, torch, "save", 2, signal.SIGINT)
    assert ae.main([*options, "--checkpoint", "run.ckpt"]) == 130
    assert capfd.readouterr().err == "interrupted\n"
    assert content_of()["state"]["batches_done"] == 43 and files() == {"run.ckpt"}


@NEEDS_POSIX
def test_an_ignored_signal_stays_ignored_and_another_thread_handles_none(options, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupt_at(monkeypatch, ae, "accumulate_gradients", 3, signal.SIGHUP)
    assert ae.main([*options, "--checkpoint", "run.ckpt"]) == 0
    assert signal.signal(signal.SIGHUP, before) is signal.SIG_IGN
    with ThreadPoolExecutor() as pool:
        assert pool.submit(ae.main, [*options, "--checkpoint", "run.ckpt"]).result() == 0


@NEEDS_POSIX
@pytest.mark.parametrize("name", ["lora", "accumulation, all"])
def test_resumed_to_the_bit(options, monkeypatch, name):
    options += CONFIGURATIONS[name].split()
    assert ae.main([*options, "--checkpoint", "whole.ckpt"]) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, torch.optim.AdamW, "step", 4, signal.SIGTERM)
        assert ae.main([*options, "--checkpoint", "run.ckpt"]) == 143
    content = content_of()
    content["state"]["usage"] = dict(training=1000.0, total=2000.0, peak_memory=10**15)
    torch.save(content, "run.ckpt")
    assert ae.main([*options, "--checkpoint", "run.ckpt"]) == 0
    whole, resumed = content_of("whole.ckpt")["state"], content_of()["state"]
    for part in ("parameters", "optimizer", "order", "random_states"):
        torch.testing.assert_close(resumed[part], whole[part], rtol=0, atol=0)
    assert resumed["history"] | dict(lines=[]) == whole["history"] | dict(lines=[])
    assert 1000 < resumed["usage"]["training"] < 1100 and 2000 < resumed["usage"]["total"] < 2100
    assert resumed["usage"]["peak_memory"] == 10**15 and 10**8 < whole["usage"]["peak_memory"] < 10**11


# --- a finished run ---


def test_a_finished_run_is_not_trained_again(options, monkeypatch, capfd):
    """It writes what is newly asked for: here the classifier that it would have written before."""
    options += ["--checkpoint", "run.ckpt"]
    assert ae.main([*options, "--save_model", "before.safetensors"]) == 0
    expected = numbers(capfd.readouterr().out)
    monkeypatch.setattr(ae, "accumulate_gradients", None)
    assert ae.main([*options, "--save_model", "after.safetensors"]) == 0
    assert numbers(capfd.readouterr().out) == expected
    torch.testing.assert_close(load_file("after.safetensors"), load_file("before.safetensors"), rtol=0, atol=0)


def test_more_repeats_of_a_finished_run(options, monkeypatch, capfd):
    options += ["--checkpoint", "run.ckpt", "--repeats"]
    assert ae.main([*options, "2"]) == 0
    rows = numbers(capfd.readouterr().out)[1]
    trained, train = [], ae.train
    monkeypatch.setattr(ae, "train", lambda *arguments: trained.append(arguments[2].seed) or train(*arguments))
    assert ae.main([*options, "3"]) == 0
    out = capfd.readouterr().out
    assert trained == [124, 125] and len(content_of()["records"]) == 2  # seed 124 from its last state
    assert "Finished before, according to run.ckpt; it printed:\nEp 1" in out and numbers(out)[1][:2] == rows[:2]
    assert "n=3" in out.splitlines()[-2] and {record["seed"] for record in records_in()} == {123, 124, 125}
    assert ae.main([*options, "1", "--save_model", "trained.safetensors"]) == 2
    assert capfd.readouterr().err == "error: run.ckpt holds the classifier of a later seed than 123\n"


def test_a_state_is_restored_in_its_own_seed_only(options, capfd):
    """The last state is of seed 123, whose record is found: seed 124 begins anew."""
    assert ae.main([*options, "--repeats", "2", "--results", "expected"]) == 0
    options += ["--checkpoint", "run.ckpt"]
    assert ae.main(options) == 0
    capfd.readouterr()
    assert ae.main([*options, "--repeats", "2", "--skip_finished"]) == 0
    assert "Resuming" not in capfd.readouterr().out and records_in() == records_in("expected")


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


def test_checkpoint_of_another_run(interrupted, data_dir, tmp_path, monkeypatch, capfd):
    shutil.copytree(data_dir, "other")
    with open("other/test.csv", "a") as file:
        file.write("0,one more\n")
    weights = save_random_weights(tmp_path / "w", emb_dim=16)
    before = Path("run.ckpt").read_bytes()
    for further, told in {
        ("--learning_rate", "0.1"): "learning_rate 5e-05, not 0.1",
        ("--seed", "7"): "seed 123, not 7",
        ("--weights", weights): "weights random, not ",
        ("--data_dir", "other"): "data ",
        ("--quiet",): f"format {FORMAT}, not {FORMAT + 1}",
    }.items():
        monkeypatch.setattr(checkpoints, "FORMAT", FORMAT + ("format" in told))
        assert ae.main([*interrupted, *further]) == 2
        out, err = capfd.readouterr()
        assert re.search(f"error: run.ckpt is of a run with {told}.*; delete it to start over\n$", err)
        assert "Ep 1" not in out and Path("run.ckpt").read_bytes() == before


def test_what_changes_no_number_may_change(interrupted, data_dir, tmp_path, capfd):
    """The folder of the data, and what else the call is to do. What may change the last digits is told."""
    moved = shutil.copytree(data_dir, tmp_path / "moved")
    further = ["--data_dir", str(moved), "--features", "off", "--quiet", "--plot", "run.svg"]
    assert ae.main([*interrupted, *further]) == 0
    told = r"warning: run.ckpt is resumed with (.*), recomputed; before: \1, kept; last digits may differ\n"
    assert re.fullmatch(told, capfd.readouterr().err)


def test_checkpoint_that_cannot_be_used(nano, capfd):
    """Cut, another file of PyTorch's, one that would run code, a text."""
    for content in ({}, {"parameters": torch.ones(1)}, Path("code"), None):
        torch.save(content, "run.ckpt")
        if content == {}:
            Path("run.ckpt").write_bytes(Path("run.ckpt").read_bytes()[:-10])
        if content is None:
            Path("run.ckpt").write_text("my diary\n" * 100)
        before = Path("run.ckpt").read_bytes()
        assert ae.main([*nano, "--checkpoint", "run.ckpt"]) == 2
        told = r"error: run.ckpt is no checkpoint \(\w+\); delete it to start over\n"
        assert re.fullmatch(told, capfd.readouterr().err) and Path("run.ckpt").read_bytes() == before


def test_full_disk(interrupted, capfd):
    """No file may grow beyond 10,000 bytes: the record fits, the checkpoint does not, and the last good one stays."""
    before = Path("run.ckpt").read_bytes()
    with no_file_above(10_000):
        assert ae.main(interrupted) == 0
    out, err = capfd.readouterr()
    assert err == "warning: the checkpoint run.ckpt could not be written: [Errno 27] File too large\n"
    assert "Test accuracy: " in out and len(records_in()) == 1 and Path("run.ckpt").read_bytes() == before
    assert files() == {"run.ckpt", "results"}


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


@pytest.mark.parametrize("layers", ["last_block", "all"])
def test_a_loss_that_is_not_finite_ends_the_run(options, capfd, layers):
    """No record, no classifier, and no checkpoint that could only fail again."""
    options += ["--trainable_layers", layers, "--learning_rate", "1e18", "--save_model", "trained.safetensors"]
    assert ae.main([*options, "--checkpoint", "run.ckpt", "--checkpoint_minutes", "0"]) == 1
    out, err = capfd.readouterr()
    assert re.match(r"error: training diverged, at step \d{6}: .+ not (finite|a number)\n", err), err
    assert err.endswith("Try: a smaller --learning_rate; --precision fp32\n") and "Test accuracy" not in out
    assert not Path("results").exists() and not Path("trained.safetensors").exists()
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


def test_an_evaluation_that_is_not_finite_ends_the_run(options, monkeypatch, capfd):
    forward = ae.Classifier.forward

    def infinite(classifier, batch, compute=None):
        result = forward(classifier, batch, compute)
        return result if compute is not None or classifier.training else result * float("inf")

    monkeypatch.setattr(ae.Classifier, "forward", infinite)
    assert ae.main(options) == 1
    assert "not finite\nTry: " in capfd.readouterr().err and not Path("results").exists()
