"""The command line: what each option does, what each bad input is told, and what is printed."""

import hashlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

import additional_experiments as ae
from additional_experiments import ROWS, Experiment, UsageError, build_classifier, main, parse_args
from previous_chapters import THIRD_OF_C_ATTN, checkpoint_name

SCRIPT = Path(ae.__file__)


def parse(*options):
    return parse_args([str(option) for option in options])[0]


# --- what options mean ---


def test_defaults_are_those_of_row_1():
    assert parse() == Experiment() == parse("--row", 1)
    assert ae.row_number(parse("--seed", 7, "--device", "cpu", "--data_dir", "elsewhere", "--precision", "bf16")) == 1


COMMANDS = {
    1: "",
    2: "--trainable_token_pos first",
    3: "--trainable_layers last_layer",
    4: "--trainable_layers last_two_blocks",
    5: "--trainable_layers all",
    6: "--model_size gpt2-medium",
    7: "--model_size gpt2-large",
    8: "--model_size gpt2-xl",
    9: "--model_size gpt2-xl --trainable_layers all",
    10: "--weights random --trainable_layers all",
    11: "--trainable_layers lora --lora_rank 16 --lora_alpha 16",
    12: "--trainable_layers lora --lora_rank 16 --lora_alpha 8 --model_size gpt2-xl",
    13: "--context_length model_context_length",
    14: "--no_padding --batch_size 1",
    15: "--no_padding --batch_size 1 --accumulation_steps 8",
    16: "--trainable_token_pos flexible",
    17: "--disable_causal_mask",
    18: "--ignore_index 50256",
    19: "--average_embeddings",
}


@pytest.mark.parametrize("number, command", COMMANDS.items())
def test_each_row_is_one_command(number, command):
    experiment = parse(*command.split())
    assert experiment == parse("--row", number)
    assert ae.row_number(experiment) == number


def test_options_given_beside_a_preset_win():
    assert parse("--row", 11, "--lora_rank", 4) == parse(
        "--trainable_layers", "lora", "--lora_rank", 4, "--lora_alpha", 16
    )
    assert parse("--batch_size", 2, "--row", 14).batch_size == 2
    demo = parse("--demo", "--num_epochs", 1)
    assert (demo.model_size, demo.weights, demo.trainable_layers) == ("gpt2-nano (7M)", "random", "all")
    assert (demo.dataset, demo.learning_rate, demo.num_epochs) == ("sample", 5e-4, 1)


def test_configuration_in_words():
    own = parse("--seed", 5, "--device", "cpu", "--data_dir", "d")
    assert ae.configuration(own, "own", "01234567" * 8) == "last block, last token, own data 01234567"
    assert ae.configuration(parse(), "uci", "") == "last block, last token"
    demo = "gpt2-nano (7M), random weights, all, learning rate 0.0005, sample data"
    assert ae.configuration(parse("--demo"), "sample", "") == demo
    for number, (command, words, _) in ae.described_rows().items():
        assert parse_args(shlex.split(command))[0] == parse("--row", number)
        differing = ae.configuration(parse("--row", number), "uci", "").split(", ")
        assert set(differing) == set(words.split(", ")) - {"alpha 8"}  # row 12 names what is the default


def test_published_figures():
    assert {n: str(row.published) for n, row in ROWS.items() if n in (1, 9, 15)} == {
        1: "96.63% / 99.33% / 95.00%, 0.28 min (A100)",
        9: "100.00% / 98.66% / 98.67%, 8.12 min (A100)",
        15: "99.33% / 98.66% / 98.33%, 1.70 min (A100)",
    }


def test_auto_device_prefers_an_accelerator(monkeypatch):
    there = {"cuda": True, "mps": True}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there["cuda"])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there["mps"])
    assert ae.resolve_device("auto").type == "cuda"
    there["cuda"] = False
    assert ae.resolve_device("auto").type == "mps"
    there["mps"] = False
    assert ae.resolve_device("auto").type == "cpu"


