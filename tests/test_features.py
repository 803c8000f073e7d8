"""Frozen features that outlive a run: the same to the bit, refused where they are not, shared, removed by age."""

import os
import random
import re
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from conftest import TINY, TINY_SIZE
from filelock import FileLock
from helpers import CPU, QUIET, finish_together, no_file_above, processes, save_random_weights
from runner.data.feature_files import FeatureFiles
from torch.torch_version import TorchVersion

import additional_experiments as ae
from gpt_download import Weights, find_weights
from previous_chapters import GPT_SIZES, TransformerBlock
from runner.data import features
from runner.data.features import FrozenFeatures
from runner.data.messages import Stage, split_into_passes
from runner.files import UserError


@pytest.fixture(autouse=True)
def keep_what_took_no_time(monkeypatch):
    monkeypatch.setattr(features, "MIN_SECONDS", 0)


@pytest.fixture(scope="module")
def tiny(sample_splits):
    """(experiment, classifier, messages) of three frozen blocks, in messages of different lengths."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(GPT_SIZES, TINY, TINY_SIZE)
        experiment = ae.Experiment(model_size=TINY, weights="random", device="cpu", no_padding=True)
        yield experiment, *made_for(experiment, sample_splits)


def made_for(experiment, sample_splits):
    """(classifier, messages) of an experiment: 80 messages of at most 30 letters."""
    splits = {split: frame.head(n) for (split, frame), n in zip(sample_splits.items(), (50, 10, 20))}
    splits = {split: frame.assign(Text=frame["Text"].str[:30]) for split, frame in splits.items()}
    classifier = ae.optimize_frozen_blocks(ae.build_classifier(experiment, 2))
    return classifier, ae.encode(ae.load_vocabulary(), splits, experiment)[0]


def console_of(info, warning):
    """A console that passes its lines and warnings to these functions."""
    return SimpleNamespace(info=info, warning=warning, progress=QUIET.progress)


def make(experiment, classifier, messages, cache, weights=Weights(TINY, "random"), **run_options):
    """(features, what was told, warnings) of a FrozenFeatures of its own."""
    lines, warnings = [], []
    console = console_of(lines.append, warnings.append)
    frozen = FrozenFeatures(experiment, ae.RunOptions(feature_cache=str(cache), **run_options), weights, console)
    return frozen.of(classifier, messages, experiment.seed), told(lines[-1]), warnings


def told(text):
    """What a run said about its frozen features, on a machine on which nothing takes time."""
    return re.sub(r" in \d+ s", " in 0 s", re.search(r"^Frozen features: .*? tokens, (.*)$", text, re.M)[1])


def numbers(text):
    """The lines of a run with losses and accuracies."""
    return [line for line in text.splitlines() if " loss " in line or " accuracy: " in line]


def files_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


# --- to the bit ---


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layers", ["last_layer", "last_block", "last_two_blocks"])
@pytest.mark.parametrize(
    "changes",
    [
        dict(no_padding=False),
        dict(no_padding=False, trainable_token_pos="first"),
        dict(trainable_token_pos="flexible"),
        dict(no_padding=False, disable_causal_mask=True, average_embeddings=True),
    ],
)
def test_read_continued_and_computed_features_are_the_same(tiny, sample_splits, tmp_path, layers, precision, changes):
    """On disk, what is made of them is the same. Their size is foreseen."""
    experiment = replace(tiny[0], trainable_layers=layers, precision=precision, **changes)
    classifier, messages = made_for(experiment, sample_splits)
    expected, how, _ = make(experiment, classifier, messages, "")
    assert how.startswith("computed in 0 s; ")
    tensors = [tensor for part in expected.values() for tensor in (part.x, part.residual) if tensor is not None]
    assert features.feature_bytes(classifier, messages) == sum(tensor.nbytes for tensor in tensors)

    n_frozen, n_full = classifier.n_frozen_blocks, classifier.n_full_blocks
    classifier.n_frozen_blocks = n_full - 1  # so that less is kept than is needed
    make(experiment, classifier, messages, tmp_path)
    classifier.n_frozen_blocks = n_frozen
    for begin in (f"continued from {n_full - 1} blocks in 0 s and kept in", "read from "):
        found, how, warnings = make(experiment, classifier, messages, tmp_path)
        assert how.startswith(begin) and warnings == []
        for split, part in expected.items():
            assert found[split].stage is part.stage and found[split].lengths.equal(part.lengths)
            assert found[split].x.dtype == part.x.dtype and found[split].x.equal(part.x)
            assert part.residual is None or found[split].residual.equal(part.residual)

    on_disk, how, _ = make(replace(experiment, features="disk"), classifier, messages, tmp_path)
    assert how.endswith(" on disk") == (on_disk["train"].stage is Stage.HIDDEN_STATES) == (layers != "last_layer")
    for split, part in expected.items():
        everything = torch.arange(len(part))
        assert ae.predict(classifier, on_disk[split], everything).equal(ae.predict(classifier, part, everything))


def test_rows_share_what_they_have_in_common(options, tmp_path, monkeypatch, capfd):
    """After row 4: row 1 computes one block, then rows 3, 18, 19 and other settings none but for the test of a pass."""
    calls, forward = [], TransformerBlock.forward  # of a trained last block, on frozen features, it is another one
    monkeypatch.setattr(TransformerBlock, "forward", lambda self, *rest: calls.append(self) or forward(self, *rest))
    options[options.index("random")] = save_random_weights(tmp_path / "weights", emb_dim=16)

    def run(*further):
        calls.clear()
        assert ae.main([*options, "--num_epochs", "1", "--batch_size", "8", *further]) == 0
        return told(capfd.readouterr().out)

    assert run("--trainable_layers", "last_two_blocks").startswith("computed in 0 s and kept in ")
    assert run().startswith("continued from 2 blocks in 0 s and kept in ")
    assert len(calls) == 6  # one pass of two blocks, one to foresee the time, one for each split
    further = "--ignore_index 50256 --learning_rate 1e-3 --seed 7 --batch_size 3 --weight_decay 0"
    assert run(*further.split()).startswith("read from ") and len(calls) == 3
    assert "-03-blocks-" in run("--trainable_layers", "last_layer")
    assert run("--average_embeddings").startswith("read from ")
    assert "-02-blocks-" in run("--trainable_layers", "last_two_blocks")
    assert len(files_in(tmp_path / "features")) == 2


def test_features_that_took_less_than_five_seconds_are_not_kept(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "MIN_SECONDS", 5)
    assert make(*tiny, tmp_path / "features")[1] == "computed in 0 s; 0.00 GB in cpu memory"
    assert not (tmp_path / "features").exists()


def test_seconds_are_those_of_the_first_computation(tiny, tmp_path, monkeypatch):
    experiment, classifier, messages = tiny
    clock, forward = [], TransformerBlock.forward
    monkeypatch.setattr(features, "time", SimpleNamespace(perf_counter=lambda: sum(clock)))
    monkeypatch.setattr(TransformerBlock, "forward", lambda self, *rest: clock.append(1.5) or forward(self, *rest))
    found = []
    for n_frozen in (2, 3, 3):
        monkeypatch.setattr(classifier, "n_frozen_blocks", n_frozen)
        frozen = FrozenFeatures(experiment, ae.RunOptions(feature_cache=str(tmp_path)), Weights(TINY, "random"), QUIET)
        frozen.of(classifier, messages, experiment.seed)
        found.append(frozen.seconds)
    assert found == [9.0, 13.5, 13.5]  # three passes, one for each split, through two blocks, and then one more


# --- what is kept is used only where it is what would be computed ---


def change_boundary(messages):
    """The same tokens in all, of which the second message has one more and the first one less."""
    lengths = messages["train"].lengths + torch.tensor([-1, 1] + [0] * 48)
    return messages | {"train": replace(messages["train"], lengths=lengths, positions=lengths - 1)}


@pytest.mark.parametrize(
    "change",
    [
        dict(seed=124),
        dict(model_size="gpt2-other"),
        dict(disable_causal_mask=True),
        dict(precision="bf16"),
        lambda messages: messages | {"test": replace(messages["test"], x=messages["test"].x + 1)},
        change_boundary,
        (features, "describe_device", lambda device: "other"),
        (torch.backends.cpu, "get_cpu_capability", lambda: "other"),
        (torch, "get_num_threads", lambda: 77),
        (torch, "__version__", "2.99.0"),
        (features, "sha256_of", lambda path: "other code"),
    ],
)
def test_other_circumstances_find_nothing(tiny, sample_splits, tmp_path, monkeypatch, change):
    monkeypatch.setitem(GPT_SIZES, "gpt2-other", TINY_SIZE | dict(n_heads=2))
    experiment, classifier, messages = tiny
    make(*tiny, tmp_path)
    if isinstance(change, dict):
        experiment = replace(experiment, **change)
        classifier, messages = made_for(experiment, sample_splits)
    elif isinstance(change, tuple):
        monkeypatch.setattr(*change)
    else:
        messages = change(messages)
    for how in ("computed in 0 s and kept in ", "read from "):
        assert make(experiment, classifier, messages, tmp_path)[1].startswith(how)
    assert len(files_in(tmp_path)) == 2


def test_a_weights_file_is_known_by_its_content(tiny, tmp_path):
    """Where it changes meanwhile, the run ends and nothing is kept."""
    path = Path(save_random_weights(tmp_path / "weights", emb_dim=16))
    weights = find_weights(str(path), TINY)
    assert make(*tiny, tmp_path / "kept", weights=weights)[1].startswith("computed in ")
    moved = find_weights(str(path.rename(tmp_path / "moved.safetensors")), TINY)
    assert make(*tiny, tmp_path / "kept", weights=moved)[1].startswith("read from ")
    os.utime(moved.path, (0, 0))
    with pytest.raises(UserError, match=f"^the weights file {moved.path} was changed while this run used it$"):
        make(*tiny, tmp_path / "kept", weights=replace(moved, sha256="other"))
    assert len(files_in(tmp_path / "kept")) == 1


def test_the_pass_is_chosen_at_random_and_draws_nothing_from_the_run(tiny):
    _, classifier, messages = tiny
    states = torch.get_rng_state(), random.getstate()
    splits = {features.compute_random_pass(classifier, messages, 1)[0] for _ in range(60)}
    assert splits == set(messages)
    assert torch.get_rng_state().equal(states[0]) and random.getstate() == states[1]


def flip(path, row):
    """Change a value in its last bit, as products do in another environment, of which the key knows nothing."""
    np.lib.format.open_memmap(path, mode="r+").view(np.int32)[row, 7] ^= 1


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path, rows: os.truncate(path, path.stat().st_size - 1), "mmap length is greater than file ?size"),
        (lambda path, rows: path.write_text("x" * 1000), "magic string is not correct"),
        (lambda path, rows: flip(path, min(rows)), "npy does not hold what is computed here"),
        (lambda path, rows: flip(path, max(rows)), "npy does not hold what is computed here"),
    ],
)
def test_a_file_that_is_no_use_is_told_and_replaced(tiny, tmp_path, monkeypatch, damage, message):
    monkeypatch.setattr(features.secrets, "choice", lambda passes: [one for one in passes if one[0] == "train"][-1])
    *_, indices = split_into_passes(tiny[2]["train"].lengths, CPU)
    rows, is_real = tiny[2]["train"].token_indices(indices)
    expected, *_ = make(*tiny, tmp_path)
    damage(next(tmp_path.glob("*.npy")), rows[is_real].tolist())
    found, how, [warning] = make(*tiny, tmp_path)
    assert re.search(f"{message}.*; they are computed again$", warning) and " and kept in " in how
    assert found["train"].x.equal(expected["train"].x)
    assert make(*tiny, tmp_path)[1].startswith("read from ")


# --- several runs at once ---


def run_into(out, *options):
    """A run in a process of its own, which prints into a file."""
    features.MIN_SECONDS = 0
    with open(out, "w", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        sys.exit(ae.main(options))


def run_slowly(go, *arguments):
    """`run_into`, which gives the file of features its name only when the file `go` is there."""
    publish = FeatureFiles.publish

    def publish_late(*rest):
        wait_until(go.exists)
        return publish(*rest)

    FeatureFiles.publish = publish_late
    run_into(*arguments)


def wait_until(condition):
    give_up = time.time() + 60
    while not condition() and time.time() < give_up:
        time.sleep(0.01)
    assert condition()


@pytest.mark.parametrize("is_killed, how", [(False, "read from "), (True, "computed in 0 s and kept in ")])
def test_who_waits_reads_what_was_written_or_takes_over(nano, tmp_path, is_killed, how):
    options = [*nano, "--feature_cache", str(tmp_path / "cache")]
    go, out = tmp_path / "go", tmp_path / "second.txt"
    first = processes().Process(target=run_slowly, args=(go, tmp_path / "first.txt", *options))
    second = processes().Process(target=run_into, args=(out, *options))
    first.start()
    wait_until(lambda: list(tmp_path.glob("cache/*.part")))
    second.start()
    waits = "Frozen features: waiting for another run, which computes them\n"
    wait_until(lambda: out.exists() and waits in out.read_text())
    first.kill() if is_killed else go.touch()
    first.join()
    second.join()
    assert second.exitcode == 0 and "warning" not in out.read_text() and told(out.read_text()).startswith(how)
    assert is_killed or numbers(out.read_text()) == numbers((tmp_path / "first.txt").read_text()) != []
    [name] = files_in(tmp_path / "cache")  # no lock, nothing half-written
    assert name.endswith("s.npy")


def test_ctrl_c_leaves_nothing(tiny, tmp_path, monkeypatch):
    def interrupt(*_):
        assert len(files_in(tmp_path)) == 2  # a lock, and what is being written
        raise KeyboardInterrupt

    monkeypatch.setattr(FeatureFiles, "publish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(*tiny, tmp_path)
    assert files_in(tmp_path) == []


# --- several processes of one run ---


def in_two_processes(wrong, elsewhere, options):
    """A run in which process 1 has another folder or another processor."""
    GPT_SIZES[TINY], features.MIN_SECONDS = TINY_SIZE, 0
    if os.environ["RANK"] == "1":
        os.chdir(elsewhere if wrong == "folder" else ".")
        if wrong == "processor":
            torch.backends.cpu.get_cpu_capability = lambda: "other"
    return ae.main(options)


@pytest.mark.parametrize(
    "wrong, how, warning",
    [
        ("", r"computed in 0 s and kept in kept/.* GB in cpu memory", []),
        ("processor", "computed in 0 s; .*", ["the processes of this run differ in processor"]),
        ("folder", "computed in 0 s; .*", ["[Errno 2] No such file or directory: 'kept/"]),
    ],
)
def test_several_processes_compute_together(options, tmp_path, monkeypatch, capfd, wrong, how, warning):
    """One process can use what they have kept; what is not kept is told with the reason."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir(), elsewhere.mkdir()
    options += ["--feature_cache", "kept", "--batch_size", "8"]
    out = finish_together(2, here, in_two_processes, wrong, elsewhere, options)
    assert re.fullmatch(how, told(out))
    warnings = re.findall("warning: frozen features are not kept: (.*)", out)
    assert [line[: len(start)] for line, start in zip(warnings, warning, strict=True)] == warning
    assert files_in(elsewhere) == []
    assert len(list(here.glob("kept/*"))) == (wrong == "")
    if not wrong:
        monkeypatch.chdir(here)
        monkeypatch.setattr(features.torch, "get_num_threads", lambda: 1)
        assert ae.main(options) == 0
        assert told(capfd.readouterr().out).startswith("read from kept/")


