"""Train linear models on words and on letters of the same splits, in a second (`--baseline`)."""

import time
import warnings
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

from runner.console import Console, describe_data
from runner.data.datasets import SPLITS, load
from runner.files import UserError
from runner.results.accuracy import Confusion, describe_accuracies, describe_mistakes
from runner.results.records import file_name, new_record, write_record


def run_baselines(experiment, run_options):
    """Train and evaluate each baseline on the data of `experiment`, print its row and write its Record.

    Raises UserError for training messages without words.
    """
    console = Console(run_options.quiet)
    data = load(experiment)
    console.info(describe_data(data))
    for warning in data.warnings:
        console.warning(warning)
    letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
    models = {
        "logistic regression on words (TF-IDF)": make_pipeline(TfidfVectorizer(), LogisticRegression(max_iter=1000)),
        "linear SVM on 2 to 5 letters (TF-IDF)": make_pipeline(letters, LinearSVC()),
    }
    of_data = {
        "uci": "",
        "sample": ", sample data",
        "own": f", own data {data.sha256[:8]} ({Path(experiment.data_dir).resolve().name})",
    }[data.name]
    for name, model in models.items():
        console.info(f"\nTraining on {len(data.splits['train']):,} messages: {name}")
        start = time.perf_counter()
        confusions = evaluate(model, data.splits, len(data.class_names))
        seconds = time.perf_counter() - start
        record = new_record(
            data,
            confusions,
            run_id=file_name(name, dict(baseline=name, data=data.sha256)),
            configuration=name + of_data,
            minutes=seconds / 60,
            seconds=seconds,
            note=run_options.note,
            is_baseline=True,
        )
        console.info("\n".join([*describe_accuracies(record), *describe_mistakes(record)]))
        cells = {f"{title} acc": getattr(record, split) for split, title in SPLITS.items()}
        console.table_row({"Baseline": name, **cells, "Unseen": record.unseen, "Time": f"{seconds:.1f} s"})
        console.write_output("the record", run_options.results, write_record, record)
    console.close()


def evaluate(model, splits, n_classes):
    """Train a model on the training messages that have a label, and return {split: Confusion}. Raises UserError."""
    labelled = splits["train"][splits["train"]["Label"] >= 0]
    try:
        with warnings.catch_warnings(action="ignore"):  # that it has not converged shows in its accuracies
            model.fit(list(labelled["Text"]), labelled["Label"].to_numpy())
    except ValueError as error:
        if "empty vocabulary" not in str(error):
            raise
        problem = "the training messages have no word of two letters or digits"
        raise UserError(f"--baseline: {problem}; a linear model on words needs some") from None
    confusions = {}
    for split, frame in splits.items():
        texts = list(frame["Text"])
        margins = model.decision_function(texts)  # (n, K), of two classes (n,)
        margins = np.abs(margins) if margins.ndim == 1 else margins.max(axis=1)
        columns = range(len(texts)), frame["Label"].tolist(), model.predict(texts).tolist(), margins.tolist()
        confusions[split] = Confusion.from_predictions(*columns, n_classes)
    return confusions
