"""Several processes for one run: the numbers of one process, and how they end together."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from conftest import TINY, TINY_SIZE
from helpers import (
    CPU,
    encoded,
    end_together,
    finish_together,
    interrupt_at,
    records_in,
    save_random_weights,
    start_together,
)
from torch.torch_version import TorchVersion

import additional_experiments as ae
from classifier import build_classifier, place
from gpt_download import load_weights
from previous_chapters import GPT_SIZES
from runner.data import features
from runner.data.messages import Batch, Stage
from runner.files import UserError
from runner.machine import devices, processes
from runner.options import RunOptions
from runner.results.records import read_records
from runner.rows import ROWS
from runner.saved import checkpoints

# Each with 43 training messages: no number of processes divides the batches, nor a batch the messages.
CONFIGURATIONS = {f"row {number}": row.options for number, row in ROWS.items()} | {
    "batches of 3": dict(batch_size=3),
    "batches of 1": dict(batch_size=1, trainable_layers="last_two_blocks"),
    "accumulation": dict(batch_size=3, accumulation_steps=4, trainable_layers="all"),
    "labels ignored": dict(ignore_index=1, trainable_layers="all"),
    "bf16": dict(precision="bf16"),
    "bf16, lora": dict(precision="bf16", trainable_layers="lora", learning_rate=1e-4),
}
HAS_SHARDS = torch.__version__ >= "2.8"
needs_shards = pytest.mark.skipif(not HAS_SHARDS, reason="--shard needs PyTorch 2.8")
SHARDED = ("row 1", "row 3", "row 4", "row 5", "row 11", "row 14", "row 15", "row 19", "accumulation", "bf16, lora")
SHARDED += ("kept features", "features read")
RUNS = {"repeats": dict(repeats=2)} | dict.fromkeys(("kept features", "features read"), dict(feature_cache="features"))


def make_tiny():
    """Set what the tests of this file need in another process: losses are printed every other batch."""
    GPT_SIZES[TINY], ae.EVALUATE_EVERY, features.MIN_SECONDS = TINY_SIZE, 2, 0
    processes.TIMEOUT = timedelta(minutes=1)


def results(data_dir, weights, shard, names):
    """Return {configuration: what its runs have found}, at the tiny size."""
    base = dict(model_size=TINY, device="cpu", data_dir=str(data_dir), learning_rate=5e-4, num_epochs=1, shard=shard)
    found, known = {}, set()
    for name in names:
        own = {option: value for option, value in CONFIGURATIONS.get(name, {}).items() if option != "model_size"}
        own["weights"] = weights if name in ("row 1", "row 5", "row 11") else "random"
        experiment = ae.Experiment(**base | own)
        if experiment in known and name not in RUNS:  # rows that differ in their size only
            continue
        known.add(experiment)
        run_options = RunOptions(**dict(results="", feature_cache="") | RUNS.get(name, {}))
        found[name] = [
            dict(
                losses=record.history.train_losses + record.history.val_losses,
                accuracies=record.history.train_accuracies,
                mistakes={split: len(confusion.mistakes) for split, confusion in record.confusions.items()},
            )
            for record in ae.run(experiment, run_options)
        ]
    return found


def gradients(data_dir, shard):
    """Return {parameter: gradient} of three batches, of which no number of processes divides the last one."""
    base = dict(model_size=TINY, weights="random", device="cpu", data_dir=str(data_dir), shard=shard)
    experiment = ae.Experiment(**base, batch_size=3, accumulation_steps=3, trainable_layers="last_two_blocks")
    classifier = place(build_classifier(experiment, 2), CPU, shard)
    ae.accumulate_gradients(classifier, encoded(experiment), torch.arange(7).split(3), experiment)
    return {name: processes.gather_full(p.grad) for name, p in classifier.named_parameters() if p.grad is not None}


def write_results(data_dir, weights):
    make_tiny()
    with processes.process_group():
        for shard in (False, True)[: processes.world_size() if HAS_SHARDS else 1]:
            found = results(data_dir, weights, shard, SHARDED if shard else (*CONFIGURATIONS, *RUNS))
            found_gradients = gradients(data_dir, shard)
            if processes.rank() == 0:
                Path(f"{shard}.json").write_text(json.dumps(found))
                torch.save(found_gradients, f"{shard}.pt")


def folders(tmp_path, *names):
    for name in names:
        (tmp_path / name).mkdir()
        yield tmp_path / name


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_numbers_are_those_of_one_process(data_dir, tmp_path, n):
    alone, together = folders(tmp_path, "alone", "together")
    weights = save_random_weights(tmp_path, emb_dim=16)
    finish_together(1, alone, write_results, data_dir, weights)
    of_one_process = json.loads((alone / "False.json").read_text())
    out = finish_together(n, together, write_results, data_dir, weights)
    n_shared = 1 + HAS_SHARDS
    assert out.count("and kept in features/") == out.count("read from features/") == n_shared  # printed by one process
    assert f"{n} × CPU, 1 thread" in out
    for shard in (False, True)[:n_shared]:
        found = json.loads((together / f"{shard}.json").read_text())
        assert found.keys() == (set(SHARDED) if shard else of_one_process.keys())
        for name, runs in found.items():
            for run, expected in zip(runs, of_one_process[name], strict=True):
                expected_losses = pytest.approx(expected["losses"], rel=0, abs=2e-3 if "bf16" in name else 1e-5)
                assert run == expected | dict(losses=expected_losses), (name, shard)
        # AdamW takes steps of the same size whether gradients are summed or averaged.
        torch.testing.assert_close(torch.load(together / f"{shard}.pt"), torch.load(alone / "False.pt"))


# --- how they end ---


def main(options, elsewhere=".", of_rank1=(), fault=None):
    """A run as the command line starts it; rank 1 may have another folder, further options, and a fault."""
    make_tiny()
    ae.EVALUATE_EVERY = 5
    if processes.rank() == 1:
        os.chdir(elsewhere)
        options = [*options, *of_rank1]
    if fault is not None:
        fault(pytest.MonkeyPatch())
    return ae.main(options)


ENDINGS = {
    "all": (signal.SIGKILL, "--trainable_layers all --accumulation_steps 3 --checkpoint_minutes 0"),
    "sharded": (signal.SIGTERM, "--trainable_layers last_two_blocks --shard"),
    "repeats": (signal.SIGINT, "--trainable_layers last_layer --repeats 2"),
}


@pytest.fixture
def long_options(options):
    """Those of a run with so many epochs that there is time to interrupt it in one of the first."""
    return [*options, "--num_epochs", "5", "--batch_size", "8", "--checkpoint", "run.ckpt"]


@pytest.mark.parametrize("name", [pytest.param("sharded", marks=needs_shards), "all", "repeats"])
def test_ended_together_and_resumed(long_options, tmp_path, name):
    """In the second epoch, by a signal to one of them. Resumed by as many, by one, and sharded by three."""
    number, own = ENDINGS[name]
    options = [*long_options, *own.split()]
    whole, ended, by_one, by_three = folders(tmp_path, "whole", "ended", "by_one", "by_three")
    finish_together(2, whole, main, options)

    started = start_together(2, ended, main, options)
    printed = ended / "out.txt"
    while not printed.exists() or "Ep 2 (" not in printed.read_text():
        time.sleep(0.005)
    os.kill(started[-1].pid, number)
    statuses, out = end_together(started, ended)
    if number == signal.SIGKILL:
        assert statuses == [1, -number]
    else:
        assert statuses == [128 + number] * 2 and "Traceback" not in out
        assert re.findall("^interrupted.*", out, re.M) == ["interrupted; the same command resumes from run.ckpt"]

    for folder in (by_one, by_three):
        shutil.copy(ended / "run.ckpt", folder)
    assert "Resuming from run.ckpt after" in finish_together(2, ended, main, options)
    assert records_in(ended / "results") == records_in(whole / "results")
    finish_together(1, by_one, main, [option for option in options if option != "--shard"])
    if name == "sharded":
        finish_together(3, by_three, main, options)
    for folder in (by_one, by_three) if name == "sharded" else (by_one,):
        for record, expected in zip(*(read_records([each / "results"])[0] for each in (folder, whole)), strict=True):
            assert record.test == expected.test
            assert record.history.train_losses == pytest.approx(expected.history.train_losses, abs=1e-5)


@pytest.mark.parametrize(
    "further, status, message",
    [
        (["--learning_rate", "1e18"], 1, "error: training diverged, at step 0000"),
        (["--batch_size", "44"], 2, "error: --batch_size 44: there are only 43 training messages\n"),
    ],
)
def test_what_all_find_is_told_once(long_options, tmp_path, further, status, message):
    statuses, out = end_together(start_together(2, tmp_path, main, [*long_options, *further]), tmp_path)
    assert statuses == [status] * 2 and out.count(message) == out.count("error") == 1 and "Traceback" not in out


def run_out_of_memory(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("CUDA out of memory")

    if processes.rank() == 1:
        monkeypatch.setattr(ae, "accumulate_gradients", fail)


def test_a_rank_that_fails_alone_ends_all(long_options, tmp_path):
    started = start_together(2, tmp_path, main, long_options, ".", (), run_out_of_memory)
    statuses, out = end_together(started, tmp_path)
    assert statuses == [1, 1] and out.count("error: out of memory\nTry: ") == 1


@needs_shards
def test_what_one_finds_ends_all(long_options, tmp_path):
    """Rank 1 would save less often; then, in another folder, it finds neither the checkpoint nor the weights."""
    here, elsewhere = folders(tmp_path, "here", "elsewhere")
    options = [*long_options, "--trainable_layers", "last_layer", "--shard", "--checkpoint_minutes", "0.001"]
    finish_together(2, here, main, options, ".", ["--checkpoint_minutes", "1000"])  # with shards all ranks save
    statuses, out = end_together(start_together(2, here, main, options, elsewhere), here)
    assert statuses == [2, 2]
    assert out.endswith("error: --checkpoint run.ckpt: not all hosts have the same file there\n")
    (here / "weights").touch()
    statuses, out = end_together(start_together(2, here, main, [*options, "--weights", "weights"], elsewhere), here)
    assert statuses == [2, 2] and out.count("error: --weights weights: neither ") == 1


def test_a_finished_run_is_skipped_by_all(options, tmp_path):
    """Its record is in the folder of process 0 alone."""
    here, elsewhere = folders(tmp_path, "here", "elsewhere")
    options = [*options, "--trainable_layers", "last_layer", "--batch_size", "8", "--skip_finished"]
    finish_together(2, here, main, options)
    statuses, out = end_together(start_together(2, here, main, options, elsewhere), here)
    assert statuses == [0, 0] and out.count("Finished before: ") == 1


def interrupt_the_last_save(monkeypatch):
    if processes.rank() == 1:
        interrupt_at(monkeypatch, checkpoints.Checkpoint, "save", 1, signal.SIGTERM)


def diverge_before_the_last_save(monkeypatch):
    save = checkpoints.Checkpoint.save

    def diverged(checkpoint, state):
        next(iter(state.parameters.values())).data.fill_(float("nan"))
        save(checkpoint, state)

    monkeypatch.setattr(checkpoints.Checkpoint, "save", diverged)


@needs_shards
@pytest.mark.parametrize(
    "fault, status, told",
    [
        (interrupt_the_last_save, 143, "interrupted; the same"),
        (diverge_before_the_last_save, 1, "error: training diverged, at"),
    ],
)
def test_the_last_state_ends_all(long_options, tmp_path, fault, status, told):
    options = [*long_options, "--num_epochs", "1", "--trainable_layers", "last_layer", "--shard"]
    statuses, out = end_together(start_together(2, tmp_path, main, options, ".", (), fault), tmp_path)
    assert statuses == [status] * 2 and out.count(told) == 1 and "Traceback" not in out


def write_slowly(monkeypatch):
    """Ctrl-C reaches all ranks; rank 0 takes a second to write the checkpoint."""
    fsync = os.fsync
    interrupt_at(monkeypatch, ae, "accumulate_gradients", 4, signal.SIGINT)
    monkeypatch.setattr(os, "fsync", lambda descriptor: time.sleep(1) or fsync(descriptor))


def test_no_rank_ends_before_the_checkpoint_is_written(long_options, tmp_path):
    """When one has ended, torchrun ends the others."""
    rank0, rank1 = start_together(2, tmp_path, main, long_options, ".", (), write_slowly)
    rank1.join()
    rank0.terminate()
    rank0.join()
    assert torch.load(tmp_path / "run.ckpt")["state"]["batches_done"] == 4


# --- what torchrun itself does ---


@needs_shards
def test_torchrun_is_ended(nano):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ae.__file__]
    command += [*nano, "--trainable_layers", "all", "--num_epochs", "200", "--shard"]
    command += ["--checkpoint", "run.ckpt", "--checkpoint_minutes", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert any("Step" in line for line in process.stdout)
    process.terminate()
    out = process.communicate(timeout=40)[0]
    assert process.returncode != 0 and "\ninterrupted; the same command resumes from run.ckpt" in "\n" + out
    assert Path("run.ckpt").exists()


# --- shards ---


@needs_shards
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells memory apart from mapped files")
def test_shards_and_the_peak_of_loading(tmp_path):
    """Each process holds its part of parameters, gradients and moments, and never the whole of a file."""
    path = save_random_weights(tmp_path, emb_dim=256, n_layer=24)
    out = finish_together(2, tmp_path, measure_shards, path)
    sizes = [list(map(int, line.split())) for line in out.splitlines() if line[0].isdigit()]
    assert len(sizes) == 2
    for total, held, gradients, moments, peak in sizes:
        assert held == pytest.approx(total / 2, rel=0.01) == gradients and moments == pytest.approx(total, rel=0.01)
        assert total / 2 < peak < 0.8 * Path(path).stat().st_size


def measure_shards(path):
    """Print bytes: of all parameters; of this process's part of them, their gradients and moments; while loading."""
    GPT_SIZES["wide"] = dict(emb_dim=256, n_layers=24, n_heads=4)
    experiment = ae.Experiment(model_size="wide", weights=path, device="cpu", trainable_layers="all")
    with processes.process_group():
        import torch.distributed.fsdp as fsdp

        fully_shard, held = fsdp.fully_shard, [memory_of_its_own()]

        def measured(module, **arguments):
            held.append(memory_of_its_own())
            return fully_shard(module, **arguments)

        fsdp.fully_shard = measured
        classifier = build_classifier(experiment, 2, load_weights(path, "wide").tensors)
        place(classifier, CPU, shard=True)
        peak = max(*held, memory_of_its_own()) - held[0]
        optimizer = ae.make_optimizer(classifier, experiment)
        batch = Batch(Stage.TOKEN_IDS, torch.ones(2, 5, dtype=torch.int32), torch.tensor([4, 4]), None)
        classifier(batch).square().sum().backward()
        optimizer.step()
        parameters = list(classifier.parameters())
        moments = [moment for kept in optimizer.state.values() for moment in kept.values() if moment.ndim]
        sizes = [
            [part.to_local().nbytes for part in parts] for parts in (parameters, [p.grad for p in parameters], moments)
        ]
        print(sum(p.nbytes for p in parameters), *map(sum, sizes), peak, flush=True)


