"""The report as text: the tables, and what can be concluded."""

import time
from pathlib import Path

import pytest
from helpers import made_up_record, made_up_run

from additional_experiments import DEFAULTS, QUESTIONS, ROWS, main
from runner.results import report
from runner.results.accuracy import Accuracy
from runner.results.results_file import append_record, read_records
from runner.results.summary import answer_questions, arrange

FIRST_ROWS = {number: ROWS[number] for number in (1, 2, 3)}


def six_records(path):
    append_record(path, made_up_record("a"))
    append_record(path, made_up_record("b", seed=124, test=Accuracy(291, 300), minutes=4.5))
    append_record(path, made_up_record("c", row=3))
    for run, seed in (("d", 123), ("e", 124), ("again", 124)):
        append_record(path, made_up_record(run, row=None, configuration="2 epochs", num_epochs=2, seed=seed))
    return read_records(path)[0]


def standing_of(*records):
    return arrange(records, FIRST_ROWS, DEFAULTS)


def lines_of(*records, rows=FIRST_ROWS, is_compact=False):
    standing = arrange(records, rows, DEFAULTS)
    questions = [question for question in QUESTIONS if question.a in rows and question.b in rows]
    return report.lines_of(standing, answer_questions(standing, questions), rows, is_compact)


def test_report_in_markdown(tmp_path):
    header, rule, first, third, _, missing, *rest = lines_of(*six_records(tmp_path / "r.csv"))
    assert header.count("|") == rule.count("|") == first.count("|") == third.count("|")
    both = Accuracy(288, 300).bounds  # the mean of two runs on the same 300 messages
    assert "| 2 | 95.00% ± 0.00 [91.9–96.9]; 96.63, -1.63, inside | 95.00% ± 0.00 [91.9–96.9]; 99.33" in first
    assert f"| 96.00% ± 1.41 [{both}]; 95.00, +1.00, inside | 4.00 ± 0.71 min; 0.28 |" in first
    assert "| 1 | 95.00% [91.9–96.9]; 78.65, +16.35, outside |" in third and "| 3.50 min; 0.25 |" in third
    assert missing == "Not run: rows 2."
    [others] = [line for line in rest if line.startswith("| Other runs | Runs | Training acc |")]
    # the third has the seed and the result of the second: nothing new
    assert (
        rest[rest.index(others) + 1].startswith("| ---")
        and "| 2 | 95.00% ± 0.00 [91.9–96.9] |" in rest[rest.index(others) + 2]
    )


def test_report_on_a_terminal_fits_100_columns():
    records = [made_up_record(str(n), row=n, device_name="a" * 200) for n in ROWS]
    records += [
        made_up_record("bf16", row=12, precision="bf16"),
        made_up_record("x", row=None, configuration="y" * 200),
    ]
    records += [
        made_up_record(f"nano {n}", row=None, model_size="gpt2-nano (7M)", **row.options)
        for n, row in ROWS.items()
        if "model_size" not in row.options
    ]
    records += [made_up_run(f"run {n}", range(n), row=n, seed=7) for n in ROWS]
    lines = lines_of(*records, rows=ROWS, is_compact=True)
    assert max(map(len, lines)) <= 100 and any(line.startswith("- 1–2: ") for line in lines)
    assert lines[0].split() == ["row", "options", "n", "test", "accuracy", "published"]
    [line] = [line for line in lines if line.startswith("       16 ")]
    assert line.split("  ")[-1] == "98.33 outside"


@pytest.mark.parametrize("is_compact", [True, False])
def test_rows_that_were_not_run_are_one_line(is_compact):
    lines = lines_of(made_up_record("a"), made_up_record("b", row=16), rows=ROWS, is_compact=is_compact)
    assert "Not run: rows 2–15, 17–19." in lines and not any("missing" in line for line in lines)


def test_a_seed_counts_once_on_whatever_device():
    two, four = (made_up_record(name, device_name=f"CPU, {name} threads") for name in ("2", "4"))
    lines = lines_of(two, four)
    assert lines[2].startswith("| 1 | - | 1 | 95.00% [91.9–96.9]; ") and standing_of(two, four).disagreements == []


def test_results_that_differ_by_device_are_told_and_are_no_variation_of_seeds():
    cpu, gpu = made_up_record("a", device_name="CPU"), made_up_record("b", device_name="A100", test=Accuracy(280, 300))
    lines = lines_of(cpu, gpu, made_up_record("c", seed=124))
    assert lines[2].startswith("| 1 | - | 2 | 95.00% ± 0.00 [91.9–96.9]; ") and "| CPU" in lines[2]
    assert lines[-1] == (
        "Row 1, seed 123: results differ by device or version, the first counts: "
        "test 95.00% on CPU, PyTorch 2.13.0; test 93.33% on A100, PyTorch 2.13.0"
    )


def test_runs_from_other_weights_files_are_no_disagreement():
    changes = dict(row=None, num_epochs=2, configuration="2 epochs")
    records = [
        made_up_record(sha, weights_sha256=sha, test=Accuracy(n, 300), **changes) for sha, n in (("a", 1), ("b", 2))
    ]
    standing = standing_of(*records)
    assert standing.disagreements == []
    assert [group.name for group in standing.others] == ["2 epochs, weights a", "2 epochs, weights b"]


