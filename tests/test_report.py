"""The report and the pictures."""

import re
from pathlib import Path

import pytest
from helpers import made_up_record

from additional_experiments import ROWS, main
from runner import report
from runner.parsers import IMAGE_FORMATS
from runner.records import Accuracy, History
from runner.results_file import append_record, read_records

FIRST_ROWS = {number: ROWS[number] for number in (1, 2, 3)}


def six_records(path):
    append_record(path, made_up_record("a"))
    append_record(path, made_up_record("b", seed=124, test=Accuracy(291, 300), minutes=4.5))
    append_record(path, made_up_record("c", row=3))
    for run, seed in (("d", 123), ("e", 124), ("again", 124)):
        append_record(path, made_up_record(run, row=None, configuration="gpt2-nano (7M), sample data", seed=seed))
    return report.one_per_seed(read_records(path)[0])[0]


def test_report(tmp_path):
    header, rule, first, second, third, *_, _, others, _, other = report.report(
        six_records(tmp_path / "r.csv"), FIRST_ROWS
    ).splitlines()
    assert header.count("|") == rule.count("|") == first.count("|") == second.count("|") == third.count("|")
    both = Accuracy(288, 300).bounds  # the mean of two runs on the same 300 messages
    assert "| 2 | 95.00% ± 0.00 [91.9–96.9]; 96.63, -1.63, inside | 95.00% ± 0.00 [91.9–96.9]; 99.33" in first
    assert f"| 96.00% ± 1.41 [{both}]; 95.00, +1.00, inside | 4.00 ± 0.71 min; 0.28 |" in first
    assert second == (
        "| 2 | `--trainable_token_pos first` | 0 "
        "| missing; 78.46 | missing; 80.54 | missing; 75.00 | missing; 0.28 | - |"
    )
    assert "| 1 | 95.00% [91.9–96.9]; 78.65, +16.35, outside |" in third and "| 3.50 min; 0.25 |" in third
    assert others.startswith("| Other runs | Runs | Training acc |") and others.count("|") == other.count("|")
    # the third has the seed and the result of the second: nothing new
    assert other.startswith("| gpt2-nano (7M), sample data | 2 | 95.00% ± 0.00 [91.9–96.9] |")


def report_of(*records):
    kept, disagreements = report.one_per_seed(records)
    return report.report(kept, FIRST_ROWS).splitlines(), disagreements


def test_a_seed_counts_once_on_whatever_device():
    two, four = (made_up_record(name, device_name=f"CPU, {name} threads") for name in ("2", "4"))
    lines, disagreements = report_of(two, four)
    assert lines[2].startswith("| 1 | - | 1 | 95.00% [91.9–96.9]; ") and disagreements == []


def test_results_that_differ_by_device_are_told_and_are_no_variation_of_seeds():
    cpu, gpu = made_up_record("a", device_name="CPU"), made_up_record("b", device_name="A100", test=Accuracy(280, 300))
    lines, disagreements = report_of(cpu, gpu, made_up_record("c", seed=124))
    assert lines[2].startswith("| 1 | - | 2 | 95.00% ± 0.00 [91.9–96.9]; ") and "| CPU" in lines[2]
    assert disagreements == [
        "Row 1, seed 123: results differ by device or version, the first counts: "
        "test 95.00% on CPU, PyTorch 2.13.0; test 93.33% on A100, PyTorch 2.13.0"
    ]


def test_runs_from_other_weights_files_are_no_disagreement():
    records = [
        made_up_record(sha, row=None, weights_sha256=sha, test=Accuracy(n, 300)) for sha, n in (("a", 1), ("b", 2))
    ]
    assert report.one_per_seed(records) == (records, [])
    lines, _ = report_of(*records)
    assert [line.split("|")[1:3] for line in lines[-2:]] == [
        [" last block, last token, weights a ", " 1 "],
        [" last block, last token, weights b ", " 1 "],
    ]


def test_data_without_labels_has_a_report():
    """Of which nothing can be said: not a number, and no error."""
    records = [made_up_record(str(seed), seed=seed, row=None, test=Accuracy(0, 0)) for seed in (123, 124)]
    assert "nan%" in report.report(records, FIRST_ROWS).splitlines()[-1]


def test_precisions_are_never_pooled():
    records = [made_up_record(p, precision=p, test=Accuracy(n, 300)) for p, n in (("fp32", 285), ("bf16", 282))]
    other = dict(row=None, configuration="2 epochs")
    records += [made_up_record(f"other {p}", precision=p, **other) for p in ("fp32", "bf16", "tf32")]
    lines, disagreements = report_of(*records)
    assert disagreements == []
    assert lines[2].startswith("| 1 | - | 1 |") and "95.00% [" in lines[2]
    assert lines[3].startswith("| 1, bf16 | - | 1 |") and "94.00% [" in lines[3]
    assert [line.split("|")[1:3] for line in lines[-3:]] == [
        [" 2 epochs ", " 1 "],
        [" 2 epochs, bf16 ", " 1 "],
        [" 2 epochs, tf32 ", " 1 "],
    ]


def test_report_and_pictures_from_the_command_line(options, capfd):
    assert main([*options, "--plot", "run.png"]) == 0
    capfd.readouterr()
    with open("results.csv", "a") as file:
        file.write("incomplete")
    assert main(["--report", "--report_plot", "report.svg"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("| Row | Options |") and out.count("missing; ") == 19 * 4
    assert err == "results.csv: no complete record on line 3; skipped\n"
    assert Path("run.png").stat().st_size > 10_000 and "<svg" in Path("report.svg").read_text()


# --- pictures ---

SIGNATURES = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}


@pytest.mark.parametrize("suffix", IMAGE_FORMATS)
def test_pictures(tmp_path, suffix):
    history = History(
        steps=[0, 50, 100],
        train_losses=[1.0, 0.5, 0.1],
        val_losses=[1.0, 0.6, 0.4],
        train_accuracies=[Accuracy(30, 40)],
        val_accuracies=[Accuracy(35, 40)],
    )
    record = made_up_record("x", history=history)
    report.plot_histories(tmp_path / f"one{suffix}", [record], n_train=847)
    report.plot_histories(tmp_path / f"seeds{suffix}", [record, record], n_train=847)
    report.plot_report(tmp_path / f"report{suffix}", six_records(tmp_path / "r.csv"), FIRST_ROWS)
    report.plot_report(tmp_path / f"nothing{suffix}", [], FIRST_ROWS)
    pictures = [path for path in tmp_path.iterdir() if path.suffix == suffix]
    assert len(pictures) == 4 and all(path.read_bytes().startswith(SIGNATURES[suffix]) for path in pictures)


def test_report_picture_names_each_row(tmp_path):
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):  # letters as letters
        report.plot_report(tmp_path / "report.svg", six_records(tmp_path / "r.csv"), FIRST_ROWS)
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "report.svg").read_text())
    for text in (
        "last block, last token (n\u00a0=\u00a02)   1",
        "first token   2",
        "last layer   3",
        "missing",
        "published",
    ):
        assert text in texts


def test_report_picture_takes_any_path(tmp_path):
    record = made_up_record("x", row=None, configuration="{0} {braces} 100% $x^2$ weights, \\frac")
    report.plot_report(tmp_path / "report.svg", [record], FIRST_ROWS)
    assert "<svg" in (tmp_path / "report.svg").read_text()
