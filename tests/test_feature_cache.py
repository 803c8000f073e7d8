"""Frozen features that outlive a run: hits to the bit, the key, several processes, eviction, files that are no use."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, TINY_SIZE
from helpers import damaged_at, encoded, no_file_above, processes, records_in, save_random_weights

import additional_experiments as ae
from gpt_download import Weights
from previous_chapters import GPT_SIZES, TransformerBlock
from runner import files, locks
from runner.console import Console
from runner.data import feature_cache, features, placement
from runner.data.feature_cache import FeatureCache, HiddenStates
from runner.data.features import FrozenFeatures
from runner.data.tensor_files import FileRows, create_rows, write_tensors
from runner.saved import classifiers


@pytest.fixture(autouse=True)
def keep_what_took_no_time(monkeypatch):
    monkeypatch.setattr(features, "MIN_SECONDS", 0)


@pytest.fixture
def block_calls(monkeypatch):
    """Grows by one with each forward pass of a block; on frozen features a trained last block has another one."""
    calls, forward = [], TransformerBlock.forward
    monkeypatch.setattr(TransformerBlock, "forward", lambda self, *rest: calls.append(self) or forward(self, *rest))
    return calls


def files_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def told(text):
    """What a run said about its frozen features."""
    return re.search(r"^Frozen features: .*? tokens, (.*)$", text, re.M)[1]


# --- to the bit ---


class Told(Console):
    """A console that keeps its lines."""

    def __init__(self):
        super().__init__(quiet=True)
        self.lines = []

    def info(self, line):
        self.lines.append(line)


def make(classifier, messages, experiment, cache, choice="auto"):
    """(features, what was told)."""
    console = Told()
    run_options = ae.RunOptions(feature_cache=str(cache))
    weights = Weights(experiment.model_size, "random")
    frozen = FrozenFeatures(replace(experiment, features=choice), run_options, weights, console)
    return frozen.of(classifier, messages, experiment.seed), told(console.lines[-1])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layers", ["last_layer", "last_block", "last_two_blocks"])
def test_read_continued_and_computed_features_are_the_same_to_the_bit(nano, tmp_path, layers, precision):
    """For each position, mask, padding and pooling, at the nano size; on disk, what is made of them is the same."""
    experiment, *_ = ae.parse_args([*nano, "--trainable_layers", layers, "--precision", precision])
    for position, *switches in product(("last", "first", "flexible"), *[(False, True)] * 3):
        names = ("disable_causal_mask", "no_padding", "average_embeddings")
        changes = dict(zip(names, switches, strict=True))
        if position == "first" and changes["average_embeddings"]:
            continue
        changed = replace(experiment, trainable_token_pos=position, **changes)
        messages = encoded(changed)
        classifier = ae.optimize_frozen_blocks(ae.build_classifier(changed, 2))
        expected, how = make(classifier, messages, changed, "")
        assert how.startswith("computed in 0 s (")

        cache = tmp_path / f"{position} {switches}"
        n_frozen = classifier.n_frozen_blocks
        classifier.n_frozen_blocks = classifier.n_full_blocks - 1  # so that less is kept than is needed
        n_before = classifier.n_frozen_blocks
        make(classifier, messages, changed, cache)
        classifier.n_frozen_blocks = n_frozen
        ways = {"computed": tmp_path / f"{position} {switches} 2", "continued": cache, "read": cache}
        for way, folder in ways.items():
            found, how = make(classifier, messages, changed, folder)
            if way == "read" and classifier.n_full_blocks < n_frozen:
                way = f"continued from {n_frozen - 1} blocks in 0 s, read"
            elif way == "continued":
                way = f"continued from {n_before} blocks in 0 s and kept in"
            assert how.startswith(way)
            for split, part in expected.items():
                assert found[split].stage is part.stage and found[split].lengths.equal(part.lengths)
                assert found[split].x.dtype == part.x.dtype and found[split].x.equal(part.x)
                if part.residual is not None:
                    assert found[split].residual.equal(part.residual)

        on_disk, how = make(classifier, messages, changed, cache, "disk")
        assert isinstance(on_disk["train"].x, torch.Tensor) == (layers == "last_layer")
        for split, part in expected.items():
            everything = torch.arange(len(part))
            assert ae.predict(classifier, on_disk[split], everything).equal(ae.predict(classifier, part, everything))


@pytest.mark.parametrize(
    "changes",
    [
        "",
        "--trainable_layers last_layer",
        "--trainable_layers last_two_blocks --precision bf16",
        "--average_embeddings --disable_causal_mask",
        "--no_padding --accumulation_steps 8",
    ],
)
def test_whole_runs_are_the_same_to_the_bit(options, tmp_path, capfd, changes):
    """Losses, accuracies, record and classifier of a run without a cache, one that fills it and one that reads it."""
    runs, ways = [], ("", "cache", "cache", "cache --features disk", "other --features disk")
    for number, way in enumerate(ways):
        saved = tmp_path / f"{number}.safetensors"
        further = f"--results_file {number}.csv --save_model {saved} --feature_cache"
        assert ae.main([*options, *changes.split(), *further.split(), *(way.split() or [""])]) == 0
        out, err = capfd.readouterr()
        assert err == ""
        lines = [line for line in out.splitlines() if " loss " in line or " accuracy" in line]
        [record] = records_in(f"{number}.csv")
        record.pop("features")
        description, tensors = classifiers.read_classifier(saved)
        description.settings.pop("features")
        description.record = {}  # with its times
        runs.append((told(out).split()[0], lines, record, description, tensors))
    assert [how for how, *_ in runs[:2]] == ["computed", "computed"]
    assert {how for how, *_ in runs[2:4]} <= {"read", "continued"}
    _, *expected, expected_tensors = runs[0]
    for _, *found, tensors in runs[1:]:
        assert found == expected
        assert all(tensors[name].equal(tensor) for name, tensor in expected_tensors.items())


def test_rows_share_what_they_have_in_common(options, tmp_path, capfd, block_calls):
    """After row 4: row 1 computes one block, then rows 3, 18, 19 and other settings none at all positions."""
    weights = save_random_weights(tmp_path / "weights", emb_dim=16)
    options[options.index("random")] = weights

    def run(*further):
        block_calls.clear()
        assert ae.main([*options, "--num_epochs", "1", *further]) == 0
        return told(capfd.readouterr().out)

    assert run("--trainable_layers", "last_two_blocks").startswith("computed in 0 s and kept in ")
    assert run().startswith("continued from 2 blocks in 0 s and kept in ")
    assert len(block_calls) == 4  # one block and a pass for each split, and one to foresee the time
    assert run("--ignore_index", "50256").startswith("read from ") and block_calls == []
    for further in ("--learning_rate 1e-3", "--seed 7", "--batch_size 3", "--num_epochs 2", "--weight_decay 0"):
        assert run(*further.split()).startswith("read from ") and block_calls == []
    assert run("--trainable_layers", "last_layer").startswith("continued from 3 blocks in 0 s, read from ")
    assert len(block_calls) == 3
    assert run("--average_embeddings").startswith("read from ")
    assert len(files_in(tmp_path / "features")) == 2


def test_features_that_took_less_than_five_seconds_are_not_kept(options, tmp_path, monkeypatch, capfd):
    monkeypatch.undo()
    assert features.MIN_SECONDS == 5
    GPT_SIZES[TINY] = TINY_SIZE
    assert ae.main(options) == 0
    assert told(capfd.readouterr().out) == "computed in 0 s (0.00 GB)"
    assert not (tmp_path / "features").exists()  # nothing is left where nothing is kept


def test_only_the_first_of_several_random_seeds_is_kept(options, tmp_path, capfd):
    assert ae.main([*options, "--repeats", "3"]) == 0
    hows = re.findall(r"tokens, (.*)", capfd.readouterr().out)
    assert [" and kept in " in how for how in hows] == [True, False, False]
    assert len(files_in(tmp_path / "features")) == 1
    assert ae.main([*options, "--repeats", "3", "--features", "disk"]) == 0
    hows = re.findall(r"tokens, (.*)", capfd.readouterr().out)
    assert [how.split()[0] for how in hows] == ["read", "computed", "computed"]
    assert len(files_in(tmp_path / "features")) == 1


def test_the_first_seed_is_the_first_of_the_command(options, tmp_path, capfd):
    """Not the first that a resumed run computes."""
    options += ["--checkpoint", "run.ckpt", "--feature_cache", "cache"]
    assert ae.main([*options, "--feature_cache", ""]) == 0
    assert ae.main([*options, "--repeats", "2"]) == 0
    assert not Path("cache").exists()


# --- the key ---


def change_messages(change):
    """A circumstance: the messages, of which `change` makes others."""

    def patch(monkeypatch):
        encode = ae.encode
        monkeypatch.setattr(ae, "encode", lambda *rest: (change(encode(*rest)[0]), *encode(*rest)[1:]))

    return patch


def other_token(messages):
    messages["test"].x[-1] += 1
    return messages


def other_boundary(messages):
    """The same tokens in all, and in each message a number of them that it may have."""
    lengths = messages["train"].lengths.clone()
    lengths[0], lengths[1] = lengths[0] - 1, lengths[1] + 1
    part = replace(messages["train"], lengths=lengths, positions=lengths - 1)
    return messages | {"train": part}


CIRCUMSTANCES = {
    "seed of random weights": "--seed 124",
    "model size": "--model_size gpt2-other",
    "causal mask": "--disable_causal_mask",
    "length of messages": "--context_length 11",
    "precision": "--precision bf16",
    "token": change_messages(other_token),
    "boundary": change_messages(other_boundary),
    "device": lambda patch: patch.setattr(feature_cache, "describe_device", lambda device: "other"),
    "processor": lambda patch: patch.setattr(feature_cache, "describe_processor", lambda: "other"),
    "threads": lambda patch: patch.setattr(torch, "get_num_threads", lambda: 77),
    "PyTorch": lambda patch: patch.setattr(torch, "__version__", "2.99.0"),
    "environment": lambda patch: patch.setenv("MKL_CBWR", "COMPATIBLE"),
    "code": lambda patch: patch.setattr(feature_cache, "sha256_of", lambda path: "other"),
    "format": lambda patch: patch.setattr(feature_cache, "VERSION", 99),
}


@pytest.mark.parametrize("name", CIRCUMSTANCES)
def test_other_circumstances_find_nothing(options, monkeypatch, block_calls, name):
    monkeypatch.setitem(GPT_SIZES, "gpt2-other (1M)", TINY_SIZE)
    position = "last" if name == "causal mask" else "flexible"  # without the mask flexible sees other tokens too
    options += ["--feature_cache", "cache", "--num_epochs", "1", "--trainable_token_pos", position]
    assert ae.main(options) == 0
    at_first = len(block_calls)
    assert at_first == 12  # three blocks of three splits, and of one pass to foresee the time
    assert ae.main(options) == 0 and len(block_calls) == at_first
    change = CIRCUMSTANCES[name]
    with monkeypatch.context() as patch:
        if isinstance(change, str):
            assert ae.main([*options, *change.split()]) == 0
        else:
            change(patch)
            assert ae.main(options) == 0
    assert len(block_calls) >= 2 * at_first
    assert ae.main(options) == 0 and len(block_calls) < 3 * at_first


def test_other_weights_find_nothing(options, tmp_path, block_calls):
    options += ["--feature_cache", "cache", "--num_epochs", "1"]
    at = options.index("random")
    options[at] = save_random_weights(tmp_path / "weights", emb_dim=16)
    assert ae.main(options) == 0 and len(block_calls) == 12
    moved = Path(options[at]).rename(tmp_path / "moved.safetensors")
    options[at] = str(moved)
    assert ae.main(options) == 0 and len(block_calls) == 12
    tensors = ae.find_weights(options[at], TINY).tensors
    other = {name: tensor + 1 if name.endswith("h.0.ln_1.bias") else tensor for name, tensor in tensors.items()}
    from safetensors.torch import save_file

    save_file({name: tensor.clone() for name, tensor in other.items()}, tmp_path / "other.safetensors")
    options[at] = str(tmp_path / "other.safetensors")
    assert ae.main(options) == 0 and len(block_calls) == 24


def test_the_key_counts_all_code_that_computes(options):
    experiment, *_ = ae.parse_args(options)
    classifier = ae.build_classifier(experiment, 2)
    hashed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_cache, "sha256_of", lambda path: hashed.append(Path(path).name) or "")
        feature_cache.circumstances(classifier, encoded(experiment), experiment, Weights(TINY, "random"))
    assert sorted(hashed) == ["additional_experiments.py", "features.py", "messages.py", "previous_chapters.py"]


# --- several runs at once ---

SOME_TIME = "--dataset sample --context_length 40 --trainable_layers last_layer --num_epochs 1 --model_size gpt2-nano"
SOME_TIME += " --weights random --device cpu --feature_cache ../cache"


def run_in_folder(folder, options):
    """A run in a process of its own, which prints into files of its folder."""
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    features.MIN_SECONDS = 0
    GPT_SIZES[TINY] = TINY_SIZE
    with open("out.txt", "w") as out, open("err.txt", "w") as err, redirect_stdout(out), redirect_stderr(err):
        sys.exit(ae.main(options))


def start(folder, options=SOME_TIME):
    process = processes().Process(target=run_in_folder, args=(folder, options.split()))
    process.start()
    return process


@pytest.mark.parametrize("n", [2, 5])
def test_runs_at_the_same_time_compute_once(tmp_path, n):
    folders = [tmp_path / str(number) for number in range(n)]
    started = [start(folder) for folder in folders]
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * n
    outs = [(folder / "out.txt").read_text() for folder in folders]
    assert sum("computed in" in told(out) and "read from" not in told(out) for out in outs) == 1
    assert sum("read from" in told(out) for out in outs) == n - 1
    assert all((folder / "err.txt").read_text() == "" for folder in folders)
    found = {str(records_in(folder / "results.csv")) for folder in folders}
    assert len(found) == 1
    assert len(files_in(tmp_path / "cache")) == 1  # no lock, nothing half-written


def test_who_waits_says_for_whom(options, tmp_path):
    """And reads what was written meanwhile."""
    options += ["--feature_cache", str(tmp_path / "cache"), "--results_file", ""]
    assert ae.main(options) == 0
    [path] = (tmp_path / "cache").iterdir()
    path.rename(tmp_path / "finished")
    lock = locks.LockFile(locks.lock_path(path))
    assert lock.acquire() is None
    process = processes().Process(target=run_in_folder, args=(tmp_path / "waiting", options))
    process.start()
    out = tmp_path / "waiting" / "out.txt"
    while not out.exists() or "waiting" not in out.read_text():
        assert process.is_alive()
        time.sleep(0.01)
    assert f"Frozen features: waiting for process {os.getpid()} on " in out.read_text()
    (tmp_path / "finished").rename(path)
    lock.release()
    process.join()
    assert process.exitcode == 0 and "read from" in out.read_text()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on Windows")
def test_a_run_that_is_killed_is_taken_over(tmp_path):
    """At three random moments; a second run waits meanwhile."""
    for number in range(3):
        cache = tmp_path / str(number) / "cache"
        cache.parent.mkdir()
        first = start(cache.parent / "first")
        while not list(cache.glob("*.part")) and first.is_alive():
            time.sleep(0.01)
        second = start(cache.parent / "second")
        time.sleep(random.uniform(0, 1))
        first.kill()
        first.join()
        second.join()
        assert second.exitcode == 0
        assert (cache.parent / "second" / "err.txt").read_text() == ""
        assert len(files_in(cache)) == 1
        HiddenStates(*opened(cache))


def opened(cache):
    """The arguments of HiddenStates for the one file of a cache."""
    [path] = cache.iterdir()
    description = json.loads(json.loads(path.read_bytes()[8:65536])["__metadata__"]["description"])
    return path, description["circumstances"], description["blocks"]


def test_ctrl_c_leaves_nothing(options, tmp_path, monkeypatch):
    run_blocks = ae.Classifier.run_blocks

    def interrupting(*arguments):
        if (tmp_path / "features").exists():
            assert len(files_in(tmp_path / "features")) == 2  # a lock, and what is being written
            raise KeyboardInterrupt
        return run_blocks(*arguments)

    monkeypatch.setattr(ae.Classifier, "run_blocks", interrupting)
    assert ae.main(options) == 130
    assert files_in(tmp_path / "features") == []


def test_a_file_system_without_locks(options, tmp_path, monkeypatch, capfd):
    def flock(file, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    options += ["--results_file", ""]
    for how in ("computed in 0 s and kept in ", "read from "):
        assert ae.main(options) == 0
        out, err = capfd.readouterr()
        assert told(out).startswith(how) and err == ""


# --- eviction ---


def fill(cache, number, age):
    """A file of 1000 float32 numbers in the cache, last used `age` seconds ago: (path, circumstances)."""
    facts = {"number": number}
    path = cache.path(facts, 3)
    with cache.create(path, {"train": (10, 100)}) as new:
        new.rows["train"][torch.arange(10)] = torch.full((10, 100), float(number))
        new.description = dict(circumstances=facts, blocks=3, date="2026-11-24", seconds=9.0)
    if path.exists():
        os.utime(path, (time.time() - age,) * 2)
    return path, facts


@pytest.fixture
def cache(tmp_path):
    (tmp_path / "cache").mkdir()
    size = 65536 + 4000
    return FeatureCache(tmp_path / "cache", 3.5 * size, Told())


def test_the_least_recently_used_go_first(cache):
    paths = [fill(cache, number, age) for number, age in enumerate((10, 30, 20))]
    states = HiddenStates(paths[1][0], paths[1][1], 3)  # the oldest is used again
    states.close()
    fill(cache, 3, 0)
    assert [path.exists() for path, _ in paths] == [True, True, False]
    fill(cache, 4, 0)
    assert [path.exists() for path, _ in paths] == [False, True, False]


def test_a_file_in_use_is_not_removed(cache):
    path, facts = fill(cache, 0, 100)
    states = HiddenStates(path, facts, 3)
    os.utime(path, (0, 0))
    for number in range(1, 6):
        fill(cache, number, 0)
    assert path.exists() and len(files_in(cache.folder)) == 3
    assert states.rows["train"][torch.tensor([9])].equal(torch.zeros(1, 100))
    states.close()
    fill(cache, 6, 0)
    assert not path.exists()


def test_where_all_files_are_in_use_no_other_is_kept(cache):
    states = [HiddenStates(*fill(cache, number, 0), 3) for number in range(3)]
    with pytest.raises(OSError, match="is full of features in use"):
        fill(cache, 4, 0)
    assert len(files_in(cache.folder)) == 3
    with cache.create(cache.folder / "needed", {"train": (10, 100)}, is_needed=True) as new:
        new.description = {}
    assert (cache.folder / "needed").exists()
    for one in states:
        one.close()


def test_a_file_that_vanishes_meanwhile_ends_no_eviction(cache, monkeypatch):
    paths = [fill(cache, number, 30 - number)[0] for number in range(3)]
    stat = Path.stat

    def failing(self, **keywords):
        if self == paths[0]:
            raise FileNotFoundError
        return stat(self, **keywords)

    monkeypatch.setattr(Path, "stat", failing)
    cache.max_bytes = 0
    cache.make_room(1, None)
    monkeypatch.undo()
    assert [path.exists() for path in paths] == [True, False, False]


def test_the_lock_of_a_killed_run_is_removed(cache):
    left = cache.folder / f".{'0' * 16}-03-blocks.safetensors.lock"
    left.write_text("process 999999999 on here\n")
    held = locks.LockFile(cache.folder / f".{'1' * 16}-03-blocks.safetensors.lock")
    assert held.acquire() is None
    fill(cache, 0, 0)
    assert not left.exists() and held.path.exists()
    held.release()


def test_files_of_other_names_are_never_removed(cache):
    mine = cache.folder / "my-weights.safetensors"
    mine.write_bytes(bytes(1_000_000))
    (cache.folder / "video.123.part").mkdir()
    os.utime(cache.folder / "video.123.part", (0, 0))
    os.utime(mine, (0, 0))
    for number in range(6):
        fill(cache, number, 0)
    assert mine.exists() and (cache.folder / "video.123.part").exists()
    assert len(files_in(cache.folder)) == 5


def test_features_larger_than_the_cache_are_not_kept(options, tmp_path, capfd):
    options += ["--feature_cache_gb", "1e-6"]
    assert ae.main(options) == 0
    assert told(capfd.readouterr().out) == "computed in 0 s (0.00 GB), more than --feature_cache_gb to keep"
    assert not (tmp_path / "features").exists()
    assert ae.main([*options, "--features", "disk"]) == 2
    assert re.match(
        r"error: --features disk: they take 0\.00 GB, and --feature_cache_gb allows 1e-06\n", capfd.readouterr().err
    )


def test_what_a_killed_run_left_is_removed_by_the_next(cache):
    left = cache.folder / f"{'0' * 16}-03-blocks.safetensors.{files.host_name()}.999999999.0123abcd.part"
    left.mkdir()
    (left / "file").write_bytes(bytes(100))
    fill(cache, 0, 0)
    assert not left.exists()


# --- what cannot be written or used ---


def test_a_full_disk_costs_one_warning(options, tmp_path, capfd):
    assert ae.main([*options, "--feature_cache", "", "--results_file", ""]) == 0
    expected = capfd.readouterr().out.replace(" s (0.00 GB)", "").splitlines()
    with no_file_above(30_000):
        assert ae.main([*options, "--results_file", ""]) == 0
    out, err = capfd.readouterr()
    assert err == "warning: frozen features are not kept: [Errno 27] File too large\n"
    lines = [line for line in out.splitlines() if " loss " in line or " accuracy: " in line]
    assert lines and set(lines) <= set(expected)
    assert files_in(tmp_path / "features") == []
    with no_file_above(30_000):
        assert ae.main([*options, "--results_file", "", "--features", "disk"]) == 0
    out, err = capfd.readouterr()
    assert told(out).startswith("recomputed each time (")
    assert err == "warning: frozen features are not kept: [Errno 27] File too large\n"


@pytest.mark.parametrize("further", ["", "--features disk", "--features disk --trainable_layers last_layer"])
def test_a_folder_that_cannot_be_made_costs_one_warning(options, tmp_path, capfd, further):
    (tmp_path / "file").write_text("")
    options += ["--feature_cache", str(tmp_path / "file" / "features"), *further.split()]
    assert ae.main(options) == 0
    err = capfd.readouterr().err
    assert err.startswith("warning: frozen features are not kept: [Errno 20] Not a directory") and err.count("\n") == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_read_only_folder_is_read_from(options, tmp_path, capfd):
    assert ae.main(options) == 0
    (tmp_path / "features").chmod(0o500)
    assert ae.main(options) == 0
    out, err = capfd.readouterr()
    assert "read from" in out and err == ""
    assert ae.main([*options, "--seed", "124"]) == 0
    assert capfd.readouterr().err.startswith("warning: frozen features are not kept: [Errno 13] Permission denied")
    (tmp_path / "features").chmod(0o700)


def test_a_file_in_place_of_the_folder_is_refused(options, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    assert ae.main([*options, "--feature_cache", str(tmp_path / "file")]) == 2
    assert capfd.readouterr().err == f"error: --feature_cache {tmp_path}/file is not a folder\n"


def test_a_read_error_costs_a_warning(options, monkeypatch, capfd):
    """Of the file that is read, and of the one that is continued: they are computed again, with the same numbers."""
    options += ["--feature_cache", "cache", "--results_file", ""]
    assert ae.main(options) == 0
    expected = [line for line in capfd.readouterr().out.splitlines() if " loss " in line or " accuracy: " in line]
    reads, getitem = [], FileRows.__getitem__

    def failing(self, indices):
        reads.append(len(indices))
        if len(reads) == 2:
            raise OSError(5, "Input/output error")
        return getitem(self, indices)

    monkeypatch.setattr(FileRows, "__getitem__", failing)
    for further in ([], ["--features", "disk", "--trainable_layers", "last_layer"]):
        reads.clear()
        assert ae.main([*options, *further]) == 0
        out, err = capfd.readouterr()
        assert re.fullmatch(r"warning: frozen features: cache/\S+ cannot be read: .*; they are computed again\n", err)
        if not further:
            assert expected == [line for line in out.splitlines() if " loss " in line or " accuracy: " in line]


def test_links_in_a_circle(options, tmp_path, capfd):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for folder in (tmp_path / "circle", tmp_path / "circle" / "x"):
        for further in ([], ["--features", "disk"]):
            assert ae.main([*options, "--feature_cache", str(folder), *further]) == 0
            assert re.fullmatch(r"warning: frozen features are not kept: .*\n", capfd.readouterr().err)


def test_a_name_that_is_too_long(options, capfd):
    assert ae.main([*options, "--feature_cache", "x" * 300]) == 0
    assert re.fullmatch(r"warning: frozen features are not kept: .*\n", capfd.readouterr().err)


def test_all_layers_trained_need_no_room(options, capfd):
    options += ["--features", "disk", "--feature_cache_gb", "1e-6", "--trainable_layers", "all"]
    assert ae.main(options) == 0 and capfd.readouterr().err == ""


def test_auto_takes_the_disk_where_memory_is_short(options, monkeypatch, capfd):
    """If there is room on it, or the file is there already."""
    monkeypatch.setattr(placement, "free_memory", lambda device: 0)
    monkeypatch.setattr(features, "free_for_each", lambda device: 10**12)
    free = [10**9]
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    for how, room in (("recomputed", 1000), ("computed", 10**9), ("read", 1000)):
        free[0] = room
        assert ae.main(options) == 0
        assert told(capfd.readouterr().out).split()[0] == how


def test_the_disk_needs_a_folder(options, capfd):
    assert ae.main([*options, "--feature_cache", "", "--features", "disk"]) == 2
    assert capfd.readouterr().err == 'error: --features disk needs a --feature_cache; "" is none\n'


def of_the_future(path):
    with create_rows(path, feature_cache.KIND, feature_cache.VERSION + 1, {"train": (1, 1)}) as new:
        new.description = {}


def of_other_circumstances(path):
    with create_rows(path, feature_cache.KIND, feature_cache.VERSION, {"train": (1, 1)}) as new:
        new.description = dict(circumstances={}, blocks=3)


@pytest.mark.parametrize(
    "damage, message",
    [
        (damaged_at(-1), "is damaged: its SHA-256 differs from the one that it was written with"),
        (damaged_at(9), "cannot be read as a file of hidden states"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged"),
        (lambda path: path.write_bytes(b""), "cannot be read as a file of hidden states"),
        (lambda path: write_tensors(path, "checkpoint", 2, {}, {"a": torch.ones(2)}), "cannot be read as"),
        (of_the_future, "is a file of hidden states in format 2; this program reads format 1"),
        (of_other_circumstances, "is of other circumstances than its name says"),
    ],
)
def test_a_file_that_is_no_use_is_told_and_replaced(options, tmp_path, capfd, damage, message):
    assert ae.main(options) == 0
    expected = [line for line in capfd.readouterr().out.splitlines() if " loss " in line]
    [name] = files_in(tmp_path / "features")
    damage(tmp_path / "features" / name)
    for place in ("read-only", "writable"):
        assert ae.main(options) == 0
        out, err = capfd.readouterr()
        assert [line for line in out.splitlines() if " loss " in line] == expected
        if place == "read-only":
            assert err.count("\n") == 1 and message in err and err.endswith("; they are computed again\n")
            assert " and kept in " in told(out)
        else:
            assert err == "" and told(out).startswith("read from ")


def test_two_users_share_a_folder_by_links(options, tmp_path, capfd):
    (tmp_path / "shared").mkdir()
    for user in ("a", "b"):
        (tmp_path / user).symlink_to(tmp_path / "shared")
        assert ae.main([*options, "--feature_cache", str(tmp_path / user)]) == 0
    assert "read from" in capfd.readouterr().out
    assert len(files_in(tmp_path / "shared")) == 1


def test_the_folder_is_no_data_of_somebody_else(tmp_path, monkeypatch, capfd):
    """A folder with nothing but kept features is one into which the collection may be downloaded."""
    from runner.data import datasets

    (tmp_path / "features").mkdir()
    datasets.names_in(tmp_path)
    (tmp_path / "other").mkdir()
    with pytest.raises(ae.UserError):
        datasets.names_in(tmp_path)


# --- larger than memory ---

LIMITED = """
import resource, sys
sys.path[:0] = {path!r}
import torch
import additional_experiments as ae
from runner.data import features

