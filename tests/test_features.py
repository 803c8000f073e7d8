"""Frozen features that outlive a run: the same to the bit, refused where they are not, shared, removed by age."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_SIZE
from filelock import FileLock
from helpers import encoded, finish_together, no_file_above, processes, save_random_weights
from safetensors.torch import load_file

import additional_experiments as ae
from gpt_download import Weights, find_weights
from previous_chapters import GPT_SIZES, TransformerBlock
from runner.console import Console
from runner.data import feature_files, features
from runner.data.feature_files import FeatureFiles
from runner.data.features import FrozenFeatures
from runner.data.messages import Stage, split_into_passes


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
    """What a run said about its frozen features, on a machine on which nothing takes time."""
    return re.sub(r" in \d+ s", " in 0 s", re.search(r"^Frozen features: .*? tokens, (.*)$", text, re.M)[1])


def numbers(text):
    """The lines of a run with losses and accuracies."""
    return [line for line in text.splitlines() if " loss " in line or " accuracy: " in line]


class Told(Console):
    """A console that keeps its lines and warnings."""

    def __init__(self):
        super().__init__(quiet=True)
        self.lines, self.warnings = [], []
        self.info, self.warning = self.lines.append, self.warnings.append


def make(classifier, messages, experiment, cache, choice="auto", weights=None):
    """(features, what was told, warnings) of a FrozenFeatures of its own."""
    console, weights = Told(), weights or Weights(experiment.model_size, "random")
    run_options = ae.RunOptions(feature_cache=str(cache))
    frozen = FrozenFeatures(replace(experiment, features=choice), run_options, weights, console)
    made = frozen.of(classifier, messages, experiment.seed)
    return made, told(console.lines[-1]), console.warnings


@pytest.fixture
def tiny(options):
    """(experiment, classifier, messages) of three frozen blocks, in messages of different lengths."""
    experiment, *_ = ae.parse_args([*options, "--no_padding"])
    return experiment, ae.optimize_frozen_blocks(ae.build_classifier(experiment, 2)), encoded(experiment)


# --- to the bit ---


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layers", ["last_layer", "last_block", "last_two_blocks"])
def test_read_continued_and_computed_features_are_the_same_to_the_bit(options, tmp_path, layers, precision):
    """For positions, masks, padding and pooling; on disk, what is made of them is the same."""
    experiment, *_ = ae.parse_args([*options, "--trainable_layers", layers, "--precision", precision])
    for position, switch in (("last", ""), ("first", ""), ("flexible", "no_padding"), ("last", "disable_causal_mask")):
        changed = replace(experiment, trainable_token_pos=position, average_embeddings=switch == "disable_causal_mask")
        changed = replace(changed, **{switch: True} if switch else {})
        messages = encoded(changed)
        classifier = ae.optimize_frozen_blocks(ae.build_classifier(changed, 2))
        expected, how, _ = make(classifier, messages, changed, "")
        assert how.startswith("computed in 0 s; ")

        cache = tmp_path / f"{position} {switch}"
        n_frozen, n_full = classifier.n_frozen_blocks, classifier.n_full_blocks
        classifier.n_frozen_blocks = n_full - 1  # so that less is kept than is needed
        make(classifier, messages, changed, cache)
        classifier.n_frozen_blocks = n_frozen
        for begin in (f"continued from {n_full - 1} blocks in 0 s and kept in", "read from "):
            found, how, warnings = make(classifier, messages, changed, cache)
            assert how.startswith(begin) and warnings == []
            for split, part in expected.items():
                assert found[split].stage is part.stage and found[split].lengths.equal(part.lengths)
                assert found[split].x.dtype == part.x.dtype and found[split].x.equal(part.x)
                assert part.residual is None or found[split].residual.equal(part.residual)

        on_disk, how, _ = make(classifier, messages, changed, cache, "disk")
        assert how.endswith(" on disk") == (on_disk["train"].stage is Stage.HIDDEN_STATES) == (layers != "last_layer")
        for split, part in expected.items():
            everything = torch.arange(len(part))
            assert ae.predict(classifier, on_disk[split], everything).equal(ae.predict(classifier, part, everything))


@pytest.mark.parametrize("changes", ["", "--trainable_layers last_two_blocks --precision bf16 --no_padding"])
def test_whole_runs_are_the_same_to_the_bit(options, capfd, changes):
    """Losses, accuracies and classifier of runs without kept features, that write them, and that read them."""
    ways = ("", "cache", "cache", "cache --features disk", "cache --features off")
    runs = []
    for number, way in enumerate(ways):
        further = f"--num_epochs 1 --save_model {number}.safetensors --feature_cache"
        assert ae.main([*options, *changes.split(), *further.split(), *(way.split() or [""])]) == 0
        out, err = capfd.readouterr()
        assert err == ""
        runs.append((told(out).split()[0], numbers(out), load_file(f"{number}.safetensors")))
    assert [how for how, *_ in runs] == ["computed", "computed", "read", "read", "recomputed"]
    for _, lines, tensors in runs[1:4]:
        assert lines == runs[0][1]
        assert all(tensors[name].equal(tensor) for name, tensor in runs[0][2].items())


def test_rows_share_what_they_have_in_common(options, tmp_path, capfd, block_calls):
    """After row 4: row 1 computes one block, then rows 3, 18, 19 and other settings none but for the test of a pass."""
    weights = save_random_weights(tmp_path / "weights", emb_dim=16)
    options[options.index("random")] = weights

    def run(*further):
        block_calls.clear()
        assert ae.main([*options, "--num_epochs", "1", *further]) == 0
        return told(capfd.readouterr().out)

    assert run("--trainable_layers", "last_two_blocks").startswith("computed in 0 s and kept in ")
    assert run().startswith("continued from 2 blocks in 0 s and kept in ")
    assert len(block_calls) == 6  # one pass of two blocks, one to foresee the time, one for each split
    for further in ("--ignore_index 50256", "--learning_rate 1e-3", "--seed 7", "--batch_size 3", "--weight_decay 0"):
        assert run(*further.split()).startswith("read from ") and len(block_calls) == 3
    assert "-03-blocks-" in run("--trainable_layers", "last_layer")
    assert run("--average_embeddings").startswith("read from ")
    assert "-02-blocks-" in run("--trainable_layers", "last_two_blocks")
    assert len(files_in(tmp_path / "features")) == 2


def test_features_that_took_less_than_five_seconds_are_not_kept(options, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(features, "MIN_SECONDS", 5)
    assert ae.main(options) == 0
    assert told(capfd.readouterr().out) == "computed in 0 s; 0.00 GB in cpu memory"
    assert not (tmp_path / "features").exists()  # nothing is left where nothing is kept


def test_seconds_are_those_of_the_first_computation(tiny, tmp_path, monkeypatch):
    experiment, classifier, messages = tiny
    clock = [0.0]
    forward = TransformerBlock.forward
    monkeypatch.setattr(features, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def slow(self, *rest):
        clock[0] += 1.5
        return forward(self, *rest)

    monkeypatch.setattr(TransformerBlock, "forward", slow)
    found = []
    for n_frozen in (2, 3, 3):
        classifier.n_frozen_blocks = n_frozen
        frozen = FrozenFeatures(experiment, ae.RunOptions(feature_cache=str(tmp_path)), Weights(TINY, "random"), Told())
        frozen.of(classifier, messages, experiment.seed)
        found.append(frozen.seconds)
    assert found == [9.0, 13.5, 13.5]  # three passes, one for each split, through two blocks, and then one more


# --- what is kept is used only where it is what would be computed ---


def change_token(messages):
    messages["test"].x[-1] += 1
    return messages


def change_boundary(messages):
    """The same tokens in all, and in each message a number of them that it may have."""
    lengths = messages["train"].lengths.clone()
    lengths[0], lengths[1] = lengths[0] - 1, lengths[1] + 1
    return messages | {"train": replace(messages["train"], lengths=lengths, positions=lengths - 1)}


CIRCUMSTANCES = {
    "seed": dict(seed=124),
    "model size": dict(model_size="gpt2-other"),
    "causal mask": dict(disable_causal_mask=True),
    "precision": dict(precision="bf16"),
    "token": change_token,
    "boundary": change_boundary,
    "device": (features, "describe_device", lambda device: "other"),
    "processor": (torch.backends.cpu, "get_cpu_capability", lambda: "other"),
    "threads": (torch, "get_num_threads", lambda: 77),
    "PyTorch": (torch, "__version__", "2.99.0"),
}


@pytest.mark.parametrize("name", CIRCUMSTANCES)
def test_other_circumstances_find_nothing(tiny, tmp_path, monkeypatch, name):
    monkeypatch.setitem(GPT_SIZES, "gpt2-other", TINY_SIZE)
    experiment, classifier, messages = tiny
    make(classifier, messages, experiment, tmp_path / "kept")
    match CIRCUMSTANCES[name]:
        case dict(changes):
            experiment = replace(experiment, **changes)
            classifier, messages = ae.optimize_frozen_blocks(ae.build_classifier(experiment, 2)), encoded(experiment)
        case tuple(patched):
            monkeypatch.setattr(*patched)
        case change:
            messages = change(messages)
    for how in ("computed in 0 s and kept in ", "read from "):
        assert make(classifier, messages, experiment, tmp_path / "kept")[1].startswith(how)
    assert len(files_in(tmp_path / "kept")) == 2


def test_the_key_counts_all_code_that_computes(tiny, monkeypatch):
    experiment, classifier, messages = tiny
    monkeypatch.setattr(features, "sha256_of", lambda path: Path(path).name)
    facts = features.circumstances(classifier, messages, 123, experiment, Weights(TINY, "random"))
    assert facts["code"] == ["additional_experiments.py", "features.py", "messages.py", "previous_chapters.py"]


def test_a_weights_file_is_known_by_its_content(tiny, tmp_path):
    experiment, classifier, messages = tiny
    path = Path(save_random_weights(tmp_path / "weights", emb_dim=16))
    weights = find_weights(str(path), TINY)
    moved = find_weights(str(path.rename(tmp_path / "moved.safetensors")), TINY)
    weights.path, other = None, replace(moved, sha256="other")  # nothing is to ask whether the file was changed
    for given, how in (weights, "computed in "), (moved, "read from "), (other, "computed in "):
        assert make(classifier, messages, experiment, tmp_path / "kept", weights=given)[1].startswith(how)


def test_a_weights_file_that_changes_meanwhile_ends_the_run(options, tmp_path, monkeypatch, capfd):
    path = Path(save_random_weights(tmp_path / "weights", emb_dim=16))
    options[options.index("random")] = str(path)
    capfd.readouterr()
    compute = features.compute_features

    def compute_and_change(*rest):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        return compute(*rest)

    monkeypatch.setattr(features, "compute_features", compute_and_change)
    assert ae.main(options) == 1
    assert capfd.readouterr().err == f"error: the weights file {path} was changed while this run used it\n"
    assert files_in(tmp_path / "features") == []


def test_a_value_that_differs_is_found_wherever_it_is_in_the_pass(tiny, tmp_path, monkeypatch):
    """In the last bit, as what products give in another environment, of which the key knows nothing."""
    monkeypatch.setattr(features.secrets, "choice", lambda passes: [one for one in passes if one[0] == "train"][-1])
    experiment, classifier, messages = tiny
    *_, indices = split_into_passes(messages["train"].lengths, torch.device("cpu"))
    rows, is_real = messages["train"].token_indices(indices)
    rows = rows[is_real].tolist()
    expected, *_ = make(classifier, messages, experiment, tmp_path)
    for row, column in (min(rows), 0), (max(rows), 15), (random.choice(rows), 7):
        path = max(tmp_path.glob("*.npy"), key=os.path.getmtime)
        array = np.lib.format.open_memmap(path, mode="r+")
        array.view(np.int32)[row, column] ^= 1
        found, how, [warning] = make(classifier, messages, experiment, tmp_path)
        assert warning == f"frozen features: {path} does not hold what is computed here; they are computed again"
        assert " and kept in " in how and found["train"].x.equal(expected["train"].x)
    assert make(classifier, messages, experiment, tmp_path)[1].startswith("read from ")


def test_the_pass_is_chosen_at_random_and_draws_nothing_from_the_run(tiny):
    _, classifier, messages = tiny
    states = torch.get_rng_state(), random.getstate()
    splits = {features.compute_random_pass(classifier, messages, 1)[0] for _ in range(60)}
    assert splits == set(messages)
    assert torch.get_rng_state().equal(states[0]) and random.getstate() == states[1]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: os.truncate(path, path.stat().st_size - 1), "mmap length is greater than file ?size"),
        (lambda path: path.write_bytes(b""), "EOF"),
        (lambda path: path.write_text("x" * 1000), "magic string is not correct"),
    ],
)
def test_a_file_that_is_no_use_is_told_and_replaced(tiny, tmp_path, damage, message):
    experiment, classifier, messages = tiny
    expected, *_ = make(classifier, messages, experiment, tmp_path)
    damage(next(tmp_path.glob("*.npy")))
    found, how, [warning] = make(classifier, messages, experiment, tmp_path)
    assert re.search(message, warning) and warning.endswith("; they are computed again") and " and kept in " in how
    assert found["train"].x.equal(expected["train"].x)
    assert make(classifier, messages, experiment, tmp_path)[1].startswith("read from ")


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


def test_runs_at_the_same_time_compute_once(tmp_path):
    folders = [tmp_path / str(number) for number in range(2)]
    started = [start(folder) for folder in folders]
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, 0]
    outs = [(folder / "out.txt").read_text() for folder in folders]
    assert sorted("read from" in told(out) for out in outs) == [False, True]
    assert all((folder / "err.txt").read_text() == "" for folder in folders)
    assert len({str(numbers(out)) for out in outs}) == 1
    assert len(files_in(tmp_path / "cache")) == 1  # no lock, nothing half-written


def test_who_waits_says_so(options, tmp_path):
    """And reads what was written meanwhile."""
    assert ae.main([*options, "--feature_cache", str(tmp_path / "cache")]) == 0
    [path] = (tmp_path / "cache").iterdir()
    path.rename(tmp_path / path.name)
    with FileLock(tmp_path / "cache" / re.sub(r"-[\d.]+s\.npy", ".lock", path.name)):
        process = start(tmp_path / "waiting", " ".join([*options, "--feature_cache", str(tmp_path / "cache")]))
        out = tmp_path / "waiting" / "out.txt"
        while not out.exists() or "Frozen features: waiting for another run, which" not in out.read_text():
            assert process.is_alive()
            time.sleep(0.01)
        (tmp_path / path.name).rename(path)
    process.join()
    assert process.exitcode == 0 and told(out.read_text()).startswith("read from")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on Windows")
def test_a_run_that_is_killed_is_taken_over(tmp_path):
    """At a random moment; a second run waits meanwhile."""
    cache = tmp_path / "cache"
    first = start(tmp_path / "first")
    while not list(cache.glob("*.part")) and first.is_alive():
        time.sleep(0.01)
    second = start(tmp_path / "second")
    time.sleep(random.uniform(0, 1))
    first.kill()
    first.join()
    second.join()
    assert second.exitcode == 0 and (tmp_path / "second" / "err.txt").read_text() == ""
    [name] = files_in(cache)
    assert name.endswith("s.npy")


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


# --- several processes of one run ---


def in_two_processes(wrong, elsewhere, options):
    """A run in which process 1 has another folder or another processor, or in which there is no room for a file."""
    GPT_SIZES[TINY], features.MIN_SECONDS = TINY_SIZE, 0
    if wrong == "disk":
        feature_files.reserve = full
    if os.environ["RANK"] == "1":
        os.chdir(elsewhere if wrong == "folder" else ".")
        if wrong == "processor":
            torch.backends.cpu.get_cpu_capability = lambda: "other"
    return ae.main(options)


def full(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "wrong, how, warning",
    [
        ("", r"computed in 0 s and kept in kept/.* GB in cpu memory", ""),
        ("processor", "computed in 0 s; .*", "the processes of this run differ in processor"),
        ("disk", "computed in 0 s; .*", r"\[Errno 28\] No space left on device"),
        ("folder", "computed in 0 s; .*", r"\[Errno 2\] No such file or directory: 'kept/.*part'"),
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
    assert [bool(re.fullmatch(warning, one)) for one in warnings] == [True] * bool(warning)
    assert files_in(elsewhere) == []
    assert len(list(here.glob("kept/*"))) == (wrong == "")
    if not wrong:
        monkeypatch.chdir(here)
        monkeypatch.setattr(features.torch, "get_num_threads", lambda: 1)
        assert ae.main(options) == 0
        assert told(capfd.readouterr().out).startswith("read from kept/")


def test_memory_is_counted_for_each_process(nano, monkeypatch):
    for name, value in dict(TORCHELASTIC_RUN_ID="", RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(features.processes, "from_main", lambda value: value)
    monkeypatch.setattr(features, "free_memory", lambda device: 20_000_000)
    experiment, *_ = ae.parse_args([*nano, "--trainable_layers", "all"])
    with torch.device("meta"):
        classifier = ae.build_classifier(experiment, 2)
    for shard, needed, parts in (False, "0.12", ("0.03", "0.03", "0.06")), (True, "0.06", ("0.01", "0.01", "0.03")):
        frozen = FrozenFeatures(experiment, ae.RunOptions(shard=shard), Weights(TINY, "random"), console := Told())
        frozen.warn_if_memory_is_short(classifier, encoded(experiment), torch.device("cpu"))
        [warning] = console.warnings
        assert warning.startswith(f"each process of this run needs {needed} GB and 0.01 GB are free: weights ")
        assert tuple(re.findall(r"(?:weights|gradients|optimizer) (\S+) GB", warning)) == parts


# --- removal ---


def fill(files, number, age):
    """A file of 1000 float32 numbers, last used `age` seconds ago."""
    part = files.part(f"{number:016x}", 3)
    files.create(part, (10, 100))[:] = number
    path = files.publish(part, seconds=1.0)
    os.utime(path, (time.time() - age,) * 2)
    return path


@pytest.fixture
def files(tmp_path):
    (tmp_path / "kept").mkdir()
    return FeatureFiles(tmp_path / "kept", 3.5 * (4000 + 128))


def test_the_least_recently_used_go_first(files):
    paths = [fill(files, number, age) for number, age in enumerate((10, 30, 20))]
    files.open(paths[1])  # the oldest is used again
    fill(files, 3, 0)
    assert [path.exists() for path in paths] == [True, True, False]
    fill(files, 4, 0)
    assert [path.exists() for path in paths] == [False, True, False]


def test_only_files_of_this_program_are_removed(files):
    old = files.part(f"{0xA:016x}", 11)  # left by a process that was killed
    for path in (old, other := files.folder / "weights.npy"):
        path.write_bytes(bytes(1_000_000))
        os.utime(path, (0, 0))
    fill(files, 1, 0)
    assert not old.exists() and other.exists()


def test_features_larger_than_the_folder_may_be_are_not_kept(options, tmp_path, capfd):
    for choice, how in (("auto", "computed in 0 s; 0.00 GB in cpu memory"), ("disk", "recomputed each time")):
        assert ae.main([*options, "--feature_cache_gb", "1e-6", "--features", choice]) == 0
        out, err = capfd.readouterr()
        assert err == "warning: frozen features are not kept: they would take more than --feature_cache_gb\n"
        assert told(out).startswith(how)
    assert not (tmp_path / "features").exists()


# --- what cannot be written or read ---


@pytest.mark.parametrize("falls_short_of", ["reserved", "written"])
def test_a_full_disk_costs_one_warning(options, tmp_path, monkeypatch, capfd, falls_short_of):
    """With a system that reserves space and with one on which the file is filled with zeros first."""
    if falls_short_of == "written":
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    assert ae.main([*options, "--feature_cache", ""]) == 0
    expected = numbers(capfd.readouterr().out)
    for choice, how in (("auto", "computed in "), ("disk", "recomputed each time (")):
        with no_file_above(40_000):
            assert ae.main([*options, "--features", choice]) == 0
        out, err = capfd.readouterr()
        assert err == "warning: frozen features are not kept: [Errno 27] File too large\n"
        assert told(out).startswith(how)
        if choice == "auto":
            assert numbers(out) == expected
        assert files_in(tmp_path / "features") == []
    monkeypatch.undo()


def test_a_folder_that_cannot_be_made_costs_one_warning(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    experiment, classifier, messages = tiny
    for folder in ("file/features", "circle", "x" * 300):
        *_, [warning] = make(classifier, messages, experiment, tmp_path / folder)
        assert re.match(r"frozen features are not kept: \[Errno \d+\] ", warning)


def test_a_read_only_folder_is_read_from(tiny, tmp_path, monkeypatch):
    def refuse(path, *rest, **keywords):
        raise PermissionError(13, "Permission denied")

    experiment, classifier, messages = tiny
    make(classifier, messages, experiment, tmp_path)
    monkeypatch.setattr(feature_files.FileLock, "acquire", refuse)
    monkeypatch.setattr(os, "utime", refuse)
    _, how, warnings = make(classifier, messages, experiment, tmp_path)
    assert how.startswith("read from ") and warnings == []
    *_, [warning] = make(classifier, messages, replace(experiment, seed=124), tmp_path)
    assert warning == "frozen features are not kept: [Errno 13] Permission denied"


def test_the_disk_needs_a_folder(options, capfd):
    assert ae.main([*options, "--feature_cache", "", "--features", "disk"]) == 2
    assert capfd.readouterr().err == 'error: --features disk needs a --feature_cache; "" is none\n'


def test_auto_takes_the_disk_where_memory_is_short(tiny, tmp_path, monkeypatch):
    experiment, classifier, messages = tiny
    monkeypatch.setattr(features, "free_memory", lambda device: 0)
    for choice, cache, ends in (
        ("auto", "", "recomputed each time (they would take 0.00 GB)"),
        ("auto", tmp_path, " on disk"),
        ("memory", tmp_path, " in cpu memory"),
    ):
        assert make(classifier, messages, experiment, cache, choice)[1].endswith(ends)


# --- larger than memory ---

LIMITED = """
import re, resource, sys
sys.path[:0] = {path!r}
import torch
import additional_experiments as ae
from runner.data import features

