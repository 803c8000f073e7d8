"""Linear models on words and letters, on the splits of the runs."""

import importlib.util
import os
from pathlib import Path

import pandas as pd
import pytest
from helpers import records_in

from additional_experiments import main
from runner.results.results_file import read_records


def test_baselines_of_own_data(data_dir, capfd):
    assert main(["--baseline", "--data_dir", str(data_dir)]) == 0
    out, err = capfd.readouterr()
    assert err == "" and out.count("Test errors: ") == 2 and out.count("| Baseline | Training acc |") == 2
    assert "| linear SVM on 2 to 5 letters (TF-IDF) | 100.00% |" in out
    first, second = records_in()
    assert first["configuration"].startswith("logistic regression on words (TF-IDF), own data ")
    assert first["model_size"] == first["weights"] == "" and first["seed"] == "123"
    records, damaged = read_records("results.csv")
    assert damaged == []
    for record in records:
        for split, n in (("train", 43), ("validation", 9), ("test", 17)):
            assert record.confusions[split].accuracy == getattr(record, split) and getattr(record, split).total == n


def test_more_classes_and_messages_without_label(data_dir, capfd):
    for split in ("train", "validation", "test"):
        frame = pd.read_csv(data_dir / f"{split}.csv")
        frame["Label"] = [(-100, 0, 1, 2)[i % 4] for i in range(len(frame))]
        frame.to_csv(data_dir / f"{split}.csv", index=None)
    assert main(["--baseline", "--data_dir", str(data_dir)]) == 0
    assert "Test errors:\n  label  called 0  called 1  called 2" in capfd.readouterr().out
    records, _ = read_records("results.csv")
    assert [record.test.total for record in records] == [12, 12]


def test_baselines_stand_in_the_report(data_dir, options, capfd):
    assert main(options) == 0
    assert main(["--baseline", "--data_dir", str(data_dir), "--quiet"]) == 0
    out, err = capfd.readouterr()
    assert out.splitlines()[-2].startswith("| logistic regression") and err == ""
    assert main(["--report", "--report_page", "page.html"]) == 0
    assert "| linear SVM on 2 to 5 letters (TF-IDF), own data " in capfd.readouterr().out
    page = Path("page.html").read_text()
    assert "Baselines: " in page or "linear SVM" in page


def test_messages_without_a_word_are_refused(tmp_path, capfd):
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.csv").write_text("Label,Text\n0,!\n1,?\n")
    assert main(["--baseline", "--data_dir", str(tmp_path)]) == 2
    assert capfd.readouterr().err.startswith("error: a baseline cannot be trained on these messages: ")


def test_without_scikit_learn(monkeypatch, capfd):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find_spec(name))
    assert main(["--baseline"]) == 2
    told = "error: --baseline needs scikit-learn, which is not installed: pip install scikit-learn\n"
    assert capfd.readouterr().err == told


def test_options_of_gpt_2_are_refused(capfd):
    assert main(["--baseline", "--row", "3"]) == 2
    assert capfd.readouterr().err == "error: --row cannot be combined with --baseline, which trains no GPT-2\n"


def test_figures_on_the_sample(capfd):
    """Measured once with scikit-learn as pinned; a change of either is to be noticed."""
    assert main(["--baseline", "--dataset", "sample", "--quiet"]) == 0
    records, _ = read_records("results.csv")
    assert [(r.train.correct, r.validation.correct, r.test.correct) for r in records] == SAMPLE_FIGURES


SAMPLE_FIGURES = [(826, 116, 230), (840, 116, 235)]  # of 840, 120 and 240


@pytest.mark.skipif("COLLECTION_DIR" not in os.environ, reason="needs the collection: COLLECTION_DIR=folder")
def test_figures_on_the_collection():
    """94.63% and 95.33% with words, 97.99% and 97.67% with letters."""
    assert main(["--baseline", "--data_dir", os.environ["COLLECTION_DIR"], "--quiet"]) == 0
    words, letters = read_records("results.csv")[0]
    assert (words.validation.correct, words.test.correct) == (141, 286)
    assert (letters.validation.correct, letters.test.correct) == (146, 293)
