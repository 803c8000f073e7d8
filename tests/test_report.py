"""The report as text and as files."""

import csv
import json
import os
from pathlib import Path

import pytest
from helpers import made_up_confusion, made_up_record
from test_summary import baseline, nano, row

from additional_experiments import main
from runner.data.datasets import Duplicates
from runner.results import report
from runner.results.records import write_record
from runner.results.report import as_text
from runner.results.summary import summarize
from runner.rows import ROWS


def lines_of(*records):
    return as_text(summarize(records)).splitlines()


def test_the_report_is_tables_of_100_columns_with_conclusions():
    records = [row(n, range(n, n + 20 + seed), seed=seed, note="x " * 60) for n in ROWS for seed in (1, 2, 3)]
    records += [nano(n, range(n), device_name="a" * 200) for n in ROWS]
    lines = lines_of(*records, row(12, precision="bf16"), row(1, lora_rank=4), baseline())
    assert max(len(line) for line in lines if "no padding, batch size 1, " not in line) <= 100
    assert "| 16  | 3 | 92.67 [89.1–95.2] | 92.62  | 98.33 outside | 100.00 | flexible token |" in lines
    assert "|     | 1 | 97.67 [95.3–98.9] | 98.32  |               | 100.00 | linear SVM |" in lines
    assert "## Rows with gpt2-nano, random weights, sample data, lr 0.0005" in lines
    assert "| 1 | 100.00 [98.7–100.0] | 100.00 | 100.00 | rank 4 |" in lines[lines.index("## Other runs") :]
    text = " ".join(" ".join(lines_of(row(1, range(10, 30)), row(2, range(60)))).split())
    assert "### Conclusions These single runs can show a difference of about " in text
    assert "- 1–2: Does the first token serve as well as the last? Row 2 is 13.33 points worse (95% interval" in text
    assert "Under the causal mask the first token sees only itself" in text
    assert "Which is best? Row 1" in text and "Not run: rows 3, 4, 5" in text


def test_data_without_labels_has_a_report():
    """Of which nothing can be said: "n/a" in every format, and no error."""
    nothing = dict.fromkeys(("train", "validation", "test"), made_up_confusion({}, totals=(0, 0)))
    changes = dict(confusions=nothing, duplicates=dict(validation=Duplicates(), test=Duplicates()))
    summary = summarize([row(n, seed=seed, **changes) for n in (1, 2) for seed in (1, 2)])
    text = as_text(summary)
    assert "| 1   | 2 | n/a  | n/a    |" in text and "### Conclusions" not in text
    for suffix in (".html", ".csv", ".tex", ".svg"):
        report.write_report(Path(f"out{suffix}"), summary)
        assert "nan" not in Path(f"out{suffix}").read_text(encoding="utf-8") and "0/0" not in Path(
            "out.html"
        ).read_text(encoding="utf-8")
    [line, *_] = csv.DictReader(open("out.csv", newline="", encoding="utf-8"))
    assert (line["unseen.correct"], line["unseen.total"]) == ("n/a", "0")


def test_texts_from_files_are_escaped():
    text = "\x1b]0;title\x07 <script> a|b \u202e"
    fields = dict(configuration=text, device_name=text, note=text)
    table = [made_up_record([n], options=ROWS[n].options | dict(data=text), **fields) for n in (1, 16)]
    differing = [made_up_record([n], options=dict(data=text, num_epochs=3), **fields) for n in (1, 2)]
    shown = " ".join(" ".join(lines_of(*table, *differing)).split())
    assert shown.isprintable() and "<script>" not in shown
    assert shown.count("\\x1b]0;title\\x07 &lt;script> a|b \\u202e") > 5


