"""Linear models on words and letters, on the splits of the runs."""

import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest

from additional_experiments import main
from runner.results.baseline import evaluate
from runner.results.records import read_records


def test_baselines_of_own_data(data_dir, options, capfd):
    assert main(["--baseline", "--data_dir", str(data_dir), "--note", "here"]) == 0
    out, err = capfd.readouterr()
    assert err == "" and out.count("Test errors: ") == 2 and out.count("| Baseline | Training acc |") == 2
    assert "\nTraining on 43 messages: linear SVM on 2 to 5 letters (TF-IDF)\n" in out
    assert "| linear SVM on 2 to 5 letters (TF-IDF) | 100.00% |" in out
    for record in read_records(["results"])[0]:
        assert record.is_baseline and record.note == "here"
        assert [record.train.total, record.validation.total, record.test.total] == [43, 9, 17]
    assert main(options) == 0 and main(["--report"]) == 0
    assert "linear SVM on 2 to 5 letters (TF-IDF), own data " in capfd.readouterr().out


def test_more_classes_and_messages_without_label(data_dir, capfd):
    for split in ("train", "validation", "test"):
        frame = pd.read_csv(data_dir / f"{split}.csv")
        frame["Label"] = [(-100, 0, 1, 2)[i % 4] for i in range(len(frame))]
        frame.to_csv(data_dir / f"{split}.csv", index=None)
    assert main(["--baseline", "--data_dir", str(data_dir)]) == 0
    out = capfd.readouterr().out
    assert "Test errors: " in out and "Test macro-averaged F1: " in out
    assert [record.test.total for record in read_records(["results"])[0]] == [12, 12]


def test_messages_without_a_word_are_one_line(data_dir, capfd):
    for split in ("train", "validation", "test"):
        Path(data_dir, f"{split}.csv").write_text("Label,Text\n0,!\n1,??\n")
    assert main(["--baseline", "--data_dir", str(data_dir)]) == 2
    err = capfd.readouterr().err.splitlines()
    assert err[-1].startswith("error: --baseline: the training messages have no word ")
    assert not any("Traceback" in line for line in err)


def test_the_confidence_of_more_classes_is_the_largest_margin(recwarn):
    """And what scikit-learn warns of, such as a fit that has not converged, does not reach the user."""
    margins, predicted = np.array([[3.0, 1.0, 2.0], [0.5, -1.0, 0.0]]), np.zeros(2, dtype=int)
    fit = Mock(side_effect=lambda *_: warnings.warn("not converged"))
    model = SimpleNamespace(fit=fit, predict=lambda _: predicted, decision_function=lambda _: margins)
    split = pd.DataFrame(dict(Text=["a", "b"], Label=[1, 2]))
    found = evaluate(model, dict(train=split), 3)["train"].mistakes
    assert [(mistake.predicted, mistake.confidence) for mistake in found] == [(0, 3.0), (0, 0.5)]
    assert fit.called and not recwarn.list


def test_options_of_gpt_2_are_refused(capfd):
    assert main(["--baseline", "--row", "3"]) == 2
    assert capfd.readouterr().err == "error: --row cannot be combined with --baseline, which trains no GPT-2\n"


def test_figures_on_the_sample():
    """Measured once with scikit-learn as pinned; a change of either is to be noticed."""
    assert main(["--baseline", "--dataset", "sample", "--quiet"]) == 0
    found = [(r.train.correct, r.validation.correct, r.test.correct) for r in read_records(["results"])[0]]
    assert sorted(found) == [(826, 116, 230), (840, 116, 235)]  # of 840, 120 and 240
    assert {len(record.duplicates["test"].exact) for record in read_records(["results"])[0]} == {22}


@pytest.mark.skipif("COLLECTION_DIR" not in os.environ, reason="needs the collection: COLLECTION_DIR=folder")
def test_figures_on_the_collection():
    """94.63% and 95.33% with words, 97.99% and 97.67% with letters; 97.18% without the 52 similar messages."""
    assert main(["--baseline", "--data_dir", os.environ["COLLECTION_DIR"], "--quiet"]) == 0
    letters, words = sorted(read_records(["results"])[0], key=lambda record: record.configuration)
    assert (words.validation.correct, words.test.correct) == (141, 286)
    assert (letters.validation.correct, letters.test.correct) == (146, 293)
    assert (len(letters.duplicates["test"].exact), len(letters.duplicates["test"].similar)) == (36, 52)
    assert (letters.unseen.correct, letters.unseen.total) == (241, 248)
