"""Which records are runs of the same configuration, of which row of which table, and on the same messages."""

import numpy as np
import pytest
from helpers import made_up_confusion, made_up_record, made_up_run

from additional_experiments import DEFAULTS, QUESTIONS, ROWS
from runner.results.accuracy import Confusion, Mistake
from runner.results.results_file import append_record, read_records
from runner.results.summary import Group, answer_questions, arrange, compare_groups, paired_samples


def nano(run, number, wrong=(), **changes):
    """A Record of a row's options at the nano size, on the sample, from random weights."""
    options = {name: value for name, value in ROWS[number].options.items() if name not in ("model_size", "weights")}
    settings = dict(model_size="gpt2-nano (7M)", weights="random", dataset="sample", learning_rate=5e-4) | options
    return made_up_run(run, wrong, row=None, configuration=f"nano {number}", data="sample", **settings | changes)


def test_the_rows_at_another_size_are_a_table_of_their_own(tmp_path):
    """Nineteen lines, also for rows that differ from others in what the table chooses; also from a file."""
    differ = [number for number in ROWS if number not in (6, 7, 8, 9, 10)]
    for number in differ:
        append_record(tmp_path / "results.csv", nano(str(number), number))
    records, _ = read_records(tmp_path / "results.csv")
    standing = arrange(records, ROWS, DEFAULTS)
    [table] = standing.variants
    assert table.title == "gpt2-nano (7M), random weights, sample data, learning rate 0.0005"
    assert [number for number in ROWS if table.group(number) is None] == [] and standing.others == []
    assert table.group(6) is table.group(1) and table.group(10) is table.group(5) is table.group(9)
    assert table.group(12) is not table.group(11)
    assert len(standing.groups) == len(differ)


def test_other_sizes_rates_and_data_are_other_tables():
    changes = (dict(), dict(learning_rate=1e-3), dict(data_sha256="other"), dict(seed=7))
    records = []
    for number, change in enumerate(changes):
        for row in (1, 2):
            records.append(nano(f"{number} {row}", row, **change))
            object.__setattr__(records[-1], "configuration", f"{number} {row}")
    tables = arrange(records, ROWS, DEFAULTS).variants
    title = "gpt2-nano (7M), random weights, sample data, learning rate 0.0"
    assert [table.title for table in tables] == [f"{title}005, data 0123", f"{title}01", f"{title}005, data other"]
    assert [record.seed for record in tables[0].group(1).records] == [123, 7]


def test_one_row_is_no_table():
    """Else a sweep of learning rates would be a table for each."""
    records = [nano(f"{n}", 1, learning_rate=n / 1000) for n in range(1, 9)]
    for number, record in enumerate(records):
        object.__setattr__(record, "configuration", f"{number}")
    standing = arrange(records, ROWS, DEFAULTS)
    assert standing.tables == [] and len(standing.others) == 8


def test_a_run_of_an_earlier_version_is_healed_by_the_same_run():
    old, new = made_up_record("old"), made_up_run("new", range(15))
    [group] = arrange([old, new], ROWS, DEFAULTS).groups.values()
    assert group.records == [new] and group.tested == [new]


def test_rows_are_compared_in_the_same_precision():
    records = [made_up_run(f"{row} {p}", range(row), row=row, precision=p) for row in (1, 2) for p in ("fp32", "bf16")]
    standing = arrange([records[0], records[1], records[3]], ROWS, DEFAULTS)
    a, b = standing.table.pair(1, 2)
    assert a.records == [records[1]] and b.records == [records[3]]
    standing = arrange([records[0], records[3]], ROWS, DEFAULTS)
    assert compare_groups(*standing.table.pair(1, 2))[1] == "in fp32 and bf16"


