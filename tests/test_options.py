"""The command line: what options mean, what bad ones are told, and --help."""

from dataclasses import fields
from pathlib import Path

import pytest

from additional_experiments import Experiment, main, parse_args
from runner.files import UserError
from runner.options import RunOptions


def parse(*options):
    return parse_args([str(option) for option in options])[0]


def test_options_given_with_a_preset_win():
    assert parse("--row", 11, "--lora_rank", 4) == parse(
        "--trainable_layers", "lora", "--lora_rank", 4, "--lora_alpha", 16
    )
    assert parse("--batch_size", 2, "--row", 14).batch_size == 2
    demo = parse("--demo", "--num_epochs", 1)
    assert (demo.model_size, demo.weights, demo.trainable_layers) == ("gpt2-nano (7M)", "random", "all")
    assert (demo.dataset, demo.learning_rate, demo.num_epochs) == ("sample", 5e-4, 1)


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
        ("--lora_rank 769", "--lora_rank 769 exceeds the width 768 of gpt2-small (124M)"),
        ("--seed -1", "-1 is less than 0"),
        ("--ignore_index 9223372036854775808", "is more than 9223372036854775807"),
        ("--accumulation_steps 9223372036854775808", "is more than 9223372036854775807"),
        ("--ignore_index x", '"x" is not a whole number'),
        ("--device tpu", "invalid choice: 'tpu'"),
        ("--dataset mine", "invalid choice: 'mine'"),
        ("--weights missing.safetensors", "no such file"),
        ("--model_size gpt2-nano", "gpt2-nano (7M) has no pretrained weights"),
        (
            "--average_embeddings --trainable_token_pos first",
            "--average_embeddings (all positions) cannot be combined with --trainable_token_pos first",
        ),
        ("--dataset sample --data_dir here", "--data_dir is not read with the sample"),
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


def test_misprint_of_row_9(capsys):
    assert main(["--model_size", "gpt2-xl (1558M)--trainable_layers", "all"]) == 2
    assert 'is a space missing before "--trainable_layers"?' in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        ("--write a.png", "--write needs --report"),
        ("--classify a", "--classify needs --load_model"),
        ("--load_model a", "--load_model needs --classify"),
        ("--restart", "--restart needs --checkpoint"),
        ("--plot a.gif", '"a.gif" does not end in .png, .pdf, .svg'),
        ("--repeats 0", "0 is less than 1"),
        ("--repeats 2 --save_model a", "--save_model is for one classifier, --repeats trains several"),
        ("--checkpoint nowhere/a", "--checkpoint nowhere/a: there is no folder nowhere"),
        ("--checkpoint .", "--checkpoint . is a folder"),
        ("--checkpoint /dev/null", "--checkpoint /dev/null is not a regular file"),
        ("--weights random --save_model sms_spam_collection/train.csv", "there is no folder sms_spam_collection"),
        ("--weights random --data_dir . --save_model train.csv", "--save_model train.csv would overwrite the data"),
        (
            "--weights random --data_dir . --checkpoint ./SMSSpamCollection",
            "SMSSpamCollection would overwrite the data",
        ),
        ("--seed " + "9" * 5000, "is not a whole number"),
        ("--checkpoint=", "--checkpoint is given without the name of a file"),
        ("--checkpoint a --save_model ./a", "--checkpoint and --save_model name the same file, ./a"),
        ("--plot a.png --save_model ./a.png", "--plot and --save_model name the same file"),
        ("--checkpoint_minutes -1", "-1.0 is less than 0"),
        ("--report --row 3", "--row cannot be combined with --report"),
        ("--report --repeats 2", "--repeats cannot be combined with --report"),
        ("--report missing", "--report missing: there is no such folder"),
        ("--load_model missing --classify a", "missing cannot be read as a saved classifier"),
    ],
)
def test_bad_options_of_what_a_call_does(options, message, capsys):
    assert main(options.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err and list(Path().iterdir()) == []


# --- help and settings ---


def test_help_names_every_option_and_its_default(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in (*fields(Experiment), *fields(RunOptions)):
        assert f"--{field.name}" in text
        if field.type is not bool and field.default not in (None, ()):
            assert f"(default: {field.default})" in text


def test_settings_are_checked_without_a_command_line_too():
    with pytest.raises(UserError, match="no pretrained weights"):
        Experiment(model_size="gpt2-nano (7M)")
