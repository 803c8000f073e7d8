"""The printed row, and settings as text."""

import shlex
from dataclasses import replace

from helpers import made_up_confusion, made_up_record

from additional_experiments import parse_args
from runner.console import Console
from runner.results.report import print_row, row_cells
from runner.rows import ROWS
from runner.wording import changed_options, command_line, describe_settings, markdown_table, quoted


def test_settings_in_words():
    assert describe_settings({}) == "last block, last token"
    assert describe_settings({}, dict(trainable_layers="all")) == "last token"  # as the heading of its table says
    demo = changed_options(parse_args(["--demo", "--num_epochs", "2"])[0])
    assert describe_settings(demo) == "gpt2-nano, random weights, all layers, epochs 2, lr 0.0005, sample data"
    assert len({describe_settings(row.options) for row in ROWS.values()}) == len(ROWS)
    assert describe_settings(dict(weights="file 12ab34cd")) == "file 12ab34cd weights"
    assert describe_settings(dict(learning_rate=1.2345678e-05, weight_decay=1.0)) == "lr 1.2345678e-05, weight decay 1"


def test_a_printed_command_can_be_pasted():
    assert quoted("results/a-1") == "results/a-1" and quoted(r"D:\runs") == r"D:\runs"
    assert quoted("my results") == '"my results"' and command_line(dict(weights="a b")) == '--weights "a b"'
    assert [shlex.split(quoted(text)) for text in ('$HOME "x"', "a`b", "it's $1")] == [
        ['$HOME "x"'],
        ["a`b"],
        ["it's $1"],
    ]
    assert "'" in quoted("$HOME x")


def test_tables_are_markdown_whatever_is_in_them():
    lines = markdown_table(["a", "b"], [["x|y", "<b>\x1b[1m"], [1, "z" * 200]])
    assert lines[2:] == ["| x\\|y | &lt;b>\\x1b[1m |", f"| 1    | {'z' * 200} |"]
    lines = markdown_table(["long title", "b"], [["two\nlines", 1]], align=False)
    assert lines == ["| long title | b |", "| --- | --- |", "| two lines | 1 |"]


def record(number, seed=123):
    mistakes = [made_up_confusion(dict.fromkeys(range(seed - 123), 0.9), totals) for totals in ((520, 520), (75, 74))]
    confusions = dict(train=mistakes[0], validation=mistakes[1], test=made_up_confusion({1: 0.5, seed - 100: 0.5}))
    fields = dict(seed=seed, minutes=ROWS[number].minutes, device_name="NVIDIA A100-SXM4-40GB")
    fields |= dict(tokens_per_message=1024 if number == 13 else 120, confusions=confusions)
    return made_up_record(**ROWS[number].options, **fields)


def printed(records, capsys):
    print_row(records, Console())
    return capsys.readouterr().out.splitlines()


def test_row_under_the_published_figures(capsys):
    assert printed([record(1)], capsys)[1:] == [
        "Published, row 1: training 96.63%, validation 99.33%, test 95.00%; 0.28 minutes on an A100",
        "",
        "| Row | Model | Weights | Position | Trained | Context | Other options | Train acc "
        "| Val acc | Test acc | Minutes | CPU/GPU |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| 1 | gpt2-small | pretrained | last | last_block | 120 | - | 100.00% | 100.00% | 99.33% | 0.28 "
        "| A100-SXM4-40GB |",
    ]


def test_rows_fit_140_columns_also_as_means_and_differ_in_more_than_their_numbers(capsys):
    for seeds in ((123,), (123, 124, 130)):
        rows = [printed([record(number, seed) for seed in seeds], capsys) for number in ROWS]
        assert max(len(line) for lines in rows for line in lines) <= 140
        assert len({str(lines[-1].split(" | ")[1:7]) for lines in rows}) == len(ROWS)


def test_the_row_names_all_that_differs_from_row_1():
    changes = dict(trainable_layers="lora", lora_alpha=16.0, average_embeddings=True, no_padding=True, batch_size=1)
    changes |= dict(accumulation_steps=8, num_epochs=2, learning_rate=1e-3, weight_decay=0.0, ignore_index=1)
    cells = row_cells([replace(made_up_record(**changes, dataset="sample"), precision="bf16", seed=5)])
    assert (cells["Row"], cells["Trained"], cells["Position"]) == ("-", "lora 8/16", "mean of real")
    words = "batch 1×8, epochs 2, lr 0.001, weight decay 0, ignore 1, sample data, bf16, seed 5"
    assert (cells["Context"], cells["Other options"]) == ("unpadded", words)
    cells = row_cells([record(17, seed) for seed in (123, 124, 125)])
    assert (cells["Row"], cells["Context"], cells["Other options"]) == ("17, n=3", "120", "no causal mask")
    assert (cells["Train acc"], cells["Test ± SD of seeds"]) == ("99.90±0.1", "99.33±0.0")
    assert row_cells([record(17, seed) for seed in (123, 124, 130)])["Val acc"] == "98.21±2.5"  # divisor n - 1
