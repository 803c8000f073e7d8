"""Predictions for single messages as CSV, for a spreadsheet or pandas (`--predictions`, `--classify FILE.csv`)."""

import csv

import pandas as pd

from runner.files import write_bytes


def predictions_table(texts, labels, probabilities, class_names):
    """Return a DataFrame with number, label, predicted label, probability of each class, and text of n messages.

    `probabilities` (n, K) are those of the K classes. Messages are counted from 0, as in the record of a run.
    """
    columns = dict(number=range(len(texts)), label=labels)
    columns |= dict(predicted=[class_names[k] for k in probabilities.argmax(-1).tolist()])
    columns |= {f"probability_{name}": probabilities[:, k].tolist() for k, name in enumerate(class_names)}
    return pd.DataFrame(columns | dict(text=texts))


def to_csv(table):
    """Return a table as CSV in which all texts have quotes: some contain separators or line breaks."""
    return table.to_csv(index=False, float_format="%.6f", quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")


def write_predictions(path, data, probabilities):
    """Write a table for these splits of a Dataset, {split: probabilities (n, K)}, whole or not at all.

    The byte order mark tells Excel that it is UTF-8. Raises OSError.
    """
    tables = []
    for split, of_split in probabilities.items():
        codes = data.splits[split]["Label"]
        labels = [data.class_names[code] if code >= 0 else "" for code in codes]
        table = predictions_table(data.splits[split]["Text"].tolist(), labels, of_split, data.class_names)
        table.insert(0, "split", split)
        tables.append(table)
    write_bytes(path, to_csv(pd.concat(tables)).encode("utf-8-sig"))