def test_data_without_labels_has_a_report():
    """Of which nothing can be said: not a number, and no error."""
    changes = dict(row=None, num_epochs=2, test=Accuracy(0, 0))
    records = [made_up_record(str(seed), seed=seed, **changes) for seed in (123, 124)]
    assert any("nan%" in line for line in lines_of(*records))
    assert any("nan" in line for line in lines_of(*records, is_compact=True))


def test_precisions_are_never_pooled():
    records = [made_up_record(p, precision=p, test=Accuracy(n, 300)) for p, n in (("fp32", 285), ("bf16", 282))]
    other = dict(row=None, configuration="2 epochs", num_epochs=2)
    records += [made_up_record(f"other {p}", precision=p, **other) for p in ("fp32", "bf16", "tf32")]
    lines = lines_of(*records)
    assert lines[2].startswith("| 1 | - | 1 |") and "95.00% [" in lines[2]
    assert lines[3].startswith("| 1, bf16 | - | 1 |") and "94.00% [" in lines[3]
    names = [group.name for group in standing_of(*records).others]
    assert names == ["2 epochs", "2 epochs, bf16", "2 epochs, tf32"]


def test_comparisons_are_told():
    a, b = made_up_run("a", range(10, 30)), made_up_run("b", range(60), row=2)
    lines = lines_of(a, b)
    [line] = [line for line in lines if line.startswith("- 1–2: ")]
    assert line == (
        "- 1–2: Does the first token serve as well as the last? Row 2: worse: -13.33 points (95% -17.6 to -9.9), "
        "p < 0.001; of these two runs; only row 1 right: 40, only row 2: 0. (published -20.00)"
    )
    assert any("Holm" in line for line in lines) and "Not compared (not yet run): 1–3." in lines


def test_row_18_is_told_as_identical():
    a, b = made_up_run("a", range(5)), made_up_run("b", range(5), row=18)
    lines = lines_of(a, b, rows=ROWS)
    assert (
        "- 1–18: Does the label that the loss ignores matter? Row 18: identical predictions. (published +0.00)" in lines
    )


def test_report_and_pictures_from_the_command_line(options, capfd):
    assert main([*options, "--plot", "run.png"]) == 0
    capfd.readouterr()
    with open("results.csv", "a") as file:
        file.write("incomplete")
    assert main(["--report", "--report_plot", "report.svg", "--report_page", "report.html"]) == 0
    out, err = capfd.readouterr()
    assert "| Other runs | Runs |" in out and "Not run: rows 1–19." in out
    assert err == "results.csv: no complete record on line 3; skipped\n"
    assert Path("run.png").stat().st_size > 10_000 and "<svg" in Path("report.svg").read_text()
    assert Path("report.html").read_text().startswith("<!DOCTYPE html>")


def test_records_beside_are_read_too(options, capfd):
    """A file of an earlier version stays as it is; what came after it stands beside it."""
    Path("results.csv").write_text(
        "run,row,configuration,seed,minutes,device_name,train_correct,train_total,validation_correct,validation_total,"
        "test_correct,test_total\nold,1,x,123,0.3,A100,1,1,1,1,285,300\n"
    )
    assert main(options) == 0
    assert Path("results-2.csv").exists()
    Path("results-3.csv").write_text("somebody else's\n")
    capfd.readouterr()
    assert main(["--report"]) == 0
    out, err = capfd.readouterr()
    assert "| 1 | - | 1 | 100.00%" in out and "gpt2-tiny" in out and err == ""


@pytest.mark.parametrize("n", [0, 1, 19, 2000])
def test_a_report_takes_less_than_two_seconds(tmp_path, n, capsys):
    path = tmp_path / "results.csv"
    numbers = list(ROWS)
    for run in range(n):
        row = numbers[run % 19]
        append_record(path, made_up_run(str(run), range(row, row + 30), row=row, seed=run // 19)) if run < 40 else None
    if n == 0:
        append_record(path, made_up_record("x"))
        path.write_text(path.read_text().splitlines()[0] + "\n")
    if n > 40:
        lines = path.read_text().splitlines()
        columns = lines[0].split(",")
        for run in range(40, n):  # much faster than one append after the other
            cells = dict(run=str(run), seed=str(run // 19))
            lines.append(renamed(lines[1 + run % 19], columns, cells))
        path.write_text("\n".join(lines) + "\n")
    begin = time.process_time()  # whatever else the machine does
    assert main(["--report", str(path), "--report_page", str(tmp_path / "page.html")]) == 0
    assert time.process_time() - begin < 2
    assert (tmp_path / "page.html").stat().st_size < 1_000_000
    assert capsys.readouterr().err == ""


def renamed(line, columns, cells):
    """A line of a results file with other values in some columns."""
    import csv
    import io

    [row] = csv.reader([line])
    row = [cells.get(column, value) for column, value in zip(columns, row, strict=True)]
    out = io.StringIO()
    csv.writer(out, lineterminator="").writerow(row)
    return out.getvalue()
