"""Runs from the command line to the row: what each option does, what is printed, Ctrl-C, weights from files."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean, stdev
from unittest.mock import Mock

import pytest
import torch
from helpers import no_file_above, records_in, save_random_weights
from safetensors.torch import save_file

import additional_experiments as ae
from additional_experiments import build_classifier, main, parse_args
from previous_chapters import gpt2_tensors
from runner.machine import devices


def parse(*options):
    return parse_args([str(option) for option in options])[0]


@pytest.mark.parametrize(
    "options, told",
    [
        ("", "Model: gpt2-tiny (1M), weights: random, trained: last_block"),
        ("--trainable_layers last_layer", "34 trainable and 833,648 frozen parameters"),
        ("--trainable_layers last_two_blocks", "Frozen features: 2 of 4 blocks, 68 distinct messages, 816 tokens"),
        ("--trainable_layers all", "833,682 trainable and 0 frozen"),
        ("--trainable_layers lora --lora_rank 2 --lora_alpha 3", "lora 2/3"),
        ("--trainable_token_pos first", "Frozen features: 3 of 4 blocks, 50 distinct messages, 50 tokens"),
        ("--trainable_token_pos flexible", "3 of 4 blocks, 68 distinct messages, 588 tokens"),
        ("--average_embeddings --trainable_token_pos flexible", "| mean of real |"),
        ("--no_padding", "68 distinct messages, 591 tokens"),
        ("--disable_causal_mask --trainable_token_pos first --context_length 5", "68 distinct messages, 340 tokens"),
        ("--ignore_index 1 --batch_size 3 --accumulation_steps 4", "batch 3×4, ignore 1"),
        ("--learning_rate 1e-3 --weight_decay 0 --precision bf16 --seed 5", "lr 0.001, weight decay 0, own data"),
        ("--features off --device auto", "recomputed each time"),
        ("--dataset sample --context_length 4 --trainable_layers last_layer", "messages: 840 train, 120"),
    ],
)
def test_each_option_end_to_end(quick, capsys, options, told):
    if "--dataset sample" in options:
        quick = quick[:-2]
    assert main([*quick, *options.split()]) == 0
    out, err = capsys.readouterr()
    assert told in out and err == ""


def test_lines_of_a_run(quick, capsys):
    assert main(quick) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("(numbers do not compare with the table); messages: 43 train, 9 validation, 17 test")
    assert lines[2] == "2 classes: 0, 1"
    percent, bounds = r"\d+\.\d\d%", r"\d+\.\d–\d+\.\d"
    patterns = [
        r"Ep 1 \(Step 000000\): Train loss \d\.\d{3}, Val loss \d\.\d{3}",
        rf"Training accuracy: {percent} \| Validation accuracy: {percent} \(first messages only: \d+/40, \d/9\)$",
        r"Training completed in \d+\.\d\d minutes\.",
        r"Wrote the record to results/\S+\.json",  # before anything that a closed pipe could stop
        rf"Training accuracy: {percent} \(\d+/40, 95% interval {bounds}\)$",
        rf"Validation accuracy: {percent} \(\d/9, 95% interval {bounds}\)$",
        rf"Test accuracy: {percent} \(\d+/17, 95% interval {bounds}\)$",
    ]
    for pattern, line in zip(patterns, lines[7:14], strict=True):
        assert re.match(pattern, line), line
    header, rule, row, signpost = lines[-4:]
    assert signpost == "All runs so far: python additional_experiments.py --report results"
    assert header.count("|") == rule.count("|") == row.count("|")
    test_accuracy = lines[13].split()[2]
    assert row.split("|")[header.split("|").index(" Test acc ")].strip() == test_accuracy


def test_quiet_leaves_the_row_only_and_without_results_no_record(quick, capsys):
    assert main([*quick, "--quiet", "--results", ""]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and out.startswith("| - | gpt2-tiny | random |") and err == ""
    assert list(Path().iterdir()) == []


@pytest.mark.slow
def test_demo_learns_without_a_network():
    """As a user types it but for two epochs less, in an empty folder, with every host out of reach."""
    nowhere = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HF_ENDPOINT")}
    command = [sys.executable, ae.__file__, "--demo", "--num_epochs", "3"]
    run = subprocess.run(command, env=os.environ | nowhere, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(re.search(r"^Test accuracy: ([\d.]+)%", run.stdout, re.M)[1]) > 85
    assert os.listdir() == ["results"]


# --- outputs and warnings ---


def test_a_full_disk_is_found_before_training(options, capsys):
    with no_file_above(0):
        assert main([*options, "--save_model", "trained.safetensors"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: --save_model trained.safetensors cannot be written")
    assert list(Path().iterdir()) == []


def test_a_disk_that_becomes_full_while_training(options, monkeypatch, capsys):
    """Not even the record is kept: the result stays on the screen, and the exit status says that something is lost."""
    train = ae.train
    with ExitStack() as disk:
        monkeypatch.setattr(ae, "train", lambda *given: disk.enter_context(no_file_above(0)) or train(*given))
        status = main([*options, "--save_model", "trained.safetensors", "--plot", "run.png"])
    out, err = capsys.readouterr()
    assert status == 1 and "Test accuracy: " in out and "| - | gpt2-tiny |" in out
    for what in ("the record could not be written to results", "the classifier could", "the picture could"):
        assert f"warning: {what}" in err
    assert [path.name for path in Path().glob("**/*")] == ["results"]


@pytest.mark.parametrize("layers, gigabytes", [("all", [0.12, 0.05, 0.03, 0.03, 0.06]), ("last_layer", None)])
def test_memory_that_cannot_be_enough_is_told_item_by_item(nano, monkeypatch, capfd, layers, gigabytes):
    """In order: needed, free, weights, gradients, optimizer. Frozen weights need neither of two."""
    monkeypatch.setattr(devices, "free_memory", lambda device: 50_000_000)
    assert main([*nano, "--trainable_layers", layers]) == 0
    warnings = [[float(size) for size in re.findall(r"([\d.]+) GB", capfd.readouterr().err)]]
    assert warnings == [gigabytes or []]


def test_each_process_needs_its_share_of_what_is_sharded(monkeypatch):
    monkeypatch.setattr(devices, "free_memory", lambda device: 0)
    monkeypatch.setattr(devices.processes, "world_size", lambda: 4)
    with torch.device("meta"):
        model = build_classifier(ae.Experiment(weights="random", trainable_layers="all"), n_classes=2)
    for is_sharded, needed in ((False, ("1.99", "0.50", "0.50", "1.00")), (True, ("0.50", "0.12", "0.12", "0.25"))):
        expected = "training needs {} GB in each process, but only 0.00 GB are free: "
        expected += "weights {} GB, gradients {} GB, optimizer {} GB"
        assert devices.describe_short_memory(model, torch.device("cpu"), is_sharded) == expected.format(*needed)


# --- several seeds ---


def test_repeats_share_what_does_not_depend_on_the_seed(options, tmp_path, capfd):
    options[options.index("random")] = save_random_weights(tmp_path / "weights", emb_dim=16)
    for seed in (123, 124, 125):
        assert main([*options, "--seed", str(seed)]) == 0
    alone = records_in()
    shutil.rmtree("results")
    capfd.readouterr()
    assert main([*options, "--repeats", "3"]) == 0
    assert records_in() == alone
    out = capfd.readouterr().out
    assert out.count("Frozen features: ") == 1 and out.count("Training completed") == 3  # computed for the first only
    [mean] = [line for line in out.splitlines() if line.startswith("| -, n=3 |")]
    tests = [100 * record["test"]["correct"] / record["test"]["total"] for record in alone]
    assert f"| {fmean(tests):.2f}±{stdev(tests):.1f} |" in mean


def test_random_weights_change_with_the_seed(options):
    assert main([*options, "--repeats", "2"]) == 0
    repeated = records_in()
    shutil.rmtree("results")
    assert main([*options, "--seed", "124"]) == 0
    assert sorted(repeated, key=lambda record: record["seed"])[1:] == records_in()
    assert repeated[0]["confusions"] != repeated[1]["confusions"]


# --- how a run ends ---


@pytest.mark.parametrize(
    "fail, line, advice",
    [
        (lambda *_: torch.empty(2**60), "out of memory", "a smaller --batch_size with more --accumulation_steps"),
        (RuntimeError("CUDA error: ECC\nmore"), "the device failed: CUDA error: ECC", "--device cpu"),
    ],
)
def test_a_failure_is_told_with_what_to_try(quick, monkeypatch, capsys, fail, line, advice):
    monkeypatch.setattr(ae, "train", Mock(side_effect=fail))
    assert main(quick) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {line}\nTry: ") and advice in err


# --- weights from a file ---


@pytest.mark.parametrize("layers", ["last_block", "all"])
def test_a_weights_file_gives_the_numbers_of_the_same_weights_drawn(nano, capsys, layers):
    options = [*nano, "--trainable_layers", layers]
    tensors = gpt2_tensors(build_classifier(parse(*options), 2).gpt)
    save_file(tensors, "drawn.safetensors")
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, "other.safetensors")

    found = {}
    for weights in ("random", "drawn.safetensors", "other.safetensors"):
        [found[weights]] = ae.run(parse(*options, "--weights", weights))
        assert f"weights: {weights}" in capsys.readouterr().out
    drawn, of_file, of_other = (record.history.train_losses for record in found.values())
    assert of_file == pytest.approx(drawn, abs=1e-5) != of_other
    assert found["drawn.safetensors"].test == found["random"].test