@pytest.mark.parametrize(
    "options, told",
    [
        ("", "Tokens per message: 12 at most, padded"),
        ("--model_size gpt2-nano", "Model: gpt2-nano (7M), weights: random, trained: last_block"),
        ("--trainable_layers last_layer", "258 trainable and 7,357,312 frozen parameters"),
        ("--trainable_layers last_two_blocks", "Frozen features: 2 of 4 blocks, 69 messages, 828 tokens"),
        ("--trainable_layers all", "7,357,570 trainable and 0 frozen"),
        ("--trainable_layers lora --lora_rank 2 --lora_alpha 3", "lora (rank 2, alpha 3)"),
        ("--trainable_layers lora_alternative", "lora_alternative (rank 8, alpha 8)"),
        ("--trainable_token_pos first", "Frozen features: 3 of 4 blocks, 69 messages, 69 tokens"),
        ("--trainable_token_pos flexible", r"Frozen features: 3 of 4 blocks, 69 messages, 5\d\d tokens"),
        ("--average_embeddings", "| all tokens | last_block | longest train ex. (12) |"),
        ("--average_embeddings --trainable_token_pos flexible", "| all real tokens |"),
        ("--average_embeddings --no_padding", "| all real tokens |"),
        ("--context_length model_context_length", "Tokens per message: 1024 at most"),
        ("--context_length 5", "69 messages, 345 tokens"),
        ("--no_padding", r"69 messages, 5\d\d tokens"),
        ("--disable_causal_mask", "no causal mask"),
        ("--disable_causal_mask --trainable_token_pos first", "69 messages, 828 tokens"),
        ("--ignore_index 1", "ignore index 1"),
        ("--batch_size 3 --accumulation_steps 4", "batch size 3, accumulation 4"),
        ("--num_epochs 2", "Ep 2 (Step"),
        ("--learning_rate 1e-3 --weight_decay 0", "learning rate 0.001, weight decay 0"),
        ("--seed 5", "seed 5"),
        ("--device auto", "Device: "),
        ("--precision bf16", "bf16"),
        ("--features off", "worked out anew each time"),
        (
            "--dataset sample --context_length 4 --trainable_layers last_layer",
            "messages: 840 train, 120",
        ),
    ],
)
def test_each_option_end_to_end(nano, capsys, options, told):
    if "--dataset sample" in options:
        nano = nano[:-2]
    if "--num_epochs 2" in options:
        options += " --batch_size 1"  # more than 50 batches, so that the second epoch has a line
    assert main([*nano, *options.split()]) == 0
    out, err = capsys.readouterr()
    assert re.search(told if "\\" in told else re.escape(told), out)
    assert err == ""


def test_lines_of_a_run(nano, capsys):
    assert main(nano) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == (
        "Data: your own data (numbers do not compare with the table); messages: 43 train, 9 validation, 17 test"
    )
    percent, bounds = r"\d+\.\d\d%", r"\d+\.\d–\d+\.\d"
    patterns = [
        r"Ep 1 \(Step 000000\): Train loss \d\.\d{3}, Val loss \d\.\d{3}",
        rf"Training accuracy: {percent} \| Validation accuracy: {percent} "
        rf"\(\d+/40, \d/9; 95% intervals {bounds}, {bounds}\)$",
        r"Training completed in \d+\.\d\d minutes\.",
        rf"Training accuracy: {percent} \(\d+/40, 95% interval {bounds}\)$",
        rf"Validation accuracy: {percent} \(\d/9, 95% interval {bounds}\)$",
        rf"Test accuracy: {percent} \(\d+/17, 95% interval {bounds}\)$",
    ]
    for pattern, line in zip(patterns, lines[5:11], strict=True):
        assert re.match(pattern, line), line
    header, rule, row = lines[-3:]
    assert header.count("|") == rule.count("|") == row.count("|")
    test_accuracy = lines[10].split()[2]
    assert row.split("|")[header.split("|").index(" Test acc ")].strip() == test_accuracy


