"""The command line: what options mean, what bad ones are told, and --help."""

import json
import math
import os
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from additional_experiments import Experiment, main, parse_args, run
from runner.files import UserError
from runner.options import RunOptions
from runner.rows import ROWS

NANO = "gpt2-nano (7M)"


def parse(*options):
    return parse_args([str(option) for option in options])[0]


def test_options_given_with_a_preset_win():
    spelled_out = parse("--trainable_layers", "lora", "--lora_rank", 4, "--lora_alpha", 16)
    assert parse("--row", 11, "--lora_rank", 4) == spelled_out
    assert parse("--batch_size", 2, "--row", 14).batch_size == 2
    demo = parse("--demo", "--num_epochs", 1)
    assert (demo.model_size, demo.weights, demo.trainable_layers) == (NANO, "random", "all")
    assert (demo.dataset, demo.learning_rate, demo.num_epochs) == ("sample", 5e-4, 1)


def test_settings_of_lora_without_it_are_no_other_configuration():
    assert parse("--lora_rank", 4, "--lora_alpha", 16) == Experiment() != parse("--row", 11)


def test_an_argument_that_is_no_text(capsys):
    assert main(["--demo", "--note", "\udcff"]) == 2
    assert capsys.readouterr().err.startswith("error: an argument is not Unicode text: \\udcff")


def test_dashes_and_short_names():
    assert parse("--trainable-layers", "all", "--batch-size=4") == parse("--trainable_layers=all", "--batch_size", 4)
    assert parse("--no-padding").no_padding
    sizes = {parse("--weights=random", "--model-size", size).model_size for size in ("nano", "gpt2-nano", NANO)}
    assert sizes == {NANO} and parse("--model_size", "xl").model_size == "gpt2-xl (1558M)"


# --- bad input ---


@pytest.mark.parametrize(
    "options, message",
    [
        ("--batch 8", "there is no option --batch; the nearest is --batch_size"),  # no guessing of abbreviations
        ("--epochs=8", "there is no option --epochs=8; the nearest is --num_epochs"),
        ("--learning-rte 1", "there is no option --learning_rte; the nearest is --learning_rate"),
        ("-row 2", "there is no option -row; the nearest is --row"),
        ("--lr 1", "there is no option --lr; the nearest is --learning_rate (--help"),  # and not --row
        ("--output-dir a", "there is no option --output_dir; the nearest is --results (--help"),
        ("--wd=1", "there is no option --wd=1; the nearest is --weight_decay (--help"),
        ("--bs 8", "there is no option --bs; the nearest is --batch_size (--help"),
        ("--model xl", "there is no option --model; the nearest is --model_size (--help"),
        ("--text hello", "there is no option --text; the nearest is --classify or --text_column (--help"),
        ("--wandb", "there is no option --wandb (--help"),  # and not --shard
        (
            "--row 1,16,19",
            '"1,16,19" is not a whole number from 1 to 19; one row per command; for several see All rows',
        ),
        ("--row 1 16 19", "unexpected argument 16; one row per command; for several see All rows in README.md"),
        ("--epochs 1 2", "there is no option --epochs; the nearest is --num_epochs"),
        ("--num_epochs 1 2", "unexpected argument 2 (--help"),
        ("--xyz", "there is no option --xyz (--help"),
        ("--model_size gpt3", '"gpt3" is none of gpt2-small (124M), '),
        ("--trainable_layers some", "invalid choice: 'some'"),
        ("--learning_rate 1e30", '"1e30" is not a finite number of at most 9.223e+18'),
        ("--context_length 0", '"0" is not a whole number from 1 to 1024'),
        ("--context_length long", '"long" is not a whole number from 1 to 1024, nor longest_training_example'),
        ("--batch_size 0", '"0" is not a whole number of at least 1'),
        ("--seed " + "9" * 5000, "is not a whole number"),
        ("--learning_rate 0", '"0" is not a finite number of at least 1e-12'),
        ("--learning_rate nan", '"nan" is not a finite number'),
        ("--lora_rank 769", "--lora_rank 769 exceeds the width 768 of gpt2-small (124M)"),
        ("--ignore_index 9223372036854775808", "is not a whole number"),
        ("--weights missing.safetensors", "no such file"),
        ("--model_size gpt2-nano", "gpt2-nano (7M) has no pretrained weights"),
        ("--average_embeddings --trainable_token_pos first", "cannot be combined with --trainable_token_pos first"),
        ("--dataset sample --data_dir here", "--data_dir is not read with the sample"),
        ("--demo --row 3", "not allowed with argument"),
        ("--row 20", '"20" is not a whole number from 1 to 19'),
        ("--weights random --precision tf32 --device cpu", "--precision tf32 is for CUDA"),
        ("--weights random --shard", "--shard needs several processes: torchrun"),
        ("--features disk --feature_cache=", "--features disk needs a --feature_cache"),
        ("--checkpoint a --repeats 2 --results=", "--checkpoint with --repeats needs --results"),
        ("--skip_finished --results=", "--skip_finished needs --results"),
        ("--write a.png", "--write needs --report"),
        ("--classify a", "--classify needs --load_model"),
        ("--load_model a", "--load_model needs --classify"),
        ("--plot a.gif", '"a.gif" does not end in .png, .pdf, .svg'),
        ("--repeats 2 --save_model a.safetensors", "are for one classifier; --repeats trains several"),
        ("--checkpoint .", "--checkpoint . is not a regular file"),
        (f"--checkpoint {os.devnull}", f"--checkpoint {os.devnull} is not a regular file"),
        ("--weights random --data_dir . --checkpoint train.csv", "--checkpoint train.csv would overwrite the data"),
        (
            "--checkpoint a.safetensors --save_model ./A.safetensors",
            "A.safetensors would overwrite --checkpoint",
        ),  # on macOS and Windows
        ("--plot a.png --checkpoint ./a.png", "--plot a.png would overwrite --checkpoint"),
        ("--report --row 3", "--row cannot be combined with --report"),
        ("--report missing", "--report missing: there is no such folder"),
        ("--load_model missing --classify a", "missing cannot be read as a .safetensors file"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, message, capsys):
    assert main(options.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
    assert list(Path().iterdir()) == []


# --- help and settings ---


def test_help_names_every_option_and_its_default(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 140 and max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[-19:]] == [str(number) for number in ROWS]
    for number in list(ROWS)[1:]:  # the first is the defaults
        assert parse(*lines[number - 20].split()[1:]) == parse("--row", number)
    text = " ".join(" ".join(lines).split())
    for field in (*fields(Experiment), *fields(RunOptions)):
        assert f"--{field.name}" in text
        if field.type is not bool and field.default not in (None, (), ""):
            assert f"default: {field.default})" in text
        assert all(f"{choice}, " in text or f"{choice}; " in text for choice in field.metadata.get("choices", ()))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(model_size=NANO), "no pretrained weights"),
        (dict(precision="fp16"), "--precision does not take 'fp16'; choose from fp32, bf16, tf32"),
        (dict(num_epochs=2.5), '--num_epochs: "2.5" is not a whole number'),
        (dict(learning_rate=math.nan), '--learning_rate: "nan" is not a finite number'),
        (dict(no_padding="no"), "--no_padding does not take 'no'"),
        (dict(weights=None), "--weights does not take None"),
        (dict(shard=True), "--shard needs several processes: torchrun"),
        (dict(repeats=0), '--repeats: "0" is not a whole number'),
        (dict(write=("a.gif",), report=()), '--write: "a.gif" does not end in'),
    ],
)
def test_settings_are_checked_without_a_command_line_too(settings, message):
    kind = RunOptions if {"repeats", "write"} & settings.keys() else Experiment
    with pytest.raises(UserError) as error:
        kind(**settings)
    assert message in str(error.value)


