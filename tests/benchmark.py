"""The fast path compared with the plain one, row by row, in one process: `python tests/benchmark.py --help`.

The plain path (plain.py) runs a few training steps and a few evaluation batches, and its seconds are extrapolated to a
whole run: 5 epochs, an evaluation of 10 batches every 50 steps and after every epoch, all messages at the end. The fast
path runs whole, or, with --fast_steps N, is extrapolated from N training steps, the features of their messages and
their evaluation. What is extrapolated is marked with ~. Beside each time stands the machine's own peak in matmuls of
the run's precision, measured just before.

With --sitting, whole commands run one after the other, each row without a cache of frozen features and with one that
is empty at first, and the first row with it once more at the end.

With --classify, all messages are classified once by a classifier in memory, as by the program's option of this name,
and once by the pipeline of transformers with its export.

All other options are the program's, for every row.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import plain
from helpers import QUIET, train_quietly

import additional_experiments as ae
from gpt_download import Weights
from runner.data import datasets
from runner.data.features import FrozenFeatures
from runner.machine.devices import resolve_device, set_precision
from runner.saved.classifiers import SavedClassifier, save_classifier, sha256_of_base
from runner.saved.export import write_export


def experiment_of(*options):
    """Return the Experiment of a command line, and its splits {name: DataFrame}."""
    experiment, *_ = ae.parse_args([*options, "--weights=random"])
    return experiment, datasets.load(experiment).splits


def seconds(device, function, *arguments):
    """Return how long a call takes until the device has finished."""
    synchronize = getattr(torch, device.type).synchronize
    synchronize()
    start = time.perf_counter()
    function(*arguments)
    synchronize()
    return time.perf_counter() - start


def matmul_peak(device, precision):
    """Return the floating-point operations per second of a matmul, the best of ten."""
    n = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return 2 * n**3 / min(seconds(device, torch.mm, a, b) for _ in range(10))


# --- the two paths ---


def counts(experiment, splits):
    """Return how many messages a whole run predicts, and on how many batches it trains."""
    n = {name: len(split) for name, split in splits.items()}
    steps = n["train"] // experiment.batch_size * experiment.num_epochs
    evaluations = -(-steps // ae.EVALUATE_EVERY) + experiment.num_epochs
    predicted = evaluations * 2 * ae.EVALUATE_BATCHES * experiment.batch_size + sum(n.values())
    return predicted, steps


def time_plain(classifier, experiment, token_lists, encoded):
    """Return the seconds of a whole plain run, extrapolated from some of its steps and evaluations."""
    optimizer = torch.optim.AdamW([p for p in classifier.parameters() if p.requires_grad], lr=5e-5, weight_decay=0.1)
    predicted, steps = counts(experiment, encoded.splits)
    B, device = experiment.batch_size, classifier.device
    labels = encoded.splits["train"].labels.to(device)
    order = torch.randperm(len(token_lists), generator=torch.Generator().manual_seed(1)).tolist()

    def logits(step):
        chosen = [order[i % len(order)] for i in range(step * B, (step + 1) * B)]
        return plain.logits(classifier, experiment, [token_lists[i] for i in chosen], encoded.limit), labels[chosen]

    def train_step(step):
        F.cross_entropy(*logits(step)).backward()
        if (step + 1) % experiment.accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()

    def seconds_each(function):
        function(0)
        n = 4 if B > 1 else 32  # single messages differ in length, so more of them
        return sum(seconds(device, function, 1 + step) for step in range(n)) / n

    return seconds_each(train_step) * steps + seconds_each(torch.no_grad()(logits)) * predicted / B


def time_fast(classifier, experiment, encoded, part=None):
    """Return the seconds of a fast run: whole, or extrapolated from a `part` of the EncodedData.

    A part has one message of validation and test, and of training as many as its steps need.
    """
    device, weights = classifier.device, Weights("random")

    def with_features(data):
        features = FrozenFeatures(experiment.features, None, 0, weights, QUIET)
        return replace(data, pool=features.load_or_compute(classifier, data.pool, experiment.seed))

    def whole_run():
        data = with_features(encoded)
        train_quietly(classifier, data, experiment)
        for name, loader in ae.make_loaders(data.splits, experiment.batch_size).items():
            ae.predict_batches(classifier, data, name, loader)

    if part is None:
        return seconds(device, whole_run)

    predicted, steps = counts(experiment, encoded.splits)
    features, n = [], len(part.splits["train"])
    feature_seconds = seconds(device, lambda: features.append(with_features(part)))
    feature_seconds *= len(encoded.pool.x) / len(part.pool.x) * (classifier.n_frozen_blocks > 0)

    [part], indices = features, part.splits["train"].indices
    ae.predict(classifier, part.pool, indices)
    per_message = seconds(device, ae.predict, classifier, part.pool, indices) / n
    training = seconds(device, train_quietly, classifier, part, replace(experiment, num_epochs=1))
    n_steps = n // experiment.batch_size
    evaluated = 2 * (min(n, ae.EVALUATE_BATCHES * experiment.batch_size) + 1)  # at step 0 and after the epoch
    evaluated += n_steps // ae.EVALUATE_EVERY * evaluated // 2
    return feature_seconds + (training - evaluated * per_message) / n_steps * steps + per_message * predicted


def measure(row, fast_steps, options):
    """Print the line of a row: seconds of the plain and of the fast path."""
    experiment, splits = experiment_of(f"--row={row}", *options)
    device, _ = resolve_device(experiment.device)
    set_precision(experiment.precision, device)
    tokenizer, part = ae.load_vocabulary(), None
    encoded = ae.encode(tokenizer, splits, experiment)
    if fast_steps:
        sizes = dict.fromkeys(splits, 1) | dict(train=fast_steps * experiment.batch_size)
        frames = {name: frame.head(sizes[name]) for name, frame in splits.items()}
        part = ae.encode(tokenizer, frames, replace(experiment, context_length=encoded.limit))
    token_lists = tokenizer.encode_ordinary_batch(list(splits["train"]["Text"]))

    peak = matmul_peak(device, experiment.precision)
    classifier = ae.build_classifier(experiment, n_classes=2).to(device)
    slow = time_plain(classifier, replace(experiment, precision="fp32"), token_lists, encoded)
    classifier = ae.place(ae.build_classifier(experiment, n_classes=2), device)
    fast, about = time_fast(classifier, experiment, encoded, part), "~" * bool(part)
    figures = f"~{slow:.0f} | {about}{fast:.0f} | {slow / fast:.2f} | {peak / 1e9:.0f}"
    print(f"| {row} | {experiment.model_size}, {experiment.precision} | {figures} |", flush=True)


# --- a trained classifier ---


def classify(options):
    """Print the messages a second of this program and of transformers."""
    from transformers import pipeline

    experiment, splits = experiment_of("--trainable_token_pos=flexible", "--context_length=120", *options)
    texts = [text for frame in splits.values() for text in frame["Text"]]
    device, _ = resolve_device(experiment.device)
    print(f"{experiment.model_size}, {len(texts):,} messages\n| | messages/s | peak GFLOP/s |\n| --- | --- | --- |")

    with tempfile.TemporaryDirectory() as folder:
        classifier, path = ae.build_classifier(experiment, 2), f"{folder}/trained"
        base = sha256_of_base(Weights("random"), classifier)
        saved = SavedClassifier(asdict(experiment), 120, ["ham", "spam"], base, "", "sample", [])
        save_classifier(path, saved, {name: p for name, p in classifier.named_parameters() if p.requires_grad})
        write_export(f"{folder}/out", classifier, saved)
        trained = ae.load_classifier(path, device=device.type)
        trained.predict(texts[:8])  # the first call compares the device with the CPU
        peak = matmul_peak(device, "fp32")
        start = time.perf_counter()
        found, _ = trained.predict(texts)
        ours = len(texts) / (time.perf_counter() - start)
        print(f"| this program | {ours:.1f} | {peak / 1e9:.0f} |", flush=True)

        model = pipeline("text-classification", model=f"{folder}/out", truncation=True, device=device)
        peak = matmul_peak(device, "fp32")
        start = time.perf_counter()
        answers = [answer["label"] for answer in model(texts, batch_size=64)]
        theirs = len(texts) / (time.perf_counter() - start)
    print(f"| transformers | {theirs:.1f} | {peak / 1e9:.0f} |")
    n_equal = sum(answer == label for answer, label in zip(answers, found, strict=True))
    print(f"{ours / theirs:.2f} times; {n_equal:,} of {len(texts):,} labels are the same")


# --- the table in one sitting ---


def sitting(rows, options):
    """Print the seconds of whole commands without and with a cache, and what became of the frozen features."""
    print("| row | without s | with s | peak GFLOP/s | |\n| --- | --- | --- | --- | --- |")
    totals, (experiment, _) = [0.0, 0.0], experiment_of(*options)
    with tempfile.TemporaryDirectory() as cache:
        for row, caches in [*((row, ("", cache)) for row in rows), (rows[0], (cache,))]:
            peak = matmul_peak(resolve_device(experiment.device)[0], experiment.precision)
            taken = []
            for folder in caches:
                start = time.perf_counter()
                command = [sys.executable, ae.__file__, f"--row={row}", *options, "--weights=random", "--results="]
                command += [f"--feature_cache={folder}"]
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                taken.append(time.perf_counter() - start)
            told = re.search(r"tokens, (.*)", out)[1].replace(f"{cache}/", "")
            if len(taken) == 2:
                totals = [total + one for total, one in zip(totals, taken, strict=True)]
            cells = ["-"] * (2 - len(taken)) + [f"{one:.1f}" for one in taken]
            print(f"| {row} | {' | '.join(cells)} | {peak / 1e9:.0f} | {told} |", flush=True)
    print(f"| all | {totals[0]:.1f} | {totals[1]:.1f} | | {totals[0] / totals[1]:.2f} times |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1", help="row numbers with commas between them (default: 1)")
    parser.add_argument("--fast_steps", type=int, help="extrapolate the fast path too, from this many training steps")
    parser.add_argument("--sitting", action="store_true", help="whole commands, without and with a cache of features")
    parser.add_argument("--classify", action="store_true", help="messages a second, with those of transformers")
    arguments, options = parser.parse_known_args()
    rows = [int(row) for row in arguments.rows.split(",")]
    if arguments.classify:
        classify(options)
    elif arguments.sitting:
        sitting(rows, options)
    else:
        print("| row | model | plain s | fast s | ratio | peak GFLOP/s |\n| --- | --- | --- | --- | --- | --- |")
        for row in rows:
            measure(row, arguments.fast_steps, options)


if __name__ == "__main__":
    main()
