"""Interrupted runs that are resumed, at chosen and at random moments, and what can go wrong with their checkpoints."""

import csv
import errno
import json
import os
import platform
import random
import re
import shutil
import signal
import sys
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from conftest import TINY, TINY_SIZE
from helpers import damaged_at, encoded, interrupt_at, no_file_above, processes, records_in, save_random_weights
from safetensors.torch import save_file

import additional_experiments as ae
from previous_chapters import GPT_SIZES
from runner import locks
from runner.data import features
from runner.data.tensor_files import read_tensors
from runner.files import NonFiniteError, UserError
from runner.locks import LockFile
from runner.results import outputs
from runner.saved import checkpoints, training_state
from runner.saved.signals import DeferredSignals
from runner.saved.training_state import TrainingState

CONFIGURATIONS = {
    "last_block": "",
    "last_layer": "--trainable_layers last_layer --average_embeddings",
    "all": "--trainable_layers all --trainable_token_pos flexible",
    "lora": "--trainable_layers lora --precision bf16",
    "accumulation": "--accumulation_steps 8",
    "accumulation, all": "--accumulation_steps 3 --trainable_layers all",
    "no padding": "--no_padding --trainable_layers last_two_blocks",
    "repeats": "--repeats 2",
}


@pytest.fixture(scope="session")
def whole_runs():
    """What `whole_run` has computed: {configuration: (lines and rows, records)}."""
    return {}


def whole_run(name, options, whole_runs, capfd):
    """What a run of this configuration that is never interrupted prints and records."""
    if name not in whole_runs:
        assert ae.main([*options, *CONFIGURATIONS[name].split()]) == 0
        whole_runs[name] = numbers(capfd.readouterr().out), without_data_dir(records_in())
        Path("results.csv").unlink()
    return whole_runs[name]


def numbers(text):
    """What a run printed, without times and where it resumed."""
    begins = ("Ep ", "Training accuracy", "Validation accuracy", "Test accuracy")
    lines = [line for line in text.splitlines() if line.startswith(begins)]
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| - |")]
    return lines, [row[:10] + row[11:] for row in rows]  # the eleventh cell is the time


def without_data_dir(records):
    """It differs from test to test, and its content does not."""
    return [{name: cell for name, cell in record.items() if name != "data_dir"} for record in records]


def run_in_folder(folder, options):
    """A run in a process of its own, which prints into out.txt and err.txt of its folder; at its end its seconds."""
    os.chdir(folder)
    GPT_SIZES[TINY] = TINY_SIZE
    begin = time.perf_counter()
    with open("out.txt", "a") as out, open("err.txt", "a") as err, redirect_stdout(out), redirect_stderr(err):
        status = ae.main(options)
    Path("seconds").write_text(f"{time.perf_counter() - begin}")
    sys.exit(status)


# --- SIGKILL ---


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on Windows")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (number % 2)) for number, name in enumerate(CONFIGURATIONS)],
)
def test_killed_at_random_moments(options, tmp_path, name):
    """Two random moments, perhaps before there is a checkpoint, and one just after the first."""
    options = [*options, *CONFIGURATIONS[name].split(), "--checkpoint", "run.ckpt", "--checkpoint_minutes", "0.002"]

    def start(folder):
        folder.mkdir(exist_ok=True)
        process = processes().Process(target=run_in_folder, args=(folder, options))
        process.start()
        return process

    def finish(folder):
        process = start(folder)
        process.join()
        assert process.exitcode == 0, (folder / "err.txt").read_text()

    finish(tmp_path / "whole")
    duration = float((tmp_path / "whole" / "seconds").read_text())
    whole = (tmp_path / "whole" / "out.txt").read_text()

    for number in range(3):
        folder, moment = tmp_path / f"cut {number}", random.uniform(0.2, 1) * duration
        process = start(folder)
        if number == 2:  # as soon as there is a checkpoint
            while process.is_alive() and not (folder / "run.ckpt").exists():
                time.sleep(0.001)
        else:
            process.join(moment)
        process.kill()
        process.join()
        # Wherever it was: at most one file was being written, and the next run removes it.
        assert len(list(folder.glob("*.part"))) <= 1
        (folder / "out.txt").unlink(missing_ok=True)
        finish(folder)
        out = (folder / "out.txt").read_text()
        assert number < 2 or "Resuming from" in out or "Finished before" in out
        assert numbers(out) == numbers(whole), f"killed after {moment} s"
        assert records_in(folder / "results.csv") == records_in(tmp_path / "whole" / "results.csv")
        assert not list(folder.glob("*.part"))


