"""Frozen features that outlive a run: equal to the bit, refused where they are not, removed by age."""

import os
import re
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, TINY_SIZE
from helpers import CPU, end_together, finish_together, no_file_above, save_random_weights, start_together

import additional_experiments as ae
from classifier import build_classifier, place
from gpt_download import Weights, load_weights
from previous_chapters import GPT_SIZES
from runner.data import features, messages
from runner.data.features import FrozenFeatures
from runner.files import UserError

RANDOM = Weights("random")


@pytest.fixture(autouse=True)
def keep_what_took_no_time(monkeypatch):
    monkeypatch.setattr(features, "MIN_SECONDS", 0)


@pytest.fixture
def several_passes(monkeypatch):
    monkeypatch.setitem(messages.TOKENS_PER_PASS, "cpu", 128)


@pytest.fixture(scope="module")
def tiny(sample_splits):
    """(experiment, classifier, pool) of three frozen blocks, and of messages of different lengths in one pass."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(GPT_SIZES, TINY, TINY_SIZE)
        experiment = ae.Experiment(model_size=TINY, weights="random", device="cpu", no_padding=True)
        yield experiment, *made_for(experiment, sample_splits)


def made_for(experiment, sample_splits):
    """Return (classifier, pool) of an experiment, of 60 messages of at most 30 letters."""
    splits = {split: frame.head(n) for (split, frame), n in zip(sample_splits.items(), (30, 10, 20))}
    splits = {split: frame.assign(Text=frame["Text"].str[:30]) for split, frame in splits.items()}
    pool = ae.encode(ae.load_vocabulary(), splits, experiment).pool
    return place(build_classifier(experiment, 2), CPU), pool


def load_or_compute(
    classifier, pool, folder, choice="auto", weights=RANDOM, seed=123, gigabytes=5.0, progress=lambda n: None
):
    """Return the pool, outcome, warnings and seconds of a FrozenFeatures of its own; `progress` is called often."""
    lines, warnings = [], []
    console = SimpleNamespace(info=lines.append, warning=warnings.append)
    console.progress = lambda *arguments: nullcontext(SimpleNamespace(update=progress))
    frozen = FrozenFeatures(choice, folder, gigabytes * 1e9, weights, console)
    pool = frozen.load_or_compute(classifier, pool, seed)
    return SimpleNamespace(pool=pool, outcome=outcome(lines[-1]), warnings=warnings, seconds=frozen.seconds)


def outcome(text):
    """Return what a run printed about its frozen features, as if nothing took time."""
    return re.sub(r" in \d+ s", " in 0 s", re.search(r"^Frozen features: .*? tokens, (.*)$", text, re.M)[1])


def files_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


# --- to the bit ---


AVERAGE = dict(no_padding=False, disable_causal_mask=True, average_embeddings=True)


@pytest.mark.parametrize(
    "layers, precision, changes",
    [
        ("last_layer", "fp32", AVERAGE),
        ("last_layer", "bf16", dict(trainable_token_pos="flexible")),
        ("last_block", "fp32", dict(no_padding=False, trainable_token_pos="first")),
        ("last_block", "bf16", dict(no_padding=False)),
        ("last_block", "fp32", AVERAGE),
        ("last_two_blocks", "bf16", dict(trainable_token_pos="flexible")),
    ],
)
@pytest.mark.usefixtures("several_passes")
def test_read_continued_and_computed_features_are_the_same(
    tiny, sample_splits, tmp_path, monkeypatch, layers, precision, changes
):
    """And so are the predictions from them, also on disk. How much memory and time they need is known."""
    experiment = replace(tiny[0], trainable_layers=layers, precision=precision, **changes)
    classifier, pool = made_for(experiment, sample_splits)
    computed = load_or_compute(classifier, pool, None)
    expected = computed.pool
    assert computed.outcome.startswith("computed in 0 s; ")
    tensors = [tensor for tensor in (expected.x, expected.residual) if tensor is not None]
    assert features.feature_bytes(classifier, pool) == sum(tensor.nbytes for tensor in tensors)

    n_frozen, n_full = classifier.n_frozen_blocks, classifier.n_full_blocks
    classifier.n_frozen_blocks = n_full - 1  # so that less is kept than is needed
    load_or_compute(classifier, pool, tmp_path)
    classifier.n_frozen_blocks = n_frozen
    continued = f"continued from {n_full - 1} blocks in 0 s"
    for min_seconds, begin in ((5, f"{continued}; "), (0, f"{continued} and kept in "), (0, "read from ")):
        monkeypatch.setattr(features, "MIN_SECONDS", min_seconds)
        found = load_or_compute(classifier, pool, tmp_path)
        assert found.outcome.startswith(begin) and found.warnings == []
        assert found.pool.stage is expected.stage and found.pool.lengths.equal(expected.lengths)
        assert found.pool.x.dtype == expected.x.dtype and found.pool.x.equal(expected.x)
        assert expected.residual is None or found.pool.residual.equal(expected.residual)

    predictions = [ae.predict(classifier, of_pool, torch.arange(len(pool))) for of_pool in (pool, expected)]
    torch.testing.assert_close(*predictions, rtol=0, atol=1e-5 if precision == "fp32" else 0.02)
    on_disk = load_or_compute(classifier, pool, tmp_path, "disk")
    assert on_disk.outcome.endswith(" on disk") == (layers != "last_layer") and on_disk.seconds > 0
    assert ae.predict(classifier, on_disk.pool, torch.arange(len(pool))).equal(predictions[1])


def test_runs_and_seeds_share_what_they_have_in_common(options, tmp_path, capfd):
    """After row 4, row 1 computes one block, and then rows 3, 18, 19 and other settings none."""
    options[options.index("random")] = save_random_weights(tmp_path / "weights", emb_dim=16)

    def run(*further):
        assert ae.main([*options, "--num_epochs", "1", "--batch_size", "8", *further]) == 0
        out = capfd.readouterr().out
        assert out.count("Frozen features: ") == 1
        return outcome(out)

    assert run("--trainable_layers", "last_two_blocks").startswith("computed in 0 s and kept in ")
    assert run().startswith("continued from 2 blocks in 0 s and kept in ")
    further = "--ignore_index 50256 --learning_rate 1e-3 --seed 7 --repeats 2 --batch_size 9 --weight_decay 0"
    assert run(*further.split()).startswith("read from ")
    assert "-03.npy in 0 s; " in run("--trainable_layers", "last_layer")
    assert run("--average_embeddings").startswith("read from ")
    found = run("--average_embeddings", "--trainable_layers", "last_layer")
    assert re.match("continued from 3 blocks in 0 s and kept in .*-04.npy; ", found)
    assert "-02.npy in 0 s; " in run("--trainable_layers", "last_two_blocks")
    assert len(files_in(tmp_path / "features")) == 3


def test_features_that_took_less_than_five_seconds_are_kept_on_disk_only_if_asked_for(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "MIN_SECONDS", 5)
    assert load_or_compute(*tiny[1:], tmp_path / "features").outcome == "computed in 0 s; 0.00 GB in cpu memory"
    assert not (tmp_path / "features").exists()
    assert " and kept in " in load_or_compute(*tiny[1:], tmp_path / "features", "disk").outcome


# --- what is kept is used only where it is what would be computed ---


def change_boundary(pool):
    """Return the same tokens, of which the second message has one more and the first one less."""
    lengths = pool.lengths + torch.tensor([-1, 1] + [0] * (len(pool) - 2))
    return replace(pool, lengths=lengths, positions=lengths - 1)


@pytest.mark.parametrize(
    "change",
    [
        dict(seed=124),
        dict(model_size="gpt2-other"),
        dict(disable_causal_mask=True),
        dict(precision="bf16"),
        lambda pool: replace(pool, x=torch.cat([pool.x[:-1], pool.x[-1:] + 1])),
        change_boundary,
        (torch.backends.cpu, "get_cpu_capability", lambda: "other"),
        (torch, "get_num_threads", lambda: 77),
        (torch, "get_float32_matmul_precision", lambda: "high"),
        (torch, "__version__", "2.99.0"),
        (features, "sha256_of", lambda path: "other code"),
    ],
)
def test_another_cache_key_finds_nothing(tiny, sample_splits, tmp_path, monkeypatch, change):
    monkeypatch.setitem(GPT_SIZES, "gpt2-other", TINY_SIZE | dict(n_heads=2))
    experiment, classifier, pool = tiny
    load_or_compute(classifier, pool, tmp_path)
    if isinstance(change, dict):
        experiment = replace(experiment, **change)
        classifier, pool = made_for(experiment, sample_splits)
    elif isinstance(change, tuple):
        monkeypatch.setattr(*change)
    else:
        pool = change(pool)
    for begin in ("computed in 0 s and kept in ", "read from "):
        assert load_or_compute(classifier, pool, tmp_path, seed=experiment.seed).outcome.startswith(begin)
    assert len(files_in(tmp_path)) == 2


def test_a_weights_file_is_identified_by_its_content(tiny, tmp_path):
    """If it changes meanwhile, the run ends and nothing is kept."""
    path, kept = Path(save_random_weights(tmp_path / "weights", emb_dim=16)), tmp_path / "kept"
    weights = load_weights(str(path), TINY)
    assert load_or_compute(*tiny[1:], kept, weights=weights).outcome.startswith("computed in ")
    moved = load_weights(str(path.rename(tmp_path / "moved.safetensors")), TINY)
    assert load_or_compute(*tiny[1:], kept, weights=moved).outcome.startswith("read from ")
    os.utime(moved.path, (0, 0))
    with pytest.raises(UserError, match=f"^the weights file {moved.path} was changed while this run used it$"):
        load_or_compute(*tiny[1:], kept, weights=replace(moved, sha256="other"))
    assert len(files_in(kept)) == 1


def flip_bit(path, offset, bit=0):
    """Change one bit of a file; a negative offset counts from its end."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


