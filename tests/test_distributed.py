"""Several processes for one run: the numbers of one process, and how they end together."""

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
REPEATED = (10, 13, 18)  # row 5 with other weights, row 1 with longer messages, row 1
CONFIGURATIONS = {
    f"row {n}": row.options for n, row in ROWS.items() if "model_size" not in row.options and n not in REPEATED
}
CONFIGURATIONS |= {
    "batches of 3": dict(batch_size=3),
    "batches of 1": dict(batch_size=1, trainable_layers="last_two_blocks"),
    "accumulation": dict(batch_size=3, accumulation_steps=4, trainable_layers="all"),
    "labels ignored": dict(ignore_index=1, trainable_layers="all"),
    "bf16": dict(precision="bf16"),
    "bf16, lora": dict(precision="bf16", trainable_layers="lora", learning_rate=1e-4),
}
SIGKILL = getattr(signal, "SIGKILL", 9)  # Windows has none
HAS_SHARDS = torch.__version__ >= "2.8"
needs_shards = pytest.mark.skipif(not HAS_SHARDS, reason="--shard needs PyTorch 2.8")
SHARDED = ("row 1", "row 3", "row 4", "row 5", "row 11", "row 14", "row 15", "row 19", "accumulation", "bf16, lora")
SHARDED += ("kept features", "features read")
RUNS = {"repeats": dict(repeats=2)} | dict.fromkeys(("kept features", "features read"), dict(feature_cache="features"))


def make_tiny():
    """Set what the tests of this file need in another process: losses are printed every other batch."""
    GPT_SIZES[TINY], ae.EVALUATE_EVERY, features.MIN_SECONDS = TINY_SIZE, 2, 0
    processes.TIMEOUT = timedelta(minutes=1)


def results(base, weights, names):
    """Return {configuration: what its runs have found}, at the tiny size."""
    found = {}
    for name in names:
        own = dict(weights=weights if name in ("row 1", "row 5", "row 11") else "random", num_epochs=1)
        experiment = ae.Experiment(**base | dict(learning_rate=5e-4) | CONFIGURATIONS.get(name, {}) | own)
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


def gradients(base):
    """Return {parameter: gradient} of three batches, of which no number of processes divides the last one."""
    layers = dict(weights="random", trainable_layers="last_two_blocks")
    experiment = ae.Experiment(**base | layers, batch_size=3, accumulation_steps=3)
    classifier = place(build_classifier(experiment, 2), CPU, experiment.shard)
    ae.accumulate_gradients(classifier, encoded(experiment), torch.arange(7).split(3), experiment)
    return {name: processes.gather_full(p.grad) for name, p in classifier.named_parameters() if p.grad is not None}


def write_results(data_dir, weights):
    make_tiny()
    with processes.process_group():
        for shard in (False, True)[: processes.world_size() if HAS_SHARDS else 1]:
            base = dict(model_size=TINY, device="cpu", data_dir=str(data_dir), shard=shard)
            found = results(base, weights, SHARDED if shard else (*CONFIGURATIONS, *RUNS)), gradients(base)
            if processes.rank() == 0:
                torch.save(found, f"{shard}.pt")


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_numbers_are_those_of_one_process(data_dir, tmp_path, n):
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir(), together.mkdir()
    weights = save_random_weights(tmp_path, emb_dim=16)
    finish_together(1, alone, write_results, data_dir, weights)
    expected, expected_gradients = torch.load(alone / "False.pt")
    out = finish_together(n, together, write_results, data_dir, weights)
    assert f"{n} × CPU, 1 thread" in out
    for shard in (False, True)[: 1 + HAS_SHARDS]:
        found, found_gradients = torch.load(together / f"{shard}.pt")
        assert found.keys() == (set(SHARDED) if shard else expected.keys())
        for name in found:
            for run, in_one in zip(found[name], expected[name], strict=True):
                losses = pytest.approx(in_one["losses"], rel=0, abs=2e-3 if "bf16" in name else 1e-5)
                assert run == in_one | dict(losses=losses), (name, shard)
        # AdamW takes the same steps whether gradients are summed or averaged.
        torch.testing.assert_close(found_gradients, expected_gradients)
    assert out.count("and kept in features/") == out.count("read from features/") == 1 + HAS_SHARDS  # by one process


# --- how they end ---


def main(options, of_rank1=(), fault=None):
    """A run as the command line starts it; rank 1 may have further options, and there may be a fault."""
    make_tiny()
    ae.EVALUATE_EVERY = 5
    if fault is not None:
        fault(pytest.MonkeyPatch())
    return ae.main([*options, *of_rank1] if processes.rank() == 1 else options)