def memory_of_its_own():
    """Bytes that this process holds, without what it has mapped of files."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


# --- one process of several, without the others ---


@pytest.fixture
def launched(monkeypatch):
    """This process is rank 1 of two on its host."""
    launched = dict(TORCHELASTIC_RUN_ID="test", RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2")
    for name, value in launched.items():
        monkeypatch.setenv(name, value)


def test_a_device_for_each(launched, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    assert devices.device_of_rank("cuda") == torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="2 processes cannot have a CUDA device each: this host has 1"):
        devices.resolve_device("cuda")
    with pytest.raises(UserError, match="--device mps is for one process; use --device cpu with several"):
        devices.resolve_device("mps")


def test_an_empty_share_is_one_message_without_weight(launched):
    indices, weights = torch.tensor([7, 8, 9]), torch.tensor([0.2, 0.3, 0.5])
    assert [part.tolist() for part in processes.rank_share(indices, weights)] == [[8], [weights[1].item()]]
    assert [part.tolist() for part in processes.rank_share(indices[:1], weights[:1])] == [[7], [0.0]]


def test_shards_need_a_newer_pytorch(launched, monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.7.1+cu126"))
    with pytest.raises(UserError, match="--shard needs PyTorch 2.8 or later; this is 2.7.1"):
        ae.Experiment(shard=True)


@pytest.mark.parametrize("mode", ["--report", "--baseline", "--load_model"])
def test_what_trains_nothing_needs_no_torchrun(launched, mode):
    Path("model").touch()
    with pytest.raises(UserError, match=f"{mode} runs in one process: call it without torchrun"):
        ae.parse_args([mode, *(["model", "--classify", "text"] if mode == "--load_model" else [])])
