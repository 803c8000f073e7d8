"""Which records are runs of one configuration, which configurations are rows of one table, and what they answer."""

import numpy as np
import pytest
from helpers import made_up_confusion, made_up_record

from runner.results.summary import place, samples_of, summarize
from runner.rows import QUESTIONS, ROWS

MEDIUM = dict(model_size="gpt2-medium (355M)")
NANO = dict(model_size="gpt2-nano (7M)", weights="random", dataset="sample", learning_rate=5e-4)


def row(number, wrong=(), **changes):
    return made_up_record(wrong, **ROWS[number].options | changes)


def nano(number, wrong=(), **changes):
    """A Record of a row's options at the nano size, on the sample, from random weights."""
    return row(number, wrong, **NANO | dict(data="sample", data_sha256="sample") | changes)


def names(table):
    return [group.name for group in table.groups]


def test_the_published_rows_are_the_first_table():
    summary = summarize([row(16), row(1, seed=1), row(12), row(1, seed=2), row(1, precision="bf16"), nano(1), nano(2)])
    published, other = summary.tables
    assert published.title == "" and names(published) == ["1", "12", "16"]
    assert [len(group.records) for group in published.groups] == [2, 1, 1]
    assert published.below == "Not run: rows 2–11, 13–15, 17–19."
    assert [group.title for group in summary.others] == ["row 1, bf16"]
    assert other.title == "gpt2-nano, random weights, sample data, lr 0.0005" and names(other) == ["1, 6–8", "2"]


def test_rows_that_differ_in_nothing_but_size_and_weights_are_one_line_at_another_size():
    [table] = summarize([nano(number) for number in ROWS if number not in (6, 7, 8, 9, 10)]).tables
    assert table.below == "" and names(table)[0] == "1, 6–8" and "5, 9–10" in names(table) and len(table.groups) == 14


@pytest.mark.parametrize(
    "options, numbers, rest",
    [
        (dict(num_epochs=2), (1,), dict(num_epochs=2)),
        (dict(num_epochs=2, trainable_token_pos="flexible"), (16,), dict(num_epochs=2)),
        (MEDIUM | dict(num_epochs=2), (6,), dict(num_epochs=2)),
        (dict(num_epochs=2, weights="random", trainable_layers="all"), (10,), dict(num_epochs=2)),
        (dict(context_length=64, trainable_token_pos="flexible"), (16,), dict(context_length=64)),
        (MEDIUM | dict(trainable_layers="all"), (5, 9, 10), MEDIUM),
        (dict(weights="w 1234"), (1, 6, 7, 8), dict(weights="w 1234")),
        (dict(data="own", trainable_layers="lora"), (1,), dict(data="own", trainable_layers="lora")),
        *((row.options, (number,), {}) for number, row in ROWS.items()),
    ],
)
def test_what_a_run_has_beyond_its_row_is_a_table(options, numbers, rest):
    found, _, of_table = place(options)
    assert (found, of_table) == (numbers, rest)


def test_one_row_is_no_table():
    """Else a sweep of learning rates would be a table for each."""
    summary = summarize([row(16, learning_rate=n / 1000) for n in range(1, 9)] + [row(1, lora_rank=4)])
    assert summary.tables == [] and len(summary.others) == 9
    assert [group.title for group in summary.others[-2:]] == ["row 16, lr 0.008", "rank 4"]


def test_other_data_are_told_apart():
    options = [dict(options=ROWS[n].options | dict(data=f"own data {d}"), data_sha256=d) for n in (1, 2) for d in "ab"]
    tables = summarize([made_up_record(**one) for one in options]).tables
    assert [table.title for table in tables] == ["own data a", "own data b"]


# --- seeds ---


@pytest.mark.parametrize("other, told", [([1], None), ([1, 2], "99.33%"), ([3], "99.67%")])
def test_a_seed_counts_once_and_mistakes_that_differ_are_told(other, told):
    summary = summarize([row(1, [1], device_name="A100"), row(1, other, device_name="CPU"), row(1, [1], seed=7)])
    assert [len(group.records) for group in summary.tables[0].groups] == [2]
    torch = summary.records[0].torch
    line = "Row 1, seed 123: mistakes differ, the first counts: test 99.67% on A100, PyTorch "
    assert summary.remarks == ([line + f"{torch}; {told} on CPU, PyTorch {torch}."] if told else [])


def test_notes_are_told():
    assert summarize([row(1, note="a remark", run="x")]).remarks == ["Note of x: a remark"]


def test_the_interval_of_several_seeds_holds_them_all():
    [group] = summarize([row(1, range(n), seed=n) for n in (10, 20, 30)]).tables[0].groups
    low, high = group.interval
    assert low < 90 < 96.67 < high and group.percent == pytest.approx(93.33, abs=0.01)


# --- questions ---


def answers_of(*records):
    return {question.rows: found for table in summarize(records).tables for question, found in table.answers.items()}


def test_questions_of_all_tables_are_corrected_together():
    tables = summarize([row(1, range(30)), row(2, range(80)), nano(1, range(30)), nano(2, range(80))]).tables
    for table in tables:
        [found] = table.answers.values()
        assert found.p_corrected == 2 * found.p and sum(map(len, table.not_compared.values())) == len(QUESTIONS) - 1
    assert list(tables[1].not_compared) == ["not yet run", "the same configuration here"]


def test_a_verdict_in_words():
    assert answers_of(row(1, range(10, 30)), row(2, range(60)))["1–2"].sentence == (
        "worse, -13.33 points (95% interval -17.1 to -9.4), p < 0.001; one run each, 40 messages right only in the "
        "first, 0 only in the second."
    )
    assert answers_of(row(1, [3]), row(18, [3]))["1–18"].sentence.startswith("identical predictions; one run each")


@pytest.mark.parametrize("seeds, words", [((1, 5), "1 and 5 seeds; a verdict"), ((2, 2), "2 seeds each; a verdict")])
def test_too_few_seeds_get_no_verdict(seeds, words):
    runs = [row(n, range(10 * n), seed=seed) for n, count in zip((1, 2), seeds, strict=True) for seed in range(count)]
    sentence = answers_of(*runs)["1–2"].sentence
    assert sentence.startswith("no verdict, -3.33 points (95% interval ") and words in sentence
    assert ", p " not in sentence


def test_rows_are_compared_in_the_same_precision():
    published, bf16 = summarize(
        [row(n, [n + i], precision=p) for i, p in enumerate(("fp32", "bf16")) for n in (1, 2)]
    ).tables
    assert (published.title, bf16.title) == ("", "bf16") and len(published.answers) == len(bf16.answers) == 1


def test_samples_are_made_from_mistakes():
    """Also of messages of which some have no label: the numbers go further than their count."""
    samples = samples_of(*summarize([row(1, [0, 301]), row(2, [301, 302])]).tables[0].groups)
    for sample in samples:
        found, n = np.unique(sample.called, return_counts=True)
        assert (found.tolist(), n.tolist()) == ([-1, 0, 1], [298, 1, 1])
    assert (samples[0].correct != samples[1].correct).sum() == 2


def test_macro_f1_is_shown_where_accuracy_says_little():
    rare = made_up_confusion({number: 0.9 for number in range(1, 12, 2)}, totals=(294, 6))
    confusions = dict.fromkeys(("train", "validation", "test"), rare)
    groups = [summarize([row(1, **change)]).tables[0].groups[0] for change in ({}, dict(confusions=confusions))]
    assert [group.macro_f1 for group in groups] == ["", "0.495"]