DAMAGED, OTHER = "is damaged", "does not hold what is computed here"


@pytest.mark.parametrize(
    "problem, damage",
    [
        (DAMAGED, lambda path: os.truncate(path, path.stat().st_size - 1)),
        (DAMAGED, lambda path: flip_bit(path, 60)),  # in the header
        (OTHER, lambda path: flip_bit(path, 128)),  # the first value, by its last bit
        (OTHER, lambda path: flip_bit(path, -12)),  # the last value
    ],
)
def test_a_file_that_cannot_be_used_is_computed_again(tiny, tmp_path, problem, damage):
    expected = load_or_compute(*tiny[1:], tmp_path).pool
    [path] = tmp_path.iterdir()
    damage(path)
    found = load_or_compute(*tiny[1:], tmp_path)
    assert found.warnings == [f"frozen features: {path} {problem}; they are computed again"]
    assert " and kept in " in found.outcome and found.pool.x.equal(expected.x)
    assert load_or_compute(*tiny[1:], tmp_path).outcome.startswith("read from ")


# --- several runs at once ---


def test_two_runs_compute_the_same_at_once(tiny, tmp_path):
    """The last to finish replaces the file of the other."""
    others = []

    def run_another(n):
        if not others:
            others.append(None)
            others[0] = load_or_compute(*tiny[1:], tmp_path)

    found = load_or_compute(*tiny[1:], tmp_path, progress=run_another)
    for one in (found, others[0]):
        assert one.outcome.startswith("computed in 0 s and kept in ") and one.warnings == []
    assert found.pool.x.equal(others[0].pool.x) and len(files_in(tmp_path)) == 1
    assert load_or_compute(*tiny[1:], tmp_path).outcome.startswith("read from ")


