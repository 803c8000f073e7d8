"""The table: its rows as commands, what makes a run one of them, settings as text."""

import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest
from helpers import made_up_record

from additional_experiments import DEFAULTS, ROWS, Experiment, parse_args
from gpt_download import find_weights
from runner.results import table
from runner.results.accuracy import Accuracy

UCI = SimpleNamespace(name="uci", sha256="")


def parse(*options):
    return parse_args([str(option) for option in options])[0]


def row_number(experiment):
    return table.row_number(experiment, UCI, find_weights(experiment.weights, experiment.model_size), ROWS)


def test_defaults_are_those_of_row_1():
    assert parse() == Experiment() == parse("--row", 1)
    assert row_number(parse("--seed", 7, "--device", "cpu", "--data_dir", "elsewhere", "--precision", "bf16")) == 1


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
    assert row_number(experiment) == number


def test_a_run_on_other_data_is_no_row():
    for name in ("own", "sample"):
        data = SimpleNamespace(name=name)
        assert table.row_number(Experiment(), data, find_weights("pretrained", "gpt2-small (124M)"), ROWS) is None


def test_configuration_in_words():
    own = parse("--seed", 5, "--device", "cpu", "--data_dir", "d")
    assert (
        table.describe_configuration(own, SimpleNamespace(name="own", sha256="01234567" * 8))
        == "last block, last token, own data 01234567"
    )
    assert table.describe_configuration(parse(), UCI) == "last block, last token"
    demo = "gpt2-nano (7M), random weights, all, learning rate 0.0005, sample data"
    assert table.describe_configuration(parse("--demo"), SimpleNamespace(name="sample")) == demo
    for number, row in ROWS.items():
        assert parse_args(shlex.split(table.command_line(row.options)))[0] == parse("--row", number)
        differing = table.describe_configuration(parse("--row", number), UCI).split(", ")
        assert set(differing) == set(table.describe_settings(row.options).split(", ")) - {
            "alpha 8"
        }  # row 12 names what is the default


def test_published_figures():
    assert {n: row.published for n, row in ROWS.items() if n in (1, 9, 15)} == {
        1: "96.63% / 99.33% / 95.00%, 0.28 min (A100)",
        9: "100.00% / 98.66% / 98.67%, 8.12 min (A100)",
        15: "99.33% / 98.66% / 98.33%, 1.70 min (A100)",
    }


# --- the printed row ---

RECORD = made_up_record(
    "x", train=Accuracy(1005, 1040), validation=Accuracy(148, 149), minutes=0.284, device_name="A100"
)


def row(record):
    return table.markdown_line(table.row_cells(record, ROWS, DEFAULTS).values())


def test_row_with_the_published_figures():
    assert row(RECORD) == (
        "| 1 | gpt2-small (124M) | pretrained | last | last_block | longest train ex. (120) | 96.63% | 99.33% | 95.00% "
        "| 0.28 min | A100 | - | 96.63% / 99.33% / 95.00%, 0.28 min (A100) |"
    )


def test_row_is_a_markdown_table_whatever_is_in_it():
    odd = replace(RECORD, row=None, settings=RECORD.settings | dict(weights="a|b.safetensors"))
    header, rule = table.markdown_header(table.row_cells(odd, ROWS, DEFAULTS)).splitlines()
    assert row(odd).startswith("| - |") and row(odd).endswith("| - |") and "a\\|b.safetensors" in row(odd)
    assert header.count("|") == rule.count("|") == row(odd).replace("\\|", "").count("|")


def test_row_names_all_that_differs_from_the_defaults():
    changes = dict(trainable_layers="lora", lora_alpha=16.0, average_embeddings=True, no_padding=True, seed=5)
    changes |= dict(context_length=64, batch_size=1, accumulation_steps=8, num_epochs=2, learning_rate=1e-3)
    changes |= dict(weight_decay=0.0, ignore_index=1, precision="bf16", disable_causal_mask=True)
    cells = table.row_cells(made_up_record("x", row=None, tokens_per_message=64, data="own", **changes), ROWS, DEFAULTS)
    assert cells["Trainable layers"] == "lora (rank 8, alpha 16)"
    assert cells["Trainable token position"] == "all real tokens" and cells["Context length"] == "64, no padding"
    assert cells["Remarks"] == (
        "averaged outputs, no causal mask, batch size 1, accumulation 8, epochs 2, learning rate 0.001, "
        "weight decay 0, ignore index 1, bf16, seed 5, your own data (numbers do not compare with the table)"
    )


def test_row_of_several_seeds():
    records = [replace(RECORD, test=Accuracy(correct, 300)) for correct in (282, 285, 288)]
    line = table.markdown_line(table.mean_row_cells(records, ROWS, DEFAULTS).values())
    assert "| 95.00% ± 1.00 | 0.28 ± 0.00 min |" in line
    assert "| mean ± standard deviation of 3 seeds |" in line