def test_settings_of_a_command_line_and_of_python_are_the_same(nano_weights):
    """Also as Python has them: short names, paths, numbers of NumPy and whole numbers for others."""
    given = dict(model_size="nano", weights=Path(nano_weights), data_dir=Path("a"), context_length=np.int64(50))
    given |= dict(learning_rate=np.float32(1e-3), weight_decay=0, lora_alpha=16, seed=np.int64(2**63 - 1))
    given |= dict(ignore_index=-1, lora_rank="4")
    words = [f"--{name}={value!s}" for name, value in given.items()]
    expected = parse("--no_padding", "--activation_checkpointing", *words)
    found = Experiment(no_padding=np.bool_(True), activation_checkpointing=True, **given)
    assert (found, repr(found)) == (expected, repr(expected))  # 16 == 16.0, but they are not stored alike
    assert json.loads(json.dumps(asdict(found))) == asdict(expected)
    assert found.config.activation_checkpointing and not parse().config.activation_checkpointing
    of_command = parse_args(["--load_model=c", "--classify", "a", "b", "--export=d"])[1]
    assert RunOptions(classify=["a", "b"], load_model=Path("c"), export=Path("d")) == of_command


@pytest.mark.parametrize(
    "settings, run_options, message",
    [
        (dict(), dict(save_model="missing/x.safetensors"), "--save_model missing/x.safetensors cannot be written"),
        (dict(data_dir="."), dict(checkpoint="test.csv"), "--checkpoint test.csv would overwrite the data"),
        (dict(weights="file.safetensors"), dict(save_model="file.safetensors"), "would overwrite the weights"),
        (dict(), dict(results="file"), "--results file cannot be written"),
        (dict(), dict(plot="missing/x.png", repeats=2), "--plot missing/x.png cannot be written"),
        (dict(), dict(export="out"), "--export needs --trainable_token_pos flexible"),
        (dict(features="disk"), dict(feature_cache=""), "--features disk needs a --feature_cache"),
    ],
)
def test_outputs_are_checked_for_callers_from_python_too(data_dir, capsys, settings, run_options, message):
    """Before anything is trained or printed."""
    Path("file").touch(), Path("file.safetensors").touch()
    common = dict(model_size="nano", weights="random", data_dir=data_dir)
    with pytest.raises(UserError, match=message):
        run(Experiment(**common | settings), RunOptions(**run_options))
    assert capsys.readouterr() == ("", "") and sorted(os.listdir()) == ["file", "file.safetensors"]


@pytest.mark.parametrize("option", ["--results", "--checkpoint", "--save_model", "--plot", "--write"])
@pytest.mark.parametrize("place", ["read-only", "missing", "dangling link", "circular link"])
def test_what_cannot_be_written_is_found_before_training(tmp_path, monkeypatch, capsys, option, place):
    folder = tmp_path / "folder"
    if place == "read-only":
        folder.mkdir()
        refuse = Mock(side_effect=PermissionError(13, "Permission denied"))  # also to root
        monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    if place.endswith("link"):
        folder.symlink_to(folder if place == "circular link" else tmp_path / "nowhere" / "deeper")
    name = "a.safetensors" if option == "--save_model" else "a.png"
    path = folder / name if option != "--results" else folder / "results" if place == "missing" else folder
    command = ["--report", str(tmp_path)] if option == "--write" else ["--demo", "--results="]
    assert main([*command, option, str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and str(folder) in err