def test_memory_is_counted_for_each_process(tiny, monkeypatch):
    for name, value in dict(TORCHELASTIC_RUN_ID="", RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.13"))  # older ones have no shards
    monkeypatch.setattr(features.processes, "from_main", lambda value: value)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=20_000_000))
    experiment = replace(tiny[0], model_size="gpt2-nano (7M)", trainable_layers="all")
    with torch.device("meta"):
        classifier = ae.build_classifier(experiment, 2)
    for shard, needed in (False, "0.12"), (True, "0.06"):
        console = console_of(None, (warnings := []).append)
        frozen = FrozenFeatures(experiment, ae.RunOptions(shard=shard), None, console)
        frozen.warn_if_memory_is_short(classifier, tiny[2], CPU)
        assert warnings[0].startswith(f"each process needs {needed} GB and 0.01 GB are free: weights ")


# --- removal ---


def fill(files, number, age):
    """A file of 10,000 float32 numbers, for which the disk had room from the start, last used `age` seconds ago."""
    part = files.folder / f"{number:016x}-03-blocks.part"
    rows = files.create(part, (100, 100))
    assert getattr(part.stat(), "st_blocks", 100) * 512 >= 40_000  # unknown on Windows
    rows[:] = number
    path = files.publish(part, seconds=1.0)
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_the_least_recently_used_files_of_this_program_are_removed(tiny, tmp_path):
    files = FeatureFiles(tmp_path, 3.5 * (40_000 + 128))
    killed, other = tmp_path / f"{0xA:016x}-11-blocks.part", tmp_path / "weights.npy"
    for path in (killed, other):
        path.write_bytes(bytes(1_000_000))
        os.utime(path, (0, 0))
    paths = [fill(files, number, age) for number, age in enumerate((10, 30, 20))]
    assert not killed.exists()
    files.open(paths[1], {"train": replace(tiny[2]["train"], x=torch.zeros(100))})  # the oldest is used again
    fill(files, 3, 0)
    assert [path.exists() for path in paths] == [True, True, False]
    fill(files, 4, 0)
    assert [path.exists() for path in paths] == [False, True, False] and other.exists()
    (tmp_path / f"{5:016x}-03-blocks.part").write_bytes(bytes(1_000_000))  # of a run that was killed: written anew
    fill(files, 5, 0)
    assert len(list(tmp_path.glob("*-blocks-*"))) == 3
    part = tmp_path / f"{6:016x}-03-blocks.part"
    with files.locked(part, QUIET):  # what another run is writing stays
        files.create(part, (100, 100))
        os.utime(part, (0, 0))
        fill(files, 7, 0)
        assert part.exists() and len(list(tmp_path.glob("*-blocks-*"))) == 2
    assert list(tmp_path.glob("*.lock")) == [] and not part.exists()