def test_other_mistakes_on_the_same_messages_are_not_identical():
    """Of three classes: wrong in another way."""
    records = []
    for row, called in ((1, 1), (18, 2)):
        record = made_up_run(f"{row}", [], row=row)
        record.confusions["test"] = Confusion((100, 100, 100), (Mistake(0, 0, called, 0.9),))
        object.__setattr__(record, "test", record.confusions["test"].accuracy)
        records.append(record)
    standing = arrange(records, ROWS, DEFAULTS)
    found, _ = compare_groups(*standing.table.pair(1, 18))
    assert found.difference == 0 and not found.is_identical


def test_other_options_are_other_runs():
    standing = arrange([nano("a", 1, num_epochs=2)], ROWS, DEFAULTS)
    assert standing.variants == [] and len(standing.others) == 1


def test_questions_of_each_table_are_answered_and_corrected_together():
    wrong = {1: range(30), 2: range(80)}
    records = [made_up_run(f"{row}", numbers, row=row) for row, numbers in wrong.items()]
    records += [nano(f"nano {row}", row, numbers) for row, numbers in wrong.items()]
    answers = answer_questions(arrange(records, ROWS, DEFAULTS), QUESTIONS)
    compared = [answer for answer in answers if answer.comparison]
    assert len(answers) == 34
    same = "the same configuration here"
    assert {answer.remark for answer in answers if not answer.comparison} == {"not yet run", same}
    assert [answer.comparison.p_corrected for answer in compared] == [2 * answer.comparison.p for answer in compared]


def test_what_is_not_on_the_same_messages_is_not_compared():
    a, b = made_up_run("a", [1], data_sha256="1"), made_up_run("b", [2], row=2, data_sha256="2")
    standing = arrange([a, b], ROWS, DEFAULTS)
    assert compare_groups(standing.table.group(1), standing.table.group(2)) == (None, "on other messages")


def test_runs_of_an_earlier_version_are_not_compared():
    standing = arrange([made_up_record("a"), made_up_run("b", [2], row=2)], ROWS, DEFAULTS)
    found, remark = compare_groups(standing.table.group(1), standing.table.group(2))
    assert found is None and remark == "run by an earlier version, which did not record the single mistakes"


def test_runs_on_other_devices_are_compared_and_it_is_said():
    a, b = made_up_run("a", [1], device_name="CPU"), made_up_run("b", [2], row=2, device_name="A100")
    standing = arrange([a, b], ROWS, DEFAULTS)
    found, remark = compare_groups(standing.table.group(1), standing.table.group(2))
    assert found.only == (1, 1) and remark == "on CPU and A100"


def test_samples_are_made_from_mistakes():
    """Also of messages of which some have no label: the numbers go further than their count."""
    a, b = made_up_run("a", [0, 301]), made_up_run("b", [301, 302])
    first, second = paired_samples(Group("a", [a]), Group("b", [b]))
    assert first.correct.shape == second.correct.shape == (1, 300)
    assert (first.correct & ~second.correct).sum() == (second.correct & ~first.correct).sum() == 1
    assert np.array_equal(first.correct.sum(axis=1), [298])


def test_a_comparison_of_what_was_written_and_read_is_that_of_what_was_run(tmp_path):
    records = [made_up_run(f"{n}", range(3 * n, 40), seed=n % 2, row=1 + n // 2) for n in range(4)]
    for record in records:
        append_record(tmp_path / "results.csv", record)
    read, _ = read_records(tmp_path / "results.csv")
    for before, after in zip(records, read, strict=True):
        assert after.confusions == before.confusions
        assert all(after.confusions[s].accuracy == getattr(before, s) for s in ("train", "validation", "test"))
    answers = [answer_questions(arrange(some, ROWS, DEFAULTS), QUESTIONS)[0].comparison for some in (records, read)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("n", [0, 1, 100])
def test_confusions_survive_the_file(tmp_path, n):
    record = made_up_run("x", [])
    record.confusions["train"] = made_up_confusion({number: 0.5 for number in range(n)})
    object.__setattr__(record, "train", record.confusions["train"].accuracy)
    append_record(tmp_path / "results.csv", record)
    [read], damaged = read_records(tmp_path / "results.csv")
    assert damaged == [] and read.confusions == record.confusions