# --- several ranks of one run ---


def run_on_two_ranks(wrong, elsewhere, options):
    """A run in which rank 1 may have another folder or another processor."""
    GPT_SIZES[TINY], features.MIN_SECONDS = TINY_SIZE, 0
    if os.environ["RANK"] == "1" and wrong == "folder":
        os.chdir(elsewhere)
    elif os.environ["RANK"] == "1" and wrong == "processor":
        features.platform.machine = lambda: "another"
    return ae.main(options)


@pytest.mark.parametrize(
    "wrong, how, warning",
    [
        ("", r"computed in 0 s and kept in kept/.* GB in cpu memory", []),
        (
            "folder",
            "computed in 0 s; .*",
            ["[Errno 2] No such file or directory: 'kept'; --feature_cache DIR names another folder"],
        ),
        ("processor", "computed in 0 s; .*", ["the processes of this run differ in processor"]),
    ],
)
def test_several_ranks_compute_together(options, tmp_path, monkeypatch, capfd, wrong, how, warning):
    """A run in one process can use what they have kept; what is not kept costs one warning."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir(), elsewhere.mkdir()
    options += ["--feature_cache", "kept", "--batch_size", "8"]
    out = finish_together(2, here, run_on_two_ranks, wrong, elsewhere, options)
    assert re.fullmatch(how, outcome(out))
    assert re.findall("warning: frozen features are not kept: (.*)", out) == warning
    assert files_in(elsewhere) == []
    assert len(list(here.glob("kept/*"))) == (wrong == "")
    if not wrong:
        monkeypatch.chdir(here)
        monkeypatch.setattr(features.torch, "get_num_threads", lambda: 1)
        assert ae.main(options) == 0
        assert outcome(capfd.readouterr().out).startswith("read from kept/")


# --- removal ---


def test_the_least_recently_used_files_of_this_program_are_removed(tiny, tmp_path):
    killed, foreign = tmp_path / ".89abcdef-0123abcd.part.npy", tmp_path / "weights.npy"
    being_written = tmp_path / ".89abcdef-76543210.part.npy"
    for path, age in (killed, 3700), (foreign, 3700), (being_written, 3500):
        path.write_bytes(bytes(1_000_000 if age == 3700 else 100))
        os.utime(path, (time.time() - age,) * 2)
    paths, room = {}, 2.5e-9 * (64 * len(tiny[2].x) + 136)  # for two files

    def run(seed):
        found = load_or_compute(*tiny[1:], tmp_path, seed=seed, gigabytes=room)
        paths.setdefault(seed, Path(re.search(r" (\S+\.npy)", found.outcome)[1]))
        return found.outcome.startswith("read from "), [seed for seed, path in paths.items() if path.exists()]

    assert run(1) == (False, [1]) and not killed.exists()
    assert run(2) == (False, [1, 2])
    for age, path in enumerate((paths[2], paths[1])):
        os.utime(path, (time.time() - 100 - age,) * 2)
    assert run(1) == (True, [1, 2])  # the oldest is used again
    assert run(3) == (False, [1, 3]) and run(3) == (True, [1, 3])
    assert foreign.exists() and being_written.exists() and len(files_in(tmp_path)) == 4


# --- what cannot be written or read ---


@pytest.mark.parametrize(
    "choice, folder, room, reason",
    [
        ("auto", "full", 5, r"\[Errno 27\] File too large"),
        ("auto", "file/features", 5, r"\[Errno \d+\] .*"),
        ("disk", "small", 1e-6, "they would take more than --feature_cache_gb"),
    ],
)
def test_what_cannot_be_kept_costs_one_warning(tiny, tmp_path, choice, folder, room, reason):
    (tmp_path / "file").write_text("")
    expected = load_or_compute(*tiny[1:], None).pool if choice == "auto" else tiny[2]
    with no_file_above(10_000 if folder == "full" else 10**9):
        found = load_or_compute(*tiny[1:], tmp_path / folder, choice, gigabytes=room)
    [warning] = found.warnings
    assert re.fullmatch(f"frozen features are not kept: {reason}(; --feature_cache DIR .*)?", warning)
    assert found.pool.x.equal(expected.x)
    assert found.outcome.startswith("computed" if choice == "auto" else "recomputed each time (")
    assert list(tmp_path.glob("*/*")) == []


def test_a_read_only_folder_is_read_from(tiny, tmp_path, monkeypatch):
    def refuse(path, *rest, **keywords):
        raise PermissionError(13, "Permission denied")

    load_or_compute(*tiny[1:], tmp_path)
    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(Path, "touch", refuse)
    found = load_or_compute(*tiny[1:], tmp_path)
    assert found.outcome.startswith("read from ") and found.warnings == []
    found = load_or_compute(*tiny[1:], tmp_path, seed=124)
    assert found.warnings == [
        "frozen features are not kept: [Errno 13] Permission denied; --feature_cache DIR names another folder"
    ]


# --- larger than memory ---


def run_limited(allowed, options):
    """A run that, once model and messages are there, may take `allowed` bytes more of memory that is no file's."""
    import resource

    load_or_compute = FrozenFeatures.load_or_compute

    def limited(*arguments):
        torch.randn(256, 256) @ torch.randn(256, 256)  # threads and buffers that matmuls need anyway
        private = 1024 * int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1])
        resource.setrlimit(resource.RLIMIT_DATA, (private + allowed,) * 2)
        return load_or_compute(*arguments)

    FrozenFeatures.load_or_compute, features.MIN_SECONDS = limited, 0
    return ae.main(options)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="this limit does not hold elsewhere")
def test_features_may_be_larger_than_memory(tmp_path, sample_splits):
    """Of 77 MB of hidden states, a run that may take 45 MB more gives the same numbers as one in memory."""
    for split, frame in sample_splits.items():
        frame.head(240).to_csv(tmp_path / f"{split}.csv", index=None)
    options = f"--model_size gpt2-nano --weights random --device cpu --num_epochs 1 --data_dir {tmp_path}".split()
    on_disk = [*options, "--context_length", "250", "--features", "disk"]
    in_memory = [*on_disk, "--features", "memory", "--feature_cache", ""]
    found = []
    for allowed, command in ((10**12, in_memory), (45_000_000, on_disk), (45_000_000, in_memory)):
        (folder := tmp_path / str(len(found))).mkdir()
        [status], out = end_together(start_together(1, folder, run_limited, allowed, command), folder)
        assert command is in_memory or outcome(out).endswith(" on disk")
        found.append((status, re.findall(".* loss .*|.* accuracy: .*", out)))
    assert found[1] == found[0] and found[0][0] == 0 and found[0][1] != []
    assert sum(path.stat().st_size for path in (tmp_path / "features").iterdir()) > 70_000_000
    assert found[2][0] == 1 and "error: out of memory" in out