@pytest.fixture
def long_options(options):
    """Those of a run with so many epochs that there is time to interrupt it in the second one."""
    return [*options, "--num_epochs", "5", "--batch_size", "8", "--checkpoint", "run.ckpt"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize(
    "n, number, further, others",
    [
        (1, SIGKILL, "--trainable_layers all --checkpoint_minutes 0", ()),
        (2, SIGKILL, "--trainable_layers all --accumulation_steps 3 --checkpoint_minutes 0", (1,)),
        pytest.param(2, signal.SIGTERM, "--trainable_layers last_two_blocks --shard", (3,), marks=needs_shards),
    ],
)
def test_ended_and_resumed(long_options, tmp_path, n, number, further, others):
    """By a signal to the last of `n` processes. Resumed by as many, and by other numbers of them."""
    options = [*long_options, *further.split()]
    whole, ended, *folders = (tmp_path / name for name in ("whole", "ended", *map(str, others)))
    for folder in (whole, ended, *folders):
        folder.mkdir()
    finish_together(n, whole, main, options)

    started = start_together(n, ended, main, options)
    printed = ended / "out.txt"
    while not printed.exists() or "Ep 2 (" not in printed.read_text():
        time.sleep(0.005)
    os.kill(started[-1].pid, number)
    statuses, out = end_together(started, ended)
    if number == SIGKILL:
        assert statuses == [1, -number][-n:]
    else:
        assert statuses == [128 + number] * n and "Traceback" not in out
        assert re.findall("^interrupted.*", out, re.M) == ["interrupted; the same command resumes from run.ckpt"]

    for folder in folders:
        shutil.copy(ended / "run.ckpt", folder)
    assert "Resuming from run.ckpt after" in finish_together(n, ended, main, options)
    assert records_in(ended / "results") == records_in(whole / "results")
    for other, folder in zip(others, folders, strict=True):
        finish_together(other, folder, main, [word for word in options if other > 1 or word != "--shard"])
        [found], [expected] = (read_records([each / "results"])[0] for each in (folder, whole))
        assert found.test == expected.test
        assert found.history.train_losses == pytest.approx(expected.history.train_losses, abs=1e-5)


def run_out_of_memory(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("CUDA out of memory")

    if processes.rank() == 1:
        monkeypatch.setattr(ae, "accumulate_gradients", fail)


def interrupt_the_last_save(monkeypatch):
    if processes.rank() == 1:
        interrupt_at(monkeypatch, checkpoints.Checkpoint, "save", 5, signal.SIGTERM)


def diverge(monkeypatch):
    def step(optimizer):
        optimizer.param_groups[0]["params"][0].data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)


DIVERGED, SAVE_FIRST = "error: training diverged, at step 00000", "--accumulation_steps 2 --checkpoint_minutes 0"


@pytest.mark.parametrize(
    "further, of_rank1, fault, status, told",
    [
        ("--batch_size 44", "", None, 2, "error: --batch_size 44: there are only 43 training messages\n"),
        ("", "--weights missing", None, 2, "error: --weights missing: neither "),
        ("", "", run_out_of_memory, 1, "error: out of memory\nTry: "),
        pytest.param("--shard", "", interrupt_the_last_save, 143, "interrupted; the same", marks=needs_shards),
        pytest.param(f"--shard {SAVE_FIRST}", "", diverge, 1, DIVERGED, marks=needs_shards),
    ],
)
def test_all_end_and_one_says_why(long_options, tmp_path, further, of_rank1, fault, status, told):
    options = [*long_options, "--trainable_layers", "last_layer", *further.split()]
    statuses, out = end_together(start_together(2, tmp_path, main, options, of_rank1.split(), fault), tmp_path)
    assert statuses == [status] * 2 and out.count(told) == out.count("error: ") + out.count("interrupted") == 1
    assert fault is run_out_of_memory or "Traceback" not in out


def test_ranks_that_differ(long_options, tmp_path):
    """Rank 1 would save less often; then it has another checkpoint, then other results."""
    options = [*long_options, "--trainable_layers", "last_layer", *["--shard"] * HAS_SHARDS]
    options += ["--checkpoint_minutes", "0.001"]
    finish_together(2, tmp_path, main, options, ["--checkpoint_minutes", "1000"])  # with shards all ranks save
    statuses, out = end_together(start_together(2, tmp_path, main, options, ["--checkpoint", "other"]), tmp_path)
    assert statuses == [2, 2] and out.endswith("error: --checkpoint other: not all hosts have the same file there\n")
    out = finish_together(2, tmp_path, main, [*options, "--skip_finished"], ["--results", "other"])
    assert out.count("Finished before: ") == 1


def write_slowly(monkeypatch):
    """Ctrl-C reaches all ranks; rank 0 takes a second to write the checkpoint."""
    fsync = os.fsync
    interrupt_at(monkeypatch, ae, "accumulate_gradients", 4, signal.SIGINT)
    monkeypatch.setattr(os, "fsync", lambda descriptor: time.sleep(1) or fsync(descriptor))


def test_no_rank_ends_before_the_checkpoint_is_written(long_options, tmp_path):
    """When one has ended, torchrun ends the others."""
    rank0, rank1 = start_together(2, tmp_path, main, long_options, (), write_slowly)
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
        shards = [sum(x.to_local().nbytes for x in xs) for xs in (parameters, [p.grad for p in parameters], moments)]
        print(sum(p.nbytes for p in parameters), *shards, peak, flush=True)


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


def test_shards_need_a_newer_pytorch(launched, monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.7.1+cu126"))
    with pytest.raises(UserError, match="--shard needs PyTorch 2.8 or later; this is 2.7.1"):
        ae.Experiment(shard=True)


@pytest.mark.parametrize("mode", ["--report", "--baseline", "--load_model"])
def test_what_trains_nothing_needs_no_torchrun(launched, mode):
    Path("model").touch()
    with pytest.raises(UserError, match=f"{mode} runs in one process: call it without torchrun"):
        ae.parse_args([mode, *(["model", "--classify", "text"] if mode == "--load_model" else [])])
