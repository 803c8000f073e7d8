"""The report as text and as files."""

import csv
import time
from pathlib import Path

from helpers import made_up_confusion, made_up_record
from test_summary import nano, row

from additional_experiments import main
from runner.data.datasets import Repeats
from runner.results.records import read_records, write_record
from runner.results.report import as_text
from runner.results.summary import summarize
from runner.rows import ROWS


def lines_of(*records):
    return as_text(summarize(records)).splitlines()


def every_row():
    """Three seeds of each row, in both precisions, of the rows at the nano size, of other runs."""
    records = [row(n, range(n, n + 20 + seed), seed=seed, note="x " * 60) for n in ROWS for seed in (1, 2, 3)]
    records += [nano(n, range(n), device_name="a" * 200) for n in ROWS]
    return [*records, row(12, precision="bf16"), row(1, lora_rank=4), baseline()]


def baseline():
    none = dict(seed=None, row=None, tokens_per_message=None, settings={})
    return made_up_record(range(7), is_baseline=True, configuration="linear SVM", **none)


def test_the_report_is_a_table_of_100_columns():
    lines = lines_of(*every_row())
    assert max(map(len, lines)) <= 110 and max(len(line) for line in lines if not line.startswith("| ")) <= 100
    assert "| 16  | 3 | 92.67 [89.1–95.2] | 92.62  | 98.33 outside | flexible token |" in lines
    assert "## Rows with gpt2-nano, random weights, sample data, lr 0.0005" in lines
    assert "Baseline: linear SVM 97.67 [95.3–98.9]." in lines
    assert any(line.startswith("| 1 | 97.67 ") and line.endswith("| linear SVM |") for line in lines)


def test_questions_have_answers_with_explanations_or_are_one_line():
    text = " ".join(" ".join(lines_of(row(1, range(10, 30)), row(2, range(60)))).split())
    assert "- 1–2: Does the first token serve as well as the last? Row 2: worse, -13.33 points (95% interval" in text
    assert "Published: -20.00. Under the causal mask the first token sees only itself" in text and "p < 0.001;" in text
    assert "The p-value decides." in text and "Not run: rows 3–19." in text
    assert "Not compared (not yet run): 1–3, 1–4," in text


def test_lopsided_classes_have_their_own_figures():
    rare = made_up_confusion({number: 0.9 for number in range(1, 12, 2)}, totals=(294, 6))
    lines = lines_of(row(1, confusions=dict.fromkeys(("train", "validation", "test"), rare)))
    assert "Always the most frequent class: 98.00%." in " ".join(lines)
    assert any("| Macro F1 |" in line for line in lines) and any("| 0.495    |" in line for line in lines)


def test_data_without_labels_has_a_report():
    """Of which nothing can be said: not a number, and no error."""
    nothing = dict.fromkeys(("train", "validation", "test"), made_up_confusion({}, totals=(0, 0)))
    changes = dict(confusions=nothing, repeats=dict(validation=Repeats(), test=Repeats()))
    lines = lines_of(*(row(n, seed=seed, **changes) for n in (1, 2) for seed in (1, 2)))
    assert any("nan" in line for line in lines) and "Not compared (no message has a label): 1–2." in lines


def test_texts_from_files_are_escaped():
    text = "\x1b]0;title\x07 <script> a|b \u202e"
    fields = dict(configuration=text, device_name=text, note=text)
    table = [made_up_record([n], options=ROWS[n].options | dict(data=text), **fields) for n in (1, 16)]
    differing = [made_up_record([n], options=dict(data=text, num_epochs=3), **fields) for n in (1, 2)]
    lines = lines_of(*table, *differing)
    shown = "\n".join(lines)
    assert shown.replace("\n", "").isprintable()
    assert " ".join(shown.split()).count("\\x1b]0;title\\x07 &lt;script> a|b \\u202e") > 5 and "<script>" not in shown


def test_the_report_from_the_command_line(options, capfd):
    assert main([*options, "--plot", "run.png", "--note", "=1+1"]) == 0
    Path("results/other.json").write_text("{}")
    files = [f"out{suffix}" for suffix in (".html", ".md", ".csv", ".tex", ".svg", ".pdf", ".png")]
    capfd.readouterr()
    assert main(["--report", "--write", *files]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("Test: accuracy in percent") and "gpt2-tiny, random weights, " in out
    assert err == "results/other.json is no record of a run (KeyError: 'version'); skipped\n"
    assert [f"Written: {name}" for name in files] == out.splitlines()[-7:]
    assert Path("out.md").read_text() == out[: out.index("Written: ")]
    [line] = csv.DictReader(open("out.csv", newline=""))
    [record] = read_records(["results"])[0]
    assert line["num_epochs"] == "2" and line["note"] == "=1+1" and line["test_correct"] == str(record.test.correct)
    assert Path("out.tex").read_text().count(r"\\") == 2 and "own data" in Path("out.tex").read_text()
    for name, begin in {".html": b"<!DOCTYPE", ".svg": b"<?xml", ".pdf": b"%PDF", ".png": b"\x89PNG"}.items():
        assert Path(f"out{name}").read_bytes().startswith(begin)


def test_folders_are_named(tmp_path, capfd):
    for name, number in (("a", 1), ("b", 2), ("c", 3)):
        write_record(tmp_path / name, row(number))
    assert main(["--report", str(tmp_path / "a"), str(tmp_path / "c")]) == 0
    out = capfd.readouterr().out
    assert "| 1   |" in out and "| 3   |" in out and "| 2   |" not in out
    assert main(["--report"]) == 2 and "--report results: there is no such folder" in capfd.readouterr().err
    assert main(["--report", "results.csv"]) == 2
    assert "results.csv of earlier versions is not read" in capfd.readouterr().err
    assert main(["--report", str(tmp_path / "a"), "--write", "x.txt"]) == 2
    assert '"x.txt" does not end in .html, .md, .csv, .tex, .png, .pdf, .svg' in capfd.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["--report", str(tmp_path / "empty")]) == 0 and capfd.readouterr().out == "There are no runs.\n"


def test_a_report_of_the_whole_table_is_quick(tmp_path, capsys):
    for record in (row(n, range(n, n + 30), seed=seed) for n in ROWS for seed in range(5)):
        write_record(tmp_path, record)
    begin = time.process_time()  # whatever else the machine does
    assert main(["--report", str(tmp_path), "--write", str(tmp_path / "page.html")]) == 0
    assert time.process_time() - begin < 2 and capsys.readouterr().err == ""
