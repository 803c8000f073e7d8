"""The fast path compared with the plain one, row by row, in one process: `python tests/benchmark.py --help`.

The plain path (plain.py) runs a few training steps and a few evaluation batches, and its seconds are extrapolated
to a whole run: 5 epochs, an evaluation of 10 batches every 50 steps and after every epoch, all messages at the
end. The fast path runs whole, or, with --fast_steps N, is extrapolated from N training steps, the features of their
messages and their evaluation. What is extrapolated is marked with ~.

Floating-point operations are those of the matrix products: of the plain path all that it does, of the fast path
what the loss needs. The share is the fast path's operations per second over the machine's own float32 product peak
(with bf16: bfloat16), measured just before. No number of this file is asserted by a test.

With --sitting, whole commands run one after the other, each row without a cache of frozen features and with one that
is empty at first, and the first row with it once more at the end.

With --classify, all messages are classified once by a classifier in memory, as by the program's option of this name,
and once by the pipeline of transformers with its export.
"""

import argparse
import json
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

import additional_experiments as ae
from gpt_download import Weights
from runner.console import Console
from runner.data import datasets
from runner.data.features import FrozenFeatures
from runner.machine.devices import describe_device, peak_memory, resolve_device, set_precision
from runner.saved.checkpoints import Checkpoint
from runner.saved.classifiers import SavedClassifier

PLAIN_STEPS, PLAIN_EVALUATIONS = 3, 4