make = features.FrozenFeatures.of
def limited(self, *arguments):  # when model and messages are there, before there are features
    torch.randn(256, 256) @ torch.randn(256, 256)  # threads and buffers that products need anyway
    private = 1024 * int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1])
    resource.setrlimit(resource.RLIMIT_DATA, (private + {allowed},) * 2)
    return make(self, *arguments)
if {allowed}:
    features.FrozenFeatures.of = limited
sys.exit(ae.main(sys.argv[1:]))
"""


def run_limited(folder, allowed, *options):
    """(exit status, what was printed) of a run that may take `allowed` bytes more of memory that is no file's."""
    environment = os.environ | dict(OMP_NUM_THREADS="1", MALLOC_ARENA_MAX="1")
    program = LIMITED.format(path=sys.path, allowed=allowed)
    command = [sys.executable, "-c", program, *options, "--data_dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="this limit does not hold elsewhere")
def test_features_may_be_larger_than_memory(tmp_path, sample_splits):
    """Of 77 MB of hidden states, a run that may take 45 MB more gives the same numbers as one in memory."""
    for split, frame in sample_splits.items():
        frame.head(240).to_csv(tmp_path / f"{split}.csv", index=None)
    options = "--model_size gpt2-nano --weights random --device cpu --num_epochs 1 --context_length 250".split()
    in_memory = [*options, "--features", "memory", "--feature_cache", ""]
    status, expected = run_limited(tmp_path, 0, *in_memory)
    assert status == 0, expected
    status, out = run_limited(tmp_path, 45_000_000, *options, "--features", "disk")
    assert status == 0 and numbers(out) == numbers(expected) != [], out
    assert sum(path.stat().st_size for path in (tmp_path / "features").iterdir()) > 70_000_000
    status, out = run_limited(tmp_path, 45_000_000, *in_memory)
    assert status == 1 and "error: out of memory" in out
    status, out = run_limited(tmp_path, 45_000_000, *options, "--features", "disk", "--trainable_layers", "last_layer")
    assert status == 0 and "continued from 3 blocks" in out, out