def test_what_another_run_removes_meanwhile_is_not_counted(tmp_path, monkeypatch):
    files, stat = FeatureFiles(tmp_path, 3.5 * (40_000 + 128)), Path.stat
    paths = [fill(files, number, age=10) for number in range(2)]

    def vanish(path, **keywords):
        if path == paths[0]:
            path.unlink(missing_ok=True)
        return stat(path, **keywords)

    monkeypatch.setattr(Path, "stat", vanish)
    assert files.deepest(f"{0:016x}", 3) is None and files.deepest(f"{1:016x}", 3) == paths[1]
    paths[0].touch()
    fill(files, 2, 0)


# --- what cannot be written or read ---


@pytest.mark.parametrize("choice, how", [("auto", "computed in "), ("disk", "recomputed each time (")])
@pytest.mark.parametrize(
    "folder, room, reason",
    [
        ("full", 5, r"\[Errno 27\] File too large"),
        ("small", 1e-6, "they would take more than --feature_cache_gb"),
        ("file/features", 5, r"\[Errno \d+\] .*"),
    ],
)
def test_what_cannot_be_kept_costs_one_warning(tiny, tmp_path, choice, how, folder, room, reason):
    experiment, classifier, messages = tiny
    (tmp_path / "file").write_text("")
    expected, *_ = make(*tiny, "")
    changed = replace(experiment, features=choice)
    with no_file_above(10_000 if folder == "full" else 10**9):
        found, line, [warning] = make(changed, classifier, messages, tmp_path / folder, feature_cache_gb=room)
    assert re.fullmatch(f"frozen features are not kept: {reason}", warning) and line.startswith(how)
    assert choice == "disk" or found["train"].x.equal(expected["train"].x)
    assert list(tmp_path.glob("*/*")) == []


