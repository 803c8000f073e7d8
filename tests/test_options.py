"""The command line: what options mean, what bad ones are told, and --help."""

import math
from dataclasses import fields
from pathlib import Path

import pytest

from additional_experiments import Experiment, main, parse_args
from runner import files, options
from runner.files import UserError
from runner.options import RunOptions
from runner.rows import ROWS

NANO = "gpt2-nano (7M)"


def parse(*options):
    return parse_args([str(option) for option in options])[0]


def test_options_given_with_a_preset_win():
    assert parse("--row", 11, "--lora_rank", 4) == parse(
        "--trainable_layers", "lora", "--lora_rank", 4, "--lora_alpha", 16
    )
    assert parse("--batch_size", 2, "--row", 14).batch_size == 2
    demo = parse("--demo", "--num_epochs", 1)
    assert (demo.model_size, demo.weights, demo.trainable_layers) == (NANO, "random", "all")
    assert (demo.dataset, demo.learning_rate, demo.num_epochs) == ("sample", 5e-4, 1)


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
        ("--model 3", "there is no option --model; the nearest is --model_size"),
        ("--epochs=8", "there is no option --epochs=8; the nearest is --num_epochs"),
        ("--learning-rte 1", "there is no option --learning_rte; the nearest is --learning_rate"),
        ("-row 2", "there is no option -row; the nearest is --row"),
        ("--xyz", "there is no option --xyz (--help"),
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
        ("--demo please", "there is no option please"),
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
        ("--plot a.gif", '"a.gif" does not end in .png, .pdf, .svg'),
        ("--repeats 0", "0 is less than 1"),
        ("--repeats 2 --save_model a", "--save_model is for one classifier, --repeats trains several"),
        ("--checkpoint nowhere/a", "--checkpoint nowhere/a cannot be written: "),
        ("--checkpoint .", "--checkpoint . is not a regular file"),
        ("--checkpoint /dev/null", "--checkpoint /dev/null is not a regular file"),
        ("--weights random --save_model sms_spam_collection/train.csv", "sms_spam_collection: No such file"),
        ("--weights random --data_dir . --save_model train.csv", "--save_model train.csv would overwrite the data"),
        (
            "--weights random --data_dir . --checkpoint ./SMSSpamCollection",
            "SMSSpamCollection would overwrite the data",
        ),
        ("--seed " + "9" * 5000, "is not a whole number"),
        ("--checkpoint=", "--checkpoint  is not a regular file"),
        ("--checkpoint a --save_model ./a", "--save_model ./a would overwrite --checkpoint"),
        ("--plot a.png --save_model ./a.png", "--plot a.png would overwrite --save_model"),
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
        (dict(model_size="xl"), "--model_size does not take 'xl'"),
        (dict(precision="fp16"), "--precision does not take 'fp16'; choose from fp32, bf16, tf32"),
        (dict(num_epochs=0), "--num_epochs: 0 is less than 1"),
        (dict(num_epochs="3"), "--num_epochs does not take '3'"),
        (dict(num_epochs=2.5), '--num_epochs: "2.5" is not a whole number'),
        (dict(num_epochs=True), '--num_epochs: "True" is not a whole number'),
        (dict(num_epochs=None), '--num_epochs: "None" is not a whole number'),
        (dict(learning_rate=math.nan), '--learning_rate: "nan" is not a finite number'),
        (dict(learning_rate=[5e-5]), "is not a finite number"),
        (dict(context_length="120"), "--context_length does not take '120'"),
        (dict(context_length=1025), "--context_length: 1025 is more than 1024"),
        (dict(no_padding=0), "--no_padding does not take 0"),
        (dict(no_padding="yes"), "--no_padding does not take 'yes'"),
        (dict(weights=None), "--weights does not take None"),
        (dict(device=["cpu"]), "--device does not take ['cpu']; choose from auto, cpu, mps, cuda"),
        (dict(repeats=0), "--repeats: 0 is less than 1"),
        (dict(quiet=None), "--quiet does not take None"),
        (dict(checkpoint=3), "--checkpoint does not take 3"),
        (dict(plot="a.gif"), '"a.gif" does not end in .png'),
    ],
)
def test_settings_are_checked_without_a_command_line_too(settings, message):
    kind = Experiment if settings.keys() <= Experiment.__dataclass_fields__.keys() else RunOptions
    with pytest.raises(UserError) as error:
        kind(**settings)
    assert message in str(error.value)


def test_settings_of_a_command_line_and_of_python_are_the_same():
    settings = dict(
        context_length=50, learning_rate=1, weight_decay=0, lora_alpha=1e-9, ignore_index=-1, seed=2**63 - 1
    )
    given = [word for name, value in settings.items() for word in (f"--{name}", value)]
    assert Experiment(no_padding=True, **settings) == parse("--no_padding", *given)
    assert RunOptions(classify=("a", "b"), load_model="c") == parse_args(["--load_model=c", "--classify", "a", "b"])[1]


@pytest.mark.parametrize("system, is_one", [("linux", False), ("darwin", True), ("win32", True)])
def test_names_that_differ_in_case_are_one_file_where_the_system_says_so(monkeypatch, capsys, system, is_one):
    monkeypatch.setattr(options.sys, "platform", system)
    paths = options.as_one_file("run.ckpt"), options.as_one_file("RUN.ckpt")
    assert (paths[0] == paths[1]) == is_one


def read_only(monkeypatch, folder):
    """Refuse files in a folder, also to root."""
    temporary_file = files.tempfile.TemporaryFile

    def refuse(dir):
        if Path(dir).resolve() == folder.resolve():
            raise PermissionError(13, "Permission denied")
        return temporary_file(dir=dir)

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)


@pytest.mark.parametrize("option", ["--results", "--checkpoint", "--save_model", "--plot", "--write"])
@pytest.mark.parametrize("place", ["read-only", "missing", "dangling link", "circular link"])
def test_what_cannot_be_written_is_found_before_training(tmp_path, monkeypatch, capsys, option, place):
    folder = tmp_path / "folder"
    if place == "read-only":
        folder.mkdir()
        read_only(monkeypatch, folder)
    if place.endswith("link"):
        folder.symlink_to(folder if place == "circular link" else tmp_path / "nowhere" / "deeper")
    path = folder / "a.png" if option != "--results" else folder / "results" if place == "missing" else folder
    given = [option, str(path)]
    assert main(["--report", str(tmp_path), *given] if option == "--write" else ["--demo", *given]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and str(folder) in err