# --- SIGTERM and Ctrl-C at chosen moments ---


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send itself these signals on Windows")
@pytest.mark.parametrize("name", ["last_block", "accumulation", "accumulation, all", "repeats"])
@pytest.mark.parametrize(
    "owner, function, call",
    [
        (ae, "mean_loss", 1),  # in an evaluation, the first, second and third
        (ae, "mean_loss", 2),
        (ae, "mean_loss", 3),
        (ae, "accumulate_gradients", 3),
        (torch.optim.AdamW, "step", 1),  # in an update
        (torch.optim.AdamW, "step", 4),
        (ae, "accuracy", 1),  # at the end of an epoch
        (ae, "confusion", 2),  # at the end of the run
        (outputs, "append_record", 1),
        (checkpoints, "write_checkpoint", 2),
    ],
)
def test_interrupted(options, whole_runs, monkeypatch, capfd, name, owner, function, call):
    expected, expected_records = whole_run(name, options, whole_runs, capfd)
    signal_number, status = random.choice([(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    options = [*options, *CONFIGURATIONS[name].split(), "--checkpoint", "run.ckpt"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, owner, function, call, signal_number)
        before = [signal.getsignal(number) for number in DeferredSignals.NUMBERS]
        assert ae.main(options) == status
        assert [signal.getsignal(number) for number in DeferredSignals.NUMBERS] == before
    # The first evaluation falls into the first accumulation window, before there is anything to save.
    is_saved = not (name.startswith("accumulation") and function == "mean_loss" and call < 3)
    assert Path("run.ckpt").exists() == is_saved
    resumes = "; the same command resumes from run.ckpt" if is_saved else ""
    assert capfd.readouterr().err == f"interrupted{resumes}\n"

    assert ae.main(options) == 0
    assert numbers(capfd.readouterr().out) == expected
    assert without_data_dir(records_in()) == expected_records


def test_interrupted_before_there_is_anything_to_save(options, monkeypatch, capfd):
    interrupt_at(monkeypatch, features, "compute_features", 1, signal.SIGTERM)
    assert ae.main([*options, "--checkpoint", "run.ckpt"]) == 143
    assert capfd.readouterr().err == "interrupted\n" and list(Path().iterdir()) == []


def test_resuming_is_announced_and_earlier_lines_are_printed_again(options, monkeypatch, capfd):
    options += ["--checkpoint", "run.ckpt"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, ae, "accumulate_gradients", 60, signal.SIGINT)
        assert ae.main(options) == 130
    before = numbers(capfd.readouterr().out)[0]
    assert ae.main(options) == 0
    out = capfd.readouterr().out
    assert "Resuming from run.ckpt after 59 batches; printed before:\n" + before[0] in out


def test_a_finished_run_is_not_run_again(options, monkeypatch, capfd):
    options += ["--checkpoint", "run.ckpt"]
    assert ae.main(options) == 0
    expected = numbers(capfd.readouterr().out)
    monkeypatch.setattr(ae, "train", None)
    assert ae.main([*options, "--save_model", "trained.safetensors"]) == 0
    out = capfd.readouterr().out
    assert numbers(out) == expected and "Finished before, according to run.ckpt" in out
    assert len(records_in()) == 1 and ae.load_classifier("trained.safetensors", {})


def test_another_environment_is_told(interrupted, capfd):
    """Sums in another order, as with another number of threads, may differ in the last digits."""
    assert ae.main([*interrupted, "--features", "off"]) == 0
    told = "warning: run.ckpt was started with features kept and is resumed with recomputed: last digits may differ\n"
    assert capfd.readouterr().err == told


def test_an_error_in_training_loses_no_more_than_an_interruption(options, monkeypatch, capfd):
    options += ["--checkpoint", "run.ckpt"]
    accumulate_gradients, calls = ae.accumulate_gradients, []

    def fail_once(*arguments):
        calls.append(1)
        if len(calls) == 20:
            raise RuntimeError("MPS backend out of memory")
        accumulate_gradients(*arguments)

    monkeypatch.setattr(ae, "accumulate_gradients", fail_once)
    assert ae.main(options) == 1
    assert "error: out of memory\nTry: " in capfd.readouterr().err
    assert ae.main(options) == 0
    assert "Resuming from run.ckpt after 19 batches" in capfd.readouterr().out


def test_more_repeats_of_a_finished_run(options, capfd):
    options += ["--checkpoint", "run.ckpt", "--repeats"]
    assert ae.main([*options, "1"]) == 0
    assert ae.main([*options, "3"]) == 0
    assert [record["seed"] for record in records_in()] == ["123", "124", "125"]
    assert "mean ± standard deviation of 3 seeds" in capfd.readouterr().out


# --- faults ---


@pytest.fixture
def interrupted(options, monkeypatch, capfd):
    """The options of a run whose checkpoint run.ckpt holds its first epoch."""
    options += ["--checkpoint", "run.ckpt"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, ae, "accumulate_gradients", 50, signal.SIGINT)
        assert ae.main(options) == 130
    capfd.readouterr()
    return options


@pytest.mark.parametrize(
    "further, message",
    [
        (["--learning_rate", "0.1"], "with learning_rate 5e-05, not 0.1"),
        (["--trainable_layers", "all"], "with trainable_layers last_block, not all"),
        (["--seed", "7"], "with seed 123, not 7"),
        (["--precision", "bf16"], "with precision fp32, not bf16"),
    ],
)
def test_checkpoint_of_other_settings(interrupted, capfd, further, message):
    before = Path("run.ckpt").read_bytes()
    assert ae.main([*interrupted, *further]) == 2
    out, err = capfd.readouterr()
    assert err == f"error: run.ckpt is of a run {message}; --restart overwrites it\n" and "Ep 1" not in out
    assert Path("run.ckpt").read_bytes() == before
    assert ae.main([*interrupted, *further, "--restart"]) == 0
    assert Path("run.ckpt").read_bytes() != before and len(records_in()) == 1


def test_checkpoint_of_other_data(interrupted, data_dir, capfd):
    with open(data_dir / "test.csv", "a") as file:
        file.write("0,one more\n")
    assert ae.main(interrupted) == 2
    assert "run.ckpt is of a run with data " in capfd.readouterr().err


def test_checkpoint_of_other_weights(interrupted, tmp_path, capfd):
    options = [
        save_random_weights(tmp_path / "w", emb_dim=16) if option == "random" else option for option in interrupted
    ]
    assert ae.main(options) == 2
    assert "run.ckpt is of a run with weights random, not " in capfd.readouterr().err


def test_what_changes_no_number_may_change(interrupted, data_dir, tmp_path):
    """The folder of the data, where features are kept, and what else the call is to do."""
    moved = shutil.copytree(data_dir, tmp_path / "moved")
    further = ["--data_dir", str(moved), "--features", "memory", "--quiet", "--plot", "run.svg"]
    assert ae.main([*interrupted, *further]) == 0


def in_another_format(version):
    """A function that writes a checkpoint as a program with another version of the format does."""

    def write(path):
        metadata = dict(kind=checkpoints.KIND, format=str(version), description="{}", sha256="")
        save_file({"a": torch.ones(1)}, path, metadata)

    return write


@pytest.mark.parametrize(
    "damage, message",
    [
        (damaged_at(-1000), "is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-10]), "cannot be read as a checkpoint"),
        (lambda path: path.write_text("my diary\n" * 100), "cannot be read as a checkpoint"),
        (in_another_format(3), "is a checkpoint in format 3; this program reads format 2"),
        (in_another_format(1), "is a checkpoint in format 1; this program reads format 2"),
    ],
)
def test_checkpoint_that_cannot_be_used(interrupted, capfd, damage, message):
    damage(Path("run.ckpt"))
    before = Path("run.ckpt").read_bytes()
    assert ae.main(interrupted) == 2
    err = capfd.readouterr().err
    assert message in err and err.endswith("; --restart overwrites it\n") and err.count("\n") == 1
    assert Path("run.ckpt").read_bytes() == before


def test_full_disk(interrupted, capfd):
    """No file may grow beyond 10,000 bytes: the record fits, the checkpoint does not, and the last good one stays."""
    before = Path("run.ckpt").read_bytes()
    with no_file_above(10_000):
        assert ae.main([*interrupted, "--checkpoint_minutes", "0"]) == 0
    out, err = capfd.readouterr()
    assert err.count("\n") == 1 and "warning: the checkpoint run.ckpt could not be written: " in err
    assert "File too large" in err and "Test accuracy: " in out and len(records_in()) == 1
    assert Path("run.ckpt").read_bytes() == before and not list(Path().glob("*.part"))


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="a folder that even root cannot write into")
def test_read_only_folder(options, capfd):
    further = ["--checkpoint", "/sys/run.ckpt", "--results_file", "/sys/results.csv"]
    assert ae.main([*options, *further]) == 1
    out, err = capfd.readouterr()
    assert "Test accuracy: " in out
    assert "warning: the checkpoint /sys/run.ckpt could not be written" in err
    assert "warning: the record could not be written to /sys/results.csv" in err and "Traceback" not in err


def test_folder_that_vanishes(options, monkeypatch, capfd):
    Path("folder").mkdir()
    accumulate_gradients = ae.accumulate_gradients

    def remove_then_accumulate(*arguments):
        shutil.rmtree("folder", ignore_errors=True)
        accumulate_gradients(*arguments)

    monkeypatch.setattr(ae, "accumulate_gradients", remove_then_accumulate)
    assert ae.main([*options, "--checkpoint", "folder/run.ckpt", "--results_file", "folder/results.csv"]) == 1
    out, err = capfd.readouterr()
    assert "Test accuracy: " in out and "No such file or directory" in err and err.count("the checkpoint") == 1


def test_a_classifier_that_is_no_longer_in_the_checkpoint(options, capfd):
    options += ["--checkpoint", "run.ckpt"]
    assert ae.main([*options, "--repeats", "2"]) == 0
    assert ae.main([*options, "--save_model", "trained.safetensors"]) == 2
    told = "error: --save_model: run.ckpt no longer holds the classifier of seed 123, but a later one\n"
    assert capfd.readouterr().err == told and not Path("trained.safetensors").exists()


def test_another_run_is_refused_by_the_setting_that_differs(tmp_path):
    path = tmp_path / "file"
    content = dict(n=[1.5, None], tensors=dict(a=torch.ones(2)))
    checkpoints.write_checkpoint(path, dict(seed=1, device="cpu"), content)
    found = checkpoints.read_checkpoint(path, dict(seed=1, device="cpu"))
    assert found["n"] == [1.5, None] and found["tensors"]["a"].equal(torch.ones(2))
    with pytest.raises(UserError, match="is of a run with device cpu, not cuda"):
        checkpoints.read_checkpoint(path, dict(seed=1, device="cuda"))
    with pytest.raises(UserError, match="is of a run with momentum None, not 1"):
        checkpoints.read_checkpoint(path, dict(seed=1, device="cpu", momentum=1))


# --- what is restored ---


def tensors_of(state):
    """All tensors of a TrainingState by name, as they are now."""
    flat = checkpoints.flatten(state.state_dict())
    return {name: tensor.detach().clone() for name, tensor in flat.items() if isinstance(tensor, torch.Tensor)}


@pytest.mark.parametrize("name", ["last_block", "lora", "accumulation, all"])
@pytest.mark.parametrize("function", ["step", "zero_grad"])
def test_resumed_to_the_bit(options, monkeypatch, name, function):
    """Interrupted within an update, before and after the optimizer's step; what is restored is what was there after."""
    options = [*options, *CONFIGURATIONS[name].split(), "--checkpoint", "run.ckpt"]
    states, resumed = [], []
    update, resume = checkpoints.Checkpointer.update, checkpoints.Checkpointer.resume

    @contextmanager
    def recording(checkpointer, state):
        try:
            with update(checkpointer, state):
                yield
        finally:
            states.append(tensors_of(state) | {"batches_done": torch.tensor(state.batches_done)})

    def recording_resume(checkpointer, state):
        found = resume(checkpointer, state)
        resumed.append(tensors_of(state) | {"batches_done": torch.tensor(state.batches_done)})
        return found

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Checkpointer, "update", recording)
        interrupt_at(patch, torch.optim.AdamW, function, 4, signal.SIGTERM)
        assert ae.main(options) == 143
    monkeypatch.setattr(checkpoints.Checkpointer, "resume", recording_resume)
    assert ae.main(options) == 0
    assert len(states) == 4  # the update was finished, and no other was begun
    before, [after] = states[-1], resumed
    assert before.keys() == after.keys() and before["batches_done"] > 0
    assert any("exp_avg_sq" in name for name in before) and "random_states/cpu" in before
    assert [name for name in before if not before[name].equal(after[name])] == []
    assert [name for name in before if before[name].dtype != after[name].dtype] == []


def test_signals_wait_until_an_update_is_over(options, monkeypatch):
    """All of it: parameters, the count of steps, and the state that can be resumed."""
    seen = []

    def step(optimizer, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        seen.append("not interrupted")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    assert ae.main([*options, "--checkpoint", "run.ckpt"]) == 143
    assert seen == ["not interrupted"] and Path("run.ckpt").exists()


def test_further_signals_lose_nothing(options, monkeypatch, capfd):
    """An impatient second Ctrl-C comes while the first one is writing the checkpoint, or just before."""
    options += ["--checkpoint", "run.ckpt"]
    before = [signal.getsignal(number) for number in DeferredSignals.NUMBERS]
    for owner, function in ((checkpoints.Checkpointer, "__exit__"), (checkpoints, "write_checkpoint")):
        with monkeypatch.context() as patch:
            interrupt_at(patch, ae, "accumulate_gradients", 20, signal.SIGTERM)
            interrupt_at(patch, owner, function, 1, signal.SIGINT)
            assert ae.main([*options, "--restart"]) == 143
        assert capfd.readouterr().err.startswith("interrupted; the same command without --restart resumes")
        assert [signal.getsignal(number) for number in DeferredSignals.NUMBERS] == before
        tree = checkpoints.unflatten(read_tensors("run.ckpt", checkpoints.KIND, checkpoints.VERSION)[0])
        assert tree["content"]["training_state"]["batches_done"] == 19


# --- its cost ---


def test_without_a_checkpoint_an_update_copies_nothing(options, monkeypatch):
    monkeypatch.setattr(TrainingState, "snapshot", None)
    assert ae.main(options) == 0


def test_a_snapshot_is_constant_work(options, monkeypatch):
    """It has the lengths of the history and not its entries, however long the run is."""
    sizes = []
    snapshot = TrainingState.snapshot

    def measuring(state):
        found = snapshot(state)
        described = json.dumps({name: found[name] for name in ("batches_done", "usage", "history")})
        sizes.append(len(described))
        assert found["order"] is state.order
        return found

    monkeypatch.setattr(TrainingState, "snapshot", measuring)
    assert ae.main([*options, "--num_epochs", "20", "--batch_size", "40", "--checkpoint", "run.ckpt"]) == 0
    assert len(sizes) >= 40 and max(sizes) < min(sizes) + 40


# --- two runs at once ---


def test_a_checkpoint_belongs_to_one_run_at_a_time(options, monkeypatch, capfd):
    """Whatever its settings. The lock ends with the run, also with one that is interrupted."""
    options += ["--checkpoint", "run.ckpt"]
    found = []
    train = ae.train

    def start_another(*arguments):
        if not found:
            found.append(None)
            for further in ([], ["--seed", "7"], ["--restart"]):
                assert ae.main([*options, *further]) == 2
                found.append(capfd.readouterr().err)
        train(*arguments)

    monkeypatch.setattr(ae, "train", start_another)
    assert ae.main(options) == 0
    holder = f"process {os.getpid()} on {platform.node()}"
    told = f"error: --checkpoint run.ckpt is used by {holder}; wait for it, or use another file\n"
    assert found == [None, told, told, told]
    assert not Path(".run.ckpt.lock").exists() and len(records_in()) == 1
    assert ae.main([*options, "--seed", "7"]) == 2  # refused for its settings now
    assert "is of a run with seed 123, not 7" in capfd.readouterr().err and not Path(".run.ckpt.lock").exists()


def test_a_link_to_a_checkpoint_is_the_same_checkpoint(options, monkeypatch, capfd):
    train, statuses = ae.train, []

    def start_another(*arguments):
        if not statuses:
            Path("link.ckpt").symlink_to("run.ckpt")
            statuses.append(ae.main([*options, "--checkpoint", "link.ckpt", "--restart"]))
        train(*arguments)

    monkeypatch.setattr(ae, "train", start_another)
    assert ae.main([*options, "--checkpoint", "run.ckpt"]) == 0
    assert statuses == [2] and "--checkpoint link.ckpt is used by process" in capfd.readouterr().err


def test_a_file_that_is_no_lock_is_left_alone(options, capfd):
    Path(".run.ckpt.lock").write_text("my diary\n")
    assert ae.main([*options, "--checkpoint", "run.ckpt"]) == 0
    told = "run.ckpt is not locked (.run.ckpt.lock: a file of this name exists and is not a lock); use it"
    assert told.replace("(", f"({Path().resolve()}/") in capfd.readouterr().err
    assert Path(".run.ckpt.lock").read_text() == "my diary\n"


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on Windows")
def test_the_lock_of_a_killed_run_blocks_nobody(options, tmp_path):
    process = processes().Process(target=hold_lock, args=(tmp_path,))
    process.start()
    while not (tmp_path / ".run.ckpt.lock").exists() or not (tmp_path / ".run.ckpt.lock").read_text():
        time.sleep(0.01)
    assert LockFile(tmp_path / ".run.ckpt.lock").acquire().startswith(f"process {process.pid} on ")
    process.kill()
    process.join()
    lock = LockFile(tmp_path / ".run.ckpt.lock")
    assert lock.acquire() is None and lock.is_effective
    lock.release()
    assert list(tmp_path.glob(".run.ckpt.lock")) == []


def hold_lock(folder):
    lock = LockFile(folder / ".run.ckpt.lock")
    assert lock.acquire() is None
    time.sleep(60)


def test_a_file_system_without_locks_is_told(options, monkeypatch, capfd):
    def flock(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    assert ae.main([*options, "--checkpoint", "run.ckpt"]) == 0
    err = capfd.readouterr().err
    assert "warning: run.ckpt is not locked (its file system has no locks); use it in one run at a time\n" in err
    assert (
        "warning: results.csv: its file system has no locks; the record is in a file of its own, results.csv\n" in err
    )
    assert ae.main([*options, "--checkpoint", "run.ckpt"]) == 0  # the same run, whose record is there
    assert "a file of its own, results.csv\n" in capfd.readouterr().err
    assert ae.main(options) == 0
    assert "a file of its own, results-2.csv\n" in capfd.readouterr().err
    assert len(records_in()) == len(records_in("results-2.csv")) == 1


# --- numbers that are not finite ---


@pytest.mark.parametrize("layers", ["last_block", "all", "last_layer"])
def test_a_loss_that_is_not_finite_ends_the_run(options, capfd, layers):
    """No record, no classifier, and no checkpoint that could only fail again."""
    options += ["--trainable_layers", layers, "--learning_rate", "1e30", "--save_model", "trained.safetensors"]
    assert ae.main([*options, "--checkpoint", "run.ckpt", "--checkpoint_minutes", "0"]) == 1
    out, err = capfd.readouterr()
    assert re.match(r"error: training diverged, at step \d{6}: .+ not (finite|a number)\n", err), err
    assert err.endswith("Try: a smaller --learning_rate; --precision fp32\n") and "Test accuracy" not in out
    assert not Path("results.csv").exists() and not Path("trained.safetensors").exists()
    if Path("run.ckpt").exists():
        _, tensors = read_tensors("run.ckpt", checkpoints.KIND, checkpoints.VERSION)
        assert all(tensor.isfinite().all() for name, tensor in tensors.items() if "parameters" in name)


@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_the_checkpoint_before_it_is_kept(interrupted, monkeypatch, capfd, value):
    """Not overwritten, neither with values that are not finite nor with values that lead to them again."""
    before = read_tensors("run.ckpt", checkpoints.KIND, checkpoints.VERSION)[1]
    step, calls = torch.optim.AdamW.step, []

    def diverge(optimizer, *arguments):
        step(optimizer, *arguments)
        calls.append(1)
        if len(calls) == 5:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0].fill_(value)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", diverge)
        assert ae.main(interrupted) == 1
    assert "error: training diverged, at step 000054: a training loss is not finite\n" in capfd.readouterr().err
    after = read_tensors("run.ckpt", checkpoints.KIND, checkpoints.VERSION)[1]
    assert all(before[name].equal(after[name]) for name in before) and not Path("results.csv").exists()
    assert ae.main(interrupted) == 0


@pytest.mark.parametrize("function", ["predict", "accumulate_gradients"])
def test_logits_that_are_not_finite_end_the_run(options, monkeypatch, capfd, function):
    """In an evaluation, and where no label counts, so that the loss is zero."""
    forward = ae.Classifier.forward

    def infinite(classifier, batch, compute=None):
        result = forward(classifier, batch, compute)
        is_logits = compute is None
        return result * float("inf") if is_logits and classifier.training == (function != "predict") else result

    monkeypatch.setattr(ae.Classifier, "forward", infinite)
    assert ae.main(options) == 1
    assert "not finite\nTry: " in capfd.readouterr().err and not Path("results.csv").exists()


def test_logits_are_looked_at_where_no_label_counts(nano):
    """The loss is zero then, whatever they are."""
    experiment, *_ = ae.parse_args([*nano, "--ignore_index", "1"])
    classifier, messages = ae.build_classifier(experiment, 2), encoded(experiment)["train"]
    ignored = messages.labels.nonzero().flatten()[:8]
    ae.accumulate_gradients(classifier, messages, [ignored], experiment)
    with torch.no_grad():
        classifier.out_head.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        ae.accumulate_gradients(classifier, messages, [ignored], experiment)


def test_an_error_within_an_update_leaves_the_checkpoint_alone(interrupted, monkeypatch):
    """Some parameters are changed then, and others are not."""
    before, step = Path("run.ckpt").read_bytes(), torch.optim.AdamW.step

    def fail(optimizer, *arguments):
        step(optimizer, *arguments)
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", fail)
        assert ae.main(interrupted) == 1
    assert Path("run.ckpt").read_bytes() == before
    assert ae.main(interrupted) == 0


def test_an_interrupted_run_does_not_promise_a_file_that_is_gone(options, monkeypatch, capfd):
    accumulate_gradients, calls = ae.accumulate_gradients, []
    Path("folder").mkdir()

    def remove_then_interrupt(*arguments):
        calls.append(1)
        if len(calls) == 60:  # after the checkpoint of the first epoch
            shutil.rmtree("folder")
            os.kill(os.getpid(), signal.SIGINT)
        accumulate_gradients(*arguments)

    monkeypatch.setattr(ae, "accumulate_gradients", remove_then_interrupt)
    assert ae.main([*options, "--checkpoint", "folder/run.ckpt"]) == 130
    err = capfd.readouterr().err
    assert "could not be written" in err and err.endswith("interrupted\n")


def test_peak_memory_is_that_of_each_seed(options, monkeypatch):
    """On Linux; elsewhere it is known only where it exceeds that of the seeds before."""
    counted = []
    monkeypatch.setattr(training_state, "reset_peak_memory", lambda device: counted.append(device) or 10**15)
    assert ae.main([*options, "--repeats", "2"]) == 0
    with open("results.csv", newline="") as file:
        assert [line["peak_memory_gb"] for line in csv.DictReader(file)] == ["", ""]
    assert len(counted) == 2