def test_a_read_only_folder_is_read_from(tiny, tmp_path, monkeypatch):
    def refuse(path, *rest, **keywords):
        raise PermissionError(13, "Permission denied")

    make(*tiny, tmp_path)
    monkeypatch.setattr(FileLock, "acquire", refuse)
    monkeypatch.setattr(os, "utime", refuse)
    _, how, warnings = make(*tiny, tmp_path)
    assert how.startswith("read from ") and warnings == []
    *_, [warning] = make(replace(tiny[0], seed=124), *tiny[1:], tmp_path)
    assert warning == "frozen features are not kept: [Errno 13] Permission denied"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other locks")
def test_a_file_system_without_locks_keeps_nothing(tiny, tmp_path, monkeypatch):
    """A lock that is only a file would outlast a killed run, and later ones would wait for it for ever."""
    import fcntl

    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    _, how, [warning] = make(*tiny, tmp_path)
    assert warning == "frozen features are not kept: [Errno 38] Function not implemented" and " kept " not in how


def test_the_disk_needs_a_folder(options, capfd):
    assert ae.main([*options, "--feature_cache", "", "--features", "disk"]) == 2
    assert capfd.readouterr().err == 'error: --features disk needs a --feature_cache; "" is none\n'


# --- larger than memory ---


def run_limited(allowed, *options):
    """A run that, once model and messages are there, may take `allowed` bytes more of memory that is no file's."""
    import resource

    make = FrozenFeatures.of

    def of(*arguments):
        torch.randn(256, 256) @ torch.randn(256, 256)  # threads and buffers that products need anyway
        private = 1024 * int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1])
        resource.setrlimit(resource.RLIMIT_DATA, (private + allowed,) * 2)
        return make(*arguments)

    torch.set_num_threads(1)
    FrozenFeatures.of = of
    run_into("out.txt", *options)


def finish_limited(allowed, *options):
    """Its exit status, and what it printed."""
    process = processes().Process(target=run_limited, args=(allowed, *options))
    process.start()
    process.join()
    return process.exitcode, Path("out.txt").read_text()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="this limit does not hold elsewhere")
def test_features_may_be_larger_than_memory(tmp_path, sample_splits):
    """Of 77 MB of hidden states, a run that may take 45 MB more gives the same numbers as one in memory."""
    for split, frame in sample_splits.items():
        frame.head(240).to_csv(tmp_path / f"{split}.csv", index=None)
    options = f"--model_size gpt2-nano --weights random --device cpu --num_epochs 1 --data_dir {tmp_path}".split()
    on_disk = [*options, "--context_length", "250", "--features", "disk"]
    in_memory = [*on_disk, "--features", "memory", "--feature_cache", ""]
    status, expected = finish_limited(10**12, *in_memory)
    assert status == 0, expected
    status, out = finish_limited(45_000_000, *on_disk)
    assert status == 0 and numbers(out) == numbers(expected) != [], out
    assert sum(path.stat().st_size for path in (tmp_path / "features").iterdir()) > 70_000_000
    status, out = finish_limited(45_000_000, *in_memory)
    assert status == 1 and "error: out of memory" in out