def test_quiet_leaves_the_row_only(nano, capsys):
    assert main([*nano, "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and out.startswith("| - | gpt2-nano (7M) | random |") and err == ""


def test_published_figures_stand_beside_the_result_of_a_row(nano, capsys, monkeypatch):
    """On the collection itself, which is not at hand here: its splits are what a test says they are."""
    monkeypatch.setattr(ae, "load_splits", lambda *_: (LOAD_SPLITS(parse(*nano), False)[0], "uci"))
    monkeypatch.setitem(ROWS, 20, ae.Row(dict(model_size=ae.NANO, weights="random", num_epochs=1), ROWS[2].published))
    assert main([*nano, "--quiet"]) == 0
    row = capsys.readouterr().out
    assert row.startswith("| 20 |") and row.endswith("| 78.46% / 80.54% / 75.00%, 0.28 min (A100) |\n")


LOAD_SPLITS = ae.load_splits


def test_demo_learns_without_a_network(tmp_path):
    """As a user types it, in an empty folder, with every host out of reach."""
    nowhere = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HF_ENDPOINT")}
    run = subprocess.run(
        [sys.executable, SCRIPT, "--demo"],
        cwd=tmp_path,
        env=os.environ | nowhere,
        capture_output=True,
        text=True,
        timeout=900,  # well under a minute on two quiet cores; this only ends what hangs
    )
    assert run.returncode == 0, run.stderr
    assert float(re.search(r"^Test accuracy: ([\d.]+)%", run.stdout, re.M)[1]) > 85
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]


# --- bad input ---


@pytest.mark.parametrize(
    "options, message",
    [
        ("--no_such_option", "unrecognized arguments: --no_such_option"),
        ("--batch 8", "unrecognized arguments: --batch 8"),  # no guessing of abbreviations
        ("--model_size gpt3", '"gpt3" is none of gpt2-small (124M), '),
        ("--trainable_layers some", "invalid choice: 'some'"),
        ("--trainable_token_pos middle", "invalid choice: 'middle'"),
        ("--context_length 0", "0 is less than 1"),
        ("--context_length 1025", "1025 is more than 1024"),
        ("--context_length long", '"long" is not a whole number'),
        ("--batch_size 0", "0 is less than 1"),
        ("--batch_size 1.5", '"1.5" is not a whole number'),
        ("--accumulation_steps -1", "-1 is less than 1"),
        ("--num_epochs 0", "0 is less than 1"),
        ("--learning_rate 0", "0 is not greater than 0"),
        ("--learning_rate nan", '"nan" is not a finite number'),
        ("--weight_decay -0.1", "-0.1 is less than 0"),
        ("--lora_rank 0", "0 is less than 1"),
        ("--lora_alpha 0", "0 is not greater than 0"),
        ("--lora_rank 769", "--lora_rank 769 is over the width 768 of gpt2-small (124M)"),
        ("--seed -1", "-1 is less than 0"),
        ("--ignore_index 9223372036854775808", "is more than 9223372036854775807"),
        ("--accumulation_steps 9223372036854775808", "is more than 9223372036854775807"),
        ("--ignore_index x", '"x" is not a whole number'),
        ("--device tpu", "invalid choice: 'tpu'"),
        ("--dataset mine", "invalid choice: 'mine'"),
        ("--weights missing.safetensors", "no such file"),
        ("--model_size gpt2-nano", "gpt2-nano (7M) has no pretrained weights"),
        ("--average_embeddings --trainable_token_pos first", "--average_embeddings takes all positions"),
        ("--dataset sample --data_dir here", "--data_dir is not looked at with the sample"),
        ("--demo --row 3", "not allowed with argument"),
        ("--demo please", "unrecognized arguments: please"),
        ("--row 0", "0 is less than 1"),
        ("--row 20", "20 is more than 19"),
        ("--row one", '"one" is not a whole number'),
        ("--weights random --precision tf32 --device cpu", "--precision tf32 is for CUDA"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(options.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there(capsys):
    assert main(["--device", "cuda"]) == 2
    assert "--device cuda: PyTorch finds none here" in capsys.readouterr().err


def test_misprint_of_row_9(capsys):
    assert main(["--model_size", "gpt2-xl (1558M)--trainable_layers", "all"]) == 2
    assert 'is a space missing before "--trainable_layers"?' in capsys.readouterr().err


@pytest.mark.parametrize(
    "split, content, message",
    [
        ("train", "", "the file is empty"),
        ("train", "Label,Text\n", "no messages below the header"),
        ("train", "Label,Message\n0,a\n", "column Text is missing; there are Label, Message"),
        ("train", "Class,Text\n0,a\n", "column Label is missing"),
        ("test", "Label,Text\n0,a\n1,\n", "line 3: the text is empty"),
        ("test", "Label,Text\n0,a\n1,   \n", "line 3: the text is empty"),
        ("test", "Label,Text\n0,a\n1\n", "line 3: the text is empty"),
        ("test", "Label,Text\n0,a\n,b\n", 'line 3: label "" is not a whole number'),
        ("train", "Label,Text\n0,a\nspam,b\n", 'line 3: label "spam" is not a whole number'),
        ("train", "Label,Text\n0,a\n1.0,b\n", 'line 3: label "1.0" is not a whole number'),
        ("train", 'Label,Text\n0,"two\nlines"\nx,b\n', 'line 4: label "x" is not a whole number'),
        ("train", "Label,Text\n0,a,b\n", "line 2: more fields than columns"),
        ("train", "Label,Text\n2,a\n1,b\n", "line 3: label 1, but labels begin at 0"),
        ("train", "Label,Text\n0,a\n-1,b\n", "line 3: label -1, but labels begin at 0"),
        ("train", "Label,Text\n0,a\n2,b\n", "line 3: label 2, but no training message has label 1"),
        ("validation", "Label,Text\n0,a\n2,b\n", "validation.csv, line 3: label 2, which no training message has"),
        ("train", "Label,Text\n-100,a\n-100,b\n", "every training label is the ignored one, -100"),
        ("train", 'Label,Text\n0,"a\n', "unexpected end of data"),
        (
            "train",
            "Label,Text\n0,a\n999999999999,b\n",
            "label 999999999999, but no training message has label 1",
        ),
        ("train", "Label,Text\n0,a\n0,b\n", "every label is 0; there is nothing to tell apart"),
        ("train", b"Label,Text\n0,\xff\xfe\n", "not UTF-8 text"),
    ],
)
def test_bad_data_is_refused_by_line(nano, data_dir, capsys, split, content, message):
    (data_dir / f"{split}.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(nano) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
    assert f"{split}.csv" in err or message.startswith("every training")


def test_training_labels_that_are_all_ignored(nano, data_dir, capsys):
    (data_dir / "train.csv").write_text("Label,Text\n" + "0,a\n" * 8)
    (data_dir / "validation.csv").write_text("Label,Text\n0,a\n")
    (data_dir / "test.csv").write_text("Label,Text\n0,a\n")
    assert main([*nano, "--ignore_index", "0"]) == 2
    assert "every training label is the ignored one, 0" in capsys.readouterr().err


def test_batch_larger_than_the_training_set(nano, capsys):
    assert main([*nano, "--batch_size", "44"]) == 2
    assert "--batch_size 44: there are only 43 training messages" in capsys.readouterr().err


def test_one_of_three_files_is_not_overwritten(nano, data_dir, capsys):
    (data_dir / "test.csv").unlink()
    before = (data_dir / "train.csv").read_bytes()
    assert main(nano) == 2
    assert "holds train.csv but not test.csv; your own data needs all three" in capsys.readouterr().err
    assert (data_dir / "train.csv").read_bytes() == before and len(list(data_dir.iterdir())) == 2


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "cannot be read as a .safetensors file"),
        (lambda path: path.write_bytes(b"PK\x03\x04" * 100), "cannot be read as a .safetensors file"),
        (lambda path: path.write_bytes(b""), "cannot be read as a .safetensors file"),
        (lambda path: save_file({"weight": torch.ones(2)}, path), "tensor wte.weight is missing"),
    ],
)
def test_weights_that_cannot_be_used(tmp_path, monkeypatch, capsys, damage, message):
    """Refused before the collection is asked for."""
    monkeypatch.setattr(ae, "load_splits", lambda *_: pytest.fail("the data was asked for"))
    path = tmp_path / "file.safetensors"
    save_file({"wte.weight": torch.ones(1000)}, path)
    damage(path)
    assert main(["--model_size", "gpt2-nano", "--weights", str(path), "--data_dir", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err and str(path) in err


# --- data ---


def test_text_is_taken_as_it_is(nano, data_dir):
    """NA is a message, a comma in quotes and a line break are part of one, and so is <|endoftext|>."""
    texts = ["NA", "null", 'a "b", c', "two\nlines", "<|endoftext|>", "ä€😀"]
    frame = pd.DataFrame({"Label": [0, 1] * 3, "Text": texts})
    frame.to_csv(data_dir / "test.csv", index=None)
    splits, name = ae.load_splits(parse(*nano))
    assert list(splits["test"]["Text"]) == texts and list(splits["test"]["Label"]) == [0, 1] * 3 and name == "own"
    messages, _ = ae.encode(ae.gpt_download.load_vocabulary(), splits, parse(*nano, "--no_padding"))
    assert 50256 not in messages["test"].x


def test_byte_order_mark_and_further_columns(nano, data_dir):
    (data_dir / "test.csv").write_text("\ufeffId,Text,Label\n7,a,1\n", encoding="utf-8")
    splits, _ = ae.load_splits(parse(*nano))
    assert splits["test"][["Label", "Text"]].values.tolist() == [[1, "a"]]


def test_three_classes_and_messages_without_a_label(nano, data_dir, capsys):
    frame = pd.read_csv(data_dir / "train.csv")
    frame["Label"] = [0, 1, 2] * 14 + [-100]
    frame.to_csv(data_dir / "train.csv", index=None)
    (data_dir / "test.csv").write_text("Label,Text\n-100,a\n2,b\n")
    [(result, _)] = ae.run(parse(*nano, "--batch_size", 1))
    assert (result.train.total, result.test.total) == (42, 1)
    assert "loss nan" not in capsys.readouterr().out


def test_sample_is_split_70_10_20_and_balanced(sample_splits):
    assert [len(sample_splits[split]) for split in ae.SPLITS] == [840, 120, 240]
    assert sum(frame["Label"].sum() for frame in sample_splits.values()) == 600


def test_collection_is_split_and_written_once(tmp_path, monkeypatch):
    """On the sample in place of the collection. A run that was killed between two files is completed."""
    collection = tmp_path / "SMSSpamCollection"
    collection.write_bytes(ae.gpt_download.SAMPLE.read_bytes())
    monkeypatch.setattr(ae.gpt_download, "COLLECTION_SHA256", ae.gpt_download.SAMPLE_SHA256)
    experiment = parse("--data_dir", tmp_path)
    with pytest.raises(ae.FileError, match="splits the collection differently"):
        ae.load_splits(experiment)
    assert list(tmp_path.iterdir()) == [collection]

    contents = {s: frame.to_csv(index=None).encode() for s, frame in ae.balanced_splits(collection).items()}
    sums = {split: hashlib.sha256(content).hexdigest() for split, content in contents.items()}
    monkeypatch.setattr(ae, "UCI_SPLITS_SHA256", sums)
    splits, name = ae.load_splits(experiment)
    assert {split: len(frame) for split, frame in splits.items()} == dict(train=840, validation=120, test=240)
    assert name == "uci"
    (tmp_path / "test.csv").unlink()
    assert ae.load_splits(experiment)[1] == "uci"
    assert ae.gpt_download.sha256_of(tmp_path / "test.csv") == sums["test"]
    collection.unlink()  # not looked at any more
    assert len(ae.load_splits(experiment)[0]["train"]) == 840


# --- interruption ---


def wait_until(condition, process):
    while not condition():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc to see what is being imported")
@pytest.mark.parametrize("moment", ["import", "training"])
def test_ctrl_c(tmp_path, moment):
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--demo", "--num_epochs", "1000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    try:
        if moment == "import":
            maps = Path(f"/proc/{process.pid}/maps")
            wait_until(lambda: "libtorch" in maps.read_text(), process)
        else:
            wait_until(lambda: process.stdout.readline().startswith("Ep 1"), process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in err


def test_out_of_memory_is_told_with_the_ways_on(nano, monkeypatch, capsys):
    def allocate(*arguments):
        torch.empty(2**60)

    monkeypatch.setattr(ae, "fine_tune", allocate)
    assert main(nano) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: out of memory\nWays on: a smaller --batch_size with more --accumulation_steps")


# --- weights from a file ---


@pytest.mark.parametrize("layers", ["last_layer", "last_block", "all", "lora"])
def test_weights_file_that_transformers_wrote(nano, tmp_path, layers, capsys):
    """A run from the file of a model gives the losses of a run in which the same weights were drawn."""
    drawn = build_classifier(parse(*nano), 2).gpt
    theirs = GPT2LMHeadModel(GPT2Config(n_embd=128, n_layer=4, n_head=4))
    with torch.no_grad():
        state = {}
        for name, parameter in drawn.named_parameters():
            source, third = checkpoint_name(name), THIRD_OF_C_ATTN.get(name.split(".")[-2])
            value = parameter.T if parameter.ndim == 2 and "trf_blocks" in name else parameter
            state.setdefault(f"transformer.{source}", []).append(value)
            assert third is None or third == len(state[f"transformer.{source}"]) - 1
        theirs.load_state_dict({name: torch.cat(parts, dim=-1) for name, parts in state.items()}, strict=False)
    theirs.save_pretrained(tmp_path / "theirs")

    options = [*nano, "--trainable_layers", layers]
    [(expected, expected_history)] = ae.run(parse(*options))
    options[options.index("random")] = str(tmp_path / "theirs" / "model.safetensors")
    [(result, history)] = ae.run(parse(*options))
    assert history.train_losses == pytest.approx(expected_history.train_losses, abs=1e-5)
    assert (result.train, result.test) == (expected.train, expected.test)
    assert "weights: " + options[options.index("--weights") + 1] in capsys.readouterr().out


def test_help_names_every_option_and_its_default(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(Experiment):
        assert f"--{field.name}" in text
        if field.type is not bool:
            assert f"(default: {field.default})" in text


def test_importing_does_nothing():
    program = "import signal; before = signal.getsignal(2); import additional_experiments; "
    program += "print(before == signal.getsignal(2))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=SCRIPT.parent)
    assert (run.stdout, run.stderr) == ("True\n", "")


def test_settings_are_checked_without_a_command_line_too():
    with pytest.raises(UsageError, match="no pretrained weights"):
        Experiment(model_size="gpt2-nano (7M)")
