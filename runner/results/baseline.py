"""`--baseline`: what linear models on words and on letters make of the same splits, in a second.

scikit-learn is imported only here.
"""

import time
import uuid
from dataclasses import asdict

import numpy as np

from runner.console import Console, describe_data
from runner.data.datasets import SPLITS, class_names, count_classes, load_splits, sha256_of_splits
from runner.data.features import CPU
from runner.files import UserError
from runner.machine.devices import peak_memory, reset_peak_memory
from runner.results.accuracy import Confusion, describe_mistakes
from runner.results.outputs import publish_record
from runner.results.records import Record, made_now


def baselines():
    """{name: a scikit-learn pipeline that has learned nothing yet}."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
    return {
        "logistic regression on words (TF-IDF)": make_pipeline(TfidfVectorizer(), LogisticRegression(max_iter=1000)),
        "linear SVM on 2 to 5 letters (TF-IDF)": make_pipeline(letters, LinearSVC()),
    }


def certainty(model, texts):
    """How certain a model is of each of n texts, (n,): the probability of the likeliest class; without, the margin."""
    if hasattr(model, "predict_proba"):
        return model.predict_proba(texts).max(axis=1)
    margins = model.decision_function(texts)
    return np.abs(margins) if margins.ndim == 1 else margins.max(axis=1)


def run_baselines(experiment, run_options):
    """Train and evaluate each baseline, print its row and append its record: [Record, ...].

    Of `experiment` only the data are read. Errors: those of the data.
    """
    console = Console(run_options.quiet)
    splits, data_name = load_splits(experiment.data_dir, experiment.dataset, console.quiet)
    n_classes = count_classes(splits, experiment.ignore_index, experiment.data_dir)
    names, sha256 = class_names(data_name, n_classes), sha256_of_splits(splits)
    console.info(describe_data(data_name, splits))
    finished = []
    for name, model in baselines().items():
        console.info(f"\n{name}")
        known_above, start = reset_peak_memory(CPU), time.perf_counter()
        confusions = evaluate(model, splits, n_classes)
        seconds = time.perf_counter() - start
        for split, confusion in confusions.items():
            console.info(f"{SPLITS[split]} accuracy: {confusion.accuracy.in_full}")
        measure = "" if hasattr(model, "predict_proba") else " (with their margins)"
        for line in describe_mistakes(confusions["test"], names, list(splits["test"]["Text"]), measure):
            console.info(line)
        record = make_record(name, experiment, data_name, sha256, confusions, seconds, peak_memory(CPU, known_above))
        cells = {f"{title} acc": getattr(record, split) for split, title in SPLITS.items()}
        console.table_row({"Baseline": name, **cells, "Time": f"{seconds:.1f} s"})
        publish_record(record, run_options.results_file, console)
        finished.append(record)
    console.close()
    return finished


def evaluate(model, splits, n_classes):
    """{split: Confusion} of a model that is trained here on the training messages that have a label."""
    labelled = splits["train"][splits["train"]["Label"] >= 0]
    try:
        model.fit(list(labelled["Text"]), labelled["Label"].to_numpy())
    except ValueError as error:  # an empty vocabulary
        raise UserError(f"a baseline cannot be trained on these messages: {error}") from None
    confusions = {}
    for split, frame in splits.items():
        texts = list(frame["Text"])
        called = model.predict(texts).tolist()
        numbers, labels = range(len(texts)), frame["Label"].tolist()
        confusions[split] = Confusion.of(numbers, labels, called, certainty(model, texts).tolist(), n_classes)
    return confusions


def make_record(name, experiment, data_name, sha256, confusions, seconds, peak):
    """The Record of a baseline; settings that it has none of are empty."""
    settings = dict.fromkeys(asdict(experiment), "")
    ours = {name: getattr(experiment, name) for name in ("seed", "ignore_index", "data_dir", "dataset")}
    return Record(
        run=uuid.uuid4().hex,
        **made_now(),
        row=None,
        configuration=name + {"uci": "", "sample": ", sample data", "own": f", own data {sha256[:8]}"}[data_name],
        settings=settings | ours | dict(device="cpu", precision="fp32"),
        weights_sha256="",
        data=data_name,
        data_sha256=sha256,
        tokens_per_message=None,
        **{split: confusion.accuracy for split, confusion in confusions.items()},
        minutes=seconds / 60,
        seconds=seconds,
        peak_memory_gb=peak / 1e9 if peak else None,
        device_name="CPU",
        confusions=confusions,
    )