def vm_size():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

make = features.FrozenFeatures.of
def limited(self, *arguments):  # when model and messages are there, before there are features
    torch.randn(256, 256) @ torch.randn(256, 256)  # threads and buffers that products need anyway
    limit = vm_size() + {allowed}
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return make(self, *arguments)
if {allowed}:
    features.FrozenFeatures.of = limited
status = ae.main(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(status)
"""


def run_limited(folder, allowed, *options):
    """(exit status, what was printed) of a run that may take `allowed` bytes more once its model is there."""
    environment = os.environ | dict(OMP_NUM_THREADS="1", MALLOC_ARENA_MAX="1")
    program = LIMITED.format(path=sys.path, allowed=allowed)
    command = [sys.executable, "-c", program, *options, "--data_dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits on the address space are Linux's")
def test_features_may_be_larger_than_memory(tmp_path, sample_splits):
    """Of 77 MB of hidden states, a run that may take 45 MB more gives the same numbers as one in memory."""
    for split, frame in sample_splits.items():
        frame.head(240).to_csv(tmp_path / f"{split}.csv", index=None)
    options = "--model_size gpt2-nano --weights random --device cpu --num_epochs 1 --trainable_layers last_block"
    options += " --context_length 250"
    status, expected = run_limited(tmp_path, 0, *options.split(), "--features", "host", "--feature_cache", "")
    assert status == 0, expected
    status, out = run_limited(tmp_path, 45_000_000, *options.split(), "--features", "disk")
    assert status == 0, out
    numbers = [
        [line for line in text.splitlines() if " loss " in line or "accuracy" in line] for text in (expected, out)
    ]
    assert numbers[0] == numbers[1] != []
    assert sum(path.stat().st_size for path in (tmp_path / "features").iterdir()) > 70_000_000
    status, out = run_limited(tmp_path, 45_000_000, *options.split(), "--features", "host", "--feature_cache", "")
    assert status == 1 and "error: out of memory" in out
    last_layer = [*options.split(), "--trainable_layers", "last_layer", "--features", "disk"]
    status, out = run_limited(tmp_path, 45_000_000, *last_layer)
    assert status == 0 and "continued from 3 blocks" in out, out
