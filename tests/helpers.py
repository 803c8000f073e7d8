"""What several test files need."""

import multiprocessing
import os
import signal
import socket
import sys
from contextlib import contextmanager
from dataclasses import asdict

import pytest
import torch

import additional_experiments as ae
from runner.console import Console
from runner.data import datasets
from runner.data.datasets import Duplicates
from runner.results.accuracy import Confusion, Mistake
from runner.results.records import NOT_IDENTIFYING, History, Record, file_name, read_records
from runner.rows import ROWS
from runner.saved.checkpoints import Checkpoint, TrainingState
from runner.wording import describe_settings

CPU = torch.device("cpu")
QUIET = Console(quiet=True)


def assert_equal_to_rounding(ours, theirs):
    """Assert that float64 tensors differ by rounding only."""
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def encoded(experiment):
    """Return the EncodedData of an experiment."""
    splits = datasets.load(experiment).splits
    return ae.encode(ae.load_vocabulary(), splits, experiment)


def train_quietly(classifier, data, experiment):
    """Train a Classifier on EncodedData, without a checkpoint."""
    optimizer = ae.make_optimizer(classifier, experiment)
    state = TrainingState(classifier, optimizer, History(), experiment.seed, {}, started=0.0)
    ae.train(classifier, data, experiment, state, Checkpoint(None, 10, {}, None, None, QUIET), QUIET)


def records_in(folder="results"):
    """The Records of a folder as dicts by date, without what differs each time."""
    records, problems = read_records([folder])
    assert problems == []
    differ = ("date", "minutes", "feature_seconds", "seconds", "peak_memory_gb", "history")
    return [{name: value for name, value in record.to_dict().items() if name not in differ} for record in records]


def save_random_weights(folder, emb_dim=128, n_layer=4):
    """The path of a weights file of the nano size, or of another one, as transformers writes it."""
    from transformers import GPT2Config, GPT2LMHeadModel  # slow to import, for processes that do not need it

    torch.manual_seed(1)
    GPT2LMHeadModel(GPT2Config(n_embd=emb_dim, n_layer=n_layer, n_head=4)).save_pretrained(folder)
    return str(folder / "model.safetensors")


def made_up_record(wrong=(), **changes):
    """A Record of row 1 with mistakes on these of 300 test messages; `changes` are fields, or options as in ROWS."""
    settings = asdict(ae.Experiment())
    excluded = ("seed", "precision", *NOT_IDENTIFYING)
    options = {name: changes.pop(name) for name in list(changes) if name in settings and name not in excluded}
    confusions = {split: made_up_confusion({}) for split in ("train", "validation")}
    fields = dict(
        configuration=describe_settings(options),
        data="uci",
        data_sha256="0123",
        class_names=["ham", "spam"],
        tokens_per_message=120,
        confusions=confusions | dict(test=made_up_confusion(dict.fromkeys(wrong, 0.9))),
        duplicates=dict(validation=Duplicates(), test=Duplicates([0], [0, 1])),
        texts=[f"message {index}" for index in list(wrong)[:10]],
        minutes=3.5,
        feature_seconds=20.0,
        seconds=220.0,
        date="2026-11-24T12:00:00+00:00",
        row=next((number for number, row in ROWS.items() if row.options == options), None),
        options=options,
        seed=123,
        precision="fp32",
        device_name='an "odd", name',
    )
    fields |= changes
    seed = dict(seed=fields["seed"], precision=fields["precision"])
    return Record(**dict(run_id=file_name("made-up", [str(fields)]), settings=settings | options | seed) | fields)


def made_up_confusion(wrong, totals=(150, 150)):
    """A Confusion of two classes, in turns; `wrong` maps indices of messages to how certain the mistake was."""
    mistakes = [Mistake(index, index % 2, 1 - index % 2, confidence) for index, confidence in sorted(wrong.items())]
    return Confusion(list(totals), mistakes)


def processes():
    """Python with all that takes long to import, from which a process starts at once."""
    if sys.platform == "win32":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    preloaded = ["torch._dynamo", "torch.distributed.fsdp", "test_checkpoints", "test_distributed"]
    context.set_forkserver_preload(preloaded)
    return context


def start_together(n, folder, function, *arguments):
    """Start `n` processes as torchrun does, each with function(*arguments), in `folder`, where they write out.txt.

    A single one starts as without torchrun.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for number in range(n):
        launched = dict(TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        launched |= dict(RANK=number, WORLD_SIZE=n, LOCAL_RANK=number, LOCAL_WORLD_SIZE=n)
        launched = launched if n > 1 else {}
        started.append(processes().Process(target=run_launched, args=(launched, folder, function, arguments)))
        started[-1].start()
    return started


def run_launched(launched, folder, function, arguments):
    os.environ.update({name: str(value) for name, value in launched.items()})
    os.chdir(folder)
    torch.set_num_threads(1)
    descriptor = os.open("out.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
    sys.exit(function(*arguments))


def end_together(started, folder):
    """The exit statuses of processes that were started together, and what they have written in `folder`."""
    for process in started:
        process.join()
    return [process.exitcode for process in started], (folder / "out.txt").read_text("utf-8")


def finish_together(n, folder, *arguments):
    """`start_together`, and what the processes have written when all have ended; their exit status must be 0."""
    statuses, out = end_together(start_together(n, folder, *arguments), folder)
    assert statuses == [0] * n, out
    return out


def interrupt_at(monkeypatch, owner, name, call, number):
    """Have this process send itself a signal at the beginning of the `call`-th call of a function."""
    calls, function = [], getattr(owner, name)

    def interrupting(*arguments, **keywords):
        calls.append(name)
        if len(calls) == call:
            signal.raise_signal(number)  # on Windows os.kill would end the process
        return function(*arguments, **keywords)

    monkeypatch.setattr(owner, name, interrupting)


@contextmanager
def no_file_above(size):
    """The system refuses to let any file of this process grow beyond `size` bytes: what a full disk does."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