def synchronize(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def seconds(device, function, *arguments):
    synchronize(device)
    start = time.perf_counter()
    function(*arguments)
    synchronize(device)
    return time.perf_counter() - start


def product_peak(device, precision):
    """Floating-point operations per second of a matrix product, the best of ten."""
    n = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return 2 * n**3 / min(seconds(device, torch.mm, a, b) for _ in range(10))


# --- operations ---


def block_operations(D, T, causal, queries=None):
    """Of one block's forward pass over T tokens: (linear layers, attention), for all queries or for one."""
    tokens = T if queries is None else queries
    linear = 2 * D * D * (2 * T + 2 * tokens + 8 * tokens)
    pairs = T * (T + 1) / 2 if causal and queries is None else tokens * T
    return linear, 4 * D * pairs


def keyless_block_operations(D, T, n_heads):
    """Of the last block with one query and no keys and values: query, fold, W_value, output, feed-forward; products."""
    return 2 * D * D * (4 + 8), 4 * n_heads * D * T


def times(operations, linear, attention):
    return operations[0] * linear + operations[1] * attention


def message_operations(experiment, T, fast, n_frozen):
    """(frozen part, one prediction, one training pass) of a message with T tokens in this path.

    A training pass is the forward one, the gradients with respect to the weights that are trained, and those with
    respect to the inputs wherever something before them is trained.
    """
    cfg = experiment.config
    D, L = cfg.emb_dim, cfg.n_layers
    layers = experiment.trainable_layers
    first_trained = {"last_layer": L, "last_block": L - 1, "last_two_blocks": L - 2}.get(layers, 0)
    one_query = fast and not experiment.average_embeddings
    frozen = predicted = trained = 0
    for number in range(L):
        last = number == L - 1
        if last and one_query and first_trained == L - 1:
            operations = keyless_block_operations(D, T, cfg.n_heads)
        else:
            # The plain path scores every pair, and masks afterwards.
            operations = block_operations(D, T, cfg.causal and fast, 1 if last and one_query else None)
        forward = times(operations, 1, 1)
        if fast and number < n_frozen:
            frozen += forward
            continue
        predicted += forward
        if number < first_trained:
            trained += forward
        elif layers.startswith("lora"):
            rank = 2 * experiment.lora_rank * D * T * 18  # A and B of six layers: in + out is 18 D together
            predicted += rank
            trained += times(operations, 2, 3) + 3 * rank
        else:
            trained += times(operations, 2 if number == first_trained and number > 0 else 3, 3)
    return frozen, predicted, trained


def operations(experiment, messages, token_lists, max_tokens, n_frozen):
    """Of a whole run: (what the fast path needs, what the plain path does)."""
    predicted, trained, _ = counts(experiment, messages)
    lengths = [length for part in messages.values() for length in part.lengths.tolist()]
    needed = sum(message_operations(experiment, length, True, n_frozen)[0] for length in lengths)
    plainly, n = 0, len(token_lists)
    # The training messages stand for all that are predicted.
    for length, tokens in zip(messages["train"].lengths.tolist(), token_lists, strict=True):
        _, predict, train = message_operations(experiment, length, True, n_frozen)
        needed += (predicted * predict + trained * train) / n
        T = min(len(tokens), max_tokens) if experiment.no_padding else max_tokens
        _, predict, train = message_operations(experiment, T, False, 0)
        plainly += (predicted * predict + trained * train) / n
    return needed, plainly


# --- the two paths ---


def counts(experiment, messages):
    """How many messages a whole run predicts and trains on, and how many batches it trains on."""
    n = {split: len(part) for split, part in messages.items()}
    steps = n["train"] // experiment.batch_size * experiment.num_epochs
    evaluations = -(-steps // ae.EVALUATE_EVERY) + experiment.num_epochs
    predicted = evaluations * 2 * ae.EVALUATE_BATCHES * experiment.batch_size + sum(n.values())
    return predicted, steps * experiment.batch_size, steps


def time_plain(classifier, experiment, token_lists, max_tokens, messages, device):
    """Seconds of a whole plain run, extrapolated from some of its steps and evaluations."""
    optimizer = torch.optim.AdamW([p for p in classifier.parameters() if p.requires_grad], lr=5e-5, weight_decay=0.1)
    predicted, _, steps = counts(experiment, messages)
    B = experiment.batch_size
    n_steps = PLAIN_STEPS if B > 1 else 8 * PLAIN_STEPS  # single messages differ in length, so more of them
    labels = messages["train"].labels.to(device)
    order = torch.randperm(len(token_lists), generator=torch.Generator().manual_seed(1)).tolist()

    def logits(step):
        chosen = [order[i % len(order)] for i in range(step * B, (step + 1) * B)]
        return plain.logits(classifier, experiment, [token_lists[i] for i in chosen], max_tokens), labels[chosen]

    def train_step(step):
        F.cross_entropy(*logits(step)).backward()
        if (step + 1) % experiment.accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def predict(step):
        logits(step)

    train_step(0), predict(0)
    per_step = sum(seconds(device, train_step, 1 + step) for step in range(n_steps)) / n_steps
    n_evaluations = PLAIN_EVALUATIONS if B > 1 else 8 * PLAIN_EVALUATIONS
    per_batch = sum(seconds(device, predict, 1 + step) for step in range(n_evaluations)) / n_evaluations
    return per_step * steps + per_batch * predicted / B


class StandardError(Console):
    """Shows the progress of the fast path, but leaves standard output to the table."""

    def print(self, line):
        print(f"    {line}", file=sys.stderr, flush=True)


def compute_features(classifier, messages, experiment, console):
    """The frozen features, which an earlier run has not kept."""
    frozen = FrozenFeatures(
        experiment, ae.RunOptions(feature_cache=""), Weights(experiment.model_size, "random"), console
    )
    return frozen.of(classifier, messages, experiment.seed)


def time_fast(classifier, experiment, messages, fast_steps):
    """Seconds of a whole fast run: all of it, or extrapolated from `fast_steps` training steps and their messages."""
    device, console = classifier.device, StandardError()

    def whole_run():
        inputs = compute_features(classifier, messages, experiment, console)
        state = ae.make_training_state(classifier, experiment)
        ae.fine_tune(classifier, inputs, experiment, state, Checkpoint(ae.RunOptions()), console)

    if fast_steps is None:
        return seconds(device, whole_run)

    predicted, _, steps = counts(experiment, messages)
    n = fast_steps * experiment.batch_size
    part = {split: take(whole, n if split == "train" else 1) for split, whole in messages.items()}
    tokens = [sum(int(split.lengths.sum()) for split in splits.values()) for splits in (messages, part)]
    synchronize(device)
    start = time.perf_counter()
    part = compute_features(classifier, part, experiment, console)
    synchronize(device)
    feature_seconds = (time.perf_counter() - start) * tokens[0] / tokens[1] if classifier.n_frozen_blocks else 0.0

    everything = torch.arange(len(part["train"]))
    ae.predict(classifier, part["train"], everything)
    per_message = seconds(device, ae.predict, classifier, part["train"], everything) / n
    one_epoch = replace(experiment, num_epochs=1)
    state = ae.make_training_state(classifier, one_epoch)
    training = seconds(device, ae.train, classifier, part, one_epoch, state, Checkpoint(ae.RunOptions()), console)
    evaluated = 2 * (min(n, ae.EVALUATE_BATCHES * experiment.batch_size) + 1)  # at step 0 and after the epoch
    evaluated += fast_steps // ae.EVALUATE_EVERY * evaluated // 2
    return feature_seconds + (training - evaluated * per_message) / fast_steps * steps + per_message * predicted


def take(messages, n):
    """The first n of the Messages, as Messages of their own."""
    lengths = messages.lengths[:n]
    return replace(
        messages,
        x=messages.x[: lengths.sum()],
        lengths=lengths,
        positions=messages.positions[:n],
        labels=messages.labels[:n],
    )


def measure(number, arguments):
    options = ["--row", str(number), "--weights", "random", "--features", arguments.features]
    options += ["--device", arguments.device, "--precision", arguments.precision, "--data_dir", arguments.data_dir]
    if arguments.model_size:
        options += ["--model_size", arguments.model_size]
    options += arguments.options.split()
    experiment, *_ = ae.parse_args(options)
    if arguments.dataset == "sample":
        experiment = replace(experiment, dataset="sample")
    device = resolve_device(experiment.device)
    set_precision(experiment.precision, device)
    splits, _ = datasets.load_splits(experiment.data_dir, experiment.dataset)
    tokenizer = ae.load_vocabulary()
    messages, max_tokens, _ = ae.encode(tokenizer, splits, experiment)
    token_lists = tokenizer.encode_ordinary_batch(list(splits["train"]["Text"]))

    peak = product_peak(device, experiment.precision)
    classifier = ae.build_classifier(experiment, n_classes=2).to(device)
    ae.optimize_frozen_blocks(classifier)
    fast = time_fast(classifier, experiment, messages, arguments.fast_steps)
    peak_memory_gb = peak_memory(device) / 1e9  # of the process so far, which is why the plain path comes later
    classifier = ae.build_classifier(experiment, n_classes=2).to(device)
    slow = time_plain(classifier, replace(experiment, precision="fp32"), token_lists, max_tokens, messages, device)

    needed, plainly = operations(experiment, messages, token_lists, max_tokens, classifier.n_frozen_blocks)
    return {
        "row": number,
        "options": arguments.options,
        "model": experiment.model_size,
        "device": describe_device(device),
        "precision": experiment.precision,
        "plain_seconds": slow,
        "fast_seconds": fast,
        "fast_extrapolated": arguments.fast_steps is not None,
        "ratio": slow / fast,
        "plain_tflop": plainly / 1e12,
        "fast_tflop": needed / 1e12,
        "peak_gflops": peak / 1e9,
        "share_of_peak": needed / fast / peak,
        "peak_memory_gb": peak_memory_gb,
    }


# --- a trained classifier ---


def classify(arguments):
    """Print the messages a second of this program and of transformers."""
    from transformers import pipeline

    options = ["--trainable_token_pos=flexible", "--weights=random", f"--data_dir={arguments.data_dir}"]
    options += [f"--model_size={arguments.model_size}"] if arguments.model_size else []
    experiment, *_ = ae.parse_args([*options, f"--device={arguments.device}", *arguments.options.split()])
    splits, _ = datasets.load_splits(experiment.data_dir, arguments.dataset)
    texts = [text for frame in splits.values() for text in frame["Text"]]
    experiment = replace(experiment, context_length=120)
    device = resolve_device(experiment.device)
    print(f"{experiment.model_size}, {len(texts):,} messages\n| | messages/s | peak GFLOP/s |\n| --- | --- | --- |")

    with tempfile.TemporaryDirectory() as folder:
        classifier = ae.build_classifier(experiment, 2)
        record = dict(data="sample", history=dict(lines=[]))
        saved = SavedClassifier(asdict(experiment), 120, ["ham", "spam"], "", record)
        ae.export_classifier(f"{folder}/out", classifier, saved)
        ae.optimize_frozen_blocks(classifier.to(device)).eval()
        peak = product_peak(device, "fp32")
        start, logits = time.perf_counter(), []
        for first in range(0, len(texts), 1000):
            logits.append(ae.predict_texts(classifier, experiment, texts[first : first + 1000]))
        found = torch.cat(logits).argmax(-1).tolist()
        ours = len(texts) / (time.perf_counter() - start)
        print(f"| this program | {ours:.1f} | {peak / 1e9:.0f} |", flush=True)

        model = pipeline("text-classification", model=f"{folder}/out", truncation=True, device=device)
        peak = product_peak(device, "fp32")
        start = time.perf_counter()
        answers = [answer["label"] for answer in model(texts, batch_size=64)]
        theirs = len(texts) / (time.perf_counter() - start)
    print(f"| transformers | {theirs:.1f} | {peak / 1e9:.0f} |")
    n_equal = sum(answer == ("ham", "spam")[label] for answer, label in zip(answers, found, strict=True))
    print(f"{ours / theirs:.2f} times; {n_equal:,} of {len(texts):,} labels are the same")


# --- the table in one sitting ---


def sitting(rows, arguments):
    """Print the seconds of whole commands without and with a cache, and what became of the frozen features."""
    given = [f"--{name}={getattr(arguments, name)}" for name in ("device", "precision", "data_dir", "features")]
    given += [f"--model_size={arguments.model_size}"] if arguments.model_size else []
    given += [*arguments.options.split(), "--weights=random", "--results="]
    print("| row | without s | with s | peak GFLOP/s | |\n| --- | --- | --- | --- | --- |")
    totals = [0.0, 0.0]
    with tempfile.TemporaryDirectory() as cache:
        for number, caches in [*((row, ("", cache)) for row in rows), (rows[0], (cache,))]:
            peak = product_peak(resolve_device(arguments.device), arguments.precision)
            taken = []
            for folder in caches:
                start = time.perf_counter()
                command = [sys.executable, ae.__file__, f"--row={number}", f"--feature_cache={folder}", *given]
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                taken.append(time.perf_counter() - start)
            told = re.search(r"tokens, (.*)", out)[1].replace(f"{cache}/", "")
            if len(taken) == 2:
                totals = [total + one for total, one in zip(totals, taken, strict=True)]
            cells = ["-"] * (2 - len(taken)) + [f"{one:.1f}" for one in taken]
            print(f"| {number} | {' | '.join(cells)} | {peak / 1e9:.0f} | {told} |", flush=True)
    print(f"| all | {totals[0]:.1f} | {totals[1]:.1f} | | {totals[0] / totals[1]:.2f} times |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1", help="row numbers with commas between them (default: 1)")
    parser.add_argument("--model_size", help="instead of each row's own")
    parser.add_argument("--options", default="", help="further options of the program, in one string, for every row")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "tf32"))
    parser.add_argument("--features", default="auto", choices=("auto", "memory", "disk", "off"))
    parser.add_argument("--dataset", default="uci", choices=("uci", "sample"))
    parser.add_argument("--data_dir", default="sms_spam_collection")
    parser.add_argument("--fast_steps", type=int, help="extrapolate the fast path too, from this many training steps")
    parser.add_argument("--sitting", action="store_true", help="whole commands, without and with a cache of features")
    parser.add_argument("--classify", action="store_true", help="messages a second, with those of transformers")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()
    if arguments.classify:
        classify(arguments)
        return
    if arguments.sitting:
        sitting([int(number) for number in arguments.rows.split(",")], arguments)
        return

    columns = [
        "row",
        "model",
        "plain s",
        "fast s",
        "ratio",
        "plain TFLOP",
        "fast TFLOP",
        "peak GFLOP/s",
        "share",
        "memory",
    ]
    print("| " + " | ".join(columns) + " |")
    print("| --- " * len(columns) + "|")
    records = []
    for number in map(int, arguments.rows.split(",")):
        record = measure(number, arguments)
        records.append(record)
        about = "~" if record["fast_extrapolated"] else ""
        print(
            f"| {number} | {record['model']}, {record['precision']} | ~{record['plain_seconds']:.0f} "
            f"| {about}{record['fast_seconds']:.0f} | {record['ratio']:.2f} | {record['plain_tflop']:.1f} "
            f"| {record['fast_tflop']:.1f} | {record['peak_gflops']:.0f} | {record['share_of_peak']:.0%} "
            f"| {record['peak_memory_gb']:.2f} GB |",
            flush=True,
        )
        if arguments.json:
            arguments.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