def test_the_report_from_the_command_line(options, capfd):
    assert main([*options, "--plot", "run.png", "--note", "=1+1"]) == 0
    Path("results/other.json").write_text("{}")
    files = [f"out{suffix}" for suffix in (".html", ".md", ".tex", ".svg", ".pdf", ".png", ".csv")]
    capfd.readouterr()
    assert main(["--report", "--write", *files]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("Test: accuracy in percent") and "gpt2-tiny, random weights, " in out
    assert err == "results/other.json is no record of a run (KeyError: 'version'); skipped\n"
    assert [f"Written: {name}" for name in [*files, "out-conclusions.csv"]] == out.splitlines()[-8:]
    assert Path("out.md").read_text() == out[: out.index("Written: ")]
    assert main(["--baseline", "--dataset", "sample", "--quiet"]) == 0  # it has no seed; that of a run stays 123
    assert main(["--report", "--write", "both.csv"]) == 0
    assert {line["seed"] for line in csv.DictReader(open("both.csv", newline=""))} == {"123", ""}
    [line] = csv.DictReader(open("out.csv", newline=""))
    [record] = (json.loads(path.read_text()) for path in Path("results").glob("*seed123*.json"))
    assert (line["settings.num_epochs"], line["note"]) == ("2", "=1+1")
    assert line["test.correct"] == str(record["test"]["correct"]) and not any("confusions" in name for name in line)
    assert Path("out.tex").read_text().count(r" \\") == 2 and "own data" in Path("out.tex").read_text()
    for name, begin in {".html": b"<!DOCTYPE", ".svg": b"<?xml", ".pdf": b"%PDF", ".png": b"\x89PNG"}.items():
        assert Path(f"out{name}").read_bytes().startswith(begin)


def test_a_conclusion_is_a_line_of_a_csv_and_of_a_table_in_latex():
    summary = summarize([row(1, range(10, 30)), row(2, range(10, 38)), row(18, range(10, 30), num_epochs=9)])
    report.write_report(Path("a.b.csv"), summary)
    [line] = csv.DictReader(open("a.b-conclusions.csv", newline="", encoding="utf-8"))
    assert (line["rows"], line["verdict"], line["subject"]) == ("1–2", "worse", "Row 2")
    numbers = [float(line[name]) for name in ("difference", "low", "high", "p")]
    assert numbers == pytest.approx([-8 / 3, -4.57, -0.725, 2 * 0.5**8], abs=0.005)
    report.write_report(Path("a.tex"), summary)
    lines = Path("a.tex").read_text(encoding="utf-8").splitlines()
    verdict = r"1–2 & Does the first token serve as well as the last? & worse & -2.67 & -4.6 to -0.7 & 0.0078 \\"
    assert verdict in lines
    assert lines[2] == r"\begin{tabular}{@{}rrrrr>{\raggedright\arraybackslash}p{0.26\textwidth}@{}}"


def test_a_note_that_is_not_utf8_is_escaped_in_every_file():
    """As a shell gives it to Python: a byte of Latin-1."""
    note = os.fsdecode(b"caf\xe9")
    summary = summarize([made_up_record([1], note=note, options=dict(weights=note), row=None, configuration=note)])
    for suffix in (".html", ".md", ".csv", ".tex", ".svg"):
        report.write_report(Path(f"out{suffix}"), summary)
    for suffix in (".html", ".md", ".csv"):
        assert r"caf\udce9" in Path(f"out{suffix}").read_text(encoding="utf-8")


def test_folders_are_named(tmp_path, capfd):
    for name, number in (("a", 1), ("b", 2), ("c", 3)):
        write_record(tmp_path / name, row(number))
    assert main(["--report", str(tmp_path / "a"), str(tmp_path / "c")]) == 0
    out = capfd.readouterr().out
    assert "| 1   |" in out and "| 3   |" in out and "| 2   |" not in out
    assert main(["--report"]) == 2 and "--report results: there is no such folder" in capfd.readouterr().err
    Path("results").mkdir()
    assert main(["--report"]) == 0
    assert " ".join(capfd.readouterr().out.split()).startswith("There are no runs. This command makes one")
